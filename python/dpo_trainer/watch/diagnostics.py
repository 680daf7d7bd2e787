"""Diagnostics of a run: scores a sample with the reference before training, runs checks at every log, may stop the run."""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from pyarrow.compute import list_value_length
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..data.account import FILTERS
from ..data.prepare import PreparedStream, by_name
from ..data.processor import tokenizer_of
from ..data.rows import REFERENCE, SIDES, has_reference
from ..data.tokens import scored_counts
from ..run import Run
from ..run_folder.journal import Journal
from ..run_folder.records import EVENTS, SUMMARY
from ..run_folder.summary import initial_loss
from ..settings.checks import as_mapping
from ..settings.diagnoses import DIAGNOSES, Limits
from .diagnoses import CHECKS, FEWEST, Facts, Found, History, before_training, number
from .evaluated import shortened

logger = logging.getLogger("dpo_trainer")


def examine(run: Run, limits: Limits) -> Facts:
    """Facts about the data, and about the reference's log-probabilities of a sample spread evenly over the training rows."""
    dataset: Any = run.train_dataset
    evals = by_name(run.eval_dataset).items()
    named = {"the training data": dataset} | {f"the evaluation data {key}".strip(): data for key, data in evals}
    weights = {
        name: list(data["weight"]) for name, data in named.items() if "weight" in getattr(data, "column_names", ())
    }
    weightless = tuple(name for name, values in weights.items() if not any(values))
    tokenizer = tokenizer_of(run.processing_class)
    left_out = [(account.name, account.reasons[FILTERS["empty"]]) for account in run.accounts]
    empty = (
        *(phrase for name, data in named.items() if (phrase := empty_answers(name, data, tokenizer))),
        *(f"{count:,} pairs of {name} were left out with one" for name, count in left_out if count),
    )
    if isinstance(dataset, PreparedStream):
        return Facts(weightless=weightless, empty=empty)  # a stream's pairs are not known before training
    sample = dataset.select(spread(len(dataset), 2048))
    probe = dataset.select(probed(dataset["length"], limits))
    if has_reference(dataset):
        logps = tuple(probe[column] for column in REFERENCE)
    else:
        logps = run.reference_logps(probe, batch_size=run.args.per_device_eval_batch_size)
    return Facts(
        pairs=len(dataset),
        lengths=tuple(statistics.fmean(map(len, sample[f"{side}_ids"])) for side in SIDES),
        weights=tuple(weights.get("the training data", ())),
        weightless=weightless,
        empty=empty,
        **reference_facts(probe, logps),
    )


