"""`python -m dpo_kernels`: versions, devices, which backend serves what, and why the others do not."""

from __future__ import annotations

import os
import platform
import warnings

import torch

from . import __version__, backends


def main() -> None:
    """Print the report."""
    warnings.simplefilter("ignore", RuntimeWarning)  # the table below gives the same reasons
    print(f"dpo-kernels {__version__}, torch {torch.__version__}, Python {platform.python_version()}")
    devices = ["cpu"]
    if torch.cuda.is_available():
        devices.append("cuda")
        for index in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(index)
            print(f"cuda:{index}  {torch.cuda.get_device_name(index)}, compute capability {major}.{minor}")
    else:
        print("no CUDA device")
    for device in devices:
        print(f"\n{device} tensors are served by: {backends.resolve(device, torch.float32)}")
        for name in backends.NAMES:
            reason = backends.why_not(name, device)
            note = "available" if reason is None else f"not available: {reason}"
            if name == "cpu" and reason is None:
                from .backends import cpu

                note += f" ({cpu.instruction_set()}, {torch.get_num_threads()} threads)"
            print(f"  {name:<7} {note}")
    for variable in ("DPO_KERNELS_BACKEND", "DPO_KERNELS_JIT", "DPO_KERNELS_ISA", "DPO_KERNELS_CACHE"):
        if variable in os.environ:
            print(f"{variable}={os.environ[variable]}")


if __name__ == "__main__":
    main()
