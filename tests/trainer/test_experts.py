"""The auxiliary loss of mixtures of experts: equal in every layout, with the right share in every step, logged separately."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig
from torch.nn.functional import one_hot
from transformers.models.mixtral import modeling_mixtral

from dpo_trainer import ConfigError, DPOConfig
from dpo_trainer.model.auxiliary import load_balancing_loss

from .tiny import LLAMA, build_pairs, build_tokenizer, build_trainer

VOCAB = len(build_tokenizer())
SMALL = {**LLAMA, "vocab_size": VOCAB, "pad_token_id": 0, "num_experts_per_tok": 2}
MODELS: dict[str, dict[str, Any]] = {
    "Mixtral": {**SMALL, "num_local_experts": 4},
    "Qwen2Moe": {**SMALL, "num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
    "Qwen3Moe": {**SMALL, "num_experts": 4, "moe_intermediate_size": 16, "head_dim": 8},
    "Olmoe": {**SMALL, "num_experts": 4},
    "GraniteMoe": {**SMALL, "num_local_experts": 4},
    "GptOss": {**SMALL, "num_local_experts": 4, "head_dim": 8},
}


def mixture(kind: str, seed: int = 0, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    torch.manual_seed(seed)
    config = getattr(transformers, f"{kind}Config")(**{**MODELS[kind], **settings})
    model = getattr(transformers, f"{kind}ForCausalLM")(config).to(dtype)
    model.set_experts_implementation("eager")  # the grouped product does not support float64
    return model


def plain_auxiliary(model: Any, rows: list[dict[str, Any]]) -> torch.Tensor:
    """Switch Transformers' formula over both sides of all pairs, with each text run separately and without padding."""
    shares, probabilities = [], []
    for side in ("chosen_ids", "rejected_ids"):
        for row in rows:
            ids = torch.tensor([row["prompt_ids"] + row[side][:-1]])
            for logits in model.model(input_ids=ids, output_router_logits=True).router_logits:
                probabilities.append(logits.softmax(-1))
                shares.append(one_hot(logits.topk(2).indices, logits.shape[-1]).sum(1).to(logits.dtype))
    experts = shares[0].shape[-1]
    return experts * (torch.cat(shares).mean(0) * torch.cat(probabilities).mean(0)).sum()


@pytest.mark.parametrize("layout", ["padded", "prefix_shared", "auto"])
@pytest.mark.parametrize("kind", MODELS)
def test_value_and_gradient_are_those_of_plain_forwards(kind: str, layout: str, tmp_path: Path) -> None:
    model = mixture(kind, dtype=torch.float64)
    trainer = build_trainer(tmp_path, model=model, batch_layout=layout, router_aux_loss_coef=3.0, use_cpu=True)
    rows = [dict(trainer.train_dataset[index]) for index in range(4)]
    batch = trainer.data_collator(rows)
    if layout == "prefix_shared" and kind != "GptOss":  # GptOss has attention sinks
        assert "segments" in batch
    model.train()
    gates = ("mlp.gate.", "router", "embed_tokens")
    names = [name for name, _ in model.named_parameters() if any(part in name for part in gates)]
    parameters = dict(model.named_parameters())
    expected = plain_auxiliary(model, rows)
    expected.backward()
    gradients = {name: parameters[name].grad.clone() for name in names}
    model.zero_grad()
    with torch.no_grad():
        without = trainer.compute_loss(model, batch)
    trainer.policy.packed_logits(batch)
    found = trainer.auxiliary.take(batch)
    torch.testing.assert_close(found, expected.detach(), rtol=1e-9, atol=1e-12)
    found.backward()
    assert len(names) >= 3
    for name in names:
        torch.testing.assert_close(parameters[name].grad, gradients[name], rtol=1e-6, atol=1e-9)
    with_it = trainer.compute_loss(model, batch)
    assert (with_it - without).item() == pytest.approx(3 * expected.item(), rel=1e-6)


def trained(folder: Path, **settings: Any) -> Any:
    trainer = build_trainer(folder, max_steps=3, learning_rate=1e-2, logging_steps=1, **settings)
    trainer.train()
    return trainer


def gates(trainer: Any) -> torch.Tensor:
    return torch.cat([value.flatten() for name, value in trainer.model.named_parameters() if "mlp.gate." in name])


def logged(trainer: Any, name: str) -> list[float]:
    return [record[name] for record in trainer.state.log_history if name in record]


def test_the_models_own_coefficient_counts(tmp_path: Path) -> None:
    """TRL uses the config's factor too, whether or not output_router_logits is set."""
    much = trained(tmp_path / "a", model=mixture("Mixtral", output_router_logits=True, router_aux_loss_coef=10.0))
    none = trained(tmp_path / "b", model=mixture("Mixtral", output_router_logits=True, router_aux_loss_coef=0.0))
    unset = trained(tmp_path / "c", model=mixture("Mixtral", router_aux_loss_coef=10.0))
    off = trained(tmp_path / "d", model=mixture("Mixtral", router_aux_loss_coef=10.0), router_aux_loss_coef=0.0)
    assert (gates(much) - gates(none)).abs().max() > 1e-3
    assert torch.equal(gates(much), gates(unset))
    assert torch.equal(gates(none), gates(off))
    assert [trainer.aux_loss_enabled for trainer in (much, none, unset, off)] == [True, False, True, False]
    assert len(logged(much, "aux_loss")) == 3
    assert all(2 <= value < 4.1 for value in logged(much, "aux_loss"))
    assert logged(none, "aux_loss") == []
    assert logged(much, "loss")[0] == pytest.approx(0.693147, abs=1e-5), "the logged loss is DPO's alone"


