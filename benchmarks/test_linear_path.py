"""Which way from hidden states and LM head to loss and gradients is fastest, and what memory does it need?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from . import method
from .conftest import Settings
from .linear_problem import LinearCase, LinearProblem, LinearTruth
from .method import Contender, Samples
from .peers.linear import LINEAR_PEERS, LinearPeer
from .report import Column, Result

FIRST = "4 pairs x 256 tokens, half prompt"
_FROZEN = "the same, frozen head"
CASES = {
    "small": [LinearCase("2 pairs x 32 tokens, half prompt", 2, 32, hidden_size=64, vocab=4096, source="random")],
    "default": [LinearCase(FIRST), LinearCase(_FROZEN, frozen=True)],
    "full": [
        LinearCase(FIRST),
        LinearCase(_FROZEN, frozen=True),
        LinearCase("the same, precomputed reference", precomputed=True),
        LinearCase("2 pairs x 1,024 tokens, three quarters prompt", pairs=2, length=1024, prompt=0.75),
        LinearCase("H = 896, V = 151,936, random", pairs=1, hidden_size=896, vocab=151936, source="random"),
    ],
}
QUESTION = "Linear path: hidden states and LM head to loss and gradients"
FLOOR = "the products alone"

#: What a CPU must reach in float32 on the first case: against the best peer; multiple of the products; MiB.
EXACT_BAR, FILTERED_BAR, FLOOR_BAR, MEMORY_BAR, FROZEN_BAR = 2.2, 3.5, 1.15, 64, 1.3


def _products(problem: LinearProblem) -> Contender:
    """The case's dense products over its scored tokens, 256 at a time, in buffers that exist already."""
    case = problem.case
    rows = problem.hidden.detach()[problem.labels != -100].contiguous()
    head = problem.weight.detach()
    logits = torch.zeros(min(256, len(rows)), case.vocab, device=rows.device)
    grad_rows, grad_head = torch.zeros_like(rows[: len(logits)]), torch.zeros_like(head)

    def run() -> None:
        for begin in range(0, len(rows), len(logits)):
            some = rows[begin : begin + len(logits)]
            for _ in range(1 if case.precomputed else 2):
                torch.mm(some, head.t(), out=logits[: len(some)])
            torch.mm(logits[: len(some)], head, out=grad_rows[: len(some)])
            if not case.frozen:
                grad_head.addmm_(logits[: len(some)].t(), some, beta=1.0 if begin else 0.0)

    return Contender(FLOOR, run)


def race(case: LinearCase, settings: Settings) -> tuple[Result, dict[str, Samples]]:
    """Check every peer's gradients, then time those that passed, interleaved with the products."""
    problem = LinearProblem(case, settings.device)
    truth = LinearTruth(problem)
    result = Result("linear_path", QUESTION, _columns())
    peers: dict[str, LinearPeer] = {}
    first_call: dict[str, float] = {}
    rows: dict[str, dict[str, Any]] = {}
    for name, kind in LINEAR_PEERS.items():
        if case.precomputed and name.startswith("liger"):
            continue  # takes no precomputed reference
        if name == "ours_filtered" and not problem.real:
            continue  # random hidden states make the softmax flat and say nothing about a filter
        row: dict[str, Any] = {"case": case.name, "peer": name, "title": kind.title, "ours": kind.ours}
        rows[name] = row
        result.rows.append(row)
        if why := kind.why_missing():
            row["verdict"] = f"missing: {why}"
            continue
        peer = kind(problem)
        kept: list[tuple[torch.Tensor, ...]] = []
        try:
            seconds = method.Clock(settings.device).time(lambda peer=peer, kept=kept: kept.append(peer.step()))
        except (RuntimeError, NotImplementedError) as error:
            row["verdict"] = f"fails: {str(error).splitlines()[0][:60]}"
            continue
        error = truth.error_of(kept.pop())
        row |= {"hidden_error": error.hidden, "weight_error": error.weight}
        if error.worst > kind.allowed:
            row["verdict"] = "WRONG"
            continue
        row["verdict"] = "right"
        peers[name], first_call[name] = peer, seconds
    del truth
    contenders = [_products(problem), *(Contender(name, peer.step) for name, peer in peers.items())]
    samples = method.interleave(contenders, settings.rounds, device=settings.device)
    gradients = sum(leaf.nbytes for leaf in problem.leaves)
    for name in peers:
        one = samples[name]
        rows[name] |= {
            "median_s": one.median,
            "spread": one.spread,
            "samples_s": one.seconds,
            "floor_s": samples[FLOOR].median,
            "times_floor": method.ratio(one, samples[FLOOR]),
            "extra_bytes": None if one.extra_bytes is None else max(0, one.extra_bytes - gradients),
            "first_call_s": first_call[name],
        }
        if LINEAR_PEERS[name].ours:
            others = {o: method.ratio(samples[o], one) for o in peers if not LINEAR_PEERS[o].ours}
            best = min(others, key=others.__getitem__)
            rows[name] |= {"vs": others, "vs_best": others[best], "best_peer": LINEAR_PEERS[best].title}
    source = "a real model's hidden states on real text" if problem.real else "random hidden states"
    flops = 2 * case.products * case.scored * case.hidden_size * case.vocab
    result.notes.append(
        f"{case.name}: {case.scored} scored tokens, {source}; the floor is {case.products} dense products, "
        f"{flops / 1e9:.0f} GFLOP at {flops / samples[FLOOR].median / 1e9:.0f} GFLOP/s. Extra memory is beside the gradients."
    )
    return result, samples


