"""Which way from hidden states and LM head to loss and gradients is fastest, and what memory does it need?"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from dpo_kernels import backends
from dpo_kernels.linear.chunk import accumulator_dtype, logits_buffer
from dpo_kernels.linear.products import multiply

from . import method
from .conftest import DTYPES, Settings, wanted
from .linear_problem import LinearCase, LinearProblem, LinearTruth
from .method import Contender, Samples
from .peers.linear import LINEAR_PEERS, LinearPeer
from .report import EXTRA, PRODUCTS, SPREAD, TIME, TIMES_PRODUCTS, Column, Result, counted


def _cases(pairs: int, length: int) -> list[LinearCase]:
    name = f"{counted(pairs, 'pair')} x {length} tokens, half prompt"
    return [LinearCase(name, pairs, length), LinearCase(f"{name}, frozen head", pairs, length, frozen=True)]


CASES = {
    "small": [LinearCase("2 pairs x 32 tokens, half prompt", 2, 32, hidden_size=64, vocab=4096, source="random")],
    # An eighth of the tokens of full: otherwise ten peers, at seconds per step, would take a quarter of an hour.
    "default": _cases(1, 128)[:1],
    "full": [
        *_cases(4, 256),
        LinearCase("4 pairs x 256 tokens, half prompt, precomputed reference", reference="precomputed"),
        LinearCase("2 pairs x 1,024 tokens, three quarters prompt", pairs=2, length=1024, prompt=0.75),
        LinearCase(
            "1 pair x 256 tokens, H = 896, V = 151,936", pairs=1, hidden_size=896, vocab=151936, source="random"
        ),
    ],
}
#: Fewer rounds than in other benchmarks, because a step takes seconds.
ROUNDS = {"small": 3, "default": 2, "full": 5}
FLOOR = "the products alone"

COLUMNS = [
    Column("title", "method"),
    TIME,
    TIMES_PRODUCTS,
    Column("ours_faster", "time / dpo_kernels, exact", "ratio"),
    EXTRA,
    Column("verdict", "gradient"),
]
DETAILS = [
    Column("title", "method"),
    Column("filtered_faster", "time / dpo_kernels, filtered", "ratio"),
    SPREAD,
    Column("first_call_s", "first call", "time"),
    Column("hidden_error", "error of dH", "error"),
    Column("weight_error", "error of dW", "error"),
]

#: Goals for a CPU in float32 on the first case of full: times as fast as the best peer (exact, filtered); time over that of the
#: products; MiB of extra memory; times as fast with a frozen head as with a trainable one.
EXACT_BAR, FILTERED_BAR, FLOOR_BAR, MEMORY_BAR, FROZEN_BAR = 2.2, 3.5, 1.15, 64, 1.3
#: Policy and reference are projected once each: the products of that case that no filter leaves out.
FORWARD_PRODUCTS = 2


def _products(problem: LinearProblem) -> Contender:
    """The case's dense products over its scored tokens, 256 at a time, by our fastest kernels, into existing buffers."""
    case = problem.case
    rows = problem.hidden.detach()[problem.labels != -100].contiguous()
    head = problem.weight.detach()
    backend = backends.default(rows.device.type)
    logits = logits_buffer(min(256, len(rows)), case.vocab, rows.dtype, rows.device)
    grad_rows = torch.zeros_like(rows[: len(logits)])
    grad_head = torch.zeros(head.shape, dtype=accumulator_dtype(rows.dtype), device=rows.device)

    def run() -> None:
        for begin in range(0, len(rows), len(logits)):
            some = rows[begin : begin + len(logits)]
            dz = logits[: len(some)]
            for _ in range(2 if case.reference == "hidden" else 1):
                multiply(backend, some, head.t(), dz)
            multiply(backend, dz, head, grad_rows[: len(some)])
            if not case.frozen:
                multiply(backend, dz.t(), some, grad_head, add=begin > 0)

    return Contender(FLOOR, run)


