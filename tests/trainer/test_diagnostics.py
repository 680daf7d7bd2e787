"""Real training of a tiny model triggers each diagnosis, and a healthy run triggers none."""

import random
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

from dpo_trainer import ConfigError, DPOConfig, DPOTrainer
from dpo_trainer.batch.collator import PairCollator
from dpo_trainer.run_folder.records import read_records
from dpo_trainer.settings.diagnoses import DIAGNOSES, Limits
from dpo_trainer.watch.diagnoses import History, _grad_spike, _kl_exploding, _learning_rate_high, _overfitting
from dpo_trainer.watch.diagnostics import examine, probed

from .tiny import build_model, build_pairs, build_tokenizer

Make = Callable[..., DPOTrainer]
SIDES = ("chosen", "rejected")


@cache
def _taught(sides: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """Weights of a tiny model after a short supervised training on the answers of these sides."""
    tokenizer = build_tokenizer()
    model = build_model("llama-tied", len(tokenizer))
    texts = [row["prompt"] + row[side] + "<|end|>" for row in build_pairs(48, seed=9) for side in sides]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(40):
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


def taught_model(sides: tuple[str, ...] = SIDES) -> Any:
    model = build_model("llama-tied", len(build_tokenizer()))
    model.load_state_dict(_taught(sides))
    return model


@pytest.fixture
def train(make_trainer: Make, tmp_path: Path) -> Callable[..., dict[str, dict[str, Any]]]:
    """Train with the given settings, on a model that knows the language; returns the diagnoses by name."""

    def train(**settings: Any) -> dict[str, dict[str, Any]]:
        settings = {"model": taught_model(), "per_device_train_batch_size": 8, "max_steps": 16, **settings}
        settings.setdefault("train_dataset", build_pairs(128))
        make_trainer(**settings).train()
        return {event["name"]: event for event in read_records(tmp_path / "run" / "events.jsonl")}

    return train


SOON = {"stuck_steps": 8, "windows": 5}


def shuffled(rows: list[dict[str, Any]], seed: int = 0) -> list[dict[str, Any]]:
    """Pairs whose preferred answer is random."""
    coin = random.Random(seed)
    return [
        {**row, "chosen": row["rejected"], "rejected": row["chosen"]} if coin.random() < 0.5 else row for row in rows
    ]


def flipped(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]


def test_a_healthy_run_stays_silent(train: Any) -> None:
    evaluation = {"eval_dataset": build_pairs(32, seed=1), "eval_strategy": "steps", "eval_steps": 4}
    assert train(**evaluation, eval_on_start=True, max_steps=32, learning_rate=5e-4, diagnostics=SOON) == {}


def test_a_learning_rate_that_is_too_low(train: Any) -> None:
    found = train(learning_rate=1e-9, diagnostics=SOON)
    assert set(found) == {"learning_rate_low"}
    event = found["learning_rate_low"]
    assert event["step"] >= 8
    assert "it starts at 0.6931" in event["seen"]
    assert "Set learning_rate: 1e-08, ten times this run's" in event["remedy"]


def test_updates_lost_to_rounding(train: Any) -> None:
    """16-bit weights without float32 masters lose updates; the same learning rate does change float32 weights."""
    found = train(model=taught_model().bfloat16(), learning_rate=1e-5, diagnostics=SOON)
    # The trained model's ranking of pairs in bfloat16 depends on the CPU's rounding, so it may also count as a weak reference.
    assert set(found) - {"weak_reference"} == {"updates_lost"}
    share = float(found["updates_lost"]["seen"].split("an update changes ")[1].split("%")[0])
    assert 0 <= share < 20


def test_a_warm_up_is_waited_for(train: Any) -> None:
    assert train(learning_rate=1e-9, warmup_steps=12, diagnostics=SOON) == {}


def test_preferences_decided_by_a_coin(train: Any) -> None:
    found = train(
        train_dataset=shuffled(build_pairs(256)), max_steps=32, learning_rate=1e-3, diagnostics={**SOON, "windows": 10}
    )
    assert "pairs_random" in found
    # Training on random preferences at this rate also lowers both answers' probabilities, which has its own diagnosis.
    assert set(found) <= {"pairs_random", "displacement"}


class SameOnBothSides(PairCollator):
    """A collator with a mistake."""

    def __call__(self, rows: Any) -> Any:
        return super().__call__([{**row, "rejected_ids": row["chosen_ids"]} for row in rows])


def test_answers_that_are_the_same_to_the_model(make_trainer: Make, tmp_path: Path) -> None:
    trainer = make_trainer(model=taught_model(), train_dataset=build_pairs(128), max_steps=12, diagnostics=SOON)
    trainer.data_collator = SameOnBothSides()
    trainer.train()
    events = read_records(tmp_path / "run" / "events.jsonl")
    assert [event["name"] for event in events] == ["pairs_equal"]


def test_swapped_columns_show_on_the_evaluation_set(train: Any) -> None:
    evaluation = {"eval_dataset": build_pairs(32, seed=1), "eval_strategy": "steps", "eval_steps": 4}
    found = train(
        train_dataset=flipped(build_pairs(128)), **evaluation, learning_rate=3e-4, diagnostics={"accuracy_gap": None}
    )
    assert set(found) == {"pairs_swapped"}
    assert "on eval the rejected answer has the higher reward in" in found["pairs_swapped"]["seen"]


def test_memorised_pairs(train: Any) -> None:
    found = train(
        train_dataset=shuffled(build_pairs(8)),
        eval_dataset=shuffled(build_pairs(64, seed=1), seed=2),
        eval_strategy="steps",
        eval_steps=4,
        max_steps=28,
        learning_rate=3e-3,
    )
    assert "overfitting" in found
    assert "in training and" in found["overfitting"]["seen"] or "rose from" in found["overfitting"]["seen"]


def test_a_policy_that_runs_away(train: Any) -> None:
    assert "kl_exploding" in train(learning_rate=5e-2)


def test_a_reference_that_never_saw_such_text(train: Any) -> None:
    found = train(model=build_model("llama-tied", len(build_tokenizer())), max_steps=1)
    assert set(found) == {"weak_reference"}
    assert found["weak_reference"]["step"] == 0
    assert "nats per token under the reference" in found["weak_reference"]["seen"]


def test_a_reference_that_prefers_rejected_answers(train: Any) -> None:
    found = train(model=taught_model(("rejected",)), max_steps=1, diagnostics={"chosen_likelihood": None})
    assert "is likelier per token than the rejected one in only" in found["weak_reference"]["seen"]


def test_weights_that_leave_few_pairs(train: Any) -> None:
    rows = [{**row, "weight": 50.0 if index % 32 == 0 else 0.1} for index, row in enumerate(build_pairs(128))]
    found = train(train_dataset=rows, max_steps=1)
    assert set(found) == {"uneven_preferences"}
    assert "128 pairs count like 5" in found["uneven_preferences"]["seen"]


def test_margins_of_the_reference_with_a_heavy_tail(train: Any) -> None:
    rows = [{**row, "chosen": " good fine", "rejected": " good great"} for row in build_pairs(56)]
    rows += [{**row, "rejected": " zqx" * 12, "chosen": " good"} for row in build_pairs(8)]
    found = train(train_dataset=rows, max_steps=1, diagnostics={"probe_pairs": 64, "length_ratio": None})
    assert set(found) == {"uneven_preferences"}
    assert "at the 95th percentile" in found["uneven_preferences"]["seen"]


def test_likelihood_displacement(train: Any) -> None:
    """The answers differ only in their last word, so lowering the rejected one also lowers the chosen one."""
    rows = [{**row, "chosen": " good great fine", "rejected": " good great good"} for row in build_pairs(128)]
    assert "displacement" in train(train_dataset=rows, learning_rate=1e-2, max_steps=24, diagnostics={"kl_level": None})


def test_answers_of_different_length(train: Any) -> None:
    rows = [{**row, "chosen": row["chosen"] + " good" * 6} for row in build_pairs(64)]
    found = train(train_dataset=rows, max_steps=1)
    assert "lengths_differ" in found
    assert "tokens on average, rejected ones" in found["lengths_differ"]["seen"]


def test_a_gradient_spike(train: Any) -> None:
    rows = build_pairs(128)
    for row in rows[72:80]:
        row["rejected"] = " zqx" * 25
    found = train(
        train_dataset=rows, train_sampling_strategy="sequential", max_grad_norm=1.0, diagnostics={"grad_spike": 4}
    )
    assert found["grad_spike"]["step"] == 10


def test_a_spike_between_two_logs_is_seen(train: Any) -> None:
    rows = build_pairs(256)
    for row in rows[-24:-16]:
        row["rejected"] = " zqx" * 25
    settings = {"train_sampling_strategy": "sequential", "logging_steps": 4, "logging_first_step": False}
    found = train(train_dataset=rows, max_steps=32, **settings, diagnostics={"grad_spike": 4})
    assert found["grad_spike"]["step"] == 32


def test_a_loss_that_is_not_a_number(train: Any) -> None:
    model = taught_model()
    with torch.no_grad():
        model.get_input_embeddings().weight.fill_(float("nan"))
    assert set(train(model=model, max_steps=2)) == {"not_finite"}


# --- the sample before the first step ----------------------------------------------------------------------------------


def test_the_sample_is_as_large_as_its_tokens_allow_and_lies_evenly_over_the_rows() -> None:
    limits = Limits(probe_pairs=32, probe_tokens=2048)
    assert probed([32] * 320, limits) == list(range(0, 320, 10))  # 32 x 2 x 32 tokens: exactly the limit
    assert probed([40] * 100, limits) == [index * 100 // 25 for index in range(25)]
    assert len(probed([2000] * 320, limits)) == 16  # enough for every check
    assert probed([2000] * 9, limits) == list(range(9))
    assert len(probed([2000] * 320, Limits(probe_pairs=4))) == 4
    assert len(probed([2000] * 320, Limits.of({"probe_tokens": None}))) == 32


@pytest.mark.parametrize("kind", ["copy", "another", "none", "precomputed", "adapter"])
def test_the_sample_says_what_the_reference_says_and_runs_only_that(kind: str, make_trainer: Make) -> None:
    reference = taught_model(("rejected",))
    settings: dict[str, dict[str, Any]] = {
        "copy": {"model": reference},
        "another": {"ref_model": reference},
        "none": {"model": reference, "loss_type": "simpo"},
        "precomputed": {"model": reference, "precompute_ref_log_probs": True},
        "adapter": {"model": reference, "peft_config": LoraConfig(r=2, target_modules=["q_proj"])},
    }
    trainer = make_trainer(train_dataset=build_pairs(20), **settings[kind])
    ran: list[str] = []
    trainer.policy.model.register_forward_pre_hook(lambda *_: ran.append("policy"))
    trainer.policy.backbone.register_forward_pre_hook(lambda *_: ran.append("policy"))
    facts = examine(trainer, Limits(probe_tokens=10**6))
    assert bool(ran) == (kind in ("none", "adapter"))
    model, sums = taught_model(("rejected",)), []
    for row in trainer.train_dataset:
        for side in SIDES:
            ids = torch.tensor([row["prompt_ids"] + row[f"{side}_ids"]])
            with torch.no_grad():
                logps = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
            sums.append((logps[len(row["prompt_ids"]) - 1 :].sum().item(), len(row[f"{side}_ids"])))
    chosen, rejected = sums[::2], sums[1::2]
    assert facts.pairs == 20
    assert facts.margins == pytest.approx([a - b for (a, _), (b, _) in zip(chosen, rejected, strict=True)], abs=1e-4)
    assert facts.chosen_per_token == pytest.approx(sum(a for a, _ in chosen) / sum(n for _, n in chosen), abs=1e-4)
    wins = [a / m > b / n for (a, m), (b, n) in zip(chosen, rejected, strict=True)]
    assert facts.accuracy == pytest.approx(sum(wins) / 20)


# --- what happens then ---------------------------------------------------------------------------------------------


def test_stop_on_stops_with_a_checkpoint_and_speaks_once(make_trainer: Make, tmp_path: Path) -> None:
    said: list[str] = []
    settings = {"learning_rate": 1e-9, "max_steps": 40, "diagnostics": SOON, "stop_on": ["learning_rate_low"]}
    trainer = make_trainer(model=taught_model(), train_dataset=build_pairs(128), **settings)
    trainer.diagnostics.announce = said.append
    trainer.train()
    step = trainer.state.global_step
    assert 8 <= step < 12
    assert trainer.diagnostics.stopped_by == "learning_rate_low"
    assert (tmp_path / "run" / f"checkpoint-{step}" / "trainer_state.json").exists()
    assert len(said) == 1
    assert said[0].endswith("Stopping, because stop_on contains it.")
    # The same again goes on: it has been said.
    resumed = make_trainer(model=taught_model(), train_dataset=build_pairs(128), **settings)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 40
    assert len(read_records(tmp_path / "run" / "events.jsonl")) == 1


def test_a_stop_before_the_first_step_takes_no_step(make_trainer: Make) -> None:
    trainer = make_trainer(max_steps=4, stop_on=["weak_reference"])
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.train()
    assert trainer.state.global_step == 0
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"stop_on": ["kl_explodes"]}, "stop_on: unknown diagnosis 'kl_explodes' .did you mean 'kl_exploding'"),
        ({"diagnostics": {"kl_levle": 1}}, "unknown threshold 'kl_levle' .did you mean 'kl_level'"),
        ({"diagnostics": {"kl_level": "high"}}, "diagnostics.kl_level: expected a number, or null"),
        ({"diagnostics": {"kl_level": -1}}, "diagnostics.kl_level: must not be negative"),
        ({"diagnostics": {"windows": None}}, "diagnostics.windows: must be a whole number from 1"),
        ({"diagnostics": "loud"}, "diagnostics: expected a mapping, got 'loud'"),
    ],
)
def test_bad_thresholds_are_explained(settings: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        DPOConfig(output_dir=str(tmp_path), **settings)


def test_null_turns_a_check_off(train: Any) -> None:
    assert train(learning_rate=1e-9, diagnostics={**SOON, "stuck_steps": None}) == {}


def test_every_diagnosis_says_what_to_do() -> None:
    assert all(diagnosis.title and diagnosis.remedy.endswith(".") for diagnosis in DIAGNOSES.values())


# --- trends, on records ----------------------------------------------------------------------------------------------


def run_of(train: list[dict[str, Any]], evals: list[dict[str, Any]] | None = None) -> History:
    run = History(Limits(), 0.6931, 0, 100, train=[{"step": step, **record} for step, record in enumerate(train)])
    run.evals = {"eval": evals} if evals else {}
    return run


def test_a_kl_that_grows_fivefold_is_a_trend_and_one_that_creeps_is_none() -> None:
    assert list(_kl_exploding(run_of([{"kl": 0.06}] * 5 + [{"kl": 0.3}] * 5)))
    assert not list(_kl_exploding(run_of([{"kl": 0.2}] * 5 + [{"kl": 0.3}] * 5)))
    assert not list(_kl_exploding(run_of([{"kl": 0.001}] * 5 + [{"kl": 0.05}] * 5)))
    assert not list(_kl_exploding(run_of([{"loss": 0.6}] * 20)))  # with precomputed references the KL is unknown


def test_a_held_out_loss_that_turns_up_while_training_falls_is_overfitting() -> None:
    train = [{"loss": 0.2}] * 5
    evals = [{"step": step, "loss": loss} for step, loss in ((0, 0.69), (10, 0.5), (20, 0.6))]
    assert list(_overfitting(run_of(train, evals)))
    assert not list(_overfitting(run_of([{"loss": 0.55}] * 5, evals)))
    assert not list(_overfitting(run_of(train, evals[:2])))


def test_spikes_need_a_usual_to_be_told_from() -> None:
    assert not list(_grad_spike(run_of([{"grad_norm_max": 1.0}] * 4 + [{"grad_norm_max": 99.0}])))
    assert list(_grad_spike(run_of([{"grad_norm_max": 1.0}] * 5 + [{"grad_norm_max": 99.0}])))
    assert not list(_grad_spike(run_of([{"grad_norm_max": 1.0}] * 5 + [{"grad_norm_max": float("inf")}])))


def test_what_was_not_learnt_is_not_memorised() -> None:
    evals = [{"step": step, "loss": loss} for step, loss in ((0, 0.69), (10, 0.65), (20, 0.9))]
    assert list(_overfitting(run_of([{"loss": 0.6, "rewards/accuracies": 0.9}] * 5, evals)))
    assert not list(_overfitting(run_of([{"loss": 0.6, "rewards/accuracies": 0.48}] * 5, evals)))


def test_a_rise_within_its_error_is_not_overfitting() -> None:
    train = [{"loss": 0.2, "rewards/accuracies": 0.95}] * 5
    evals = [{"step": 0, "loss": 0.5}, {"step": 10, "loss": 0.62, "loss_since_best_se": 0.08}]
    assert not list(_overfitting(run_of(train, evals)))
    assert list(_overfitting(run_of(train, [evals[0], {**evals[1], "loss_since_best_se": 0.02}])))


def test_a_training_loss_that_rises_means_a_learning_rate_that_is_too_high() -> None:
    found = dict(_learning_rate_high(run_of([{"loss": 0.69}] * 50 + [{"loss": 1.2}] * 5)))
    assert "has risen to 1.2000" in found["learning_rate_high"]
    assert not list(_learning_rate_high(run_of([{"loss": 0.69}] * 50 + [{"loss": 0.9}] * 5)))


def test_without_a_kl_the_chosen_answers_tell_a_learning_rate_that_is_too_high() -> None:
    assert list(_learning_rate_high(run_of([{"loss": 0.6, "logratios/chosen": -1.5}] * 5)))
    assert not list(_learning_rate_high(run_of([{"loss": 0.6, "logratios/chosen": -0.5}] * 5)))


def test_a_reference_that_differs_from_the_first_step_on_is_no_learning_rate() -> None:
    for metric, value in (("kl", 3.0), ("logratios/chosen", -3.0)):
        first = {"step": 1, "loss": 0.9, metric: value}
        for last, found in ((value, False), (1.5 * value, True)):
            history = run_of([first, {"step": 2, "loss": 0.9, metric: last}])
            history.train[0]["step"] = 1
            assert bool(list(_learning_rate_high(history))) == found, metric
            assert bool(list(_kl_exploding(history))) == (found and metric == "kl")


def test_no_multiple_of_a_learning_rate_of_0_is_a_remedy() -> None:
    assert DIAGNOSES["learning_rate_low"].advice({"learning_rate": 0.0}) == DIAGNOSES["learning_rate_low"].remedy


def test_advice_has_values_of_the_run() -> None:
    advice = DIAGNOSES["learning_rate_high"].advice({"learning_rate": 2e-5})
    assert advice.startswith("Set learning_rate: 2e-06, a tenth of this run's. ")
    assert DIAGNOSES["learning_rate_high"].advice({}) == DIAGNOSES["learning_rate_high"].remedy
    assert "beta: 0.2" in DIAGNOSES["kl_exploding"].advice({"learning_rate": 1e-6, "beta": 0.1})


def test_empty_answers_are_counted_and_named(train: Any) -> None:
    rows = build_pairs(24)
    rows[5]["chosen"], rows[9]["rejected"] = "", "  "
    found = train(train_dataset=rows, max_steps=1, filters=[], diagnostics={"length_ratio": None})
    seen = found["empty_answers"]["seen"]
    assert (
        f"2 of 24 pairs of the training data have one; the first is the chosen answer to '{rows[5]['prompt']}'" == seen
    )
    found = train(train_dataset=rows, max_steps=1, diagnostics={"length_ratio": None})
    assert found["empty_answers"]["seen"] == "2 pairs of train_dataset were left out with one"


# --- weights of 0 ----------------------------------------------------------------------------------------------------


def weightless(count: int, seed: int = 0) -> list[dict[str, Any]]:
    return [{**row, "weight": 0.0} for row in build_pairs(count, seed)]


def test_weights_that_are_all_0_are_told_before_the_first_step(train: Any) -> None:
    found = train(train_dataset=weightless(24), max_steps=2)
    assert found["weights_zero"]["step"] == 0
    assert "every pair of the training data has weight 0" in found["weights_zero"]["seen"]


def test_weights_of_0_in_the_evaluation_data_or_in_a_stream_are_told(train: Any) -> None:
    found = train(eval_dataset={"a": weightless(4), "b": build_pairs(4)}, max_steps=1)
    assert "every pair of the evaluation data a has weight 0" in found["weights_zero"]["seen"]
    found = train(train_dataset=Dataset.from_list(weightless(24)).to_iterable_dataset(), max_steps=2)
    assert found["weights_zero"]["step"] == 1


def test_a_single_weight_is_enough(train: Any) -> None:
    assert "weights_zero" not in train(
        train_dataset=[*weightless(24), {**build_pairs(1, seed=1)[0], "weight": 0.5}], max_steps=2
    )
