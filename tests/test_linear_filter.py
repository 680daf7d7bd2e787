"""The filtered gradient equals its definition, keeps its error bound, reports the dropped mass and is deterministic.

The kernels divide rows into blocks of 2,048 logits, source rows into tiles of 1,024 and hidden sizes into strips of 8
vectors. The sizes here are around these boundaries. With logits of standard deviation 4, softmax rows are as sparse as a
trained model's.
"""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from test_linear import Case, make_inputs, textbook

from dpo_kernels import backends, filtered, linear_dpo_loss, linear_logps, reference

pytestmark = pytest.mark.skipif(
    backends.why_not("cpu", "cpu") is not None, reason="the native CPU kernels are the only ones that filter"
)
_F32, _F64, _BF16, _F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16


def make(tokens, hidden_size, vocab, dtype=_F32, seed=0, spread=4.0):
    """(hidden [N, H], weight [V, H], bias [V], labels [N], upstream [N]); one token ignored, one without gradient."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, hidden_size, generator=g, dtype=_F64)
    weight = torch.randn(vocab, hidden_size, generator=g, dtype=_F64) * spread / hidden_size**0.5
    bias = torch.randn(vocab, generator=g, dtype=_F64)
    logits = F.linear(hidden, weight, bias)
    # Most labels are likely, as in real text. The first label is the least likely token.
    labels = torch.multinomial(logits.softmax(-1), 1, generator=g).squeeze(-1)
    labels[0] = logits[0].argmin()
    upstream = torch.randn(tokens, generator=g, dtype=_F64)
    if tokens > 2:
        labels[1], upstream[2] = -100, 0.0
    return *(t.to(dtype) for t in (hidden, weight, bias)), labels, upstream


def definition(hidden, weight, bias, labels, upstream, eps, scale=1.0, cap=0.0):
    """dH, dW, dbias and dropped mass in float64, from dense matrices."""
    hidden, weight, bias = (t.double() for t in (hidden, weight, bias))
    z = reference.transform_logits(F.linear(hidden, weight, bias), scale, cap)
    slope = scale * (1 - (z / cap) ** 2 if cap else torch.ones_like(z))
    p = z.softmax(-1)
    scored = labels != -100
    index = torch.where(scored, labels, 0).unsqueeze(-1)
    onehot = torch.zeros_like(p).scatter_(-1, index, 1.0)
    kept = (p > eps) | (onehot > 0)
    dropped = torch.where(kept, 0.0, p)
    tail = (dropped * slope).sum(-1, keepdim=True)
    g = torch.where(scored, upstream, 0.0).unsqueeze(-1)
    dz = g * (torch.where(kept, (onehot - p) * slope, 0.0) - tail / p.shape[-1])
    return dz @ weight, dz.t() @ hidden, dz.sum(0), torch.where(scored, dropped.sum(-1), 0.0)


def run(hidden, weight, bias, labels, upstream, eps, **options):
    leaves = [t.clone().requires_grad_() for t in (hidden, weight, bias)]
    logps, found = linear_logps(
        leaves[0], leaves[1], labels, bias=leaves[2], grad_filter=eps, statistics=("grad_dropped_mass",), **options
    )
    return logps, torch.autograd.grad(logps, leaves, upstream.to(logps.dtype)), found["grad_dropped_mass"]


# Below one vector; odd; exactly one strip; past one strip; past one tile of the vocabulary; past one block of it.
SIZES = [(5, 3, 11), (7, 17, 130), (9, 128, 500), (9, 145, 700), (6, 64, 2047), (6, 40, 2500), (1, 8, 4100)]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("eps", [2.0**-4, 2.0**-7, 2.0**-10])
def test_filtered_gradients_equal_their_definition_in_float64(size, eps):
    inputs = make(*size, dtype=_F64)
    truth = definition(*inputs, eps)
    _, gradients, dropped = run(*inputs, eps)
    if not dropped.any():  # with too many entries above eps, the gradient is exact
        truth = definition(*inputs, 0.0)
    for mine, true in zip((*gradients, dropped), truth, strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("dtype", [_F32, _BF16, _F16])
@pytest.mark.parametrize("size", SIZES[2:], ids=str)
def test_filtered_gradients_equal_their_definition_in_each_dtype(size, dtype):
    """The definition uses the logits of this dtype's products, so only the backward is tested."""
    inputs = make(*size, dtype=dtype)
    eps = 2.0**-8
    truth = definition(*inputs, eps)
    _, gradients, dropped = run(*inputs, eps)
    assert bool(dropped.any())
    # float32: rounding of logits of size 15. 16 bits: rounding of logits changes each probability by a few per cent.
    tolerance = 2e-5 if dtype == _F32 else 0.1
    for mine, true in zip(gradients, truth, strict=False):
        assert float((mine.double() - true).norm() / true.norm()) < tolerance
    torch.testing.assert_close(dropped.double(), truth[3], rtol=2e-3 if dtype == _F32 else 0.3, atol=2e-5)


