"""Adapters in unusual states: the saved, loaded or merged adapter equals the trained one, or an error says why not."""

import copy
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, PeftConfig, PromptTuningConfig, VeraConfig, get_peft_model
from peft.tuners.lora import LoraLayer

from dpo_trainer import ConfigError, DPOTrainer, ModelError, OutputError, load_model
from dpo_trainer.model.reference_cache import model_fingerprint

from .test_adapter_references import LOG2, lora, losses, moved, plain_logps
from .tiny import build_model, build_pairs, build_tokenizer

Make = Callable[..., DPOTrainer]
ROWS = build_pairs(8)


def folder_of(path: Path, config: LoraConfig, seed: int = 3) -> Path:
    """The folder of a trained adapter; its base model is in the same parent folder."""
    tokenizer, base = build_tokenizer(), path / "plain"
    build_model("llama-tied", len(tokenizer)).save_pretrained(base)
    model = get_peft_model(load_model(base), config)
    torch.manual_seed(seed)
    for value in model.parameters():
        if value.requires_grad:
            value.data.add_(torch.randn_like(value), alpha=0.05)
    model.save_pretrained(path / f"adapter-{seed}")
    tokenizer.save_pretrained(path / f"adapter-{seed}")
    return path / f"adapter-{seed}"


def two_adapters(model: Any) -> Any:
    """A model with the trained adapters "default", which is active, and "second", of the same shape."""
    torch.manual_seed(0)
    model = get_peft_model(model, lora())
    model.add_adapter("second", lora())
    moved(model)
    model.set_adapter("default")
    return model


def _edited(adapter: Path, **changes: Any) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def _stacked(adapter: Path) -> None:
    shutil.copytree(adapter, adapter.with_name("other"))
    _edited(adapter, base_model_name_or_path=str(adapter.with_name("other")))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_stacked, "is an adapter of an adapter (.*), and peft cannot stack them"),
        (lambda path: _edited(path, target_modules=["q_proj"]), "'.*v_proj.*' is not in its config"),
        (lambda path: _edited(path, target_modules=["q_proj", "v_proj", "o_proj"]), "'.*o_proj.*' is not in its file"),
        (lambda path: _edited(path, r=8), "cannot be loaded .size mismatch for .*q_proj"),
        (lambda path: (path / "adapter_config.json").write_text("{"), "its adapter_config.json cannot be read"),
        (lambda path: (path / "adapter_model.safetensors").unlink(), "no weights that can be read"),
    ],
    ids=["stacked", "fewer layers", "more layers", "other rank", "broken config", "no weights"],
)
def test_a_folder_that_is_not_the_trained_adapter(spoil: Any, message: str, tmp_path: Path) -> None:
    adapter = folder_of(tmp_path, lora())
    spoil(adapter)
    with pytest.raises(ModelError, match=f"^model '{adapter}': .*{message}"):
        load_model(adapter)


def test_an_adapter_with_more_embeddings_than_its_tokenizer_has_tokens(tmp_path: Path) -> None:
    """More embeddings than tokens, as from `resize_token_embeddings(..., pad_to_multiple_of=64)`."""
    model = load_model(folder_of(tmp_path, lora()).with_name("plain"))
    model.resize_token_embeddings(384)
    model = moved(get_peft_model(model, lora(modules_to_save=["embed_tokens", "lm_head"])))
    model.save_pretrained(tmp_path / "wide")
    build_tokenizer().save_pretrained(tmp_path / "wide")
    assert torch.equal(plain_logps(load_model(tmp_path / "wide"), ROWS), plain_logps(model, ROWS))


@pytest.mark.parametrize("module", ["lm_head", "embed_tokens"])
@pytest.mark.parametrize("anew", [True, False], ids=["and a new one", "and all trains"])
def test_a_merge_that_changes_the_model_is_refused(module: str, anew: bool, make_trainer: Make, tmp_path: Path) -> None:
    """Head and embeddings share a weight, so merging an update for one of them changes the other too."""
    adapter = folder_of(tmp_path, lora(target_modules=[module, "q_proj"]))
    truth = plain_logps(load_model(adapter), ROWS)
    with pytest.raises(ModelError, match=r"^adapter: it cannot be merged: .* differ by .*adapter: continue"):
        make_trainer(model=adapter, peft_config=lora() if anew else None, adapter=None if anew else "merge")
    trainer = make_trainer(model=adapter, train_dataset=ROWS, filters=[], max_steps=1, adapter="continue")
    found = torch.tensor(trainer.reference_logps(trainer.train_dataset, batch_size=4), dtype=torch.float64)
    assert torch.allclose(found, truth, atol=1e-4)


@pytest.mark.parametrize(
    "config", [lora(), lora(use_dora=True), lora(modules_to_save=["embed_tokens"])], ids=["lora", "dora", "embeddings"]
)
def test_other_merges_are_done(config: LoraConfig, make_trainer: Make, tmp_path: Path) -> None:
    adapter = folder_of(tmp_path, config)
    truth = plain_logps(load_model(adapter), ROWS)
    assert torch.allclose(plain_logps(make_trainer(model=adapter, adapter="merge").model, ROWS), truth, atol=1e-4)


