"""The textbook form, as in most tutorials and small trainers: log-softmax in float32, gather, sum, log-sigmoid."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..problem import BETA
from .base import Peer


def sequence_logps(logits: Tensor, labels: Tensor) -> Tensor:
    """Sums of label log-probabilities, [2P] from [2P, T, V]."""
    return logits.float().log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1).sum(-1)


def dpo_from_sums(sums: Tensor, ref_sums: Tensor) -> Tensor:
    """DPO's mean loss from the sequences' log-probabilities."""
    chosen, rejected = (sums - ref_sums).chunk(2)
    return -F.logsigmoid(BETA * (chosen - rejected)).mean()


def textbook_loss(logits: Tensor, ref_logits: Tensor, labels: Tensor) -> Tensor:
    """The whole loss; the reference receives no gradient."""
    with torch.no_grad():
        ref_sums = sequence_logps(ref_logits, labels)
    return dpo_from_sums(sequence_logps(logits, labels), ref_sums)


class Eager(Peer):
    name = "eager"
    title = "eager PyTorch"

    def forward(self) -> Tensor:
        return textbook_loss(self.problem.logits, self.problem.ref_logits, self.problem.labels)
