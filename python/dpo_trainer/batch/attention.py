"""Attention over several sequences in one row, each by itself: no padding, no mask over the whole row.

A row of T tokens under a mask costs T^2 comparisons, whatever the mask hides, so that only short rows pay. Here every
sequence of the row (`layout`) is attended to alone: prompt and chosen as one causal sequence, then rejected behind the same
prompt. The rest of the model, which is nearly all of its work, sees one row without a token of padding.

It is an attention implementation of transformers (`AttentionInterface`), chosen per model by its name, NAME. The lengths reach
it in the place of the mask, because a prepared 4-D mask is what every such model hands to its layers as it is, also when
gradient checkpointing runs a layer again. Any other mask is `sdpa`'s business.
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
    """Lengths [S, 3] in the form in which a model passes them on to `attend`: int64 [1, 1, S, 3], on the CPU."""
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
    """Attention as transformers calls it: query [B, heads, T, D], key and value [B, key heads, T, D] -> [B, T, heads, D].

    Args:
        attention_mask: `as_mask` of the lengths (prompt, chosen, rejected) of the S sequences that stand one after the
            other in the only row; what follows them is padding. Or what `sdpa` takes.
        sliding_window: tokens that a query sees, itself included.

    Raises:
        ValueError: the model asks for more than this knows (a softcap, a bias by position).
    """
    if attention_mask is None or attention_mask.dtype != torch.int64:
        kwargs |= {"dropout": dropout, "scaling": scaling, "sliding_window": sliding_window}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    for name in ("softcap", "position_bias", "s_aux"):
        if kwargs.get(name) is not None:
            raise ValueError(f"attention by sequence does not know {name}")
    sequences = attention_mask[0, 0].tolist()

    def one(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Queries are the last tokens of the sequence whose keys these are."""
        queries, keys = query.shape[2], key.shape[2]
        mask = None
        windowed = sliding_window is not None and sliding_window < keys
        if windowed or queries < keys:
            mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)
            if windowed:
                mask = mask.triu(keys - queries - sliding_window + 1)  # type: ignore[operator]
        if mask is not None and query.device.type != "cpu":
            # The fused kernels of GPUs take shared heads or a mask, not both.
            key, value = (part.repeat_interleave(query.shape[1] // part.shape[1], dim=1) for part in (key, value))
        shared = query.shape[1] != key.shape[1]
        found = scaled_dot_product_attention(
            query, key, value, mask, dropout, is_causal=mask is None, scale=scaling, enable_gqa=shared
        )
        return found.transpose(1, 2)

    # split, not slices: its gradient is written once, where every slice's would be a row of zeros with a part filled in.
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
