"""Describes the machine of a measurement: its name and everything about it that affects a figure."""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

import dpo_kernels
from dpo_kernels import backends

ROOT = Path(__file__).resolve().parent.parent


def cpu_model() -> str:
    """The processor's name as the system reports it."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    found = re.search(r"^(?:model name|Model|Hardware)\s*:\s*(.+)$", text, re.MULTILINE)
    return found.group(1).strip() if found else platform.machine()


def instruction_set() -> str:
    """The instruction set of the native row kernels, or the architecture if they are not built."""
    if backends.why_not("cpu", "cpu"):
        return platform.machine()
    from dpo_kernels.backends import cpu

    return cpu.instruction_set()


def cache_bytes() -> int:
    """Size of the largest CPU cache in bytes (32 MiB if the system does not report it)."""
    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(int(text[:-1]) * {"K": 1 << 10, "M": 1 << 20}[text[-1]])
    return max(sizes) or 32 << 20


def _run(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def machine_name(device: str) -> str:
    """A folder name such as `amd-epyc-2-cores-avx512`; for an accelerator, the GPU's name."""
    if device == "cuda":
        words = torch.cuda.get_device_name()
    else:
        words = f"{cpu_model()} {os.cpu_count()} cores {instruction_set()}"
    return re.sub(r"[^a-z0-9]+", "-", words.lower().replace("(r)", "").replace("(tm)", "")).strip("-")


def describe(device: str) -> dict[str, Any]:
    """Machine, software and date, for every result file."""
    about: dict[str, Any] = {
        "name": machine_name(device),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instruction_set": instruction_set(),
        "largest_cache_bytes": cache_bytes(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "dpo_kernels": dpo_kernels.__version__,
        "backend": backends.resolve(device, torch.float32),
        "commit": _run("git", "rev-parse", "--short", "HEAD"),
        "uncommitted_changes": bool(_run("git", "status", "--porcelain", "--", "dpo_kernels", "csrc")),
        "load_average": round(os.getloadavg()[0], 2),
    }
    if device == "cuda":
        query = "clocks.sm,clocks.mem,clocks.max.sm,power.limit,driver_version"
        about["gpu"] = torch.cuda.get_device_name()
        about["gpu_state"] = _run("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader")
    return about
