"""Real vocabularies, and more than 2^31 logits: index arithmetic and accumulation at full size."""

import pytest
import torch

from dpo_kernels import dpo_loss, reference
from dpo_kernels.backends import cpu

from checks import check_gradient

# GPT-2, Llama 3, Qwen and Gemma. Rows of GPT-2 and Qwen (odd sizes) start unaligned. Gemma's is the largest in use.
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
    """The last row of a [2, 8400, 128256] bfloat16 tensor (4.3 GB) is read and written at the right address."""
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


ROWS, VOCAB = 16_800, 128_256  # 2.15e9 entries: indices beyond 2^31, and beyond 2^32 bytes in 16 bits


@pytest.fixture
def native():
    """The CPU library's operators. Each test below gives an operator a tensor of more than 2^31 elements."""
    cpu.check_available("cpu")
    assert ROWS * VOCAB > 2**31
    return torch.ops.dpo_kernels_cpu


@pytest.mark.slow
def test_products_beyond_two_to_the_31(native):
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(*shape, generator=g).bfloat16() for shape in ((ROWS, 3), (3, VOCAB)))
    out = torch.empty(ROWS, VOCAB, dtype=torch.bfloat16)
    cpu.product(a, b, out)
    for rows in (slice(0, 2), slice(ROWS - 2, ROWS)):
        torch.testing.assert_close(out[rows].double(), a[rows].double() @ b.double(), rtol=2**-8, atol=1e-6)
    # Use the large tensor as an operand, in both orientations.
    for matrix, entries in ((out, ROWS), (out.t(), VOCAB)):
        selected = torch.zeros(matrix.shape[1], 1)
        selected[-1] = 1.0
        column = torch.empty(entries, 1)
        cpu.product(matrix, selected.bfloat16(), column)
        assert torch.equal(column[:, 0], matrix[:, -1].float())


@pytest.mark.slow
def test_the_filter_beyond_two_to_the_31_logits(native):
    logits = torch.zeros(ROWS, VOCAB, dtype=torch.bfloat16)
    logits[-1, -2] = 30.0  # nearly all of the last row's probability
    labels = torch.zeros(ROWS, dtype=torch.int64)
    labels[-1] = VOCAB - 1
    lse = torch.full((ROWS,), float(VOCAB), dtype=torch.float64).log()
    lse[-1] = logits[-1].double().logsumexp(0)
    logps = logits[torch.arange(ROWS), labels].double() - lse
    counts = torch.empty(ROWS, dtype=torch.int64)
    native.filter_count(logits, labels, lse, 0.5, 1.0, 0.0, counts)
    assert counts.tolist() == [1] * (ROWS - 1) + [2]
    row_ptr = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    index, value = torch.empty(ROWS + 1, dtype=torch.int32), torch.empty(ROWS + 1)
    tail, dropped = torch.empty(2, ROWS, dtype=torch.float64).unbind()
    native.filter_fill(logits, labels, logps, lse, 0.5, 1.0, 0.0, row_ptr, index, value, tail, dropped)
    assert index[-3:].tolist() == [0, VOCAB - 2, VOCAB - 1]
    assert value[-2].item() == pytest.approx(-1.0)
    assert value[-1].item() == pytest.approx(1.0)


@pytest.mark.slow
def test_filtered_gradients_beyond_two_to_the_31(native):
    hidden_size = ROWS  # the head [V, H], and its gradient
    index = torch.tensor([VOCAB - 1], dtype=torch.int32)
    value, row_ptr = torch.tensor([2.0]), torch.tensor([0, 1])
    tail, grad = torch.zeros(1, dtype=torch.float64), torch.tensor([3.0], dtype=torch.float64)
    weight = torch.zeros(VOCAB, hidden_size, dtype=torch.bfloat16)
    weight[-1] = torch.arange(hidden_size) % 256
    out = torch.zeros(1, hidden_size)
    mean = torch.zeros(hidden_size, dtype=torch.float64)
    native.filtered_grad_hidden(index, value, row_ptr, tail, grad, weight, mean, out)
    assert torch.equal(out[0], 6.0 * weight[-1].float())
    hidden = weight[-1:].clone()
    del weight
    grad_weight = torch.empty(VOCAB, hidden_size)  # 8.6 GB
    native.filtered_grad_weight(index, value, row_ptr, grad, hidden, mean, False, grad_weight)
    assert torch.equal(grad_weight[-1], 6.0 * hidden[0].float())
    assert not bool(grad_weight[-2].any())
    assert not bool(grad_weight[0].any())
