"""How does the time grow with tokens, with the vocabulary and with the hidden size? (Exponent 1 is proportional.)"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest

from . import method
from .conftest import DTYPES, Settings, wanted
from .linear_problem import LinearCase, LinearProblem
from .machine import cache_bytes
from .method import Contender, Samples
from .peers import PEERS
from .peers.linear import LINEAR_PEERS
from .problem import LogitsProblem
from .report import SPREAD, TIME, Column, Result

#: One grid per axis: (rows 2P, tokens per row), vocabulary, hidden size.
AXES: dict[str, dict[str, list[tuple[int, int, int]]]] = {
    "small": {
        "tokens": [(4, tokens, 8192) for tokens in (8, 16, 32)],
        "vocabulary": [(4, 8, vocab) for vocab in (8192, 16384, 32768)],
        "hidden": [(32, 4096, hidden) for hidden in (64, 128, 256)],
    },
    "default": {
        "tokens": [(4, tokens, 49152) for tokens in (8, 16, 32, 64)],
        "vocabulary": [(4, 32, vocab) for vocab in (8192, 16384, 32768, 65536)],
        "hidden": [(64, 16384, hidden) for hidden in (128, 256, 512, 1024)],
    },
    "full": {
        "tokens": [(8, tokens, 49152) for tokens in (16, 32, 64, 128, 256)],
        "vocabulary": [(8, 64, vocab) for vocab in (16384, 32768, 65536, 131072, 262144)],
        "hidden": [(128, 49152, hidden) for hidden in (128, 256, 512, 1024, 2048)],
    },
}
WHAT = {
    "tokens": "tokens: logits to gradient",
    "vocabulary": "vocabulary: logits to gradient",
    "hidden": "hidden size: hidden states and head to gradients",
}

#: Compiled peers are left out: they would compile again at every size. The second tuple is for the axis `hidden`.
RUNNERS = {"tokens": ("eager", "ours_inplace"), "vocabulary": ("eager", "ours_inplace"), "hidden": ("eager", "ours")}

COLUMNS = [
    Column("title", "method"),
    Column("x", "size", "count"),
    TIME,
    SPREAD,
    Column("per_x", "ns per unit of size", "number"),
    Column("vs_best", "faster than eager by", "ratio"),
]


def exponent(x: Sequence[float], seconds: Sequence[float]) -> float:
    """Slope of log seconds over log x, by least squares."""
    a, b = [math.log(value) for value in x], [math.log(value) for value in seconds]
    mean_a, mean_b = sum(a) / len(a), sum(b) / len(b)
    return sum((p - mean_a) * (q - mean_b) for p, q in zip(a, b, strict=True)) / sum((p - mean_a) ** 2 for p in a)


def exponents(rows: list[dict[str, Any]]) -> dict[tuple[str, str], float]:
    """(axis, method) -> exponent of the time's growth with the size."""
    found = {}
    for axis, case in WHAT.items():
        for title in dict.fromkeys(row["title"] for row in rows if row["case"] == case):
            line = [row for row in rows if row["case"] == case and row["title"] == title]
            found[axis, title] = exponent([row["x"] for row in line], [row["median_s"] for row in line])
    return found


def summary(rows: list[dict[str, Any]]) -> str:
    """The exponents, by axis."""
    found = exponents(rows)
    parts = [
        f"{axis} " + ", ".join(f"{power:.2f} ({title})" for (a, title), power in found.items() if a == axis)
        for axis in dict.fromkeys(axis for axis, _ in found)
    ]
    return f"Time grows as size to a power (1 is proportional), by what grows: {'; '.join(parts)}."


RESULT = partial(
    Result, "scaling", "Scaling: loss and gradient as the sizes grow", COLUMNS, summary=summary, chart="lines"
)


def contenders(axis: str, settings: Settings, runners: Sequence[str]) -> tuple[list[int], list[Contender]]:
    """(sizes, "runner size" for each runner and size)."""
    dtype, grid = DTYPES[settings.dtypes[0]], AXES[settings.sizes][axis]
    sizes, found = [], []
    for point in grid:
        if axis == "hidden":
            tokens, vocab, size = point
            # One pair; all tokens are scored.
            case = LinearCase("", 1, tokens, 0.0, hidden_size=size, vocab=vocab, source="random")
            problem = LinearProblem(case, settings.device, dtype)
            found += [Contender(f"{name} {size}", LINEAR_PEERS[name](problem).step) for name in runners]
        else:
            # The problems take turns, so it suffices that all of them together exceed the cache.
            logits = LogitsProblem(point, dtype, settings.device, rotating_bytes=4 * cache_bytes() // len(grid))
            size = point[0] * point[1] if axis == "tokens" else point[2]
            found += [Contender(f"{name} {size}", PEERS[name](logits).step, logits.next) for name in runners]
        sizes.append(size)
    return sizes, found


@pytest.fixture(scope="module")
def samples(
    axis: str, settings: Settings, publish: Callable[[Result], Result], request: pytest.FixtureRequest
) -> dict[str, list[Samples]]:
    """By runner, one entry per size."""
    runners = wanted(request, "test_scaling", "runner", axis=axis)
    titles = {name: (LINEAR_PEERS if axis == "hidden" else PEERS)[_name(axis, name)] for name in runners}
    sizes, racers = contenders(axis, settings, [_name(axis, name) for name in runners])
    found = method.interleave(racers, settings.rounds, device=settings.device)
    result = RESULT()
    by_runner = {name: [found[f"{_name(axis, name)} {size}"] for size in sizes] for name in runners}
    for name in runners:
        for index, size in enumerate(sizes):
            one = by_runner[name][index]
            row: dict[str, Any] = {"case": WHAT[axis], "x": size, "title": titles[name].title, "ours": name == "ours"}
            row |= {"dtype": settings.dtypes[0], "median_s": one.median, "spread": one.spread}
            row |= {"per_x": one.median / size * 1e9, "select": f"test_scaling[{axis}-{name}]"}
            if name == "ours" and "eager" in by_runner:
                best = method.best_ratio({"eager": by_runner["eager"][index], "ours": one}, "ours", ["eager"])
                assert best is not None
                row |= best.row(titles["eager"].title)
                row["select"] += f" or test_scaling[{axis}-eager]"
            result.rows.append(row)
    result.notes += [
        f"{title}: time grows as {axis} ^ {power:.2f} ({settings.dtypes[0]})"
        for (axis, title), power in exponents(result.rows).items()
    ]
    publish(result)
    return by_runner


def _name(axis: str, runner: str) -> str:
    return dict(zip(("eager", "ours"), RUNNERS[axis], strict=True))[runner]


@pytest.fixture(scope="module", params=list(WHAT))
def axis(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("runner", ["eager", "ours"])
def test_scaling(samples: dict[str, list[Samples]], runner: str, replay: Callable[[Samples], None]) -> None:
    # pytest-benchmark gets the largest size.
    replay(samples[runner][-1])
