"""What `python -m dpo_kernels` and `dpo-train doctor` show about this machine: devices, backends, libraries, compilers."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from . import _build, backends

#: This package's environment variables that decide what runs; docs/environment.md explains them.
VARIABLES = (
    "DPO_KERNELS_BACKEND",
    "DPO_KERNELS_SELFCHECK",
    "DPO_KERNELS_JIT",
    "DPO_KERNELS_ISA",
    "DPO_KERNELS_CACHE",
)
#: Environment variables of other programs that also matter.
OTHER_VARIABLES = (
    "CUDA_VISIBLE_DEVICES",
    "CUDA_HOME",
    "CUDA_PATH",
    "CXX",
    "OMP_NUM_THREADS",
    "TORCH_CUDA_ARCH_LIST",
    "PYTORCH_CUDA_ALLOC_CONF",
    "TRITON_CACHE_DIR",
    "DPO_TRAINER_CACHE",
    "HF_HOME",
    "HF_HUB_OFFLINE",
    "HF_DATASETS_CACHE",
)


def gigabytes(size: float) -> str:
    """A size in bytes as text, in units of 10^9 bytes."""
    return f"{size / 1e9:.1f} GB"


def devices() -> list[str]:
    """A line for each device: name, memory, compute capability."""
    memory = ""
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        memory = f", {gigabytes(os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE'))} of memory"
    found = [f"cpu     {platform.machine()}, {torch.get_num_threads()} threads{memory}"]
    if not torch.cuda.is_available():
        return [*found, "no CUDA device"]
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        free, whole = torch.cuda.mem_get_info(index)
        found.append(
            f"cuda:{index}  {torch.cuda.get_device_name(index)}, compute capability {major}.{minor}, "
            f"{gigabytes(free)} of {gigabytes(whole)} free"
        )
    return found


def served() -> Iterator[str]:
    """For each device type: the backend that is used, and which backends are available, with the reason if not."""
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        yield f"backend used for {device} tensors: {backends.resolve(device, torch.float32)}"
        for name in backends.NAMES:
            reason = backends.why_not(name, device)
            note = "available" if reason is None else f"not available: {reason}"
            if name == "cpu" and reason is None:
                from .backends import cpu

                note += f" ({cpu.instruction_set()}, {torch.get_num_threads()} threads)"
            yield f"{name:<7} {note}"


def libraries() -> list[str]:
    """The compiled libraries that these sources would load, with the architectures that they contain."""
    found = []
    for folder in (_build.PACKAGE, _build.cache_folder()):
        for name in ("cpu", "cuda"):
            file = re.compile(rf"_{name}\.{_build.source_hash(name)}(\.sm_\d+)?\.so")
            paths = [path for path in sorted(folder.glob(f"_{name}.*.so")) if file.fullmatch(path.name)]
            found += [f"{name:<5} {', '.join(_architectures(name, path))}: {path}" for path in paths]
    return found or ["none compiled yet; each is compiled at its first use"]


def _architectures(name: str, path: Path) -> list[str]:
    if name == "cpu":
        known = _build.X86_ISAS if platform.machine().lower() in ("x86_64", "amd64") else _build.OTHER_ISAS
        return [isa for isa, *_ in known]
    if found := re.findall(r"sm_\d+", path.name):
        return found
    tool = shutil.which("cuobjdump") or shutil.which("cuobjdump", path="/usr/local/cuda/bin")
    listed = (
        subprocess.run([tool, "--list-elf", str(path)], capture_output=True, text=True, check=False) if tool else None
    )
    return sorted(set(re.findall(r"sm_\d+", listed.stdout if listed else ""))) or ["architectures not known"]


def compilers() -> list[str]:
    """The compilers that a library would be compiled with."""
    return [_compiler("C++", _build.cxx_compiler), _compiler("CUDA", _build.nvcc_compiler)]


def _compiler(kind: str, find: Callable[[], str]) -> str:
    try:
        path = find()
    except _build.BuildError as error:
        return f"{kind:<5} {error}"
    said = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout.splitlines()
    version = next((line for line in said if "release" in line), said[0] if said else "")
    return f"{kind:<5} {path} ({version.strip()})"


def variables() -> list[str]:
    """The environment variables above that are set, as NAME=VALUE."""
    return [f"{name}={os.environ[name]}" for name in (*VARIABLES, *OTHER_VARIABLES) if name in os.environ]


def troubles() -> list[tuple[str, str]]:
    """(what is missing, how to fix it) of what makes calls slower. Nothing of it keeps a run from starting."""
    found = []
    if (reason := backends.why_not("cpu", "cpu")) is not None:
        found.append((f"the CPU kernels are not used ({reason})", "install a C++ compiler, such as g++"))
    if torch.cuda.is_available() and backends.default("cuda") == "eager":
        reason = backends.why_not("triton", "cuda")
        found.append((f"eager PyTorch is used for CUDA tensors ({reason})", "pip install triton"))
    if not torch.cuda.is_available() and _build.devices_in_sight() is not None:
        found.append(
            (
                "there is an NVIDIA GPU, but this torch does not see it",
                "install a build of torch for CUDA, and check nvidia-smi",
            )
        )
    return found
