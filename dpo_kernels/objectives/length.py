"""Length desensitization: token weights that reduce the effect of the longer answer's extra tokens."""

from __future__ import annotations

import torch
from torch import Tensor


def length_desensitized_weights(
    labels: Tensor, ld_alpha: float, *, cu_seqlens: Tensor | None = None, ignore_index: int = -100
) -> Tensor:
    """Token weights of LD-DPO: 1 up to the shorter answer's length, `ld_alpha` beyond it.

    Source: Liu et al. 2024, Length Desensitization in Direct Preference Optimization.

    Args:
        labels: [2P, T] int64, or packed [N] with `cu_seqlens`; the chosen sequences come first.
        ld_alpha: weight in [0, 1] of the longer answer's tokens beyond the shorter one's length: 1 changes nothing, 0 drops
            them.
        cu_seqlens: [2P + 1] int, cumulative sequence lengths of the packed layout.
        ignore_index: label of the tokens that do not count.

    Returns:
        `token_weights` for `dpo_loss`: float32, shaped like labels, 0 on ignored tokens. Objectives that divide by
            length divide by the sum of these weights.

    Raises:
        ValueError: ld_alpha is outside [0, 1].
    """
    if not 0 <= ld_alpha <= 1:
        raise ValueError(f"ld_alpha must lie in [0, 1]; got {ld_alpha}")
    scored = labels != ignore_index
    if cu_seqlens is None:
        place = scored.cumsum(-1)
        counts = scored.sum(-1)
        common = torch.minimum(*counts.chunk(2)).repeat(2).unsqueeze(-1)
    else:
        bounds = cu_seqlens.to(torch.int64)
        running = torch.cat([scored.new_zeros(1, dtype=torch.int64), scored.cumsum(0)])
        starts = running[bounds[:-1]]
        counts = running[bounds[1:]] - starts
        position = torch.arange(labels.shape[0], device=labels.device)
        # Tokens after the last sequence belong to no sequence. Their owner is arbitrary, because none of them is scored.
        owner = torch.bucketize(position, bounds[1:], right=True).clamp(max=counts.shape[0] - 1)
        place = running[1:] - starts[owner]
        common = torch.minimum(*counts.chunk(2)).repeat(2)[owner]
    weights = torch.where(place <= common, 1.0, ld_alpha)
    return torch.where(scored, weights, 0.0)
