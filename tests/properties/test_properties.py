"""Values and gradients of the public functions equal the truth on random calls."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dpo_kernels import dpo_loss, linear_dpo_loss, linear_logps, objective, sequence_logps

from .bounds import ROUNDINGS, Bounds, bounds_of, check_close, epsilon, rounded
from .conftest import examples
from .strategies import LEFT_OUT, REGIMES, Call, Problem, laid_out, make, problems
from .truth import OBJECTIVES, Settings, Truth, truth_of

RUNNING = ("bco_running", "beta_dpo")


def loss_type_of(problem: Problem):
    """One or several objectives. Those with a running mean are new objects, so that this is their first call."""
    made = [objective(name) if name in RUNNING else name for name in problem.names]
    return made[0] if len(made) == 1 else made


def truth_of_call(problem: Problem, call: Call, x: Tensor, ref_x: Tensor | None) -> Truth:
    return truth_of(
        x,
        call.labels,
        call.spans,
        call.settings,
        ignore_index=problem.ignore_index,
        token_weights=call.token_weights,
        ref_x=ref_x,
    )


def factor_of(problem: Problem, call: Call) -> Tensor:
    """d result / d weighted loss for each pair, [P]."""
    scale = max(problem.pairs, 1) if problem.reduction == "mean" else 1
    return (call.upstream.double() / scale).expand(problem.pairs)


def check_output(problem: Problem, out, truth: Truth, bounds: Bounds) -> None:
    """Check all values of a DPOOutput."""
    check_close("loss", out.loss, truth.loss, bounds.loss)
    check_close("losses", out.losses, truth.losses, bounds.losses)
    check_close("logps", torch.cat([out.chosen_logps, out.rejected_logps]), truth.sums, bounds.sums)
    if OBJECTIVES[problem.names[0]].reference:
        check_close("ref", torch.cat([out.ref_chosen_logps, out.ref_rejected_logps]), truth.ref_sums, bounds.ref_sums)
    reward = torch.cat([out.chosen_rewards, out.rejected_rewards])
    # Every example has beta < 1.
    room = bounds.sums + bounds.ref_sums + bounds.divergences
    check_close("rewards", reward, truth.rewards, room + 4 * torch.finfo(reward.dtype).eps * truth.rewards.abs())
    check_close("token_counts", out.token_counts, truth.counts, torch.zeros(()).double())
    for name in problem.statistics:
        check_close(name, getattr(out, name), truth.statistics[name], bounds.statistics[name])


def check_rows(name: str, grad: Tensor, wanted: Tensor, bound: Tensor | None, truth: Truth, dtype: torch.dtype) -> None:
    """Check gradients [N, V] of logits: exactly zero for unscored tokens, and within the bound for scored tokens."""
    scored = torch.zeros(len(wanted), dtype=torch.bool).index_fill(0, truth.rows, True)
    assert bool((grad[~scored] == 0).all()), f"{name}: a token that does not count received gradient"
    if bound is not None:
        wanted = wanted[truth.rows]
        check_close(name, grad[truth.rows], wanted, bound + (rounded(wanted, dtype) if dtype.itemsize == 2 else 0.0))


def usable(wanted: Tensor) -> bool:
    """Whether the true gradient can be compared with, which an infinite loss does not have."""
    return bool(wanted.isfinite().all())


def check_dpo_loss(problem: Problem) -> None:
    call = make(problem)
    x = call.x.clone().requires_grad_()
    truth = truth_of_call(problem, call, x, call.ref_x)
    keywords = dict(call.keywords)
    if problem.reference == "logits":
        ref = call.extra["ref_logits"].to(problem.dtype)
        keywords["ref_logits"] = laid_out(ref, "sliced" if problem.layout == "contiguous" else "contiguous")
    logits = call.logits.detach().requires_grad_()
    out = dpo_loss(
        logits,
        call.given_labels,
        loss_type=loss_type_of(problem),
        inplace_backward=problem.inplace and problem.layout != "expanded",
        **keywords,
    )
    assert out.loss.dtype == (torch.float64 if problem.dtype == torch.float64 else torch.float32)
    if truth.loss.requires_grad:
        truth.loss.backward(call.upstream.double())
    bounds = bounds_of(truth, call.settings, problem.dtype, factor_of(problem, call))
    check_output(problem, out, truth, bounds)
    if not usable(truth.loss):
        return
    out.loss.backward(call.upstream.to(out.loss.dtype))
    wanted = torch.zeros_like(x) if x.grad is None else x.grad
    assert logits.grad.dtype == problem.dtype
    check_rows("gradient", logits.grad.reshape(-1, problem.vocab), wanted, bounds.by_logits, truth, problem.dtype)


@pytest.mark.parametrize("regime", [name for name in REGIMES if name not in LEFT_OUT])
def test_dpo_loss(engine, effort, regime):
    """One test for each kind of logits, so that every run covers all kinds."""
    examples(engine, effort, 0.05, problems(engine, regime=regime), check_dpo_loss)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_dpo_loss_of_every_objective(engine, effort, name):
    """Objectives are computed outside the kernels, so each gets few examples. The test above also draws all objectives."""
    if engine in ("triton", "cuda") and effort == "always":
        pytest.skip("objectives do not know the backend, and the interpreter is slow")
    examples(engine, effort, 0.2 / len(OBJECTIVES), problems(engine, names=(name,), regime="usual"), check_dpo_loss)


def check_sequence_logps(problem: Problem) -> None:
    call = make(problem)
    x = call.x.clone().requires_grad_()
    truth = truth_of_call(problem, call, x, None)
    logits = call.logits.detach().requires_grad_()
    names = ("token_weights", "ignore_index", "logit_scale", "logit_softcap", "cu_seqlens")
    keywords = {name: call.keywords[name] for name in names if name in call.keywords}
    found = sequence_logps(logits, call.given_labels, **keywords)
    weight = torch.linspace(-2, 1, len(call.spans)).double()
    if len(truth.rows):
        sums = torch.zeros(len(call.spans)).double().index_add(0, truth.owner, truth.weights * truth.logps)
        (sums * weight).sum().backward()
    bounds = bounds_of(truth, call.settings, problem.dtype, torch.zeros(problem.pairs).double())
    check_close("logps", found, truth.sums, bounds.sums)
    (found * weight.to(found.dtype)).sum().backward()
    wanted = torch.zeros_like(x) if x.grad is None else x.grad
    check_rows("gradient", logits.grad.reshape(-1, problem.vocab), wanted, bounds.by_logits, truth, problem.dtype)


def test_sequence_logps(engine, effort):
    examples(engine, effort, 0.06, problems(engine), check_sequence_logps)


# --- from hidden states -----------------------------------------------------------------------------------------------


class Head:
    """A policy's or a reference's hidden states, head and bias, in the problem's dtype, and their logits in float64."""

    def __init__(self, problem: Problem, shape: tuple[int, ...], g: torch.Generator) -> None:
        def draw(*size: int) -> Tensor:
            return torch.randn(*size, generator=g, dtype=torch.float64).to(problem.dtype)

        self.hidden = draw(*shape, problem.hidden)
        self.weight = draw(problem.vocab, problem.hidden) * 2 / problem.hidden**0.5
        self.bias = draw(problem.vocab) if problem.bias else None

    def exact(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """float64 leaves of hidden [N, H], weight and bias."""
        tensors = (self.hidden.reshape(-1, self.hidden.shape[-1]), self.weight, self.bias)
        return tuple(None if t is None else t.detach().double().requires_grad_() for t in tensors)

    def logits(self, exact: tuple[Tensor, Tensor, Tensor | None]) -> Tensor:
        hidden, weight, bias = exact
        return hidden @ weight.T + (0.0 if bias is None else bias)

    def error(self) -> Tensor:
        """Largest error [N] of each row's logits from the rounding of the product."""
        hidden, weight, bias = (None if t is None else t.detach().double().abs() for t in (*self.exact(),))
        size = hidden @ weight.T + (0.0 if bias is None else bias)
        return (ROUNDINGS * epsilon(self.hidden.dtype) + torch.finfo(self.hidden.dtype).eps) * size.amax(-1)


def check_head_gradients(
    head: Head, exact: tuple[Tensor, ...], given: list[Tensor | None], truth: Truth, bound: Tensor | None
) -> None:
    """Check dH, dW and dbias. Their bounds follow from the bound of the logits' gradient."""
    names = ("hidden", "weight", "bias")
    if bound is None:
        for name, tensor in zip(names, given, strict=True):
            if tensor is not None and tensor.requires_grad:
                assert bool((tensor.grad == 0).all()), f"{name}: gradient without a scored token"
        return
    dtype = head.hidden.dtype
    eps = torch.finfo(dtype).eps + ROUNDINGS * epsilon(dtype)
    dz = truth.z.grad.abs()
    stored = bound + rounded(dz, dtype) * (dtype.itemsize == 2)
    # On GPUs the logits' gradient has the head's dtype. Beyond its range it is infinite, and sums of it are NaN.
    stored = torch.where(dz + stored > torch.finfo(dtype).max, 1e300, stored)
    hidden, weight = exact[0].detach().abs()[truth.rows], exact[1].detach().abs()
    by_hidden = torch.zeros_like(exact[0]).index_copy(0, truth.rows, (stored + eps * dz) @ weight)
    wide = (by_hidden, (stored + eps * dz).T @ hidden, (stored + eps * dz).sum(0))
    for name, tensor, truth_leaf, room in zip(names, given, exact, wide, strict=True):
        if tensor is None or not tensor.requires_grad:
            continue
        grad = tensor.grad.reshape(truth_leaf.shape)
        check_close(f"gradient of {name}", grad, truth_leaf.grad, room + 2 * rounded(truth_leaf.grad, tensor.dtype))
    if given[0].requires_grad:
        unscored = torch.ones(len(exact[0]), dtype=torch.bool).index_fill(0, truth.rows, False)
        rows = given[0].grad.reshape(exact[0].shape)[unscored]
        assert bool((rows == 0).all()), "a token that does not count received gradient"


def linear_inputs(problem: Problem, call: Call) -> tuple[Head, Head, dict, list[Tensor | None]]:
    """(policy, reference, keywords of the linear path, tensors to differentiate)."""
    g = torch.Generator().manual_seed(problem.seed + 1)
    shape = call.given_labels.shape
    head, ref = Head(problem, shape, g), Head(problem, shape, g)
    if problem.poison != "none":
        for each in (head, ref):
            each.hidden = each.hidden.masked_fill(call.extra["unscored"].unsqueeze(-1), torch.nan)
    given = [
        laid_out(head.hidden, "contiguous" if problem.layout == "expanded" else problem.layout),
        head.weight,
        head.bias,
    ]
    frozen = {"nothing": (), "weight": (1, 2), "hidden": (0,)}[problem.frozen]
    given = [None if t is None else t.detach().requires_grad_(at not in frozen) for at, t in enumerate(given)]
    # Upper limit of the bytes for one row of logits and its temporary tensors.
    row = 16 * (problem.vocab + 64) + 8 * (problem.vocab + problem.hidden) + 32 * problem.hidden + 2048
    budget = None if problem.rows_budget is None else problem.rows_budget * row
    keywords = {"memory_budget": budget, "grad_filter": problem.grad_filter}
    return head, ref, keywords, given


def check_linear_dpo_loss(problem: Problem) -> None:
    call = make(problem)
    head, ref, keywords, given = linear_inputs(problem, call)
    exact, ref_exact = head.exact(), ref.exact()
    beside = problem.reference == "logits"
    ref_x = ref.logits(ref_exact).detach() if beside else None
    truth = truth_of_call(problem, call, head.logits(exact), ref_x)
    keywords |= call.keywords
    if beside:
        keywords |= {"ref_hidden": ref.hidden, "ref_weight": ref.weight, "ref_bias": ref.bias}
    out = linear_dpo_loss(
        given[0], given[1], call.given_labels, bias=given[2], loss_type=loss_type_of(problem), **keywords
    )
    if truth.loss.requires_grad:
        truth.loss.backward(call.upstream.double())
    error, ref_error = head.error()[truth.rows], ref.error()[truth.rows] * beside
    bounds = bounds_of(
        truth, call.settings, problem.dtype, factor_of(problem, call), error=error * abs(problem.scale),
        ref_error=ref_error * abs(problem.scale),
    )  # fmt: skip
    if problem.dtype.itemsize == 2:
        bounds.statistics["accuracy"] = torch.ones(()).double()  # rounded logits may tie
    check_output(problem, out, truth, bounds)
    if not usable(truth.loss):
        return
    out.loss.backward(call.upstream.to(out.loss.dtype))
    check_head_gradients(head, exact, given, truth, bounds.by_logits)


def test_linear_dpo_loss(engine, effort):
    examples(engine, effort, 0.1, problems(engine, regime="usual", linear=True), check_linear_dpo_loss)


def check_linear_logps(problem: Problem) -> None:
    """Check linear_logps, which scores every token with a label, in any sequence."""
    problem = replace(problem, token_weights="none", names=("sigmoid",), smoothing="0.0", weighting=False, kl_coef=0.0)
    call = make(problem)
    head, _, keywords, given = linear_inputs(problem, call)
    exact, count = head.exact(), len(call.labels)
    call.spans, call.settings = [(0, count), (count, count)], Settings(scale=problem.scale, cap=problem.cap)
    call.settings.ref_sums = torch.zeros(2).double()
    truth = truth_of_call(problem, call, head.logits(exact), None)
    keywords |= {name: call.keywords[name] for name in ("ignore_index", "logit_scale", "logit_softcap")}
    found = linear_logps(given[0], given[1], call.given_labels, bias=given[2], **keywords)
    assert found.shape == call.given_labels.shape
    weight = torch.linspace(-2, 1, count).double()
    if truth.logps.requires_grad:
        (truth.logps * weight[truth.rows]).sum().backward()
    error = head.error()[truth.rows] * abs(problem.scale)
    bounds = bounds_of(truth, call.settings, problem.dtype, torch.zeros(1).double(), error=error)
    wanted = torch.zeros(count).double().index_copy(0, truth.rows, truth.logps.detach())
    room = torch.zeros(count).double().index_copy(0, truth.rows, bounds.logps)
    check_close("logps", found.reshape(-1), wanted, room + 2 * torch.finfo(found.dtype).eps * wanted.abs())
    (found * weight.view(found.shape).to(found.dtype)).sum().backward()
    check_head_gradients(head, exact, given, truth, bounds.by_logits)


def test_linear_logps(engine, effort):
    examples(engine, effort, 0.06, problems(engine, regime="usual", linear=True), check_linear_logps)
