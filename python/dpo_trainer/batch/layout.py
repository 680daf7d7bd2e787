"""Where the tokens of a batch stand: which rows, which neighbours, and what every token may attend to.

A pair is laid out in one of two ways. *Apart*, each side is a sequence of its own and carries its own copy of the prompt.
*Shared*, prompt, chosen and rejected stand in one sequence: both completions attend to the prompt and not to each other,
and both take up the positions that follow the prompt. Sequences of either kind may share a row of the batch when none
attends to another. What a row holds follows from lengths alone (`arrange`), what it may see from segment numbers
(`attention_inputs`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import LAYOUTS as LAYOUTS
from . import attention

#: What the calls of attention for one more sequence cost, in tokens: a few in a model of 135 million parameters, measured on
#: pairs of 36 tokens, where nothing else differed (2.0 to 3.9 in batches of 8 and 16); less in larger ones.
SEQUENCE_COST = 4.0

#: Segment numbers of a row's k-th sequence: 3k its prompt, 3k + 1 chosen, 3k + 2 rejected; padding has PADDING.
PADDING = -1


class Piece(NamedTuple):
    """One sequence of a row: a pair's prompt followed by one side, or by both."""

    pair: int
    sides: tuple[int, ...]  # 0 chosen, 1 rejected
    length: int


Rows = list[list[Piece]]


def arrange(lengths: Sequence[tuple[int, int, int]], layout: str = "auto", attention_cost: float = 1e-3) -> Rows:
    """Distribute pairs over rows.

    Args:
        lengths: tokens of (prompt, chosen, rejected) of every pair that the model reads.
        layout: "padded": one sequence a row, chosen ones first, then rejected ones; "prefix_shared": shared pairs, as
            many to a row as pays; "auto": the cheapest of these and of sequences apart, as many to a row as pays.
        attention_cost: see `cost`.
    """
    apart = [Piece(pair, (side,), parts[0] + parts[1 + side]) for side in (0, 1) for pair, parts in enumerate(lengths)]
    padded = [[piece] for piece in apart]
    if layout == "padded":
        return padded
    candidates = _packings(row_of_sequences(lengths))
    if layout == "auto":
        # The first of equals wins: padded rows need no mask of their own.
        candidates = [padded, *candidates, *_packings(apart)]
    return min(candidates, key=lambda rows: cost(rows, attention_cost))


def cost(rows: Rows, attention_cost: float) -> float:
    """Work of a batch, in tokens: every token of every row costs 1, and each key that it is compared with `attention_cost`.

    Masked attention computes whole rows, padding and other sequences included, so length counts squared.
    """
    longest = width(rows)
    return len(rows) * longest * (1 + attention_cost * longest)


def row_of_sequences(lengths: Sequence[tuple[int, int, int]]) -> list[Piece]:
    """All pairs in one row, every prompt once, for a model that attends by sequence (see `attention`)."""
    return [Piece(pair, (0, 1), sum(parts)) for pair, parts in enumerate(lengths)]


def cost_by_sequence(row: list[Piece], attention_cost: float) -> float:
    """Work of a batch as `cost` counts it, where every sequence is attended to alone: none is compared with another."""
    return sum(piece.length * (1 + attention_cost * piece.length) + SEQUENCE_COST for piece in row)


def width(rows: Rows) -> int:
    """Tokens of the longest row."""
    return max(sum(piece.length for piece in row) for row in rows)


def _packings(pieces: list[Piece]) -> list[Rows]:
    """The pieces over 1, 2, ... rows: the longest first, each into the row that is shortest so far."""
    ordered = sorted(pieces, key=lambda piece: -piece.length)
    candidates = []
    for count in range(1, len(ordered) + 1):
        rows: Rows = [[] for _ in range(count)]
        loads = [0] * count
        for piece in ordered:
            row = loads.index(min(loads))
            rows[row].append(piece)
            loads[row] += piece.length
        candidates.append(rows)
    return candidates


# --- what tokens attend to -----------------------------------------------------------------------------------------


def attention_inputs(batch: Mapping[str, Tensor], config: Any, dtype: torch.dtype) -> dict[str, Any]:
    """`attention_mask` and, where rows hold more than one sequence, `position_ids`, as a transformers model takes them.

    Padded batches keep their mask [B, T]. A model that attends by sequence gets their lengths in its place. Others get a
    mask [B, 1, T, T], boolean or, for eager attention, additive in `dtype`. Where the rows are longer than the model's
    sliding window, the window is in the mask, and models that mix windowed with full attention get one mask for each.
    """
    if "segments" not in batch:
        return {"attention_mask": batch["attention_mask"]}
    segments, positions = batch["segments"], batch["position_ids"]
    implementation = getattr(config, "_attn_implementation", None)
    if implementation == attention.NAME and "sequences" in batch:
        return {"attention_mask": attention.as_mask(batch["sequences"]), "position_ids": positions}
    allowed = visible(segments)
    additive = implementation == "eager"

    def finish(mask: Tensor) -> Tensor:
        mask = mask[:, None]
        return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min) if additive else mask

    kinds = set(getattr(config, "layer_types", None) or ["sliding_attention"])
    window = getattr(config, "sliding_window", None) if "sliding_attention" in kinds else None
    masks: Any = finish(allowed)
    if window is not None and window < segments.shape[1]:
        windowed = finish(allowed & (positions[:, :, None] - positions[:, None, :] < window))
        masks = {"full_attention": masks, "sliding_attention": windowed} if len(kinds) > 1 else windowed
    return {"attention_mask": masks, "position_ids": positions}


def visible(segments: Tensor) -> Tensor:
    """[B, T, T] bool: whether token i of a row (second index) may attend to token j (third).

    That is to earlier tokens of its own sequence that are prompt or of its own side, and to itself.
    """
    query, key = segments[:, :, None], segments[:, None, :]
    same_sequence = query.div(3, rounding_mode="floor") == key.div(3, rounding_mode="floor")
    return (same_sequence & ((key.remainder(3) == 0) | (key == query))).tril()