def summary(rows: list[dict[str, Any]]) -> str:
    """For the first case: the best peer's time over ours, and our time over that of the products alone."""
    here = {row["peer"]: row for row in rows if row["case"] == rows[0]["case"] and row.get("vs_best")}
    if "ours" not in here:
        return ""
    exact, filtered = here["ours"], here.get("ours_filtered")
    sentence = (
        f"With exact gradients dpo_kernels is {exact['vs_best']:.2f} times as fast as the best peer ({exact['best_peer']}), and "
        f"takes {exact['times_floor']:.2f} times as long as the matrix products alone ({exact['case']})."
    )
    if filtered is None:
        return sentence
    return sentence + (
        f" With the filter it is {filtered['vs_best']:.2f} times as fast as that peer. The filter leaves out products of tiny "
        f"gradient entries, so its time may be less than that of all products ({filtered['times_floor']:.2f} times here)."
    )


RESULT = partial(
    Result,
    "linear_path",
    "Linear path: hidden states and LM head to loss and gradients",
    COLUMNS,
    details=DETAILS,
    floor=PRODUCTS,
    summary=summary,
)


def race(case: LinearCase, settings: Settings, names: list[str]) -> Result:
    """Check the named peers' gradients, then time those that passed, interleaved with the products."""
    dtype = settings.dtypes[0]
    problem = LinearProblem(case, settings.device, DTYPES[dtype])
    truth = LinearTruth(problem)
    yardstick = truth.error_of(LINEAR_PEERS["eager"](problem).step())
    result = RESULT()
    heading = f"{dtype}: {case.name}"
    peers: dict[str, LinearPeer] = {}
    first_call: dict[str, float] = {}
    rows: dict[str, dict[str, Any]] = {}
    for name in names:
        kind = LINEAR_PEERS[name]
        if case.reference == "precomputed" and name.startswith("liger"):
            continue  # takes no precomputed reference
        if kind.filtered and not problem.real:
            continue  # random hidden states make the softmax flat, which tells nothing about a filter
        select = f"test_linear_path[{case.key}-{name}]"
        row: dict[str, Any] = {"case": heading, "key": case.key, "peer": name, "title": kind.title, "ours": kind.ours}
        row |= {"dtype": dtype, "select": select}
        rows[name] = row
        result.rows.append(row)
        if why := kind.why_missing():
            row["verdict"] = f"missing: {why}"
            continue
        kept: list[tuple[torch.Tensor, ...]] = []
        try:
            peer = kind(problem)
            seconds = method.Clock(settings.device).time(lambda peer=peer, kept=kept: kept.append(peer.step()))
        except Exception as error:
            # This version of the peer may differ from the one known here: its row says so, and the other peers go on.
            row["verdict"] = f"fails: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:60]}"
            continue
        method.tell(f"{name}: first call {1e3 * seconds:.3g} ms")
        error = truth.error_of(kept.pop())
        row |= {"hidden_error": error.hidden, "weight_error": error.weight}
        if not error.within(yardstick, kind.filtered):
            row["verdict"] = "WRONG"
            continue
        row["verdict"] = "right"
        peers[name], first_call[name] = peer, seconds
    del truth
    contenders = [_products(problem), *(Contender(name, peer.step) for name, peer in peers.items())]
    # Each contender's first call, in which compilers run, was the check.
    contenders[0].run()
    samples = method.interleave(contenders, ROUNDS[settings.sizes], warmup=0, device=settings.device, called=True)
    gradients = sum(leaf.nbytes for leaf in problem.leaves)
    flops = 2 * case.products * case.scored * case.hidden_size * case.vocab
    result.extra["roofs"] = {dtype: {"gemm": flops / samples[FLOOR].median}}
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
            "flops": flops,
            "bytes": 2 * gradients
            + problem.ref_hidden.nbytes * (case.reference == "hidden")
            + (problem.weight.nbytes if case.frozen else 0),
        }
        for key, ours in (("ours_faster", "ours"), ("filtered_faster", "ours_filtered")):
            if not LINEAR_PEERS[name].ours and ours in samples:
                rows[name][key] = method.ratio(one, samples[ours])
        others = [other for other in peers if not LINEAR_PEERS[other].ours]
        if LINEAR_PEERS[name].ours and (best := method.best_ratio(samples, name, others)):
            rows[name] |= {"vs": {other: method.ratio(samples[other], one) for other in others}}
            rows[name] |= best.row(LINEAR_PEERS[best.peer].title)
            rows[name]["select"] += f" or test_linear_path[{case.key}-{best.peer}]"
    source = "a real model's hidden states on real text" if problem.real else "random hidden states"
    result.notes.append(
        f"{heading}: {case.scored} scored tokens, {source}. The floor is the time of {case.products} matrix products over all "
        f"scored tokens, {flops / 1e9:.0f} GFLOP at {flops / samples[FLOOR].median / 1e9:.0f} GFLOP/s. Extra memory is what a "
        f"step needs on top of inputs and gradients. The error of dH is that of the worst row, relative to that row's norm."
    )
    return result


