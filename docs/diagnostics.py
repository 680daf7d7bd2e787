"""Writes the tables of diagnoses and thresholds into docs/trainer.md from the trainer's own: `python docs/diagnostics.py`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from dpo_trainer.settings.diagnoses import DIAGNOSES, Limits

PAGE = Path(__file__).resolve().parent / "trainer.md"
BEGIN, END = "<!-- diagnostics:begin -->\n", "<!-- diagnostics:end -->\n"


def tables() -> str:
    """Both tables in Markdown."""
    limits = {item.name: item for item in dataclasses.fields(Limits)}
    lines = ["| name | what it says | thresholds | what to do |", "|---|---|---|---|"]
    for name, diagnosis in DIAGNOSES.items():
        used = ", ".join(f"`{limit}`" for limit in diagnosis.limits) or "-"
        lines.append(f"| `{name}` | {diagnosis.title} | {used} | {diagnosis.remedy} |")
    lines += ["", "| threshold | default | |", "|---|---:|---|"]
    for name, item in limits.items():
        lines.append(f"| `{name}` | {item.default:g} | {item.metadata['help'].replace('|', chr(92) + '|')} |")
    return "\n".join(lines) + "\n"


def filled(page: str) -> str:
    """The page with the tables between their markers."""
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    return before + BEGIN + tables() + END + after


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
