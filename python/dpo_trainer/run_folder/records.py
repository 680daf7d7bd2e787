"""Reading and writing of a run's files: JSON records, one per line, and texts that are written atomically. No torch."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import OutputError, first_line

METRICS = "metrics.jsonl"
EVENTS = "events.jsonl"
SAMPLES = "samples.jsonl"
SUMMARY = "summary.json"
REPORT = "report.html"
#: The settings of a folder's run, by which `check_output` recognises the same command.
SETTINGS = "settings.json"
#: Fields with texts that every record of a file has.
_TEXTS = {EVENTS: ("name", "title", "seen", "remedy"), SAMPLES: ("evaluation", "prompt")}

#: Words of the RuntimeErrors that torch.save raises if a file cannot be written.
_OF_TORCH = ("inline_container", "file write", "iostream")


@contextlib.contextmanager
def writing(path: Path, then: str = "free some space and give the same command again") -> Iterator[None]:
    """A context for code that writes `path`. Raises an OutputError of one line, with the path, if writing fails."""
    try:
        yield
    except Exception as error:
        # The error of safetensors is recognised by its name, so that the command line works without the package.
        if not (isinstance(error, OSError | RuntimeError) or type(error).__name__ == "SafetensorError"):
            raise
        reason = error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
        if isinstance(error, RuntimeError):
            if not any(word in str(error) for word in _OF_TORCH):
                raise
            reason = "torch.save could not write all of it: is the disk full?"
        raise OutputError(f"{path}: cannot be written ({reason}); {then}") from error


def write_aside(path: Path, text: str) -> None:
    """Write a text atomically: into a file next to `path`, which is then renamed to `path`. Raises OutputError."""
    aside = path.with_name(path.name + ".part")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            aside.write_text(text, encoding="utf-8")
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)  # an incomplete text, if the disk is full


def sha256(path: Path) -> str:
    """The SHA-256 digest of a file's bytes, in hexadecimal. Raises OSError."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def json_line(record: dict[str, Any]) -> str:
    """The record as one line of JSON, with its newline."""
    # JSON has no NaN. null keeps the file readable everywhere and still shows that there was a value.
    finite = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in record.items()
    }
    return json.dumps(finite, ensure_ascii=False) + "\n"


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a file, or none without a file. Damaged lines, and records that lack a field, are left out."""
    if not path.exists():
        return []
    texts = _TEXTS.get(path.name, ())
    found = map(as_object, path.read_text(encoding="utf-8", errors="replace").split("\n"))
    return [r for r in found if type(r.get("step")) is int and all(isinstance(r.get(name), str) for name in texts)]


def as_object(text: str | bytes) -> dict[str, Any]:
    """The JSON object in a text. Empty if the text is damaged or is not an object."""
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Empty if there is no file or no object in it."""
    try:
        return as_object(path.read_bytes())
    except OSError:
        return {}
