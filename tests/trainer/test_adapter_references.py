"""A model with an adapter starts from the right weights, has the right reference, and trains the right parameters."""

import copy
import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model

from dpo_trainer import ConfigError, DPOTrainer, ModelError, load_model, load_tokenizer
from dpo_trainer.cli import main
from dpo_trainer.model.references import AdapterOffReference, FrozenReference

from .tiny import build_model, build_pairs, build_tokenizer

Make = Callable[..., DPOTrainer]
LOG2 = math.log(2)


def lora(**given: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **given})


def moved(model: Any, scale: float = 0.1) -> Any:
    """The model with changed adapter weights, as if it had been trained."""
    torch.manual_seed(3)
    for name, value in model.named_parameters():
        if "lora_B" in name:
            value.data.normal_(0, scale)
    return model


def losses(trainer: DPOTrainer) -> list[float]:
    trainer.train()
    return [record["loss"] for record in trainer.state.log_history if "loss" in record]


@torch.no_grad()
def plain_logps(model: Any, rows: list[dict[str, Any]]) -> torch.Tensor:
    """Log-probabilities [2, rows] from a float64 forward of each sequence separately."""
    tokenizer, model = build_tokenizer(), copy.deepcopy(model).double().eval()
    found = []
    for side in ("chosen", "rejected"):
        for row in rows:
            prompt = len(tokenizer(row["prompt"])["input_ids"])
            ids = torch.tensor([tokenizer(row["prompt"] + row[side])["input_ids"] + [tokenizer.eos_token_id]])
            logits = model(input_ids=ids).logits[0, prompt - 1 : -1].log_softmax(-1)
            found.append(logits.gather(1, ids[0, prompt:, None]).sum())
    return torch.stack(found).view(2, -1)


def reference_of(trainer: DPOTrainer) -> torch.Tensor:
    dataset: Any = trainer.train_dataset
    return torch.tensor(trainer.reference_logps(dataset, batch_size=4), dtype=torch.float64)


@pytest.mark.parametrize("precomputed", [False, True], ids=["in memory", "precomputed"])
def test_a_trained_adapter_is_continued_against_itself(precomputed: bool, make_trainer: Make, make_model: Any) -> None:
    model = moved(get_peft_model(make_model(), lora()))
    rows = build_pairs(8)
    truth = plain_logps(model, rows)
    trainer = make_trainer(
        model=model, train_dataset=rows, filters=[], max_steps=3, precompute_ref_log_probs=precomputed
    )
    if precomputed:
        dataset: Any = trainer.train_dataset
        found = torch.tensor([dataset["ref_chosen_logps"], dataset["ref_rejected_logps"]], dtype=torch.float64)
    else:
        found = reference_of(trainer)
    assert torch.allclose(found, truth, atol=1e-4)
    seen = losses(trainer)
    assert seen[0] == pytest.approx(LOG2, abs=1e-6)
    assert min(seen[1:]) < LOG2 - 1e-4
    if not precomputed:
        assert torch.allclose(reference_of(trainer), truth, atol=1e-4), "the reference moved"
        reference: Any = trainer.reference
        shared = {value.data_ptr() for value in trainer.policy.model.parameters() if not value.requires_grad}
        own = [value for value in reference.split.model.parameters() if value.data_ptr() not in shared]
        assert sum(value.numel() for value in own) == sum(
            value.numel() for value in trainer.policy.model.parameters() if value.requires_grad
        ), "only the adapter is copied"


def test_a_fresh_adapter_needs_no_copy(make_trainer: Make, make_model: Any) -> None:
    given = make_trainer(model=get_peft_model(make_model(), lora()))
    assert isinstance(given.reference, AdapterOffReference)
    assert isinstance(make_trainer(peft_config=lora()).reference, AdapterOffReference)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_adapter_that_rewrites_the_base(init: str, make_trainer: Make, make_model: Any) -> None:
    rows = build_pairs(8)
    model = make_model()
    truth = plain_logps(model, rows)
    trainer = make_trainer(
        model=model, train_dataset=rows, filters=[], peft_config=lora(init_lora_weights=init), max_steps=2
    )
    assert torch.allclose(reference_of(trainer), truth, atol=1e-3)
    assert losses(trainer)[0] == pytest.approx(LOG2, abs=1e-6)
    assert torch.allclose(reference_of(trainer), truth, atol=1e-3), "the reference moved"


