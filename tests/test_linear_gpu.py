"""The linear path on a pretend GPU: synchronisations, bytes moved for gradients, alignment of logits, memory budget.

The numbers are checked as on a CPU (test_linear.py's cases and budgets). The kernels run in Triton's interpreter.
"""

import dataclasses
import logging

import pytest
import torch
from pretend_gpu import PretendGPU
from test_linear import BY_NAME, CASES, Case, check_rows, make_inputs, row_budget, textbook

from dpo_kernels import linear_logps, memory
from dpo_kernels.backends.triton.launch import rows_aligned
from dpo_kernels.linear.chunk import logits_buffer
from dpo_kernels.linear.gpu import GPU_SHARE

_BF16, _F16, _F32, _F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64

# numpy, which the interpreter uses, warns about the NaN that the tests make the kernels produce.
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="a pretend GPU stands where none is"),
]


@pytest.fixture(autouse=True)
def no_card_was_ever_short():
    memory._short.clear()
    yield
    memory._short.clear()


def on(gpu, inputs):
    """The inputs on the pretend GPU. Leaves stay leaves."""

    def move(value):
        moved = gpu.tensor(value) if isinstance(value, torch.Tensor) else value
        return moved.requires_grad_() if isinstance(value, torch.Tensor) and value.requires_grad else moved

    words = {name: move(value) for name, value in inputs.keywords.items()}
    return dataclasses.replace(
        inputs,
        hidden=move(inputs.hidden),
        weight=move(inputs.weight),
        bias=move(inputs.bias),
        labels=move(inputs.labels),
        keywords=words,
    )


def step(gpu, inputs, factor=1.0):
    """(loss, gradients) on the CPU, of `factor` times the loss."""
    moved = on(gpu, inputs)
    gpu.reset()
    out = moved.loss(grad_filter=None)
    gradients = torch.autograd.grad(out.loss.sum() * factor, moved.trained)
    return out.loss.inner, [gradient.inner for gradient in gradients]


def for_gpu(case):
    """The case's inputs, with a budget for the same number of rows on a GPU."""
    inputs = make_inputs(case)
    if case.rows is not None:
        inputs.keywords["memory_budget"] = row_budget(case, case.rows, "cuda")
    return inputs


#: One case of each strategy and chunking, and every kind of loss. The other cases take a minute and are slow tests.
QUICK = {
    "whole_pairs",
    "pairs_beyond_the_budget",
    "bfloat16_in_groups_packed",
    "ipo_in_groups",
    "frozen_head_in_chunks",
    "coupled_two_pass",
    "tdpo_packed_in_groups",
    "wpo",
}


@pytest.mark.parametrize(
    "case", [case if case.name in QUICK else pytest.param(case, marks=pytest.mark.slow) for case in CASES], ids=str
)
def test_a_call_waits_once_and_its_rows_hold_the_float64_truth(case):
    """Forward and backward, in every strategy and chunking, read only the counts of scored tokens from the device."""
    inputs = for_gpu(case)
    with PretendGPU() as gpu:
        loss, gradients = step(gpu, inputs)
    if case.dtype != _F64:  # float64 runs on the eager backend, which may synchronise
        assert gpu.syncs in (["tolist"], ["nonzero"])
    truth_loss, truth = textbook(inputs.cast(_F64))
    eager = textbook(inputs)[1]
    torch.testing.assert_close(loss.double(), truth_loss, rtol=0.02 if case.dtype.itemsize == 2 else 1e-5, atol=1e-6)
    for mine, true, theirs in zip(gradients, truth, eager, strict=True):
        check_rows(mine, true, theirs)


def run_filtered(gpu, inputs, **words):
    moved = on(gpu, inputs)
    gpu.reset()
    out = moved.loss(statistics=("grad_dropped_mass",), **words)
    torch.autograd.grad(out.loss, moved.trained)
    return out.grad_dropped_mass.inner


def test_the_block_filter_waits_once_as_well():
    inputs = make_inputs(dataclasses.replace(BY_NAME["bfloat16"], vocab=600, hidden_size=32))
    with torch.no_grad():
        inputs.weight *= 4
    for loss_type in ("sigmoid", "aot"):  # whole pairs, two passes
        with PretendGPU() as gpu:
            dropped = run_filtered(gpu, inputs, grad_filter=0.01, loss_type=loss_type)
        assert gpu.syncs in (["tolist"], ["nonzero"])
        assert bool(dropped.any())


def test_auto_is_exact_on_a_gpu_and_the_plan_says_so(caplog):
    """A narrow bfloat16 head, which an earlier estimate of the kernels' rate filtered."""
    inputs = make_inputs(
        dataclasses.replace(BY_NAME["coupled_two_pass_bfloat16"], vocab=600, hidden_size=32, rows=None)
    )
    with torch.no_grad():
        inputs.weight *= 4
    with caplog.at_level(logging.DEBUG, "dpo_kernels.linear"), PretendGPU() as gpu:
        dropped = run_filtered(gpu, inputs, grad_filter="auto")
    assert not dropped.any()
    assert "the gradient is exact" in caplog.text


# --- dW -------------------------------------------------------------------------------------------------------------

#: A case in which only the head's gradient is large: 16 tokens, 2,048 x 64 entries.
TALL = Case("tall", dtype=_BF16, vocab=2048, hidden_size=64, pairs=2, length=4)
ENTRIES = TALL.vocab * TALL.hidden_size


