"""The losses as nn.Modules that a trainer plugs in: hyper-parameters at construction, tensors at the call."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from . import objectives
from .functional import LINEAR_STATISTICS, _check_statistics, dpo_loss, linear_dpo_loss
from .objectives import Objective
from .output import DPOOutput


class _PairLoss(nn.Module):
    """The hyper-parameters that both losses share, checked once."""

    def __init__(
        self,
        beta: float,
        loss_type: str | Objective | Sequence[str | Objective],
        *,
        loss_weights: Sequence[float] | None,
        label_smoothing: float,
        ignore_index: int,
        logit_scale: float,
        logit_softcap: float | None,
        statistics: tuple[str, ...],
        reduction: str,
    ) -> None:
        super().__init__()
        self.beta = beta
        self.loss_type = objectives.build(loss_type)
        objectives.check(self.loss_type, loss_weights, label_smoothing)
        # Objectives with a running mean are modules; registered, they follow state_dict, .to and .train.
        self.running = nn.ModuleList(entry for entry in self.loss_type if isinstance(entry, nn.Module))
        self.loss_weights = loss_weights
        self.label_smoothing = label_smoothing
        self.ignore_index = ignore_index
        self.logit_scale = logit_scale
        self.logit_softcap = logit_softcap
        self.statistics = statistics
        self.reduction = reduction

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
        ValueError: unknown objective or statistic, or label_smoothing outside the objective's range.
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
            beta,
            loss_type,
            loss_weights=loss_weights,
            label_smoothing=label_smoothing,
            ignore_index=ignore_index,
            logit_scale=logit_scale,
            logit_softcap=logit_softcap,
            statistics=_check_statistics(statistics),
            reduction=reduction,
        )
        self.kl_coef = kl_coef
        self.use_weighting = use_weighting
        self.inplace_backward = inplace_backward

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
        # A KL needs the reference's logits; with precomputed sums there is none to report.
        statistics = tuple(name for name in self.statistics if name != "kl" or ref_logits is not None)
        return dpo_loss(
            logits,
            labels,
            ref_logits=ref_logits,
            ref_logps=ref_logps,
            beta=self.beta,
            loss_type=self.loss_type,
            loss_weights=self.loss_weights,
            label_smoothing=self.label_smoothing,
            cu_seqlens=cu_seqlens,
            token_weights=token_weights,
            pair_weights=pair_weights,
            ignore_index=self.ignore_index,
            logit_scale=self.logit_scale,
            logit_softcap=self.logit_softcap,
            statistics=statistics,
            kl_coef=self.kl_coef,
            use_weighting=self.use_weighting,
            inplace_backward=self.inplace_backward,
            reduction=self.reduction,
        )


class LinearDPOLoss(_PairLoss):
    """`linear_dpo_loss` with its hyper-parameters fixed: the loss from hidden states and the LM head.

        loss_fn = LinearDPOLoss(beta=0.1, statistics=("kl",))
        out = loss_fn(hidden, model.lm_head.weight, labels, ref_hidden=ref_hidden)
        out.loss.backward()

    Arguments are those of `linear_dpo_loss`; they are checked here, once.

    Raises:
        ValueError: unknown objective or statistic, or label_smoothing outside the objective's range.
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
            beta,
            loss_type,
            loss_weights=loss_weights,
            label_smoothing=label_smoothing,
            ignore_index=ignore_index,
            logit_scale=logit_scale,
            logit_softcap=logit_softcap,
            statistics=_check_statistics(statistics, LINEAR_STATISTICS),
            reduction=reduction,
        )
        self.kl_coef = kl_coef
        self.use_weighting = use_weighting
        self.memory_budget = memory_budget
        self.grad_filter = grad_filter

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
        # A KL needs the reference's logits; with precomputed sums there is none to report.
        statistics = tuple(name for name in self.statistics if name != "kl" or ref_hidden is not None)
        return linear_dpo_loss(
            hidden,
            weight,
            labels,
            bias=bias,
            ref_hidden=ref_hidden,
            ref_weight=ref_weight,
            ref_bias=ref_bias,
            ref_logps=ref_logps,
            memory_budget=self.memory_budget,
            grad_filter=self.grad_filter,
            beta=self.beta,
            loss_type=self.loss_type,
            loss_weights=self.loss_weights,
            label_smoothing=self.label_smoothing,
            cu_seqlens=cu_seqlens,
            token_weights=token_weights,
            pair_weights=pair_weights,
            ignore_index=self.ignore_index,
            logit_scale=self.logit_scale,
            logit_softcap=self.logit_softcap,
            statistics=statistics,
            kl_coef=self.kl_coef,
            use_weighting=self.use_weighting,
            reduction=self.reduction,
        )
