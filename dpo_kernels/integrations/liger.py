"""A drop-in replacement for Liger's DPO loss: the same constructor, call and returned tuple.

To migrate, change the import:

```python
from dpo_kernels.integrations.liger import LigerFusedLinearDPOLoss
```

Or leave the imports as they are, and exchange the class in every module that has it, such as TRL's (0.19 to 1.12, which build it
for `use_liger_loss=True` or `use_liger_kernel=True`):

```python
import dpo_kernels.integrations.liger

dpo_kernels.integrations.liger.apply()  # before the trainer is built
```

`apply()` knows the class of Liger 0.5.9 to 0.8.5. Objects that exist already stay Liger's.

`loss_type` accepts every objective of `dpo_kernels.OBJECTIVES` that does not depend on the whole batch, and texts such as
"sigmoid(divergence=js)".
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import objectives
from ..functional import linear_dpo_loss
from ..objectives import Pairs
from .patch import Example, Patch, Target

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


def _exchanged(theirs: Callable[..., Any]) -> type[LigerFusedLinearDPOLoss]:
    """Our class with the constructor of the installed Liger, which may have fewer arguments in another order."""
    constructor = inspect.signature(theirs)

    class Exchanged(LigerFusedLinearDPOLoss):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            given = constructor.bind(*args, **kwargs)
            given.apply_defaults()
            super().__init__(**given.arguments)
            self._theirs = lambda: theirs(*args, **kwargs)

        def forward(self, lin_weight: Tensor, *args: Any, **kwargs: Any) -> Any:
            if hasattr(lin_weight, "ds_id"):
                # DeepSpeed ZeRO-3 frees the gathered head after the forward pass, and Liger does not need it afterwards.
                return self._theirs()(lin_weight, *args, **kwargs)
            return super().forward(lin_weight, *args, **kwargs)

    Exchanged.__name__ = Exchanged.__qualname__ = LigerFusedLinearDPOLoss.__name__
    return Exchanged


def _example(seed: int, **options: Any) -> Example:
    """A call of the class with small tensors: its loss, other results and gradients."""

    def example(kind: Callable[..., Any]) -> Any:
        generator = torch.Generator().manual_seed(seed)
        shapes = {"lin_weight": (11, 4), "_input": (4, 5, 4), "bias": (11,)}
        shapes |= {"ref_weight": (11, 4), "ref_input": (4, 5, 4), "ref_bias": (11,)}
        tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        if not options.get("use_ref_model", True):
            tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("ref_")}
        target = torch.randint(11, (4, 5), generator=generator)
        target[1:, :2] = -100
        inputs = [tensors[name].requires_grad_() for name in ("_input", "lin_weight", "bias")]
        with torch.enable_grad():
            loss, rest = kind(beta=0.3, compiled=False, **options)(target=target, **tensors)
            return loss, [torch.as_tensor(value).detach() for value in rest], torch.autograd.grad(loss, inputs)

    return example


_FORWARD = "self, lin_weight, _input, target, bias, ref_input, ref_weight, ref_bias"
_PATCH = Patch(
    "liger-kernel",
    lambda: [
        Target(
            "liger_kernel.chunked_loss.dpo_loss",
            "LigerFusedLinearDPOLoss",
            tuple(
                f"{constructor}; {_FORWARD}"
                for constructor in (
                    # since 0.8.1; without the last two and alpha since 0.6.2; without loss_type too since 0.5.9
                    "ignore_index, beta, alpha, compute_nll_loss, compiled, use_ref_model, average_log_prob, chunk_size, "
                    "loss_type, label_smoothing, discopop_tau",
                    "ignore_index, beta, compute_nll_loss, compiled, use_ref_model, average_log_prob, chunk_size, loss_type",
                    "ignore_index, beta, compute_nll_loss, compiled, use_ref_model, average_log_prob, chunk_size",
                )
            ),
            _exchanged,
            (
                _example(0),
                _example(1, use_ref_model=False, compute_nll_loss=True, average_log_prob=True, chunk_size=2),
            ),
        )
    ],
)


def apply() -> Callable[[], None]:
    """Puts our class in the place of Liger's, wherever it has been imported.

    A class of Liger with other arguments or results is left in place; a RuntimeWarning says why. Under DeepSpeed ZeRO-3, calls
    still use Liger's class. A second call first undoes the previous one.

    Returns:
        A function that puts Liger's class back.

    Raises:
        ImportError: Liger cannot be imported.
    """
    return _PATCH.apply()


applied = _PATCH.applied
