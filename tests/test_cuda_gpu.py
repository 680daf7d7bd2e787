"""The compiled CUDA library on a real GPU: operator table, whole calls, streams, graphs, and sizes too large for a CPU."""

from __future__ import annotations

import pytest
import test_objectives_kl
import test_operators
import torch
from bad_bounds import bad_bounds, clamped_sums

from dpo_kernels import dpo_loss, use_backend
from dpo_kernels.backends import eager, whole_call
from dpo_kernels.backends.whole_call import Family, Weighting
from dpo_kernels.stages import STATISTICS, Transform

from cases import CASES, make_inputs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="no CUDA device; tests/test_cuda_emulator.py runs the same kernels"
    ),
]

PLAIN = Transform()
SIGMOID = Family(None, None, 0.1, None, 0.0, False)


@pytest.fixture
def stages():
    """The backend's module. A machine that runs `pytest -m gpu` must be able to load it."""
    from dpo_kernels.backends import cuda

    cuda.check_available("cuda")
    return cuda


def batch(shape: tuple[int, int, int], dtype: torch.dtype, seed: int = 0):
    g = torch.Generator("cuda").manual_seed(seed)
    logits = (torch.randn(shape, generator=g, device="cuda") * 3).to(dtype)
    ref = (logits.float() + torch.randn(shape, generator=g, device="cuda") * 0.3).to(dtype)
    labels = torch.randint(0, shape[-1], shape[:-1], generator=g, device="cuda")
    labels[:, 0] = -100
    return logits, ref, labels


@pytest.mark.parametrize("case", [c for c in CASES if c.dtype != torch.float64], ids=str)
@pytest.mark.parametrize("name", ["cuda", "triton", "eager"])
def test_operator_table(name, case):
    device = torch.device("cuda")
    test_operators.test_loss_and_gradient_equal_the_float64_reference(name, case, device)
    if case.reference == "logits":
        test_operators.test_statistics_and_logps_equal_the_float64_reference(name, case, device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("upstream", test_objectives_kl.UPSTREAM)
@pytest.mark.parametrize("name", ["cuda", "triton", "eager"])
def test_gradient_of_token_divergences(name, upstream, dtype):
    for vocab in (7, 2101, 50257):
        test_objectives_kl.test_the_stage_equals_the_float64_truth(upstream, dtype, vocab, name, torch.device("cuda"))


@pytest.mark.parametrize("packed", [False, True])
def test_the_public_loss_is_the_separate_stages_bit_for_bit(stages, packed, monkeypatch):
    case = next(c for c in CASES if c.name == ("packed_bfloat16" if packed else "bfloat16"))
    inputs = make_inputs(case, "cuda")
    found = []
    for separate in (False, True):
        if separate:
            monkeypatch.delattr(stages, "preference_forward")
            monkeypatch.delattr(stages, "preference_backward")
        logits = inputs.logits.clone().requires_grad_()
        with use_backend("cuda"):
            out = dpo_loss(logits, inputs.labels, statistics=("entropy", "kl"), **inputs.keywords)
            out.loss.backward()
        found.append((out.losses, out.chosen_logps, out.rejected_rewards, out.entropy, out.kl, logits.grad))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_bad_bounds_are_clamped(stages):
    logits, ref, labels = batch((1, 64, 1000), torch.bfloat16)
    weights = (labels >= 0).double()
    for _, bounds in [*bad_bounds(64), ("sound", [0, 16, 32, 48, 64])]:
        cu = torch.tensor(bounds, device="cuda")
        call = (logits, labels, ref, PLAIN, STATISTICS, Weighting(None, cu, None, "mean"), SIGMOID)
        results = stages.preference_forward(*call)
        separate = whole_call.preference_forward(stages, *call)
        assert all(torch.equal(a, b) for a, b in zip(results[:3], separate[:3], strict=True))
        tokens, sequences, *_ = results
        torch.testing.assert_close(sequences[0], clamped_sums(tokens[0], weights, bounds), rtol=1e-12, atol=1e-12)
        stages.preference_backward(logits, labels, *results[:2], results[3], PLAIN, call[5], torch.empty_like(logits))


# Real vocabularies: SmolLM2, GPT-2 (odd), Llama 3, Qwen 3 (odd), Gemma.
@pytest.mark.parametrize("vocab", [49152, 50257, 128256, 151669, 262144])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_real_vocabularies(stages, dtype, vocab):
    # On sm_90 and later, 4 rows run in clusters and 4,096 rows do not. The bits must be the same.
    logits, ref, labels = batch((4, 8, vocab), dtype)
    for statistics in ((), STATISTICS):
        ours = stages.token_logps(logits, labels, ref, PLAIN, statistics)
        truth = eager.token_logps(logits.double(), labels, ref.double(), PLAIN, statistics)
        lost = eager.token_logps(logits, labels, ref, PLAIN, statistics)
        for mine, true, theirs in zip(ours, truth, lost, strict=True):
            budget = (theirs - true).abs().max() + 4 * 2**-24 * true.abs().clamp(min=1.0)
            assert ((mine - true).abs() <= budget).all()
        repeated = (t.repeat(32, 1, *[1] * (t.dim() - 2)) for t in (logits, labels, ref))
        assert torch.equal(stages.token_logps(*repeated, PLAIN, statistics)[:, :4], ours)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_whole_call_equals_its_stages_every_time(stages, reduction):
    logits, ref, labels = batch((16, 64, 4096), torch.bfloat16)
    small = {"dtype": torch.float64, "device": "cuda"}
    every = torch.linspace(0.1, 0.4, 8, **small)
    weighting = Weighting(torch.rand(16, 64, **small) + 0.1, None, every, reduction)
    for statistics in ((), STATISTICS):
        call = (logits, labels, ref, PLAIN, statistics, weighting, Family(None, every, 0.0, every, 0.0, False))
        separate = whole_call.preference_forward(stages, *call)
        grad_loss, expected = torch.full_like(separate[3], 0.7), torch.empty_like(logits)
        backward = (labels, *separate[:2], grad_loss, PLAIN, weighting)
        whole_call.preference_backward(stages, logits, *backward, expected)
        for _ in range(50):  # the order in which blocks finish changes from run to run, but the bits must not
            results = stages.preference_forward(*call)
            assert all(torch.equal(a, b) for a, b in zip(results[:3], separate[:3], strict=True))
            torch.testing.assert_close(results[3], separate[3], rtol=2e-7, atol=0)
        out = torch.empty_like(logits)
        stages.preference_backward(logits, *backward, out)
        assert torch.equal(out, expected)


def test_current_stream_is_used(stages):
    """The stream waits until the logits are written. On the default stream the kernel would read zeros."""
    logits, ref, labels = batch((2, 16, 32000), torch.bfloat16)
    expected = stages.token_logps(logits, labels, ref, PLAIN, STATISTICS)
    late = torch.zeros_like(logits)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        late.copy_(logits)
        found = stages.token_logps(late, labels, ref, PLAIN, STATISTICS)
    stream.synchronize()
    assert torch.equal(found, expected)


def test_cuda_graph_replays(stages):
    logits, ref, labels = batch((4, 16, 32000), torch.bfloat16)
    weighting = Weighting(None, None, None, "mean")

    def step():
        results = stages.preference_forward(logits, labels, ref, PLAIN, STATISTICS, weighting, SIGMOID)
        out = torch.empty_like(logits)
        stages.preference_backward(logits, labels, *results[:2], results[3], PLAIN, weighting, out)
        return (*results, out)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in (1, 2):
        fresh, fresh_ref, _ = batch((4, 16, 32000), torch.bfloat16, seed)
        logits.copy_(fresh)
        ref.copy_(fresh_ref)
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))


