"""What goes wrong in preference training, told while it goes wrong: each diagnosis with its figures and a remedy.

A diagnosis is a function of the run's log records, the facts known before the first step (`Facts`) and the thresholds
(`Limits`). It speaks once a run. Adding one: a row in DIAGNOSES, a check in CHECKS.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..data.rows import REFERENCE
from ..errors import ConfigError, did_you_mean
from ..run_folder.records import EVENTS, SUMMARY, append_record, keep_records, read_records

if TYPE_CHECKING:
    from torch import Tensor

    from ..trainer import DPOTrainer

logger = logging.getLogger("dpo_trainer")

SIDES = ("chosen", "rejected")
#: Margins from which a 95th percentile is taken at the least.
FEWEST = 16


@dataclass(frozen=True)
class Diagnosis:
    """A condition that is watched for: its name in a sentence, and what to do about it."""

    title: str
    remedy: str
    #: Thresholds that decide it: fields of Limits.
    limits: tuple[str, ...] = ()


#: When a loss counts as stuck.
_STUCK = ("stuck_steps", "stuck_share", "stuck_tolerance")

DIAGNOSES: dict[str, Diagnosis] = {
    "learning_rate_low": Diagnosis(
        "The loss is stuck where it started and the rewards do not move",
        "Raise the learning rate tenfold (5e-7 to 5e-6 for whole models, 1e-5 to 1e-4 with LoRA), and check that the "
        "parameters you mean to train require gradients.",
        (*_STUCK, "stuck_rewards"),
    ),
    "updates_lost": Diagnosis(
        "The loss is stuck where it started because updates are lost to rounding",
        "16-bit weights cannot take updates of this size. Load the model in float32 (the default) and set bf16: true for "
        "16-bit arithmetic on float32 weights, or train a LoRA adapter in float32.",
        (*_STUCK, "stuck_rewards", "changed_share"),
    ),
    "pairs_random": Diagnosis(
        "The rewards move, but chosen answers win no more often than by chance",
        "Read twenty pairs: is the preference visible in the text, and the same kind of preference throughout? Filter "
        "unclear pairs, give weights, or set label_smoothing. A learning rate that is far too high looks the same.",
        (*_STUCK, "random_accuracy"),
    ),
    "pairs_equal": Diagnosis(
        "Chosen and rejected answers are the same to the model",
        "Look at the batches (dpo-train inspect): a truncation that cuts both answers to the same tokens, a template "
        "or a collator that puts one text on both sides.",
        _STUCK,
    ),
    "pairs_swapped": Diagnosis(
        "Rejected answers win: accuracy is well under 50 %",
        "Check that the columns chosen and rejected are not swapped, in training and in evaluation data, and that both "
        "were labelled by the same rule.",
        (*_STUCK, "swapped_accuracy"),
    ),
    "overfitting": Diagnosis(
        "The model memorises the training pairs",
        "Stop here or go back to the best checkpoint; fewer epochs, a lower learning rate, a larger beta, more pairs, "
        "or label_smoothing.",
        ("eval_rise", "accuracy_gap", "memorised_accuracy", "displacement"),
    ),
    "kl_exploding": Diagnosis(
        "The policy is running away from the reference",
        "Lower the learning rate, raise beta, or stop at an earlier checkpoint.",
        ("kl_level", "kl_growth"),
    ),
    "weak_reference": Diagnosis(
        "The reference is weak on these pairs",
        "Fine-tune on the chosen answers first (SFT), and use the chat template the model was trained with: DPO moves "
        "probability between answers the model can already give. If its accuracy is low, check for swapped columns.",
        ("chosen_likelihood", "reference_accuracy"),
    ),
    "uneven_preferences": Diagnosis(
        "A few pairs outweigh the rest",
        "Look at the extreme pairs: filter them, cap the weights, or give a column weight with the confidence of "
        "each preference.",
        ("margin_spread", "weight_share"),
    ),
    "displacement": Diagnosis(
        "Likelihood displacement: chosen and rejected answers both become less likely",
        "The margin grows while good answers are unlearnt. Add the chosen answers' likelihood to the loss "
        "(loss_type: rpo or dpop, or [sigmoid, sft]), lower the learning rate, or filter pairs whose answers are "
        "nearly alike.",
        ("displacement",),
    ),
    "weights_zero": Diagnosis(
        "No pair counts: all weights are 0",
        "Give the column weight a positive number for each pair that should count, or leave the column out.",
    ),
    "lengths_differ": Diagnosis(
        "Chosen and rejected answers differ in length",
        "The model may learn length for quality. Balance the lengths, set ld_alpha below 1, or use a length-normalised "
        "objective (loss_type: sigmoid_norm or simpo).",
        ("length_ratio",),
    ),
    "grad_spike": Diagnosis(
        "A gradient far above the usual",
        "A lone spike points to odd pairs at this step: very long, garbled or extreme ones. Repeated ones: lower the "
        "learning rate, lengthen the warm-up, keep max_grad_norm at 1.",
        ("grad_spike",),
    ),
    "not_finite": Diagnosis(
        "The loss or the gradient is not a number",
        "Lower the learning rate; use bf16 instead of fp16; check the data's weights and reference columns for "
        "infinities.",
    ),
}


#: Thresholds that speak when something is below them; the others speak above.
_SPEAK_BELOW = (
    "stuck_tolerance",
    "stuck_rewards",
    "changed_share",
    "random_accuracy",
    "swapped_accuracy",
    "chosen_likelihood",
    "reference_accuracy",
    "weight_share",
)


def _limit(default: float, meaning: str) -> float:
    return cast(float, field(default=default, metadata={"help": meaning}))


@dataclass(frozen=True)
class Limits:
    """The thresholds. Given as None, a threshold becomes the infinity that is never passed, which turns its check off."""

    windows: float = _limit(5, "logged records that count as recent")
    probe_pairs: float = _limit(32, "training pairs that the reference is asked about before the first step, or ...")
    probe_tokens: float = _limit(2048, "... 16 to so many that have this many tokens")
    stuck_steps: float = _limit(20, "steps after the warm-up before the loss may be called stuck, and at least ...")
    stuck_share: float = _limit(0.1, "... this share of the run")
    stuck_tolerance: float = _limit(0.015, "stuck: less than this share of the first loss below it")
    stuck_rewards: float = _limit(0.02, "rewards below this do not move")
    changed_share: float = _limit(0.5, "of the 16-bit weights with a gradient, that an update must change")
    random_accuracy: float = _limit(0.58, "up to this, accuracy is near 50 %")
    swapped_accuracy: float = _limit(0.4, "below this, it is well under 50 %")
    eval_rise: float = _limit(0.1, "rise of the evaluation loss over its least, as a share of the first loss")
    accuracy_gap: float = _limit(0.25, "training accuracy above evaluation accuracy")
    memorised_accuracy: float = _limit(0.99, "with chosen log-probs falling by more than `displacement`")
    kl_level: float = _limit(1.0, "nats per token")
    kl_growth: float = _limit(4.0, "recent KL over that of the windows before, from a fifth of kl_level on")
    chosen_likelihood: float = _limit(-4.0, "mean log-prob per chosen token under the reference, in nats")
    reference_accuracy: float = _limit(0.4, "share of pairs whose chosen answer is likelier per token")
    margin_spread: float = _limit(10.0, "95th percentile of the reference's |margins| over their median")
    weight_share: float = _limit(0.5, "effective number of pairs, (sum w)^2 / sum w^2, over their number")
    displacement: float = _limit(0.1, "nats per token lost on both sides")
    length_ratio: float = _limit(1.5, "mean completion lengths, either way round")
    grad_spike: float = _limit(10.0, "over the median of the records before")

    @classmethod
    def of(cls, given: Mapping[str, Any] | None) -> Limits:
        """The defaults with the given ones put over them. Raises ConfigError for unknown names and bad values."""
        names = [item.name for item in dataclasses.fields(cls)]
        fitted: dict[str, float] = {}
        for name, value in (given or {}).items():
            if name not in names:
                raise ConfigError(
                    f"diagnostics: unknown threshold '{name}'{did_you_mean(name, names)}; known are {', '.join(names)}"
                )
            try:
                number = None if value is None else float(value)
            except (TypeError, ValueError):
                number = math.nan
            if isinstance(value, bool) or (number is not None and not math.isfinite(number)):
                raise ConfigError(f"diagnostics.{name}: expected a number, or null to turn it off, got {value!r}")
            if name in ("windows", "probe_pairs") and (number is None or number < 1 or number != int(number)):
                raise ConfigError(f"diagnostics.{name}: must be a whole number from 1, got {value}")
            if number is not None and number < 0 and name != "chosen_likelihood":
                raise ConfigError(f"diagnostics.{name}: must not be negative, got {value}")
            fitted[name] = number if number is not None else -math.inf if name in _SPEAK_BELOW else math.inf
        return cls(**fitted)


@dataclass(frozen=True)
class Facts:
    """What is known before the first step. Log-probabilities in nats, of a sample of the training pairs."""

    pairs: int = 0
    chosen_length: float = 0.0
    rejected_length: float = 0.0
    weights: tuple[float, ...] = ()
    chosen_per_token: float = math.nan
    accuracy: float = math.nan
    margins: tuple[float, ...] = ()
    #: The names of datasets in which every pair weighs 0.
    weightless: tuple[str, ...] = ()


@dataclass
class Run:
    """Everything a check may look at; records have the names of metrics.jsonl without an evaluation's prefix."""

    limits: Limits
    start_loss: float  # NaN until the first record, for objectives whose start depends on the model
    warmup_steps: int
    planned_steps: int
    facts: Facts = field(default_factory=Facts)
    train: list[dict[str, Any]] = field(default_factory=list)
    evals: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    eval_pairs: int = 0
    #: Share of the 16-bit weights that updates changed; NaN where the weights have 32 bits.
    changed: float = math.nan

    def recent(self, metric: str, back: int = 0) -> float:
        """Mean of the metric over the last `windows` records, or over those `back` times as far back.

        NaN where there are too few or one lacks it: comparisons with NaN are false, so what is not known fires nothing.
        """
        count = int(self.limits.windows)
        stop = len(self.train) - back * count
        values = [number(record.get(metric)) for record in self.train[max(stop - count, 0) : max(stop, 0)]]
        return statistics.fmean(values) if len(values) == count else math.nan

    def falling(self, metric: str) -> float:
        """The recent mean where it is below the mean before, else NaN."""
        now = self.recent(metric)
        return now if now < self.recent(metric, back=1) else math.nan


