"""What a loss call returns: the differentiable loss, and everything that people watch, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .arguments import LINEAR_STATISTICS

if TYPE_CHECKING:
    from .linear.planner import Plan

#: Attributes that are half of a vector per sequence: (vector, whether the rejected half).
_HALVES = {
    f"{prefix}{side}_{what}": (f"{prefix}{what}", side == "rejected")
    for side in ("chosen", "rejected")
    for prefix, what in (("", "logps"), ("ref_", "logps"), ("", "rewards"))
}
#: Those that are a vector per sequence.
_WHOLE = ("token_counts", *LINEAR_STATISTICS)


# A dataclass, because that is how DistributedDataParallel finds the loss among what a module returns.
@dataclass(init=False, repr=False, eq=False)
class DPOOutput:
    """Result of `dpo_loss`. P pairs; all tensors on the logits' device; log-probabilities and KL in nats.

    Only `loss` carries gradient; the rest is detached, so keeping it keeps no graph alive. dtype is float32 (float64 for
    float64 logits). An attribute is computed when it is first read.

    Attributes:
        loss: scalar, or [P] with reduction="none".
        losses: [P], each pair's loss before pair_weights, so that a weighted and a plain mean can both be logged.
        chosen_logps, rejected_logps: [P], weighted sums of token log-probabilities under the policy.
        ref_chosen_logps, ref_rejected_logps: [P], under the reference (0 when reference-free).
        chosen_rewards, rejected_rewards: [P], beta * (log pi - log pi_ref), the implicit reward (DPO paper, section 5).
        entropy, kl, accuracy, mean_logits: [2P] or None when not asked for; means over each sequence's scored tokens.
            kl is the exact KL(policy || reference) of the next-token distributions; accuracy counts argmax hits.
        grad_dropped_mass: [2P] or None; mean probability mass that a filtered gradient spread uniformly (linear path).
        token_counts: [2P], scored tokens in each sequence.
        plan: how the linear path computed it (`dpo_kernels.linear.planner.Plan`), else None.
    """

    loss: Tensor
    losses: Tensor
    chosen_logps: Tensor
    rejected_logps: Tensor
    ref_chosen_logps: Tensor
    ref_rejected_logps: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor
    token_counts: Tensor
    entropy: Tensor | None
    kl: Tensor | None
    accuracy: Tensor | None
    mean_logits: Tensor | None
    grad_dropped_mass: Tensor | None

    def __init__(self, loss: Tensor, **fields: Tensor | None) -> None:
        """An output of finished attributes, as `fields()` gives them."""
        unknown = fields.keys() - {"losses", *_HALVES, *_WHOLE}
        if unknown:
            raise TypeError(f"DPOOutput has no attribute {min(unknown)!r}")
        self.loss = loss
        self.plan: Plan | None = None
        self._check: Callable[[], None] | None = None
        self._losses: Tensor | None = None
        self._sequences: dict[str, Tensor] | tuple[tuple[str, ...], Tensor] = {}
        self._dtype = loss.dtype
        self.__dict__.update(fields)

    @classmethod
    def of(
        cls,
        loss: Tensor,
        losses: Tensor,
        sequences: dict[str, Tensor] | tuple[tuple[str, ...], Tensor],
        *,
        check: Callable[[], None] | None = None,
        plan: Plan | None = None,
    ) -> DPOOutput:
        """The output whose attributes are views of these results, in the loss's dtype.

        Args:
            losses: [P].
            sequences: "logps", "ref_logps", "rewards", "token_counts" and statistics, [2P] each, by name; or their names and
                one tensor of such rows.
            check: raises if a label or a sequence bound was out of range; run by metrics(), which waits for the device anyway.
        """
        output = cls(loss)
        output.plan, output._check = plan, check
        output._losses, output._sequences = losses, sequences
        return output

    def __getattr__(self, name: str) -> Any:
        sequences = self.__dict__.get("_sequences", {})
        if isinstance(sequences, tuple):
            self._sequences = sequences = dict(zip(sequences[0], sequences[1].unbind(0), strict=True))
        if name in _HALVES:
            vector, rejected = _HALVES[name]
            value = sequences.get(vector)
            value = None if value is None else value.chunk(2)[rejected]
        elif name == "losses":
            value = self.__dict__.get("_losses")
        elif name in _WHOLE:
            value = sequences.get(name)
        else:
            raise AttributeError(f"DPOOutput has no attribute {name!r}")
        if value is not None and name != "token_counts":
            value = value.to(self._dtype)
        self.__dict__[name] = value
        return value

    def detach(self) -> DPOOutput:
        """The same without the graph that `loss` holds."""
        output = DPOOutput(self.loss.detach(), **self.fields())
        output.plan, output._check = self.plan, self._check
        return output

    def fields(self) -> dict[str, Tensor]:
        """Every attribute but `loss` that is not None, by name: what `DPOOutput(loss, **fields)` takes."""
        found = {name: getattr(self, name) for name in ("losses", *_HALVES, *_WHOLE)}
        return {name: value for name, value in found.items() if value is not None}

    def __repr__(self) -> str:
        shown = ", ".join(f"{name}={value!r}" for name, value in {"loss": self.loss, **self.fields()}.items())
        return f"DPOOutput({shown})"

    def _per_token(self, values: Tensor, part: slice) -> Tensor:
        """Mean over the scored tokens of some sequences; NaN when they have none."""
        counts = self.token_counts[part].to(values.dtype)
        # A sequence without tokens has mean 0 by convention and weight 0 here.
        return (values[part] * counts).sum() / counts.sum()

    def metrics(self) -> dict[str, float]:
        """Batch means under TRL's names, as Python floats (one wait for the device).

        Always: "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen",
        "logps/rejected". With the statistic asked for: "logits/chosen", "logits/rejected" (mean_logits), "entropy"
        (over all completion tokens), "mean_token_accuracy" (accuracy, over the chosen ones, as TRL has it) and "kl"
        (ours: exact mean per-token KL).

        Raises:
            ValueError: a label was outside the vocabulary (its pair's loss is NaN), or cu_seqlens did not rise within the
                tokens. GPU backends find out only now.
        """
        if self._check is not None:
            self._check()
        pairs = self.chosen_logps.shape[0]
        chosen, rejected, everyone = slice(0, pairs), slice(pairs, None), slice(None)
        found = {
            "rewards/chosen": self.chosen_rewards.mean(),
            "rewards/rejected": self.rejected_rewards.mean(),
            "rewards/accuracies": (self.chosen_rewards > self.rejected_rewards).to(self.chosen_rewards.dtype).mean(),
            "rewards/margins": (self.chosen_rewards - self.rejected_rewards).mean(),
            "logps/chosen": self.chosen_logps.mean(),
            "logps/rejected": self.rejected_logps.mean(),
        }
        if self.mean_logits is not None:
            found["logits/chosen"] = self._per_token(self.mean_logits, chosen)
            found["logits/rejected"] = self._per_token(self.mean_logits, rejected)
        if self.entropy is not None:
            found["entropy"] = self._per_token(self.entropy, everyone)
        if self.accuracy is not None:
            found["mean_token_accuracy"] = self._per_token(self.accuracy, chosen)
        if self.kl is not None:
            found["kl"] = self._per_token(self.kl, everyone)
        if self.grad_dropped_mass is not None:
            found["grad_dropped_mass"] = self._per_token(self.grad_dropped_mass, everyone)
        values = torch.stack([value.float() for value in found.values()]).tolist()
        return dict(zip(found, values, strict=True))
