"""The fused LM head in the trainer gives the loss and gradients of the logits path, which is used if the head prevents it."""

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from dpo_kernels import reference
from dpo_kernels.linear import planner
from dpo_trainer import ConfigError, DPOConfig, DPOTrainer, ModelError
from dpo_trainer.model import loss_path
from dpo_trainer.model.split import SplitModel

Make = Callable[..., DPOTrainer]


def loss_and_gradients(trainer: DPOTrainer, rows: int = 4) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    batch = trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[i] for i in range(rows)]))
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    found = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}
    return loss.detach(), found


@pytest.mark.parametrize(
    ("kind", "weighted", "loss_type"),
    [
        *((kind, False, "sigmoid") for kind in ("llama-tied", "llama-untied", "gemma2-softcap", "cohere-scale")),
        ("llama-tied", True, "sigmoid"),
        ("gemma2-softcap", True, "sigmoid"),
        ("llama-untied", True, "tdpo2"),
        ("gemma2-softcap", False, "tdpo"),
    ],
)
def test_both_paths_give_the_same_loss_gradients_and_metrics(
    kind: str, weighted: bool, loss_type: str, make_trainer: Make, make_model: Any, pairs: Any
) -> None:
    rows = [{**row, "weight": 0.3 + index} for index, row in enumerate(pairs(8))] if weighted else pairs(8)
    results = []
    for path in ("linear", "logits"):
        trainer = make_trainer(
            model=make_model(kind),
            ref_model=make_model(kind, seed=1),
            train_dataset=rows,
            beta=0.3,
            loss_type=loss_type,
            loss_path=path,
        )
        assert trainer.loss_path == path
        loss, gradients = loss_and_gradients(trainer)
        results.append((loss, gradients, trainer._drain("train")))
    (loss, gradients, metrics), (other_loss, other_gradients, other_metrics) = results
    torch.testing.assert_close(loss, other_loss, rtol=1e-5, atol=1e-6)
    assert gradients.keys() == other_gradients.keys()
    for name, gradient in gradients.items():
        assert (gradient - other_gradients[name]).norm() <= 1e-4 * other_gradients[name].norm(), name
    assert metrics == pytest.approx(other_metrics, rel=1e-4, abs=1e-5)
    assert metrics["kl"] > 0


def test_an_adapter_shares_its_head_with_its_reference(make_trainer: Make, make_model: Any) -> None:
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    found = []
    for path in ("auto", "logits"):
        torch.manual_seed(0)
        trainer = make_trainer(model=make_model(), peft_config=lora, loss_path=path)
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(1))
        found.append((trainer.loss_path, *loss_and_gradients(trainer)))
    (path, loss, gradients), (_, other_loss, other_gradients) = found
    assert path == "linear"
    torch.testing.assert_close(loss, other_loss, rtol=1e-5, atol=1e-6)
    assert loss.item() != pytest.approx(0.6931472)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, other_gradients[name], rtol=1e-3, atol=1e-6)


def test_hooks_around_the_head_fire_and_it_stays_as_it_was(make_trainer: Make, make_model: Any) -> None:
    """Sharded training gathers the weight in hooks of the head."""
    trainer = make_trainer(model=make_model("llama-untied"), loss_path="linear")
    seen = []
    trainer.policy.head.register_forward_pre_hook(lambda module, args: seen.append("before"))
    trainer.policy.head.register_forward_hook(lambda module, args, output: seen.append(output[0].requires_grad))
    loss_and_gradients(trainer)
    assert seen == ["before", True]
    assert "forward" not in trainer.policy.head.__dict__


