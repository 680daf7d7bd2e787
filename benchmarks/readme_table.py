"""Writes the README's figures from benchmarks/results/*/*.json, so that none is typed by hand.

python -m benchmarks.readme_table            print what the README should say
python -m benchmarks.readme_table --write    put it between the README's markers
python -m benchmarks.readme_table --check    exit 1 if the README says something else
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from .report import RESULTS, Column, markdown_table

README = Path(__file__).resolve().parent.parent / "README.md"
BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"

#: Results of one sentence each, in this order, below the logits path's table.
SENTENCES = ("statistics", "objectives", "scaling")


def _columns(rows: list[dict[str, Any]]) -> list[Column]:
    """The README's columns, with one ratio for each peer that the rows were compared with."""
    titles = {row["peer"]: row["title"] for row in rows}
    compared = dict.fromkeys(key for row in rows for key in row if key.startswith("vs_"))
    return [
        Column("title", "method"),
        Column("median_s", "time", "time"),
        Column("times_floor", "over the floor", "ratio"),
        *(Column(key, f"faster than {titles[key.removeprefix('vs_')]}", "ratio") for key in compared),
        Column("extra_bytes", "memory beside the inputs", "bytes"),
        Column("gradient_error", "gradient error", "error"),
        Column("verdict", "gradient"),
    ]


def machine_block(folder: Path) -> list[str]:
    """Tables and sentences of one machine's results; empty without a logits path."""
    source = folder / "logits_path.json"
    if not source.is_file():
        return []
    result = json.loads(source.read_text())
    machine = result["machine"]
    where = machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} threads, {machine['instruction_set']}"
    lines = [
        f"Measured {machine['date']} on {where} with torch {machine['torch']}, all methods interleaved in one run:",
        "",
    ]
    steps = [row for row in result["rows"] if row["part"] == "step"]
    for case in dict.fromkeys(row["case"] for row in steps):
        rows = [row for row in steps if row["case"] == case]
        lines += [f"**{case}** (policy and reference logits)", "", *markdown_table(_columns(rows), rows), ""]
    if line := result.get("headline", {}).get("line"):
        lines.append(f"* {line}.")
    lines += [f"* {note}" for note in result["notes"] if not note.startswith("Bar: ")]
    for name in SENTENCES:
        other = folder / f"{name}.json"
        if other.is_file():
            lines += [f"* {note}" for note in json.loads(other.read_text())["notes"]]
    files = folder.relative_to(README.parent) if folder.is_relative_to(README.parent) else folder
    lines += ["", f"Every row, its spread, and the command that makes it alone: [{files}]({files})."]
    return lines


def render(results: Path = RESULTS) -> str:
    """What stands between the README's markers, without them."""
    blocks = [block for folder in sorted(results.glob("*/")) if (block := machine_block(folder))]
    return "\n\n".join("\n".join(block) for block in blocks)


def with_block(text: str, block: str) -> str:
    """The README's text with the block between its markers. Raises ValueError where a marker is missing."""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"the README must hold {BEGIN} and {END} once each")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    return f"{before}{BEGIN}\n{block}\n{END}{after}" if block else f"{before}{BEGIN}\n{END}{after}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--write", action="store_true")
    action.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    text = README.read_text(encoding="utf-8")
    wanted = with_block(text, render())
    if arguments.write:
        README.write_text(wanted, encoding="utf-8")
    elif arguments.check and text != wanted:
        print(
            "README.md does not show the figures of benchmarks/results; run: python -m benchmarks.readme_table --write"
        )
        return 1
    elif not arguments.check:
        print(render())
    return 0


if __name__ == "__main__":
    sys.exit(main())
