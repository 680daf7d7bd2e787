"""TRL patched with our kernels equals TRL: its head's outputs and gradients, and whole training runs.

The models are tiny (tests/trainer/tiny.py). The trainers are TRL's, and every number that they log is compared.
"""

import types
import warnings
from pathlib import Path

import pytest
import torch
from trainer.tiny import build_model, build_pairs, build_tokenizer

from dpo_kernels.integrations import trl as integration
from dpo_kernels.integrations.trl import apply_to_trl, trl_patched
from dpo_kernels.linear import planner

pytest.importorskip("trl", reason="pip install --no-deps trl==1.16.0 (the extra `peers`)")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import trl.trainer.utils as utils
    from datasets import Dataset
    from peft import LoraConfig
    from trl import (
        DPOConfig,
        DPOTrainer,
        GRPOConfig,
        GRPOTrainer,
        KTOConfig,
        KTOTrainer,
        RLOOConfig,
        RLOOTrainer,
        SFTConfig,
        SFTTrainer,
    )

N, H, V = 11, 24, 67
EVERYTHING = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
# In a namespace, because the patch replaces the function wherever a module holds it.
THEIRS = types.SimpleNamespace(head=utils._ChunkedLogProbFunction)


@pytest.fixture(autouse=True)
def restored():
    """Remove the patch from TRL after every test."""
    before = utils._ChunkedLogProbFunction, utils._use_triton
    yield
    assert (utils._ChunkedLogProbFunction, utils._use_triton) == before


def head_inputs(seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(shape, generator=g).to(dtype) for shape in ((N, H), (V, H), (V,))]
    return [t.requires_grad_() for t in tensors], torch.randint(0, V, (N,), generator=g)


@pytest.mark.parametrize(("given", "taken"), [(None, planner.step_budget(H, V)), ("1MB", "1MB")])
def test_the_heads_budget_is_that_of_a_step(given, taken, monkeypatch):
    asked = []
    whole = integration.linear_logps
    (hidden, weight, bias), targets = head_inputs()
    with trl_patched(memory_budget=given):
        monkeypatch.setattr(
            integration, "linear_logps", lambda *a, **k: (asked.append(k["memory_budget"]), whole(*a, **k))[1]
        )
        utils._ChunkedLogProbFunction.apply(hidden, weight, bias, targets, 1.0, 4)
    assert asked == [taken]


HEADS = [
    (1.0, None, 1.0),
    (0.7, None, 1.0),
    (1.0, 5.0, 1.0),
    (1.7, 5.0, 0.25),
]


