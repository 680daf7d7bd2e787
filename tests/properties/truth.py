"""The true results of the public functions, from the papers' equations, in float64, computed row by row and sequence by sequence.

This file imports nothing from the library. Gradients come from autograd. To avoid cancellation, a row's maximum is subtracted
before any exponential, and the label is left out of the sum if it is the most likely token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Vectors = dict[str, Tensor]


def transformed(x: Tensor, scale: float, cap: float | None) -> Tensor:
    """The logits after scale and softcap."""
    z = x * scale
    return z if cap is None else cap * torch.tanh(z / cap)


def log_probability(z: Tensor, label: int) -> Tensor:
    """log softmax(z)[label] of one row."""
    own, rest = z[label], torch.cat([z[:label], z[label + 1 :]])
    if rest.numel() == 0 or bool(own >= rest.max()):
        return -torch.log1p((rest - own).exp().sum())
    top = rest.max().detach()
    return (own - top) - (z - top).exp().sum().log()


def log_softmax(z: Tensor) -> Tensor:
    """All log-probabilities of one row."""
    top = z.max().detach()
    return (z - top) - (z - top).exp().sum().log()


def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) of one row. Tokens with probability 0 under p contribute 0."""
    live = log_p.detach().exp() > 0
    return (log_p[live].exp() * (log_p[live] - log_q[live])).sum()


# --- losses of pairs, from vectors [P] --------------------------------------------------------------------------------


def log_loss(x: Tensor) -> Tensor:
    """-log sigmoid(x)."""
    return torch.logaddexp(torch.zeros_like(x), -x)


def smoothed(x: Tensor, e: Tensor) -> Tensor:
    return (1 - e) * log_loss(x) + torch.where(e == 0, torch.zeros_like(x), e * log_loss(-x))


def per_token(sums: Tensor, lengths: Tensor) -> Tensor:
    return sums / torch.where(lengths > 0, lengths, torch.ones_like(lengths))


def dealt(values: Tensor, by: Tensor) -> Tensor:
    """For each pair the k-th smallest of `values`, if the pair's `by` is the k-th smallest."""
    order = sorted(range(len(by)), key=lambda i: float(by[i]))
    ranked = sorted(range(len(values)), key=lambda i: float(values[i]))
    out: list[Tensor] = [values[:1].sum()] * len(values)
    for place, pair in enumerate(order):
        out[pair] = values[ranked[place]]
    return torch.stack(out) if out else values


def _margins(v: Vectors) -> Tensor:
    return v["c"] - v["r"]


def _robust(v: Vectors) -> Tensor:
    x, e = v["beta"] * _margins(v), v["e"]
    return ((1 - e) * log_loss(x) - torch.where(e == 0, torch.zeros_like(x), e * log_loss(-x))) / (1 - 2 * e)


def _means(v: Vectors) -> tuple[Tensor, Tensor]:
    return per_token(v["c"], v["n"]), per_token(v["r"], v["m"])


def _mean_logps(v: Vectors) -> tuple[Tensor, Tensor]:
    return per_token(v["S"], v["n"]), per_token(v["Q"], v["m"])


def _sigmoid_norm(v: Vectors) -> Tensor:
    chosen, rejected = _means(v)
    return smoothed(v["beta"] * (chosen - rejected), v["e"])


def _ipo(v: Vectors) -> Tensor:
    chosen, rejected = _means(v)
    return (chosen - rejected - 1 / (2 * v["beta"])) ** 2


def _exo(v: Vectors) -> Tensor:
    x, e = v["beta"] * _margins(v), v["e"]
    right, wrong = -log_loss(x), -log_loss(-x)
    return right.exp() * (right - torch.log(1 - e)) + wrong.exp() * (wrong - torch.log(e))


def _nca(v: Vectors) -> Tensor:
    c, r = v["beta"] * v["c"], v["beta"] * v["r"]
    return log_loss(c) + log_loss(-c) / 2 + log_loss(-r) / 2


def _bco(v: Vectors) -> Tensor:
    return log_loss(v["beta"] * v["c"]) + log_loss(-v["beta"] * v["r"])


def _bco_running(v: Vectors) -> Tensor:
    """The first call of a new objective, in which the shift is the mean of this batch's rewards."""
    c, r = v["beta"] * v["c"], v["beta"] * v["r"]
    shift = torch.cat([c, r]).detach().mean() if len(c) else 0.0
    return log_loss(c - shift) + log_loss(shift - r)


