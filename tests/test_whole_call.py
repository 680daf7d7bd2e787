"""A whole call gives the same bits as its separate stages, and its output attributes are computed when they are read."""

import dataclasses

import pytest
import torch

from dpo_kernels import STATISTICS, DPOOutput, dpo_loss, linear_dpo_loss, use_backend
from dpo_kernels.backends import cpu, whole_call

from cases import CASES, Case, make_inputs

EVERY = {"statistics": STATISTICS}
MORE = [
    Case("each_loss", weighted=True, options={"reduction": "none"}),
    Case("each_loss_packed", weighted=True, packed=True, pairs=3, options={"reduction": "none"}),
    Case("sum_weighted", weighted=True, options={"reduction": "sum"}),
    Case("statistics", options=EVERY),
    Case("statistics_packed_bfloat16", dtype=torch.bfloat16, packed=True, pairs=3, options=EVERY),
    Case("statistics_weighted", weighted=True, pairs=3, options=EVERY),
    Case("in_place", options={"inplace_backward": True}),
    Case("many_pairs", vocab=17, pairs=65, length=3),
]


def run(case, seed=0):
    inputs = make_inputs(case, seed=seed)
    logits = inputs.logits.clone().requires_grad_()
    with use_backend("cpu"):
        out = dpo_loss(logits, inputs.labels, **inputs.keywords)
    (gradient,) = torch.autograd.grad(out.loss.sum(), logits)
    return {"loss": out.loss.detach(), "gradient": gradient, **out.fields()}


@pytest.mark.parametrize("case", [*CASES, *MORE], ids=str)
def test_the_native_call_equals_its_stages_bit_for_bit(case, monkeypatch):
    native = run(case)
    monkeypatch.delattr(cpu, "preference_forward")
    monkeypatch.delattr(cpu, "preference_backward")
    staged = run(case)
    assert native.keys() == staged.keys()
    for name, value in staged.items():
        # PyTorch sums many losses in blocks, C++ in order.
        tolerance = 1e-7 if name == "loss" and case.pairs > 8 else 0.0
        torch.testing.assert_close(native[name], value, rtol=tolerance, atol=0.0, equal_nan=True)


def test_the_default_call_is_one_native_call_each_way(monkeypatch):
    calls = []

    def counted(name):
        function = getattr(cpu, name)

        def run(*arguments):
            calls.append(name)
            return function(*arguments)

        return run

    for name in ("token_logps", "sequence_sums", "preference_loss", "logits_grad"):
        monkeypatch.setattr(cpu, name, counted(name))
    monkeypatch.setattr(whole_call, "preference_forward", counted("preference_forward"))
    run(Case("default", weighted=True, options=EVERY))
    assert calls == []
    run(Case("another_objective", options={"loss_type": "ipo"}))
    assert "token_logps" in calls


def test_no_pairs_and_no_tokens():
    logits = torch.randn(0, 5, 7, requires_grad=True)
    out = dpo_loss(logits, torch.zeros(0, 5, dtype=torch.int64), ref_logps=torch.zeros(0))
    out.loss.backward()
    assert out.loss == 0
    assert logits.grad.shape == logits.shape
    logits = torch.randn(2, 0, 7, requires_grad=True)
    out = dpo_loss(logits, torch.zeros(2, 0, dtype=torch.int64), ref_logps=torch.zeros(2))
    out.loss.backward()
    assert out.loss.item() == pytest.approx(0.6931, abs=1e-4)
    assert out.token_counts.tolist() == [0.0, 0.0]


def test_tokens_of_no_sequence_get_no_gradient():
    logits = torch.randn(9, 7, requires_grad=True)
    labels = torch.randint(0, 7, (9,))
    bounds = torch.tensor([0, 3, 6])
    out = dpo_loss(logits, labels, cu_seqlens=bounds, ref_logps=torch.zeros(2), inplace_backward=False)
    out.loss.backward()
    assert bool((logits.grad[:6] != 0).any(-1).all())
    assert bool((logits.grad[6:] == 0).all())


