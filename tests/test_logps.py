"""token_logps and selective_log_softmax: values, statistics and gradients, also of the entropy, against float64.

On a machine without GPU the CUDA sources run on the emulator, and the Triton kernels in the interpreter. Vocabularies are below,
at and past one vector, tile and block of the kernels.
"""

import math

import pytest
import torch

from dpo_kernels import (
    dpo_loss,
    linear_logps,
    reference,
    selective_log_softmax,
    sequence_logps,
    token_logps,
    use_backend,
)

from checks import check_gradient, row_errors
from conftest import DEVICE

STATISTICS = ("entropy", "accuracy", "mean_logits", "log_sum_sq")


@pytest.fixture(autouse=True)
def emulated(request, monkeypatch):
    """Without a GPU, run the backend "cuda" on the emulator."""
    wanted = getattr(request.node, "callspec", None)
    if wanted is not None and wanted.params.get("backend") == "cuda" and not torch.cuda.is_available():
        from cuda_emulator import serve_backend

        serve_backend(monkeypatch)


def problem(vocab=517, spread=3.0, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    logits = (torch.randn(2, 4, vocab, generator=g) * spread).to(dtype)
    labels = torch.randint(vocab, (2, 4), generator=g)
    labels[0, 0] = -100
    upstream = torch.randn(2, 2, 4, generator=g, dtype=torch.float64)
    return logits.to(DEVICE), labels.to(DEVICE), upstream.to(DEVICE)


def truth_of(logits, labels, upstream, dtype=torch.float64, **transform):
    """(quantities, gradient) of `upstream[0] * logps + upstream[1] * entropy`, by autograd in `dtype`."""
    leaf = logits.detach().to(dtype).requires_grad_()
    found = reference.token_statistics(leaf, labels, **transform)
    (found["logps"] * upstream[0] + found["entropy"] * upstream[1]).sum().backward()
    return found, leaf.grad


def ours_of(logits, labels, upstream, backend, **keywords):
    leaf = logits.detach().clone().requires_grad_()
    with use_backend(backend):
        logps, found = token_logps(leaf, labels, statistics=STATISTICS, differentiable_entropy=True, **keywords)
        (logps * upstream[0] + found["entropy"] * upstream[1]).sum().backward()
    return {"logps": logps, **found}, leaf.grad


TRANSFORMS = {
    "plain": ({}, {}),
    "temperature": ({"temperature": 0.7}, {"logit_scale": 1 / 0.7}),
    "cap, then temperature": (
        {"temperature": 1.6, "logit_scale": 0.5, "logit_softcap": 8.0},
        {"logit_scale": 0.5 / 1.6, "logit_softcap": 8.0 / 1.6},
    ),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vocab", [3, 256, 517])
def test_values_statistics_and_gradients_are_those_of_float64(vocab, dtype, transform, backend):
    given, meant = TRANSFORMS[transform]
    logits, labels, upstream = problem(vocab, dtype=dtype)
    found, grad = ours_of(logits, labels, upstream, backend, **given)
    truth, true_grad = truth_of(logits, labels, upstream, **meant)
    _, eager_grad = truth_of(logits, labels, upstream, dtype, **meant)
    assert set(found) == {"logps", *STATISTICS}
    for name, value in found.items():
        assert value.dtype == torch.float32
        assert value.shape == labels.shape
        assert bool((value[labels == -100] == 0).all())
        torch.testing.assert_close(value.double(), truth[name], rtol=2e-6, atol=2e-6)
    check_gradient(grad, true_grad, eager_grad.to(dtype), labels)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("engine", ["eager", "cpu"])
def test_float64_logits_give_float64(transform, engine):
    given, meant = TRANSFORMS[transform]
    logits, labels, upstream = problem(dtype=torch.float64)
    found, grad = ours_of(logits, labels, upstream, engine, **given)
    truth, true_grad = truth_of(logits, labels, upstream, **meant)
    for name, value in found.items():
        torch.testing.assert_close(value, truth[name], rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(grad, true_grad, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("fault", ["none", "sign", "scale", "missing"])
def test_the_gradient_check_sees_faults_of_the_entropys_part(fault):
    logits, labels, upstream = problem()
    truth = truth_of(logits, labels, upstream)[1]
    eager = truth_of(logits, labels, upstream, torch.float32)[1]
    part = truth_of(logits, labels, torch.stack([torch.zeros_like(upstream[0]), upstream[1]]))[1]
    wrong = (truth - {"none": 0.0, "sign": 2.0, "scale": 0.05, "missing": 1.0}[fault] * part).float()
    if fault == "none":
        check_gradient(wrong, truth, eager, labels)
    else:
        with pytest.raises(AssertionError):
            check_gradient(wrong, truth, eager, labels)


def test_the_entropys_gradient_where_one_token_is_certain(backend):
    """p near 1: in float32 the textbook's p (log p + H) cancels."""
    logits, labels, upstream = problem(spread=1.0)
    upstream[0] = 0.0
    logits[1, 1, 7] += 25.0
    logits[1, 2, 9] += 60.0
    _, grad = ours_of(logits, labels, upstream, backend)
    _, truth = truth_of(logits, labels, upstream)
    errors = row_errors(grad[1, 1:2], truth[1, 1:2], labels[1, 1:2])
    assert float(errors.others.max()) < 1e-4
    top = (grad[1, 1, 7].double() - truth[1, 1, 7]).abs() / truth[1, 1, 7].abs()
    assert float(top) < 1e-4
    assert bool((grad[1, 2].double() - truth[1, 2]).abs().max() < 1e-12)


def test_masked_vocabulary_and_nan(backend):
    logits, labels, upstream = problem()
    logits[0, 1, ::3] = -torch.inf
    labels[0, 1] = 1
    logits[1, 3, 5] = torch.nan
    found, grad = ours_of(logits, labels, upstream, backend)
    truth, _ = truth_of(logits, labels, upstream)
    for name in ("logps", "entropy", "log_sum_sq"):
        torch.testing.assert_close(found[name][:, :3].double(), truth[name][:, :3], rtol=2e-6, atol=2e-6)
        assert bool(found[name][1, 3].isnan())
    assert bool((grad[0, 1, ::3] == 0).all())
    assert bool(grad[1, 3].isnan().any())
    assert bool(grad[1, :3].isfinite().all())
    masked = logits[0, 1:2].masked_select(logits[0, 1:2] > -torch.inf).view(1, 1, -1)
    _, kept = truth_of(masked, torch.zeros(1, 1, dtype=torch.long, device=DEVICE), upstream[:, :1, 1:2])
    ours = grad[0, 1][logits[0, 1] > -torch.inf]
    torch.testing.assert_close(ours[1:].double(), kept[0, 0, 1:], rtol=1e-4, atol=1e-7)


def test_what_is_not_asked_for_has_no_gradient():
    logits, labels, _ = problem()
    logits.requires_grad_()
    logps, found = token_logps(logits, labels, statistics=STATISTICS)
    assert logps.requires_grad
    assert not any(value.requires_grad for value in found.values())
    _, found = token_logps(logits, labels, statistics=STATISTICS, differentiable_entropy=True)
    assert [name for name, value in found.items() if value.requires_grad] == ["entropy"]


def test_any_number_of_dimensions_and_views_are_read_in_place(backend):
    wide = torch.randn(3, 2, 5, 33, device=DEVICE)
    labels = torch.randint(33, (3, 2, 4), device=DEVICE)
    view = wide[:, :, :-1].requires_grad_()
    with use_backend(backend):
        whole = token_logps(view, labels)
        assert torch.equal(whole[1, 0], token_logps(view[1, 0], labels[1, 0]))
        assert torch.equal(whole[2], token_logps(view[2], labels[2]))
        assert token_logps(wide[:0, 0], labels.new_zeros(0, 5)).shape == (0, 5)


def test_in_place_gradients_overwrite_the_logits_and_are_the_same(backend):
    logits, labels, upstream = problem(257)
    grads = []
    for inplace in (False, True):
        leaf = logits.clone().requires_grad_()
        given = leaf * 1.0
        with use_backend(backend):
            logps, found = token_logps(
                given, labels, statistics="entropy", differentiable_entropy=True, inplace_backward=inplace
            )
            (logps * upstream[0] + found["entropy"] * upstream[1]).sum().backward()
        grads.append(leaf.grad)
        assert torch.equal(given, logits) != inplace
    assert torch.equal(*grads)


def test_sequence_logps_are_sums_of_token_logps(backend):
    logits, labels, _ = problem()
    weights = torch.rand(2, 4, device=DEVICE)
    with use_backend(backend):
        sums = sequence_logps(logits, labels, token_weights=weights, logit_scale=0.5)
        tokens = token_logps(logits, labels, logit_scale=0.5)
    torch.testing.assert_close(sums, (tokens * weights).sum(-1), rtol=1e-6, atol=1e-5)


def test_a_loss_from_tokens_equals_dpo_loss(backend):
    """The usual way by which trainers compute DPO: log-probabilities, sums, a sigmoid."""
    logits, labels, _ = problem()
    grads, losses = [], []
    for own in (False, True):
        leaf = logits.clone().requires_grad_()
        with use_backend(backend):
            if own:
                loss = dpo_loss(leaf, labels, ref_logps=torch.zeros(2, device=DEVICE), beta=0.3).loss
            else:
                chosen, rejected = token_logps(leaf, labels).sum(-1)
                loss = -torch.nn.functional.logsigmoid(0.3 * (chosen - rejected))
            loss.backward()
        grads.append(leaf.grad)
        losses.append(loss)
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_selective_log_softmax_has_the_dtype_of_the_logits_and_the_shape_of_the_index(dtype):
    logits, labels, _ = problem(dtype=dtype)
    labels = labels.clamp(min=0)
    truth = logits.double().log_softmax(-1)
    found = selective_log_softmax(logits, labels)
    assert found.dtype == dtype
    wanted = truth.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(found, wanted.to(dtype), rtol=torch.finfo(dtype).eps * 2, atol=1e-6)
    alone = selective_log_softmax(logits[0, 0], labels[0, 0])
    torch.testing.assert_close(alone, found[0, 0])


@pytest.mark.parametrize("count", [1, 3, 40])
def test_selective_log_softmax_of_several_entries(count):
    logits, _, _ = problem(vocab=101)
    logits[0, 0, :50] = -torch.inf
    index = torch.randint(101, (2, 4, count), device=DEVICE)
    index[0, 0, 0] = 3  # an entry of -inf
    if count == 3:
        index[0, 0] = torch.tensor([3, 4, 5], device=DEVICE)  # all of them
    ours, truth = logits.clone().requires_grad_(), logits.double().requires_grad_()
    weights = torch.rand(2, 4, count, device=DEVICE)
    found, wanted = selective_log_softmax(ours, index, 0.7), (truth / 0.7).log_softmax(-1).gather(-1, index)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
    finite = wanted.isfinite()
    (found[finite] * weights[finite]).sum().backward()
    (wanted[finite] * weights[finite]).sum().backward()
    torch.testing.assert_close(ours.grad.double(), truth.grad.nan_to_num(), rtol=1e-4, atol=1e-6)


def test_several_entries_of_16_bit_logits_are_rounded_once():
    logits = torch.randn(3, 5, 101, device=DEVICE).mul(20).bfloat16()
    index = torch.randint(101, (3, 5, 7), device=DEVICE)
    truth = logits.double().log_softmax(-1).gather(-1, index)
    assert torch.equal(selective_log_softmax(logits, index), truth.bfloat16())


@pytest.mark.parametrize("several", [False, True])
def test_selective_log_softmax_does_not_read_masked_rows(several):
    logits, labels, _ = problem()
    logits[1, 2] = torch.nan
    index = labels.clamp(min=0)
    mask = torch.ones(2, 4, dtype=torch.long, device=DEVICE)
    mask[1, 2] = 0
    if several:
        index = torch.stack([index, index + 1], -1) % 517
    leaf = logits.requires_grad_()
    found = selective_log_softmax(leaf, index, row_mask=mask)
    assert bool((found[1, 2] == 0).all())
    assert bool(found.isfinite().all())
    found.sum().backward()
    assert bool((leaf.grad[1, 2] == 0).all()) or several  # the gather of several entries reads the row


def test_selective_log_softmax_accepts_any_entry_of_a_masked_row_and_no_wrong_one_elsewhere():
    logits, labels, _ = problem()
    index = labels.clamp(min=0)
    mask = torch.ones_like(index)
    mask[1, 2] = 0
    for entries in (index, torch.stack([index, index + 1], -1) % 517):
        right = selective_log_softmax(logits, entries, row_mask=mask)
        entries[1, 2] = -100
        torch.testing.assert_close(selective_log_softmax(logits, entries, row_mask=mask), right)
    index[0, 0] = -100
    if DEVICE == "cpu":
        with pytest.raises(ValueError, match="outside the vocabulary"):
            selective_log_softmax(logits, index, row_mask=mask)
    with pytest.raises(ValueError, match="row_mask must have shape"):
        selective_log_softmax(logits, labels.clamp(min=0), row_mask=mask[0])


@pytest.mark.parametrize("rows", [(0, 4), (2, 0), (2, 4)])
@pytest.mark.parametrize("count", [0, 2])
def test_selective_log_softmax_of_nothing(rows, count):
    logits = torch.randn(*rows, 7, device=DEVICE, requires_grad=True)
    found = selective_log_softmax(logits, torch.ones(*rows, count, dtype=torch.int64, device=DEVICE))
    assert found.shape == (*rows, count)
    found.sum().backward()
    assert logits.grad.shape == logits.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("hidden", [False, True])
def test_callers_may_write_to_the_results(dtype, hidden):
    logits, labels, _ = problem(vocab=11, dtype=dtype)
    leaf = logits.requires_grad_()
    head = (torch.eye(11, dtype=dtype, device=DEVICE),) if hidden else ()
    function = linear_logps if hidden else token_logps
    logps, found = function(leaf, *head, labels, statistics=("entropy", "accuracy"), differentiable_entropy=True)
    (wanted,) = torch.autograd.grad(logps[1].sum() + 2 * found["entropy"].sum(), leaf, retain_graph=True)
    logps[0] = 0
    found["entropy"] *= 2
    found["accuracy"].zero_()
    (grad,) = torch.autograd.grad(logps.sum() + found["entropy"].sum(), leaf)
    torch.testing.assert_close(grad, wanted)


def test_a_temperature_that_is_learned_is_refused():
    logits, labels, _ = problem()
    with pytest.raises(TypeError, match="temperature must be a number"):
        token_logps(logits, labels, temperature=torch.tensor(0.7, requires_grad=True))


def test_compiled_without_graph_breaks():
    logits, labels, upstream = problem(130)

    def loss_of(x):
        logps, found = token_logps(
            x * 1.0, labels, statistics=("entropy",), differentiable_entropy=True, temperature=0.9
        )
        return (logps * upstream[0] + found["entropy"] * upstream[1]).sum()

    grads = []
    for function in (loss_of, torch.compile(loss_of, fullgraph=True)):
        leaf = logits.clone().requires_grad_()
        function(leaf).backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads, rtol=1e-6, atol=1e-7)


ERRORS = {
    "one dimension": (lambda x, y: token_logps(x[0, 0], y[0, 0]), "at least two dimensions"),
    "shape of labels": (lambda x, y: token_logps(x, y[:, :-1]), "labels must have shape"),
    "temperature": (lambda x, y: token_logps(x, y, temperature=0.0), "temperature must be positive"),
    "infinite": (lambda x, y: token_logps(x, y, temperature=math.inf), "temperature must be positive"),
    "kl": (lambda x, y: token_logps(x, y, statistics=("kl",)), "unknown statistic 'kl'"),
    "entropy": (lambda x, y: token_logps(x, y, differentiable_entropy=True), '"entropy" among the statistics'),
    "label": (lambda x, y: token_logps(x, y + 1000), "outside the vocabulary"),
    "index": (lambda x, y: selective_log_softmax(x, y[0]), r"index must be \[...\] or"),
    "order of index": (lambda x, y: selective_log_softmax(x, y.view(4, 2).clamp(min=0)), "labels must have shape"),
    "ignored index": (lambda x, y: selective_log_softmax(x, torch.full_like(y, -100)), "outside the vocabulary"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_what_was_expected(name):
    call, text = ERRORS[name]
    logits, labels, _ = problem()
    with pytest.raises(ValueError, match=text):
        call(logits, labels)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("budget", [None, "4KB"])
def test_the_entropys_gradient_from_hidden_states(budget, frozen, backend):
    g = torch.Generator().manual_seed(3)
    hidden, weight, bias = (
        torch.randn(2, 4, 24, generator=g),
        torch.randn(131, 24, generator=g),
        torch.randn(131, generator=g),
    )
    _, labels, upstream = problem(131)
    grads = []
    for exact in (False, True):
        h, w, b = (x.clone().to(DEVICE, torch.float64 if exact else torch.float32) for x in (hidden, weight, bias))
        leaves = [x.requires_grad_() for x in ((h,) if frozen else (h, w, b))]
        if exact:
            found = reference.token_statistics(
                torch.nn.functional.linear(h, w, b), labels, logit_scale=1 / 1.3, logit_softcap=6 / 1.3
            )
            logps = found["logps"]
        else:
            with use_backend(backend):
                logps, found = linear_logps(
                    h,
                    w,
                    labels,
                    bias=b,
                    statistics=("entropy", "accuracy"),
                    temperature=1.3,
                    logit_softcap=6.0,
                    differentiable_entropy=True,
                    memory_budget=budget,
                )
            assert found["entropy"].requires_grad
            assert not found["accuracy"].requires_grad
        (logps * upstream[0] + found["entropy"] * upstream[1]).sum().backward()
        grads.append([leaf.grad for leaf in leaves])
    for ours, truth in zip(*grads, strict=True):
        torch.testing.assert_close(ours.double(), truth, rtol=1e-4, atol=1e-5 * float(truth.abs().max()))


def test_the_entropys_gradient_from_hidden_states_compiled():
    hidden, weight = torch.randn(2, 4, 24, device=DEVICE), torch.randn(131, 24, device=DEVICE)
    _, labels, upstream = problem(131)

    def loss_of(h, w):
        logps, found = linear_logps(h, w, labels, statistics=("entropy",), differentiable_entropy=True)
        return (logps * upstream[0] + found["entropy"] * upstream[1]).sum()

    grads = []
    for function in (loss_of, torch.compile(loss_of, fullgraph=True)):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
        function(*leaves).backward()
        grads.append([leaf.grad for leaf in leaves])
    for eager, compiled in zip(*grads, strict=True):
        torch.testing.assert_close(eager, compiled, rtol=1e-5, atol=1e-6)