@pytest.mark.parametrize(
    "config",
    [
        PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
        VeraConfig(r=4, target_modules=["q_proj"]),
        lora(trainable_token_indices=[3, 4]),
        lora(modules_to_save=["lm_head"], use_dora=True),
    ],
    ids=["prompt", "vera", "tokens", "head"],
)
def test_the_base_under_any_new_adapter_is_the_merged_model(
    config: PeftConfig, make_trainer: Make, tmp_path: Path
) -> None:
    adapter = folder_of(tmp_path, lora())
    truth = plain_logps(load_model(adapter), ROWS)
    trainer = make_trainer(model=adapter, peft_config=config, max_steps=1, output_dir=str(tmp_path / "run"))
    trainer.train()
    assert torch.allclose(plain_logps(load_model(tmp_path / "run" / "base"), ROWS), truth, atol=1e-4)


def test_layers_are_not_replicated_over_a_merge(make_trainer: Make, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"^peft_config: layer_replication changes the merged model"):
        make_trainer(model=folder_of(tmp_path, lora()), peft_config=lora(layer_replication=[[0, 2], [0, 2]]))


def test_ranks_that_adalora_has_cut_are_not_cut_again(make_trainer: Make, tmp_path: Path) -> None:
    """peft applies the second rank pattern to all ranks, although it refers to the ranks that the first pattern kept."""
    config = AdaLoraConfig(
        init_r=4,
        target_r=2,
        tinit=1,
        tfinal=1,
        total_step=6,
        target_modules=["q_proj", "v_proj"],
        task_type="CAUSAL_LM",
    )
    plain = folder_of(tmp_path, lora()).with_name("plain")
    trainer = make_trainer(
        model=plain, peft_config=config, max_steps=6, learning_rate=5e-2, output_dir=str(tmp_path / "run")
    )
    trainer.train()
    trainer.save_model()
    with pytest.raises(ModelError, match=r"^adapter: AdaLoRA has already reduced the ranks of this adapter"):
        make_trainer(model=tmp_path / "run")
    merged = make_trainer(model=tmp_path / "run", adapter="merge")
    assert torch.allclose(plain_logps(merged.model, ROWS), plain_logps(trainer.policy.model, ROWS), atol=1e-4)


def test_the_base_under_a_new_adapter_is_this_runs_own(make_trainer: Make, tmp_path: Path) -> None:
    """Two runs in one folder merge different adapters. The second run finds the base model that the first run saved."""
    for seed in (3, 4):
        trainer = make_trainer(
            model=folder_of(tmp_path, lora(), seed), peft_config=lora(), max_steps=1, output_dir=str(tmp_path / "run")
        )
        trainer.train()
        trainer.save_model()
        expected = plain_logps(trainer.policy.model, ROWS)
        assert torch.allclose(plain_logps(load_model(tmp_path / "run"), ROWS), expected, atol=1e-6)


@pytest.mark.parametrize("given", [None, lora()], ids=["by itself", "with peft_config"])
def test_the_inside_of_a_peft_model_is_refused(given: Any, make_trainer: Make, make_model: Any) -> None:
    inner = make_model()
    moved(get_peft_model(inner, lora()))
    with pytest.raises(
        ModelError, match=r"^model: its layers hold a peft adapter, which only the peft model around it can save"
    ):
        make_trainer(model=inner, peft_config=given)


def test_an_adapter_that_transformers_added(make_trainer: Make, make_model: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr("transformers.integrations.peft.check_peft_version", lambda **_: None)
    model = make_model()
    model.add_adapter(lora())
    truth = plain_logps(moved(model), ROWS)
    with pytest.raises(ModelError, match=r"^peft_config: the model has an adapter already"):
        make_trainer(model=model, peft_config=lora())
    with pytest.raises(ConfigError, match=r"^adapter: 'merge' is for peft models"):
        make_trainer(model=model, adapter="merge")
    trainer = make_trainer(model=model, train_dataset=ROWS, filters=[], max_steps=1)
    found = torch.tensor(trainer.reference_logps(trainer.train_dataset, batch_size=4), dtype=torch.float64)
    assert torch.allclose(found, truth, atol=1e-4)
    before = model_fingerprint(model)
    assert model_fingerprint(copy.deepcopy(model)) == before
    next(part for part in model.modules() if isinstance(part, LoraLayer)).scaling["default"] *= 2
    assert model_fingerprint(model) != before, "log-probabilities that are kept depend on lora_alpha"


def test_a_mixed_model_is_refused(make_trainer: Make, make_model: Any) -> None:
    with pytest.raises(ModelError, match=r"^model: peft cannot save a model of mixed adapters"):
        make_trainer(model=get_peft_model(make_model(), lora(), mixed=True))


SAVED = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3, "learning_rate": 5e-2, "train_dataset": ROWS}


def _second(model: Any) -> Any:
    model.set_adapter("second")
    return model


def _both(model: Any) -> Any:
    model.base_model.set_adapter(["default", "second"])
    return model


