"""Writes the measured errors of docs/numerics.md: `python docs/numerics_tables.py`.

The figures come from benchmarks/results: the rows with a gradient in each machine's logits_path.json and in each GPU's
results.json.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
PAGE, RESULTS = DOCS / "numerics.md", DOCS.parent / "benchmarks" / "results"
BEGIN, END = "<!-- errors:begin -->\n", "<!-- errors:end -->\n"


def table(heading: str, rows: list[tuple[str, float, str]]) -> list[str]:
    """A table of (method, error, verdict)."""
    lines = ["", heading, "", "| method | relative error of the gradient | verdict |", "|---|---:|---|"]
    return lines + [f"| {title} | {error:.1e} | {verdict} |" for title, error, verdict in rows]


def of_cpu(path: Path) -> list[str]:
    """The tables of one machine, one for each case."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    cases: dict[str, list[tuple[str, float, str]]] = {}
    for row in found["rows"]:
        if row.get("gradient_error") is not None and row["part"] == "step":
            title = f"**{row['title']}**" if row["ours"] else row["title"]
            cases.setdefault(row["case"], []).append((title, row["gradient_error"], row["verdict"]))
    machine = found["machine"]
    about = f"{machine['cpu']}, {machine['instruction_set']}, torch {machine['torch']}, {machine['date']}"
    return [line for case, rows in cases.items() for line in table(f"{case} ({about}):", rows)]


def of_gpu(path: Path) -> list[str]:
    """The tables of a card: its largest case from logits and its largest case from hidden states."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    lines = []
    for name, call in (("logits", "peers"), ("hidden states", "linear")):
        shape, case = next(iter(found["calls"]["headline"][call]["result"]["tables"].items()))
        rows = [
            (
                f"**{title}**" if title.startswith("ours") else title,
                gradient["error"],
                "right" if gradient["right"] else "WRONG",
            )
            for title, gradient in ((title, row.get("gradient")) for title, row in case["rows"].items())
            if gradient
        ]
        lines += table(f"bfloat16, from {name}, {shape} ({path.parent.name}):", rows)
    return lines


def filled(page: str) -> str:
    """The page with the tables between their markers."""
    lines = [line for path in sorted(RESULTS.glob("*/logits_path.json")) for line in of_cpu(path)]
    lines += [line for path in sorted(RESULTS.glob("nvidia-*/results.json")) for line in of_gpu(path)]
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    return before + BEGIN + "\n".join(lines[1:]) + "\n" + END + after


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
