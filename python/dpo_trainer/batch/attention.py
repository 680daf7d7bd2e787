"""Attention to each sequence of a row separately, without padding and without a mask over the whole row.

Under a mask, a row of T tokens costs T^2 comparisons, however much the mask hides. So packing with a mask pays only for
short rows. Here attention is computed one sequence at a time (see `layout`): prompt and chosen as one causal sequence, then
rejected behind the same prompt. The rest of the model, which is nearly all of its work, sees one row without padding.

`attend` is an attention implementation of transformers (`AttentionInterface`), chosen per model by its name, NAME. The
lengths are passed in place of the mask. Every model that can use `attend` hands a prepared 4-D mask to its layers unchanged,
also when gradient checkpointing recomputes a layer. With any other mask, `sdpa` computes the attention.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "dpo_sequences"


def as_mask(sequences: Tensor) -> Tensor:
    """Lengths [S, 3] as the mask that a model hands to `attend`: int64 [1, 1, S, 3], on the CPU."""
    return sequences.cpu()[None, None]


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute attention; transformers calls this function in every layer.

    Args:
        query: [B, heads, T, D].
        key, value: [B, key heads, T, D].
        attention_mask: `as_mask` of the lengths (prompt, chosen, rejected) of S sequences. They follow each other in the
            only row (B = 1), and the tokens after them are padding. Or any mask that `sdpa` takes.
        sliding_window: number of tokens that a query attends to, itself included.

    Returns:
        [B, T, heads, D], and None in place of the attention weights.

    Raises:
        ValueError: the model uses a softcap, a position bias or attention sinks (`s_aux`).
    """
    if attention_mask is None or attention_mask.dtype != torch.int64:
        kwargs |= {"dropout": dropout, "scaling": scaling, "sliding_window": sliding_window}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    for name in ("softcap", "position_bias", "s_aux"):
        if kwargs.get(name) is not None:
            raise ValueError(f"attention by sequence does not support {name}")
    sequences = attention_mask[0, 0].tolist()

    def one(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend from the last tokens of one sequence (query) to the whole sequence (key, value)."""
        queries, keys = query.shape[2], key.shape[2]
        mask = None
        windowed = sliding_window is not None and sliding_window < keys
        if windowed or queries < keys:
            mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)
            if windowed:
                mask = mask.triu(keys - queries - sliding_window + 1)  # type: ignore[operator]
        if mask is not None and query.device.type != "cpu":
            # The fused GPU kernels support shared key heads or a mask, not both.
            key, value = (part.repeat_interleave(query.shape[1] // part.shape[1], dim=1) for part in (key, value))
        shared = query.shape[1] != key.shape[1]
        found = scaled_dot_product_attention(
            query, key, value, mask, dropout, is_causal=mask is None, scale=scaling, enable_gqa=shared
        )
        return found.transpose(1, 2)

    # split, not slices: split writes its gradient once. Each slice would write a full row of zeros with one part filled in.
    sizes = [size for prompt, chosen, rejected in sequences for size in (prompt + chosen, rejected)]
    sizes.append(query.shape[2] - sum(sizes))
    queries, keys, values = (tensor.split(sizes, dim=2) for tensor in (query, key, value))
    rows = []
    for place, (prompt, _, rejected) in enumerate(sequences):
        first, second = 2 * place, 2 * place + 1
        if sizes[first]:
            rows.append(one(queries[first], keys[first], values[first]))
        if rejected:
            behind = [torch.cat([part[first][:, :, :prompt], part[second]], dim=2) for part in (keys, values)]
            rows.append(one(queries[second], *behind))
    if sizes[-1]:
        rows.append(value.new_zeros(1, sizes[-1], query.shape[1], value.shape[3]))
    return torch.cat(rows, dim=1), None


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