def bars(rows: list[dict[str, Any]], sizes: str) -> list[dict[str, Any]]:
    """The goals and the measured values, for the size's first case and the same case with a frozen head.

    Speed against a peer also has a ceiling: an exact method cannot be faster than the products alone, and a filtered method
    cannot leave out the forward's products, which are the policy's and the reference's.
    """
    measured = {(row["key"], row["peer"]): row for row in rows if row.get("median_s") and row["dtype"] == "float32"}
    if sizes != "full":
        return []
    first, *others = CASES[sizes]
    exact, filtered = measured.get((first.key, "ours")), measured.get((first.key, "ours_filtered"))
    frozen = next((measured.get((case.key, "ours")) for case in others if case.frozen), None)
    found = []

    def add(what: str, value: float | None, bar: float, *, most: bool = False, ceiling: float | None = None) -> None:
        if value is not None:
            met = value <= bar if most else value >= bar
            found.append({"what": what, "bar": bar, "measured": value, "met": met, "ceiling": ceiling})

    def peers_distance(row: dict[str, Any]) -> float | None:
        """The best peer's time over that of the products alone."""
        peers = (other for other in measured.values() if other["title"] == row.get("best_peer"))
        return next((other["times_floor"] for other in peers if other["key"] == first.key), None)

    if exact:
        add(
            "exact gradient, times as fast as the best peer",
            exact.get("vs_best"),
            EXACT_BAR,
            ceiling=peers_distance(exact),
        )
        add("exact gradient, time over that of the matrix products alone", exact["times_floor"], FLOOR_BAR, most=True)
        extra = exact["extra_bytes"]
        add("exact gradient, MiB of extra memory", None if extra is None else extra / 2**20, MEMORY_BAR, most=True)
    if filtered:
        distance = peers_distance(filtered)
        ceiling = None if distance is None else distance * first.products / FORWARD_PRODUCTS
        add("filtered gradient, times as fast as the best peer", filtered.get("vs_best"), FILTERED_BAR, ceiling=ceiling)
    if exact and frozen:
        add("frozen head, times as fast as a trainable one", exact["median_s"] / frozen["median_s"], FROZEN_BAR)
    return found


@pytest.fixture(scope="module")
def measured(
    case: LinearCase, settings: Settings, publish: Callable[[Result], Result], request: pytest.FixtureRequest
) -> dict[str, dict[str, Any]]:
    """The rows of one case, by peer."""
    found = race(case, settings, wanted(request, "test_linear_path", "linear_peer", case=case))
    mine = {row["peer"]: row for row in found.rows}
    published = publish(found)
    if settings.device == "cpu":
        published.extra["bars"] = bars(published.rows, settings.sizes)
    return mine


def test_linear_path(measured: dict[str, dict[str, Any]], linear_peer: str, replay: Callable[[Samples], None]) -> None:
    row = measured.get(linear_peer)
    if row is None:
        pytest.skip("not measured in this case: the result would mean nothing")
    verdict = row["verdict"]
    if verdict.startswith(("missing", "fails")):
        (pytest.fail if row["ours"] else pytest.skip)(verdict)
    if verdict == "WRONG":
        reason = f"gradient off by {row['hidden_error']:.1%} (worst row of dH), {row['weight_error']:.1%} (dW)"
        if LINEAR_PEERS[linear_peer].ours:
            pytest.fail(reason)
        pytest.xfail(reason)
    replay(Samples(row["samples_s"]))
