"""The run's own files: JSON records a line each, and text that a reader or a kill never meets half written."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

METRICS = "metrics.jsonl"
EVENTS = "events.jsonl"


def write_aside(path: Path, text: str) -> None:
    """Write the text beside `path` and rename it there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".part")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)


def json_line(record: dict[str, Any]) -> str:
    """The record as one line of JSON, with its newline."""
    # JSON knows no NaN; null keeps the file readable everywhere and still shows that something happened.
    finite = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in record.items()
    }
    return json.dumps(finite, ensure_ascii=False) + "\n"


def append_record(path: Path, record: dict[str, Any]) -> None:
    """Add the record as the file's last line."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json_line(record))


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a file; none if there is no file. A line cut short by a kill is left out."""
    if not path.exists():
        return []
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            found.append(record)
    return found


def keep_records(path: Path, step: int) -> list[dict[str, Any]]:
    """Start the file anew for a fresh run (step 0), or drop what a resumed one will write again after `step`."""
    kept = [record for record in read_records(path) if record["step"] <= step] if step else []
    write_aside(path, "".join(map(json_line, kept)))
    return kept
