"""Turns results into terminal tables, JSON and markdown pages; one list of columns defines all of them.

    python -m benchmarks.report FOLDER...    write the pages and charts of these results again, and measure nothing

`pytest benchmarks/ --report DIR` writes into DIR/<machine>: three files for each question (JSON, a page, a chart), one
roofline, and README.md, which opens with a table of all questions and links to the pages. The project's README and
docs/performance.md are filled from the same JSON (readme_table.py).
"""

from __future__ import annotations

import argparse
import importlib
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


#: How a value is written, by kind of column.
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


#: The benchmarks in the order of all pages: those that most readers ask about come first.
ORDER = (
    "logits_path",
    "logps",
    "linear_path",
    "trainer",
    "memory",
    "compile",
    "objectives",
    "statistics",
    "reference_modes",
    "prefix_sharing",
    "products",
    "scaling",
    "latency",
    "threads",
    "startup",
)


@dataclass(frozen=True)
class Column:
    """One column of a table: the key in the rows, the heading, and the kind (how values are written)."""

    key: str
    heading: str
    kind: str = "text"

    def write(self, row: dict[str, Any]) -> str:
        value = row.get(self.key)
        return "-" if value is None else FORMATS[self.kind](value)


#: Columns that most tables share.
TIME, SPREAD = Column("median_s", "time", "time"), Column("spread", "spread", "percent")
#: The floors of the two paths, in words: they follow "floor:" in charts. The tables' headings agree with them.
TRAFFIC = "the time of the necessary memory traffic alone"
TIMES_FLOOR = Column("times_floor", "time / floor (memory traffic alone)", "ratio")
PRODUCTS = "the time of all matrix products alone"
TIMES_PRODUCTS = Column("times_floor", "time / floor (matrix products alone)", "ratio")
EXTRA = Column("extra_bytes", "extra memory", "bytes")
VS_BEST, BEST_PEER = Column("vs_best", "faster than the best peer by", "ratio"), Column("best_peer", "best peer")
#: In a peer's row: how many times longer it takes than our method that does the same work.
SLOWER = Column("ours_faster", "time / dpo_kernels", "ratio")


def counted(number: float, noun: str) -> str:
    """ "1 pair", "4 pairs"."""
    return f"{number:,.0f} {noun}" if number == 1 else f"{number:,.0f} {noun}s"


