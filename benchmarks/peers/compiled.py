"""torch.compile of the textbook form: what a careful user can do without a library."""

from __future__ import annotations

import torch
from torch import Tensor

from ..problem import LogitsProblem
from .base import Peer
from .eager import textbook_loss


class Compiled(Peer):
    name = "compiled"
    title = "torch.compile"

    def __init__(self, problem: LogitsProblem) -> None:
        super().__init__(problem)
        self._loss = torch.compile(textbook_loss, fullgraph=True, dynamic=False)

    def forward(self) -> Tensor:
        return self._loss(self.problem.logits, self.problem.ref_logits, self.problem.labels)
