"""Patches TRL so that its DPO, KTO, SFT, GRPO and RLOO trainers compute log-probabilities with these kernels.

```python
from dpo_kernels.integrations.trl import apply_to_trl

apply_to_trl()  # once, before training; or: with trl_patched(): trainer.train()
```

TRL's trainers (1.15 and newer) get per-token log-probabilities and statistics from one autograd function, which they look up by
name in `trl.trainer.utils` at each forward pass. The patch replaces that function; trainers, models and saved files do not
change. Two cases still use TRL's function: a gradient through the entropy, and heads partitioned by DeepSpeed ZeRO-3.

On a CPU, import this module before TRL's trainers: it also makes torch use 2 MB pages for large tensors.
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
from ..logps import linear_logps

# A TRL step on a CPU maps gigabytes of new memory, with one page fault per page; 2 MB pages cause fewer faults than 4 KB pages.
# torch reads the variable at its first allocation, which importing a trainer causes. Set it to 0 to keep small pages.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

_UTILS = "trl.trainer.utils"
_NAME = "_ChunkedLogProbFunction"
#: The arguments of TRL's function since 1.15. A function with other arguments is not patched.
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
#: TRL's optional outputs, in the order in which its function returns them -> name of the statistic here.
_STATISTICS = {
    "entropy": "entropy",
    "log_sum_sq_probs": "log_sum_sq",
    "mean_logits": "mean_logits",
    "is_top1": "accuracy",
}


class _TheirEntropy(torch.autograd.Function):
    """Identity on the entropy; its backward runs TRL's function, because these kernels do not differentiate the entropy."""

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
        """Replacement for TRL's autograd function; `apply` has the same arguments and the same five outputs."""

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
                # ZeRO-3 frees the gathered head after the forward pass; TRL's backward gathers it again.
                return theirs.apply(hidden, weight, bias, *rest)
            head, offset = weight, bias
            if not torch.is_autocast_enabled(hidden.device.type) and weight.dtype != hidden.dtype:
                head, offset = weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)
            # TRL divides by the temperature t after the cap: (c tanh(s x / c)) / t equals the transform with c / t and s / t.
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
    """The reason why the installed TRL cannot be patched; None if it can."""
    try:
        utils = importlib.import_module(_UTILS)
    except ImportError as error:
        return f"TRL cannot be imported ({error}); install it with: pip install 'trl>=1.15'"
    version = getattr(importlib.import_module("trl"), "__version__", "of unknown version")
    if not hasattr(utils, _NAME) or not hasattr(utils, "add_fused_lm_head"):
        return f"TRL {version} has no fused LM head to replace; it came with 1.15"
    theirs = getattr(utils, _NAME)
    if theirs is None:  # TRL 1.15 without Triton has no function here, so there are no arguments to compare
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
    """Make TRL's trainers use these kernels in this process.

    A TRL whose fused head has another interface is not patched; a RuntimeWarning names the difference. A second call first
    undoes the previous one.

    Args:
        grad_filter: as in `linear_logps`.
        memory_budget: as in `linear_logps`, but None uses `dpo_kernels.linear.planner.step_budget`: at least 256 MiB, and on a
            GPU at least 3% of its memory.

    Returns:
        A function that undoes the patch.

    Raises:
        ImportError: TRL cannot be imported.
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
        # In that module the function only decides whether unscored tokens are left out. TRL itself does so only on GPUs.
        utils._use_triton = lambda device: True  # type: ignore[attr-defined]
    return undo


@contextmanager
def trl_patched(*, grad_filter: float | str | None = "auto", memory_budget: int | str | None = None) -> Iterator[None]:
    """Context manager that applies the patch of `apply_to_trl` inside a `with` block.

    Args:
        grad_filter: as in `apply_to_trl`.
        memory_budget: as in `apply_to_trl`.

    Raises:
        ImportError: TRL cannot be imported.
    """
    undo = apply_to_trl(grad_filter=grad_filter, memory_budget=memory_budget)
    try:
        yield
    finally:
        undo()
