"""The report's first sentence, the verdict: tested on runs whose outcome is known."""

import importlib.util
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dpo_trainer import DPOTrainer
from dpo_trainer.report.verdict import by_cause, grouped, judge

from .tiny import build_pairs

Make = Callable[..., DPOTrainer]
HELD_OUT = build_pairs(40, seed=9)
FLIPPED = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in build_pairs(40)]


def run(make_trainer: Make, **settings: Any) -> str:
    """The verdict at the top of the report of a run."""
    given = {"train_dataset": build_pairs(40), "eval_dataset": HELD_OUT, "max_steps": 40, **settings}
    if given["eval_dataset"] is not None:
        given |= {"eval_strategy": "steps", "eval_steps": 0.5, "eval_on_start": True}
    trainer = make_trainer(**given, write_report=True)
    trainer.train()
    page = (Path(str(trainer.args.output_dir)) / "report.html").read_text(encoding="utf-8")
    start = page.index("box verdict")
    assert start < page.index("Main figures"), "the verdict comes first"
    return page[start : page.index("</section>", start)]


def test_a_healthy_run(make_trainer: Make) -> None:
    said = run(make_trainer)
    assert "Worked: chosen answers win on pairs that were held out" in said
    assert "of 40 held-out pairs" in said


def test_a_learning_rate_far_too_high_on_wrong_labels(make_trainer: Make) -> None:
    said = run(make_trainer, train_dataset=FLIPPED, eval_dataset=FLIPPED, learning_rate=0.1, max_steps=60)
    assert "Failed: the learning rate is far too high" in said
    assert "Set learning_rate: 0.01, a tenth of this run" in said


def test_wrong_labels(make_trainer: Make) -> None:
    assert "Failed: rejected answers win, so the labels look flipped" in run(make_trainer, train_dataset=FLIPPED)


def test_a_learning_rate_far_too_low(make_trainer: Make) -> None:
    said = run(make_trainer, learning_rate=1e-7)
    assert "Failed: the learning rate is too low, so the loss is stuck where it started" in said


def test_nothing_held_out(make_trainer: Make) -> None:
    assert "Unclear: nothing was held out" in run(make_trainer, eval_dataset=None)


