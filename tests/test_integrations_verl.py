"""verl's functions, written out, give the same results with the patch as without it.

tests/test_frameworks.py runs the real versions. Here are their contracts on inputs that a normal step does not have.
"""

import json
import subprocess
import sys
import types
import warnings

import pytest
import torch
from frameworks import matrix

from dpo_kernels.integrations import verl as integration

LOGITS, HIDDEN = "verl.utils.torch_functional", "verl.utils.experimental.torch_functional"


def logprobs_from_logits(logits, labels, inplace_backward=True):
    module = sys.modules[LOGITS]
    if module.FLAH_ATTN_CROSS_ENTROPY_LOSS_AVAILABLE:
        rows = logits.reshape(-1, logits.shape[-1])
        return -module.cross_entropy_loss(rows, labels.reshape(-1), inplace_backward)[0].view(logits.shape[:-1])
    return logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def entropy_from_logits(logits):
    return logits.logsumexp(-1) - (logits.softmax(-1) * logits).sum(-1)


def entropy_from_logits_with_chunking(logits, chunk_size=2048):
    return torch.cat([entropy_from_logits(chunk.float()) for chunk in logits.split(chunk_size)])


class FusedLinearForPPO(torch.nn.Module):
    """dtype: of the log-probabilities for 16-bit hidden states; None for theirs, as in verl up to 0.7."""

    dtype = torch.float32

    def __init__(self, impl_backend="torch"):
        super().__init__()
        self.impl_backend = impl_backend

    def forward(self, hidden_states, vocab_weights, input_ids, temperature=1.0):
        if self.impl_backend != "torch":
            return self.impl_backend
        logits = ((hidden_states @ vocab_weights.t()) / temperature).float()
        logps = logits.log_softmax(-1).gather(-1, input_ids.long().unsqueeze(-1)).squeeze(-1)
        return logps.to(FusedLinearForPPO.dtype or hidden_states.dtype), entropy_from_logits(logits).to(
            hidden_states.dtype
        )


ORIGINAL_FORWARD = FusedLinearForPPO.forward


@pytest.fixture(autouse=True)
def package(monkeypatch):
    """The package with the functions above; afterwards every original is back."""
    modules = {
        name: types.ModuleType(name)
        for name in (
            "verl",
            "verl.utils",
            LOGITS,
            "verl.utils.experimental",
            HIDDEN,
            "verl.workers",
            "verl.workers.actor",
        )
    }
    for name, module in modules.items():
        module.__path__ = []
        monkeypatch.setitem(sys.modules, name, module)
    functional = modules[LOGITS]
    functional.FLAH_ATTN_CROSS_ENTROPY_LOSS_AVAILABLE = False
    functional.logprobs_from_logits = logprobs_from_logits
    functional.entropy_from_logits = entropy_from_logits
    functional.entropy_from_logits_with_chunking = entropy_from_logits_with_chunking
    modules[HIDDEN].FusedLinearForPPO = FusedLinearForPPO
    modules["verl.workers.actor"].logprobs_from_logits = logprobs_from_logits
    # This file holds the originals under the names of the package, and would be patched, too.
    monkeypatch.setitem(sys.modules, __name__, types.ModuleType(__name__))
    yield types.SimpleNamespace(functional=functional, actor=modules["verl.workers.actor"], hidden=modules[HIDDEN])
    integration._PATCH.undo()
    assert FusedLinearForPPO.forward is ORIGINAL_FORWARD


def logits_of(*shape, dtype=torch.float32, seed=0):
    return (3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def labels_of(*shape, vocab, seed=1):
    return torch.randint(vocab, shape, generator=torch.Generator().manual_seed(seed))


def outcome(call, logits, *arguments, **named):
    """(result, gradient of the logits) with an upstream gradient that differs for every token."""
    leaf = logits.detach().clone().requires_grad_()
    result = call(leaf * 1, *arguments, **named)
    result.backward(torch.linspace(-1, 2, result.numel()).view(result.shape).to(result.dtype))
    return result.detach(), leaf.grad


TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-5, torch.float16: 2**-7}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCES)


@DTYPES
@pytest.mark.parametrize("inplace_backward", [True, False])
@pytest.mark.parametrize("shape", [(2, 5), (1, 9), (7,)])
def test_log_probabilities_are_those_of_the_original(shape, inplace_backward, dtype, package):
    logits, labels = logits_of(*shape, 33, dtype=dtype), labels_of(*shape, vocab=33)
    # In 16 bits the original's results have 8 or 11 bits; ours are float32, as flash-attn's.
    wanted, wanted_grad = outcome(logprobs_from_logits, logits.float() if dtype.itemsize == 2 else logits, labels)
    with integration.applied():
        call = package.functional.logprobs_from_logits
        found, grad = outcome(call, logits, labels, inplace_backward=inplace_backward)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert grad.dtype == dtype
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad, wanted_grad.to(dtype), rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])


