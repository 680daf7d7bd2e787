"""Turns tokenised pairs into one batch in the cheapest layout and lists the scored tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..data.rows import REFERENCE, images_of
from ..data.tokens import MASKS, TOKENS
from .images import PREFIX, ImageInputs
from .layout import PADDING, Rows, arrange, cost, cost_by_sequence, row_of_sequences, width


@dataclass
class PairCollator:
    """Collate tokenised preference pairs into one batch.

    Every row has `prompt_ids`, `chosen_ids` and `rejected_ids` (the completions without the prompt). A row may also have
    `chosen_mask` and `rejected_mask`, one bool for each token of a completion: the model reads a token whose mask is false,
    but the token is not scored.

    A batch of P pairs has B rows of T tokens. `layout` describes what each row holds. The last token of a completion is left
    out, because nothing is predicted from it. The entries of a batch:

    * `input_ids`, `attention_mask` [B, T] int64. In the padded layout B is 2P: rows 0..P-1 are prompt + chosen, rows
      P..2P-1 are prompt + rejected.
    * `segments`, `position_ids` [B, T] int64, in every layout but the padded one: the sequence and side that a token belongs
      to, and the token's position in its own text.
    * `sequences` [P, 3] int64, only when the model is to attend by sequence: the number of tokens of (prompt, chosen,
      rejected) of each pair in the only row, in this order.
    * `positions` [N] int64: indices into the flattened [B * T] tokens at which the model predicts a completion token. The
      last token of a shared prompt predicts the first token of both sides, so its index is listed twice.
    * `labels` [N] int64: the token to predict at each position. The shift by one is done here and nowhere else.
    * `cu_seqlens` [2P + 1] int64: sequence s owns `labels[cu_seqlens[s]:cu_seqlens[s + 1]]`. In every layout the chosen
      sequences come first, then the rejected ones.
    * `num_tokens` [] int64: tokens of the pairs as text, with prompts counted for both sides and padding not counted. It is
      the same in every layout.
    * `pair_weights` [P] float32, if every row has `weight`.
    * `ref_logps` [2P] float64, if every row has `ref_chosen_logps` and `ref_rejected_logps`.
    * `model.pixel_values` and other model inputs, if rows have images: first of the chosen sequences, then of the rejected
      ones. Such a batch is always padded, because the model computes the positions of images itself.

    Everything follows from lengths, never from token ids. So a tokenizer whose padding token is also its end token
    (SmolLM2's, for example) is safe. The first token of a sequence without a prompt is not scored, because there is no token
    before it.

    An empty list of rows gives a batch of no pairs and one token. A process gets such a batch when a step has no pairs left
    for it.

    Args:
        pad_token_id: the id written into padding. Any valid id works.
        pad_to_multiple_of: T is rounded up to a multiple of this number.
        layout: "padded", "prefix_shared" or "auto". "sequences" always makes one row, for a model that attends by sequence.
        attention_cost: the cost of attention by which "auto" compares layouts, see `layout.cost`.
        by_sequence: whether the model can attend by sequence. "prefix_shared" and "auto" then use this where it is cheaper.
        images: makes the model's inputs for images. None if rows have no images.
    """

    pad_token_id: int = 0
    pad_to_multiple_of: int | None = None
    layout: str = "padded"
    attention_cost: float = 1e-3
    by_sequence: bool = False
    images: ImageInputs | None = None

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Collate rows into a batch.

        Args:
            rows: tokenised pairs, as described above.

        Returns:
            the entries of the batch by name, on the CPU.

        Raises:
            DataError: an image cannot be read or processed.
        """
        pairs = [[list(row[name]) for name in TOKENS] for row in rows]
        lengths = [(len(p), _inputs(p, chosen), _inputs(p, rejected)) for p, chosen, rejected in pairs]
        images = [images_of(row) or [] for row in rows] if self.images is not None else []
        layout = "padded" if any(images) else self.layout
        arranged, by_sequence = self._arrange(lengths, layout) if pairs else ([[]], False)
        longest = max(width(arranged), 1)
        longest += -longest % (self.pad_to_multiple_of or 1)

        input_ids = torch.full((len(arranged), longest), self.pad_token_id, dtype=torch.int64)
        segments = torch.full_like(input_ids, PADDING)
        position_ids = torch.zeros_like(input_ids)
        # Positions and labels of each sequence, in the order of `cu_seqlens`.
        positions, labels = ([torch.empty(0, dtype=torch.int64)] * 2 * len(pairs) for _ in range(2))
        for index, row in enumerate(arranged):
            end = 0
            for number, piece in enumerate(row):
                counts = lengths[piece.pair]
                last = end + counts[0] - 1
                for part in (0, *(1 + side for side in piece.sides)):
                    tokens = torch.tensor(pairs[piece.pair][part], dtype=torch.int64)
                    start, end = end, end + counts[part]
                    first = counts[0] if part else 0
                    input_ids[index, start:end] = tokens[: counts[part]]
                    segments[index, start:end] = 3 * number + part
                    position_ids[index, start:end] = torch.arange(first, first + counts[part])
                    if part:
                        before = torch.arange(start - 1, start - 1 + len(tokens))
                        before[:1] = last  # token of the prompt: the chosen side may stand between it and this side
                        scored: Any = slice(0 if counts[0] else 1, None)
                        mask = rows[piece.pair].get(MASKS[part - 1])
                        if mask is not None and not all(mask):
                            scored = [place for place in range(len(tokens))[scored] if mask[place]]
                        sequence = piece.pair + (part - 1) * len(pairs)
                        positions[sequence] = before[scored] + index * longest
                        labels[sequence] = tokens[scored]

        batch = {
            "input_ids": input_ids,
            "attention_mask": (segments != PADDING).long() if pairs else torch.ones_like(segments),
            "positions": torch.cat(positions) if pairs else input_ids.new_empty(0),
            "labels": torch.cat(labels) if pairs else input_ids.new_empty(0),
            "cu_seqlens": torch.tensor([0, *map(len, labels)]).cumsum(0),
            "num_tokens": torch.tensor(sum(len(prompt) + len(side) for prompt, *sides in pairs for side in sides)),
        }
        if self.images is not None and any(images):
            found = self.images(images, input_ids, copies=2)
            batch |= {PREFIX + name: value for name, value in found.items()}
        if any(len(row) > 1 or len(piece.sides) > 1 for row in arranged for piece in row):
            batch |= {"segments": segments, "position_ids": position_ids}
        if by_sequence:
            batch["sequences"] = torch.tensor(lengths)
        if pairs and all(row.get("weight") is not None for row in rows):
            batch["pair_weights"] = torch.tensor([row["weight"] for row in rows], dtype=torch.float32)
        if pairs and all(row.get(name) is not None for name in REFERENCE for row in rows):
            batch["ref_logps"] = torch.tensor([row[name] for name in REFERENCE for row in rows], dtype=torch.float64)
        return batch

    def _arrange(self, lengths: list[tuple[int, int, int]], layout: str) -> tuple[Rows, bool]:
        """The rows, and whether the model is to attend to their sequences separately."""
        row = row_of_sequences(lengths)
        if layout == "sequences":
            return [row], True
        rows = arrange(lengths, layout, self.attention_cost)
        allowed = self.by_sequence and layout != "padded"
        if allowed and cost_by_sequence(row, self.attention_cost) <= cost(rows, self.attention_cost):
            return [row], True
        return rows, False


def _inputs(prompt: Sequence[int], side: Sequence[int]) -> int:
    """Number of a completion's tokens that the model reads: all but the last, or one if the sequence would be empty."""
    return max(len(side) - 1, 0 if prompt else min(len(side), 1))
