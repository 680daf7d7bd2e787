"""Means over a logging window or an evaluation that weigh every pair, and every completion token, the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from dpo_kernels import DPOOutput

_PER_PAIR = (
    "losses",
    "chosen_logps",
    "rejected_logps",
    "ref_chosen_logps",
    "ref_rejected_logps",
    "chosen_rewards",
    "rejected_rewards",
)
_PER_SEQUENCE = ("token_counts", "entropy", "kl", "accuracy", "mean_logits")


class MetricWindow:
    """The outputs of all batches since the last `drain`.

    A mean of batch means would weigh the pairs of a short last batch more than the others. So the vectors of length P
    are kept, on their device: they are tiny, and no step has to wait for the host.
    """

    def __init__(self) -> None:
        self._outputs: list[DPOOutput] = []
        self._tokens: list[Tensor] = []

    def add(self, output: DPOOutput, tokens: Tensor) -> None:
        """Add a batch and the number of its real tokens, prompts included."""
        self._outputs.append(replace(output, loss=output.loss.detach()))
        self._tokens.append(tokens.detach())

    def drain(self, gather: Callable[[DPOOutput], list[DPOOutput]] = lambda output: [output]) -> dict[str, float]:
        """`loss`, the names of `DPOOutput.metrics` and `tokens` (a sum) since the last call, then forget them.

        Args:
            gather: brings together what all processes have; `tokens` it leaves to the caller.
        """
        if not self._outputs:
            return {}
        everything = join(gather(join(self._outputs)))
        tokens = torch.stack(self._tokens).sum().item()
        self._outputs, self._tokens = [], []
        return {"loss": everything.losses.double().mean().item(), **everything.metrics(), "tokens": float(tokens)}


def join(outputs: Sequence[DPOOutput]) -> DPOOutput:
    """Several batches as one: all chosen sequences first, then all rejected ones; without statistics that one lacks."""
    for output in outputs:
        if output._check is not None:
            output._check()
    fields: dict[str, Tensor | None] = {}
    for name in _PER_PAIR:
        fields[name] = torch.cat([getattr(output, name) for output in outputs])
    for name in _PER_SEQUENCE:
        values = [getattr(output, name) for output in outputs]
        if any(value is None for value in values):
            fields[name] = None
        else:
            halves = [value.chunk(2) for value in values]
            fields[name] = torch.cat([half[0] for half in halves] + [half[1] for half in halves])
    losses = fields["losses"]
    assert losses is not None
    return DPOOutput(loss=losses.mean(), **fields)  # type: ignore[arg-type]