def listed(parts: Sequence[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def no_summary(rows: list[dict[str, Any]]) -> str:
    """The summary of a result that has none."""
    return ""


@dataclass
class Result:
    """The answer of one benchmark file.

    Attributes:
        name: the benchmark's name; its files have the same name.
        question: one sentence.
        columns, rows: the table, of at most six columns; rows hold plain JSON values, seconds and bytes.
            Keys with a meaning here: `select` (the `-k` expression that runs only the row and the peer that it is
            compared with), `best_peer` and `vs_best` (the fastest peer whose gradient is right, and how many times longer
            it takes for the same work), `explanation` (why `vs_best` is below 1, if it is; see reasons.py), `flops` and
            `bytes` (what the work requires: its place on the roofline).
        details: columns of a second table, also at most six, for the page, and for the terminal with `-v`.
        floor: the meaning of `floor_s` in the rows, in words that follow "floor:".
        group: the row key whose change starts a new table.
        notes: sentences below the table, made from measured values only.
        summary: makes the answer, one sentence, from the rows of all cases.
        chart: "bars" (one bar per row and group) or "lines" (`y` over `x`, one line per title).
        x_label: label of a line chart's horizontal axis; the group's name if empty.
        y: the row key of a line chart's vertical axis, one of charts.SCALES.
        extra: more keys of the JSON file; `bars` are goals and whether they were met (see goal()), `roofs` are the measured
            speeds of the machine, by dtype (see charts.py).
    """

    name: str
    question: str
    columns: list[Column]
    rows: list[dict[str, Any]] = field(default_factory=list)
    details: Sequence[Column] = ()
    floor: str = ""
    group: str = "case"
    notes: list[str] = field(default_factory=list)
    summary: Callable[[list[dict[str, Any]]], str] = no_summary
    chart: str = "bars"
    x_label: str = ""
    y: str = "median_s"
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def file(self) -> str:
        """Path of the benchmark's file, for pytest."""
        return f"benchmarks/test_{self.name}.py"

    def groups(self) -> dict[str, list[dict[str, Any]]]:
        """The rows, by the value of their group, in order."""
        found: dict[str, list[dict[str, Any]]] = {}
        for row in self.rows:
            found.setdefault(str(row[self.group]), []).append(row)
        return found

    def sentences(self) -> list[str]:
        """All lines below the tables: notes, then goals."""
        return [*self.notes, *map(goal, self.extra.get("bars", ()))]

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
    """The columns that are not empty in these rows, and their cells."""
    used = [column for column in columns if any(row.get(column.key) is not None for row in rows)]
    return used, [[column.write(row) for column in used] for row in rows]


def text_table(columns: Sequence[Column], rows: Sequence[dict[str, Any]]) -> list[str]:
    """Aligned lines for a terminal: the first column is left-aligned, all others are right-aligned."""
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
    """The table as markdown; our methods in bold."""
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


#: A row that is compared with the best peer: (benchmark, row).
Compared = tuple[str, dict[str, Any]]


def compared(rows_by_benchmark: Iterable[tuple[str, Iterable[dict[str, Any]]]]) -> list[Compared]:
    """Each of our rows that had a peer."""
    return [(name, row) for name, rows in rows_by_benchmark for row in rows if row.get("vs_best") is not None]


def has_peer(rows: Iterable[dict[str, Any]]) -> bool:
    """Whether any row was compared with a peer."""
    return any(row.get("vs_best") is not None for row in rows)


def _said(row: dict[str, Any], low: float, high: float) -> str:
    """A ratio to the best peer, or its range, in words: of times, or of memory if no time was measured."""
    if "median_s" in row:
        return f"{_range(low, high)} times the speed of {row['best_peer']}"
    return f"{_range(1 / high, 1 / low)} times the memory of {row['best_peer']}"


def _sentence(rows: Sequence[dict[str, Any]], low: float, high: float) -> str:
    titles = list(dict.fromkeys(row["title"] for row in rows))
    reach, need = ("reaches", "needs") if len(titles) == 1 else ("reach", "need")
    return f"{listed(titles)} {reach if 'median_s' in rows[0] else need} {_said(rows[0], low, high)}"


def _range(low: float, high: float) -> str:
    first, last = (f"{value:.2f}" if value < 10 else f"{value:.0f}" for value in (low, high))
    return first if first == last else f"{first} to {last}"


def headline(rows: Sequence[Compared]) -> dict[str, Any]:
    """Our weakest row against the best peer, over all rows of all results; empty if nothing was compared."""
    if not rows:
        return {}
    name, row = min(rows, key=lambda found: found[1]["vs_best"])
    below = sum(found["vs_best"] < 1 for _, found in rows)
    line = (
        f"dpo_kernels is behind the best peer in {below} of {counted(len(rows), 'comparison')}. The weakest ({_words(name)}): "
        f"{_sentence([row], row['vs_best'], row['vs_best'])} ({row['case']})"
    )
    return {
        "ratio": row["vs_best"],
        "benchmark": name,
        "line": line,
        "said": _said(row, row["vs_best"], row["vs_best"]),
    }


def below_one(rows: Sequence[Compared]) -> list[str]:
    """A sentence for each case in which our methods lose to the best peer, with the reason if one is known."""
    found: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for name, row in rows:
        if row["vs_best"] < 1:
            reason = reasons.explain(name, row) or "No reason is known yet."
            found.setdefault((name, row["best_peer"], row["case"], reason), []).append(row)
    return [
        f"Behind a peer ({_words(name)}): {_sentence(lost, *_ends(lost))} ({case}). {reason}"
        for (name, _, case, reason), lost in found.items()
    ]


def _words(name: str) -> str:
    """A benchmark's name in words."""
    return name.replace("_", " ").replace("gpu", "GPU")


def _ends(rows: Sequence[dict[str, Any]]) -> tuple[float, float]:
    ratios = [row["vs_best"] for row in rows]
    return min(ratios), max(ratios)


#: A row of a page's first table: question, result against the best peer, verdict.
Answer = tuple[str, str, str]


def answer(question: str, rows: Sequence[dict[str, Any]]) -> Answer:
    """A benchmark's row of a page's first table: how its rows compare with the best peers."""
    mine = [row for row in rows if row.get("vs_best") is not None]
    if not mine:
        return question, "not compared with a peer", "-"
    memory = "median_s" not in mine[0]
    better = "less memory" if memory else "faster"
    worse = "more memory" if memory else "slower"
    lost = [row for row in mine if row["vs_best"] < 1]
    peers = list(dict.fromkeys(row["best_peer"] for row in mine))
    said = _said({**mine[0], "best_peer": peers[0] if len(peers) == 1 else "the best peer"}, *_ends(mine))
    if not lost:
        return question, said, better
    if len(titles := {row["title"] for row in lost}) == 1 and len(lost) < len(mine):
        return question, said, f"{better} ({worse}: {titles.pop()})"
    return question, said, f"{worse} in {len(lost)} of {counted(len(mine), 'row')}"


def answer_table(answers: Iterable[Answer]) -> list[str]:
    """A page's first table as markdown."""
    lines = ["| question | result against the best peer | verdict |", "| :--- | :--- | :--- |"]
    return [*lines, *(f"| {' | '.join(one)} |" for one in answers)]


def place(machine: dict[str, Any]) -> str:
    """The machine of a measurement, in a few words."""
    return (
        machine.get("gpu") or f"{machine['cpu']}, {counted(machine['threads'], 'thread')}, {machine['instruction_set']}"
    )


def machine_line(machine: dict[str, Any]) -> str:
    """Machine, versions and date of a measurement."""
    return (
        f"{place(machine)}; backend {machine['backend']}, "
        f"torch {machine['torch']}, dpo-kernels {machine['dpo_kernels']}, {machine['date']}"
    )


def markdown(result: Result, machine: dict[str, Any], chart: str | None = None) -> str:
    """The result as a page; chart: file name of its picture."""
    lines = [f"# {result.question}", "", *answer_table([answer(result.question, result.rows)]), ""]
    if summary := result.summary(result.rows):
        lines += [summary, ""]
    lines += [f"Measured on {machine_line(machine)}.", ""]
    if chart:
        lines += [f"![{result.question}]({chart})", ""]
    for columns, title in ((result.columns, ""), (result.details, "more figures of the same run: ")):
        for group, rows in result.groups().items() if columns else ():
            lines += [f"## {title}{group}", "", *markdown_table(columns, rows), ""]
    lines += [f"* {sentence}" for sentence in [*result.sentences(), *below_one(compared([(result.name, result.rows)]))]]
    if commands := list(dict.fromkeys(row["command"] for row in result.rows if row.get("command"))):
        lines += ["", "## The command that measures each row alone", "", "```", *commands, "```"]
    return "\n".join(lines).rstrip() + "\n"


def _short(question: str) -> str:
    """The topic of a question: its words before the colon."""
    return question.partition(":")[0]


def goal(bar: dict[str, Any]) -> str:
    """A goal in words: `what`, `measured`, `bar`, whether it is `met`, and the `ceiling`, the largest possible value."""
    bound = "at least" if (bar["measured"] >= bar["bar"]) == bar["met"] else "at most"
    ceiling = f"; more than {bar['ceiling']:.2f} is impossible" if bar.get("ceiling") is not None else ""
    said = f"measured {bar['measured']:.2f}, {'met' if bar['met'] else 'MISSED'}{ceiling}"
    return f"Goal: {bar['what']}, {bound} {bar['bar']:g}: {said}."


#: Pairs of a result and the machine it was measured on.
Measured = Sequence[tuple[Result, dict[str, Any]]]


def write(results: Measured, folder: Path) -> None:
    """Write `<name>.json`, `.md` and `.svg` of each result (a line chart needs matplotlib), then README.md of the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    # All figures are saved before the first picture is drawn, which may fail.
    for result, machine in results:
        (folder / f"{result.name}.json").write_text(json.dumps(result.as_json(machine), indent=1) + "\n")
    for result, machine in results:
        chart = charts.draw(result, folder / f"{result.name}.svg")
        (folder / f"{result.name}.md").write_text(markdown(result, machine, chart.name if chart else None))
    write_index(folder)


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """The results of one machine, by benchmark, in the order of ORDER."""
    paths = sorted(
        folder.glob("*.json"), key=lambda path: (path.stem not in ORDER, [*ORDER, path.stem].index(path.stem))
    )
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in paths}


def restored(found: dict[str, Any]) -> Result:
    """A result read from its JSON: measured figures as saved, with the benchmark's current columns and words."""
    make = importlib.import_module(f"benchmarks.test_{found['benchmark']}").RESULT
    known = {"benchmark", "question", "summary", "machine", "rows", "notes"}
    extra = {key: value for key, value in found.items() if key not in known}
    return make(rows=found["rows"], notes=found["notes"], extra=extra)


def write_index(folder: Path) -> None:
    """Write README.md and the roofline of a machine's folder from all its JSON files, including those of earlier runs."""
    results = read(folder)
    everything = compared((name, found["rows"]) for name, found in results.items())
    machine = next(iter(results.values()))["machine"]
    lines = [f"# {machine.get('gpu') or machine['cpu']}", ""]
    lines += [
        *answer_table(answer(f"[{one['question']}]({name}.md)", one["rows"]) for name, one in results.items()),
        "",
    ]
    lines += [f"Measured on {machine_line(machine)}."]
    for found in results.values():
        day = "" if found["machine"]["date"] == machine["date"] else f" ({found['machine']['date']})"
        if summary := found.get("summary"):
            lines += [
                *([""] if not lines[-1].startswith("* ") else []),
                f"* **{_short(found['question'])}**{day}: {summary}",
            ]
    if line := headline(everything).get("line"):
        lines += ["", f"{line}.", ""]
        lines += [f"* {sentence}" for sentence in below_one(everything)]
    drawn = [
        (_short(results[name]["question"]), f"{name}.svg") for name in results if (folder / f"{name}.svg").is_file()
    ]
    if chart := charts.roofline(results, folder / "roofline.svg"):
        drawn.append(("Speed of each method under the speed of the machine", chart.name))
    for title, file in drawn:
        lines += ["", f"## {title}", "", f"![{title}]({file})"]
    (folder / "README.md").write_text("\n".join(lines) + "\n")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Write the pages and charts of results again, and measure nothing.")
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="holds one machine's JSON files")
    for folder in parser.parse_args().folders:
        if (folder / "results.json").is_file():
            from . import gpu_session

            gpu_session.merge([folder], folder)
        else:
            write([(restored(found), found["machine"]) for found in read(folder).values()], folder)


if __name__ == "__main__":
    main()