@pytest.mark.parametrize(("temperature", "softcap", "scale"), HEADS, ids=str)
def test_the_heads_outputs_and_gradients_are_trls(temperature, softcap, scale):
    results = []
    for patched in (True, False):
        leaves, targets = head_inputs()
        arguments = (*leaves, targets, temperature, 32, softcap, scale, EVERYTHING)
        if patched:
            with trl_patched():
                found = utils._ChunkedLogProbFunction.apply(*arguments)
        else:
            found = THEIRS.head.apply(*arguments)
        upstream = torch.linspace(-1, 2, N)
        (found[0] * upstream).sum().backward()
        results.append((found, [leaf.grad for leaf in leaves]))
    (ours, our_grads), (theirs, their_grads) = results
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.dtype == other.dtype
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)
    for mine, other in zip(our_grads, their_grads, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


def test_every_output_comes_from_one_projection(monkeypatch):
    from dpo_kernels.linear.chunk import Projection

    project, rows = Projection.project, []
    leaves, targets = head_inputs(seed=2)
    with trl_patched(), torch.no_grad():
        monkeypatch.setattr(
            Projection, "project", lambda self, x, *rest: rows.append(len(x)) or project(self, x, *rest)
        )
        # The head must not be used in another way either: any other product with it would call this function.
        monkeypatch.setattr(torch.nn.functional, "linear", None)
        utils._ChunkedLogProbFunction.apply(*leaves, targets, 1.0, 32, None, 1.0, EVERYTHING)
    assert sum(rows) == N


def test_a_gradient_through_the_entropy_is_trls():
    """GRPO's entropy bonus."""
    results = []
    for patched in (True, False):
        leaves, targets = head_inputs(seed=1)
        arguments = (*leaves, targets, 0.9, 32, None, 1.0, ("entropy",))
        with trl_patched():
            function = utils._ChunkedLogProbFunction if patched else THEIRS.head
            logps, entropy, *_ = function.apply(*arguments)
        (logps.sum() - 0.3 * (entropy * torch.arange(N)).sum()).backward()
        results.append([leaf.grad for leaf in leaves])
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


def test_only_what_is_asked_for_is_returned():
    leaves, targets = head_inputs()
    with trl_patched():
        found = utils._ChunkedLogProbFunction.apply(*leaves, targets, 1.0, 32, None, 1.0, ("log_probs",))
    assert found[0].requires_grad
    assert found[1:] == (None, None, None, None)


@pytest.mark.parametrize(
    "kind", ["llama-tied", "gemma2-softcap", "cohere-scale", "granite-divisor", "gpt2-learned-positions"]
)
def test_models_with_a_fused_head_give_the_same(kind):
    """One model for each operation that models apply between the last hidden state and the logits."""
    tokenizer = build_tokenizer()
    model = build_model(kind, len(tokenizer)).eval()  # GPT-2 has dropout
    utils.add_fused_lm_head(model, temperature=0.8, outputs=("log_probs", *EVERYTHING))
    ids = torch.randint(0, len(tokenizer), (3, 9), generator=torch.Generator().manual_seed(0))
    labels = torch.where(torch.arange(9) > 3, ids, -100)
    runs = []
    for patched in (True, False):
        model.zero_grad()
        if patched:
            with trl_patched():
                out = model(input_ids=ids, labels=labels, fused_lm_head=True)
                out.loss.backward()
        else:
            out = model(input_ids=ids, labels=labels, fused_lm_head=True)
            out.loss.backward()
        runs.append((out, {name: p.grad.clone() for name, p in model.named_parameters()}))
    for field in ("loss", "log_probs", *EVERYTHING):
        torch.testing.assert_close(getattr(runs[0][0], field), getattr(runs[1][0], field), rtol=1e-4, atol=1e-5)
    for name, grad in runs[1][1].items():
        torch.testing.assert_close(
            runs[0][1][name], grad, rtol=1e-3, atol=1e-6 + 1e-4 * float(grad.abs().max()), msg=name
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_under_autocast_the_products_are_in_its_dtype_and_the_rest_in_float32(dtype):
    """Our results are as close to float32 as TRL's, or closer. Both round the logits to 16 bits."""
    with torch.autocast("cpu", dtype=dtype), trl_patched(grad_filter=None):
        leaves, targets = head_inputs(seed=2)
        logps = utils._ChunkedLogProbFunction.apply(*leaves, targets, 1.0, 32, None, 1.0, ("entropy",))[0]
        logps.sum().backward()
        ours = leaves
    with torch.autocast("cpu", dtype=dtype):
        leaves, targets = head_inputs(seed=2)
        theirs = THEIRS.head.apply(*leaves, targets, 1.0, 32, None, 1.0, ("entropy",))[0]
        theirs.sum().backward()
    assert logps.dtype == torch.float32
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(logps, theirs, rtol=0, atol=4 * eps * float(theirs.abs().max()))
    for mine, other in zip(ours, leaves, strict=True):
        assert mine.grad.dtype == torch.float32
        torch.testing.assert_close(mine.grad, other.grad, rtol=0, atol=8 * eps * float(other.grad.abs().max()))


def test_a_float32_head_over_a_bfloat16_model():
    """With cast_lm_head_to_fp32, hidden states are float32 but the head is not. Its gradient must have the head's dtype."""
    (hidden, weight, bias), targets = head_inputs(seed=3)
    weight, bias = (t.detach().bfloat16().requires_grad_() for t in (weight, bias))
    with trl_patched():
        utils._ChunkedLogProbFunction.apply(hidden, weight, bias, targets, 1.0, 32, None, 1.0, ())[0].sum().backward()
    assert weight.grad.dtype == torch.bfloat16
    assert hidden.grad.dtype == torch.float32


def test_a_batch_without_a_scored_token_still_backpropagates():
    tokenizer = build_tokenizer()
    model = build_model("llama-tied", len(tokenizer))
    utils.add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    ids = torch.zeros(2, 5, dtype=torch.int64)
    with trl_patched():
        out = model(input_ids=ids, labels=torch.full_like(ids, -100), fused_lm_head=True)
        out.loss.backward()
    assert out.loss.item() == 0.0
    assert all((p.grad == 0).all() for p in model.parameters())


# --- whole trainings ----------------------------------------------------------------------------------------------


def train(folder, trainer, config, rows, model="llama-untied", extra=None, steps=10, **settings):
    """The log of a run of `steps` steps."""
    tokenizer = build_tokenizer()
    defaults = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        # SGD, because Adam divides by the gradient's size and would turn the rounding error of a zero gradient into a step.
        "optim": "sgd",
        "learning_rate": 0.3,
        "logging_steps": 1,
        "max_steps": steps,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "max_length": 64,
    }
    settings = {**defaults, **settings}
    built = trainer(
        model=str(model) if isinstance(model, Path) else build_model(model, len(tokenizer)),
        args=config(**{name: value for name, value in settings.items() if value is not None}),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        **(extra or {}),
    )
    built.train()
    times = {"train_runtime", "train_samples_per_second", "train_steps_per_second", "total_flos", "step_time"}
    return [{k: v for k, v in row.items() if k not in times} for row in built.state.log_history]


def compare_runs(tmp_path, *arguments, **settings):
    theirs = train(tmp_path, *arguments, **settings)
    calls = []
    with trl_patched():
        counted = utils._ChunkedLogProbFunction

        def apply(*inputs):
            calls.append(inputs[0].shape[0])
            return counted.apply(*inputs)

        utils._ChunkedLogProbFunction = types.SimpleNamespace(apply=apply)
        ours = train(tmp_path, *arguments, **settings)
        utils._ChunkedLogProbFunction = counted
    assert calls, "the patched head was never called"
    assert len(ours) == len(theirs) > settings.get("steps", 10)
    for step, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        assert mine.keys() == other.keys()
        for key in other:
            if key == "rewards/accuracies" and abs(other["rewards/margins"]) < 1e-5:
                continue  # policy equals reference, so rounding decides which reward is larger
            assert mine[key] == pytest.approx(other[key], rel=1e-3, abs=2e-5), f"step {step}: {key}"
    assert ours[0]["loss"] != ours[-2]["loss"]


NAMES = [
    "sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot",
    "aot_unpaired", "apo_zero", "apo_down", "discopop", "sft",
]  # fmt: skip


def dpo(tmp_path, extra=None, **settings):
    tokenizer = build_tokenizer()
    if settings.get("precompute_ref_log_probs") is None and "peft_config" not in (extra or {}):
        extra = {"ref_model": build_model("llama-untied", len(tokenizer)), **(extra or {})}
    compare_runs(tmp_path, DPOTrainer, DPOConfig, build_pairs(24), extra=extra, **settings)


def test_dpo_training_is_the_same_with_all_loss_types_mixed(tmp_path):
    dpo(tmp_path, loss_type=NAMES, loss_weights=[0.1 + 0.05 * k for k in range(len(NAMES))], label_smoothing=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_dpo_training_is_the_same_for_every_loss_type(tmp_path, name):
    dpo(tmp_path, loss_type=[name], label_smoothing={"exo_pair": 0.1, "robust": 0.1}.get(name, 0.0))


VARIANTS = {
    "lora": {"extra": {"peft_config": LoraConfig(target_modules=["q_proj", "v_proj"], lora_dropout=0.0)}},
    "precomputed reference": {"precompute_ref_log_probs": True},
    "two losses": {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.3]},
    "wpo weights": {"use_weighting": True},
    "length desensitised": {"ld_alpha": 0.5},
    "f-divergence": {"f_divergence_type": "js_divergence"},
}


QUICK = {"lora", "precomputed reference", "wpo weights"}


@pytest.mark.parametrize("variant", [v if v in QUICK else pytest.param(v, marks=pytest.mark.slow) for v in VARIANTS])
def test_dpo_training_is_the_same_in_every_mode(tmp_path, variant):
    dpo(tmp_path, **VARIANTS[variant])


def test_sft_and_kto_training_are_the_same(tmp_path):
    rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in build_pairs(24)]
    compare_runs(tmp_path, SFTTrainer, SFTConfig, rows)
    kto = [
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
        for row in build_pairs(12)
        for side in ("chosen", "rejected")
    ]
    reference = {"ref_model": build_model("llama-untied", len(build_tokenizer()))}
    compare_runs(tmp_path, KTOTrainer, KTOConfig, kto, extra=reference)


