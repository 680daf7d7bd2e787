"""The f-divergences that can replace reverse KL, each as a function of the log-ratio."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def _reverse_kl(logratio: Tensor, alpha: float) -> Tensor:
    return logratio


def _forward_kl(logratio: Tensor, alpha: float) -> Tensor:
    return -torch.expm1(-logratio)


def _js(logratio: Tensor, alpha: float) -> Tensor:
    return math.log(2) + F.logsigmoid(logratio)


def _alpha(logratio: Tensor, alpha: float) -> Tensor:
    if abs(alpha - 1) < 1e-6:
        return logratio
    # exp must stay finite: otherwise the difference of two scores could be inf - inf, which is NaN.
    ceiling = 80.0 if logratio.dtype == torch.float32 else 700.0
    return torch.expm1(((alpha - 1) * logratio).clamp(max=ceiling)) / (alpha - 1)


#: f'(pi / pi_ref) as a function of the log-ratio log(pi / pi_ref), which it replaces. Source: Wang et al. 2023, Beyond
#: Reverse KL: Generalizing Direct Preference Optimization with Diverse Divergence Constraints.
DIVERGENCES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "reverse_kl": _reverse_kl,
    "forward_kl": _forward_kl,
    "js": _js,
    "alpha": _alpha,
}

#: The same functions as text, with u = log(pi / pi_ref).
DIVERGENCE_FORMULAS = {
    "reverse_kl": "u",
    "forward_kl": "1 - exp(-u)",
    "js": "log 2 + log sigmoid(u)",
    "alpha": "(exp((a - 1) u) - 1) / (a - 1), a = divergence_alpha; u at a = 1",
}