def test_all_logits_are_never_held(make_trainer: Make, make_model: Any) -> None:
    """With a budget of a few tokens, no tensor of the step is as large as the logits of all completion tokens."""
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            for tensor in torch.utils._pytree.tree_leaves(out):
                if isinstance(tensor, torch.Tensor) and tensor.dim() and tensor.shape[-1] == vocabulary:
                    largest = max(largest, tensor[..., 0].numel())
            return out

    trainer = make_trainer(model=make_model("llama-untied"), loss_path="linear", memory_budget="20KB")
    vocabulary = trainer.policy.head.weight.shape[0]
    rows = len(trainer.train_dataset)
    scored = len(trainer.data_collator([trainer.train_dataset[i] for i in range(rows)])["labels"])
    with Watch():
        loss_and_gradients(trainer, rows)
    # The transposed weight [H, V] is one of the tensors seen.
    assert 0 < largest <= max(trainer.policy.head.weight.shape[1], scored / 4)


def test_real_pairs_fit_whole_in_what_the_trainer_takes_unasked() -> None:
    """SmolLM2's head, pairs of 400 scored tokens, two buffers for the KL. The library's default would use several chunks."""
    config = LlamaConfig(vocab_size=49152, hidden_size=576, num_hidden_layers=0, num_attention_heads=8)
    with torch.device("meta"):
        policy = SplitModel(LlamaForCausalLM(config))
    head = planner.Head(576, 49152, 4, projects_reference=True, kl=True)
    counts = [200] * 8
    lean = planner.plan_pairs(head, counts, planner.budget_of(None, head, "whole_pairs"))
    taken = planner.plan_pairs(head, counts, loss_path.memory_budget(None, policy))
    products = 4 * head.product * sum(counts)
    assert lean.flops > products
    assert taken.flops == products, "no token is projected twice"
    assert loss_path.memory_budget("32MB", policy) == "32MB"
    # The default for a large head is larger.
    config.hidden_size = 4096
    with torch.device("meta"):
        policy = SplitModel(LlamaForCausalLM(config))
    assert loss_path.memory_budget(None, policy) == planner.default_budget(4096, 49152) > 256 * 2**20


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("adapted head", "not a plain nn.Linear"),
        ("gemma2-softcap", "policy and reference scale or cap their logits differently"),
    ],
)
def test_what_the_linear_path_cannot_do_runs_on_logits_and_says_so(
    kind: str, why: str, make_trainer: Make, make_model: Any, caplog: pytest.LogCaptureFixture
) -> None:
    settings: dict[str, Any] = (
        {"ref_model": make_model(kind)}
        if kind != "adapted head"
        else {"peft_config": LoraConfig(r=2, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")}
    )
    with caplog.at_level(logging.INFO, logger="dpo_trainer"):
        trainer = make_trainer(model=make_model("llama-untied"), **settings)
    assert trainer.loss_path == "logits"
    assert why in caplog.text
    loss, _ = loss_and_gradients(trainer)
    assert loss.isfinite()
    with pytest.raises(ConfigError, match=f"loss_path: 'linear' is not possible here: .*{why}"):
        make_trainer(model=make_model("llama-untied"), loss_path="linear", **settings)


def test_a_reference_of_another_vocabulary_width_is_a_clear_error(make_trainer: Make, make_model: Any) -> None:
    """Policy and reference may share a tokenizer but have padded embeddings of different sizes, which the loss refuses."""
    wide = make_model("llama-untied", seed=1)
    wide.resize_token_embeddings(wide.config.vocab_size + 8)
    with pytest.raises(ModelError, match="ref_model: has a vocabulary of 314 tokens, but the model has 306"):
        make_trainer(model=make_model("llama-untied"), ref_model=wide)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"loss_path": "linera"}, r"did you mean 'linear'\?"),
        ({"memory_budget": "much"}, "memory_budget: .*256MB"),
        ({"grad_filter": "fine"}, "grad_filter: must be 'auto'"),
        ({"grad_filter": 1.5}, r"lies in \(0, 1\)"),
    ],
)
def test_bad_settings_are_explained(settings: dict[str, Any], said: str, tmp_path: Any) -> None:
    with pytest.raises(ConfigError, match=said):
        DPOConfig(output_dir=str(tmp_path), **settings)


