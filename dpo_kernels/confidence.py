"""Pair weights and label smoothing from ratings, margins or annotators' votes.

Some preference labels are certain, others are nearly random. A loss that trusts all labels equally learns the annotators'
noise. Two steps avoid that. First, the evidence gives a probability p that the label is right:

    preference_probability    p = sigmoid((chosen score - rejected score) / scale)      Bradley and Terry 1952
    agreement_probability     p = (votes for + prior) / (votes + 2 prior)               Laplace's rule for prior = 1

Second, p gives an argument of `dpo_loss`:

    confidence_smoothing      e = min(1 - p, ceiling)              -> label_smoothing [P]
    confidence_weights        w = max(2 p - 1, floor)^power        -> pair_weights [P], scaled to mean 1

Smoothing keeps every pair and bounds its margin: the smoothed loss is minimal at beta * margin = log(p / (1 - p)), which
equals the score gap if scale is 1. Weights keep each pair's target and reduce the gradient of doubtful pairs. Use one of the
two: together they count the same doubt twice.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Values = Tensor | Sequence[float]


def _vector(name: str, values: Values, shape: torch.Size | None = None) -> Tensor:
    vector = values if isinstance(values, Tensor) else torch.tensor(values, dtype=torch.float64)
    if not vector.is_floating_point():
        vector = vector.to(torch.float64)
    if vector.dim() != 1:
        raise ValueError(f"{name} must be a vector with one entry per pair; got {list(vector.shape)}")
    if shape is not None and vector.shape != shape:
        raise ValueError(f"{name} has {vector.shape[0]} entries, but there are {shape[0]} pairs")
    bad = ~torch.isfinite(vector)
    if bool(bad.any()):
        first = int(bad.nonzero()[0])
        raise ValueError(f"{name} must be finite; entry {first} is {vector[first].item()}")
    return vector


def _probability(probability: Values) -> Tensor:
    p = _vector("probability", probability)
    if bool(((p < 0) | (p > 1)).any()):
        raise ValueError(f"probability must lie in [0, 1]; got values from {p.min():g} to {p.max():g}")
    return p


def preference_probability(chosen_scores: Values, rejected_scores: Values, *, scale: float = 1.0) -> Tensor:
    """Probability that the chosen response is preferred, from two scores: sigmoid((chosen - rejected) / scale).

    Source: Bradley and Terry 1952, Rank Analysis of Incomplete Block Designs.

    Args:
        chosen_scores: [P], in any unit: ratings, reward-model outputs, sentiment.
        rejected_scores: [P], in the same unit.
        scale: the score gap at which the odds are e to 1, in the scores' unit; about the noise of one score. Reward
            models trained with the Bradley-Terry loss have scale 1.

    Returns:
        [P] in (0, 1); 0.5 for equal scores, below 0.5 where the scores contradict the label.

    Raises:
        ValueError: scale is not positive, or the scores are not finite or have different lengths.
    """
    if not scale > 0:
        raise ValueError(f"scale must be positive; got {scale}")
    chosen = _vector("chosen_scores", chosen_scores)
    rejected = _vector("rejected_scores", rejected_scores, chosen.shape)
    return torch.sigmoid((chosen - rejected) / scale)


def agreement_probability(votes_for: Values, votes: Values, *, prior: float = 1.0) -> Tensor:
    """Probability that the label is right, from annotators' votes: (votes_for + prior) / (votes + 2 prior).

    Args:
        votes_for: [P], annotators who agree with the label; 0 <= votes_for <= votes.
        votes: [P], all annotators.
        prior: votes added to each side, so that one vote of one is not certainty (Laplace: 1, Jeffreys: 0.5).

    Returns:
        [P] in (0, 1).

    Raises:
        ValueError: prior is not positive, the vectors have different lengths, or votes_for exceeds votes.
    """
    if not prior > 0:
        raise ValueError(f"prior must be positive; got {prior}")
    total = _vector("votes", votes)
    agreeing = _vector("votes_for", votes_for, total.shape)
    if bool(((agreeing < 0) | (agreeing > total)).any()):
        raise ValueError("votes_for must lie between 0 and votes for every pair")
    return (agreeing + prior) / (total + 2 * prior)


def confidence_smoothing(probability: Values, *, ceiling: float = 0.5) -> Tensor:
    """Label smoothing per pair: min(1 - p, ceiling).

    Args:
        probability: [P], probability that each label is right.
        ceiling: largest smoothing. It matters for a label that is more likely wrong than right: at 0.5 its margin is
            driven to 0, at 1 the preference is reversed. The robust objective needs smoothing below 0.5, exo_pair needs
            it in (0, 1).

    Returns:
        [P], for `label_smoothing`.

    Raises:
        ValueError: probability or ceiling is outside [0, 1].
    """
    if not 0 <= ceiling <= 1:
        raise ValueError(f"ceiling must lie in [0, 1]; got {ceiling}")
    return (1 - _probability(probability)).clamp(max=ceiling)


def confidence_weights(
    probability: Values, *, power: float = 1.0, floor: float = 0.0, normalize: bool = True
) -> Tensor:
    """Weight per pair: max(2 p - 1, floor)^power, divided by its mean.

    Args:
        probability: [P], probability that each label is right. Pass the whole data set at once: normalized batch by batch, a
            batch of doubtful pairs would weigh as much as a batch of certain ones.
        power: 0 gives equal weights, 1 weights proportional to 2 p - 1; larger values favour certain pairs more.
        floor: smallest value of 2 p - 1, in [0, 1]; above 0 no pair is dropped.
        normalize: divide by the mean, so that the weights do not change the effective learning rate.

    Returns:
        [P] >= 0, for `pair_weights`.

    Raises:
        ValueError: probability is outside [0, 1], power or floor is out of range, or all weights are 0.
    """
    if not power >= 0:
        raise ValueError(f"power must not be negative; got {power}")
    if not 0 <= floor <= 1:
        raise ValueError(f"floor must lie in [0, 1]; got {floor}")
    weights = (2 * _probability(probability) - 1).clamp(min=floor) ** power
    if not normalize or weights.numel() == 0:
        return weights
    mean = weights.mean()
    if mean == 0:
        raise ValueError("all weights are 0: no label is more likely right than wrong; set a floor, or drop the data")
    return weights / mean
