"""How much faster are loss and gradient on more cores?"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from . import method
from .conftest import DTYPES, Settings, wanted
from .method import Contender, Samples
from .peers import PEERS
from .problem import LogitsProblem
from .report import SPREAD, TIME, Column, Result, listed

SHAPE = {"small": (4, 32, 8192), "default": (8, 32, 49152), "full": (8, 128, 49152)}
#: Compiled peers are left out: they would compile again for every number of threads.
RUNNERS = ("eager", "ours_inplace")


def thread_counts() -> list[int]:
    """1, 2, 4 ... up to the number of cores."""
    cores = os.cpu_count() or 1
    return [*(n for n in (2**k for k in range(12)) if n < cores), cores]


CONTENDERS = [f"{name}-{threads}" for name in RUNNERS for threads in thread_counts()]
COLUMNS = [
    Column("title", "method"),
    Column("x", "threads", "count"),
    TIME,
    SPREAD,
    Column("speedup", "faster than on 1 thread by", "ratio"),
    Column("vs_best", "faster than eager by", "ratio"),
]


def summary(rows: list[dict[str, Any]]) -> str:
    """The speed-up of all cores over one."""
    most = max(row["x"] for row in rows)
    gains = [f"{row['speedup']:.2f} ({row['title']})" for row in rows if row["x"] == most and row.get("speedup")]
    return f"{most} threads are {listed(gains)} times as fast as one." if gains and most > 1 else ""


RESULT = partial(
    Result,
    "threads",
    "Threads: loss and gradient on more cores",
    COLUMNS,
    summary=summary,
    chart="lines",
    x_label="threads",
)


@pytest.fixture(scope="module")
def samples(
    settings: Settings, publish: Callable[[Result], Result], request: pytest.FixtureRequest
) -> dict[str, Samples]:
    if settings.device != "cpu":
        pytest.skip("threads are a question about CPUs")
    dtype, shape = settings.dtypes[0], SHAPE[settings.sizes]
    problem = LogitsProblem(shape, DTYPES[dtype])
    before = torch.get_num_threads()

    def contender(name: str) -> Contender:
        runner, threads = name.split("-")
        peer = PEERS[runner](problem)

        def prepare() -> None:
            torch.set_num_threads(int(threads))
            problem.next()

        return Contender(name, peer.step, prepare)

    names = wanted(request, "test_threads", "name")
    try:
        found = method.interleave([contender(name) for name in names], settings.rounds)
    finally:
        torch.set_num_threads(before)
    result = RESULT()
    for name in names:
        runner, threads = name.split("-")
        row = {"case": f"{dtype} {list(shape)}", "x": int(threads), "title": PEERS[runner].title}
        row |= {"ours": PEERS[runner].ours, "median_s": found[name].median, "spread": found[name].spread}
        row["select"] = f"test_threads[{name}]"
        if f"{runner}-1" in found:
            row["speedup"] = method.ratio(found[f"{runner}-1"], found[name])
        if PEERS[runner].ours and (best := method.best_ratio(found, name, [f"eager-{threads}"])):
            row |= best.row(PEERS["eager"].title)
            row["select"] += f" or test_threads[{best.peer}]"
        result.rows.append(row)
    publish(result)
    return found


@pytest.mark.parametrize("name", CONTENDERS)
def test_threads(samples: dict[str, Samples], name: str, replay: Callable[[Samples], None]) -> None:
    replay(samples[name])
