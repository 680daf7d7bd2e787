"""Every objective of TRL equals TRL's own code: loss, gradient, rewards and metrics.

TRL computes the loss in its trainer's `_compute_loss`. Here that method runs on a stand-in for the trainer, which has only
the attributes that it reads, and on a model that returns given per-token log-probabilities. So the comparison is with TRL's
unmodified formulas, in float64, where rounding hides no difference.
"""

import contextlib
import importlib.util
import types
import warnings
from collections import defaultdict

import pytest
import torch

from dpo_kernels import dpo_loss, length_desensitized_weights, objective, shift_labels
from dpo_kernels.objectives import Pairs, mix, rewards

pytest.importorskip("trl", reason="pip install --no-deps trl==1.16.0 (the extra `peers`)")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # trl.experimental warns on import
    from trl import DPOTrainer
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer
    from trl.trainer.utils import FusedCausalLMOutput

BETA = 0.3
PAIRS, LENGTH, VOCAB = 4, 9, 31

#: Label smoothing for TRL's objectives. TRL's sigmoid and sigmoid_norm have none; exo_pair requires it.
SMOOTHING = {"exo_pair": 0.125, "robust": 0.2, "aot": 0.2, "aot_unpaired": 0.2}
NAMES = [
    "sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot",
    "aot_unpaired", "apo_zero", "apo_down", "discopop", "sft",
]  # fmt: skip
DIVERGENCE_NAMES = {
    "reverse_kl": "reverse_kl",
    "forward_kl": "forward_kl",
    "js": "js_divergence",
    "alpha": "alpha_divergence",
}


class Gather:
    """The accelerator of a single process."""

    device = torch.device("cpu")

    def gather(self, values):
        return values

    gather_for_metrics = gather

    def autocast(self):
        return contextlib.nullcontext()


def trl_call(inputs, policy, reference_logps, loss_type, *, smoothing=0.0, weights=None, **options):
    """(loss, metrics) of TRL's own `_compute_loss` on given per-token outputs."""
    model = torch.nn.Identity()  # has .training and does not look like a peft model
    model.is_gradient_checkpointing = False
    names = [loss_type] if isinstance(loss_type, str) else loss_type
    trainer = types.SimpleNamespace(
        model=model,
        ref_model=lambda **_: FusedCausalLMOutput(log_probs=reference_logps),
        accelerator=Gather(),
        args=types.SimpleNamespace(gradient_checkpointing_kwargs=None, discopop_tau=options.get("discopop_tau", 0.05)),
        precompute_ref_logps=False,
        aux_loss_enabled=False,
        ld_alpha=options.get("ld_alpha"),
        loss_types=names,
        loss_weights=weights or [1.0] * len(names),
        beta=options.get("beta", BETA),
        label_smoothing=smoothing,
        f_divergence_type=options.get("divergence", "reverse_kl"),
        f_alpha_divergence_coef=options.get("alpha", 0.5),
        use_weighting=options.get("use_weighting", False),
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
    )
    loss = DPOTrainer._compute_loss(trainer, lambda **_: FusedCausalLMOutput(**policy), inputs, return_outputs=False)
    return loss, {name: values[0] for name, values in trainer._metrics["train"].items()}


def make_batch(seed=0):
    """(TRL's inputs, per-token shapes), with prompts of two lengths, completions of 2 to 6 tokens and right padding."""
    g = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(0, VOCAB, (2 * PAIRS, LENGTH), generator=g)
    prompt = torch.randint(1, 4, (PAIRS,), generator=g).repeat(2)[:, None]
    length = prompt + torch.randint(2, 7, (2 * PAIRS, 1), generator=g)
    position = torch.arange(LENGTH)
    inputs = {
        "input_ids": input_ids,
        "attention_mask": (position < length).long(),
        "completion_mask": ((position >= prompt) & (position < length)).long(),
    }
    return inputs, g


def make_logps(inputs, g, dtype=torch.float64):
    """Policy and reference log-probabilities per token, 0 where unscored.

    The reference's are about -2 nats; the policy's differ from them by about 1 nat.
    """
    mask = inputs["completion_mask"][:, 1:]
    ref = -torch.rand(mask.shape, generator=g, dtype=torch.float64) * 4 - 0.05
    policy = (ref + torch.randn(mask.shape, generator=g, dtype=torch.float64)).clamp(max=-0.01)
    nothing = torch.zeros(mask.shape, dtype=torch.float64)
    extras = {"entropy": nothing, "mean_logits": nothing, "is_top1": nothing.bool()}
    return (policy * mask).to(dtype).requires_grad_(), (ref * mask).to(dtype), mask, extras