def test_an_attribute_is_computed_when_it_is_read():
    inputs = make_inputs(CASES[0])
    out = dpo_loss(inputs.logits.requires_grad_(), inputs.labels, **inputs.keywords, statistics=("entropy",))
    assert "chosen_rewards" not in vars(out)
    assert out.chosen_rewards is out.chosen_rewards
    assert "chosen_rewards" in vars(out)
    assert out.kl is None
    with pytest.raises(AttributeError, match="speed"):
        _ = out.speed
    # DistributedDataParallel looks for tensors in the fields of a dataclass.
    assert any(getattr(out, field.name) is out.loss for field in dataclasses.fields(out))
    assert dataclasses.replace(out, loss=out.loss * 2).entropy is out.entropy
    again = DPOOutput(out.loss, **out.fields())
    assert again.metrics() == out.metrics()
    assert out.detach().loss.grad_fn is None
    with pytest.raises(TypeError, match="speed"):
        DPOOutput(out.loss, speed=out.loss)


def test_the_linear_path_says_its_plan():
    hidden, weight = torch.randn(2, 5, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
    labels = torch.randint(0, 11, (2, 5))
    out = linear_dpo_loss(hidden, weight, labels, ref_logps=torch.zeros(2))
    assert out.plan.strategy == "whole_pairs"
    assert "10 scored tokens" in out.plan.describe()
    each = linear_dpo_loss(hidden, weight, labels, ref_logps=torch.zeros(2), reduction="none")
    assert each.plan.strategy == "kept_logits"
    assert dpo_loss(hidden @ weight.T, labels, ref_logps=torch.zeros(2)).plan is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"bias": torch.zeros(3)}, r"^bias must have shape \[11\]"),
        ({"ref_bias": torch.zeros(3)}, r"^ref_bias must have shape \[11\]"),
        ({"weight": torch.zeros(11, 8, dtype=torch.float64)}, "weight is torch.float64, hidden is torch.float32"),
        ({"ref_weight": torch.zeros(11, 7)}, r"ref_weight must have shape \[11, 8\]"),
        ({"loss_type": "tdpo", "ref_hidden": None, "ref_logps": torch.zeros(2)}, "loss_type tdpo needs ref_hidden"),
        ({"labels": torch.zeros(2, 4, dtype=torch.int64)}, "labels must have shape .*one label per row of hidden"),
    ],
)
def test_errors_of_the_linear_path_use_the_callers_names(words, message):
    given = {
        "hidden": torch.randn(2, 5, 8),
        "weight": torch.randn(11, 8),
        "labels": torch.zeros(2, 5, dtype=torch.int64),
    }
    given |= {"ref_hidden": torch.randn(2, 5, 8), **words}
    with pytest.raises((ValueError, TypeError), match=message):
        linear_dpo_loss(given.pop("hidden"), given.pop("weight"), given.pop("labels"), **given)


def test_attributes_and_weights_are_the_callers_to_write_into():
    inputs = make_inputs(Case("weighted", weighted=True))
    logits = inputs.logits.double().requires_grad_()
    weights = inputs.keywords.pop("token_weights").double()
    out = dpo_loss(logits, inputs.labels, token_weights=weights, **inputs.keywords)
    (expected,) = torch.autograd.grad(out.loss, logits, retain_graph=True)
    weights.zero_()
    for value in out.fields().values():
        value.zero_()
    (gradient,) = torch.autograd.grad(out.loss, logits)
    assert torch.equal(gradient, expected)
    ref_logits = inputs.keywords["ref_logits"]
    each = dpo_loss(logits, inputs.labels, ref_logits=ref_logits, reduction="none", loss_type="ipo")
    with torch.no_grad():
        each.loss.zero_()
    assert bool((each.losses != 0).all())


def test_a_label_outside_the_vocabulary_is_a_value_error_with_its_place():
    logits, labels = torch.randn(2, 3, 7), torch.zeros(2, 3, dtype=torch.int64)
    labels[1, 2] = 7
    for options in ({}, {"loss_type": "ipo"}):
        with pytest.raises(ValueError, match="label 7 at row 1, position 2 is outside"):
            dpo_loss(logits, labels, ref_logps=torch.zeros(2), **options)
