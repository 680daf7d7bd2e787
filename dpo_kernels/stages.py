"""The interface that every backend implements: the three stages from logits to loss and gradient.

    stage 1  token_logps       logits [B, T, V]  -> log-probabilities and statistics of the tokens, [R, B, T]
    stage 2  sequence_sums     tokens [B, T]     -> weighted sums of the sequences, [S]
             preference_loss   tokens [B, T]     -> losses [P], sums [2P] and d loss / d sum of the sigmoid family
    stage 3  logits_grad       d loss / d token  -> d loss / d logits [B, T, V], in place if the caller allows it

A backend is a module with these functions (`Stages`). They take and return plain tensors and do not use autograd. The simplest
implementation is backends/eager.py. A packed batch has one row: logits [1, N, V] and the sequences' bounds `cu_seqlens` [S + 1].

Every tensor of size [tokens] or less is float64 (float32 on devices without float64). Compared with the logits these tensors
are small, and float64 makes rounding errors of sums, losses and coefficients negligible.

Results for special input:

    ignored token (label == ignore_index)    0 in every row of stage 1, gradient exactly 0; its logits are never read
    -inf among the logits                    probability 0, no contribution to any statistic, gradient 0
    NaN in a token's logits                  NaN in the token's results and gradient, and in its sequence's sum
    label outside [0, V)                     ValueError on a CPU; NaN in the token's results on a GPU, where a check would
                                             synchronize
    weight 0                                 the token is skipped, whatever its value is
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

#: The statistics of a token that stage 1 can compute, in the order of its rows.
#:   entropy      entropy of the policy's next-token distribution, in nats
#:   kl           KL(policy || reference) in nats; needs the reference's logits
#:   accuracy     1 if the label is the most likely token, else 0
#:   mean_logits  mean of z over the vocabulary
#:   log_sum_sq   log sum_v p_v^2, in nats; WPO's weights subtract it from the log-probability
STATISTICS = ("entropy", "kl", "accuracy", "mean_logits", "log_sum_sq")
#: The divergences that a loss can depend on: KL(policy || reference) and KL(reference || policy).
KL_TERMS = ("kl", "forward_kl")


class Transform(NamedTuple):
    """The map from logits x to z, the input of the softmax: z = softcap * tanh(scale * x / softcap).

    Attributes:
        ignore_index: label of the tokens that do not count.
        scale: any number; the CUDA kernels need a positive one.
        softcap: 0 for no cap, z = scale * x.
    """

    ignore_index: int = -100
    scale: float = 1.0
    softcap: float = 0.0


class TokenKL(NamedTuple):
    """The input of stage 3 for the gradients of token-level KL divergences.

    Attributes:
        ref_logits: [B, T, V], unit stride on V, any floating dtype.
        ref_logps, ref_max, ref_log_sum: [B, T], rows of stage 1.
        kl: [B, T], KL(policy || reference), a row of stage 1; read only where grad_kl is not 0.
        grad_kl: [B, T], gradient of the loss with respect to `kl`, or None.
        grad_forward_kl: [B, T], gradient of the loss with respect to KL(reference || policy), or None.
    """

    ref_logits: Tensor
    ref_logps: Tensor
    ref_max: Tensor
    ref_log_sum: Tensor
    kl: Tensor
    grad_kl: Tensor | None
    grad_forward_kl: Tensor | None


def from_uniform(entropy: Tensor, vocab: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The rows "ref_logps", "ref_max", "ref_log_sum" and "kl" of a reference whose logits are all 0, from the entropy [...].

    Such a reference is uniform, and the entropy is log V - KL(policy || uniform), so stage 3 gives its gradient.
    """
    zero, log_vocab = torch.zeros_like(entropy), math.log(vocab)
    return zero - log_vocab, zero, zero + log_vocab, log_vocab - entropy


