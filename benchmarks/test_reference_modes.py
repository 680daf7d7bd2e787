"""What does each form of the reference cost: whole logits, hidden states and head, precomputed sums, or no reference?"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dpo_kernels import dpo_loss

from . import method
from .conftest import DTYPES, Settings, wanted
from .linear_problem import LinearCase, LinearProblem, LinearTruth
from .method import Contender, Samples
from .peers.eager import dpo_from_sums
from .peers.linear import LINEAR_PEERS, LinearPeer
from .problem import BETA
from .report import EXTRA, SPREAD, TIME, Column, Result

#: (pairs, tokens, half of which are prompt); vocabulary; hidden size.
SIZES = {"small": ((1, 32), 4096, 64), "default": ((1, 32), 49152, 576), "full": ((4, 256), 49152, 576)}

MODES = {
    "whole": "whole logits of both",
    "hidden": "hidden states and head",
    "precomputed": "sums computed before",
    "none": "no reference",
}

COLUMNS = [
    Column("title", "method"),
    TIME,
    SPREAD,
    Column("over_none", "time / no reference", "ratio"),
    Column("vs_best", "faster than eager by", "ratio"),
    EXTRA,
]


def summary(rows: list[dict[str, Any]]) -> str:
    """Time of each form of the reference over the time without a reference."""
    costs = [
        f"{row['over_none']:.2f} ({MODES[row['mode']]})"
        for row in rows
        if row["ours"] and row.get("over_none") and row["mode"] != "none"
    ]
    return (
        f"Time of a step with a reference, over that of a step without, by what is given: {', '.join(costs)}."
        if costs
        else ""
    )


RESULT = partial(
    Result,
    "reference_modes",
    "Reference: loss and gradients, by where the reference comes from",
    COLUMNS,
    summary=summary,
)


class EagerLogits(LinearPeer):
    """Both models' logits as tensors, then the textbook formula: as LinearPeer "eager", but for all positions."""

    name, title = "eager_logits", "eager PyTorch"

    def loss(self) -> Tensor:
        problem = self.problem
        with torch.no_grad():
            reference = self._sums(F.linear(problem.ref_hidden, problem.ref_weight))
        return dpo_from_sums(self._sums(F.linear(problem.hidden, problem.weight)), reference)

    def _sums(self, logits: Tensor) -> Tensor:
        labels = self.problem.labels
        logps = logits.float().log_softmax(-1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        return torch.where(labels != -100, logps, 0.0).sum(-1)


class OursLogits(LinearPeer):
    """Both models' logits as tensors, then `dpo_loss`, which writes the gradient over them."""

    name, title, ours = "ours_whole", "dpo_kernels", True

    def loss(self) -> Tensor:
        problem = self.problem
        with torch.no_grad():
            ref_logits = F.linear(problem.ref_hidden, problem.ref_weight)
        logits = F.linear(problem.hidden, problem.weight)
        return dpo_loss(logits, problem.labels, ref_logits=ref_logits, beta=BETA, inplace_backward=True).loss


def peer(name: str, problem: LinearProblem) -> LinearPeer:
    """The contender `runner-mode`, on a problem of its mode."""
    runner, mode = name.split("-")
    if mode == "whole":
        return (OursLogits if runner == "ours" else EagerLogits)(problem)
    return LINEAR_PEERS[runner](problem)


@pytest.fixture(scope="module")
def samples(
    settings: Settings, publish: Callable[[Result], Result], request: pytest.FixtureRequest
) -> dict[str, Samples]:
    (pairs, length), vocab, hidden = SIZES[settings.sizes]
    dtype = settings.dtypes[0]
    names = wanted(request, "test_reference_modes", "name")
    contenders, leaves = [], 0
    for mode in MODES:
        mine = [name for name in names if name.endswith(f"-{mode}")]
        if not mine:
            continue
        reference = "hidden" if mode == "whole" else mode
        case = LinearCase("", pairs, length, hidden_size=hidden, vocab=vocab, reference=reference, source="random")
        problem = LinearProblem(case, settings.device, DTYPES[dtype])
        leaves = sum(leaf.nbytes for leaf in problem.leaves)
        truth = LinearTruth(problem)
        yardstick = truth.error_of(LINEAR_PEERS["eager"](problem).step())
        for name in mine:
            one = peer(name, problem)
            error = truth.error_of(one.step())
            assert error.within(yardstick), f"{name}: gradient off by {error}, eager by {yardstick}"
            contenders.append(Contender(name, one.step))
    rounds = 5 if settings.sizes == "full" else 2
    found = method.interleave(contenders, rounds, warmup=0, device=settings.device, called=True)
    result = RESULT()
    for name in names:
        runner, mode = name.split("-")
        row: dict[str, Any] = {"case": f"{dtype} {2 * pairs} x {length} tokens, half prompt", "mode": mode}
        row |= {"title": f"{LINEAR_PEERS[runner].title.removesuffix(', exact')}, {MODES[mode]}"}
        row |= {"ours": runner == "ours", "median_s": found[name].median, "spread": found[name].spread}
        row["select"] = f"test_reference_modes[{name}]"
        if found[name].extra_bytes is not None:
            row["extra_bytes"] = max(0, found[name].extra_bytes - leaves)
        if f"{runner}-none" in found:
            row["over_none"] = method.ratio(found[name], found[f"{runner}-none"])
        if runner == "ours" and (best := method.best_ratio(found, name, [f"eager-{mode}"])):
            row |= best.row(LINEAR_PEERS["eager"].title)
            row["select"] += f" or test_reference_modes[{best.peer}]"
        result.rows.append(row)
    if "ours-hidden" in found and "ours-precomputed" in found:
        saved = method.ratio(found["ours-hidden"], found["ours-precomputed"])
        result.notes.append(
            f"{dtype}: with reference sums that were computed before, the head's step is {saved:.2f} times as fast as with the "
            f"reference's hidden states. It also saves the reference's own forward pass, which is not counted here."
        )
    publish(result)
    return found


@pytest.mark.parametrize("name", [f"{runner}-{mode}" for mode in MODES for runner in ("eager", "ours")])
def test_reference_modes(samples: dict[str, Samples], name: str, replay: Callable[[Samples], None]) -> None:
    replay(samples[name])
