"""From a caller's tensors and wishes to a `Call`: heads checked, products' dtype, filter, strategy and budget chosen."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .. import backends, objectives
from ..arguments import Batch, PairSettings, check_divergences, check_dtype, check_tensor
from ..stages import Transform
from . import planner
from .call import NO_REFERENCE, Call, LMHead, Needs, Reference, sizes_of
from .gpu import device_of, fuse

#: What `grad_filter="auto"` means on a CPU: the threshold whose error in dH stays below the dtype's own rounding
#: (docs/linear.md). On a GPU it means exact.
AUTO_FILTER = {torch.bfloat16: 2.0**-16, torch.float16: 2.0**-20}


def head_of(weight: Tensor, bias: Tensor | None) -> LMHead:
    """The head, unchecked. A sharded (DTensor) weight is gathered, differentiably."""
    return LMHead(weight.full_tensor() if hasattr(weight, "full_tensor") else weight, bias)


def reference_of(
    ref_hidden: Tensor | None, ref_weight: Tensor | None, ref_bias: Tensor | None, hidden: Tensor, head: LMHead
) -> Reference:
    """The reference's tensors, checked and detached; its head is by default the policy's own."""
    if ref_hidden is None:
        if ref_weight is not None or ref_bias is not None:
            raise ValueError("ref_weight and ref_bias need ref_hidden, the reference's hidden states")
        return NO_REFERENCE
    check_dtype("ref_hidden", ref_hidden)
    width = ref_hidden.shape[-1] if ref_hidden.dim() else 0
    check_tensor("ref_hidden", ref_hidden, (*hidden.shape[:-1], width), hidden.device, "that of hidden, but for H")
    if ref_weight is None:
        ref = LMHead(head.weight, head.bias if ref_bias is None else ref_bias)
    else:
        ref = head_of(ref_weight, ref_bias)
    ref.check(ref_hidden, head.vocab, "ref_")
    ref_hidden = ref_hidden.detach()
    bias = None if ref.bias is None else ref.bias.detach()
    return Reference(ref_hidden if ref_hidden.dim() == 3 else ref_hidden.unsqueeze(0), ref.weight.detach(), bias)


def _compute_dtype(hidden: Tensor) -> torch.dtype:
    """What the products are in: autocast's dtype where it is on (it leaves float64 alone), else the tensors' own."""
    device_type = hidden.device.type
    if hidden.dtype != torch.float64 and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return hidden.dtype


def threshold(grad_filter: float | str | None, dtype: torch.dtype, backend: str) -> float:
    """The threshold on probabilities, 0 for exact gradients."""
    if grad_filter is None:
        return 0.0
    if isinstance(grad_filter, str):
        if grad_filter != "auto":
            raise ValueError(f'grad_filter must be None (exact), "auto" or a probability; got {grad_filter!r}')
        return AUTO_FILTER.get(dtype, 0.0) if backend == "cpu" else 0.0
    if not 0.0 < grad_filter < 1.0:
        raise ValueError(f"grad_filter must lie in (0, 1), a probability; got {grad_filter}")
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
    """The call, on a backend whose kernels for it have passed their self-check.

    Args:
        batch: its rows are hidden states.
        scalar_loss, couples_pairs: see `planner.choose_strategy`.
    """
    hidden, dtype = batch.rows, _compute_dtype(batch.rows)
    enabled = torch.is_grad_enabled()
    needs = Needs(*(t is not None and t.requires_grad and enabled for t in (hidden, head.weight, head.bias)))
    sizes = sizes_of(hidden, head.vocab, reference, statistics, terms, dtype, needs)

    def planned(backend: str) -> Call:
        # The lists of a filtered gradient hold that of a log-probability, not that of a KL.
        eps = 0.0 if terms else threshold(grad_filter, dtype, backend)
        # The native CPU kernels filter entry by entry, GPU kernels block by block, and eager PyTorch not at all.
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
    """The call of a preference loss. Nothing here depends on how many tokens the batch has.

    Args:
        reported: the statistics that the caller reads.

    Raises:
        ValueError: a divergence is asked for without the reference's hidden states.
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
        # A compiled graph knows the sigmoid family alone: other objectives are Python, which no operator can hold.
        scalar_loss=settings.reduction != "none" and (not torch.compiler.is_compiling() or settings.family is not None),
        couples_pairs=objectives.couples_pairs(settings.functions),
    )


def _variant_of(call: Call, head: LMHead) -> backends.Variant:
    """Which kernels the call runs."""
    return backends.Variant(
        call.compute_dtype,
        reference=None if call.reference.hidden is None else call.compute_dtype,
        aligned=head.vocab % 8 == 0,
        statistics=call.statistics,
        terms=call.terms,
        # Divergences run the same kernels whatever the strategy is.
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
