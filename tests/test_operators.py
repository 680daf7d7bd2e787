"""Every backend equals the float64 reference on the operator table: loss, log-probabilities, statistics, gradients."""

import pytest
import torch

from dpo_kernels import STATISTICS, dpo_loss, ops, reference, use_backend
from dpo_kernels.stages import Transform

from cases import CASES, Case, make_inputs
from checks import check_gradient


def supported(backend: str, case: Case) -> bool:
    """Whether the backend supports the case. Only eager and cpu support float64 logits, for checks."""
    return case.dtype != torch.float64 or backend in ("eager", "cpu")


def in_float64(keywords: dict) -> dict:
    return {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in keywords.items()}


def truth_of(inputs, grad_dtype=torch.float64):
    """Loss and gradient by autograd through the definition, in `grad_dtype` arithmetic."""
    logits = inputs.logits.detach().to(grad_dtype).requires_grad_()
    keywords = in_float64(inputs.keywords) if grad_dtype == torch.float64 else inputs.keywords
    loss = reference.dpo_loss(logits, inputs.labels, **keywords)
    loss.sum().backward()
    return loss.detach(), logits.grad


@pytest.mark.parametrize("case", CASES, ids=str)
def test_loss_and_gradient_equal_the_float64_reference(backend, case, device):
    if not supported(backend, case):
        # Not skipped: the backend must raise an error that names the dtypes.
        inputs = make_inputs(case, device)
        with use_backend(backend), pytest.raises((TypeError, ValueError), match="float64"):
            dpo_loss(inputs.logits, inputs.labels, **inputs.keywords)
        return
    inputs = make_inputs(case, device)
    truth, truth_grad = truth_of(inputs)
    # Eager in the same precision: 16-bit logits are upcast, as careful trainers do, and the gradient is cast back.
    work = torch.float64 if case.dtype == torch.float64 else torch.float32
    eager_loss, eager_grad = truth_of(inputs, work)

    logits = inputs.logits.detach().requires_grad_()
    with use_backend(backend):
        out = dpo_loss(logits, inputs.labels, **inputs.keywords)
        out.loss.backward()
    epsilon = torch.finfo(out.loss.dtype).eps
    # The error may be at most eager's, plus the rounding of the returned number.
    bits = 4.0 if out.loss.dtype == torch.float64 else 0.5
    rounding = bits * epsilon * float(truth.abs().max().clamp(min=0.5))
    allowed = float((eager_loss.double() - truth).abs().max()) + rounding
    assert float((out.loss.detach().double() - truth).abs().max()) <= allowed
    if case.vocab > 1:
        check_gradient(logits.grad, truth_grad, eager_grad.to(case.dtype), inputs.labels)
    else:
        assert bool((logits.grad == 0).all()), "a one-word vocabulary leaves nothing to learn"


