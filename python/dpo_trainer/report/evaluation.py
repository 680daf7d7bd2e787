"""The figures behind a verdict: the evaluations of a run, and what their standard errors allow to say."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..settings.diagnoses import Limits
from ..watch.diagnoses import number
from .figures import figure, with_error

#: A difference counts if it is larger than this many standard errors.
ERRORS = 2.0


@dataclass(frozen=True)
class Figures:
    """The figures behind a verdict. Unknown figures are NaN.

    Attributes:
        first: the record of the evaluation before training; empty if there is none.
        final: the record of the evaluation of the run's final weights.
        best: the record with the lowest loss.
        pairs: number of pairs of the evaluation.
        known: number of these pairs that are training pairs.
        start: the loss before training.
        tolerance: the loss has fallen if it fell by more than this share of `start`.
        of: the name of the evaluation in words, if there are several.
    """

    first: dict[str, Any]
    final: dict[str, Any]
    best: dict[str, Any]
    pairs: int
    known: int
    start: float
    tolerance: float
    of: str = ""

    @property
    def accuracy(self) -> float:
        """The final accuracy, with pairs that are training pairs counted as wrong."""
        return number(self.final.get("rewards/accuracies")) - self.known / max(self.pairs, 1)

    @property
    def loss(self) -> float:
        return number(self.final.get("loss"))

    @property
    def doubt(self) -> float:
        """The least distance from 50 % at which an accuracy differs from guessing: two standard errors plus half a pair.

        The half pair (continuity correction) makes it agree with the binomial distribution for few pairs too.
        """
        count = max(self.pairs, 1)
        return ERRORS * 0.5 / math.sqrt(count) + 0.5 / count

    @property
    def wins(self) -> bool:
        return self.accuracy > 0.5 + self.doubt

    @property
    def won_before(self) -> bool:
        """Whether chosen answers won before training, and not clearly less often: without a reference a model may begin so."""
        before = number(self.first.get("rewards/accuracies"))
        return before > 0.5 + self.doubt and number(self.final.get("rewards/accuracies")) - before <= self.doubt

    @property
    def fell(self) -> bool:
        """Whether the loss fell by more than the tolerance, and by more than its standard error if that is known."""
        since, error = number(self.final.get("loss_since_first")), number(self.final.get("loss_since_first_se"))
        if math.isnan(since):
            since, error = self.loss - self.start, number(self.final.get("loss_se"))
        least = self.tolerance * abs(self.start)
        return since < -max(least, 0.0 if math.isnan(error) else ERRORS * error)

    @property
    def was_better(self) -> bool:
        """Whether the best evaluation was an earlier one, and better by more than the error of the difference."""
        if not self.best or self.best["step"] >= self.final["step"]:
            return False
        rise, error = number(self.final.get("loss_since_best")), number(self.final.get("loss_since_best_se"))
        if math.isnan(rise):  # the evaluations were not compared pair by pair
            rise = self.loss - number(self.best["loss"])
            error = math.hypot(number(self.final.get("loss_se")), number(self.best.get("loss_se")))
        return rise > ERRORS * error

    def say(self) -> str:
        """The figures in two sentences."""
        held_out = "evaluation" if self.known else "held-out"
        went = "" if math.isnan(self.start) else f" ({figure(self.start)} before training)"
        said = [f"The {held_out} loss is {with_error(self.loss, self.final.get('loss_se'))}{went}."]
        if (accuracy := self.final.get("rewards/accuracies")) is not None:
            share = with_error(accuracy, self.final.get("rewards/accuracies_se"), "rewards/accuracies")
            said.insert(
                0, f"The chosen answer wins in {share} of {self.pairs:,} {held_out} pairs{self.of}; guessing is 50 %."
            )
            if self.wins and not self.fell and abs(self.loss - self.start) < self.tolerance * abs(self.start):
                said.append("A win counts however small it is, and these wins are very small.")
        if self.known:
            said.insert(0, f"{self.known:,} of the {self.pairs:,} evaluation pairs were trained on.")
        return " ".join(said)


def figures_of(summary: dict[str, Any], evals: Sequence[dict[str, Any]]) -> Figures | None:
    """The figures of a run's evaluation. None if no evaluation followed the first step."""
    last_step = summary.get("best_step") or math.inf  # the run may have loaded the weights of an earlier evaluation
    judged = [record for record in evals if 0 < record.get("step", 0) <= last_step]
    if not judged:
        return None
    first = evals[0] if evals[0].get("step", 0) == 0 else {}
    known = [record for record in evals if record.get("loss") is not None]
    names = [name for name in summary["pairs"] if name.startswith("eval_dataset")]
    name = names[0] if names else ""
    start = summary["initial_loss"] if summary["initial_loss"] is not None else first.get("loss")
    return Figures(
        first,
        judged[-1],
        min(known, key=lambda record: record["loss"], default={}),
        summary["pairs"].get(name, 0),
        summary.get("trained_on", {}).get(name, 0),
        number(start),
        Limits.of(summary["changed_settings"].get("diagnostics")).stuck_tolerance,
        f" of {name}, the first of {len(names)} evaluation datasets" if len(names) > 1 else "",
    )
