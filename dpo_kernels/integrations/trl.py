"""Puts `linear_logps` under TRL's fused LM head, so that its DPO, KTO, SFT, GRPO and RLOO trainers run on these kernels.

    from dpo_kernels.integrations.trl import apply_to_trl
    apply_to_trl()                          # once, before training; or `with trl_patched(): trainer.train()`

TRL's trainers (1.15 and newer) get per-token log-probabilities and statistics from one autograd function, looked up by
name in `trl.trainer.utils` at each forward. That name is what is exchanged; no trainer, model or saved file changes.
What stays TRL's: a gradient through the entropy and DeepSpeed ZeRO-3's partitioned heads (both call TRL's own function).
On a CPU, importing this before TRL's trainers also gives torch's large tensors 2 MB pages.
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .. import linear
from ..functional import linear_logps

# A step of TRL's on a CPU maps gigabytes anew and pays for every page of it: 2 MB instead of 4 KB. torch reads this when it first
# allocates, which importing a trainer does. Set it to 0 to keep small pages.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

_UTILS = "trl.trainer.utils"
_NAME = "_ChunkedLogProbFunction"
#: The arguments of TRL's function from 1.15 on; another list means another contract.
_ARGUMENTS = [
    "hidden",
    "weight",
    "bias",
    "targets",
    "temperature",
    "chunk_size",
    "final_logit_softcapping",
    "logit_scale",
    "outputs",
]
#: TRL's optional outputs in the order in which its function returns them, by our statistic's name.
_STATISTICS = {
    "entropy": "entropy",
    "log_sum_sq_probs": "log_sum_sq",
    "mean_logits": "mean_logits",
    "is_top1": "accuracy",
}


class _TheirEntropy(torch.autograd.Function):
    """Passes our entropy on; if a loss differentiates it, TRL's own function is run for the gradient."""

    @staticmethod
    def forward(ctx: Any, entropy: Tensor, theirs: Any, *arguments: Any) -> Tensor:
        ctx.theirs, ctx.rest = theirs, arguments[3:]
        ctx.save_for_backward(*arguments[:3])
        ctx.autocast = torch.is_autocast_enabled(entropy.device.type), torch.get_autocast_dtype(entropy.device.type)
        return entropy.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        tensors = [None if t is None else t.detach() for t in ctx.saved_tensors]
        wanted = []
        for tensor, needed in zip(tensors, ctx.needs_input_grad[2:5], strict=True):
            if tensor is not None and needed:
                wanted.append(tensor.requires_grad_())
        enabled, dtype = ctx.autocast
        with torch.enable_grad(), torch.autocast(grad.device.type, dtype=dtype, enabled=enabled):
            entropy = ctx.theirs.apply(*tensors, *ctx.rest)[1]
        found = iter(torch.autograd.grad(entropy, wanted, grad))
        grads = [next(found) if t is not None and t.requires_grad else None for t in tensors]
        return (None, None, *grads, *(None for _ in ctx.rest))


def _replacement(theirs: Any, grad_filter: float | str | None, memory_budget: int | str | None) -> type:
    class FusedLogProbs:
        """Stands where TRL's autograd function stood; `apply` has its arguments and returns its five outputs."""

        @staticmethod
        def apply(
            hidden: Tensor,
            weight: Tensor,
            bias: Tensor | None,
            targets: Tensor,
            temperature: float,
            chunk_size: int,
            final_logit_softcapping: float | None = None,
            logit_scale: float = 1.0,
            outputs: tuple[str, ...] = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1"),
        ) -> tuple[Tensor | None, ...]:
            rest = (targets, temperature, chunk_size, final_logit_softcapping, logit_scale, outputs)
            if hasattr(weight, "ds_id"):
                # ZeRO-3 frees the gathered head after the forward; TRL's backward knows how to gather it again.
                return theirs.apply(hidden, weight, bias, *rest)
            head, offset = weight, bias
            if not torch.is_autocast_enabled(hidden.device.type) and weight.dtype != hidden.dtype:
                head, offset = weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)
            # Temperature divides after the cap: (c tanh(s x / c)) / t is the same map with c / t and s / t.
            scale = logit_scale / temperature
            softcap = None if final_logit_softcapping is None else final_logit_softcapping / temperature
            budget = memory_budget
            if budget is None:
                budget = linear.planner.step_budget(head.shape[1], head.shape[0], linear.card_memory(hidden.device))
            logps, found = linear_logps(
                hidden,
                head,
                targets,
                bias=offset,
                statistics=tuple(ours for name, ours in _STATISTICS.items() if name in outputs) or ("accuracy",),
                logit_scale=scale,
                logit_softcap=softcap,
                grad_filter=grad_filter,
                memory_budget=budget,
                ignore_index=-100,
            )
            entropy = found.get("entropy")
            if entropy is not None and theirs is not None and logps.requires_grad:
                entropy = _TheirEntropy.apply(entropy, theirs, hidden, weight, bias, *rest)
            top1 = found["accuracy"] > 0.5 if "is_top1" in outputs else None
            return logps, entropy, found.get("log_sum_sq"), found.get("mean_logits"), top1

    return FusedLogProbs


