"""Means over a logging window or an evaluation that weigh every pair, and every completion token, the same."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
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
_PER_SEQUENCE = ("token_counts", "entropy", "kl", "accuracy", "mean_logits", "grad_dropped_mass")


def memory_mib(device: torch.device) -> float:
    """Memory in use, in MiB: the most that the device's tensors have taken, or the process's resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    import psutil

    return psutil.Process().memory_info().rss / 2**20


class MetricWindow:
    """The outputs of all batches since the last `drain`.

    A mean of batch means would weigh the pairs of a short last batch more than the others. So the vectors of length P
    are kept, on their device: they are tiny, and no step has to wait for the host.
    """

    def __init__(self) -> None:
        self._outputs: list[DPOOutput] = []
        self._weights: list[Tensor] = []
        self._tokens: list[Tensor] = []

    def add(self, output: DPOOutput, weights: Tensor, tokens: Tensor) -> None:
        """Add a batch, the weights [P] of its pairs, and the number of its real tokens, prompts included."""
        self._outputs.append(output.detach())
        self._weights.append(weights)
        self._tokens.append(tokens)

    def drop(self, batches: int) -> None:
        """Forget the last batches: those of a step that was not taken."""
        for kept in (self._outputs, self._weights, self._tokens):
            del kept[len(kept) - batches :]

    def joined(self, gather: Callable[[list[Any]], list[Any]] = list) -> DPOOutput | None:
        """All batches as one, on the CPU; None before the first.

        Of several processes every first batch comes first, then every second one: the order in which an evaluation
        divides its rows.

        Args:
            gather: collects a list of picklable objects from all processes.
        """
        if not self._outputs:
            return None
        mine = [
            {name: value.cpu() for name, value in vars(output).items() if isinstance(value, Tensor)}
            for output in self._outputs
        ]
        return join([DPOOutput(**fields) for turn in zip(*gather([mine]), strict=True) for fields in turn])

    def state(self) -> dict[str, Any]:
        """Everything added so far, as tensors and numbers, for a checkpoint."""
        if not self._outputs:
            return {}
        output = {name: value for name, value in vars(join(self._outputs)).items() if isinstance(value, Tensor)}
        return {"output": output, "weights": torch.cat(self._weights), "tokens": sum(map(int, self._tokens))}

    @classmethod
    def of(cls, state: dict[str, Any], device: torch.device) -> MetricWindow:
        """The window that `state` was taken from."""
        window = cls()
        if state:
            output = DPOOutput(**{name: value.to(device) for name, value in state["output"].items()})
            window.add(output, state["weights"].to(device), torch.tensor(state["tokens"]))
        return window

    def drain(self, gather: Callable[[list[Any]], list[Any]] = list) -> dict[str, float]:
        """The means of all batches, by name; then forget the batches.

        `loss` (weighted mean over pairs), the names of `DPOOutput.metrics`, `rewards/margins_std` (standard deviation over
        pairs), with a reference `logratios/chosen` and `logratios/rejected` (log-probability gained over the reference, in
        nats per completion token), and `tokens` (a sum).

        Args:
            gather: collects a list of picklable objects from all processes.
        """
        if not self._outputs:
            return {}
        tensors = {name: value.cpu() for name, value in vars(join(self._outputs)).items() if isinstance(value, Tensor)}
        mine = (tensors, torch.cat(self._weights).cpu(), sum(map(int, self._tokens)))
        self._outputs, self._weights, self._tokens = [], [], []
        outputs, weights, tokens = zip(*gather([mine]), strict=True)
        everything = join([DPOOutput(**fields) for fields in outputs])
        # float64, and weights after the loss: where policy equals reference, exactly log 2 whatever the weights.
        weight = torch.cat(weights).double()
        loss = (everything.losses.double() * weight).sum() / weight.sum().clamp(min=TINY)
        return {
            "loss": loss.item(),
            **everything.metrics(),
            "rewards/margins_std": (everything.chosen_rewards - everything.rejected_rewards).std(correction=0).item(),
            **_log_ratios(everything),
            "tokens": float(sum(tokens)),
        }


def names(statistics: Iterable[str], *, reference: bool) -> list[str]:
    """What `MetricWindow.drain` will call its means, tokens aside: asked of it with a pair of ones.

    Args:
        statistics: those that the outputs have.
        reference: whether they have a reference's log-probabilities.
    """
    fields: dict[str, Any] = {name: torch.ones(1) for name in _PER_PAIR} | {
        name: torch.ones(2) for name in ("token_counts", *statistics)
    }
    if not reference:
        fields |= {name: torch.zeros(1) for name in ("ref_chosen_logps", "ref_rejected_logps")}
    window = MetricWindow()
    window.add(DPOOutput(loss=torch.ones(()), **fields), torch.ones(1), torch.ones(()))
    return [name for name in window.drain() if name != "tokens"]


def _log_ratios(everything: DPOOutput) -> dict[str, float]:
    """Log-ratios per token of each side; none without a reference, whose sums then are all 0."""
    references = (everything.ref_chosen_logps, everything.ref_rejected_logps)
    if not any(reference.any() for reference in references):
        return {}
    found = {}
    sides = zip(("chosen", "rejected"), (everything.chosen_logps, everything.rejected_logps), references, strict=True)
    for (side, logps, reference), counts in zip(sides, everything.token_counts.chunk(2), strict=True):
        gained = (logps.double() - reference.double()).sum() / counts.sum().clamp(min=1)
        found[f"logratios/{side}"] = gained.item()
    return found


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
