"""Errors that users can correct. Each is one line, the same in a library call and on the command line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path


class UsageError(ValueError):
    """An input of the user cannot be used. The message is one line: what is wrong, where, and what would work."""


class ConfigError(UsageError):
    """A setting is unknown, of the wrong type, or contradicts another one."""


class DataError(UsageError):
    """A preference file or row cannot be used."""


class ModelError(UsageError):
    """A model or tokenizer cannot be loaded or trained."""


class OutputError(UsageError):
    """The output directory cannot be used or written to, or contains files that must not be overwritten."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """' (did you mean ...?)' with the most similar known word, or '' if no word is similar."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" (did you mean '{near[0]}'?)" if near else ""


def is_hub_name(path: str) -> bool:
    """Whether a path that does not exist may be a name on the hub: 'name' or 'owner/name'."""
    return not (path.startswith((".", "~", "/")) or path.count("/") > 1 or Path(path).is_absolute())


def first_line(error: BaseException) -> str:
    """The first line of an error's message that is not blank. The name of its type if there is none."""
    for line in str(error).splitlines():
        if line.strip():
            return line.strip()
    return type(error).__name__
