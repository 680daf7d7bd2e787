"""Writes tables of the docs from the trainer's code: `python docs/trainer_tables.py`.

The diagnoses and their thresholds go into docs/trainer.md, between two markers. The settings go into docs/settings.md.
"""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

from dpo_trainer.settings.aliases import OBJECTIVES, SAME
from dpo_trainer.settings.diagnoses import DIAGNOSES, Limits
from dpo_trainer.settings.rows import settings_table
from dpo_trainer.settings.table import GROUPS, SHOWN

DOCS = Path(__file__).resolve().parent
PAGE, SETTINGS = DOCS / "trainer.md", DOCS / "settings.md"
BEGIN, END = "<!-- diagnostics:begin -->\n", "<!-- diagnostics:end -->\n"


def row(*cells: str) -> str:
    """A row of a Markdown table."""
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def diagnoses() -> str:
    """The tables of diagnoses and of thresholds."""
    lines = ["| name | what it says | thresholds | what to do |", "|---|---|---|---|"]
    for name, diagnosis in DIAGNOSES.items():
        used = ", ".join(f"`{limit}`" for limit in diagnosis.limits) or "-"
        step = re.sub(r"{.*?}, ", "", diagnosis.step)  # the values of a run are unknown here
        lines.append(row(f"`{name}`", diagnosis.title, used, f"{step} {diagnosis.remedy}".strip()))
    lines += ["", "| threshold | default | what it means |", "|---|---:|---|"]
    lines += [row(f"`{item.name}`", f"{item.default:g}", item.metadata["help"]) for item in dataclasses.fields(Limits)]
    return "\n".join(lines) + "\n"


def filled(page: str) -> str:
    """The page with the tables of diagnoses between their markers."""
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    return before + BEGIN + diagnoses() + END + after


def settings() -> str:
    """The page of settings: one table per group. Settings that most runs need are in bold."""
    lines = [
        "# Settings",
        "",
        "This page lists every setting of `dpo-train`, for a YAML file (`beta: 0.1`) or the command line (`--beta 0.1`).",
        "All groups except the first are fields of `DPOConfig`. `dpo-train --help` shows the settings in bold.",
        "`dpo-train --help-all` also lists the other settings of `transformers.TrainingArguments`, which may be given as well.",
    ]
    for group, title in GROUPS.items():
        lines += ["", f"## {title}", "", "| setting | default | what it does |", "|---|---|---|"]
        for item in settings_table().values():
            if item.group == group:
                name = f"**`{item.name}`**" if item.name in SHOWN else f"`{item.name}`"
                default = "" if item.default is None else f"`{json.dumps(item.default, default=str)}`"
                lines.append(row(name, default, item.help))
    lines += [
        "",
        "## Names of other tools",
        "",
        "The command accepts the names on the right for the setting on the left, and prints a line about it. For other names",
        "of TRL's scripts, the alignment handbook, Axolotl, LLaMA-Factory and ms-swift, it prints what to set instead.",
        "",
        "| setting | other names |",
        "|---|---|",
    ]
    lines += [row(f"`{name}`", ", ".join(f"`{other}`" for other in others)) for name, others in SAME.items()]
    words = ", ".join(f"`{word}` (`{ours}`)" for word, ours in OBJECTIVES.items())
    lines += ["", f"`loss_type` also accepts these names of objectives: {words}."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    SETTINGS.write_text(settings(), encoding="utf-8")
