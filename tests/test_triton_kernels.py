"""The Triton stages equal the float64 reference around their boundaries: tiles, groups, alignment, strides, label positions.

Without a GPU they run in Triton's interpreter, which takes milliseconds per token, so there are few rows. The interpreter's
tile is a quarter of the compiled tile (launch.UNROLL). `tile_loads` also runs the compiled size.
"""

import math
import sys

import pytest
import torch

from dpo_kernels import backends
from dpo_kernels.reference import token_statistics, transform_logits
from dpo_kernels.stages import STATISTICS, TokenKL, Transform, token_rows

from checks import BUDGET, row_errors
from contraction import fused_products

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
triton_backend = backends.load("triton", DEVICE)
launch = sys.modules["dpo_kernels.backends.triton.launch"]
stage_modules = [sys.modules[f"dpo_kernels.backends.triton.{name}"] for name in ("token_logps", "logits_grad")]

# numpy, which the interpreter uses, warns about the NaN that the tests make the kernels produce.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

PLAIN = Transform()
NAMES = token_rows(True, STATISTICS)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

#: Logits per tile: 16 bytes x lanes x loads.
TILE = {dtype: 16 // dtype.itemsize * launch.LANES * launch.UNROLL for dtype in DTYPES}


@pytest.fixture(params=[1, 4])
def tile_loads(request, monkeypatch):
    """Set the loads per thread and tile to those of the interpreter or of the compiled kernels."""
    for module in stage_modules:
        monkeypatch.setattr(module, "UNROLL", request.param)
    return request.param


def random_logits(*shape, dtype=torch.float32, seed=0, spread=4.0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) * spread).to(dtype).to(DEVICE)


def forward(logits, labels, ref_logits=None, statistics=(), transform=PLAIN):
    tokens = triton_backend.token_logps(logits, labels, ref_logits, transform, statistics)
    return dict(zip(token_rows(ref_logits is not None, statistics), tokens, strict=True))


def backward(logits, labels, grad_logps, out=None, transform=PLAIN):
    small = triton_backend.token_logps(logits, labels, None, transform, ())
    out = torch.empty_like(logits) if out is None else out
    triton_backend.logits_grad(logits, labels, *small, grad_logps, transform, out)
    return out


def truth_of(logits, labels, ref_logits=None, dtype=torch.float64, transform=PLAIN):
    """Every statistic by its definition, in `dtype` arithmetic on the same stored logits."""
    ref = None if ref_logits is None else ref_logits.to(dtype)
    return token_statistics(
        logits.to(dtype), labels, ref_logits=ref, logit_scale=transform.scale, logit_softcap=transform.softcap
    )


def gradient_of(logits, labels, grad_logps, dtype=torch.float64, transform=PLAIN):
    x = logits.detach().to(dtype).requires_grad_()
    z = transform_logits(x, transform.scale, transform.softcap)
    scored = labels != -100
    logps = z.log_softmax(-1).gather(-1, torch.where(scored, labels, 0).unsqueeze(-1)).squeeze(-1)
    (torch.where(scored, logps, 0.0) * grad_logps.to(dtype)).sum().backward()
    return x.grad


def check_forward(found, logits, labels, ref_logits, names, transform=PLAIN):
    """Compare with the float64 truth. The error may be at most that of eager float32 on the same logits, or one unit.

    One unit is a unit in the last place of the largest z or of the result. Computing one logit in float32 has that error,
    while eager's errors may cancel by chance. Differences of two logits may have two units: a KL divergence, and a maximum
    under a softcap and the values relative to it.
    """
    truth = truth_of(logits, labels, ref_logits, transform=transform)
    eager = truth_of(logits, labels, ref_logits, torch.float32, transform)
    z = (transform_logits(t.double(), transform.scale, transform.softcap) for t in (logits, ref_logits))
    largest_z = max(float(t.abs().max()) for t in z)
    for name in names:
        error = float((found[name] - truth[name]).abs().max())
        unit = 2.0 ** (math.frexp(max(largest_z, float(truth[name].abs().max())))[1] - 24)
        units = unit if name in ("logps", "ref_logps", "entropy", "accuracy", "mean_logits") else 2 * unit
        allowed = max(float((eager[name].double() - truth[name]).abs().max()), units)
        assert error <= allowed, f"{name}: {error:.3g} > {allowed:.3g}"


