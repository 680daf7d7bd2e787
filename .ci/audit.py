"""Looks up the locked packages in the public vulnerability database (make audit).

Exit status 1 if one has a known vulnerability. Where the database cannot be reached, that is said, and the status is 0.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

LOCK = Path(__file__).resolve().parent.parent / "requirements-ci.lock"


def main() -> int:
    with tempfile.TemporaryDirectory() as scratch:
        answer = Path(scratch) / "answer.json"
        command = [sys.executable, "-m", "pip_audit", "--no-deps", "--disable-pip", "--requirement", str(LOCK)]
        done = subprocess.run(
            [*command, "--format", "json", "--output", str(answer)], capture_output=True, text=True, check=False
        )
        if not answer.is_file():
            print(f"audit: no package looked up: {(done.stderr.strip().splitlines() or ['no output'])[-1]}")
            return 0
        packages = json.loads(answer.read_text())["dependencies"]
    known = [package for package in packages if "skip_reason" not in package]
    print(f"audit: {len(known)} of {len(packages)} packages looked up; the database knows nothing of the others")
    for package in known:
        for found in package["vulns"]:
            print(
                f"  {package['name']} {package['version']}: {found['id']}, fixed in {found['fix_versions'] or 'no version'}"
            )
    return int(any(package["vulns"] for package in known))


if __name__ == "__main__":
    sys.exit(main())
