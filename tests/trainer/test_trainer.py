"""The trainer end to end on tiny models: starts at log 2, learns, averages correctly, resumes, equals plain PyTorch."""

import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig
from transformers import TrainingArguments

from dpo_trainer import ConfigError, DataError, DPOConfig, DPOTrainer, ModelError
from dpo_trainer.run_folder.summary import initial_loss

from .tiny import MODELS, build_pairs

Make = Callable[..., DPOTrainer]
LOG2 = 0.6931472
LORA = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


def curve(trainer: DPOTrainer, name: str = "loss") -> list[float]:
    return [record[name] for record in trainer.state.log_history if name in record]


def step_batch(trainer: DPOTrainer, rows: int = 4, layout: str = "auto") -> dict[str, Any]:
    collate = replace(trainer.data_collator, layout=layout)
    return trainer._prepare_inputs(collate([trainer.train_dataset[i] for i in range(rows)]))


# --- the start -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MODELS)
def test_first_step_is_exactly_log2_with_rewards_exactly_zero(kind: str, make_trainer: Make, make_model: Any) -> None:
    trainer = make_trainer(model=make_model(kind), max_steps=1)
    trainer.train()
    first = trainer.state.log_history[0]
    assert round(first["loss"], 7) == LOG2
    assert first["rewards/chosen"] == first["rewards/rejected"] == first["rewards/margins"] == 0.0
    assert first["kl"] == 0.0


def test_first_step_with_an_adapter_weights_and_accumulation_is_log2(make_trainer: Make, pairs: Any) -> None:
    rows = [{**row, "weight": 0.1 + index % 7} for index, row in enumerate(pairs(24))]
    trainer = make_trainer(train_dataset=rows, peft_config=LORA, max_steps=1, gradient_accumulation_steps=3)
    trainer.train()
    assert round(trainer.state.log_history[0]["loss"], 7) == LOG2
    assert trainer.state.log_history[0]["rewards/margins"] == 0.0


def test_evaluation_before_the_first_step_is_log2(make_trainer: Make, pairs: Any) -> None:
    trainer = make_trainer(eval_dataset=pairs(5, seed=1), eval_strategy="steps", eval_on_start=True, max_steps=1)
    trainer.train()
    assert [record["step"] for record in trainer.state.log_history if "eval_loss" in record] == [0, 1]
    assert round(curve(trainer, "eval_loss")[0], 7) == LOG2
    assert curve(trainer, "eval_kl")[0] == 0.0


# --- learning ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", [None, LORA], ids=["whole", "lora"])
def test_training_learns_a_preference_that_holds_on_unseen_pairs(adapter: Any, make_trainer: Make, pairs: Any) -> None:
    trainer = make_trainer(
        train_dataset=pairs(64),
        eval_dataset=pairs(40, seed=1),
        peft_config=adapter,
        learning_rate=1e-3 if adapter is None else 2e-2,
        per_device_train_batch_size=8,
        max_steps=16 if adapter is None else 40,
    )
    trainer.train()
    losses = curve(trainer)
    assert round(losses[0], 7) == LOG2
    assert sum(losses[-4:]) / 4 < 0.6
    result = trainer.evaluate()
    assert result["eval_rewards/accuracies"] > 0.9
    assert result["eval_loss"] < 0.6
    assert result["eval_kl"] > 0


def test_flipped_labels_are_learnt_the_other_way(make_trainer: Make, pairs: Any) -> None:
    """The control: the rise in the test above comes from the data, not from the trainer."""
    flipped = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in pairs(64)]
    trainer = make_trainer(train_dataset=flipped, eval_dataset=pairs(40, seed=1), max_steps=12)
    trainer.train()
    assert trainer.evaluate()["eval_rewards/accuracies"] < 0.1


def textbook_loss(trainer: DPOTrainer, beta: float) -> torch.Tensor:
    """Equation 7 of the DPO paper from the model's whole logits; only the batch comes from our code."""
    sums, batch = [], step_batch(trainer, layout="padded")
    for model in (trainer.model, trainer.reference.split.model):
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        logps = logits.flatten(0, 1)[batch["positions"]].log_softmax(-1).gather(1, batch["labels"][:, None])[:, 0]
        sums.append(torch.stack([part.sum() for part in logps.split(batch["cu_seqlens"].diff().tolist())]))
    chosen, rejected = (sums[0] - sums[1].detach()).chunk(2)
    return -F.logsigmoid(beta * (chosen - rejected)).mean()


