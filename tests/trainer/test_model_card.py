"""The card of a trained model has metadata that hubs read and the run's figures, and is saved with the model."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from peft import LoraConfig

from dpo_kernels.objectives import OBJECTIVES
from dpo_trainer import DPOTrainer

from .tiny import build_pairs

Make = Callable[..., DPOTrainer]
LORA = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], task_type="CAUSAL_LM")


def parts(card: Path) -> tuple[dict[str, Any], str]:
    """(metadata, text) of a card."""
    _, head, text = card.read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(head), text


def test_the_card_says_what_was_trained_how_and_how_well(make_trainer: Make, pairs: Any, tmp_path: Path) -> None:
    trainer = make_trainer(
        eval_dataset=pairs(6, seed=1),
        eval_strategy="steps",
        eval_on_start=True,
        max_steps=3,
        loss_type=["sigmoid", "sft"],
        loss_weights=[1.0, 0.2],
        beta=0.3,
        learning_rate=3e-3,
    )
    trainer.train()
    assert not (tmp_path / "run" / "README.md").exists()
    trainer.save_model()
    metadata, text = parts(tmp_path / "run" / "README.md")
    assert metadata["library_name"] == "transformers"
    assert metadata["pipeline_tag"] == "text-generation"
    assert {"dpo", "dpo-kernels"} <= set(metadata["tags"])
    assert "base_model" not in metadata, "a folder of this machine is nothing that a hub knows"
    for name in ("sigmoid", "sft"):
        assert OBJECTIVES[name].formula in text
        assert OBJECTIVES[name].source in text
    assert "**sft**, weight 0.2" in text
    assert "train_dataset: 24 of 24 pairs kept" in text
    evals = [record for record in trainer.state.log_history if "eval_loss" in record]
    assert f"| loss | {evals[0]['eval_loss']:.4f} | {evals[-1]['eval_loss']:.4f} |" in text
    assert f"{evals[-1]['eval_rewards/accuracies']:.1%} |" in text
    assert "* `learning_rate`: `0.003`" in text
    assert "torch " in text
    assert "&amp;" not in text, "Markdown is not escaped as HTML"
    assert str(tmp_path) not in text, "nothing of this machine's folders"
    assert "\n\n\n" not in text


def test_an_adapter_is_an_adapter_and_checkpoints_have_no_card(make_trainer: Make, tmp_path: Path) -> None:
    trainer = make_trainer(peft_config=LORA, max_steps=2, save_strategy="steps", save_steps=1)
    trainer.model.get_base_model().config._name_or_path = "someone/tiny-model"
    trainer.train()
    trainer.save_model(str(tmp_path / "elsewhere"))
    metadata, text = parts(tmp_path / "elsewhere" / "README.md")
    assert metadata["library_name"] == "peft"
    assert metadata["base_model"] == "someone/tiny-model"
    assert "An adapter for someone/tiny-model" in text
    assert "The run had no evaluation data" in text
    card = tmp_path / "run" / "checkpoint-2" / "README.md"
    assert not card.exists() or "Direct Preference Optimization" not in card.read_text()  # peft's own, if any


def test_a_push_takes_the_card_along(make_trainer: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pushed: dict[str, Any] = {}

    class Repo:
        repo_id = "me/tiny-dpo"

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda *_, **__: Repo)

    def upload(self: Any, **options: Any) -> str:
        pushed.update(options)
        pushed["card"] = (Path(options["folder_path"]) / "README.md").read_text()
        return "done"

    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", upload)
    trainer = make_trainer(max_steps=1)
    trainer.train()
    trainer.push_to_hub(model_name="tiny-dpo", license="apache-2.0", tags="mine", dataset_tags="me/pairs")
    assert pushed["repo_id"] == "me/tiny-dpo"
    metadata = yaml.safe_load(pushed["card"].split("---\n")[1])
    assert metadata["model_name"] == "tiny-dpo"
    assert metadata["license"] == "apache-2.0"
    assert metadata["datasets"] == "me/pairs"
    assert "mine" in metadata["tags"]
    assert (tmp_path / "run" / "model.safetensors").exists()


def test_the_front_matter_is_what_a_hub_takes(make_trainer: Make, tmp_path: Path) -> None:
    base = tmp_path / "models--someone--tiny/snapshots/abc"
    base.mkdir(parents=True)
    (base / "README.md").write_text("---\nlicense: apache-2.0\ntags:\n- x\n---\n# Tiny\n", encoding="utf-8")
    trainer = make_trainer(max_steps=1)
    trainer.model.config._name_or_path = str(base)
    trainer.train()
    (tmp_path / "run" / "settings.json").write_text(json.dumps({"train_data": "someone/pairs:train"}))
    trainer.save_model()
    data = ModelCard.load(tmp_path / "run" / "README.md").data
    assert (data.base_model, data.license, data.datasets) == ("someone/tiny", "apache-2.0", ["someone/pairs"])
    assert data.to_dict()["base_model_relation"] == "finetune"
    assert (data.library_name, data.pipeline_tag) == ("transformers", "text-generation")
    assert str(tmp_path) not in (tmp_path / "run" / "README.md").read_text()


def test_a_damaged_card_of_the_base_gives_no_licence(make_trainer: Make, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: [unclosed\n---\n", encoding="utf-8")
    trainer = make_trainer(max_steps=1)
    trainer.model.config._name_or_path = str(tmp_path)
    trainer.train()
    trainer.save_model()
    assert "license" not in parts(tmp_path / "run" / "README.md")[0]


def test_settings_that_nobody_set_are_not_in_the_card(make_trainer: Make, tmp_path: Path) -> None:
    trainer = make_trainer(max_steps=1, eval_dataset=build_pairs(4), eval_strategy="steps")
    trainer.train()
    trainer.save_model()
    _, text = parts(tmp_path / "run" / "README.md")
    assert "eval_strategy" in text
    assert "do_eval" not in text, "which follows from eval_strategy"
    assert "eval_steps" not in text, "which transformers takes from logging_steps"
    # dpo-train evaluates by default; its folder records the settings it was given.
    (tmp_path / "run" / "settings.json").write_text(json.dumps({"model": "m", "max_steps": 1}))
    trainer.save_model()
    settings = parts(tmp_path / "run" / "README.md")[1].partition("## Settings")[2].partition("##")[0]
    assert settings.split() == ["*", "`max_steps`:", "`1`"]


def test_settings_of_the_card_are_those_of_the_summary(make_trainer: Make, tmp_path: Path) -> None:
    trainer = make_trainer(max_steps=1, beta=0.5)
    trainer.train()
    trainer.save_model()
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    _, text = parts(tmp_path / "run" / "README.md")
    for key, value in summary["changed_settings"].items():
        assert (f"* `{key}`: `{value}`" in text) == (key != "output_dir"), key