@pytest.mark.parametrize("path", ["linear", "logits"])
@pytest.mark.parametrize(
    "settings", [{"ld_alpha": 0.25}, {"use_weighting": True}, {"kl_coef": 0.5}], ids=lambda found: next(iter(found))
)
def test_lengths_likelihoods_and_divergence_may_weigh(
    settings: dict[str, Any], path: str, make_trainer: Make, make_model: Any
) -> None:
    """Equal to the reference implementation on the whole logits, in float64."""
    models = {"model": make_model().double(), "ref_model": make_model(seed=1).double()}
    trainer = make_trainer(**models, loss_path=path, batch_layout="padded", **settings)
    batch = trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[i] for i in range(4)]))
    weights = None
    if "ld_alpha" in settings:
        counts = batch["cu_seqlens"].diff().tolist()
        shorter = [min(pair) for pair in zip(counts[:4], counts[4:], strict=True)] * 2
        weights = torch.cat(
            [torch.tensor([1.0] * s + [0.25] * (n - s)) for n, s in zip(counts, shorter, strict=True)]
        ).double()
        assert weights.min() == 0.25
    with torch.no_grad():
        expected = reference.dpo_loss(
            trainer.policy.packed_logits(batch),
            batch["labels"],
            ref_logits=trainer.reference.packed_logits(batch),
            cu_seqlens=batch["cu_seqlens"],
            token_weights=weights,
            use_weighting=settings.get("use_weighting", False),
            kl_coef=settings.get("kl_coef", 0.0),
        )
    loss = trainer.compute_loss(trainer.model.train(), batch)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    plain = make_trainer(**models, loss_path=path, batch_layout="padded")
    assert loss.item() != pytest.approx(plain.compute_loss(trainer.model, batch).item(), rel=1e-4)


@pytest.mark.parametrize("path", ["linear", "logits"])
def test_the_divergence_counts_once_a_batch_however_the_pairs_weigh(
    path: str, make_trainer: Make, make_model: Any, pairs: Any
) -> None:
    """kl_coef adds kl_coef times the mean KL to the loss, its gradient and the log, with and without weights."""
    found = []
    for weights in ([1.0] * 4, [0.0, 0.5, 3.0, 7.0]):
        rows = [{**row, "weight": weight} for row, weight in zip(pairs(4), weights, strict=True)]
        results = []
        for coefficient in (0.0, 0.5):
            trainer = make_trainer(
                model=make_model().double(),
                ref_model=make_model(seed=1).double(),
                train_dataset=rows,
                loss_path=path,
                kl_coef=coefficient,
            )
            loss, gradients = loss_and_gradients(trainer)
            results.append((loss, gradients, trainer._drain("train")))
        (plain, plain_gradients, plain_logs), (loss, gradients, logs) = results
        assert (loss - plain).item() == pytest.approx(0.5 * logs["kl"], rel=1e-6)
        if len(set(weights)) == 1:  # with different weights, the log also weighs the KL of each pair
            assert logs["loss"] - plain_logs["loss"] == pytest.approx(0.5 * logs["kl"], rel=1e-6)
        found.append({name: value - plain_gradients[name] for name, value in gradients.items()})
    for name, gradient in found[0].items():
        assert (found[1][name] - gradient).norm() <= 1e-5 * gradient.norm(), name  # weights have 32 bits
        assert gradient.norm() > 0


def test_length_weights_and_divergence_need_the_reference_in_the_step(make_trainer: Make) -> None:
    for settings in ({"ld_alpha": 0.5}, {"kl_coef": 0.5}):
        with pytest.raises(ConfigError, match=f"{next(iter(settings))}: needs the reference model in every step"):
            make_trainer(**settings, precompute_ref_log_probs=True)
    with pytest.raises(ConfigError, match="kl_coef: needs a reference, and loss_type simpo has none"):
        make_trainer(kl_coef=0.5, loss_type="simpo")
    with pytest.raises(ConfigError, match="kl_coef: must not be negative, got -1"):
        make_trainer(kl_coef=-1.0)
    with pytest.raises(ConfigError, match=r"ld_alpha: must lie in \[0, 1\], got 2"):
        make_trainer(ld_alpha=2.0)
