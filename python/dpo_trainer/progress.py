"""Progress of a long phase: on a terminal a line that is rewritten, elsewhere one line a minute."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterator
from multiprocessing.sharedctypes import RawValue
from typing import IO, Any

from rich.console import Console
from rich.control import Control
from rich.segment import ControlType
from rich.text import Text

#: Seconds between two lines in a log, and between two updates of a terminal's line.
IN_A_LOG, ON_A_TERMINAL = 60.0, 0.2

#: Control codes that clear the terminal's line.
_CLEAR = Control(ControlType.CARRIAGE_RETURN, (ControlType.ERASE_IN_LINE, 2))


class Line:
    """The output for progress.

    Args:
        stream: standard error if not given.
        live: whether the last line can be rewritten; if not given, it can if the stream is a terminal.
    """

    def __init__(self, stream: IO[str] | None = None, live: bool | None = None) -> None:
        stream = stream or sys.stderr
        self.live = live if live is not None else stream.isatty()
        self.console = Console(file=stream, force_terminal=self.live, highlight=False)

    @property
    def pause(self) -> float:
        """Seconds between two updates."""
        return ON_A_TERMINAL if self.live else IN_A_LOG

    def show(self, text: str) -> None:
        """Replace the live line by the text, without the last figures if the terminal is too narrow. In a log, print it."""
        if not self.live:
            self.print(text)
            return
        while len(text) > self.console.width and "  " in text:
            text = text.rpartition("  ")[0]
        self.clear()
        self.console.print(Text(text), no_wrap=True, overflow="ellipsis", end="")

    def print(self, text: str) -> None:
        """Replace the live line by the text. Later texts do not replace it."""
        self.clear()
        self.console.print(Text(text), soft_wrap=True)

    def clear(self) -> None:
        """Clear the live line."""
        if self.live:
            self.console.control(_CLEAR)


def line_of(args: Any) -> Line | None:
    """The `Line` of a run with these TrainingArguments. None if `disable_tqdm` is set, and in all but the first process."""
    return None if args.disable_tqdm or args.process_index else Line()


class Phase:
    """A long phase and its progress.

    Args:
        line: shows the progress. None shows nothing.
        what: name of the phase, for instance "evaluating".
        total: the count at the end. None if it is not known.
        of: what is counted, for instance "pairs".
    """

    def __init__(self, line: Line | None, what: str, total: int | None, of: str) -> None:
        self.line, self.what, self.total, self.of = line, what, total, of
        self.done = 0
        self.began = self.told = time.monotonic()

    def advance(self, count: int = 1) -> None:
        """Add `count` to what is done."""
        self.reach(self.done + count)

    def reach(self, done: int) -> None:
        """Set what is done in all."""
        self.done = done
        if self.line is not None and time.monotonic() - self.told >= self.line.pause:
            self.told = time.monotonic()
            self.line.show(self.describe())

    def describe(self) -> str:
        """The phase's name, the count that is done, and the remaining time."""
        seconds = time.monotonic() - self.began
        if self.total is None:
            return f"{self.what}: {self.done:,} {self.of}  in {clock(seconds)}"
        text = f"{self.what}: {self.done:,} of {self.total:,} {self.of}  {100 * self.done // max(self.total, 1)}%"
        return f"{text}  {clock(seconds / self.done * (self.total - self.done))} left" if self.done else text

    def __enter__(self) -> Phase:
        return self

    def __exit__(self, *_: Any) -> None:
        if self.line is not None:
            self.line.clear()


#: The number that `count` increases. It is shared with the processes that a phase forks.
_counter: Any = None


@contextlib.contextmanager
def counted(phase: Phase) -> Iterator[None]:
    """Show a phase whose loop is in another library, perhaps in forked processes. The code in the loop calls `count`."""
    global _counter
    _counter = counter = RawValue("q", 0)
    ended = threading.Event()

    def watch() -> None:
        while phase.line is not None and not ended.wait(min(phase.line.pause, 1.0)):
            phase.reach(counter.value)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        with phase:
            yield
    finally:
        _counter = None
        ended.set()
        watcher.join()


def count() -> None:
    """Count one more. There is no lock, so two processes may together count only one, which does not matter here."""
    if _counter is not None:
        _counter.value += 1


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss or m:ss."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
