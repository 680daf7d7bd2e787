"""What an objective looks at, and what it gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Pairs:
    """What an objective may look at; every tensor is [P], float64 inside the kernels' path.

    Attributes:
        chosen_logps, rejected_logps: weighted sums of token log-probabilities under the policy, in nats.
        ref_chosen_logps, ref_rejected_logps: the same under the reference (0 when there is none).
        chosen_lengths, rejected_lengths: sums of the token weights (token counts, when no weights are given).
        beta: inverse temperature of the implicit reward; scalar or [P].
        label_smoothing: probability that the pair's label is wrong; scalar or [P].
        chosen_kl, rejected_kl: weighted sums over the tokens of KL(reference || policy), in nats; only for objectives
            whose row says `needs_token_kl`.
    """

    chosen_logps: Tensor
    rejected_logps: Tensor
    ref_chosen_logps: Tensor
    ref_rejected_logps: Tensor
    chosen_lengths: Tensor
    rejected_lengths: Tensor
    beta: Tensor
    label_smoothing: Tensor
    chosen_kl: Tensor | None = None
    rejected_kl: Tensor | None = None

    @classmethod
    def from_sums(
        cls,
        sums: Tensor,
        ref_sums: Tensor,
        lengths: Tensor,
        beta: Tensor,
        label_smoothing: Tensor,
        kl_sums: Tensor | None = None,
    ) -> Pairs:
        """Split [2P] vectors (chosen first, then rejected) into pairs."""
        chosen_kl, rejected_kl = (None, None) if kl_sums is None else kl_sums.chunk(2)
        (chosen, rejected), (ref_chosen, ref_rejected) = sums.chunk(2), ref_sums.chunk(2)
        chosen_lengths, rejected_lengths = lengths.chunk(2)
        return cls(
            chosen,
            rejected,
            ref_chosen,
            ref_rejected,
            chosen_lengths,
            rejected_lengths,
            beta,
            label_smoothing,
            chosen_kl,
            rejected_kl,
        )

    @property
    def chosen_logratios(self) -> Tensor:
        """log pi(chosen) - log pi_ref(chosen)."""
        return self.chosen_logps - self.ref_chosen_logps

    @property
    def rejected_logratios(self) -> Tensor:
        """log pi(rejected) - log pi_ref(rejected)."""
        return self.rejected_logps - self.ref_rejected_logps

    @property
    def margins(self) -> Tensor:
        """The log-ratio difference whose sigmoid is the preference probability (before beta)."""
        return self.chosen_logratios - self.rejected_logratios


Objective = Callable[[Pairs], Tensor]

#: Rewards to report of the chosen and the rejected responses, [P] each.
Rewards = tuple[Tensor, Tensor]
