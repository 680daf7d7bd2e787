"""The versions of other frameworks that the integrations are tested with, each with the packages that it needs.

    python tests/frameworks/matrix.py install [NAME ...]   install the packages of these entries (all if none is given)
    python tests/frameworks/matrix.py install sample       install what `make test` needs
    python tests/frameworks/matrix.py run [NAME ...]       run these entries and print one JSON object each
    python tests/frameworks/matrix.py record [NAME ...]    run these entries and renew benchmarks/results/frameworks.json
    python tests/frameworks/matrix.py write [NAME ...]     the same with time and memory of a step, which takes minutes each

Every package lies in a folder of its own, .venv/packages/NAME-VERSION, installed without its dependencies. An entry runs in a
process whose PYTHONPATH lists the folders of its packages, before the environment's own packages.
"""

from __future__ import annotations

import json
import os
import shutil
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

#: Others, each with the versions that its transformers accepts.
TRANSFORMERS_4_49 = ("transformers==4.49.0", "tokenizers==0.21.0", "huggingface-hub==0.36.0")
TRANSFORMERS_4_51 = ("transformers==4.51.3", "tokenizers==0.21.1", "huggingface-hub==0.36.0")
TRANSFORMERS_4_57 = ("transformers==4.57.1", "tokenizers==0.22.1", "huggingface-hub==0.36.0")
HTTPX = ("httpx==0.28.1", "httpcore==1.0.9")
TRANSFORMERS_5_6 = ("transformers==5.6.0", "tokenizers==0.22.2", "huggingface-hub==1.12.0", *HTTPX)
TRANSFORMERS_5_19 = ("transformers==5.19.0", *HTTPX)

#: What LLaMA-Factory imports from 0.9.3 on.
OMEGACONF = ("omegaconf==2.3.0", "antlr4-python3-runtime==4.9.3")
#: Each version of LLaMA-Factory with versions that it accepts; datasets as steps/llamafactory.py says.
LLAMAFACTORY = (
    Entry(
        "llamafactory",
        (
            *("llamafactory==0.9.1", *TRANSFORMERS_4_46),
            *("trl==0.9.6", "accelerate==1.0.1", "peft==0.12.0", "datasets==4.0.0"),
        ),
    ),
    Entry(
        "llamafactory",
        (
            *("llamafactory==0.9.2", *TRANSFORMERS_4_49),
            *("trl==0.9.6", "accelerate==1.2.1", "peft==0.12.0", "datasets==4.0.0"),
        ),
    ),
    Entry(
        "llamafactory",
        (
            *("llamafactory==0.9.3", *TRANSFORMERS_4_51, *OMEGACONF),
            *("trl==0.9.6", "accelerate==1.7.0", "peft==0.15.2", "datasets==4.0.0"),
        ),
    ),
    Entry(
        "llamafactory",
        (
            *("llamafactory==0.9.4", *TRANSFORMERS_4_57, *OMEGACONF),
            *("trl==0.24.0", "accelerate==1.11.0", "peft==0.17.1", "datasets==4.0.0"),
        ),
        sample=True,
    ),
    Entry(
        "llamafactory",
        (
            *("llamafactory==0.9.5", *TRANSFORMERS_5_6, *OMEGACONF),
            *("trl==0.24.0", "accelerate==1.11.0", "peft==0.18.1", "datasets==4.0.0"),
        ),
    ),
)

#: What ms-swift imports.
SWIFT = ("modelscope==1.31.0", "json-repair==0.64.6", "einops==0.8.1")
#: ms-swift accepts many versions of each package. 4.6.0 runs with the newest that it accepts.
MS_SWIFT = (
    Entry(
        "ms_swift",
        (
            *("ms_swift==3.12.6", *TRANSFORMERS_4_57, *SWIFT),
            *("trl==0.24.0", "accelerate==1.11.0", "peft==0.17.1", "datasets==3.6.0"),
        ),
    ),
    Entry(
        "ms_swift",
        (
            *("ms_swift==4.0.4", *TRANSFORMERS_4_57, *SWIFT),
            *("trl==0.24.0", "accelerate==1.11.0", "peft==0.17.1", "datasets==3.6.0"),
        ),
    ),
    Entry(
        "ms_swift",
        (
            *("ms_swift==4.3.2", *TRANSFORMERS_5_6, *SWIFT),
            *("trl==0.29.1", "accelerate==1.11.0", "peft==0.19.1", "datasets==4.8.4"),
        ),
    ),
    Entry(
        "ms_swift",
        ("ms_swift==4.6.0", *TRANSFORMERS_5_19, *SWIFT, "trl==0.29.1", "peft==0.20.0", "datasets==4.8.4"),
    ),
)

#: What verl imports besides the environment's packages.
VERL = (
    "tensordict==0.10.0",
    "pyvers==0.2.3",
    "cloudpickle==3.1.2",
    "orjson==3.11.4",
    "importlib_metadata==8.7.0",
    "zipp==3.23.0",
    "codetiming==1.4.0",
    "hydra-core==1.3.2",
    "omegaconf==2.3.0",
    "antlr4-python3-runtime==4.9.3",
)
OLDER = (*TRANSFORMERS_4_57, "datasets==4.0.0", "peft==0.18.1")
OPENRLHF_AND_VERL = (
    Entry("openrlhf", ("openrlhf==0.11.2", "pylatexenc==2.10"), sample=True),
    Entry("openrlhf", ("openrlhf==0.10.4", "pylatexenc==2.10")),
    Entry("openrlhf", ("openrlhf==0.9.10", "pylatexenc==2.10")),
    Entry("openrlhf", ("openrlhf==0.8.11", *OLDER)),
    Entry("verl", ("verl==0.9.1", *VERL), sample=True),
    Entry("verl", ("verl==0.8.0", *VERL)),
    Entry("verl", ("verl==0.7.1", *VERL)),
    Entry("verl", ("verl==0.6.1", *VERL, *OLDER)),
    Entry("verl", ("verl==0.5.0", *VERL, *OLDER)),
    Entry("verl", ("verl==0.4.1", *VERL, *OLDER, "setuptools==80.9.0")),
)

