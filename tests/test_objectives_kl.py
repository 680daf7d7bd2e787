"""Terms that use the whole distribution (kl_coef, TDPO, WPO weights) equal the float64 reference and its autograd gradient."""

import pytest
import torch

from dpo_kernels import DPOLoss, backends, dpo_loss, reference, use_backend
from dpo_kernels.backends import eager
from dpo_kernels.reference import transform_logits
from dpo_kernels.stages import TokenKL, Transform

from checks import check_gradient, row_errors

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
    """KL and its gradient are 0 at this minimum, up to float64 rounding."""
    logits, _, labels = make()
    leaf = logits.clone().requires_grad_()
    dpo_loss(leaf, labels, ref_logits=logits, kl_coef=1.0, loss_type=lambda p: 0 * p.margins).loss.backward()
    assert leaf.grad.abs().max() < 1e-15


def test_an_impossible_token_keeps_the_gradient_finite():
    """With -inf in both models, or only in the policy, the token has no probability, no KL and no gradient."""
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
    arguments = (
        logits.clone().requires_grad_(),
        labels,
        ref,
        -100,
        1.0,
        0.0,
        ["entropy", "mean_logits", "log_sum_sq"],
        ["kl", "forward_kl"],
        False,
        "eager",
    )
    torch.library.opcheck(torch.ops.dpo_kernels.token_logps.default, arguments)


def test_compiles_without_graph_breaks():
    logits, ref, labels = make()

    def loss(x):
        return dpo_loss(x, labels, ref_logits=ref, kl_coef=0.2, loss_type="tdpo").loss

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(logits), loss(logits))


@pytest.mark.parametrize("options", [{}, {"loss_type": "ipo"}, {"kl_coef": 0.1}], ids=str)
@pytest.mark.parametrize("kernels", ["eager", "cpu"])
def test_wpo_weights_cost_no_further_read_of_the_logits(kernels, options, monkeypatch):
    stages = backends.load(kernels, "cpu")
    token_logps, reads = stages.token_logps, []

    def counted(logits, labels, ref_logits, transform, statistics):
        reads.append("log_sum_sq" in statistics)
        return token_logps(logits, labels, ref_logits, transform, statistics)

    monkeypatch.setattr(stages, "token_logps", counted)
    monkeypatch.delattr(stages, "preference_forward", raising=False)
    logits, ref, labels = make(torch.float32)
    with use_backend(kernels):
        weighted = dpo_loss(logits, labels, ref_logits=ref, use_weighting=True, **options)
        plain = dpo_loss(logits, labels, ref_logits=ref, **options)
    assert reads == [True, False]
    assert bool((weighted.losses != plain.losses).all())


def test_sums_do_not_determine_a_kl():
    logits, _, labels = make()
    with pytest.raises(ValueError, match="kl_coef needs ref_logits"):
        dpo_loss(logits, labels, ref_logps=torch.zeros(2 * P), kl_coef=0.1)
    with pytest.raises(ValueError, match="kl_coef must not be negative"):
        dpo_loss(logits, labels, ref_logps=torch.zeros(2 * P), kl_coef=-0.1)


# --- the stage, on every backend ----------------------------------------------------------------------------------

#: gradients of (logps, reverse KL, forward KL); None leaves the divergence out.
UPSTREAM = {
    "both": (0.7, -0.4, 0.3),
    "reverse": (0.7, 0.5, None),
    "forward": (-0.2, None, 0.6),
    "kl alone": (0.0, 0.5, None),
}


def divergences(logits, ref, labels, upstream, scale=1.0, cap=0.0):
    """The stage's gradient by autograd, in the dtype of the logits."""
    leaf = logits.detach().clone().requires_grad_()
    log_p, log_q = (transform_logits(x, scale, cap).log_softmax(-1) for x in (leaf, ref))
    p, q = log_p.exp(), log_q.exp()
    index = labels.clamp(min=0).unsqueeze(-1)
    terms = (
        log_p.gather(-1, index).squeeze(-1),
        torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1),
        torch.where(q > 0, q * (log_q - log_p), 0.0).sum(-1),
    )
    total = sum(g * term for g, term in zip(upstream, terms, strict=True) if g)
    (gradient,) = torch.autograd.grad(torch.where(labels == -100, 0.0, total).sum(), leaf)
    return gradient


