"""A CPU behind the device boundary of benchmarks/gpu_session.py: the same stages, small shapes, a clock without events."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from typing import Any, ClassVar


class CpuMachine:
    """What CudaMachine does, on a CPU. Tools of a GPU machine are answered, not run."""

    device = "cpu"
    backends = ("cpu", "eager")
    shapes = ((16, 1000), (8, 2001))
    without = ("compiled", "liger", "liger_compiled", "cce")  # compiling takes most of a minute
    step_shape = (4, 8, 500)
    linear_shapes = ((1, 8, 16, 200),)
    head_shapes = ((8, 16, 200),)
    variants: ClassVar[dict] = {"cpu": ({}, {"DPO_ROW_THREADS": 128}, {"DPO_MAX_CLUSTER": 0})}

    def describe(self) -> dict[str, Any]:
        return {"name": "a CPU"}

    def synchronize(self) -> None:
        """Nothing is under way on a CPU."""

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
        wish = next((word.removeprefix("DPO_VARIANT=") for word in arguments if word.startswith("DPO_VARIANT=")), None)
        if wish is None:
            return 0, " ".join(arguments)
        # A GPU on which blocks of 128 threads are twice as quick and an impossible cluster is refused.
        settings = json.loads(wish)["settings"]
        if settings.get("DPO_MAX_CLUSTER") == 0:
            return 1, "no such cluster"
        seconds = 0.5 if settings else 1.0
        return 0, "a word before\n" + json.dumps(
            {"seconds": {"token_logps [4x1000]": seconds, "logits_grad [4x1000]": 1.0}}
        )


class BrokenMachine(CpuMachine):
    """Fails in one stage and hangs in another."""

    def describe(self) -> dict[str, Any]:
        raise RuntimeError("no such device")

    def command(self, arguments: list[str], seconds: float) -> tuple[int, str]:
        time.sleep(3600)
        raise AssertionError


class SlowMachine(CpuMachine):
    """Its second backend never answers."""

    @property
    def backends(self) -> Iterator[str]:  # type: ignore[override]
        yield "eager"
        time.sleep(3600)
