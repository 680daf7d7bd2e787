"""The layout of a batch: which sequences share a row, and which tokens every token may attend to.

A pair is laid out in one of two ways. *Apart*: each side is a sequence of its own with its own copy of the prompt. *Shared*:
prompt, chosen and rejected form one sequence. Both completions then attend to the prompt and not to each other, and both
have the positions that follow the prompt. Several sequences, apart or shared, may be packed into one row; no sequence
attends to another. `arrange` chooses the rows from lengths alone. `attention_inputs` makes the mask from segment numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import LAYOUTS as LAYOUTS
from . import attention

#: Cost of the attention calls for one more sequence, in tokens. In a model of 135 million parameters, 2.0 to 3.9 tokens were
#: measured in batches of 8 and 16 pairs of 36 tokens, where nothing else differed. Larger models have a lower cost.
SEQUENCE_COST = 4.0

#: Segment number of padding. In a row's k-th sequence, the prompt has number 3k, chosen 3k + 1 and rejected 3k + 2.
PADDING = -1


class Piece(NamedTuple):
    """One sequence of a row: a pair's prompt followed by one side or by both sides."""

    pair: int
    sides: tuple[int, ...]  # 0 chosen, 1 rejected
    length: int  # in tokens


Rows = list[list[Piece]]


def arrange(lengths: Sequence[tuple[int, int, int]], layout: str = "auto", attention_cost: float = 1e-3) -> Rows:
    """Distribute pairs over rows.

    Args:
        lengths: how many tokens of (prompt, chosen, rejected) the model reads, for every pair.
        layout: "padded": one sequence in each row, first all chosen ones, then all rejected ones. "prefix_shared": shared
            pairs, packed into the number of rows that costs least. "auto": the cheapest of "padded", packed shared pairs and
            packed sequences apart.
        attention_cost: see `cost`.
    """
    apart = [Piece(pair, (side,), parts[0] + parts[1 + side]) for side in (0, 1) for pair, parts in enumerate(lengths)]
    padded = [[piece] for piece in apart]
    if layout == "padded":
        return padded
    candidates = _packings(row_of_sequences(lengths))
    if layout == "auto":
        # padded comes first because the first of equal costs wins, and padded rows need no [T, T] mask.
        candidates = [padded, *candidates, *_packings(apart)]
    return min(candidates, key=lambda rows: cost(rows, attention_cost))


def cost(rows: Rows, attention_cost: float) -> float:
    """Work of a batch, in tokens: each token costs 1, plus `attention_cost` for every key that it is compared with.

    Masked attention compares every token of a row with the whole row, so the cost grows with the square of the length.
    """
    longest = width(rows)
    return len(rows) * longest * (1 + attention_cost * longest)


def row_of_sequences(lengths: Sequence[tuple[int, int, int]]) -> list[Piece]:
    """One row with all pairs, each prompt once, for a model that attends by sequence (see `attention`)."""
    return [Piece(pair, (0, 1), sum(parts)) for pair, parts in enumerate(lengths)]


def cost_by_sequence(row: list[Piece], attention_cost: float) -> float:
    """Work of a batch, in tokens as in `cost`, if every sequence is compared only with itself."""
    return sum(piece.length * (1 + attention_cost * piece.length) + SEQUENCE_COST for piece in row)


def width(rows: Rows) -> int:
    """Number of tokens of the longest row."""
    return max(sum(piece.length for piece in row) for row in rows)


def _packings(pieces: list[Piece]) -> list[Rows]:
    """The pieces packed into 1, 2, ... rows: the longest piece first, each into the row that is shortest so far."""
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


# --- attention masks -----------------------------------------------------------------------------------------------


def attention_inputs(batch: Mapping[str, Tensor], config: Any, dtype: torch.dtype) -> dict[str, Any]:
    """The `attention_mask` and, for packed or shared rows, the `position_ids` of a batch for a transformers model.

    A padded batch keeps its mask [B, T]. For a model that attends by sequence, the mask is the sequences' lengths. In all
    other cases it is [B, 1, T, T]: boolean, or additive in `dtype` for eager attention. If rows are longer than the
    model's sliding window, the mask includes the window. A model that mixes windowed and full attention then gets a dict of
    two masks.
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
    """Whether token i of a row (second index) may attend to token j (third index): bool [B, T, T].

    A token attends to itself and to the earlier tokens of its own sequence that belong to the prompt or to its own side.
    """
    query, key = segments[:, :, None], segments[:, None, :]
    same_sequence = query.div(3, rounding_mode="floor") == key.div(3, rounding_mode="floor")
    return (same_sequence & ((key.remainder(3) == 0) | (key == query))).tril()
