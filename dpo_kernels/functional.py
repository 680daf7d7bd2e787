"""The public functions: check the arguments once, run the stages, return a DPOOutput."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from . import backends, linear, objectives, ops, planner, token_kl
from .backends.eager import check_labels, small_dtype
from .objectives import Objective, Pairs
from .output import DPOOutput

#: What `statistics` may name.
STATISTICS = ("entropy", "kl", "accuracy", "mean_logits")
#: And on the linear path: "grad_dropped_mass" is the probability mass that `grad_filter` left out of a token's gradient.
LINEAR_STATISTICS = (*STATISTICS, "grad_dropped_mass")
#: Those of log-probabilities without a reference, token by token; "log_sum_sq" is log sum_v p_v^2, what WPO's weights compare
#: a token's log-probability with.
TOKEN_STATISTICS = (*(name for name in LINEAR_STATISTICS if name != "kl"), "log_sum_sq")
LOGIT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class _Batch:
    """A call's tensors in the one shape that the stages know: logits [B, T, V], tokens [B, T].

    On the linear path `logits` holds the hidden states [B, T, H].
    """

    logits: Tensor
    vocab: int
    labels: Tensor
    weights: Tensor  # 0 on ignored tokens
    cu_seqlens: Tensor | None
    sequences: int
    backend: str
    given_bounds: Tensor | None = (
        None  # cu_seqlens as they came, where they lie on an accelerator and wait to be checked
    )


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


def _check_tensor(name: str, value: Tensor, shape: tuple[int, ...], device: torch.device, why: str) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor of shape {list(shape)}; got {type(value).__name__}")
    if tuple(value.shape) != shape:
        raise ValueError(f"{name} must have shape {list(shape)} ({why}); got {list(value.shape)}")
    if value.device != device:
        raise ValueError(f"{name} is on {value.device}, the logits are on {device}; move it there")


def _prepare(
    logits: Tensor,
    labels: Tensor,
    cu_seqlens: Tensor | None,
    token_weights: Tensor | None,
    ignore_index: int,
    *,
    name: str = "logits",
    axis: str = "V",
    vocab: int | None = None,
) -> _Batch:
    """Check a call's tensors and bring them into shape; `name` and `axis` word the errors ("hidden", "H")."""
    if not isinstance(logits, Tensor) or logits.dtype not in LOGIT_DTYPES:
        got = logits.dtype if isinstance(logits, Tensor) else type(logits).__name__
        raise TypeError(f"{name} must be a float32, bfloat16, float16 or float64 tensor; got {got}")
    packed = cu_seqlens is not None
    if logits.dim() != (2 if packed else 3):
        wanted = f"[N, {axis}] with cu_seqlens" if packed else f"[2P, T, {axis}], or [N, {axis}] with cu_seqlens"
        raise ValueError(f"{name} must be {wanted}; got {list(logits.shape)}")
    if logits.shape[-1] == 0:
        raise ValueError(f"{name} must not be empty in {axis}: {list(logits.shape)}")
    _check_tensor("labels", labels, tuple(logits.shape[:-1]), logits.device, f"one label per row of {name}")
    if labels.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"labels must be int64 (or int32) token ids; got {labels.dtype}")
    given_bounds = None
    if cu_seqlens is not None:
        if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1 or cu_seqlens.dtype not in (torch.int64, torch.int32):
            raise ValueError(
                f"cu_seqlens must be a vector of integers [2P + 1]; got {list(cu_seqlens.shape)} {cu_seqlens.dtype}"
            )
        _check_tensor("cu_seqlens", cu_seqlens, tuple(cu_seqlens.shape), logits.device, "")
        if cu_seqlens.device.type != "cpu":
            given_bounds, cu_seqlens = cu_seqlens, ops.rising_bounds(cu_seqlens, logits.shape[0])
        cu_seqlens = cu_seqlens.to(torch.int64)
        logits, labels = logits.unsqueeze(0), labels.unsqueeze(0)
    labels = labels.to(torch.int64)
    weights = (labels != ignore_index).to(small_dtype(logits.device))
    if token_weights is not None:
        if packed:
            _check_tensor("token_weights", token_weights, tuple(labels.shape[1:]), logits.device, "one per label")
            token_weights = token_weights.unsqueeze(0)
        _check_tensor("token_weights", token_weights, tuple(labels.shape), logits.device, "one per label")
        weights = weights * token_weights.detach().to(weights.dtype)
        labels = torch.where(weights != 0, labels, ignore_index)
    sequences = labels.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    backend = backends.resolve(logits.device, logits.dtype)
    vocab = logits.shape[-1] if vocab is None else vocab
    return _Batch(logits, vocab, labels, weights, cu_seqlens, sequences, backend, given_bounds)


