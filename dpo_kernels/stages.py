"""The contract of the stages: what lies between logits and loss, and what every backend computes alike.

    stage 1  token_logps       logits [B, T, V]  -> log-probabilities and statistics of the tokens, [R, B, T]
    stage 2  sequence_sums     tokens [B, T]     -> weighted sums of the sequences, [S]
             preference_loss   tokens [B, T]     -> losses [P], sums [2P] and d loss / d sum of the sigmoid family
    stage 3  logits_grad       d loss / d token  -> d loss / d logits [B, T, V], possibly over the logits

A backend is a module with these functions (`Stages`): plain tensors in and out, no autograd. backends/eager.py is the shortest
to read. A packed batch is one row: [1, N, V], with `cu_seqlens` [S + 1] to say where its sequences lie.

Everything of size [tokens] or less is float64 (float32 where a device has none). It costs nothing beside the logits and keeps
sums, losses and coefficients free of rounding.

What hostile input gives:
    ignored tokens (label == ignore_index)   0 in every row of stage 1, a gradient of exactly 0; their logits are never read
    -inf among the logits                    no probability, no part in any statistic, a gradient of 0
    NaN in a token's logits                  NaN in that token's results and gradient, and in its sequence's sum
    a label outside [0, V)                   ValueError on CPU; NaN in that token's results on a GPU, which cannot look
    weight 0                                 the token is skipped, whatever its value is
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

#: What stage 1 finds of a token beside its log-probability, in the order of its rows. Nats, but for accuracy.
#:   entropy      of the policy's next-token distribution
#:   kl           KL(policy || reference); needs the reference's logits
#:   accuracy     1 where the label is the most likely token, else 0
#:   mean_logits  mean of z over the vocabulary
#:   log_sum_sq   log sum_v p_v^2, which WPO's weights compare the log-probability with
STATISTICS = ("entropy", "kl", "accuracy", "mean_logits", "log_sum_sq")
#: The divergences that a loss may be differentiated by: KL(policy || reference) and KL(reference || policy).
KL_TERMS = ("kl", "forward_kl")


class Transform(NamedTuple):
    """How logits become z, whose softmax is meant: z = softcap * tanh(scale * x / softcap), or scale * x without a cap.

    Attributes:
        ignore_index: the label of tokens that do not count.
        scale: any number; the CUDA kernels need a positive one.
        softcap: 0 for none.
    """

    ignore_index: int = -100
    scale: float = 1.0
    softcap: float = 0.0


class TokenKL(NamedTuple):
    """What stage 3 needs to differentiate token-level KL divergences as well.

    Attributes:
        ref_logits: [B, T, V], unit stride on V, any floating dtype.
        ref_logps, ref_max, ref_log_sum: [B, T], of stage 1.
        kl: [B, T], KL(policy || reference), of stage 1; read only where grad_kl is not 0.
        grad_kl: [B, T], gradient of the loss with respect to it, or None.
        grad_forward_kl: [B, T], gradient with respect to KL(reference || policy), or None.
    """

    ref_logits: Tensor
    ref_logps: Tensor
    ref_max: Tensor
    ref_log_sum: Tensor
    kl: Tensor
    grad_kl: Tensor | None
    grad_forward_kl: Tensor | None


class Stages(Protocol):
    """A backend's functions. Tensors are contiguous, but for logits, whose rows only have unit stride."""

    def token_logps(
        self,
        logits: Tensor,
        labels: Tensor,
        ref_logits: Tensor | None,
        transform: Transform,
        statistics: tuple[str, ...],
    ) -> Tensor:
        """Stage 1: [R, B, T] float64, the rows of `token_rows`.

        Args:
            logits, ref_logits: [B, T, V]; their dtypes may differ.
            labels: [B, T] int64.
            statistics: any of STATISTICS; "kl" only with ref_logits.
        """

    def sequence_sums(self, values: Tensor, weights: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        """Weighted sum over each sequence's tokens, [S]; values and weights [B, T]."""

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
        """Stage 2 of the sigmoid family (csrc/common/sigmoid_family.h): losses [P]; sums, reference sums and coef [2P].

        coef is d losses[p] / d sums[s]. ref_sums [2P] counts where ref_logps is None; without both the reference's sums are 0.
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

        `logps`, `top` and `log_sum` are stage 1's rows "logps", "max" and "log_sum" [B, T].

        `token_kl` adds the gradients of token-level divergences; its logits must not share memory with `out`.
        """


def token_rows(has_reference: bool, statistics: Sequence[str]) -> tuple[str, ...]:
    """The names of stage 1's rows.

    "max" is the largest z of a token and "log_sum" = log sum_v exp(z_v - max), for policy and reference. They stay apart:
    their sum rounds log_sum away where z is large, and no difference of logits and log-probabilities gives them back.
    """
    asked = (name for name in STATISTICS if name in statistics)
    reference = ("ref_logps", *(("ref_max", "ref_log_sum") if "kl" in statistics else ())) if has_reference else ()
    return ("logps", "max", "log_sum", *reference, *asked)


def asked_rows(has_reference: bool, statistics: Sequence[str]) -> int:
    """`token_rows` as compiled kernels take them: a bit for each row that there can be (csrc/common/params.h), in their order."""
    names = token_rows(has_reference, statistics)
    return sum(1 << bit for bit, name in enumerate(token_rows(True, STATISTICS)) if name in names)


def all_rows(has_reference: bool, statistics: Sequence[str], terms: Sequence[str]) -> tuple[str, ...]:
    """`token_rows`, and what is found around stage 1.

    Args:
        statistics: may hold "grad_dropped_mass", the probability that a filtered gradient left out (linear path).
        terms: of KL_TERMS. The gradient of either starts from the value of "kl".
    """
    asked = (*statistics, *(("kl",) if terms else ()))
    names = token_rows(has_reference, asked)
    return (
        *names,
        *(("grad_dropped_mass",) if "grad_dropped_mass" in asked else ()),
        *(("forward_kl",) if "forward_kl" in terms else ()),
    )


def small_dtype(device: torch.device) -> torch.dtype:
    """dtype of everything of size [tokens] or less: float64, or float32 where the device (MPS) has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def check_labels(labels: Tensor, vocab: int, ignore_index: int) -> None:
    """Raise ValueError naming row and position of the first label outside [0, vocab) that is not ignore_index."""
    bad = ((labels < 0) | (labels >= vocab)) & (labels != ignore_index)
    if bad.any():
        row, position = bad.nonzero()[0].tolist()
        raise ValueError(
            f"label {labels[row, position].item()} at row {row}, position {position} is outside the vocabulary "
            f"[0, {vocab}) and is not ignore_index ({ignore_index})"
        )


def check_bounds(cu_seqlens: Tensor, tokens: int) -> None:
    """Raise ValueError unless cu_seqlens rises from 0 to at most `tokens`. Waits for the device."""
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] > tokens or any(a > b for a, b in itertools.pairwise(bounds)):
        raise ValueError(f"cu_seqlens must rise from 0 to at most {tokens} (the number of tokens); got {bounds}")


def rising_bounds(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """cu_seqlens with every bound moved into [0, tokens], and up to the largest bound before it.

    Bounds that were right stay as they are. Wrong ones then name sequences that exist and do not overlap, so no kernel
    reads or writes elsewhere, and each token's gradient goes through the one sequence that its log-probability was added to.
    """
    return cu_seqlens.clamp(0, tokens).cummax(0).values


def owners(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """The sequence of each of `tokens` packed tokens, [tokens] int64; -1 or S for a token of none of the S sequences."""
    return torch.bucketize(torch.arange(tokens, device=cu_seqlens.device), cu_seqlens, right=True) - 1


def spread(per_sequence: Tensor, weights: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Each token's weight times its sequence's number, [B, T]; exactly 0 on tokens of weight 0. The adjoint of a weighted sum."""
    if cu_seqlens is None:
        each = per_sequence.unsqueeze(-1)
    else:
        # Both -1 and S find the appended 0: tokens before the first and behind the last sequence belong to nobody.
        by_owner = torch.cat([per_sequence, per_sequence.new_zeros(1)])
        each = by_owner[owners(cu_seqlens, weights.shape[1])].unsqueeze(0)
    return torch.where(weights != 0, weights * each, 0.0)


def share_memory(a: Tensor, b: Tensor) -> bool:
    """Whether the first to the last element of a and those of b lie in common memory: views of one buffer, say."""

    def span(x: Tensor) -> tuple[int, int]:
        last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
        return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()

    (a_start, a_end), (b_start, b_end) = span(a), span(b)
    return a.device == b.device and a.numel() > 0 and b.numel() > 0 and a_start < b_end and b_start < a_end
