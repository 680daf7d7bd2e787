"""Ends a run with a checkpoint on SIGTERM or Ctrl-C, so that no step is lost."""

from __future__ import annotations

import contextlib
import logging
import signal
from collections.abc import Iterator
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..run import Run
from ..run_folder.checkpoints import checkpoints
from .signals import end, is_first, listening

logger = logging.getLogger("dpo_trainer")


class EndAfterStep(TrainerCallback):
    """Ends training on a signal: after the current step, its evaluation and a checkpoint; at once before the first step."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.stepping = False
        #: The signal that this process received, and the signal for which the run ends; 0 for none.
        self.heard = self.ending = 0
        self._asked: torch.Tensor | int = 0

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """A context for a run, which handles signals. Raises KeyboardInterrupt or SystemExit inside."""
        self.stepping, self.heard, self.ending, self._asked = False, 0, 0, 0
        with listening(self._hear):
            yield

    def _hear(self, signum: int) -> None:
        self.heard = signum
        if not self.stepping:
            self.end(signum)
        name = signal.Signals(signum).name
        if is_first():
            logger.warning("%s: ending after the current step with a checkpoint; a second signal ends at once", name)

    def end(self, signum: int) -> None:
        """Log from which checkpoint the run can resume, and end it."""
        found = checkpoints(self.run.args.run_folder)
        if found:
            end(signum, f"stopped; the same command, or train(resume_from_checkpoint=True), resumes from {found[-1]}")
        end(signum, "stopped before the first checkpoint, so there is nothing to resume from")

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.stepping = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._stop(self._agreed(args), state, control)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.stepping and args.world_size <= 1:
            self._stop(self.heard, state, control)

    def _stop(self, signum: int, state: TrainerState, control: TrainerControl) -> None:
        if signum and state.global_step < state.max_steps:  # after the last step the run ends in any case
            self.ending = signum
            control.should_save = control.should_training_stop = True

    def _agreed(self, args: TrainingArguments) -> int:
        """The signal that any process has received; every process gets the same answer.

        With several processes the answer is one step old, so that no process waits for it.
        """
        if args.world_size <= 1:
            return self.heard
        answer, self._asked = int(self._asked), torch.tensor(self.heard, device=args.device)
        torch.distributed.all_reduce(self._asked, torch.distributed.ReduceOp.MAX)
        return answer
