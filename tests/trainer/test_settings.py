"""Settings that save memory or time, each with the fused head: LoRA, checkpointing, autocast, torch.compile, quantisation."""

import json
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from peft import LoraConfig
from torch import nn
from transformers import TrainerCallback

from dpo_trainer import ConfigError, DPOConfig, DPOTrainer
from dpo_trainer.cli.main import main

from .tiny import build_pairs

Make = Callable[..., DPOTrainer]
LORA = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
#: The model is traced, since tracing is where a graph could break, but not compiled to C++. A trace takes 10 s whatever the
#: model's size, so most combinations are marked slow.
COMPILED = {"torch_compile": True, "torch_compile_backend": "eager"}

CHECKPOINTED = {"gradient_checkpointing": True}


def step(trainer: DPOTrainer) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of a run's first step. Trains, because transformers applies some settings only then."""
    found: dict[str, torch.Tensor] = {}

    class Keep(TrainerCallback):
        def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
            for name, parameter in trainer.model.named_parameters():
                if parameter.grad is not None:
                    found[name] = parameter.grad.clone()

    trainer.add_callback(Keep())
    trainer.train()
    return trainer.state.log_history[0]["loss"], found


@pytest.mark.parametrize(
    ("settings", "tolerance", "adapter"),
    [
        (CHECKPOINTED, 1e-6, None),
        (CHECKPOINTED, 1e-6, LORA),
        ({**CHECKPOINTED, "gradient_checkpointing_kwargs": {"use_reentrant": True}}, 1e-6, LORA),
        ({"bf16": True}, 0.1, LORA),
        pytest.param(COMPILED, 1e-5, None, marks=pytest.mark.slow),
        pytest.param({"bf16": True, **CHECKPOINTED, **COMPILED}, 0.1, LORA, marks=pytest.mark.slow),
    ],
    ids=["checkpointing", "checkpointing-lora", "reentrant-lora", "bf16-lora", "compile", "all-lora"],
)
def test_the_same_gradients_with_the_fused_head(
    settings: dict[str, Any], tolerance: float, adapter: Any, make_trainer: Make, make_model: Any
) -> None:
    results = []
    for given in ({}, settings):
        torch.manual_seed(0)
        torch._dynamo.reset()
        trainer = make_trainer(
            model=make_model("llama-untied"),
            ref_model=make_model("llama-untied", seed=1),
            peft_config=adapter,
            max_steps=1,
            max_grad_norm=0.0,
            diagnostics={"probe_pairs": 1},
            **given,
        )
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(1))
        assert trainer.loss_path == "linear"
        results.append(step(trainer))
    (loss, gradients), (other_loss, other_gradients) = results
    assert other_loss == pytest.approx(loss, rel=tolerance)
    assert other_gradients.keys() == gradients.keys()
    assert gradients
    for name, gradient in gradients.items():
        assert (other_gradients[name] - gradient).norm() <= tolerance * gradient.norm() + 1e-7, name


def test_checkpointing_runs_the_backbone_again_and_the_head_once(make_trainer: Make, make_model: Any) -> None:
    """Only the backbone is recomputed: recomputing logits too would cost the memory and time that the fused head saves."""
    counts = {"layer": 0, "head": 0}
    trainer = make_trainer(model=make_model("llama-untied"), **CHECKPOINTED, loss_type="simpo", max_steps=1)
    trainer.policy.backbone.layers[0].mlp.register_forward_pre_hook(lambda *_: counts.update(layer=counts["layer"] + 1))
    trainer.policy.head.register_forward_pre_hook(lambda *_: counts.update(head=counts["head"] + 1))
    trainer.remove_callback(trainer.diagnostics)  # it would run the model on the data first
    trainer.train()
    assert counts == {"layer": 2, "head": 1}


def test_compiling_compiles_the_backbone_and_trains(make_trainer: Make) -> None:
    torch._dynamo.reset()
    frames = torch._dynamo.utils.counters["frames"]
    frames.clear()
    trainer = make_trainer(max_steps=2, **COMPILED, loss_type="simpo", train_dataset=build_pairs(4))
    trainer.remove_callback(trainer.diagnostics)  # it would run other shapes first
    trainer.train()
    losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    assert frames["ok"] > 0
    assert losses[1] < losses[0], "the same four pairs twice"


def test_fp16_on_a_cpu_is_either_trained_or_refused_in_a_line(make_trainer: Make, make_model: Any) -> None:
    """float16 needs loss scaling, which needs an accelerator; without one, the error suggests bf16."""
    if torch.cuda.is_available():
        trainer = make_trainer(model=make_model(), fp16=True, use_cpu=False, max_steps=2)
        trainer.train()
        assert trainer.state.global_step == 2
        return
    with pytest.raises(ConfigError, match=r"fp16: .*bf16"):
        make_trainer(model=make_model(), fp16=True)


# --- quantised -----------------------------------------------------------------------------------------------------


