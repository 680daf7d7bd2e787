"""Which layouts of a batch a model can take: found by asking it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from ..batch.collator import PairCollator
from .split import Batch, SplitModel

logger = logging.getLogger("dpo_trainer")


def choose_layout(
    collator: PairCollator,
    splits: Sequence[SplitModel],
    rows: list[dict[str, Any]],
    prepare: Callable[[Any], Batch],
    *,
    compiled: bool,
) -> None:
    """Try a batch in which pairs share prompts and a row; set the collator to what all models answer rightly.

    Without autocast, because rounding would hide small leaks from one sequence into another. Both attention by sequence
    and a mask over whole rows are tried, since batches take what costs least.

    Args:
        collator: gets `attention_cost`, `by_sequence` and, where prompts cannot be shared, another `layout`.
        splits: the policy first, then a reference that is a model of its own.
        rows: tokenised pairs.
        prepare: moves a batch to the models' device.
        compiled: whether backbones are compiled. They would be compiled anew for every number of sequences, so they get
            masks alone.
    """
    if any(split.around for split in splits):  # which has been told
        collator.layout = "padded"
        return
    collator.attention_cost = splits[0].attention_cost()
    sequences, shared, padded = (
        prepare(replace(collator, layout=layout, attention_cost=0.0)(rows))
        for layout in ("sequences", "prefix_shared", "padded")
    )

    def obstacle(batch: Batch) -> str | None:
        found = ((split, split.obstacle_to_layout(batch, padded)) for split in splits)
        return next(
            (f"{type(split.model).__name__}: prompts cannot be shared, {why}" for split, why in found if why), None
        )

    if not compiled:
        undo = [split.attend_by_sequence() for split in splits]
        collator.by_sequence = all(undo) and obstacle(sequences) is None
        if not collator.by_sequence:
            for restore in filter(None, undo):
                restore()
    if reason := obstacle(shared):
        collator.layout = "sequences" if collator.by_sequence else "padded"
        if not collator.by_sequence:
            logger.warning("%s; using padded batches, slower", reason)
