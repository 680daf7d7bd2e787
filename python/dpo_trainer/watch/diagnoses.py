"""The checks behind the diagnoses. They take the figures of a run and return findings, without other effects.

A check is a function of a run's log records, the facts known before its first step (`Facts`) and the thresholds (`Limits`).
Each diagnosis is reported once per run. To add a diagnosis, add a row to `settings.diagnoses.DIAGNOSES` and a check to
CHECKS.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from ..run_folder.metrics import evaluation_prefix, without_prefix
from ..settings.diagnoses import Limits

#: Least number of margins for a 95th percentile.
FEWEST = 16


@dataclass(frozen=True)
class Facts:
    """Facts that are known before the first step. Log-probabilities are in nats, from a sample of the training pairs."""

    pairs: int = 0
    #: Mean length in tokens of the chosen answers, and of the rejected answers.
    lengths: tuple[float, ...] = (0.0, 0.0)
    weights: tuple[float, ...] = ()
    chosen_per_token: float = math.nan
    accuracy: float = math.nan
    margins: tuple[float, ...] = ()
    #: The names of datasets in which every pair has weight 0.
    weightless: tuple[str, ...] = ()
    #: Phrases about empty answers, one for each dataset that has some.
    empty: tuple[str, ...] = ()


@dataclass
class History:
    """The input of a check. Records have the names of metrics.jsonl, but without an evaluation's prefix."""

    limits: Limits
    start_loss: float  # NaN until the first record, for objectives whose start depends on the model
    warmup_steps: int
    planned_steps: int
    facts: Facts = field(default_factory=Facts)
    train: list[dict[str, Any]] = field(default_factory=list)
    evals: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    #: Number of pairs of each evaluation dataset, by the prefix of its metrics.
    eval_pairs: dict[str, int] = field(default_factory=dict)
    #: Share of the 16-bit weights that updates changed. NaN if the weights have 32 bits.
    changed: float = math.nan

    def take(self, record: dict[str, Any]) -> bool:
        """Add a log record of training or evaluation. Returns whether the record was of one of these kinds."""
        if "loss" in record:
            self.train.append(record)
            if math.isnan(self.start_loss):
                self.start_loss = number(record["loss"])
            return True
        if (prefix := evaluation_prefix(record)) is None:
            return False
        self.evals.setdefault(prefix, []).append({**without_prefix(record, prefix), "step": record["step"]})
        return True

    def recent(self, metric: str, back: int = 0) -> float:
        """Mean of the metric over the last `windows` records, or over the same number of records `back` windows earlier.

        NaN if there are too few records or one of them lacks the metric. Comparisons with NaN are false, so an unknown mean
        causes no diagnosis.
        """
        count = int(self.limits.windows)
        stop = len(self.train) - back * count
        values = [number(record.get(metric)) for record in self.train[max(stop - count, 0) : max(stop, 0)]]
        return statistics.fmean(values) if len(values) == count else math.nan

    def before(self, metric: str) -> float:
        """The metric of the first step, which is computed before its update; 0 where that was not logged."""
        first = self.train[0] if self.train else {}
        found = number(first.get(metric)) if first.get("step") == 1 else math.nan
        return 0.0 if math.isnan(found) else found

    def falling(self, metric: str) -> float:
        """The recent mean if it is below the mean one window earlier, else NaN."""
        now = self.recent(metric)
        return now if now < self.recent(metric, back=1) else math.nan


def number(value: float | None) -> float:
    """A value of a record as a float. NaN for None."""
    return math.nan if value is None else float(value)


Found = tuple[str, str]  # name in DIAGNOSES, what was seen


