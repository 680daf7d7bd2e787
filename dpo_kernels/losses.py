"""The losses as nn.Modules: hyper-parameters are given at construction, tensors at each call."""

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
    """A loss whose hyper-parameters are attributes, checked once; `_arguments` names them."""

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
        # Objectives with a running mean are modules; registration includes them in state_dict, .to and .train.
        self.running = nn.ModuleList(entry for entry in functions if isinstance(entry, nn.Module))
        self._arguments = tuple(settings)
        for name, value in settings.items():
            setattr(self, name, value)

    def _settings(self, *, with_kl: bool) -> dict[str, Any]:
        settings = {name: getattr(self, name) for name in self._arguments}
        # The KL needs the reference's logits, so a call with precomputed sums does not report it.
        settings["statistics"] = tuple(name for name in self.statistics if name != "kl" or with_kl)
        return settings

    def extra_repr(self) -> str:
        """Shown by print(module)."""
        names = ", ".join(str(entry) for entry in self.loss_type)
        return f"beta={self.beta}, loss_type=[{names}], label_smoothing={self.label_smoothing}"


class DPOLoss(_PairLoss):
    """`dpo_loss` as a module with fixed hyper-parameters, which are checked once, at construction.

    Source: Rafailov et al. 2023, Direct Preference Optimization, equation 7.

    Example:
        ```python
        loss_fn = DPOLoss(beta=0.1, statistics=("kl", "entropy"))
        out = loss_fn(logits, labels, ref_logits=ref_logits)
        out.loss.backward()
        ```

    Args:
        beta: inverse temperature of the implicit reward.
        loss_type: a name in `dpo_kernels.OBJECTIVES`, `objective(name, ...)` with hyper-parameters, a callable
            `Pairs` -> losses [P], or a sequence of these. The module keeps and saves the state of objectives with a running
            mean.
        loss_weights: as in `dpo_loss`.
        label_smoothing: as in `dpo_loss`, a number.
        ignore_index: as in `dpo_loss`.
        logit_scale: as in `dpo_loss`.
        logit_softcap: as in `dpo_loss`.
        statistics: as in `dpo_loss`. "kl" is left out of calls without `ref_logits`.
        kl_coef: as in `dpo_loss`.
        use_weighting: as in `dpo_loss`.
        inplace_backward: as in `dpo_loss`.
        reduction: as in `dpo_loss`.

    Raises:
        ValueError: the objective or a statistic is unknown, label_smoothing is outside the objective's range, or the cap,
            the KL coefficient or the reduction is invalid.
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
        """The loss of a batch.

        Args:
            logits: [2P, T, V], or packed [N, V] with `cu_seqlens`, as in `dpo_loss`.
            labels: [2P, T] or [N] int64.
            ref_logits: the reference's logits, shaped like `logits`.
            ref_logps: [2P], the reference's sequence log-probabilities; an alternative to `ref_logits`.
            cu_seqlens: [2P + 1] int, cumulative sequence lengths of the packed layout.
            token_weights: shaped like `labels`.
            pair_weights: [P].

        Raises:
            TypeError: as `dpo_loss`.
            ValueError: as `dpo_loss`.
        """
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
    """`linear_dpo_loss` as a module with fixed hyper-parameters, which are checked once, at construction.

    Source: Rafailov et al. 2023, Direct Preference Optimization, equation 7.

    Example:
        ```python
        loss_fn = LinearDPOLoss(beta=0.1, statistics=("kl",))
        out = loss_fn(hidden, model.lm_head.weight, labels, ref_hidden=ref_hidden)
        out.loss.backward()
        ```

    Args:
        beta: inverse temperature of the implicit reward.
        loss_type: a name in `dpo_kernels.OBJECTIVES`, `objective(name, ...)` with hyper-parameters, a callable
            `Pairs` -> losses [P], or a sequence of these. The module keeps and saves the state of objectives with a running
            mean.
        loss_weights: as in `dpo_loss`.
        label_smoothing: as in `dpo_loss`, a number.
        ignore_index: as in `dpo_loss`.
        logit_scale: as in `dpo_loss`.
        logit_softcap: as in `dpo_loss`.
        statistics: as in `linear_dpo_loss`. "kl" is left out of calls without `ref_hidden`.
        kl_coef: as in `linear_dpo_loss`.
        use_weighting: as in `dpo_loss`.
        reduction: as in `dpo_loss`.
        memory_budget: as in `linear_dpo_loss`.
        grad_filter: as in `linear_dpo_loss`.

    Raises:
        TypeError: the budget or the filter has a wrong type.
        ValueError: the objective or a statistic is unknown, label_smoothing is outside the objective's range, or the cap,
            the KL coefficient, the reduction, the budget or the filter is invalid.
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
        """The loss of a batch.

        Args:
            hidden: [2P, T, H], or packed [N, H] with `cu_seqlens`, as in `linear_dpo_loss`.
            weight: [V, H], the LM head.
            labels: [2P, T] or [N] int64.
            bias: [V] or None.
            ref_hidden: the reference's hidden states, [2P, T, Hr] or [N, Hr].
            ref_weight: the reference's LM head [V, Hr]; by default `weight`, detached.
            ref_bias: the reference's bias [V].
            ref_logps: [2P], the reference's sequence log-probabilities; an alternative to `ref_hidden`.
            cu_seqlens: [2P + 1] int, cumulative sequence lengths of the packed layout.
            token_weights: shaped like `labels`.
            pair_weights: [P].

        Raises:
            TypeError: as `linear_dpo_loss`.
            ValueError: as `linear_dpo_loss`.
        """
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
