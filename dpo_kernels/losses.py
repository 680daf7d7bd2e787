"""The losses as nn.Modules that a trainer plugs in: hyper-parameters at construction, tensors at the call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import objectives
from .arguments import LINEAR_STATISTICS, STATISTICS, check_settings, check_statistics
from .functional import dpo_loss, linear_dpo_loss
from .linear.door import threshold
from .linear.planner import parse_budget
from .objectives import Objective
from .output import DPOOutput


class _PairLoss(nn.Module):
    """The hyper-parameters of a loss as attributes, checked once; `_arguments` names those that each call takes."""

    beta: float
    loss_type: list[Objective]
    label_smoothing: float
    statistics: tuple[str, ...]

    def __init__(self, known_statistics: tuple[str, ...], **settings: Any) -> None:
        super().__init__()
        settings["loss_type"] = functions = objectives.build(settings["loss_type"])
        settings["statistics"] = check_statistics(settings["statistics"], known_statistics)
        shared = ("loss_weights", "label_smoothing", "logit_softcap", "kl_coef", "reduction")
        check_settings(functions, **{name: settings[name] for name in shared})
        # Objectives with a running mean are modules; registered, they follow state_dict, .to and .train.
        self.running = nn.ModuleList(entry for entry in functions if isinstance(entry, nn.Module))
        self._arguments = tuple(settings)
        for name, value in settings.items():
            setattr(self, name, value)

    def _settings(self, *, with_kl: bool) -> dict[str, Any]:
        settings = {name: getattr(self, name) for name in self._arguments}
        # A KL needs the reference's logits; with precomputed sums there is none to report.
        settings["statistics"] = tuple(name for name in self.statistics if name != "kl" or with_kl)
        return settings

    def extra_repr(self) -> str:
        """Shown by print(module)."""
        names = ", ".join(str(entry) for entry in self.loss_type)
        return f"beta={self.beta}, loss_type=[{names}], label_smoothing={self.label_smoothing}"


class DPOLoss(_PairLoss):
    """`dpo_loss` with its hyper-parameters fixed.

        loss_fn = DPOLoss(beta=0.1, statistics=("kl", "entropy"))
        out = loss_fn(logits, labels, ref_logits=ref_logits)
        out.loss.backward()

    Arguments are those of `dpo_loss`; they are checked here, once.

    Raises:
        ValueError: unknown objective or statistic; label_smoothing outside the objective's range; a cap,
            coefficient or reduction that no call can have.
    """

    def __init__(
        self,
        beta: float = 0.1,
        loss_type: str | Objective | Sequence[str | Objective] = "sigmoid",
        *,
        loss_weights: Sequence[float] | None = None,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        logit_scale: float = 1.0,
        logit_softcap: float | None = None,
        statistics: Sequence[str] = (),
        kl_coef: float = 0.0,
        use_weighting: bool = False,
        inplace_backward: bool = False,
        reduction: str = "mean",
    ) -> None:
        super().__init__(
            STATISTICS,
            beta=beta,
            loss_type=loss_type,
            loss_weights=loss_weights,
            label_smoothing=label_smoothing,
            ignore_index=ignore_index,
            logit_scale=logit_scale,
            logit_softcap=logit_softcap,
            statistics=statistics,
            kl_coef=kl_coef,
            use_weighting=use_weighting,
            inplace_backward=inplace_backward,
            reduction=reduction,
        )

    def forward(
        self,
        logits: Tensor,
        labels: Tensor,
        *,
        ref_logits: Tensor | None = None,
        ref_logps: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        token_weights: Tensor | None = None,
        pair_weights: Tensor | None = None,
    ) -> DPOOutput:
        """See `dpo_loss`: logits [2P, T, V] or packed [N, V], labels [2P, T] or [N]."""
        return dpo_loss(
            logits,
            labels,
            ref_logits=ref_logits,
            ref_logps=ref_logps,
            cu_seqlens=cu_seqlens,
            token_weights=token_weights,
            pair_weights=pair_weights,
            **self._settings(with_kl=ref_logits is not None),
        )


class LinearDPOLoss(_PairLoss):
    """`linear_dpo_loss` with its hyper-parameters fixed: the loss from hidden states and the LM head.

        loss_fn = LinearDPOLoss(beta=0.1, statistics=("kl",))
        out = loss_fn(hidden, model.lm_head.weight, labels, ref_hidden=ref_hidden)
        out.loss.backward()

    Arguments are those of `linear_dpo_loss`; they are checked here, once.

    Raises:
        ValueError: unknown objective or statistic; label_smoothing outside the objective's range; a cap,
            coefficient, reduction, budget or filter that no call can have.
    """

    def __init__(
        self,
        beta: float = 0.1,
        loss_type: str | Objective | Sequence[str | Objective] = "sigmoid",
        *,
        loss_weights: Sequence[float] | None = None,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        logit_scale: float = 1.0,
        logit_softcap: float | None = None,
        statistics: Sequence[str] = (),
        kl_coef: float = 0.0,
        use_weighting: bool = False,
        reduction: str = "mean",
        memory_budget: int | str | None = None,
        grad_filter: float | str | None = "auto",
    ) -> None:
        super().__init__(
            LINEAR_STATISTICS,
            beta=beta,
            loss_type=loss_type,
            loss_weights=loss_weights,
            label_smoothing=label_smoothing,
            ignore_index=ignore_index,
            logit_scale=logit_scale,
            logit_softcap=logit_softcap,
            statistics=statistics,
            kl_coef=kl_coef,
            use_weighting=use_weighting,
            reduction=reduction,
            memory_budget=memory_budget,
            grad_filter=grad_filter,
        )
        parse_budget(memory_budget, 1, 1)
        threshold(grad_filter, torch.float32, "eager")

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        *,
        bias: Tensor | None = None,
        ref_hidden: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        ref_logps: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        token_weights: Tensor | None = None,
        pair_weights: Tensor | None = None,
    ) -> DPOOutput:
        """See `linear_dpo_loss`: hidden [2P, T, H] or packed [N, H], weight [V, H], labels [2P, T] or [N]."""
        return linear_dpo_loss(
            hidden,
            weight,
            labels,
            bias=bias,
            ref_hidden=ref_hidden,
            ref_weight=ref_weight,
            ref_bias=ref_bias,
            ref_logps=ref_logps,
            cu_seqlens=cu_seqlens,
            token_weights=token_weights,
            pair_weights=pair_weights,
            **self._settings(with_kl=ref_hidden is not None),
        )
