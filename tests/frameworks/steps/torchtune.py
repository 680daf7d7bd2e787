"""torchtune's recipe lora_dpo_single_device: its setup from a config, its data loader and its training loop.

The recipe runs one training step for each call. Its optimizer is one that keeps the gradients instead of changing parameters.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ..compare import Size
from ..material import pairs_of

HERE = __name__


def model_of(vocab: int, hidden: int, layers: int, **lora: Any) -> torch.nn.Module:
    from torchtune.models.llama3 import lora_llama3

    torch.manual_seed(0)
    model = lora_llama3(
        vocab_size=vocab,
        embed_dim=hidden,
        num_layers=layers,
        num_heads=4,
        num_kv_heads=2,
        max_seq_len=1024,
        intermediate_dim=2 * hidden,
        **lora,
    )
    # LoRA starts with zeros in its second factor. With other values, the policy differs from its reference.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def tokenizer() -> SimpleNamespace:
    """What the recipe needs of a tokenizer; the rows have tokens already."""
    return SimpleNamespace(pad_id=0)


def rows_of(tokenizer: Any, **size: int) -> list[dict[str, list[int]]]:
    rows = []
    for pair in pairs_of(Size(**size)):
        ids = {name: [int(word[1:]) for word in text.split()] for name, text in pair.items()}
        row = {}
        for side in ("chosen", "rejected"):
            row[f"{side}_input_ids"] = ids["prompt"] + ids[side]
            row[f"{side}_labels"] = [-100] * len(ids["prompt"]) + ids[side]
        rows.append(row)
    return rows


class Keeps(torch.optim.Optimizer):
    """An optimizer that keeps the gradients and leaves the parameters unchanged."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.0})
        self.kept: list[Tensor | None] = []

    def step(self, closure: Any = None) -> None:
        self.kept = [parameter.grad for group in self.param_groups for parameter in group["params"]]


def constant(optimizer: Any, num_training_steps: int, last_epoch: int) -> SimpleNamespace:
    """A learning-rate schedule that changes nothing; torchtune 0.4 needs one."""
    return SimpleNamespace(step=lambda: None)


class Logger:
    """Keeps what the recipe logs."""

    def log_config(self, config: Any) -> None: ...

    def log_dict(self, payload: dict[str, Any], step: int) -> None:
        self.last = payload


def recipe_of(size: Size, folder: str) -> Any:
    import torchtune
    from omegaconf import OmegaConf

    path = Path(torchtune.__file__).parent.parent / "recipes" / "lora_dpo_single_device.py"
    spec = importlib.util.spec_from_file_location("lora_dpo_single_device", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    lora = {
        "lora_attn_modules": ["q_proj", "v_proj"],
        "apply_lora_to_mlp": True,
        "apply_lora_to_output": False,
        "lora_rank": 4,
        "lora_alpha": 8,
    }
    sizes = {"vocab": size.vocab, "hidden": size.hidden, "layers": size.layers}
    state = {name: tensor for name, tensor in model_of(**sizes, **lora).state_dict().items() if "lora" not in name}
    base = Path(folder) / "base"
    base.mkdir()
    torch.save(state, base / "model.pt")
    config = OmegaConf.create(
        {
            "output_dir": f"{folder}/out",
            "model": {"_component_": f"{HERE}.model_of", **sizes, **lora},
            "tokenizer": {"_component_": f"{HERE}.tokenizer"},
            "checkpointer": {
                "_component_": "torchtune.training.FullModelTorchTuneCheckpointer",
                "checkpoint_dir": str(base),
                "checkpoint_files": ["model.pt"],
                "recipe_checkpoint": None,
                "output_dir": f"{folder}/out",
                "model_type": "LLAMA3",
            },
            "resume_from_checkpoint": False,
            "dataset": {"_component_": f"{HERE}.rows_of", **vars(size)},
            "seed": 1,
            "shuffle": False,
            "batch_size": size.pairs,
            "optimizer": {"_component_": f"{HERE}.Keeps"},
            "lr_scheduler": {"_component_": f"{HERE}.constant"},
            "loss": {"_component_": "torchtune.rlhf.loss.DPOLoss"},
            "epochs": 1,
            "max_steps_per_epoch": 1,
            "gradient_accumulation_steps": 1,
            "enable_activation_checkpointing": False,
            "compile": False,
            "metric_logger": {"_component_": f"{HERE}.Logger"},
            "device": "cpu",
            "dtype": "fp32",
        }
    )
    recipe = module.LoRADPORecipeSingleDevice(config)
    recipe.setup(config)
    recipe.save_checkpoint = lambda epoch: None
    return recipe


def step_of(size: Size) -> Callable[[], tuple[float, dict[str, Tensor]]]:
    with tempfile.TemporaryDirectory() as folder:
        recipe = recipe_of(size, folder)
    names = [name for name, _ in recipe._model.named_parameters()]

    def step() -> tuple[float, dict[str, Tensor]]:
        recipe.epochs_run = 0
        recipe.train()
        grads = dict(zip(names, recipe._optimizer.kept, strict=True))
        return recipe._metric_logger.last["loss"], {name: grad for name, grad in grads.items() if grad is not None}

    return step


def versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("torchtune", "torchao")}