def _checked(
    batch: _Batch,
    *,
    ref_logits: Tensor | None = None,
    ref_sums: Tensor | None = None,
    loss: str = "sums",
    terms: tuple[str, ...] = (),
    **stage: Any,
) -> _Batch:
    """The batch, on a backend whose kernels for this call have passed their self-check."""
    if batch.backend not in backends.GPU_BACKENDS:
        return batch
    variant = backends.Variant(
        batch.logits.dtype,
        reference=ref_logits.dtype if ref_logits is not None else None if ref_sums is None else "sums",
        aligned=batch.vocab % 8 == 0,
        statistics=tuple(stage["statistics"]),
        terms=terms,
        loss=loss,
        packed=batch.cu_seqlens is not None,
        softcap=stage["logit_softcap"] > 0,
        negative_scale=stage["logit_scale"] < 0,
        grad=_wants_grad(batch.logits),
        # A compiled graph serves batches of any length.
        few_rows=not torch.compiler.is_compiling() and batch.labels.numel() < backends.MANY_ROWS,
        linear=None,
    )
    backend = backends.checked(batch.backend, batch.logits.device, variant)
    return batch if backend == batch.backend else replace(batch, backend=backend)


def _check_softcap(logit_softcap: float | None) -> float:
    if logit_softcap is not None and not logit_softcap > 0:
        raise ValueError(f"logit_softcap must be positive, or None for no cap; got {logit_softcap}")
    return float(logit_softcap or 0.0)


def _per_pair(name: str, value: float | Tensor, pairs: int, batch: _Batch) -> Tensor:
    """A float or a [P] tensor, as [P] in the small dtype."""
    if isinstance(value, Tensor) and value.dim() > 0:
        _check_tensor(name, value, (pairs,), batch.logits.device, "one per pair, or a number")
        return value.detach().to(batch.weights.dtype)
    if isinstance(value, Tensor):
        return value.detach().to(batch.weights).expand(pairs)
    return torch.full((pairs,), float(value), dtype=batch.weights.dtype, device=batch.logits.device)