def check_backward(gradient, logits, labels, grad_logps, transform=PLAIN):
    """Compare label entries and other entries separately, row by row, with BUDGET times eager float32's error as limit.

    Eager's gradient is cast to the dtype.
    """
    truth = gradient_of(logits, labels, grad_logps, transform=transform)
    eager = gradient_of(logits, labels, grad_logps, torch.float32, transform).to(logits.dtype)
    ours, theirs = row_errors(gradient, truth, labels), row_errors(eager, truth, labels)
    for part in ("label", "others"):
        mine, other = getattr(ours, part), getattr(theirs, part)
        assert float(mine.max()) <= BUDGET * max(float(other.max()), torch.finfo(gradient.dtype).eps), part


def vocabularies(dtype):
    """Sizes below, at and past a tile and a group, with and without a tail, and three tiles, so that the main loop runs."""
    tile = TILE[dtype]
    return [1, 2, 7, 8, tile - 1, tile, tile + 1, 3 * tile, 3 * tile + 16 // dtype.itemsize + 3]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_stages_equal_the_float64_truth_around_the_tile(dtype):
    for vocab in vocabularies(dtype):
        logits, ref_logits = (random_logits(1, 3, vocab, dtype=dtype, seed=s) for s in (1, 2))
        labels = torch.tensor([[0, vocab // 2, vocab - 1]], device=DEVICE)  # first, middle and last tile
        found = forward(logits, labels, ref_logits, STATISTICS)
        check_forward(found, logits, labels, ref_logits, NAMES)
        grad_logps = torch.tensor([[0.7, -0.3, 1e-3]], dtype=torch.float64, device=DEVICE)
        gradient = backward(logits, labels, grad_logps)
        if vocab == 1:
            assert bool((gradient == 0).all())
        else:
            check_backward(gradient, logits, labels, grad_logps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled_tile_size_agrees_and_keeps_every_label_place(dtype, tile_loads):
    vocab = 3 * TILE[torch.float32] * 4 + 5
    logits = random_logits(1, 4, vocab, dtype=dtype, seed=3)
    labels = torch.tensor([[0, vocab // 3, 2 * vocab // 3, vocab - 1]], device=DEVICE)
    check_forward(forward(logits, labels, logits, STATISTICS), logits, labels, logits, NAMES)
    grad_logps = torch.full((1, 4), -0.25, dtype=torch.float64, device=DEVICE)
    check_backward(backward(logits, labels, grad_logps), logits, labels, grad_logps)


def test_a_real_odd_vocabulary():
    """GPT-2's 50,257: the start of every row is two bytes less aligned than that of the row before."""
    logits, ref_logits = (random_logits(1, 2, 50257, dtype=torch.bfloat16, seed=s) for s in (4, 5))
    labels = torch.tensor([[50256, 31000]], device=DEVICE)
    check_forward(forward(logits, labels, ref_logits, STATISTICS), logits, labels, ref_logits, NAMES)
    grad_logps = torch.tensor([[1.0, -2.0]], dtype=torch.float64, device=DEVICE)
    check_backward(backward(logits, labels, grad_logps), logits, labels, grad_logps)


@pytest.mark.parametrize(
    ("scale", "cap"), [(0.5, 0.0), (1 / 0.7, 0.0), (-1.0, 0.0), (0.0, 0.0), (1.0, 30.0), (0.7, 5.0)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scale_and_softcap(dtype, scale, cap):
    transform = Transform(scale=scale, softcap=cap)
    logits, ref_logits = (random_logits(1, 3, 1037, dtype=dtype, seed=s, spread=8.0) for s in (6, 7))
    labels = torch.tensor([[3, 600, 1036]], device=DEVICE)
    found = forward(logits, labels, ref_logits, STATISTICS, transform)
    names = [name for name in NAMES if name not in ("kl", "entropy")] if scale == 0.0 else NAMES
    check_forward(found, logits, labels, ref_logits, names, transform)
    grad_logps = torch.tensor([[0.7, -0.3, 1.0]], dtype=torch.float64, device=DEVICE)
    gradient = backward(logits, labels, grad_logps, transform=transform)
    if scale == 0.0:
        # With constant logits, the entropy is log V and the gradient 0.
        torch.testing.assert_close(found["entropy"], torch.full_like(found["entropy"], math.log(1037)))
        assert bool((gradient == 0).all())
    else:
        check_backward(gradient, logits, labels, grad_logps, transform)


@pytest.mark.parametrize(
    ("dtype", "ref_dtype"), [(torch.bfloat16, torch.float32), (torch.float32, torch.float16)], ids=str
)
def test_policy_and_reference_may_differ_in_dtype_and_alignment(dtype, ref_dtype):
    vocab = 1200
    logits = random_logits(1, 3, vocab, dtype=dtype, seed=8)
    ref_logits = random_logits(1, 3, vocab + 3, dtype=ref_dtype, seed=9)[..., 1:-2]
    labels = torch.tensor([[5, -100, 1199]], device=DEVICE)
    found = forward(logits, labels, ref_logits, STATISTICS)
    check_forward(found, logits, labels, ref_logits, NAMES)


def test_reference_without_kl_is_the_reference_with_it():
    logits, ref_logits = (random_logits(1, 2, 1500, dtype=torch.bfloat16, seed=s) for s in (10, 11))
    labels = torch.tensor([[7, 1400]], device=DEVICE)
    with_kl, without = (triton_backend.token_logps(logits, labels, ref_logits, PLAIN, s) for s in (("kl",), ()))
    assert torch.equal(with_kl[:4], without)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("offset", [1, 2, 3, 5, 8])
def test_no_bit_depends_on_where_a_row_lies(dtype, offset):
    """A row inside wider memory, at any alignment, gives the same bits as its contiguous copy."""
    vocab = TILE[dtype] * 2 + 8
    wide = random_logits(1, 2, vocab + offset + 2, dtype=dtype, seed=12)
    view = wide[..., offset : offset + vocab]
    copy = view.contiguous()
    labels = torch.tensor([[vocab - 1, 17]], device=DEVICE)
    left, right = (triton_backend.token_logps(x, labels, x, PLAIN, STATISTICS) for x in (view, copy))
    assert torch.equal(left, right)
    grad_logps = torch.tensor([[0.5, -0.5]], dtype=torch.float64, device=DEVICE)
    assert torch.equal(backward(view, labels, grad_logps), backward(copy, labels, grad_logps))


@pytest.mark.parametrize("vocab", [1040, 1037])
def test_gradient_in_place_out_of_place_and_into_a_view_are_bitwise_equal(vocab):
    whole = random_logits(2, 3, vocab, dtype=torch.bfloat16, seed=13)
    logits = whole[:, :-1]  # the usual shift: a strided view
    labels = torch.tensor([[1, vocab - 1], [-100, 500]], device=DEVICE)
    grad_logps = torch.tensor([[0.5, -1.0], [1.0, 0.0]], dtype=torch.float64, device=DEVICE)
    apart = backward(logits, labels, grad_logps)
    memory = torch.full((2, 4, vocab), 7.0, dtype=torch.bfloat16, device=DEVICE)
    elsewhere = backward(logits, labels, grad_logps, out=memory[:, 1:3])
    last = whole[:, -1].clone()
    in_place = backward(logits, labels, grad_logps, out=logits)
    assert torch.equal(apart, elsewhere)
    assert torch.equal(apart, in_place)
    # Memory outside the rows is unchanged.
    assert torch.equal(whole[:, -1], last)
    assert bool((memory[:, [0, 3]] == 7).all())


@pytest.mark.parametrize("cap", [0.0, 5.0])
def test_the_labels_logit_may_already_be_its_gradient(cap):
    """In place, one warp may store the label's gradient before another warp reads: nothing may depend on that logit.

    The labels are in the unaligned ends, in a tile and in the last tile. Each label's logit is replaced by the value that a
    faster warp would have written.
    """
    logits, ref_logits = (random_logits(1, 3, 1037, seed=s) for s in (30, 31))
    labels = torch.tensor([[3, 600, 1036]], device=DEVICE)
    grads = [
        torch.tensor([values], dtype=torch.float64, device=DEVICE) for values in ([0.7, -0.3, 1.0], [0.5, 2.0, -1.0])
    ]
    transform = Transform(softcap=cap)
    *small, ref_logps, ref_max, ref_log_sum, kl = triton_backend.token_logps(
        logits, labels, ref_logits, transform, ("kl",)
    )
    token_kl = TokenKL(ref_logits, ref_logps, ref_max, ref_log_sum, kl, grads[1], grads[0])

    def gradient(logits, out):
        triton_backend.logits_grad(logits, labels, *small, grads[0], transform, out, token_kl)
        return out

    expected = gradient(logits, torch.empty_like(logits))
    place = labels.unsqueeze(-1)
    late = logits.scatter(-1, place, expected.gather(-1, place))
    assert torch.equal(gradient(late, late), expected)


def test_rows_without_gradient_are_zeroed_without_being_read():
    logits = random_logits(1, 4, 1037, dtype=torch.bfloat16, seed=14)
    logits[:, [0, 2]] = math.nan
    labels = torch.tensor([[-100, 3, 9, 9]], device=DEVICE)
    grad_logps = torch.tensor([[1.0, 1.0, 0.0, 0.0]], dtype=torch.float64, device=DEVICE)
    gradient = backward(logits, labels, grad_logps)
    assert bool((gradient[:, [0, 2, 3]] == 0).all())
    assert bool(gradient[:, 1].isfinite().all())
    assert bool((gradient[:, 1] != 0).any())


def test_ignored_rows_give_zeros_whatever_they_hold():
    logits = random_logits(1, 3, 64, seed=15)
    logits[:, 1] = math.nan
    found = forward(logits, torch.tensor([[5, -100, 6]], device=DEVICE), logits, STATISTICS)
    for values in found.values():
        assert float(values[0, 1]) == 0.0
        assert bool(values.isfinite().all())


def test_a_label_outside_the_vocabulary_is_nan_and_nothing_is_read_for_it():
    logits = random_logits(1, 3, 64, seed=16)
    labels = torch.tensor([[64, -1, 6]], device=DEVICE)
    found = forward(logits, labels, logits, STATISTICS)
    for values in found.values():
        assert values.isnan().tolist() == [[True, True, False]]
    gradient = torch.empty_like(logits)
    ones = torch.ones(1, 3, dtype=torch.float64, device=DEVICE)
    triton_backend.logits_grad(logits, labels, found["logps"], found["max"], found["log_sum"], ones, PLAIN, gradient)
    assert gradient.isnan().all(-1).tolist() == [[True, True, False]]


@pytest.mark.parametrize("place", [0, 700, 1030])
def test_nan_and_infinity_stay_in_their_row(place):
    logits, ref_logits = (random_logits(1, 4, 1037, seed=s) for s in (17, 18))
    labels = torch.tensor([[5, 6, 7, 8]], device=DEVICE)
    clean = forward(logits, labels, ref_logits, STATISTICS)
    logits[0, 1, place], ref_logits[0, 2, place], logits[0, 3, place] = math.nan, math.nan, math.inf
    found = forward(logits, labels, ref_logits, STATISTICS)
    for name, values in found.items():
        assert float(values[0, 0]) == float(clean[name][0, 0])
    assert found["logps"].isnan().tolist() == [[False, True, False, True]]
    assert found["entropy"].isnan().tolist() == [[False, True, False, True]]
    assert found["accuracy"].isnan().tolist() == [[False, True, False, True]]
    assert found["ref_logps"].isnan().tolist() == [[False, False, True, False]]
    assert found["kl"].isnan().tolist() == [[False, True, True, True]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_minus_infinity_carries_no_mass(dtype):
    vocab = 3 * TILE[dtype] + 3
    logits, ref_logits = (random_logits(1, 3, vocab, dtype=dtype, seed=s) for s in (19, 20))
    banned = torch.zeros(vocab, dtype=torch.bool, device=DEVICE)
    banned[2::3] = True
    logits[:, :2, banned] = -math.inf
    ref_logits[:, 0, banned] = -math.inf
    ref_logits[:, 2, 1] = -math.inf
    labels = torch.tensor([[0, vocab - 1, 4]], device=DEVICE)
    labels -= banned[labels].long()
    found = forward(logits, labels, ref_logits, STATISTICS)
    # Row 0: banned in both. Row 1: possible under the reference only. Row 2: possible under the policy only.
    for name in ("logps", "entropy", "log_sum_sq"):
        check = truth_of(logits[..., ~banned][:, :2], (torch.cumsum(~banned, 0) - 1)[labels[:, :2]])
        torch.testing.assert_close(found[name][:, :2], check[name], rtol=1e-6, atol=1e-6)
    both = truth_of(logits[:, :1, ~banned], (torch.cumsum(~banned, 0) - 1)[labels[:, :1]], ref_logits[:, :1, ~banned])
    torch.testing.assert_close(found["kl"][:, :1], both["kl"], rtol=1e-6, atol=1e-6)
    p = logits[0, 1].double().softmax(-1)
    drift = (p * (logits[0, 1].double().log_softmax(-1) - ref_logits[0, 1].double().log_softmax(-1)))[p > 0].sum()
    torch.testing.assert_close(found["kl"][0, 1], drift, rtol=1e-6, atol=1e-6)
    assert math.isinf(float(found["kl"][0, 2]))
    assert found["mean_logits"].isinf().tolist() == [[True, True, False]]
    gradient = backward(logits, labels, torch.ones(1, 3, dtype=torch.float64, device=DEVICE))
    assert bool((gradient[:, :2, banned] == 0).all())


def test_ties_go_to_the_first_entry():
    vocab = 3 * TILE[torch.float32]
    logits = torch.zeros(1, 6, vocab, device=DEVICE)
    logits[..., 700] = logits[..., 1200] = 5.0
    logits[:, 4:] = 1.0  # everything ties
    labels = torch.tensor([[700, 1200, 699, 1201, 0, vocab - 1]], device=DEVICE)
    assert forward(logits, labels, statistics=("accuracy",))["accuracy"].tolist() == [[1.0, 0.0, 0.0, 0.0, 1.0, 0.0]]


@pytest.mark.parametrize("gap", [1.0, 20.0, 60.0, 90.0])
def test_a_nearly_certain_label_keeps_its_relative_precision(gap):
    """logp and the label's gradient 1 - p, where p rounds to 1 in float32 (or in float64)."""
    logits = random_logits(1, 2, 1037, seed=21, spread=0.5)
    labels = torch.tensor([[0, 1036]], device=DEVICE)
    logits.scatter_(-1, labels.unsqueeze(-1), gap)
    found = forward(logits, labels)
    others = logits.double().scatter(-1, labels.unsqueeze(-1), -math.inf).logsumexp(-1) - gap
    truth = -torch.log1p(others.exp())
    torch.testing.assert_close(found["logps"], truth, rtol=1e-6, atol=0.0)
    gradient = backward(logits, labels, torch.ones(1, 2, dtype=torch.float64, device=DEVICE))
    at_label = gradient.gather(-1, labels.unsqueeze(-1)).squeeze(-1).double()
    torch.testing.assert_close(at_label, -torch.expm1(truth), rtol=1e-6, atol=1e-44)


def test_large_logits_do_not_bias_the_log_sum():
    """The factor log2(e) is rounded. Relative to the maximum, this error affects small differences only."""
    logits = random_logits(1, 4, 1037, seed=22, spread=2.0)
    labels = torch.tensor([[1, 2, 3, 4]], device=DEVICE)
    moved = (logits + 4096.0).contiguous()
    found, truth = forward(moved, labels), truth_of(moved, labels)
    # 2^-22 is the error of one hardware exponential. Float32 numbers around 4,096 have a spacing of 5e-4.
    assert torch.equal(found["max"], truth["max"])
    lost = float((found["log_sum"] - truth["log_sum"]).abs().max())
    assert lost < 2**-22
    assert float((found["logps"] - truth["logps"]).abs().max()) < 2**-22
    eager = moved.logsumexp(-1).double()
    assert float((eager - truth["max"] - truth["log_sum"]).abs().max()) > 100 * lost


def test_a_row_does_not_feel_its_neighbours():
    logits = random_logits(3, 2, 1037, dtype=torch.bfloat16, seed=23)
    labels = torch.tensor([[5, 6], [-100, 7], [1036, 0]], device=DEVICE)
    together = triton_backend.token_logps(logits, labels, logits, PLAIN, STATISTICS)
    alone = triton_backend.token_logps(logits[2:], labels[2:], logits[2:], PLAIN, STATISTICS)
    assert torch.equal(together[:, 2:], alone)


# Stage 2 --------------------------------------------------------------------------------------------------------------


def pair_inputs(tokens=37, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logps, ref_logps = (-torch.rand(4, tokens, generator=generator, dtype=torch.float64) * 5 for _ in range(2))
    weights = torch.rand(4, tokens, generator=generator, dtype=torch.float64)
    weights[torch.rand(4, tokens, generator=generator) < 0.3] = 0.0
    logps[weights == 0] = math.nan
    beta = torch.tensor([0.1, 0.3], dtype=torch.float64)
    smoothing = torch.tensor([0.0, 0.2], dtype=torch.float64)
    return [t.to(DEVICE) for t in (logps, ref_logps, weights, beta, smoothing)]


@pytest.mark.parametrize("robust", [False, True])
def test_preference_loss_equals_its_formulas(robust):
    logps, ref_logps, weights, beta, e = pair_inputs()
    losses, sums, ref_sums, coef = triton_backend.preference_loss(
        logps, ref_logps, weights, None, None, beta, e, robust
    )
    expected = torch.where(weights != 0, weights * logps, 0.0).sum(-1).requires_grad_()
    expected_ref = (weights * ref_logps).sum(-1)
    chosen, rejected = (expected - expected_ref).chunk(2)
    x = beta * (chosen - rejected)
    right, wrong = -torch.nn.functional.logsigmoid(x), -torch.nn.functional.logsigmoid(-x)
    truth = ((1 - e) * right - e * wrong) / (1 - 2 * e) if robust else (1 - e) * right + e * wrong
    truth.sum().backward()
    for ours, theirs in ((losses, truth), (sums, expected), (ref_sums, expected_ref), (coef, expected.grad)):
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-13, atol=1e-14)


def test_preference_loss_with_given_reference_sums_and_without_a_reference():
    logps, _, weights, beta, e = pair_inputs()
    given = torch.tensor([-3.0, -1.0, -2.0, 0.5], dtype=torch.float64, device=DEVICE)
    _, sums, ref_sums, _ = triton_backend.preference_loss(logps, None, weights, None, given, beta, e, False)
    assert torch.equal(ref_sums, given)
    losses, _, ref_sums, _ = triton_backend.preference_loss(logps, None, weights, None, None, beta, e * 0, False)
    assert bool((ref_sums == 0).all())
    x = beta * (sums[:2] - sums[2:])
    torch.testing.assert_close(losses, torch.nn.functional.softplus(-x), rtol=1e-13, atol=0.0)


@pytest.mark.parametrize("robust", [False, True])
def test_equal_policy_and_reference_are_exactly_log_two(robust):
    logps, _, weights, beta, e = pair_inputs()
    losses, sums, ref_sums, coef = triton_backend.preference_loss(
        logps, logps.clone(), weights, None, None, beta, e, robust
    )
    assert torch.equal(sums, ref_sums)
    assert losses.tolist() == [math.log(2)] * 2
    if not robust:
        torch.testing.assert_close(
            coef, torch.cat([-beta / 2 * (1 - 2 * e), beta / 2 * (1 - 2 * e)]), rtol=1e-15, atol=0.0
        )


@pytest.mark.parametrize("margin", [-800.0, 800.0, math.inf, -math.inf])
def test_extreme_margins_give_limits_and_never_nan(margin):
    logps = torch.tensor([[margin], [0.0]], dtype=torch.float64, device=DEVICE)
    ones = torch.ones_like(logps)
    for smoothing, expected in (
        (0.0, max(-margin, 0.0)),
        (1.0, max(margin, 0.0)),
        (0.25, abs(margin) * (0.25 if margin > 0 else 0.75)),
    ):
        e = torch.tensor([smoothing], dtype=torch.float64, device=DEVICE)
        losses, _, _, coef = triton_backend.preference_loss(logps, None, ones, None, None, ones[0], e, False)
        assert losses.item() == expected
        assert coef.tolist() == [
            (smoothing if margin > 0 else smoothing - 1),
            -(smoothing if margin > 0 else smoothing - 1),
        ]


def test_sums_do_not_feel_padding_or_packing():
    """2,500 tokens need more than two chunks of the kernel. Tokens of weight 0 shift them left, right and apart."""
    generator = torch.Generator().manual_seed(3)
    values, weights = (torch.rand(2, 2500, generator=generator, dtype=torch.float64).to(DEVICE) for _ in range(2))
    weights[0, 1000:1007] = 0.0
    expected = triton_backend.sequence_sums(values, weights, None)
    torch.testing.assert_close(expected, (values * weights).sum(-1), rtol=1e-13, atol=0.0)
    place = torch.arange(2500) + 3 + 40 * (torch.arange(2500) > 900) + torch.arange(2500) // 10
    for fill in (0.0, math.nan):
        wide_values = torch.full((2, 2900), fill, dtype=torch.float64, device=DEVICE)
        wide_weights = torch.zeros(2, 2900, dtype=torch.float64, device=DEVICE)
        wide_values[:, place], wide_weights[:, place] = values, weights
        assert torch.equal(triton_backend.sequence_sums(wide_values, wide_weights, None), expected)
    bounds = torch.tensor([0, 2500, 2500, 5000], device=DEVICE)
    packed = triton_backend.sequence_sums(values.reshape(1, -1), weights.reshape(1, -1), bounds)
    assert torch.equal(packed[[0, 2]], expected)
    assert float(packed[1]) == 0.0


@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
def test_empty_inputs(shape):
    logits = torch.empty(*shape, 17, device=DEVICE)
    labels = torch.empty(shape, dtype=torch.int64, device=DEVICE)
    found = triton_backend.token_logps(logits, labels, logits, PLAIN, STATISTICS)
    assert found.shape == (len(NAMES), *shape)
    nothing = torch.empty(shape, dtype=torch.float64, device=DEVICE)
    triton_backend.logits_grad(logits, labels, *[nothing] * 4, PLAIN, logits)
    sums = triton_backend.sequence_sums(nothing, nothing, None)
    assert sums.tolist() == [0.0] * shape[0]


def test_backend_says_why_it_does_not_serve_a_device(monkeypatch):
    module = sys.modules["dpo_kernels.backends.triton"]
    monkeypatch.setattr(module.INTERPRETED, "value", False)
    with pytest.raises(backends.BackendUnavailable, match="CUDA tensors, not on cpu ones"):
        module.check_available("cpu")


@pytest.mark.skipif(DEVICE == "cuda", reason="the GPU's compiler contracts products and sums itself")
@pytest.mark.parametrize("first", ["left", "right"])
@pytest.mark.parametrize("vocab", [33, 700])
def test_right_whichever_product_a_compiler_joins_with_a_sum(first, vocab):
    """In rows shorter than a tile, some lanes hold FLOOR. There the rounding error of a product is 10^17."""
    logits, ref_logits = random_logits(1, 3, vocab), random_logits(1, 3, vocab, seed=1)
    labels = torch.randint(0, vocab, (1, 3), device=DEVICE)
    with fused_products(first):
        found = forward(logits, labels, ref_logits, STATISTICS)
    check_forward(found, logits, labels, ref_logits, NAMES)