@pytest.mark.parametrize("case", [c for c in CASES if c.reference == "logits"], ids=str)
def test_statistics_and_logps_equal_the_float64_reference(backend, case, device):
    if not supported(backend, case):
        return
    inputs = make_inputs(case, device)
    names = ("logps", "ref_logps", *STATISTICS)
    options = {k: inputs.keywords[k] for k in ("logit_scale", "logit_softcap") if k in inputs.keywords}

    def sums_of(tokens, weights):
        cu = inputs.keywords.get("cu_seqlens")
        return {name: reference.sequence_sums(tokens[name], weights, cu) for name in names}

    def averages(dtype):
        tokens = reference.token_statistics(
            inputs.logits.to(dtype), inputs.labels, ref_logits=inputs.keywords["ref_logits"].to(dtype), **options
        )
        mask = (inputs.labels != -100).to(dtype)
        weights = mask * inputs.keywords.get("token_weights", torch.ones_like(mask)).to(dtype)
        found = sums_of(tokens, mask)
        count = reference.sequence_sums(mask, torch.ones_like(mask), inputs.keywords.get("cu_seqlens")).clamp(min=1)
        found = {name: value / count for name, value in found.items()}
        for name in ("logps", "ref_logps"):
            found[name] = reference.sequence_sums(tokens[name], weights, inputs.keywords.get("cu_seqlens"))
        return found

    truth = averages(torch.float64)
    eager = averages(torch.float64 if case.dtype == torch.float64 else torch.float32)
    with use_backend(backend):
        out = dpo_loss(inputs.logits, inputs.labels, statistics=STATISTICS, **inputs.keywords)
    ours = {name: getattr(out, name) for name in STATISTICS}
    ours["logps"] = torch.cat([out.chosen_logps, out.rejected_logps])
    ours["ref_logps"] = torch.cat([out.ref_chosen_logps, out.ref_rejected_logps])
    for name in names:
        # The error may be at most eager's in the same precision, or one unit in the last place of the largest logit (a KL
        # divergence is a difference of numbers of that size).
        epsilon = torch.finfo(ours[name].dtype).eps
        error = (ours[name].double() - truth[name]).abs()
        bits = 16.0 if case.dtype == torch.float64 else 1.0
        scale = max(float(truth[name].abs().max()), float(inputs.logits.abs().max()))
        allowed = max(float((eager[name].double() - truth[name]).abs().max()), bits * epsilon * scale)
        assert float(error.max()) <= allowed, f"{name}: {float(error.max()):.3g} > {allowed:.3g}"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_log_sum_sq_equals_the_float64_reference(backend, case, device):
    """WPO's weights compare the log-probability with log_sum_sq. It is computed for each token and 0 for unscored tokens."""
    if not supported(backend, case):
        return
    inputs = make_inputs(case, device)
    logits, labels = inputs.logits, inputs.labels
    if case.packed:
        logits, labels = logits.unsqueeze(0), labels.unsqueeze(0)
    options = {k: inputs.keywords.get(k, default) for k, default in (("logit_scale", 1.0), ("logit_softcap", 0.0))}
    transform = Transform(-100, options["logit_scale"], options["logit_softcap"])
    found = ops.token_logps(logits, labels, None, transform, ("log_sum_sq",), backend=backend)
    ours, plain = found["log_sum_sq"], ops.token_logps(logits, labels, None, transform, backend=backend)
    assert all(torch.equal(found[name], plain[name]) for name in ("logps", "max", "log_sum"))
    assert bool((ours[labels == -100] == 0).all())
    truth, eager = (
        reference.token_statistics(logits.to(dtype), labels, **options)["log_sum_sq"].double()
        for dtype in (torch.float64, torch.float64 if case.dtype == torch.float64 else torch.float32)
    )
    # As for the other statistics: at most eager's error, or one unit in the last place of the largest logit.
    unit = 16 * torch.finfo(torch.float64).eps if case.dtype == torch.float64 else torch.finfo(torch.float32).eps
    allowed = max(float((eager - truth).abs().max()), unit * max(float(logits.abs().max()), float(truth.abs().max())))
    assert float((ours - truth).abs().max()) <= allowed


def test_policy_equal_to_reference_is_exactly_log_two(backend, device):
    for dtype in (torch.float32, torch.bfloat16):
        inputs = make_inputs(Case("same", vocab=517, dtype=dtype), device)
        for statistics in ((), ("kl", "entropy")):
            with use_backend(backend):
                out = dpo_loss(inputs.logits, inputs.labels, ref_logits=inputs.logits.clone(), statistics=statistics)
            assert out.loss.item() == torch.tensor(2.0).log().item()
            assert bool((out.chosen_rewards == 0).all())
            assert bool((out.rejected_rewards == 0).all())
            if statistics:
                assert bool((out.kl == 0).all())


def test_in_place_gradient_is_bitwise_the_other_one(backend, device):
    for case in (Case("padded", vocab=1021), Case("packed", vocab=1024, packed=True, dtype=torch.bfloat16)):
        inputs = make_inputs(case, device)
        grads = []
        for inplace in (False, True):
            logits = inputs.logits.clone().requires_grad_()
            with use_backend(backend):
                dpo_loss(logits, inputs.labels, inplace_backward=inplace, **inputs.keywords).loss.backward()
            grads.append(logits.grad)
            assert (logits.grad.data_ptr() == logits.data_ptr()) == inplace
        assert torch.equal(*grads)


def test_two_runs_are_bitwise_equal(backend, device):
    inputs = make_inputs(Case("again", vocab=2100, pairs=3, weighted=True), device)
    results = []
    for _ in range(2):
        logits = inputs.logits.clone().requires_grad_()
        with use_backend(backend):
            out = dpo_loss(logits, inputs.labels, **inputs.keywords)
            out.loss.backward()
        results.append((out.losses, out.chosen_logps, logits.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
