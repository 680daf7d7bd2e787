"""The input of an objective (`Pairs`), and the types of objectives and rewards."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Pairs:
    """The input of an objective. Every tensor is [P]; inside `dpo_loss` it is float64 (float32 on MPS).

    Attributes:
        chosen_logps: weighted sums of the chosen tokens' log-probabilities under the policy, in nats.
        rejected_logps: the same sums for the rejected tokens.
        ref_chosen_logps: the chosen sums under the reference, in nats; 0 without a reference.
        ref_rejected_logps: the rejected sums under the reference, in nats; 0 without a reference.
        chosen_lengths: sums of the chosen tokens' weights; without weights, token counts.
        rejected_lengths: the same for the rejected tokens.
        beta: inverse temperature of the implicit reward; scalar or [P].
        label_smoothing: probability that the pair's label is wrong; scalar or [P].
        chosen_kl: weighted sums over the chosen tokens of KL(reference || policy), in nats; None unless the objective's
            registry row has `needs_token_kl`.
        rejected_kl: the same for the rejected tokens.
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
        """Pairs from [2P] vectors whose first half belongs to the chosen answers; beta and label_smoothing as they are."""
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
        """Chosen minus rejected log-ratio; the sigmoid of beta times it is the preference probability."""
        return self.chosen_logratios - self.rejected_logratios


Objective = Callable[[Pairs], Tensor]

#: Reported rewards of the chosen and of the rejected responses, [P] each.
Rewards = tuple[Tensor, Tensor]