def number(value: float | None) -> float:
    """The value of a record, NaN where there is none."""
    return math.nan if value is None else float(value)


Found = tuple[str, str]  # name in DIAGNOSES, what was seen


def _before_training(run: Run) -> Iterator[Found]:
    facts, limits = run.facts, run.limits
    lengths = (facts.chosen_length, facts.rejected_length)
    if max(lengths) > limits.length_ratio * min(lengths):
        yield (
            "lengths_differ",
            f"chosen answers have {lengths[0]:.1f} tokens on average, rejected ones {lengths[1]:.1f}",
        )
    if facts.weightless:
        yield (
            "weights_zero",
            f"every pair of {' and '.join(facts.weightless)} has weight 0, so the loss there is 0 and says nothing",
        )
    if (total := sum(facts.weights)) > 0:
        effective = total**2 / sum(weight**2 for weight in facts.weights)
        if effective < limits.weight_share * len(facts.weights):
            yield (
                "uneven_preferences",
                f"the weights are so uneven that {len(facts.weights)} pairs count like {effective:.0f}",
            )
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
            f"under the reference the chosen answer is the likelier one, per token, in only {facts.accuracy:.0%} of "
            f"{len(facts.margins)} pairs",
        )


def doubt(pairs: int) -> float:
    """Two standard deviations of the share of heads in so many throws of a fair coin."""
    return 1 / math.sqrt(max(pairs, 1))