@pytest.mark.parametrize(
    ("shape", "inplace_backward", "leaf", "overwritten"),
    [
        ((7,), True, False, True),
        ((7,), False, False, False),
        ((7,), True, True, False),
        ((1, 7), True, False, False),
    ],
)
def test_logits_are_overwritten_only_where_verl_no_longer_needs_them(
    shape, inplace_backward, leaf, overwritten, package
):
    source, labels = logits_of(*shape, 33).requires_grad_(), labels_of(*shape, vocab=33)
    logits = source if leaf else source * 1
    before = logits.detach().clone()
    with integration.applied():
        package.functional.logprobs_from_logits(logits, labels, inplace_backward=inplace_backward).sum().backward()
    assert torch.equal(logits.detach(), before) != overwritten
    wanted = outcome(lambda x, y: logprobs_from_logits(x, y).sum(), before, labels)[1]
    torch.testing.assert_close(source.grad, -wanted)


def test_log_probabilities_and_entropy_of_the_same_padded_logits(package):
    """The actor's padded step: a view of the responses, `inplace_backward` left at True, and an entropy bonus."""
    logits, labels = logits_of(2, 9, 33), labels_of(2, 4, vocab=33)

    def step(logps, entropy):
        def loss(logits):
            responses = (logits / 0.7)[:, -5:-1]
            return logps(responses, labels).sum() - 0.3 * entropy(responses).sum()

        return outcome(loss, logits)

    wanted = step(logprobs_from_logits, entropy_from_logits)
    with integration.applied():
        found = step(package.actor.logprobs_from_logits, package.functional.entropy_from_logits)
    torch.testing.assert_close(found, wanted)


def test_labels_of_a_row_fit_flat_logits(package):
    """flash-attn's branch flattens both, so labels [1, N] may come with logits [N, V]."""
    logits, labels = logits_of(7, 33), labels_of(1, 7, vocab=33)
    with integration.applied():
        found = package.functional.logprobs_from_logits(logits, labels)
    torch.testing.assert_close(found, logprobs_from_logits(logits, labels[0]))


def test_ignored_labels_give_0_and_labels_outside_the_vocabulary_an_error(package):
    logits, labels = logits_of(2, 4, 9), torch.full((2, 4), -100)
    with integration.applied():
        result, grad = outcome(package.functional.logprobs_from_logits, logits, labels)
        assert not result.any()
        assert not grad.any()
        for outside in (9, -1):
            labels[1, 2] = outside
            with pytest.raises(ValueError, match="label"):
                package.functional.logprobs_from_logits(logits, labels)


@DTYPES
@pytest.mark.parametrize("shape", [(2, 5), (7,), ()])
def test_entropies_are_those_of_the_original(shape, dtype, package):
    logits = logits_of(*shape, 33, dtype=dtype)
    wanted, wanted_grad = outcome(entropy_from_logits, logits.float() if dtype.itemsize == 2 else logits)
    with integration.applied():
        found, grad = outcome(package.functional.entropy_from_logits, logits)
    assert found.dtype == wanted.dtype
    assert found.shape == shape
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad, wanted_grad.to(dtype), rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])


@DTYPES
def test_chunked_entropies_are_float32(dtype, package):
    logits = logits_of(7, 33, dtype=dtype)
    wanted = outcome(lambda x: entropy_from_logits_with_chunking(x, chunk_size=3), logits)
    with integration.applied():
        found = outcome(lambda x: package.functional.entropy_from_logits_with_chunking(x, chunk_size=3), logits)
    assert found[0].dtype == torch.float32
    tolerance = max(TOLERANCES[dtype], 1e-5)
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("wrap", [lambda call: torch.compile(call, dynamic=True), "checkpoint"])
def test_the_entropy_works_compiled_and_checkpointed(wrap, package):
    """As verl's engines call it: through torch.compile by default, and with entropy_checkpointing."""
    logits = logits_of(7, 33)
    wanted = outcome(entropy_from_logits, logits)
    with integration.applied():
        call = package.functional.entropy_from_logits
        if wrap == "checkpoint":
            found = outcome(lambda x: torch.utils.checkpoint.checkpoint(call, x, use_reentrant=False), logits)
        else:
            found = outcome(wrap(call), logits)
    torch.testing.assert_close(found, wanted)


class Sharded(torch.Tensor):
    """A subclass of Tensor, like a DTensor: its results are left to verl."""


def test_other_kinds_of_tensors_use_verls_functions(package):
    logits, labels = logits_of(7, 33).as_subclass(Sharded), labels_of(7, vocab=33)
    module = FusedLinearForPPO()
    with integration.applied():
        assert type(package.functional.logprobs_from_logits(logits, labels)) is Sharded
        assert type(package.functional.entropy_from_logits(logits)) is Sharded
        assert type(package.functional.entropy_from_logits_with_chunking(logits)) is Sharded
        assert type(module(logits, logits_of(5, 33), labels % 5)[0]) is Sharded