def _reduce(losses: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return losses
    total = losses.sum()
    # The mean over no pairs is 0, so that a rank with an empty batch still takes part in the step.
    return total if reduction == "sum" else total / max(losses.shape[0], 1)


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
    batch = _prepare(logits, labels, cu_seqlens, token_weights, ignore_index)
    pairs = _count_pairs(batch)
    _check_reduction(reduction)
    functions = objectives.resolve(loss_type)
    has_reference = ref_logits is not None or ref_logps is not None
    objectives.check(functions, loss_weights, label_smoothing, has_reference=has_reference)
    wanted = _check_statistics(statistics)
    if ref_logits is not None and ref_logps is not None:
        raise ValueError("give ref_logits or ref_logps, not both")
    if "kl" in wanted and ref_logits is None:
        raise ValueError('the statistic "kl" needs ref_logits: sequence sums (ref_logps) do not determine it')
    if ref_logits is not None:
        if not isinstance(ref_logits, Tensor) or ref_logits.dtype not in LOGIT_DTYPES:
            raise TypeError("ref_logits must be a float32, bfloat16, float16 or float64 tensor")
        _check_tensor("ref_logits", ref_logits, tuple(logits.shape), logits.device, "that of logits")
        ref_logits = ref_logits.detach().view(batch.logits.shape) if cu_seqlens is None else ref_logits.detach()[None]
        if ref_logits.dtype == torch.float64:  # which not every backend reads beside narrower logits
            batch = replace(batch, backend=backends.resolve(logits.device, torch.float64))
    ref_sums = _reference_sums(ref_logps, batch)
    if not kl_coef >= 0:
        raise ValueError(f"kl_coef must not be negative; got {kl_coef}")
    if kl_coef and ref_logits is None:
        raise ValueError("kl_coef needs ref_logits: the KL divergence of distributions is not determined by ref_logps")
    stage: dict[str, Any] = {
        "ignore_index": ignore_index,
        "logit_scale": float(logit_scale),
        "logit_softcap": _check_softcap(logit_softcap),
        "statistics": (*wanted, "log_sum_sq") if use_weighting else wanted,
    }
    forward_kl = objectives.needs_token_kl(functions)
    beta_each = _per_pair("beta", beta, pairs, batch)
    smoothing_each = _per_pair("label_smoothing", label_smoothing, pairs, batch)
    kernel = _sigmoid_family(functions, loss_weights)
    kl_from = ref_logits if kl_coef or forward_kl else None  # the reference of a differentiable divergence
    batch = _checked(
        batch,
        ref_logits=ref_logits,
        ref_sums=ref_sums,
        loss="sums" if kernel is None else "robust" if kernel[0] else "sigmoid",
        terms=tuple(name for name, asked in (("kl", bool(kl_coef)), ("forward_kl", forward_kl)) if asked),
        **stage,
    )
    stage["backend"] = batch.backend
    if kernel is not None and kl_from is None:
        tokens, losses, sums, ref_sums = ops.fused_forward(
            batch.logits,
            batch.labels,
            ref_logits,
            batch.weights,
            batch.cu_seqlens,
            ref_sums,
            beta_each,
            smoothing_each,
            kernel[0],
            inplace_backward=inplace_backward,
            **stage,
        )
        rewards = beta_each.repeat(2) * (sums.detach() - ref_sums)
    else:
        if kl_from is not None:
            tokens = token_kl.token_logps(
                batch.logits,
                batch.labels,
                kl_from,
                forward_kl=forward_kl,
                inplace_backward=inplace_backward,
                **stage,
            )
        else:
            tokens = ops.token_logps(batch.logits, batch.labels, ref_logits, inplace_backward=inplace_backward, **stage)
        losses, sums, ref_sums, rewards = _pair_losses(
            batch, tokens, ref_sums, beta_each, smoothing_each, functions, loss_weights
        )
    if use_weighting:
        losses = losses * _wpo_weights(batch, tokens)
    weighted = losses if pair_weights is None else losses * _per_pair("pair_weights", pair_weights, pairs, batch)
    if kl_coef:
        shares = kl_coef * _kl_shares(batch, tokens["kl"])
        losses, weighted = losses + shares, weighted + shares
    return _output(batch, tokens, _reduce(weighted, reduction), losses, sums, ref_sums, rewards, wanted, ignore_index)


@torch.no_grad()
def _wpo_weights(batch: _Batch, tokens: dict[str, Tensor]) -> Tensor:
    """[P], from stage 1's log-probabilities and log_sum_sq."""
    scored = (batch.weights != 0).to(batch.weights.dtype)
    aligned = ops.sequence_sums(tokens["logps"] - tokens["log_sum_sq"], scored, batch.cu_seqlens, batch.backend)
    return linear.wpo_weights(aligned, ops.sequence_sums(scored, scored, batch.cu_seqlens, batch.backend))


def _kl_shares(batch: _Batch, kl: Tensor) -> Tensor:
    """[P], whose mean over the pairs is the mean of `kl` over all scored tokens."""
    scored = (batch.weights != 0).to(batch.weights.dtype)
    chosen, rejected = ops.sequence_sums(kl, scored, batch.cu_seqlens, batch.backend).chunk(2)
    return (chosen + rejected) * (chosen.shape[0] / _scored_count(batch))


def _scored_count(batch: _Batch) -> Tensor:
    """The number of scored tokens, at least 1."""
    scored = (batch.weights != 0).to(batch.weights.dtype)
    return ops.sequence_sums(scored, scored, batch.cu_seqlens, batch.backend).sum().clamp(min=1)


def _count_pairs(batch: _Batch) -> int:
    if batch.sequences % 2:
        raise ValueError(
            f"the batch holds {batch.sequences} sequences, an odd number; it must hold P chosen ones followed by "
            f"their P rejected ones"
        )
    return batch.sequences // 2


def _check_reduction(reduction: str) -> None:
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'reduction must be "mean", "sum" or "none"; got {reduction!r}')


