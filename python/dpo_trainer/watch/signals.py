"""Handles SIGTERM and Ctrl-C: installs the handlers, and ends the process. Imports no torch."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

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
