"""Named objectives with bound hyper-parameters, and objectives that keep a running mean."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from .divergences import DIVERGENCES
from .pairs import Pairs, Rewards
from .registry import OBJECTIVES, POSITIVE, ObjectiveInfo, Range, lookup, unknown


@dataclass(frozen=True)
class BoundObjective:
    """A registry row with its hyper-parameters: a callable Pairs -> losses [P]. Created by `objective`.

    Attributes:
        info: the row.
        parameters: (name, value) of each of the row's parameters.
        beta: overrides the call's beta; None uses the call's.
        label_smoothing: overrides the call's label_smoothing; None uses the call's.
        divergence: a name in `DIVERGENCES`.
        divergence_alpha: the alpha of the alpha-divergence.
    """

    info: ObjectiveInfo
    parameters: tuple[tuple[str, float], ...] = ()
    beta: float | None = None
    label_smoothing: float | None = None
    divergence: str = "reverse_kl"
    divergence_alpha: float = 1.0

    def _own(self, pairs: Pairs) -> Pairs:
        if self.beta is not None:
            pairs = replace(pairs, beta=torch.full_like(pairs.beta, self.beta))
        if self.label_smoothing is not None:
            pairs = replace(pairs, label_smoothing=torch.full_like(pairs.label_smoothing, self.label_smoothing))
        return pairs

    def __call__(self, pairs: Pairs, *state: Tensor) -> Tensor:
        pairs = self._own(pairs)
        if self.divergence != "reverse_kl":
            score = DIVERGENCES[self.divergence]
            nothing = torch.zeros_like(pairs.ref_chosen_logps)
            pairs = replace(
                pairs,
                chosen_logps=score(pairs.chosen_logratios, self.divergence_alpha),
                rejected_logps=score(pairs.rejected_logratios, self.divergence_alpha),
                ref_chosen_logps=nothing,
                ref_rejected_logps=nothing,
            )
        return self.info.function(pairs, *state, **dict(self.parameters))

    def rewards(self, pairs: Pairs) -> Rewards:
        """(chosen, rejected) rewards [P] that this objective reports; always log-ratios, whatever the divergence."""
        return self.info.reward(self._own(pairs))

    @property
    def kernel(self) -> str | None:
        """ "sigmoid" or "robust" if the kernels of stage 2 compute this objective; None otherwise."""
        plain = self.beta is None and self.label_smoothing is None and self.divergence == "reverse_kl"
        return self.info.kernel if plain else None

    def __str__(self) -> str:
        """The text form, which `loss_type` accepts."""
        said = [f"{name}={value:g}" for name, value in self.parameters]
        own = {"beta": self.beta, "label_smoothing": self.label_smoothing}
        said += [f"{name}={value:g}" for name, value in own.items() if value is not None]
        if self.divergence != "reverse_kl":
            said.append(f"divergence={self.divergence}")
            if self.divergence == "alpha":
                said.append(f"divergence_alpha={self.divergence_alpha:g}")
        return f"{self.info.name}({', '.join(said)})" if said else self.info.name


class RunningObjective(nn.Module):
    """An objective that keeps a running mean between calls.

    It is a module, so state_dict saves the mean and `.train()` and `.eval()` apply to it. In training mode each call first
    adds its batch to the mean and then uses the mean as a constant. In eval mode the mean does not change. Under
    torch.distributed the mean covers all processes, and every process must call at the same step. With the parameter
    `momentum` it is an exponential moving average that starts at 0; without it, the mean of all values seen.
    """

    mean: Tensor
    count: Tensor

    def __init__(self, bound: BoundObjective) -> None:
        super().__init__()
        self.bound = bound
        self.register_buffer("mean", torch.zeros((), dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    @property
    def info(self) -> ObjectiveInfo:
        """The registry's row."""
        return self.bound.info

    @torch.no_grad()
    def _observe(self, pairs: Pairs) -> None:
        assert self.info.observe is not None
        values = self.info.observe(self.bound._own(pairs)).detach()
        seen = torch.stack([values.sum(), torch.full_like(values.sum(), values.numel())])
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(seen)
        total, number = seen[0], seen[1]
        self.mean, self.count = self.mean.to(seen), self.count.to(seen)
        batch_mean = torch.where(number > 0, total / number.clamp(min=1), self.mean)
        momentum = dict(self.bound.parameters).get("momentum")
        self.count = self.count + number
        share = number / self.count.clamp(min=1) if momentum is None else 1 - momentum
        self.mean = self.mean + share * (batch_mean - self.mean)

    def forward(self, pairs: Pairs) -> Tensor:
        """Losses [P]."""
        if self.training:
            self._observe(pairs)
        return self.bound(pairs, self.mean.to(pairs.chosen_logps))

    def rewards(self, pairs: Pairs) -> Rewards:
        """See `BoundObjective.rewards`."""
        return self.bound.rewards(pairs)

    def __str__(self) -> str:
        return str(self.bound)

    def extra_repr(self) -> str:
        """Shown by print(module)."""
        return str(self.bound)