def _norms(model: Any) -> Any:
    for name, value in model.named_parameters():
        if "layer_norm" in name or "layernorm" in name:
            value.requires_grad_(True)
    return model


def _head(model: Any) -> Any:
    model.get_output_embeddings().weight.requires_grad_(True)
    return model


PLAIN = lora(target_modules=["query_key_value"])
BIAS = lora(bias="all", target_modules=["query_key_value"])


# A peft_config freezes all weights except the adapter, so only a given peft model can have trainable norms or a trainable head.
@pytest.mark.parametrize(
    ("config", "change", "given"),
    [
        (BIAS, None, True),
        (BIAS, None, False),
        (PLAIN, _norms, True),
        (PLAIN, _head, True),
    ],
    ids=["bias", "bias by peft_config", "norms", "head"],
)
def test_the_reference_stands_still_where_more_than_the_adapter_trains(
    config: Any, change: Any, given: bool, make_trainer: Make, make_model: Any
) -> None:
    rows = build_pairs(8)
    base = make_model("gpt-neox")
    truth = plain_logps(base, rows)
    model = get_peft_model(base, config) if given else base
    model = change(model) if change is not None else model
    trainer = make_trainer(
        model=model,
        train_dataset=rows,
        filters=[],
        peft_config=None if given else config,
        learning_rate=3e-2,
        max_steps=4,
    )
    assert isinstance(trainer.reference, FrozenReference)
    assert losses(trainer)[0] == pytest.approx(LOG2, abs=1e-6)
    assert torch.allclose(reference_of(trainer), truth, atol=1e-4), "the reference moved"


def test_a_module_that_the_adapter_saves_is_part_of_it(make_trainer: Make, make_model: Any) -> None:
    trainer = make_trainer(model=make_model("llama-untied"), peft_config=lora(modules_to_save=["lm_head"]), max_steps=3)
    assert isinstance(trainer.reference, AdapterOffReference)
    before = reference_of(trainer)
    trainer.train()
    assert torch.equal(reference_of(trainer), before)


def test_tokens_that_no_example_holds_count(make_trainer: Make, make_model: Any) -> None:
    """A trained embedding row has no effect on a batch without its token."""
    model = get_peft_model(make_model(), lora(trainable_token_indices=[5, 6]))
    for name, value in model.named_parameters():
        if "trainable_tokens_delta" in name:
            value.data.add_(1)
    assert isinstance(make_trainer(model=model).reference, FrozenReference)


def test_several_adapters_by_name(make_trainer: Make, make_model: Any) -> None:
    rows = build_pairs(8)
    base = make_model()
    model = get_peft_model(base, lora(), adapter_name="sft")
    moved(model)
    model.add_adapter("new", lora(r=2))
    model.set_adapter("sft")
    truth = plain_logps(model, rows)
    trainer = make_trainer(
        model=model,
        train_dataset=rows,
        filters=[],
        model_adapter_name="new",
        ref_adapter_name="sft",
        max_steps=2,
    )
    assert "'sft'" in trainer.reference_kind
    assert torch.allclose(reference_of(trainer), truth, atol=1e-4)
    kept = {name: value.clone() for name, value in model.named_parameters() if ".sft." in name}
    trainer.train()
    parameters = dict(model.named_parameters())
    assert all(torch.equal(parameters[name], value) for name, value in kept.items())
    assert any(".new." in name and value.requires_grad for name, value in parameters.items())
    assert torch.allclose(reference_of(trainer), truth, atol=1e-4)


@pytest.mark.parametrize("setting", ["model_adapter_name", "ref_adapter_name"])
def test_an_unknown_adapter_name(setting: str, make_trainer: Make, make_model: Any) -> None:
    model = get_peft_model(make_model(), lora(), adapter_name="policy")
    with pytest.raises(
        ConfigError, match=f"{setting}: the model has no adapter 'polcy'; it has policy .did you mean 'policy'"
    ):
        make_trainer(model=model, **{setting: "polcy"})
    with pytest.raises(ConfigError, match=f"{setting}: the model has no adapter 'x'; it has none"):
        make_trainer(**{setting: "x"})


