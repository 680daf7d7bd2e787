"""The CUDA C++ backend (csrc/cuda): loads the library, or compiles it at first use, and allocates the outputs.

A whole call of the sigmoid family takes two kernel launches in the forward pass and one in the backward pass.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from .. import _build
from ..stages import TokenKL, Transform, asked_rows
from . import BackendUnavailable, announce, load_library
from .whole_call import REDUCTIONS, SEQUENCE_ROWS, Family, Weighting, result_dtype

logger = logging.getLogger(__name__)

#: The operators that csrc/cuda/ops.cpp registers.
OPERATORS = (
    "token_logps", "logits_grad", "sequence_sums", "preference_loss", "preference_forward", "preference_backward",
)  # fmt: skip

NAMESPACE = f"{_build.NAMESPACE}_cuda"
# The library's operators. Tests replace them by those of the emulator.
_kernels = getattr(torch.ops, NAMESPACE)


def _load() -> None:
    try:
        # A library compiled at installation may serve any GPU. At first use it is compiled for this GPU only, which takes a third
        # of the time.
        capability = torch.cuda.get_device_capability()
        build, variant = _build.build_for_device(capability), _build.variant_of(capability)
        path = _build.find_or_build("cuda", build, announce, variant)
    except _build.BuildError as error:
        raise BackendUnavailable(str(error)) from error
    load_library(path, NAMESPACE, OPERATORS)
    logger.debug("loaded %s", path)


def check_available(device_type: str) -> None:
    """Raise BackendUnavailable unless the tensors are on a CUDA device and the library loads."""
    if device_type != "cuda":
        raise BackendUnavailable("the CUDA kernels support CUDA tensors only")
    if torch.version.cuda is None or not torch.cuda.is_available():
        raise BackendUnavailable("this torch sees no CUDA device")
    if torch.cuda.get_device_capability() < (8, 0):
        raise BackendUnavailable("the CUDA kernels need compute capability 8.0 or later")
    if not hasattr(_kernels, "token_logps"):
        _load()


def _check_logits(logits: Tensor, ref_logits: Tensor | None) -> None:
    for name, tensor in (("logits", logits), ("ref_logits", ref_logits)):
        if tensor is not None and tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise TypeError(
                f"the CUDA kernels need float32, bfloat16 or float16 {name}, not {str(tensor.dtype).removeprefix('torch.')}; "
                'use_backend("eager") computes in float64'
            )


def _empty(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float64, device=like.device)


def token_logps(
    logits: Tensor,
    labels: Tensor,
    ref_logits: Tensor | None,
    transform: Transform,
    statistics: tuple[str, ...],
) -> Tensor:
    """Stage 1."""
    _check_logits(logits, ref_logits)
    asked = asked_rows(ref_logits is not None, statistics)
    tokens = _empty(labels, asked.bit_count(), *labels.shape)
    _kernels.token_logps(logits, labels, ref_logits, *transform, asked, tokens)
    return tokens


def sequence_sums(values: Tensor, weights: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Weighted sums over each sequence's tokens, [2P] float64."""
    count = values.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    sums = _empty(values, count)
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
    """Stage 2: (losses [P], sums [2P], ref_sums [2P], coef [2P]); the formulas of csrc/common/sigmoid_family.h."""
    pairs = beta.shape[0]
    outputs = _empty(beta, pairs), _empty(beta, 2 * pairs), _empty(beta, 2 * pairs), _empty(beta, 2 * pairs)
    _kernels.preference_loss(logps, ref_logps, weights, cu_seqlens, ref_sums, beta, label_smoothing, robust, *outputs)
    return outputs


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
    _check_logits(logits, None if token_kl is None else token_kl.ref_logits)
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
    """`whole_call.preference_forward` in two launches."""
    _check_logits(logits, ref_logits)
    pairs, asked = weighting.pairs(labels), asked_rows(ref_logits is not None, statistics)
    tokens = _empty(labels, asked.bit_count(), *labels.shape)
    sequences, losses = _empty(labels, len(SEQUENCE_ROWS) + len(statistics), 2 * pairs), _empty(labels, pairs)
    loss = logits.new_empty((pairs,) if weighting.reduction == "none" else (), dtype=result_dtype(logits))
    # A counter for this call only, cleared by its first launch. A counter shared by calls would be wrong with several streams,
    # replays of a CUDA graph, or after a failed launch, and one from a graph's memory pool would outlive its call.
    pairs_done = labels.new_empty(1, dtype=torch.int32)
    _kernels.preference_forward.default(
        logits, labels, ref_logits, *transform, asked, *weighting[:3], REDUCTIONS.index(weighting.reduction), *family,
        tokens, sequences, losses, loss, pairs_done,
    )  # fmt: skip
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
    """`whole_call.preference_backward` in one launch."""
    _check_logits(logits, None)
    reduction = REDUCTIONS.index(weighting.reduction)
    _kernels.preference_backward.default(
        logits, labels, tokens, sequences, grad_loss, *transform, *weighting[:3], reduction, out
    )
