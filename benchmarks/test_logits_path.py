"""Which way from logits to loss and gradient is fastest, what memory does it need, and is its gradient right?"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import pytest
import torch

from . import method
from .conftest import DTYPES, Settings, wanted
from .method import Contender, Samples
from .peers import PEERS, Peer
from .problem import GradientError, LogitsProblem, Truth, error_budget
from .report import BEST_PEER, EXTRA, SLOWER, SPREAD, TIME, TIMES_FLOOR, TRAFFIC, VS_BEST, Column, Result, listed

#: [2P, T, V], all tokens scored. The default has SmolLM2's vocabulary; full adds Llama 3's. Both exceed any cache.
SHAPES = {
    "small": [(4, 32, 8192)],
    "default": [(4, 64, 49152)],
    "full": [(8, 128, 49152), (8, 128, 128256)],
}

#: Goals for a CPU in float32, in place: (our row, peer that does the same work, bar, aim).
BARS = (
    ("ours_inplace", "eager", 5.0, 7.0),
    ("ours_inplace", "compiled", 3.0, 4.0),
    ("ours_inplace_stats", "trl_old", 10.0, 15.0),
)
FLOOR_BAR, FLOOR_AIM = 2.0, 1.5

#: Operations per logit, an exponential counted as one: three to add it to a log-sum-exp, in the policy and in the
#: reference, and three for its gradient.
FLOPS_PER_LOGIT = 9

COLUMNS = [
    Column("title", "method"),
    TIME,
    TIMES_FLOOR,
    SLOWER,
    EXTRA,
    Column("verdict", "gradient"),
]
DETAILS = [
    Column("title", "method"),
    SPREAD,
    VS_BEST,
    BEST_PEER,
    Column("first_call_s", "first call", "time"),
    Column("gradient_error", "gradient error", "error"),
]


def counterpart(name: str, present: Collection[str]) -> str | None:
    """Our method that does the same work as a peer, statistics included; the in-place method if it is present."""
    same = [ours for ours in PEERS if PEERS[ours].ours and PEERS[ours].statistics == PEERS[name].statistics]
    return next((ours for ours in reversed(same) if ours in present), None)


def summary(rows: list[dict[str, Any]]) -> str:
    """For each case of loss and gradient: how much longer each peer takes, and our time over that of memory traffic alone."""
    sentences = []
    for case in dict.fromkeys(row["case"] for row in rows if row["part"] == "step"):
        here = {row["peer"]: row for row in rows if row["case"] == case}
        best = here.get("ours_inplace") or here.get("ours")
        if best is None or not best.get("times_floor"):
            continue
        peers = [
            f"{row['ours_faster']:.1f} times as fast as {row['title']}"
            for row in here.values()
            if row.get("ours_faster")
        ]
        wrong = [row["title"] for row in here.values() if row.get("verdict") == "WRONG"]
        shape = case.removesuffix(", loss and gradient")
        sentence = f"{shape}: {best['title']} is {listed(peers)}; it " if peers else f"{shape}: {best['title']} "
        sentence += f"takes {best['times_floor']:.2f} times as long as memory traffic alone."
        sentences.append(
            sentence + (f" The gradient of {listed(wrong)} is wrong, so it is not timed." if wrong else "")
        )
    if sentences:
        sentences.append('"In place" means that the gradient is written over the logits (`inplace_backward=True`).')
    return " ".join(sentences)


RESULT = partial(
    Result,
    "logits_path",
    "Logits path: policy and reference logits [sequences, tokens, vocabulary] to loss and gradient",
    COLUMNS,
    details=DETAILS,
    floor=TRAFFIC,
    summary=summary,
)


@dataclass
class Race:
    """All peers on one problem."""

    step: dict[str, Samples]
    forward: dict[str, Samples]
    errors: dict[str, GradientError]
    missing: dict[str, str]
    budget: float
    floors: method.Floors
    gemm: float

    def wrong(self, name: str) -> bool:
        return name in self.errors and not self.errors[name].worst <= self.budget


def run(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    settings: Settings,
    steppers: list[str],
    forwarders: list[str],
) -> Race:
    """Check every peer's gradient, then time the peers that passed, interleaved with the floors.

    steppers, forwarders: names of the peers whose step or forward is timed.
    """
    problem = LogitsProblem(shape, dtype, settings.device)
    truth = Truth(problem)
    names = [name for name in PEERS if name in steppers or name in forwarders]
    missing = {name: f"missing: {why}" for name in names if (why := PEERS[name].why_missing())}
    errors: dict[str, GradientError] = {}
    peers: dict[str, Peer] = {}
    first_call: dict[str, float] = {}
    for name in names:
        if name in missing:
            continue
        problem.next()
        gradient: list[torch.Tensor] = []
        try:
            peer = PEERS[name](problem)
            # Compilers run in the first call, whose time is part of the result.
            clock = method.Clock(settings.device)
            first_call[name] = clock.time(lambda peer=peer, keep=gradient: keep.append(peer.step()))
            method.tell(f"{name}: first call {1e3 * first_call[name]:.3g} ms")
        except Exception as error:
            # This version of the peer may differ from the one known here: its row says so, and the other peers go on.
            if PEERS[name].ours:
                raise
            missing[name] = f"fails: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:60]}"
            continue
        errors[name] = truth.error_of(gradient.pop())
        if errors[name].worst <= error_budget(dtype):
            peers[name] = peer
    del truth
    scratch = torch.zeros_like(problem.ref_logits)
    floors = method.floor_contenders(problem.ref_logits, scratch)
    step = method.interleave(
        [*floors, *(Contender(name, peers[name].step, problem.next) for name in steppers if name in peers)],
        settings.rounds,
        device=settings.device,
    )
    forward = method.interleave(
        [
            *floors,
            *(Contender(name, peers[name].forward_only, problem.next) for name in forwarders if name in peers),
        ],
        settings.rounds,
        device=settings.device,
    )
    for name in steppers:
        if name in step:
            step[name].first_call = first_call[name]
    floor = method.Floors.of(step, problem.nbytes)
    return Race(step, forward, errors, missing, error_budget(dtype), floor, method.gemm_rate(settings.device, dtype))


def table(race: Race, shape: tuple[int, int, int], dtype: str, steppers: list[str], forwarders: list[str]) -> Result:
    """Rows of both parts, with the ratio to the floor and to every peer that is not ours."""
    names = [name for name in PEERS if name in steppers or name in forwarders]
    others = [name for name in names if not PEERS[name].ours]
    result = RESULT()
    label = f"{dtype} {list(shape)}"
    nbytes = shape[0] * shape[1] * shape[2] * DTYPES[dtype].itemsize
    for part, samples in (("step", race.step), ("forward", race.forward)):
        case = f"{label}, loss and gradient" if part == "step" else f"{label}, loss alone"
        test = "test_loss_and_gradient" if part == "step" else "test_loss_alone"
        for name in steppers if part == "step" else forwarders:
            peer = PEERS[name]
            passes = peer.passes if part == "step" else peer.forward_passes
            assert passes is not None
            row: dict[str, Any] = {"case": case, "part": part, "dtype": dtype, "shape": list(shape), "peer": name}
            row |= {"title": peer.title, "ours": peer.ours, "statistics": list(peer.statistics)}
            identity = f"{test}[{dtype}-{'x'.join(map(str, shape))}"
            row["select"] = f"{identity}-{name}]"
            if name in race.missing:
                row["verdict"] = race.missing[name]
            elif race.wrong(name):
                row |= {"gradient_error": race.errors[name].worst, "verdict": "WRONG"}
            else:
                one = samples[name]
                row |= {
                    "median_s": one.median,
                    "spread": one.spread,
                    "samples_s": one.seconds,
                    "floor_s": samples[method.FLOOR_NAMES[0]].median * passes / 2,
                    "times_floor": method.passes_over_copy(samples, name, passes),
                    "extra_bytes": one.extra_bytes,
                    "page_faults": one.page_faults or None,
                }
                if part == "step":
                    row |= {
                        "flops": FLOPS_PER_LOGIT * (nbytes // DTYPES[dtype].itemsize),
                        "bytes": passes * nbytes,
                        "first_call_s": one.first_call,
                        "gradient_error": race.errors[name].worst,
                        "verdict": "right",
                    }
                if not peer.ours and (ours := counterpart(name, samples)):
                    row["ours_faster"] = method.ratio(one, samples[ours])
                if peer.ours and (best := method.best_ratio(samples, name, others)):
                    row |= {f"vs_{o}": method.ratio(samples[o], one) for o in others if o in samples}
                    row |= best.row(PEERS[best.peer].title)
                    row["select"] += f" or {identity}-{best.peer}]"
            result.rows.append(row)
    floors = race.floors
    result.notes.append(
        f"{label}: this machine copies {floors.copy / 1e9:.1f} GB/s, reads {floors.read / 1e9:.1f} and writes "
        f"{floors.write / 1e9:.1f}. The floor is the time to move {nbytes / 2**20:,.0f} MiB at the copy's speed: 4 times for "
        f"loss and gradient (read policy and reference; read the policy again, write its gradient), 2 times for the loss alone."
    )
    for name in names:
        if race.wrong(name):
            error = race.errors[name]
            result.notes.append(
                f"{dtype}: the gradient of {PEERS[name].title} is WRONG (off by {100 * error.label:.1f} % at the "
                f"labels, {100 * error.others:.1f} % elsewhere; allowed {100 * race.budget:.2f} %): not timed."
            )
    if "ours" in race.step and "ours_inplace" in race.step and race.step["ours"].page_faults:
        fresh, inplace = race.step["ours"], race.step["ours_inplace"]
        lost = statistics.median(a - b for a, b in zip(fresh.seconds, inplace.seconds, strict=True))
        result.notes.append(
            f"{dtype}: a gradient in new memory takes {PEERS['ours'].title} {lost * 1e3:.0f} ms longer than one written over the "
            f"logits, because of page faults: {fresh.page_faults:,} against {inplace.page_faults:,}."
        )
    result.extra["floors"] = {dtype: asdict(floors)}
    result.extra["roofs"] = {dtype: {"copy": floors.copy, "gemm": race.gemm}}
    return result


def bars(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The goals of BARS and the measured values, on the default shape in float32."""
    step = {
        r["peer"]: r for r in rows if r["part"] == "step" and r["dtype"] == "float32" and r["shape"] == [8, 128, 49152]
    }
    found = []
    for ours, peer, bar, aim in BARS:
        if ours in step and (measured := step[ours].get(f"vs_{peer}")):
            what = f"{PEERS[ours].title}, times as fast as {PEERS[peer].title}"
            found.append({"what": what, "bar": bar, "aim": aim, "measured": measured, "met": measured >= bar})
    if "ours_inplace" in step and (measured := step["ours_inplace"].get("times_floor")):
        what = f"{PEERS['ours_inplace'].title}, time over that of memory traffic alone"
        found.append(
            {"what": what, "bar": FLOOR_BAR, "aim": FLOOR_AIM, "measured": measured, "met": measured <= FLOOR_BAR}
        )
    return found


