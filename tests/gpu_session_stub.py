"""A CPU in place of the GPU of benchmarks/gpu_session.py: the same stages, small shapes, a clock without CUDA events."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, ClassVar

from benchmarks.gpu_stages import CudaMachine


class CpuMachine(CudaMachine):
    """CudaMachine on a CPU. Triton kernels are compiled for an H100, but not launched."""

    device = "cpu"
    backends = ("cpu", "eager")
    without = ("compiled", "liger", "liger_compiled", "cce")  # compiling takes most of a minute
    shapes = ((16, 1000),)
    more_shapes = ((8, 2001),)
    step_shapes = ((4, 8, 500), (2, 4, 300))
    linear_shapes = ((1, 8, 16, 200),)
    small_heads = ((1, 8, 16, 201),)
    latency_vocab, latency_repeats = 1000, 5
    trace_vocab = 1000
    product = 64
    small_vocabs = (33,)
    head_shapes = ((8, 16, 200),)
    sweep_tokens = (4, 8)
    trainer_config: ClassVar[dict[str, int]] = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 340,
    }  # fmt: skip
    trainer_steps, trainer_batch = 3, 2

    def prepare(self) -> None:
        pass  # the pack's library is for a GPU

    def describe(self) -> dict[str, Any]:
        return {"name": "a CPU"}

    def compile_target(self) -> tuple[Any, Any]:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32), None

    def triton_serves(self) -> str | None:
        return "a CPU runs no Triton kernels"

    def synchronize(self) -> None:
        pass  # CPU operations are synchronous

    def free_memory(self) -> int:
        return 256 << 20

    def measure(
        self,
        work: Callable[[], object],
        repeats: int = 3,
        prepare: Callable[[], None] = lambda: None,
        replay: bool = False,
    ) -> dict[str, Any]:
        times = []
        for _ in range(min(repeats, 3)):
            prepare()
            begin = time.perf_counter()
            work()
            times.append(time.perf_counter() - begin)
        return {"times": times, "host": statistics.median(times), "replayed": replay}

    def packed_variants(self) -> list[str]:
        return ["default", "DPO_ROW_THREADS=128", "DPO_MAX_CLUSTER=0"]

    def load_variant(self, name: str) -> Any:
        from dpo_kernels import backends

        if name == "DPO_MAX_CLUSTER=0":
            raise RuntimeError("no such cluster")
        return backends.load("cpu", "cpu")


class CompilingMachine(CpuMachine):
    """A CpuMachine whose Triton kernels can be recorded and compiled for an H100, with the alignment of GPU tensors."""

    more_shapes = ()
    step_shapes = ()
    small_heads = ()

    def triton_serves(self) -> str | None:
        import importlib

        from dpo_kernels import backends

        module = importlib.import_module("dpo_kernels.backends.triton")
        load = backends.load
        backends.load = lambda name, device: module if name == "triton" else load(name, device)
        return None
