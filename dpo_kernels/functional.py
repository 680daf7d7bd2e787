"""The public functions. Each checks its arguments (arguments.py), runs the stages, and returns what people watch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from . import backends, linear, objectives, ops
from .arguments import (
    LINEAR_STATISTICS,
    STATISTICS,
    TOKEN_STATISTICS,
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
from .objectives import Objective
from .output import DPOOutput
from .pair_loss import PairLosses, Tokens, pair_losses
from .stages import Transform

__all__ = [
    "LINEAR_STATISTICS",
    "STATISTICS",
    "TOKEN_STATISTICS",
    "dpo_loss",
    "linear_dpo_loss",
    "linear_logps",
    "sequence_logps",
    "shift_labels",
]


def shift_labels(input_ids: Tensor, mask: Tensor, ignore_index: int = -100) -> Tensor:
    """Labels such that logits[..., t, :] scores labels[..., t], from the tokens that the model read.

    Args:
        input_ids: [..., T] int64, the model's input.
        mask: [..., T] bool or 0/1, true on the tokens that count (the completion).

    Returns:
        [..., T] int64: labels[t] = input_ids[t + 1] where mask[t + 1], else ignore_index; the last position is ignored.
        Pass the whole logits with these labels: ignored rows cost nothing, and no slice has to be copied.
    """
    if input_ids.shape != mask.shape:
        raise ValueError(f"input_ids {tuple(input_ids.shape)} and mask {tuple(mask.shape)} must have one shape")
    following = torch.where(mask[..., 1:].bool(), input_ids[..., 1:], ignore_index)
    return torch.cat([following, torch.full_like(input_ids[..., :1], ignore_index)], dim=-1)


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
    """Direct Preference Optimization loss of P pairs, from logits (Rafailov et al. 2023, equation 7).

    Sequences 0 .. P-1 are chosen, P .. 2P-1 rejected. `logits[..., t, :]` scores `labels[..., t]`: no hidden shift
    (`shift_labels` makes such labels). Each logits row is read once in the forward pass, and read and written once in
    the backward pass. Arithmetic is float32 for 16-bit inputs, sequence sums are float64.

    Args:
        logits: [2P, T, V], or packed [N, V] with `cu_seqlens`; float32, bfloat16, float16 or float64. Strided views
            are read in place.
        labels: [2P, T] or [N], int64 token ids; `ignore_index` marks tokens that do not count.
        ref_logits: the reference's logits, shaped like `logits` (any of its dtypes); never differentiated.
        ref_logps: or the reference's sequence log-probabilities [2P], summed with the same weights (nats).
            Objectives that compare with a reference need one of the two; reference-free ones ignore both.
        beta: inverse temperature of the implicit reward, a number or [P].
        loss_type: a name in `dpo_kernels.OBJECTIVES`, `objective(name, ...)` with hyper-parameters, a callable on
            `Pairs`, or a sequence of these.
        loss_weights: one weight per entry of a `loss_type` sequence (default 1 each).
        label_smoothing: probability that a pair's label is wrong, a number or [P].
        cu_seqlens: [2P + 1] int, cumulative sequence lengths of the packed layout, from 0 to at most N. Bounds that do
            not rise, or leave [0, N], raise on CPU. On a GPU they are moved to the nearest that do (a sequence may come
            out empty), and `DPOOutput.metrics()` raises.
        token_weights: like `labels`; weights of the tokens in their sequence's sum. 0 skips the token.
        pair_weights: [P], multiplies each pair's loss (confidence scores); the mean stays over P.
        ignore_index: the label to skip.
        logit_scale, logit_softcap: z = cap * tanh(scale * x / cap); None for no cap.
        statistics: any of "entropy", "kl", "accuracy", "mean_logits", from the same pass. "kl" needs `ref_logits`.
        kl_coef: adds kl_coef times the mean over all scored tokens of KL(policy || reference), differentiable; needs
            `ref_logits`. Each pair's loss gets its tokens' share, unweighted by `pair_weights`.
        use_weighting: multiply each pair's loss by how likely the policy is to have written both answers (WPO, Zhou et
            al. 2024, equation 2): exp of the mean over tokens of log p(label) - log sum_v p_v^2, chosen times rejected,
            without gradient.
        inplace_backward: let the backward write the gradient over `logits`. Saves a [2P, T, V] tensor and its page
            faults; then no one else may need the logits, nor this graph a second backward. Ignored under
            torch.compile, which plans memory itself.
        reduction: "mean" over the pairs, "sum", or "none".

    Returns:
        DPOOutput.

    Raises:
        ValueError, TypeError: an argument is wrong; the message says what was expected and what came.
        A label outside [0, V) raises on CPU, naming row and position; on a GPU, where looking would stall the stream,
        its pair's loss is NaN and `DPOOutput.metrics()` raises.
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
        if ref_logits.dtype == torch.float64:  # which not every backend reads beside narrower logits
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
    batch = _checked(batch, transform, statistics, ref_logits, settings)
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


