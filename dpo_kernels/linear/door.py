"""From a caller's arguments to a `Call`: checks of the heads, choice of compute dtype, filter, strategy and budget."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .. import backends, objectives
from ..arguments import Batch, PairSettings, check_divergences, check_dtype, check_tensor
from ..stages import Transform
from . import planner
from .call import NO_REFERENCE, Call, LMHead, Needs, Reference, sizes_of
from .gpu import device_of, fuse

#: Thresholds of `grad_filter="auto"` on a CPU: their error in dH is below the rounding error of the dtype (docs/linear.md). For
#: other dtypes, and on a GPU, "auto" means exact gradients.
AUTO_FILTER = {torch.bfloat16: 2.0**-16, torch.float16: 2.0**-20}


def head_of(weight: Tensor, bias: Tensor | None) -> LMHead:
    """The head, not checked yet. A sharded weight or bias (DTensor) is gathered by a differentiable operation."""

    def whole(part: Any) -> Any:
        return part.full_tensor() if hasattr(part, "full_tensor") else part

    return LMHead(whole(weight), whole(bias))


def reference_of(
    ref_hidden: Tensor | None, ref_weight: Tensor | None, ref_bias: Tensor | None, hidden: Tensor, head: LMHead
) -> Reference:
    """The reference's tensors, checked and detached; its head defaults to the policy's."""
    if ref_hidden is None:
        if ref_weight is not None or ref_bias is not None:
            raise ValueError("ref_weight and ref_bias need ref_hidden, the reference's hidden states")
        return NO_REFERENCE
    check_dtype("ref_hidden", ref_hidden)
    width = ref_hidden.shape[-1] if ref_hidden.dim() else 0
    check_tensor("ref_hidden", ref_hidden, (*hidden.shape[:-1], width), hidden.device, "that of hidden except H")
    if ref_weight is None:
        ref = head_of(head.weight, head.bias if ref_bias is None else ref_bias)
    else:
        ref = head_of(ref_weight, ref_bias)
    ref.check(ref_hidden, head.vocab, "ref_")
    ref_hidden = ref_hidden.detach()
    bias = None if ref.bias is None else ref.bias.detach()
    return Reference(ref_hidden if ref_hidden.dim() == 3 else ref_hidden.unsqueeze(0), ref.weight.detach(), bias)


def _compute_dtype(hidden: Tensor) -> torch.dtype:
    """dtype of the products: autocast's if it is enabled (it does not apply to float64), else that of the hidden states."""
    device_type = hidden.device.type
    if hidden.dtype != torch.float64 and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return hidden.dtype


def threshold(grad_filter: float | str | None, dtype: torch.dtype, backend: str) -> float:
    """The filter threshold on probabilities; 0 for exact gradients."""
    if grad_filter is None:
        return 0.0
    if isinstance(grad_filter, str):
        if grad_filter != "auto":
            raise ValueError(f'grad_filter must be None (exact), "auto" or a probability; got {grad_filter!r}')
        return AUTO_FILTER.get(dtype, 0.0) if backend == "cpu" else 0.0
    if not 0.0 < grad_filter < 1.0:
        raise ValueError(f"grad_filter must lie in (0, 1); got {grad_filter}")
    return float(grad_filter)


