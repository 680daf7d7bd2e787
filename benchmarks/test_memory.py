"""How much memory do loss and gradients need on top of their inputs, as the batch grows?"""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from . import method
from .conftest import DTYPES, Settings, wanted
from .linear_problem import LinearCase, LinearProblem
from .peers import PEERS
from .peers.linear import LINEAR_PEERS
from .problem import LogitsProblem
from .report import BEST_PEER, EXTRA, Column, Result

#: Scored tokens; vocabulary; hidden size, for the linear path.
SIZES = {
    "small": ((32, 64), 4096, 64),
    "default": ((64, 256), 49152, 256),
    "full": ((128, 256, 512, 1024), 49152, 576),
}
#: No name contains that of the paths' own benchmarks, so that `-k` with a benchmark's name selects its tests alone.
WHAT = {"whole": "logits to their gradient", "hidden": "hidden states and head to their gradients"}
#: Peers that compile at each size are left out: the memory of their first call would be the compiler's.
RUNNERS = {
    "whole": ("eager", "trl_old", "ours", "ours_inplace"),
    "hidden": ("eager", "trl_compact", "liger", "torch_lce", "ours"),
}
KNOWN: dict[str, Any] = {"whole": PEERS, "hidden": LINEAR_PEERS}
#: Sizes below this mean nothing in a ratio: the system counts resident pages in batches.
LEAST = 1 << 20

COLUMNS = [
    Column("title", "method"),
    Column("x", "tokens", "count"),
    EXTRA,
    Column("per_token", "KiB per token", "number"),
    Column("vs_best", "best peer's memory / ours", "ratio"),
    BEST_PEER,
]


def summary(rows: list[dict[str, Any]]) -> str:
    """Extra memory at the largest size, by path and method."""
    parts = []
    for what in WHAT.values():
        here = [row for row in rows if row["case"] == what and row["extra_bytes"] is not None]
        most = max((row["x"] for row in here), default=0)
        needs = [f"{row['extra_bytes'] / 2**20:,.0f} ({row['title']})" for row in here if row["x"] == most]
        parts += [f"from {what}, {', '.join(needs)}"] if needs else []
    return f"Extra memory in MiB, at {most:,} tokens: {'; '.join(parts)}." if parts else ""


RESULT = partial(
    Result,
    "memory",
    "Memory: what loss and gradients need on top of their inputs",
    COLUMNS,
    summary=summary,
    chart="lines",
    x_label="tokens",
    y="extra_bytes",
)


def measure(path: str, name: str, tokens: int, settings: Settings) -> int | None:
    """Bytes that one step of the peer needs on top of its inputs."""
    _, vocab, hidden = SIZES[settings.sizes]
    dtype = DTYPES[settings.dtypes[0]]
    step: Callable[[], object]
    if path == "whole":
        step = PEERS[name](LogitsProblem((2, tokens // 2, vocab), dtype, settings.device, rotating_bytes=0)).step
    else:
        case = LinearCase("", 1, tokens // 2, 0.0, hidden_size=hidden, vocab=vocab, source="random")
        step = LINEAR_PEERS[name](LinearProblem(case, settings.device, dtype)).step
    step()  # libraries keep memory that their first call allocates
    return method.peak_memory(step, settings.device)[0]


@pytest.fixture(scope="module")
def rows(
    settings: Settings, publish: Callable[[Result], Result], request: pytest.FixtureRequest
) -> dict[str, list[dict[str, Any]]]:
    """By contender, one row per size."""
    result = RESULT()
    found: dict[str, list[dict[str, Any]]] = {}
    # As in method.interleave: the objects alive now are exempt from the collection before each measurement.
    gc.collect()
    gc.freeze()
    for path in WHAT:
        names = [name.split("-")[1] for name in wanted(request, "test_memory", "name") if name.startswith(path)]
        names = [name for name in names if name in settings.peers and not KNOWN[path][name].why_missing()]
        found |= {f"{path}-{name}": [] for name in names}
        for tokens in SIZES[settings.sizes][0]:
            for row in _rows(path, names, tokens, settings):
                method.tell(f"{path}-{row['peer']}, {tokens} tokens: {(row['extra_bytes'] or 0) / 2**20:,.0f} MiB")
                found[f"{path}-{row['peer']}"].append(row)
    gc.unfreeze()
    for mine in found.values():
        result.rows += mine
        first, last = mine[0], mine[-1]
        if last["extra_bytes"] is not None:
            slope = (last["extra_bytes"] - first["extra_bytes"]) / (last["x"] - first["x"]) / 1024
            result.notes.append(
                f"{last['case']}: {last['title']} needs {last['extra_bytes'] / 2**20:,.0f} MiB for {last['x']:,} tokens, "
                f"and {slope:,.0f} KiB for each further token."
            )
    publish(result)
    return found


def _rows(path: str, names: list[str], tokens: int, settings: Settings) -> list[dict[str, Any]]:
    """One row for each peer, at one size."""
    peers = KNOWN[path]
    extra = {name: measure(path, name, tokens, settings) for name in names}
    known = {name: max(value, LEAST) for name, value in extra.items() if value is not None}
    rows = []
    for name in names:
        row: dict[str, Any] = {"case": WHAT[path], "x": tokens, "peer": name, "title": peers[name].title}
        row |= {"ours": peers[name].ours, "extra_bytes": extra[name], "dtype": settings.dtypes[0]}
        row["select"] = f"test_memory[{path}-{name}]"
        if name in known:
            row["per_token"] = known[name] / tokens / 1024
        others = [other for other in known if not peers[other].ours]
        if peers[name].ours and name in known and others:
            best = min(others, key=known.__getitem__)
            row |= {"vs_best": known[best] / known[name], "best_peer": peers[best].title}
            row["select"] += f" or test_memory[{path}-{best}]"
        rows.append(row)
    return rows


@pytest.mark.parametrize("name", [f"{path}-{name}" for path, names in RUNNERS.items() for name in names])
def test_memory(rows: dict[str, list[dict[str, Any]]], name: str) -> None:
    if name not in rows:
        path, peer = name.split("-")
        pytest.skip(KNOWN[path][peer].why_missing() or "not among --peers")
    if any(row["extra_bytes"] is None for row in rows[name]):
        pytest.skip("this system does not tell a process its peak of memory")
    assert min(row["extra_bytes"] for row in rows[name]) >= 0
