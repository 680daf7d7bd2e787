"""Our LigerFusedLinearDPOLoss equals Liger's on the same inputs, for every loss type, option and output.

Liger runs unmodified in float32, without torch.compile. The results may differ only by float32 rounding. tests/test_frameworks.py
runs TRL with the class exchanged.
"""

import inspect
import sys
import types

import pytest
import torch

from dpo_kernels import linear_dpo_loss
from dpo_kernels.integrations import liger as integration
from dpo_kernels.integrations.liger import LigerFusedLinearDPOLoss as Ours

chunked_loss = pytest.importorskip(
    "liger_kernel.chunked_loss", reason="pip install --no-deps liger-kernel==0.8.5 (the extra `peers`)"
)

#: Modules in which `apply` exchanges the class; not this one, where a global named as the class would be exchanged too.
PLACES = (chunked_loss, sys.modules["liger_kernel.chunked_loss.dpo_loss"])
NAME = "LigerFusedLinearDPOLoss"


class Liger:
    DPOLoss = chunked_loss.LigerFusedLinearDPOLoss


P, T, H, V = 3, 6, 16, 37
SMOOTHING = {"robust": 0.2, "exo_pair": 0.05}


def make(seed=0, with_bias=True):
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g)

    target = torch.randint(0, V, (2 * P, T), generator=g)
    for row in range(2 * P):
        target[row, : row % 3] = -100
    inputs = {"lin_weight": normal(V, H) * 0.5, "_input": normal(2 * P, T, H)}
    if with_bias:
        inputs["bias"] = normal(V)
    frozen = {"ref_input": normal(2 * P, T, H), "ref_weight": normal(V, H) * 0.5}
    if with_bias:
        frozen["ref_bias"] = normal(V)
    return inputs, frozen, target


def run(kind, options, inputs, frozen, target):
    leaves = {name: value.clone().requires_grad_() for name, value in inputs.items()}
    reference = frozen if options.get("use_ref_model", True) else {}
    loss, extras = kind(**options)(target=target, **leaves, **reference)
    (2 * loss).backward()
    return loss, extras, {name: leaf.grad for name, leaf in leaves.items()}


def compare(options, *batch):
    ours, theirs = (run(kind, {"compiled": False, "beta": 0.3, **options}, *batch) for kind in (Ours, Liger.DPOLoss))
    torch.testing.assert_close(ours[0].float(), theirs[0].float(), rtol=2e-5, atol=2e-6)
    assert len(ours[1]) == len(theirs[1]) == 7
    for mine, other in zip(ours[1], theirs[1], strict=True):
        torch.testing.assert_close(mine, torch.as_tensor(other).detach(), rtol=2e-5, atol=2e-5)
    for name, grad in theirs[2].items():
        assert grad.abs().max() > 0
        torch.testing.assert_close(ours[2][name], grad, rtol=1e-4, atol=2e-5 * float(grad.abs().max()))


@pytest.mark.parametrize("loss_type", sorted(Liger.DPOLoss._SUPPORTED_LOSS_TYPES))
def test_every_loss_type(loss_type):
    compare({"loss_type": loss_type, "label_smoothing": SMOOTHING.get(loss_type, 0.0)}, *make())