def our_pairs(logps, ref_logps, weights, smoothing):
    size = logps.shape[0] // 2
    sums, refs = (logps * weights).sum(-1), (ref_logps * weights).sum(-1)
    scalar = torch.tensor([BETA, smoothing], dtype=logps.dtype)
    return Pairs.from_sums(
        sums, refs, weights.sum(-1).to(logps.dtype), scalar[0].expand(size), scalar[1].expand(size)
    )  # fmt: skip


def assert_same(ours, our_leaf, theirs, their_leaf, rtol):
    (our_grad,) = torch.autograd.grad(ours, our_leaf, retain_graph=True)
    (their_grad,) = torch.autograd.grad(theirs, their_leaf, retain_graph=True)
    # TRL also sums over the zeros of unscored tokens. In TRL, the head stops the gradient there.
    their_grad = their_grad * (their_leaf != 0)
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=0)
    assert their_grad.abs().max() > 0
    torch.testing.assert_close(our_grad, their_grad, rtol=rtol, atol=rtol * float(their_grad.abs().max()))


@pytest.mark.parametrize("name", NAMES)
def test_loss_and_gradient_are_trls(name):
    inputs, g = make_batch()
    logps, ref, mask, extras = make_logps(inputs, g)
    smoothing = SMOOTHING.get(name, 0.0)
    theirs, metrics = trl_call(inputs, {"log_probs": logps, **extras}, ref, name, smoothing=smoothing)
    pairs = our_pairs(logps, ref, mask, smoothing)
    # TRL holds exo_pair's epsilon in float32.
    assert_same(mix(pairs, name).mean(), logps, theirs, logps, rtol=1e-6 if name == "exo_pair" else 1e-12)
    for side, values in zip(("chosen", "rejected"), rewards(pairs, name), strict=True):
        assert values.mean().item() == pytest.approx(metrics[f"rewards/{side}"], rel=1e-6)


@pytest.mark.parametrize("divergence", DIVERGENCE_NAMES)
@pytest.mark.parametrize("name", ["sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop"])
def test_divergences_are_trls(name, divergence):
    """In float32, because TRL's alpha divergence supports no wider dtype."""
    inputs, g = make_batch(1)
    logps, ref, mask, extras = make_logps(inputs, g, torch.float32)
    smoothing = SMOOTHING.get(name, 0.0)
    theirs, _ = trl_call(
        inputs, {"log_probs": logps, **extras}, ref, name, smoothing=smoothing, divergence=DIVERGENCE_NAMES[divergence]
    )
    made = objective(name, divergence=divergence, divergence_alpha=0.5)
    assert_same(made(our_pairs(logps, ref, mask, smoothing)).mean(), logps, theirs, logps, rtol=2e-5)


@pytest.mark.parametrize(
    ("names", "weights"),
    [
        (["sigmoid", "sft"], [1.0, 0.3]),
        (["apo_zero", "ipo", "aot"], [0.5, 2.0, 1.0]),
        (["bco_pair", "sppo_hard"], None),
    ],
    ids=str,
)
def test_mixes_are_trls(names, weights):
    inputs, g = make_batch(2)
    logps, ref, mask, extras = make_logps(inputs, g)
    theirs, _ = trl_call(inputs, {"log_probs": logps, **extras}, ref, names, weights=weights)
    assert_same(mix(our_pairs(logps, ref, mask, 0.0), names, weights).mean(), logps, theirs, logps, rtol=1e-12)


