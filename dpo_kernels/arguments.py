"""Checks of a call's arguments, and their conversion to the layout that the stages use. Errors name the caller's arguments."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import backends, objectives
from .backends.whole_call import Family, Weighting
from .objectives import Objective
from .stages import STATISTICS as ALL_STATISTICS
from .stages import Transform, check_bounds, check_labels, rising_bounds, small_dtype

#: Valid names in `statistics` of `dpo_loss`. "log_sum_sq" is not among them: only WPO's weights use it.
STATISTICS = tuple(name for name in ALL_STATISTICS if name != "log_sum_sq")
#: Valid names on the linear path; "grad_dropped_mass" is the probability mass that `grad_filter` left out of a token's gradient.
LINEAR_STATISTICS = (*STATISTICS, "grad_dropped_mass")
#: Valid names for `linear_logps`, which has no reference. "log_sum_sq" is log sum_v p_v^2; WPO's weights subtract it from the
#: log-probability.
TOKEN_STATISTICS = (*(name for name in LINEAR_STATISTICS if name != "kl"), "log_sum_sq")
#: Valid names for `token_logps`, which has no reference either.
LOGITS_STATISTICS = tuple(name for name in ALL_STATISTICS if name != "kl")
LOGIT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Batch:
    """The tokens of a call in the layout that the stages use; a packed batch has one row.

    Attributes:
        rows: logits [B, T, V], or hidden states [B, T, H].
        vocab: V.
        labels: [B, T] int64; tokens of weight 0 have the label ignore_index.
        token_weights: [B, T] in the dtype of `small`, or None for 1.
        cu_seqlens: [S + 1] int64, or None where each row is a sequence.
        ignore_index: label of the tokens that do not count.
        backend: the backend's name.
        given_bounds: cu_seqlens before clamping, on an accelerator, where they are checked later; else None.
    """

    rows: Tensor
    vocab: int
    labels: Tensor
    token_weights: Tensor | None
    cu_seqlens: Tensor | None
    ignore_index: int
    backend: str
    given_bounds: Tensor | None = None

    @property
    def sequences(self) -> int:
        """S, the number of sequences."""
        return self.labels.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    @property
    def small(self) -> torch.dtype:
        """dtype of every tensor of size [tokens] or less."""
        return small_dtype(self.labels.device)

    def scored(self) -> Tensor:
        """[B, T], 1 on scored tokens, else 0."""
        return (self.labels != self.ignore_index).to(self.small)

    def weights(self) -> Tensor:
        """[B, T], the weights of the tokens; 0 where a token is not scored."""
        if self.token_weights is None:
            return self.scored()
        return torch.where(self.labels != self.ignore_index, self.token_weights, 0.0)

    def late_check(self) -> Callable[[], None] | None:
        """A check of labels and bounds that synchronizes with the device; None if they are already checked."""
        # CPU kernels check them. A compiled graph cannot return a closure.
        looked = self.labels.device.type == "cpu" and self.backend in ("eager", "cpu")
        if looked or torch.compiler.is_compiling():
            return None
        labels, vocab, ignore_index, bounds = self.labels, self.vocab, self.ignore_index, self.given_bounds

        def check() -> None:
            check_labels(labels, vocab, ignore_index)
            if bounds is not None:
                check_bounds(bounds, labels.shape[1])

        return check


def check_tensor(name: str, value: Tensor, shape: Sequence[int], device: torch.device, why: str) -> None:
    """Raise unless `value` is a tensor of this shape and device; `why` explains the shape in the error."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor of shape {list(shape)}; got {type(value).__name__}")
    if value.shape != torch.Size(shape):
        raise ValueError(f"{name} must have shape {list(shape)} ({why}); got {list(value.shape)}")
    if value.device != device:
        raise ValueError(f"{name} is on {value.device}, but the call's other tensors are on {device}; move it there")


def check_dtype(name: str, value: Tensor) -> None:
    """Raise unless `value` is a tensor of a floating dtype that the kernels support."""
    if not isinstance(value, Tensor) or value.dtype not in LOGIT_DTYPES:
        got = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name} must be a float32, bfloat16, float16 or float64 tensor; got {got}")
    if hasattr(value, "full_tensor"):
        raise TypeError(f"{name} is a DTensor, and the kernels read plain tensors; pass {name}.full_tensor()")
    refuse_transforms(name, value)


def refuse_transforms(name: str, value: Tensor) -> None:
    """Raise NotImplementedError for a tensor inside torch.func or forward-mode differentiation.

    There the kernels would treat the tensor as a constant, and its derivative would be 0.
    """
    if torch.compiler.is_compiling():
        return
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor(value)
    if wrapped or (forward_ad._current_level >= 0 and forward_ad.unpack_dual(value).tangent is not None):
        raise NotImplementedError(
            f"{name} is inside a torch.func transform or forward-mode differentiation; dpo_kernels supports first-order "
            "reverse-mode gradients only (loss.backward() or torch.autograd.grad)"
        )


