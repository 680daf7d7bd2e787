"""For every kind of peft adapter, the reference is the unchanged base model and all of the adapter gets a gradient."""

import json
import math
import os
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils.peft_types import PeftType
from torch.nn.functional import logsigmoid

from dpo_trainer import ConfigError, ModelError
from dpo_trainer.model.adapter_kinds import moved

from .tiny import build_model, build_pairs, build_tokenizer, build_trainer

#: Results for the table of adapters in docs/compatibility.md.
RESULTS = Path(__file__).resolve().parents[2] / "benchmarks/results/adapters.json"
VOCAB = len(build_tokenizer())
LINEAR = {"target_modules": ["q_proj", "v_proj", "down_proj"]}
VIRTUAL = {"num_virtual_tokens": 4}
#: Arguments of each kind's config: the fewest that fit the tiny model (hidden size 32).
KINDS: dict[str, dict[str, Any]] = {
    "PROMPT_TUNING": VIRTUAL,
    "MULTITASK_PROMPT_TUNING": VIRTUAL,
    "P_TUNING": {**VIRTUAL, "encoder_hidden_size": 16},
    "PREFIX_TUNING": VIRTUAL,
    "LORA": {**LINEAR, "r": 4},
    "ADALORA": {**LINEAR, "init_r": 4, "target_r": 2, "total_step": 20},
    "ADAMSS": {**LINEAR, "r": 8, "num_subspaces": 2},
    "BOFT": {**LINEAR, "boft_block_size": 4},
    "ADAPTION_PROMPT": {"adapter_len": 4, "adapter_layers": 2},
    "IA3": {**LINEAR, "feedforward_modules": ["down_proj"]},
    "BEFT": {"target_modules": ["v_proj"]},
    "LILY": {**LINEAR, "r": 4},
    "LOHA": {**LINEAR, "r": 4},
    "LOKR": {**LINEAR, "r": 4},
    "OFT": {**LINEAR, "oft_block_size": 8},
    "POLY": {**LINEAR, "r": 4},
    "LN_TUNING": {"target_modules": ["input_layernorm", "post_attention_layernorm"]},
    "VERA": {**LINEAR, "r": 8},
    "FROD": {**LINEAR, "progressbar": False},
    "PVERA": {**LINEAR, "r": 8},
    "FOURIERFT": {**LINEAR, "n_frequency": 50},
    "GLORA": {**LINEAR, "r": 4},
    "HRA": {**LINEAR, "r": 4},
    "VBLORA": {**LINEAR, "r": 4, "num_vectors": 16, "vector_length": 16},
    "UNILORA": {**LINEAR, "r": 4},
    "CPT": {"cpt_token_ids": [5, 6, 7, 8], "cpt_mask": [1] * 4, "cpt_tokens_type_mask": [1, 2, 3, 4]},
    "MISS": {**LINEAR, "r": 4},
    "RANDLORA": {**LINEAR, "r": 8},
    "ROAD": {**LINEAR, "group_size": 8},
    "TRAINABLE_TOKENS": {"token_indices": [70, 80, 90], "target_modules": ["embed_tokens"]},
    "HIRA": {**LINEAR, "r": 4},
    "SHIRA": {**LINEAR, "r": 4},
    "C3A": {**LINEAR, "block_size": 16},
    "WAVEFT": {**LINEAR, "n_frequency": 50},
    "OSF": LINEAR,
    "DELORA": {**LINEAR, "r": 4},
    "GRALORA": {**LINEAR, "r": 4},
    "CARTRIDGE": VIRTUAL,
    "TINYLORA": {**LINEAR, "r": 2, "u": 8},
    "PSOFT": {**LINEAR, "r": 8},
    "PEANUT": {**LINEAR, "r": 4},
    "SHADOW": {"r": 4},
    "SUPERTUNING": {"target_modules": ["q_proj", "v_proj"], "sparsity": 0.9},
    "DEFT": {**LINEAR, "r": 4},
    "XLORA": {"hidden_size": 32, "xlora_depth": 2, "xlora_size": 16},
}
#: Kinds that are always tested. Tests of the other kinds are slow tests.
SAMPLE = (
    "PROMPT_TUNING",
    "PREFIX_TUNING",
    "CPT",
    "LORA",
    "ADALORA",
    "ADAPTION_PROMPT",
    "IA3",
    "OFT",
    "VERA",
    "POLY",
    "LN_TUNING",
)
#: Kinds that are refused. Lily weighs its experts by a mean over the batch.
REFUSED = {"LILY": "looks ahead"}
NEEDS = {"ADAMSS": "sklearn"}


def with_adapter(kind: str, folder: Path, **settings: Any) -> Any:
    return peft.get_peft_model(*base_and_config(kind, folder, **settings))