@pytest.mark.parametrize(("scale", "cap"), [(0.5, 0.0), (1.0, 8.0), (-0.7, 9.0)])
def test_scale_and_softcap_are_filtered_by_probability_too(scale, cap):
    inputs = make(9, 24, 600, dtype=_F64)
    eps = 2.0**-8
    truth = definition(*inputs, eps, scale, cap)
    _, gradients, dropped = run(*inputs, eps, logit_scale=scale, logit_softcap=cap or None)
    assert bool(dropped.any())
    for mine, true in zip((*gradients, dropped), truth, strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("eps", [2.0**-6, 2.0**-9, 2.0**-12])
def test_the_error_stays_inside_the_documented_bound(eps):
    hidden, weight, bias, labels, upstream = make(40, 32, 3000, dtype=_F64)
    exact = definition(hidden, weight, bias, labels, upstream, 0.0)
    _, gradients, dropped = run(hidden, weight, bias, labels, upstream, eps)
    assert bool(dropped.any())
    reach = (weight - weight.mean(0)).norm(dim=-1).max()
    error = (gradients[0] - exact[0]).norm(dim=-1)
    assert bool((error <= upstream.abs() * dropped * reach + 1e-12).all())
    # The bound is not far too wide: some row comes within a factor of 100.
    assert bool((error > upstream.abs() * dropped * reach / 100)[upstream != 0].any())
    # To a row of dW, each token contributes at most eps (or its tail) times its hidden state.
    per_token = torch.maximum(torch.full_like(dropped, eps), dropped / weight.shape[0])
    limit = (upstream.abs() * (labels != -100) * per_token * hidden.norm(dim=-1)).sum()
    assert float((gradients[1] - exact[1]).norm(dim=-1).max()) <= float(limit)


def test_the_uniform_tail_makes_every_row_sum_to_zero():
    """The bias's gradient is the sum of dz over tokens. Its sum over the vocabulary must be 0, with or without a tail."""
    inputs = make(30, 32, 3000, dtype=_F64)
    _, gradients, dropped = run(*inputs, 2.0**-8)
    assert float(dropped.max()) > 0.01
    assert abs(float(gradients[2].sum())) < 1e-12


def test_the_tail_reduces_the_error():
    hidden, weight, bias, labels, upstream = make(60, 32, 3000, dtype=_F64)
    exact = definition(hidden, weight, bias, labels, upstream, 0.0)[0]
    _, gradients, dropped = run(hidden, weight, bias, labels, upstream, 2.0**-8)
    scored = torch.where(labels != -100, upstream, 0.0)
    without = gradients[0] + (scored * dropped).unsqueeze(-1) * weight.mean(0)
    assert float((gradients[0] - exact).norm()) < float((without - exact).norm())


def test_the_label_keeps_its_exact_gradient_when_its_probability_is_near_one():
    hidden, weight = torch.eye(4, dtype=_F32) * 20, torch.eye(64, 4, dtype=_F32)
    labels = torch.arange(4)
    bias = torch.zeros(64)
    truth = definition(hidden, weight, bias, labels, torch.ones(4, dtype=_F64), 2.0**-20)
    leaf = bias.clone().requires_grad_()
    logps = linear_logps(hidden, weight, labels, bias=leaf, grad_filter=2.0**-20)
    (mine,) = torch.autograd.grad(logps.sum(), leaf)
    torch.testing.assert_close(mine[:4].double(), truth[2][:4], rtol=1e-5, atol=0)


def test_a_flat_softmax_turns_exact_and_says_so():
    inputs = make(20, 16, 800, dtype=_F64, spread=0.1)
    _, gradients, dropped = run(*inputs, 2.0**-12)
    assert not dropped.any()
    for mine, true in zip(gradients, definition(*inputs, 0.0), strict=False):
        torch.testing.assert_close(mine, true, rtol=1e-10, atol=1e-13)


def test_chunks_change_no_bit_of_the_lists_products():
    inputs = make(50, 24, 600, dtype=_F64)
    row = 600 * 8 + 3 * 24 * 8 + 128
    whole = run(*inputs, 2.0**-8)
    parts = run(*inputs, 2.0**-8, memory_budget=7 * row)
    for a, b in zip(whole[1], parts[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)


def test_filtered_gradients_are_deterministic_and_a_graph_runs_twice():
    inputs = make(50, 48, 1500)
    first, second = run(*inputs, 2.0**-10), run(*inputs, 2.0**-10)
    for a, b in zip(first[1], second[1], strict=True):
        assert torch.equal(a, b)
    leaf = inputs[0].clone().requires_grad_()
    logps = linear_logps(leaf, inputs[1], inputs[3], grad_filter=2.0**-10).sum()
    once, twice = (torch.autograd.grad(logps * k, leaf, retain_graph=True)[0] for k in (1, 2))
    assert torch.equal(2 * once, twice)


def test_a_frozen_head_filters_as_well():
    hidden, weight, _, labels, upstream = make(30, 32, 2000, dtype=_F64)
    leaf = hidden.clone().requires_grad_()
    logps = linear_logps(leaf, weight, labels, grad_filter=2.0**-8)
    (mine,) = torch.autograd.grad(logps, leaf, upstream)
    true = definition(hidden, weight, torch.zeros(2000), labels, upstream, 2.0**-8)[0]
    torch.testing.assert_close(mine, true, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("options", [{}, {"loss_type": "aot"}, {"reduction": "none"}], ids=str)
@pytest.mark.parametrize("packed", [False, True])
def test_the_loss_takes_the_filter_for_any_objective(options, packed):
    case = Case("filtered", vocab=900, pairs=3, length=6, packed=packed, options=options)
    inputs = make_inputs(case)
    with torch.no_grad():
        inputs.weight *= 2
    exact = inputs.loss(grad_filter=None)
    out = inputs.loss(grad_filter=2.0**-12, statistics=("grad_dropped_mass", "kl"))
    torch.testing.assert_close(out.loss, exact.loss, rtol=2e-6, atol=0)
    assert 0 < float(out.grad_dropped_mass.max()) < 0.05
    assert out.metrics()["grad_dropped_mass"] > 0 if "reduction" not in options else True
    truth = textbook(inputs.cast(_F64))[1]
    for mine, true in zip(torch.autograd.grad(out.loss.sum(), inputs.trained), truth, strict=True):
        assert float((mine.double() - true).norm() / true.norm()) < 0.02


@pytest.mark.parametrize(("dtype", "filters"), [(_F32, False), (_F64, False), (_BF16, True), (_F16, True)])
def test_auto_filters_16_bit_types_only(dtype, filters):
    hidden, weight, _, labels, _ = make(30, 16, 3000, dtype=dtype, spread=12.0)
    _, found = linear_logps(hidden.requires_grad_(), weight.requires_grad_(), labels, statistics=("grad_dropped_mass",))
    assert bool(found["grad_dropped_mass"].any()) == filters


def test_the_filter_adds_to_main_grad():
    hidden, weight, _, labels, upstream = make(30, 32, 2000)
    plain, buffered = (weight.clone().requires_grad_() for _ in range(2))
    buffered.main_grad = torch.ones_like(weight)
    for leaf in (plain, buffered):
        linear_logps(hidden, leaf, labels, grad_filter=2.0**-8).backward(upstream.float())
    assert buffered.grad is None
    torch.testing.assert_close(buffered.main_grad - 1, plain.grad, rtol=1e-4, atol=3e-7)


def test_too_many_entries_are_refused_by_the_kernels_door():
    logits = torch.zeros(4, 100)
    log_sum = torch.full((4,), 100.0, dtype=_F64).log()
    softmax = (-log_sum, torch.zeros_like(log_sum), log_sum)
    labels = torch.zeros(4, dtype=torch.int64)
    words = {"logit_scale": 1.0, "logit_softcap": 0.0}
    assert filtered.keep(logits, labels, *softmax, eps=1e-3, **words) is None
    kept, dropped = filtered.keep(logits, labels, *softmax, eps=0.5, **words)
    assert kept.row_ptr.tolist() == [0, 1, 2, 3, 4]
    torch.testing.assert_close(dropped, torch.full((4,), 0.99, dtype=_F64))


def test_every_instruction_set_gives_the_definition(tmp_path):
    code = (
        "import sys; sys.path.insert(0, 'tests'); import torch, test_linear_filter as t\n"
        "x = t.make(9, 145, 2500); truth = t.definition(*x, 2.0**-9); got = t.run(*x, 2.0**-9)[1]\n"
        "print(max(float((a.double() - b).norm() / b.norm()) for a, b in zip(got, truth)))"
    )
    for isa in ("baseline", "avx2"):
        environment = {"DPO_KERNELS_ISA": isa, "OMP_NUM_THREADS": "1", "HOME": str(tmp_path), **_cache()}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
        assert float(done.stdout) < 2e-5


def _cache():
    from dpo_kernels import _build

    return {"DPO_KERNELS_CACHE": str(_build.cache_folder())}


def test_the_loss_itself_is_not_filtered():
    hidden, weight, _, labels, _ = make(24, 16, 2000)
    labels = labels.clamp(min=0).view(4, 6)
    words = {"ref_logps": torch.zeros(4)}
    with_filter = linear_dpo_loss(
        hidden.view(4, 6, 16).requires_grad_(), weight.requires_grad_(), labels, grad_filter=0.1, **words
    )
    exact = linear_dpo_loss(hidden.view(4, 6, 16), weight, labels, grad_filter=None, **words)
    torch.testing.assert_close(with_filter.loss, exact.loss, rtol=1e-6, atol=0)