@pytest.fixture(scope="module")
def race(
    shape: tuple[int, int, int],
    dtype: str,
    settings: Settings,
    publish: Callable[[Result], Result],
    request: pytest.FixtureRequest,
) -> Race:
    where = {"dtype": dtype, "shape": shape}
    steppers = wanted(request, "test_loss_and_gradient", "peer", **where)
    forwarders = wanted(request, "test_loss_alone", "forward_peer", **where)
    found = run(shape, DTYPES[dtype], settings, steppers, forwarders)
    result = publish(table(found, shape, dtype, steppers, forwarders))
    if settings.device == "cpu":
        result.extra["bars"] = bars(result.rows)
    return found


def _check(race: Race, peer: str) -> None:
    if peer in race.missing:
        pytest.skip(race.missing[peer])
    if race.wrong(peer):
        reason = f"gradient off by {race.errors[peer].worst:.1%}, allowed {race.budget:.2%}"
        if PEERS[peer].ours:
            pytest.fail(reason)
        pytest.xfail(reason)


def test_loss_and_gradient(race: Race, peer: str, replay: Callable[[Samples], None]) -> None:
    _check(race, peer)
    replay(race.step[peer])


def test_loss_alone(race: Race, forward_peer: str, replay: Callable[[Samples], None]) -> None:
    _check(race, forward_peer)
    replay(race.forward[forward_peer])
