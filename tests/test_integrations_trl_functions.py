"""The functions that the patch of TRL replaces, by their contracts: values, gradients, masks, dtypes, and what is left to TRL.

tests/test_frameworks.py runs the trainers of every version. The contracts of older versions are written out here.
"""

import importlib
import sys
import types
import warnings

import pytest
import torch

pytest.importorskip("trl", reason="pip install --no-deps trl==1.16.0 (the extra `peers`)")

from dpo_kernels.integrations import trl as integration
from dpo_kernels.integrations import unsloth
from dpo_kernels.integrations.patch import small_logits

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import trl.trainer.utils as utils
    from trl.experimental.cpo import cpo_trainer
    from trl.experimental.orpo import orpo_trainer

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def patched():
    before = [utils.selective_log_softmax, utils.entropy_from_logits, utils.selective_log_softmax_and_entropy]
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        integration.apply()
    yield
    integration.PATCH.undo()
    assert [utils.selective_log_softmax, utils.entropy_from_logits, utils.selective_log_softmax_and_entropy] == before


def inputs(*shape, dtype=torch.float32, vocab=37):
    generator = torch.Generator().manual_seed(len(shape))
    logits = torch.randn(*shape, vocab, generator=generator) * 3
    return logits.to(dtype).requires_grad_(), torch.randint(vocab, shape, generator=generator)


def close(found, wanted, dtype):
    assert found.dtype == dtype
    eps = max(torch.finfo(dtype).eps, 1e-6)
    found, wanted = found.detach().double(), wanted.detach().double()
    torch.testing.assert_close(found, wanted, rtol=4 * eps, atol=4 * eps * float(wanted.abs().max()))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(5,), (2, 5), (2, 3, 5)], ids=str)
def test_log_probabilities_of_any_shape_and_dtype(shape, dtype):
    logits, index = inputs(*shape, dtype=dtype)
    found = utils.selective_log_softmax(logits, index)
    weights = torch.linspace(-1, 2, index.numel(), dtype=torch.float64).view(shape)
    wanted = logits.double().log_softmax(-1).gather(-1, index.unsqueeze(-1)).squeeze(-1)
    close(found, wanted, dtype)
    (grad,) = torch.autograd.grad((found.double() * weights).sum(), logits)
    (right,) = torch.autograd.grad((wanted * weights).sum(), logits)
    close(grad, right, dtype)


def test_several_entries_of_a_row():
    logits, _ = inputs(2, 5)
    index = torch.arange(2 * 5 * 3).view(2, 5, 3) % 37
    found = utils.selective_log_softmax(logits, index, 0.7)
    torch.testing.assert_close(found, (logits / 0.7).log_softmax(-1).gather(-1, index))


def test_an_index_of_another_shape_is_left_to_trl():
    logits, index = inputs(2, 5)
    original = utils.selective_log_softmax.__wrapped__
    torch.testing.assert_close(utils.selective_log_softmax(logits, index[:1]), original(logits, index[:1]))
    half = logits.bfloat16()
    torch.testing.assert_close(utils.selective_log_softmax(half, index[:, :3]), original(half, index[:, :3]))
    for function in (utils.selective_log_softmax, utils.selective_log_softmax_and_entropy):
        with pytest.raises(RuntimeError):
            function(logits, index.reshape(5, 2))


@pytest.mark.parametrize("requires_grad", [True, False])
def test_entropy_beside_the_log_probabilities(requires_grad):
    logits, index = inputs(2, 5)
    mask = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 0, 0]])
    logps, entropy = utils.selective_log_softmax_and_entropy(logits, index, requires_grad, 0.8, mask)
    p = (logits / 0.8).log_softmax(-1)
    wanted = p.gather(-1, index.unsqueeze(-1)).squeeze(-1) * mask, -(p.exp() * p).sum(-1) * mask
    torch.testing.assert_close((logps, entropy), wanted)
    assert entropy.requires_grad == requires_grad
    total, right = logps.sum(), wanted[0].sum()
    if requires_grad:
        total, right = total + 0.3 * entropy.square().sum(), right + 0.3 * wanted[1].square().sum()
    torch.testing.assert_close(torch.autograd.grad(total, logits), torch.autograd.grad(right, logits))


