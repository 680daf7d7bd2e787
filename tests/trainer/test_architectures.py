"""For every architecture, with and without LoRA, in every layout: log-probabilities of a plain forward, first loss log 2.

The slow test tries all architectures of transformers and, if DPO_WRITE_RESULTS is 1, writes
benchmarks/results/architectures.json. docs/compatibility.md shows from it which are supported, slower or refused. A sample of
the architectures is always tested.
"""

import copy
import itertools
import json
import logging
import math
import os
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from dpo_trainer import DPOTrainer, UsageError

from . import architectures
from .tiny import build_pairs, build_tokenizer

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks/results/architectures.json"
#: One architecture for each difference: learned, rotary and relative positions, windows, softcaps, experts, latent attention,
#: recurrence, an unusual head, several kinds of layers, no causal attention.
SAMPLE = (
    "bert",
    "bloom",
    "deepseek_v3",
    "electra",
    "gemma3_text",
    "gemma4_text",
    "gpt_oss",
    "mamba",
    "mixtral",
    "modernbert-decoder",
    "opt",
    "phi3",
    "qwen3_next",
)
LAYOUTS = ("auto", "padded", "prefix_shared")
#: The last row is longer than the sliding windows in `architectures`.
ROWS = [
    *build_pairs(5),
    {"prompt": " ".join(["film", "review", "the"] * 5), "chosen": " great good" * 3, "rejected": " bad" * 5},
]


def build(model_type: str) -> Any:
    """A tiny model that can be run, or None."""
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            model = architectures.tiny(model_type, len(build_tokenizer()))
            model(input_ids=torch.tensor([[3, 4, 5, 6]]))
    except Exception:  # a config or a model may raise anything for unsuitable sizes
        return None
    return model


def lora(model: Any) -> LoraConfig:
    """LoRA on linear layers, except the head, routers, grouped layers, and layers that peft refuses (Mamba's out_proj)."""
    head = model.get_output_embeddings()
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D))
        and module is not head
        and not re.search(r"router|gate$|out_proj", name)
        and "Grouped" not in type(module).__name__
    ]
    return LoraConfig(r=4, target_modules=names, task_type="CAUSAL_LM")


@torch.no_grad()
def plain_logps(model: Any) -> Tensor:
    """Log-probabilities [2 * rows] of the whole model for each sequence separately, in float64 (float32 if unsupported)."""
    tokenizer = build_tokenizer()

    def logps(model: Any) -> Tensor:
        found = []
        for side, row in itertools.product(("chosen", "rejected"), ROWS):
            prompt = len(tokenizer(row["prompt"])["input_ids"])
            ids = torch.tensor([tokenizer(row["prompt"] + row[side])["input_ids"] + [tokenizer.eos_token_id]])
            logits = model(input_ids=ids, use_cache=False).logits[0, prompt - 1 : -1].double().log_softmax(-1)
            found.append(logits.gather(1, ids[0, prompt:, None]).sum())
        return torch.stack(found)

    exact = copy.deepcopy(model).double().eval()
    base = exact.get_base_model() if hasattr(exact, "get_base_model") else exact
    base.set_experts_implementation("eager")  # the default does not support float64
    try:
        return logps(exact)
    except RuntimeError:
        return logps(model.eval())


def differ(found: Tensor, truth: Tensor) -> float:
    """The largest difference of log-probabilities, relative to the true log-probabilities."""
    return ((found.double() - truth) / truth.abs()).abs().max().item()


def answers(trainer: DPOTrainer) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of policy and reference, and losses, of all rows in one batch."""
    dataset: Any = trainer.train_dataset
    batch = trainer._prepare_inputs(trainer.data_collator([dataset[index] for index in range(len(ROWS))]))
    trainer.policy.model.eval()
    with torch.no_grad():
        output = trainer.pair_loss(batch, torch.ones(len(ROWS)))
    policy = torch.cat([output.chosen_logps, output.rejected_logps])
    return policy, torch.cat([output.ref_chosen_logps, output.ref_rejected_logps]), output.losses


def tried(model_type: str, make_trainer: Callable[..., DPOTrainer], caplog: pytest.LogCaptureFixture) -> dict[str, Any]:
    """The trainer's choices for an architecture. Checks the numbers in every layout, with and without an adapter."""
    kind = type(build(model_type)).__name__
    found: dict[str, Any] = {"class": kind}
    for adapter, layout in itertools.product((False, True), LAYOUTS):
        model = build(model_type)
        truth = plain_logps(model)
        caplog.clear()
        try:
            with caplog.at_level(logging.INFO, "dpo_trainer"):
                trainer = make_trainer(
                    model=model,
                    train_dataset=ROWS,
                    filters=[],
                    batch_layout=layout,
                    peft_config=lora(model) if adapter else None,
                )
        except UsageError as error:
            if adapter:  # the model itself was accepted
                raise
            return {**found, "refused": str(error)}
        where = f"{model_type}, {layout}, {'LoRA' if adapter else 'whole'}"
        policy, reference, losses = answers(trainer)
        assert differ(policy, truth) < 1e-5, where
        assert differ(reference, truth) < 1e-5, where
        assert (losses - math.log(2)).abs().max() < 1e-6, where
        if adapter:
            torch.manual_seed(1)
            for name, value in trainer.policy.model.named_parameters():
                if "lora_B" in name:
                    value.data.normal_(0, 0.1)
            policy, reference, _ = answers(trainer)
            moved = plain_logps(trainer.policy.model)
            assert differ(moved, truth) > 1e-4, where
            assert differ(policy, moved) < 1e-5, where
            assert differ(reference, truth) < 1e-5, where
        if not adapter and layout == "auto":
            collator: Any = trainer.data_collator
            shared = collator.layout != "padded"
            found |= {
                "layout": "by sequence" if collator.by_sequence else "shared rows" if shared else "padded",
                "head": trainer.loss_path,
                "said": [
                    r.getMessage() for r in caplog.records if r.name == "dpo_trainer" and r.levelno >= logging.WARNING
                ],
            }
    return found


@pytest.mark.parametrize("model_type", SAMPLE)
def test_log_probabilities_of_a_sample(
    model_type: str, make_trainer: Callable[..., DPOTrainer], caplog: pytest.LogCaptureFixture
) -> None:
    found = tried(model_type, make_trainer, caplog)
    assert found == json.loads(RESULTS.read_text(encoding="utf-8"))["architectures"][model_type]


@pytest.mark.slow
def test_log_probabilities_of_every_architecture(
    make_trainer: Callable[..., DPOTrainer], caplog: pytest.LogCaptureFixture
) -> None:
    found, unbuilt, wrong = {}, [], []
    for model_type in architectures.names():
        if build(model_type) is None:
            unbuilt.append(model_type)
            continue
        try:
            found[model_type] = tried(model_type, make_trainer, caplog)
        except Exception as error:  # one failure must not stop the loop
            wrong.append(f"{model_type}: {type(error).__name__}: {error}"[:300])
    assert wrong == []
    assert len(found) > 150
    if os.environ.get("DPO_WRITE_RESULTS") == "1":
        results = {"transformers": transformers.__version__, "architectures": found, "not_tried": unbuilt}
        RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
