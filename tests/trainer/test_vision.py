"""Vision-language models equal a plain forward of the whole model on one sequence with its images at a time."""

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import PreTrainedTokenizerFast

from dpo_trainer import DPOTrainer
from dpo_trainer.errors import ConfigError, DataError, ModelError
from dpo_trainer.model.loading import load_model, load_parts

from .tiny import build_model, build_tokenizer, build_trainer
from .vision import KINDS, build_image, build_processor, build_vision_model, vision_pairs

BETA = 0.1


def build(folder: Path, kind: str = "llava", *, double: bool = False, **settings: Any) -> DPOTrainer:
    """A trainer of a tiny vision-language model."""
    model = settings.pop("model", None) or build_vision_model(kind)
    processor = settings.pop("processing_class", None) or build_processor(kind)
    settings.setdefault("train_dataset", vision_pairs(8))
    return build_trainer(folder, model=model.double() if double else model, processing_class=processor, **settings)


def plain_logps(model: Any, processor: Any, row: dict[str, Any], side: str) -> torch.Tensor:
    """The sum of the answer's log-probabilities, from a forward of the whole model on this row and its images."""
    places = [{"type": "image"} for _ in row["images"]]
    content = [*places, {"type": "text", "text": row["prompt"][0]["content"]}]
    prompt = [{"role": "user", "content": content}]
    answer = [{"role": "assistant", "content": [{"type": "text", "text": row[side][0]["content"]}]}]

    def encode(messages: Any, **options: Any) -> Any:
        text = processor.apply_chat_template(messages, tokenize=False, **options)
        images = [row["images"]] if row["images"] else None
        return processor(text=[text], images=images, add_special_tokens=False, return_tensors="pt")

    start = encode(prompt, add_generation_prompt=True)["input_ids"][0]
    inputs = encode([*prompt, *answer])
    ids = inputs["input_ids"][0]
    assert ids[: len(start)].tolist() == start.tolist()
    dtype = next(model.parameters()).dtype
    given = {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}
    logps = model(**given).logits[0, :-1].log_softmax(-1)
    return logps.gather(-1, ids[1:, None])[len(start) - 1 :].sum()


def plain_loss(policy: Any, reference: Any, processor: Any, rows: list[dict[str, Any]]) -> torch.Tensor:
    """The mean DPO loss (arXiv:2305.18290, eq. 7) of the rows."""
    margins = []
    for row in rows:
        ours = [plain_logps(policy, processor, row, side) for side in ("chosen", "rejected")]
        with torch.no_grad():
            theirs = [plain_logps(reference, processor, row, side) for side in ("chosen", "rejected")]
        margins.append(BETA * (ours[0] - theirs[0] - ours[1] + theirs[1]))
    return -torch.nn.functional.logsigmoid(torch.stack(margins)).mean()


@pytest.mark.parametrize("kind", KINDS)
def test_log_probabilities_are_those_of_the_whole_model(kind: str, tmp_path: Path) -> None:
    rows = vision_pairs(7, images=(1, 3, 0, 2))
    trainer = build(tmp_path, kind, double=True, train_dataset=rows)
    assert trainer.policy.split
    assert trainer.loss_path == "linear"
    found = trainer.reference_logps(trainer.train_dataset, batch_size=3)
    model, processor = build_vision_model(kind).double().eval(), build_processor(kind)
    with torch.no_grad():
        for side, values in zip(("chosen", "rejected"), found, strict=True):
            expected = [plain_logps(model, processor, row, side).item() for row in rows]
            assert values == pytest.approx(expected, rel=1e-5)
        seen = plain_logps(model, processor, rows[0], "chosen").item()
        other = plain_logps(model, processor, {**rows[0], "images": [build_image(99)]}, "chosen").item()
    assert abs(seen - other) > 1e-3, "the images make no difference, so this test could not fail"


