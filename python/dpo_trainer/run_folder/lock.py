"""One run a folder, and an end that loses no step: the lock of `output_dir`, and what SIGTERM and Ctrl-C do."""

from __future__ import annotations

import contextlib
import getpass
import json
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..errors import OutputError
from .checkpoints import checkpoints
from .records import writing

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from ..trainer import DPOTrainer

logger = logging.getLogger("dpo_trainer")

LOCK = "run.lock"

# --- the lock ------------------------------------------------------------------------------------------------------

_held: set[Path] = set()


@contextlib.contextmanager
def run_lock(folder: Path, *, first: bool = True) -> Iterator[None]:
    """Hold the folder against other runs while the block lasts; a folder that is then empty, and was not there, is removed.

    The operating system's lock on `run.lock` decides: it ends with the process that holds it, however that ends. The file
    says who holds it, for the message. A process that holds the folder already enters at once.

    Args:
        folder: the run's folder; made if it is not there.
        first: whether this is the main process; the others take no lock.

    Raises:
        OutputError: another run holds the folder, or its owner was on another host, where nobody can see whether it lives.
    """
    path = folder.absolute() / LOCK
    if not first or path in _held:
        yield
        return
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    with writing(path):
        folder.mkdir(parents=True, exist_ok=True)
        file = _taken(path, folder)
    _held.add(path)
    try:
        yield
    finally:
        _held.discard(path)
        path.unlink(missing_ok=True)
        file.close()
        for place in missing:
            with contextlib.suppress(OSError):  # not empty
                place.rmdir()


def _taken(path: Path, folder: Path) -> IO[str]:
    """The lock's open file, which holds the lock and names this process."""
    host = socket.gethostname()
    while True:
        file = path.open("a+", encoding="utf-8")  # not truncated: it may name another run
        try:
            if fcntl is not None:
                # Not flock, which a data loader's processes would inherit and hold on after a kill.
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            file.seek(0)
            who = _owner(file.read())
            file.close()
            raise OutputError(
                f"output_dir '{folder}': a run is using it ({_described(who)}); wait for its end or choose another folder"
            ) from error
        except OSError as error:
            logger.warning("%s: cannot be locked (%s); see that no other run uses this folder", path, error.strerror)
        if _still(file, path):
            break
        file.close()  # its owner removed it between our opening and our lock
    file.seek(0)
    who = _owner(file.read())
    if who and who.get("host") != host:
        file.close()
        raise OutputError(
            f"output_dir '{folder}': a run on another host used it and did not end well, or still does ({_described(who)}); "
            f"if it has ended, remove '{path}'"
        )
    file.truncate(0)
    json.dump({"pid": os.getpid(), "user": _user(), "host": host, "since": time.strftime("%Y-%m-%d %H:%M:%S")}, file)
    file.flush()
    return file


def _still(file: IO[str], path: Path) -> bool:
    """Whether the open file is the one that has the path."""
    # Opening it once more, and closing it, would end a POSIX lock.
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _owner(text: str) -> dict[str, Any]:
    """Whom a lock's text names; nobody if it is empty or damaged."""
    try:
        who = json.loads(text)
    except ValueError:
        return {}
    return who if isinstance(who, dict) else {}


def _described(who: dict[str, Any]) -> str:
    if not who:
        return "owner not known"
    return f"process {who.get('pid')} of {who.get('user')} on {who.get('host')}, since {who.get('since')}"


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # no such user in a container
        return f"user {os.getuid()}"


# --- signals -------------------------------------------------------------------------------------------------------


class Interrupted(KeyboardInterrupt):
    """Ctrl-C ended the run. What is left of it has been logged."""

    code = 130


class Terminated(SystemExit):
    """SIGTERM ended the run; an exit with code 143. What is left of it has been logged."""


def is_first() -> bool:
    """Whether this is the main process of those that a launcher started; known before they meet."""
    return int(os.environ.get("RANK", 0)) == 0


def end(signum: int, text: str) -> None:
    """Log how the run can go on, and end. Raises Interrupted for SIGINT, Terminated for others."""
    if is_first():
        logger.error("%s: %s", signal.Signals(signum).name, text)
    if signum == signal.SIGINT:
        raise Interrupted
    raise Terminated(128 + signum)


@contextlib.contextmanager
def listening(heard: Callable[[int], None]) -> Iterator[None]:
    """The first SIGTERM or Ctrl-C calls `heard` with its number, the next one ends the process at once.

    Only the main thread can listen; elsewhere, and for a signal that is ignored, nothing changes.
    """
    since: float | None = None
    # A launcher sends its processes what the terminal has sent them already.
    patience = 2.0 if int(os.environ.get("WORLD_SIZE", 1)) > 1 else 0.0

    def handle(signum: int, _: Any) -> None:
        nonlocal since
        if since is None:
            since = time.monotonic()
            heard(signum)
        elif time.monotonic() - since >= patience:
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)

    before = {}
    if threading.current_thread() is threading.main_thread():
        for signum in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(signum) not in (signal.SIG_IGN, None):
                before[signum] = signal.signal(signum, handle)
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


class EndAfterStep(TrainerCallback):
    """A signal ends training after the step at hand, its evaluation and a checkpoint; before the first step, at once."""

    def __init__(self, trainer: DPOTrainer) -> None:
        self.trainer = trainer
        self.stepping = False
        #: The signal that came, and the one that the run ends for.
        self.heard = self.ending = 0
        self._asked: torch.Tensor | None = None

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Around a run. Raises Interrupted or Terminated inside."""
        self.stepping, self.heard, self.ending, self._asked = False, 0, 0, None
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
        found = checkpoints(Path(str(self.trainer.args.output_dir)))
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
        if args.world_size <= 1 or not torch.distributed.is_initialized():
            return self.heard
        answer = int(self._asked) if self._asked is not None else 0
        self._asked = torch.tensor(self.heard, device=args.device)
        torch.distributed.all_reduce(self._asked, torch.distributed.ReduceOp.MAX)
        return answer