@pytest.mark.parametrize("layout", ["padded", "prefix_shared", "auto"])
@pytest.mark.parametrize("kind", ["llama-tied", "llama-untied", "gemma2-softcap", "cohere-scale"])
def test_loss_and_every_gradient_equal_plain_pytorch(
    kind: str, layout: str, make_trainer: Make, make_model: Any
) -> None:
    trainer = make_trainer(model=make_model(kind).double(), ref_model=make_model(kind, seed=1).double(), beta=0.3)
    batch = step_batch(trainer, layout=layout)
    expected = textbook_loss(trainer, beta=0.3)
    expected.backward()
    wanted = {name: parameter.grad.clone() for name, parameter in trainer.model.named_parameters()}
    trainer.model.zero_grad()
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    # The models' norms compute in float32 even here, and their rounding depends on the batch's shape.
    assert loss.item() == pytest.approx(expected.item(), rel=1e-7)
    assert abs(expected.item() - LOG2) > 1e-3, "a case where policy equals reference would test little"
    for name, parameter in trainer.model.named_parameters():
        # Kernels sum exponentials in float32 for every dtype; a parameter's error stays below 1e-5 of its norm.
        error = (parameter.grad - wanted[name]).norm() / wanted[name].norm()
        assert error < 1e-5, (name, error)


def test_two_models_with_different_logit_scales_are_compared_as_they_are(make_trainer: Make, make_model: Any) -> None:
    trainer = make_trainer(model=make_model("cohere-scale").double(), ref_model=make_model("llama-tied").double())
    batch = step_batch(trainer)
    loss = trainer.compute_loss(trainer.model, batch)
    assert loss.item() == pytest.approx(textbook_loss(trainer, beta=0.1).item(), rel=1e-9)


# --- averages ------------------------------------------------------------------------------------------------------


def test_accumulated_micro_batches_equal_one_batch(make_trainer: Make, make_model: Any, pairs: Any) -> None:
    """With weights and 3 + 3 + 2 pairs per step: a mean of means would give the last two pairs too much weight."""
    rows = [{**row, "weight": 0.2 + index % 5} for index, row in enumerate(pairs(8))]
    curves = []
    for size, accumulation in ((8, 1), (3, 3)):
        trainer = make_trainer(
            model=make_model(),
            train_dataset=rows,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            num_train_epochs=6,
            max_grad_norm=0.0,
            learning_rate=3e-4,
        )
        trainer.train()
        curves.append((curve(trainer), curve(trainer, "rewards/margins"), curve(trainer, "entropy")))
    assert len(curves[0][0]) == 6
    for whole, parts in zip(*curves, strict=True):
        assert parts == pytest.approx(whole, rel=2e-5, abs=1e-6)


def test_evaluation_does_not_depend_on_the_batch_size(make_trainer: Make, make_model: Any, pairs: Any) -> None:
    """11 pairs in batches of 4: the last batch is shorter, and its pairs must not count more."""
    held_out = [{**row, "weight": 1.0 + index % 3} for index, row in enumerate(pairs(11, seed=3))]
    results = []
    for size in (1, 4, 11):
        trainer = make_trainer(
            model=make_model(), ref_model=make_model(seed=5), eval_dataset=held_out, per_device_eval_batch_size=size
        )
        results.append(trainer.evaluate())
    names = [name for name in results[0] if not name.endswith(("time", "second"))]
    assert {"eval_loss", "eval_kl", "eval_entropy", "eval_rewards/margins"} <= set(names)
    for name in names:
        assert results[1][name] == pytest.approx(results[0][name], rel=1e-5), name
        assert results[2][name] == pytest.approx(results[0][name], rel=1e-5), name