def fused_outcome(hidden, weight, labels, temperature, bonus):
    hidden, weight = hidden.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()
    logps, entropy = FusedLinearForPPO()(hidden * 1, weight, labels, temperature)
    slope = torch.linspace(-1, 2, logps.numel()).view(logps.shape)
    ((logps.float() * slope).sum() + bonus * (entropy.float() * slope.flip(-1)).sum()).backward()
    return logps.detach(), entropy.detach(), hidden.grad, weight.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("narrow", [False, True], ids=["float32 results", "results of the hidden states' dtype"])
@pytest.mark.parametrize("bonus", [0.0, 0.5], ids=["no bonus", "entropy bonus"])
@pytest.mark.parametrize("shape", [(2, 5), (1, 9), (7,)])
def test_the_fused_backend_is_the_original(shape, bonus, narrow, dtype, monkeypatch):
    monkeypatch.setattr(FusedLinearForPPO, "dtype", None if narrow else torch.float32)
    hidden, weight = logits_of(*shape, 16).to(dtype), (logits_of(33, 16, seed=2) / 8).to(dtype)
    labels = labels_of(*shape, vocab=33).int()
    wanted = fused_outcome(hidden, weight, labels, 0.7, bonus)
    with integration.applied():
        found = fused_outcome(hidden, weight, labels, 0.7, bonus)
    assert [tensor.dtype for tensor in found] == [tensor.dtype for tensor in wanted]
    tolerance = 1e-5 if dtype == torch.float32 else 2**-4
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours / theirs.abs().max(), theirs / theirs.abs().max(), rtol=0, atol=tolerance)


def test_another_fused_backend_stays():
    with integration.applied():
        assert FusedLinearForPPO("liger")(None, None, None) == "liger"


def test_apply_replaces_every_import_and_undo_restores_it(package):
    undo = integration.apply()
    ours = package.functional.logprobs_from_logits
    assert ours is not logprobs_from_logits
    assert package.actor.logprobs_from_logits is ours
    assert FusedLinearForPPO.forward is not ORIGINAL_FORWARD
    undo = integration.apply()  # a second call replaces the first
    undo()
    assert package.functional.logprobs_from_logits is logprobs_from_logits
    assert package.actor.logprobs_from_logits is logprobs_from_logits
    assert package.functional.entropy_from_logits is entropy_from_logits
    assert package.functional.entropy_from_logits_with_chunking is entropy_from_logits_with_chunking
    assert FusedLinearForPPO.forward is ORIGINAL_FORWARD


def mean_entropy(logits):
    return entropy_from_logits(logits).mean()


def other_arguments(logits, dim=-1):
    return entropy_from_logits(logits)


@pytest.mark.parametrize("strange", [mean_entropy, other_arguments])
def test_an_unknown_function_is_left_alone_with_one_warning(strange, package):
    package.functional.entropy_from_logits = strange
    with pytest.warns(RuntimeWarning, match=r"verl .* was left as it is: .*entropy_from_logits") as seen:
        integration.apply()()
    assert len(seen) == 1
    assert package.functional.entropy_from_logits is strange
    assert package.functional.logprobs_from_logits is logprobs_from_logits
    assert FusedLinearForPPO.forward is ORIGINAL_FORWARD


def test_flash_attention_is_not_called_by_the_check(package):
    """flash-attn's kernels cannot read the check's tensors, which are on the CPU."""

    def kernel(logits, labels, inplace_backward):
        raise AssertionError("Pointer argument cannot be accessed from Triton (cpu tensor?)")

    package.functional.FLAH_ATTN_CROSS_ENTROPY_LOSS_AVAILABLE = True
    package.functional.cross_entropy_loss = kernel
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        integration.apply()
    assert package.functional.logprobs_from_logits is not logprobs_from_logits
    assert package.functional.FLAH_ATTN_CROSS_ENTROPY_LOSS_AVAILABLE


@pytest.mark.slow
@pytest.mark.parametrize("name", ["verl-0.8.0", "verl-0.9.1"])
def test_the_step_of_verl_with_fused_kernels_is_the_same(name):
    (entry,) = (entry for entry in matrix.ENTRIES if entry.name == name)
    code = """
import json
from tests.frameworks import compare
from tests.frameworks.steps.verl import step_of
from dpo_kernels.integrations import verl
print(json.dumps(compare.compare(step_of(compare.TINY, fused=True), verl.apply)))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=matrix.environment(entry),
        cwd=matrix.ROOT,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["kernels_used"] == ["linear_logps"]
    assert found["loss_difference"] < 1e-5
    assert found["grad_difference"] < 1e-4
    assert found["undone"]