def before_training(history: History) -> Iterator[Found]:
    facts, limits, lengths = history.facts, history.limits, history.facts.lengths
    if max(lengths) > limits.length_ratio * min(lengths):
        seen = f"chosen answers have {lengths[0]:.1f} tokens on average, rejected ones {lengths[1]:.1f}"
        yield "lengths_differ", seen
    if facts.weightless:
        seen = f"every pair of {' and '.join(facts.weightless)} has weight 0, so the loss there is 0 and says nothing"
        yield "weights_zero", seen
    if facts.empty:
        yield "empty_answers", "; ".join(facts.empty)
    if (total := sum(facts.weights)) > 0:
        effective = total**2 / sum(weight**2 for weight in facts.weights)
        if effective < limits.weight_share * len(facts.weights):
            seen = f"the weights are so uneven that {len(facts.weights)} pairs count like {effective:.0f}"
            yield "uneven_preferences", seen
    if len(facts.margins) >= FEWEST:
        sizes = sorted(map(abs, facts.margins))
        middle, high = statistics.median(sizes), sizes[math.ceil(0.95 * len(sizes)) - 1]
        if high > limits.margin_spread * middle:
            yield (
                "uneven_preferences",
                f"the reference's log-prob margins are {middle:.1f} nats in the median, but {high:.1f} at the 95th percentile",
            )
    if facts.chosen_per_token < limits.chosen_likelihood:
        yield (
            "weak_reference",
            f"chosen answers have {facts.chosen_per_token:.2f} nats per token under the reference "
            f"(perplexity {math.exp(min(-facts.chosen_per_token, 50)):,.0f})",
        )
    if facts.margins and facts.accuracy < min(limits.reference_accuracy, 0.5 - doubt(len(facts.margins))):
        yield (
            "weak_reference",
            f"under the reference, the chosen answer is likelier per token than the rejected one in only {facts.accuracy:.0%} of "
            f"{len(facts.margins)} pairs",
        )


def doubt(pairs: int) -> float:
    """Two standard errors of an accuracy of 50 % over the given number of pairs."""
    return 1 / math.sqrt(max(pairs, 1))


def _loss_stuck(history: History) -> Iterator[Found]:
    """The loss is still at its start. Rewards, gradients and weights tell the cause."""
    limits = history.limits
    since = history.train[-1]["step"] - history.warmup_steps if history.train else 0
    loss, spread, accuracy = (
        history.recent("loss"),
        history.recent("rewards/margins_std"),
        history.recent("rewards/accuracies"),
    )
    size = max(abs(history.recent("rewards/chosen")), abs(history.recent("rewards/rejected")))
    stuck = loss >= history.start_loss - limits.stuck_tolerance * abs(history.start_loss)
    if not stuck or since < max(limits.stuck_steps, limits.stuck_share * history.planned_steps):
        return
    seen = f"{since} steps past the warm-up the loss is {loss:.4f}, and it starts at {history.start_loss:.4f}"
    if spread <= 1e-3 * max(size, 1e-3) and (size > 1e-6 or history.recent("grad_norm") < 1e-4):
        # Both sides have the same tokens. Their gradients cancel up to rounding errors, from which Adam still makes steps.
        yield "pairs_equal", f"{seen}; over all pairs, the margin between the two answers varies by {spread:.1e}"
    elif max(spread, size) < limits.stuck_rewards:
        if history.changed < limits.changed_share:
            yield (
                "updates_lost",
                f"{seen}; an update changes {history.changed:.1%} of the 16-bit weights that have a gradient",
            )
        else:
            yield "learning_rate_low", f"{seen}; rewards are {size:.1e} in size, and margins vary by {spread:.1e}"
    elif accuracy < limits.swapped_accuracy:
        yield "pairs_swapped", f"{seen}; training accuracy is {accuracy:.0%}"
    elif accuracy < limits.random_accuracy:
        yield "pairs_random", f"{seen}; margins vary by {spread:.2f}, but accuracy is {accuracy:.0%}"


def _swapped_evaluation(history: History) -> Iterator[Found]:
    for name, records in history.evals.items():
        last = records[-1]
        accuracy = number(last.get("rewards/accuracies"))
        moved = number(last.get("rewards/margins_std")) > 0  # before the first update, all pairs are ties
        pairs = history.eval_pairs.get(name, 0)
        if moved and accuracy < min(history.limits.swapped_accuracy, 0.5 - doubt(pairs)):
            seen = f"on {name} the rejected answer has the higher reward in {1 - accuracy:.0%} of {pairs:,} pairs"
            yield "pairs_swapped", seen


