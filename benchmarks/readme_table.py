"""Writes the README's figures from benchmarks/results/*/*.json, so that none is typed by hand.

python -m benchmarks.readme_table            print what the README should say
python -m benchmarks.readme_table --write    put it between the README's markers
python -m benchmarks.readme_table --check    exit 1 if the README says something else

The README shows one machine, the one measured last; the others' folders are named below its tables.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from .report import RESULTS, Column, Result, headline, markdown_table

README = Path(__file__).resolve().parent.parent / "README.md"
BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"

#: Columns of the tables that the README shows, by benchmark; the logits path's follow from its peers.
COLUMNS = {
    "linear_path": [
        Column("title", "method"),
        Column("median_s", "time", "time"),
        Column("times_floor", "over the products alone", "ratio"),
        Column("vs_best", "faster than the best peer", "ratio"),
        Column("extra_bytes", "memory beside the gradients", "bytes"),
        Column("verdict", "gradient"),
    ],
    "trainer": [
        Column("title", "trainer"),
        Column("tokens_per_second", "tokens/s", "count"),
        Column("median_s", "a step", "time"),
        Column("vs_best", "faster than TRL", "ratio"),
        Column("peak_bytes", "peak memory", "bytes"),
        Column("memory_share", "of TRL's", "percent"),
        Column("verdict", "losses"),
    ],
}

#: Results of a few sentences each, in this order, below the tables.
SENTENCES = (
    "statistics",
    "objectives",
    "reference_modes",
    "prefix_sharing",
    "scaling",
    "threads",
    "compile",
    "startup",
)


def _logits_columns(rows: list[dict[str, Any]]) -> list[Column]:
    """The README's columns, with one ratio for each peer that the rows were compared with."""
    titles = {row["peer"]: row["title"] for row in rows}
    compared = dict.fromkeys(key for row in rows for key in row if key.removeprefix("vs_") in titles)
    return [
        Column("title", "method"),
        Column("median_s", "time", "time"),
        Column("times_floor", "over the floor", "ratio"),
        *(Column(key, f"faster than {titles[key.removeprefix('vs_')]}", "ratio") for key in compared),
        Column("extra_bytes", "memory beside the inputs", "bytes"),
        Column("gradient_error", "gradient error", "error"),
        Column("verdict", "gradient"),
    ]


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """The results of one machine, by benchmark."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}


def _tables(name: str, found: dict[str, Any]) -> list[str]:
    """A benchmark's tables, one for each case."""
    rows = [row for row in found["rows"] if row.get("part", "step") == "step"]
    lines = []
    for case in dict.fromkeys(row["case"] for row in rows):
        here = [row for row in rows if row["case"] == case]
        columns = COLUMNS.get(name) or _logits_columns(here)
        lines += [f"**{found['question'].partition(':')[0]}: {case}**", "", *markdown_table(columns, here), ""]
    return lines


def machine_block(folder: Path) -> list[str]:
    """Tables and sentences of one machine's results; empty without a logits path."""
    results = read(folder)
    if "logits_path" not in results:
        return []
    machine = results["logits_path"]["machine"]
    where = machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} threads, {machine['instruction_set']}"
    lines = [
        f"Measured {machine['date']} on {where} with torch {machine['torch']}; "
        "in each table all methods took turns in one run:",
        "",
    ]
    for name in ("logits_path", *COLUMNS):
        if name in results:
            lines += _tables(name, results[name])
    plain = [Result(name, found["question"], [], found["rows"]) for name, found in results.items() if "rows" in found]
    if line := headline(plain).get("line"):
        lines.append(f"* **{line}.**")
    lines += [f"* {sentence}" for result in plain for sentence in result.below_one()]
    for name in ("logits_path", *COLUMNS, *SENTENCES):
        notes = results.get(name, {}).get("notes", [])
        lines += [f"* {note}" for note in notes if not note.startswith("Bar: ")]
    files = folder.relative_to(README.parent) if folder.is_relative_to(README.parent) else folder
    lines += ["", f"Every row, its spread, charts, and the command that makes it alone: [{files}]({files})."]
    return lines


def render(results: Path = RESULTS) -> str:
    """What stands between the README's markers, without them."""
    folders = [folder for folder in sorted(results.glob("*/")) if (folder / "logits_path.json").is_file()]
    if not folders:
        return ""

    def date(folder: Path) -> str:
        return json.loads((folder / "logits_path.json").read_text(encoding="utf-8"))["machine"]["date"]

    latest = max(folders, key=date)
    lines = machine_block(latest)
    if others := [folder.name for folder in folders if folder != latest]:
        links = ", ".join(f"[{name}](benchmarks/results/{name})" for name in others)
        lines[-1] += f" Other machines: {links}."
    return "\n".join(lines)


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
