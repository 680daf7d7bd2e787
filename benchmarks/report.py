"""Turns results into terminal tables, JSON and markdown pages; one list of columns drives all of them.

`--report DIR` leaves in DIR/<machine>: three files for each question (JSON, a page, a chart), a roofline of all, and
README.md, which answers every question in a sentence and links to the rest. The project's README is filled from the same
JSON (readme_table.py).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import charts, reasons

RESULTS = Path(__file__).resolve().parent / "results"


def _time(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if seconds * scale >= 1.0 or unit == "us":
            value = seconds * scale
            return f"{value:.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"
    raise AssertionError


def _bytes(count: float) -> str:
    return f"{count / 2**20:,.0f} MiB"


#: How a value of each kind is written.
FORMATS: dict[str, Callable[[Any], str]] = {
    "text": str,
    "time": _time,
    "ratio": lambda value: f"{value:.2f}x" if value < 10 else f"{value:.1f}x",
    "percent": lambda value: f"{100 * value:.1f} %",
    "error": lambda value: f"{value:.1e}",
    "bytes": _bytes,
    "count": lambda value: f"{value:,.0f}",
    "number": lambda value: f"{value:.3g}",
}


@dataclass(frozen=True)
class Column:
    """One column of a table: the key in the rows, what stands above it, and how its values are written."""

    key: str
    heading: str
    kind: str = "text"

    def write(self, row: dict[str, Any]) -> str:
        value = row.get(self.key)
        return "-" if value is None else FORMATS[self.kind](value)


#: Columns that most tables share.
TIME, SPREAD = Column("median_s", "time", "time"), Column("spread", "spread", "percent")
TIMES_FLOOR = Column("times_floor", "x floor", "ratio")
EXTRA = Column("extra_bytes", "extra memory", "bytes")
VS_BEST, BEST_PEER = Column("vs_best", "vs best peer", "ratio"), Column("best_peer", "which is")
#: In rows of others: how many times longer they take than the method of ours that does the same work.
FASTER = Column("ours_faster", "dpo_kernels is faster by", "ratio")


def counted(number: float, noun: str) -> str:
    """ "1 pair", "4 pairs"."""
    return f"{number:,.0f} {noun}" if number == 1 else f"{number:,.0f} {noun}s"


def no_summary(rows: list[dict[str, Any]]) -> str:
    """For a result that has nothing to say in one sentence."""
    return ""


@dataclass
class Result:
    """The answer of one benchmark file.

    Attributes:
        name: of the benchmark; names its files.
        question: in one sentence.
        columns, rows: the table; rows hold plain JSON values, seconds and bytes.
            Keys with a meaning here: `select` (the `-k` expression that runs the row alone, with the peer that it is
            compared with), `vs_best` and `best_peer` (how many times longer the best right peer takes for the same
            work, and who that is), `explanation` (why, where that is below 1; see reasons.py), `flops` and `bytes` (what
            the work cannot do without: a place on the roofline).
        group: the row key whose change starts a new table.
        notes: sentences below the table, made from measured values only.
        summary: the answer in a sentence, from the rows of all cases.
        chart: "bars" (one bar per row and group) or "lines" (`x` against `y`, one line per title).
        x_label: of a line chart; the group's name if empty.
        y: the row key of a line chart's vertical axis, one of charts.SCALES.
        extra: more of the JSON file; `roofs` are what the machine was seen to reach, by dtype (see charts.py).
    """

    name: str
    question: str
    columns: list[Column]
    rows: list[dict[str, Any]] = field(default_factory=list)
    group: str = "case"
    notes: list[str] = field(default_factory=list)
    summary: Callable[[list[dict[str, Any]]], str] = no_summary
    chart: str = "bars"
    x_label: str = ""
    y: str = "median_s"
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def file(self) -> str:
        """The benchmark's file, as pytest takes it."""
        return f"benchmarks/test_{self.name}.py"

    def groups(self) -> dict[str, list[dict[str, Any]]]:
        """The rows, by the value of their group, in order."""
        found: dict[str, list[dict[str, Any]]] = {}
        for row in self.rows:
            found.setdefault(str(row[self.group]), []).append(row)
        return found

    def as_json(self, machine: dict[str, Any]) -> dict[str, Any]:
        return {
            "benchmark": self.name,
            "question": self.question,
            "summary": self.summary(self.rows),
            "machine": machine,
            "rows": self.rows,
            "notes": self.notes,
            **self.extra,
        }


def cells(columns: Sequence[Column], rows: Sequence[dict[str, Any]]) -> tuple[list[Column], list[list[str]]]:
    """The columns that hold anything in these rows, and their cells."""
    used = [column for column in columns if any(row.get(column.key) is not None for row in rows)]
    return used, [[column.write(row) for column in used] for row in rows]


def text_table(columns: Sequence[Column], rows: Sequence[dict[str, Any]]) -> list[str]:
    """Aligned lines for a terminal: the first column to the left, the others to the right."""
    used, body = cells(columns, rows)
    lines = [[column.heading for column in used], *body]
    widths = [max(len(line[i]) for line in lines) for i in range(len(used))]
    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))

    def align(line: list[str]) -> str:
        return "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()

    return [align(lines[0]), rule, *map(align, lines[1:])]


def markdown_table(columns: Sequence[Column], rows: Sequence[dict[str, Any]]) -> list[str]:
    """The same as a markdown table; ours in bold."""
    used, body = cells(columns, rows)
    ruler = "|" + "|".join(" :--- " if i == 0 else " ---: " for i in range(len(used))) + "|"
    for row, line in zip(rows, body, strict=True):
        if row.get("ours"):
            line[0] = f"**{line[0]}**"
    return [
        "| " + " | ".join(column.heading for column in used) + " |",
        ruler,
        *("| " + " | ".join(line) + " |" for line in body),
    ]


