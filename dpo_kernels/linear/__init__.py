"""The linear path: loss and log-probabilities from hidden states and LM head, with logits in memory one chunk at a time.

Data flow of a chunk of c scored tokens (planner.py chooses c and the strategy):

    rows [c, H] --GEMM with the head--> logits [c, V]   one buffer, reused by every chunk, because mapping new pages costs
                                                        more than the arithmetic on them
    logits --token_logps--> logps, max, log_sum, ...    stage 1 of the backend, one read
    logits --logits_grad--> dz, in place                stage 3 of the backend, when the coefficients are known
    dz --GEMM--> dH rows [c, H];  dz, rows --GEMM--> dW [V, H], accumulated in float32

Only scored tokens are gathered, so prompts and padding need no arithmetic.

Modules:

    door.py        from a call's arguments to a `Call`: checks, strategy, budget
    forecast.py    the plan of a batch without running it
    planner.py     strategies, chunks and budgets as pure functions of sizes
    gpu.py         the planner's constants and rules for GPUs
    call.py        `Call`: all arguments of a call except the tensors that may need a gradient
    chunk.py       the logits buffer, the stages of a chunk, the head's gradient
    products.py    the matrix products
    tokens.py      per-token log-probabilities for any upstream gradient: every strategy except whole_pairs
    pairs.py       whole_pairs: a scalar loss whose coefficients are known while a pair's logits are in memory
    fused.py       chunks on the fused Triton kernels: logits stay on chip, and blocks of negligible probability are skipped
    operators.py   the same functions as PyTorch operators, for torch.compile

On a GPU the host synchronizes with the stream once per call, to read the number of scored tokens.
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
    """Per-token log-probabilities and statistics.

    Returns:
        ({name: [B, T]}, plan). "logps" and the divergences among the call's terms are differentiable. The plan is None under
            torch.compile, because a compiled graph does not know the number of scored tokens.
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
    """The scalar loss of whole pairs.

    Returns:
        (loss, the pairs' losses, {name: [B, T]} of the tokens, plan). Only the loss is differentiable. The plan is None under
            torch.compile.
    """
    plan = None
    if torch.compiler.is_compiling():
        loss, done, found = operators.linear_whole_pairs(hidden, head, call, tokens, settings)
    else:
        loss, *vectors, found, plan = WholePairs.apply(hidden, *head, call, tokens, settings)
        done = PairLosses(*vectors)
    return loss, done, dict(zip(call.rows, found.unbind(0), strict=True)), plan
