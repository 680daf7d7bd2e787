"""OpenRLHF's functions, written out, give the same results with the patch as without it.

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

from dpo_kernels.integrations import openrlhf as integration

FLASH = "flash_attn.ops.triton.cross_entropy"


def log_probs_from_logits(logits, labels, temperature=1.0):
    if temperature != 1.0:
        logits.div_(temperature)
    if logits.dtype in (torch.float32, torch.float64):
        try:
            from flash_attn.ops.triton.cross_entropy import cross_entropy_loss
        except ImportError:
            picked = logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
            return picked - logits.logsumexp(-1)
        return -cross_entropy_loss(logits.flatten(0, -2), labels.flatten())[0].view(labels.shape)
    return logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)


@torch.compile
def compute_entropy(logits):
    return logits.logsumexp(-1) - (logits.softmax(-1) * logits).sum(-1)


class DPOTrainer:
    def __init__(self):
        self.strategy = types.SimpleNamespace(ring_attn_group=None)
        self.tokenizer = types.SimpleNamespace(pad_token_id=0)

    def concatenated_forward(self, model, chosen_ids, c_mask, reject_ids, r_mask, prompt_id_lens):
        ids, masks, lengths = self.concatenated_inputs(chosen_ids, c_mask, reject_ids, r_mask, prompt_id_lens)
        logps, output = model(
            ids,
            attention_mask=masks,
            return_output=True,
            return_logprobs=True,
            ring_attn_group=self.strategy.ring_attn_group,
        )
        sums, means = self._get_batch_logps(logps, masks, lengths)
        pairs = len(chosen_ids)
        aux_loss = output.aux_loss if "aux_loss" in output else []
        return sums[:pairs], sums[pairs:], aux_loss, -means[:pairs].mean()

    def concatenated_inputs(self, chosen_ids, c_mask, reject_ids, r_mask, prompt_id_lens):
        width = max(chosen_ids.shape[1], reject_ids.shape[1])

        def wide(tensor, value):
            return torch.nn.functional.pad(tensor, (0, width - tensor.shape[1]), value=value)

        ids = torch.cat([wide(chosen_ids, self.tokenizer.pad_token_id), wide(reject_ids, self.tokenizer.pad_token_id)])
        return ids, torch.cat([wide(c_mask, 0), wide(r_mask, 0)]), prompt_id_lens * 2

    def _get_batch_logps(self, per_token_logps, attention_mask, prompt_id_lens):
        counted = attention_mask.clone().bool()
        for row, length in zip(counted, prompt_id_lens, strict=False):
            row[:length] = False
        counted = counted[:, 1:]
        sums = (per_token_logps * counted).sum(-1)
        return sums, sums / counted.sum(-1)


ORIGINALS = (log_probs_from_logits, compute_entropy, DPOTrainer.concatenated_forward)


class Actor:
    """OpenRLHF's model, around logits [2P, T, V] that are given."""

    def __init__(self, logits, packed):
        self.logits, self.packed = logits, packed

    def __call__(self, ids, attention_mask, **_):
        log_probs = sys.modules["openrlhf.models.actor"].log_probs_from_logits
        labels, logits = ids.roll(-1, dims=1), self.logits * 1
        self.read = logits
        if not self.packed:
            return log_probs(logits, labels)[:, :-1], {}
        indices = attention_mask.flatten().nonzero().flatten()
        self.read = logits.flatten(0, 1)[indices].unsqueeze(0)
        found = log_probs(self.read, labels.flatten()[indices].unsqueeze(0))
        full = found.new_zeros(ids.numel()).index_put((indices,), found.flatten())
        return full.view(ids.shape)[:, :-1], {}


@pytest.fixture(autouse=True)
def package(monkeypatch):
    """The package with the functions above; afterwards every original is back."""
    modules = {
        name: types.ModuleType(name)
        for name in (
            "openrlhf",
            "openrlhf.models",
            "openrlhf.models.utils",
            "openrlhf.models.actor",
            "openrlhf.trainer",
            "openrlhf.trainer.dpo_trainer",
        )
    }
    for name, module in modules.items():
        module.__path__ = []
        monkeypatch.setitem(sys.modules, name, module)
    for name in ("openrlhf.models.utils", "openrlhf.models.actor"):
        modules[name].log_probs_from_logits = log_probs_from_logits
        modules[name].compute_entropy = compute_entropy
    modules["openrlhf.trainer.dpo_trainer"].DPOTrainer = DPOTrainer
    # This file holds the originals under the names of the package, and would be patched, too.
    monkeypatch.setitem(sys.modules, __name__, types.ModuleType(__name__))
    yield types.SimpleNamespace(
        utils=modules["openrlhf.models.utils"],
        actor=modules["openrlhf.models.actor"],
        dpo_trainer=modules["openrlhf.trainer.dpo_trainer"],
    )
    integration._PATCH.undo()
    assert DPOTrainer.concatenated_forward is ORIGINALS[2]


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


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
@pytest.mark.parametrize("shape", [(2, 5), (1, 9), (7,)])
def test_log_probabilities_are_those_of_the_original(shape, temperature, dtype, package):
    logits, labels = logits_of(*shape, 33, dtype=dtype), labels_of(*shape, vocab=33)
    wanted = outcome(log_probs_from_logits, logits, labels, temperature=temperature)
    with integration.applied():
        assert package.utils.log_probs_from_logits is not log_probs_from_logits
        found = outcome(package.utils.log_probs_from_logits, logits, labels, temperature=temperature)
    assert found[0].dtype == wanted[0].dtype == dtype
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 2**-6)
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


