"""The CPU backend, compiled C++ (csrc/cpu): loads the library, or compiles it at first use, and allocates the outputs."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from .. import _build
from ..stages import TokenKL, Transform, asked_rows, check_labels
from . import BackendUnavailable, announce, eager, load_library
from .whole_call import REDUCTIONS, SEQUENCE_ROWS, Family, Weighting, result_dtype

logger = logging.getLogger(__name__)

#: The operators that csrc/cpu/ops.cpp registers.
OPERATORS = (
    "token_logps", "logits_grad", "sequence_sums", "preference_loss", "preference_forward", "preference_backward",
    "filter_count", "filter_fill", "filtered_grad_hidden", "filtered_grad_weight", "product", "prefer_huge_pages", "isa",
)  # fmt: skip

NAMESPACE = f"{_build.NAMESPACE}_cpu"
_kernels = getattr(torch.ops, NAMESPACE)


def _load() -> None:
    try:
        path = _build.find_or_build("cpu", _build.build_cpu, announce)
    except _build.BuildError as error:
        raise BackendUnavailable(str(error)) from error
    load_library(path, NAMESPACE, OPERATORS)
    logger.debug("loaded %s", path)


def check_available(device_type: str) -> None:
    """Raise BackendUnavailable unless the library loads and the tensors are on the CPU."""
    if device_type != "cpu":
        raise BackendUnavailable("the native CPU kernels support CPU tensors only")
    if not hasattr(_kernels, "token_logps"):
        _load()


def instruction_set() -> str:
    """The instruction set of the row kernels on this CPU: "baseline", "avx2" or "avx512"."""
    return ("baseline", "avx2", "avx512")[_kernels.isa()]


def multiplies(dtype: torch.dtype) -> bool:
    """Whether the linear path uses `product` instead of torch's library for matrices of this dtype.

    It does on CPUs with AVX2 but without AVX-512, where `product` is faster, above all for 16-bit dtypes, for which these CPUs
    have no instructions (benchmarks/test_products.py). It was not measured with AVX-512.
    """
    return dtype != torch.float64 and instruction_set() == "avx2"


def product(a: Tensor, b: Tensor, out: Tensor, bias: Tensor | None = None, add: bool = False) -> None:
    """Writes a @ b (+ bias) to `out` [M, N], or adds it (float32 only); a [M, K] and b [K, N] of any 16- or 32-bit dtype.

    Sums are float32 and rounded once. The bits of an entry do not depend on the other rows and columns.
    """
    a, b = (matrix if 1 in matrix.stride() else matrix.contiguous() for matrix in (a, b))
    _kernels.product.default(a, b, None if bias is None else bias.float().contiguous(), add, out)


def token_logps(
    logits: Tensor,
    labels: Tensor,
    ref_logits: Tensor | None,
    transform: Transform,
    statistics: tuple[str, ...],
) -> Tensor:
    """Stage 1."""
    asked = asked_rows(ref_logits is not None, statistics)
    tokens = torch.empty((asked.bit_count(), *labels.shape), dtype=torch.float64)
    try:
        _kernels.token_logps.default(logits, labels, ref_logits, *transform, asked, tokens)
    except RuntimeError:
        check_labels(labels, logits.shape[-1], transform.ignore_index)  # raises ValueError, which C++ cannot
        raise
    return tokens


def sequence_sums(values: Tensor, weights: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Weighted sums over each sequence's tokens, [2P] float64."""
    count = values.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    sums = torch.empty(count, dtype=torch.float64)
    _kernels.sequence_sums(values, weights, cu_seqlens, sums)
    return sums


def preference_loss(
    logps: Tensor,
    ref_logps: Tensor | None,
    weights: Tensor,
    cu_seqlens: Tensor | None,
    ref_sums: Tensor | None,
    beta: Tensor,
    label_smoothing: Tensor,
    robust: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Stage 2: (losses [P], sums [2P], ref_sums [2P], coef [2P])."""
    pairs = beta.shape[0]
    losses = torch.empty(pairs, dtype=torch.float64)
    sums, ref_sums_out, coef = (torch.empty(2 * pairs, dtype=torch.float64) for _ in range(3))
    _kernels.preference_loss(
        logps, ref_logps, weights, cu_seqlens, ref_sums, beta, label_smoothing, robust, losses, sums, ref_sums_out, coef
    )
    return losses, sums, ref_sums_out, coef


def logits_grad(
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
    """Stage 3."""
    if token_kl is not None and token_kl.ref_logits.dtype == torch.float64 != logits.dtype:
        # The row kernels compute in float64 only if the gradient is float64.
        eager.logits_grad(logits, labels, logps, top, log_sum, grad_logps, transform, out, token_kl)
        return
    reference = (None,) * len(TokenKL._fields) if token_kl is None else token_kl
    _kernels.logits_grad(logits, labels, logps, top, log_sum, grad_logps, *transform, out, *reference)


def preference_forward(
    logits: Tensor,
    labels: Tensor,
    ref_logits: Tensor | None,
    transform: Transform,
    statistics: tuple[str, ...],
    weighting: Weighting,
    family: Family,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`whole_call.preference_forward` in one call of the library."""
    asked = asked_rows(ref_logits is not None, statistics)
    pairs = weighting.pairs(labels)
    tokens = torch.empty((asked.bit_count(), *labels.shape), dtype=torch.float64)
    sequences = torch.empty((len(SEQUENCE_ROWS) + len(statistics), 2 * pairs), dtype=torch.float64)
    losses = torch.empty(pairs, dtype=torch.float64)
    loss = torch.empty((pairs,) if weighting.reduction == "none" else (), dtype=result_dtype(logits))
    try:
        _kernels.preference_forward.default(
            logits, labels, ref_logits, *transform, asked, *weighting[:3], REDUCTIONS.index(weighting.reduction),
            *family, tokens, sequences, losses, loss,
        )  # fmt: skip
    except RuntimeError:
        check_labels(labels, logits.shape[-1], transform.ignore_index)
        raise
    return tokens, sequences, losses, loss


def preference_backward(
    logits: Tensor,
    labels: Tensor,
    tokens: Tensor,
    sequences: Tensor,
    grad_loss: Tensor,
    transform: Transform,
    weighting: Weighting,
    out: Tensor,
) -> None:
    """`whole_call.preference_backward` in one call of the library."""
    reduction = REDUCTIONS.index(weighting.reduction)
    _kernels.preference_backward.default(
        logits, labels, tokens, sequences, grad_loss.contiguous(), *transform, *weighting[:3], reduction, out
    )
