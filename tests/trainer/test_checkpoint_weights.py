"""Checkpoints of mixtures of experts, whose weights have other names than the model's. test_vision has vision-language models."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from dpo_trainer.model.checkpoint_weights import load_translated, saved_names

from .tiny import LLAMA, build_model, build_tokenizer, build_trainer


def build_mixture(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return MixtralForCausalLM(MixtralConfig(vocab_size=len(build_tokenizer()), num_local_experts=4, **LLAMA))


@pytest.mark.parametrize("largest_file", ["1GB", "30KB"])
def test_weights_are_those_that_were_saved(largest_file: str, tmp_path: Path) -> None:
    saved, other = build_mixture(0), build_mixture(1)
    saved.save_pretrained(tmp_path, max_shard_size=largest_file)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (largest_file == "30KB")
    assert not saved_names(tmp_path) <= set(saved.state_dict()), "no other names, so this test could not fail"
    assert load_translated(other, tmp_path)
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in saved.state_dict().items())


def test_weights_of_the_models_own_names_are_left_to_transformers(tmp_path: Path) -> None:
    model = build_model("llama-tied", 306)
    model.save_pretrained(tmp_path)
    assert not load_translated(model, tmp_path)


def test_a_resumed_run_of_a_mixture_takes_the_same_steps(tmp_path: Path) -> None:
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    whole = build_trainer(tmp_path, model=build_mixture(), **settings)
    whole.train()
    resumed = build_trainer(tmp_path, model=build_mixture(), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    found = resumed.policy.model.state_dict()
    assert all(torch.equal(value, found[name]) for name, value in whole.policy.model.state_dict().items())