def _loss_stuck(run: Run) -> Iterator[Found]:
    """The loss has not left its start; what the rewards, gradients and weights do tells the cause."""
    limits = run.limits
    since = run.train[-1]["step"] - run.warmup_steps if run.train else 0
    loss, spread, accuracy = run.recent("loss"), run.recent("rewards/margins_std"), run.recent("rewards/accuracies")
    size = max(abs(run.recent("rewards/chosen")), abs(run.recent("rewards/rejected")))
    stuck = loss >= run.start_loss - limits.stuck_tolerance * abs(run.start_loss)
    if not stuck or since < max(limits.stuck_steps, limits.stuck_share * run.planned_steps):
        return
    seen = f"{since} steps past the warm-up the loss is {loss:.4f}, and it starts at {run.start_loss:.4f}"
    if spread <= 1e-3 * max(size, 1e-3) and (size > 1e-6 or run.recent("grad_norm") < 1e-4):
        # Two sides with the same tokens: the gradient cancels but for rounding, which Adam still turns into steps.
        yield "pairs_equal", f"{seen}; over all pairs, the margin between the two answers varies by {spread:.1e}"
    elif max(spread, size) < limits.stuck_rewards:
        if run.changed < limits.changed_share:
            yield (
                "updates_lost",
                f"{seen}; an update changes {run.changed:.1%} of the 16-bit weights that have a gradient",
            )
        else:
            yield "learning_rate_low", f"{seen}; rewards are {size:.1e} in size, and margins vary by {spread:.1e}"
    elif accuracy < limits.swapped_accuracy:
        yield "pairs_swapped", f"{seen}; training accuracy is {accuracy:.0%}"
    elif accuracy < limits.random_accuracy:
        yield "pairs_random", f"{seen}; margins vary by {spread:.2f}, but accuracy is {accuracy:.0%}"


