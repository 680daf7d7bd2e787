"""The public functions: layouts agree, options do what their names say, and invalid input gives a one-line error."""

import pytest
import torch

from dpo_kernels import DPOLoss, Pairs, dpo_loss, linear_dpo_loss, reference, sequence_logps, shift_labels, use_backend

from cases import Case, loss_of, make_inputs

P, T, V = 2, 5, 97


@pytest.fixture
def batch():
    g = torch.Generator().manual_seed(3)
    logits = torch.randn(2 * P, T, V, generator=g)
    labels = torch.randint(0, V, (2 * P, T), generator=g)
    labels[:, 0] = -100
    return logits, labels


def test_shift_labels_scores_each_completion_token_by_the_logits_before_it():
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    mask = torch.tensor([[0, 0, 1, 1, 0]])
    assert shift_labels(ids, mask).tolist() == [[-100, 7, 8, -100, -100]]
    with pytest.raises(ValueError, match="one shape"):
        shift_labels(ids, mask[:, 1:])


def test_packed_and_padded_layouts_agree_bitwise(batch):
    logits, labels = batch
    padded = loss_of(logits, labels, ref_logits=logits.roll(1, 0))
    cu_seqlens = torch.arange(0, 2 * P * T + 1, T, dtype=torch.int32)
    packed = loss_of(
        logits.reshape(-1, V), labels.reshape(-1), ref_logits=logits.roll(1, 0).reshape(-1, V), cu_seqlens=cu_seqlens
    )
    assert torch.equal(padded.losses, packed.losses)
    assert torch.equal(padded.chosen_logps, packed.chosen_logps)


def test_packed_tokens_behind_the_last_sequence_are_ignored(batch):
    logits, labels = batch
    flat, flat_labels = logits.reshape(-1, V).requires_grad_(), labels.reshape(-1)
    cu_seqlens = torch.tensor([0, 4, 8, 12, 16])
    out = loss_of(flat, flat_labels, cu_seqlens=cu_seqlens)
    out.loss.backward()
    alone = loss_of(flat[:16].detach(), flat_labels[:16], cu_seqlens=cu_seqlens)
    assert torch.equal(out.losses, alone.losses)
    assert bool((flat.grad[16:] == 0).all())
    assert bool((flat.grad[:16] != 0).any())


def test_precomputed_reference_equals_reference_logits(batch):
    logits, labels = batch
    ref_logits = logits.flip(0)
    with_logits = loss_of(logits, labels, ref_logits=ref_logits)
    sums = torch.cat([with_logits.ref_chosen_logps, with_logits.ref_rejected_logps])
    assert torch.equal(sums, sequence_logps(ref_logits, labels))
    with_sums = loss_of(logits, labels, ref_logps=sums)
    torch.testing.assert_close(with_logits.losses, with_sums.losses, rtol=1e-6, atol=1e-7)


def test_reductions(batch):
    logits, labels = batch
    each = loss_of(logits, labels, reduction="none").loss
    assert each.shape == (P,)
    assert loss_of(logits, labels, reduction="sum").loss.item() == pytest.approx(each.sum().item())
    assert loss_of(logits, labels).loss.item() == pytest.approx(each.mean().item())


def test_reduction_none_takes_any_upstream_gradient(batch):
    logits, labels = batch
    upstream = torch.tensor([0.3, -2.0])
    ours, truth = logits.clone().requires_grad_(), logits.double().requires_grad_()
    loss_of(ours, labels, reduction="none").loss.backward(upstream)
    reference.dpo_loss(truth, labels, reduction="none").backward(upstream.double())
    torch.testing.assert_close(ours.grad.double(), truth.grad, rtol=1e-4, atol=1e-9)


def test_a_callable_objective_equals_the_built_in_one(batch):
    logits, labels = batch

    def mine(pairs: Pairs) -> torch.Tensor:
        return -torch.nn.functional.logsigmoid(pairs.beta * pairs.margins)

    a, b = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    first, second = loss_of(a, labels, beta=0.3), loss_of(b, labels, beta=0.3, loss_type=mine)
    first.loss.backward()
    second.loss.backward()
    torch.testing.assert_close(first.losses, second.losses)
    torch.testing.assert_close(a.grad, b.grad)