def test_it_is_added_in_training_only(tmp_path: Path) -> None:
    model = mixture("Mixtral", router_aux_loss_coef=10.0)
    trainer = trained(tmp_path, model=model, eval_dataset=build_pairs(4, seed=1))
    first = trainer.evaluate()
    trainer.auxiliary.factor = 0.0
    assert trainer.evaluate()["eval_loss"] == first["eval_loss"]
    assert "eval_aux_loss" not in first


def gradients(folder: Path, batch_size: int, accumulation: int, **settings: Any) -> Any:
    """The gradients of the routers in the first step, and its logged aux_loss."""
    trainer = build_trainer(
        folder,
        model=mixture("Mixtral", router_aux_loss_coef=10.0),
        train_dataset=build_pairs(1) * 8,
        filters=[],
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        max_steps=1,
        max_grad_norm=0.0,
        learning_rate=1.0,
        optim="sgd",
        lr_scheduler_type="constant",
        **settings,
    )
    before = gates(trainer).clone()
    trainer.train()
    return before - gates(trainer), logged(trainer, "aux_loss")


def test_accumulated_batches_share_a_step(tmp_path: Path) -> None:
    """All pairs are equal, so that the mean of the batches' auxiliary losses equals the whole step's."""
    whole, logged_whole = gradients(tmp_path / "a", 8, 1)
    parts, logged_parts = gradients(tmp_path / "b", 2, 4)
    assert whole.abs().max() > 1e-3
    torch.testing.assert_close(parts, whole, rtol=1e-3, atol=1e-5)
    assert logged_parts == pytest.approx(logged_whole, rel=1e-5)


def test_layers_that_are_computed_twice_change_nothing(tmp_path: Path) -> None:
    plain, _ = gradients(tmp_path / "a", 8, 1)
    twice, _ = gradients(tmp_path / "b", 8, 1, gradient_checkpointing=True)
    torch.testing.assert_close(twice, plain, rtol=1e-4, atol=1e-6)


def test_a_run_that_goes_on_has_its_experts_and_logs_the_same(tmp_path: Path) -> None:
    """Experts are saved one by one but stored together in the model, so transformers would skip them on resume."""
    settings = {
        "logging_steps": 4,
        "save_strategy": "steps",
        "save_steps": 3,
        "max_steps": 4,
        "logging_first_step": False,
    }
    whole = build_trainer(tmp_path, model=mixture("Mixtral", router_aux_loss_coef=1.0), **settings)
    whole.train()
    resumed = build_trainer(tmp_path, model=mixture("Mixtral", router_aux_loss_coef=1.0), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert all(map(torch.equal, resumed.model.parameters(), whole.model.parameters()))
    assert logged(resumed, "aux_loss") == logged(whole, "aux_loss") != []


def test_the_best_model_has_its_experts(tmp_path: Path) -> None:
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps"}
    evaluation = {"eval_dataset": build_pairs(4, seed=1), "metric_for_best_model": "loss", "greater_is_better": True}
    trainer = build_trainer(
        tmp_path, model=mixture("Mixtral"), max_steps=3, save_steps=1, learning_rate=1e-2, **best, **evaluation
    )
    trainer.train()
    assert trainer.state.best_global_step == 1
    saved = transformers.MixtralForCausalLM.from_pretrained(tmp_path / "checkpoint-1")
    assert all(map(torch.equal, trainer.model.parameters(), saved.parameters()))


def test_adapters_on_experts_get_it_too(tmp_path: Path) -> None:
    adapter = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    trainer = trained(tmp_path, model=mixture("Mixtral", router_aux_loss_coef=10.0), peft_config=adapter)
    assert len(logged(trainer, "aux_loss")) == 3


def test_a_coefficient_without_experts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="router_aux_loss_coef: LlamaForCausalLM returns no router logits"):
        build_trainer(tmp_path, router_aux_loss_coef=0.1)
    build_trainer(tmp_path, router_aux_loss_coef=0.0)
    with pytest.raises(ConfigError, match="router_aux_loss_coef"):
        DPOConfig(output_dir=str(tmp_path), router_aux_loss_coef=-1.0)


def test_another_auxiliary_loss_than_the_models_own_is_not_added(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = modeling_mixtral.load_balancing_loss_func
    monkeypatch.setattr(modeling_mixtral, "load_balancing_loss_func", lambda *args: 3 * own(*args))
    trainer = build_trainer(tmp_path, model=mixture("Mixtral", router_aux_loss_coef=0.5))
    assert not trainer.aux_loss_enabled
    assert "its auxiliary loss (router_aux_loss_coef 0.5) is not added: the model computes" in caplog.text


def test_equal_experts_give_top_k() -> None:
    logits = torch.eye(4).repeat(5, 1) * 20
    assert load_balancing_loss((logits,), 1, torch.ones(20)).item() == pytest.approx(1.0, abs=1e-5)
