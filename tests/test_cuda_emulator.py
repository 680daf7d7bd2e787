"""The CUDA sources, run on a CPU by tests/cuda_emulator, compared with the eager backend in float64.

The error of an output may be at most the error of eager float32 on the same input (the largest over the batch), plus four
units of float32 rounding relative to the value, because on a few numbers eager may be exact by chance.
"""

from __future__ import annotations

import gc
import math
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import test_compile
import test_objectives_kl
import test_operators
import torch
from bad_bounds import bad_bounds, clamped_sums
from cuda_emulator import SANITIZERS, Emulator, EmulatorError, Order, build, serve_backend
from torch import Tensor

from dpo_kernels import dpo_loss, use_backend
from dpo_kernels.backends import cuda, eager, whole_call
from dpo_kernels.backends.whole_call import REDUCTIONS, Family, Weighting, reduce
from dpo_kernels.stages import STATISTICS, Stages, TokenKL, Transform, rising_bounds, token_rows

from cases import CASES, make_inputs

IGNORE = -100
PLAIN = Transform()
NO_KL = ("entropy", "accuracy", "mean_logits", "log_sum_sq")
# Each compiled variant of the kernel: without log_sum_sq, with it alone, and with it and other statistics.
VARIANTS = [
    (),
    STATISTICS,
    NO_KL,
    ("kl",),
    ("entropy", "kl", "accuracy", "mean_logits"),
    ("entropy", "accuracy", "mean_logits"),
    ("log_sum_sq",),
]
with_and_without_kl = pytest.mark.parametrize("statistics", [STATISTICS, NO_KL], ids=["kl", "no kl"])
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SCHEDULES = [
    {"order": Order.FORWARD},
    {"order": Order.REVERSE, "clusters": False},
    {"order": Order.RANDOM, "seed": 1, "resident": 5},
    {"order": Order.RANDOM, "seed": 2, "sm_count": 1},
    # An H100 that runs PTX of compute_80: the device supports clusters, but the code does not use them.
    {"order": Order.FORWARD, "code_arch": 80},
]
# 1: only the label. 7: no whole 16-byte group. 8, 16: groups only. 33: head, groups and tail. 1000: one partial tile.
# 5003: odd, so every row starts at a different alignment. 16384, 20000: several tiles, 256 threads for each row.
VOCABS = [1, 7, 8, 16, 33, 1000, 5003, 16384, 20000]


@pytest.fixture(scope="module")
def library() -> Path:
    return build()


def make(seed: int, shape: tuple[int, ...], dtype: torch.dtype, scale: float = 3.0) -> tuple[Tensor, Tensor, Tensor]:
    """(logits, reference near them, labels with one ignored token)."""
    g = torch.Generator().manual_seed(seed)
    logits = (torch.randn(shape, generator=g) * scale).to(dtype)
    ref = (logits.float() + torch.randn(shape, generator=g) * 0.3).to(dtype)
    labels = torch.randint(0, shape[-1], shape[:-1], generator=g)
    if labels.numel() > 1:
        labels[0, 0] = IGNORE
    return logits, ref, labels


def assert_within_eager(
    ours: Tensor,
    logits: Tensor,
    labels: Tensor,
    ref: Tensor | None,
    statistics: tuple[str, ...],
    transform: Transform = PLAIN,
) -> None:
    truth = eager.token_logps(logits.double(), labels, None if ref is None else ref.double(), transform, statistics)
    lost = eager.token_logps(logits, labels, ref, transform, statistics)
    assert ours.shape == truth.shape
    for name, mine, true, theirs in zip(token_rows(ref is not None, statistics), ours, truth, lost, strict=True):
        assert torch.equal(mine.isnan(), true.isnan()), name
        finite = true.isfinite()
        torch.testing.assert_close(mine[~finite], true[~finite], rtol=0, atol=0, equal_nan=True)
        if not finite.any():
            continue
        budget = (theirs - true)[finite].nan_to_num(0.0).abs().max() + 4 * 2**-24 * true[finite].abs().clamp(min=1.0)
        error = (mine - true)[finite].abs()
        assert (error <= budget).all(), f"{name}: {error.max():.2e} over a budget of {budget.min():.2e}"


# ---- The emulator itself ----


def self_test(library: Path, which: int, n: int, **schedule: object) -> Tensor:
    values = torch.arange(n * 256, dtype=torch.float32)
    out = torch.zeros(max(n, 64) + 1)
    Emulator(library, **schedule).call("emu_self_test", which, _pointer(values), _pointer(out), n)
    return out


def _pointer(tensor: Tensor):
    import ctypes

    return ctypes.c_void_p(tensor.data_ptr())


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_shuffles_barriers_static_and_dynamic_shared_memory(library, schedule):
    out = self_test(library, 0, 5, **schedule)
    expected = torch.arange(5 * 256, dtype=torch.float64).reshape(5, 256).sum(1)
    assert torch.equal(out[:5].double(), expected)


def test_a_missing_barrier_gives_wrong_sums(library):
    wrong = 0
    for schedule in [{"order": Order.FORWARD}, {"order": Order.RANDOM, "seed": 0}, {"order": Order.RANDOM, "seed": 1}]:
        out = self_test(library, 1, 5, **schedule)
        expected = torch.arange(5 * 256, dtype=torch.float64).reshape(5, 256).sum(1)
        wrong += not torch.equal(out[:5].double(), expected)
    assert wrong == 3


@pytest.mark.parametrize("schedule", SCHEDULES[:4])
def test_blocks_of_a_cluster_reach_the_leaders_shared_memory(library, schedule):
    assert self_test(library, 2, 3, **schedule)[:3].tolist() == [10.0] * 3


def test_divergent_warp_operations_are_refused(library):
    with pytest.raises(EmulatorError, match="different operations"):
        self_test(library, 3, 1)


def test_a_deadlock_is_reported(library):
    with pytest.raises(EmulatorError, match="deadlock"):
        self_test(library, 4, 1)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_exactly_one_block_is_last(library, schedule):
    out = self_test(library, 5, 9, **schedule)
    assert out[0] == 9.0


# ---- Stage 1 ----


@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_token_logps_against_float64(library, dtype, vocab):
    logits, ref, labels = make(vocab, (2, 3, vocab), dtype)
    for i, statistics in enumerate(VARIANTS):
        em = Emulator(library, **SCHEDULES[i % len(SCHEDULES)])
        ours = em.token_logps(logits, labels, ref, PLAIN, statistics)
        assert_within_eager(ours, logits, labels, ref, statistics)