def _swapped_evaluation(run: Run) -> Iterator[Found]:
    for name, records in run.evals.items():
        last = records[-1]
        accuracy = number(last.get("rewards/accuracies"))
        moved = number(last.get("rewards/margins_std")) > 0  # before that, all pairs are ties
        if moved and accuracy < min(run.limits.swapped_accuracy, 0.5 - doubt(run.eval_pairs)):
            yield (
                "pairs_swapped",
                f"on {name} the rejected answer has the higher reward in {1 - accuracy:.0%} of the pairs",
            )


def _overfitting(run: Run) -> Iterator[Found]:
    limits, accuracy, train = run.limits, run.recent("rewards/accuracies"), run.recent("loss")
    for name, records in run.evals.items():
        (least, best), last = min((number(record["loss"]), record["step"]) for record in records), records[-1]
        rise = number(last["loss"]) - least
        if train < least and rise > limits.eval_rise * abs(run.start_loss):
            yield (
                "overfitting",
                f"the loss on {name} rose from {least:.4f} at step {best} to {least + rise:.4f}; in training it is {train:.4f}",
            )
        held_out = number(last.get("rewards/accuracies"))
        moved = number(last.get("rewards/margins_std")) > 0
        if moved and accuracy - held_out > max(limits.accuracy_gap, doubt(run.eval_pairs)):
            yield "overfitting", f"accuracy is {accuracy:.0%} in training and {held_out:.0%} on {name}"
    falling = run.falling("logratios/chosen")
    if accuracy >= limits.memorised_accuracy and falling < -limits.displacement:
        yield (
            "overfitting",
            f"training accuracy is {accuracy:.0%} while chosen answers lose {-falling:.2f} nats per token",
        )