def reference_facts(pairs: Any, logps: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Facts from the reference's log-probabilities, by the names of `Facts`. Pairs without finite ones are left out.

    Args:
        pairs: a dataset of tokenised pairs.
        logps: log-probabilities of the chosen and of the rejected answers, in nats, in the dataset's order.
    """
    values = torch.tensor([list(side) for side in logps], dtype=torch.float64)
    known = values.isfinite().all(dim=0)
    (chosen, rejected), counts = values[:, known], torch.tensor(scored_counts(pairs)).clamp(min=1)[:, known]
    lead = chosen / counts[0] - rejected / counts[1]
    return {
        "chosen_per_token": (chosen.sum() / counts[0].sum()).item(),
        "accuracy": (lead.sign() / 2 + 0.5).mean().item(),  # a tie is half right
        "margins": tuple((chosen - rejected).tolist()),
    }


def empty_answers(name: str, dataset: Any, tokenizer: Any) -> str:
    """A phrase about the pairs of a tokenised dataset with an answer without text. "" if there are none."""
    if "chosen_ids" not in (getattr(dataset, "column_names", None) or ()):
        return ""
    found = []
    for side in SIDES:
        # An empty answer has few tokens. Longer white space was written on purpose.
        column = dataset.select_columns(f"{side}_ids").with_format("arrow")[:].column(0)
        rows = [row for row, count in enumerate(list_value_length(column).to_pylist()) if count <= 4]
        texts = tokenizer.batch_decode(dataset[rows][f"{side}_ids"], skip_special_tokens=True)
        found += [(row, side) for row, text in zip(rows, texts, strict=True) if not text.strip()]
    if not found:
        return ""
    row, side = min(found)
    pairs = len({row for row, _ in found})
    prompt = tokenizer.decode(dataset[row]["prompt_ids"], skip_special_tokens=True).strip()
    shown = shortened(" ".join(prompt.split()), 60, "...")
    return f"{pairs:,} of {len(dataset):,} pairs of {name} have one; the first is the {side} answer to '{shown}'"


def spread(count: int, wanted: int) -> list[int]:
    """`wanted` row indices out of `count`, evenly spaced. All indices if there are fewer rows than `wanted`."""
    wanted = min(wanted, count)
    return [index * count // wanted for index in range(wanted)]


def probed(lengths: Sequence[int], limits: Limits) -> list[int]:
    """Indices of the rows that the reference scores: `probe_pairs`, or fewer if these have more than `probe_tokens` tokens.

    Args:
        lengths: number of tokens of every row's prompt and longer side together.
    """
    rows = spread(len(lengths), int(limits.probe_pairs))
    tokens = 2 * sum(lengths[row] for row in rows)
    fitting = max(int(min(limits.probe_tokens / max(tokens, 1), 1) * len(rows)), FEWEST)
    return spread(len(lengths), min(fitting, len(rows)))


class ChangedWeights:
    """The share of 16-bit weights with a gradient that an optimizer step changes, measured on a sample of the weights."""

    SAMPLE = 4096  # about this many weights of a parameter
    PARAMETERS = 32  # number of parameters, the largest first

    def __init__(self, model: torch.nn.Module) -> None:
        wanted = [p for p in model.parameters() if p.requires_grad and p.dtype in (torch.bfloat16, torch.float16)]
        self.parameters = sorted(wanted, key=lambda p: p.numel(), reverse=True)[: self.PARAMETERS]
        self.before: list[tuple[Tensor, Tensor, Tensor]] = []
        self.changed: Tensor | float = 0.0
        self.total: Tensor | float = 0.0

    def _sample(self, values: Tensor) -> Tensor:
        flat = values.detach().reshape(-1)
        return flat[:: max(flat.numel() // self.SAMPLE, 1)].clone()

    def remember(self) -> None:
        """Call before an optimizer step."""
        self.before = [(p, self._sample(p), self._sample(p.grad) != 0) for p in self.parameters if p.grad is not None]

    def compare(self) -> None:
        """Call after an optimizer step. Does not synchronise devices."""
        for parameter, old, had_gradient in self.before:
            self.changed = self.changed + ((self._sample(parameter) != old) & had_gradient).sum()
            self.total = self.total + had_gradient.sum()
        self.before = []

    @property
    def share(self) -> float:
        """The share so far. NaN if no trained weight has 16 bits, or none had a gradient yet."""
        total = float(self.total)
        return float(self.changed) / total if total else math.nan


class Diagnostics(TrainerCallback):
    """Runs the checks at every log and evaluation, logs diagnoses, writes `events.jsonl`, and obeys `stop_on`.

    Args:
        run: the run that is watched.
        journal: writes the events.
    """

    def __init__(self, run: Run, journal: Journal) -> None:
        self.run, self.journal = run, journal
        self.announce: Callable[[str], None] = logger.warning
        self.events: list[dict[str, Any]] = []
        self.stopped_by: str | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        config = self.run.args
        limits = Limits.of(as_mapping("diagnostics", config.diagnostics))
        start = number(initial_loss(config))
        self.history = History(limits, start, args.get_warmup_steps(state.max_steps), state.max_steps)
        self.history.eval_pairs = {
            account.name.replace("eval_dataset", "eval").replace(" ", "_"): account.kept
            for account in self.run.accounts
        }
        self.weights = ChangedWeights(self.run.policy.model)
        self.stopped_by = None
        # All processes read the events: a diagnosis may stop the run, so all must agree on which were reported.
        self.events = self.journal.keep(EVENTS, state.global_step)
        for record in state.log_history:
            self.history.take(record)
        if state.global_step and not (self.journal.folder / SUMMARY).exists():
            # A diagnosis stopped the run at this step, and it was killed before it finished. Now it only has to finish.
            told = (event["name"] for event in self.events if event["step"] == state.global_step)
            self.stopped_by = next((name for name in told if name in config.stop_on), None)
            control.should_training_stop = self.stopped_by is not None
        if not state.global_step:
            # All processes examine the data, since a sharded model needs all of them. Only the first one logs.
            self.history.facts = examine(self.run, limits)
            self._tell(state, control, before_training(self.history))

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.weights.remember()

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.weights.compare()

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any) -> None:
        # Evaluations outside of training are not part of the run.
        if logs and self.run.is_in_train and self.history.take({"step": state.global_step, **logs}):
            self.history.changed = self.weights.share
            for check in CHECKS:
                self._tell(state, control, check(self.history))

    def stop_before_update(self, state: TrainerState, control: TrainerControl, seen: str) -> None:
        """Stop the run because a gradient is not finite. Reports the diagnosis unless it was reported before."""
        self._tell(state, control, [("not_finite", f"{seen}; its update was not made")])
        self._stop("not_finite", state, control)

    def _tell(self, state: TrainerState, control: TrainerControl, found: Iterable[Found]) -> None:
        for name, seen in found:
            if any(event["name"] == name for event in self.events):
                continue
            title, remedy = DIAGNOSES[name].title, DIAGNOSES[name].advice(self.run.args.to_dict())
            event = {"step": state.global_step, "name": name, "title": title, "seen": seen, "remedy": remedy}
            self.events.append(event)
            stop = name in self.run.args.stop_on
            if stop:
                self._stop(name, state, control)
            self.journal.append(EVENTS, event)
            if self.journal.first:
                said = f"step {state.global_step}: {title} ({name}): {seen}. {remedy}"
                self.announce(said + (" Stopping, because stop_on contains it." if stop else ""))

    def _stop(self, name: str, state: TrainerState, control: TrainerControl) -> None:
        self.stopped_by = self.stopped_by or name
        control.should_save = state.global_step > 0
        control.should_training_stop = True
