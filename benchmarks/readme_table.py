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

from .gpu_summary import readme_block
from .report import FASTER, RESULTS, Column, below_one, compared, headline, markdown_table, place, read

README = Path(__file__).resolve().parent.parent / "README.md"
BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"

#: The tables that settle arguments, by benchmark: the first case of each, these columns.
TABLES = {
    "logits_path": [
        Column("title", "method"),
        Column("median_s", "time", "time"),
        Column("times_floor", "x floor", "ratio"),
        Column("extra_bytes", "memory beside the inputs", "bytes"),
        FASTER,
        Column("verdict", "gradient"),
    ],
    "linear_path": [
        Column("title", "method"),
        Column("median_s", "time", "time"),
        Column("times_floor", "x products", "ratio"),
        Column("extra_bytes", "memory beside the gradients", "bytes"),
        Column("ours_faster", "exact is faster by", "ratio"),
        Column("filtered_faster", "filtered is faster by", "ratio"),
        Column("verdict", "gradient"),
    ],
    "trainer": [
        Column("title", "trainer"),
        Column("tokens_per_second", "tokens/s", "count"),
        Column("median_s", "a step", "time"),
        Column("peak_bytes", "peak memory", "bytes"),
        Column("ours_faster", "dpo_trainer is faster by", "ratio"),
        Column("verdict", "losses"),
    ],
}

#: What the others found, a sentence each, in this order; and the tables' other cases.
SENTENCES = (
    "logits_path",
    "linear_path",
    "products",
    "statistics",
    "objectives",
    "reference_modes",
    "prefix_sharing",
    "memory",
    "scaling",
    "latency",
    "threads",
    "compile",
    "startup",
)


def _table(name: str, found: dict[str, Any]) -> list[str]:
    """A benchmark's first case; a peer that is missing here is left to the machine's own page."""
    first = found["rows"][0]["case"]
    rows = [
        row
        for row in found["rows"]
        if row["case"] == first and not row.get("verdict", "").startswith(("missing", "fails"))
    ]
    if not rows:
        return []
    return [f"**{found['question'].partition(':')[0]}: {first}**", "", *markdown_table(TABLES[name], rows), ""]


def machine_block(folder: Path) -> list[str]:
    """Tables and sentences of one machine's results; empty without a logits path."""
    results = read(folder)
    if "logits_path" not in results:
        return []
    machine = results["logits_path"]["machine"]
    files = folder.relative_to(README.parent) if folder.is_relative_to(README.parent) else folder
    lines = [
        f"Measured {machine['date']} on {place(machine)} with torch {machine['torch']}; "
        "in each table all methods took turns in one run:",
        "",
    ]
    for name in TABLES:
        if name in results:
            lines += _table(name, results[name])
    everything = compared((name, found.get("rows", ())) for name, found in results.items())
    lines += [
        f"* **{found['question'].partition(':')[0]}.** {found['summary']}"
        for name in SENTENCES
        if (found := results.get(name)) and found.get("summary")
    ]
    if line := headline(everything).get("line"):
        lines += ["", f"**{line}.**"]
    if lost := below_one(everything):
        lines += ["", *(f"* {sentence}" for sentence in lost)]
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
    if gpus := readme_block(results):
        lines += ["", *gpus[:-1]]
    return "\n".join(lines)


def with_block(text: str, block: str, markers: tuple[str, str] = (BEGIN, END)) -> str:
    """A page's text with the block between its markers. Raises ValueError where a marker is missing."""
    begin, end = markers
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"the page must hold {begin} and {end} once each")
    before, rest = text.split(begin)
    after = rest.split(end)[1]
    return f"{before}{begin}\n{block}\n{end}{after}" if block else f"{before}{begin}\n{end}{after}"


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
