"""The versions of other frameworks that the integrations are tested with, each with the packages that it needs.

    python tests/frameworks/matrix.py install [NAME ...]   install the packages of these entries (all if none is given)
    python tests/frameworks/matrix.py install sample       install what `make test` needs
    python tests/frameworks/matrix.py run [NAME ...]       run these entries and print one JSON object each
    python tests/frameworks/matrix.py write [NAME ...]     measure these entries and renew benchmarks/results/frameworks.json

Every package lies in a folder of its own, .venv/packages/NAME-VERSION, installed without its dependencies. An entry runs in a
process whose PYTHONPATH lists the folders of its packages, before the environment's own packages.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "frameworks.json"


@dataclass(frozen=True)
class Entry:
    """One version of a framework.

    Attributes:
        framework: the module in dpo_kernels.integrations, and the script in tests/frameworks/steps.
        packages: exact versions, the framework first; () for the versions that the environment has.
        sample: whether `make test` runs it; all entries run with the slow tests.
    """

    framework: str
    packages: tuple[str, ...]
    sample: bool = False

    @property
    def name(self) -> str:
        """For example "trl-0.12.2"; the framework's name alone for the environment's own version."""
        return self.packages[0].replace("==", "-") if self.packages else self.framework


#: transformers and what it pins, of the time of the older frameworks.
TRANSFORMERS_4_46 = ("transformers==4.46.3", "tokenizers==0.20.3", "huggingface-hub==0.36.0")

#: TRL builds Liger's loss; 1.12 is the last version that does.
LIGER = (
    Entry("liger", ("liger-kernel==0.8.5", "trl==1.12.0"), sample=True),
    Entry(
        "liger",
        (
            "liger-kernel==0.6.4",
            "trl==0.24.0",
            "transformers==4.57.1",
            "tokenizers==0.22.1",
            "huggingface-hub==0.36.0",
            "datasets==4.0.0",
            "accelerate==1.11.0",
            "peft==0.17.1",
        ),
    ),
)

#: torchtune's recipes import these, and its models need no others.
TORCHTUNE_NEEDS = ("torchao==0.10.0", "omegaconf==2.4.0", "tiktoken==0.9.0", "sentencepiece==0.2.0")
TORCHTUNE = (
    Entry("torchtune", ("torchtune==0.6.1", *TORCHTUNE_NEEDS), sample=True),
    Entry("torchtune", ("torchtune==0.5.0", *TORCHTUNE_NEEDS)),
    Entry("torchtune", ("torchtune==0.4.0", *TORCHTUNE_NEEDS)),
)

ENTRIES = (Entry("trl", (), sample=True), *LIGER, *TORCHTUNE)


def folder(package: str) -> Path:
    """Where a package is installed."""
    return ROOT / ".venv" / "packages" / package.replace("==", "-")


def install(entry: Entry) -> None:
    """Install the packages of an entry that are not installed yet."""
    for package in entry.packages:
        if not folder(package).is_dir():
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder(package))]
            subprocess.run([*pip, package], check=True)


def environment(entry: Entry) -> dict[str, str]:
    """Environment variables of a process that runs an entry."""
    path = [ROOT, ROOT / "python", *(folder(package) for package in entry.packages)]
    return os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path)), "HF_HUB_OFFLINE": "1"}


def run(entry: Entry, *options: str) -> dict[str, Any]:
    """What tests/frameworks/compare.py found for an entry.

    Raises:
        RuntimeError: it failed; the text holds the end of its output.
    """
    command = [sys.executable, "-W", "ignore", "-m", "tests.frameworks.compare", entry.framework, *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment(entry), timeout=900)
    if done.returncode:
        raise RuntimeError(f"{entry.name}: {done.stderr[-4000:]}")
    return {"name": entry.name, **json.loads(done.stdout.splitlines()[-1])}


def main() -> None:
    command, *names = sys.argv[1:] or ["help"]
    sample = names == ["sample"]
    chosen = [e for e in ENTRIES if (e.sample if sample else not names or e.name in names or e.framework in names)]
    if command == "install":
        for entry in chosen:
            install(entry)
    elif command == "run":
        for entry in chosen:
            print(json.dumps(run(entry)))
    elif command == "write":
        found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        for entry in chosen:
            found[entry.name] = run(entry, "--measure")
            # Written after each entry: a run of all takes long.
            RESULTS.write_text(json.dumps(dict(sorted(found.items())), indent=1) + "\n")
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main()