@pytest.mark.parametrize("loss_path", ["linear", "logits"])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_those_of_plain_pytorch(kind: str, loss_path: str, tmp_path: Path) -> None:
    rows = vision_pairs(4)
    trainer = build(
        tmp_path, kind, double=True, train_dataset=rows, loss_path=loss_path, train_sampling_strategy="sequential"
    )
    policy, processor = build_vision_model(kind).double(), build_processor(kind)
    reference = copy.deepcopy(policy).eval()
    batch = trainer._prepare_inputs(trainer.data_collator([dict(row) for row in trainer.train_dataset]))
    trainer.model.train()
    assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(math.log(2), rel=1e-6)
    with torch.no_grad():  # change the policy, because at the start all pairs have the same coefficient
        for model in (trainer.policy.model, policy):
            for number, parameter in enumerate(model.parameters()):
                torch.manual_seed(number)
                parameter.add_(torch.randn_like(parameter), alpha=0.02)
    loss = trainer.compute_loss(trainer.model, batch)
    expected = plain_loss(policy, reference, processor, rows)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    expected.backward()
    found, wanted = dict(trainer.policy.model.named_parameters()), dict(policy.named_parameters())
    towers = [name for name in wanted if "vis" in name and wanted[name].grad is not None]
    assert len(towers) > 8
    assert all(found[name].grad.abs().max() > 0 for name in towers if name.endswith("proj.weight"))
    for name, parameter in wanted.items():
        if parameter.grad is None:
            assert found[name].grad is None or found[name].grad.abs().max() < 1e-12, name
            continue
        torch.testing.assert_close(found[name].grad, parameter.grad, rtol=1e-4, atol=1e-8, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_training_lowers_the_loss_from_log_2(kind: str, tmp_path: Path) -> None:
    trainer = build(tmp_path, kind, max_steps=8, learning_rate=1e-3)
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5)
    assert losses[-1] < 0.9 * losses[0]


def test_rows_of_any_number_of_images_do_not_touch_each_other(tmp_path: Path) -> None:
    rows = vision_pairs(6, images=(0, 4, 1))
    trainer = build(tmp_path, "qwen2.5-vl", double=True, train_dataset=rows)
    alone = trainer.reference_logps(trainer.train_dataset, batch_size=1)
    together = trainer.reference_logps(trainer.train_dataset, batch_size=6)
    assert together[0] == pytest.approx(alone[0], rel=1e-9)
    assert together[1] == pytest.approx(alone[1], rel=1e-9)


def test_an_adapter_of_the_language_part_learns_and_its_reference_is_the_model_without_it(tmp_path: Path) -> None:
    peft_config = LoraConfig(r=4, target_modules=r".*language_model.*\.(q|v)_proj")
    trainer = build(tmp_path, max_steps=8, learning_rate=2e-2, peft_config=peft_config)
    trained = {name for name, value in trainer.policy.model.named_parameters() if value.requires_grad}
    assert trained
    assert all("language_model" in name for name in trained)
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5)
    assert losses[-1] < 0.9 * losses[0]
    rows, processor = vision_pairs(3), build_processor("llava")
    with torch.no_grad():
        expected = [plain_logps(build_vision_model("llava").eval(), processor, row, "chosen").item() for row in rows]
    found = trainer.reference_logps(trainer.train_dataset.select(range(3)), batch_size=3)[0]
    assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("kind", ["llava", "gemma3", "idefics3"])