Named = BoundObjective | RunningObjective


def _check_range(what: str, value: float, legal: Range) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{what} must be a number; got {type(value).__name__}")
    if not legal.holds(value, value):
        raise ValueError(f"{what} must lie in {legal}; got {value:g}")
    return float(value)


def _extremes(value: float | Tensor) -> tuple[float, float] | None:
    """(min, max) of a number or CPU tensor; None if the tensor is empty, or if reading it would synchronize or be traced."""
    if not isinstance(value, Tensor):
        return float(value), float(value)
    if value.device.type != "cpu" or value.numel() == 0 or torch.compiler.is_compiling():
        return None
    return value.min().item(), value.max().item()


def check_smoothing(loss_type: str, label_smoothing: float | Tensor) -> None:
    """Raise ValueError, naming the legal range, if label_smoothing is illegal for the objective (a text as for `parse`).

    Tensors on an accelerator are not checked, because reading them would synchronize.
    """
    name = loss_type.partition("(")[0].strip()
    legal = lookup(name).smoothing_range
    ends = _extremes(label_smoothing)
    if ends is None:
        return
    if legal is None:
        if ends != (0.0, 0.0):
            able = ", ".join(row.name for row in OBJECTIVES.values() if row.smoothing_range)
            raise ValueError(f"loss_type {name!r} has no label smoothing; got {label_smoothing}. These have: {able}")
    elif not legal.holds(*ends):
        raise ValueError(f"label_smoothing must lie in {legal} for loss_type {name!r}; got {label_smoothing}")


def objective(
    name: str,
    *,
    beta: float | None = None,
    label_smoothing: float | None = None,
    divergence: str = "reverse_kl",
    divergence_alpha: float = 1.0,
    **parameters: float,
) -> Named:
    """A named objective with its hyper-parameters, to pass as `loss_type` or as an entry of a mix.

    Example:
        ```python
        dpo_loss(logits, labels, loss_type=objective("simpo", gamma=1.0, beta=2.0))
        DPOLoss(loss_type=[objective("sigmoid", divergence="js"), "sft"], loss_weights=[1.0, 0.1])
        ```

    Args:
        name: a name in `OBJECTIVES`.
        beta: overrides the call's beta.
        label_smoothing: overrides the call's label_smoothing.
        divergence: "reverse_kl" (DPO), "forward_kl", "js" or "alpha" (f-DPO, Wang et al. 2023). Only objectives whose row
            has `divergence=True` accept one other than "reverse_kl".
        divergence_alpha: alpha of "alpha"; 1 is reverse_kl, 0 is forward_kl.
        parameters: the objective's own parameters, as listed in its row.

    Returns:
        A callable Pairs -> losses [P]. An objective with a running mean is an nn.Module: create it once and reuse it.

    Raises:
        TypeError: a value is not a number.
        ValueError: a name, parameter or divergence is unknown (the message lists the known ones), or a value is outside
            its range.
    """
    info = lookup(name)
    known = {parameter.name: parameter for parameter in info.parameters}
    for given in parameters:
        if given not in known:
            takes = ["beta", "divergence"] if info.divergence else ["beta"]
            takes = [*known, *takes, *(["label_smoothing"] if info.smoothing_range else [])]
            raise ValueError(f"objective {name!r} has no parameter {given!r}; it has: {', '.join(takes)}")
    values = tuple(
        (key, _check_range(f"{key} of {name!r}", parameters.get(key, parameter.default), parameter.legal))
        for key, parameter in known.items()
    )
    if divergence not in DIVERGENCES:
        raise unknown("divergence", divergence, list(DIVERGENCES))
    if divergence != "reverse_kl" and not info.divergence:
        able = ", ".join(row.name for row in OBJECTIVES.values() if row.divergence)
        raise ValueError(
            f"objective {name!r} does not support divergence={divergence!r}: f-DPO's normalizer cancels only in the "
            f"difference of the two log-ratios. Objectives that can: {able}"
        )
    if beta is not None:
        _check_range(f"beta of {name!r}", beta, POSITIVE)
    if label_smoothing is not None:
        check_smoothing(name, label_smoothing)
    bound = BoundObjective(info, values, beta, label_smoothing, divergence, float(divergence_alpha))
    return bound if info.observe is None else RunningObjective(bound)
