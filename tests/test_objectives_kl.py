"""Terms that read the whole distribution (kl_coef, TDPO, WPO weights) equal the float64 reference and its autograd gradient."""

import pytest
import torch

from dpo_kernels import DPOLoss, dpo_loss, reference

from checks import check_gradient

P, T, V = 2, 4, 23


def make(dtype=torch.float64, seed=0, spread=2.0):
    g = torch.Generator().manual_seed(seed)
    logits, ref = (torch.randn(2 * P, T, V, generator=g, dtype=torch.float64) * spread for _ in range(2))
    labels = torch.randint(0, V, (2 * P, T), generator=g)
    labels[1, :2] = labels[3, 3] = -100
    return logits.to(dtype), ref.to(dtype), labels


TERMS = [
    {"kl_coef": 0.3},
    {"kl_coef": 0.3, "loss_type": ["ipo", "sft"], "reduction": "sum"},
    {"loss_type": "tdpo"},
    {"loss_type": "tdpo2(alpha=0.7)", "kl_coef": 0.2},
    {"loss_type": "tdpo", "logit_scale": 0.7, "logit_softcap": 5.0, "kl_coef": 0.1},
    {"use_weighting": True, "logit_scale": 0.7, "logit_softcap": 5.0, "loss_type": ["sigmoid", "ipo"]},
]


@pytest.mark.parametrize("options", TERMS, ids=str)
def test_loss_and_gradient_equal_the_float64_reference(options):
    logits, ref, labels = make()
    weights = torch.rand(2 * P, T, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.5
    pair_weights = torch.tensor([0.5, 2.0], dtype=torch.float64)
    keywords = {"ref_logits": ref, "beta": 0.4, "token_weights": weights, "pair_weights": pair_weights, **options}
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    out = dpo_loss(ours, labels, **keywords)
    out.loss.backward()
    expected = reference.dpo_loss(theirs, labels, **keywords)
    expected.backward()
    torch.testing.assert_close(out.loss, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-13)
    assert (ours.grad[labels == -100] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", TERMS[::2], ids=str)
def test_gradient_is_no_further_from_the_truth_than_eagers(options, dtype):
    logits, ref, labels = make(dtype, seed=2, spread=4.0)
    grads = []
    for run, kind in ((dpo_loss, dtype), (reference.dpo_loss, torch.float64), (reference.dpo_loss, torch.float32)):
        leaf = logits.detach().clone().to(kind).requires_grad_()
        loss = run(leaf, labels, ref_logits=ref.to(kind), beta=0.4, **options)
        (loss if isinstance(loss, torch.Tensor) else loss.loss).backward()
        grads.append(leaf.grad)
    check_gradient(grads[0], grads[1], grads[2].to(dtype), labels)


def test_the_term_is_the_reported_statistic():
    logits, ref, labels = make()
    with_term = dpo_loss(logits, labels, ref_logits=ref, kl_coef=0.5, statistics=("kl", "entropy"))
    without = dpo_loss(logits, labels, ref_logits=ref, statistics=("kl", "entropy"))
    assert (with_term.loss - without.loss).item() == pytest.approx(0.5 * without.metrics()["kl"])
    torch.testing.assert_close(with_term.kl, without.kl)
    torch.testing.assert_close(with_term.entropy, without.entropy)
    assert not with_term.kl.requires_grad


def test_policy_equal_to_reference_feels_no_kl():
    """KL is 0 and so is its gradient: the minimum, up to the rounding of float64."""
    logits, _, labels = make()
    leaf = logits.clone().requires_grad_()
    dpo_loss(leaf, labels, ref_logits=logits, kl_coef=1.0, loss_type=lambda p: 0 * p.margins).loss.backward()
    assert leaf.grad.abs().max() < 1e-15


def test_an_impossible_token_keeps_the_gradient_finite():
    """-inf under both models, and under the policy only: no mass, no KL, no gradient there."""
    logits, ref, labels = make()
    labels = torch.where(labels > 2, labels, torch.where(labels == -100, labels, 5))
    logits[..., 0] = ref[..., 0] = float("-inf")
    logits[..., 1] = float("-inf")
    leaf = logits.clone().requires_grad_()
    out = dpo_loss(leaf, labels, ref_logits=ref, kl_coef=1.0)
    out.loss.backward()
    assert out.loss.isfinite()
    assert leaf.grad.isfinite().all()
    assert (leaf.grad[..., :2] == 0).all()


def test_packed_layout_and_module_agree_with_the_padded_function():
    logits, ref, labels = make()
    module = DPOLoss(beta=0.4, loss_type="tdpo2", kl_coef=0.2)
    padded = module(logits, labels, ref_logits=ref)
    cu_seqlens = torch.arange(2 * P + 1) * T
    packed = module(logits.view(-1, V), labels.view(-1), ref_logits=ref.view(-1, V), cu_seqlens=cu_seqlens)
    torch.testing.assert_close(packed.loss, padded.loss)
    same = dpo_loss(logits, labels, ref_logits=ref, beta=0.4, loss_type="tdpo2", kl_coef=0.2)
    torch.testing.assert_close(padded.loss, same.loss)


def test_operators_are_sound():
    logits, ref, labels = make()
    arguments = (logits.clone().requires_grad_(), labels, ref, -100, 1.0, 0.0, True, False, True, True, "eager")
    torch.library.opcheck(torch.ops.dpo_kernels.token_kl.default, arguments)


def test_compiles_without_graph_breaks():
    logits, ref, labels = make()

    def loss(x):
        return dpo_loss(x, labels, ref_logits=ref, kl_coef=0.2, loss_type="tdpo").loss

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(logits), loss(logits))


def test_sums_do_not_determine_a_kl():
    logits, _, labels = make()
    with pytest.raises(ValueError, match="kl_coef needs ref_logits"):
        dpo_loss(logits, labels, ref_logps=torch.zeros(2 * P), kl_coef=0.1)
    with pytest.raises(ValueError, match="kl_coef must not be negative"):
        dpo_loss(logits, labels, ref_logps=torch.zeros(2 * P), kl_coef=-0.1)
