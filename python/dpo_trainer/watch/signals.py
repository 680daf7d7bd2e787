"""Ends a run with a checkpoint on SIGTERM or Ctrl-C, so that no step is lost."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..run import Run
from ..run_folder.checkpoints import checkpoints

logger = logging.getLogger("dpo_trainer")


def is_first() -> bool:
    """Whether this is the main process, by the launcher's environment variables. No process group is needed."""
    return int(os.environ.get("RANK", 0)) == 0


def end(signum: int, text: str) -> None:
    """Log `text` and end the run. Raises KeyboardInterrupt for SIGINT and SystemExit with code 143 for SIGTERM."""
    if is_first():
        logger.error("%s: %s", signal.Signals(signum).name, text)
    if signum == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + signum)


@contextlib.contextmanager
def listening(heard: Callable[[int], None]) -> Iterator[None]:
    """A context in which the first SIGTERM or Ctrl-C calls `heard` with its number, and the next ends the process at once.

    Only the main thread can handle signals. In other threads, and for a signal that is ignored, nothing changes.
    """
    since: float | None = None
    # On Ctrl-C, a process gets the signal twice: from the terminal and from its launcher.
    patience = 2.0 if int(os.environ.get("WORLD_SIZE", 1)) > 1 else 0.0

    def handle(signum: int, _: Any) -> None:
        nonlocal since
        if since is None:
            since = time.monotonic()
            heard(signum)
        elif time.monotonic() - since >= patience:
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)

    with contextlib.ExitStack() as stack:
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(signum) not in (signal.SIG_IGN, None):
                    stack.callback(signal.signal, signum, signal.signal(signum, handle))
        yield


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
        """Log from which checkpoint the run can go on, and end."""
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
        """The signal that any process has received; every process gets the same answer.

        With several processes the answer is one step old, so that no process waits for it.
        """
        if args.world_size <= 1:
            return self.heard
        answer, self._asked = int(self._asked), torch.tensor(self.heard, device=args.device)
        torch.distributed.all_reduce(self._asked, torch.distributed.ReduceOp.MAX)
        return answer
