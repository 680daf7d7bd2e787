"""Real vocabularies, and more than 2^31 logits: index arithmetic and accumulation at full size."""

import pytest
import torch

from dpo_kernels import dpo_loss, reference

from checks import check_gradient

# GPT-2 and Qwen are odd sizes whose rows start unaligned; Llama 3 is the common large one; Gemma the largest in use.
VOCABULARIES = [50_257, 128_256, 151_669, 262_144]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_real_vocabularies(vocab, dtype, device):
    g = torch.Generator().manual_seed(vocab)
    logits, ref_logits = ((torch.randn(2, 3, vocab, generator=g) * 3).to(dtype).to(device) for _ in range(2))
    labels = torch.tensor([[-100, 0, vocab - 1], [vocab // 2, -100, 2048]], device=device)
    ours = logits.clone().requires_grad_()
    out = dpo_loss(ours, labels, ref_logits=ref_logits, statistics=("kl", "entropy"))
    out.loss.backward()

    def by_definition(work):
        x = logits.to(work).requires_grad_()
        loss = reference.dpo_loss(x, labels, ref_logits=ref_logits.to(work))
        loss.backward()
        return loss.item(), x.grad

    truth, truth_grad = by_definition(torch.float64)
    eager, eager_grad = by_definition(torch.float32)
    assert abs(out.loss.item() - truth) <= abs(eager - truth) + 1e-7
    check_gradient(ours.grad, truth_grad, eager_grad.to(dtype), labels)
    tokens = reference.token_statistics(logits.double(), labels, ref_logits=ref_logits.double())
    counts = (labels != -100).sum(-1)
    torch.testing.assert_close(out.kl.double(), tokens["kl"].sum(-1) / counts, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(out.entropy.double(), tokens["entropy"].sum(-1) / counts, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_more_than_two_to_the_31_logits(device):
    """The last row of a [2, 8400, 128256] bfloat16 tensor (4.3 GB) is found, read and written at its place."""
    vocab, length = 128_256, 8_400
    logits = torch.zeros(2, length, vocab, dtype=torch.bfloat16, device=device)
    assert logits.numel() > 2**31
    labels = torch.full((2, length), -100, device=device)
    labels[0, 0], labels[1, -1] = 5, vocab - 1
    g = torch.Generator().manual_seed(0)
    row = (torch.randn(vocab, generator=g) * 3).to(torch.bfloat16).to(device)
    logits[1, -1] = row
    logits.requires_grad_()
    out = dpo_loss(logits, labels, ref_logps=torch.zeros(2, device=device), inplace_backward=True)
    out.loss.backward()
    alone = row.double().requires_grad_()
    logp = alone.log_softmax(-1)[-1]
    assert out.rejected_logps.item() == pytest.approx(logp.item(), rel=1e-6)
    logp.backward()
    coefficient = 0.1 * torch.sigmoid(-0.1 * (out.chosen_logps - out.rejected_logps).double()).item()
    expected = coefficient * alone.grad
    found = logits.grad[1, -1].double()
    assert float((found - expected).norm() / expected.norm()) < 4e-3
    assert bool((logits.grad[1, :-1] == 0).all())
    assert bool((logits.grad[0, 1:] == 0).all())
