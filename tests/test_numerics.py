"""Numerical guarantees beyond the operator table: special values, probabilities near 1, invariances, rounding problems."""

import math

import pytest
import torch

from dpo_kernels import ops, reference, sequence_logps, use_backend
from dpo_kernels.stages import Transform

from cases import loss_of
from checks import row_errors

VOCAB = 517


def random_batch(pairs=2, length=6, vocab=VOCAB, dtype=torch.float32, seed=0, spread=3.0):
    g = torch.Generator().manual_seed(seed)
    logits = (torch.randn(2 * pairs, length, vocab, generator=g) * spread).to(dtype)
    ref_logits = (torch.randn(2 * pairs, length, vocab, generator=g) * spread).to(dtype)
    labels = torch.randint(0, vocab, (2 * pairs, length), generator=g)
    return logits, ref_logits, labels


@pytest.mark.parametrize("p_other", [1e-2, 1e-5, 1e-8, 1e-12])
def test_a_nearly_certain_label_keeps_its_relative_precision(backend, device, p_other):
    """p(label) near 1: the label's gradient is p - 1, which cancels unless computed as -expm1(logp).

    Peers in float32 differ by several per cent here; eager float32 returns 0 below 6e-8.
    """
    gap = -math.log(p_other / (VOCAB - 1))
    logits = (torch.randn(2, 3, VOCAB, generator=torch.Generator().manual_seed(1)) * 0.5).to(device)
    labels = torch.tensor([[0, 250, VOCAB - 1], [7, 511, 512]], device=device)
    logits.scatter_(-1, labels.unsqueeze(-1), gap)
    x, truth = logits.clone().requires_grad_(), logits.double().requires_grad_()
    with use_backend(backend):
        out = loss_of(x, labels)
        out.loss.backward()
    # The true value must avoid cancellation too: -log1p(sum of the other exponentials / the label's), in float64.
    others = truth.scatter(-1, labels.unsqueeze(-1), -math.inf).logsumexp(-1) - gap
    logp = -torch.log1p(others.exp())
    margin = 0.1 * (logp[0].sum() - logp[1].sum())
    torch.nn.functional.softplus(-margin).backward()
    assert out.chosen_logps.item() == pytest.approx(logp[0].sum().item(), rel=1e-5)
    # The label's entry is 1 - p = -expm1(logp), times its coefficient.
    coefficient = 0.1 * torch.sigmoid(-margin.detach())
    sign = torch.tensor([[1.0], [-1.0]], device=device, dtype=torch.float64)
    label_truth = -coefficient * sign * -torch.expm1(logp.detach())
    label_grad = x.grad.double().gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(label_grad, label_truth, rtol=2e-5, atol=0.0)
    others_grad = x.grad.double().scatter(-1, labels.unsqueeze(-1), 0.0)
    others_truth = truth.grad.scatter(-1, labels.unsqueeze(-1), 0.0)
    assert float((others_grad - others_truth).norm() / others_truth.norm()) < 2e-5