def test_a_logged_window_is_the_mean_over_its_pairs(make_trainer: Make, make_model: Any, pairs: Any) -> None:
    """Ten pairs in batches of four, learning rate zero: a log window of three steps equals an evaluation of all ten pairs."""
    rows = pairs(10)
    settings = {"ref_model": make_model(seed=5), "train_dataset": rows, "learning_rate": 0.0}
    trainer = make_trainer(**settings, eval_dataset=rows, logging_steps=3, logging_first_step=False, num_train_epochs=1)
    trainer.train()
    logged, evaluated = trainer.state.log_history[0], trainer.evaluate()
    for name in ("loss", "kl", "entropy", "rewards/accuracies", "rewards/margins", "logps/chosen"):
        assert logged[name] == pytest.approx(evaluated[f"eval_{name}"], rel=1e-5), name
    assert logged["tokens"] == trainer.accounts[0].tokens
    assert logged["tokens_per_second"] > 0


def test_every_promised_metric_is_logged(make_trainer: Make, pairs: Any) -> None:
    trainer = make_trainer(
        max_steps=1,
        eval_dataset=pairs(4),
        eval_strategy="steps",
        eval_on_start=False,
        statistics=["entropy", "kl", "accuracy", "mean_logits"],
    )
    trainer.train()
    shared = {"loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "kl", "entropy"}
    shared |= {"logps/chosen", "logps/rejected", "logits/chosen", "logits/rejected", "mean_token_accuracy", "epoch"}
    train = {"learning_rate", "grad_norm", "tokens_per_second", "tokens"}
    assert shared | train | {"grad_norm_max", "memory_mib", "rewards/margins_std"} <= set(trainer.state.log_history[0])
    assert {f"eval_{name}" for name in shared - {"epoch"}} <= set(trainer.state.log_history[1])


# --- references ----------------------------------------------------------------------------------------------------


def test_precomputed_references_give_the_same_curve_and_keep_no_model(
    make_trainer: Make, make_model: Any, pairs: Any
) -> None:
    runs = {}
    for precompute in (False, True):
        trainer = make_trainer(
            model=make_model(),
            eval_dataset=pairs(6, seed=2),
            max_steps=8,
            precompute_ref_log_probs=precompute,
            learning_rate=3e-4,
        )
        assert (trainer.reference is None) == precompute
        trainer.train()
        runs[precompute] = (curve(trainer), [trainer.evaluate()["eval_loss"]])
        assert ("kl" in trainer.state.log_history[0]) == (not precompute)
    for with_model, without in zip(runs[False], runs[True], strict=True):
        assert without == pytest.approx(with_model, abs=5e-6)


def test_reference_columns_replace_the_reference_model(make_trainer: Make, make_model: Any) -> None:
    source = make_trainer(model=make_model(), precompute_ref_log_probs=True)
    trainer = make_trainer(model=make_model(), train_dataset=source.train_dataset, max_steps=3)
    assert trainer.reference is None
    trainer.train()
    with_model = make_trainer(model=make_model(), max_steps=3)
    with_model.train()
    assert curve(trainer) == pytest.approx(curve(with_model), abs=5e-6)


def test_a_dropped_reference_cannot_be_asked_again(make_trainer: Make, pairs: Any) -> None:
    trainer = make_trainer(precompute_ref_log_probs=True, max_steps=1)
    assert trainer.evaluate(pairs(3))["eval_loss"] == pytest.approx(LOG2, abs=1e-6)
    trainer.train()
    with pytest.raises(DataError, match="the reference was dropped"):
        trainer.evaluate(pairs(3))


def test_only_the_adapter_trains(make_trainer: Make, make_model: Any, tmp_path: Path) -> None:
    model = make_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = make_trainer(model=model, peft_config=LORA, max_steps=3, learning_rate=1e-2)
    trainer.train()
    for name, value in trainer.model.get_base_model().state_dict().items():
        if "lora_" not in name:
            assert torch.equal(value, before[name.replace(".base_layer", "")]), name
    trainer.save_model()
    assert (tmp_path / "run" / "adapter_model.safetensors").exists()


def test_dropout_off_by_default_keeps_the_start_exact(make_trainer: Make, make_model: Any) -> None:
    starts = {}
    for off in (True, False):
        trainer = make_trainer(model=make_model("gpt2-learned-positions"), max_steps=1, disable_dropout=off)
        trainer.train()
        starts[off] = curve(trainer)[0]
    assert round(starts[True], 7) == LOG2
    assert abs(starts[False] - LOG2) > 1e-4


# --- checkpoints ---------------------------------------------------------------------------------------------------


def test_resuming_continues_bitwise(make_trainer: Make, make_model: Any, tmp_path: Path, read_jsonl: Any) -> None:
    settings = {"max_steps": 8, "save_strategy": "steps", "save_steps": 5, "num_train_epochs": 3}
    whole = make_trainer(model=make_model(), output_dir=str(tmp_path / "whole"), **settings)
    whole.train()

    stopped = make_trainer(model=make_model(), output_dir=str(tmp_path / "cut"), **settings)
    stopped.add_callback(stop_after(7))
    stopped.train()
    resumed = make_trainer(model=make_model(), output_dir=str(tmp_path / "cut"), **settings)
    resumed.train(resume_from_checkpoint=True)

    timeless = [
        [
            {key: value for key, value in record.items() if not key.endswith(("second", "_mib"))}
            for record in read_jsonl(path)
        ]
        for path in (tmp_path / "whole" / "metrics.jsonl", tmp_path / "cut" / "metrics.jsonl")
    ]
    assert [record["step"] for record in timeless[0]] == list(range(1, 9))
    assert timeless[1] == timeless[0]
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


def stop_after(step: int) -> Any:
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop = control.should_training_stop or state.global_step >= step

    return Stop()


def test_precomputed_references_survive_resuming(make_trainer: Make, make_model: Any) -> None:
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "precompute_ref_log_probs": True}
    whole = make_trainer(model=make_model(), **settings)
    whole.train()
    resumed = make_trainer(model=make_model(), **settings)
    resumed.train(resume_from_checkpoint=str(Path(resumed.args.output_dir) / "checkpoint-3"))
    assert curve(resumed)[-3:] == curve(whole)[-3:]


