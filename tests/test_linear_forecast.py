"""The predicted plan is the plan of the call, for every CPU strategy and every setting that changes the plan."""

import contextlib

import pytest
import torch

from dpo_kernels import backends, linear_dpo_loss, use_backend
from dpo_kernels.linear import plan_linear_dpo_loss
from dpo_kernels.linear.planner import Head

V, H, LENGTHS = 97, 16, [5, 0, 7, 4, 3, 6]
ROW = Head(H, V, 4, projects_reference=True).row_bytes

needs_native = pytest.mark.skipif(
    backends.why_not("cpu", "cpu") is not None, reason="the native CPU kernels are the only ones that filter"
)


def batch_of(spread: float, dtype: torch.dtype = torch.float32):
    """(hidden [N + 3, H], weight [V, H], bias [V], labels, cu_seqlens), with a prompt token before three sequences."""
    generator = torch.Generator().manual_seed(0)
    prompts = [1, 0, 1, 0, 1, 0]
    held = [p + n for p, n in zip(prompts, LENGTHS, strict=True)]
    bounds = torch.tensor([0, *held]).cumsum(0)
    labels = torch.randint(0, V, (sum(held),), generator=generator)
    for begin, prompt in zip(bounds.tolist(), prompts, strict=False):
        labels[begin : begin + prompt] = -100
    hidden = torch.randn(sum(held), H, generator=generator)
    weight = torch.randn(V, H, generator=generator) * spread / H**0.5
    bias = torch.randn(V, generator=generator)
    return hidden.to(dtype), weight.to(dtype), bias.to(dtype), labels, bounds


CASES = {
    "whole_pairs": ("whole_pairs", {}),
    "whole_pairs_in_groups": ("whole_pairs", {"memory_budget": 12 * ROW}),
    "pairs_beyond_the_budget": ("whole_pairs", {"memory_budget": 3 * ROW}),
    "sum_of_a_mix": ("whole_pairs", {"loss_type": ["sigmoid", "ipo"], "reduction": "sum", "reference": "logps"}),
    "reference_free": ("whole_pairs", {"loss_type": "simpo", "reference": None}),
    "kl_statistic": ("whole_pairs", {"statistics": ("kl", "entropy"), "memory_budget": 12 * ROW}),
    "kl_coef": ("whole_pairs", {"kl_coef": 0.1, "memory_budget": 9 * ROW}),
    "kl_of_coupled_pairs": ("two_pass", {"loss_type": ["aot", "sigmoid"], "kl_coef": 0.1}),
    "tdpo_with_a_frozen_head": ("whole_pairs", {"loss_type": "tdpo", "frozen": ("weight", "bias")}),
    "forward": ("forward", {"frozen": ("hidden", "weight", "bias")}),
    "no_grad": ("forward", {"no_grad": True}),
    "frozen_head": ("frozen_head", {"frozen": ("weight", "bias"), "memory_budget": 4 * ROW}),
    "frozen_weight": ("whole_pairs", {"frozen": ("weight",)}),
    "frozen_hidden": ("whole_pairs", {"frozen": ("hidden",)}),
    "per_pair_losses": ("kept_logits", {"reduction": "none"}),
    "coupled": ("kept_logits", {"loss_type": "aot", "bias": False}),
    "coupled_in_chunks": ("two_pass", {"loss_type": "aot", "memory_budget": 4 * ROW}),
    "eager_has_no_filter": ("whole_pairs", {"grad_filter": 1e-3, "backend": "eager"}),
    "float64": ("whole_pairs", {"dtype": torch.float64, "memory_budget": 12 * ROW}),
    "float16": ("kept_logits", {"dtype": torch.float16, "grad_filter": None}),
    "bfloat16": ("whole_pairs", {"dtype": torch.bfloat16, "grad_filter": None, "memory_budget": 12 * ROW}),
    "autocast": ("whole_pairs", {"autocast": True, "grad_filter": None, "memory_budget": 12 * ROW}),
    "weights": ("whole_pairs", {"weighted": True, "use_weighting": True, "beta": 0.3, "logit_softcap": 9.0}),
}
FILTERED = {
    "filtered": ("filtered", {"grad_filter": 1e-3, "spread": 12.0}),
    "filtered_in_chunks": ("filtered", {"grad_filter": 1e-3, "spread": 12.0, "memory_budget": 4 * ROW}),
    "filtered_frozen_head": ("frozen_head", {"grad_filter": 1e-3, "spread": 12.0, "frozen": ("weight", "bias")}),
    "filtered_but_flat": ("two_pass", {"grad_filter": 1e-6, "spread": 0.1, "flat_softmax": True}),
    "bfloat16_filters_by_itself": ("two_pass", {"dtype": torch.bfloat16, "spread": 0.1, "flat_softmax": True}),
    "autocast_filters_by_itself": ("two_pass", {"autocast": True, "spread": 0.1, "flat_softmax": True}),
}


