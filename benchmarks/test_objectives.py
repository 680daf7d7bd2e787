"""What does each objective of the registry cost, relative to the default, which the kernels compute themselves?"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from dpo_kernels import OBJECTIVES
from dpo_kernels.objectives import objective

from . import method
from .conftest import DTYPES, Settings, wanted
from .method import Contender, Samples
from .problem import LogitsProblem, step
from .report import SPREAD, TIME, TIMES_FLOOR, TRAFFIC, Column, Result

#: A quarter of the logits path's default size: the passes over the logits are the same, the rest is [P] vectors.
SHAPES = {"small": [(4, 32, 8192)], "default": [(8, 16, 49152)], "full": [(8, 64, 49152)]}

COLUMNS = [
    Column("title", "objective"),
    TIME,
    SPREAD,
    TIMES_FLOOR,
    Column("vs_sigmoid", "time / sigmoid's", "ratio"),
    Column("reads", "reads"),
]


def summary(rows: list[dict[str, Any]]) -> str:
    """The objectives' costs relative to the default's, by what they read."""
    found = {}
    for row in rows:
        found.setdefault(row["reads"], []).append((row["vs_sigmoid"], row["title"]))
    spans = []
    for reads, costs in found.items():
        (low, least), (high, most) = min(costs), max(costs)
        spans.append(
            f"{len(costs)} that read {reads.replace(', ', ' and ')}, {low:.2f} ({least}) to {high:.2f} ({most})"
        )
    return f"Time of a step relative to the default objective (sigmoid): {'; '.join(spans)}."


RESULT = partial(
    Result, "objectives", "Objectives: loss and gradient in place", COLUMNS, floor=TRAFFIC, summary=summary
)


@pytest.fixture(scope="module")
def samples(
    shape: tuple[int, int, int],
    settings: Settings,
    publish: Callable[[Result], Result],
    request: pytest.FixtureRequest,
) -> dict[str, Samples]:
    dtype = settings.dtypes[0]
    problem = LogitsProblem(shape, DTYPES[dtype], settings.device)

    # The baseline of the comparison always takes part.
    names = list(dict.fromkeys(["sigmoid", *wanted(request, "test_objectives", "name", shape=shape)]))

    def contender(name: str) -> Contender:
        # A reference-free objective gets no reference, as from a user: it reads one tensor less.
        info = OBJECTIVES[name]
        smoothing = 0.0 if info.smoothing_range is None or info.smoothing_range.holds(0.0, 0.0) else 0.1
        # An objective with a running mean is made once, so that it keeps the mean.
        loss_type = objective(name) if info.observe else name
        keywords = {"loss_type": loss_type, "label_smoothing": smoothing, "reference": info.needs_reference}
        return Contender(name, lambda: step(problem, **keywords), problem.next)

    floors = method.floor_contenders(problem.ref_logits, problem.ref_logits.clone())
    with warnings.catch_warnings():
        # Some objectives warn that the benchmark's beta is far from their usual one, which does not affect the time.
        warnings.simplefilter("ignore")
        found = method.interleave([*floors, *map(contender, names)], settings.rounds, device=settings.device)
    rows = [
        {
            "case": f"{dtype} {list(shape)}",
            "title": name,
            "ours": info.kernel is not None,
            "dtype": dtype,
            "shape": list(shape),
            "median_s": found[name].median,
            "spread": found[name].spread,
            "times_floor": method.passes_over_copy(found, name, passes=4 if info.needs_reference else 3),
            "vs_sigmoid": method.ratio(found[name], found["sigmoid"]),
            "reads": "policy, reference" if info.needs_reference else "policy",
            "select": f"test_objectives[{'x'.join(map(str, shape))}-{name}]",
        }
        for name, info in OBJECTIVES.items()
        if name in names
    ]
    publish(RESULT(rows=rows))
    return found


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives(samples: dict[str, Samples], name: str, replay: Callable[[Samples], None]) -> None:
    replay(samples[name])
