"""dpo-train inspect shows the figures of the run that would follow, and trains and writes nothing."""

import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig

from dpo_trainer import DPOConfig
from dpo_trainer.cli.inspect import Inspector, SelfReference, _histogram, render
from dpo_trainer.cli.main import main

from .tiny import build_model, build_pairs, build_tokenizer, build_trainer

LORA = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


def name_of(value: Any) -> str:
    """The name of a case. (peft's configs print a set, whose order differs between processes.)"""
    return "lora" if isinstance(value, dict) and "peft_config" in value else str(value)


@pytest.fixture
def inspector(tmp_path: Path) -> Callable[..., Inspector]:
    def make(model: Any = None, peft_config: Any = None, ref_model: Any = None, **settings: Any) -> Inspector:
        tokenizer = build_tokenizer()
        fixed = {"output_dir": str(tmp_path / "nowhere"), "per_device_train_batch_size": 4, "use_cpu": True}
        return Inspector(
            model or build_model("llama-tied", len(tokenizer)),
            ref_model,
            args=DPOConfig(**{**fixed, **settings}),
            train_dataset=build_pairs(24),
            processing_class=tokenizer,
            peft_config=peft_config,
        )

    return make


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_folder: Path) -> Path:
    monkeypatch.chdir(tmp_path)
    rows = build_pairs(30)
    rows[3]["rejected"] = rows[3]["chosen"]
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "model": str(model_folder),
        "train_data": "pairs.jsonl",
        "per_device_train_batch_size": 4,
        "use_cpu": True,
    }
    Path("config.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_it_tells_what_a_reader_wants_to_know_and_writes_nothing(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = tree(here)
    assert main(["inspect", "config.yaml", "--num_train_epochs", "3"]) == 0
    assert tree(here) == before
    shown = capsys.readouterr().out
    for words in (
        "29 of 30 pairs kept",
        "1 with chosen equal to rejected",
        "prompt: mean",
        "#####",
        "no log-probabilities are known",
        "<|end|>",
        "pair 1\n",
        "pair 15\n",
        "pair 29\n",
        "28,384 of 28,384 parameters trained",
        "reference        0.1 MiB (a frozen model)",
        "whole_pairs",
        "steps            24, 8 per epoch",
        "an estimate",
    ):
        assert words in shown, words


def test_json_is_one_object_and_kept_references_are_told(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["config.yaml", "--precompute_ref_log_probs", "true"]
    assert main([*words, "--output_dir", "run", "--max_steps", "1", "--quiet", "--write_report", "false"]) == 0
    capsys.readouterr()
    assert main(["inspect", *words, "--json", "--quiet"]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    found = json.loads(shown.out)
    figures = found["reference"]["train_dataset"]
    assert figures["pairs"] == 29
    assert 0 < figures["accuracy"] < 1
    assert figures["margin_std"] > 0
    assert found["plan"]["reference_bytes"] == 0, "precomputed: no model stays"
    assert "chosen likelier in" in render(found)


def test_mistakes_are_told_as_in_a_run(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "config.yaml", "--beta", "-1"]) == 2
    assert "beta: must be a positive number" in capsys.readouterr().err
    assert main(["inspect", "--model", "x"]) == 2
    assert "train_data: not given" in capsys.readouterr().err


def test_nothing_moves(inspector: Callable[..., Inspector]) -> None:
    found = inspector(loss_type="bco_running", weight_decay=0.1)
    before = {name: value.clone() for name, value in found.model.state_dict().items()}
    mean = found._objectives[0].mean.clone()
    found.inspect()
    assert all(torch.equal(value, before[name]) for name, value in found.model.state_dict().items())
    assert all(parameter.grad is None for parameter in found.model.parameters())
    assert torch.equal(found._objectives[0].mean, mean), "an objective's running mean neither"


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"bf16": True},
        {"loss_type": "simpo"},
        {"loss_type": "tdpo2"},
        {"kl_coef": 0.2},
        {"loss_type": "aot"},
        {"precompute_ref_log_probs": True},
        {"peft_config": LORA},
        {"memory_budget": "20KB"},
        {"grad_filter": 1e-3},
        {"grad_filter": 1e-3, "statistics": []},
        {"statistics": ["accuracy"]},
    ],
    ids=name_of,
)
def test_the_plan_of_the_head_is_the_one_that_training_makes(
    settings: dict[str, Any], inspector: Callable[..., Inspector], tmp_path: Path, caplog: Any
) -> None:
    """The library's plan for a training batch and the inspection's plan are equal, except for the reason."""
    found = inspector(**settings)
    strategy = found._time(found._batches())["head_of_timed_batch"].partition(":")[0]
    trainer = build_trainer(tmp_path / "run", **settings)
    batch = trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[index] for index in range(4)]))
    trainer.model.train()
    with caplog.at_level(logging.DEBUG, "dpo_kernels.linear"):
        trainer.compute_loss(trainer.model, batch)
    said = next(m for m in caplog.messages if " scored tokens in " in m).partition(";")[0]
    assert found.plan_of(batch, strategy).describe().partition(";")[0] == said


@pytest.mark.parametrize(
    ("settings", "reference"),
    [
        ({}, "copy"),
        ({"peft_config": LORA}, 0),
        ({"loss_type": "simpo"}, 0),
        ({"precompute_ref_log_probs": True}, 0),
        ({"ref_model": "given"}, "copy"),
    ],
    ids=name_of,
)
def test_memory_is_that_of_the_run(settings: dict[str, Any], reference: Any, inspector: Any, tmp_path: Path) -> None:
    settings = {
        **settings,
        **({"ref_model": build_model("llama-tied", len(build_tokenizer()), seed=1)} if "ref_model" in settings else {}),
    }
    found = inspector(**settings)
    plan = found._model_plan()
    own = sum(p.numel() * p.element_size() for p in found.model.parameters())
    trained = sum(p.numel() * p.element_size() for p in found.model.parameters() if p.requires_grad)
    assert plan["weights_bytes"] == own
    assert plan["gradients_bytes"] == trained
    assert plan["reference_bytes"] == (own if reference == "copy" else reference)
    if not settings:
        assert isinstance(found.reference, SelfReference), "no copy is made to count its bytes"
        trainer = build_trainer(tmp_path / "run", max_steps=1)
        trainer.train()
        states = trainer.optimizer.state_dict()["state"].values()
        held = sum(v.numel() * v.element_size() for s in states for v in s.values() if torch.is_tensor(v) and v.dim())
        assert plan["optimizer_bytes"] == held
    assert inspector(**settings, optim="adafactor")._model_plan()["optimizer_bytes"] is None


def test_every_length_falls_into_one_bar() -> None:
    for values in ([5], [1, 1, 2], list(range(1, 100)), [3, 1000], [7] * 4 + [8]):
        histogram = _histogram(values)
        assert sum(bar["pairs"] for bar in histogram["bins"]) == len(values)
        assert len(histogram["bins"]) <= 8
        assert math.isclose(histogram["mean"], sum(values) / len(values))
