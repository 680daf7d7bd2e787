"""The report's first sentence: what became of a run, judged by runs whose end is known."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dpo_trainer import DPOTrainer
from dpo_trainer.report.verdict import by_cause, judge

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
    assert "of 40 pairs" in said


def test_a_learning_rate_far_too_high_on_wrong_labels(make_trainer: Make) -> None:
    said = run(make_trainer, train_dataset=FLIPPED, eval_dataset=FLIPPED, learning_rate=0.1, max_steps=60)
    assert "Failed: the learning rate is far too high" in said
    assert "Lower it tenfold or more" in said


def test_wrong_labels(make_trainer: Make) -> None:
    assert "Failed: rejected answers win: accuracy is well under 50 %" in run(make_trainer, train_dataset=FLIPPED)


def test_a_learning_rate_far_too_low(make_trainer: Make) -> None:
    said = run(make_trainer, learning_rate=1e-7)
    assert "Failed: the loss is stuck where it started and the rewards do not move" in said


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
        (0.7, 0.6, ["pairs_random"], "Worked"),  # it held early, not at the end
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