def _beta_dpo(v: Vectors) -> Tensor:
    """The first call, in which the running mean is a tenth of this batch's mean."""
    x = _margins(v)
    mean = (v["beta"] * x).detach().mean() if len(x) else 0.0
    return smoothed((v["beta"] * (1 + 0.6 * (mean - 0.1 * mean))).clamp(min=1e-3) * x, v["e"])


def _sppo(v: Vectors) -> Tensor:
    half = 1 / (2 * v["beta"])
    return (v["c"] - half) ** 2 + (v["r"] + half) ** 2


def _aot(v: Vectors) -> Tensor:
    policy, reference = v["S"] - v["Q"], v["RS"] - v["RQ"]
    return smoothed(v["beta"] * (policy - dealt(reference, policy)), v["e"])


def _aot_unpaired(v: Vectors) -> Tensor:
    return smoothed(v["beta"] * (v["c"] - dealt(v["r"], v["c"])), v["e"])


def _discopop(v: Vectors, tau: float = 0.05) -> Tensor:
    x = v["beta"] * _margins(v)
    gate = -log_loss(x / tau)
    return (1 - gate.exp()) * log_loss(x) + (gate - x).exp()


def _sft(v: Vectors) -> Tensor:
    return -v["S"] * len(v["S"]) / v["n"].sum().clamp(min=1e-300) if bool(v["n"].sum() > 0) else -v["S"] * len(v["S"])


def _simpo(v: Vectors) -> Tensor:
    chosen, rejected = _mean_logps(v)
    return smoothed(v["beta"] * (chosen - rejected) - 0.5, v["e"])


def _cpo(v: Vectors) -> Tensor:
    return smoothed(v["beta"] * (v["S"] - v["Q"]), v["e"]) - per_token(v["S"], v["n"])


def _orpo(v: Vectors) -> Tensor:
    top = -torch.finfo(torch.float64).eps  # at probability 1 the odds are infinite
    chosen, rejected = (mean.clamp(max=top) for mean in _mean_logps(v))
    odds = (chosen - torch.log(-torch.expm1(chosen))) - (rejected - torch.log(-torch.expm1(rejected)))
    return v["beta"] * log_loss(odds) - per_token(v["S"], v["n"])


def _dpop(v: Vectors) -> Tensor:
    return smoothed(v["beta"] * (_margins(v) - 50 * (-v["c"]).clamp(min=0)), v["e"])


def _tdpo(v: Vectors) -> Tensor:
    return smoothed(v["beta"] * (_margins(v) - (v["kr"] - v["kc"])), v["e"])


def _tdpo2(v: Vectors) -> Tensor:
    return smoothed(v["beta"] * (_margins(v) - 0.5 * (v["kr"] - v["kc"].detach())), v["e"])


@dataclass(frozen=True)
class Formula:
    """An objective: its losses, its rewards and its requirements.

    Attributes:
        smoothing: label smoothings to draw from.
        reward: "ratio", "logp" or "mean".
    """

    losses: Callable[[Vectors], Tensor]
    smoothing: tuple[float, ...] = (0.0,)
    reward: str = "ratio"
    reference: bool = True
    divergence: bool = False


_ANY = (0.0, 0.1, 1.0)

#: Objectives under the library's names, with its default hyper-parameters.
OBJECTIVES: dict[str, Formula] = {
    "sigmoid": Formula(lambda v: smoothed(v["beta"] * _margins(v), v["e"]), _ANY),
    "robust": Formula(_robust, (0.0, 0.2)),
    "sigmoid_norm": Formula(_sigmoid_norm, _ANY),
    "hinge": Formula(lambda v: (1 - v["beta"] * _margins(v)).clamp(min=0)),
    "ipo": Formula(_ipo),
    "exo_pair": Formula(_exo, (0.1, 0.4)),
    "nca_pair": Formula(_nca),
    "bco_pair": Formula(_bco),
    "bco_running": Formula(_bco_running),
    "sppo_hard": Formula(_sppo),
    "aot": Formula(_aot, _ANY),
    "aot_unpaired": Formula(_aot_unpaired, _ANY),
    "apo_zero": Formula(lambda v: torch.sigmoid(-v["beta"] * v["c"]) + torch.sigmoid(v["beta"] * v["r"])),
    "apo_down": Formula(lambda v: torch.sigmoid(v["beta"] * v["c"]) + torch.sigmoid(-v["beta"] * _margins(v))),
    "discopop": Formula(_discopop),
    "sft": Formula(_sft, reference=False),
    "simpo": Formula(_simpo, _ANY, "mean", reference=False),
    "cpo": Formula(_cpo, _ANY, "logp", reference=False),
    "orpo": Formula(_orpo, (0.0,), "mean", reference=False),
    "dpop": Formula(_dpop, _ANY),
    "rpo": Formula(lambda v: smoothed(v["beta"] * _margins(v), v["e"]) - per_token(v["S"], v["n"]), _ANY),
    "tdpo": Formula(_tdpo, _ANY, "token", divergence=True),
    "tdpo2": Formula(_tdpo2, _ANY, "token", divergence=True),
    "beta_dpo": Formula(_beta_dpo, _ANY),
}


