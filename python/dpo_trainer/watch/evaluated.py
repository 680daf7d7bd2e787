"""What an evaluation says of single pairs: how their margins moved, and which ones are hardest and most improved."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dpo_kernels import DPOOutput

from ..data.tokens import TOKENS

SHOWN = 4  # pairs of each kind
LONGEST = 600  # characters of a text
#: The standard errors that every evaluation logs.
ERRORS = ("loss_se", "rewards/accuracies_se")


@dataclass(frozen=True)
class Example:
    """One pair as a reader wants it: its texts, and its margins in nats under reference and policy."""

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
        hardest: the pairs whose rejected answer the policy still prefers, by the largest margin first.
        improved: the pairs whose margin grew most.
        gained: log-probability that chosen and rejected answers gained over the reference: mean and standard error, in nats an
            answer.
    """

    before: list[float]
    after: list[float]
    hardest: list[Example]
    improved: list[Example]
    gained: dict[str, tuple[float, float]] = field(default_factory=dict)


def look_at(output: DPOOutput, dataset: Any, tokenizer: Any) -> EvaluatedPairs | None:
    """Pick from an evaluation's output; None without a reference or where rows and outputs do not correspond.

    Args:
        output: of all pairs, in the dataset's order.
        dataset: tokenised pairs.
        tokenizer: to show them with.
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
    """The text, or its two ends around a mark where it has more than `longest` characters."""
    return text if len(text) <= longest else f"{text[: longest // 2]} {mark} {text[-longest // 2 :]}"


def mean_and_error(values: Tensor, weights: Tensor) -> tuple[float, float]:
    """Weighted mean of independent values [P], and its standard error, which is NaN for fewer than two."""
    values, weights = values.double(), weights.double()
    total, count = weights.sum(), len(values)
    mean = (weights * values).sum() / total
    error = (weights * (values - mean)).square().sum().sqrt() / total
    return mean.item(), error.item() * math.sqrt(count / (count - 1)) if count > 1 else math.nan


def share_error(share: float, count: int) -> float:
    """Standard error of a share of `count` pairs.

    With two hits and two misses added (Agresti and Coull 1998): ten hits of ten do not make a share certain.
    """
    likely = (share * count + 2) / (count + 4)
    return math.sqrt(likely * (1 - likely) / (count + 4))


class Evaluations:
    """Compares an evaluation with the first and with the best before it, pair by pair.

    Args:
        losses: the state to go on from, as the attribute has it.

    Attributes:
        losses: by the prefix of the metrics, the losses [P] of the first and of the best evaluation.
    """

    def __init__(self, losses: dict[str, dict[str, Tensor]] | None = None) -> None:
        self.losses = losses or {}

    def compare(self, prefix: str, output: DPOOutput, weights: Tensor, *, begun: bool, keep: bool) -> dict[str, float]:
        """The standard errors of an evaluation's loss and accuracy, and how its loss differs from earlier ones'.

        `loss_since_first` and `loss_since_best` are differences over the same pairs, whose standard errors (`..._se`) are far
        smaller than those of the two losses. What is not known is left out.

        Args:
            output: of all pairs.
            weights: of the pairs [P].
            begun: whether a step was taken, so this cannot be the first evaluation.
            keep: whether later ones are to be compared with this.
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
