"""Profiles one stage or a whole loss: a trace with the stages' names, memory over time, and commands of other profilers.

    python -m benchmarks.profile logits_grad --shape 8,128,49152 --dtype bfloat16 --trace out.json
    python -m benchmarks.profile linear_dpo_loss --shape 4,128,49152 --hidden 576 --memory memory.svg

KERNEL is token_logps, preference_loss or logits_grad, or dpo_loss or linear_dpo_loss for forward and backward together. The
trace opens in chrome://tracing or Perfetto and has a range (record_function, and NVTX on a GPU) for each stage, with the
stage's name in the source. `--memory` draws the memory that torch's allocator held, with the stages shaded. At the end it
prints commands of profilers that show more detail.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from dpo_kernels import STATISTICS, backends, filtered, linear_dpo_loss
from dpo_kernels.stages import Transform

from . import charts, method
from .conftest import DTYPES
from .linear_problem import LinearCase, LinearProblem
from .problem import BETA, LogitsProblem, step

#: Stage -> reads and writes of a [2P, T, V] tensor.
STAGES = {"token_logps": 2, "preference_loss": 0, "logits_grad": 2}
#: Whole calls, for backends that have them as one function.
WHOLE = ("preference_forward", "preference_backward")
#: Ranges of the linear path: range -> function of `dpo_kernels.filtered`.
FILTERED = {"filter": "keep", "filtered_grad_hidden": "grad_hidden", "filtered_grad_weight": "grad_weight"}
KERNELS = {**STAGES, "dpo_loss": 4, "linear_dpo_loss": 0}


def _with_range(name: str, function: Callable[..., Any], device: str) -> Callable[..., Any]:
    def inside(*args: Any, **kwargs: Any) -> Any:
        with ExitStack() as ranges:
            ranges.enter_context(record_function(name))
            if device == "cuda":
                ranges.enter_context(torch.cuda.nvtx.range(name))
            return function(*args, **kwargs)

    return inside


@contextmanager
def stage_ranges(stages: ModuleType, device: str) -> Iterator[None]:
    """Make every call of a backend's stage run inside a range with the stage's name."""
    with ExitStack() as patches:
        own = [name for name in (*STAGES, *WHOLE) if hasattr(stages, name)]
        places = [*((stages, name, name) for name in own), *((filtered, at, name) for name, at in FILTERED.items())]
        for module, attribute, name in places:
            wrapped = _with_range(name, getattr(module, attribute), device)
            patches.enter_context(mock.patch.object(module, attribute, wrapped))
        yield


def make_call(
    kernel: str, problem: LogitsProblem, stages: ModuleType, statistics: tuple[str, ...]
) -> Callable[[], Any]:
    """A call of the kernel alone, on inputs from the stages before it."""
    logits, ref, labels = problem.logits.detach(), problem.ref_logits, problem.labels

    def token_logps() -> Any:
        return stages.token_logps(logits, labels, ref, Transform(), statistics)

    if kernel == "token_logps":
        return token_logps
    if kernel == "dpo_loss":
        return lambda: step(problem, statistics=statistics)
    *small, ref_logps = token_logps()[:4]
    logps = small[0]
    ones = torch.ones_like(logps)
    if kernel == "preference_loss":
        pairs = torch.full((labels.shape[0] // 2,), 0.1, dtype=logps.dtype, device=logps.device)
        return lambda: stages.preference_loss(logps, ref_logps, ones, None, None, pairs, 0 * pairs, False)
    # The gradient goes into the reference's memory, which is no longer needed, so the logits are not overwritten.
    return lambda: stages.logits_grad(logits, labels, *small, 0.05 * ones, Transform(), ref)


def make_linear_call(arguments: argparse.Namespace, statistics: tuple[str, ...]) -> Callable[[], Any]:
    """Loss and gradients from hidden states and head; half of each sequence is prompt."""
    batch, tokens, vocab = arguments.shape
    case = LinearCase("", batch // 2, tokens, hidden_size=arguments.hidden, vocab=vocab, source="random")
    problem = LinearProblem(case, arguments.device, DTYPES[arguments.dtype])
    reference = {"ref_hidden": problem.ref_hidden, "ref_weight": problem.ref_weight}
    options = {"beta": BETA, "grad_filter": arguments.grad_filter, "statistics": statistics}

    def call() -> Any:
        loss = linear_dpo_loss(problem.hidden, problem.weight, problem.labels, **reference, **options).loss
        return torch.autograd.grad(loss, problem.leaves)

    return call


Span = tuple[str, float, float]


def memory_timeline(trace: Path) -> tuple[list[tuple[float, int]], list[Span]]:
    """From a trace: [(milliseconds, bytes held by torch's allocator above the start) ...], [(stage, begin, end) ...]."""
    events = json.loads(trace.read_text())["traceEvents"]
    spans = [e for e in events if e.get("cat") in ("user_annotation", "gpu_user_annotation") and "dur" in e]
    changes = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]")
    start = min([e["ts"] for e in spans] + [at for at, _ in changes], default=0.0)
    held, points = 0, [(0.0, 0)]
    for at, change in changes:
        held += change
        points.append(((at - start) / 1e3, held))
    return points, [(e["name"], (e["ts"] - start) / 1e3, (e["ts"] + e["dur"] - start) / 1e3) for e in spans]


def write_memory(trace: Path, target: Path) -> None:
    """Write the timeline as JSON or as a picture, by the target's suffix."""
    points, spans = memory_timeline(trace)
    if target.suffix == ".json":
        target.write_text(json.dumps({"ms_and_bytes": points, "stages": spans}) + "\n")
    elif charts.memory(points, spans, target) is None:
        raise SystemExit("--memory: matplotlib is not installed (pip install matplotlib); FILE.json needs none")


def deeper(arguments: argparse.Namespace) -> list[str]:
    """Commands of profilers that look inside a kernel."""
    again = f"{sys.executable} -m benchmarks.profile {arguments.kernel} --shape {','.join(map(str, arguments.shape))}"
    again += f" --dtype {arguments.dtype} --device {arguments.device} --calls 3"
    if arguments.kernel == "linear_dpo_loss":
        again += f" --hidden {arguments.hidden}"
        again += "" if arguments.grad_filter is None else f" --grad-filter {arguments.grad_filter!r}"
    if arguments.device == "cuda":
        # The kernels are named after their stage; the range is pushed by the stage's name.
        return [
            f"ncu --set full --nvtx --nvtx-include '{arguments.kernel}/' -o {arguments.kernel} {again}",
            f"nsys profile --trace cuda,nvtx --cuda-memory-usage true -o {arguments.kernel} {again}",
        ]
    return [
        f"perf record -g -o perf.data {again} && perf report -i perf.data",
        f"perf stat -e cycles,instructions,cache-misses,page-faults {again}",
        f"{sys.executable} -m benchmarks.instructions",
    ]


def _shape(text: str) -> tuple[int, int, int]:
    shape = tuple(int(part) for part in text.split(","))
    if len(shape) != 3 or shape[0] % 2 or min(shape) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not 2P,T,V with an even first number")
    return shape


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kernel", choices=KERNELS)
    parser.add_argument("--shape", type=_shape, default=(8, 128, 49152), metavar="2P,T,V")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--statistics", default="", metavar="NAMES", help=f"some of {','.join(STATISTICS)}, or all")
    parser.add_argument("--hidden", type=int, default=576, metavar="H", help="of linear_dpo_loss")
    parser.add_argument("--grad-filter", type=float, metavar="EPS", help="of linear_dpo_loss; exact if not given")
    parser.add_argument("--calls", type=int, default=10, help="calls inside the trace")
    parser.add_argument("--trace", metavar="FILE", help="write the trace here")
    parser.add_argument("--memory", type=Path, metavar="FILE", help="draw memory along time: FILE.svg, or FILE.json")
    arguments = parser.parse_args()
    asked = arguments.statistics
    statistics = STATISTICS if asked == "all" else tuple(filter(None, asked.split(",")))
    dtype = DTYPES[arguments.dtype]
    name = backends.resolve(arguments.device, dtype)
    stages = backends.load(name, arguments.device)
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if arguments.device == "cuda" else [])
    with stage_ranges(stages, arguments.device):
        if arguments.kernel == "linear_dpo_loss":
            call, prepare, nbytes = make_linear_call(arguments, statistics), lambda: None, 0
        else:
            problem = LogitsProblem(arguments.shape, dtype, arguments.device)
            call = make_call(arguments.kernel, problem, stages, statistics)
            prepare, nbytes = problem.next, problem.nbytes
        call()
        clock = method.Clock(arguments.device)
        with profile(activities=activities, profile_memory=True, record_shapes=True) as trace:
            seconds = []
            for _ in range(arguments.calls):
                prepare()
                seconds.append(clock.time(call))
    print(trace.key_averages().table(sort_by=f"self_{arguments.device}_time_total", row_limit=15))
    median = sorted(seconds)[len(seconds) // 2]
    moved = KERNELS[arguments.kernel] * nbytes
    print(f"{arguments.kernel} ({name} backend): median {median * 1e3:.3f} ms", end="")
    print(f", {moved / 2**20:,.0f} MiB moved at least, {moved / median / 1e9:.1f} GB/s" if moved else "")
    with tempfile.TemporaryDirectory() as scratch:
        target = arguments.trace or f"{scratch}/trace.json"
        trace.export_chrome_trace(target)
        if arguments.memory:
            write_memory(Path(target), arguments.memory)
    for what in ("trace", "memory"):
        if getattr(arguments, what):
            print(f"{what}: {getattr(arguments, what)}")
    print("\nDeeper:")
    for line in deeper(arguments):
        print("  " + line)


if __name__ == "__main__":
    main()