@pytest.mark.parametrize("shape", [(), (5,), (2, 3)], ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_entropy_alone_has_a_gradient(shape, dtype):
    logits, _ = inputs(*shape, dtype=dtype)
    found = utils.entropy_from_logits(logits)
    p = logits.double().log_softmax(-1)
    wanted = -(p.exp() * p).sum(-1)
    close(found, wanted, dtype)
    close(*(torch.autograd.grad(x.double().square().sum(), logits)[0] for x in (found, wanted)), dtype)


def test_masked_rows_are_not_read():
    logits, index = inputs(2, 5)
    mask = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 0, 0]])
    leaf = torch.where(mask.unsqueeze(-1) == 0, torch.nan, logits.detach()).requires_grad_()
    logps, entropy = utils.selective_log_softmax_and_entropy(leaf, index, row_mask=mask)
    (logps.sum() + entropy.sum() + utils.selective_log_softmax(leaf, index, row_mask=mask).sum()).backward()
    assert torch.isfinite(leaf.grad).all()
    assert (leaf.grad[mask == 0] == 0).all()


def test_a_temperature_of_zero_is_refused():
    logits, index = inputs(2, 5)
    for call in (utils.selective_log_softmax, utils.selective_log_softmax_and_entropy):
        with pytest.raises(ValueError, match="temperature"):
            call(logits, index, temperature=0.0)


class Other(torch.Tensor):
    """A tensor subclass, as those of tensor parallelism."""


def test_other_tensors_are_left_to_trl(monkeypatch):
    monkeypatch.setattr(integration.logps, "token_logps", None)
    logits, index = inputs(2, 5)
    other = logits.detach().as_subclass(Other)
    found = utils.selective_log_softmax(other, index), utils.entropy_from_logits(other)
    assert all(type(x) is Other for x in found)
    mask = index % 2 == 0
    assert type(integration.masked_logps(other, index, mask)) is Other


@pytest.mark.parametrize("trainer", [cpo_trainer.CPOTrainer, orpo_trainer.ORPOTrainer], ids=str)
def test_sequence_sums_read_no_prompts(trainer):
    logits, labels = inputs(3, 6)
    labels[:, :3] = -100
    labels[2] = -100
    for settings in ({}, {"average_log_prob": True}, {"is_encoder_decoder": True}):
        found = trainer.get_batch_logps(logits, labels.clone(), **settings)
        shifted = (logits, labels) if settings.get("is_encoder_decoder") else (logits[:, :-1], labels[:, 1:])
        mask = shifted[1] != -100
        wanted = shifted[0].log_softmax(-1).gather(-1, shifted[1].clamp(min=0).unsqueeze(-1)).squeeze(-1) * mask
        wanted = wanted.sum(-1) / (mask.sum(-1) if "average_log_prob" in settings else 1)
        torch.testing.assert_close(found, wanted, equal_nan=True)
    leaf = logits.detach().clone()
    leaf[:, :2] = torch.nan
    assert torch.isfinite(trainer.get_batch_logps(leaf, labels)[:2]).all()
    with pytest.raises(ValueError, match="same shape"):
        trainer.get_batch_logps(logits[:, 1:], labels)


# --- contracts of older versions ----------------------------------------------------------------------------------


class Head2(torch.autograd.Function):
    """TRL 1.2: no bias and no cap, two results."""

    @staticmethod
    def forward(ctx, last_hidden, weight, targets, temperature, chunk_size, logit_scale=1.0):
        return of_head(ctx, last_hidden, weight, None, targets, temperature, None, logit_scale)

    @staticmethod
    def backward(ctx, grad, grad_entropy):
        return (*grads_of_head(ctx, grad)[:2], None, None, None, None)