def _reference_sums(ref_logps: Tensor | None, batch: _Batch) -> Tensor | None:
    if ref_logps is None:
        return None
    _check_tensor("ref_logps", ref_logps, (batch.sequences,), batch.logits.device, "one sum per sequence, chosen first")
    return ref_logps.detach().to(batch.weights.dtype)


def _output(
    batch: _Batch,
    tokens: dict[str, Tensor],
    loss: Tensor,
    losses: Tensor,
    sums: Tensor,
    ref_sums: Tensor,
    rewards: Tensor,
    statistics: Sequence[str],
    ignore_index: int,
) -> DPOOutput:
    """The public result, in float32 (float64 for float64 logits); statistics become means per sequence."""
    dtype = torch.float64 if batch.logits.dtype == torch.float64 else torch.float32
    scored = (batch.weights != 0).to(batch.weights.dtype)

    def sum_of(values: Tensor) -> Tensor:
        return ops.sequence_sums(values, scored, batch.cu_seqlens, batch.backend)

    counts = sum_of(scored)
    rewards = rewards.to(dtype)
    means = {name: (sum_of(tokens[name].detach()) / counts.clamp(min=1)).to(dtype) for name in statistics}
    sums, ref_sums = sums.detach().to(dtype), ref_sums.to(dtype)
    pairs = losses.shape[0]
    return DPOOutput(
        loss=loss.to(dtype),
        losses=losses.detach().to(dtype),
        chosen_logps=sums[:pairs],
        rejected_logps=sums[pairs:],
        ref_chosen_logps=ref_sums[:pairs],
        ref_rejected_logps=ref_sums[pairs:],
        chosen_rewards=rewards[:pairs],
        rejected_rewards=rewards[pairs:],
        token_counts=counts,
        _check=_late_check(batch, ignore_index),
        **means,
    )


def _sigmoid_family(functions: list[Objective], loss_weights: Sequence[float] | None) -> tuple[bool] | None:
    """(robust,) where the objective is one that the kernels know, else None."""
    only = functions[0] if len(functions) == 1 and loss_weights is None else None
    return only.kernel if isinstance(only, objectives.BoundObjective) else None