def _overfitting(history: History) -> Iterator[Found]:
    """The training loss still improves, but the evaluation does not."""
    limits, accuracy, train = history.limits, history.recent("rewards/accuracies"), history.recent("loss")
    if accuracy <= limits.random_accuracy:
        return  # pairs that are not learnt are not memorised
    for name, records in history.evals.items():
        (least, best), last = min((number(record["loss"]), record["step"]) for record in records), records[-1]
        rise, held_out = number(last["loss"]) - least, number(last.get("rewards/accuracies"))
        margin = doubt(history.eval_pairs.get(name, 0))
        if held_out < 0.5 - margin:
            continue  # the evaluation pairs are labelled by another rule
        known = 2 * last.get("loss_since_best_se", 0.0)
        if train < least and rise > max(limits.eval_rise * abs(history.start_loss), known):
            yield (
                "overfitting",
                f"the loss on {name} rose from {least:.4f} at step {best} to {least + rise:.4f}; in training it is {train:.4f}",
            )
        moved = number(last.get("rewards/margins_std")) > 0
        if moved and accuracy - held_out > max(limits.accuracy_gap, margin):
            yield "overfitting", f"accuracy is {accuracy:.0%} in training and {held_out:.0%} on {name}"
    falling = history.falling("logratios/chosen")
    if not history.evals and accuracy >= limits.memorised_accuracy and falling < -limits.displacement:
        seen = f"training accuracy is {accuracy:.0%} while chosen answers lose {-falling:.2f} nats per token"
        yield "overfitting", seen


def _displacement(history: History) -> Iterator[Found]:
    chosen, rejected = history.falling("logratios/chosen"), history.falling("logratios/rejected")
    if chosen < -history.limits.displacement and rejected < -history.limits.displacement:
        yield (
            "displacement",
            f"against the reference, chosen answers have lost {-chosen:.2f} nats per token and rejected ones {-rejected:.2f}",
        )


def _learning_rate_high(history: History) -> Iterator[Found]:
    """The first steps take the model far from its reference, or training makes the training loss worse."""
    limits, last, loss = history.limits, history.train[-1] if history.train else {}, history.recent("loss")
    if loss > history.start_loss + limits.loss_rise * abs(history.start_loss):
        seen = f"the training loss has risen to {loss:.4f}, and it starts at {history.start_loss:.4f}"
        yield "learning_rate_high", seen
    since = last.get("step", 0) - history.warmup_steps
    early = since <= max(limits.early_steps, limits.early_share * history.planned_steps)
    if early and number(last.get("kl")) - history.before("kl") > limits.kl_level:
        yield (
            "learning_rate_high",
            f"the KL divergence is {last['kl']:.2f} nats per token already",
        )
    # Log-probabilities that were computed beforehand tell no KL.
    elif (
        early
        and last.get("kl") is None
        and (lost := history.before("logratios/chosen") - number(last.get("logratios/chosen"))) > limits.kl_level
    ):
        yield "learning_rate_high", f"chosen answers have lost {lost:.2f} nats per token already"


def _kl_exploding(history: History) -> Iterator[Found]:
    limits = history.limits
    last = number(history.train[-1].get("kl")) if history.train else math.nan
    now, before = history.recent("kl"), history.recent("kl", back=1)
    if last - history.before("kl") > limits.kl_level:
        yield "kl_exploding", f"the KL divergence is {last:.2f} nats per token"
    elif now > limits.kl_level / 5 and now > limits.kl_growth * before:
        yield "kl_exploding", f"the KL divergence grew from {before:.3f} to {now:.3f} nats per token in a few records"


def _grad_spike(history: History) -> Iterator[Found]:
    norms = [number(record.get("grad_norm_max")) for record in history.train[-21:]]
    known = [norm for norm in norms[:-1] if math.isfinite(norm)]
    if len(known) < 5:
        return
    usual = statistics.median(known)
    if math.inf > norms[-1] > history.limits.grad_spike * usual > 0:
        yield "grad_spike", f"the gradient norm is {norms[-1]:.3g}; the median of the records before is {usual:.3g}"


def _weightless_stream(history: History) -> Iterator[Found]:
    """All weights of a stream are 0. They are not known before training, but then loss and gradient are 0 at first."""
    first = history.train[0] if history.train else {}
    if not history.facts.pairs and history.start_loss > 0 and first.get("loss") == 0 and first.get("grad_norm") == 0:
        yield "weights_zero", f"up to step {first['step']} the loss is 0 and so is its gradient"


def _not_finite(history: History) -> Iterator[Found]:
    for name in ("loss", "grad_norm"):
        if history.train and name in history.train[-1]:
            value = number(history.train[-1][name])
            if not math.isfinite(value):
                yield "not_finite", f"{name} is {value}"


CHECKS: tuple[Callable[[History], Iterator[Found]], ...] = (
    _not_finite,
    _weightless_stream,
    _learning_rate_high,
    _loss_stuck,
    _swapped_evaluation,
    _overfitting,
    _displacement,
    _kl_exploding,
    _grad_spike,
)