def plan_call(
    batch: Batch,
    head: LMHead,
    reference: Reference,
    transform: Transform,
    statistics: tuple[str, ...],
    terms: tuple[str, ...] = (),
    *,
    memory_budget: int | str | None,
    grad_filter: float | str | None,
    scalar_loss: bool,
    couples_pairs: bool,
) -> Call:
    """The call, with a backend whose kernels for it have passed their self-check.

    Args:
        batch: the tokens; its rows are hidden states.
        head: the policy's LM head.
        reference: the reference's tensors.
        transform: the map from logits to z.
        statistics: names of stage 1's statistics.
        terms: the token-level divergences that the loss depends on.
        memory_budget: as in `linear_dpo_loss`.
        grad_filter: as in `linear_dpo_loss`.
        scalar_loss: see `planner.choose_strategy`.
        couples_pairs: see `planner.choose_strategy`.
    """
    hidden, dtype = batch.rows, _compute_dtype(batch.rows)
    enabled = torch.is_grad_enabled()
    needs = Needs(*(t is not None and t.requires_grad and enabled for t in (hidden, head.weight, head.bias)))
    sizes = sizes_of(hidden, head.vocab, reference, statistics, terms, dtype, needs)

    def planned(backend: str) -> Call:
        # The lists of a filtered gradient hold gradients of log-probabilities, not of KL divergences.
        eps = 0.0 if terms else threshold(grad_filter, dtype, backend)
        # The native CPU kernels filter single entries, GPU kernels filter blocks, and eager PyTorch does not filter.
        entries = eps > 0.0 and backend == "cpu"
        strategy, reason = planner.choose_strategy(
            sizes, scalar_loss=scalar_loss, couples_pairs=couples_pairs, filtered=entries
        )
        device = device_of(backend, hidden.device, dtype)
        fused, why = fuse(sizes, strategy, device, eps)
        final = replace(sizes, fused=fused)
        return Call(
            batch.labels,
            reference,
            transform,
            statistics,
            terms,
            dtype,
            backend,
            strategy,
            final,
            needs,
            planner.budget_of(memory_budget, final, strategy, device.memory),
            f"{reason}; {why}" if why else reason,
            eps if entries or fused else 0.0,
        )

    call = planned(batch.backend)
    if call.backend not in backends.GPU_BACKENDS:
        return call
    backend = backends.checked(call.backend, hidden.device, _variant_of(call, head))
    return call if backend == call.backend else planned(backend)


def loss_call(
    batch: Batch,
    head: LMHead,
    reference: Reference,
    transform: Transform,
    settings: PairSettings,
    reported: tuple[str, ...],
    memory_budget: int | str | None,
    grad_filter: float | str | None,
) -> Call:
    """The call of a preference loss; it does not depend on the number of tokens.

    Args:
        batch: the tokens; its rows are hidden states.
        head: the policy's LM head.
        reference: the reference's tensors.
        transform: the map from logits to z.
        settings: the settings of the pairs.
        reported: the statistics that the caller asked for.
        memory_budget: as in `linear_dpo_loss`.
        grad_filter: as in `linear_dpo_loss`.

    Raises:
        ValueError: a KL divergence is needed without the reference's hidden states, or the filter or budget is invalid.
    """
    check_divergences(reported, settings, reference.hidden, "ref_hidden")
    return plan_call(
        batch,
        head,
        reference,
        transform,
        settings.statistics(reported),
        settings.terms,
        memory_budget=memory_budget,
        grad_filter=grad_filter,
        # A compiled graph supports only the sigmoid family here: other objectives are Python code, which an operator cannot call.
        scalar_loss=settings.reduction != "none" and (not torch.compiler.is_compiling() or settings.family is not None),
        couples_pairs=objectives.couples_pairs(settings.functions),
    )


def _variant_of(call: Call, head: LMHead) -> backends.Variant:
    """The kernel variant of a call."""
    # The entropy's gradient runs the kernels of a divergence from a reference.
    entropy = "entropy" in call.terms
    return backends.Variant(
        call.compute_dtype,
        reference=call.compute_dtype if entropy or call.reference.hidden is not None else None,
        aligned=head.vocab % 8 == 0,
        statistics=call.statistics,
        terms=("kl",) if entropy else call.terms,
        # With divergences, every strategy runs the same kernels.
        loss="sigmoid" if call.strategy == "whole_pairs" and not call.terms else "sums",
        packed=False,
        softcap=call.transform.softcap > 0,
        negative_scale=call.transform.scale < 0,
        grad=True,
        few_rows=True,
        linear=backends.LinearVariant(
            "two_pass" if call.terms else call.strategy,
            call.fused,
            head.bias is not None,
            call.needs.hidden,
            call.needs.weight,
        ),
    )
