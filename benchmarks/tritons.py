"""The versions of Triton that the kernels are tested with: those that supported torch versions bring, and the newest.

    python -m benchmarks.tritons install [VERSION ...]   install these into .venv/triton-VERSION; all if none is given
    python -m benchmarks.tritons install oldest          the one that `make test` needs
    python -m benchmarks.tritons figures [VERSION ...]   rewrite benchmarks/results/machine_code.json; all if none is given

torch decides which Triton a user has, and so which compiler translates our kernels: torch 2.10 and 2.11 bring 3.6.0,
torch 2.12 brings 3.7.0. Each version must produce the machine code on which the speed argument rests. `OLDER` is the only
list: the Makefile installs from it, the tests compile with it, and pyproject's `dev` extra asks for its first entry or
newer. The newest Triton is installed in the environment itself.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

#: Versions older than the installed one, oldest first. All test runs compile with the oldest, slow tests with all.
OLDER = ("3.6.0", "3.7.1", "3.8.0")

ROOT = Path(__file__).resolve().parent.parent


def folder(version: str) -> Path:
    """Where `make setup` puts an older Triton."""
    return ROOT / ".venv" / f"triton-{version}"


def installed() -> str:
    """Version of the environment's own Triton."""
    return importlib.metadata.version("triton")


def environment(version: str | None = None, **extra: str) -> dict[str, str]:
    """Environment variables of a process that runs from this tree with Triton `version` (None: the installed one).

    Raises FileNotFoundError if that version is not installed.
    """
    path = [str(ROOT), str(ROOT / "python")]
    if version is not None and version != installed():
        if not (folder(version) / "triton").is_dir():
            raise FileNotFoundError(
                f"Triton {version} is not in {folder(version)}; run: python -m benchmarks.tritons install {version}"
            )
        path.insert(0, str(folder(version)))
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return kept | {"PYTHONPATH": os.pathsep.join(path)} | extra


def install(version: str) -> None:
    """Install one Triton into its folder. PYTHONPATH finds it there, before the environment's own."""
    if (folder(version) / "triton").is_dir():
        return
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder(version))]
    subprocess.run([*pip, f"triton=={version}"], check=True)


def main() -> None:
    command, *versions = sys.argv[1:] or ["help"]
    if command == "install":
        if importlib.util.find_spec("triton") is None:
            print("no Triton for this platform: none is installed")
            return
        for version in versions or OLDER:
            install(OLDER[0] if version == "oldest" else version)
    elif command == "figures":
        from .machine_code import RESULTS

        for version in versions or (*OLDER, installed()):
            inspection = [sys.executable, "-W", "ignore", "-m", "benchmarks.machine_code", "--only", "triton"]
            subprocess.run([*inspection, "--json", str(RESULTS)], check=True, cwd=ROOT, env=environment(version))
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main()
