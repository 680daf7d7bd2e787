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
from dataclasses import dataclass, field
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
        variables: environment variables of its process.
        label: added to the name if entries have the same version of the framework.
    """

    framework: str
    packages: tuple[str, ...]
    sample: bool = False
    variables: dict[str, str] = field(default_factory=dict)
    label: str = ""

    @property
    def name(self) -> str:
        """For example "trl-0.12.2"; the framework's name alone for the environment's own version."""
        name = self.packages[0].replace("==", "-") if self.packages else self.framework
        return f"{name}-{self.label}" if self.label else name


#: transformers and what it pins, of the time of the older frameworks.
TRANSFORMERS_4_46 = ("transformers==4.46.1", "tokenizers==0.20.3", "huggingface-hub==0.36.0")

#: The last transformers 4, with what TRL needs besides.
TRANSFORMERS_4_57 = (
    "transformers==4.57.1",
    "tokenizers==0.22.1",
    "huggingface-hub==0.36.0",
    "datasets==4.0.0",
)

TRL_BEFORE_1 = ("0.13.0", "0.14.0", "0.15.2", "0.16.1", "0.17.0", "0.18.2", "0.19.1", "0.20.0", "0.21.0", "0.22.2", "0.23.1",
                "0.24.0", "0.25.1", "0.26.2", "0.27.2", "0.28.0")  # fmt: skip
#: These run with the environment's transformers.
TRL_SINCE_1 = ("0.29.1", "1.0.0", "1.1.0", "1.2.0", "1.3.0", "1.4.0", "1.5.1", "1.6.0", "1.7.1", "1.8.0", "1.9.2", "1.10.0",
               "1.11.0", "1.12.0", "1.13.0", "1.14.2")  # fmt: skip

ENTRIES = (
    Entry("trl", (), sample=True),
    Entry(
        "trl",
        ("trl==0.12.2", *TRANSFORMERS_4_46, "datasets==4.0.0", "accelerate==1.0.1", "peft==0.12.0"),
        sample=True,
    ),
    *(Entry("trl", (f"trl=={v}", *TRANSFORMERS_4_57), sample=v == "0.24.0") for v in TRL_BEFORE_1),
    *(Entry("trl", (f"trl=={v}",)) for v in TRL_SINCE_1),
    *(
        Entry(
            "axolotl", (f"axolotl=={v}", f"trl=={trl}", "addict==2.4.0", "art==6.5", "fire==0.7.1", "fastcore==1.8.2")
        )
        for v, trl in (("0.17.0", "1.5.1"), ("0.18.0", "1.8.0"), ("0.19.0", "1.9.0"))
    ),
    *(
        Entry("unsloth", ("unsloth==2026.10.9", "unsloth_zoo==2026.10.9", f"trl=={trl}", *more), label=f"trl-{trl}")
        for trl, more in (("0.24.0", TRANSFORMERS_4_57), ("1.12.0", ()), ("1.14.2", ()))
    ),
    # This version has no code for CPUs but Triton kernels.
    Entry("trl", ("trl==1.15.0",), variables={"TRITON_INTERPRET": "1"}),
)


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
    # The folder of the tests comes last: a package may contain a module with the name of one of them.
    path = [ROOT, ROOT / "python", *(folder(package) for package in entry.packages), ROOT / "tests"]
    return os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path)), "HF_HUB_OFFLINE": "1"} | entry.variables


def run(entry: Entry, *options: str) -> dict[str, Any]:
    """What tests/frameworks/compare.py found for an entry.

    Raises:
        RuntimeError: it failed; the text holds the end of its output.
    """
    command = [sys.executable, "-W", "ignore", "-m", "frameworks.compare", entry.framework, *options]
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