def test_the_dpo_trainers_views_are_read_in_place(package):
    logits, labels = logits_of(3, 6, 21), labels_of(3, 6, vocab=21)
    wanted = outcome(lambda x: log_probs_from_logits(x[:, :-1], labels[:, 1:]), logits)
    with integration.applied():
        call = package.utils.log_probs_from_logits
        torch.testing.assert_close(outcome(lambda x: call(x[:, :-1], labels[:, 1:]), logits), wanted)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_entropies_are_those_of_the_original(dtype, package):
    logits = logits_of(2, 5, 33, dtype=dtype)
    wanted = outcome(compute_entropy._torchdynamo_orig_callable, logits)
    with integration.applied():
        found = outcome(package.actor.compute_entropy, logits)
    assert found[0].dtype == wanted[0].dtype == dtype
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 2**-4)
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


def test_ignored_labels_give_0_and_labels_outside_the_vocabulary_an_error(package):
    logits, labels = logits_of(2, 4, 9), torch.full((2, 4), -100)
    with integration.applied():
        result, grad = outcome(package.utils.log_probs_from_logits, logits, labels)
        assert not result.any()
        assert not grad.any()
        for outside in (9, -1):
            labels[1, 2] = outside
            with pytest.raises(ValueError, match="label"):
                package.utils.log_probs_from_logits(logits, labels)


def batch():
    """(chosen ids and mask, rejected ids and mask, lengths of the prompts) of 2 pairs with padding on the right."""
    ids = labels_of(4, 9, vocab=33)
    mask = (torch.arange(9) < torch.tensor([9, 6, 7, 8]).unsqueeze(1)).long()
    return ids[:2], mask[:2], ids[2:, :8], mask[2:, :8], [3, 2]


def dpo_step(logits, packed):
    """Sums of both sides and the mean, and the gradient of the logits [4, 9, 33]."""
    leaf = logits.clone().requires_grad_()
    actor = Actor(leaf, packed)
    chosen, rejected, _, nll = DPOTrainer().concatenated_forward(actor, *batch())
    results = torch.stack([*chosen, *rejected, nll])
    before = actor.read.detach().clone()
    results.backward(torch.linspace(-1, 1, 5))
    return results.detach(), leaf.grad, not torch.equal(before, actor.read.detach())


@pytest.mark.parametrize("packed", [False, True])
def test_the_dpo_step_is_that_of_the_original(packed):
    logits = logits_of(4, 9, 33)
    wanted, wanted_grad, overwritten = dpo_step(logits, packed)
    assert not overwritten
    with integration.applied():
        found, grad, overwritten = dpo_step(logits, packed)
    torch.testing.assert_close((found, grad), (wanted, wanted_grad))
    assert overwritten  # the gradient is in the memory of the logits


@pytest.mark.parametrize("packed", [False, True])
def test_logits_of_prompts_and_padding_are_not_read(packed):
    logits = logits_of(4, 9, 33)
    _, mask, lengths = DPOTrainer().concatenated_inputs(*batch())
    scored = mask.bool()
    for row, length in zip(scored, lengths, strict=True):
        row[:length] = False
    spoilt = logits.clone()
    spoilt[:, :-1][~scored[:, 1:]] = torch.nan
    spoilt[:, -1] = torch.nan
    with integration.applied():
        clean, found = dpo_step(logits, packed), dpo_step(spoilt, packed)
    assert torch.equal(clean[0], found[0])
    assert torch.equal(clean[1], found[1])


def test_outside_the_dpo_step_every_token_counts_and_nothing_is_overwritten(package):
    ids, mask, *_ = batch()
    logits = logits_of(2, 9, 33)
    with integration.applied():
        leaf = logits.clone().requires_grad_()
        actor = Actor(leaf, packed=False)
        logps, _ = actor(ids, mask)
        assert torch.all(logps != 0)
        logps.sum().backward()
        assert torch.equal(actor.read.detach(), logits)


def test_an_error_in_the_step_ends_it(package):
    def broken(*_, **__):
        raise ArithmeticError

    with integration.applied():
        with pytest.raises(ArithmeticError):
            DPOTrainer().concatenated_forward(broken, *batch())
        logits, labels = logits_of(4, 9, 33), labels_of(4, 9, vocab=33)
        assert torch.all(package.utils.log_probs_from_logits(logits, labels) != 0)