def test_minus_infinity_is_a_legal_logit(backend, device):
    logits, ref_logits, labels = (t.to(device) for t in random_batch())
    banned = torch.zeros(VOCAB, dtype=torch.bool, device=device)
    banned[::3] = True
    labels = labels - (labels % 3 == 0).long() * 1 + (labels == 0).long() * 2
    logits, ref_logits = logits.masked_fill(banned, -math.inf), ref_logits.masked_fill(banned, -math.inf)
    x, truth = logits.clone().requires_grad_(), logits.double().requires_grad_()
    with use_backend(backend):
        out = loss_of(x, labels, ref_logits=ref_logits, statistics=("entropy", "kl", "accuracy", "mean_logits"))
        out.loss.backward()
    # The true result is that of the same problem without the banned entries.
    keep = (~banned).nonzero().squeeze(-1)
    place = torch.cumsum(~banned, 0) - 1
    small = reference.token_statistics(
        logits.double()[..., keep], place[labels], ref_logits=ref_logits.double()[..., keep]
    )
    reference.dpo_loss(truth, labels, ref_logits=ref_logits.double()).backward()
    torch.testing.assert_close(out.entropy.double(), small["entropy"].mean(-1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out.kl.double(), small["kl"].mean(-1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.accuracy.double(), small["accuracy"].mean(-1))
    assert bool((x.grad[..., banned] == 0).all())
    errors = row_errors(x.grad, truth.grad, labels)
    assert float(errors.others.max()) < 2e-6


def test_reference_minus_infinity_where_the_policy_has_mass_is_infinite_kl(backend, device):
    logits, ref_logits, labels = (t.to(device) for t in random_batch())
    ref_logits[1, 2, (labels[1, 2] + 1) % VOCAB] = -math.inf
    with use_backend(backend):
        out = loss_of(logits, labels, ref_logits=ref_logits, statistics=("kl",))
    assert out.kl.isinf().tolist() == [False, True, False, False]
    assert out.losses.isfinite().all()


def test_log_sum_sq_of_rows_at_the_edge(backend, device):
    """Masked entries have probability 0. The sum of squares overflows or underflows only if the sum does."""
    logits = torch.zeros(1, 7, VOCAB, device=device)
    logits[0, 1, 1:] = -math.inf  # all mass on the label
    logits[0, 2, 3:] = -math.inf  # on three entries
    logits[0, 3] = 200.0  # squares of exp(200) would overflow
    logits[0, 4, 0] = -200.0  # a label of probability 0, all other entries equal
    logits[0, 5, 3:] -= 60.0  # of these entries, only the squares underflow to 0
    logits[0, 6, 7] = math.nan
    labels = torch.zeros(1, 7, dtype=torch.int64, device=device)
    found = ops.token_logps(
        logits,
        labels,
        None,
        Transform(),
        ("log_sum_sq",),
        backend=backend,
    )["log_sum_sq"].double()
    even = -math.log(VOCAB)
    three = -math.log(3)
    expected = torch.tensor([[even, 0.0, three, even, -math.log(VOCAB - 1), three, math.nan]], device=device).double()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7, equal_nan=True)


@pytest.mark.parametrize("poison", ["policy", "reference"])
def test_nan_stays_in_its_own_pair(backend, device, poison):
    logits, ref_logits, labels = (t.to(device) for t in random_batch(pairs=3))
    clean = loss_of(logits, labels, ref_logits=ref_logits)
    (logits if poison == "policy" else ref_logits)[1, 2, 5] = math.nan
    x = logits.clone().requires_grad_()
    with use_backend(backend):
        out = loss_of(x, labels, ref_logits=ref_logits, statistics=("entropy", "kl"), reduction="none")
        out.loss.sum().backward()
    assert out.losses.isnan().tolist() == [False, True, False]
    torch.testing.assert_close(out.losses[[0, 2]], clean.losses[[0, 2]], rtol=1e-6, atol=1e-7)
    assert out.kl.isnan().tolist() == [False, True, False, False, False, False]
    good = [0, 2, 3, 5]
    assert x.grad[good].isfinite().all()


def test_nan_on_ignored_rows_does_not_matter(backend, device):
    logits, ref_logits, labels = (t.to(device) for t in random_batch())
    labels[:, 1] = -100
    with use_backend(backend):
        clean = loss_of(logits, labels, ref_logits=ref_logits)
        logits[:, 1], ref_logits[:, 1] = math.nan, math.inf
        x = logits.clone().requires_grad_()
        out = loss_of(x, labels, ref_logits=ref_logits)
        out.loss.backward()
    assert torch.equal(out.losses, clean.losses)
    assert bool((x.grad[:, 1] == 0).all())


def test_ties_count_as_argmax_does(backend, device):
    logits = torch.zeros(2, 4, VOCAB, device=device)
    logits[:, :, 100] = logits[:, :, 300] = 5.0
    labels = torch.tensor([[100, 300, 0, 100], [300, 300, 1, 2]], device=device)
    logits[:, 2] = 1.0  # everything ties: the first entry is the argmax
    with use_backend(backend):
        out = loss_of(logits, labels, statistics=("accuracy",))
    assert out.accuracy.tolist() == [0.75, 0.0]


def test_a_pair_does_not_feel_its_neighbours_padding_or_strides(backend, device):
    logits, ref_logits, labels = (t.to(device) for t in random_batch(pairs=3))
    labels[4, 3:] = -100
    pick = [1, 4]

    def run(z, y, r):
        x = z.clone().requires_grad_()
        with use_backend(backend):
            out = loss_of(x, y, ref_logits=r, statistics=("entropy", "kl"), reduction="sum")
            out.loss.backward()
        return out, x.grad

    together, grad = run(logits, labels, ref_logits)
    alone, alone_grad = run(logits[pick], labels[pick], ref_logits[pick])
    assert torch.equal(together.losses[1:2], alone.losses)
    assert torch.equal(together.kl[pick], alone.kl)
    assert torch.equal(grad[pick], alone_grad)

    # Padding on the left, on the right or in between (a gap of ignored tokens) changes no bit.
    def spread(t, fill):
        wide = torch.full((t.shape[0], 11, *t.shape[2:]), fill, dtype=t.dtype, device=t.device)
        wide[:, [2, 3, 5, 6, 7, 9]] = t
        return wide

    padded, padded_grad = run(spread(logits, 7.0), spread(labels, -100), spread(ref_logits, 1.0))
    assert torch.equal(together.losses, padded.losses)
    assert torch.equal(together.chosen_logps, padded.chosen_logps)
    assert torch.equal(together.entropy, padded.entropy)
    assert torch.equal(grad, padded_grad[:, [2, 3, 5, 6, 7, 9]])

    # A view into wider memory gives the same bits as its copy.
    wide = torch.zeros(6, 9, VOCAB + 3, device=device)
    wide[:, 2:8, 1:-2] = logits
    view = wide[:, 2:8, 1:-2]
    with use_backend(backend):
        seen = loss_of(view, labels, ref_logits=ref_logits)
    assert torch.equal(seen.losses, together.losses)


def test_sums_beat_bfloat16_and_float32_accumulation(backend, device):
    """With many small terms, summing log-probabilities in bfloat16 loses a quarter of the loss, in float32 its last digits."""
    g = torch.Generator().manual_seed(0)
    logits = (torch.randn(2, 153, 64, generator=g) * 2).to(torch.bfloat16).to(device)
    labels = torch.randint(0, 64, (2, 153), generator=g).to(device)
    truth = reference.token_statistics(logits.double(), labels)["logps"].sum(-1)
    with use_backend(backend):
        ours = sequence_logps(logits, labels).double()
    in_bfloat16 = logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1).sum(-1).double()
    assert float((ours - truth).abs().max()) <= float(truth.abs().max()) * 2**-24 + 1e-6
    assert float((in_bfloat16 - truth).abs().max()) > 1000 * float((ours - truth).abs().max())


