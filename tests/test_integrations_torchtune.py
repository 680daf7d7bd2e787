"""torchtune's log-probabilities with our kernels equal torchtune's formulas, and its functions are exchanged and put back.

The package here is a stand-in with torchtune's formulas. tests/test_frameworks.py runs torchtune itself.
"""

import importlib
import sys
import types
import warnings

import pytest
import torch
import torch.nn.functional as F

from dpo_kernels.integrations import torchtune as integration

B, T, V = 4, 7, 19
NAMES = ("get_batch_log_probs", "logits_to_logprobs", "batched_logits_to_logprobs")


class Theirs:
    """torchtune's functions. They are not globals of this module, because `apply` exchanges functions in every module."""

    @staticmethod
    def logits_to_logprobs(logits, sequences, temperature=1.0):
        logps = F.log_softmax(logits / temperature, dim=-1)
        return torch.gather(logps, 2, sequences.unsqueeze(-1)).squeeze(-1)

    @staticmethod
    def batched_logits_to_logprobs(logits, sequences, temperature=1.0, chunk_size=4):
        return Theirs.logits_to_logprobs(logits, sequences, temperature).to(torch.float32)

    @staticmethod
    def get_batch_log_probs(logits, labels, label_pad_token_id=-100, return_average_logprobs=False):
        if logits.shape[:-1] != labels.shape:
            raise ValueError("shapes differ")
        labels, logits = labels[:, 1:].clone(), logits[:, :-1, :]
        mask = labels != label_pad_token_id
        labels[labels == label_pad_token_id] = 0
        logps = Theirs.logits_to_logprobs(logits, labels, temperature=1.0)
        sums = (logps * mask).sum(-1)
        return sums / (mask.sum(-1) + 1e-8) if return_average_logprobs else sums


@pytest.fixture(autouse=True)
def package(monkeypatch):
    """torchtune.rlhf with the module of its functions; `rlhf` has imported the functions by name, as recipes may."""
    top, rlhf, module = map(types.ModuleType, ("torchtune", "torchtune.rlhf", "torchtune.rlhf.sequence_processing"))
    for name in NAMES:
        for place in (rlhf, module):
            setattr(place, name, getattr(Theirs, name))
    for place in (top, rlhf, module):
        monkeypatch.setitem(sys.modules, place.__name__, place)
    yield rlhf
    integration._PATCH.undo()


def batch(dtype=torch.float32, ignored=-100):
    logits = torch.randn(B, T, V, dtype=torch.float64).mul(3).to(dtype)
    labels = torch.randint(1, V, (B, T))
    labels[0, :3] = ignored
    labels[1, -2:] = ignored
    labels[2, 1:] = ignored  # no token counts: the first label is predicted by nothing
    return logits, labels


def gradient_of(function, logits, *rest, **options):
    leaf = logits.detach().clone().requires_grad_()
    found = function(leaf * 1, *rest, **options)
    (found * torch.arange(1.0, found.numel() + 1).view(found.shape)).sum().backward()
    return found.detach(), leaf.grad


OPTIONS = [{}, {"return_average_logprobs": True}, {"label_pad_token_id": 0}, {"label_pad_token_id": 7}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_sequence_sums_and_gradients_are_torchtunes(package, dtype, options):
    logits, labels = batch(dtype, options.get("label_pad_token_id", -100))
    wanted, wanted_grad = gradient_of(Theirs.get_batch_log_probs, logits, labels, **options)
    with integration.applied():
        found, grad = gradient_of(package.get_batch_log_probs, logits, labels, **options)
    assert found.dtype == dtype
    assert grad.abs().max() > 0
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad, wanted_grad, rtol=1e-5, atol=1e-6)


def test_the_options_can_be_given_by_position(package):
    logits, labels = batch(ignored=5)
    with integration.applied():
        found = package.get_batch_log_probs(logits, labels, 5, True)
    torch.testing.assert_close(found, Theirs.get_batch_log_probs(logits, labels, 5, True))


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("name", NAMES[1:])
def test_token_log_probs_and_gradients_are_torchtunes(package, name, temperature):
    logits, _ = batch()
    tokens = torch.randint(V, (B, T))
    wanted, wanted_grad = gradient_of(getattr(Theirs, name), logits, tokens, temperature)
    with integration.applied():
        found, grad = gradient_of(getattr(package, name), logits, tokens, temperature=temperature)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad, wanted_grad, rtol=1e-5, atol=1e-6)


