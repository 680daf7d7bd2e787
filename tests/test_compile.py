"""The operators under opcheck, under torch.compile without graph breaks, and with dynamic shapes."""

import pytest
import torch

from dpo_kernels import STATISTICS, DPOLoss, dpo_loss, ops, stages, use_backend

from cases import Case, loss_of, make_inputs

_ops = torch.ops.dpo_kernels


def op_arguments(backend, device):
    """Arguments of a call of every operator, with and without its optional tensors."""
    z, r = (torch.randn(4, 3, 33, device=device) for _ in range(2))
    y = torch.randint(0, 33, (4, 3), device=device)
    y[1, 1] = -100
    small = {"dtype": torch.float64, "device": device}
    w = (y != -100).to(torch.float64)
    packed = torch.tensor([0, 3, 6, 10, 12], device=device)
    values = torch.randn(4, 3, **small)
    pair = torch.full((2,), 0.1, **small)
    plain, capped = (-100, 1.0, 0.0), (-100, 0.5, 9.0)
    everything = list(stages.STATISTICS)
    narrow = z.bfloat16().view(1, 12, 33).requires_grad_()
    yield _ops.token_logps, (z.clone().requires_grad_(), y, r, *plain, everything, [], False, backend)
    yield _ops.token_logps, (z.clone().requires_grad_(), y, r, *plain, [], ["kl", "forward_kl"], False, backend)
    yield _ops.token_logps, (z.clone().requires_grad_(), y, None, *plain, ["entropy"], ["entropy"], False, backend)
    yield _ops.token_logps, (z.bfloat16().requires_grad_(), y, None, *capped, [], [], False, backend)
    yield _ops.sequence_sums, (values.clone().requires_grad_(), w, None, backend)
    yield _ops.sequence_sums, (values.view(1, 12).clone().requires_grad_(), w.view(1, 12), packed, backend)
    yield _ops.preference_loss, (values.clone().requires_grad_(), values * 2, w, None, None, pair, pair, False, backend)
    sums = torch.randn(4, **small)
    flat = values.view(1, 12).clone().requires_grad_()
    yield _ops.preference_loss, (flat, None, w.view(1, 12), packed, sums, pair, pair, True, backend)
    call = (y, r, *plain, everything, None, None, None, "mean", None, None, 0.1, None, 0.0, False)
    yield _ops.preference_forward, (z.clone().requires_grad_(), *call, False, backend)
    rest = (w.view(1, 12), packed, pair, "none", sums, pair, 0.0, pair, 0.0, True)
    yield _ops.preference_forward, (narrow, y.view(1, 12), None, *capped, [], *rest, False, backend)
    tokens, sequences, _, loss = _ops.preference_forward(z, *call, False, backend)
    yield _ops.preference_backward, (z, y, tokens, sequences, loss, *plain, None, None, None, "mean", backend)
    yield _ops.logits_grad, (z, y, *tokens[:3], values, *plain, *[None] * 7, backend)
    reference = (r, *tokens[3:6], tokens[7])
    yield _ops.logits_grad, (z, y, *tokens[:3], values, *plain, *reference, values, values, backend)


def test_opcheck_passes_for_every_operator(backend, device):
    seen = set()
    for op, arguments in op_arguments(backend, device):
        torch.library.opcheck(op.default, arguments)
        seen.add(op.default.name().split("::")[1])
    assert seen == {operator.name for operator in ops.OPERATORS}


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_compiled_loss_has_no_graph_break_and_equals_the_plain_one(fresh_dynamo, packed, device):
    inputs = make_inputs(Case("compiled", vocab=131, packed=packed, pairs=3), device)

    def step(logits):
        out = dpo_loss(logits, inputs.labels, statistics=STATISTICS, inplace_backward=True, **inputs.keywords)
        return out.loss, out.chosen_rewards, out.kl

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    x, y = (inputs.logits.clone().requires_grad_() for _ in range(2))
    plain, fused = step(x), compiled(y)
    plain[0].backward()
    fused[0].backward()
    for a, b in zip(plain, fused, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(x.grad, y.grad)


def test_inductor_compiles_a_head_and_the_loss_together(fresh_dynamo, device):
    inputs = make_inputs(Case("head", vocab=64, pairs=2), device)
    head = torch.nn.Linear(16, 64).to(device)
    hidden = torch.randn(4, 5, 16, device=device)
    loss_fn = DPOLoss(statistics=("entropy",), inplace_backward=True)

    def step(h):
        return loss_fn(head(h), inputs.labels, ref_logits=inputs.keywords["ref_logits"]).loss

    step(hidden).backward()
    plain = head.weight.grad.clone()
    head.zero_grad()
    torch.compile(step, fullgraph=True)(hidden).backward()
    torch.testing.assert_close(head.weight.grad, plain)


def test_no_recompilation_when_only_the_length_changes(fresh_dynamo, device):
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda z, y: dpo_loss(z, y, ref_logits=z.detach()).loss, fullgraph=True, backend=counter)
    for length in (4, 5, 6, 9):
        inputs = make_inputs(Case("length", vocab=67, length=length), device)
        compiled(inputs.logits.requires_grad_(), inputs.labels).backward()
    # One graph for the first shape, and one with a symbolic length for all later shapes.
    assert counter.frame_count <= 2


def test_a_backend_chosen_by_hand_is_kept_by_the_graph(fresh_dynamo, device):
    inputs = make_inputs(Case("eager", vocab=67), device)
    compiled = torch.compile(lambda z: loss_of(z, inputs.labels).loss, fullgraph=True, backend="aot_eager")
    first = compiled(inputs.logits)
    with use_backend("eager"):
        second = compiled(inputs.logits)
    torch.testing.assert_close(first, second)
