"""The loss functions. Each checks its arguments (arguments.py), runs the stages, and returns the results.

The functions for log-probabilities without a loss are in logps.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from . import backends, linear, objectives, ops
from .arguments import (
    LINEAR_STATISTICS,
    Batch,
    PairSettings,
    batch_of,
    check_divergences,
    check_dtype,
    check_settings,
    check_statistics,
    check_tensor,
    settings_of,
    transform_of,
)
from .backends.whole_call import reduce, result_dtype
from .logps import checked
from .objectives import Objective
from .output import DPOOutput
from .pair_loss import PairLosses, Tokens, pair_losses


def dpo_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    ref_logits: Tensor | None = None,
    ref_logps: Tensor | None = None,
    beta: float | Tensor = 0.1,
    loss_type: str | Objective | Sequence[str | Objective] = "sigmoid",
    loss_weights: Sequence[float] | None = None,
    label_smoothing: float | Tensor = 0.0,
    cu_seqlens: Tensor | None = None,
    token_weights: Tensor | None = None,
    pair_weights: Tensor | None = None,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    statistics: Sequence[str] = (),
    kl_coef: float = 0.0,
    use_weighting: bool = False,
    inplace_backward: bool = False,
    reduction: str = "mean",
) -> DPOOutput:
    """Direct Preference Optimization loss of P pairs, from logits.

    Source: Rafailov et al. 2023, Direct Preference Optimization, equation 7.

    Sequences 0 .. P-1 are chosen, sequences P .. 2P-1 rejected. `logits[..., t, :]` predicts `labels[..., t]`: the function
    does not shift the labels (`shift_labels` does). The forward pass reads each row of logits once; the backward pass reads
    and writes it once. Arithmetic is float32 for 16-bit logits, and sequence sums are float64.

    Args:
        logits: [2P, T, V], or packed [N, V] with `cu_seqlens`; float32, bfloat16, float16 or float64. Strided views are
            read without a copy.
        labels: [2P, T] or [N], int64 token ids; `ignore_index` marks tokens that do not count.
        ref_logits: the reference's logits, shaped like `logits`, of any of these dtypes; not differentiated.
        ref_logps: [2P], the reference's sequence log-probabilities in nats, summed with the same token weights; an
            alternative to `ref_logits`. Objectives that compare with a reference need one of the two; others ignore both.
        beta: inverse temperature of the implicit reward, a number or [P].
        loss_type: a name in `dpo_kernels.OBJECTIVES`, `objective(name, ...)` with hyper-parameters, a callable
            `Pairs` -> losses [P], or a sequence of these.
        loss_weights: one weight per entry of a `loss_type` sequence; 1 each by default.
        label_smoothing: probability that a pair's label is wrong, a number or [P].
        cu_seqlens: [2P + 1] int, cumulative sequence lengths of the packed layout, rising from 0 to at most N. Other bounds
            raise on a CPU. On a GPU they are clamped to valid ones, which can leave a sequence empty, and
            `DPOOutput.metrics()` raises.
        token_weights: shaped like `labels`, weights of the tokens in their sequence's sum; 0 skips the token.
        pair_weights: [P], factors of the pairs' losses, such as confidences. The mean still divides by P.
        ignore_index: label of the tokens that do not count.
        logit_scale: scale of z = cap * tanh(scale * x / cap), the transform of the logits x before the softmax.
        logit_softcap: cap of the same formula; None for z = scale * x.
        statistics: any of "entropy", "kl", "accuracy", "mean_logits", computed in the same pass. "kl" needs `ref_logits`.
        kl_coef: adds kl_coef times the mean over all scored tokens of KL(policy || reference), differentiable; needs
            `ref_logits`. Each pair's loss gets the share of its tokens; `pair_weights` do not apply to it.
        use_weighting: multiplies each pair's loss by WPO's weight (Zhou et al. 2024, equation 2): how likely the policy is to
            generate both answers. It is the product over chosen and rejected of exp(mean over tokens of
            log p(label) - log sum_v p_v^2), without gradient.
        inplace_backward: lets the backward pass write the gradient into the memory of `logits`, which saves a [2P, T, V]
            tensor and its page faults. Nothing else may use the logits afterwards, and the graph allows no second backward
            pass. Ignored under torch.compile, which plans memory itself.
        reduction: "mean" over the pairs, "sum", or "none".

    Returns:
        A `DPOOutput` with the loss and quantities to log.

    Raises:
        BackendUnavailable: the backend that the user selected cannot serve the call.
        NotImplementedError: a tensor is inside a torch.func transform or forward-mode differentiation.
        TypeError: an argument has a wrong type or dtype; the message names the expected and the given one.
        ValueError: an argument has a wrong shape or value; the message names the expected and the given one. A label
            outside [0, V) raises on a CPU, with its row and position. On a GPU a check would synchronize: there the loss of
            its pair is NaN, and `DPOOutput.metrics()` raises.
    """
    batch = batch_of(logits, labels, cu_seqlens, token_weights, ignore_index)
    functions = objectives.resolve(loss_type)
    check_settings(
        functions,
        loss_weights=loss_weights,
        label_smoothing=label_smoothing,
        logit_softcap=logit_softcap,
        kl_coef=kl_coef,
        reduction=reduction,
        has_reference=ref_logits is not None or ref_logps is not None,
    )
    reported = check_statistics(statistics)
    if ref_logits is not None and ref_logps is not None:
        raise ValueError("give ref_logits or ref_logps, not both")
    if ref_logits is not None:
        check_dtype("ref_logits", ref_logits)
        check_tensor("ref_logits", ref_logits, logits.shape, logits.device, "that of logits")
        ref_logits = ref_logits.detach() if ref_logits.requires_grad else ref_logits
        ref_logits = ref_logits if cu_seqlens is None else ref_logits.unsqueeze(0)
        if ref_logits.dtype == torch.float64:  # not every backend reads a float64 reference with narrower logits
            batch = replace(batch, backend=backends.resolve(logits.device, torch.float64))
    settings = settings_of(
        batch,
        functions,
        loss_weights=loss_weights,
        beta=beta,
        label_smoothing=label_smoothing,
        pair_weights=pair_weights,
        ref_logps=ref_logps,
        kl_coef=kl_coef,
        use_weighting=use_weighting,
        reduction=reduction,
    )
    check_divergences(reported, settings, ref_logits, "ref_logits")
    transform = transform_of(ignore_index, logit_scale, logit_softcap)
    statistics = settings.statistics(reported)
    batch = checked(batch, transform, statistics, ref_logits, settings)
    if settings.family is not None and not (settings.terms or use_weighting):
        _, sequences, losses, loss = ops.preference_forward(
            batch.rows,
            batch.labels,
            ref_logits,
            *transform,
            list(statistics),
            *settings.weighting(batch),
            *settings.whole_family(),
            inplace_backward,
            batch.backend,
        )
        names = ("logps", "ref_logps", "rewards", "coef", "token_counts", *reported)
        return DPOOutput.of(loss, losses, (names, sequences), check=batch.late_check())
    found = ops.token_logps(
        batch.rows,
        batch.labels,
        ref_logits,
        transform,
        statistics,
        terms=settings.terms,
        inplace_backward=inplace_backward,
        backend=batch.backend,
    )
    return _from_tokens(found, batch, settings, reported)


def _from_tokens(
    found: dict[str, Tensor],
    batch: Batch,
    settings: PairSettings,
    reported: tuple[str, ...],
    plan: linear.Plan | None = None,
) -> DPOOutput:
    """The output of a call, from the per-token results `found`."""
    tokens = Tokens.of(batch)
    done = pair_losses(found, tokens, settings)
    loss = reduce(done.weighted, settings.reduction).to(result_dtype(batch.rows))
    return _watched(loss, done, found, tokens, reported, batch, plan)


def _watched(
    loss: Tensor,
    done: PairLosses,
    found: dict[str, Tensor],
    tokens: Tokens,
    reported: tuple[str, ...],
    batch: Batch,
    plan: linear.Plan | None,
) -> DPOOutput:
    """The output, with each statistic as a mean over the scored tokens of a sequence."""
    counts = tokens.counts()
    sequences = {"logps": done.sums, "ref_logps": done.ref_sums, "rewards": done.rewards, "token_counts": counts}
    for name in reported:
        sequences[name] = tokens.sums(found[name].detach(), weighted=False) / counts.clamp(min=1)
    return DPOOutput.of(loss, done.losses, sequences, check=batch.late_check(), plan=plan)


# --- from hidden states -------------------------------------------------------------------------------------------


def linear_dpo_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    ref_logps: Tensor | None = None,
    memory_budget: int | str | None = None,
    grad_filter: float | str | None = "auto",
    beta: float | Tensor = 0.1,
    loss_type: str | Objective | Sequence[str | Objective] = "sigmoid",
    loss_weights: Sequence[float] | None = None,
    label_smoothing: float | Tensor = 0.0,
    cu_seqlens: Tensor | None = None,
    token_weights: Tensor | None = None,
    pair_weights: Tensor | None = None,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    statistics: Sequence[str] = (),
    kl_coef: float = 0.0,
    use_weighting: bool = False,
    reduction: str = "mean",
) -> DPOOutput:
    """`dpo_loss` from hidden states and the LM head, without all logits in memory at a time.

    Source: Rafailov et al. 2023, Direct Preference Optimization, equation 7.

    Computes `dpo_loss(hidden @ weight.T + bias, labels, ...)` chunk by chunk. Only scored tokens are projected. With a mean or
    sum over pairs, the forward pass also computes the gradients while a pair's logits are in memory, so a pair that fits in
    the budget is projected once. `dpo_kernels.linear.planner` chooses the chunks (docs/linear.md); the plan is logged at DEBUG
    level.

    Args:
        hidden: [2P, T, H], or packed [N, H] with `cu_seqlens`; float32, bfloat16, float16 or float64.
        weight: [V, H], the LM head, of the same dtype; under torch.autocast of any dtype, and autocast's dtype is used for the
            matrix products. Its gradient is accumulated in float32 and cast once. If the parameter has a float32 buffer
            `weight.main_grad`, the gradient is added to that buffer and autograd gets none. A sharded DTensor is gathered.
        labels: [2P, T] or [N], as in `dpo_loss`.
        bias: [V] or None.
        ref_hidden: the reference's hidden states, [2P, T, Hr] or [N, Hr]; not differentiated.
        ref_weight: the reference's LM head [V, Hr]; by default `weight`, detached.
        ref_bias: the reference's bias [V]; by default, if `ref_weight` is not given, `bias`, detached.
        ref_logps: [2P], the reference's sequence log-probabilities in nats; an alternative to `ref_hidden`.
        memory_budget: bytes, or a text such as "256MB", for temporary memory: everything except the arguments, their
            gradients and the kept entries of a filtered gradient. Default: half of a float32 head gradient, at least 64 MiB.
            If no such gradient exists during the forward pass (frozen head, filter): room for 512 tokens, at most a whole
            head gradient. On a GPU at least 3% of its memory, but no more than is available.
        grad_filter: None for exact gradients. A probability eps leaves entries with p <= eps out of the backward pass's matrix
            products: single entries on a CPU, blocks of 128 tokens x 128 entries on GPUs with Triton. The dropped probability
            mass is replaced by a uniform tail. "auto" takes the dtype's own eps on a CPU (exact in float32 and float64) and
            is exact on a GPU.
        beta: as in `dpo_loss`.
        loss_type: as in `dpo_loss`.
        loss_weights: as in `dpo_loss`.
        label_smoothing: as in `dpo_loss`.
        cu_seqlens: as in `dpo_loss`.
        token_weights: as in `dpo_loss`.
        pair_weights: as in `dpo_loss`.
        ignore_index: as in `dpo_loss`.
        logit_scale: as in `dpo_loss`.
        logit_softcap: as in `dpo_loss`.
        statistics: any of "entropy", "kl", "accuracy", "mean_logits", "grad_dropped_mass" (the probability mass that
            `grad_filter` left out). "kl" needs `ref_hidden`.
        kl_coef: as in `dpo_loss`; needs `ref_hidden`. With it, and with TDPO's objectives, gradients are exact, and a pair
            whose logits exceed the budget projects the reference twice.
        use_weighting: as in `dpo_loss`.
        reduction: as in `dpo_loss`.

    Returns:
        A `DPOOutput` with the loss and quantities to log.

    Raises:
        BackendUnavailable: as `dpo_loss`.
        NotImplementedError: as `dpo_loss`.
        TypeError: as `dpo_loss`.
        ValueError: as `dpo_loss`, or the budget cannot hold the logits of one token.
    """
    head = linear.head_of(weight, bias)
    batch = batch_of(hidden, labels, cu_seqlens, token_weights, ignore_index, name="hidden", axis="H", vocab=head.vocab)
    functions = objectives.resolve(loss_type)
    check_settings(
        functions,
        loss_weights=loss_weights,
        label_smoothing=label_smoothing,
        logit_softcap=logit_softcap,
        kl_coef=kl_coef,
        reduction=reduction,
        has_reference=ref_hidden is not None or ref_logps is not None,
    )
    reported = check_statistics(statistics, LINEAR_STATISTICS)
    if ref_hidden is not None and ref_logps is not None:
        raise ValueError("give ref_hidden or ref_logps, not both")
    head.check(hidden)
    reference = linear.reference_of(ref_hidden, ref_weight, ref_bias, hidden, head)
    transform = transform_of(ignore_index, logit_scale, logit_softcap)
    settings = settings_of(
        batch,
        functions,
        loss_weights=loss_weights,
        beta=beta,
        label_smoothing=label_smoothing,
        pair_weights=pair_weights,
        ref_logps=ref_logps,
        kl_coef=kl_coef,
        use_weighting=use_weighting,
        reduction=reduction,
    )
    call = linear.loss_call(batch, head, reference, transform, settings, reported, memory_budget, grad_filter)
    batch = replace(batch, backend=call.backend)
    if call.strategy != "whole_pairs":
        found, plan = linear.linear_logps(batch.rows, head, call)
        return _from_tokens(found, batch, settings, reported, plan)
    tokens = Tokens.of(batch)
    loss, done, found, plan = linear.whole_pairs(batch.rows, head, call, tokens, settings)
    return _watched(loss.to(result_dtype(hidden)), done, found, tokens, reported, batch, plan)