# --- trained parameters ----------------------------------------------------------------------------------------------


def test_an_adapter_loaded_for_inference_is_refused(make_trainer: Make, make_model: Any, tmp_path: Path) -> None:
    moved(get_peft_model(make_model(), lora())).save_pretrained(tmp_path / "adapter")
    model = PeftModel.from_pretrained(make_model(), tmp_path / "adapter")
    trainer = make_trainer(model=model)
    with pytest.raises(
        ModelError, match=r"nothing would be trained, because no parameter requires a gradient; .*is_trainable=True"
    ):
        trainer.train()


def test_trainable_parameters_that_do_not_reach_the_loss(make_trainer: Make, make_model: Any) -> None:
    model = make_model().requires_grad_(False)
    model.unused = torch.nn.Linear(2, 2)
    with pytest.raises(ModelError, match=r"the loss depends on no trainable parameter .such as 'unused.weight'"):
        make_trainer(model=model).train()


def test_a_frozen_model_still_evaluates(make_trainer: Make, make_model: Any) -> None:
    trainer = make_trainer(model=make_model().requires_grad_(False), eval_dataset=build_pairs(4))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(LOG2, abs=1e-6)


# --- folders of adapters ---------------------------------------------------------------------------------------------


@pytest.fixture
def adapter_folder(model_folder: Path, tmp_path: Path) -> Path:
    model = get_peft_model(load_model(model_folder), lora())
    moved(model).save_pretrained(tmp_path / "sft")
    return tmp_path / "sft"


def logps_of(path: Path) -> torch.Tensor:
    return plain_logps(load_model(path), build_pairs(8))


def test_an_adapter_folder_is_loaded_with_its_model(adapter_folder: Path) -> None:
    model = load_model(adapter_folder)
    assert isinstance(model, PeftModel)
    assert sum(value.requires_grad for value in model.parameters()) > 0
    assert len(load_tokenizer(adapter_folder)) == len(build_tokenizer())


@pytest.mark.parametrize("kind", [PromptTuningConfig, PrefixTuningConfig])
def test_virtual_tokens_in_a_folder_go_on_training(
    kind: Any, model_folder: Path, tmp_path: Path, make_trainer: Make
) -> None:
    torch.manual_seed(5)
    saved = get_peft_model(load_model(model_folder), kind(num_virtual_tokens=4, task_type="CAUSAL_LM"))
    saved.save_pretrained(tmp_path / "prompt")
    trainer = make_trainer(model=str(tmp_path / "prompt"), learning_rate=0.1, max_steps=2)
    before = trainer.policy.model.prompt_encoder["default"].embedding.weight.detach().clone()
    assert losses(trainer)[0] == pytest.approx(LOG2, abs=1e-6)
    assert not torch.equal(before, trainer.policy.model.prompt_encoder["default"].embedding.weight)
    assert trainer.reference is not None
    assert torch.equal(before, trainer.reference.split.model.prompt_encoder["default"].embedding.weight)


def settings(here: Path, adapter: Path) -> list[str]:
    rows = "\n".join(json.dumps(row) for row in build_pairs(8))
    (here / "train.jsonl").write_text(rows)
    words = {
        "model": adapter,
        "train_data": here / "train.jsonl",
        "output_dir": here / "run",
        "max_steps": 2,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "filters": "[]",
        "write_report": "false",
        "save_strategy": "no",
    }
    return [word for key, value in words.items() for word in (f"--{key}", str(value))]


def first_loss(here: Path) -> float:
    return json.loads((here / "run/metrics.jsonl").read_text().splitlines()[0])["loss"]


def test_a_folder_of_an_adapter_goes_on_training(
    adapter_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "dpo_trainer"):
        assert main(settings(tmp_path, adapter_folder)) == 0
    assert "adapter: 'default' continues training" in caplog.text
    assert first_loss(tmp_path) == pytest.approx(LOG2, abs=1e-6)
    start, end = logps_of(adapter_folder), logps_of(tmp_path / "run")
    assert 1e-4 < (start - end).abs().max() < 1, "the saved adapter is the loaded one, a few steps on"