def batch_of(
    rows: Tensor,
    labels: Tensor,
    cu_seqlens: Tensor | None,
    token_weights: Tensor | None,
    ignore_index: int,
    *,
    name: str = "logits",
    axis: str = "V",
    vocab: int | None = None,
) -> Batch:
    """The batch of a call; `name` and `axis` appear in error messages ("logits" and "V", or "hidden" and "H")."""
    check_dtype(name, rows)
    packed, device = cu_seqlens is not None, rows.device
    if rows.dim() != (2 if packed else 3):
        wanted = f"[N, {axis}] with cu_seqlens" if packed else f"[2P, T, {axis}], or [N, {axis}] with cu_seqlens"
        raise ValueError(f"{name} must be {wanted}; got {list(rows.shape)}")
    if rows.shape[-1] == 0:
        raise ValueError(f"{name} must not be empty in {axis}: {list(rows.shape)}")
    check_tensor("labels", labels, rows.shape[:-1], device, f"one label per row of {name}")
    if labels.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"labels must be int64 (or int32) token ids; got {labels.dtype}")
    given_bounds = None
    if cu_seqlens is not None:
        if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1 or cu_seqlens.dtype not in (torch.int64, torch.int32):
            raise ValueError(
                f"cu_seqlens must be a vector of integers [2P + 1]; got {list(cu_seqlens.shape)} {cu_seqlens.dtype}"
            )
        check_tensor("cu_seqlens", cu_seqlens, cu_seqlens.shape, device, "")
        if cu_seqlens.device.type != "cpu":
            given_bounds, cu_seqlens = cu_seqlens, rising_bounds(cu_seqlens, rows.shape[0])
        cu_seqlens = cu_seqlens.to(torch.int64).contiguous()
    if token_weights is not None:
        check_tensor("token_weights", token_weights, labels.shape, device, "one per label")
        token_weights = token_weights.detach().to(small_dtype(device), copy=True).contiguous()
        labels = torch.where(token_weights != 0, labels, ignore_index)
    labels = labels if labels.dtype == torch.int64 else labels.to(torch.int64)
    if packed:
        rows, labels = rows.unsqueeze(0), labels.unsqueeze(0)
        token_weights = None if token_weights is None else token_weights.unsqueeze(0)
    backend = backends.resolve(device, rows.dtype)
    vocab = rows.shape[-1] if vocab is None else vocab
    return Batch(rows, vocab, labels, token_weights, cu_seqlens, ignore_index, backend, given_bounds)


def count_pairs(batch: Batch) -> int:
    """P, the number of pairs. Raises ValueError for an odd number of sequences."""
    if batch.sequences % 2:
        raise ValueError(
            f"the batch holds {batch.sequences} sequences, an odd number; it must hold P chosen sequences, then P rejected "
            f"ones"
        )
    return batch.sequences // 2


def transform_of(
    ignore_index: int, logit_scale: float, logit_softcap: float | None, temperature: float = 1.0
) -> Transform:
    """The `Transform` of a call's arguments. Raises ValueError for a cap or a temperature that is not positive."""
    if logit_softcap is not None and not logit_softcap > 0:
        raise ValueError(f"logit_softcap must be positive, or None for no cap; got {logit_softcap}")
    if isinstance(temperature, Tensor) and temperature.requires_grad:
        raise TypeError("temperature must be a number; the gradient of a tensor would be lost. Divide the logits by it")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive and finite; got {temperature}")
    # (c tanh(s x / c)) / t equals the transform with c / t and s / t.
    return Transform(ignore_index, float(logit_scale) / temperature, float(logit_softcap or 0.0) / temperature)


def check_statistics(statistics: Sequence[str], known: tuple[str, ...] = STATISTICS) -> tuple[str, ...]:
    """The requested statistics in the order of `known`. Raises ValueError for an unknown name."""
    if isinstance(statistics, str):
        statistics = (statistics,)
    for name in statistics:
        if name not in known:
            raise ValueError(f"unknown statistic {name!r}; known: {', '.join(known)}")
    return tuple(name for name in known if name in statistics)


def check_settings(
    functions: list[Objective],
    *,
    loss_weights: Sequence[float] | None,
    label_smoothing: float | Tensor,
    logit_softcap: float | None,
    kl_coef: float,
    reduction: str,
    has_reference: bool | None = None,
) -> None:
    """Raise for invalid hyper-parameters; `has_reference` is None before a call, when it is not known yet."""
    objectives.check(functions, loss_weights, label_smoothing, has_reference=has_reference)
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'reduction must be "mean", "sum" or "none"; got {reduction!r}')
    if not kl_coef >= 0:
        raise ValueError(f"kl_coef must not be negative; got {kl_coef}")
    transform_of(0, 1.0, logit_softcap)