OPTIONS = [
    {"compute_nll_loss": True},
    {"compute_nll_loss": True, "alpha": 0.3, "average_log_prob": True},
    {"average_log_prob": True, "beta": 2.0},
    {"use_ref_model": False},
    {"use_ref_model": False, "compute_nll_loss": True, "average_log_prob": True},
    {"chunk_size": 2, "loss_type": "apo_zero"},
    {"loss_type": "discopop", "discopop_tau": 0.5},
    {"loss_type": "sigmoid", "label_smoothing": 0.2},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_option(options):
    compare(options, *make(seed=1))


def test_without_a_bias():
    compare({"compute_nll_loss": True}, *make(seed=2, with_bias=False))


def test_another_ignore_index():
    inputs, frozen, target = make(seed=3)
    compare({"ignore_index": 7, "compute_nll_loss": True}, inputs, frozen, torch.where(target == -100, 7, target))


def test_constructor_and_call_are_ligers():
    for method in ("__init__", "forward"):
        ours, theirs = (inspect.signature(getattr(kind, method)).parameters for kind in (Ours, Liger.DPOLoss))
        assert {n: p.default for n, p in ours.items()} == {n: p.default for n, p in theirs.items()}
        assert list(ours) == list(theirs)


def test_what_liger_lacks_is_there():
    inputs, frozen, target = make(seed=4)
    for loss_type in ("ipo", "sigmoid_norm", "sigmoid(divergence=js)"):
        loss, _ = Ours(loss_type=loss_type)(target=target, **inputs, **frozen)
        assert loss.isfinite()


def test_mistakes_are_named():
    inputs, _, target = make()
    with pytest.raises(ValueError, match="did you mean 'sigmoid'"):
        Ours(loss_type="sigmod")
    with pytest.raises(ValueError, match=r"\(0, 1\)"):
        Ours(loss_type="exo_pair")
    with pytest.raises(ValueError, match=r"\[0, 0.5\)"):
        Ours(loss_type="robust", label_smoothing=0.5)
    with pytest.raises(ValueError, match="LinearDPOLoss"):
        Ours(loss_type="aot")
    with pytest.raises(ValueError, match="ref_input and ref_weight"):
        Ours()(target=target, **inputs)


def test_16_bit_inputs_give_ligers_dtypes_and_nearly_its_results():
    inputs, frozen, target = make(seed=5)
    halves = [{name: value.bfloat16() for name, value in tensors.items()} for tensors in (inputs, frozen)]
    options = {"compiled": False, "beta": 0.3, "compute_nll_loss": True}
    exact = run(Ours, options, *({n: v.double() for n, v in tensors.items()} for tensors in halves), target)
    ours, theirs = (run(kind, options, *halves, target) for kind in (Ours, Liger.DPOLoss))
    assert ours[0].dtype == theirs[0].dtype
    assert [t.dtype for t in ours[1]] == [t.dtype for t in theirs[1]]
    assert {n: g.dtype for n, g in ours[2].items()} == {n: g.dtype for n, g in theirs[2].items()}
    for mine, other, right in zip((ours[0], *ours[1]), (theirs[0], *theirs[1]), (exact[0], *exact[1]), strict=True):
        assert (mine.double() - right).norm() <= 1.2 * (other.double() - right).norm() + 1e-3 * right.norm()
    for name, right in exact[2].items():
        mine, other = ours[2][name].double(), theirs[2][name].double()
        assert (mine - right).norm() <= 1.2 * (other - right).norm() + 1e-3 * right.norm()


def test_under_autocast_float32_heads_go_with_bfloat16_states():
    inputs, frozen, target = make(seed=6)
    for tensors, name in ((inputs, "_input"), (frozen, "ref_input")):
        tensors[name] = tensors[name].bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, theirs = (run(kind, {"compiled": False}, inputs, frozen, target) for kind in (Ours, Liger.DPOLoss))
    torch.testing.assert_close(ours[0], theirs[0], rtol=2e-2, atol=1e-2)
    for name, grad in theirs[2].items():
        assert ours[2][name].dtype == grad.dtype
        torch.testing.assert_close(ours[2][name], grad, rtol=0, atol=0.05 * float(grad.abs().max()))


def test_views_are_read_as_they_are():
    inputs, frozen, target = make(seed=7)
    wanted = run(Ours, {}, inputs, frozen, target)
    for tensors, name in ((inputs, "_input"), (frozen, "ref_input"), (inputs, "lin_weight")):
        tensors[name] = tensors[name].transpose(0, 1).contiguous().transpose(0, 1)
    found = run(Ours, {}, inputs, frozen, target.t().contiguous().t())
    torch.testing.assert_close(found[0], wanted[0])
    for name, grad in wanted[2].items():
        torch.testing.assert_close(found[2][name], grad, rtol=1e-5, atol=1e-6)


def test_a_sequence_without_labels_is_finite():
    """Liger divides by its count of tokens, 0."""
    inputs, frozen, target = make(seed=8)
    target[1] = -100
    options = {"compiled": False, "average_log_prob": True}
    assert run(Liger.DPOLoss, options, inputs, frozen, target)[0].isnan()
    loss, extras, grads = run(Ours, options, inputs, frozen, target)
    assert loss.isfinite()
    assert all(extra.isfinite().all() for extra in extras)
    assert all(grad.isfinite().all() for grad in grads.values())


# --- exchanging the class -----------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def trl_like(monkeypatch):
    """A module that imported Liger's class by name, as TRL's trainer does."""
    module = types.ModuleType("trl_like")
    setattr(module, NAME, Liger.DPOLoss)
    monkeypatch.setitem(sys.modules, "trl_like", module)
    yield module
    integration._PATCH.undo()
    assert all(getattr(place, NAME) is Liger.DPOLoss for place in (module, *PLACES))


def test_apply_exchanges_the_class_wherever_it_was_imported(trl_like):
    undo = integration.apply()
    kinds = {getattr(place, NAME) for place in (trl_like, *PLACES)}
    assert len(kinds) == 1
    assert issubclass(kinds.pop(), Ours)
    batch = make(seed=9)
    for options in ({}, {"loss_type": "apo_down", "beta": 0.5}, {"compute_nll_loss": True, "alpha": 0.2}):
        found, wanted = (run(kind, options, *batch) for kind in (trl_like.LigerFusedLinearDPOLoss, Ours))
        assert torch.equal(found[0], wanted[0])
    stale, undo = undo, integration.apply()
    stale()
    assert issubclass(trl_like.LigerFusedLinearDPOLoss, Ours)
    undo()
    assert all(getattr(place, NAME) is Liger.DPOLoss for place in (trl_like, *PLACES))
    with integration.applied():
        assert issubclass(trl_like.LigerFusedLinearDPOLoss, Ours)


def test_an_older_constructor_keeps_its_order(trl_like, monkeypatch):
    class Older(Liger.DPOLoss):
        def __init__(
            self,
            ignore_index=-100,
            beta=0.1,
            compute_nll_loss=False,
            compiled=True,
            use_ref_model=True,
            average_log_prob=False,
            chunk_size=1,
        ):
            super().__init__(ignore_index, beta, 1.0, compute_nll_loss, compiled, use_ref_model, average_log_prob)

    for place in (trl_like, *PLACES):
        monkeypatch.setattr(place, NAME, Older)
    with integration.applied():
        kind = getattr(trl_like, NAME)
        loss = kind(-100, 0.2, True, False, True, True)
        with pytest.raises(TypeError, match="loss_type"):
            kind(loss_type="hinge")
    assert isinstance(loss, Ours)
    assert (loss.beta, loss.compute_nll_loss, loss.average_log_prob, loss.alpha) == (0.2, True, True, 1.0)
    monkeypatch.undo()


def test_heads_partitioned_by_zero3_go_to_liger(trl_like):
    inputs, frozen, target = make(seed=10)
    wanted = run(Liger.DPOLoss, {"compiled": False, "beta": 0.4}, inputs, frozen, target)
    with integration.applied():
        loss = trl_like.LigerFusedLinearDPOLoss(compiled=False, beta=0.4)
    leaves = {name: value.clone().requires_grad_() for name, value in inputs.items()}
    leaves["lin_weight"].ds_id = 0
    found, _ = loss(target=target, **leaves, **frozen)
    assert torch.equal(found, wanted[0])
    assert type(found.grad_fn).__name__.startswith("LigerFusedLinearDPOFunction")


def changed(kind):
    """Liger's class with another constructor, another call or another loss."""
    if kind == "constructor":

        class Changed(Liger.DPOLoss):
            def __init__(self, ignore_index=-100, beta=0.1, gamma=0.0):
                super().__init__(ignore_index, beta)
    elif kind == "call":

        class Changed(Liger.DPOLoss):
            def forward(self, lin_weight, _input, target, weights=None):
                return super().forward(lin_weight, _input, target)
    else:

        class Changed(Liger.DPOLoss):
            def forward(self, lin_weight, _input, target, bias=None, ref_input=None, ref_weight=None, ref_bias=None):
                loss, rest = super().forward(lin_weight, _input, target, bias, ref_input, ref_weight, ref_bias)
                return 2 * loss, rest

    return Changed


@pytest.mark.parametrize("kind", ["constructor", "call", "loss"])
def test_an_unknown_liger_is_left_as_it_is(kind, trl_like, monkeypatch):
    theirs = changed(kind)
    for place in (trl_like, *PLACES):
        monkeypatch.setattr(place, NAME, theirs)
    with pytest.warns(RuntimeWarning, match="was left as it is: .*LigerFusedLinearDPOLoss") as found:
        undo = integration.apply()
    assert len(found) == 1
    assert all(getattr(place, NAME) is theirs for place in (trl_like, *PLACES))
    undo()
    monkeypatch.undo()


# --- Liger's other losses -----------------------------------------------------------------------------------------

#: Liger's class, its options, and the loss type that docs/migration/liger.md names for it.
OTHERS = [
    ("SimPO", {"gamma": 0.7}, "simpo(gamma=0.7)"),
    ("CPO", {"label_smoothing": 0.1}, "cpo(alpha=0)"),
    ("ORPO", {}, "orpo(alpha=0)"),
]


@pytest.mark.parametrize("likelihood", [True, False])
@pytest.mark.parametrize(("name", "options", "loss_type"), OTHERS, ids=str)
def test_loss_types_for_ligers_other_losses(name, options, loss_type, likelihood):
    inputs, _, target = make(seed=11)
    kind = getattr(chunked_loss, f"LigerFusedLinear{name}Loss")
    leaves = {n: value.clone().requires_grad_() for n, value in inputs.items()}
    wanted, _ = kind(compiled=False, beta=0.4, compute_nll_loss=likelihood, **options)(target=target, **leaves)
    wanted.backward()
    ours = {n: value.clone().requires_grad_() for n, value in inputs.items()}
    found = linear_dpo_loss(
        ours["_input"],
        ours["lin_weight"],
        target,
        bias=ours["bias"],
        beta=0.4,
        loss_type=[loss_type, "sft"] if likelihood else loss_type,
        label_smoothing=options.get("label_smoothing", 0.0),
    ).loss
    found.backward()
    torch.testing.assert_close(found, wanted, rtol=2e-5, atol=2e-6)
    for n, leaf in leaves.items():
        torch.testing.assert_close(ours[n].grad, leaf.grad, rtol=1e-4, atol=2e-5 * float(leaf.grad.abs().max()))