@pytest.mark.parametrize("ld_alpha", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("name", ["sigmoid", "hinge", "apo_down", "nca_pair"])
def test_length_desensitisation_is_trls(name, ld_alpha):
    inputs, g = make_batch(3)
    logps, ref, mask, extras = make_logps(inputs, g)
    theirs, _ = trl_call(inputs, {"log_probs": logps, **extras}, ref, name, ld_alpha=ld_alpha)
    labels = torch.where(mask.bool(), inputs["input_ids"][:, 1:], -100)
    weights = length_desensitized_weights(labels, ld_alpha).double()
    assert_same(mix(our_pairs(logps, ref, weights, 0.0), name).mean(), logps, theirs, logps, rtol=1e-6)


@pytest.mark.parametrize("tau", [0.05, 0.5])
def test_discopops_temperature_is_trls(tau):
    inputs, g = make_batch(4)
    logps, ref, mask, extras = make_logps(inputs, g)
    theirs, _ = trl_call(inputs, {"log_probs": logps, **extras}, ref, "discopop", discopop_tau=tau)
    ours = objective("discopop", tau=tau)(our_pairs(logps, ref, mask, 0.0)).mean()
    assert_same(ours, logps, theirs, logps, rtol=1e-12)


def test_aot_with_equal_margins_is_trls():
    """Ties may be paired differently, so compare the loss and the sum of the tied gradients, not each gradient."""
    inputs, g = make_batch(5)
    for key, value in inputs.items():
        inputs[key] = value[[0, 0, 1, 1, 4, 4, 5, 5]]
    logps, ref, mask, extras = make_logps(inputs, g)
    tied = logps.detach()[[0, 0, 2, 2, 4, 4, 6, 6]].requires_grad_()
    theirs, _ = trl_call(inputs, {"log_probs": tied, **extras}, ref, "aot", smoothing=0.1)
    ours = mix(our_pairs(tied, ref, mask, 0.1), "aot").mean()
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    (our_grad,), (their_grad,) = torch.autograd.grad(ours, tied), torch.autograd.grad(theirs, tied)
    their_grad = their_grad * mask
    torch.testing.assert_close(our_grad[0::2] + our_grad[1::2], their_grad[0::2] + their_grad[1::2])


# --- the reference-free objectives, from TRL's CPO and ORPO trainers -----------------------------------------------


def sequence_logps(seed, mean):
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 9, (2 * PAIRS,), generator=g).double()
    per_token = (-torch.rand(2 * PAIRS, generator=g, dtype=torch.float64) * 3 - 0.1).requires_grad_()
    sums = per_token * lengths
    value = torch.full((PAIRS,), 2.0, dtype=torch.float64)
    smoothing = torch.full((PAIRS,), 0.2, dtype=torch.float64)
    nothing = torch.zeros_like(sums)
    return per_token, (per_token if mean else sums).chunk(2), Pairs.from_sums(sums, nothing, lengths, value, smoothing)


@pytest.mark.parametrize(
    ("ours", "theirs"), [("simpo(gamma=0.7)", "simpo"), ("cpo(alpha=0)", "sigmoid"), ("hinge", "hinge")]
)
def test_reference_free_objectives_are_trls(ours, theirs):
    leaf, (chosen, rejected), pairs = sequence_logps(6, mean=theirs == "simpo")
    trainer = types.SimpleNamespace(
        loss_type=theirs, beta=2.0, simpo_gamma=0.7, alpha=0.0, label_smoothing=0.2, accelerator=Gather()
    )
    losses, chosen_rewards, rejected_rewards = CPOTrainer.cpo_loss(trainer, chosen, rejected)
    assert_same(mix(pairs, ours).mean(), leaf, losses.mean(), leaf, rtol=1e-12)
    torch.testing.assert_close(mix(pairs, ours), losses)
    if ours != "hinge":
        torch.testing.assert_close(rewards(pairs, ours), (chosen_rewards, rejected_rewards))