def test_graph_trees_beside_eager_calls_on_another_stream(stages):
    """With torch.compile(mode="reduce-overhead"), all memory that a call allocates is from the graph's pool."""
    inputs = make_inputs(next(c for c in CASES if c.name == "bfloat16"), "cuda")

    def loss_of(logits):
        with use_backend("cuda"):
            return dpo_loss(logits, inputs.labels, **inputs.keywords).losses

    compiled = torch.compile(loss_of, mode="reduce-overhead")
    expected, stream = loss_of(inputs.logits), torch.cuda.Stream()
    torch.cuda.synchronize()
    for _ in range(5):  # warm-up, recording, replays
        torch.compiler.cudagraph_mark_step_begin()
        replayed = compiled(inputs.logits)
        with torch.cuda.stream(stream):
            beside = loss_of(inputs.logits)
        torch.cuda.synchronize()
        assert torch.equal(replayed, expected)
        assert torch.equal(beside, expected)


def test_more_than_two_to_the_thirty_one_logits(stages):
    if torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("needs 12 GB of free GPU memory")
    vocab, tokens = 128256, 17000  # 2.18e9 logits, 4.4 GB
    logits = torch.zeros(1, tokens, vocab, dtype=torch.bfloat16, device="cuda")
    logits[0, -1, 7] = 20.0
    labels = torch.full((1, tokens), 7, device="cuda")
    small = stages.token_logps(logits, labels, None, PLAIN, ())
    logps = small[0]
    assert logps[0, 0].item() == pytest.approx(-torch.tensor(float(vocab)).log().item(), rel=1e-6)
    assert logps[0, -1].item() > -1e-3
    g = torch.ones_like(logps)
    stages.logits_grad(logits, labels, *small, g, PLAIN, logits)
    torch.testing.assert_close(logits[0, 0].float().sum().item(), 0.0, atol=2e-2, rtol=0)
    assert logits[0, -1, 7].item() == pytest.approx(-torch.expm1(logps[0, -1]).item(), rel=1e-2)


def test_no_synchronisation(stages):
    logits, ref, labels = batch((4, 16, 32000), torch.bfloat16)
    x = logits.requires_grad_()
    with use_backend("cuda"):
        dpo_loss(x, labels, ref_logits=ref).loss.backward()  # loads and warms
        torch.cuda.set_sync_debug_mode("error")
        try:
            dpo_loss(x, labels, ref_logits=ref).loss.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
