"""What became of a run, in a sentence: it worked, it failed, or its figures do not say."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..settings.diagnoses import DIAGNOSES, Limits


@dataclass(frozen=True)
class Verdict:
    """What a reader should know first.

    Attributes:
        word: "Worked", "Failed" or "Unclear".
        what: goes on after the word, for instance "the learning rate is far too high".
        why: the figures.
        remedy: what to do next; "" where nothing is to be done.
    """

    word: str
    what: str
    why: str
    remedy: str = ""


def judge(summary: dict[str, Any], evals: Sequence[dict[str, Any]], events: Sequence[dict[str, Any]]) -> Verdict:
    """The verdict on a run.

    Args:
        summary: what `run_folder.summary.summarize` returns.
        evals: the records of its first evaluation dataset, without their prefix.
        events: what the diagnostics said.
    """
    last = evals[-1] if evals and evals[-1].get("step", 0) > 0 else {}
    pairs = next((count for name, count in summary["pairs"].items() if name.startswith("eval_dataset")), 0)
    known = sum(summary.get("trained_on", {}).values())
    accuracy, loss, start = last.get("rewards/accuracies"), last.get("loss"), summary["initial_loss"]
    error = math.sqrt(accuracy * (1 - accuracy) / pairs) if accuracy is not None and pairs else math.nan
    limits = Limits.of(summary["changed_settings"].get("diagnostics"))
    fell = start is None or (loss or start) < start - limits.stuck_tolerance * abs(start)
    wins = accuracy is not None and accuracy - 2 * error > 0.5 and fell
    far = (last or summary["last"]).get("kl", 0) > limits.kl_level
    for event in by_cause(events):
        diagnosis = DIAGNOSES.get(event.get("name", ""))
        # What held early need not hold at the end: an evaluation that is won answers all causes of a stuck loss.
        over = wins and event.get("name") != "not_finite" and not (event.get("name") == "learning_rate_high" and far)
        if diagnosis is not None and diagnosis.fails and not over:
            return Verdict("Failed", _lower(event["title"]), event["seen"], event["remedy"])
    if accuracy is None:
        return Verdict(
            "Unclear",
            "nothing was held out",
            "The figures are of training pairs.",
            "Give eval_data, pairs to judge by.",
        )
    figures = f"The chosen answer wins in {accuracy:.1%} ± {error:.1%} of {pairs:,} pairs, and the loss is {loss:.4f}"
    figures += f"; it starts at {start:.4f}." if start is not None else "."
    if known:
        why = f"{known:,} of the {pairs:,} evaluation pairs were trained on. {figures}"
        return Verdict(
            "Unclear", "the evaluation is not held out", why, "Give eval_data pairs that are not in train_data."
        )
    if not wins:
        return Verdict(
            "Unclear", "the evaluation tells no difference from chance", figures, "Evaluate more pairs or train longer."
        )
    return Verdict("Worked", "chosen answers win on pairs that were held out", figures)


def by_cause(events: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Events with causes before their consequences, then by step."""
    order = {name: place for place, name in enumerate(DIAGNOSES)}
    return sorted(events, key=lambda event: order.get(event.get("name", ""), len(order)))


def _lower(title: str) -> str:
    return title[:1].lower() + title[1:]
