"""Scores and votes are turned into probabilities, weights and smoothing by the documented formulas; bad input is refused."""

import math

import pytest
import torch

from dpo_kernels.confidence import (
    agreement_probability,
    confidence_smoothing,
    confidence_weights,
    preference_probability,
)
from dpo_kernels.objectives import Pairs, mix


def test_probability_is_bradley_terry_of_the_score_gap():
    p = preference_probability([2.0, 5.0, 1.0], [2.0, 3.0, 3.0], scale=2.0)
    expected = torch.tensor([0.5, 1 / (1 + math.exp(-1.0)), 1 / (1 + math.exp(1.0))], dtype=torch.float64)
    torch.testing.assert_close(p, expected)


def test_agreement_is_pulled_towards_a_coin_toss_by_few_votes():
    p = agreement_probability([1, 10, 5, 0], [1, 10, 10, 0])
    torch.testing.assert_close(p, torch.tensor([2 / 3, 11 / 12, 0.5, 0.5], dtype=torch.float64))


def test_weights_keep_the_mean_at_one_and_drop_contradicted_labels():
    w = confidence_weights([1.0, 0.75, 0.5, 0.2])
    torch.testing.assert_close(w, torch.tensor([1.0, 0.5, 0.0, 0.0], dtype=torch.float64) / 0.375)
    assert w.mean().item() == pytest.approx(1.0)
    torch.testing.assert_close(confidence_weights([0.9, 0.6], power=0.0), torch.ones(2, dtype=torch.float64))
    raw = confidence_weights([0.75, 0.4], power=2.0, floor=0.1, normalize=False)
    torch.testing.assert_close(raw, torch.tensor([0.25, 0.01], dtype=torch.float64))


def test_smoothing_is_the_probability_of_a_wrong_label_up_to_the_ceiling():
    e = confidence_smoothing(torch.tensor([0.9, 0.5, 0.2]))
    torch.testing.assert_close(e, torch.tensor([0.1, 0.5, 0.5]))
    torch.testing.assert_close(confidence_smoothing([0.2], ceiling=1.0), torch.tensor([0.8], dtype=torch.float64))


def test_smoothed_loss_is_least_where_the_margin_equals_the_score_gap():
    gap = torch.tensor([0.3, 1.2, 2.0], dtype=torch.float64)
    e = confidence_smoothing(preference_probability(gap, torch.zeros(3)))
    margins = gap.clone().requires_grad_()
    zero, one = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    mix(Pairs(margins, zero, zero, zero, one, one, one, e), "sigmoid").sum().backward()
    torch.testing.assert_close(margins.grad, zero, atol=1e-15, rtol=0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: preference_probability([1.0, 2.0], [1.0]), "rejected_scores has 1 entries, for 2 pairs"),
        (lambda: preference_probability([1.0], [float("nan")]), "rejected_scores must be finite; entry 0"),
        (lambda: preference_probability([1.0], [0.0], scale=0.0), "scale must be positive"),
        (lambda: agreement_probability([3], [2]), "between 0 and votes"),
        (lambda: agreement_probability([1], [2], prior=0.0), "prior must be positive"),
        (lambda: confidence_weights([1.2]), r"must lie in \[0, 1\]"),
        (lambda: confidence_weights([0.9], power=-1.0), "power"),
        (lambda: confidence_weights([0.9], floor=2.0), "floor"),
        (lambda: confidence_weights([0.5, 0.1]), "all weights are 0"),
        (lambda: confidence_smoothing([0.5], ceiling=1.5), "ceiling"),
        (lambda: confidence_weights(torch.ones(2, 2)), "one entry per pair"),
    ],
)
def test_bad_evidence_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
