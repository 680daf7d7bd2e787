"""Our LigerFusedLinearDPOLoss equals Liger's on the same inputs, for every loss type, option and output.

Liger runs unmodified in float32, without torch.compile. The results may differ only by float32 rounding.
"""

import inspect

import pytest
import torch

from dpo_kernels.integrations.liger import LigerFusedLinearDPOLoss as Ours

chunked_loss = pytest.importorskip(
    "liger_kernel.chunked_loss", reason="pip install --no-deps liger-kernel==0.8.5 (the extra `peers`)"
)
Theirs = chunked_loss.LigerFusedLinearDPOLoss

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
    ours, theirs = (run(kind, {"compiled": False, "beta": 0.3, **options}, *batch) for kind in (Ours, Theirs))
    torch.testing.assert_close(ours[0].float(), theirs[0].float(), rtol=2e-5, atol=2e-6)
    assert len(ours[1]) == len(theirs[1]) == 7
    for mine, other in zip(ours[1], theirs[1], strict=True):
        torch.testing.assert_close(mine, torch.as_tensor(other).detach(), rtol=2e-5, atol=2e-5)
    for name, grad in theirs[2].items():
        assert grad.abs().max() > 0
        torch.testing.assert_close(ours[2][name], grad, rtol=1e-4, atol=2e-5 * float(grad.abs().max()))


@pytest.mark.parametrize("loss_type", sorted(Theirs._SUPPORTED_LOSS_TYPES))
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
        ours, theirs = (inspect.signature(getattr(kind, method)).parameters for kind in (Ours, Theirs))
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
