"""This package: gradient in new memory, in place, and in place with all statistics that TRL logs."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from dpo_kernels import dpo_loss

from ..problem import BETA
from .base import Peer


class Ours(Peer):
    name = "ours"
    title = "dpo_kernels"
    ours = True
    inplace: ClassVar[bool] = False

    def forward(self) -> Tensor:
        problem = self.problem
        return dpo_loss(
            problem.logits,
            problem.labels,
            ref_logits=problem.ref_logits,
            beta=BETA,
            statistics=self.statistics,
            inplace_backward=self.inplace,
        ).loss


class OursInPlace(Ours):
    name = "ours_inplace"
    title = "dpo_kernels, in place"
    inplace = True
    forward_passes = None


class OursInPlaceStatistics(OursInPlace):
    name = "ours_inplace_stats"
    title = "dpo_kernels, in place, with statistics"
    statistics = ("entropy", "mean_logits", "accuracy")
    forward_passes = 2
