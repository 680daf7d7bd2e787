"""The pair objectives: functions on vectors of length P, their mixing, and one registry that everything else iterates.

An objective sees no logits and no device: it gets the summed log-probabilities of each pair under policy and reference
(`Pairs`) and returns a loss per pair. Autograd differentiates it; the kernels take dL/dS from there.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Pairs:
    """What an objective may look at; every tensor is [P], float64 inside the kernels' path.

    Attributes:
        chosen_logps, rejected_logps: weighted sums of token log-probabilities under the policy, in nats.
        ref_chosen_logps, ref_rejected_logps: the same under the reference (0 when there is none).
        chosen_lengths, rejected_lengths: sums of the token weights (token counts, when no weights are given).
        beta: inverse temperature of the implicit reward; scalar or [P].
        label_smoothing: probability that the pair's label is wrong; scalar or [P].
    """

    chosen_logps: Tensor
    rejected_logps: Tensor
    ref_chosen_logps: Tensor
    ref_rejected_logps: Tensor
    chosen_lengths: Tensor
    rejected_lengths: Tensor
    beta: Tensor
    label_smoothing: Tensor

    @classmethod
    def from_sums(cls, sums: Tensor, ref_sums: Tensor, lengths: Tensor, beta: Tensor, label_smoothing: Tensor) -> Pairs:
        """Split [2P] vectors (chosen first, then rejected) into pairs."""
        return cls(*sums.chunk(2), *ref_sums.chunk(2), *lengths.chunk(2), beta, label_smoothing)

    @property
    def chosen_logratios(self) -> Tensor:
        """log pi(chosen) - log pi_ref(chosen)."""
        return self.chosen_logps - self.ref_chosen_logps

    @property
    def rejected_logratios(self) -> Tensor:
        """log pi(rejected) - log pi_ref(rejected)."""
        return self.rejected_logps - self.ref_rejected_logps

    @property
    def margins(self) -> Tensor:
        """The log-ratio difference whose sigmoid is the preference probability (before beta)."""
        return self.chosen_logratios - self.rejected_logratios


Objective = Callable[[Pairs], Tensor]


@dataclass(frozen=True)
class ObjectiveInfo:
    """One row of the registry.

    Attributes:
        name: the value of `loss_type`.
        function: Pairs -> losses [P].
        formula: in plain text, with x = beta * margin.
        source: paper and equation.
        smoothing_range: legal label_smoothing, as (low, high, high is included); None where it has no meaning.
        kernel: (robust,) if the stage-2 kernel computes it in the forward launch itself; None otherwise.
    """

    name: str
    function: Objective
    formula: str
    source: str
    smoothing_range: tuple[float, float, bool] | None = None
    kernel: tuple[bool] | None = None


def sigmoid(pairs: Pairs) -> Tensor:
    """DPO's loss, with label smoothing (conservative DPO)."""
    x = pairs.beta * pairs.margins
    e = pairs.label_smoothing
    return -(1 - e) * F.logsigmoid(x) - torch.where(e == 0, torch.zeros_like(x), e * F.logsigmoid(-x))


def robust(pairs: Pairs) -> Tensor:
    """Unbiased under labels flipped with probability label_smoothing."""
    x = pairs.beta * pairs.margins
    e = pairs.label_smoothing
    wrong = torch.where(e == 0, torch.zeros_like(x), e * F.logsigmoid(-x))
    return (-(1 - e) * F.logsigmoid(x) + wrong) / (1 - 2 * e)


def hinge(pairs: Pairs) -> Tensor:
    """Margin loss of sequence likelihood calibration."""
    return F.relu(1 - pairs.beta * pairs.margins)


def ipo(pairs: Pairs) -> Tensor:
    """Squared distance of the per-token log-ratio difference from 1 / (2 beta)."""
    chosen = pairs.chosen_logratios / pairs.chosen_lengths.clamp(min=1)
    rejected = pairs.rejected_logratios / pairs.rejected_lengths.clamp(min=1)
    return (chosen - rejected - 1 / (2 * pairs.beta)) ** 2


_ROWS = (
    ObjectiveInfo(
        "sigmoid",
        sigmoid,
        "-(1 - e) log sigmoid(x) - e log sigmoid(-x)",
        "Rafailov et al. 2023, Direct Preference Optimization, eq. 7; label smoothing e: Mitchell 2023",
        (0.0, 1.0, True),
        (False,),
    ),
    ObjectiveInfo(
        "robust",
        robust,
        "(-(1 - e) log sigmoid(x) + e log sigmoid(-x)) / (1 - 2 e)",
        "Chowdhury et al. 2024, Provably Robust DPO, eq. 12",
        (0.0, 0.5, False),
        (True,),
    ),
    ObjectiveInfo("hinge", hinge, "max(0, 1 - x)", "Zhao et al. 2023, SLiC-HF, eq. 4; Liu et al. 2023, RSO"),
    ObjectiveInfo(
        "ipo",
        ipo,
        "(mean-token margin - 1 / (2 beta))^2",
        "Azar et al. 2023, A General Theoretical Paradigm (IPO), eq. 17",
    ),
)

#: Every named objective, by its name.
OBJECTIVES: dict[str, ObjectiveInfo] = {row.name: row for row in _ROWS}


def lookup(name: str) -> ObjectiveInfo:
    """The registry's row for `name`. Raises ValueError listing the known names and the nearest match."""
    if name in OBJECTIVES:
        return OBJECTIVES[name]
    near = difflib.get_close_matches(name, OBJECTIVES, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"unknown loss_type {name!r}{hint} Known: {', '.join(sorted(OBJECTIVES))}")


def check_smoothing(loss_type: str, label_smoothing: float | Tensor) -> None:
    """Raise ValueError if label_smoothing is illegal for the objective, naming the legal range.

    Tensors on an accelerator are not checked: that would synchronise.
    """
    legal = lookup(loss_type).smoothing_range
    if isinstance(label_smoothing, Tensor):
        if label_smoothing.device.type != "cpu" or label_smoothing.numel() == 0 or torch.compiler.is_compiling():
            return
        low, high = label_smoothing.min().item(), label_smoothing.max().item()
    else:
        low = high = float(label_smoothing)
    if legal is None:
        if not low == high == 0.0:
            raise ValueError(f"loss_type {loss_type!r} has no label smoothing; got {label_smoothing}")
        return
    start, stop, closed = legal
    if not (start <= low and (high <= stop if closed else high < stop)):
        shown = f"[{start:g}, {stop:g}{']' if closed else ')'}"
        raise ValueError(f"label_smoothing must lie in {shown} for loss_type {loss_type!r}; got {label_smoothing}")


def as_list(loss_type: str | Objective | Sequence[str | Objective]) -> list[str | Objective]:
    """One objective or several, as a list."""
    return [loss_type] if isinstance(loss_type, str) or callable(loss_type) else list(loss_type)


def mix(
    pairs: Pairs,
    loss_type: str | Objective | Sequence[str | Objective],
    loss_weights: Sequence[float] | None = None,
) -> Tensor:
    """The weighted sum of one or several objectives, [P]. Weights default to 1 each."""
    names = as_list(loss_type)
    functions = [lookup(name).function if isinstance(name, str) else name for name in names]
    weights = [1.0] * len(names) if loss_weights is None else list(loss_weights)
    losses = [function(pairs) if w == 1.0 else w * function(pairs) for function, w in zip(functions, weights, strict=True)]
    return losses[0] if len(losses) == 1 else torch.stack(losses).sum(0)