class Stages(Protocol):
    """The functions of a backend. Tensors are contiguous; logits need only unit stride along the vocabulary."""

    def token_logps(
        self,
        logits: Tensor,
        labels: Tensor,
        ref_logits: Tensor | None,
        transform: Transform,
        statistics: tuple[str, ...],
    ) -> Tensor:
        """Stage 1: the results of each token, [R, B, T] float64, with the rows named by `token_rows`.

        Args:
            logits: [B, T, V].
            labels: [B, T] int64.
            ref_logits: [B, T, V] or None; the dtype may differ from that of logits.
            transform: the map from logits to z.
            statistics: any of STATISTICS; "kl" only with ref_logits.
        """

    def sequence_sums(self, values: Tensor, weights: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        """Weighted sum over the tokens of each sequence, [S]; values and weights are [B, T]."""

    def preference_loss(
        self,
        logps: Tensor,
        ref_logps: Tensor | None,
        weights: Tensor,
        cu_seqlens: Tensor | None,
        ref_sums: Tensor | None,
        beta: Tensor,
        label_smoothing: Tensor,
        robust: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Stage 2 of the sigmoid family (csrc/common/sigmoid_family.h).

        `ref_sums` [2P] is used if `ref_logps` is None. If both are None, the reference's sums are 0.

        Returns:
            (losses [P], sums [2P], reference sums [2P], coef [2P]); coef[s] is d losses[p] / d sums[s], p the pair of s.
        """

    def logits_grad(
        self,
        logits: Tensor,
        labels: Tensor,
        logps: Tensor,
        top: Tensor,
        log_sum: Tensor,
        grad_logps: Tensor,
        transform: Transform,
        out: Tensor,
        token_kl: TokenKL | None = None,
    ) -> None:
        """Stage 3: writes grad_logps (onehot(label) - softmax) dz/dx into `out`, which may be `logits` itself.

        Args:
            logits: [B, T, V].
            labels: [B, T] int64.
            logps: [B, T], the row "logps" of stage 1.
            top: [B, T], the row "max" of stage 1.
            log_sum: [B, T], the row "log_sum" of stage 1.
            grad_logps: [B, T], d loss / d log-probability.
            transform: the map from logits to z.
            out: [B, T, V], dtype of logits.
            token_kl: adds the gradients of token-level divergences; its logits must not share memory with `out`.
        """


def token_rows(has_reference: bool, statistics: Sequence[str]) -> tuple[str, ...]:
    """The names of stage 1's rows.

    "max" is the largest z of a token, and "log_sum" is log sum_v exp(z_v - max); the rows of the reference have the prefix
    "ref_". The two are stored separately, because their sum would lose log_sum to rounding where z is large.
    """
    asked = (name for name in STATISTICS if name in statistics)
    reference = ("ref_logps", *(("ref_max", "ref_log_sum") if "kl" in statistics else ())) if has_reference else ()
    return ("logps", "max", "log_sum", *reference, *asked)


def asked_rows(has_reference: bool, statistics: Sequence[str]) -> int:
    """`token_rows` as a bit mask for compiled kernels: bit i is set if the i-th possible row (csrc/common/params.h) is asked."""
    names = token_rows(has_reference, statistics)
    return sum(1 << bit for bit, name in enumerate(token_rows(True, STATISTICS)) if name in names)


def all_rows(has_reference: bool, statistics: Sequence[str], terms: Sequence[str]) -> tuple[str, ...]:
    """`token_rows`, and the rows that are computed outside stage 1.

    Args:
        has_reference: whether the call has reference logits.
        statistics: may include "grad_dropped_mass", the probability mass that a filtered gradient left out (linear path).
        terms: a subset of KL_TERMS, whose gradients need the row "kl", or ("entropy",).
    """
    asked = (*statistics, *(("kl",) if set(terms) & set(KL_TERMS) else ()))
    names = token_rows(has_reference, asked)
    return (
        *names,
        *(("grad_dropped_mass",) if "grad_dropped_mass" in asked else ()),
        *(("forward_kl",) if "forward_kl" in terms else ()),
    )


def small_dtype(device: torch.device) -> torch.dtype:
    """dtype of every tensor of size [tokens] or less: float64, or float32 on MPS, which has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def check_labels(labels: Tensor, vocab: int, ignore_index: int) -> None:
    """Raise ValueError for a label outside [0, vocab) that is not ignore_index; the message names its row and position."""
    bad = ((labels < 0) | (labels >= vocab)) & (labels != ignore_index)
    if bad.any():
        row, position = bad.nonzero()[0].tolist()
        raise ValueError(
            f"label {labels[row, position].item()} at row {row}, position {position} is outside the vocabulary "
            f"[0, {vocab}) and is not ignore_index ({ignore_index})"
        )


def check_bounds(cu_seqlens: Tensor, tokens: int) -> None:
    """Raise ValueError unless cu_seqlens rises from 0 to at most `tokens`. Synchronizes with the device."""
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] > tokens or any(a > b for a, b in itertools.pairwise(bounds)):
        raise ValueError(f"cu_seqlens must rise from 0 to at most {tokens} (the number of tokens); got {bounds}")


def rising_bounds(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """cu_seqlens with each bound clamped to [0, tokens] and then raised to the largest bound before it.

    Valid bounds do not change. Invalid bounds become bounds of existing sequences without overlap. So no kernel reads or
    writes out of range, and the gradient of a token comes from the sequence whose sum holds its log-probability.
    """
    return cu_seqlens.clamp(0, tokens).cummax(0).values


def owners(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """The sequence of each packed token, [tokens] int64; -1 or S for a token outside all S sequences."""
    return torch.bucketize(torch.arange(tokens, device=cu_seqlens.device), cu_seqlens, right=True) - 1


def spread(per_sequence: Tensor, weights: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """The adjoint of a weighted sum: each token's weight times its sequence's value, [B, T]; exactly 0 where the weight is 0."""
    if cu_seqlens is None:
        each = per_sequence.unsqueeze(-1)
    else:
        # Tokens before the first or after the last sequence have owner -1 or S. Both indices select the appended 0.
        by_owner = torch.cat([per_sequence, per_sequence.new_zeros(1)])
        each = by_owner[owners(cu_seqlens, weights.shape[1])].unsqueeze(0)
    return torch.where(weights != 0, weights * each, 0.0)


def share_memory(a: Tensor, b: Tensor) -> bool:
    """Whether the memory from the first to the last element of `a` overlaps that of `b` (two views of a buffer may)."""

    def span(x: Tensor) -> tuple[int, int]:
        last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
        return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()

    (a_start, a_end), (b_start, b_end) = span(a), span(b)
    return a.device == b.device and a.numel() > 0 and b.numel() > 0 and a_start < b_end and b_start < a_end