def test_orpos_odds_ratio_is_trls():
    """TRL works in float32 and adds the likelihood term outside."""
    leaf, (chosen, rejected), pairs = sequence_logps(7, mean=True)
    trainer = types.SimpleNamespace(beta=2.0, accelerator=Gather())
    ratio_term, chosen_rewards, rejected_rewards, *_ = ORPOTrainer.odds_ratio_loss(trainer, chosen, rejected)
    ours = objective("orpo", alpha=0.0)
    torch.testing.assert_close(ours(pairs), -ratio_term.double(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        ours.rewards(pairs), (chosen_rewards.double(), rejected_rewards.double()), rtol=1e-6, atol=0
    )
    (our_grad,) = torch.autograd.grad(ours(pairs).sum(), leaf, retain_graph=True)
    (their_grad,) = torch.autograd.grad(-ratio_term.sum(), leaf)
    torch.testing.assert_close(our_grad, their_grad, rtol=1e-4, atol=1e-6)


# --- from logits to metrics ---------------------------------------------------------------------------------------


def from_logits(inputs, logits, ref_logits):
    """The outputs of TRL's fused head, computed in float64 with plain PyTorch."""
    mask = inputs["completion_mask"][:, 1:].bool()
    index = inputs["input_ids"][:, 1:, None]
    log_p = logits.log_softmax(-1)[:, :-1]
    entropy = -(log_p.exp() * log_p).sum(-1)
    outputs = {
        "log_probs": torch.where(mask, log_p.gather(-1, index).squeeze(-1), 0.0),
        "entropy": torch.where(mask, entropy, 0.0),
        "mean_logits": torch.where(mask, logits[:, :-1].mean(-1), 0.0),
        "is_top1": mask & (log_p.argmax(-1) == index.squeeze(-1)),
        "log_sum_sq_probs": torch.where(mask, log_p.exp().square().sum(-1).log(), 0.0).detach(),
    }
    ref = ref_logits.log_softmax(-1)[:, :-1].gather(-1, index).squeeze(-1)
    return outputs, torch.where(mask, ref, 0.0)


def compare_from_logits(inputs, logits, ref_logits, name, rtol, use_weighting=False):
    smoothing = SMOOTHING.get(name, 0.0)
    leaf = logits.double().requires_grad_()
    policy, ref = from_logits(inputs, leaf, ref_logits.double())
    theirs, metrics = trl_call(inputs, policy, ref, name, smoothing=smoothing, use_weighting=use_weighting)
    (their_grad,) = torch.autograd.grad(theirs, leaf)
    ours_leaf = logits.clone().requires_grad_()
    out = dpo_loss(
        ours_leaf,
        shift_labels(inputs["input_ids"], inputs["completion_mask"]),
        ref_logits=ref_logits,
        beta=BETA,
        loss_type=name,
        label_smoothing=smoothing,
        statistics=("entropy", "accuracy", "mean_logits"),
        use_weighting=use_weighting,
    )
    out.loss.backward()
    assert out.loss.item() == pytest.approx(theirs.item(), rel=rtol)
    scale = float(their_grad.abs().max())
    torch.testing.assert_close(ours_leaf.grad.double(), their_grad, rtol=10 * rtol, atol=10 * rtol * scale)
    measured = out.metrics()
    compared = set(measured) & set(metrics)
    assert len(compared) == 10, sorted(compared)
    for key in compared:
        assert measured[key] == pytest.approx(metrics[key], rel=rtol, abs=1e-6), key


@pytest.mark.parametrize("name", NAMES)
def test_from_logits_to_metrics_all_is_trls(name):
    inputs, g = make_batch(8)
    shape = (2 * PAIRS, LENGTH, VOCAB)
    logits, ref_logits = (torch.randn(shape, generator=g) * 2 for _ in range(2))
    compare_from_logits(inputs, logits, ref_logits, name, rtol=2e-6)


@pytest.mark.parametrize("name", ["sigmoid", "ipo", "robust"])
def test_wpo_weighting_is_trls(name):
    inputs, g = make_batch(9)
    logits, ref_logits = (torch.randn((2 * PAIRS, LENGTH, VOCAB), generator=g) * 2 for _ in range(2))
    compare_from_logits(inputs, logits, ref_logits, name, rtol=5e-6, use_weighting=True)


@pytest.mark.slow
def test_on_a_real_model_all_is_trls():
    """SmolLM2 with bfloat16 logits, as in training. The reference is the same model with another softmax temperature."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from examples import smollm2

    # Look for the package without importing it: an import needs the command-line tool that the package extends.
    if importlib.util.find_spec(smollm2.PACKAGE) is None:
        pytest.skip(smollm2.INSTALL_HINT)

    folder = smollm2.model_folder()
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    chosen = ["The sea was calm and the harbour slept.", "Add the eggs one by one, and stir."]
    rejected = ["The sea sea sea wet.", "Eggs. No. Add the flour to the car and stir it well."]
    prompts = ["Write one line about a harbour: ", "How do I make the dough? "] * 2
    rows = [tokenizer(p + a)["input_ids"] for p, a in zip(prompts, chosen + rejected, strict=True)]
    starts = [len(tokenizer(p)["input_ids"]) for p in prompts]
    width = max(map(len, rows))
    input_ids = torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row in rows])
    position = torch.arange(width)
    lengths = torch.tensor([len(row) for row in rows])[:, None]
    inputs = {
        "input_ids": input_ids,
        "attention_mask": (position < lengths).long(),
        "completion_mask": ((position >= torch.tensor(starts)[:, None]) & (position < lengths)).long(),
    }
    with torch.no_grad():
        logits = model(input_ids, attention_mask=inputs["attention_mask"]).logits.bfloat16()
    ref_logits = (logits.float() * 0.9).bfloat16()
    for name in NAMES:
        # The gradient is stored in bfloat16, which keeps 8 bits.
        compare_from_logits(inputs, logits.float(), ref_logits.float(), name, rtol=5e-6)
