"""The interface of a peer: it is built on a problem, runs forward and backward, and names the statistics it computes."""

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
        statistics: what it computes besides the loss. Only rows that do the same work are compared.
        ours: whether it is this package.
        passes: reads and writes of a [2P, T, V] tensor that its step requires.
        forward_passes: the same for its forward alone; None if another row has the same forward.
        needs: the module that it comes from; None if torch is enough.
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

        Uses `autograd.grad`, not `.backward()`: in training the logits are not a leaf, so no `.grad` is accumulated.
        """
        return torch.autograd.grad(loss, self.problem.logits)[0]

    def step(self) -> Tensor:
        """Forward and backward."""
        return self.backward(self.forward())

    def forward_only(self) -> Tensor:
        """The forward without a graph, as in an evaluation loop."""
        with torch.no_grad():
            return self.forward()