def _unsupported() -> str | None:
    """Why this TRL cannot be patched; None if it can."""
    try:
        utils = importlib.import_module(_UTILS)
    except ImportError as error:
        return f"TRL cannot be imported ({error}); install it with: pip install 'trl>=1.15'"
    version = getattr(importlib.import_module("trl"), "__version__", "of unknown version")
    if not hasattr(utils, _NAME) or not hasattr(utils, "add_fused_lm_head"):
        return f"TRL {version} has no fused LM head to replace; it came with 1.15"
    theirs = getattr(utils, _NAME)
    if theirs is None:  # 1.15 without Triton: nothing to compare with, and no head without us
        return None
    arguments = list(inspect.signature(theirs.forward).parameters)[1:]
    if arguments != _ARGUMENTS:
        return f"TRL {version} calls its fused LM head with {arguments}, not with {_ARGUMENTS}"
    return None


def _undo_last() -> None:
    utils = sys.modules.get(_UTILS)
    undo = getattr(getattr(utils, _NAME, None), "undo", None)
    if undo is not None:
        undo()


def apply_to_trl(
    *, grad_filter: float | str | None = "auto", memory_budget: int | str | None = None
) -> Callable[[], None]:
    """Let TRL's trainers use these kernels, in this process, from now on.

    Args:
        grad_filter: see `linear_logps`.
        memory_budget: the same; None takes what a step may (`planner.step_budget`), at least 256 MiB, on a GPU 3% of its memory.

    Returns:
        A function that puts everything back. Calling `apply_to_trl` again first undoes the last one.

    Raises:
        ImportError: TRL is not installed. A TRL whose fused head is not the one known here is left alone, with a
            RuntimeWarning that says what differs.
    """
    _undo_last()
    reason = _unsupported()
    if reason is not None:
        if "cannot be imported" in reason:
            raise ImportError(reason)
        warnings.warn(f"dpo_kernels: {reason}. TRL keeps working, unpatched.", RuntimeWarning, stacklevel=2)
        return lambda: None
    utils = importlib.import_module(_UTILS)
    theirs, compact = getattr(utils, _NAME), getattr(utils, "_use_triton", None)
    patched = _replacement(theirs, grad_filter, memory_budget)

    def undo() -> None:
        if getattr(utils, _NAME) is patched:
            setattr(utils, _NAME, theirs)
            if compact is not None:
                utils._use_triton = compact  # type: ignore[attr-defined]

    patched.undo = staticmethod(undo)  # type: ignore[attr-defined]
    setattr(utils, _NAME, patched)
    if compact is not None:
        # In that module the name only decides whether unscored tokens are left out, which TRL does on GPUs alone.
        utils._use_triton = lambda device: True  # type: ignore[attr-defined]
    return undo


@contextmanager
def trl_patched(*, grad_filter: float | str | None = "auto", memory_budget: int | str | None = None) -> Iterator[None]:
    """`apply_to_trl` for the length of a `with` block."""
    undo = apply_to_trl(grad_filter=grad_filter, memory_budget=memory_budget)
    try:
        yield
    finally:
        undo()