def base_and_config(kind: str, folder: Path, **settings: Any) -> tuple[Any, Any]:
    base = build_model("llama-tied", VOCAB, 0)
    arguments = {**KINDS[kind], **settings}
    if kind == "XLORA":
        arguments["adapters"] = {}
        for index in range(2):
            expert = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
            peft.get_peft_model(build_model("llama-tied", VOCAB, 0), expert).save_pretrained(folder / str(index))
            arguments["adapters"][str(index)] = str(folder / str(index))
        base.config.use_cache = False
    torch.manual_seed(0)
    return base, PEFT_TYPE_TO_CONFIG_MAPPING[kind](task_type="CAUSAL_LM", **arguments)


def plain_logps(model: Any, dataset: Any, count: int, **inputs: Any) -> torch.Tensor:
    """Summed log-probabilities [2 * count], chosen first, each from a forward of one text."""
    found = []
    for side in ("chosen_ids", "rejected_ids"):
        for row in (dataset[index] for index in range(count)):
            ids = torch.tensor([row["prompt_ids"] + row[side]])
            logits = model(input_ids=ids, use_cache=False, **inputs).logits[0, -ids.shape[1] :]
            logps = logits[:-1].log_softmax(-1).gather(1, ids[0, 1:, None])
            found.append(logps[len(row["prompt_ids"]) - 1 :].sum())
    return torch.stack(found)


def sample(values: Any) -> list[Any]:
    return [pytest.param(value, marks=() if value in SAMPLE else pytest.mark.slow) for value in values]


def test_every_kind_of_peft_is_here() -> None:
    assert {kind.value for kind in PeftType} - set(KINDS) == set()


