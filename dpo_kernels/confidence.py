"""From what is known about a pair (ratings, margins, annotators' votes) to pair weights and label smoothing.

Preference data are uneven: some pairs are obvious, others a coin toss, and a loss that trusts all labels alike learns
the annotators' noise. Two steps mend it. First the evidence becomes a probability p that the label is right:

    preference_probability    p = sigmoid((chosen score - rejected score) / scale)      Bradley and Terry 1952
    agreement_probability     p = (votes for + prior) / (votes + 2 prior)               Laplace's rule for prior = 1

Then p becomes what `dpo_loss` takes:

    confidence_smoothing      e = min(1 - p, ceiling)              -> label_smoothing [P]
    confidence_weights        w = max(2 p - 1, floor)^power        -> pair_weights [P], scaled to mean 1

Smoothing keeps every pair and bounds the margin it asks for: the minimum of the smoothed loss lies at
beta * margin = log(p / (1 - p)), which for scale 1 is the score gap itself. Weights leave each pair's target where it
is and let doubtful pairs pull less. Use one of the two: both together count the same doubt twice.
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
        raise ValueError(f"{name} has {vector.shape[0]} entries, for {shape[0]} pairs")
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
    """Probability that chosen really is preferred, from the two responses' scores: sigmoid(gap / scale).

    Args:
        chosen_scores, rejected_scores: [P], any unit: ratings, reward-model outputs, sentiment.
        scale: the gap at which the odds are e to 1, in the scores' unit; about the noise of one score. Reward models
            trained with the Bradley-Terry loss have scale 1.

    Returns:
        [P] in (0, 1); 0.5 for equal scores, below 0.5 where the scores contradict the label.

    Raises:
        ValueError: scale not positive, scores of different lengths, or not finite.

    Source: Bradley and Terry 1952, Rank Analysis of Incomplete Block Designs.
    """
    if not scale > 0:
        raise ValueError(f"scale must be positive; got {scale}")
    chosen = _vector("chosen_scores", chosen_scores)
    rejected = _vector("rejected_scores", rejected_scores, chosen.shape)
    return torch.sigmoid((chosen - rejected) / scale)


def agreement_probability(votes_for: Values, votes: Values, *, prior: float = 1.0) -> Tensor:
    """Probability that the label is right, from `votes_for` of `votes` annotators: (k + prior) / (n + 2 prior).

    Args:
        votes_for, votes: [P], 0 <= votes_for <= votes.
        prior: how many imagined votes each side starts with, so that 1 of 1 is not certainty (Laplace: 1,
            Jeffreys: 0.5).

    Returns:
        [P] in (0, 1).

    Raises:
        ValueError: prior not positive, vectors of different lengths, or more votes for than votes.
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
        probability: [P], that each label is right.
        ceiling: at 0.5, a pair whose label is more likely wrong than right teaches nothing; at 1 it teaches the
            opposite. The robust objective needs less than 0.5, exo_pair more than 0 and less than 1.

    Returns:
        [P], for `label_smoothing`.

    Raises:
        ValueError: probability or ceiling outside [0, 1].
    """
    if not 0 <= ceiling <= 1:
        raise ValueError(f"ceiling must lie in [0, 1]; got {ceiling}")
    return (1 - _probability(probability)).clamp(max=ceiling)


def confidence_weights(
    probability: Values, *, power: float = 1.0, floor: float = 0.0, normalize: bool = True
) -> Tensor:
    """Weight per pair: max(2 p - 1, floor)^power over its mean, so that the learning rate keeps its meaning.

    Args:
        probability: [P], that each label is right. Give the whole data set's at once: a mean over one batch would hand
            a batch of doubtful pairs the weight of a batch of sure ones.
        power: 0 weighs all alike, 1 in proportion to the information 2 p - 1, larger prefers obvious pairs more.
        floor: least weight before normalizing; above 0 no pair is dropped.
        normalize: scale to mean 1.

    Returns:
        [P] >= 0, for `pair_weights`.

    Raises:
        ValueError: probability outside [0, 1], power or floor out of range, or all weights 0.
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