def test_a_saved_run_is_loaded_by_its_path_with_its_processor(kind: str, tmp_path: Path) -> None:
    trainer = build(tmp_path / "first", kind, max_steps=2)
    trainer.train()
    trainer.save_model()
    folder = str(tmp_path / "first")
    model, _, processor = load_parts(folder, None, None, {})
    assert type(model) is type(build_vision_model(kind))
    assert type(processor) is type(build_processor(kind))
    settings = {"model": model, "processing_class": processor, "ref_model": folder, "precompute_ref_log_probs": True}
    again = build(tmp_path / "again", kind, **settings)
    trained = trainer.policy.model.eval()
    with torch.no_grad():
        expected = [plain_logps(trained, build_processor(kind), row, "chosen").item() for row in vision_pairs(8)]
    assert list(again.train_dataset["ref_chosen_logps"]) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_takes_the_same_steps(kind: str, adapter: bool, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    if adapter:
        settings["peft_config"] = LoraConfig(r=4, target_modules=r".*(language|text)_model.*\.(q|v)_proj")
    whole = build(tmp_path / "whole", kind, **settings)
    whole.train()
    resumed = build(tmp_path / "whole", kind, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for (name, one), (_, other) in zip(
        whole.policy.model.named_parameters(), resumed.policy.model.named_parameters(), strict=True
    ):
        assert torch.equal(one, other), name


def test_the_best_model_is_loaded_at_the_end(tmp_path: Path) -> None:
    rows = vision_pairs(4)
    swapped = [
        {**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows
    ]  # gets worse at every step
    settings = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "max_steps": 3}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss"}
    trainer = build(tmp_path, train_dataset=rows, eval_dataset=swapped, **settings, **best)
    trainer.train()
    assert trainer.state.best_global_step == 1
    found = load_model(tmp_path / "checkpoint-1").state_dict()
    assert all(torch.equal(value, found[name]) for name, value in trainer.policy.model.state_dict().items())


# --- precomputed reference, streams, samples -----------------------------------------------------------------------


def test_precomputed_references_are_kept_by_the_images(tmp_path: Path, own_cache: Path) -> None:
    rows = vision_pairs(4, images=(1, 2))
    trainer = build(tmp_path / "a", train_dataset=rows, precompute_ref_log_probs=True)
    model, processor = build_vision_model("llava").eval(), build_processor("llava")
    with torch.no_grad():
        expected = [plain_logps(model, processor, row, "rejected").item() for row in rows]
    assert list(trainer.train_dataset["ref_rejected_logps"]) == pytest.approx(expected, rel=1e-5)
    kept = {path.name for path in (own_cache / "reference_logps").iterdir()}
    same = build(tmp_path / "b", train_dataset=rows, precompute_ref_log_probs=True)
    assert {path.name for path in (own_cache / "reference_logps").iterdir()} == kept
    assert list(same.train_dataset["ref_rejected_logps"]) == list(trainer.train_dataset["ref_rejected_logps"])
    others = [
        {**row, "images": [build_image(900 + number, *image.size) for number, image in enumerate(row["images"])]}
        for row in rows
    ]
    moved = build(tmp_path / "c", train_dataset=others, precompute_ref_log_probs=True)
    assert [row["prompt_ids"] for row in moved.train_dataset] == [row["prompt_ids"] for row in same.train_dataset]
    with torch.no_grad():
        expected = [plain_logps(model, processor, row, "rejected").item() for row in others]
    assert list(moved.train_dataset["ref_rejected_logps"]) == pytest.approx(expected, rel=1e-5)
    moved.args.max_steps = 1
    moved.train()
    assert moved.state.log_history[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)


@pytest.mark.parametrize("first", [0, 1])
def test_a_stream_has_images(first: int, tmp_path: Path) -> None:
    import datasets

    rows = vision_pairs(6, images=(first, 1, 2))
    stream = datasets.IterableDataset.from_generator(lambda: iter(rows))
    trainer = build(tmp_path, train_dataset=stream, max_steps=2, train_sampling_strategy="sequential")
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    found = trainer.reference_logps(trainer.datasets()[0], batch_size=3)[0]
    model, processor = build_vision_model("llava").eval(), build_processor("llava")
    with torch.no_grad():
        assert found == pytest.approx([plain_logps(model, processor, row, "chosen").item() for row in rows], rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_samples_are_answers_to_the_prompt_with_its_images(
    kind: str, tmp_path: Path, read_jsonl: Callable[..., Any]
) -> None:
    rows = vision_pairs(4, images=(1, 2, 0))
    settings = {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "eval_on_start": False,
        "max_steps": 1,
        "sample_prompts": 4,
        "sample_max_new_tokens": 6,
    }
    trainer = build(tmp_path, kind, eval_dataset=rows, per_device_eval_batch_size=3, **settings)
    trainer.train()
    first = [record for record in read_jsonl(tmp_path / "samples.jsonl") if record["step"] == 0]
    model, processor = build_vision_model(kind).eval(), build_processor(kind)
    for record, row in zip(first, rows, strict=True):
        content = [*({"type": "image"} for _ in row["images"]), {"type": "text", "text": row["prompt"][0]["content"]}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        images = [row["images"]] if row["images"] else None
        inputs = processor(text=[text], images=images, add_special_tokens=False, return_tensors="pt")
        answer = model.generate(**inputs, max_new_tokens=6, do_sample=False, eos_token_id=0, pad_token_id=0)
        answer = answer[:, inputs["input_ids"].shape[1] :]
        assert record["reference"] == processor.tokenizer.batch_decode(answer, skip_special_tokens=True)[0]
    assert kind == "gemma3" or len({record["reference"] for record in first}) > 1


# --- incompatible settings -----------------------------------------------------------------------------------------


def test_images_are_padded_and_prefix_shared_is_refused(tmp_path: Path) -> None:
    trainer = build(tmp_path, batch_layout="auto")
    assert trainer.data_collator.layout == "padded"  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match="batch_layout: 'prefix_shared' is not possible with images"):
        build(tmp_path, batch_layout="prefix_shared")


def test_images_need_a_processor_and_a_model_that_reads_them(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(DataError, match=r"row 1: has images, and [A-Za-z]+ reads text only"):
        build(tmp_path, processing_class=build_processor("llava").tokenizer)
    text_model = build_model("llama-tied", len(build_processor("llava").tokenizer))
    with pytest.raises(ModelError, match=r"^model: LlamaForCausalLM reads no images"):
        build(tmp_path, model=text_model)
    with pytest.raises(ModelError, match=r"^ref_model: LlamaForCausalLM reads no images"):
        build(tmp_path, ref_model=text_model)
    text_rows = [{key: value for key, value in row.items() if key != "images"} for row in vision_pairs(4)]
    trainer = build(tmp_path, model=text_model, train_dataset=text_rows)
    with pytest.raises(ModelError, match=r"^model: LlamaForCausalLM reads no images"):
        trainer.evaluate(vision_pairs(2))
    trainer = build(tmp_path, ref_model=text_model, train_dataset=text_rows)
    with pytest.raises(ModelError, match=r"^ref_model: LlamaForCausalLM reads no images"):
        trainer.evaluate(vision_pairs(2))


def test_text_alone_with_a_processor_is_as_with_its_tokenizer(tmp_path: Path) -> None:
    rows = [{key: value for key, value in row.items() if key != "images"} for row in vision_pairs(6)]
    whole = build(tmp_path / "a", train_dataset=rows)
    bare = build(tmp_path / "b", train_dataset=[{**row, "images": []} for row in rows])
    tokenizer = build_processor("llava").tokenizer
    tokenizer.chat_template = build_processor("llava").chat_template
    plain = build(tmp_path / "c", train_dataset=rows, processing_class=tokenizer)
    assert list(whole.train_dataset) == list(plain.train_dataset) == list(bare.train_dataset)
    assert "images_digest" not in bare.train_dataset.column_names
    one, other = (trainer.reference_logps(trainer.train_dataset, batch_size=3)[0] for trainer in (whole, plain))
    assert one == other
    expected = [
        plain_logps(
            build_vision_model("llava").eval(), build_processor("llava"), {**row, "images": []}, "chosen"
        ).item()
        for row in rows
    ]
    assert one == pytest.approx(expected, rel=1e-4)


def test_text_after_training_on_images_and_images_after_training_on_text(tmp_path: Path) -> None:
    text = [{**row, "images": []} for row in vision_pairs(4)]
    for train, evaluated in ((vision_pairs(4), text), (text, vision_pairs(4))):
        trainer = build(tmp_path, "qwen2.5-vl", train_dataset=train)
        assert trainer.evaluate(evaluated)["eval_loss"] == pytest.approx(math.log(2), abs=1e-5)


def test_a_text_model_is_loaded_as_before(model_folder: Path) -> None:
    assert type(load_model(model_folder)).__name__ == "LlamaForCausalLM"
    assert json.loads((model_folder / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    _, _, tokenizer = load_parts(model_folder, None, None, {})
    assert len(tokenizer) == len(build_tokenizer())
