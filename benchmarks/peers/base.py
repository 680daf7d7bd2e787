"""The interface of a peer: built on a problem, it runs a forward and a backward; it says what it returns in addition."""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from ..problem import LogitsProblem

PEERS_EXTRA = "pip install -e .[peers]"


def not_installed(module: str | None) -> str | None:
    """None if the module is there (or None), else the reason and the pip line that installs it."""
    if module is None or importlib.util.find_spec(module) is not None:
        return None
    return f"{module} is not installed ({PEERS_EXTRA})"


class Peer(ABC):
    """One way to get DPO's loss and its gradient from logits.

    Attributes:
        name: for `--peers` and for files.
        title: for tables and charts.
        statistics: what it computes in addition to the loss. Compare only rows that do the same work.
        ours: whether it is this package.
        passes: reads and writes of a [2P, T, V] tensor that its step cannot do without.
        forward_passes: the same of its forward alone; None if that forward is another row's already.
        needs: the module that it comes from; None where torch is enough.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    statistics: ClassVar[tuple[str, ...]] = ()
    ours: ClassVar[bool] = False
    # Read policy and reference; read the policy again and write its gradient.
    passes: ClassVar[int] = 4
    forward_passes: ClassVar[int | None] = 2
    needs: ClassVar[str | None] = None

    def __init__(self, problem: LogitsProblem) -> None:
        self.problem = problem

    @classmethod
    def why_missing(cls) -> str | None:
        """None if the peer can run here, else the reason and the pip line that installs it."""
        return not_installed(cls.needs)

    @abstractmethod
    def forward(self) -> Tensor:
        """The mean loss over the pairs, a scalar with a graph (statistics are computed and dropped)."""

    def backward(self, loss: Tensor) -> Tensor:
        """The gradient of the logits, [2P, T, V].

        `autograd.grad`, not `.backward()`: in training the logits are no leaf, so nobody accumulates into a `.grad`.
        """
        return torch.autograd.grad(loss, self.problem.logits)[0]

    def step(self) -> Tensor:
        """Forward and backward."""
        return self.backward(self.forward())

    def forward_only(self) -> Tensor:
        """What an evaluation loop runs: the forward without a graph."""
        with torch.no_grad():
            return self.forward()
