"""Every objective equals its paper's formula, written here in plain Python floats, and has the right gradient.

The tests iterate over the registry, so an objective without a formula here fails.
"""

import math
from dataclasses import replace

import pytest
import torch

from dpo_kernels import DPOLoss, dpo_loss, length_desensitized_weights, linear_dpo_loss, objective, reference
from dpo_kernels.objectives import (
    DIVERGENCES,
    OBJECTIVES,
    Pairs,
    RunningObjective,
    build,
    check,
    check_smoothing,
    couples_pairs,
    lookup,
    mix,
    parse,
    rewards,
)

# --- the formulas, for one pair or one batch at a time -------------------------------------------------------------


def log_s(x):
    return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))


def s(x):
    return math.exp(log_s(x))


def ce(x, e):
    return -(1 - e) * log_s(x) - e * log_s(-x)


def per_pair(formula):
    return lambda batch, **p: [formula(**row, **p) for row in batch]


def odds(logp):
    return math.exp(logp) / (1 - math.exp(logp))


def in_order(keys, values):
    """For each pair, values[k] if its key is the k-th smallest. Equal keys are ordered by position."""
    order = sorted(range(len(keys)), key=lambda i: keys[i])
    dealt = [0.0] * len(keys)
    for rank, i in enumerate(order):
        dealt[i] = sorted(values)[rank]
    return dealt


def aot_formula(batch):
    policy, ref = [b["S"] - b["Q"] for b in batch], [b["RS"] - b["RQ"] for b in batch]
    return [ce(b["beta"] * (m - q), b["e"]) for b, m, q in zip(batch, policy, in_order(policy, ref), strict=True)]


def aot_unpaired_formula(batch):
    c, r = [b["c"] for b in batch], [b["r"] for b in batch]
    return [ce(b["beta"] * (u - q), b["e"]) for b, u, q in zip(batch, c, in_order(c, r), strict=True)]


def running_mean_of_first_call(values, momentum=None):
    mean = sum(values) / len(values)
    return mean if momentum is None else (1 - momentum) * mean


def bco_running_formula(batch):
    d = running_mean_of_first_call([b["beta"] * b[k] for k in ("c", "r") for b in batch])
    return [-log_s(b["beta"] * b["c"] - d) - log_s(d - b["beta"] * b["r"]) for b in batch]


def beta_dpo_formula(batch, alpha, momentum):
    x = [b["beta"] * (b["c"] - b["r"]) for b in batch]
    scale = 1 + alpha * (sum(x) / len(x) - running_mean_of_first_call(x, momentum))
    return [ce(max(b["beta"] * scale, 1e-3) * (b["c"] - b["r"]), b["e"]) for b in batch]