@dataclass(frozen=True)
class PairSettings:
    """The settings of a call's P pairs; tensors are float64 (float32 on MPS).

    Attributes:
        pairs: P.
        functions, loss_weights: the objectives, and their weights in a mix.
        beta, label_smoothing: numbers, or [P].
        pair_weights: [P], or None for 1.
        ref_sums: [2P], the reference's sequence sums; None if its logits are given, or there is no reference.
    """

    pairs: int
    functions: list[Objective]
    loss_weights: Sequence[float] | None
    beta: float | Tensor
    label_smoothing: float | Tensor
    pair_weights: Tensor | None = None
    ref_sums: Tensor | None = None
    kl_coef: float = 0.0
    use_weighting: bool = False
    reduction: str = "mean"

    @property
    def family(self) -> str | None:
        """ "sigmoid" or "robust" if the kernels of stage 2 compute the objective, else None."""
        only = self.functions[0] if len(self.functions) == 1 and self.loss_weights is None else None
        return only.kernel if isinstance(only, objectives.BoundObjective) else None

    @property
    def terms(self) -> tuple[str, ...]:
        """The token-level divergences that the loss depends on, a subset of stages.KL_TERMS."""
        forward = objectives.needs_token_kl(self.functions)
        return (*(("kl",) if self.kl_coef else ()), *(("forward_kl",) if forward else ()))

    def statistics(self, reported: tuple[str, ...]) -> tuple[str, ...]:
        """The statistics that stage 1 must compute: those that the caller asked for and those that the loss needs."""
        return (*reported, "log_sum_sq") if self.use_weighting else reported

    def each(self, value: float | Tensor, like: Tensor) -> Tensor:
        """beta or label_smoothing as [P], with dtype and device of `like`."""
        if isinstance(value, Tensor):
            return value
        return torch.full((self.pairs,), value, dtype=like.dtype, device=like.device)

    def part(self, first: int, last: int) -> PairSettings:
        """The settings of pairs first .. last - 1."""

        def cut(value: Any) -> Any:
            return value[first:last] if isinstance(value, Tensor) else value

        ref_sums = self.ref_sums
        if ref_sums is not None:
            ref_sums = torch.cat([side[first:last] for side in ref_sums.chunk(2)])
        return replace(
            self,
            pairs=last - first,
            beta=cut(self.beta),
            label_smoothing=cut(self.label_smoothing),
            pair_weights=cut(self.pair_weights),
            ref_sums=ref_sums,
        )

    def weighting(self, batch: Batch) -> Weighting:
        """The weights, bounds and reduction, as the whole-call kernels take them."""
        return Weighting(batch.token_weights, batch.cu_seqlens, self.pair_weights, self.reduction)

    def whole_family(self) -> Family:
        """The parameters of the sigmoid family, as the whole-call kernels take them."""
        (betas, beta), (smoothings, smoothing) = (
            (value, 0.0) if isinstance(value, Tensor) else (None, float(value))
            for value in (self.beta, self.label_smoothing)
        )
        return Family(self.ref_sums, betas, beta, smoothings, smoothing, self.family == "robust")


def settings_of(
    batch: Batch,
    functions: list[Objective],
    *,
    loss_weights: Sequence[float] | None,
    beta: float | Tensor,
    label_smoothing: float | Tensor,
    pair_weights: Tensor | None,
    ref_logps: Tensor | None,
    kl_coef: float,
    use_weighting: bool,
    reduction: str,
) -> PairSettings:
    """The settings of a call from arguments that `check_settings` has checked."""
    pairs, device, small = count_pairs(batch), batch.labels.device, batch.small

    def per_pair(name: str, value: float | Tensor) -> float | Tensor:
        if not isinstance(value, Tensor):
            return float(value)
        if value.dim() == 0:
            return value.detach().to(device=device, dtype=small).expand(pairs).contiguous()
        check_tensor(name, value, (pairs,), device, "one per pair, or a number")
        return value.detach().to(small, copy=True).contiguous()

    ref_sums = None
    if ref_logps is not None:
        check_tensor("ref_logps", ref_logps, (batch.sequences,), device, "one sum per sequence, chosen first")
        ref_sums = ref_logps.detach().to(small).contiguous()
    if pair_weights is not None:
        weights = per_pair("pair_weights", pair_weights)
        pair_weights = (
            weights if isinstance(weights, Tensor) else torch.full((pairs,), weights, dtype=small, device=device)
        )
    return PairSettings(
        pairs,
        functions,
        loss_weights,
        per_pair("beta", beta),
        per_pair("label_smoothing", label_smoothing),
        pair_weights,
        ref_sums,
        kl_coef,
        use_weighting,
        reduction,
    )


def check_divergences(reported: tuple[str, ...], settings: PairSettings, reference: Tensor | None, name: str) -> None:
    """Raise ValueError if a KL divergence is needed but the reference's logits or hidden states (`name`) are missing."""
    if reference is not None:
        return
    if "kl" in reported:
        raise ValueError(f'the statistic "kl" needs {name}: it cannot be computed from sequence sums (ref_logps)')
    needy = ["kl_coef"] if settings.kl_coef else []
    needy += [f"loss_type {entry}" for entry in settings.functions if objectives.needs_token_kl([entry])]
    if needy:
        raise ValueError(f"{needy[0]} needs {name}: a KL divergence cannot be computed from sequence sums (ref_logps)")