@pytest.mark.parametrize("offset", [0.0, 30.0, -80.0, 3000.0])
def test_a_constant_added_to_a_row_changes_nothing_but_its_rounding(backend, device, offset):
    logits, _, labels = (t.to(device) for t in random_batch(seed=5))
    logits = (logits * 64).round() / 64  # so that adding the offset is exact
    with use_backend(backend):
        plain, moved = sequence_logps(logits, labels), sequence_logps(logits + offset, labels)
    torch.testing.assert_close(plain, moved, rtol=3e-7, atol=0.0)


def test_huge_margins_do_not_overflow(backend, device):
    logits = torch.full((2, 2, 50), -1e4, device=device)
    logits[..., 0] = 1e4
    labels = torch.tensor([[0, 0], [1, 1]], device=device)
    for order in ([0, 1], [1, 0]):
        x = logits[order].clone().requires_grad_()
        with use_backend(backend):
            out = loss_of(x, labels[order], beta=10.0)
            out.loss.backward()
        expected = 0.0 if order == [0, 1] else 10.0 * 2 * 2e4
        assert out.loss.item() == pytest.approx(expected, rel=1e-6)
        assert bool(x.grad.isfinite().all())


# Kinds of rows of logits, and the upstream gradients of their log-probabilities.
REGIMES = {
    "usual": (lambda z: z, 0.03),
    "other sign": (lambda z: z, -0.03),
    "no gradient": (lambda z: z, 0.0),
    "faint gradient": (lambda z: z, 1e-30),
    "all negative": (lambda z: z - 40, 0.03),
    "far from zero": (lambda z: z + 1000, 0.03),
    "far apart": (lambda z: torch.where(torch.arange(z.shape[-1]) % 50 == 7, -90.0, z), 1.0),
    "partly minus infinity": (lambda z: torch.where(torch.arange(z.shape[-1]) > 2060, -math.inf, z), 0.03),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("regime", REGIMES)
def test_sixteen_bit_gradient_is_the_truth_rounded_once(backend, device, regime, dtype):
    """At most half a unit in the last place, plus a little for float32's own error: the result is rounded only once."""
    shape, upstream = REGIMES[regime]
    logits = shape(torch.randn(2, 2, 2101) * 2).to(device, dtype)
    labels = torch.randint(0, 2060, (2, 2), device=device)
    x, exact = logits.clone().requires_grad_(), logits.double().requires_grad_()
    with use_backend(backend):
        sequence_logps(x, labels).backward(torch.full((2,), upstream, device=device))
    true_logps = torch.log_softmax(exact, -1).gather(-1, labels[..., None])[..., 0].sum(-1)
    (truth,) = torch.autograd.grad(true_logps, exact, torch.full_like(true_logps, upstream))
    info = torch.finfo(dtype)
    exponent = truth.abs().clamp(min=info.smallest_normal).log2().floor()
    units = (x.grad.double() - truth).abs() / (info.eps * exponent.exp2())
    assert float(units.max()) < 0.51
    assert bool((x.grad[truth == 0] == 0).all())