class Head6(torch.autograd.Function):
    """TRL 1.6: with a cap."""

    @staticmethod
    def forward(
        ctx, last_hidden, weight, targets, temperature, chunk_size, final_logit_softcapping=None, logit_scale=1.0
    ):
        return of_head(ctx, last_hidden, weight, None, targets, temperature, final_logit_softcapping, logit_scale)

    @staticmethod
    def backward(ctx, grad, grad_entropy):
        return (*grads_of_head(ctx, grad)[:2], None, None, None, None, None)


class Head13(torch.autograd.Function):
    """TRL 1.13: with a bias."""

    @staticmethod
    def forward(
        ctx, last_hidden, weight, bias, targets, temperature, chunk_size, final_logit_softcapping=None, logit_scale=1.0
    ):
        return of_head(ctx, last_hidden, weight, bias, targets, temperature, final_logit_softcapping, logit_scale)

    @staticmethod
    def backward(ctx, grad, grad_entropy):
        return (*grads_of_head(ctx, grad), None, None, None, None, None)


def of_head(ctx, hidden, weight, bias, targets, temperature, cap, scale):
    ctx.leaves = [None if t is None else t.detach().requires_grad_() for t in (hidden, weight, bias)]
    with torch.enable_grad():
        logits = torch.nn.functional.linear(*ctx.leaves) * scale
        logits = logits if cap is None else cap * torch.tanh(logits / cap)
        p = (logits / temperature).log_softmax(-1)
        ctx.logps = p.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return ctx.logps.detach(), -(p.exp() * p).sum(-1).detach()


def grads_of_head(ctx, grad):
    found = iter(torch.autograd.grad(ctx.logps, [t for t in ctx.leaves if t is not None], grad))
    return [None if t is None else next(found) for t in ctx.leaves]


@pytest.mark.parametrize("head", [Head2, Head6, Head13], ids=lambda head: head.__name__)
def test_older_heads_have_the_same_results_and_gradients(head, monkeypatch):
    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", head)
    names = integration.arguments_of(head)
    (hidden, targets), weight = small_logits(1, 5, 11), small_logits(1, 7, 11, seed=1)[0][0]
    known = {"last_hidden": hidden[0], "weight": weight, "bias": weight[:, 0].clone(), "targets": targets[0] % 7}
    known |= {"temperature": 0.7, "chunk_size": 3, "final_logit_softcapping": 2.0, "logit_scale": 0.5}
    results = []
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        undo = integration.apply()
    # The patch also replaces the name of the class in this module.
    assert utils._ChunkedLogProbFunction is not head
    for function in (utils._ChunkedLogProbFunction, head):
        arguments = {
            k: v.clone().requires_grad_() if torch.is_tensor(v) and v.is_floating_point() else v
            for k, v in known.items()
        }
        found = function.apply(*(arguments[name] for name in names))
        (found[0] * torch.arange(5)).sum().backward()
        grads = [arguments[name].grad for name in ("last_hidden", "weight", "bias") if name in names]
        results.append((found, grads))
    undo()
    torch.testing.assert_close(*results)


class Older:
    """The lines of TRL until 0.14, and those from 0.29 to 1.13, in an else block."""

    def first(self, logits, labels, loss_mask):
        """The text of the method."""
        labels[~loss_mask] = 0
        per_token_logps = torch.gather(logits.log_softmax(-1), dim=2, index=labels.unsqueeze(2)).squeeze(2)
        per_token_logps[~loss_mask] = 0
        return per_token_logps

    def second(self, shift_logits, shift_labels, shift_completion_mask):
        if self is None:
            return None
        else:
            per_token_logps = utils.selective_log_softmax(shift_logits, shift_labels)
            with torch.no_grad():
                ref = selective_log_softmax(shift_logits, shift_labels)
                ref[shift_completion_mask == 0] = 0.0
        return per_token_logps, ref

    def third(self, logits, labels, mask):
        per_token_logps = torch.gather(logits.log_softmax(-1), dim=-1, index=labels.unsqueeze(2)).squeeze(2)
        per_token_logps[~mask] = 0
        return per_token_logps


