"""The LM-head strategies: loss and log-probabilities from hidden states, with the logits in memory one chunk at a time.

Data flow of a chunk of c scored tokens (planner.py chooses c, and the strategy):

    rows [c, H] --GEMM with the head--> logits [c, V]   one buffer, reused by every chunk: fresh pages cost more than the
                                                        arithmetic on them
    logits --token_logps--> logps, max, log_sum, ...    the backend's stage 1: one read
    logits --logits_grad--> dz, over the logits         the backend's stage 3, when the coefficients are known
    dz --GEMM--> dH rows [c, H];  dz, rows --GEMM--> dW [V, H], accumulated in float32

Unscored tokens are never gathered, so prompts and padding cost nothing.

    door.py        from a caller's tensors to a call: heads checked, strategy and budget chosen
    forecast.py    the plan of a call that is not made
    planner.py     strategies, chunks and budgets, as pure functions of sizes; gpu.py has what is particular to a GPU
    call.py        what a call is, but for the tensors that may need a gradient
    chunk.py       the logits buffer, a chunk's way through the stages, the head's gradient
    tokens.py      log-probabilities per token, for any upstream gradient: all strategies but the next
    pairs.py       whole pairs: a scalar loss whose coefficients are known while a pair's logits are in memory
    fused.py       the same chunks by the fused Triton kernels: logits on chip, and no gradient where there is no probability
    operators.py   the same as operators, for torch.compile

On a GPU a call waits for the stream once, where it reads how many tokens are scored; everything else is enqueued.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..arguments import PairSettings
from ..pair_loss import PairLosses, Tokens
from . import operators
from .call import NO_REFERENCE, Call, LMHead, Needs, Reference, sizes_of
from .door import AUTO_FILTER, head_of, loss_call, plan_call, reference_of
from .forecast import plan_linear_dpo_loss
from .gpu import card_memory
from .pairs import WholePairs
from .planner import Plan
from .tokens import LinearLogps

__all__ = [
    "AUTO_FILTER",
    "NO_REFERENCE",
    "Call",
    "LMHead",
    "Needs",
    "Plan",
    "Reference",
    "card_memory",
    "head_of",
    "linear_logps",
    "loss_call",
    "plan_call",
    "plan_linear_dpo_loss",
    "reference_of",
    "sizes_of",
    "whole_pairs",
]


def linear_logps(hidden: Tensor, head: LMHead, call: Call) -> tuple[dict[str, Tensor], Plan | None]:
    """(what is found of each token by name, [B, T]; the plan). "logps" and the divergences among the terms are differentiable.

    A compiled graph has no plan: it does not know how many tokens are scored.
    """
    plan = None
    if torch.compiler.is_compiling():
        found = operators.linear_logps(hidden, head, call)
    else:
        found, plan = LinearLogps.apply(hidden, *head, call)
    return dict(zip(call.rows, found.unbind(0), strict=True)), plan


def whole_pairs(
    hidden: Tensor, head: LMHead, call: Call, tokens: Tokens, settings: PairSettings
) -> tuple[Tensor, PairLosses, dict[str, Tensor], Plan | None]:
    """(loss, what `pair_losses` gives, what is found of each token by name, the plan); only `loss` is differentiable."""
    plan = None
    if torch.compiler.is_compiling():
        loss, done, found = operators.linear_whole_pairs(hidden, head, call, tokens, settings)
    else:
        loss, *vectors, found, plan = WholePairs.apply(hidden, *head, call, tokens, settings)
        done = PairLosses(*vectors)
    return loss, done, dict(zip(call.rows, found.unbind(0), strict=True)), plan