# --- surroundings --------------------------------------------------------------------------------------------------


def test_predict_returns_rewards_in_order(make_trainer: Make, make_model: Any, pairs: Any) -> None:
    trainer = make_trainer(model=make_model(), ref_model=make_model(seed=5), per_device_eval_batch_size=3)
    rows = pairs(8, seed=4)
    result = trainer.predict(rows)
    assert result.predictions.shape == (8, 2)
    margins = result.predictions[:, 0] - result.predictions[:, 1]
    assert result.metrics["test_rewards/margins"] == pytest.approx(margins.mean(), rel=1e-5)
    assert trainer.predict(rows[5:6]).predictions[0] == pytest.approx(result.predictions[5], rel=1e-5)


ALL_STATISTICS = ["entropy", "kl", "accuracy", "mean_logits", "grad_dropped_mass"]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"statistics": []},
        {"statistics": ALL_STATISTICS, "loss_path": "linear"},
        {"statistics": ALL_STATISTICS, "loss_path": "logits"},
        {"precompute_ref_log_probs": True},
        {"loss_type": "simpo"},
        {"sample_prompts": 2, "sample_max_new_tokens": 2, "scorer": lambda prompts, answers: [0.0] * len(answers)},
        {"eval_dataset": {"one": build_pairs(4), "two": build_pairs(4, seed=2)}},
        {"eval_dataset": [{**row, "ref_chosen_logps": -3.0, "ref_rejected_logps": -4.0} for row in build_pairs(4)]},
    ],
    ids=lambda settings: ",".join(settings) or "default",
)
def test_what_an_evaluation_will_log_is_known_before_the_first(settings: dict[str, Any], make_trainer: Make) -> None:
    """So a metric_for_best_model that is not in the table is refused at the start."""
    schedule = {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": False, "max_steps": 1}
    trainer = make_trainer(**{"eval_dataset": build_pairs(4, seed=1), **schedule, **settings})
    trainer.train()
    logged = {name for entry in trainer.state.log_history for name in entry if name.startswith("eval_")}
    assert {f"eval_{name}" for name in trainer._evaluation_names()} == logged


@pytest.mark.parametrize(("wanted", "steps"), [({}, [0, 1, 2]), ({"eval_on_start": False}, [1, 2])])
def test_a_run_that_evaluates_does_so_before_its_first_step(
    wanted: dict[str, Any], steps: list[int], make_trainer: Make, tmp_path: Path
) -> None:
    def evaluated(**more: Any) -> list[int]:
        schedule = {
            "eval_strategy": "steps",
            "eval_steps": 1,
            "save_strategy": "steps",
            "save_steps": 1,
            "max_steps": 2,
        }
        trainer = make_trainer(eval_dataset=build_pairs(4, seed=1), **schedule, **wanted)
        trainer.train(**more)
        assert trainer.args.eval_on_start == wanted.get("eval_on_start"), "the next run decides anew"
        return [entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry]

    assert evaluated() == steps
    shutil.rmtree(tmp_path / "run" / "checkpoint-2")
    assert evaluated(resume_from_checkpoint=True) == steps, "not again where a resumed run goes on"


def test_metrics_of_ones_own_can_choose_the_best_model(make_trainer: Make, tmp_path: Path) -> None:
    trainer = make_trainer(
        eval_dataset=build_pairs(4, seed=1),
        compute_metrics=lambda prediction: {"mine": 1.0},
        metric_for_best_model="mine",
        greater_is_better=True,
        load_best_model_at_end=True,
        save_strategy="steps",
        eval_strategy="steps",
        eval_steps=1,
        save_steps=1,
        max_steps=1,
    )
    trainer.train()
    assert trainer.state.best_metric == 1.0


def test_several_evaluation_sets_keep_their_names(make_trainer: Make, pairs: Any) -> None:
    trainer = make_trainer(
        eval_dataset={"near": pairs(4, seed=1), "far": pairs(4, seed=2)}, eval_strategy="steps", max_steps=1
    )
    trainer.train()
    names = set().union(*trainer.state.log_history)
    assert {"eval_near_loss", "eval_far_loss", "eval_near_kl"} <= names


@pytest.mark.parametrize("loss_type", ["hinge", "ipo", ["sigmoid", "ipo"]])
def test_other_objectives_train(loss_type: Any, make_trainer: Make) -> None:
    trainer = make_trainer(loss_type=loss_type, max_steps=4)
    trainer.train()
    assert curve(trainer)[-1] < curve(trainer)[0]


@pytest.mark.parametrize(
    "settings",
    [{"bf16": True}, {"activation_checkpointing": True}, {"train_sampling_strategy": "group_by_length"}],
    ids=lambda settings: next(iter(settings)),
)
def test_the_usual_training_settings_work(settings: dict[str, Any], make_trainer: Make) -> None:
    trainer = make_trainer(max_steps=4, **settings)
    trainer.train()
    losses = curve(trainer)
    assert losses[0] == pytest.approx(LOG2, abs=1e-6)
    assert losses[-1] < losses[0]


def test_bfloat16_autocast_reaches_backbone_and_head(make_trainer: Make) -> None:
    trainer = make_trainer(bf16=True)
    with trainer._kernels():
        logits = trainer.policy.packed_logits(step_batch(trainer))
    assert logits.dtype == torch.bfloat16


def test_tensorboard_gets_the_metrics(make_trainer: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "tb"))
    make_trainer(max_steps=2, report_to="tensorboard").train()
    events = EventAccumulator(str(tmp_path / "tb")).Reload()
    assert {"train/loss", "train/rewards/margins", "train/kl"} <= set(events.Tags()["scalars"])


