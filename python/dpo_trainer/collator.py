"""Turns tokenised pairs into one batch: chosen rows, then rejected, right padded, with the scored tokens listed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass
class PairCollator:
    """Collate rows of `prompt_input_ids`, `chosen_input_ids` and `rejected_input_ids` (completions without prompt).

    With P rows the batch holds:

    * `input_ids`, `attention_mask` [2P, T] int64: rows 0..P-1 are prompt + chosen, rows P..2P-1 prompt + rejected.
    * `positions` [N] int64: where, in the flattened [2P * T] tokens, the model predicts a completion token.
    * `labels` [N] int64: what it has to predict there, so the shift by one has been done here and nowhere else.
    * `cu_seqlens` [2P + 1] int64: sequence s owns `labels[cu_seqlens[s]:cu_seqlens[s + 1]]`.
    * `pair_weights` [P] float32 when every row has `weight`; `ref_logps` [2P] float64 when every row has
      `ref_chosen_logps` and `ref_rejected_logps`.

    Everything is derived from lengths, never from token ids: a tokenizer whose padding token is also its end token
    (SmolLM2 has such a one) is safe. The first token of a sequence without a prompt has nothing to be predicted from
    and is not scored.

    Args:
        pad_token_id: the id written into padding. Any valid id will do.
        pad_to_multiple_of: round T up to a multiple of this.
    """

    pad_token_id: int = 0
    pad_to_multiple_of: int | None = None

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        sequences = [
            (list(row["prompt_input_ids"]), list(row[side]))
            for side in ("chosen_input_ids", "rejected_input_ids")
            for row in rows
        ]
        longest = max(len(prompt) + len(completion) for prompt, completion in sequences)
        if self.pad_to_multiple_of:
            longest += -longest % self.pad_to_multiple_of

        input_ids = torch.full((len(sequences), longest), self.pad_token_id, dtype=torch.int64)
        attention_mask = torch.zeros_like(input_ids)
        positions, labels, ends = [], [], [0]
        for index, (prompt, completion) in enumerate(sequences):
            tokens = torch.tensor(prompt + completion, dtype=torch.int64)
            input_ids[index, : len(tokens)] = tokens
            attention_mask[index, : len(tokens)] = 1
            first = max(len(prompt), 1)
            positions.append(torch.arange(first - 1, len(tokens) - 1) + index * longest)
            labels.append(tokens[first:])
            ends.append(ends[-1] + len(tokens) - first)

        batch = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "positions": torch.cat(positions),
            "labels": torch.cat(labels),
            "cu_seqlens": torch.tensor(ends, dtype=torch.int64),
        }
        if all(row.get("weight") is not None for row in rows):
            batch["pair_weights"] = torch.tensor([row["weight"] for row in rows], dtype=torch.float32)
        if all(row.get("ref_chosen_logps") is not None and row.get("ref_rejected_logps") is not None for row in rows):
            columns = ("ref_chosen_logps", "ref_rejected_logps")
            batch["ref_logps"] = torch.tensor([row[name] for name in columns for row in rows], dtype=torch.float64)
        return batch