def _displacement(run: Run) -> Iterator[Found]:
    chosen, rejected = run.falling("logratios/chosen"), run.falling("logratios/rejected")
    if chosen < -run.limits.displacement and rejected < -run.limits.displacement:
        yield (
            "displacement",
            f"against the reference, chosen answers have lost {-chosen:.2f} nats per token and rejected ones {-rejected:.2f}",
        )


def _kl_exploding(run: Run) -> Iterator[Found]:
    limits = run.limits
    last = number(run.train[-1].get("kl")) if run.train else math.nan
    now, before = run.recent("kl"), run.recent("kl", back=1)
    if last > limits.kl_level:
        yield "kl_exploding", f"the KL divergence is {last:.2f} nats per token"
    elif now > limits.kl_level / 5 and now > limits.kl_growth * before:
        yield "kl_exploding", f"the KL divergence grew from {before:.3f} to {now:.3f} nats per token in a few records"


def _grad_spike(run: Run) -> Iterator[Found]:
    norms = [number(record.get("grad_norm_max")) for record in run.train[-21:]]
    known = [norm for norm in norms[:-1] if math.isfinite(norm)]
    if len(known) < 5:
        return
    usual = statistics.median(known)
    if math.inf > norms[-1] > run.limits.grad_spike * usual > 0:
        yield "grad_spike", f"the gradient norm is {norms[-1]:.3g}; the median of the records before is {usual:.3g}"


def _weightless_stream(run: Run) -> Iterator[Found]:
    """Of a stream no weights are known beforehand; that its first steps have no loss and no gradient shows them."""
    first = run.train[0] if run.train else {}
    if not run.facts.pairs and run.start_loss > 0 and first.get("loss") == 0 and first.get("grad_norm") == 0:
        yield "weights_zero", f"up to step {first['step']} the loss is 0 and so is its gradient"


def _not_finite(run: Run) -> Iterator[Found]:
    for name in ("loss", "grad_norm"):
        if run.train and name in run.train[-1]:
            value = number(run.train[-1][name])
            if not math.isfinite(value):
                yield "not_finite", f"{name} is {value}"


CHECKS: tuple[Callable[[Run], Iterator[Found]], ...] = (
    _not_finite,
    _weightless_stream,
    _loss_stuck,
    _swapped_evaluation,
    _overfitting,
    _displacement,
    _kl_exploding,
    _grad_spike,
)


def examine(trainer: DPOTrainer, limits: Limits) -> Facts:
    """Look at the training data and at what the reference makes of a sample of it, spread evenly over the rows."""
    dataset: Any = trainer.train_dataset
    evals = trainer.eval_dataset if isinstance(trainer.eval_dataset, dict) else {"": trainer.eval_dataset}
    named = {
        "the training data": dataset,
        **{f"the evaluation data {key}".strip(): data for key, data in evals.items()},
    }
    weightless = tuple(name for name, data in named.items() if _weighs_nothing(data))
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "column_names") or not len(dataset):
        return Facts(weightless=weightless)  # a stream: nothing is known before it flows
    sample = dataset.select(spread(len(dataset), 2048))
    lengths = [statistics.fmean(map(len, sample[f"{side}_input_ids"])) for side in SIDES]
    weights = tuple(float(weight) for weight in dataset["weight"]) if "weight" in dataset.column_names else ()
    probe = dataset.select(probed(dataset["length"], limits))
    if all(column in dataset.column_names for column in REFERENCE):
        logps = tuple(probe[column] for column in REFERENCE)
    else:
        logps = trainer.reference_logps(probe, batch_size=trainer.args.per_device_eval_batch_size)
    chosen, rejected = (torch.tensor(values, dtype=torch.float64) for values in logps)
    unscored = torch.tensor([not ids for ids in probe["prompt_input_ids"]])  # first tokens, which follow nothing
    chosen_counts, rejected_counts = (
        (torch.tensor([len(ids) for ids in probe[f"{side}_input_ids"]]) - unscored.long()).clamp(min=1)
        for side in SIDES
    )
    known = chosen.isfinite() & rejected.isfinite()
    chosen, rejected, chosen_counts, rejected_counts = (
        values[known] for values in (chosen, rejected, chosen_counts, rejected_counts)
    )
    lead = chosen / chosen_counts - rejected / rejected_counts
    return Facts(
        pairs=len(dataset),
        chosen_length=lengths[0],
        rejected_length=lengths[1],
        weights=weights,
        chosen_per_token=(chosen.sum() / chosen_counts.sum()).item(),
        accuracy=(lead.sign() / 2 + 0.5).mean().item(),  # a tie is half right
        margins=tuple((chosen - rejected).tolist()),
        weightless=weightless,
    )