# --- a call -----------------------------------------------------------------------------------------------------------


@dataclass
class Settings:
    """Arguments of a call other than tensors of tokens. Vectors are [P] or [2P], float64."""

    names: Sequence[str] = ("sigmoid",)
    loss_weights: Sequence[float] | None = None
    beta: Tensor | None = None
    smoothing: Tensor | None = None
    pair_weights: Tensor | None = None
    ref_sums: Tensor | None = None
    kl_coef: float = 0.0
    weighting: bool = False
    reduction: str = "mean"
    scale: float = 1.0
    cap: float | None = None


@dataclass
class Truth:
    """The true results. Values of tokens are those of the n scored tokens, in order.

    Attributes:
        rows: indices of the scored tokens among all tokens, [n].
        labels, weights, owner: [n], label, token weight and sequence of each token.
        z, ref_z: [n, V], transformed logits; z retains its gradient.
        logps, kl, forward_kl: [n], retain their gradients.
        ref_logps: [n].
        statistics: by name, [2P], means over scored tokens.
        loss: the value that the call returns.
        losses: [P].
        sums, ref_sums, rewards, counts, lengths: [2P].
        at: sums [2P] -> (losses, d (sum of weighted losses) / d sums), to find the effect of rounding of the sums.
    """

    rows: Tensor
    labels: Tensor
    weights: Tensor
    owner: Tensor
    z: Tensor
    ref_z: Tensor | None
    logps: Tensor
    ref_logps: Tensor
    kl: Tensor
    forward_kl: Tensor
    loss: Tensor
    losses: Tensor
    sums: Tensor
    ref_sums: Tensor
    rewards: Tensor
    counts: Tensor
    lengths: Tensor
    at: Callable[[Tensor], tuple[Tensor, Tensor]]
    statistics: dict[str, Tensor] = field(default_factory=dict)


def _stack(values: list[Tensor]) -> Tensor:
    return torch.stack(values) if values else torch.zeros(0, dtype=torch.float64)


def _over(values: Tensor, owner: Tensor, sequences: int) -> Tensor:
    """The sum over each sequence's tokens, added one by one."""
    sums = [torch.zeros((), dtype=torch.float64) for _ in range(sequences)]
    for at, sequence in enumerate(owner.tolist()):
        sums[sequence] = sums[sequence] + values[at]
    return _stack(sums)


