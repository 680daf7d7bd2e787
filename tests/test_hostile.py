"""Extreme inputs, compared with the float64 reference: masks of the lowest finite number, labels under such a mask, huge and
constant rows, neighbouring rows of every size, loss scales, and views with overlapping elements.

Each kind of input has once given a silently wrong number, a NaN or a crash.
"""

from __future__ import annotations

import asyncio
import math
import subprocess
import sys
import threading

import pytest
import torch
from torch import Tensor

from dpo_kernels import (
    backends,
    dpo_loss,
    linear_dpo_loss,
    linear_logps,
    reference,
    sequence_logps,
    token_logps,
    use_backend,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
#: Relative rounding error of the gradient's dtype and of float32 sums.
ROUNDING = {torch.float32: 3e-7, torch.bfloat16: 4e-3, torch.float16: 5e-4}
STATISTICS = ("entropy", "kl", "accuracy", "mean_logits")


@pytest.fixture(autouse=True)
def emulated(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU, run the backend "cuda" on the emulator."""
    wanted = getattr(request.node, "callspec", None)
    if wanted is not None and wanted.params.get("backend") == "cuda" and not torch.cuda.is_available():
        from cuda_emulator import serve_backend

        serve_backend(monkeypatch)


def check(backend: str, logits: Tensor, labels: Tensor, ref: Tensor, kl_coef: float = 0.0, **settings) -> None:
    """Assert that loss, statistics and each row of the gradient equal those of the float64 reference."""
    leaf = logits.detach().clone().requires_grad_()
    with use_backend(backend):
        out = dpo_loss(leaf, labels, ref_logits=ref, kl_coef=kl_coef, statistics=STATISTICS, **settings)
        out.loss.backward()
    truth = logits.double().requires_grad_()
    loss = reference.dpo_loss(truth, labels, ref_logits=ref.double(), kl_coef=kl_coef, **settings)
    loss.backward()
    torch.testing.assert_close(out.loss.detach().double(), loss.detach(), rtol=3e-6, atol=1e-6)
    error = (leaf.grad.double() - truth.grad).norm(dim=-1)
    size = truth.grad.norm(dim=-1)
    # A divergence is stored in float32. Where the terms of its gradient cancel, this rounding error remains.
    assert bool((error <= ROUNDING[logits.dtype] * size + 3e-8 * kl_coef + 1e-15).all()), (error / size).max()
    rows = reference.token_statistics(logits.double(), labels, ref_logits=ref.double(), **settings)
    for name in STATISTICS:
        expected = rows[name].mean(-1)
        # Float32 logits of size x have a spacing of 1e-7 x, and so have the sums of their exponentials.
        torch.testing.assert_close(
            getattr(out, name).double(), expected, rtol=1e-6, atol=3e-6, msg=lambda m, name=name: f"{name}: {m}"
        )


def make(dtype: torch.dtype, vocab: int = 611, spread: float = 3.0) -> tuple[Tensor, Tensor, Tensor]:
    """(logits, labels, reference logits) of one pair."""
    logits, ref = (torch.randn(2, 3, vocab) * spread for _ in range(2))
    return logits.to(dtype), torch.randint(0, vocab // 2, (2, 3)), ref.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask", [None, -1e12, -1e15, -1e16, -1e20], ids=str)
def test_a_label_under_a_mask(mask, dtype, backend):
    if dtype == torch.float16 and mask is not None:
        pytest.skip("float16 has no such number")
    logits, labels, ref = make(dtype)
    low = torch.finfo(dtype).min if mask is None else mask
    logits[..., -60:] = low
    ref[..., -60:] = low
    labels[0, 1] = 611 - 30
    leaf = logits.detach().clone().requires_grad_()
    with use_backend(backend):
        # The label's log-probability is about `low`, so the loss saturates. A constant coefficient does not.
        sums = sequence_logps(leaf, labels)
        sums.sum().backward()
    truth = logits.double().log_softmax(-1)
    p = truth.exp()
    expected = torch.zeros_like(p).scatter_(-1, labels.unsqueeze(-1), 1.0) - p
    error, size = (leaf.grad.double() - expected).norm(dim=-1), expected.norm(dim=-1)
    assert bool((error <= ROUNDING[dtype] * size).all())
    torch.testing.assert_close(sums.double(), truth.gather(-1, labels.unsqueeze(-1)).sum((1, 2)), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("kl_coef", [0.0, 0.1])
@pytest.mark.parametrize("side", ["policy", "reference", "both"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_mask_of_lowest_numbers(dtype, side, kl_coef, backend):
    logits, labels, ref = make(dtype, spread=1.0)
    # Mask the first half of the row, so that the running maximum begins with the mask.
    for masked in [x for x, name in ((logits, "policy"), (ref, "reference")) if side in (name, "both")]:
        masked[..., :300] = torch.finfo(dtype).min
    check(backend, logits, labels + 300, ref, kl_coef)


@pytest.mark.parametrize("kl_coef", [0.0, 0.1])
@pytest.mark.parametrize("size", [1e9, 1e12, 1e15, 3e38, -1e12, -1e26, -3e38])
def test_rows_of_huge_equal_logits(size, kl_coef, backend):
    logits, labels, ref = make(torch.float32)
    logits[:] = size
    check(backend, logits, labels, ref, kl_coef)
    # Only part of the row is huge, so the other entries have probability 0.
    logits[..., 400:] = -3e38 if size > 0 else 3.3e38
    check(backend, logits, labels if size > 0 else labels + 300, ref, 0.0)


@pytest.mark.parametrize("start", [1.0e9, 1.4e9, 2.0e9, 2.2e9])
def test_huge_logits_whose_exponent_rounds(start, backend):
    # One logit of each row has all the probability. Chosen are logits with the largest rounding of z * log2(e), up to 128.
    top = start + 128.0 * torch.arange(10_000)
    exact = top.double() * torch.tensor(math.log2(math.e)).double()
    top = top[(exact.float() - exact).abs().topk(32).indices]
    logits = torch.stack([top, top - 1e6], -1).view(2, 16, 2)
    labels = (torch.arange(32) % 2).view(2, 16)
    with use_backend(backend):
        leaf = logits.clone().requires_grad_()
        sequence_logps(leaf, labels).sum().backward()
    assert torch.equal(leaf.grad[labels == 0], torch.zeros(16, 2))
    torch.testing.assert_close(leaf.grad[labels == 1], torch.tensor([-1.0, 1.0]).expand(16, 2), rtol=1e-6, atol=0)


@pytest.mark.parametrize("scale", [1e-3, 2.5, 100.0, 1e30, -40.0])
def test_huge_logits_by_their_scale(scale, backend):
    if backend == "cuda" and scale < 0:
        pytest.skip("the CUDA kernels refuse negative scales")
    top = torch.tensor(1.6e9) / scale
    # Adjacent float32 numbers, which differ by 128 after the scale.
    logits = (
        torch.stack([top, top * (1 - 2.0**-23), torch.tensor(-3e38 if scale > 0 else 3e38)])
        .expand(2, 2, 3)
        .contiguous()
    )
    labels = torch.tensor([[0, 1], [1, 1]])
    leaf, truth = logits.clone().requires_grad_(), logits.double().requires_grad_()
    with use_backend(backend):
        sequence_logps(leaf, labels, logit_scale=scale).sum().backward()
    (truth * scale).log_softmax(-1).gather(-1, labels.unsqueeze(-1)).sum().backward()
    torch.testing.assert_close(leaf.grad.double(), truth.grad, rtol=1e-6, atol=1e-6 * abs(scale))


@pytest.mark.parametrize("kl_coef", [0.0, 0.1])
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("vocab", [2, 9, 130])
def test_a_coefficient_beyond_float32(vocab, side, kl_coef, backend):
    # IPO's coefficient is proportional to the difference of log-probabilities; here it is twice the largest float32.
    logits, ref = torch.randn(2, 1, vocab), torch.randn(2, 1, vocab)
    labels = torch.zeros(2, 1, dtype=torch.int64)
    logits[side, 0, 0] = torch.finfo(torch.float32).min
    logits[:, :, -1] = -1e3 if vocab > 2 else 0.0
    logits[1 - side, :, -1] = -1e3
    settings = {"loss_type": "ipo", "beta": 0.1, "kl_coef": kl_coef}
    leaf, truth = logits.clone().requires_grad_(), logits.double().requires_grad_()
    with use_backend(backend):
        dpo_loss(leaf, labels, ref_logits=ref, **settings).loss.backward()
    reference.dpo_loss(truth, labels, ref_logits=ref.double(), **settings).backward()
    beyond = truth.grad.abs() > torch.finfo(torch.float32).max
    assert torch.equal(leaf.grad[beyond], truth.grad[beyond].float())
    size = truth.grad.abs().max()
    torch.testing.assert_close(leaf.grad[~beyond].double(), truth.grad[~beyond], rtol=1e-6, atol=1e-37 * float(size))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("low", [None, float("-inf")], ids=["lowest", "inf"])
@pytest.mark.parametrize("side", ["policy", "both"])
def test_a_mask_under_a_loss_scale(side, low, dtype, backend):
    logits, labels, ref = make(dtype, spread=1.0)
    both = (logits, ref) if side == "both" else (logits,)
    for masked in both:
        masked[..., 400:] = -1e4
    truth = logits.double().requires_grad_()
    (reference.dpo_loss(truth, labels, ref_logits=ref.double(), kl_coef=3.0) * 2.0**16).backward()
    for masked in both:
        masked[..., 400:] = torch.finfo(dtype).min if low is None else low
    leaf = logits.clone().requires_grad_()
    with use_backend(backend):
        (dpo_loss(leaf, labels, ref_logits=ref, kl_coef=3.0).loss * 2.0**16).backward()
    assert torch.equal(leaf.grad[..., 400:], torch.zeros(2, 3, 211, dtype=dtype))
    error, size = (leaf.grad.double() - truth.grad).norm(dim=-1), truth.grad.norm(dim=-1)
    assert bool((error <= max(ROUNDING[dtype], 1e-6) * size).all())


@pytest.mark.parametrize("low", [-30.0, -1e4, -1e9])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_divergence_at_a_certain_token(dtype, low, backend):
    # The policy gives probability 1 to a token that is not the label and that the reference masks: p (d - D) is 0 there.
    if dtype == torch.float16 and low == -1e9:
        pytest.skip("float16 has no such number")
    logits, labels, ref = make(dtype, spread=1.0)
    logits[..., 400] = 200.0
    ref[..., 400] = low
    leaf, truth = logits.clone().requires_grad_(), logits.double().requires_grad_()
    with use_backend(backend):
        dpo_loss(leaf, labels, ref_logits=ref, kl_coef=0.1).loss.backward()
    reference.dpo_loss(truth, labels, ref_logits=ref.double()).backward()
    error, size = (leaf.grad.double() - truth.grad).norm(dim=-1), truth.grad.norm(dim=-1)
    assert bool((error <= max(ROUNDING[dtype], 1e-6) * size).all()), (error / size).max()


def test_a_divergence_under_a_large_scale(backend):
    logits, labels, ref = make(torch.float32, spread=1.0)
    settings = {"logit_scale": 1024.0, "kl_coef": 0.1}
    leaf, truth = logits.clone().requires_grad_(), logits.double().requires_grad_()
    with use_backend(backend):
        dpo_loss(leaf, labels, ref_logits=ref, **settings).loss.backward()
    reference.dpo_loss(truth, labels, ref_logits=ref.double(), **settings).backward()
    error, size = (leaf.grad.double() - truth.grad).norm(dim=-1), truth.grad.norm(dim=-1)
    assert bool((error <= 1e-5 * size + 1e-9).all()), (error / size).max()


@pytest.mark.parametrize("upstream", [1.0, 1e18, 1e30])
def test_a_divergence_of_huge_label_logits(upstream, backend):
    # p(label) = 1, so every gradient is 0.
    labels = torch.tensor([[0], [1]])
    logits = torch.zeros(2, 1, 2).scatter_(-1, labels.unsqueeze(-1), 1e12)
    leaf = logits.clone().requires_grad_()
    with use_backend(backend):
        ref = torch.tensor([[[0.3, -0.2]], [[-0.5, 0.1]]])
        (dpo_loss(leaf, labels, ref_logits=ref, kl_coef=3.0, beta=1e-6).loss * upstream).backward()
    assert bool((leaf.grad.abs() <= 1e-7 * upstream).all())


def test_a_gap_beyond_float32_once_multiplied(backend):
    # The reference masks tokens to which the policy gives a probability of 1e-35, so the divergence is about 1,000.
    logits, labels, ref = make(torch.float32, spread=1.0)
    logits[..., 400:] = -80.0
    ref[..., 400:] = torch.finfo(torch.float32).min
    leaf, truth = logits.clone().requires_grad_(), logits.double().requires_grad_()
    with use_backend(backend):
        (dpo_loss(leaf, labels, ref_logits=ref, kl_coef=3.0).loss * 2.0**16).backward()
    (reference.dpo_loss(truth, labels, ref_logits=ref.double(), kl_coef=3.0) * 2.0**16).backward()
    torch.testing.assert_close(leaf.grad.double(), truth.grad, rtol=1e-5, atol=1.0)


@pytest.mark.parametrize("kl_coef", [0.0, 0.1])
@pytest.mark.parametrize("distance", [300.0, 3e4, 1e6, 1e10])
def test_the_reference_far_away(distance, kl_coef, backend):
    logits, labels, ref = make(torch.float32)
    # The reference must keep its precision at any distance of the policy.
    logits = (logits * 2**6).round() * 2**-6 if distance < 1e5 else torch.zeros_like(logits)
    check(backend, logits + distance, labels, ref, kl_coef)
    check(backend, ref, labels, logits + distance, kl_coef)


def test_huge_label_beside_small_ones(backend):
    logits, labels, ref = make(torch.float32)
    logits.scatter_(-1, labels.unsqueeze(-1), 1e20)
    check(backend, logits, labels, ref, 0.1)


@pytest.mark.parametrize("scale", [1.0, 0.5, -1.0])
def test_accuracy_is_judged_before_the_softcap(scale, backend):
    if backend == "cuda" and scale < 0:
        pytest.skip("the CUDA kernels refuse negative scales")
    # After the cap the three large logits are all 1, in float32 and in float64.
    logits = torch.tensor([30.0, 50.0, 40.0, -5.0]).mul(1 / scale).expand(2, 4, 4).contiguous()
    labels = torch.arange(4).expand(2, 4)
    with use_backend(backend):
        for cap in (None, 1.0):
            out = dpo_loss(
                logits, labels, ref_logps=torch.zeros(2), logit_scale=scale, logit_softcap=cap, statistics=("accuracy",)
            )
            assert out.accuracy.tolist() == [0.25, 0.25]


def test_subnormal_logits_are_told_apart(backend):
    logits = torch.tensor([1e-40, 2e-40]).bfloat16().expand(2, 1, 2).contiguous()
    with use_backend(backend):
        out = dpo_loss(logits, torch.zeros(2, 1, dtype=torch.int64), ref_logps=torch.zeros(2), statistics=("accuracy",))
    assert out.accuracy.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("size", [-1e20, -3e38, float("nan"), float("-inf")])
def test_a_sequence_is_independent_of_its_neighbours(size, backend):
    logits, labels = torch.randn(8, 50), torch.randint(0, 50, (8,))
    bounds = torch.tensor([0, 2, 4, 6, 8])

    def sums() -> Tensor:
        with use_backend(backend):
            out = dpo_loss(logits, labels, cu_seqlens=bounds, ref_logps=torch.zeros(4), beta=0.01)
        return torch.cat([out.chosen_logps, out.rejected_logps])

    clean = sums()
    logits[0, labels[0]] = size
    assert torch.equal(sums()[1:], clean[1:])


def test_padding_and_packing_give_the_same_bits(backend):
    logits, labels = torch.randn(4, 6, 90), torch.randint(0, 90, (4, 6))
    lengths = [6, 2, 5, 3]
    for row, length in enumerate(lengths):
        labels[row, length:] = -100
    packed = torch.cat([logits[row, :length] for row, length in enumerate(lengths)])
    packed_labels = torch.cat([labels[row, :length] for row, length in enumerate(lengths)])
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    with use_backend(backend):
        padded = dpo_loss(logits, labels, ref_logps=torch.zeros(4))
        other = dpo_loss(packed, packed_labels, cu_seqlens=bounds, ref_logps=torch.zeros(4))
    assert torch.equal(padded.losses, other.losses)
    assert torch.equal(padded.chosen_logps, other.chosen_logps)


@pytest.mark.parametrize("scale", [1.0, 65536.0])
@pytest.mark.parametrize("autocast", [False, True])
def test_float16_keeps_what_a_loss_scale_protects(autocast, scale, backend):
    if backend == "triton":
        pytest.skip("the interpreter takes minutes for this vocabulary; the strategy is the same on every backend")
    vocab, dtype = 50257, torch.float32 if autocast else torch.float16
    hidden, weight = ((torch.randn(*shape) * 0.02).to(dtype).requires_grad_() for shape in ((8, 2, 32), (vocab, 32)))
    labels = torch.randint(0, vocab, (8, 2))
    with use_backend(backend), torch.autocast("cpu", dtype=torch.float16, enabled=autocast):
        out = linear_dpo_loss(hidden, weight, labels, ref_logps=torch.zeros(8), beta=0.01, grad_filter=None)
    (out.loss * scale).backward()
    leaves = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    (reference.linear_dpo_loss(*leaves, labels, ref_logps=torch.zeros(8).double(), beta=0.01) * scale).backward()
    others = torch.ones(vocab, dtype=torch.bool)
    others[labels.reshape(-1)] = False
    ours, truth = weight.grad.double()[others], leaves[1].grad[others]
    if scale > 1.0:
        assert float((ours - truth).norm()) < 0.01 * float(truth.norm())
    assert bool(hidden.grad.isfinite().all())


def entries(name: str) -> tuple[list[Tensor], object]:
    """(leaves, a function of them that returns a number) for each differentiable public function."""
    labels, logits = torch.randint(0, 11, (2, 3)), torch.randn(2, 3, 11)
    hidden, weight, bias = torch.randn(2, 3, 8), torch.randn(11, 8), torch.randn(11)
    zeros = torch.zeros(2)
    asked = {"statistics": ("entropy",), "differentiable_entropy": True}
    return {
        "dpo_loss": ([logits], lambda x: dpo_loss(x, labels, ref_logps=zeros).loss),
        "ipo": ([logits], lambda x: dpo_loss(x, labels, ref_logps=zeros, loss_type="ipo").loss),
        "sequence_logps": ([logits], lambda x: sequence_logps(x, labels).sum()),
        "token_logps": ([logits], lambda x: token_logps(x, labels).sum()),
        "entropy": ([logits], lambda x: token_logps(x, labels, **asked)[1]["entropy"].sum()),
        "linear_dpo_loss": ([hidden, weight, bias], lambda h, w, b: linear_dpo_loss(h, w, labels, bias=b, ref_logps=zeros).loss),
        "linear ipo": ([hidden, weight], lambda h, w: linear_dpo_loss(h, w, labels, ref_logps=zeros, loss_type="ipo").loss),
        "frozen head": ([hidden], lambda h: linear_dpo_loss(h, weight, labels, ref_logps=zeros).loss),
        "linear_logps": ([hidden, weight], lambda h, w: linear_logps(h, w, labels).sum()),
    }[name]  # fmt: skip


ENTRIES = [
    "dpo_loss",
    "ipo",
    "sequence_logps",
    "token_logps",
    "entropy",
    "linear_dpo_loss",
    "linear ipo",
    "frozen head",
    "linear_logps",
]


@pytest.mark.parametrize("name", ENTRIES)
def test_a_double_backward_raises(name, backend):
    leaves, function = entries(name)
    leaves = [leaf.requires_grad_() for leaf in leaves]
    with use_backend(backend):
        plain = torch.autograd.grad(function(*leaves), leaves)
        gradients = torch.autograd.grad(function(*leaves), leaves, create_graph=True)
        for gradient, other in zip(gradients, plain, strict=True):
            assert torch.equal(gradient, other)
            assert gradient.requires_grad
            with pytest.raises(RuntimeError, match="no double backward"):
                gradient.square().sum().backward(retain_graph=True)


@pytest.mark.parametrize("name", ENTRIES)
def test_transforms_and_forward_mode_raise(name):
    leaves, function = entries(name)
    everything = tuple(range(len(leaves)))
    with pytest.raises(NotImplementedError, match="reverse-mode gradients only"):
        torch.func.jvp(function, tuple(leaves), tuple(map(torch.ones_like, leaves)))
    with pytest.raises(NotImplementedError, match="reverse-mode gradients only"):
        torch.func.grad(function, argnums=everything)(*leaves)
    with torch.autograd.forward_ad.dual_level():
        duals = [torch.autograd.forward_ad.make_dual(leaf, torch.ones_like(leaf)) for leaf in leaves]
        with pytest.raises(NotImplementedError, match="reverse-mode gradients only"):
            function(*duals)


def overlapping() -> dict[str, Tensor]:
    """Views [2, 3, 7] in which some elements share memory."""
    return {
        "rows overlap": torch.randn(40).as_strided((2, 3, 7), (15, 4, 1)),
        "sequences overlap": torch.randn(40).as_strided((2, 3, 7), (8, 7, 1)),
        "unfold": torch.randn(12).unfold(0, 7, 1).unfold(0, 3, 1)[:2].transpose(1, 2),
        "expand": torch.randn(1, 3, 7).expand(2, 3, 7),
    }


@pytest.mark.parametrize("name", overlapping())
def test_in_place_gradients_of_overlapping_views(name, backend):
    view = overlapping()[name]
    labels = torch.randint(0, 7, (2, 3))
    before, grads = view.clone(), []
    with use_backend(backend):
        for leaf in (view.detach(), view.clone()):
            leaf.requires_grad_()
            dpo_loss(leaf, labels, ref_logps=torch.zeros(2), inplace_backward=True).loss.backward()
            grads.append(leaf.grad.clone())
    assert torch.equal(*grads)
    assert torch.equal(view, before)


def test_strided_views_without_overlap_are_still_overwritten(backend):
    wide = torch.randn(2, 5, 9)
    labels = torch.randint(0, 7, (2, 3))
    for view in (wide[:, 1:4, 1:8], wide.transpose(0, 1)[1:4, :, 1:8].transpose(0, 1)):
        leaf = view.detach().requires_grad_()
        before = leaf.detach().clone()
        with use_backend(backend):
            dpo_loss(leaf, labels, ref_logps=torch.zeros(2), inplace_backward=True).loss.backward()
        assert not torch.equal(leaf.detach(), before)


def test_token_weights_of_ignored_tokens_are_not_read(backend):
    logits, hidden, weight = torch.randn(2, 3, 9), torch.randn(2, 3, 4), torch.randn(9, 4)
    labels = torch.tensor([[1, -100, 2], [3, 4, -100]])
    token_weights = torch.rand(2, 3) + 0.1
    hostile = token_weights.clone()
    hostile[0, 1], hostile[1, 2] = float("nan"), float("inf")
    zeros = torch.zeros(2)
    with use_backend(backend):
        for loss_type in ("sigmoid", "ipo"):
            results = []
            for weights in (token_weights, hostile):
                leaf = logits.clone().requires_grad_()
                words = {"ref_logps": zeros, "token_weights": weights, "loss_type": loss_type}
                loss = dpo_loss(leaf, labels, **words).loss
                loss.backward()
                heads = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
                linear = linear_dpo_loss(*heads, labels, **words).loss
                linear.backward()
                results.append((loss.detach(), linear.detach(), leaf.grad, *(head.grad for head in heads)))
            assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    given = reference.dpo_loss(logits, labels, ref_logps=zeros, token_weights=hostile)
    assert torch.equal(given, reference.dpo_loss(logits, labels, ref_logps=zeros, token_weights=token_weights))


def test_no_sequences_but_a_scored_token(backend):
    leaf = torch.randn(3, 5, requires_grad=True)
    with use_backend(backend):
        out = dpo_loss(leaf, torch.tensor([1, 2, 3]), cu_seqlens=torch.tensor([0]), ref_logps=torch.zeros(0))
        out.loss.backward()
    assert float(out.loss) == 0.0
    assert bool((leaf.grad == 0).all())


def test_the_first_call_of_a_process_may_score_nothing():
    script = """if True:
        import torch
        from dpo_kernels import linear_logps, use_backend
        hidden, weight = torch.randn(2, 3, 8).bfloat16().requires_grad_(), torch.randn(11, 8).bfloat16().requires_grad_()
        with use_backend("cpu"):
            linear_logps(hidden, weight, torch.full((2, 3), -100)).sum().backward()
        assert bool((hidden.grad == 0).all()) and bool((weight.grad == 0).all())
    """
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


@pytest.mark.parametrize("argument", ["labels", "ref_hidden"])
@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo"])
def test_what_a_backward_reads_may_not_change_before_it(loss_type, argument):
    hidden, weight = torch.randn(2, 3, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
    given = {"labels": torch.randint(0, 11, (2, 3)), "ref_hidden": torch.randn(2, 3, 8)}
    out = linear_dpo_loss(hidden, weight, given["labels"], ref_hidden=given["ref_hidden"], loss_type=loss_type)
    given[argument].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.loss.backward()


def test_use_backend_in_threads_and_tasks():
    entered, second, left = (threading.Event() for _ in range(3))
    seen = []

    def first() -> None:
        with use_backend("eager"):
            entered.set()
            second.wait(10)
        left.set()

    def other() -> None:
        entered.wait(10)
        seen.append(backends.resolve("cpu", torch.float32))
        with use_backend("cpu"):
            second.set()
            left.wait(10)
            seen.append(backends.resolve("cpu", torch.float32))

    before = backends.resolve("cpu", torch.float32)
    threads = [threading.Thread(target=target) for target in (first, other)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [before, "cpu"]
    assert backends.resolve("cpu", torch.float32) == before

    async def task(name: str) -> str:
        with use_backend(name):
            await asyncio.sleep(0)
            return backends.resolve("cpu", torch.float32)

    async def both() -> list[str]:
        return await asyncio.gather(task("eager"), task("cpu"))

    assert asyncio.run(both()) == ["eager", "cpu"]
