"""Methods that compute DPO from hidden states and LM head, behind one small interface; a new peer is one class."""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from dpo_kernels import linear_dpo_loss

from ..linear_problem import LinearProblem
from ..problem import BETA
from .base import not_installed
from .eager import dpo_from_sums


class LinearPeer(ABC):
    """One way from hidden states to DPO's loss and the gradients of hidden states and head.

    Attributes:
        name, title: for files and for tables.
        ours: whether it is this package.
        needs: the module that it comes from; None if torch is enough.
        filtered: whether its gradient leaves out entries on purpose.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    ours: ClassVar[bool] = False
    needs: ClassVar[str | None] = None
    filtered: ClassVar[bool] = False

    def __init__(self, problem: LinearProblem) -> None:
        self.problem = problem

    @classmethod
    def why_missing(cls) -> str | None:
        """None if the peer can run here, else the reason and what fixes it."""
        return not_installed(cls.needs)

    @abstractmethod
    def loss(self) -> Tensor:
        """The mean loss over the pairs, with a graph."""

    def step(self) -> tuple[Tensor, ...]:
        """Forward and backward: the gradients of the problem's leaves."""
        return torch.autograd.grad(self.loss(), self.problem.leaves)


class _FromTokens(LinearPeer):
    """Peers that compute log-probabilities per token; sums, reference and loss are the textbook's."""

    @abstractmethod
    def sums(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """Sequence sums [2P]."""

    def loss(self) -> Tensor:
        problem = self.problem
        if problem.case.reference != "hidden":
            reference = problem.ref_logps
        else:
            with torch.no_grad():
                reference = self.sums(problem.ref_hidden, problem.ref_weight)
        return dpo_from_sums(self.sums(problem.hidden, problem.weight), reference)

    def _spread(self, values: Tensor, mask: Tensor) -> Tensor:
        return values.new_zeros(mask.shape).masked_scatter(mask, values).sum(-1)


def _textbook_sums(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    log_p = F.linear(hidden, weight).float().log_softmax(-1)
    logps = log_p.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return torch.where(labels != -100, logps, 0.0).sum(-1)


class Eager(_FromTokens):
    name = "eager"
    title = "eager PyTorch"

    def sums(self, hidden: Tensor, weight: Tensor) -> Tensor:
        return _textbook_sums(hidden, weight, self.problem.labels)


class Compiled(Eager):
    name = "compiled"
    title = "torch.compile"

    def __init__(self, problem: LinearProblem) -> None:
        super().__init__(problem)
        self._sums = torch.compile(_textbook_sums, fullgraph=True, dynamic=False)

    def sums(self, hidden: Tensor, weight: Tensor) -> Tensor:
        return self._sums(hidden, weight, self.problem.labels)


class TRL(_FromTokens):
    """TRL's function as its fused head calls it on machines without a Triton device: on every position, prompts included."""

    name = "trl"
    title = "TRL 1.16 ChunkedLogProbFunction"
    needs = "trl"

    def _logps(self, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        from trl.kernels import ChunkedLogProbFunction
        from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

        outputs = ChunkedLogProbFunction.apply(
            hidden, weight, None, labels, 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ()
        )
        return outputs[0]

    def sums(self, hidden: Tensor, weight: Tensor) -> Tensor:
        labels = self.problem.labels
        logps = self._logps(hidden.reshape(-1, hidden.shape[-1]), weight, labels.clamp(min=0).reshape(-1))
        return logps.view(labels.shape).masked_fill(labels == -100, 0.0).sum(-1)


class TRLCompact(TRL):
    """TRL's function on the scored positions only, as TRL calls it on GPUs."""

    name = "trl_compact"
    title = "TRL 1.16, scored tokens only"

    def sums(self, hidden: Tensor, weight: Tensor) -> Tensor:
        mask = self.problem.labels != -100
        return self._spread(self._logps(hidden[mask], weight, self.problem.labels[mask]), mask)


class Liger(LinearPeer):
    name = "liger"
    title = "Liger LigerFusedLinearDPOLoss"
    needs = "liger_kernel"
    compiled: ClassVar[bool] = False

    def __init__(self, problem: LinearProblem) -> None:
        super().__init__(problem)
        from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

        self._loss = LigerFusedLinearDPOLoss(beta=BETA, compiled=self.compiled, use_ref_model=True)

    def loss(self) -> Tensor:
        problem = self.problem
        found = self._loss(
            problem.weight, problem.hidden, problem.labels, ref_input=problem.ref_hidden, ref_weight=problem.ref_weight
        )
        return found[0]


class LigerCompiled(Liger):
    name = "liger_compiled"
    title = "Liger, compiled"
    compiled = True


class LigerScaledCrossEntropy(_FromTokens):
    """Liger's per-token head on the scored positions: its own kernels on an H100 or H200, chunks of 512 tokens elsewhere."""

    name = "liger_scaled_ce"
    title = "Liger LigerFusedLinearScaledCrossEntropyFunction"
    needs = "liger_kernel"

    @classmethod
    def why_missing(cls) -> str | None:
        if missing := super().why_missing():
            return missing
        try:
            from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction  # noqa: F401
        except ImportError as error:
            return f"this liger_kernel has no such function: {error}"
        on_hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
        if on_hopper and importlib.util.find_spec("cutlass") is None:
            return (
                "its kernels for this card need nvidia-cutlass-dsl (pip install liger-kernel[cutedsl], 98 MB of wheels)"
            )
        return None

    def sums(self, hidden: Tensor, weight: Tensor) -> Tensor:
        from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction

        mask = self.problem.labels != -100
        losses = LigerFusedLinearScaledCrossEntropyFunction.apply(hidden[mask], weight, self.problem.labels[mask])
        return self._spread(-losses, mask)


class TorchLinearCrossEntropy(_FromTokens):
    """PyTorch's own function on the scored positions, in chunks of 512 tokens.

    The chunk size is explicit: with "auto" the first call on a CPU took minutes.
    """

    name = "torch_lce"
    title = "F.linear_cross_entropy, chunks of 512"
    chunk: ClassVar[int | None] = 512

    @classmethod
    def why_missing(cls) -> str | None:
        if hasattr(F, "linear_cross_entropy") and hasattr(torch.nn, "LinearCrossEntropyOptions"):
            return None
        return "this torch has no F.linear_cross_entropy in chunks (torch >= 2.13 has)"

    def sums(self, hidden: Tensor, weight: Tensor) -> Tensor:
        mask = self.problem.labels != -100
        options = None
        if self.chunk is not None:
            options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=self.chunk, chunking_method=None)
        losses = F.linear_cross_entropy(
            hidden[mask], weight, self.problem.labels[mask], reduction="none", options=options
        )
        return self._spread(-losses, mask)


class TorchLinearCrossEntropyWhole(TorchLinearCrossEntropy):
    """PyTorch's own function without options: the whole logits at once."""

    name = "torch_lce_whole"
    title = "F.linear_cross_entropy, unchunked"
    chunk = None


class CutCrossEntropy(_FromTokens):
    """Apple's package: its own Triton kernels on a GPU, its torch_compile implementation elsewhere."""

    name = "cce"
    title = "Cut Cross-Entropy"
    needs = "cut_cross_entropy"

    def sums(self, hidden: Tensor, weight: Tensor) -> Tensor:
        from cut_cross_entropy import linear_cross_entropy

        mask = self.problem.labels != -100
        impl = "cce" if hidden.is_cuda else "torch_compile"
        losses = linear_cross_entropy(hidden[mask], weight, self.problem.labels[mask], reduction="none", impl=impl)
        return self._spread(-losses, mask)


class Ours(LinearPeer):
    name = "ours"
    title = "dpo_kernels, exact"
    ours = True
    grad_filter: ClassVar[float | None] = None

    def loss(self) -> Tensor:
        problem = self.problem
        reference = "ref_hidden" if problem.case.reference == "hidden" else "ref_logps"
        return linear_dpo_loss(
            problem.hidden,
            problem.weight,
            problem.labels,
            beta=BETA,
            grad_filter=self.grad_filter,
            **{reference: getattr(problem, reference)},
        ).loss


class OursFiltered(Ours):
    name = "ours_filtered"
    title = "dpo_kernels, filtered at 2^-20"
    grad_filter = 2.0**-20
    filtered = True


#: In the order of the tables.
LINEAR_PEERS: dict[str, type[LinearPeer]] = {
    peer.name: peer
    for peer in (
        Eager,
        Compiled,
        TRL,
        TRLCompact,
        Liger,
        LigerCompiled,
        LigerScaledCrossEntropy,
        TorchLinearCrossEntropy,
        TorchLinearCrossEntropyWhole,
        CutCrossEntropy,
        Ours,
        OursFiltered,
    )
}
