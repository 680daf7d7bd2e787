"""The gradient check catches planted faults, for small and real vocabularies, in float32 and bfloat16."""

import pytest
import torch

from dpo_kernels import dpo_loss, reference

from checks import check_gradient

SIZES = [1_000, 128_256]


def problem(vocab, dtype, spread=2.0):
    """Labels of a batch with prompts, and three gradients: in float64, from eager, and ours."""
    g = torch.Generator().manual_seed(vocab)
    logits = (torch.randn(4, 4, vocab, generator=g) * spread).to(dtype)
    ref_logits = (torch.randn(4, 4, vocab, generator=g) * spread).to(dtype)
    labels = torch.randint(0, vocab - 1, (4, 4), generator=g)
    labels[:, 0] = -100

    def by_definition(work):
        x = logits.to(work).requires_grad_()
        reference.dpo_loss(x, labels, ref_logits=ref_logits.to(work)).backward()
        return x.grad

    ours = logits.clone().requires_grad_()
    dpo_loss(ours, labels, ref_logits=ref_logits).loss.backward()
    return labels, by_definition(torch.float64), by_definition(torch.float32).to(dtype), ours.grad


def at_labels(labels, shift=0):
    index = (labels + shift).clamp(min=0).unsqueeze(-1)
    return index


def zeroed(grad, labels):
    return torch.zeros_like(grad)


def sign_flipped(grad, labels):
    return -grad


def scaled_by_five_per_cent(grad, labels):
    return (grad.double() * 1.05).to(grad.dtype)


def tail_zeroed(grad, labels):
    """All entries except the label's are 0. Flat tolerances do not detect this."""
    index = at_labels(labels)
    return torch.zeros_like(grad).scatter(-1, index, grad.gather(-1, index)) * (labels != -100).unsqueeze(-1)


def one_row_zeroed(grad, labels):
    out = grad.clone()
    out[2, 3] = 0
    return out


def label_off_by_one(grad, labels):
    """The one-hot term of the gradient is one entry too far to the right."""
    here, there = at_labels(labels), at_labels(labels, 1)
    a, b = grad.gather(-1, here), grad.gather(-1, there)
    return grad.scatter(-1, here, b).scatter(-1, there, a)


def leak_into_ignored_tokens(grad, labels):
    out = grad.clone()
    out[1, 0, 5] = 1e-30
    return out


FAULTS = [
    zeroed,
    sign_flipped,
    scaled_by_five_per_cent,
    tail_zeroed,
    one_row_zeroed,
    label_off_by_one,
    leak_into_ignored_tokens,
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vocab", SIZES)
def test_the_sound_gradient_passes_and_every_planted_fault_is_caught(vocab, dtype):
    labels, truth, eager, ours = problem(vocab, dtype)
    check_gradient(ours, truth, eager, labels)
    for fault in FAULTS:
        broken = fault(ours, labels)
        assert not torch.equal(broken, ours), f"{fault.__name__} changed nothing"
        with pytest.raises(AssertionError):
            check_gradient(broken, truth, eager, labels)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_flat_tolerance_or_one_norm_would_not_catch_them(dtype):
    """The usual checks accept a gradient whose non-label entries are 0, which is why ours is stricter."""
    labels, truth, _, ours = problem(128_256, dtype, spread=0.1)
    broken = tail_zeroed(ours, labels)
    torch.testing.assert_close(broken.double(), truth, atol=5e-5, rtol=1e-2)
    assert float((broken.double() - truth).norm() / truth.norm()) < 0.02
