"""The result of a loss call: the differentiable loss, and named quantities to log."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .arguments import LINEAR_STATISTICS

if TYPE_CHECKING:
    from .linear.planner import Plan

#: Attributes that are one half of a [2P] vector: (name of the vector, whether it is the rejected half).
_HALVES = {
    f"{prefix}{side}_{what}": (f"{prefix}{what}", side == "rejected")
    for side in ("chosen", "rejected")
    for prefix, what in (("", "logps"), ("ref_", "logps"), ("", "rewards"))
}
#: Attributes that are a whole [2P] vector.
_WHOLE = ("token_counts", *LINEAR_STATISTICS)


# A dataclass, because DistributedDataParallel finds tensors in a module's output only in lists, tuples, dicts and dataclasses.
@dataclass(init=False, repr=False, eq=False)
class DPOOutput:
    """Result of `dpo_loss` and `linear_dpo_loss` for P pairs.

    Only `loss` is differentiable. All other tensors are detached, so they keep no autograd graph alive. Tensors are on the
    device of the logits. Their dtype is float32, or float64 for float64 logits; `token_counts` is float64 (float32 on MPS). An
    attribute is computed when it is first read. Log-probabilities, entropy and KL are in nats.

    Attributes:
        loss: scalar, or [P] with reduction="none".
        losses: [P], the loss of each pair before pair_weights.
        chosen_logps: [P], weighted sums of the chosen tokens' log-probabilities under the policy.
        rejected_logps: [P], the same sums for the rejected tokens.
        ref_chosen_logps: [P], the chosen sums under the reference; 0 without a reference.
        ref_rejected_logps: [P], the rejected sums under the reference; 0 without a reference.
        chosen_rewards: [P], implicit rewards beta * (log pi - log pi_ref) of the chosen answers (Rafailov et al. 2023,
            section 5); objectives such as simpo define their own rewards.
        rejected_rewards: [P], the same for the rejected answers.
        token_counts: [2P], number of scored tokens in each sequence.
        entropy: [2P], entropy of the next-token distributions, mean over each sequence's scored tokens; None unless asked.
        kl: [2P], exact KL(policy || reference) of the next-token distributions, mean over scored tokens; None unless asked.
        accuracy: [2P], share of scored tokens whose label is the most likely token; None unless asked.
        mean_logits: [2P], mean logit over the vocabulary and the scored tokens; None unless asked.
        grad_dropped_mass: [2P], probability mass that a filtered gradient replaced by a uniform tail, mean over scored
            tokens (linear path); None unless asked.
        plan: how the linear path computed the result (`dpo_kernels.linear.planner.Plan`); None on the logits path.
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
        """An output with the given attributes, in the form that `fields()` returns."""
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
        """An output whose attributes are computed from these results on first read, in the dtype of the loss.

        Args:
            loss: scalar, or [P] with reduction="none".
            losses: [P].
            sequences: "logps", "ref_logps", "rewards", "token_counts" and statistics by name, [2P] each; or a tuple of
                these names and one tensor whose rows they name.
            check: raises if a label or a sequence bound was out of range. `metrics()` calls it, because it synchronizes
                with the device anyway.
            plan: the plan of the linear path, or None.
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
        """The same output with a detached `loss`."""
        output = DPOOutput(self.loss.detach(), **self.fields())
        output.plan, output._check = self.plan, self._check
        return output

    def fields(self) -> dict[str, Tensor]:
        """All tensors except `loss` that are not None, by name; `DPOOutput(loss, **fields)` accepts them."""
        found = {name: getattr(self, name) for name in ("losses", *_HALVES, *_WHOLE)}
        return {name: value for name, value in found.items() if value is not None}

    def __repr__(self) -> str:
        shown = ", ".join(f"{name}={value!r}" for name, value in {"loss": self.loss, **self.fields()}.items())
        return f"DPOOutput({shown})"

    def _per_token(self, values: Tensor, part: slice) -> Tensor:
        """Mean over the scored tokens of the sequences in `part`; NaN if they have no scored token."""
        counts = self.token_counts[part].to(values.dtype)
        # Here a sequence without tokens has mean 0 and weight 0.
        return (values[part] * counts).sum() / counts.sum()

    def metrics(self) -> dict[str, float]:
        """Batch means as Python floats, under the names that TRL uses. Synchronizes with the device once.

        Always present: "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen" and
        "logps/rejected". Present if the statistic was asked for:

        * "logits/chosen", "logits/rejected": from mean_logits
        * "entropy": mean over all scored tokens
        * "mean_token_accuracy": from accuracy, over the chosen tokens only, as in TRL
        * "kl": mean over all scored tokens (not one of TRL's metrics)
        * "grad_dropped_mass": mean over all scored tokens (not one of TRL's metrics)

        Raises:
            ValueError: a label is outside the vocabulary (the loss of its pair is NaN), or cu_seqlens does not rise from 0
                to at most the number of tokens. On a GPU this is where such errors are detected.
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
