"""What a run writes and prints while it trains: the report, the model at the end, a progress line."""

from __future__ import annotations

import sys
import time
from typing import IO, Any

from rich.console import Console
from rich.control import Control
from rich.segment import ControlType
from rich.text import Text
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy, has_length

from ..data.prepare import by_name
from ..run import Run
from ..run_folder.metrics import evaluation_prefix, without_prefix, without_ties
from ..run_folder.records import SUMMARY
from ..settings import pace


class Pace(TrainerCallback):
    """Give a run its steps between logs, evaluations and checkpoints, where the settings leave them open (`settings.pace`)."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **other: Any) -> None:
        settings, steps = self.run.args, state.max_steps
        if settings.logging_steps is None:
            state.logging_steps = pace.logging_steps(steps)
        if settings.eval_steps is None:
            evaluated = sum(map(len, by_name(self.run.eval_dataset).values()))
            sampled = settings.sample_prompts * len(by_name(self.run.eval_dataset))
            trained = steps * self._pairs_per_step(other["train_dataloader"])
            state.eval_steps = pace.eval_steps(steps, trained, evaluated, sampled)
        if settings.save_steps is None:
            together = settings.load_best_model_at_end and settings.eval_strategy == IntervalStrategy.STEPS
            state.save_steps = pace.save_steps(steps, state.eval_steps if together else None)

    def _pairs_per_step(self, loader: Any) -> float:
        args, dataset = self.run.args, self.run.train_dataset
        if has_length(loader) and has_length(dataset):
            return len(dataset) / max(len(loader) / args.gradient_accumulation_steps, 1)
        return args.train_batch_size * args.gradient_accumulation_steps * args.world_size


class LogAtTheEnd(TrainerCallback):
    """Log, and evaluate if the run evaluates by steps, after the last step, whatever the intervals."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_log = True
            if args.eval_strategy == IntervalStrategy.STEPS:
                control.should_evaluate = True


class ReportFile(TrainerCallback):
    """Write `report.html` at checkpoints and, with `summary.json`, when training ends."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.ended = False

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.ended = False
        self.run.accelerator.wait_for_everyone()  # others may still have to see whether the run had finished
        if state.is_world_process_zero:
            (self.run.args.run_folder / SUMMARY).unlink(missing_ok=True)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step < state.max_steps:  # otherwise the end is near and writes it anyway
            self.run.write_report(finished=False)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.ended = True
        self.run.write_report(finished=True)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.ended:
            self.run.write_report(finished=True)


class SaveAtTheEnd(TrainerCallback):
    """Save the model when training ends, before `summary.json`: a folder that holds a summary holds the model."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.run.save_model()


#: Empties the terminal's line.
_CLEAR = Control(ControlType.CARRIAGE_RETURN, (ControlType.ERASE_IN_LINE, 2))


class ProgressLine(TrainerCallback):
    """One line on a terminal, rewritten as training goes on; elsewhere only evaluations and the end are printed.

    Args:
        stream: where to print; standard error if not given.
        live: rewrite the line; if not given, whether the stream is a terminal.
    """

    def __init__(self, stream: IO[str] | None = None, live: bool | None = None) -> None:
        stream = stream or sys.stderr
        self.live = live if live is not None else stream.isatty()
        self.console = Console(file=stream, force_terminal=self.live, highlight=False)
        self.shown: dict[str, float] = {}
        self.began, self.first_step = 0.0, 0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.began, self.first_step, self.shown = time.monotonic(), state.global_step, {}

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.live and state.is_world_process_zero:
            self._show(self.line(state))

    def on_log(
        self, args: Any, state: TrainerState, control: Any, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        if not state.is_world_process_zero or not logs:
            return
        if "loss" in logs:
            self.shown = logs
            if self.live:
                self._show(self.line(state))
        elif (prefix := evaluation_prefix(logs)) is not None:
            self._print(f"step {state.global_step:>5}  {prefix}: {_figures(without_prefix(logs, prefix))}")

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero and self.shown:
            took = _clock(time.monotonic() - self.began)
            self._print(f"step {state.global_step:>5}  trained in {took}: {_figures(self.shown)}")

    def line(self, state: TrainerState) -> str:
        """Step, share done, the last logged figures and the time left."""
        done = state.global_step - self.first_step
        left = (time.monotonic() - self.began) / done * (state.max_steps - state.global_step) if done else 0.0
        percent = 100 * state.global_step // max(state.max_steps, 1)
        figures = _figures({**self.shown, "time_left": _clock(left)})
        return f"step {state.global_step}/{state.max_steps} {percent:>3}%  {figures}"

    def _show(self, text: str) -> None:
        """Put the text in the live line's place, as many whole figures of it as the terminal is wide."""
        while len(text) > self.console.width and "  " in text:
            text = text.rpartition("  ")[0]
        self.console.control(_CLEAR)
        self.console.print(Text(text), no_wrap=True, overflow="ellipsis", end="")

    def _print(self, text: str) -> None:
        """Put the text in the live line's place, for good."""
        if self.live:
            self.console.control(_CLEAR)
        self.console.print(Text(text), soft_wrap=True)


#: What the lines show of a record, in this order: the metric and its format.
SHOWN = {
    "loss": "loss {:.4f}",
    "rewards/accuracies": "acc {:.0%}",
    "rewards/margins": "margin {:.3f}",
    "kl": "kl {:.4f}",
    "win_rate": "wins {:.0%}",
    "time_left": "{} left",
    "tokens_per_second": "{:,.0f} tok/s",
}


def _figures(record: dict[str, Any]) -> str:
    record = without_ties(record)
    return "  ".join(text.format(record[name]) for name, text in SHOWN.items() if record.get(name) is not None)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