def test_a_part_of_a_row_is_scored_whole():
    """With ring attention a process has a part of the packed row, to which the mask of the batch does not fit."""
    logits, labels = logits_of(1, 11, 33), labels_of(1, 11, vocab=33)
    seen = []

    def model(ids, **_):
        seen.append(sys.modules["openrlhf.models.actor"].log_probs_from_logits(logits, labels))
        return torch.zeros(4, 8), {}

    with integration.applied():
        DPOTrainer().concatenated_forward(model, *batch())
    torch.testing.assert_close(seen[0], log_probs_from_logits(logits, labels))


def test_a_completion_without_tokens_has_sum_0_and_no_mean():
    logits = logits_of(4, 9, 33)
    chosen_ids, c_mask, reject_ids, r_mask, _ = batch()
    with integration.applied():
        found = DPOTrainer().concatenated_forward(
            Actor(logits, packed=False), chosen_ids, c_mask, reject_ids, r_mask, [99, 99]
        )
    assert not torch.stack(found[:2]).any()
    assert found[3].isnan()  # 0 / 0, as in the original


def test_apply_replaces_every_import_and_undo_restores_it(package):
    undo = integration.apply()
    ours = package.utils.log_probs_from_logits
    assert ours is not log_probs_from_logits
    assert package.actor.log_probs_from_logits is ours
    assert DPOTrainer.concatenated_forward is not ORIGINALS[2]
    undo = integration.apply()  # a second call replaces the first
    undo()
    for module in (package.utils, package.actor):
        assert module.log_probs_from_logits is log_probs_from_logits
        assert module.compute_entropy is compute_entropy
    assert DPOTrainer.concatenated_forward is ORIGINALS[2]


def probabilities(logits, labels, temperature=1.0):
    return logits.softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def other_arguments(logits, labels, temperature=1.0, reduction="none"):
    return log_probs_from_logits(logits, labels, temperature)


@pytest.mark.parametrize("strange", [probabilities, other_arguments])
def test_an_unknown_function_is_left_alone_with_one_warning(strange, package):
    package.utils.log_probs_from_logits = strange
    with pytest.warns(RuntimeWarning, match=r"openrlhf .* was left as it is: .*log_probs_from_logits") as seen:
        integration.apply()()
    assert len(seen) == 1
    assert package.utils.log_probs_from_logits is strange
    assert package.utils.compute_entropy is compute_entropy
    assert DPOTrainer.concatenated_forward is ORIGINALS[2]


def test_a_trainer_that_counts_prompts_is_left_alone(package, monkeypatch):
    def with_prompts(self, per_token_logps, attention_mask, prompt_id_lens):
        sums = (per_token_logps * attention_mask[:, 1:]).sum(-1)
        return sums, sums / attention_mask[:, 1:].sum(-1)

    monkeypatch.setattr(DPOTrainer, "_get_batch_logps", with_prompts)
    with pytest.warns(RuntimeWarning, match="concatenated_forward does not compute") as seen:
        integration.apply()
    assert len(seen) == 1
    assert package.utils.log_probs_from_logits is log_probs_from_logits


def test_flash_attention_is_not_called_by_the_check(package, monkeypatch):
    """flash-attn's kernels cannot read the check's tensors, which are on the CPU."""

    def kernel(logits, labels):
        raise AssertionError("Pointer argument cannot be accessed from Triton (cpu tensor?)")

    for name in ("flash_attn", "flash_attn.ops", "flash_attn.ops.triton", FLASH):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules[FLASH].cross_entropy_loss = kernel
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        undo = integration.apply()
    assert package.utils.log_probs_from_logits is not log_probs_from_logits
    undo()
    assert sys.modules[FLASH].cross_entropy_loss is kernel


@pytest.mark.slow
@pytest.mark.parametrize("name", ["openrlhf-0.8.11", "openrlhf-0.11.2"])
def test_the_packed_step_of_openrlhf_is_the_same(name):
    (entry,) = (entry for entry in matrix.ENTRIES if entry.name == name)
    code = """
import json
from tests.frameworks import compare
from tests.frameworks.steps.openrlhf import step_of
from dpo_kernels.integrations import openrlhf
print(json.dumps(compare.compare(step_of(compare.TINY, packed=True), openrlhf.apply)))
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
    assert found["kernels_used"] == ["token_logps"]
    assert found["loss_difference"] < 1e-5
    assert found["grad_difference"] < 1e-4
    assert found["undone"]


def test_logits_that_are_no_plain_tensors_are_left_to_openrlhf(package):
    class Distributed(torch.Tensor):
        """Stands for a DTensor, whose rows lie on several devices."""

    logits, labels = logits_of(2, 5, 33), labels_of(2, 5, vocab=33)
    other = logits.as_subclass(Distributed)
    with integration.applied():
        assert package.utils.log_probs_from_logits is not log_probs_from_logits
        found = [package.utils.log_probs_from_logits(other, labels), package.utils.compute_entropy(other)]
    wanted = [log_probs_from_logits(logits, labels), compute_entropy(logits)]
    for mine, theirs in zip(found, wanted, strict=True):
        assert isinstance(mine, Distributed)
        torch.testing.assert_close(mine.as_subclass(torch.Tensor), theirs)
