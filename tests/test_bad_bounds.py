"""Invalid cu_seqlens, which cannot be checked without waiting for the device: negative, decreasing, overlapping, too large.

With any bounds, no kernel reads or writes outside its tensors, each sum is over the sequence that stages.rising_bounds
defines, and a token's gradient goes only to that sequence.
"""

import dataclasses
import itertools
import sys

import pytest
import torch
from bad_bounds import bad_bounds, clamped_spans, clamped_sums

from dpo_kernels import arguments, backends, ops
from dpo_kernels import stages as stages_contract

TOKENS, VOCAB = 12, 23


def rising(bounds):
    """Each bound clamped to the number of tokens and to at least the largest bound before it."""
    return list(itertools.accumulate((min(max(bound, 0), TOKENS) for bound in bounds), max))


#: Bounds as given, and the bounds that are used instead.
BAD = {name: (bounds, rising(bounds)) for name, bounds in [("right", [0, 3, 6, 9, 12]), *bad_bounds(TOKENS)]}
assert BAD["one step back: two sequences overlap"][1] == [0, 9, 9, 9, 12]


def available(name):
    return backends.why_not(name, "cpu") is None


@pytest.fixture(params=["eager", "cpu", "triton"])
def server(request):
    if not available(request.param):
        pytest.skip(f"{request.param} does not serve here")
    return request.param


@pytest.mark.parametrize("case", BAD)
def test_bounds_are_moved_to_the_nearest_that_rise(case):
    given, meant = BAD[case]
    for dtype in (torch.int64, torch.int32):
        small = [max(min(bound, 2**31 - 1), -(2**31)) for bound in given]
        bounds = torch.tensor(given if dtype == torch.int64 else small, dtype=dtype)
        assert stages_contract.rising_bounds(bounds, TOKENS).tolist() == meant


@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")
@pytest.mark.parametrize("case", BAD)
def test_sums_and_gradients_follow_the_bounds_that_are_meant(case, server):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, TOKENS, VOCAB, generator=generator)
    labels = torch.randint(VOCAB, (1, TOKENS), generator=generator)
    weights = torch.rand(1, TOKENS, generator=generator, dtype=torch.float64) + 0.5
    meant = BAD[case][1]
    bounds = torch.tensor(meant)
    logps = logits[0].double().log_softmax(-1).gather(-1, labels[0, :, None])[:, 0]

    leaf = logps.clone()[None].requires_grad_()
    if meant[0] > 0:  # the operator refuses such bounds on a CPU, so call the stages
        stages = backends.load(server, "cpu")
        sums = stages.sequence_sums(leaf.detach(), weights, bounds)
        grads = stages_contract.spread(torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64), weights, bounds)
    else:
        sums = ops.sequence_sums(leaf, weights, bounds, server)
        (grads,) = torch.autograd.grad((sums * torch.tensor([1.0, 2.0, 3.0, 4.0])).sum(), leaf)
    truth, expected = [], torch.zeros(1, TOKENS, dtype=torch.float64)
    for number, (begin, end) in enumerate(itertools.pairwise(meant), start=1):
        truth.append(float((logps[begin:end] * weights[0, begin:end]).sum()))
        expected[0, begin:end] = number * weights[0, begin:end]
    assert sums.tolist() == pytest.approx(truth, rel=1e-12)
    torch.testing.assert_close(grads, expected, rtol=0, atol=0)


class _Guarded:
    """Tensors between guard elements, so that a write out of bounds is detected."""

    def __init__(self):
        self.whole = []

    def place(self, tensor, fill):
        guard = 4096
        whole = torch.full((tensor.numel() + 2 * guard,), fill, dtype=tensor.dtype)
        inside = whole[guard:-guard].view(tensor.shape)
        inside.copy_(tensor)
        self.whole.append((whole, whole.clone(), guard))
        return inside

    def intact(self):
        return all(
            torch.equal(now[:guard], then[:guard]) and torch.equal(now[-guard:], then[-guard:])
            for now, then, guard in self.whole
        )


@pytest.mark.skipif(not available("triton"), reason="Triton's interpreter is not here")
@pytest.mark.parametrize("long", [False, True])
@pytest.mark.parametrize("case", BAD)
def test_triton_stays_inside_its_tensors_whatever_the_bounds(case, long, monkeypatch):
    """The kernels without stages.rising_bounds. The guards around the weights are ones, so a token out of bounds would count."""
    stage = sys.modules["dpo_kernels.backends.triton.preference_loss"]
    triton_backend = backends.load("triton", "cpu")
    monkeypatch.setattr(stage, "LONG", 0 if long else 1 << 20)
    guarded = _Guarded()
    values = guarded.place(torch.arange(1.0, TOKENS + 1, dtype=torch.float64)[None], 7.0)
    weights = guarded.place(torch.ones(1, TOKENS, dtype=torch.float64), 1.0)
    plain = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda like: guarded.place(plain(like).zero_(), 0.0))
    bounds = [
        max(min(bound, 3000), -3000) for bound in BAD[case][0]
    ]  # so that wrong code hits the guards, not unmapped memory
    sums = triton_backend.sequence_sums(values, weights, torch.tensor(bounds))
    assert guarded.intact()
    filled = sorted(span for span in clamped_spans(bounds, TOKENS) if span[0] < span[1])
    if all(one[1] <= two[0] for one, two in itertools.pairwise(filled)):
        assert sums.tolist() == clamped_sums(values, weights, bounds).tolist()
    # Overlapping spans would share scratch memory. rising_bounds ensures that the kernels never get them.


def test_metrics_raise_where_bounds_on_a_device_were_wrong():
    """A call on an accelerator does not wait to check bounds; metrics() synchronises anyway and checks them.

    The test calls the check that the batch builds.
    """
    logits, labels, bounds = torch.randn(1, 6, VOCAB), torch.zeros(1, 6, dtype=torch.int64), torch.tensor([0, 5, 9])
    risen = stages_contract.rising_bounds(bounds, 6)
    batch = arguments.Batch(logits, VOCAB, labels, None, risen, -100, "triton", bounds)
    with pytest.raises(ValueError, match="must rise from 0 to at most 6"):
        batch.late_check()()
    dataclasses.replace(batch, given_bounds=torch.tensor([0, 5, 6])).late_check()()