def test_sequence_logps_builds_any_loss(batch, backend):
    logits, labels = batch
    x, truth = logits.clone().requires_grad_(), logits.double().requires_grad_()
    with use_backend(backend):
        (sequence_logps(x, labels)[::2].sin().sum()).backward()
    tokens = reference.token_statistics(truth, labels)["logps"]
    tokens.sum(-1)[::2].sin().sum().backward()
    torch.testing.assert_close(x.grad.double(), truth.grad, rtol=1e-4, atol=1e-9)
    assert bool((x.grad[1::2] == 0).all())


def test_metrics_have_trl_names_and_match_the_reference(batch):
    logits, labels = batch
    ref_logits = logits.roll(1, -1)
    out = loss_of(logits, labels, ref_logits=ref_logits, statistics=("entropy", "kl", "accuracy", "mean_logits"))
    metrics = out.metrics()
    tokens = reference.token_statistics(logits.double(), labels, ref_logits=ref_logits.double())
    scored = labels != -100
    rewards = 0.1 * (tokens["logps"] - tokens["ref_logps"]).sum(-1)
    chosen, rejected = rewards.chunk(2)
    expected = {
        "rewards/chosen": chosen.mean(),
        "rewards/rejected": rejected.mean(),
        "rewards/accuracies": (chosen > rejected).double().mean(),
        "rewards/margins": (chosen - rejected).mean(),
        "logps/chosen": tokens["logps"].sum(-1)[:P].mean(),
        "logps/rejected": tokens["logps"].sum(-1)[P:].mean(),
        "logits/chosen": tokens["mean_logits"][:P][scored[:P]].mean(),
        "logits/rejected": tokens["mean_logits"][P:][scored[P:]].mean(),
        "entropy": tokens["entropy"][scored].mean(),
        "mean_token_accuracy": tokens["accuracy"][:P][scored[:P]].mean(),
        "kl": tokens["kl"][scored].mean(),
    }
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value.item(), rel=1e-5, abs=1e-6), name


def test_the_module_does_what_the_function_does(batch):
    logits, labels = batch
    module = DPOLoss(beta=0.4, loss_type="hinge", statistics=("entropy", "kl"))
    ours = module(logits, labels, ref_logits=logits.flip(0))
    same = loss_of(logits, labels, ref_logits=logits.flip(0), beta=0.4, loss_type="hinge", statistics=("entropy", "kl"))
    assert torch.equal(ours.losses, same.losses)
    assert torch.equal(ours.kl, same.kl)
    # Without reference logits there is no KL to report. This is not an error, because a module may be used both ways.
    assert module(logits, labels, ref_logps=torch.zeros(2 * P)).kl is None
    assert "hinge" in repr(module)


def test_empty_completions_and_empty_batches_give_numbers(batch, backend):
    logits, labels = batch
    nothing = torch.full_like(labels, -100)
    with use_backend(backend):
        x = logits.clone().requires_grad_()
        out = loss_of(x, nothing, ref_logits=logits, statistics=("entropy", "kl"))
        out.loss.backward()
        assert out.loss.item() == pytest.approx(0.6931472)
        assert bool((x.grad == 0).all())
        empty = logits[:0].clone().requires_grad_()
        loss = loss_of(empty, labels[:0]).loss
        loss.backward()
        assert loss.item() == 0.0
        assert empty.grad.shape == empty.shape


