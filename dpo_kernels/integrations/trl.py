"""Patches TRL, from 0.12 on, so that its trainers compute log-probabilities with these kernels.

```python
from dpo_kernels.integrations.trl import apply

apply()  # once, before training; or: with applied(): trainer.train()
```

Trainers, models and saved files do not change. What is replaced depends on the version of TRL:

    from hidden states and the LM head   the autograd function behind the fused head (1.2 and newer; DPO and SFT since 1.15)
    from logits                          `selective_log_softmax` (0.15), `entropy_from_logits` (0.20) and
                                         `selective_log_softmax_and_entropy` (1.14)
    DPOTrainer before 1.14               the line that computes log-probabilities and the line that sets those of the prompt to 0
    CPO, ORPO, KTO and BCO               `get_batch_logps`: always before 0.15, later if the trainer's module is loaded

Two cases still use TRL's function: heads partitioned by DeepSpeed ZeRO-3, and logits that are not plain tensors.

On a CPU, import this module before TRL's trainers: it also makes torch use 2 MB pages for large tensors.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import itertools
import os
import re
import sys
import textwrap
import types
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from .. import linear, logps
from ..logps import NO_LABEL, linear_logps
from .patch import Patch, Target, arguments_of, entropy_of, small_logits, takes

# A TRL step on a CPU maps gigabytes of new memory, with one page fault per page; 2 MB pages cause fewer faults than 4 KB pages.
# torch reads the variable at its first allocation, which importing a trainer causes. Set it to 0 to keep small pages.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

_UTILS = "trl.trainer.utils"
#: The arguments of TRL's autograd function since 1.15, 1.13, 1.6 and 1.2.
_HEADS = (
    "hidden, weight, bias, targets, temperature, chunk_size, final_logit_softcapping, logit_scale, outputs",
    "last_hidden, weight, bias, targets, temperature, chunk_size, final_logit_softcapping, logit_scale",
    "last_hidden, weight, targets, temperature, chunk_size, final_logit_softcapping, logit_scale",
    "last_hidden, weight, targets, temperature, chunk_size, logit_scale",
)
#: TRL's optional outputs, in the order in which its function returns them -> name of the statistic here.
_STATISTICS = {
    "entropy": "entropy",
    "log_sum_sq_probs": "log_sum_sq",
    "mean_logits": "mean_logits",
    "is_top1": "accuracy",
}

# --- from hidden states and the LM head ---------------------------------------------------------------------------


class _LaterEntropy(torch.autograd.Function):
    """Identity on the entropy. Its backward computes the logits again, so an entropy that is only logged costs nothing more."""

    @staticmethod
    def forward(ctx: Any, entropy: Tensor, settings: dict[str, Any], *tensors: Tensor | None) -> Tensor:
        ctx.settings = settings
        ctx.save_for_backward(*tensors)
        ctx.autocast = torch.is_autocast_enabled(entropy.device.type), torch.get_autocast_dtype(entropy.device.type)
        return entropy.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        needed = ctx.needs_input_grad[2:]
        leaves: list[Any] = [
            None if tensor is None else tensor.detach().requires_grad_(need)
            for tensor, need in zip(ctx.saved_tensors, needed, strict=True)
        ]
        hidden, weight, bias, labels = leaves
        enabled, dtype = ctx.autocast
        with torch.enable_grad(), torch.autocast(grad.device.type, dtype=dtype, enabled=enabled):
            _, found = linear_logps(
                hidden, weight, labels, bias=bias, statistics=("entropy",), differentiable_entropy=True, **ctx.settings
            )
        wanted = [leaf for leaf, need in zip(leaves, needed, strict=True) if need]
        grads = iter(torch.autograd.grad(found["entropy"], wanted, grad))
        return (None, None, *(next(grads) if need else None for need in needed))


def _head(theirs: Any, grad_filter: float | str | None, memory_budget: int | str | None) -> type:
    """The replacement of TRL's autograd function; None stands for TRL 1.15 without Triton, which has none."""
    names = _HEADS[0].split(", ") if theirs is None else arguments_of(theirs)
    defaults = {"final_logit_softcapping": None, "logit_scale": 1.0, "outputs": tuple(_STATISTICS)}

    class FusedLogProbs:
        """Replacement for TRL's autograd function; `apply` has the same arguments and the same outputs."""

        @staticmethod
        def apply(*arguments: Any) -> tuple[Tensor | None, ...]:
            given = defaults | dict(zip(names, arguments, strict=False))
            hidden, weight, bias = arguments[0], given["weight"], given.get("bias")
            if hasattr(weight, "ds_id"):
                # ZeRO-3 frees the gathered head after the forward pass; TRL's backward gathers it again.
                return theirs.apply(*arguments)
            outputs = given["outputs"] if "outputs" in names else ("entropy",)
            head, offset = weight, bias
            if not torch.is_autocast_enabled(hidden.device.type) and weight.dtype != hidden.dtype:
                head, offset = weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)
            budget = memory_budget
            if budget is None:
                budget = linear.planner.step_budget(head.shape[1], head.shape[0], linear.card_memory(hidden.device))
            settings = {
                "temperature": given["temperature"],
                "logit_scale": given["logit_scale"],
                "logit_softcap": given["final_logit_softcapping"],
                "memory_budget": budget,
            }
            statistics = tuple(ours for name, ours in _STATISTICS.items() if name in outputs) or ("accuracy",)
            labels = given["targets"]
            logps, found = linear_logps(
                hidden, head, labels, bias=offset, statistics=statistics, grad_filter=grad_filter, **settings
            )
            entropy = found.get("entropy")
            if entropy is not None and logps.requires_grad:
                entropy = _LaterEntropy.apply(entropy, settings, hidden, head, offset, labels)
            if "outputs" not in names:
                return logps, entropy
            top1 = found["accuracy"] > 0.5 if "is_top1" in outputs else None
            return logps, entropy, found.get("log_sum_sq"), found.get("mean_logits"), top1

    return FusedLogProbs