def check(strategy: str, settings: dict) -> None:
    settings = dict(settings)

    def taken(name, default):
        return settings.pop(name, default)

    dtype, frozen, reference = taken("dtype", torch.float32), taken("frozen", ()), taken("reference", "hidden")
    hidden, weight, bias, labels, bounds = batch_of(taken("spread", 1.0), dtype)
    bias = bias if taken("bias", True) else None
    for name, tensor in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if tensor is not None:
            tensor.requires_grad_(name not in frozen)
    counts, only_call = list(LENGTHS), {}
    if taken("weighted", False):
        only_call = {"token_weights": torch.rand(labels.shape) + 0.5, "pair_weights": torch.tensor([1.0, 0.0, 2.0])}
        only_call["token_weights"][1] = 0.0
        counts[0] -= 1
    only_call |= {name: settings.pop(name) for name in ("use_weighting", "beta", "logit_softcap") if name in settings}
    if reference == "hidden":
        only_call |= {"ref_hidden": hidden.detach() * 0.9}
    elif reference == "logps":
        only_call |= {"ref_logps": -torch.ones(len(counts))}
    flat = taken("flat_softmax", False)
    with contextlib.ExitStack() as stack:
        if backend := taken("backend", None):
            stack.enter_context(use_backend(backend))
        if taken("no_grad", False):
            stack.enter_context(torch.no_grad())
        if taken("autocast", False):
            stack.enter_context(torch.autocast("cpu", torch.bfloat16))
        said = plan_linear_dpo_loss(
            counts,
            weight,
            bias=bias,
            needs_hidden=hidden.requires_grad,
            projects_reference=reference == "hidden",
            flat_softmax=flat,
            **settings,
        )
        done = linear_dpo_loss(hidden, weight, labels, bias=bias, cu_seqlens=bounds, **settings, **only_call)
    assert said == done.plan
    assert said.strategy == strategy


@pytest.mark.parametrize("name", CASES)
def test_the_plan_said_beforehand_is_that_of_the_call(name):
    check(*CASES[name])


@needs_native
@pytest.mark.parametrize("name", FILTERED)
def test_so_it_is_with_a_filter(name):
    check(*FILTERED[name])


@needs_native
def test_that_the_softmax_is_flat_only_the_call_finds():
    weight = torch.randn(V, H, requires_grad=True)
    filtered = plan_linear_dpo_loss(LENGTHS, weight, grad_filter=1e-3)
    exact = plan_linear_dpo_loss(LENGTHS, weight, grad_filter=1e-3, flat_softmax=True)
    assert (filtered.strategy, exact.strategy) == ("filtered", "two_pass")
    assert (filtered.groups, filtered.bytes) == (exact.groups, exact.bytes)
    assert exact.flops == 4 * filtered.flops, "the forward once; then once more, dH and dW"
    plain = {"loss_type": "aot", "grad_filter": None}
    assert plan_linear_dpo_loss(LENGTHS, weight, **plain, flat_softmax=True) == plan_linear_dpo_loss(
        LENGTHS, weight, **plain
    )


def test_no_value_is_read():
    """The weights may be uninitialised, and a million tokens need no memory."""
    plan = plan_linear_dpo_loss([500_000, 500_000], torch.full((V, H), torch.nan), projects_reference=True)
    assert plan.tokens == 1_000_000


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"counts": [3]}, "the batch holds 1 sequences, an odd number"),
        ({"counts": [3, -1]}, "counts must not be negative; got -1"),
        ({"weight": torch.zeros(V)}, r"weight must be the head's weight \[V, H\]; got \[97\]"),
        ({"bias": torch.zeros(3)}, r"^bias must have shape \[97\]"),
        ({"kl_coef": 0.1}, "kl_coef needs ref_hidden"),
        ({"statistics": ("kl",)}, 'the statistic "kl" needs ref_hidden'),
        ({"loss_type": "tdpo"}, "loss_type tdpo needs ref_hidden"),
        ({"reduction": "median"}, 'reduction must be "mean", "sum" or "none"'),
        ({"grad_filter": 2.0}, r"grad_filter must lie in \(0, 1\)"),
        ({"memory_budget": 8}, "cannot hold the logits of one token"),
        ({"memory_budget": "much"}, "memory_budget must read like"),
    ],
)
def test_mistakes_are_told_as_by_the_call(words, message):
    words = {"counts": [3, 3], "weight": torch.zeros(V, H), **words}
    with pytest.raises(ValueError, match=message):
        plan_linear_dpo_loss(**words)
