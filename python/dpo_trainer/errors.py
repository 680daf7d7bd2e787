"""The errors a person can act on: one line each, the same text in a library call and on the command line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path


class UsageError(ValueError):
    """Something the user gave cannot be used. The message is one line: what is wrong, where, and what would work."""


class ConfigError(UsageError):
    """A setting is unknown, of the wrong type, or contradicts another one."""


class DataError(UsageError):
    """A preference file or row cannot be used."""


class ModelError(UsageError):
    """A model or tokenizer cannot be loaded or trained."""


class OutputError(UsageError):
    """The output directory already holds something that must not be overwritten."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """' (did you mean ...?)' with the nearest known word, or '' when nothing is near."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" (did you mean '{near[0]}'?)" if near else ""


def is_hub_name(path: str) -> bool:
    """Whether a path that is not here may be a name on the hub: 'name' or 'owner/name'."""
    return not (path.startswith((".", "~", "/")) or path.count("/") > 1 or Path(path).is_absolute())


def first_line(error: BaseException) -> str:
    """The first non-empty line of an error's message; its type where it has none."""
    for line in str(error).splitlines():
        if line.strip():
            return line.strip()
    return type(error).__name__