BAD = {
    "odd batch": (lambda z, y: loss_of(z[:3], y[:3]), ValueError, "odd number"),
    "labels of another shape": (lambda z, y: loss_of(z, y[:, :-1]), ValueError, r"labels must have shape \[4, 5\]"),
    "two-dimensional logits": (lambda z, y: loss_of(z[0], y[0]), ValueError, "cu_seqlens"),
    "packed without cu_seqlens": (lambda z, y: loss_of(z.reshape(-1, V), y.reshape(-1)), ValueError, "cu_seqlens"),
    "integer logits": (lambda z, y: loss_of(z.long(), y), TypeError, "float32"),
    "float labels": (lambda z, y: loss_of(z, y.float()), TypeError, "int64"),
    "label beyond the vocabulary": (
        lambda z, y: loss_of(z, y.clone().index_put_((torch.tensor(1), torch.tensor(2)), torch.tensor(V))),
        (ValueError, RuntimeError),
        "label 97 at row 1, position 2",
    ),
    "negative label": (
        lambda z, y: loss_of(z, y.clone().index_put_((torch.tensor(3), torch.tensor(4)), torch.tensor(-1))),
        (ValueError, RuntimeError),
        "label -1 at row 3, position 4",
    ),
    "unknown objective": (lambda z, y: loss_of(z, y, loss_type="sigmiod"), ValueError, "did you mean 'sigmoid'.*hinge"),
    "no objective": (lambda z, y: loss_of(z, y, loss_type=[]), ValueError, "at least one"),
    "loss_weights of wrong length": (
        lambda z, y: loss_of(z, y, loss_type=["ipo", "hinge"], loss_weights=[1.0]),
        ValueError,
        "1 entries for 2",
    ),
    "smoothing out of range": (lambda z, y: loss_of(z, y, label_smoothing=1.5), ValueError, r"\[0, 1\]"),
    "robust smoothing of a half": (
        lambda z, y: loss_of(z, y, loss_type="robust", label_smoothing=0.5),
        ValueError,
        r"\[0, 0.5\)",
    ),
    "no reference": (lambda z, y: dpo_loss(z, y), ValueError, "none was given.*simpo"),
    "both references": (
        lambda z, y: loss_of(z, y, ref_logits=z, ref_logps=torch.zeros(4)),
        ValueError,
        "not both",
    ),
    "reference of another shape": (
        lambda z, y: loss_of(z, y, ref_logits=z[:, :-1]),
        ValueError,
        "ref_logits must have",
    ),
    "ref_logps of wrong length": (lambda z, y: loss_of(z, y, ref_logps=torch.zeros(3)), ValueError, r"shape \[4\]"),
    "kl without reference logits": (lambda z, y: loss_of(z, y, statistics=["kl"]), ValueError, "needs ref_logits"),
    "unknown statistic": (lambda z, y: loss_of(z, y, statistics=["varentropy"]), ValueError, "known: entropy"),
    "pair_weights of wrong length": (lambda z, y: loss_of(z, y, pair_weights=torch.ones(3)), ValueError, r"\[2\]"),
    "token_weights of wrong shape": (lambda z, y: loss_of(z, y, token_weights=torch.ones(4)), ValueError, r"\[4, 5\]"),
    "beta of wrong length": (lambda z, y: loss_of(z, y, beta=torch.ones(3)), ValueError, r"beta must have shape \[2\]"),
    "unknown reduction": (lambda z, y: loss_of(z, y, reduction="avg"), ValueError, "mean"),
    "softcap of zero": (lambda z, y: loss_of(z, y, logit_softcap=0.0), ValueError, "positive"),
    "cu_seqlens past the end": (
        lambda z, y: loss_of(z.reshape(-1, V), y.reshape(-1), cu_seqlens=torch.tensor([0, 5, 10, 15, 21])),
        ValueError,
        "at most 20",
    ),
    "cu_seqlens falling": (
        lambda z, y: loss_of(z.reshape(-1, V), y.reshape(-1), cu_seqlens=torch.tensor([0, 5, 4, 15, 20])),
        ValueError,
        "rise from 0",
    ),
    "labels on another device": (lambda z, y: loss_of(z, y.to("meta")), ValueError, "move it there"),
    "objective that is no callable": (lambda z, y: loss_of(z, y, loss_type=[3]), TypeError, "callables"),
    "objective of wrong shape": (
        lambda z, y: loss_of(z, y, loss_type=lambda pairs: pairs.margins.sum()),
        ValueError,
        "one loss per pair",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_gets_one_clear_line(batch, name):
    call, kind, message = BAD[name]
    with pytest.raises(kind, match=message) as caught:
        call(*batch)
    assert "\n" not in str(caught.value).split("Exception raised from")[0].strip()


def test_label_out_of_range_is_named_by_every_backend(batch, backend, device):
    logits, labels = (t.to(device) for t in batch)
    labels[2, 3] = V + 7
    with use_backend(backend), pytest.raises((ValueError, RuntimeError), match="label 104 at row 2, position 3"):
        loss_of(logits, labels).metrics()


def test_a_second_backward_works_or_says_why_not(batch):
    logits, labels = batch
    x = logits.clone().requires_grad_()
    loss = loss_of(x, labels).loss
    loss.backward(retain_graph=True)
    first = x.grad.clone()
    loss.backward()
    assert torch.equal(x.grad, 2 * first)

    x = logits.clone().requires_grad_()
    loss = loss_of(x * 1.0, labels, inplace_backward=True).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace_backward=False"):
        loss.backward()


def test_overwritten_logits_are_noticed_by_others_who_saved_them(batch):
    logits, labels = batch
    x = logits.clone().requires_grad_()
    hidden = x * 1.0
    other = (hidden**2).sum()
    loss_of(hidden, labels, inplace_backward=True).loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace operation"):
        other.backward()


def test_double_backward_says_that_there_is_none(batch):
    logits, labels = batch
    for inplace in (False, True):
        x = logits.clone().requires_grad_()
        loss = loss_of(x, labels, inplace_backward=inplace).loss
        (grad,) = torch.autograd.grad(loss, x, create_graph=True)
        with pytest.raises(RuntimeError, match="no double backward"):
            grad.sum().backward()


def test_no_grad_inference_mode_and_autocast(batch):
    logits, labels = batch
    expected = loss_of(logits, labels).losses
    with torch.no_grad():
        out = loss_of(logits.clone().requires_grad_(), labels)
        assert not out.loss.requires_grad
    with torch.inference_mode():
        assert torch.equal(loss_of(logits, labels).losses, expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x = logits.clone().requires_grad_()
        out = loss_of(x, labels)
        out.loss.backward()
    assert out.loss.dtype == torch.float32
    assert torch.equal(out.losses, expected)
    assert x.grad.dtype == torch.float32


def test_gradient_checkpointing(batch):
    logits, labels = batch
    a, b = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    loss_of(a * 2, labels).loss.backward()
    torch.utils.checkpoint.checkpoint(lambda x: loss_of(x * 2, labels).loss, b, use_reentrant=False).backward()
    assert torch.equal(a.grad, b.grad)


def test_only_the_loss_keeps_the_graph(batch):
    logits, labels = batch
    out = loss_of(logits.clone().requires_grad_(), labels, ref_logits=logits, statistics=("entropy",))
    for name, value in vars(out).items():
        if isinstance(value, torch.Tensor):
            assert value.requires_grad == (name == "loss"), name


def test_gradcheck_in_float64(backend):
    if backend not in ("eager", "cpu"):
        return  # no float64; tests/test_operators.py tests the error
    inputs = make_inputs(Case("tiny", vocab=11, dtype=torch.float64, weighted=True, pairs=2, length=3))
    logits = inputs.logits.requires_grad_()
    with use_backend(backend):
        assert torch.autograd.gradcheck(lambda x: loss_of(x, inputs.labels, **inputs.keywords).loss, (logits,))


def test_losses_are_each_pairs_own_before_pair_weights():
    g = torch.Generator().manual_seed(3)
    logits, labels = torch.randn(4, 5, 11, generator=g), torch.randint(11, (4, 5), generator=g)
    weights = torch.tensor([0.25, 3.0])
    plain = dpo_loss(logits, labels, ref_logits=logits.flip(2))
    weighted = dpo_loss(logits, labels, ref_logits=logits.flip(2), pair_weights=weights, reduction="sum")
    assert torch.equal(weighted.losses, plain.losses)
    torch.testing.assert_close(weighted.loss, (plain.losses * weights).sum())
    hidden, head = torch.randn(4, 5, 3, generator=g, requires_grad=True), torch.randn(11, 3, generator=g)
    linear = linear_dpo_loss(hidden, head, labels, ref_logps=torch.zeros(4), pair_weights=weights, reduction="sum")
    unweighted = linear_dpo_loss(hidden, head, labels, ref_logps=torch.zeros(4))
    assert torch.equal(linear.losses, unweighted.losses)
    torch.testing.assert_close(linear.loss, (unweighted.losses * weights).sum())
