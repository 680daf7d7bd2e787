"""What an evaluation says of single pairs: how their margins moved, and which ones are hardest and most improved."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from dpo_kernels import DPOOutput

from ..data.tokens import TOKENS

SHOWN = 4  # pairs of each kind
LONGEST = 600  # characters of a text


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
        hardest: the pairs that the policy gets most wrong, or least right, compared with the reference.
        improved: the pairs whose margin grew most.
    """

    before: list[float]
    after: list[float]
    hardest: list[Example]
    improved: list[Example]


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
    order = torch.argsort(after - before).tolist()

    def example(index: int) -> Example:
        row = dataset[index]
        texts = tokenizer.batch_decode([row[ids] for ids in TOKENS], skip_special_tokens=True)
        prompt, chosen, rejected = (shortened(text.strip(), LONGEST, "...") for text in texts)
        return Example(prompt, chosen, rejected, before[index].item(), after[index].item())

    few = min(SHOWN, len(order) // 2)
    hardest, improved = ([example(index) for index in ordered[:few]] for ordered in (order, order[::-1]))
    return EvaluatedPairs(before.tolist(), after.tolist(), hardest, improved)


def shortened(text: str, longest: int, mark: str) -> str:
    """The text, or its two ends around a mark where it has more than `longest` characters."""
    return text if len(text) <= longest else f"{text[: longest // 2]} {mark} {text[-longest // 2 :]}"
