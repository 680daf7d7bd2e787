"""A drop-in replacement for Liger's DPO loss: the same constructor, call and returned tuple.

To migrate, change the import:

```python
from dpo_kernels.integrations.liger import LigerFusedLinearDPOLoss
```

`loss_type` accepts every objective of `dpo_kernels.OBJECTIVES` that does not depend on the whole batch, and texts such as
"sigmoid(divergence=js)".
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import objectives
from ..functional import linear_dpo_loss
from ..objectives import Pairs

#: Objectives to which Liger applies label_smoothing; its other objectives ignore it.
_SMOOTHED = ("robust", "exo_pair")


class _Loss:
    """Liger's loss of a pair as one objective: a named objective on sums or means, plus the pair's share of the NLL term."""

    couples_pairs = False  # the NLL's token count is known in advance, so no pair depends on others

    def __init__(self, made: objectives.Named, average: bool, nll_scale: Tensor | None) -> None:
        self.made, self.average, self.nll_scale = made, average, nll_scale

    def pairs(self, pairs: Pairs) -> Pairs:
        """The input of the objective: means over tokens if `average` is set, else sums."""
        if not self.average:
            return pairs
        chosen, rejected = pairs.chosen_lengths.clamp(min=1), pairs.rejected_lengths.clamp(min=1)
        one = torch.ones_like(chosen)
        return Pairs(
            pairs.chosen_logps / chosen,
            pairs.rejected_logps / rejected,
            pairs.ref_chosen_logps / chosen,
            pairs.ref_rejected_logps / rejected,
            one,
            one,
            pairs.beta,
            pairs.label_smoothing,
        )

    def __call__(self, pairs: Pairs) -> Tensor:
        losses = self.made(self.pairs(pairs))
        return losses if self.nll_scale is None else losses - self.nll_scale * pairs.chosen_logps


class LigerFusedLinearDPOLoss(nn.Module):
    """DPO loss from hidden states and LM head, with the interface of Liger's class of the same name.

    Source: Rafailov et al. 2023, Direct Preference Optimization, equation 7.

    Args:
        ignore_index: label of the tokens that do not count.
        beta: inverse temperature of the implicit reward.
        alpha: weight of the negative log-likelihood.
        compute_nll_loss: adds alpha times the mean negative log-likelihood of the chosen tokens.
        compiled: has no effect, because the kernels are always compiled.
        use_ref_model: whether calls pass ref_input and ref_weight. If False, the reference is uniform.
        average_log_prob: uses means over tokens instead of sums.
        chunk_size: has no effect, because the chunk size follows from the memory budget.
        loss_type: as in `linear_dpo_loss`, one name or text.
        label_smoothing: applies to robust and exo_pair only, as in Liger; `LinearDPOLoss` applies it to other objectives too.
        discopop_tau: temperature of the discopop objective.

    Raises:
        ValueError: loss_type is unknown or depends on the whole batch, or label_smoothing is outside the objective's range.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        compute_nll_loss: bool = False,
        compiled: bool = True,
        use_ref_model: bool = True,
        average_log_prob: bool = False,
        chunk_size: int = 1,
        loss_type: str = "sigmoid",
        label_smoothing: float = 0.0,
        discopop_tau: float = 0.05,
    ) -> None:
        super().__init__()
        self.ignore_index = ignore_index
        self.beta = beta
        self.alpha = alpha
        self.compute_nll_loss = compute_nll_loss
        self.compiled = compiled
        self.use_ref_model = use_ref_model
        self.average_log_prob = average_log_prob
        self.chunk_size = chunk_size
        self.loss_type = loss_type
        self.label_smoothing = label_smoothing
        self.discopop_tau = discopop_tau
        if loss_type in _SMOOTHED:
            self.objective = objectives.objective(loss_type, label_smoothing=label_smoothing)
        elif loss_type == "discopop":
            self.objective = objectives.objective(loss_type, tau=discopop_tau)
        else:
            self.objective = objectives.parse(loss_type)
        if self.objective.info.couples_pairs:
            raise ValueError(
                f"loss_type {loss_type!r} depends on the whole batch, but this class processes the batch in chunks; "
                f"use dpo_kernels.LinearDPOLoss"
            )

    def forward(
        self,
        lin_weight: Tensor,
        _input: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The loss and the quantities that Liger returns.

        Args:
            lin_weight: [V, H], the LM head.
            _input: [2P, T, H], hidden states; the chosen sequences come first.
            target: [2P, T] int64, already shifted labels.
            bias: [V] or None.
            ref_input: the reference's hidden states, [2P, T, Hr].
            ref_weight: the reference's LM head, [V, Hr].
            ref_bias: the reference's bias, [V] or None.

        Returns:
            A tuple (loss, (chosen_logps, rejected_logps, mean chosen logit, mean rejected logit, nll, chosen_rewards,
                rejected_rewards)); only the loss is differentiable.

        Raises:
            TypeError: as `linear_dpo_loss`.
            ValueError: as `linear_dpo_loss`, or ref_input or ref_weight is missing while use_ref_model is True.
        """
        if self.use_ref_model and (ref_input is None or ref_weight is None):
            raise ValueError("use_ref_model=True needs ref_input and ref_weight; else pass use_ref_model=False")
        pairs = target.shape[0] // 2
        chosen_tokens = (target[:pairs] != self.ignore_index).sum()
        nll_scale = None
        if self.compute_nll_loss:
            nll_scale = self.alpha * pairs / chosen_tokens.clamp(min=1)
        loss = _Loss(self.objective, self.average_log_prob, nll_scale)
        reference = {"ref_hidden": ref_input, "ref_weight": ref_weight, "ref_bias": ref_bias}
        out = linear_dpo_loss(
            _input,
            lin_weight,
            target,
            bias=bias,
            beta=self.beta,
            loss_type=loss,
            ignore_index=self.ignore_index,
            **(reference if self.use_ref_model else {}),  # type: ignore[arg-type]
        )
        lengths = (target != self.ignore_index).sum(-1).to(out.chosen_logps.dtype)
        beta = torch.full_like(out.chosen_logps, self.beta)
        sums = torch.cat([out.chosen_logps, out.rejected_logps])
        ref_sums = torch.cat([out.ref_chosen_logps, out.ref_rejected_logps])
        seen = loss.pairs(Pairs.from_sums(sums, ref_sums, lengths, beta, torch.zeros_like(beta)))
        chosen_rewards, rejected_rewards = self.objective.rewards(seen)
        nll = -out.chosen_logps.sum() / chosen_tokens.clamp(min=1) if self.compute_nll_loss else sums.new_zeros(())
        means = _mean_logits(_input, lin_weight, bias, pairs)
        return out.loss, (seen.chosen_logps, seen.rejected_logps, *means, nll, chosen_rewards, rejected_rewards)


@torch.no_grad()
def _mean_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, pairs: int) -> tuple[Tensor, Tensor]:
    """Mean logits of the chosen and of the rejected sequences, over all positions including prompt and padding, as in Liger.

    The mean of hidden @ weight.T equals the product of the means, so no logits are computed.
    """
    row = weight.mean(0, dtype=torch.float32)
    offset = 0.0 if bias is None else bias.mean(dtype=torch.float32)
    chosen, rejected = (side.mean((0, 1), dtype=torch.float32) @ row + offset for side in hidden.split(pairs))
    return chosen, rejected
