"""Means over a logging window or an evaluation that weigh every pair, and every completion token, the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dpo_kernels import DPOOutput

#: Least sum of weights to divide by: pairs that all weigh nothing have loss 0, not NaN.
TINY = torch.finfo(torch.float32).tiny

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
        self._weights: list[Tensor] = []
        self._tokens: list[Tensor] = []

    def add(self, output: DPOOutput, weight: Tensor, tokens: Tensor) -> None:
        """Add a batch, the sum of its pairs' weights, and the number of its real tokens, prompts included."""
        self._outputs.append(replace(output, loss=output.loss.detach()))
        self._weights.append(weight)
        self._tokens.append(tokens)

    def drain(self, gather: Callable[[list[Any]], list[Any]] = list) -> dict[str, float]:
        """`loss`, the names of `DPOOutput.metrics`, and `tokens` (a sum) since the last call, then forget them.

        Args:
            gather: collects a list of picklable objects from all processes.
        """
        if not self._outputs:
            return {}
        mine = (_on_host(join(self._outputs)), torch.stack(self._weights).sum().item(), sum(map(int, self._tokens)))
        self._outputs, self._weights, self._tokens = [], [], []
        outputs, weights, tokens = zip(*gather([mine]), strict=True)
        everything = join([DPOOutput(**fields) for fields in outputs])
        loss = everything.losses.double().sum().item() / max(sum(weights), TINY)
        return {"loss": loss, **everything.metrics(), "tokens": float(sum(tokens))}


def _on_host(output: DPOOutput) -> dict[str, Tensor]:
    return {name: value.cpu() for name, value in vars(output).items() if isinstance(value, Tensor)}


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