@pytest.mark.parametrize("extra", [[], ["--adapter", "merge"]], ids=["by itself", "asked for"])
def test_a_new_adapter_on_top_of_an_older_one(
    extra: list[str], adapter_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    words = [*settings(tmp_path, adapter_folder), "--lora.r", "2", "--lora.target_modules", "[q_proj]", *extra]
    with caplog.at_level(logging.INFO, "dpo_trainer"):
        assert main(words) == 0
    assert "adapter: 'default' is merged into the model, and a new one starts on top of it" in caplog.text
    assert first_loss(tmp_path) == pytest.approx(LOG2, abs=1e-6)
    start, end = logps_of(adapter_folder), logps_of(tmp_path / "run")
    assert 1e-5 < (start - end).abs().max() < 1, "the saved adapter stands on the merged model"
    base = load_model(tmp_path / "run" / "base")
    assert torch.allclose(plain_logps(base, build_pairs(8)), start, atol=1e-4)


def test_an_adapter_merged_and_the_whole_model_trained(adapter_folder: Path, tmp_path: Path) -> None:
    assert main([*settings(tmp_path, adapter_folder), "--adapter", "merge"]) == 0
    assert first_loss(tmp_path) == pytest.approx(LOG2, abs=1e-6)
    assert (tmp_path / "run/model.safetensors").exists()
    start, end = logps_of(adapter_folder), logps_of(tmp_path / "run")
    assert 1e-5 < (start - end).abs().max() < 10


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"adapter": "merge"}, "adapter: 'merge' needs a model with an adapter"),
        ({"adapter": "continue"}, "adapter: 'continue' needs a model with an adapter"),
        ({"adapter": "keep"}, "adapter: unknown 'keep'"),
    ],
)
def test_adapter_without_one(given: Any, message: str, make_trainer: Make) -> None:
    with pytest.raises(ConfigError, match=message):
        make_trainer(**given)


def test_continue_with_a_new_config_is_a_contradiction(make_trainer: Make, make_model: Any) -> None:
    with pytest.raises(ConfigError, match="'continue' trains the model's own adapter"):
        make_trainer(model=get_peft_model(make_model(), lora()), peft_config=lora(), adapter="continue")


def test_an_adapter_whose_model_is_gone(adapter_folder: Path, capsys: Any, tmp_path: Path) -> None:
    config = adapter_folder / "adapter_config.json"
    config.write_text(
        config.read_text().replace(str(load_model(adapter_folder).get_base_model().name_or_path), "/gone")
    )
    assert main(settings(tmp_path, adapter_folder)) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "is an adapter, whose base_model_name_or_path in adapter_config.json is '/gone'" in line


def test_an_adapter_that_names_no_model(make_model: Any, capsys: Any, tmp_path: Path) -> None:
    get_peft_model(make_model(), lora()).save_pretrained(tmp_path / "adapter")
    assert main(settings(tmp_path, tmp_path / "adapter")) == 2
    assert "names no base model; set base_model_name_or_path" in capsys.readouterr().err


def test_an_adapter_as_reference_model(adapter_folder: Path, make_trainer: Make) -> None:
    trainer = make_trainer(ref_model=adapter_folder, train_dataset=build_pairs(8), filters=[])
    assert torch.allclose(reference_of(trainer), logps_of(adapter_folder), atol=1e-4)


def test_the_seed_fixes_a_new_adapter(make_trainer: Make, make_model: Any) -> None:
    def first(seed: int) -> torch.Tensor:
        model: Any = make_trainer(peft_config=lora(), seed=seed).policy.model
        return next(value for name, value in model.named_parameters() if "lora_A" in name).detach().clone()

    assert torch.equal(first(1), first(1))
    assert not torch.equal(first(1), first(2))


def test_an_adapter_that_starts_away_from_the_model_is_told(
    make_trainer: Make, caplog: pytest.LogCaptureFixture
) -> None:
    config = lora(init_lora_weights=False)
    with caplog.at_level(logging.INFO, "dpo_trainer"):
        trainer = make_trainer(peft_config=config)
    assert "the first loss is not log 2" in caplog.text
    assert isinstance(trainer.reference, AdapterOffReference)
    assert torch.allclose(
        reference_of(trainer),
        plain_logps(build_model("llama-tied", len(build_tokenizer())), build_pairs(24)),
        atol=1e-4,
    )