class QuantisedLinear(nn.Linear):
    """Like a layer of bitsandbytes: 8-bit weights with a scale, and its own forward, in a subclass of nn.Linear."""

    def __init__(self, plain: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = plain.in_features, plain.out_features
        scale = plain.weight.detach().abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((plain.weight.detach() / scale).round().to(torch.int8), requires_grad=False)
        self.register_buffer("scale", scale)
        self.bias = None

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden @ (self.weight.to(hidden.dtype) * self.scale).T


def quantise(model: Any, *, head: bool) -> Any:
    for layer in model.model.layers:
        for name in ("gate_proj", "up_proj", "down_proj"):
            setattr(layer.mlp, name, QuantisedLinear(getattr(layer.mlp, name)))
    if head:
        model.lm_head = QuantisedLinear(model.lm_head)
    return model.requires_grad_(False)


@pytest.mark.parametrize("head", [False, True], ids=["16-bit head", "quantised head"])
def test_an_adapter_on_a_quantised_base_trains_and_a_quantised_head_is_noticed(
    head: bool, make_trainer: Make, make_model: Any, caplog: pytest.LogCaptureFixture
) -> None:
    model = quantise(make_model("llama-untied"), head=head)
    frozen = {name: value.clone() for name, value in model.state_dict().items()}
    with caplog.at_level(logging.INFO, "dpo_trainer"):
        trainer = make_trainer(model=model, peft_config=LORA, learning_rate=2e-2, max_steps=12, bf16=True)
    assert trainer.loss_path == ("logits" if head else "linear")
    assert ("the head is not a plain nn.Linear but QuantisedLinear" in caplog.text) == head
    trainer.train()
    losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    assert losses[0] == pytest.approx(0.6931472, abs=1e-6)
    assert sum(losses[-3:]) / 3 < 0.68
    for name, value in trainer.model.get_base_model().state_dict().items():
        if "lora_" not in name:
            assert torch.equal(value, frozen[name.replace(".base_layer", "")]), name
    trainable = [name for name, p in trainer.model.named_parameters() if p.requires_grad]
    assert all("lora_" in name for name in trainable)


# --- from the command line -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("compiled", [{}, pytest.param(COMPILED, marks=pytest.mark.slow)], ids=["", "compiled"])
def test_all_of_them_from_a_file(
    compiled: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_folder: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    torch._dynamo.reset()
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in build_pairs(24)))
    settings = {
        "model": str(model_folder),
        "train_data": "pairs.jsonl",
        "output_dir": "run",
        "lora": {"r": 4, "target_modules": ["q_proj", "v_proj"]},
        "gradient_checkpointing": True,
        "bf16": True,
        **compiled,
        "precompute_ref_log_probs": True,
        "learning_rate": 2e-2,
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "write_report": False,
    }
    Path("config.yaml").write_text(yaml.safe_dump(settings))
    assert main(["config.yaml", "--quiet"]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    # Precomputed sums come from another batch, and rounding under autocast depends on the batch.
    assert summary["first"]["loss"] == pytest.approx(0.6931472, abs=5e-3)
    assert summary["last"]["loss"] < summary["first"]["loss"]
    assert summary["trainable_parameters"] < summary["parameters"]
    assert (tmp_path / "run" / "adapter_model.safetensors").exists()


def test_config_takes_them(tmp_path: Path) -> None:
    config = DPOConfig(output_dir=str(tmp_path), bf16=True, gradient_checkpointing=True, **COMPILED)
    assert config.torch_compile


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"statistics": "kl"}, "statistics: expected a list of text, got 'kl'"),
        ({"filters": "identical"}, "filters: expected a list of text, got 'identical'"),
        ({"stop_on": None}, "stop_on: expected a list of text, got None"),
        ({"truncation_mode": None}, "truncation_mode: unknown 'None'; known are keep_end, keep_start"),
        ({"loss_path": [1]}, "loss_path: unknown '[1]'; known are auto, linear, logits"),
        ({"batch_layout": 0}, "batch_layout: unknown '0'; known are auto, padded, prefix_shared"),
        ({"seed": np.int64(-1)}, "seed: must lie in [0, 2**32), got -1"),
        ({"kl_coef": Decimal(-1)}, "kl_coef: must not be negative, got -1"),
        ({"max_length": np.int64(-3)}, "max_length: must be at least 2, got -3"),
        ({"learning_rate": "0.1"}, "learning_rate: expected a number, got '0.1'"),
        ({"beta": None}, "beta: expected a number, got None"),
        ({"beta": math.nan}, "beta: must be a positive number, got nan"),
    ],
    ids=str,
)
def test_values_that_come_from_python_are_checked_whatever_their_type(
    settings: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as found:
        DPOConfig(output_dir=str(tmp_path), **settings)
    assert str(found.value) == said


def test_a_field_that_a_subclass_declares_again_is_checked(tmp_path: Path) -> None:
    @dataclass
    class Mine(DPOConfig):
        beta: float = 0.5
        stop_on: list[str] = field(default_factory=lambda: ["kl_explodng"])

    with pytest.raises(ConfigError, match="beta: must be a positive number, got -1"):
        Mine(output_dir=str(tmp_path), beta=-1, stop_on=[])
    with pytest.raises(ConfigError, match="stop_on: unknown diagnosis 'kl_explodng'"):
        Mine(output_dir=str(tmp_path))
    assert Mine(output_dir=str(tmp_path), stop_on=[]).beta == 0.5
