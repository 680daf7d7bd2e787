"""`python -m dpo_kernels`: versions, devices, libraries, and which backends are available, with the reason if not.

`check` runs the operator table on this machine; `bench` compares the time of loss and gradient with eager PyTorch.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import warnings

import torch

from . import __version__, backends, bench, doctor, selfcheck
from ._build import cache_folder
from .backends import BackendUnavailable
from .doctor import VARIABLES as VARIABLES


class UsageError(ValueError):
    """The command cannot run as given; the message says why in one line."""


def report() -> None:
    """Print versions, devices, backends, libraries, compilers, caches and variables, and how to fix what is missing."""
    warnings.simplefilter("ignore", RuntimeWarning)  # the table below gives the same reasons
    print(
        f"dpo-kernels {__version__}, torch {torch.__version__}, Python {platform.python_version()}, {platform.platform()}"
    )
    sections = {
        "devices": doctor.devices(),
        "backends": doctor.served(),
        "libraries": doctor.libraries(),
        "compilers": doctor.compilers(),
        "cache of libraries": [str(cache_folder())],
        "environment": doctor.variables() or ["no variable that matters is set"],
        "to fix": [f"{what}: {fix}" for what, fix in doctor.troubles()] or ["nothing"],
    }
    for title, lines in sections.items():
        print("\n".join([f"\n{title}", *(f"  {line}" for line in lines)]))


def device_of(text: str | None) -> torch.device:
    """The device that --device names: an index, "cuda:1" or "cpu"; by default the first GPU, else the CPU."""
    if text is None:
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device("cuda", int(text)) if text.isdecimal() else torch.device(text)
    except RuntimeError:
        raise UsageError(f"unknown device {text!r}; give the index of a CUDA device, or cpu") from None
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"no kernels for {device.type} devices; give the index of a CUDA device, or cpu")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        device = torch.device("cuda", device.index or 0)
        if device.index >= count:
            raise UsageError(f"there is no {device}: this torch sees {count} CUDA devices")
    elif device.index not in (None, 0):
        raise UsageError(f"there is no {device}")
    return device


def _known(backend: str, who: str = "") -> str:
    """The name itself. Raises UsageError if it is unknown; the message begins with `who`."""
    try:
        return backends.check_name(backend)
    except ValueError as reason:
        raise UsageError(f"{who}{reason}") from None


def check(backend: str | None, device_name: str | None, cases: tuple[selfcheck.Case, ...] = selfcheck.TABLE) -> int:
    """Run the operator table on the given backend, or on all for the device. Returns 1 if a case is wrong, else 0."""
    device = device_of(device_name)
    if backend is None:
        names = list(backends.candidates(device.type))
    else:
        names = [_known(backend)]
        backends.load(backend, device.type)
    wrong = 0
    if device.type == "cuda":
        torch.cuda.set_device(device)
    for name in names:

        def progress(done: int, name: str = name) -> None:
            if sys.stderr.isatty():
                print(f"\r{name}: {done} cases", end="\r", file=sys.stderr, flush=True)

        results = selfcheck.run_table(name, device, cases, progress)
        failed = [result for result in results if not result.ok]
        print(f"{name}: {len(results) - len(failed)} of {len(results)} cases right", flush=True)
        for result in failed:
            print(f"  wrong: {result}", flush=True)
        wrong += len(failed)
    return int(wrong > 0)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        "python -m dpo_kernels",
        description="Without a command: versions, devices, libraries, and which backends are available, with the reason if not.",
    )
    commands = parser.add_subparsers(dest="command", metavar="{doctor,check,bench}")
    commands.add_parser("doctor", help="the same as without a command")
    checking = commands.add_parser(
        "check",
        help="compare this machine's backends with the float64 definition, case by case",
        description="Run the operator table on this machine and print how many cases each backend gets right. Exit status: "
        "0 all cases right, 1 a case wrong, 2 no such backend or device. On a GPU the first run compiles every "
        "kernel variant, which takes minutes.",
    )
    checking.add_argument(
        "--backend", help=f"one of {', '.join(backends.NAMES)}; default: all that can be used for the device"
    )
    timing = commands.add_parser(
        "bench",
        help="compare the time of loss and gradient on this machine with eager PyTorch",
        description="Time the loss and its gradient, alternating with eager PyTorch: medians, quartiles, and the "
        "bandwidth reached, as a share of a copy's. Takes half a minute.",
    )
    timing.add_argument(
        "--shape", help="TOKENSxVOCAB or SEQUENCESxTOKENSxVOCAB; default: 8192x128256 on a GPU, else 512x32768"
    )
    timing.add_argument("--dtype", choices=list(bench.DTYPES), help="default: bfloat16 on a GPU, float32 on a CPU")
    timing.add_argument("--seconds", type=float, default=20.0, help="time to spend on measurements (default: 20)")
    for command in (checking, timing):
        command.add_argument("--device", help="index of a CUDA device, or cpu; default: the first GPU, else the CPU")
    given = parser.parse_args(arguments)
    try:
        if wish := os.environ.get("DPO_KERNELS_BACKEND"):
            _known(wish, "DPO_KERNELS_BACKEND: ")
        if given.command == "check":
            return check(given.backend, given.device)
        if given.command == "bench":
            if given.seconds < 0:
                raise UsageError(f"--seconds must not be negative: {given.seconds:g}")
            bench.run(device_of(given.device), given.shape, given.dtype, given.seconds)
        else:
            report()
    except (UsageError, bench.ShapeError, BackendUnavailable) as reason:
        print(f"dpo_kernels {given.command or 'report'}: {reason}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
