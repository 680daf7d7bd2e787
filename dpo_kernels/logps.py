"""Log-probabilities of labels, differentiable for any upstream gradient: for losses of your own and for other trainers.

    token_logps              per token, from logits
    sequence_logps           summed over sequences, from logits
    linear_logps             per token, from hidden states and the LM head
    selective_log_softmax    token_logps with the arguments and results of TRL's function

Each checks its arguments (arguments.py) and runs the stages (ops.py, linear/).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from . import backends, linear, ops
from .arguments import (
    LOGITS_STATISTICS,
    TOKEN_STATISTICS,
    Batch,
    PairSettings,
    batch_of,
    check_dtype,
    check_statistics,
    check_tensor,
    transform_of,
)
from .backends.whole_call import result_dtype
from .stages import Transform

#: An `ignore_index` that no label has, for functions whose tokens all count.
NO_LABEL = torch.iinfo(torch.int64).min


def shift_labels(input_ids: Tensor, mask: Tensor, ignore_index: int = -100) -> Tensor:
    """Labels for a model's input, shifted by one position so that logits[..., t, :] predicts labels[..., t].

    Use them with the unsliced logits: rows with an ignored label are not read.

    Args:
        input_ids: [..., T] int64, the model's input.
        mask: [..., T] bool or 0/1, true on the tokens that count (the completion).
        ignore_index: label of the positions that do not count.

    Returns:
        [..., T] int64: labels[t] is input_ids[t + 1] where mask[t + 1] is true, else ignore_index. The label of the last
            position is ignore_index.

    Raises:
        ValueError: input_ids and mask have different shapes.
    """
    if input_ids.shape != mask.shape:
        raise ValueError(f"input_ids {tuple(input_ids.shape)} and mask {tuple(mask.shape)} must have the same shape")
    following = torch.where(mask[..., 1:].bool(), input_ids[..., 1:], ignore_index)
    return torch.cat([following, torch.full_like(input_ids[..., :1], ignore_index)], dim=-1)


def checked(
    batch: Batch,
    transform: Transform,
    statistics: tuple[str, ...],
    ref_logits: Tensor | None = None,
    settings: PairSettings | None = None,
    terms: tuple[str, ...] = (),
) -> Batch:
    """The batch with a backend whose kernels for this call have passed their self-check."""
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
        terms=terms if settings is None else settings.terms,
        loss=(settings and settings.family) or "sums",
        packed=batch.cu_seqlens is not None,
        softcap=transform.softcap > 0,
        negative_scale=transform.scale < 0,
        grad=batch.rows.requires_grad and torch.is_grad_enabled(),
        # A compiled graph may run with batches of any length, so it gets the kernels for many rows.
        few_rows=not torch.compiler.is_compiling() and batch.labels.numel() < backends.MANY_ROWS,
        linear=None,
    )
    backend = backends.checked(batch.backend, batch.rows.device, variant)
    return batch if backend == batch.backend else replace(batch, backend=backend)


def _tokens(
    batch: Batch,
    transform: Transform,
    statistics: tuple[str, ...] = (),
    *,
    differentiable_entropy: bool = False,
    inplace_backward: bool = False,
) -> dict[str, Tensor]:
    """Stage 1 of a batch of logits: its rows by name, [B, T] each."""
    batch = checked(batch, transform, statistics)
    if differentiable_entropy:
        # The kernels of a divergence from a reference compute this gradient, see ops.py.
        batch = checked(batch, transform, (), batch.rows, terms=("kl",))
    return ops.token_logps(
        batch.rows,
        batch.labels,
        None,
        transform,
        statistics,
        terms=("entropy",) if differentiable_entropy else (),
        inplace_backward=inplace_backward,
        backend=batch.backend,
    )


def _reported(statistics: Sequence[str], known: tuple[str, ...], differentiable_entropy: bool) -> tuple[str, ...]:
    """The requested statistics, checked."""
    reported = check_statistics(statistics, known)
    if differentiable_entropy and "entropy" not in reported:
        raise ValueError('differentiable_entropy needs "entropy" among the statistics')
    return reported


def _results(
    found: dict[str, Tensor],
    reported: tuple[str, ...],
    differentiable_entropy: bool,
    dtype: torch.dtype,
    shape: torch.Size,
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    """What `token_logps` and `linear_logps` return."""

    def own(values: Tensor) -> Tensor:
        # A copy even in float64: callers may write to results, and the backward pass reads the rows.
        return values.to(dtype, copy=True).view(shape)

    logps = own(found["logps"])
    if not reported:
        return logps
    kept = {
        name: found[name] if name == "entropy" and differentiable_entropy else found[name].detach() for name in reported
    }
    return logps, {name: own(value) for name, value in kept.items()}


def token_logps(
    logits: Tensor,
    labels: Tensor,
    *,
    statistics: Sequence[str] = (),
    temperature: float = 1.0,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    differentiable_entropy: bool = False,
    inplace_backward: bool = False,
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    """Differentiable log-probabilities of the labels, token by token, from logits.

    For SFT, KTO, GRPO and losses of your own. `linear_logps` does the same from hidden states. The logits are read once in the
    forward pass, which also gives the statistics, and once in the backward pass. Those of ignored tokens are never read.

    Args:
        logits: [..., T, V], at least two dimensions; dtypes as in `dpo_loss`. Views such as `logits[:, :-1]` are read in place.
        labels: [..., T] int64 token ids; `logits[..., t, :]` scores `labels[..., t]`. The result of tokens with the label
            `ignore_index` is 0.
        statistics: any of "entropy", "accuracy", "mean_logits" and "log_sum_sq" (log sum_v p_v^2, for WPO's weights), per token.
        temperature: the logits are divided by it, after the cap.
        ignore_index: label of the tokens that do not count.
        logit_scale: as in `dpo_loss`.
        logit_softcap: as in `dpo_loss`.
        differentiable_entropy: the statistic "entropy" has a gradient, as for an entropy bonus. Else all statistics are
            detached.
        inplace_backward: as in `dpo_loss`.

    Returns:
        Log-probabilities in nats, shaped like labels: float32, or float64 for float64 logits. With `statistics` a tuple of
            these and a dict of the statistics by name, each shaped like labels.

    Raises:
        BackendUnavailable: as `dpo_loss`.
        NotImplementedError: as `dpo_loss`.
        TypeError: as `dpo_loss`.
        ValueError: as `dpo_loss`, or the temperature is not positive, or differentiable_entropy is given without the statistic
            "entropy". On a GPU a label outside [0, V) makes its token's result NaN.
    """
    reported = _reported(statistics, LOGITS_STATISTICS, differentiable_entropy)
    check_dtype("logits", logits)
    if logits.dim() < 2:
        raise ValueError(f"logits must be [..., T, V], with at least two dimensions; got {list(logits.shape)}")
    check_tensor("labels", labels, logits.shape[:-1], logits.device, "one label per row of logits")
    shape = labels.shape
    if logits.dim() == 2:
        logits, labels = logits.unsqueeze(0), labels.unsqueeze(0)
    elif logits.dim() > 3:
        logits, labels = logits.flatten(0, -3), labels.flatten(0, -2)
    batch = batch_of(logits, labels, None, None, ignore_index)
    found = _tokens(
        batch,
        transform_of(ignore_index, logit_scale, logit_softcap, temperature),
        reported,
        differentiable_entropy=differentiable_entropy,
        inplace_backward=inplace_backward,
    )
    return _results(found, reported, differentiable_entropy, result_dtype(logits), shape)


def selective_log_softmax(
    logits: Tensor, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None
) -> Tensor:
    """`logits.log_softmax(-1)` at the entries `index`, with the arguments and results of TRL's function of this name.

    Args:
        logits: [..., V]; dtypes as in `dpo_loss`.
        index: [...] or [..., K] int64, one or K entries of each row; those of rows that row_mask leaves out may be any number.
        temperature: the logits are divided by it.
        row_mask: shaped like the rows [...]; rows with 0 are not read, and their result is 0.

    Returns:
        Log-probabilities in nats, shaped like index, in the dtype of logits. `token_logps` returns float32 for 16-bit logits.

    Raises:
        BackendUnavailable: as `dpo_loss`.
        NotImplementedError: as `dpo_loss`.
        TypeError: as `dpo_loss`.
        ValueError: as `token_logps`.
    """
    check_dtype("logits", logits)
    one = index.dim() == logits.dim() - 1
    if not one and (index.dim() != logits.dim() or index.shape[:-1] != logits.shape[:-1]):
        raise ValueError(
            f"index must be [...] or [..., K] for logits [..., V]; got {list(index.shape)} and {list(logits.shape)}"
        )
    if row_mask is not None:
        check_tensor("row_mask", row_mask, logits.shape[:-1], logits.device, "one entry per row of logits")
        # The entries of masked rows may be any number, which must not reach a gather.
        index = torch.where((row_mask if one else row_mask.unsqueeze(-1)) != 0, index, 0)
    labels, rest = index, None
    if not one:
        if index.shape[-1] == 0:
            return logits.gather(-1, index)
        # One entry, the most likely of the K, is computed by the kernels. The others differ from it by a difference of logits.
        picked = logits.gather(-1, index).to(result_dtype(logits))
        best = picked.detach().argmax(-1, keepdim=True)
        labels, rest = index.gather(-1, best).squeeze(-1), (picked - picked.gather(-1, best)) / temperature
        rest = torch.where(picked == -torch.inf, -torch.inf, rest)
    if row_mask is not None:
        labels = torch.where(row_mask != 0, labels.to(torch.int64), NO_LABEL)
    rows = logits
    if logits.dim() == 1:
        rows, labels = logits.unsqueeze(0), labels.unsqueeze(0)
    found = token_logps(rows, labels, temperature=temperature, ignore_index=NO_LABEL)
    assert isinstance(found, Tensor)
    logps = found.view(logits.shape[:-1])
    if rest is not None:
        logps = logps.unsqueeze(-1) + rest
        if row_mask is not None:
            logps = torch.where(row_mask.unsqueeze(-1) != 0, logps, 0.0)
    return logps.to(logits.dtype)


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
    """Differentiable log-probabilities of B sequences: weighted sums over their tokens, for losses of your own.

    Args:
        logits: [B, T, V], or packed [N, V] with `cu_seqlens`; dtypes as in `dpo_loss`. B need not be even.
        labels: [B, T] or [N], int64 token ids; `ignore_index` marks tokens that do not count.
        cu_seqlens: [B + 1] int, cumulative sequence lengths of the packed layout, as in `dpo_loss`.
        token_weights: shaped like `labels`, weights of the tokens in their sequence's sum; 0 skips the token.
        ignore_index: label of the tokens that do not count.
        logit_scale: as in `dpo_loss`.
        logit_softcap: as in `dpo_loss`.
        inplace_backward: as in `dpo_loss`.

    Returns:
        [B] in nats: float32, or float64 for float64 logits.

    Raises:
        BackendUnavailable: as `dpo_loss`.
        NotImplementedError: as `dpo_loss`.
        TypeError: as `dpo_loss`.
        ValueError: as `dpo_loss`. On a GPU a label outside [0, V) makes its sequence's sum NaN.
    """
    batch = batch_of(logits, labels, cu_seqlens, token_weights, ignore_index)
    transform = transform_of(ignore_index, logit_scale, logit_softcap)
    found = _tokens(batch, transform, inplace_backward=inplace_backward)
    sums = ops.sequence_sums(found["logps"], batch.weights(), batch.cu_seqlens, batch.backend)
    return sums.to(result_dtype(logits))


def linear_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    grad_filter: float | str | None = "auto",
    memory_budget: int | str | None = None,
    statistics: Sequence[str] = (),
    temperature: float = 1.0,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    differentiable_entropy: bool = False,
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    """Differentiable log-probabilities of the labels, token by token, from hidden states and the LM head.

    For SFT, KTO, GRPO and losses of your own. The logits are computed one chunk at a time.

    Args:
        hidden: [..., H], at least two dimensions; dtypes as in `linear_dpo_loss`.
        weight: [V, H], as in `linear_dpo_loss`.
        labels: [...] int64. Tokens with the label `ignore_index` are not projected; their result is 0.
        bias: [V] or None.
        grad_filter: as in `linear_dpo_loss`.
        memory_budget: as in `linear_dpo_loss`.
        statistics: any of "entropy", "accuracy", "mean_logits", "grad_dropped_mass" and "log_sum_sq" (log sum_v p_v^2, for
            WPO's weights), per token.
        temperature: the logits are divided by it, after the cap.
        ignore_index: label of the tokens that do not count.
        logit_scale: as in `dpo_loss`.
        logit_softcap: as in `dpo_loss`.
        differentiable_entropy: as in `token_logps`. The gradient is then exact, whatever `grad_filter` is.

    Returns:
        Log-probabilities in nats, shaped like labels: float32, or float64 for float64 hidden states. With `statistics` a
            tuple of these and a dict of the statistics by name, each shaped like labels.

    Raises:
        BackendUnavailable: as `dpo_loss`.
        NotImplementedError: as `dpo_loss`.
        TypeError: as `linear_dpo_loss`.
        ValueError: as `linear_dpo_loss`, or the statistic "kl", which needs a reference.
    """
    if "kl" in statistics:
        raise ValueError('the statistic "kl" needs a reference; call linear_dpo_loss for it')
    reported = _reported(statistics, TOKEN_STATISTICS, differentiable_entropy)
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
        transform_of(ignore_index, logit_scale, logit_softcap, temperature),
        reported,
        ("entropy",) if differentiable_entropy else (),
        memory_budget=memory_budget,
        grad_filter=grad_filter,
        scalar_loss=False,
        couples_pairs=False,
    )
    found, _ = linear.linear_logps(batch.rows, head, call)
    return _results(found, reported, differentiable_entropy, result_dtype(hidden), shape)
