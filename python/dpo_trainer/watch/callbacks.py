"""Callbacks that write and print during training: the report, the model at the end, a progress line."""

from __future__ import annotations

import time
from typing import IO, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy, has_length

from ..data.prepare import by_name
from ..progress import Line, Phase, clock
from ..run import Run
from ..run_folder.metrics import evaluation_prefix, without_prefix, without_ties
from ..run_folder.records import SUMMARY
from ..settings import pace


class Pace(TrainerCallback):
    """Sets the steps between logs, evaluations and checkpoints that the settings leave open, see `settings.pace`."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **other: Any
    ) -> None:
        settings, steps = self.run.args, state.max_steps
        if settings.logging_steps is None:
            state.logging_steps = pace.logging_steps(steps)
        together = settings.load_best_model_at_end and settings.eval_strategy == settings.save_strategy == "steps"
        if settings.eval_steps is None:
            evaluated = sum(map(len, by_name(self.run.eval_dataset).values()))
            sampled = settings.sample_prompts * len(by_name(self.run.eval_dataset))
            trained = steps * self._pairs_per_step(other["train_dataloader"])
            state.eval_steps = pace.eval_steps(steps, trained, evaluated, sampled)
            if together and settings.save_steps is not None:
                state.eval_steps = pace.dividing(state.eval_steps, int(state.save_steps))
        if settings.save_steps is None:
            state.save_steps = pace.save_steps(steps, state.eval_steps if together else None)

    def _pairs_per_step(self, loader: Any) -> float:
        args, dataset = self.run.args, self.run.train_dataset
        if has_length(loader) and has_length(dataset):
            return len(dataset) / max(len(loader) / args.gradient_accumulation_steps, 1)
        return args.train_batch_size * args.gradient_accumulation_steps * args.world_size


class LogAtTheEnd(TrainerCallback):
    """Logs after the last step, whatever the interval. If the run evaluates by steps, it also evaluates then."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_log = True
            if args.eval_strategy == IntervalStrategy.STEPS:
                control.should_evaluate = True


class ReportFile(TrainerCallback):
    """Writes `report.html` at checkpoints. When training ends, it also writes `summary.json`."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.ended = False

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.ended = False
        self.run.accelerator.wait_for_everyone()  # other processes may not have read yet whether the run was finished
        if state.is_world_process_zero:
            (self.run.args.run_folder / SUMMARY).unlink(missing_ok=True)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step < state.max_steps:  # after the last step, on_train_end writes it
            self.run.write_report(finished=False)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.ended = True
        self.run.write_report(finished=True)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.ended:
            self.run.write_report(finished=True)


class SaveAtTheEnd(TrainerCallback):
    """Saves the model when training ends, before `summary.json`. So every folder with a summary has the model."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.run.save_model()


class ProgressLine(TrainerCallback):
    """Shows progress: on a terminal one line that is rewritten; elsewhere one line a minute. Evaluations and the end stay.

    Args:
        stream: where to print; standard error if not given.
        live: whether to rewrite the line; if not given, whether the stream is a terminal.
    """

    def __init__(self, stream: IO[str] | None = None, live: bool | None = None) -> None:
        self.out = Line(stream, live)
        self.shown: dict[str, float] = {}
        self.began, self.told, self.first_step = 0.0, 0.0, 0
        #: The current evaluation.
        self.evaluation: Phase | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.began = self.told = time.monotonic()
        self.first_step, self.shown = state.global_step, {}

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero and (self.out.live or time.monotonic() - self.told >= self.out.pause):
            self._tell(self.line(state), live=True)

    def on_substep_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if not self.out.live:  # a step may take minutes
            self.on_step_end(args, state, control)

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **other: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        if self.evaluation is None:
            loader = other.get("eval_dataloader")
            self.evaluation = Phase(self.out, "evaluating", len(loader) if has_length(loader) else None, "batches")
        self.evaluation.advance()

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._end_evaluation()

    def on_predict(self, args: Any, state: Any, control: Any, metrics: Any, **_: Any) -> None:
        self._end_evaluation()

    def _end_evaluation(self) -> None:
        if self.evaluation is not None:
            self.out.clear()
            self.evaluation, self.told = None, time.monotonic()

    def on_log(
        self, args: Any, state: TrainerState, control: Any, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        if not state.is_world_process_zero or not logs:
            return
        if "loss" in logs:
            self.shown = logs
            if self.out.live:
                self._tell(self.line(state), live=True)
        elif (prefix := evaluation_prefix(logs)) is not None:
            self._end_evaluation()
            self._tell(f"step {state.global_step:>5}  {prefix}: {_figures(without_prefix(logs, prefix))}")

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero and self.shown:
            took = clock(time.monotonic() - self.began)
            self._tell(f"step {state.global_step:>5}  trained in {took}: {_figures(self.shown)}")

    def line(self, state: TrainerState) -> str:
        """The step, the percentage that is done, the last logged figures and the remaining time."""
        done = state.global_step - self.first_step
        left = (time.monotonic() - self.began) / done * (state.max_steps - state.global_step) if done else 0.0
        percent = 100 * state.global_step // max(state.max_steps, 1)
        figures = _figures({**self.shown, **({"time_left": clock(left)} if done else {})})
        return f"step {state.global_step}/{state.max_steps} {percent:>3}%  {figures}"

    def _tell(self, text: str, *, live: bool = False) -> None:
        """Print the text. With `live`, the next text replaces it on a terminal."""
        self.told = time.monotonic()
        (self.out.show if live else self.out.print)(text)


#: The metrics of a record that a line shows, in this order, with their format.
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
