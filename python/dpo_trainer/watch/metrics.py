"""Means over a logging window or an evaluation in which every pair, or every completion token, has the same weight."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor

from dpo_kernels import DPOOutput

#: Smallest sum of weights to divide by. If all pairs have weight 0, the loss is 0, not NaN.
TINY = torch.finfo(torch.float32).tiny

_PER_SEQUENCE = ("token_counts", "entropy", "kl", "accuracy", "mean_logits", "grad_dropped_mass")


def memory_mib(device: torch.device) -> float:
    """Memory in MiB: the peak of the CUDA device's tensors, or on a CPU the process's current resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    import psutil

    return psutil.Process().memory_info().rss / 2**20


class MetricWindow:
    """The outputs of all batches since the last `drain`.

    A mean of batch means would give the pairs of a short last batch too much weight. So the window keeps the vectors of
    length P of every batch. They are small and stay on their device, so no step synchronises with the host.
    """

    def __init__(self) -> None:
        self._batches: list[tuple[DPOOutput, Tensor, Tensor]] = []
        self._auxiliary: list[Tensor] = []  # [2] each: weight, and weight times the loss

    def add(self, output: DPOOutput, weights: Tensor, tokens: Tensor) -> None:
        """Add a batch's output, the weights [P] of its pairs, and its number of tokens with prompts and without padding."""
        self._batches.append((output.detach(), weights, tokens))

    def add_auxiliary(self, loss: Tensor, weights: Tensor) -> None:
        """Add the auxiliary loss of a batch; `weights` [P] are those of its pairs."""
        weight = weights.sum().double()
        self._auxiliary.append(torch.stack([weight, weight * loss.detach()]))

    def drop(self, batches: int) -> None:
        """Remove the last batches, after a step that was not taken."""
        del self._batches[len(self._batches) - batches :]
        del self._auxiliary[max(len(self._auxiliary) - batches, 0) :]

    def joined(self, gather: Callable[[list[Any]], list[Any]] = list) -> tuple[DPOOutput, Tensor] | None:
        """Concatenate all batches on the CPU.

        With several processes, the first batch of every process comes first, then the second batch of every process, and
        so on. This is the order in which an evaluation divides its rows.

        Args:
            gather: collects a list of picklable objects from all processes.

        Returns:
            the batches as one output, and the weights [P] of its pairs; None before the first batch.
        """
        if not self._batches:
            return None
        mine = send_to_device([{**output.fields(), "weights": weights} for output, weights, _ in self._batches], "cpu")
        fields = join([fields for turn in zip(*gather([mine]), strict=True) for fields in turn])
        weights = fields.pop("weights")
        return DPOOutput(**fields), weights

    def state(self) -> dict[str, Any]:
        """Everything that was added, as tensors and numbers, for a checkpoint."""
        if not self._batches:
            return {}
        outputs, weights, tokens = zip(*self._batches, strict=True)
        for output in outputs:
            if output._check is not None:
                output._check()
        fields = join([output.fields() for output in outputs])
        auxiliary = torch.stack(self._auxiliary) if self._auxiliary else torch.empty(0, 2, dtype=torch.float64)
        state = {"output": fields, "weights": torch.cat(weights), "tokens": sum(map(int, tokens))}
        return {**state, "auxiliary": auxiliary}

    @classmethod
    def of(cls, state: dict[str, Any], device: torch.device) -> MetricWindow:
        """Restore a window, on `device`, from what the method `state` returned."""
        window = cls()
        if state:
            state = send_to_device(state, device)
            window.add(DPOOutput(**state["output"]), state["weights"], torch.tensor(state["tokens"]))
            window._auxiliary = list(state.get("auxiliary", ()))
        return window

    def drain(self, gather: Callable[[list[Any]], list[Any]] = list) -> dict[str, float]:
        """Compute the means of all batches, then remove the batches.

        Args:
            gather: collects a list of picklable objects from all processes.

        Returns:
            the means by name:

            * `loss`: the weighted mean over pairs.
            * the names of `DPOOutput.metrics`.
            * `rewards/margins_std`: the standard deviation over pairs.
            * `logratios/chosen`, `logratios/rejected`, with a reference: the log-probability gained over the reference, in
              nats per completion token.
            * `aux_loss`, for a mixture of experts: the mean over batches.
            * `tokens`: a sum.

            Means over the tokens of a side with no scored token are left out. Without any scored token only `tokens` is left.
        """
        if not self._batches:
            return {}
        states = gather([send_to_device(self.state(), "cpu")])
        self._batches, self._auxiliary = [], []
        auxiliary = torch.cat([state["auxiliary"] for state in states]).sum(dim=0)
        everything = DPOOutput(**join([state["output"] for state in states]))
        # In float64, with each loss multiplied by its weight here: if policy equals reference, the mean is exactly log 2 for
        # any weights.
        weight = torch.cat([state["weights"] for state in states]).double()
        loss = (everything.losses.double() * weight).sum() / weight.sum().clamp(min=TINY)
        tokens = {"tokens": float(sum(state["tokens"] for state in states))}
        chosen, rejected = (counts.sum().item() for counts in everything.token_counts.chunk(2))
        if not chosen and not rejected:
            return tokens  # without a scored token, means would be NaN, or 0 from empty sums
        per_token = {"mean_token_accuracy": chosen, "logits/chosen": chosen, "logits/rejected": rejected}
        return {
            "loss": loss.item(),
            **{name: value for name, value in everything.metrics().items() if per_token.get(name, 1)},
            "rewards/margins_std": (everything.chosen_rewards - everything.rejected_rewards).std(correction=0).item(),
            **_log_ratios(everything),
            **({"aux_loss": (auxiliary[1] / auxiliary[0].clamp(min=TINY)).item()} if auxiliary.any() else {}),
            **tokens,
        }


