"""Single pairs of an evaluation: their margins before and after training, the hardest and the most improved pairs."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dpo_kernels import DPOOutput

from ..data.tokens import TOKENS

SHOWN = 4  # number of hardest pairs, and of most improved pairs
LONGEST = 600  # length in characters beyond which a text is shortened
#: The standard errors that every evaluation logs.
ERRORS = ("loss_se", "rewards/accuracies_se")


@dataclass(frozen=True)
class Example:
    """One pair for the report: its texts, and its margins in nats under the reference (before) and the policy (after)."""

    prompt: str
    chosen: str
    rejected: str
    before: float
    after: float


@dataclass(frozen=True)
class EvaluatedPairs:
    """The pairs of one evaluation.

    Attributes:
        before, after: log-probability of the chosen answer minus that of the rejected one, in nats, under the reference
            and under the policy; in the dataset's order.
        hardest: pairs whose rejected answer the policy still prefers, those that it prefers most first.
        improved: pairs whose margin grew, those whose margin grew most first.
        gained: by side ("chosen", "rejected"), the mean log-probability that answers gained over the reference, with its
            standard error, in nats per answer.
    """

    before: list[float]
    after: list[float]
    hardest: list[Example]
    improved: list[Example]
    gained: dict[str, tuple[float, float]] = field(default_factory=dict)


def look_at(output: DPOOutput, dataset: Any, tokenizer: Any) -> EvaluatedPairs | None:
    """The pairs of an evaluation. None without a reference, or if rows and outputs do not correspond.

    Args:
        output: the output of all pairs, in the dataset's order.
        dataset: tokenised pairs.
        tokenizer: decodes their tokens.
    """
    columns = getattr(dataset, "column_names", None) or ()
    if "chosen_ids" not in columns or len(dataset) != len(output.chosen_logps):
        return None
    if not (output.ref_chosen_logps.any() or output.ref_rejected_logps.any()):
        return None
    before = (output.ref_chosen_logps - output.ref_rejected_logps).double().cpu()
    after = (output.chosen_logps - output.rejected_logps).double().cpu()
    if not (before.isfinite().all() and after.isfinite().all()):
        return None

    def example(index: int) -> Example:
        row = dataset[index]
        texts = tokenizer.batch_decode([row[ids] for ids in TOKENS], skip_special_tokens=True)
        prompt, chosen, rejected = (shortened(text.strip(), LONGEST, "...") for text in texts)
        return Example(prompt, chosen, rejected, before[index].item(), after[index].item())

    hard = [index for index in torch.argsort(after).tolist() if after[index] < 0]
    grown = [index for index in torch.argsort(before - after).tolist() if after[index] > before[index]]
    sides = {
        "chosen": output.chosen_logps - output.ref_chosen_logps,
        "rejected": output.rejected_logps - output.ref_rejected_logps,
    }
    return EvaluatedPairs(
        before.tolist(),
        after.tolist(),
        [example(index) for index in hard[:SHOWN]],
        [example(index) for index in grown[:SHOWN]],
        {side: mean_and_error(values, torch.ones_like(values)) for side, values in sides.items()},
    )


def shortened(text: str, longest: int, mark: str) -> str:
    """The text. If it has more than `longest` characters, its start and its end with `mark` between them."""
    return text if len(text) <= longest else f"{text[: longest // 2]} {mark} {text[-longest // 2 :]}"


def mean_and_error(values: Tensor, weights: Tensor) -> tuple[float, float]:
    """Weighted mean of independent values [P], and its standard error, which is NaN for fewer than two values."""
    values, weights = values.double(), weights.double()
    total, count = weights.sum(), len(values)
    mean = (weights * values).sum() / total
    error = (weights * (values - mean)).square().sum().sqrt() / total
    return mean.item(), error.item() * math.sqrt(count / (count - 1)) if count > 1 else math.nan


def share_error(share: float, count: int) -> float:
    """Standard error of a share of `count` pairs.

    Two hits and two misses are added (Agresti and Coull 1998), so that the error is not 0 for a share of 0 or 1.
    """
    likely = (share * count + 2) / (count + 4)
    return math.sqrt(likely * (1 - likely) / (count + 4))


class Evaluations:
    """Compares an evaluation, pair by pair, with the first and with the best earlier one.

    Args:
        losses: the attribute `losses` of an earlier object, to continue from it.

    Attributes:
        losses: by the prefix of the metrics, the losses [P] of the "first" and of the "best" evaluation.
    """

    def __init__(self, losses: dict[str, dict[str, Tensor]] | None = None) -> None:
        self.losses = losses or {}

    def compare(self, prefix: str, output: DPOOutput, weights: Tensor, *, begun: bool, keep: bool) -> dict[str, float]:
        """Standard errors of an evaluation's loss and accuracy, and the differences of its loss from earlier losses.

        `loss_since_first` and `loss_since_best` are differences over the same pairs. Their standard errors (`..._se`) are
        far smaller than those of the two losses. Values that are not known are left out.

        Args:
            output: the output of all pairs.
            weights: the pairs' weights [P].
            begun: whether a step was taken, so that this cannot be the first evaluation.
            keep: whether later evaluations are compared with this one.
        """
        losses, kept = output.losses.double(), self.losses.get(prefix, {})
        loss, error = mean_and_error(losses, weights)
        right = (output.chosen_rewards > output.rejected_rewards).double().mean().item()
        found = dict(zip(ERRORS, (error, share_error(right, len(losses))), strict=True))
        for name, earlier in kept.items():
            if len(earlier) == len(losses):
                change, error = mean_and_error(losses - earlier, weights)
                if name == "first" or change > 0:
                    found |= {f"loss_since_{name}": change, f"loss_since_{name}_se": error}
        if keep:
            best = kept.get("best")
            better = best is None or len(best) != len(losses) or mean_and_error(best, weights)[0] > loss
            new = {"first": losses} if not begun else {}
            self.losses[prefix] = {**kept, **new, **({"best": losses} if better else {})}
        return {name: value for name, value in found.items() if math.isfinite(value)}
