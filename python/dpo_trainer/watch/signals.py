"""SIGTERM and Ctrl-C: who listens, and how a process ends. Imports no torch."""

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
    """Whether this is the main process of those that a launcher started; known before they meet."""
    return int(os.environ.get("RANK", 0)) == 0


def end(signum: int, text: str) -> None:
    """Log how the run can go on, and end. Raises KeyboardInterrupt for SIGINT, SystemExit with code 143 for SIGTERM."""
    if is_first():
        logger.error("%s: %s", signal.Signals(signum).name, text)
    if signum == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + signum)


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

    with contextlib.ExitStack() as stack:
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(signum) not in (signal.SIG_IGN, None):
                    stack.callback(signal.signal, signum, signal.signal(signum, handle))
        yield