def names(statistics: Iterable[str], *, reference: bool) -> list[str]:
    """Names of the means that `MetricWindow.drain` returns, without `tokens`. Found by draining a window with one dummy pair.

    Args:
        statistics: the statistics that the outputs have.
        reference: whether the outputs have a reference's log-probabilities.
    """
    sequences = {name: torch.ones(2) for name in ("logps", "rewards", "token_counts", *statistics)}
    sequences["ref_logps"] = torch.full((2,), float(reference))
    window = MetricWindow()
    window.add(DPOOutput.of(torch.ones(()), torch.ones(1), sequences), torch.ones(1), torch.ones(()))
    return [name for name in window.drain() if name != "tokens"]


def _log_ratios(everything: DPOOutput) -> dict[str, float]:
    """Log-ratios per token of each side; empty without a reference, when all of its log-probabilities are 0."""
    fields, found = everything.fields(), {}
    if not (everything.ref_chosen_logps.any() or everything.ref_rejected_logps.any()):
        return {}
    for side, counts in zip(("chosen", "rejected"), everything.token_counts.chunk(2), strict=True):
        gained = fields[f"{side}_logps"].double() - fields[f"ref_{side}_logps"].double()
        found[f"logratios/{side}"] = (gained.sum() / counts.sum().clamp(min=1)).item()
    return found


def join(batches: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Concatenate the fields of several batches' outputs. A statistic that one of the batches lacks is left out.

    All chosen sequences come first, then all rejected ones.
    """
    joined = {}
    for name in batches[0]:
        values = [fields[name] for fields in batches if name in fields]
        if name == "loss" or len(values) < len(batches):
            continue
        if name in _PER_SEQUENCE:
            chosen, rejected = zip(*(value.chunk(2) for value in values), strict=True)
            values = [*chosen, *rejected]
        joined[name] = torch.cat(values)
    return {"loss": joined["losses"].mean(), **joined}