def vowels(completions, **_):
    """A reward that differs between samples: the share of vowels."""
    return [sum(letter in "aeiou" for letter in text) / max(len(text), 1) for text in completions]


@pytest.mark.parametrize(("trainer", "config"), [(GRPOTrainer, GRPOConfig), (RLOOTrainer, RLOOConfig)])
def test_reinforcement_learning_is_the_same(tmp_path, trainer, config):
    """All logged numbers are equal in training with sampled completions, rewards and a KL to the reference."""
    folder = tmp_path / "model"  # the reference is loaded from here
    build_model("llama-untied", len(build_tokenizer())).save_pretrained(folder)
    compare_runs(
        tmp_path,
        trainer,
        config,
        [{"prompt": row["prompt"]} for row in build_pairs(24)],
        model=folder,
        extra={"reward_funcs": vowels},
        steps=3,
        max_length=None,
        num_generations=4,
        max_completion_length=8,
        temperature=0.9,
        beta=0.1,
        learning_rate=0.05,
    )


# --- patching and its undoing -------------------------------------------------------------------------------------


def test_undo_restores_everything_and_patching_twice_is_patching_once():
    undo = apply_to_trl()
    assert utils._ChunkedLogProbFunction is not THEIRS.head
    again = apply_to_trl(grad_filter=None)
    undo()  # the first patch no longer exists, so this must do nothing
    assert utils._ChunkedLogProbFunction is not THEIRS.head
    again()
    assert utils._ChunkedLogProbFunction is THEIRS.head
    with pytest.raises(KeyError), trl_patched():
        raise KeyError
    assert utils._ChunkedLogProbFunction is THEIRS.head


def test_an_unknown_trl_is_left_alone_with_a_message(monkeypatch):
    class Other(torch.autograd.Function):
        @staticmethod
        def forward(ctx, hidden, weight): ...

    selective = utils.selective_log_softmax
    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", Other)
    with pytest.warns(
        RuntimeWarning, match=r"left as it is.*_ChunkedLogProbFunction has the arguments \(hidden, weight\)"
    ):
        undo = apply_to_trl()
    assert utils._ChunkedLogProbFunction is Other
    assert utils.selective_log_softmax is selective
    undo()
    monkeypatch.undo()


def test_no_trl_is_an_import_error(monkeypatch):
    monkeypatch.setattr(integration, "_UTILS", "trl_that_is_not_installed.utils")
    with pytest.raises(ImportError, match="trl_that_is_not_installed"):
        apply_to_trl()
