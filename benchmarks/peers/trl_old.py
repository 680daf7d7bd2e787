"""TRL's method until 1.14, with functions that the installed TRL still exports: a separate pass for each quantity.

It computes all quantities that TRL logs: policy and reference log-probabilities, entropy, mean logits of both sides (over
rows selected by a mask, which copies them) and the chosen side's token accuracy. TRL's shift of the logits, one more copy,
is left out, because the inputs here are already aligned. On a CPU, log-probabilities of 16-bit logits are rounded to 16 bits
before they are summed; the gradient check shows the error. On GPUs these functions have had Triton kernels since TRL 1.15,
so there the row is faster than 1.14 was.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..problem import LogitsProblem
from .base import Peer
from .eager import dpo_from_sums


class TRLOld(Peer):
    name = "trl_old"
    title = "TRL until 1.14"
    needs = "trl"
    statistics = ("entropy", "mean_logits", "accuracy")

    def __init__(self, problem: LogitsProblem) -> None:
        super().__init__(problem)
        from trl.trainer.utils import entropy_from_logits, selective_log_softmax

        self._logps, self._entropy = selective_log_softmax, entropy_from_logits

    def forward(self) -> Tensor:
        logits, labels = self.problem.logits, self.problem.labels
        mask = torch.ones_like(labels, dtype=torch.bool)
        sums = (self._logps(logits, labels) * mask).sum(-1)
        with torch.no_grad():
            ref_sums = (self._logps(self.problem.ref_logits, labels) * mask).sum(-1)
            watched = logits.detach()
            entropy = self._entropy(watched)[mask].mean()
            chosen, rejected = watched.chunk(2)
            chosen_mask, rejected_mask = mask.chunk(2)
            mean_chosen = chosen[chosen_mask].mean(-1).sum() / chosen_mask.sum()
            mean_rejected = rejected[rejected_mask].mean(-1).sum() / rejected_mask.sum()
            hits = chosen.argmax(-1) == labels.chunk(2)[0]
            accuracy = hits[chosen_mask].float().mean()
        # TRL logs plain numbers, so on a GPU every step waits for the device.
        self.logged = [value.item() for value in (entropy, mean_chosen, mean_rejected, accuracy)]
        return dpo_from_sums(sums, ref_sums)