def staged(backend, logits, ref, labels, upstream, scale=1.0, cap=0.0, out=None):
    """The gradient from a backend's stages 1 and 3."""
    stages = backends.load(backend, logits.device.type)
    transform = Transform(scale=scale, softcap=cap)
    *small, ref_logps, ref_max, ref_log_sum, kl = stages.token_logps(logits, labels, ref, transform, ("kl",))
    by = [None if g is None else torch.full_like(kl, g) for g in upstream]
    out = torch.empty_like(logits) if out is None else out
    token_kl = TokenKL(ref, ref_logps, ref_max, ref_log_sum, kl, by[1], by[2])
    stages.logits_grad(logits, labels, *small, by[0], transform, out, token_kl)
    return out


def stage_inputs(dtype, vocab, device, spread=3.0):
    g = torch.Generator().manual_seed(vocab)
    logits = torch.randn(1, 4, vocab, generator=g, dtype=torch.float64) * spread
    ref = logits + torch.randn(1, 4, vocab, generator=g, dtype=torch.float64)
    labels = torch.tensor([[0, vocab // 2, -100, vocab - 1]])
    return logits.to(dtype).to(device), ref.to(dtype).to(device), labels.to(device)


# 7: below a vector. 2101: odd, past a block of the CPU kernels and a tile of the Triton kernels, with a remainder.
@pytest.mark.parametrize("vocab", [7, 2101])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", UPSTREAM)
def test_the_stage_equals_the_float64_truth(name, dtype, vocab, backend, device):
    # float16 has no positive number below 6e-8, and an unlikely label's entry would be smaller.
    logits, ref, labels = stage_inputs(dtype, vocab, device, spread=1.0 if dtype == torch.float16 else 3.0)
    upstream = UPSTREAM[name]
    truth = divergences(logits.double(), ref.double(), labels, upstream)
    eager = divergences(logits.float(), ref.float(), labels, upstream).to(dtype)
    check_gradient(staged(backend, logits, ref, labels, upstream), truth, eager, labels)


@pytest.mark.parametrize(("scale", "cap"), [(0.6, 0.0), (-0.5, 0.0), (1.0, 6.0), (0.7, 9.0)])
def test_the_stage_scales_and_caps(scale, cap, backend, device):
    logits, ref, labels = stage_inputs(torch.float32, 1037, device)
    truth, eager = (
        divergences(logits.to(d), ref.to(d), labels, UPSTREAM["both"], scale, cap)
        for d in (torch.float64, torch.float32)
    )
    check_gradient(staged(backend, logits, ref, labels, UPSTREAM["both"], scale, cap), truth, eager, labels)


@pytest.mark.parametrize("gap", [10.0, 25.0])
def test_a_nearly_certain_label_keeps_its_relative_precision(gap, backend, device):
    """There p (d - D) is a product of small numbers. Subtracting d and D directly would lose it by cancellation."""
    logits, ref, labels = stage_inputs(torch.float32, 1030, device, spread=1.0)
    for t, label in enumerate(labels[0].tolist()):
        if label >= 0:
            logits[0, t, label] += gap
            ref[0, t, label] += gap - 2
    upstream = (0.0, 1.0, None)
    truth = divergences(logits.double(), ref.double(), labels, upstream)
    errors = row_errors(staged(backend, logits, ref, labels, upstream), truth, labels)
    assert float(errors.label.max()) < 1e-5
    assert float(errors.others.max()) < 1e-5


def test_the_stage_in_place_is_bitwise_the_same_and_skips_dead_rows(backend, device):
    logits, ref, labels = stage_inputs(torch.bfloat16, 1031, device)
    apart = staged(backend, logits, ref, labels, UPSTREAM["both"])
    logits[0, 2] = float("nan")  # ignored: never read
    staged(backend, logits, ref, labels, UPSTREAM["both"], out=logits)
    assert torch.equal(logits, apart)
    assert bool((logits[0, 2] == 0).all())


def test_the_stage_gives_impossible_tokens_nothing(backend, device):
    """-inf in both models, and in the policy only."""
    logits, ref, labels = stage_inputs(torch.float32, 1030, device)
    logits[..., 3:9] = float("-inf")
    ref[..., 3:6] = float("-inf")
    # Without these columns, both softmaxes and the reverse KL are the same.
    alive = [v for v in range(1030) if not 3 <= v < 9]
    renamed = torch.where(labels > 8, labels - 6, labels)
    ref[..., 6:9] = float("-inf")
    truth = divergences(logits[..., alive].double(), ref[..., alive].double(), renamed, (0.3, 0.5, None))
    ref[..., 6:8] = -50.0  # possible under the reference, but too unlikely to change its softmax
    gradient = staged(backend, logits, ref, labels, (0.3, 0.5, None))
    assert bool((gradient[..., 3:9] == 0).all())
    torch.testing.assert_close(gradient[..., alive].double(), truth, rtol=1e-4, atol=1e-7)


def test_inplace_backward_overwrites_the_logits_and_says_so_the_second_time():
    logits, ref, labels = make(torch.float32)
    plain, taken = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    dpo_loss(plain, labels, ref_logits=ref, loss_type="tdpo").loss.backward()
    loss = dpo_loss(taken * 1.0, labels, ref_logits=ref, loss_type="tdpo", inplace_backward=True).loss
    loss.backward(retain_graph=True)
    assert torch.equal(plain.grad, taken.grad)
    with pytest.raises(RuntimeError, match="overwritten"):
        loss.backward()


@pytest.mark.parametrize("grad_kl", [None, 0.3])
def test_a_label_outside_the_vocabulary_is_a_row_of_nan_and_never_an_index(grad_kl):
    """On a GPU nobody checks labels before eager's gradient, and an index out of bounds would break the CUDA context."""
    logits, ref, labels = make(torch.float32)
    tokens = eager.token_logps(logits, labels, ref, Transform(), ("kl",))
    bad = torch.zeros_like(labels, dtype=torch.bool)
    bad[0, 0] = bad[2, 1] = True
    labels[0, 0], labels[2, 1] = V + 40, -7
    tokens[:, bad] = float("nan")  # as stage 1 returns them on a GPU
    *small, ref_logps, ref_max, ref_log_sum, kl = tokens
    ones = torch.ones_like(kl)
    terms = None if grad_kl is None else TokenKL(ref, ref_logps, ref_max, ref_log_sum, kl, grad_kl * ones, None)
    out = torch.empty_like(logits)
    eager.logits_grad(logits, labels, *small, ones, Transform(), out, terms)
    assert bool(out[bad].isnan().all())
    assert bool(out[~bad].isfinite().all())


def test_a_reference_that_shares_the_policys_memory_is_not_overwritten(backend):
    """Views of one buffer, shifted by a token: an in-place gradient of one row would overwrite another row's reference."""
    labels = make()[2]
    buffer = torch.randn(2 * P, T + 1, V, generator=torch.Generator().manual_seed(5))
    gradients = []
    for inplace in (False, True):
        kept = buffer.clone()
        policy, ref = kept[:, :-1].detach().requires_grad_(), kept[:, 1:].detach()
        with use_backend(backend):
            dpo_loss(policy, labels, ref_logits=ref, kl_coef=0.3, inplace_backward=inplace).loss.backward()
        gradients.append(policy.grad)
        assert torch.equal(kept, buffer)
    assert torch.equal(*gradients)


def test_a_float64_reference_of_a_float32_policy_is_served():
    logits, ref, labels = make(torch.float32)
    with use_backend("cpu"):
        leaf = logits.clone().requires_grad_()
        dpo_loss(leaf, labels, ref_logits=ref.double(), kl_coef=0.5).loss.backward()
        other = logits.clone().requires_grad_()
        dpo_loss(other, labels, ref_logits=ref, kl_coef=0.5).loss.backward()
    torch.testing.assert_close(leaf.grad, other.grad, rtol=1e-5, atol=1e-7)