def _pair_losses(
    batch: _Batch,
    tokens: dict[str, Tensor],
    ref_sums: Tensor | None,
    beta: Tensor,
    label_smoothing: Tensor,
    functions: list[Objective],
    loss_weights: Sequence[float] | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(losses [P], sums, reference sums and rewards [2P]); the sigmoid family in the kernel, the rest from vectors."""
    kernel = _sigmoid_family(functions, loss_weights)
    if kernel is not None:
        losses, sums, ref_sums = ops.preference_loss(
            tokens["logps"],
            tokens.get("ref_logps"),
            batch.weights,
            batch.cu_seqlens,
            ref_sums,
            beta,
            label_smoothing,
            kernel[0],
            batch.backend,
        )
        return losses, sums, ref_sums, beta.repeat(2) * (sums.detach() - ref_sums)
    sums = ops.sequence_sums(tokens["logps"], batch.weights, batch.cu_seqlens, batch.backend)
    if "ref_logps" in tokens:
        ref_sums = ops.sequence_sums(tokens["ref_logps"], batch.weights, batch.cu_seqlens, batch.backend)
    elif ref_sums is None:
        ref_sums = torch.zeros_like(sums.detach())
    lengths = ops.sequence_sums(batch.weights, torch.ones_like(batch.weights), batch.cu_seqlens, batch.backend)
    kl_sums = None
    if "forward_kl" in tokens:
        kl_sums = ops.sequence_sums(tokens["forward_kl"], batch.weights, batch.cu_seqlens, batch.backend)
    pairs = Pairs.from_sums(sums, ref_sums, lengths, beta, label_smoothing, kl_sums)
    losses = objectives.mix(pairs, functions, loss_weights)
    if losses.shape != beta.shape:
        raise ValueError(f"an objective must return one loss per pair, [{beta.shape[0]}]; got {list(losses.shape)}")
    return losses, sums, ref_sums, torch.cat(objectives.rewards(pairs, functions)).detach()


def _check_statistics(statistics: Sequence[str], known: tuple[str, ...] = STATISTICS) -> tuple[str, ...]:
    if isinstance(statistics, str):
        statistics = (statistics,)
    for name in statistics:
        if name not in known:
            raise ValueError(f"unknown statistic {name!r}; known: {', '.join(known)}")
    return tuple(name for name in known if name in statistics)


def _late_check(batch: _Batch, ignore_index: int) -> Callable[[], None] | None:
    """What looks at labels and bounds when somebody waits for the device anyway, or None where all was looked at."""
    # CPU kernels have looked already; a compiled graph cannot return a closure.
    looked = batch.logits.device.type == "cpu" and batch.backend in ("eager", "cpu")
    if looked or torch.compiler.is_compiling():
        return None
    labels, vocab, bounds = batch.labels, batch.vocab, batch.given_bounds

    def check() -> None:
        check_labels(labels, vocab, ignore_index)
        if bounds is not None:
            ops.check_bounds(bounds, labels.shape[1])

    return check


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
    batch = _prepare(logits, labels, cu_seqlens, token_weights, ignore_index)
    stage: dict[str, Any] = {
        "ignore_index": ignore_index,
        "logit_scale": float(logit_scale),
        "logit_softcap": _check_softcap(logit_softcap),
        "statistics": (),
    }
    batch = _checked(batch, **stage)
    tokens = ops.token_logps(
        batch.logits, batch.labels, None, inplace_backward=inplace_backward, backend=batch.backend, **stage
    )
    sums = ops.sequence_sums(tokens["logps"], batch.weights, batch.cu_seqlens, batch.backend)
    return sums if logits.dtype == torch.float64 else sums.float()


# --- from hidden states -------------------------------------------------------------------------------------------


def _whole(weight: Tensor | None) -> Tensor | None:
    """A sharded (DTensor) parameter gathered, differentiably; anything else as it is."""
    return weight.full_tensor() if hasattr(weight, "full_tensor") else weight  # type: ignore[union-attr]


def _check_head(name: str, weight: Tensor, bias: Tensor | None, hidden: Tensor, vocab: int | None, dtype: bool) -> None:
    """Check a head's weight [V, H] and bias [V] against its hidden states; `dtype`: without autocast dtypes must agree."""
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        got = list(weight.shape) if isinstance(weight, Tensor) else type(weight).__name__
        raise ValueError(f"{name} must be the head's weight [V, H]; got {got}")
    rows = weight.shape[0] if vocab is None else vocab
    if rows == 0:
        raise ValueError(f"{name} has an empty vocabulary: {list(weight.shape)}")
    _check_tensor(name, weight, (rows, hidden.shape[-1]), hidden.device, "[V, H], H being that of the hidden states")
    if bias is not None:
        _check_tensor(f"{name}'s bias", bias, (rows,), hidden.device, "one per row of the head")
    if dtype and weight.dtype != hidden.dtype:
        raise TypeError(
            f"{name} is {weight.dtype}, its hidden states are {hidden.dtype}; cast one, or call under torch.autocast"
        )


def _compute_dtype(hidden: Tensor) -> torch.dtype:
    """What the products are in: autocast's dtype where it is on (it leaves float64 alone), else the tensors' own."""
    device_type = hidden.device.type
    if hidden.dtype != torch.float64 and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return hidden.dtype


def _grad_filter(grad_filter: float | str | None, dtype: torch.dtype, backend: str) -> float:
    """The threshold on probabilities, 0 for exact gradients."""
    if grad_filter is None:
        return 0.0
    if isinstance(grad_filter, str):
        if grad_filter != "auto":
            raise ValueError(f'grad_filter must be None (exact), "auto" or a probability; got {grad_filter!r}')
        return linear.AUTO_FILTER.get(dtype, 0.0) if backend == "cpu" else 0.0
    if not 0.0 < grad_filter < 1.0:
        raise ValueError(f"grad_filter must lie in (0, 1), a probability; got {grad_filter}")
    return float(grad_filter)


def _wants_grad(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.requires_grad and torch.is_grad_enabled()


def _linear_call(batch: _Batch, weight: Tensor, bias: Tensor | None, **options: Any) -> linear.Call:
    """The call's plan, on a backend whose kernels for it have passed their self-check."""
    call = _planned_call(batch, weight, bias, **options)
    if call.backend not in backends.GPU_BACKENDS:
        return call
    variant = backends.Variant(
        call.compute_dtype,
        reference=None if call.ref_hidden is None else call.compute_dtype,
        aligned=batch.vocab % 8 == 0,
        statistics=call.statistics,
        terms=call.terms,
        # Divergences run the same kernels whatever the strategy is.
        loss="sigmoid" if call.strategy == "whole_pairs" and not call.terms else "sums",
        packed=False,
        softcap=call.logit_softcap > 0,
        negative_scale=call.logit_scale < 0,
        grad=True,
        few_rows=True,
        linear=backends.LinearVariant(
            "two_pass" if call.terms else call.strategy,
            call.fused,
            bias is not None,
            call.needs_hidden,
            call.needs_weight,
        ),
    )
    backend = backends.checked(call.backend, batch.logits.device, variant)
    return call if backend == call.backend else _planned_call(replace(batch, backend=backend), weight, bias, **options)


def _planned_call(
    batch: _Batch,
    weight: Tensor,
    bias: Tensor | None,
    *,
    reference: tuple[Tensor | None, Tensor | None, Tensor | None],
    ignore_index: int,
    logit_scale: float,
    logit_softcap: float | None,
    statistics: tuple[str, ...],
    memory_budget: int | str | None,
    grad_filter: float | str | None,
    scalar_loss: bool,
    couples_pairs: bool,
    terms: tuple[str, ...] = (),
) -> linear.Call:
    hidden = batch.logits
    dtype = _compute_dtype(hidden)
    eps = _grad_filter(grad_filter, dtype, batch.backend)
    if terms:
        eps = 0.0  # the lists hold the gradient of a log-probability, not that of a KL
    call = linear.Call(
        batch.labels,
        *reference,
        ignore_index=ignore_index,
        logit_scale=float(logit_scale),
        logit_softcap=_check_softcap(logit_softcap),
        statistics=statistics,
        compute_dtype=dtype,
        budget=0,
        backend=batch.backend,
        strategy="",
        terms=terms,
        needs_hidden=_wants_grad(hidden),
        needs_weight=_wants_grad(weight),
        needs_bias=_wants_grad(bias),
    )
    head = call.sizes(hidden.shape[-1], batch.vocab)
    # The native CPU kernels filter entry by entry, GPU kernels block by block, and eager PyTorch not at all.
    entries = eps > 0.0 and batch.backend == "cpu"
    strategy, reason = planner.choose_strategy(
        head, scalar_loss=scalar_loss, couples_pairs=couples_pairs, filtered=entries
    )
    device = linear.device_of(batch.backend, hidden.device, dtype)
    fused, why = planner.fuse(head, strategy, device, eps)
    call = replace(
        call,
        eps=eps if entries or fused else 0.0,
        fused=fused,
        strategy=strategy,
        reason=f"{reason}; {why}" if why else reason,
    )
    head = call.sizes(hidden.shape[-1], batch.vocab)
    return replace(call, budget=planner.budget_of(memory_budget, head, strategy, device.memory))


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
    weight, ref_weight = _whole(weight), _whole(ref_weight)  # type: ignore[assignment]
    batch = _prepare(
        hidden,
        labels,
        cu_seqlens,
        token_weights,
        ignore_index,
        name="hidden",
        axis="H",
        vocab=weight.shape[0] if isinstance(weight, Tensor) and weight.dim() else 0,
    )
    pairs = _count_pairs(batch)
    _check_reduction(reduction)
    functions = objectives.resolve(loss_type)
    has_reference = ref_hidden is not None or ref_logps is not None
    objectives.check(functions, loss_weights, label_smoothing, has_reference=has_reference)
    forward_kl = objectives.needs_token_kl(functions)
    if not kl_coef >= 0:
        raise ValueError(f"kl_coef must not be negative; got {kl_coef}")
    for what, asked in (("kl_coef", bool(kl_coef)), ("an objective of loss_type", forward_kl)):
        if asked and ref_hidden is None:
            raise ValueError(
                f"{what} needs ref_hidden: the KL divergence of distributions is not determined by ref_logps"
            )
    wanted = _check_statistics(statistics, LINEAR_STATISTICS)
    autocast = _compute_dtype(hidden) != hidden.dtype or torch.is_autocast_enabled(hidden.device.type)
    _check_head("weight", weight, bias, hidden, None, not autocast)
    if ref_hidden is not None and ref_logps is not None:
        raise ValueError("give ref_hidden or ref_logps, not both")
    if "kl" in wanted and ref_hidden is None:
        raise ValueError('the statistic "kl" needs ref_hidden: sequence sums (ref_logps) do not determine it')
    if ref_hidden is None and (ref_weight is not None or ref_bias is not None):
        raise ValueError("ref_weight and ref_bias need ref_hidden, the reference's hidden states")
    reference: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None)
    if ref_hidden is not None:
        if not isinstance(ref_hidden, Tensor) or ref_hidden.dtype not in LOGIT_DTYPES:
            raise TypeError("ref_hidden must be a float32, bfloat16, float16 or float64 tensor")
        _check_tensor(
            "ref_hidden",
            ref_hidden,
            (*hidden.shape[:-1], ref_hidden.shape[-1] if ref_hidden.dim() else 0),
            hidden.device,
            "that of hidden, but for H",
        )
        if ref_weight is None:
            ref_weight, ref_bias = weight, bias if ref_bias is None else ref_bias
        _check_head("ref_weight", ref_weight, ref_bias, ref_hidden, batch.vocab, not autocast)
        reference = (
            ref_hidden.detach() if cu_seqlens is None else ref_hidden.detach().unsqueeze(0),
            ref_weight.detach(),
            None if ref_bias is None else ref_bias.detach(),
        )
    call = _linear_call(
        batch,
        weight,
        bias,
        reference=reference,
        ignore_index=ignore_index,
        logit_scale=logit_scale,
        logit_softcap=logit_softcap,
        statistics=(*wanted, "log_sum_sq") if use_weighting else wanted,
        memory_budget=memory_budget,
        grad_filter=grad_filter,
        # A compiled graph takes the two-pass operators, whose outputs have static shapes.
        scalar_loss=reduction != "none" and not torch.compiler.is_compiling(),
        couples_pairs=objectives.couples_pairs(functions),
        terms=tuple(name for name, asked in (("kl", bool(kl_coef)), ("forward_kl", forward_kl)) if asked),
    )
    batch = replace(batch, backend=call.backend)
    ref_sums = _reference_sums(ref_logps, batch)
    beta_each = _per_pair("beta", beta, pairs, batch)
    smoothing_each = _per_pair("label_smoothing", label_smoothing, pairs, batch)
    scale = None if pair_weights is None else _per_pair("pair_weights", pair_weights, pairs, batch)
    if call.strategy == "whole_pairs":
        factor = torch.ones_like(beta_each) if scale is None else scale
        if reduction == "mean":
            factor = factor / max(pairs, 1)
        kernel = _sigmoid_family(functions, loss_weights)
        pair = linear.PairCall(
            batch.weights,
            batch.cu_seqlens,
            ref_sums,
            beta_each,
            smoothing_each,
            factor,
            functions,
            loss_weights,
            kernel,
            use_weighting,
            kl_coef * (1 if reduction == "mean" else pairs) / _scored_count(batch) if kl_coef else None,
        )
        loss, losses, sums, ref_sums, tokens = linear.whole_pairs(batch.logits, weight, bias, call, pair)
        rewards = _rewards(batch, functions, kernel, tokens, sums, ref_sums, beta_each, smoothing_each)
        if kl_coef:
            losses = losses + kl_coef * _kl_shares(batch, tokens["kl"])
    else:
        tokens = linear.linear_logps(batch.logits, weight, bias, call)
        losses, sums, ref_sums, rewards = _pair_losses(
            batch, tokens, ref_sums, beta_each, smoothing_each, functions, loss_weights
        )
        if use_weighting:
            losses = losses * _wpo_weights(batch, tokens)
        weighted = losses if scale is None else losses * scale
        if kl_coef:
            shares = kl_coef * _kl_shares(batch, tokens["kl"])
            losses, weighted = losses + shares, weighted + shares
        loss = _reduce(weighted, reduction)
    return _output(batch, tokens, loss, losses, sums, ref_sums, rewards, wanted, ignore_index)


def _rewards(
    batch: _Batch,
    functions: list[Objective],
    kernel: tuple[bool] | None,
    tokens: dict[str, Tensor],
    sums: Tensor,
    ref_sums: Tensor,
    beta: Tensor,
    label_smoothing: Tensor,
) -> Tensor:
    """Rewards [2P] from finished sums."""
    if kernel is not None:
        return beta.repeat(2) * (sums - ref_sums)
    lengths = ops.sequence_sums(batch.weights, torch.ones_like(batch.weights), batch.cu_seqlens, batch.backend)
    kl_sums = None
    if "forward_kl" in tokens:
        kl_sums = ops.sequence_sums(tokens["forward_kl"], batch.weights, batch.cu_seqlens, batch.backend)
    pairs = Pairs.from_sums(sums, ref_sums, lengths, beta, label_smoothing, kl_sums)
    return torch.cat(objectives.rewards(pairs, functions)).detach()


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
    wanted = _check_statistics(statistics, TOKEN_STATISTICS)
    if not isinstance(hidden, Tensor) or hidden.dim() < 2:
        raise ValueError("hidden must be a tensor [..., H] with at least two dimensions")
    weight = _whole(weight)  # type: ignore[assignment]
    _check_tensor("labels", labels, tuple(hidden.shape[:-1]), hidden.device, "one label per row of hidden")
    shape = labels.shape
    if hidden.dim() != 3:
        hidden, labels = hidden.reshape(1, -1, hidden.shape[-1]), labels.reshape(1, -1)
    vocab = weight.shape[0] if isinstance(weight, Tensor) and weight.dim() else 0
    batch = _prepare(hidden, labels, None, None, ignore_index, name="hidden", axis="H", vocab=vocab)
    _check_head("weight", weight, bias, hidden, None, not torch.is_autocast_enabled(hidden.device.type))
    call = _linear_call(
        batch,
        weight,
        bias,
        reference=(None, None, None),
        ignore_index=ignore_index,
        logit_scale=logit_scale,
        logit_softcap=logit_softcap,
        statistics=wanted,
        memory_budget=memory_budget,
        grad_filter=grad_filter,
        scalar_loss=False,
        couples_pairs=False,
    )
    tokens = linear.linear_logps(batch.logits, weight, bias, call)
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    logps = tokens["logps"].to(dtype).view(shape)
    if not wanted:
        return logps
    return logps, {name: tokens[name].to(dtype).view(shape) for name in wanted}