#: What is compared with the best peer: benchmark and row.
Compared = tuple[str, dict[str, Any]]


def compared(rows_by_benchmark: Iterable[tuple[str, Iterable[dict[str, Any]]]]) -> list[Compared]:
    """Every row of ours that had a peer."""
    return [(name, row) for name, rows in rows_by_benchmark for row in rows if row.get("vs_best") is not None]


def headline(rows: Sequence[Compared]) -> dict[str, Any]:
    """Our worst ratio against the best peer, over all rows of all results; empty where nothing was compared."""
    if not rows:
        return {}
    name, row = min(rows, key=lambda found: found[1]["vs_best"])
    below = sum(found["vs_best"] < 1 for _, found in rows)
    line = (
        f"Worst ratio against the best peer, over {counted(len(rows), 'row')}: {row['vs_best']:.2f}x "
        f"({name}: {row['title']} against {row['best_peer']}, {row['case']}); {below} below 1.0"
    )
    return {"ratio": row["vs_best"], "benchmark": name, "line": line}


def below_one(rows: Sequence[Compared]) -> list[str]:
    """A sentence for each method of ours that loses to its best peer somewhere, with its reason or the lack of one."""
    found: dict[tuple[str, ...], list[float]] = {}
    for name, row in rows:
        if row["vs_best"] < 1:
            reason = reasons.explain(name, row) or "NOT EXPLAINED"
            found.setdefault((name, row["title"], row["best_peer"], row["case"], reason), []).append(row["vs_best"])
    return [
        f"Below 1.0 ({name}): {title} against {peer}, {case}: "
        f"{' to '.join(f'{ratio:.2f}x' for ratio in sorted({min(ratios), max(ratios)}))}. {reason}"
        for (name, title, peer, case, reason), ratios in found.items()
    ]


def place(machine: dict[str, Any]) -> str:
    """On what something was measured, in a few words."""
    return (
        machine.get("gpu") or f"{machine['cpu']}, {counted(machine['threads'], 'thread')}, {machine['instruction_set']}"
    )


def machine_line(machine: dict[str, Any]) -> str:
    """One sentence that says on what, with what and when."""
    return (
        f"{place(machine)}; backend {machine['backend']}, "
        f"torch {machine['torch']}, dpo-kernels {machine['dpo_kernels']}, {machine['date']}"
    )


def markdown(result: Result, machine: dict[str, Any], chart: str | None = None) -> str:
    """The result as a page; chart: its picture's file name."""
    lines = [f"# {result.question}", "", machine_line(machine), ""]
    if summary := result.summary(result.rows):
        lines += [f"**{summary}**", ""]
    if chart:
        lines += [f"![{result.question}]({chart})", ""]
    for group, rows in result.groups().items():
        lines += [f"## {group}", "", *markdown_table(result.columns, rows), ""]
    lines += [f"* {note}" for note in [*result.notes, *below_one(compared([(result.name, result.rows)]))]]
    if commands := [(row["title"], row["command"]) for row in result.rows if row.get("command")]:
        lines += [
            "",
            "## The command that makes each row alone",
            "",
            "```",
            *dict.fromkeys(c for _, c in commands),
            "```",
        ]
    return "\n".join(lines).rstrip() + "\n"


def verdict(bar: dict[str, Any]) -> str:
    """A stated bar in words: `what`, `measured`, `bar`, whether it is `met`, and the `ceiling` above which nothing can be."""
    ceiling = f"; nothing can exceed {bar['ceiling']:.2f}" if bar.get("ceiling") is not None else ""
    return (
        f"Bar: {bar['what']}: {bar['measured']:.2f} (bar {bar['bar']:g}) {'met' if bar['met'] else 'MISSED'}{ceiling}"
    )


def write(results: Iterable[Result], folder: Path, machine: dict[str, Any]) -> None:
    """Write `<name>.json` and `.md` of each and, where matplotlib is installed, `.svg`; then README.md of the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    # All figures are safe before the first picture is drawn.
    for result in results:
        (folder / f"{result.name}.json").write_text(json.dumps(result.as_json(machine), indent=1) + "\n")
    for result in results:
        chart = charts.draw(result, folder / f"{result.name}.svg")
        (folder / f"{result.name}.md").write_text(markdown(result, machine, chart.name if chart else None))
    write_index(folder)


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """The results of one machine, by benchmark."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}


def write_index(folder: Path) -> None:
    """README.md of a machine's folder, and its roofline, from all the JSON files there, those of earlier runs included."""
    results = read(folder)
    everything = compared((name, found["rows"]) for name, found in results.items())
    machine = next(iter(results.values()))["machine"]
    lines = [f"# {machine.get('gpu') or machine['cpu']}", "", machine_line(machine), ""]
    if line := headline(everything).get("line"):
        lines += [f"**{line}.**", ""]
    for name, found in results.items():
        day = "" if found["machine"]["date"] == machine["date"] else f" ({found['machine']['date']})"
        lines.append(f"* [{found['question']}]({name}.md){day} {found.get('summary', '')}".rstrip())
    lines += [f"* {sentence}" for sentence in below_one(everything)]
    if chart := charts.roofline(results, folder / "roofline.svg"):
        lines += ["", f"![Roofline]({chart.name})"]
    (folder / "README.md").write_text("\n".join(lines) + "\n")