@pytest.mark.parametrize("active", [_second, _both])
def test_checkpoints_give_back_every_active_adapter(
    active: Any, make_trainer: Make, make_model: Any, caplog: Any
) -> None:
    caplog.set_level(logging.INFO, "dpo_trainer")
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    trainer = make_trainer(
        model=active(two_adapters(make_model())),
        eval_dataset=build_pairs(8, seed=1),
        eval_strategy="steps",
        eval_steps=1,
        eval_on_start=False,  # its evaluation has no checkpoint
        **SAVED,
        **best,
    )
    trainer.train()
    seen = [record["eval_loss"] for record in trainer.state.log_history if "eval_loss" in record]
    assert max(seen) - seen[-1] > 1e-4, "the best one, here the worst, is not the last"
    assert trainer.evaluate()["eval_loss"] == pytest.approx(max(seen), abs=1e-6)
    trainer.save_model()
    assert f"the adapter 'second' is saved in {Path(str(trainer.args.output_dir)) / 'second'}" in caplog.text


def test_two_active_adapters_are_resumed(make_trainer: Make, make_model: Any, tmp_path: Path) -> None:
    def run(resumed: str | None = None) -> tuple[list[float], dict[str, torch.Tensor]]:
        trainer = make_trainer(model=_both(two_adapters(make_model())), output_dir=str(tmp_path), **SAVED)
        trainer.train(resume_from_checkpoint=resumed)
        found = [record["loss"] for record in trainer.state.log_history if "loss" in record]
        return found, trainer.policy.model.state_dict()

    whole, expected = run()
    again, found = run(str(tmp_path / "checkpoint-1"))
    assert again == whole
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("config", [None, lora()], ids=["whole", "adapter"])
def test_a_checkpoint_of_the_other_kind_is_refused(config: Any, make_trainer: Make, tmp_path: Path) -> None:
    make_trainer(peft_config=config, output_dir=str(tmp_path), **SAVED).train()
    other = make_trainer(peft_config=None if config else lora(), output_dir=str(tmp_path), **{**SAVED, "max_steps": 4})
    with pytest.raises(OutputError, match=r"checkpoint-3: holds a.*, but the run trains a.*; resume with the model"):
        other.train(resume_from_checkpoint=True)


def test_an_adapter_that_cannot_be_copied_is_compared_with_beforehand(make_trainer: Make, tmp_path: Path) -> None:
    adapter = folder_of(tmp_path, lora(target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True))
    with pytest.raises(ModelError, match=r"^reference: the model holds tensors that torch cannot copy; set precompute"):
        make_trainer(model=adapter)
    trainer = make_trainer(model=adapter, precompute_ref_log_probs=True, max_steps=2)
    assert losses(trainer)[0] == pytest.approx(LOG2, abs=1e-5)


def test_weights_that_peft_does_not_save_are_told(make_trainer: Make, make_model: Any, caplog: Any) -> None:
    config = lora(bias="all", modules_to_save=["embed_out"], target_modules=["query_key_value"])
    model = get_peft_model(make_model("gpt-neox"), config)
    make_trainer(model=model)
    assert "peft saves it neither" not in caplog.text
    model.get_base_model().gpt_neox.final_layer_norm.weight.requires_grad_(True)
    make_trainer(model=model)
    assert (
        "gpt_neox.final_layer_norm.weight' (1 in all) trains in addition to the adapter, but peft does not save it"
        in caplog.text
    )


def test_an_adapter_that_rewrites_the_base_at_random_is_told(make_trainer: Make, caplog: Any) -> None:
    trainer = make_trainer(peft_config=lora(init_lora_weights="pissa_niter_4"), max_steps=1)
    assert (
        "init_lora_weights 'pissa_niter_4' rewrites the model with random numbers, so the saved adapter does not fit"
        in caplog.text
    )
    assert losses(trainer)[0] == pytest.approx(LOG2, abs=1e-6)


def test_the_first_loss_is_said_to_differ_only_where_it_does(make_trainer: Make, caplog: Any) -> None:
    caplog.set_level(logging.INFO, "dpo_trainer")
    said = "so the first loss is not log 2"
    for config in (lora(modules_to_save=["embed_tokens"]), lora(init_lora_weights="orthogonal")):
        assert losses(make_trainer(peft_config=config, max_steps=1))[0] == pytest.approx(LOG2, abs=1e-6)
    assert said not in caplog.text
    assert abs(losses(make_trainer(peft_config=lora(init_lora_weights=False), max_steps=1))[0] - LOG2) > 1e-4
    assert said in caplog.text


def test_a_reference_that_the_run_would_move_is_refused(make_trainer: Make, make_model: Any) -> None:
    base = make_model()
    with pytest.raises(ModelError, match=r"^ref_model: shares '.*lora_A.* with the model, which trains it"):
        make_trainer(model=get_peft_model(base, lora()), ref_model=base)


def test_one_reference_is_named(make_trainer: Make, make_model: Any) -> None:
    with pytest.raises(
        ConfigError, match=r"^ref_adapter_name: names an adapter of the model, but ref_model is given too"
    ):
        make_trainer(model=two_adapters(make_model()), ref_model=make_model(), ref_adapter_name="second")