def moved(case, main_grad=False, tokens=False, factor=0.37):
    """(bytes that operations other than products move for each entry of dW, the gradient, allocations) of one step."""
    inputs = for_gpu(case)
    with PretendGPU() as gpu:
        there = on(gpu, inputs)
        if main_grad:
            there.weight.main_grad = gpu.tensor(torch.zeros(case.vocab, case.hidden_size))
        gpu.reset()
        if tokens:
            words = {"memory_budget": there.keywords.get("memory_budget")}
            loss = linear_logps(there.hidden, there.weight, there.labels, **words).sum()
        else:
            loss = there.loss().loss
        (loss * factor).backward()
        found = there.weight.main_grad if main_grad else there.weight.grad
        assert (there.weight.grad is None) == main_grad
        return gpu.bytes / ENTRIES, found.inner, gpu.allocated


# Each access of an entry moves 4 bytes for float32 and 2 bytes for 16 bits. Half a byte per entry is left for small tensors.
@pytest.mark.parametrize(
    ("rows", "main_grad", "tokens", "most"),
    [
        (None, False, False, 0),  # one chunk: the product writes the weight's dtype
        pytest.param(None, False, True, 0, marks=pytest.mark.slow),
        (None, True, False, 0),  # or adds to the buffer
        (6, False, False, 6),  # several chunks: one pass scales and casts
        (6, False, True, 6),
        (6, True, False, 12),  # or scales and adds
        pytest.param(6, True, True, 0, marks=pytest.mark.slow),
    ],
)
def test_gradients_of_the_head_move_once_at_most(rows, main_grad, tokens, most):
    case = dataclasses.replace(TALL, rows=rows)
    each, gradient, allocated = moved(case, main_grad, tokens)
    assert most <= each < most + 0.5
    assert gradient.dtype == (_F32 if main_grad else _BF16)
    assert (4 * ENTRIES in allocated) == ((rows is not None and not main_grad) or (rows is not None and not tokens))
    if not tokens:
        inputs = make_inputs(case)
        index = [t is inputs.weight for t in inputs.trained].index(True)
        truth, eager = (textbook(x)[1][index] * 0.37 for x in (inputs.cast(_F64), inputs))
        check_rows(gradient, truth, eager if not main_grad else eager.float())


def test_a_loss_scale_saves_float16_gradients_from_underflow():
    """A GradScaler's factor must be applied to dz before rounding. Otherwise entries of dW of 1e-9 underflow."""
    case = dataclasses.replace(TALL, dtype=_F16, options={"beta": 1e-5})
    _, gradient, _ = moved(case, factor=2.0**15)
    inputs = make_inputs(case)
    truth = textbook(inputs.cast(_F64))[1][1] * 2.0**15
    error = (gradient.double() - truth).norm() / truth.norm()
    assert float(error) < 0.01


# --- rows of logits -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab", [2047, 50257, pytest.param(151669, marks=pytest.mark.slow)])
def test_products_get_rows_of_logits_that_begin_at_128_bytes(vocab):
    case = Case("odd", dtype=_BF16, vocab=vocab, hidden_size=8, pairs=1, length=2)
    inputs = make_inputs(case)
    stride = -(-vocab // 64) * 64
    with PretendGPU() as gpu:
        _, gradients = step(gpu, inputs)
        strides = [operand.stride for _, operands in gpu.products for operand in operands if vocab in operand.shape]
        buffer = logits_buffer(3, vocab, _BF16, torch.device("cuda"))
        assert rows_aligned(buffer.inner.unsqueeze(0), 8)
    # Two projections, dH and dW have the logits as an operand. The other strides are the head's.
    wide = [value for value in strides if max(value) > 8]
    assert len(wide) >= 4
    assert all(max(value) == stride for value in wide)
    truth, eager = textbook(inputs.cast(_F64))[1], textbook(inputs)[1]
    for mine, true, theirs in zip(gradients, truth, eager, strict=True):
        check_rows(mine, true, theirs)


# --- the budget -----------------------------------------------------------------------------------------------------


def test_the_default_budget_is_a_share_of_the_card_and_the_plan_says_it(caplog):
    inputs = for_gpu(BY_NAME["whole_pairs"])
    with caplog.at_level(logging.DEBUG, "dpo_kernels.linear"), PretendGPU(memory=85 * 10**9) as gpu:
        step(gpu, inputs)
    assert f"of {GPU_SHARE * 85e9 / 2**20:.1f} MiB" in caplog.text


@pytest.mark.parametrize("name", ["whole_pairs", "coupled", pytest.param("frozen_head", marks=pytest.mark.slow)])
def test_a_card_without_room_gets_smaller_chunks_and_the_same_numbers(name, caplog):
    case = dataclasses.replace(BY_NAME[name], rows=None)
    inputs = make_inputs(case)
    with PretendGPU() as gpu:
        _, whole = step(gpu, inputs)
    largest = 5 * 97 * 4 * 4  # five rows and their temporary tensors; this is more than dW
    with caplog.at_level(logging.DEBUG, "dpo_kernels.linear"), PretendGPU(largest=largest) as gpu:
        _, parts = step(gpu, inputs)
        assert gpu.syncs in (["tolist"], ["nonzero"])
    assert "no room for the budget" in caplog.text
    assert max(gpu.allocated) <= largest
    for mine, other in zip(parts, whole, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-7)


def test_a_card_that_was_short_is_asked_for_its_free_memory_first():
    device = torch.device("cuda", 0)
    with PretendGPU(largest=1000):
        assert memory.available(device, 600, 900)
        assert not memory.available(device, 600, 1001)
        # The driver reports 1,000 free bytes. Two blocks that would each fit, but not both, are refused without trying.
        assert not memory.available(device, 600, 900)
        assert memory.available(device, 600, 300)
    assert memory.available(torch.device("cpu"), 2**60)
