"""The LM-head strategies: loss and log-probabilities from hidden states, with the logits in memory one chunk at a time.

Data flow of a chunk of c scored tokens (planner.py chooses c, and the strategy):

    rows [c, H] --GEMM with the head--> logits [c, V]   one buffer, reused by every chunk: fresh pages cost more than the
                                                        arithmetic on them
    logits --token_logps--> logps, lse, statistics      the backend's stage 1: one read
    logits --logits_grad--> dz, over the logits         the backend's stage 3, when the coefficients are known
    dz --GEMM--> dH rows [c, H];  dz, rows --GEMM--> dW [V, H], accumulated in float32

Unscored tokens are never gathered, so prompts and padding cost nothing.

    call.py        what a call is, but for the tensors that may need a gradient
    chunk.py       the logits buffer, a chunk's way through the stages, the head's gradient
    tokens.py      log-probabilities per token, for any upstream gradient: all strategies but the next
    pairs.py       whole pairs: a scalar loss whose coefficients are known while a pair's logits are in memory
    fused.py       the same chunks by the fused Triton kernels: logits on chip, and no gradient where there is no probability
    operators.py   two passes as operators, for torch.compile

On a GPU a call waits for the stream once, where it reads how many tokens are scored; everything else is enqueued.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backends, planner
from . import operators  # noqa: F401 (registers what torch.compile calls)
from .call import AUTO_FILTER, KL_TERMS, TOKEN_OUTPUTS, Call
from .pairs import PairCall, WholePairs, wpo_weights
from .tokens import LinearLogps

__all__ = [
    "AUTO_FILTER",
    "KL_TERMS",
    "Call",
    "PairCall",
    "card_memory",
    "device_of",
    "linear_logps",
    "whole_pairs",
    "wpo_weights",
]


def card_memory(device: torch.device) -> int:
    """Bytes of the GPU's memory, of which a call's default budget is a share; 0 on other devices."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0


def device_of(backend: str, device: torch.device, dtype: torch.dtype) -> planner.Device:
    """What the planner knows of the device: its memory, and whether this backend's products may be the fused Triton kernels.

    They serve the cuda backend too, where Triton is there; and in Triton's interpreter a CPU.
    """
    if torch.compiler.is_compiling():
        return planner.Device(device.type)
    fused = backend in ("triton", "cuda") and dtype != torch.float64 and backends.why_not("triton", device.type) is None
    return planner.Device(device.type, card_memory(device), fused)


def linear_logps(hidden: Tensor, weight: Tensor, bias: Tensor | None, call: Call) -> dict[str, Tensor]:
    """Stage 1's results by name, [B, T]; "logps" and the divergences among the terms are differentiable."""
    if torch.compiler.is_compiling():
        outputs = torch.ops.dpo_kernels.linear_logps(
            hidden,
            weight,
            bias,
            call.labels,
            call.ref_hidden,
            call.ref_weight,
            call.ref_bias,
            call.ignore_index,
            call.logit_scale,
            call.logit_softcap,
            list(call.statistics),
            list(call.terms),
            call.compute_dtype,
            call.budget,
            call.backend,
        )
    else:
        outputs = LinearLogps.apply(hidden, weight, bias, call)
    return {name: value for name, value in zip(TOKEN_OUTPUTS, outputs, strict=True) if value.dim() > 1}


def whole_pairs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    call: Call,
    pair: PairCall,
) -> tuple[Tensor, Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """(loss, losses [P], sums, reference sums [2P], token results by name); only `loss` is differentiable."""
    loss, losses, sums, ref_sums, *tokens = WholePairs.apply(hidden, weight, bias, call, pair)
    found = {name: value for name, value in zip(TOKEN_OUTPUTS, tokens, strict=True) if value.dim() > 1}
    return loss, losses, sums, ref_sums, found