def truth_of(
    x: Tensor,
    labels: Tensor,
    spans: Sequence[tuple[int, int]],
    settings: Settings,
    *,
    ignore_index: int,
    token_weights: Tensor | None = None,
    ref_x: Tensor | None = None,
) -> Truth:
    """The results of a call on logits x [N, V] with labels [N].

    Args:
        x, ref_x: float64. x may have an autograd graph.
        spans: (begin, end) of each sequence's tokens.
        token_weights: [N] or None. Weight 0 ignores a token. The weights of ignored tokens are not read.
    """
    rows, owner, weights = [], [], []
    for sequence, (begin, end) in enumerate(spans):
        for at in range(begin, end):
            if int(labels[at]) == ignore_index or (token_weights is not None and float(token_weights[at]) == 0.0):
                continue
            rows.append(at)
            owner.append(sequence)
            weights.append(1.0 if token_weights is None else float(token_weights[at]))
    index = torch.tensor(rows, dtype=torch.int64)
    own = torch.tensor(owner, dtype=torch.int64)
    weight = torch.tensor(weights, dtype=torch.float64)
    y = labels[index].to(torch.int64)
    z = transformed(x[index], settings.scale, settings.cap)
    if z.requires_grad:
        z.retain_grad()
    logps = _stack([log_probability(row, int(label)) for row, label in zip(z, y, strict=True)])
    log_p = [log_softmax(row) for row in z]
    n, sequences = len(rows), len(spans)
    pairs = sequences // 2
    nothing = torch.zeros(n, dtype=torch.float64)
    ref_z, ref_logps, kl, forward_kl = None, nothing, nothing, nothing
    if ref_x is not None:
        ref_z = transformed(ref_x[index], settings.scale, settings.cap)
        ref_logps = _stack([log_probability(row, int(label)) for row, label in zip(ref_z, y, strict=True)])
        log_q = [log_softmax(row) for row in ref_z]
        kl = _stack([divergence(p, q) for p, q in zip(log_p, log_q, strict=True)])
        forward_kl = _stack([divergence(q, p) for p, q in zip(log_p, log_q, strict=True)])
    for tokens in (logps, kl, forward_kl):
        if tokens.requires_grad:
            tokens.retain_grad()

    sums, lengths = _over(weight * logps, own, sequences), _over(weight, own, sequences)
    counts = _over(torch.ones_like(weight), own, sequences)
    ref_sums = _over(weight * ref_logps, own, sequences) if settings.ref_sums is None else settings.ref_sums
    kl_sums = _over(weight * forward_kl, own, sequences)
    beta = torch.full((pairs,), 0.1).double() if settings.beta is None else settings.beta
    smoothing = torch.zeros(pairs).double() if settings.smoothing is None else settings.smoothing
    squares = _stack([(2 * row.detach()).exp().sum().log() for row in log_p])
    aligned = _over(logps.detach() - squares, own, sequences) / counts.clamp(min=1)
    likely = (aligned[:pairs] + aligned[pairs:]).exp() if settings.weighting else torch.ones(pairs).double()

    def vectors(sums: Tensor) -> Vectors:
        (s, q), (rs, rq), (n, m) = (v.split(pairs) if pairs else (v, v) for v in (sums, ref_sums, lengths))
        kc, kr = kl_sums.split(pairs) if pairs else (kl_sums, kl_sums)
        found = {"S": s, "Q": q, "RS": rs, "RQ": rq, "c": s - rs, "r": q - rq, "n": n, "m": m, "kc": kc, "kr": kr}
        return found | {"beta": beta, "e": smoothing}

    def losses_of(sums: Tensor) -> Tensor:
        each = settings.loss_weights or [1.0] * len(settings.names)
        parts = [w * OBJECTIVES[name].losses(vectors(sums)) for w, name in zip(each, settings.names, strict=True)]
        return sum(parts[1:], parts[0]) * likely

    pair_weights = torch.ones(pairs).double() if settings.pair_weights is None else settings.pair_weights

    def losses_at(place: Tensor) -> tuple[Tensor, Tensor]:
        leaf = place.detach().clone().requires_grad_()
        found = losses_of(leaf)
        (slopes,) = torch.autograd.grad((found * pair_weights).sum(), leaf, allow_unused=True, materialize_grads=True)
        return found.detach(), slopes

    losses = losses_of(sums)
    weighted = losses * pair_weights
    if settings.kl_coef:
        by_sequence = _over(kl, own, sequences) * pairs / max(n, 1)
        share = settings.kl_coef * (by_sequence[:pairs] + by_sequence[pairs:])
        losses, weighted = losses + share, weighted + share
    loss = weighted if settings.reduction == "none" else weighted.sum()
    if settings.reduction == "mean":
        loss = loss / max(pairs, 1)

    kind = OBJECTIVES[settings.names[0]].reward
    means = sums / torch.where(lengths > 0, lengths, torch.ones_like(lengths))
    reward = {"ratio": sums - ref_sums, "logp": sums, "mean": means, "token": sums - ref_sums + kl_sums}[kind]
    entropies = []
    for row in log_p:
        live = row.detach().exp() > 0
        entropies.append(-(row[live].exp() * row[live]).sum())
    # A softcap is monotone, so find the most likely token before it, where rounding has not made logits equal.
    raw = x.detach()[index] * settings.scale
    values: dict[str, Any] = {
        "entropy": _stack(entropies),
        "kl": kl,
        "accuracy": _stack([(row.argmax() == label).double() for row, label in zip(raw, y, strict=True)]),
        "mean_logits": _stack([row.mean() for row in z]),
    }
    statistics = {name: _over(value.detach(), own, sequences) / counts.clamp(min=1) for name, value in values.items()}
    return Truth(
        index, y, weight, own, z, ref_z, logps, ref_logps, kl, forward_kl, loss, losses.detach(), sums.detach(),
        ref_sums.detach(), (beta.repeat(2) * reward).detach(), counts, lengths, losses_at, statistics,
    )  # fmt: skip