def _weighs_nothing(dataset: Any) -> bool:
    return "weight" in (getattr(dataset, "column_names", None) or ()) and not any(dataset["weight"])


def spread(count: int, wanted: int) -> list[int]:
    """So many places, or all, spread evenly over a dataset's rows."""
    wanted = min(wanted, count)
    return [index * count // wanted for index in range(wanted)]


def probed(lengths: Sequence[int], limits: Limits) -> list[int]:
    """The rows to ask the reference about: `probe_pairs`, or fewer where those have more than `probe_tokens` tokens.

    Args:
        lengths: tokens of every row's longer side, prompt included.
    """
    rows = spread(len(lengths), int(limits.probe_pairs))
    tokens = 2 * sum(lengths[row] for row in rows)
    fitting = max(int(min(limits.probe_tokens / max(tokens, 1), 1) * len(rows)), FEWEST)
    return spread(len(lengths), min(fitting, len(rows)))


class ChangedWeights:
    """The share of 16-bit weights that an optimizer step changes, of those that had a gradient, on a sample."""

    SAMPLE = 4096  # weights of a parameter
    PARAMETERS = 32  # the largest ones

    def __init__(self, model: torch.nn.Module) -> None:
        wanted = [p for p in model.parameters() if p.requires_grad and p.dtype in (torch.bfloat16, torch.float16)]
        self.parameters = sorted(wanted, key=lambda p: p.numel(), reverse=True)[: self.PARAMETERS]
        self.before: list[tuple[Tensor, Tensor]] = []
        self.changed: Tensor | float = 0.0
        self.total: Tensor | float = 0.0

    def _sample(self, values: Tensor) -> Tensor:
        flat = values.detach().reshape(-1)
        return flat[:: max(flat.numel() // self.SAMPLE, 1)].clone()

    def remember(self) -> None:
        """Call before an optimizer step."""
        self.before = [
            (
                self._sample(p),
                self._sample(p.grad) != 0 if p.grad is not None else torch.zeros_like(self._sample(p)).bool(),
            )
            for p in self.parameters
        ]

    def compare(self) -> None:
        """Call after it. Waits for nothing."""
        for parameter, (old, had_gradient) in zip(self.parameters, self.before, strict=True):
            self.changed = self.changed + ((self._sample(parameter) != old) & had_gradient).sum()
            self.total = self.total + had_gradient.sum()
        self.before = []

    @property
    def share(self) -> float:
        """NaN where no trained weight has 16 bits, or none had a gradient yet."""
        total = float(self.total)
        return float(self.changed) / total if total else math.nan


class Diagnostics(TrainerCallback):
    """Runs the checks at every log and evaluation, writes `events.jsonl`, tells, and stops the run where asked to.

    Args:
        trainer: the trainer watched.
        announce: prints a line.
    """

    def __init__(self, trainer: DPOTrainer, announce: Callable[[str], None] = logger.warning) -> None:
        self.trainer = trainer
        self.announce = announce
        self.events: list[dict[str, Any]] = []
        self.stopped_by: str | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        from ..report.page import initial_loss

        config = self.trainer.args
        limits = Limits.of(cast("dict[str, Any]", config.diagnostics))
        start = number(initial_loss(config))
        self.run = Run(limits, start, args.get_warmup_steps(state.max_steps), state.max_steps)
        self.run.eval_pairs = sum(account.kept for account in self.trainer.accounts if account.name.startswith("eval"))
        self.weights = ChangedWeights(self.trainer.policy.model)
        self.stopped_by = None
        path = Path(str(args.output_dir)) / EVENTS
        if state.is_world_process_zero:
            self.events = keep_records(path, state.global_step)
        else:  # all processes must agree on what was told, since a diagnosis may stop the run
            self.events = [event for event in read_records(path) if 0 < state.global_step >= event["step"]]
        for record in state.log_history:
            self._take(record)
        last = [event["name"] for event in self.events if event["step"] == state.global_step]
        if state.global_step and not (path.parent / SUMMARY).exists():
            # The run stopped here and was killed before it had finished; only that is left.
            self.stopped_by = next((name for name in last if name in self.trainer.args.stop_on), None)
            control.should_training_stop = self.stopped_by is not None
        if not state.global_step:
            # Every process looks, since a sharded model needs them all; the first one speaks.
            self.run.facts = examine(self.trainer, self.run.limits)
            self._tell(state, control, _before_training(self.run))

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        if self.weights.parameters:
            self.weights.remember()

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        if self.weights.parameters:
            self.weights.compare()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        # An evaluation outside of training is the caller's own.
        if logs and self.trainer.is_in_train and self._take({"step": state.global_step, **logs}):
            self.run.changed = self.weights.share
            for check in CHECKS:
                self._tell(state, control, check(self.run))

    def stop_before_update(self, state: TrainerState, control: TrainerControl, seen: str) -> None:
        """Stop the run for a gradient that is not finite, and tell of it if that has not been told."""
        self._tell(state, control, iter([("not_finite", f"{seen}; its update was not made")]))
        self._stop("not_finite", state, control)

    def _take(self, record: dict[str, Any]) -> bool:
        """Add a log record to the run; whether it was one of training or evaluation."""
        if "loss" in record:
            self.run.train.append(record)
            if math.isnan(self.run.start_loss):
                self.run.start_loss = number(record["loss"])
            return True
        prefix = evaluation_prefix(record)
        if prefix is None:
            return False
        own = {name[len(prefix) + 1 :]: value for name, value in record.items() if name.startswith(prefix + "_")}
        self.run.evals.setdefault(prefix, []).append({**own, "step": record["step"]})
        return True

    def _tell(self, state: TrainerState, control: TrainerControl, found: Iterator[Found]) -> None:
        for name, seen in found:
            if any(event["name"] == name for event in self.events):
                continue
            diagnosis = DIAGNOSES[name]
            event = {
                "step": state.global_step,
                "name": name,
                "title": diagnosis.title,
                "seen": seen,
                "remedy": diagnosis.remedy,
            }
            self.events.append(event)
            stop = name in self.trainer.args.stop_on
            if stop:
                self._stop(name, state, control)
            if state.is_world_process_zero:
                append_record(Path(str(self.trainer.args.output_dir)) / EVENTS, event)
                self.announce(describe(event) + (" Stopping, as stop_on asks." if stop else ""))

    def _stop(self, name: str, state: TrainerState, control: TrainerControl) -> None:
        self.stopped_by = self.stopped_by or name
        control.should_save = state.global_step > 0
        control.should_training_stop = True


def evaluation_prefix(record: Mapping[str, Any]) -> str | None:
    """ "eval", or "eval_" and the dataset's name, for a record of an evaluation."""
    return next((name[: -len("_loss")] for name in record if name.startswith("eval") and name.endswith("_loss")), None)


def describe(event: Mapping[str, Any]) -> str:
    """The event as a line."""
    return f"step {event['step']}: {event['title']} ({event['name']}): {event['seen']}. {event['remedy']}"
