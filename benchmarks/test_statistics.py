"""What does each statistic cost, and what do all of them cost, in the pass that computes the loss?"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from dpo_kernels import STATISTICS

from . import method
from .conftest import DTYPES, Settings, wanted
from .method import Contender, Samples
from .problem import LogitsProblem, step
from .report import SPREAD, TIME, TIMES_FLOOR, TRAFFIC, Column, Result

#: Half of the logits path's default size, which suffices for a cost relative to no statistics.
SHAPES = {"small": [(4, 32, 8192)], "default": [(8, 64, 49152)], "full": [(8, 128, 49152)]}

#: The requested statistics, by their name in the table.
REQUESTS: dict[str, tuple[str, ...]] = {"none": (), **{name: (name,) for name in STATISTICS}, "all": STATISTICS}

#: Test names that differ from the statistic's name, so that `-k logits` selects the logits path alone.
IDS = {"mean_logits": "mean"}

COLUMNS = [
    Column("title", "statistics"),
    TIME,
    SPREAD,
    TIMES_FLOOR,
    Column("vs_none", "time / none", "ratio"),
]


def summary(rows: list[dict[str, Any]]) -> str:
    """The cost of all statistics together, in each dtype."""
    costs = [f"{100 * (row['vs_none'] - 1):+.0f} % in {row['dtype']}" for row in rows if row["title"] == "all"]
    return f"All statistics together change the time of loss and gradient by {', '.join(costs)}." if costs else ""


RESULT = partial(
    Result,
    "statistics",
    "Statistics: loss and gradient in place, with what is asked for",
    COLUMNS,
    floor=TRAFFIC,
    summary=summary,
)


@pytest.fixture(scope="module")
def samples(
    shape: tuple[int, int, int],
    dtype: str,
    settings: Settings,
    publish: Callable[[Result], Result],
    request: pytest.FixtureRequest,
) -> dict[str, Samples]:
    problem = LogitsProblem(shape, DTYPES[dtype], settings.device)
    # The baseline of the comparison always takes part.
    titles = ["none", *wanted(request, "test_statistics", "request_", shape=shape, dtype=dtype)]
    asked_for = {title: asked for title, asked in REQUESTS.items() if title in titles}
    contenders = [
        Contender(title, lambda asked=asked: step(problem, statistics=asked), problem.next)
        for title, asked in asked_for.items()
    ]
    floors = method.floor_contenders(problem.ref_logits, problem.ref_logits.clone())
    found = method.interleave([*floors, *contenders], settings.rounds, device=settings.device)
    rows = [
        {
            "case": f"{dtype} {list(shape)}",
            "title": title,
            "ours": title == "all",
            "dtype": dtype,
            "shape": list(shape),
            "median_s": found[title].median,
            "spread": found[title].spread,
            "times_floor": method.passes_over_copy(found, title, passes=4),
            "vs_none": method.ratio(found[title], found["none"]),
            "select": f"test_statistics[{dtype}-{'x'.join(map(str, shape))}-{IDS.get(title, title)}]",
        }
        for title in asked_for
    ]
    publish(RESULT(rows=rows))
    return found


@pytest.mark.parametrize("request_", REQUESTS, ids=lambda name: IDS.get(name, name))
def test_statistics(samples: dict[str, Samples], request_: str, replay: Callable[[Samples], None]) -> None:
    replay(samples[request_])
