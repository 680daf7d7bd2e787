"""A CPU behind the device boundary of benchmarks/gpu_session.py: the same stages, small shapes, a clock without events."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any


class CpuMachine:
    """What CudaMachine does, on a CPU. Tools of a GPU machine are answered, not run."""

    device = "cpu"
    backends = ("cpu", "eager")
    shapes = ((16, 1000), (8, 2001))

    def describe(self) -> dict[str, Any]:
        return {"name": "a CPU"}

    def free_memory(self) -> int:
        return 256 << 20

    def seconds(self, work: Callable[[], object], repeats: int = 3) -> list[float]:
        times = []
        for _ in range(repeats):
            begin = time.perf_counter()
            work()
            times.append(time.perf_counter() - begin)
        return times

    def command(self, arguments: list[str], seconds: float) -> tuple[int, str]:
        return 0, " ".join(arguments)


class BrokenMachine(CpuMachine):
    """Fails in one stage and hangs in another."""

    def describe(self) -> dict[str, Any]:
        raise RuntimeError("no such device")

    def command(self, arguments: list[str], seconds: float) -> tuple[int, str]:
        time.sleep(3600)
        raise AssertionError