def _checked(
    batch: Batch,
    transform: Transform,
    statistics: tuple[str, ...],
    ref_logits: Tensor | None = None,
    settings: PairSettings | None = None,
) -> Batch:
    """The batch, on a backend whose kernels for this call have passed their self-check."""
    if batch.backend not in backends.GPU_BACKENDS:
        return batch
    reference: torch.dtype | str | None = None if ref_logits is None else ref_logits.dtype
    if settings is not None and settings.ref_sums is not None:
        reference = "sums"
    variant = backends.Variant(
        batch.rows.dtype,
        reference=reference,
        aligned=batch.vocab % 8 == 0,
        statistics=statistics,
        terms=() if settings is None else settings.terms,
        loss=(settings and settings.family) or "sums",
        packed=batch.cu_seqlens is not None,
        softcap=transform.softcap > 0,
        negative_scale=transform.scale < 0,
        grad=batch.rows.requires_grad and torch.is_grad_enabled(),
        # A compiled graph serves batches of any length.
        few_rows=not torch.compiler.is_compiling() and batch.labels.numel() < backends.MANY_ROWS,
        linear=None,
    )
    backend = backends.checked(batch.backend, batch.rows.device, variant)
    return batch if backend == batch.backend else replace(batch, backend=backend)


def _from_tokens(
    found: dict[str, Tensor],
    batch: Batch,
    settings: PairSettings,
    reported: tuple[str, ...],
    plan: linear.Plan | None = None,
) -> DPOOutput:
    """The result of a call whose tokens' results are `found`."""
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
    """The output; statistics of tokens become means over each sequence's scored ones."""
    counts = tokens.counts()
    sequences = {"logps": done.sums, "ref_logps": done.ref_sums, "rewards": done.rewards, "token_counts": counts}
    for name in reported:
        sequences[name] = tokens.sums(found[name].detach(), weighted=False) / counts.clamp(min=1)
    return DPOOutput.of(loss, done.losses, sequences, check=batch.late_check(), plan=plan)


