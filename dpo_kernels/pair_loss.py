"""The loss of the pairs from the tokens' log-probabilities, for every path except the whole-call kernels.

    tokens [B, T]   --weighted sums-->   sequences [2P]   --objective-->   losses [P]   --weights, KL shares, reduction-->   loss

The loss is differentiable with respect to "logps", and with respect to the divergences that it depends on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import objectives, ops
from .arguments import Batch, PairSettings
from .objectives import Pairs
from .stages import spread


@dataclass(frozen=True)
class Tokens:
    """How the tokens of a batch form sequences.

    Attributes:
        weights: [B, T], weights of the tokens in their sequence's sum.
        scored: [B, T], 1 on scored tokens, else 0.
        cu_seqlens: [2P + 1], or None where each row is a sequence.
        backend: the backend's name.
        share: pairs of the whole call divided by its scored tokens; needed only if these tokens are a part of the call.
    """

    weights: Tensor
    scored: Tensor
    cu_seqlens: Tensor | None
    backend: str
    share: Tensor | float | None = None

    @classmethod
    def of(cls, batch: Batch) -> Tokens:
        """The tokens of a batch."""
        scored = batch.scored()
        return cls(scored if batch.token_weights is None else batch.weights(), scored, batch.cu_seqlens, batch.backend)

    def sums(self, values: Tensor, *, weighted: bool = True) -> Tensor:
        """Sum over the tokens of each sequence, [2P]: weighted, or unweighted over the scored tokens."""
        return ops.sequence_sums(values, self.weights if weighted else self.scored, self.cu_seqlens, self.backend)

    def counts(self) -> Tensor:
        """Number of scored tokens in each sequence, [2P]."""
        return self.sums(self.scored, weighted=False)


@dataclass(frozen=True)
class PairLosses:
    """The losses of P pairs; only `weighted` is differentiable.

    Attributes:
        weighted: [P], the terms that the reduction adds up.
        losses: [P], the same before pair_weights.
        sums, ref_sums, rewards: [2P].
        coef: [2P], d weighted / d sum, from stage 2; None for objectives outside the sigmoid family.
    """

    weighted: Tensor
    losses: Tensor
    sums: Tensor
    ref_sums: Tensor
    rewards: Tensor
    coef: Tensor | None = None

    def tuple(self) -> tuple[Tensor, ...]:
        """All fields except coef."""
        return self.weighted, self.losses, self.sums, self.ref_sums, self.rewards

    @classmethod
    def join(cls, parts: Sequence[PairLosses], like: Tensor) -> PairLosses:
        """Concatenation of the losses of consecutive pairs, detached; without parts, empty tensors like `like`."""
        if not parts:
            return cls(*(like.new_zeros(0) for _ in range(5)))
        fields = [
            [values.detach() for values in field] for field in zip(*(part.tuple() for part in parts), strict=True)
        ]
        each = [torch.cat(field) for field in fields[:2]]
        sides = [torch.cat([values.view(2, -1) for values in field], dim=1).view(-1) for field in fields[2:]]
        return cls(*each, *sides)


def pair_losses(found: dict[str, Tensor], tokens: Tokens, settings: PairSettings) -> PairLosses:
    """The losses of pairs from their per-token results: `found` maps the row names of stage 1 to [B, T]."""
    losses, sums, ref_sums, rewards, coef = _objective(found, tokens, settings)
    weights = settings.pair_weights
    if settings.use_weighting:
        likely = _wpo_weights(found, tokens)
        losses = losses * likely
        coef = None if coef is None else coef * likely.repeat(2)
    weighted = losses if weights is None else losses * weights
    coef = coef if coef is None or weights is None else coef * weights.repeat(2)
    if settings.kl_coef:
        shares = settings.kl_coef * _kl_shares(found["kl"], tokens)
        losses, weighted = losses + shares, weighted + shares
    return PairLosses(weighted, losses.detach(), sums.detach(), ref_sums.detach(), rewards.detach(), coef)


def token_gradients(
    found: dict[str, Tensor], tokens: Tokens, settings: PairSettings, scale: float
) -> tuple[PairLosses, dict[str, Tensor]]:
    """The result of `pair_losses`, and the gradients of its weighted sum by name, times `scale`, [B, T] each.

    The names are "logps" and the terms of the settings. The sigmoid family needs no autograd here, because autograd cannot
    run inside an operator.
    """
    if settings.family is None:
        names = ("logps", *settings.terms)
        with torch.enable_grad():
            leaves = {name: found[name].detach().requires_grad_() for name in names}
            done = pair_losses({**found, **leaves}, tokens, settings)
            total = done.weighted.sum() * scale
            grads = torch.autograd.grad(total, list(leaves.values()), materialize_grads=True)
        return done, dict(zip(names, grads, strict=True))
    with torch.no_grad():
        done = pair_losses(found, tokens, settings)
        assert done.coef is not None
        by_name = {"logps": spread(done.coef * scale, tokens.weights, tokens.cu_seqlens)}
        if settings.kl_coef:
            assert tokens.share is not None
            by_name["kl"] = tokens.scored * (settings.kl_coef * tokens.share * scale)
    return done, by_name


def _objective(
    found: dict[str, Tensor], tokens: Tokens, settings: PairSettings
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """(losses [P], sums [2P], reference sums [2P], rewards [2P], coef [2P] or None).

    Stage 2 computes the sigmoid family; other objectives are functions of `Pairs`.
    """
    beta, smoothing = (settings.each(value, tokens.weights) for value in (settings.beta, settings.label_smoothing))
    if settings.family is not None:
        losses, sums, ref_sums, coef = ops.preference_loss(
            found["logps"],
            found.get("ref_logps"),
            tokens.weights,
            tokens.cu_seqlens,
            settings.ref_sums,
            beta,
            smoothing,
            settings.family == "robust",
            tokens.backend,
        )
        return losses, sums, ref_sums, beta.repeat(2) * (sums.detach() - ref_sums), coef
    sums = tokens.sums(found["logps"])
    if "ref_logps" in found:
        ref_sums = tokens.sums(found["ref_logps"])
    else:
        ref_sums = torch.zeros_like(sums.detach()) if settings.ref_sums is None else settings.ref_sums
    lengths = tokens.sums(torch.ones_like(tokens.weights))
    kl_sums = tokens.sums(found["forward_kl"]) if "forward_kl" in found else None
    pairs = Pairs.from_sums(sums, ref_sums, lengths, beta, smoothing, kl_sums)
    losses = objectives.mix(pairs, settings.functions, settings.loss_weights)
    if losses.shape != beta.shape:
        raise ValueError(f"an objective must return one loss per pair, [{beta.shape[0]}]; got {list(losses.shape)}")
    return losses, sums, ref_sums, torch.cat(objectives.rewards(pairs, settings.functions)), None


@torch.no_grad()
def _wpo_weights(found: dict[str, Tensor], tokens: Tokens) -> Tensor:
    """WPO's weight of each pair [P] (Zhou et al. 2024, equation 2)."""
    aligned = tokens.sums(found["logps"] - found["log_sum_sq"], weighted=False)
    chosen, rejected = (aligned / tokens.counts().clamp(min=1)).chunk(2)
    return (chosen + rejected).exp()


def _kl_shares(kl: Tensor, tokens: Tokens) -> Tensor:
    """[P], each pair's share of the KL term: their mean over the call's pairs is the mean of `kl` over its scored tokens."""
    chosen, rejected = tokens.sums(kl, weighted=False).chunk(2)
    share = tokens.share
    if share is None:
        share = chosen.shape[0] / tokens.counts().sum().clamp(min=1)
    return (chosen + rejected) * share