def _head_example(function: Any, names: list[str]) -> Any:
    """Values and gradients for the arguments that the function has."""
    (states, targets), weight = small_logits(1, 5, 11), small_logits(1, 7, 11, seed=1)[0][0]
    tensors = [states[0].requires_grad_(), weight.requires_grad_(), weight.detach()[:, 0].clone().requires_grad_()]
    known = {"weight": tensors[1], "bias": tensors[2], "targets": targets[0] % 7, "temperature": 0.7, "chunk_size": 4}
    known |= {"final_logit_softcapping": 2.0, "logit_scale": 0.5, "outputs": tuple(_STATISTICS)}
    found = function.apply(tensors[0], *(known[name] for name in names[1:]))
    grads = torch.autograd.grad((found[0] * torch.arange(5)).sum(), tensors, allow_unused=True)
    return [part.detach() for part in found], [grad for grad in grads if grad is not None]


# --- from logits --------------------------------------------------------------------------------------------------


def _scored(
    logits: Tensor, index: Tensor, row_mask: Tensor | None, temperature: float = 1.0, **settings: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    """`token_logps` of logits [..., V], also of one row; 0 where row_mask is 0, for which no logit is read."""
    labels = index.long() if row_mask is None else torch.where(row_mask != 0, index.long(), NO_LABEL)
    rows = logits
    if logits.dim() == 1:
        rows, labels = logits.unsqueeze(0), labels.unsqueeze(0)
    found = logps.token_logps(
        rows,
        labels,
        temperature=temperature,
        ignore_index=NO_LABEL,
        **settings,
    )
    scores, statistics = (found, {}) if isinstance(found, Tensor) else found
    return scores.view(index.shape), {name: value.view(index.shape) for name, value in statistics.items()}


def _result_dtype(logits: Tensor, *arguments: Tensor | None) -> torch.dtype:
    """The dtype of TRL's results: float32 from its Triton kernel (1.14 and newer), else that of the logits."""
    fused = getattr(sys.modules.get(_UTILS), "_supports_trl_loss_kernel", None)
    return torch.float32 if fused is not None and fused(logits, *arguments) else logits.dtype


def _selective_log_softmax(theirs: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(theirs)
    def selective_log_softmax(
        logits: Tensor, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None
    ) -> Tensor:
        # An index of another shape, which TRL's function broadcasts in some dtypes, is left to TRL as well.
        if not takes(logits) or logits.shape[:-1] not in (index.shape, index.shape[:-1]):
            return theirs(logits, index, *(() if temperature == 1.0 and row_mask is None else (temperature, row_mask)))
        if index.dim() == logits.dim():
            return logps.selective_log_softmax(logits, index, temperature, row_mask)
        return _scored(logits, index, row_mask, temperature)[0].to(_result_dtype(logits, index, row_mask))

    return selective_log_softmax


def _entropy_from_logits(theirs: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(theirs)
    def entropy_from_logits(logits: Tensor, chunk_size: int = 1) -> Tensor:
        if not takes(logits):
            return theirs(logits, chunk_size)
        return entropy_of(logits).to(_result_dtype(logits))

    return entropy_from_logits


def _selective_log_softmax_and_entropy(theirs: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(theirs)
    def selective_log_softmax_and_entropy(
        logits: Tensor,
        index: Tensor,
        entropy_requires_grad: bool = True,
        temperature: float = 1.0,
        row_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        if not takes(logits) or logits.shape[:-1] != index.shape:
            return theirs(logits, index, entropy_requires_grad, temperature, row_mask)
        differentiable = entropy_requires_grad and logits.requires_grad and torch.is_grad_enabled()
        scores, found = _scored(
            logits, index, row_mask, temperature, statistics=("entropy",), differentiable_entropy=differentiable
        )
        dtype = _result_dtype(logits, index, row_mask)
        return scores.to(dtype), found["entropy"].to(dtype)

    return selective_log_softmax_and_entropy


def _logits_example(function: Callable[..., Any]) -> Any:
    """Values and gradients for the arguments that the function has."""
    logits, index = small_logits()
    logits.requires_grad_()
    known = {"index": index, "temperature": 0.7, "row_mask": (index % 3 != 0).long()}
    found = function(logits, **{name: value for name, value in known.items() if name in arguments_of(function)})
    parts = found if isinstance(found, tuple) else (found,)
    total = sum((part * torch.linspace(-1, 2, part.numel()).view_as(part)).sum() for part in parts)
    return *(part.detach() for part in parts), torch.autograd.grad(total, logits)[0]


# --- DPOTrainer and get_batch_logps -------------------------------------------------------------------------------

#: "P = <log-probabilities of Y in X>", as TRL writes it until 0.14 and from 0.15 on, and "P[MASK] = 0".
_SCORES = re.compile(
    r"(\w+) = (?:torch\.gather\((\w+)\.log_softmax\(-1\), dim=2, index=(\w+)\.unsqueeze\(2\)\)\.squeeze\(2\)"
    r"|selective_log_softmax\((\w+), (\w+)\))"
)
_ZEROED = re.compile(r"(\w+)\[(.+)\] = 0(?:\.0)?")


def masked_logps(logits: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """Log-probabilities of labels, in the dtype of logits; 0 where mask is true, for which no logit is read.

    Args:
        logits: [..., T, V].
        labels: [..., T] int64.
        mask: [..., T] bool.

    Returns:
        [..., T] in nats.
    """
    if not takes(logits):
        return torch.gather(logits.log_softmax(-1), -1, labels.unsqueeze(-1)).squeeze(-1)
    return _scored(logits, labels, ~mask)[0].to(logits.dtype)


def mask_first(theirs: Callable[..., Any]) -> Callable[..., Any]:
    """The method with `masked_logps` in each line that computes log-probabilities and is followed by `P[MASK] = 0`.

    The rest of the method stays TRL's. A method without such lines is returned as it is.
    """
    if not isinstance(theirs, types.FunctionType) or theirs.__closure__ is not None:
        return theirs
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(theirs)))
    except OSError:  # installed without its source
        return theirs
    count = 0
    blocks = [block for node in ast.walk(tree) for _, block in ast.iter_fields(node) if isinstance(block, list)]
    for block in blocks:
        for line, following in itertools.pairwise(block):
            if not (isinstance(line, ast.Assign) and isinstance(following, ast.Assign)):
                continue
            scores, zeroed = _SCORES.fullmatch(ast.unparse(line)), _ZEROED.fullmatch(ast.unparse(following))
            if scores and zeroed and scores[1] == zeroed[1]:
                logits, labels = (name for name in scores.groups()[1:] if name)
                # Imported in the expression, because a name in TRL's module would get into the modules that Unsloth writes.
                ours = f"__import__({__name__!r}, fromlist=['masked_logps']).masked_logps"
                call = ast.parse(f"{ours}({logits}, {labels}, {zeroed[2]})", mode="eval").body
                line.value = ast.copy_location(call, line)
                count += 1
    if not count:
        return theirs
    # Tracebacks and inspect.getsource show TRL's file and lines.
    ast.increment_lineno(ast.fix_missing_locations(tree), theirs.__code__.co_firstlineno - 1)
    made: dict[str, Any] = {}
    exec(compile(tree, theirs.__code__.co_filename, "exec"), theirs.__globals__, made)
    return functools.wraps(theirs)(made[theirs.__name__])


def _get_batch_logps(theirs: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(theirs)

    @functools.wraps(theirs)
    def get_batch_logps(*arguments: Any, **named: Any) -> Tensor:
        given = signature.bind(*arguments, **named).arguments
        logits, labels = given["logits"], given["labels"]
        if not takes(logits) or logits.shape[:-1] != labels.shape:
            return theirs(*arguments, **named)
        if not given.get("is_encoder_decoder", False):
            logits, labels = logits[:, :-1], labels[:, 1:]
        mask = labels != given.get("label_pad_token_id", -100)
        sums = _scored(logits, labels, mask)[0].sum(-1)
        if given.get("average_log_prob", False):
            sums = sums / mask.sum(-1)
        return sums.to(logits.dtype)

    return get_batch_logps


def _batch_example(function: Callable[..., Any]) -> Any:
    logits, labels = small_logits()
    labels[:, :2] = -100
    return function(logits, labels.clone()), function(logits, labels.clone(), average_log_prob=True)


#: DPOTrainer's methods with such lines: before 0.29, and from 0.29 to 1.13.
DPO_METHODS = ("concatenated_forward", "_compute_loss", "compute_ref_log_probs")

# --- the patch ----------------------------------------------------------------------------------------------------


def _batch_targets(everywhere: bool) -> list[Target]:
    """`get_batch_logps` of the trainers that have it: of all, or of those whose module is loaded."""
    modules = [f"trl.trainer.{name}_trainer" for name in ("cpo", "orpo", "kto", "bco")]
    modules += [f"trl.experimental.{name}.{name}_trainer" for name in ("cpo", "orpo", "kto", "bco")]
    return [
        Target(
            module,
            f"{module.split('.')[-1].split('_')[0].upper()}Trainer.get_batch_logps",
            (
                "logits, labels, average_log_prob, label_pad_token_id, is_encoder_decoder",
                "logits, labels, average_log_prob, label_pad_token_id",
                "logits, labels, average_log_prob, is_encoder_decoder",
                "logits, labels, average_log_prob",
            ),
            _get_batch_logps,
            (_batch_example,),
        )
        for module in modules
        if everywhere or module in sys.modules
    ]


#: The arguments, replacement and examples of Targets, also for other packages' functions with the same contract.
SELECTIVE = (("logits, index", "logits, index, temperature, row_mask"), _selective_log_softmax, (_logits_example,))
ENTROPY = (("logits, chunk_size",), _entropy_from_logits, (_logits_example,))


def _head_targets(utils: Any, grad_filter: float | str | None, memory_budget: int | str | None) -> list[Target]:
    """The fused head. None if another package has put an object of its own there, as Unsloth does."""
    head = getattr(utils, "_ChunkedLogProbFunction", None)
    if head is not None and not (isinstance(head, type) and issubclass(head, torch.autograd.Function)):
        return []
    names = [] if head is None else arguments_of(head)
    # That of 1.15 runs on GPUs only, and is None without Triton.
    only_gpu = head is None or ("outputs" in names and not hasattr(utils, "_use_triton"))
    replacement = functools.partial(_head, grad_filter=grad_filter, memory_budget=memory_budget)
    examples = () if only_gpu else (functools.partial(_head_example, names=names),)
    return [
        Target(_UTILS, "_ChunkedLogProbFunction", _HEADS, replacement, examples, here=head is None),
        # In that module the function only decides whether unscored tokens are left out. TRL itself does so only on GPUs.
        Target(_UTILS, "_use_triton", ("device",), lambda theirs: lambda device: True, here=True),
    ]


def targets(
    grad_filter: float | str | None = "auto",
    memory_budget: int | str | None = None,
    others: Sequence[Target] = (),
) -> list[Target]:
    """The functions of the installed TRL, after those of `others`. Raises ImportError if TRL cannot be imported."""
    utils: Any = importlib.import_module(_UTILS)
    return [
        *others,
        *_head_targets(utils, grad_filter, memory_budget),
        Target(_UTILS, "selective_log_softmax", *SELECTIVE),
        Target(
            _UTILS,
            "selective_log_softmax_and_entropy",
            ("logits, index, entropy_requires_grad, temperature, row_mask",),
            _selective_log_softmax_and_entropy,
            (_logits_example,),
        ),
        Target(_UTILS, "entropy_from_logits", *ENTROPY),
        *(Target("trl.trainer.dpo_trainer", f"DPOTrainer.{method}", (), mask_first) for method in DPO_METHODS),
        *_batch_targets(everywhere=not hasattr(utils, "selective_log_softmax")),
    ]


#: Of this module, and of those that patch what stands on TRL.
PATCH = Patch("trl", targets)


def apply_to_trl(
    *, grad_filter: float | str | None = "auto", memory_budget: int | str | None = None
) -> Callable[[], None]:
    """Make TRL's trainers use these kernels in this process.

    A TRL whose functions have other arguments or other results is not patched; a RuntimeWarning names the difference. A second
    call first undoes the previous one.

    Args:
        grad_filter: as in `linear_logps`.
        memory_budget: as in `linear_logps`, but None uses `dpo_kernels.linear.planner.step_budget`: at least 256 MiB, and on a
            GPU at least 3% of its memory.

    Returns:
        A function that removes the patch.

    Raises:
        ImportError: TRL cannot be imported.
    """
    return PATCH.apply(grad_filter=grad_filter, memory_budget=memory_budget)


def trl_patched(
    *, grad_filter: float | str | None = "auto", memory_budget: int | str | None = None
) -> AbstractContextManager[None]:
    """Context manager that applies the patch of `apply_to_trl` inside a `with` block.

    Args:
        grad_filter: as in `apply_to_trl`.
        memory_budget: as in `apply_to_trl`.

    Raises:
        ImportError: TRL cannot be imported.
    """
    return PATCH.applied(grad_filter=grad_filter, memory_budget=memory_budget)


apply = apply_to_trl
applied = trl_patched
