"""Invalid `cu_seqlens` on a device, which the host cannot check without waiting for the GPU.

Every backend treats them alike: each bound is clamped into [0, N], and a sequence whose end is not after its begin is empty.
If sequences overlap, each sum is taken over the sequence's own clamped span. Nothing is read or written out of bounds.
"""

from __future__ import annotations

import itertools

from torch import Tensor


def bad_bounds(tokens: int) -> list[tuple[str, list[int]]]:
    """(name, cu_seqlens) of four sequences (two pairs) over `tokens` >= 8 tokens; each is invalid in another way."""
    n, quarter = tokens, tokens // 4
    return [
        ("negative first bound", [-n, quarter, 2 * quarter, 3 * quarter, n]),
        ("negative inner bounds", [0, -1, -n, quarter, n]),
        ("last bound beyond N", [0, quarter, 2 * quarter, 3 * quarter, n + 1]),
        ("bounds far beyond N", [0, quarter, n + 1, 10 * n + 7, 2**40]),
        ("all beyond N", [n + 1, n + 2, n + 3, n + 4, n + 5]),
        ("ends of int64", [-(2**63), quarter, 2**63 - 1, -(2**63), 2**63 - 1]),
        ("decreasing", [n, 3 * quarter, 2 * quarter, quarter, 0]),
        ("one step back: two sequences overlap", [0, 3 * quarter, quarter, 2 * quarter, n]),
        ("every token in two sequences", [0, n, 0, n, n]),
        ("negative, overlapping and beyond N", [-3, 3 * quarter, -5, n + 9, 2]),
        ("nothing but empty sequences", [quarter] * 5),
    ]


def clamped_spans(bounds: list[int], tokens: int) -> list[tuple[int, int]]:
    """[begin, end) of each sequence after clamping; (0, 0) if it is empty."""
    clamped = [min(max(bound, 0), tokens) for bound in bounds]
    return [(b, e) if b < e else (0, 0) for b, e in itertools.pairwise(clamped)]


def clamped_sums(values: Tensor, weights: Tensor, bounds: list[int]) -> Tensor:
    """Weighted sum of each sequence, [2P] float64, from values and weights of N tokens in any shape."""
    terms = (values.double() * weights.double()).flatten()
    return terms.new_tensor([terms[b:e].sum().item() for b, e in clamped_spans(bounds, terms.numel())])