def views(logits):
    """Tensors with the values of logits and other strides."""
    wide = torch.zeros(B + 2, T + 3, V)
    wide[1:-1, 2:-1] = logits
    yield wide[1:-1, 2:-1]
    yield logits.transpose(0, 1).contiguous().transpose(0, 1)
    yield logits.transpose(1, 2).contiguous().transpose(1, 2)


def test_views_are_read_in_place(package):
    logits, labels = batch()
    tokens = torch.randint(V, (B, T))
    with integration.applied():
        for view in views(logits):
            torch.testing.assert_close(
                package.get_batch_log_probs(view, labels), Theirs.get_batch_log_probs(logits, labels)
            )
            torch.testing.assert_close(
                package.logits_to_logprobs(view, tokens), Theirs.logits_to_logprobs(logits, tokens)
            )


def test_logits_of_prompts_and_padding_are_not_read(package):
    logits, labels = batch()
    wanted = Theirs.get_batch_log_probs(logits, labels)
    unread = torch.ones(B, T, dtype=torch.bool)
    unread[:, :-1] = labels[:, 1:] == -100
    with integration.applied():
        found, grad = gradient_of(
            package.get_batch_log_probs, logits.masked_fill(unread.unsqueeze(-1), torch.nan), labels
        )
    torch.testing.assert_close(found, wanted)
    assert (grad[unread] == 0).all()
    assert (grad[~unread] != 0).any(-1).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sums_of_16_bit_logits_are_not_rounded(package, dtype):
    logits, labels = batch(dtype)
    exact = Theirs.get_batch_log_probs(logits.double(), labels)
    with integration.applied():
        sums, grad = gradient_of(package.get_batch_log_probs, logits, labels)
        tokens = package.logits_to_logprobs(logits, labels.clamp(min=0))
        batched = package.batched_logits_to_logprobs(logits, labels.clamp(min=0))
    assert sums.dtype == torch.float32
    assert grad.dtype == dtype
    assert Theirs.get_batch_log_probs(logits, labels).dtype == dtype
    torch.testing.assert_close(sums.double(), exact, rtol=1e-6, atol=1e-5)
    # Per token the dtypes are torchtune's.
    assert tokens.dtype == dtype
    assert batched.dtype == torch.float32


def test_a_sequence_without_labels_has_the_mean_0(package):
    logits, labels = batch()
    with integration.applied():
        assert package.get_batch_log_probs(logits, labels, return_average_logprobs=True)[2] == 0


def test_fewer_tokens_than_logits_are_left_to_torchtune(package):
    logits, _ = batch()
    tokens = torch.randint(V, (B, T - 2))
    with integration.applied():
        torch.testing.assert_close(
            package.logits_to_logprobs(logits, tokens), Theirs.logits_to_logprobs(logits, tokens)
        )


def test_wrong_arguments_raise(package):
    logits, labels = batch()
    with integration.applied():
        with pytest.raises(ValueError, match="labels"):
            package.get_batch_log_probs(logits, labels[:, 1:])
        with pytest.raises(ValueError, match=f"label {V} .*outside"):
            package.get_batch_log_probs(logits, labels.masked_fill(labels == -100, V))
        with pytest.raises(ValueError, match=r"label -100 .*outside"):
            package.get_batch_log_probs(logits, labels, label_pad_token_id=0)  # the labels have -100
        with pytest.raises(TypeError, match="labels"):
            package.get_batch_log_probs(logits, labels.float())


def backward(function, logits, labels, parts=1):
    """The gradient, the logits after the backward pass, and the loss. `parts`: calls, each with a part of the batch."""
    leaf = logits.clone().requires_grad_()
    given = leaf * 1
    size = B // parts
    sums = []
    for k in range(0, B, size):
        part = given if parts == 1 else given[k : k + size]
        sums.append(function(part, labels[k : k + size]))
    loss = (torch.cat(sums) * torch.arange(1.0, B + 1)).sum()
    loss.backward(retain_graph=True)
    return leaf.grad, given.detach(), loss


