"""The auxiliary loss of mixture-of-experts models, which balances the load of their experts."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError, first_line
from .adapter_kinds import virtual_tokens
from .split import Batch, SplitModel, evaluating, unwrap_adapter

logger = logging.getLogger("dpo_trainer")


def coefficient(model: Any, given: float | None) -> float:
    """The factor of the auxiliary loss: `given`, or the model config's; 0 for a model without an auxiliary loss.

    Raises:
        ConfigError: a factor is given, but the model returns no router logits.
    """
    base = unwrap_adapter(model)
    config = base.config.get_text_config() if hasattr(getattr(base, "config", None), "get_text_config") else None
    if not hasattr(config, "output_router_logits"):
        if given:
            raise ConfigError(
                f"router_aux_loss_coef: {type(base).__name__} returns no router logits, so it has no auxiliary loss; leave it out"
            )
        return 0.0
    if given is not None:
        return given
    places = (
        (config, "router_aux_loss_coef"),
        (base, "router_aux_loss_coef"),
        (base, "aux_loss_coef"),
    )  # the last name is JetMoE's
    return float(next((value for place, name in places if (value := getattr(place, name, None)) is not None), 0.0))


def load_balancing_loss(router_logits: tuple[Tensor, ...], top_k: int, weights: Tensor) -> Tensor:
    """The load balancing loss of Switch Transformers (arXiv:2101.03961, eq. 4 to 6) for `top_k` experts per token.

    E times the sum over experts of (assignments to the expert per token) * (the expert's mean probability), taken over all
    layers at once. It is `top_k` if all experts have the same load.

    Args:
        router_logits: [N, E] of each layer, for N tokens and E experts.
        top_k: experts per token.
        weights: [N], how often a token counts; 0 leaves it out.

    Returns:
        a scalar, float32 (float64 for float64 logits).
    """
    experts, device = router_logits[0].shape[-1], weights.device
    dtype = torch.float64 if router_logits[0].dtype == torch.float64 else torch.float32
    weights = weights.to(dtype)
    assigned, probability = torch.zeros(2, experts, dtype=dtype, device=device)
    for logits in router_logits:
        probabilities = logits.to(device).softmax(-1)
        chosen = probabilities.topk(top_k, dim=-1).indices
        assigned = assigned.index_add(0, chosen.flatten(), weights.repeat_interleave(top_k))
        probability = probability + weights @ probabilities.to(dtype)
    total = weights.sum() * len(router_logits)
    return experts * (assigned / total * (probability / total)).sum()


def token_weights(batch: Batch) -> Tensor:
    """How often each token would be read if every side had a row of its own: int64 [B * T].

    A shared prompt counts twice and padding 0. So the auxiliary loss is the same in every layout.
    """
    if "segments" not in batch:
        return batch["attention_mask"].flatten()
    segments = batch["segments"]
    pairs = (len(batch["cu_seqlens"]) - 1) // 2
    sequences = (
        segments.div(3, rounding_mode="floor").amax(dim=1).add(1).sum()
    )  # with shared prompts there is one sequence for each pair, else two
    prompts = (segments >= 0) & (segments.remainder(3) == 0) & (sequences <= pairs)
    return ((segments >= 0).long() + prompts).flatten()


class AuxiliaryLoss:
    """The auxiliary loss of a model's forward passes in training.

    Args:
        split: the policy. From now on its forward passes with gradient store their router logits in it.
        factor: see `coefficient`; not 0.
    """

    def __init__(self, split: SplitModel, factor: float) -> None:
        self.factor = factor
        self._split = split
        base = unwrap_adapter(split.model)
        config = base.config.get_text_config()
        self._top_k: Any = getattr(base, "num_experts_per_tok", getattr(config, "num_experts_per_tok", None))
        split.collect_routers = True

    def take(self, batch: Batch) -> Tensor:
        """The auxiliary loss of the last forward pass, without its factor: a scalar with gradient.

        Args:
            batch: the batch of that forward pass.
        """
        routers, self._split.router_logits = self._split.router_logits, None
        weights = token_weights(batch)
        if virtual := virtual_tokens(self._split.model):  # virtual tokens are routed too
            weights = weights.view(batch["input_ids"].shape)
            weights = torch.cat([weights.new_ones(len(weights), virtual), weights], dim=1).flatten()
        return load_balancing_loss(tuple(routers), self._top_k, weights)

    def obstacle(self, batch: Batch) -> str | None:
        """Why `take` differs from the model's own auxiliary loss on a small padded batch; None if they are equal."""
        try:
            with evaluating(self._split.model), torch.enable_grad():
                own = self._split._call(self._split.model, batch).aux_loss.double()
                self._split.packed_logits(batch)
                if self._split.router_logits is None:
                    return "it returns no router logits"
                tokens = batch["input_ids"].numel() + len(batch["input_ids"]) * virtual_tokens(self._split.model)
                if any(logits.dim() != 2 or len(logits) != tokens for logits in self._split.router_logits):
                    return "its router logits are not one row for each token"
                found = self.take(batch).double()
        except Exception as error:  # a model may raise anything
            return f"{type(error).__name__}: {first_line(error)}"
        if not torch.allclose(own, found, rtol=1e-2, atol=0):  # 16-bit routers round their probabilities
            return f"the model computes {own.item():.4g}, but its router logits give {found.item():.4g}"
        return None


def auxiliary_loss(split: SplitModel, given: float | None, example: Batch | None) -> AuxiliaryLoss | None:
    """The policy's auxiliary loss. None if it has none, if its factor is 0, or (with a warning) if it cannot be computed.

    Args:
        given: the setting `router_aux_loss_coef`, see `coefficient`.
        example: a small padded batch, on which the loss is compared with the model's own auxiliary loss.
    """
    factor = coefficient(split.model, given)
    if not factor:
        return None
    auxiliary = AuxiliaryLoss(split, factor)
    if example is None or (reason := auxiliary.obstacle(example)) is None:
        return auxiliary
    split.collect_routers = False
    name = type(unwrap_adapter(split.model)).__name__
    logger.warning("%s: its auxiliary loss (router_aux_loss_coef %g) is not added: %s", name, factor, reason)
    return None