@pytest.mark.parametrize("layout", ["padded", "prefix_shared", "auto"])
@pytest.mark.parametrize("kind", sample(kind for kind in KINDS if kind not in REFUSED))
def test_policy_reference_and_gradient_are_those_of_plain_forwards(kind: str, layout: str, tmp_path: Path) -> None:
    if kind in NEEDS:
        pytest.importorskip(NEEDS[kind])
    base, config = base_and_config(kind, tmp_path)
    trainer = build_trainer(tmp_path / "run", model=base, peft_config=config, batch_layout=layout, beta=1.0)
    model = trainer.model
    task = {"task_ids": torch.zeros(1, dtype=torch.int64)} if kind in ("POLY", "MULTITASK_PROMPT_TUNING") else {}
    if layout == "prefix_shared":
        assert (trainer.data_collator.layout == "padded") == (trainer.policy.around is not None)
    count = 4
    batch = trainer.data_collator([dict(trainer.train_dataset[index]) for index in range(count)])
    base = build_model("llama-tied", VOCAB, 0).eval()
    model.eval()  # Poly and PVeRA are random in training
    with torch.no_grad():
        untouched = plain_logps(base, trainer.train_dataset, count)
        fresh = plain_logps(model, trainer.train_dataset, count, **task)
    if torch.allclose(untouched, fresh, atol=1e-5):  # otherwise a new adapter already has an effect
        assert trainer.compute_loss(model, batch).item() == pytest.approx(math.log(2), abs=1e-5)

    with moved(model):
        expected = plain_logps(model, trainer.train_dataset, count, **task)
        assert not torch.allclose(expected, untouched, atol=1e-4), "the adapter does nothing"
        margins = (expected - untouched).view(2, -1).diff(dim=0).neg()
        (-logsigmoid(margins)).mean().backward()
        gradients = {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
        model.zero_grad()
        loss, output = trainer.compute_loss(model, batch, return_outputs=True)
        loss.backward()
        found = torch.cat([output.chosen_logps, output.rejected_logps])
        reference = torch.cat([output.ref_chosen_logps, output.ref_rejected_logps])
        torch.testing.assert_close(found, expected.detach(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(reference, untouched, rtol=1e-5, atol=1e-5)
        assert any(gradient.any() for gradient in gradients.values())
        for name, value in model.named_parameters():
            if name in gradients:
                limit = 1e-4 * gradients[name].abs().max().item() + 1e-7
                torch.testing.assert_close(value.grad, gradients[name], rtol=1e-3, atol=limit)
            else:
                assert value.grad is None, name


def becomes(kind: str, folder: Path) -> dict[str, str]:
    """The loss path and layout that the trainer chooses for this kind of adapter, or why it is refused."""
    try:
        base, config = base_and_config(kind, folder)
        trainer = build_trainer(folder / "run", model=base, peft_config=config)
    except (ModelError, ConfigError) as error:
        return {"refused": str(error)}
    return {"head": trainer.loss_path, "layout": trainer.data_collator.layout, "why": trainer.policy.around or ""}


def test_what_becomes_of_a_sample(tmp_path: Path) -> None:
    known = json.loads(RESULTS.read_text(encoding="utf-8"))["kinds"]
    sample = (*SAMPLE, *REFUSED)
    assert {kind: becomes(kind, tmp_path / kind) for kind in sample} == {kind: known[kind] for kind in sample}


@pytest.mark.slow
def test_what_becomes_of_every_kind(tmp_path: Path) -> None:
    found = {kind: becomes(kind, tmp_path / kind) for kind in KINDS if kind not in NEEDS}
    assert {kind for kind, what in found.items() if "refused" in what} == set(REFUSED)
    if os.environ.get("DPO_WRITE_RESULTS") == "1":
        results = {"peft": peft.__version__, "kinds": found, "not_tried": NEEDS}
        RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


@pytest.mark.parametrize("kind", REFUSED)
def test_an_adapter_that_looks_ahead_is_refused(kind: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=f"its adapter {kind} looks ahead"):
        build_trainer(tmp_path / "run", model=with_adapter(kind, tmp_path))


def test_virtual_tokens_are_not_scored(tmp_path: Path) -> None:
    """Trains with whole logits and padded batches. The saved adapter gives the same logits as the trained one."""
    trainer = build_trainer(tmp_path / "run", model=with_adapter("PROMPT_TUNING", tmp_path), max_steps=2)
    assert (trainer.policy.split, trainer.loss_path, trainer.data_collator.layout) == (False, "logits", "padded")
    before = trainer.model.prompt_encoder["default"].embedding.weight.detach().clone()
    trainer.train()
    assert not torch.equal(trainer.model.prompt_encoder["default"].embedding.weight, before)
    trainer.save_model(str(tmp_path / "saved"))
    loaded = peft.PeftModel.from_pretrained(build_model("llama-tied", VOCAB, 0), tmp_path / "saved").eval()
    with torch.no_grad():
        for_saved = plain_logps(loaded, trainer.train_dataset, 3)
        torch.testing.assert_close(for_saved, plain_logps(trainer.model.eval(), trainer.train_dataset, 3))


def test_samples_are_written_behind_virtual_tokens(tmp_path: Path) -> None:
    model = with_adapter("PROMPT_TUNING", tmp_path)
    trainer = build_trainer(
        tmp_path / "run", model=model, eval_dataset=build_pairs(2, seed=1), sample_prompts=2, sample_max_new_tokens=3
    )
    trainer.train()
    trainer.evaluate()
    assert (tmp_path / "run/samples.jsonl").exists()


@pytest.mark.parametrize(
    ("kind", "settings", "said"),
    [
        ("MULTITASK_PROMPT_TUNING", {"num_tasks": 3}, "with 3 tasks needs the task of every pair"),
        ("POLY", {"n_tasks": 2}, "with 2 tasks needs the task of every pair"),
    ],
)
def test_tasks_that_pairs_do_not_have_are_refused(kind: str, settings: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=said):
        build_trainer(tmp_path / "run", model=with_adapter(kind, tmp_path, **settings))


@pytest.mark.parametrize("kind", ["PREFIX_TUNING", "CARTRIDGE"])
def test_a_cache_in_layers_that_are_computed_twice_is_refused(kind: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"gradient_checkpointing: .* {kind}"):
        build_trainer(tmp_path / "run", model=with_adapter(kind, tmp_path), gradient_checkpointing=True)


def test_virtual_tokens_take_positions(tmp_path: Path) -> None:
    config = peft.PromptTuningConfig(num_virtual_tokens=120, task_type="CAUSAL_LM")
    model = peft.get_peft_model(build_model("gpt2-learned-positions", VOCAB), config)
    with pytest.raises(ConfigError, match=r"\(of them 120 of the adapter\).* set max_length to 8 or less"):
        build_trainer(tmp_path, model=model)


def test_adalora_gives_its_ranks_away_and_goes_on_to_the_bit(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    schedule = {"tinit": 1, "tfinal": 2, "deltaT": 1, "total_step": 8}
    settings = {"max_steps": 7, "learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 3}

    def trainer() -> Any:
        return build_trainer(tmp_path / "run", model=with_adapter("ADALORA", tmp_path, **schedule), **settings)

    whole = trainer()
    whole.train()
    used = [value.ne(0).sum().item() for name, value in whole.model.named_parameters() if "lora_E" in name]
    assert sum(used) == 2 * len(used), "target_r of 2, on average"
    assert "total_step" not in caplog.text
    for step in (3, 6):
        resumed = trainer()
        resumed.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{step}"))
        assert all(map(torch.equal, resumed.model.parameters(), whole.model.parameters())), step
    late = build_trainer(tmp_path / "late", model=with_adapter("ADALORA", tmp_path, total_step=100), max_steps=1)
    late.train()
    assert "ADALORA: reaches target_r at step 100 (total_step - tfinal), but the run has 1" in caplog.text