@pytest.mark.parametrize("name", NO_KL)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_statistic_alone(library, dtype, name):
    logits, _, labels = make(3, (2, 2, 999), dtype)
    ours = Emulator(library).token_logps(logits, labels, None, PLAIN, (name,))
    assert_within_eager(ours, logits, labels, None, (name,))


@pytest.mark.parametrize("ref_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@with_and_without_kl
def test_reference_of_another_dtype(library, dtype, ref_dtype, statistics):
    logits, ref, labels = make(5, (2, 2, 2600), dtype)
    ref = ref.to(ref_dtype)
    ours = Emulator(library, order=Order.RANDOM, seed=4).token_logps(logits, labels, ref, PLAIN, statistics)
    assert_within_eager(ours, logits, labels, ref, statistics)


@with_and_without_kl
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scale_and_softcap(library, dtype, statistics):
    logits, ref, labels = make(6, (2, 2, 1500), dtype, scale=20.0)
    for scale, cap in [(0.25, 0.0), (3.0, 0.0), (1.0, 30.0), (0.5, 5.0)]:
        transform = Transform(scale=scale, softcap=cap)
        for asked in (statistics, statistics[:-1]):  # with and without log_sum_sq
            ours = Emulator(library).token_logps(logits, labels, ref, transform, asked)
            assert_within_eager(ours, logits, labels, ref, asked, transform)


@with_and_without_kl
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_views_and_misaligned_references_are_read_in_place(library, dtype, statistics):
    vocab = 1003
    whole, ref, labels = make(7, (2, 4, vocab), dtype)
    logits, labels, ref = whole[:, :-1], labels[:, :-1].contiguous(), ref[:, 1:]
    plain = Emulator(library).token_logps(logits.contiguous(), labels, ref.contiguous(), PLAIN, statistics)
    views = Emulator(library).token_logps(logits, labels, ref, PLAIN, statistics)
    assert_within_eager(views, logits, labels, ref, statistics)
    wide = torch.full((2, 4, vocab + 5), float("nan"), dtype=dtype)
    wide[..., 3 : vocab + 3] = whole  # the values around are NaN, so that a read out of bounds shows
    inside = Emulator(library).token_logps(wide[:, :-1, 3 : vocab + 3], labels, ref, PLAIN, statistics)
    assert_within_eager(inside, logits, labels, ref, statistics)
    assert torch.equal(plain, views)


def at_every_offset(row: Tensor, step: int) -> Tensor:
    """[1, 16, V]: sixteen copies of one row; copy t starts step * t elements after a 16-byte boundary."""
    stride = -(-row.numel() // 16) * 16 + 16 + step
    flat = torch.full(
        (16 * stride,), float("nan"), dtype=row.dtype
    )  # the values around are NaN, so that a read out of bounds shows
    copies = flat.as_strided((1, 16, row.numel()), (0, stride, 1))
    copies.copy_(row)
    return copies


# 33, 1000: a partial tile. 4097, 5003: a last group of one and of three logits. 16391: full tiles and an incomplete group.
@pytest.mark.parametrize("vocab", [5, 33, 1000, 4097, 5003, 16391])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_do_not_depend_on_the_rows_address(library, dtype, vocab):
    logits, ref, _ = make(vocab, (1, 1, vocab), dtype)
    policy, reference = at_every_offset(logits[0, 0], 1), at_every_offset(ref[0, 0], 3)
    assert len({policy[0, t].data_ptr() % 32 for t in range(16)}) == 32 // policy.itemsize
    other = torch.float32 if dtype == torch.bfloat16 else torch.bfloat16
    mixed = at_every_offset(ref[0, 0].to(other), 5)
    for label in (0, vocab // 2, vocab - 1):
        labels = torch.full((1, 16), label)
        for second, statistics in [
            (None, ()),
            (None, NO_KL),
            (reference, STATISTICS),
            (reference, NO_KL),
            (mixed, STATISTICS),
        ]:
            ours = Emulator(library).token_logps(policy, labels, second, PLAIN, statistics)
            for name, values in zip(token_rows(second is not None, statistics), ours, strict=True):
                assert values.isfinite().all(), name
                assert (values == values[0, 0]).all(), f"{name}, label {label}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_minus_infinity_costs_no_bit_of_the_log_probabilities(library, dtype):
    """The moments of such rows need a second pass, which must not change the result of the first pass."""
    logits, ref, labels = make(17, (2, 3, 9001), dtype)
    for masked in (slice(8900, None), slice(2000, 7000), slice(0, None, 2)):
        x, y = logits.clone(), ref.clone()
        x[..., masked] = y[..., masked] = float("-inf")
        x.scatter_(-1, labels.clamp(min=0).unsqueeze(-1), 1.0)
        y.scatter_(-1, labels.clamp(min=0).unsqueeze(-1), 0.5)
        plain = Emulator(library).token_logps(x, labels, y, PLAIN, ())
        for schedule in SCHEDULES[:3]:
            ours = Emulator(library, **schedule).token_logps(x, labels, y, PLAIN, STATISTICS)
            assert torch.equal(ours[:4], plain)
        assert_within_eager(ours, x, labels, y, STATISTICS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_do_not_depend_on_schedule_cluster_neighbours_or_statistics(library, dtype):
    logits, ref, labels = make(8, (3, 2, 9000), dtype)
    plain = Emulator(library).token_logps(logits, labels, ref, PLAIN, ())
    for statistics in VARIANTS[1:]:
        first = Emulator(library).token_logps(logits, labels, ref, PLAIN, statistics)
        # The bits must not depend on the requested statistics either, so that a precomputed reference gives rewards of 0.
        own = [
            row for row, name in zip(first, token_rows(True, statistics), strict=True) if name in token_rows(True, ())
        ]
        assert torch.equal(torch.stack(own), plain)
        for schedule in SCHEDULES:
            again = Emulator(library, **schedule).token_logps(logits, labels, ref, PLAIN, statistics)
            assert torch.equal(first, again), schedule
        alone = Emulator(library).token_logps(logits[2:], labels[2:].contiguous(), ref[2:], PLAIN, statistics)
        assert torch.equal(first[:, 2:], alone)


def test_plan_uses_clusters_for_few_rows_and_always_the_same_threads_per_row(library):
    many, few, old = Emulator(library), Emulator(library), Emulator(library, clusters=False)
    for vocab in (1, 1000, 32000, 50257, 128256, 262144):
        for size in (8, 16, 32):
            threads, blocks = many.plan_rows(100_000, vocab, size)
            assert blocks == 1
            assert few.plan_rows(4, vocab, size)[0] == old.plan_rows(4, vocab, size)[0] == threads
            assert old.plan_rows(4, vocab, size)[1] == 1
            assert 64 <= threads <= 256
    assert few.plan_rows(4, 128256, 32) == (256, 4)


def test_minus_infinity_is_legal_off_the_label(library):
    for dtype in DTYPES:
        logits, ref, labels = make(9, (2, 4, 700), dtype)
        labels[0, 0] = 5
        others = torch.ones(700, dtype=torch.bool)
        logits[..., 100:300] = float("-inf")
        ref[..., 200:400] = float(
            "-inf"
        )  # -inf in both at 200:300; in the reference only at 300:400, which makes the KL infinite
        ref[1] = logits[1]  # row 1: same support, finite KL
        labels.copy_(torch.tensor([[5, 50, 450, 699], [0, 99, 300, 600]]))
        # In this row only the label has a positive probability.
        others[600] = False
        logits[1, 3, others] = float("-inf")
        ref[1, 3, others] = float("-inf")
        for schedule in SCHEDULES[:2]:
            ours = Emulator(library, **schedule).token_logps(logits, labels, ref, PLAIN, STATISTICS)
            assert_within_eager(ours, logits, labels, ref, STATISTICS)
            assert ours[7][0].isposinf().all()
            assert ours[7][1].isfinite().all()


def test_infinite_kl_is_seen_where_the_policys_probability_underflows(library):
    logits, ref = torch.zeros(1, 1, 64), torch.zeros(1, 1, 64)
    logits[..., 7] = -300.0  # exp(-300) is 0 in float32, but truly positive
    ref[..., 7] = float("-inf")
    labels = torch.zeros(1, 1, dtype=torch.int64)
    assert Emulator(library).token_logps(logits, labels, ref, PLAIN, STATISTICS)[7].item() == math.inf


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_stays_in_its_row(library, bad):
    logits, ref, labels = make(10, (2, 3, 900), torch.bfloat16)
    clean = Emulator(library).token_logps(logits, labels, ref, PLAIN, STATISTICS)
    logits[1, 1, 17] = bad
    ref[1, 2, 800] = float("nan")
    ours = Emulator(library).token_logps(logits, labels, ref, PLAIN, STATISTICS)
    for name, a, b in zip(token_rows(True, STATISTICS), ours, clean, strict=True):
        if name.startswith("ref_"):
            assert a[1, 2].isnan()
        elif not (name == "mean_logits" and bad == math.inf):
            assert a[1, 1].isnan(), name
        a[1, 1:], b[1, 1:] = 0.0, 0.0
        assert torch.equal(a, b), name
    assert ours.shape[1:] == labels.shape


def test_labels_outside_the_vocabulary_give_nan_and_touch_nothing(library):
    logits, ref, labels = make(11, (2, 3, 70), torch.float32)
    labels[1] = torch.tensor([70, -1, 2**40])
    for statistics in (STATISTICS, NO_KL):
        ours = Emulator(library).token_logps(logits, labels, ref, PLAIN, statistics)
        assert ours[:, 1].isnan().all()
        assert ours[:, 0].isfinite().all()


def test_unscored_rows_are_never_read(library):
    logits, ref, labels = make(12, (2, 3, 500), torch.bfloat16)
    labels[:, 1] = IGNORE
    logits[:, 1], ref[:, 1] = float("nan"), float("nan")
    for statistics in (STATISTICS, NO_KL):
        ours = Emulator(library).token_logps(logits, labels, ref, PLAIN, statistics)
        assert (ours[:, :, 1] == 0).all()


def test_accuracy_gives_ties_to_the_first(library):
    # 9000 logits: ties within a thread, across threads and across blocks of a cluster.
    logits = torch.zeros(1, 6, 9000, dtype=torch.bfloat16)
    labels = torch.tensor([[0, 1, 8999, 4000, 100, 4500]])
    logits[0, 3, [4000, 4001, 8000]] = 2.0  # the label is the first of three maxima
    logits[0, 4, [99, 100]] = 2.0  # the label comes second
    logits[0, 5, 4500] = 2.0
    for schedule in SCHEDULES:
        *_, accuracy = Emulator(library, **schedule).token_logps(logits, labels, None, PLAIN, ("accuracy",))
        assert accuracy.tolist() == [[1.0, 0.0, 0.0, 1.0, 0.0, 1.0]]


@pytest.mark.parametrize("gap", [10.0, 16.0, 24.0, 80.0])
def test_logp_keeps_its_precision_when_the_label_is_almost_certain(library, gap):
    g = torch.Generator().manual_seed(1)
    logits = torch.randn(1, 3, 4096, generator=g)
    labels = torch.tensor([[3, 1000, 4095]])
    logits.scatter_(-1, labels.unsqueeze(-1), gap + 8.0)
    ours = Emulator(library).token_logps(logits, labels, logits, PLAIN, STATISTICS)
    truth = eager.token_logps(logits.double(), labels, logits.double(), PLAIN, STATISTICS)
    assert ((ours[0] - truth[0]).abs() <= 4e-7 * truth[0].abs() * (1 + gap / 10)).all()
    assert ((ours[6] - truth[6]).abs() <= 1e-6 * truth[6].abs() * (1 + gap / 10)).all()
    assert (ours[7] == 0).all()


def test_policy_equal_to_reference_has_no_divergence(library):
    for dtype in DTYPES:
        logits, _, labels = make(13, (2, 3, 3000), dtype)
        ours = Emulator(library).token_logps(logits, labels, logits.clone(), PLAIN, STATISTICS)
        assert torch.equal(ours[0], ours[3])
        assert (ours[7] == 0).all()


@pytest.mark.parametrize("offset", [-1e4, 1e4])
def test_large_common_offsets(library, offset):
    logits, ref, labels = make(14, (1, 3, 2000), torch.float32)
    logits, ref = logits + offset, ref + offset
    ours = Emulator(library).token_logps(logits, labels, ref, PLAIN, STATISTICS)
    assert_within_eager(ours, logits, labels, ref, STATISTICS)


def test_empty_inputs_launch_nothing(library):
    em = Emulator(library)
    before = em.launches()
    for shape in [(0, 4, 10), (2, 0, 10)]:
        logits = torch.zeros(shape)
        labels = torch.zeros(shape[:2], dtype=torch.int64)
        em.token_logps(logits, labels, logits, PLAIN, STATISTICS)
        em.logits_grad(logits, labels, *[torch.zeros(shape[:2], dtype=torch.float64)] * 4, PLAIN, logits)
    assert em.launches() == before


def test_rows_lie_further_apart_than_32_bits_count(library):
    """2^31 elements between the rows. The memory is allocated, but only the rows are accessed."""
    near, ref, labels = make(15, (2, 1, 700), torch.bfloat16)
    stride = 2**31 + 24
    far = torch.empty(stride + 700, dtype=torch.bfloat16).as_strided((2, 1, 700), (stride, 700, 1))
    far.copy_(near)
    expected = Emulator(library).token_logps(near, labels, ref, PLAIN, STATISTICS)
    assert torch.equal(Emulator(library).token_logps(far, labels, ref, PLAIN, STATISTICS), expected)
    ones = torch.ones(2, 1, dtype=torch.float64)
    for logits in (near, far):
        Emulator(library).logits_grad(logits, labels, *expected[:3], ones, PLAIN, logits)
    assert torch.equal(far, near)


# ---- Stage 2 ----


def pairs(count: int) -> tuple[Tensor, Tensor]:
    return torch.full((count,), 0.1, dtype=torch.float64), torch.zeros(count, dtype=torch.float64)


def token_values(seed: int, batch: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    logps = -torch.rand(batch, tokens, generator=g, dtype=torch.float64) * 5
    refs = logps + torch.randn(batch, tokens, generator=g, dtype=torch.float64) * 0.1
    weights = (torch.rand(batch, tokens, generator=g) < 0.7).double() * torch.rand(batch, tokens, generator=g).double()
    return logps, refs, weights


@pytest.mark.parametrize("robust", [False, True])
@pytest.mark.parametrize("tokens", [1, 31, 32, 33, 300])
@pytest.mark.parametrize("reference", ["tokens", "sums", "none"])
def test_preference_loss_against_float64(library, tokens, robust, reference):
    count = 3
    logps, refs, weights = token_values(tokens, 2 * count, tokens)
    beta = torch.tensor([0.1, 0.5, 5.0], dtype=torch.float64)
    smoothing = torch.tensor([0.0, 0.1, 0.3], dtype=torch.float64)
    ref_sums = (refs * weights).sum(-1) if reference == "sums" else None
    args = (logps, refs if reference == "tokens" else None, weights, None, ref_sums, beta, smoothing, robust)
    size = (weights * (logps.abs() + refs.abs())).sum(-1).max()
    bound = (tokens + 8) * 2**-53 * size * beta.max() * (2 if robust else 1)
    for schedule in SCHEDULES:
        ours = Emulator(library, **schedule).preference_loss(*args)
        for mine, true in zip(ours, eager.preference_loss(*args), strict=True):
            # The two sum in different orders. Each addition may have an error of half a unit in the last place.
            assert ((mine - true).abs() <= bound).all()


def test_loss_is_exactly_log2_when_policy_equals_reference(library):
    logps, _, weights = token_values(2, 4, 50)
    beta = torch.tensor([0.1, 0.7], dtype=torch.float64)
    smoothing = torch.tensor([0.0, 0.25], dtype=torch.float64)
    losses, sums, ref_sums, coef = Emulator(library).preference_loss(
        logps, logps.clone(), weights, None, None, beta, smoothing, False
    )
    assert losses.tolist() == [math.log(2)] * 2
    assert torch.equal(sums, ref_sums)
    assert torch.equal(coef, torch.cat([-beta / 2 * (1 - 2 * smoothing), beta / 2 * (1 - 2 * smoothing)]))


def pack(values: Tensor, lengths: list[int]) -> Tensor:
    rows = [row[:n] for row, n in zip(values, lengths, strict=True)]
    return torch.cat([values[:0].flatten(0, 1), *rows]).unsqueeze(0)


def test_sums_do_not_see_padding(library):
    """Left, right and interior padding, and packing, give the same bits."""
    lengths = [40, 1, 100, 64]
    logps, refs, weights = token_values(3, 4, 100)
    for row, n in enumerate(lengths):
        weights[row, n:] = 0.0
    beta, smoothing = pairs(2)
    right = Emulator(library).preference_loss(logps, refs, weights, None, None, beta, smoothing, False)
    left = [torch.stack([row.roll(100 - n) for row, n in zip(t, lengths, strict=True)]) for t in (logps, refs, weights)]
    spread = [torch.zeros(4, 300, dtype=torch.float64) for _ in range(3)]
    for wide, narrow in zip(spread, (logps, refs, weights), strict=True):
        wide[:, ::3] = narrow
    spread[0][:, 1::3] = float("nan")  # tokens of weight 0 may hold anything
    cu = torch.tensor([0, *lengths]).cumsum(0)
    for args in (
        (left[0], left[1], left[2], None),
        (spread[0], spread[1], spread[2], None),
        (pack(logps, lengths), pack(refs, lengths), pack(weights, lengths), cu),
    ):
        other = Emulator(library).preference_loss(*args, None, beta, smoothing, False)
        assert all(torch.equal(a, b) for a, b in zip(right, other, strict=True))
    sums = Emulator(library).sequence_sums(pack(logps, lengths), pack(weights, lengths), cu)
    assert torch.equal(sums, right[1])


# 1,200 tokens need several steps, so that each of the 256 partial sums is used more than once.
def test_the_sum_of_a_long_sequence_does_not_see_padding(library):
    logps, _, weights = token_values(4, 1, 1200)
    keep = weights[0] != 0
    bounds = [0, 1193, 1200]
    compact = torch.tensor([int(keep[:bound].sum()) for bound in bounds])
    em = Emulator(library, order=Order.RANDOM, seed=8)
    sums = em.sequence_sums(logps, weights, torch.tensor(bounds))
    assert torch.equal(sums, em.sequence_sums(logps[:, keep].contiguous(), weights[:, keep].contiguous(), compact))
    torch.testing.assert_close(sums, clamped_sums(logps, weights, bounds), rtol=1e-14, atol=0)


# 9 tokens: shorter than a warp. 70: sequences of several warps.
@pytest.mark.parametrize(
    ("count", "bounds"), [pytest.param(n, b, id=f"{n}, {name}") for n in (9, 70) for name, b in bad_bounds(n)]
)
def test_bad_bounds_are_clamped(library, count, bounds):
    """The host cannot check bounds on a GPU without waiting for it."""
    logps, refs, weights = token_values(22, 1, count)
    cu = torch.tensor(bounds)
    for schedule in SCHEDULES:
        em = Emulator(library, **schedule)
        _, sums, ref_sums, _ = em.preference_loss(logps, refs, weights, cu, None, *pairs(2), False)
        assert torch.equal(em.sequence_sums(logps, weights, cu), sums)
        for mine, values in ((sums, logps), (ref_sums, refs)):
            torch.testing.assert_close(mine, clamped_sums(values, weights, bounds), rtol=1e-13, atol=1e-13)


# ---- Stage 3 ----


def gradient(
    stages: Stages, logits: Tensor, labels: Tensor, g: Tensor, out: Tensor, transform: Transform = PLAIN
) -> None:
    small = eager.token_logps(logits.double(), labels, None, transform, ())
    stages.logits_grad(logits, labels, *small, g, transform, out)


def split_errors(mine: Tensor, truth: Tensor, labels: Tensor) -> tuple[float, float]:
    """Relative errors of the labels' entries and of all other entries, each relative to its own norm."""
    at_label = torch.zeros(truth.shape, dtype=torch.bool)
    live = labels != IGNORE
    at_label.scatter_(-1, labels.clamp(min=0).unsqueeze(-1), live.unsqueeze(-1))
    errors = []
    for chosen in (at_label, ~at_label):
        size = truth[chosen].norm()
        errors.append(((mine.double() - truth)[chosen].norm() / size).item() if size > 0 else 0.0)
    return errors[0], errors[1]


# Rounding to the output dtype has an error of up to half a unit in the last place. The arithmetic may add the same again.
UNIT = {torch.float32: 2**-23, torch.bfloat16: 2**-8, torch.float16: 2**-11}


@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_grad_against_float64(library, dtype, vocab):
    logits, _, labels = make(vocab, (2, 3, vocab), dtype)
    g = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    g[1, 2] = 0.0
    truth = torch.empty(logits.shape, dtype=torch.float64)
    gradient(eager, logits.double(), labels, g, truth)
    eager32 = torch.empty_like(logits)
    gradient(eager, logits, labels, g, eager32)
    lost = split_errors(eager32, truth, labels)
    for schedule, in_place in zip(SCHEDULES, (False, True, False, True, True), strict=True):
        x = logits.clone()
        x[1, 2] = float("nan")  # rows without a gradient are written, not read
        out = x if in_place else torch.full_like(logits, float("nan"))
        gradient(Emulator(library, **schedule), x, labels, g, out)
        mine = split_errors(out, truth, labels)
        # For 16-bit subnormals the relative error is larger, in eager too.
        for part, eager_part in zip(mine, lost, strict=True):
            assert part <= 2 * max(eager_part, UNIT[dtype])
        assert (out[0, 0] == 0).all()
        assert (out[1, 2] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_of_scaled_and_capped_logits(library, dtype):
    logits, _, labels = make(30, (2, 2, 777), dtype, scale=10.0)
    g = torch.ones(2, 2, dtype=torch.float64)
    for scale, cap in [(0.5, 0.0), (1.0, 20.0), (2.0, 30.0)]:
        transform = Transform(scale=scale, softcap=cap)
        truth = torch.empty(logits.shape, dtype=torch.float64)
        gradient(eager, logits.double(), labels, g, truth, transform)
        eager32 = torch.empty_like(logits)
        gradient(eager, logits, labels, g, eager32, transform)
        out = logits.clone()
        gradient(Emulator(library), out, labels, g, out, transform)
        for part, lost in zip(split_errors(out, truth, labels), split_errors(eager32, truth, labels), strict=True):
            assert part <= 2 * max(lost, UNIT[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_into_memory_of_another_alignment(library, dtype):
    vocab = 1003
    logits, _, labels = make(31, (2, 4, vocab), dtype)
    view, labels = logits[:, :-1], labels[:, :-1].contiguous()
    g = torch.ones(2, 3, dtype=torch.float64)
    plain = torch.empty(2, 3, vocab, dtype=dtype)
    gradient(Emulator(library), view.contiguous(), labels, g, plain)
    for offset in range(1, 9):
        frame = torch.full((2, 3, vocab + 16), 7.0, dtype=dtype)
        out = frame[..., offset : offset + vocab]
        gradient(Emulator(library), view, labels, g, out)
        assert torch.equal(out, plain)
        assert (frame[..., :offset] == 7).all()
        assert (frame[..., offset + vocab :] == 7).all()


def test_gradient_bits_do_not_depend_on_how_many_blocks_share_a_row(library):
    logits, _, labels = make(32, (2, 2, 20000), torch.bfloat16)
    g = torch.ones(2, 2, dtype=torch.float64)
    results = []
    for sm_count in (1, 4, 132):
        out = torch.empty_like(logits)
        gradient(Emulator(library, sm_count=sm_count, order=Order.RANDOM), logits, labels, g, out)
        results.append(out)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_illegal_labels_and_nan_rows_give_nan_rows(library):
    logits, _, labels = make(33, (1, 3, 100), torch.float32)
    labels[0] = torch.tensor([100, 5, 6])
    nan, g = torch.full((1, 3), float("nan"), dtype=torch.float64), torch.ones(1, 3, dtype=torch.float64)
    small = eager.token_logps(logits.double(), labels.clamp(max=99), None, PLAIN, ())
    small[:, 0, :2] = nan[0, :2]
    out = torch.zeros_like(logits)
    Emulator(library).logits_grad(logits, labels, *small, g, PLAIN, out)
    assert out[0, :2].isnan().all()
    assert out[0, 2].isfinite().all()


def test_label_gradient_when_the_label_is_almost_certain(library):
    """Here p(label) - 1 would be 0, or wrong by 100 %, because of cancellation."""
    logits = torch.randn(1, 2, 600, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[4, 599]])
    logits.scatter_(-1, labels.unsqueeze(-1), 25.0)
    g = torch.ones(1, 2, dtype=torch.float64)
    truth, out = torch.empty(1, 2, 600, dtype=torch.float64), torch.empty_like(logits)
    gradient(eager, logits.double(), labels, g, truth)
    gradient(Emulator(library), logits, labels, g, out)
    assert max(split_errors(out, truth, labels)) < 4e-6


# ---- Stage 3 with token-level divergences ----


def divergence_gradient(
    em: Emulator, logits: Tensor, ref: Tensor, labels: Tensor, out: Tensor, grads: tuple[float | None, float | None]
) -> Tensor:
    """Write the gradient into `out`, for g = 0.7 and gradients `grads` of KL(policy || reference), KL(reference || policy)."""
    *small, ref_logps, ref_max, ref_log_sum, kl = Emulator().token_logps(logits, labels, ref, PLAIN, ("kl",))
    by = [None if g is None else torch.full_like(kl, g) for g in grads]
    token_kl = TokenKL(ref, ref_logps, ref_max, ref_log_sum, kl, *by)
    em.logits_grad(logits, labels, *small, torch.full_like(kl, 0.7), PLAIN, out, token_kl)
    return out


@pytest.mark.parametrize("ref_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_divergences_of_every_dtype_from_every_address_in_and_out_of_place(library, dtype, ref_dtype):
    """The bits do not depend on the alignment of logits, reference and gradient, or on the number of blocks per row."""
    vocab = 9001
    logits, ref, labels = make(34, (1, 3, vocab), dtype)
    ref = ref.to(ref_dtype)
    labels[0] = torch.tensor([0, vocab - 1, 4444])
    for grads in ((0.4, None), (None, -0.3), (0.4, -0.3)):
        plain = divergence_gradient(Emulator(library), logits, ref, labels, torch.empty_like(logits), grads)
        truth = test_objectives_kl.divergences(logits.double(), ref.double(), labels, (0.7, *grads))
        eager32 = test_objectives_kl.divergences(logits.float(), ref.float(), labels, (0.7, *grads)).to(dtype)
        for part, lost in zip(split_errors(plain, truth, labels), split_errors(eager32, truth, labels), strict=True):
            assert part <= 2 * max(lost, UNIT[dtype])
        for offset, schedule in zip((1, 2, 3, 5), SCHEDULES[:4], strict=True):
            frames = [torch.full((1, 3, vocab + 16), 7.0, dtype=d) for d in (dtype, ref_dtype, dtype)]
            views = [frame[..., i : i + vocab] for frame, i in zip(frames, (offset, 2 * offset, 7), strict=True)]
            views[0].copy_(logits)
            views[1].copy_(ref)
            em = Emulator(library, **schedule)
            assert torch.equal(divergence_gradient(em, *views[:2], labels, views[2], grads), plain)
            assert torch.equal(divergence_gradient(em, *views[:2], labels, views[0], grads), plain)
            for frame, view in zip(frames, views, strict=True):
                assert (frame == 7).sum() >= frame.numel() - view.numel()  # nothing outside was written


def test_a_row_without_a_divergence_stands_beside_one_with(library):
    """With -inf in the reference only, the divergence is infinite. If it has no gradient, it must not cause NaN."""
    logits, ref, labels = make(35, (1, 2, 70), torch.float32)
    labels[0] = torch.tensor([3, 60])
    ref[0, 0, 9] = float("-inf")
    *small, ref_logps, ref_max, ref_log_sum, kl = Emulator(library).token_logps(logits, labels, ref, PLAIN, ("kl",))
    assert kl[0].tolist()[0] == math.inf
    by_kl, by_forward = torch.tensor([[0.0, 0.5]]).double(), torch.tensor([[0.6, 0.0]]).double()
    out, zero = torch.empty_like(logits), torch.zeros_like(kl)
    token_kl = TokenKL(ref, ref_logps, ref_max, ref_log_sum, kl, by_kl, by_forward)
    Emulator(library).logits_grad(logits, labels, *small, zero, PLAIN, out, token_kl)
    log_p, log_q = logits.double().log_softmax(-1), ref.double().log_softmax(-1)
    torch.testing.assert_close(out[0, 0].double(), 0.6 * (log_p.exp() - log_q.exp())[0, 0], rtol=1e-5, atol=1e-8)
    p, gap = log_p.exp()[0, 1], (log_p - log_q)[0, 1]
    torch.testing.assert_close(out[0, 1].double(), 0.5 * p * (gap - (p * gap).sum()), rtol=1e-5, atol=1e-8)


# ---- The whole backend: dpo_kernels.backends.cuda and csrc/cuda/ops.cpp over the emulated kernels ----


@pytest.fixture
def cuda_backend(monkeypatch) -> str:
    """`use_backend("cuda")` with CPU tensors reaches the emulated kernels."""
    serve_backend(monkeypatch)
    return "cuda"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_operator_table(cuda_backend, case):
    device = torch.device("cpu")
    test_operators.test_loss_and_gradient_equal_the_float64_reference(cuda_backend, case, device)
    if case.reference == "logits":
        test_operators.test_statistics_and_logps_equal_the_float64_reference(cuda_backend, case, device)


def test_the_other_operator_tests(cuda_backend):
    device = torch.device("cpu")
    test_operators.test_policy_equal_to_reference_is_exactly_log_two(cuda_backend, device)
    test_operators.test_in_place_gradient_is_bitwise_the_other_one(cuda_backend, device)
    test_operators.test_two_runs_are_bitwise_equal(cuda_backend, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", test_objectives_kl.UPSTREAM)
def test_the_gradient_of_token_divergences(cuda_backend, name, dtype):
    for vocab in (7, 2101):
        test_objectives_kl.test_the_stage_equals_the_float64_truth(
            name, dtype, vocab, cuda_backend, torch.device("cpu")
        )


def test_the_other_tests_of_token_divergences(cuda_backend):
    device = torch.device("cpu")
    for scale, cap in ((0.6, 0.0), (1.0, 6.0), (0.7, 9.0)):
        test_objectives_kl.test_the_stage_scales_and_caps(scale, cap, cuda_backend, device)
    for gap in (10.0, 25.0):
        test_objectives_kl.test_a_nearly_certain_label_keeps_its_relative_precision(gap, cuda_backend, device)
    test_objectives_kl.test_the_stage_in_place_is_bitwise_the_same_and_skips_dead_rows(cuda_backend, device)
    test_objectives_kl.test_the_stage_gives_impossible_tokens_nothing(cuda_backend, device)


# ---- A whole call ----


@pytest.fixture
def dirty_memory():
    """Fill new memory with NaN and invalid integers, so that an output that a kernel does not write is noticed."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


class Call(NamedTuple):
    """Arguments of `preference_forward` and of its backward."""

    logits: Tensor
    labels: Tensor
    ref_logits: Tensor | None
    transform: Transform
    statistics: tuple[str, ...]
    weighting: Weighting
    family: Family

    def run(self, stages: object, grad_loss: Tensor | None = None, *, in_place: bool = False) -> tuple[Tensor, ...]:
        """(tokens, sequences, losses, loss, gradient), from the backend's whole call or from its stages (stages=None)."""
        forward, backward = (
            (cuda.preference_forward, cuda.preference_backward)
            if stages is cuda
            else (partial(whole_call.preference_forward, cuda), partial(whole_call.preference_backward, cuda))
        )
        results = forward(*self)
        if grad_loss is None:
            grad_loss = torch.linspace(0.5, 1.5, results[3].numel()).view(results[3].shape)
        logits = self.logits.clone()
        out = logits if in_place else torch.empty_like(logits)
        backward(logits, self.labels, *results[:2], grad_loss, self.transform, self.weighting, out)
        return (*results, out)


def make_call(
    lengths: list[int],
    *,
    packed: bool,
    dtype: torch.dtype = torch.bfloat16,
    vocab: int = 41,
    reference: str = "logits",
    statistics: tuple[str, ...] = (),
    weighted: bool = False,
    per_pair: bool = False,
    reduction: str = "mean",
    robust: bool = False,
    transform: Transform = PLAIN,
) -> Call:
    """A call with these sequence lengths, chosen sequences first.

    weighted: give tokens and pairs weights. per_pair: give every pair its own beta and smoothing.
    """
    count, g = len(lengths) // 2, torch.Generator().manual_seed(7)
    logits, ref, labels = make(20, (len(lengths), max(lengths, default=3), vocab), dtype)
    for row, n in enumerate(lengths):
        labels[row, n:] = IGNORE
    weights = torch.rand(labels.shape, generator=g, dtype=torch.float64) + 0.1
    cu = None
    if packed:
        cu = torch.tensor([0, *lengths]).cumsum(0)
        logits, ref, labels, weights = (pack(t, lengths) for t in (logits, ref, labels, weights))
    pair_weights, beta, smoothing = torch.rand(3, count, generator=g, dtype=torch.float64).unbind(0)
    ref_sums = torch.randn(2 * count, generator=g, dtype=torch.float64)
    return Call(
        logits,
        labels,
        ref if reference == "logits" else None,
        transform,
        statistics,
        Weighting(weights if weighted else None, cu, pair_weights if weighted else None, reduction),
        Family(
            ref_sums if reference == "sums" else None,
            *((beta, 0.0, smoothing / 3, 0.0) if per_pair else (None, 0.1, None, 0.1 if robust else 0.0)),
            robust,
        ),
    )


def assert_same(call: Call, **settings: object) -> None:
    """Assert that whole call and stages agree bit by bit. Only the sum of losses may differ, in the last bit of float64."""
    for mine, theirs in zip(call.run(cuda, **settings), call.run(None, **settings), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_whole_call_equals_its_stages(cuda_backend, library, dirty_memory, schedule, packed, reduction):
    Emulator(library, **schedule).configure()
    # An empty chosen side, an empty pair, and ordinary ones.
    lengths = [3, 0, 0, 2, 4, 0] if packed else [3, 1, 4, 2, 4, 4]
    for options in (
        {},
        {"reference": "sums", "weighted": True, "statistics": ("accuracy",), "dtype": torch.float32},
        {"reference": "none", "per_pair": True, "statistics": ("entropy", "mean_logits", "log_sum_sq")},
        {"weighted": True, "per_pair": True, "robust": True, "statistics": STATISTICS, "dtype": torch.float16},
        {"statistics": ("entropy", "kl"), "transform": Transform(scale=0.5, softcap=9.0), "vocab": 4500},
    ):
        assert_same(make_call(lengths, packed=packed, reduction=reduction, **options), in_place=packed)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("packed", [False, True])
def test_a_whole_call_without_pairs_or_without_tokens(cuda_backend, dirty_memory, packed, reduction):
    assert_same(make_call([], packed=packed, reduction=reduction, statistics=("entropy",)))
    assert_same(make_call([0] * 4, packed=packed, reduction=reduction, statistics=("entropy",), reference="sums"))
    if packed:  # tokens that belong to no sequence
        call = make_call([2, 3], packed=True, reduction=reduction)
        no_pairs = call.weighting._replace(cu_seqlens=torch.zeros(1, dtype=torch.int64))
        assert_same(call._replace(weighting=no_pairs))
    losses, loss = make_call([0] * 4, packed=packed, reduction=reduction).run(cuda)[2:4]
    assert losses.tolist() == [math.log(2)] * 2
    torch.testing.assert_close(loss, reduce(losses, reduction).float())


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_an_illegal_label_spoils_its_pair_alone(cuda_backend, dirty_memory, reduction):
    for bad in (41, -1, 2**40):
        call = make_call([3, 1, 4, 2], packed=False, statistics=STATISTICS, weighted=True, reduction=reduction)
        call.labels[2, 1] = bad
        assert_same(call)
        _, sequences, losses, loss, gradient = call.run(cuda)
        assert losses.isnan().tolist() == [True, False]
        assert loss.isnan().any()
        assert sequences[:, 1].isfinite().all()
        if reduction == "none":
            assert gradient.isnan().any(-1).any(-1).tolist() == [True, False, True, False]


def test_tokens_outside_every_sequence_count_for_none(cuda_backend, dirty_memory):
    call = make_call([4, 5, 4, 5], packed=True, statistics=("entropy",))
    bounds = torch.tensor([2, 5, 5, 5, 8])
    call = call._replace(weighting=call.weighting._replace(cu_seqlens=bounds))
    assert_same(call)
    tokens, sequences, *_, gradient = call.run(cuda)
    torch.testing.assert_close(sequences[0, [0, 3]], torch.stack([tokens[0][0, 2:5].sum(), tokens[0][0, 5:8].sum()]))
    assert (gradient[0, [0, 1, *range(8, 18)]] == 0).all()
    assert (gradient[0, 2:8] != 0).all(-1).all()


@pytest.mark.parametrize("bounds", [pytest.param(b, id=name) for name, b in bad_bounds(18)])
def test_a_whole_call_with_bad_bounds(cuda_backend, dirty_memory, bounds):
    """The kernels clamp unchecked bounds, which no caller passes. With rising bounds every token has one sequence."""
    call = make_call([4, 5, 4, 5], packed=True, statistics=("entropy",), weighted=True)
    raw = call._replace(weighting=call.weighting._replace(cu_seqlens=torch.tensor(bounds)))
    for mine, theirs in zip(raw.run(cuda), whole_call.preference_forward(cuda, *raw), strict=False):
        assert torch.equal(mine, theirs)
    risen = call.weighting._replace(cu_seqlens=rising_bounds(torch.tensor(bounds), 18))
    assert_same(call._replace(weighting=risen))


def test_the_gradient_of_losses_may_be_expanded(cuda_backend, dirty_memory):
    """`out.losses.sum().backward()` passes an expanded gradient: one number in memory for all pairs."""
    call = make_call([3, 1, 4, 2], packed=False, reduction="none")
    assert_same(call, grad_loss=torch.tensor(0.3).expand(2))
    assert_same(call, grad_loss=torch.tensor([0.3, 7.0, 0.0, 7.0])[::2])


@pytest.mark.parametrize("packed", [False, True])
def test_launches_of_a_whole_call(cuda_backend, library, packed):
    """The number of launches does not depend on the request. Without rows, a memset of a counter counts as a launch."""
    em = Emulator(library)  # the operators run the same library, so its counts are theirs
    for lengths in ([3, 1, 4, 2], [0] * 4):
        for options in ({}, {"statistics": STATISTICS, "weighted": True, "per_pair": True, "reduction": "none"}):
            call = make_call(lengths, packed=packed, **options)
            before = em.launches() + em.memsets()
            tokens, sequences, _, loss = cuda.preference_forward(*call)
            forward = em.launches() + em.memsets() - before
            backward = (call.logits, call.labels, tokens, sequences, loss, call.transform, call.weighting, call.logits)
            cuda.preference_backward(*backward)
            assert forward == 2
            assert em.launches() + em.memsets() - before - forward == (1 if call.labels.numel() else 0)


def test_nothing_of_a_call_outlives_it(cuda_backend):
    """With torch.compile(mode="reduce-overhead"), later calls reuse memory of the CUDA graph's pool."""

    def live() -> set[int]:
        gc.collect()
        return {id(t) for t in gc.get_objects() if isinstance(t, Tensor)}

    call = make_call([2, 2], packed=False)
    before = live()
    cuda.preference_forward(*call)
    assert live() <= before


# The sigmoid family, and an objective that the kernels do not implement.
@pytest.mark.parametrize("loss_type", ["sigmoid", "robust", "ipo"])
@pytest.mark.parametrize(
    "case", [c for c in CASES if c.name in ("bfloat16", "packed", "weights_everywhere", "ref_logps")], ids=str
)
def test_the_public_loss_takes_two_launches_forward_and_one_backward(
    cuda_backend, library, case, loss_type, monkeypatch
):
    """The results equal those of the separate stages bit by bit."""
    inputs = make_inputs(case)
    keywords = dict(inputs.keywords, loss_type=loss_type)
    if loss_type == "ipo":
        keywords.pop("label_smoothing", None)
    elif loss_type == "robust":
        keywords.setdefault("label_smoothing", 0.2)
    em = Emulator(library)  # the operators run the same library, so its count is theirs
    results = []
    for separate in (False, True):
        if separate:
            monkeypatch.delattr(cuda, "preference_forward")
            monkeypatch.delattr(cuda, "preference_backward")
        logits = inputs.logits.clone().requires_grad_()
        with use_backend(cuda_backend):
            before = em.launches()
            out = dpo_loss(logits, inputs.labels, statistics=("entropy", "accuracy"), **keywords)
            forward = em.launches() - before
            out.loss.backward()
            backward = em.launches() - before - forward
        # Three sums per sequence for the report: scored tokens and both statistics.
        if loss_type != "ipo":
            assert forward == (3 + 2 if separate else 2)
        else:
            assert forward > 3 + 1
        assert backward == 1
        results.append(
            (out.losses, out.chosen_logps, out.ref_rejected_logps, out.rejected_rewards, out.entropy, logits.grad)
        )
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_the_whole_call_passes_opcheck_and_compiles_without_a_graph_break(cuda_backend):
    for op, arguments in test_compile.op_arguments(cuda_backend, torch.device("cpu")):
        if op in (torch.ops.dpo_kernels.preference_forward, torch.ops.dpo_kernels.preference_backward):
            torch.library.opcheck(op.default, arguments)
    inputs = make_inputs(CASES[1])

    def loss_of(logits: Tensor) -> Tensor:
        return dpo_loss(logits, inputs.labels, **inputs.keywords).loss

    torch._dynamo.reset()
    grads = []
    for run in (loss_of, torch.compile(loss_of, fullgraph=True, backend="aot_eager")):
        logits = inputs.logits.clone().requires_grad_()
        with use_backend(cuda_backend):
            loss = run(logits)
            loss.backward()
        grads.append((loss.detach(), logits.grad))
    torch._dynamo.reset()
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_the_backend_refuses_what_its_kernels_cannot_read(cuda_backend):
    labels = torch.zeros(2, 2, dtype=torch.int64)
    with pytest.raises(TypeError, match="float64"):
        cuda.token_logps(torch.zeros(2, 2, 5, dtype=torch.float64), labels, None, PLAIN, ())
    with pytest.raises(RuntimeError, match="positive logit_scale"):
        cuda.token_logps(torch.zeros(2, 2, 5), labels, None, Transform(scale=-1.0), ())
    with pytest.raises(RuntimeError, match="unit stride"):
        cuda.token_logps(torch.zeros(2, 5, 2).transpose(1, 2), labels, None, PLAIN, ())


# ---- Can these tests fail? ----


def test_a_removed_barrier_in_the_row_kernel_is_noticed():
    broken = build(defines=("DPO_BARRIER_BEFORE_MERGE()=",))
    logits, _, labels = make(40, (2, 3, 5000), torch.bfloat16)
    right = Emulator().token_logps(logits, labels, None, PLAIN, ())[0]
    noticed = 0
    for schedule in ({"order": Order.FORWARD}, {"order": Order.RANDOM, "seed": 3}, {"order": Order.RANDOM, "seed": 4}):
        wrong = Emulator(broken, clusters=False, **schedule).token_logps(logits, labels, None, PLAIN, ())[0]
        noticed += not torch.equal(right, wrong)
    assert noticed == 3


def test_clean_under_address_and_undefined_behaviour_sanitizers():
    """Runs a reduced table in a separate process, because AddressSanitizer must be loaded first."""
    library = build(sanitize=True)
    runtimes = [
        subprocess.run(
            ["g++", f"-print-file-name=lib{name}.so"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("asan", "ubsan")
    ]
    env = dict(
        os.environ, LD_PRELOAD=" ".join(runtimes), ASAN_OPTIONS="detect_leaks=0:abort_on_error=0", OMP_NUM_THREADS="1"
    )
    script = Path(__file__).parent / "cuda_emulator" / "sanitized.py"
    done = subprocess.run(
        [sys.executable, str(script), str(library)], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{SANITIZERS}:\n{done.stdout}\n{done.stderr[-4000:]}"
    assert "sanitized table done" in done.stdout
    # The sanitizer works: a tensor that is one element too short gives an error.
    caught = subprocess.run(
        [sys.executable, str(script), str(library), "overrun"], env=env, capture_output=True, text=True, check=False
    )
    assert caught.returncode != 0
    assert "heap-buffer-overflow" in caught.stderr