# S, Q: log pi of chosen and rejected; c, r: their log-ratios; n, m: their lengths; kc, kr: their KL(reference || policy).
FORMULAS = {
    "sigmoid": per_pair(lambda c, r, beta, e, **_: ce(beta * (c - r), e)),
    "sigmoid_norm": per_pair(lambda c, r, n, m, beta, e, **_: ce(beta * (c / n - r / m), e)),
    "robust": per_pair(
        lambda c, r, beta, e, **_: (-(1 - e) * log_s(beta * (c - r)) + e * log_s(-beta * (c - r))) / (1 - 2 * e)
    ),
    "hinge": per_pair(lambda c, r, beta, **_: max(0.0, 1 - beta * (c - r))),
    "ipo": per_pair(lambda c, r, n, m, beta, **_: (c / n - r / m - 1 / (2 * beta)) ** 2),
    "exo_pair": per_pair(
        lambda c, r, beta, e, **_: sum(
            p * (math.log(p) - math.log(q)) for p, q in ((s(beta * (c - r)), 1 - e), (s(beta * (r - c)), e))
        )
    ),
    "nca_pair": per_pair(lambda c, r, beta, **_: -log_s(beta * c) - 0.5 * log_s(-beta * c) - 0.5 * log_s(-beta * r)),
    "bco_pair": per_pair(lambda c, r, beta, **_: -log_s(beta * c) - log_s(-beta * r)),
    "bco_running": bco_running_formula,
    "sppo_hard": per_pair(lambda c, r, beta, **_: (c - 0.5 / beta) ** 2 + (r + 0.5 / beta) ** 2),
    "aot": aot_formula,
    "aot_unpaired": aot_unpaired_formula,
    "apo_zero": per_pair(lambda c, r, beta, **_: 1 - s(beta * c) + s(beta * r)),
    "apo_down": per_pair(lambda c, r, beta, **_: s(beta * c) + 1 - s(beta * (c - r))),
    "discopop": per_pair(
        lambda c, r, beta, tau, **_: (
            -log_s(beta * (c - r)) * (1 - s(beta * (c - r) / tau)) + math.exp(-beta * (c - r)) * s(beta * (c - r) / tau)
        )
    ),
    "sft": lambda batch: [-b["S"] * len(batch) / sum(o["n"] for o in batch) for b in batch],
    "simpo": per_pair(lambda S, Q, n, m, beta, e, gamma, **_: ce(beta * (S / n - Q / m) - gamma, e)),
    "cpo": per_pair(lambda S, Q, n, beta, e, alpha, **_: ce(beta * (S - Q), e) - alpha * S / n),
    "orpo": per_pair(
        lambda S, Q, n, m, beta, alpha, **_: -alpha * S / n - beta * log_s(math.log(odds(S / n) / odds(Q / m)))
    ),
    "dpop": per_pair(lambda c, r, beta, e, penalty, **_: ce(beta * (c - r - penalty * max(0.0, -c)), e)),
    "rpo": per_pair(lambda S, c, r, n, beta, e, alpha, **_: ce(beta * (c - r), e) - alpha * S / n),
    "tdpo": per_pair(lambda c, r, kc, kr, beta, e, **_: ce(beta * (c - r) - (beta * kr - beta * kc), e)),
    "tdpo2": per_pair(lambda c, r, kc, kr, beta, e, alpha, **_: ce(beta * (c - r) - alpha * beta * (kr - kc), e)),
    "beta_dpo": beta_dpo_formula,
}

# Values that differ from every default, so that an ignored parameter shows.
OTHER = {"tau": 0.4, "gamma": 1.3, "alpha": 0.3, "penalty": 2.0, "momentum": 0.7}

BATCH = 5


def random_pairs(seed=0, size=BATCH, smoothing=0.1, dtype=torch.float64):
    """Pairs with sums of a few nats per token, different beta and smoothing, and margins of both signs."""
    g = torch.Generator().manual_seed(seed)

    def draw(low, high):
        return (torch.rand(size, generator=g, dtype=torch.float64) * (high - low) + low).to(dtype)

    lengths = [torch.randint(2, 9, (size,), generator=g).to(dtype) for _ in range(2)]
    sums = [-draw(0.5, 3) * n for n in lengths]
    refs = [total + draw(-4, 4) for total in sums]
    beta, smoothing_each = draw(0.1, 0.6), torch.full((size,), smoothing, dtype=dtype)
    return Pairs(*sums, *refs, *lengths, beta, smoothing_each, draw(0, 3), draw(0, 3))


def as_rows(pairs):
    fields = {
        "S": pairs.chosen_logps,
        "Q": pairs.rejected_logps,
        "RS": pairs.ref_chosen_logps,
        "RQ": pairs.ref_rejected_logps,
        "c": pairs.chosen_logratios,
        "r": pairs.rejected_logratios,
        "n": pairs.chosen_lengths,
        "m": pairs.rejected_lengths,
        "beta": pairs.beta,
        "e": pairs.label_smoothing,
        "kc": pairs.chosen_kl,
        "kr": pairs.rejected_kl,
    }
    return [{name: values[i].item() for name, values in fields.items()} for i in range(len(pairs.beta))]


def with_sums(pairs, chosen, rejected):
    return replace(pairs, chosen_logps=chosen, rejected_logps=rejected)