def test_a_nan_is_shown_and_not_hidden(make_trainer: Make, read_jsonl: Any, tmp_path: Path) -> None:
    trainer = make_trainer(max_steps=2)
    with torch.no_grad():
        trainer.model.get_input_embeddings().weight.fill_(float("nan"))
    trainer.train()
    assert all(math.isnan(loss) for loss in curve(trainer))
    assert [record["loss"] for record in read_jsonl(tmp_path / "run" / "metrics.jsonl")] == [None, None]


# --- mistakes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"loss_type": "sigmod"}, r"unknown objective 'sigmod' \(did you mean 'sigmoid'\?\); known are sigmoid, "),
        ({"loss_type": []}, "at least one objective"),
        ({"loss_type": ["sigmoid", "ipo"], "loss_weights": [1.0]}, "1 weights for 2 objectives"),
        ({"beta": 0.0}, "beta: must be a positive number"),
        ({"beta": float("nan")}, "beta: must be a positive number"),
        ({"label_smoothing": 1.5}, "label_smoothing"),
        ({"loss_type": "hinge", "label_smoothing": 0.1}, "label_smoothing"),
        ({"truncation_mode": "keep_middle"}, "known are keep_end, keep_start"),
        ({"max_length": 1}, "max_length: must be at least 2"),
        ({"max_length": 8, "max_prompt_length": 8}, "leaves no room for a completion"),
        ({"statistics": ["entropi"]}, "did you mean 'entropy'"),
        ({"batch_layout": "prefix"}, r"batch_layout: unknown 'prefix'.*; known are auto, padded, prefix_shared"),
        ({"backend": "tritton"}, "did you mean 'triton'"),
    ],
)
def test_bad_settings_are_explained(settings: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        DPOConfig(output_dir=str(tmp_path), **settings)
    assert isinstance(caught.value, ValueError)
    assert "\n" not in str(caught.value)


def test_bad_arguments_are_explained(
    make_trainer: Make, make_model: Any, tokenizer: Any, pairs: Any, tmp_path: Path
) -> None:
    model = make_model()
    with pytest.raises(ModelError, match="is the model itself"):
        make_trainer(model=model, ref_model=model)
    with pytest.raises(ModelError, match="no such folder"):
        make_trainer(model=str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="expected a DPOConfig, got TrainingArguments"):
        DPOTrainer(model, args=TrainingArguments(output_dir=str(tmp_path)), processing_class=tokenizer)
    with pytest.raises(ModelError, match="processing_class: expected a tokenizer or processor, got a path"):
        make_trainer(processing_class=str(tmp_path))
    splits = datasets.DatasetDict({"train": datasets.Dataset.from_list(pairs(2))})
    with pytest.raises(DataError, match=r"found DatasetDict; pass one of its splits \(train\)"):
        make_trainer(train_dataset=splits)
    with pytest.raises(ModelError, match="no tokenizer given"):
        DPOTrainer(model, args=DPOConfig(output_dir=str(tmp_path)), train_dataset=pairs(2))
    with pytest.raises(DataError, match="no rows"):
        make_trainer(train_dataset=datasets.Dataset.from_list([]))
    with pytest.raises(DataError, match="nothing to train on"):
        make_trainer(train_dataset=None).train()


def test_a_model_can_be_given_as_a_path(make_trainer: Make, model_folder: Path) -> None:
    trainer = make_trainer(model=str(model_folder), ref_model=model_folder, max_steps=1)
    trainer.train()
    assert round(curve(trainer)[0], 7) == LOG2


def test_objectives_with_settings_of_their_own_and_running_means_reach_the_loss(tmp_path):
    """An objective given as text is built once per trainer, so that its running mean lasts for the whole run."""
    config = DPOConfig(output_dir=str(tmp_path), loss_type=["sigmoid(beta=0.5)", "bco_running"], report_to="none")
    assert initial_loss(config) > 0
    for wrong, words in (("simpo(gama=1)", "gama"), ("sigmoid(", "sigmoid"), ("nope(x=1)", "unknown objective 'nope'")):
        with pytest.raises(ConfigError, match=words):
            DPOConfig(output_dir=str(tmp_path), loss_type=wrong)


def test_16_bit_autocast_needs_no_word_about_the_cpu(tmp_path: Path) -> None:
    """transformers alone refuses `bf16` on a machine without an accelerator unless `use_cpu` is set as well."""
    config = DPOConfig(output_dir=str(tmp_path), bf16=True)
    assert config.bf16
    assert config.use_cpu == (not torch.accelerator.is_available())


def test_what_came_before_a_run_is_not_in_its_log(make_trainer: Make) -> None:
    found = []
    for before in (False, True):
        torch.manual_seed(0)
        trainer = make_trainer(max_steps=1)
        if before:  # like a user who tries a batch by hand
            batch = trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[0]]))
            trainer.compute_loss(trainer.model.train(), batch)
        trainer.train()
        found.append(trainer.state.log_history[0])
    assert found[0]["tokens"] == found[1]["tokens"] > 0
    assert found[0]["loss"] == found[1]["loss"]