def selective_log_softmax(logits, index):
    raise AssertionError("the line was replaced")


def test_lines_that_mask_log_probabilities_afterwards_do_so_before(monkeypatch):
    logits, labels = inputs(2, 5)
    mask = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 0, 0]])
    wanted = logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1) * mask
    leaf = torch.where(mask.unsqueeze(-1) == 0, torch.nan, logits.detach())
    first = integration.mask_first(Older.first)
    assert first.__doc__ == Older.first.__doc__
    assert first.__code__.co_firstlineno == Older.first.__code__.co_firstlineno
    torch.testing.assert_close(first(None, leaf, labels.clone(), mask.bool()), wanted)
    _, ref = integration.mask_first(Older.second)(Older(), leaf, labels, mask)
    torch.testing.assert_close(ref, wanted)
    assert integration.mask_first(Older.third) is Older.third
    assert integration.mask_first(len) is len


# --- applying -----------------------------------------------------------------------------------------------------


def test_apply_does_not_depend_on_the_callers_settings():
    with warnings.catch_warnings(), torch.autocast("cpu", dtype=torch.bfloat16), torch.device("meta"):
        warnings.simplefilter("error", RuntimeWarning)
        with torch.inference_mode():
            integration.apply()
    assert utils.selective_log_softmax.__module__ == "trl.trainer.utils"  # introspection sees TRL's function
    assert utils.selective_log_softmax.__wrapped__ is not utils.selective_log_softmax


def test_a_module_that_imports_the_function_later_gets_the_original_back(monkeypatch):
    module = types.ModuleType("imports_later")
    monkeypatch.setitem(sys.modules, "imports_later", module)
    module.named = utils.selective_log_softmax
    undo = integration.apply()
    ours = utils.selective_log_softmax
    assert module.named is ours
    undo()
    assert module.named is utils.selective_log_softmax is not ours


def test_unsloth_must_be_imported_before():
    assert "unsloth" not in sys.modules
    with pytest.warns(RuntimeWarning, match="import unsloth before this call"):
        unsloth.apply()()


def test_axolotls_plugin_patches_trl_for_preferences_only(monkeypatch):
    base = types.ModuleType("axolotl.integrations.base")
    base.BasePlugin = type("BasePlugin", (), {})
    own = types.ModuleType("axolotl.monkeypatch.trainer.utils")
    theirs = utils.selective_log_softmax.__wrapped__
    own.selective_log_softmax = lambda logits, index: theirs(logits, index)
    own.entropy_from_logits = utils.entropy_from_logits.__wrapped__
    for name in ("axolotl", "axolotl.integrations", "axolotl.monkeypatch", "axolotl.monkeypatch.trainer"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, base.__name__, base)
    monkeypatch.setitem(sys.modules, own.__name__, own)
    before = [own.selective_log_softmax]
    axolotl = importlib.import_module("dpo_kernels.integrations.axolotl")
    plugin = axolotl.Plugin()
    plugin.pre_model_load(types.SimpleNamespace(rl=None))
    assert own.selective_log_softmax is before[0]
    plugin.pre_model_load(types.SimpleNamespace(rl="dpo"))
    assert own.selective_log_softmax is not before[0]
    logits, index = inputs(2, 5)
    torch.testing.assert_close(own.selective_log_softmax(logits, index), before[0](logits, index))
    axolotl.trl.PATCH.undo()
    assert own.selective_log_softmax is before[0]
    monkeypatch.delattr(axolotl, "Plugin")
    with pytest.raises(AttributeError, match="no attribute 'Other'"):
        _ = axolotl.Other
