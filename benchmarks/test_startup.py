"""How long does it take until the first gradient? Imports, first call and later calls in new processes, caches cold or warm."""

from __future__ import annotations

import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from . import method
from .conftest import Settings, wanted
from .linear_problem import ROOT
from .method import Samples
from .report import FORMATS, Column, Result

#: [2P, T, V]: small, because the question is what a call costs before its computation.
SHAPE = {"small": (2, 8, 4096), "default": (4, 32, 49152), "full": (4, 32, 49152)}
ROUNDS = {"small": 1, "default": 1, "full": 5}

#: Statements that define `step`, by contender. Triton's entry compiles ahead of time and needs no GPU.
STEPS = {
    "eager": "from benchmarks.peers import PEERS; step = PEERS['eager'](problem).step",
    "compiled": "from benchmarks.peers import PEERS; step = PEERS['compiled'](problem).step",
    "ours": "from benchmarks.peers import PEERS; step = PEERS['ours_inplace'](problem).step",
}
TITLES = {
    "eager": "eager PyTorch",
    "compiled_cold": "torch.compile, cold cache",
    "compiled_warm": "torch.compile, warm cache",
    "ours": "dpo_kernels, in place",
    "triton": "dpo_kernels, Triton kernels compiled for sm_90",
}
#: The default leaves out contenders that take a quarter of a minute each.
QUICK = ("eager", "compiled_cold", "ours")
NAMES = {"small": ("eager", "ours"), "default": QUICK, "full": tuple(TITLES)}
SCRIPT = """
import json, sys, time
begin = time.perf_counter()
import torch
torch_s = time.perf_counter() - begin
begin = time.perf_counter()
import dpo_kernels
import_s = time.perf_counter() - begin
from benchmarks.problem import LogitsProblem
problem = LogitsProblem({shape}, torch.float32, {device!r}, rotating_bytes=0)
wait = torch.cuda.synchronize if {device!r} == "cuda" else lambda: None
begin = time.perf_counter()
{make}
step(); wait()
first_s = time.perf_counter() - begin
later = []
for _ in range(3):
    problem.next(); wait()
    begin = time.perf_counter()
    step(); wait()
    later.append(time.perf_counter() - begin)
print(json.dumps(dict(torch_s=torch_s, import_s=import_s, first_s=first_s, later_s=min(later))))
"""
TRITON_SCRIPT = """
import json, time
from benchmarks.machine_code import triton_kernels
# One variant of each kernel: what a first training step has to compile.
kernels = dict((kernel.name.split()[1], kernel) for kernel in triton_kernels(90))
begin = time.perf_counter()
for kernel in kernels.values():
    kernel.cubin()
print(json.dumps(dict(first_s=time.perf_counter() - begin, kernels=len(kernels))))
"""

COLUMNS = [
    Column("title", "method"),
    Column("torch_s", "import torch", "time"),
    Column("import_s", "import dpo_kernels", "time"),
    Column("median_s", "first call", "time"),
    Column("later_s", "later calls", "time"),
    Column("vs_best", "first call faster than the best peer's by", "ratio"),
]


def summary(rows: list[dict[str, Any]]) -> str:
    """Seconds of the first call, by method."""
    first = [f"{FORMATS['time'](row['median_s'])} ({row['title']})" for row in rows]
    return f"Time until the first gradient in a new process, without the imports: {', '.join(first)}."


RESULT = partial(
    Result, "startup", "Start-up: time to the first loss and gradient in a new process", COLUMNS, summary=summary
)


def run(name: str, settings: Settings, cache: Path) -> dict[str, float]:
    """Seconds that one new process reports. Raises CalledProcessError."""
    make = STEPS.get(name.partition("_")[0], "")
    script = (
        TRITON_SCRIPT
        if name == "triton"
        else SCRIPT.format(shape=SHAPE[settings.sizes], device=settings.device, make=make)
    )
    places = {"TORCHINDUCTOR_CACHE_DIR": cache / "inductor", "TRITON_CACHE_DIR": cache / "triton"}
    environment = {**os.environ, **{key: str(value) for key, value in places.items()}}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, env=environment, check=True
    )
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.fixture(scope="module")
def measured(
    settings: Settings, publish: Callable[[Result], Result], request: pytest.FixtureRequest
) -> dict[str, list[dict[str, float]]]:
    """By contender, one entry per round; every round has its own caches."""
    names = wanted(request, "test_startup", "name")
    if importlib.util.find_spec("triton") is None:
        names = [name for name in names if name != "triton"]
    found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for _ in range(ROUNDS[settings.sizes]):
        with tempfile.TemporaryDirectory() as folder:
            cache = Path(folder)
            for name in names:
                if name == "compiled_warm" and "compiled_cold" not in names:
                    run("compiled_cold", settings, cache)
                found[name].append(run(name, settings, cache))
                method.tell(f"{name}: first call {1e3 * found[name][-1]['first_s']:.3g} ms")
    shape = list(SHAPE[settings.sizes])
    result = RESULT()
    for name in names:
        rounds = found[name]
        samples = Samples([one["first_s"] for one in rounds])
        row: dict[str, Any] = {"case": f"float32 {shape}", "title": TITLES[name], "ours": name in ("ours", "triton")}
        row |= {"median_s": samples.median, "spread": samples.spread, "select": f"test_startup[{name}]"}
        for key in ("torch_s", "import_s", "later_s"):
            if key in rounds[0]:
                row[key] = statistics.median(one[key] for one in rounds)
        if name == "triton":
            row["case"] = "ahead of time, without a GPU"
            result.notes.append(
                f"Triton compiles one variant of each of its {rounds[0]['kernels']:.0f} kernels for one architecture in "
                f"{samples.median:.1f} s, cold; a run pays that once, and finds them in its cache the next time."
            )
        others = [other for other in names if other not in ("ours", "triton")]
        if name == "ours" and others:
            first = {other: Samples([one["first_s"] for one in found[other]]) for other in names}
            best = method.best_ratio(first, name, others)
            assert best is not None
            row |= best.row(TITLES[best.peer])
            row["select"] += f" or test_startup[{best.peer}]"
        result.rows.append(row)
    publish(result)
    return found


def test_startup(measured: dict[str, list[dict[str, float]]], name: str, replay: Callable[[Samples], None]) -> None:
    if name not in measured:
        pytest.skip("triton is not installed (pip install -e .[dev])")
    replay(Samples([one["first_s"] for one in measured[name]]))
