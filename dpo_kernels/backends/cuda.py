"""The stages in CUDA C++ (csrc/cuda): loads the library, or compiles it on first use, and allocates the outputs.

Beside the four stages there is `token_logps_and_loss`: stages 1 and 2 in one launch, for the sigmoid family.
"""

from __future__ import annotations

import functools
import logging
import sys
from pathlib import Path

import torch
from torch import Tensor

from .. import _build
from ..stages import STATISTICS, TokenKL, Transform, token_rows
from . import BackendUnavailable

logger = logging.getLogger(__name__)

PairOutputs = tuple[Tensor, Tensor, Tensor, Tensor]

# The library's operators. (Tests put those of the emulator here.)
_kernels = torch.ops.dpo_kernels_cuda


def _load() -> None:
    try:
        # A prebuilt library serves any GPU; one compiled on first use is for the GPU at hand and takes a third of the time.
        capability = torch.cuda.get_device_capability()

        def build(target: Path) -> None:
            _build.build_cuda(target, [_build.arch_for_device(_build.nvcc_compiler(), capability)])

        variant = ".sm_{}{}".format(*capability)
        path = _build.find_or_build("cuda", build, lambda line: print(line, file=sys.stderr), variant)
        torch.ops.load_library(str(path))
    except (_build.BuildError, OSError) as error:
        raise BackendUnavailable(str(error)) from error
    logger.debug("loaded %s", path)


def check_available(device_type: str) -> None:
    """Raise BackendUnavailable unless the tensors are on a CUDA device and the library loads."""
    if device_type != "cuda":
        raise BackendUnavailable("the CUDA kernels serve CUDA tensors only")
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
                f"the CUDA kernels take float32, bfloat16 or float16 {name}, not {str(tensor.dtype).removeprefix('torch.')}; "
                'use_backend("eager") computes in float64'
            )


def _token_outputs(
    labels: Tensor, ref_logits: Tensor | None, statistics: tuple[str, ...]
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """(the rows [R, B, T], which the kernels write for every token, and the operators' outputs: empty where not asked)."""
    names = token_rows(ref_logits is not None, statistics)
    tokens = torch.empty(len(names), *labels.shape, dtype=torch.float64, device=labels.device)
    rows, nothing = dict(zip(names, tokens.unbind(0), strict=True)), tokens.new_empty(0)
    return tokens, tuple(rows.get(name, nothing) for name in token_rows(True, STATISTICS))


def _pair_outputs(beta: Tensor) -> PairOutputs:
    pairs = beta.shape[0]
    like = functools.partial(torch.empty, dtype=torch.float64, device=beta.device)
    return like(pairs), like(2 * pairs), like(2 * pairs), like(2 * pairs)


def token_logps(
    logits: Tensor,
    labels: Tensor,
    ref_logits: Tensor | None,
    transform: Transform,
    statistics: tuple[str, ...],
) -> Tensor:
    """Stage 1."""
    _check_logits(logits, ref_logits)
    tokens, outputs = _token_outputs(labels, ref_logits, statistics)
    _kernels.token_logps(logits, labels, ref_logits, *transform, *outputs)
    return tokens


def sequence_sums(values: Tensor, weights: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Weighted sums over each sequence's tokens, [2P] float64."""
    count = values.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    sums = torch.empty(count, dtype=torch.float64, device=values.device)
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
) -> PairOutputs:
    """Stage 2: (losses [P], sums [2P], ref_sums [2P], coef [2P]); the formulas of csrc/common/sigmoid_family.h."""
    outputs = _pair_outputs(beta)
    _kernels.preference_loss(logps, ref_logps, weights, cu_seqlens, ref_sums, beta, label_smoothing, robust, *outputs)
    return outputs


def logits_grad(
    logits: Tensor,
    labels: Tensor,
    logps: Tensor,
    lse: Tensor,
    grad_logps: Tensor,
    transform: Transform,
    out: Tensor,
    token_kl: TokenKL | None = None,
) -> None:
    """Stage 3."""
    _check_logits(logits, None if token_kl is None else token_kl.ref_logits)
    reference = (None,) * 5 if token_kl is None else token_kl
    _kernels.logits_grad(logits, labels, logps, lse, grad_logps, *transform, out, *reference)


def token_logps_and_loss(
    logits: Tensor,
    labels: Tensor,
    ref_logits: Tensor | None,
    transform: Transform,
    statistics: tuple[str, ...],
    weights: Tensor,
    cu_seqlens: Tensor | None,
    ref_sums: Tensor | None,
    beta: Tensor,
    label_smoothing: Tensor,
    robust: bool,
) -> tuple[Tensor, PairOutputs]:
    """Stages 1 and 2 in a single launch, bit for bit what `token_logps` and then `preference_loss` give.

    Arguments as theirs: weights [B, T] float64 contiguous, 0 on unscored tokens; ref_sums only without ref_logits.
    """
    _check_logits(logits, ref_logits)
    tokens, outputs = _token_outputs(labels, ref_logits, statistics)
    pairs = _pair_outputs(beta)
    # Of this call alone, and cleared by it (csrc/cuda/params.h): nothing that a CUDA graph's pool owns outlives the call.
    counters = torch.empty(3 * beta.shape[0], dtype=torch.int32, device=logits.device)
    _kernels.fused_forward(
        logits, labels, ref_logits, *transform, *outputs,
        weights, cu_seqlens, ref_sums, beta, label_smoothing, robust, *pairs, counters,
    )  # fmt: skip
    return tokens, pairs