#: TRL builds Liger's loss; 1.12 is the last version that does.
LIGER = (
    Entry("liger", ("liger-kernel==0.8.5", "trl==1.12.0"), sample=True),
    Entry(
        "liger",
        (
            *("liger-kernel==0.6.4", "trl==0.24.0", *TRANSFORMERS_4_57),
            *("datasets==4.0.0", "accelerate==1.11.0", "peft==0.17.1"),
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

#: The first needs a transformers of its time, those up to 0.28 transformers 4, and the newer ones run with the environment's.
TRL = (
    Entry("trl", (), sample=True),
    Entry(
        "trl",
        ("trl==0.12.2", *TRANSFORMERS_4_46, "datasets==4.0.0", "accelerate==1.0.1", "peft==0.12.0"),
        sample=True,
    ),
    *(
        Entry("trl", (f"trl=={version}", *TRANSFORMERS_4_57, "datasets==4.0.0"), sample=version == "0.24.0")
        for version in (
            *("0.13.0", "0.14.0", "0.15.2", "0.16.1", "0.17.0", "0.18.2", "0.19.1", "0.20.0", "0.21.0", "0.22.2"),
            *("0.23.1", "0.24.0", "0.25.1", "0.26.2", "0.27.2", "0.28.0"),
        )
    ),
    *(
        Entry("trl", (f"trl=={version}",))
        for version in (
            *("0.29.1", "1.0.0", "1.1.0", "1.2.0", "1.3.0", "1.4.0", "1.5.1", "1.6.0", "1.7.1", "1.8.0", "1.9.2"),
            *("1.10.0", "1.11.0", "1.12.0", "1.13.0", "1.14.2"),
        )
    ),
    # This version has no code for CPUs but Triton kernels.
    Entry("trl", ("trl==1.15.0",), variables={"TRITON_INTERPRET": "1"}),
)

#: Axolotl with the TRL that it pins.
AXOLOTL_NEEDS = ("addict==2.4.0", "art==6.5", "fire==0.7.1", "fastcore==1.8.2")
AXOLOTL = (
    Entry("axolotl", ("axolotl==0.17.0", "trl==1.5.1", *AXOLOTL_NEEDS)),
    Entry("axolotl", ("axolotl==0.18.0", "trl==1.8.0", *AXOLOTL_NEEDS)),
    Entry("axolotl", ("axolotl==0.19.0", "trl==1.9.0", *AXOLOTL_NEEDS), sample=True),
)

#: Unsloth compiles the trainers of each of these versions of TRL.
UNSLOTH = tuple(
    Entry(
        "unsloth",
        ("unsloth==2026.10.9", "unsloth_zoo==2026.10.9", f"trl=={version}", *others),
        sample=version == "1.14.2",
        variables={"UNSLOTH_FORCE_CPU": "1", "UNSLOTH_DISABLE_STATISTICS": "1"},
        label=f"trl-{version}",
    )
    for version, others in (("0.24.0", (*TRANSFORMERS_4_57, "datasets==4.0.0")), ("1.12.0", ()), ("1.14.2", ()))
)

ENTRIES = (*TRL, *AXOLOTL, *UNSLOTH, *LLAMAFACTORY, *MS_SWIFT, *OPENRLHF_AND_VERL, *LIGER, *TORCHTUNE)


def folder(package: str) -> Path:
    """Where a package is installed."""
    return ROOT / ".venv" / "packages" / package.replace("==", "-")


def install(entry: Entry) -> None:
    """Install the packages of an entry that are not installed yet."""
    for package in entry.packages:
        if not folder(package).is_dir():
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder(package))]
            subprocess.run([*pip, package], check=True)
            # Some wheels hold their tests as a top-level package, which would hide this repository's.
            shutil.rmtree(folder(package) / "tests", ignore_errors=True)


def environment(entry: Entry) -> dict[str, str]:
    """Environment variables of a process that runs an entry."""
    path = [ROOT, ROOT / "python", *(folder(package) for package in entry.packages)]
    return os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path)), "HF_HUB_OFFLINE": "1"} | entry.variables


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
    unknown = set(names) - {"sample"} - {name for entry in ENTRIES for name in (entry.name, entry.framework)}
    if unknown:
        sys.exit(
            f"no entry has the name {', '.join(sorted(unknown))}; known: {', '.join(entry.name for entry in ENTRIES)}"
        )
    chosen = [e for e in ENTRIES if (e.sample if sample else not names or e.name in names or e.framework in names)]
    if command == "install":
        for entry in chosen:
            install(entry)
    elif command == "run":
        for entry in chosen:
            print(json.dumps(run(entry)))
    elif command in ("record", "write"):
        found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        for entry in chosen:
            kept = found.get(entry.name, {}).get("measured")
            found[entry.name] = run(entry, *(["--measure"] if command == "write" else []))
            if kept is not None:
                found[entry.name].setdefault("measured", kept)
            # Written after each entry: a run of all takes long.
            RESULTS.write_text(json.dumps(dict(sorted(found.items())), indent=1) + "\n")
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main()