def test_an_evaluation_of_training_pairs_is_told_everywhere(
    make_trainer: Make, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    rows = build_pairs(40)
    with caplog.at_level(logging.WARNING, "dpo_trainer"):
        said = run(make_trainer, train_dataset=rows, eval_dataset=rows[:30] + HELD_OUT[:2])
    known = sum(row in rows for row in rows[:30] + HELD_OUT[:2])
    assert f"eval_dataset: {known} of 32 pairs are training pairs too" in caplog.text
    assert "Unclear: the evaluation is not held out" in said
    page = (tmp_path / "run/report.html").read_text(encoding="utf-8")
    assert 'label">evaluation accuracy' in page
    assert 'label">held-out' not in page
    assert "<h2>Held-out" not in page


def test_pairs_that_were_held_out_are_no_training_pairs(make_trainer: Make, caplog: pytest.LogCaptureFixture) -> None:
    trainer = make_trainer(eval_dataset={"a": HELD_OUT, "b": build_pairs(24)[:5]}, train_dataset=build_pairs(24))
    assert {account.name: account.trained_on for account in trainer.accounts} == {
        "train_dataset": 0,
        "eval_dataset a": 0,
        "eval_dataset b": 5,
    }
    assert "eval_dataset a" not in caplog.text


def summary(**changed: Any) -> dict[str, Any]:
    return {
        "pairs": {"train_dataset": 1000, "eval_dataset": 100},
        "initial_loss": 0.6931,
        "changed_settings": {},
        "last": {"loss": 0.5},
        **changed,
    }


def evaluated(accuracy: float, loss: float = 0.6, **others: float) -> list[dict[str, Any]]:
    return [{"step": 0, "loss": 0.6931}, {"step": 50, "loss": loss, "rewards/accuracies": accuracy, **others}]


def event(name: str) -> dict[str, Any]:
    return {"step": 3, "name": name, "title": f"Title of {name}", "seen": "seen", "remedy": "remedy"}


@pytest.mark.parametrize(
    ("accuracy", "loss", "events", "word"),
    [
        (0.7, 0.6, [], "Worked"),
        (0.58, 0.68, [], "Unclear"),  # within two standard errors of chance
        (0.7, 0.693, [], "Unclear"),  # the loss did not fall
        (0.7, 0.6, ["pairs_random"], "Worked"),  # a diagnosis that was true early, but not at the end
        (0.55, 0.69, ["pairs_random"], "Failed"),
        (0.7, 0.6, ["displacement", "kl_exploding"], "Worked"),
        (0.7, 0.6, ["not_finite"], "Failed"),
    ],
)
def test_figures_decide(accuracy: float, loss: float, events: list[str], word: str) -> None:
    assert judge(summary(), evaluated(accuracy, loss), list(map(event, events))).word == word


def test_a_run_that_stayed_far_from_its_reference_failed_by_its_learning_rate() -> None:
    events = [event("learning_rate_high")]
    assert judge(summary(), evaluated(0.7, kl=3.0), events).word == "Failed"
    assert judge(summary(), evaluated(0.7, kl=0.2), events).word == "Worked"
    given = summary(changed_settings={"diagnostics": {"kl_level": 5.0}})
    assert judge(given, evaluated(0.7, kl=3.0), events).word == "Worked"


def test_causes_stand_before_their_consequences() -> None:
    names = ["grad_spike", "displacement", "of a later version", "kl_exploding", "learning_rate_high"]
    found = [item["name"] for item in by_cause([event(name) for name in names])]
    assert found == ["learning_rate_high", "kl_exploding", "displacement", "grad_spike", "of a later version"]


# --- the first line, by figures -----------------------------------------------------------------------------------------


def first_line(records: list[dict[str, Any]], events: tuple[str, ...] = (), **changed: Any) -> str:
    verdict = judge(summary(**changed), records, list(map(event, events)))
    assert verdict.remedy, "every verdict says what to do next"
    return f"{verdict.word}: {verdict.what}"


def test_of_several_evaluations_the_one_that_is_judged_is_named() -> None:
    given = summary(pairs={"train_dataset": 9, "eval_dataset good": 100, "eval_dataset bad": 50})
    assert "of 100 held-out pairs of eval_dataset good, the first of 2" in judge(given, evaluated(0.7), []).why


def test_an_evaluation_whose_pairs_all_weigh_nothing_did_not_work() -> None:
    assert first_line(evaluated(1.0, 0.0), ("weights_zero",)) == "Unclear: title of weights_zero"
    assert first_line(evaluated(1.0, 0.0), ("weights_zero",), last={"loss": 0.0}).startswith("Failed: ")


def test_a_model_whose_chosen_answers_won_before_training_is_not_praised_for_it() -> None:
    line = "Unclear: chosen answers won as often before training"
    before = {"step": 0, "loss": 5.0, "rewards/accuracies": 0.7}
    given = {"initial_loss": None}
    assert first_line([before, {"step": 50, "loss": 4.0, "rewards/accuracies": 0.72}], **given) == line
    assert first_line([before, {"step": 50, "loss": 4.0, "rewards/accuracies": 0.9}], **given).startswith("Worked: ")


def test_a_best_model_that_is_no_better_than_the_first_is_not_told_to_train_more() -> None:
    records = [{"step": 0, "loss": 0.6931}, {"step": 5, "loss": 0.698, "rewards/accuracies": 0.45}]
    records.append({"step": 50, "loss": 1.2, "rewards/accuracies": 0.45})
    assert first_line(records, best_step=5, steps=50).startswith("Unclear: no evaluation was clearly better")
    assert "learning_rate" not in judge(summary(best_step=5, steps=50), records, []).remedy


def test_a_run_that_was_stopped_says_so() -> None:
    stopped = {"steps": 50, "planned_steps": 1000, "finished": True}
    assert judge(summary(**stopped), evaluated(0.7), []).why.startswith("The run ended at step 50 of 1,000. ")
    given = summary(**stopped, first={})
    assert judge(given, [], []).what == "the run ended at step 50 of 1,000, before it was evaluated"


def pairs_of(count: int) -> dict[str, Any]:
    return {"pairs": {"train_dataset": 1000, "eval_dataset": count}}


@pytest.mark.parametrize(
    ("accuracy", "count", "line"),
    [
        (0.6, 10, "Unclear: the evaluation does not differ from guessing"),
        (0.9, 10, "Worked: chosen answers win on pairs that were held out"),
        (1.0, 5, "Unclear: the evaluation does not differ from guessing"),
        (0.6, 100, "Unclear: the evaluation does not differ from guessing"),
        (0.61, 100, "Worked: chosen answers win on pairs that were held out"),
        (0.6, 400, "Worked: chosen answers win on pairs that were held out"),
        (0.4, 400, "Failed: rejected answers win on pairs that were held out"),
    ],
)
def test_the_number_of_pairs_decides_what_an_accuracy_tells(accuracy: float, count: int, line: str) -> None:
    assert first_line(evaluated(accuracy, 0.65), **pairs_of(count)) == line


def test_too_few_pairs_are_told_how_many_it_takes() -> None:
    verdict = judge(summary(**pairs_of(10)), evaluated(0.6, 0.65), [])
    assert (
        "only an accuracy above 87% differs from guessing. An accuracy of 60% needs about 110 pairs" in verdict.remedy
    )


BEST = [
    {"step": 0, "loss": 0.6931},
    {"step": 20, "loss": 0.5, "loss_se": 0.04, "rewards/accuracies": 0.8},
    {"step": 40, "loss": 0.56, "loss_se": 0.05, "rewards/accuracies": 0.78},
]
RISE = {"loss_since_best": 0.06, "loss_since_best_se": 0.01}


def test_a_best_evaluation_that_was_clearly_better_is_named() -> None:
    records = [*BEST[:2], {**BEST[2], **RISE}]
    assert first_line(records) == "Worked: chosen answers win, and step 20 was better"
    assert "max_steps: 20" in judge(summary(), records, []).remedy
    kept = summary(checkpoints=["checkpoint-20", "checkpoint-40"])
    assert judge(kept, records, []).remedy.startswith("Use checkpoint-20,")
    # The weights of that step were loaded at the end.
    assert first_line(records, best_step=20) == "Worked: chosen answers win on pairs that were held out"


def test_a_best_evaluation_within_errors_is_not() -> None:
    plain = "Worked: chosen answers win on pairs that were held out"
    assert first_line(BEST) == plain, "0.06 apart, with errors of 0.04 and 0.05"
    assert first_line([*BEST[:2], {**BEST[2], **RISE, "loss_since_best_se": 0.04}]) == plain


def test_a_run_that_lost_what_it_had_learnt_failed() -> None:
    records = [*BEST[:2], {"step": 40, "loss": 0.9, "rewards/accuracies": 0.52, **RISE}]
    assert first_line(records) == "Failed: the model was better at step 20 than at the end"


def test_a_run_that_made_the_model_worse_from_the_start_failed() -> None:
    records = [BEST[0], {"step": 40, "loss": 0.8, "rewards/accuracies": 0.5, **RISE}]
    given = {"settings": {"learning_rate": 2e-5}}
    assert first_line(records, **given) == "Failed: training made the model worse on pairs that were held out"
    assert "learning_rate: 2e-06" in judge(summary(**given), records, []).remedy


def test_a_model_that_hardly_moved_is_not_praised_for_the_direction() -> None:
    records = [BEST[0], {"step": 40, "loss": 0.6930, "rewards/accuracies": 0.81}]
    verdict = judge(summary(steps=40, settings={"learning_rate": 1e-8}), records, [event("learning_rate_low")])
    assert verdict.word == "Failed"
    assert "A win counts however small it is" in verdict.why


@pytest.mark.parametrize(
    ("name", "last"),
    [
        ("pairs_swapped", {"rewards/accuracies": 0.52, "loss": 0.6925}),
        ("pairs_random", {"rewards/accuracies": 0.56, "loss": 0.6}),
        ("learning_rate_low", {"rewards/accuracies": 0.56, "loss": 0.6}),
        ("learning_rate_high", {"rewards/accuracies": 0.56, "loss": 0.6, "kl": 0.1}),
    ],
)
def test_a_diagnosis_that_the_last_figures_contradict_decides_nothing(name: str, last: dict[str, Any]) -> None:
    assert first_line([BEST[0], {"step": 50, **last}], (name,), steps=50).startswith("Unclear")


def test_a_model_that_answers_with_nothing_did_not_work() -> None:
    empty = [{"policy": " "}] * 6 + [{"policy": "text"}] * 2
    verdict = judge(summary(), evaluated(0.7), [], empty)
    assert (verdict.word, verdict.what) == ("Failed", "the model's answers are empty")
    assert judge(summary(), evaluated(0.7), [], empty[4:]).word == "Worked"


def test_a_run_that_never_evaluated_is_told_how() -> None:
    given = {"first": {"loss": 0.69}, "last": {"loss": 0.5}}
    assert first_line([], **given) == "Unclear: the run was not evaluated after its first step"
    assert first_line([], **given, pairs={"train_dataset": 5}) == "Unclear: nothing was held out"


def test_consequences_stand_under_their_cause() -> None:
    found = grouped(list(map(event, ["displacement", "kl_exploding", "lengths_differ", "learning_rate_high"])))
    assert [(cause["name"], [item["name"] for item in follow]) for cause, follow in found] == [
        ("learning_rate_high", ["kl_exploding", "displacement"]),
        ("lengths_differ", []),
    ]


# --- the five runs of docs/reports ----------------------------------------------------------------------------------------

LINES = {
    "healthy": "Worked: chosen answers win on pairs that were held out",
    "flipped-labels": "Failed: rejected answers win, so the labels look flipped",
    "learning-rate-too-high": "Failed: the learning rate is far too high",
    "learning-rate-too-low": "Failed: the learning rate is too low, so the loss is stuck where it started",
    "updates-lost": "Failed: 16-bit weights lose the updates to rounding, so the loss is stuck",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LINES)
def test_the_first_line_of_a_run_whose_end_is_known(name: str, tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("reports", Path(__file__).parents[2] / "docs/reports/make.py")
    assert spec is not None
    assert spec.loader is not None
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    assert set(make.WRONG) == set(LINES)
    make.train(name, tmp_path)
    page = (tmp_path / name / "report.html").read_text(encoding="utf-8")
    assert page.partition('aria-label="Verdict">')[2].partition("<h2>")[2].partition("</h2>")[0] == LINES[name]