@pytest.mark.parametrize("given", ["defaults", "other parameters"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_value_is_the_papers_formula(name, given):
    info = OBJECTIVES[name]
    pairs = random_pairs()
    parameters = {p.name: p.default if given == "defaults" else OTHER[p.name] for p in info.parameters}
    losses = objective(name, **({} if given == "defaults" else parameters))(pairs)
    expected = torch.tensor(FORMULAS[name](as_rows(pairs), **parameters), dtype=torch.float64)
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradient_is_the_derivative_of_the_value(name):
    """gradcheck in float64. A running mean is frozen, because the loss treats it as a constant."""
    pairs = random_pairs(seed=1)
    made = objective(name)
    if isinstance(made, RunningObjective):
        made(pairs)
        made.eval()
    inputs = (pairs.chosen_logps.clone().requires_grad_(), pairs.rejected_logps.clone().requires_grad_())
    if name == "beta_dpo":
        # Its beta depends on the margins but is not differentiated. A numerical derivative would include it, so compare with
        # autograd here.
        ours = torch.autograd.grad(made(with_sums(pairs, *inputs)).sum(), inputs)
        x = pairs.beta * pairs.margins
        betas = pairs.beta * (1 + 0.6 * (x.mean() - made.mean))
        x, e = betas * pairs.margins, pairs.label_smoothing
        slope = betas * (-(1 - e) * torch.sigmoid(-x) + e * torch.sigmoid(x))
        torch.testing.assert_close(ours, (slope, -slope))
        return
    assert torch.autograd.gradcheck(lambda chosen, rejected: made(with_sums(pairs, chosen, rejected)), inputs)


@pytest.mark.parametrize("name", [row.name for row in OBJECTIVES.values() if row.divergence])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_divergence_scores_take_the_log_ratios_place(name, divergence):
    pairs = random_pairs(seed=2)
    score = {
        "reverse_kl": lambda u: u,
        "forward_kl": lambda u: 1 - math.exp(-u),
        "js": lambda u: math.log(2 * math.exp(u) / (math.exp(u) + 1)),
        "alpha": lambda u: (math.exp((0.3 - 1) * u) - 1) / (0.3 - 1),
    }[divergence]
    rows = [{**row, "c": score(row["c"]), "r": score(row["r"])} for row in as_rows(pairs)]
    made = objective(name, divergence=divergence, divergence_alpha=0.3)
    parameters = {p.name: p.default for p in OBJECTIVES[name].parameters}
    expected = torch.tensor(FORMULAS[name](rows, **parameters), dtype=torch.float64)
    torch.testing.assert_close(made(pairs), expected, rtol=1e-11, atol=1e-12)
    # The reported reward is still the log-ratio.
    torch.testing.assert_close(made.rewards(pairs)[0], pairs.beta * pairs.chosen_logratios)
    inputs = (pairs.chosen_logps.clone().requires_grad_(), pairs.rejected_logps.clone().requires_grad_())
    assert torch.autograd.gradcheck(lambda chosen, rejected: made(with_sums(pairs, chosen, rejected)), inputs)


def test_alpha_divergence_meets_its_neighbours():
    """alpha = 1 is the reverse KL and alpha = 0 the forward KL (the paper's table 1)."""
    pairs = random_pairs(seed=3)
    for alpha, other in ((1.0, "reverse_kl"), (1.0 + 1e-5, "reverse_kl"), (0.0, "forward_kl")):
        ours = objective("sigmoid", divergence="alpha", divergence_alpha=alpha)(pairs)
        torch.testing.assert_close(ours, objective("sigmoid", divergence=other)(pairs), rtol=1e-3, atol=1e-4)


# --- through the public function ----------------------------------------------------------------------------------


def logits_batch(seed=0, pairs=3, length=4, vocab=7):
    g = torch.Generator().manual_seed(seed)
    logits, ref = (torch.randn(2 * pairs, length, vocab, generator=g, dtype=torch.float64) * 2 for _ in range(2))
    labels = torch.randint(0, vocab, (2 * pairs, length), generator=g)
    for row in range(2 * pairs):
        labels[row, : row % 3] = -100
    return logits, ref, labels


@pytest.mark.parametrize("name", OBJECTIVES)
def test_dpo_loss_equals_the_float64_reference(name):
    logits, ref, labels = logits_batch()
    weights = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    smoothing = 0.1 if OBJECTIVES[name].smoothing_range else 0.0
    keywords = {"ref_logits": ref, "beta": 0.3, "pair_weights": weights, "label_smoothing": smoothing}
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    out = dpo_loss(ours, labels, loss_type=objective(name), **keywords)
    out.loss.backward()
    expected = reference.dpo_loss(theirs, labels, loss_type=objective(name), **keywords)
    expected.backward()
    torch.testing.assert_close(out.loss, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-12)
    assert ours.grad.abs().max() > 0


@pytest.mark.parametrize("name", OBJECTIVES)
def test_from_hidden_states_it_is_the_same(name):
    """The linear path may compute chunks of whole pairs. This must not change objectives that couple pairs."""
    _, _, labels = logits_batch()
    g = torch.Generator().manual_seed(3)
    hidden, ref_hidden = (torch.randn(*labels.shape, 5, generator=g, dtype=torch.float64) for _ in range(2))
    weight, ref_weight = (torch.randn(7, 5, generator=g, dtype=torch.float64) for _ in range(2))
    smoothing = 0.1 if OBJECTIVES[name].smoothing_range else 0.0
    grads = []
    for linear in (True, False):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        keywords = {"beta": 0.3, "label_smoothing": smoothing, "loss_type": objective(name)}
        if linear:
            out = linear_dpo_loss(h, w, labels, ref_hidden=ref_hidden, ref_weight=ref_weight, **keywords)
        else:
            out = dpo_loss(h @ w.T, labels, ref_logits=ref_hidden @ ref_weight.T, **keywords)
        out.loss.backward()
        grads.append((out.losses, out.chosen_rewards, h.grad, w.grad))
    for mine, other in zip(*grads, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-12)


MIXES = [
    (["sigmoid", "sft"], [1.0, 0.2]),
    (["apo_zero", "bco_pair", "ipo"], None),
    ([objective("exo_pair", label_smoothing=1e-3), "hinge"], [0.7, 0.3]),
    (["sigmoid(divergence=js)", "simpo(gamma=1, beta=2)"], [1.0, 0.5]),
]


# Explicit ids: the repr of a bound objective contains an address, but parallel test processes need equal ids.
@pytest.mark.parametrize(("loss_type", "weights"), MIXES, ids=["sigmoid+sft", "three", "bound+hinge", "text"])
def test_a_mix_is_the_weighted_sum_of_its_parts(loss_type, weights):
    logits, ref, labels = logits_batch(seed=5)
    total = 0.0
    for part, weight in zip(loss_type, weights or [1.0] * len(loss_type), strict=True):
        total = total + weight * reference.dpo_loss(logits, labels, ref_logits=ref, loss_type=part)
    out = dpo_loss(logits, labels, ref_logits=ref, loss_type=loss_type, loss_weights=weights)
    torch.testing.assert_close(out.loss, total, rtol=1e-12, atol=1e-12)
    pairs = random_pairs(seed=6, smoothing=0.0)
    inputs = (pairs.chosen_logps.clone().requires_grad_(), pairs.rejected_logps.clone().requires_grad_())
    assert torch.autograd.gradcheck(lambda a, b: mix(with_sums(pairs, a, b), loss_type, weights), inputs)


def test_a_users_callable_is_differentiated_through():
    logits, ref, labels = logits_batch(seed=7)

    def cubic(pairs):
        return (pairs.beta * pairs.margins) ** 3

    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    dpo_loss(ours, labels, ref_logits=ref, loss_type=cubic, beta=0.5).loss.backward()
    reference.dpo_loss(theirs, labels, ref_logits=ref, loss_type=cubic, beta=0.5).backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


# --- special cases ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ipo", "sigmoid_norm", "simpo", "orpo"])
def test_averaging_objectives_do_not_change_when_every_token_is_doubled(name):
    pairs = random_pairs(seed=8)
    twice = Pairs(*(2 * v for v in list(vars(pairs).values())[:6]), *list(vars(pairs).values())[6:])
    torch.testing.assert_close(objective(name)(twice), objective(name)(pairs))


@pytest.mark.parametrize("name", ["sigmoid", "hinge", "sppo_hard", "apo_zero", "cpo(alpha=0)"])
def test_summing_objectives_do_change(name):
    pairs = random_pairs(seed=8)
    twice = Pairs(*(2 * v for v in list(vars(pairs).values())[:6]), *list(vars(pairs).values())[6:])
    assert (parse(name)(twice) - parse(name)(pairs)).abs().max() > 1e-2


def test_ipo_is_least_at_half_over_beta_per_token():
    """The target of the *mean* log-ratio difference is 1 / (2 beta) for any lengths."""
    n, m, beta = 4.0, 9.0, 0.25
    one = torch.ones(1, dtype=torch.float64)
    chosen = (one * n * (1 / (2 * beta) - 1.5)).requires_grad_()
    pairs = Pairs(chosen, one * m * -1.5, 0 * one, 0 * one, n * one, m * one, beta * one, 0 * one)
    loss = mix(pairs, "ipo")
    loss.backward()
    assert loss.item() == pytest.approx(0.0, abs=1e-24)
    assert chosen.grad.item() == pytest.approx(0.0, abs=1e-12)


def test_weights_below_one_count_in_the_length():
    """For one token of weight 1/2, the mean log-probability is the token's, not half of it."""
    half = torch.tensor([0.5], dtype=torch.float64)
    zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    loss = objective("simpo", gamma=0.0)(Pairs(half * -3.0, half * -1.0, zero, zero, half, half, one, zero))
    assert loss.item() == pytest.approx(-log_s(-2.0))


def test_bco_shift_runs_over_calls_and_survives_a_checkpoint():
    first, second = random_pairs(seed=9), random_pairs(seed=10, size=2)
    values = [b["beta"] * b[k] for pairs in (first, second) for k in ("c", "r") for b in as_rows(pairs)]
    kept = objective("bco_running")
    kept(first)
    after_one = kept.mean.item()
    assert after_one == pytest.approx(sum(values[: 2 * BATCH]) / (2 * BATCH))
    losses = kept(second)
    shift = sum(values) / len(values)
    assert kept.mean.item() == pytest.approx(shift)
    expected = [-log_s(b["beta"] * b["c"] - shift) - log_s(shift - b["beta"] * b["r"]) for b in as_rows(second)]
    torch.testing.assert_close(losses, torch.tensor(expected, dtype=torch.float64))

    resumed = objective("bco_running")
    resumed.load_state_dict(kept.state_dict())
    torch.testing.assert_close(resumed(first), kept(first), rtol=0, atol=0)
    kept.eval()
    before = kept.mean.item()
    kept(second)
    assert kept.mean.item() == before, "evaluation must not move the running mean"


def test_a_loss_module_keeps_its_running_objectives():
    logits, ref, labels = logits_batch(seed=11)
    module = DPOLoss(loss_type=["beta_dpo", "sft"])
    module(logits, labels, ref_logits=ref)
    assert "running.0.mean" in module.state_dict()
    assert module.state_dict()["running.0.count"].item() == 3
    assert module.running[0].mean.item() != 0


def test_a_running_mean_is_over_all_processes(monkeypatch):
    """If a second process has the same batch, sum and count double, and the mean does not change."""
    alone, together = objective("bco_running"), objective("bco_running")
    alone(random_pairs(seed=12))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: tensor.mul_(2))
    together(random_pairs(seed=12))
    assert together.count.item() == 2 * alone.count.item() == 4 * BATCH
    assert together.mean.item() == pytest.approx(alone.mean.item())


def test_an_empty_batch_leaves_a_running_mean_alone():
    kept = objective("bco_running")
    kept(random_pairs(seed=12))
    mean = kept.mean.item()
    kept(random_pairs(seed=12, size=0))
    assert kept.mean.item() == mean


@pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
def test_aot_with_ties_is_deterministic_and_keeps_the_weights_with_their_pairs(name):
    """With equal margins, any pairing of equal values gives the same total, and permuting pairs permutes the losses."""
    pairs = random_pairs(seed=13, size=6)
    tied = with_sums(pairs, pairs.chosen_logps.clone(), pairs.rejected_logps.clone())
    for tensor in (tied.chosen_logps, tied.rejected_logps, tied.ref_chosen_logps, tied.ref_rejected_logps):
        tensor[3:] = tensor[:3]
    object.__setattr__(tied, "beta", torch.full((6,), 0.3, dtype=torch.float64))
    chosen = tied.chosen_logps.clone().requires_grad_()
    losses = objective(name)(with_sums(tied, chosen, tied.rejected_logps))
    (grad,) = torch.autograd.grad(losses.sum(), chosen)
    again = tied.chosen_logps.clone().requires_grad_()
    (grad_again,) = torch.autograd.grad(objective(name)(with_sums(tied, again, tied.rejected_logps)).sum(), again)
    assert torch.equal(grad, grad_again)
    # Sorting both sides and comparing them, as in the paper, gives the same total.
    policy = (chosen - tied.rejected_logps if name == "aot" else tied.chosen_logratios).detach().sort().values
    other = (
        tied.ref_chosen_logps - tied.ref_rejected_logps if name == "aot" else tied.rejected_logratios
    ).sort().values  # fmt: skip
    total = sum(ce(0.3 * d, 0.1) for d in (policy - other).tolist())
    assert losses.sum().item() == pytest.approx(total)
    order = torch.tensor([2, 0, 1, 5, 4, 3])
    shuffled = Pairs(*(v[order] for v in vars(tied).values()))
    distinct = random_pairs(seed=14, size=6)
    moved = Pairs(*(v[order] for v in vars(distinct).values()))
    torch.testing.assert_close(objective(name)(moved), objective(name)(distinct)[order])
    assert objective(name)(shuffled).sum().item() == pytest.approx(total)


def test_infinite_margins_give_zero_or_infinity_but_no_nan():
    inf, zero, one = (torch.tensor([v], dtype=torch.float64) for v in (math.inf, 0.0, 1.0))
    for name in ("sigmoid", "robust", "hinge", "dpop"):
        assert parse(name)(Pairs(inf, zero, zero, zero, one, one, one, zero)).item() == 0.0
        assert parse(name)(Pairs(zero, inf, zero, zero, one, one, one, zero)).item() == math.inf


@pytest.mark.parametrize("name", OBJECTIVES)
def test_far_margins_give_finite_gradients(name):
    """A collapsed policy gives margins of +-2,000 nats on a long answer. In float64, exp overflows beyond 709."""
    smoothing = 0.1 if OBJECTIVES[name].smoothing_range else 0.0
    for far in (2000.0, -2000.0):
        base = torch.full((2,), -3000.0, dtype=torch.float64)
        chosen, rejected = (base + far).requires_grad_(), (base - far / 2).requires_grad_()
        length, one = torch.full_like(base, 400.0), torch.ones_like(base)
        losses = objective(name)(Pairs(chosen, rejected, base, base, length, length, one, smoothing * one, one, one))
        losses.sum().backward()
        assert losses.isfinite().all()
        assert chosen.grad.isfinite().all()
        assert rejected.grad is None or rejected.grad.isfinite().all()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_empty_completion_gives_no_nan(name):
    logits, ref, labels = logits_batch(seed=15)
    labels[0] = -100
    smoothing = 0.1 if OBJECTIVES[name].smoothing_range else 0.0
    leaf = logits.clone().requires_grad_()
    out = dpo_loss(leaf, labels, ref_logits=ref, loss_type=objective(name), label_smoothing=smoothing, beta=0.3)
    out.loss.backward()
    assert out.losses.isfinite().all()
    assert leaf.grad.isfinite().all()
    assert (leaf.grad[0] == 0).all()


def test_rewards_are_those_of_the_objective():
    pairs = random_pairs(seed=16)
    torch.testing.assert_close(rewards(pairs, "ipo")[1], pairs.beta * pairs.rejected_logratios)
    torch.testing.assert_close(rewards(pairs, "cpo")[0], pairs.beta * pairs.chosen_logps)
    torch.testing.assert_close(rewards(pairs, "simpo(beta=2)")[0], 2 * pairs.chosen_logps / pairs.chosen_lengths)
    torch.testing.assert_close(rewards(pairs, lambda p: p.margins)[0], pairs.beta * pairs.chosen_logratios)


# --- length desensitisation ---------------------------------------------------------------------------------------


def test_length_desensitized_weights_spare_the_shared_length_only():
    ignored = -100
    labels = torch.tensor([[ignored, 1, 2, 3, 4], [5, 6, ignored, ignored, ignored], [7, ignored, 8, ignored, ignored],
                           [ignored, 1, 2, 3, ignored]])  # fmt: skip
    expected = torch.tensor([[0, 1, 1, 0.25, 0.25], [1, 1, 0, 0, 0], [1, 0, 1, 0, 0], [0, 1, 1, 0.25, 0]])
    torch.testing.assert_close(length_desensitized_weights(labels, 0.25), expected)
    cu_seqlens = torch.tensor([0, 5, 10, 15, 20])
    packed = length_desensitized_weights(labels.reshape(-1), 0.25, cu_seqlens=cu_seqlens)
    torch.testing.assert_close(packed, expected.reshape(-1))
    with pytest.raises(ValueError, match=r"ld_alpha must lie in \[0, 1\]"):
        length_desensitized_weights(labels, 1.5)


# --- names, arguments and their errors ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_text_form_names_the_same_objective(name):
    info = OBJECTIVES[name]
    made = objective(name, beta=0.25, **{p.name: OTHER[p.name] for p in info.parameters})
    assert str(parse(str(made))) == str(made)
    if not isinstance(made, RunningObjective):
        assert parse(str(made)) == made
    assert info.formula
    assert info.source
    assert info.use


def test_couples_pairs_knows_the_batch_wide_objectives():
    coupled = {name for name in OBJECTIVES if couples_pairs(build(name))}
    changed = set()
    for name in OBJECTIVES:
        pairs = random_pairs(seed=17)
        alone = Pairs(*(v[:1] for v in vars(pairs).values()))
        if not torch.equal(objective(name)(pairs)[:1], objective(name)(alone)):
            changed.add(name)
    assert changed == coupled
    assert couples_pairs([lambda pairs: pairs.margins])


@pytest.mark.parametrize("name", OBJECTIVES)
def test_only_reference_free_objectives_run_without_a_reference(name):
    logits, _, labels = logits_batch()
    smoothing = 0.1 if OBJECTIVES[name].smoothing_range else 0.0
    call = {"loss_type": objective(name), "label_smoothing": smoothing}
    if OBJECTIVES[name].needs_reference:
        with pytest.raises(ValueError, match=f"'{name}' compares .*ref_logps.*sft, simpo, cpo, orpo"):
            dpo_loss(logits, labels, **call)
        if OBJECTIVES[name].needs_token_kl:
            with pytest.raises(ValueError, match=r"loss_type tdpo.* needs ref_logits"):
                dpo_loss(logits, labels, ref_logps=torch.zeros(6), **call)
        else:
            dpo_loss(logits, labels, ref_logps=torch.zeros(6), **call)
    else:
        free = dpo_loss(logits, labels, **call).loss
        torch.testing.assert_close(free, dpo_loss(logits, labels, ref_logits=logits - logits, **call).loss)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_label_smoothing_out_of_range_names_the_range(name):
    legal = OBJECTIVES[name].smoothing_range
    if legal is None:
        with pytest.raises(ValueError, match=f"'{name}' has no label smoothing.*sigmoid"):
            check_smoothing(name, 0.1)
        check_smoothing(name, 0.0)
        return
    bad = [-0.1, 1.1, math.nan, torch.tensor([0.1, 1.2])]
    bad += [] if legal.closed_low else [legal.low]
    bad += [] if legal.closed_high else [legal.high]
    for value in bad:
        with pytest.raises(ValueError, match="must lie in") as error:
            check_smoothing(name, value)
        assert str(legal) in str(error.value)
    check_smoothing(name, 0.3)


def test_ranges_read_as_in_mathematics():
    shown = {name: str(OBJECTIVES[name].smoothing_range) for name in ("sigmoid", "robust", "exo_pair")}
    assert shown == {"sigmoid": "[0, 1]", "robust": "[0, 0.5)", "exo_pair": "(0, 1)"}


def test_smoothing_in_a_mix_reaches_those_that_have_it():
    logits, ref, labels = logits_batch()
    check(build(["exo_pair", "hinge"]), None, 0.1)
    out = dpo_loss(logits, labels, ref_logits=ref, loss_type=["exo_pair", "hinge"], label_smoothing=0.1)
    parts = [
        dpo_loss(logits, labels, ref_logits=ref, loss_type="exo_pair", label_smoothing=0.1).loss,
        dpo_loss(logits, labels, ref_logits=ref, loss_type="hinge").loss,
    ]
    torch.testing.assert_close(out.loss, sum(parts))
    with pytest.raises(ValueError, match="no label smoothing"):
        check(build(["ipo", "hinge"]), None, 0.1)
    with pytest.raises(ValueError, match=r"\(0, 1\)"):
        check(build(["exo_pair", "hinge"]), None, 0.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: lookup("sigmod"), "did you mean 'sigmoid'.* known: aot, aot_unpaired"),
        (lambda: objective("simpo", gama=1.0), "no parameter 'gama'; it has: gamma, beta, label_smoothing"),
        (lambda: objective("simpo", gamma=-1.0), r"gamma of 'simpo' must lie in \[0, inf\); got -1"),
        (lambda: objective("discopop", tau=0.0), r"\(0, inf\)"),
        (lambda: objective("sigmoid", beta=0.0), "beta of 'sigmoid'"),
        (lambda: objective("robust", label_smoothing=0.5), r"\[0, 0.5\)"),
        (lambda: objective("sigmoid", divergence="jss"), "unknown divergence 'jss'; did you mean 'js'"),
        (lambda: objective("apo_zero", divergence="js"), "Objectives that can: sigmoid, sigmoid_norm, robust"),
        (lambda: parse("simpo(1.0)"), r"name\(key=value"),
        (lambda: build([]), "empty"),
        (lambda: check(build(["sft", "ipo"]), [1.0], 0.0), "1 entries for 2 objectives"),
        (lambda: mix(random_pairs(), "bco_running"), r"objective\('bco_running'\)"),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_wrong_types_are_named():
    with pytest.raises(TypeError, match="names or callables"):
        build([3])
    with pytest.raises(TypeError, match="must be a number"):
        objective("simpo", gamma="much")


def test_weights_of_the_wrong_length_are_refused():
    logits, ref, labels = logits_batch()
    for keyword in ("pair_weights", "beta", "label_smoothing"):
        with pytest.raises(ValueError, match=rf"{keyword} must have shape \[3\]"):
            dpo_loss(logits, labels, ref_logits=ref, **{keyword: torch.full((4,), 0.1)})


def test_named_objectives_compile_without_graph_breaks():
    logits, ref, labels = logits_batch()
    for loss_type in ("ipo", [objective("sigmoid", divergence="js", beta=0.3), "aot", "simpo"]):

        def loss(x, loss_type=loss_type):
            return dpo_loss(x, labels, ref_logits=ref, loss_type=loss_type).loss

        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(logits), loss(logits))
