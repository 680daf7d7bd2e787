"""TRL 1.16 on a GPU: its Triton function for log-probabilities and entropy from logits. It has no form for a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import Peer
from .eager import dpo_from_sums


class TRLTriton(Peer):
    name = "trl_triton"
    title = "TRL 1.16, Triton kernel"
    needs = "trl"
    statistics = ("entropy",)

    @classmethod
    def why_missing(cls) -> str | None:
        if missing := super().why_missing():
            return missing
        try:
            from trl.kernels import selective_log_softmax_and_entropy  # noqa: F401
        except ImportError as error:
            return f"this trl has no Triton function: {error}"
        return None if torch.cuda.is_available() else "runs on GPUs only"

    def forward(self) -> Tensor:
        from trl.kernels import selective_log_softmax_and_entropy

        problem = self.problem
        with torch.no_grad():
            reference = selective_log_softmax_and_entropy(problem.ref_logits, problem.labels)[0].sum(-1)
        logps, _ = selective_log_softmax_and_entropy(problem.logits, problem.labels)
        return dpo_from_sums(logps.sum(-1), reference)
