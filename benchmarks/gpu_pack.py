"""The pack of a GPU session, for a machine without a network: the CUDA library, compiled here, and the peers' wheels.

`python benchmarks/gpu_session.py --pack DIR` makes it. `--from DIR` uses it: it decompresses the libraries and unzips the
wheels into a folder on the path of every stage. The pack holds nothing else from this machine.
"""

from __future__ import annotations

import json
import lzma
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_kernels import _build

#: Largest size of the whole folder in bytes, so that it can be uploaded.
LIMIT = 64 << 20

DEFAULT = "default"
#: Launch parameters of the packed libraries (csrc/cuda/plan.h): the default, and those that the sweep tries.
VARIANTS: tuple[tuple[str, ...], ...] = (
    (),
    ("DPO_ROW_THREADS=128",),
    ("DPO_ROW_THREADS=512",),
    ("DPO_ROW_UNROLL=8",),
    ("DPO_MAX_CLUSTER=1",),
    ("DPO_GRAD_THREADS=512",),
)

#: The peers (as in pyproject.toml's extra `peers`), and their imports that a machine with torch and transformers may lack.
WHEELS = (
    "trl==1.16.0",
    "liger-kernel==0.8.5",
    "cut-cross-entropy==25.1.1",
    "datasets==5.2.0",
    "dill==0.4.1",
    "multiprocess==0.70.19",
)

#: The environment variable that tells stages where the unpacked folder is.
VARIABLE = "DPO_GPU_PACK"


class PackError(RuntimeError):
    """A pack could not be made or does not fit; the message says why."""


def _megabytes(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"


def make(folder: Path, arch: str, python: str, variants: bool = True) -> list[str]:
    """Compile the libraries for one architecture ("90") and download the wheels for one Python ("3.12") into `folder`.

    Returns a line for each file with its size, and the sum. Raises PackError if a wheel cannot be downloaded or the sum
    exceeds LIMIT, _build.BuildError if nvcc is missing or fails.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # The manifest is deleted first and written last: after a failure the folder has none, so it does not count as a pack.
    for stale in (folder / "manifest.json", *folder.glob("cuda.*.so.xz"), *folder.glob("*.whl")):
        stale.unlink(missing_ok=True)
    libraries = {}
    for index, defines in enumerate(VARIANTS if variants else VARIANTS[:1]):
        name = " ".join(defines) or DEFAULT
        print(f"compiling the CUDA library for sm_{arch}: {name}", flush=True)
        with tempfile.TemporaryDirectory() as scratch:
            library = Path(scratch) / "cuda.so"
            _build.build_cuda(library, [arch], defines)
            libraries[name] = f"cuda.{index}.so.xz"
            (folder / libraries[name]).write_bytes(lzma.compress(library.read_bytes()))
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--python-version", python, "--dest", str(folder), *WHEELS]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise PackError(f"wheels not downloaded: {(done.stderr.strip().splitlines() or ['no output'])[-1]}")
    manifest = {"arch": arch, "python": python, "source": _build.source_hash("cuda"), "libraries": libraries}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    return sizes(folder)


def sizes(folder: Path) -> list[str]:
    """A line for each file of the pack, largest first, and the sum. Raises PackError if the sum exceeds LIMIT."""
    files = sorted((path for path in folder.iterdir() if path.is_file()), key=lambda path: -path.stat().st_size)
    lines = [f"{_megabytes(path.stat().st_size):>10}  {path.name}" for path in files]
    total = sum(path.stat().st_size for path in files)
    lines.append(f"{_megabytes(total):>10}  in all, of {_megabytes(LIMIT)}")
    if total > LIMIT:
        raise PackError("the pack is too large:\n" + "\n".join(lines))
    return lines


def unpack(folder: Path, into: Path) -> dict[str, str]:
    """Decompress and unzip a pack, without a network. Returns the environment variables that make stages use it.

    Raises PackError if `folder` holds no pack.
    """
    if not (folder / "manifest.json").is_file():
        raise PackError(f"{folder} holds no pack; python benchmarks/gpu_session.py --pack {folder} makes one")
    libraries = json.loads((folder / "manifest.json").read_text())["libraries"].values()
    if lost := [name for name in libraries if not (folder / name).is_file()]:
        raise PackError(f"{folder} lacks {', '.join(lost)}: copy it again")
    into.mkdir(parents=True, exist_ok=True)
    shutil.copy(folder / "manifest.json", into)
    for path in folder.glob("cuda.*.so.xz"):
        (into / path.stem).write_bytes(lzma.decompress(path.read_bytes()))
    site = into / "site"
    site.mkdir(exist_ok=True)
    for wheel in folder.glob("*.whl"):
        with zipfile.ZipFile(wheel) as packed:
            packed.extractall(site)
    return {VARIABLE: str(into), "PYTHONPATH": os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")]))}


@dataclass(frozen=True)
class Pack:
    """An unpacked pack."""

    folder: Path
    manifest: dict[str, Any]

    def variants(self) -> list[str]:
        """The libraries' names, the default first."""
        return list(self.manifest["libraries"])

    def why_not(self) -> str | None:
        """None if the libraries were compiled from this tree's sources, else what is wrong."""
        if self.manifest["source"] != _build.source_hash("cuda"):
            return "the packed CUDA library was compiled from other sources: make the pack again"
        return None

    def serves(self, capability: tuple[int, int]) -> bool:
        """Whether the libraries run on a card of this compute capability: PTX serves later cards, no code serves earlier ones."""
        return 10 * capability[0] + capability[1] >= int(self.manifest["arch"].rstrip("af"))

    def describe(self) -> str:
        """One line for the session's summary."""
        return (
            self.why_not() or f"CUDA library for sm_{self.manifest['arch']}, {len(self.manifest['libraries'])} variants"
        )

    def load(self, name: str = DEFAULT) -> None:
        """Load a library. The default one is left aside if it is not of these sources or not for this card; the backend then
        says that it has none."""
        import torch

        why = self.why_not()
        if why is None and torch.cuda.is_available() and not self.serves(torch.cuda.get_device_capability()):
            why = f"the packed CUDA library is for sm_{self.manifest['arch']}, this card is older"
        if why:
            if name == DEFAULT:
                return
            raise PackError(why)
        torch.ops.load_library(str(self.folder / Path(self.manifest["libraries"][name]).stem))


def in_use() -> Pack | None:
    """The pack of this session, if it has one."""
    folder = os.environ.get(VARIABLE)
    if not folder:
        return None
    return Pack(Path(folder), json.loads((Path(folder) / "manifest.json").read_text()))
