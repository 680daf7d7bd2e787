"""How does the time grow with tokens, with the vocabulary and with threads? (Exponents are fitted: 1 is proportional.)"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from . import method
from .conftest import DTYPES, Settings
from .method import Contender, Samples
from .peers import PEERS
from .problem import LogitsProblem
from .report import Column, Result

#: One grid per axis: [2P, T, V] of each point. Four octaves are enough for an exponent.
AXES = {
    "small": {
        "tokens": [(4, tokens, 8192) for tokens in (8, 16, 32)],
        "vocabulary": [(4, 8, vocab) for vocab in (8192, 16384, 32768)],
    },
    "default": {
        "tokens": [(4, tokens, 49152) for tokens in (8, 16, 32, 64, 128)],
        "vocabulary": [(4, 32, vocab) for vocab in (8192, 16384, 32768, 65536, 131072)],
    },
    "full": {
        "tokens": [(8, tokens, 49152) for tokens in (16, 32, 64, 128, 256)],
        "vocabulary": [(8, 64, vocab) for vocab in (16384, 32768, 65536, 131072, 262144)],
    },
}
THREADS_SHAPE = {"small": (4, 32, 8192), "default": (8, 32, 49152), "full": (8, 128, 49152)}

#: Compiled peers are left out: they would compile anew at every size.
RUNNERS = ("eager", "ours_inplace")


def exponent(x: Sequence[float], seconds: Sequence[float]) -> float:
    """Slope of log seconds over log x, by least squares."""
    a, b = [math.log(value) for value in x], [math.log(value) for value in seconds]
    mean_a, mean_b = sum(a) / len(a), sum(b) / len(b)
    return sum((p - mean_a) * (q - mean_b) for p, q in zip(a, b, strict=True)) / sum((p - mean_a) ** 2 for p in a)


def _row(group: str, x: int, name: str, samples: Samples) -> dict[str, Any]:
    title = PEERS[name].title
    return {
        "case": group,
        "x": x,
        "title": title,
        "ours": PEERS[name].ours,
        "median_s": samples.median,
        "spread": samples.spread,
    }


@pytest.mark.parametrize("axis", ["tokens", "vocabulary"])
def test_sizes(
    axis: str, settings: Settings, publish: Callable[[Result], Result], replay: Callable[[Samples], None]
) -> None:
    points = []
    for shape in AXES[settings.sizes][axis]:
        problem = LogitsProblem(shape, DTYPES[settings.dtypes[0]], settings.device)
        x = shape[0] * shape[1] if axis == "tokens" else shape[2]
        points += [(x, name, problem, PEERS[name](problem)) for name in RUNNERS]
    contenders = [Contender(f"{name} {x}", peer.step, problem.next) for x, name, problem, peer in points]
    found = method.interleave(contenders, settings.rounds, device=settings.device)
    result = Result(
        "scaling",
        "Scaling: loss and gradient as the sizes grow",
        [
            Column("title", "method"),
            Column("x", "size", "count"),
            Column("median_s", "time", "time"),
            Column("spread", "spread", "percent"),
            Column("per_x", "ns per unit", "number"),
        ],
        chart="lines",
    )
    sizes = list(dict.fromkeys(x for x, *_ in points))
    for name in RUNNERS:
        medians = [found[f"{name} {x}"].median for x in sizes]
        for x in sizes:
            row = _row(axis, x, name, found[f"{name} {x}"])
            result.rows.append(row | {"per_x": row["median_s"] / x * 1e9})
        result.notes.append(f"{PEERS[name].title}: time grows as {axis} ^ {exponent(sizes, medians):.2f}")
    publish(result)
    replay(found[contenders[-1].name])


def thread_counts() -> list[int]:
    """1, 2, 4 ... up to the cores there are."""
    cores = os.cpu_count() or 1
    return [*(n for n in (2**k for k in range(12)) if n < cores), cores]


def test_threads(settings: Settings, publish: Callable[[Result], Result], replay: Callable[[Samples], None]) -> None:
    if settings.device != "cpu":
        pytest.skip("threads are a question about CPUs")
    problem = LogitsProblem(THREADS_SHAPE[settings.sizes], DTYPES[settings.dtypes[0]])
    before = torch.get_num_threads()

    def prepare(threads: int) -> None:
        torch.set_num_threads(threads)
        problem.next()

    contenders = [
        Contender(f"{name} {threads}", PEERS[name](problem).step, lambda threads=threads: prepare(threads))
        for name in RUNNERS
        for threads in thread_counts()
    ]
    try:
        found = method.interleave(contenders, settings.rounds)
    finally:
        torch.set_num_threads(before)
    columns = [
        Column("title", "method"),
        Column("x", "threads", "count"),
        Column("median_s", "time", "time"),
        Column("spread", "spread", "percent"),
        Column("speedup", "vs 1 thread", "ratio"),
    ]
    rows = [
        _row("threads", threads, name, found[f"{name} {threads}"])
        | {"speedup": method.ratio(found[f"{name} 1"], found[f"{name} {threads}"])}
        for name in RUNNERS
        for threads in thread_counts()
    ]
    publish(Result("threads", "Threads: loss and gradient on more cores", columns, rows, chart="lines"))
    replay(found[contenders[-1].name])