def sequence_logps(
    logits: Tensor,
    labels: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    token_weights: Tensor | None = None,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    inplace_backward: bool = False,
) -> Tensor:
    """Weighted sums of token log-probabilities, one per sequence, differentiable: build your own loss on it.

    Args:
        logits: [B, T, V], or packed [N, V] with `cu_seqlens` [B + 1]. See `dpo_loss` for all arguments.

    Returns:
        [B] in nats: float32, or float64 for float64 logits. Any number of sequences, not only pairs.

    Raises:
        As `dpo_loss`.
    """
    batch = batch_of(logits, labels, cu_seqlens, token_weights, ignore_index)
    transform = transform_of(ignore_index, logit_scale, logit_softcap)
    batch = _checked(batch, transform, ())
    found = ops.token_logps(
        batch.rows, batch.labels, None, transform, inplace_backward=inplace_backward, backend=batch.backend
    )
    sums = ops.sequence_sums(found["logps"], batch.weights(), batch.cu_seqlens, batch.backend)
    return sums.to(result_dtype(logits))


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
    """`dpo_loss` from hidden states and the LM head, without ever holding all logits.

    Computes `dpo_loss(hidden @ weight.T + bias, labels, ...)` (Rafailov et al. 2023, equation 7) chunk by chunk. Only
    scored tokens are projected. With a mean or sum over pairs the gradients are computed in the forward, while a pair's
    logits are in memory, so that nothing is projected twice (docs/linear.md; `dpo_kernels.planner` chooses, and logs its
    plan at DEBUG level).

    Args:
        hidden: [2P, T, H], or packed [N, H] with `cu_seqlens`; float32, bfloat16, float16 or float64.
        weight: [V, H], the head, of the same dtype (any dtype under torch.autocast, which then sets the products').
            Its gradient is summed in float32 and cast once; if the parameter has a float32 buffer `weight.main_grad`, it
            is added there and autograd gets none. A sharded DTensor is gathered.
        labels: [2P, T] or [N], as in `dpo_loss`.
        bias: [V] or None.
        ref_hidden: the reference's hidden states, [2P, T, Hr] or [N, Hr]; never differentiated.
        ref_weight, ref_bias: the reference's head [V, Hr] and bias; by default the policy's own head and bias, detached.
        ref_logps: or the reference's sequence sums [2P].
        memory_budget: bytes, or a text such as "256MB", for what is held beside the tensors, their gradients and the
            kept entries of a filtered gradient. Default: half of a float32 head gradient, at least 64 MiB; where that
            gradient does not exist meanwhile (frozen head, filter), room for 512 tokens, at most all of it; on a GPU at
            least 3% of its memory, and less where the card has less to give.
        grad_filter: None for exact gradients; a probability eps to leave entries with p <= eps out of the backward's
            products, one by one on a CPU, by blocks of 128 tokens and 128 entries on GPUs with Triton; "auto" for the
            dtype's own on a CPU (exact in float32 and float64), exact on a GPU. The dropped mass goes back as a uniform tail.
        statistics: any of "entropy", "kl", "accuracy", "mean_logits", "grad_dropped_mass"; "kl" needs `ref_hidden`.
        kl_coef: as in `dpo_loss`; needs `ref_hidden`. With it, and with TDPO's objectives, gradients are exact, and of a
            pair beyond the budget the reference is projected twice as well.
        use_weighting: as in `dpo_loss`.
        beta, loss_type, loss_weights, label_smoothing, cu_seqlens, token_weights, pair_weights, ignore_index, logit_scale,
            logit_softcap, reduction: as in `dpo_loss`.

    Returns:
        DPOOutput.

    Raises:
        ValueError, TypeError: as `dpo_loss`; also for a budget that cannot hold one token's logits.
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


def linear_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    grad_filter: float | str | None = "auto",
    memory_budget: int | str | None = None,
    statistics: Sequence[str] = (),
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    """Log-probabilities of the labels from hidden states and the LM head, differentiable for any upstream gradient.

    What SFT, KTO, GRPO and one's own losses need; the logits exist one chunk at a time. See `linear_dpo_loss` for the
    arguments.

    Args:
        hidden: [..., H].
        weight: [V, H].
        labels: [...], int64; `ignore_index` costs nothing and gives 0.
        statistics: any of "entropy", "accuracy", "mean_logits", "grad_dropped_mass", "log_sum_sq" (log sum_v p_v^2, for
            WPO's weights), per token.

    Returns:
        logps, shaped like labels, in nats: float32, or float64 for float64 hidden states. With `statistics`:
        (logps, {name: tensor shaped like labels}), the statistics without gradient.

    Raises:
        As `linear_dpo_loss`.
    """
    if "kl" in statistics:
        raise ValueError('the statistic "kl" compares with a reference; linear_dpo_loss has it')
    reported = check_statistics(statistics, TOKEN_STATISTICS)
    if not isinstance(hidden, Tensor) or hidden.dim() < 2:
        raise ValueError("hidden must be a tensor [..., H] with at least two dimensions")
    head = linear.head_of(weight, bias)
    check_tensor("labels", labels, hidden.shape[:-1], hidden.device, "one label per row of hidden")
    shape = labels.shape
    if hidden.dim() != 3:
        hidden, labels = hidden.reshape(1, -1, hidden.shape[-1]), labels.reshape(1, -1)
    batch = batch_of(hidden, labels, None, None, ignore_index, name="hidden", axis="H", vocab=head.vocab)
    head.check(hidden)
    call = linear.plan_call(
        batch,
        head,
        linear.NO_REFERENCE,
        transform_of(ignore_index, logit_scale, logit_softcap),
        reported,
        memory_budget=memory_budget,
        grad_filter=grad_filter,
        scalar_loss=False,
        couples_pairs=False,
    )
    found, _ = linear.linear_logps(batch.rows, head, call)
    dtype = result_dtype(hidden)
    logps = found["logps"].to(dtype).view(shape)
    if not reported:
        return logps
    return logps, {name: found[name].to(dtype).view(shape) for name in reported}
