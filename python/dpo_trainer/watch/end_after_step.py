"""An end that loses no step: what SIGTERM and Ctrl-C do to a run."""

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
    """A signal ends training after the step at hand, its evaluation and a checkpoint; before the first step, at once."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.stepping = False
        #: The signal that came, and the one that the run ends for.
        self.heard = self.ending = 0
        self._asked: torch.Tensor | int = 0

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Around a run. Raises KeyboardInterrupt or SystemExit inside."""
        self.stepping, self.heard, self.ending, self._asked = False, 0, 0, 0
        with listening(self._hear):
            yield

    def _hear(self, signum: int) -> None:
        self.heard = signum
        if not self.stepping:
            self.end(signum)
        name = signal.Signals(signum).name
        if is_first():
            logger.warning("%s: ending after the step at hand with a checkpoint; a second signal ends at once", name)

    def end(self, signum: int) -> None:
        """Say which checkpoint there is, and end."""
        found = checkpoints(self.run.args.run_folder)
        if found:
            end(signum, f"stopped; the same command, or train(resume_from_checkpoint=True), goes on from {found[-1]}")
        end(signum, "stopped before the first checkpoint; nothing to go on from was written")

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
        """The signal that any process has heard, the same one on all of them.

        On several processes it is what they had heard a step ago: then no process waits for the answer.
        """
        if args.world_size <= 1:
            return self.heard
        answer, self._asked = int(self._asked), torch.tensor(self.heard, device=args.device)
        torch.distributed.all_reduce(self._asked, torch.distributed.ReduceOp.MAX)
        return answer
