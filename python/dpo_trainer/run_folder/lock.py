"""The lock of `output_dir`, which allows one run at a time in a folder."""

from __future__ import annotations

import contextlib
import getpass
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from ..errors import OutputError
from .records import as_object, writing

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger("dpo_trainer")

LOCK = "run.lock"

_held: set[Path] = set()


@contextlib.contextmanager
def run_lock(folder: Path, *, first: bool = True) -> Iterator[None]:
    """A context that locks the folder against other runs. If it created the folder and the folder is empty, it removes it.

    The operating system's lock on the file `run.lock` decides. It ends with the process that holds it, whatever ends the
    process. The file names the owner, for the error message. A process that already holds the lock enters at once.

    Args:
        folder: the run's folder. It is created if it does not exist.
        first: whether this is the main process. Other processes take no lock.

    Raises:
        OutputError: another run holds the lock. Or the file names an owner on another host, of which this host cannot tell
            whether it still runs.
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
    """Take the lock. Returns the open file, which holds the lock and names this process."""
    host = socket.gethostname()
    while True:
        file = path.open("a+", encoding="utf-8")  # not truncated: it may name another run
        try:
            if fcntl is not None:
                # Not flock: a data loader's processes would inherit it, and keep it after this process is killed.
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            owner = _described(_owner(file))
            file.close()
            raise OutputError(
                f"output_dir '{folder}': a run is using it ({owner}); wait for its end or choose another folder"
            ) from error
        except OSError as error:
            logger.warning(
                "%s: cannot be locked (%s); make sure that no other run uses this folder", path, error.strerror
            )
        # Use stat here: to open the file a second time and close it would release a POSIX lock.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                break
        file.close()  # its owner removed the file after we opened it and before we locked it
    who = _owner(file)
    if who and who.get("host") != host:
        file.close()
        raise OutputError(
            f"output_dir '{folder}': a run on another host still uses it, or ended with an error ({_described(who)}); "
            f"if it has ended, remove '{path}'"
        )
    file.truncate(0)
    json.dump({"pid": os.getpid(), "user": _user(), "host": host, "since": time.strftime("%Y-%m-%d %H:%M:%S")}, file)
    file.flush()
    return file


def _owner(file: IO[str]) -> dict[str, Any]:
    """The owner that a lock file names. Empty if the file is empty or damaged."""
    file.seek(0)
    return as_object(file.read())


def _described(who: dict[str, Any]) -> str:
    if not who:
        return "owner unknown"
    return f"process {who.get('pid')} of {who.get('user')} on {who.get('host')}, since {who.get('since')}"


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # no such user in a container
        return f"user {os.getuid()}"