def _columns() -> list[Column]:
    return [
        Column("title", "method"),
        Column("median_s", "time", "time"),
        Column("spread", "spread", "percent"),
        Column("times_floor", "x products", "ratio"),
        Column("vs_best", "vs best peer", "ratio"),
        Column("best_peer", "which is"),
        Column("extra_bytes", "extra memory", "bytes"),
        Column("first_call_s", "first call", "time"),
        Column("hidden_error", "dH error", "error"),
        Column("weight_error", "dW error", "error"),
        Column("verdict", "gradient"),
    ]


def bars(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The bars beside what was measured."""
    first = {row["peer"]: row for row in rows if row["case"] == FIRST and row.get("median_s")}
    frozen = {row["peer"]: row for row in rows if row["case"] == _FROZEN and row.get("median_s")}
    found = []

    def add(what: str, measured: float | None, bar: float, *, most: bool = False) -> None:
        if measured is not None:
            met = measured <= bar if most else measured >= bar
            found.append({"what": what, "bar": bar, "measured": measured, "met": met})

    if "ours" in first:
        add("exact against the best peer", first["ours"].get("vs_best"), EXACT_BAR)
        add("exact, multiple of the products", first["ours"]["times_floor"], FLOOR_BAR, most=True)
        extra = first["ours"]["extra_bytes"]
        add("exact, MiB beside the gradients", None if extra is None else extra / 2**20, MEMORY_BAR, most=True)
    if "ours_filtered" in first:
        add("filtered against the best peer", first["ours_filtered"].get("vs_best"), FILTERED_BAR)
    if "ours" in first and "ours" in frozen:
        add("frozen head against trainable", first["ours"]["median_s"] / frozen["ours"]["median_s"], FROZEN_BAR)
    return found


@pytest.fixture(scope="module")
def measured(settings: Settings, publish: Callable[[Result], Result]) -> Result:
    """All cases of `--sizes`, once."""
    published = None
    for case in CASES[settings.sizes]:
        published = publish(race(case, settings)[0])
    assert published is not None
    published.extra["bars"] = {"linear_path": bars(published.rows)}
    published.notes += [
        f"{bar['what']}: {bar['measured']:.2f}, bar {bar['bar']:g}: {'met' if bar['met'] else 'NOT met'}"
        for bar in bars(published.rows)
    ]
    return published


def test_our_gradients_are_right(measured: Result) -> None:
    ours = [row for row in measured.rows if row["ours"]]
    assert ours
    assert [row["peer"] for row in ours if row["verdict"] != "right"] == []


@pytest.mark.parametrize("name", LINEAR_PEERS)
def test_linear_path(name: str, measured: Result, replay: Callable[[Samples], None]) -> None:
    """Hands each peer's samples to pytest-benchmark."""
    for row in measured.rows:
        if row["peer"] == name and row.get("samples_s"):
            return replay(Samples(row["samples_s"]))
    pytest.skip(next((row["verdict"] for row in measured.rows if row["peer"] == name), "not in this size"))
