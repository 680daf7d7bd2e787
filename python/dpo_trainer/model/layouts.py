"""Finds the batch layouts that a model supports by running it on a batch in each layout."""

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
    """Set the collator to the layouts in which all models give the same results as with padding.

    Tries a batch with shared prompts and packed rows, once with attention by sequence and once with a mask over whole rows,
    because each batch uses the cheaper of the two. Autocast is off: its rounding would hide small leaks from one sequence
    into another.

    Args:
        collator: its `attention_cost` and `by_sequence` are set, and its `layout` too if prompts cannot be shared.
        splits: the policy, then the reference if it is a separate model.
        rows: tokenised pairs.
        prepare: moves a batch to the models' device.
        compiled: whether backbones are compiled. Attention by sequence is then off, because every number of sequences would
            cause a recompilation.
    """
    if around := next((split.around for split in splits if split.around), None):  # `verify` has already logged this
        if collator.layout == "prefix_shared":
            logger.warning("batch_layout: 'prefix_shared' is not possible, because %s; using padded batches", around)
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
            logger.warning("%s; using padded batches, which is slower", reason)