def test_the_gradient_may_be_written_into_the_logits(package):
    logits, labels = batch()
    wanted, _, _ = backward(Theirs.get_batch_log_probs, logits, labels)
    with integration.applied():
        grad, untouched, _ = backward(package.get_batch_log_probs, logits, labels)
    torch.testing.assert_close(grad, wanted, rtol=1e-5, atol=1e-6)
    assert torch.equal(untouched, logits)
    with integration.applied(inplace_backward=True):
        grad, overwritten, loss = backward(package.get_batch_log_probs, logits, labels)
    torch.testing.assert_close(grad, wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(overwritten, wanted, rtol=1e-5, atol=1e-6)
    with pytest.raises(RuntimeError, match="overwritten"):
        loss.backward()


def test_views_of_logits_are_not_written_to(package):
    """full_dpo_distributed calls the function for each half of the logits."""
    logits, labels = batch()
    wanted, _, _ = backward(Theirs.get_batch_log_probs, logits, labels)
    with integration.applied(inplace_backward=True):
        grad, untouched, _ = backward(package.get_batch_log_probs, logits, labels, parts=2)
    torch.testing.assert_close(grad, wanted, rtol=1e-5, atol=1e-6)
    assert torch.equal(untouched, logits)


# --- exchanging and putting back ----------------------------------------------------------------------------------


def theirs(package):
    """Whether every function of the package is torchtune's, in both modules."""
    module = importlib.import_module("torchtune.rlhf.sequence_processing")
    return [getattr(place, name, None) is getattr(Theirs, name) for place in (package, module) for name in NAMES]


def test_apply_exchanges_and_undo_puts_back(package):
    undo = integration.apply()
    assert not any(theirs(package))
    again = integration.apply(inplace_backward=True)
    assert not any(theirs(package))
    again()
    assert all(theirs(package))
    undo()
    assert all(theirs(package))
    with pytest.raises(KeyError), integration.applied():
        raise KeyError
    assert all(theirs(package))


def test_versions_may_lack_the_batched_function(package):
    for place in (package, sys.modules["torchtune.rlhf.sequence_processing"]):
        del place.batched_logits_to_logprobs
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        undo = integration.apply()
    assert package.get_batch_log_probs is not Theirs.get_batch_log_probs
    undo()


class Others:
    """Functions of a torchtune that changed."""

    @staticmethod
    def arguments(logits, labels, label_pad_token_id=-100, return_average_logprobs=False, dim=-1):
        return Theirs.get_batch_log_probs(logits, labels, label_pad_token_id, return_average_logprobs)

    @staticmethod
    def results(logits, labels, label_pad_token_id=-100, return_average_logprobs=False):
        return -Theirs.get_batch_log_probs(logits, labels, label_pad_token_id, return_average_logprobs)

    @staticmethod
    def no_shift(logits, labels, label_pad_token_id=-100, return_average_logprobs=False):
        following = F.pad(labels[:, :-1], (1, 0), value=label_pad_token_id)
        return Theirs.get_batch_log_probs(logits, following, label_pad_token_id, return_average_logprobs)


@pytest.mark.parametrize("change", ["arguments", "results", "no_shift"])
def test_an_unknown_torchtune_is_left_as_it_is(package, change):
    other = getattr(Others, change)
    places = (package, sys.modules["torchtune.rlhf.sequence_processing"])
    for place in places:
        place.get_batch_log_probs = other
    with pytest.warns(RuntimeWarning, match="was left as it is: .*get_batch_log_probs") as found:
        undo = integration.apply()
    assert len(found) == 1
    assert all(place.get_batch_log_probs is other for place in places)
    assert all(getattr(place, name) is getattr(Theirs, name) for place in places for name in NAMES[1:])
    undo()


def test_no_torchtune_is_an_import_error(monkeypatch):
    for name in ("torchtune", "torchtune.rlhf", "torchtune.rlhf.sequence_processing"):
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(ImportError):
        integration.apply()


def test_logits_that_are_no_plain_tensors_are_left_to_torchtune(package):
    class Distributed(torch.Tensor):
        """Stands for a DTensor, whose rows lie on several devices."""

    logits, labels = batch()
    other = logits.as_subclass(Distributed)
    with integration.applied():
        assert package.get_batch_log_probs is not Theirs.get_batch_log_probs
        for call, arguments in (
            ("get_batch_log_probs", (labels,)),
            ("logits_to_logprobs", (labels.clamp(min=0),)),
            ("batched_logits_to_logprobs", (labels.clamp(min=0),)),
        ):
            found = getattr(package, call)(other, *arguments)
            assert isinstance(found, Distributed)
            torch.testing.assert_close(found.as_subclass(torch.Tensor), getattr(Theirs, call)(logits, *arguments))
