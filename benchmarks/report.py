"""Turns results into a terminal table, JSON, markdown and SVG charts; one column list drives all of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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


@dataclass
class Result:
    """The answer of one benchmark file.

    Attributes:
        name: of the benchmark; names its files.
        question: in one sentence.
        columns, rows: the table; rows hold plain JSON values, seconds and bytes.
            Keys with a meaning here: `select` (the `-k` expression that runs the row alone, with the peer that it is
            compared with), `vs_best` and `best_peer` (how many times longer the best right peer takes for the same
            work, and who that is), `explanation` (why, where that is below 1).
        group: the row key whose change starts a new table.
        notes: sentences below the table, made from measured values only.
        chart: "bars" (one bar per row and group) or "lines" (`x` against `y`, one line per title).
        x_label: of a line chart; the group's name if empty.
        y: the row key of a line chart's vertical axis, one of Y_AXES.
    """

    name: str
    question: str
    columns: list[Column]
    rows: list[dict[str, Any]] = field(default_factory=list)
    group: str = "case"
    notes: list[str] = field(default_factory=list)
    chart: str = "bars"
    x_label: str = ""
    y: str = "median_s"
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def file(self) -> str:
        """The benchmark's file, as pytest takes it."""
        return f"benchmarks/test_{self.name}.py"

    def below_one(self) -> list[str]:
        """A sentence for each row that loses against its best peer; rows without an explanation say so."""
        return [
            f"Below 1.0: {row['title']} against {row['best_peer']}, {row['case']}: {row['vs_best']:.2f}x. "
            f"{row.get('explanation') or 'NOT EXPLAINED'}"
            for row in self.rows
            if row.get("vs_best") is not None and row["vs_best"] < 1
        ]

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
    """The same as a markdown table."""
    used, body = cells(columns, rows)
    ruler = "|" + "|".join(" :--- " if i == 0 else " ---: " for i in range(len(used))) + "|"
    return [
        "| " + " | ".join(column.heading for column in used) + " |",
        ruler,
        *("| " + " | ".join(line) + " |" for line in body),
    ]


def headline(results: Iterable[Result]) -> dict[str, Any]:
    """Our worst ratio against the best peer, over all rows of all results; empty where nothing was compared."""
    rows = [(row, result.name) for result in results for row in result.rows if row.get("vs_best") is not None]
    if not rows:
        return {}
    row, name = min(rows, key=lambda found: found[0]["vs_best"])
    below = sum(found["vs_best"] < 1 for found, _ in rows)
    line = (
        f"Worst ratio against the best peer, over {len(rows)} rows: {row['vs_best']:.2f}x "
        f"({name}: {row['title']} against {row['best_peer']}, {row['case']}); {below} below 1.0"
    )
    return {
        "ratio": row["vs_best"],
        "benchmark": name,
        "title": row["title"],
        "best_peer": row["best_peer"],
        "line": line,
    }


def machine_line(machine: dict[str, Any]) -> str:
    """One sentence that says on what, with what and when."""
    where = machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} threads, {machine['instruction_set']}"
    return (
        f"{where}; backend {machine['backend']}, "
        f"torch {machine['torch']}, dpo-kernels {machine['dpo_kernels']}, {machine['date']}"
    )


def markdown(result: Result, machine: dict[str, Any]) -> str:
    """The result as a page."""
    lines = [f"# {result.question}", "", machine_line(machine), ""]
    for group, rows in result.groups().items():
        quoted = [row | {"command": f"`{row['command']}`"} if row.get("command") else row for row in rows]
        columns = [*result.columns, Column("command", "the command that makes it alone")]
        lines += [f"## {group}", "", *markdown_table(columns, quoted), ""]
    lines += [f"* {note}" for note in [*result.notes, *result.below_one()]]
    return "\n".join(lines).rstrip() + "\n"


def write(result: Result, folder: Path, machine: dict[str, Any]) -> list[Path]:
    """Write `<name>.json`, `.md` and, where matplotlib is installed, `.svg` into the folder; returns the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{result.name}.json", folder / f"{result.name}.md"]
    paths[0].write_text(json.dumps(result.as_json(machine), indent=1) + "\n")
    paths[1].write_text(markdown(result, machine))
    if chart := draw(result, folder / f"{result.name}.svg"):
        paths.append(chart)
    return paths


def draw(result: Result, path: Path) -> Path | None:
    """The chart as SVG; None where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    # Same figures, same file: no random ids, no date inside.
    matplotlib.rcParams.update({"svg.hashsalt": result.name, "svg.fonttype": "none", "font.size": 9})
    from matplotlib import pyplot

    figure = _bars(result, pyplot) if result.chart == "bars" else _lines(result, pyplot)
    figure.savefig(path, metadata={"Date": None}, bbox_inches="tight")
    pyplot.close(figure)
    return path


_OURS, _OTHERS = "#1b6ca8", "#b8bec6"
#: Lines need to be told apart: one colour for ours, these for the others, in order.
_LINES = ("#8a8f98", "#d1873d", "#7a9a5b", "#a06a9e", "#b0564f")

#: What charts can show: row key -> (axis label, factor).
_SCALES = {
    "median_s": ("ms", 1e3),
    "extra_bytes": ("MiB beside the inputs", 2.0**-20),
    "peak_bytes": ("MiB in all", 2.0**-20),
}


def _bars(result: Result, pyplot: Any) -> Any:
    """A row of panels for each group: time, and memory where it was measured."""
    groups = {name: [row for row in rows if row.get("median_s")] for name, rows in result.groups().items()}
    groups = {name: rows for name, rows in groups.items() if rows}
    panels = [key for key in _SCALES if any(row.get(key) is not None for row in result.rows)]
    heights = [0.3 * len(rows) + 1.1 for rows in groups.values()]
    figure, axes = pyplot.subplots(
        len(groups),
        len(panels),
        figsize=(4 * len(panels) + 3, sum(heights)),
        squeeze=False,
        layout="constrained",
        height_ratios=heights,
    )
    for line, (name, rows) in zip(axes, groups.items(), strict=True):
        titles = [row["title"] for row in rows]
        colours = [_OURS if row.get("ours") else _OTHERS for row in rows]
        for axis, key in zip(line, panels, strict=True):
            unit, scale = _SCALES[key]
            values = [(row.get(key) or 0.0) * scale for row in rows]
            bars = axis.barh(range(len(rows)), values, color=colours)
            labels = ["-" if row.get(key) is None else _short(row[key] * scale) for row in rows]
            axis.bar_label(bars, labels, padding=3)
            axis.invert_yaxis()
            # A floor beyond the bars (a copy that a neighbour slowed) is shown, not left outside the axis.
            floors = [(row.get("floor_s") or 0.0) * scale for row in rows] if key == "median_s" else []
            furthest = max([*values, *floors])
            axis.set_xlim(0, 1.18 * furthest or 1)
            axis.set_xlabel(unit)
            axis.set_yticks(range(len(rows)), titles if axis is line[0] else [""] * len(rows))
            axis.tick_params(axis="y", length=0)
            axis.spines[["top", "right"]].set_visible(False)
        # Over the titles as well: a heading may be longer than a panel is wide.
        line[0].annotate(
            name,
            (0, 1),
            (0, 12),
            xycoords=("figure fraction", "axes fraction"),
            textcoords="offset points",
            weight="bold",
        )
        if floor := rows[0].get("floor_s"):
            line[0].axvline(floor * 1e3, color="black", linestyle=":", linewidth=1)
            line[0].annotate(
                "floor",
                (floor * 1e3, 1),
                (2, 1),
                xycoords=("data", "axes fraction"),
                textcoords="offset points",
                fontsize=7,
            )
    return figure


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 or value < 0.01 else f"{value:.2g}"


def _lines(result: Result, pyplot: Any) -> Any:
    """A panel for each group: `y` over `x`, one line a title. Times on logarithmic axes, whose slope is the exponent."""
    groups = result.groups()
    unit, scale = _SCALES[result.y]
    logarithmic = result.y == "median_s"
    figure, axes = pyplot.subplots(
        1, len(groups), figsize=(4.8 * len(groups), 3.6), squeeze=False, layout="constrained"
    )
    for axis, (name, rows) in zip(axes[0], groups.items(), strict=True):
        others = iter(_LINES)
        for series in dict.fromkeys(row["title"] for row in rows):
            line = [row for row in rows if row["title"] == series and row.get(result.y) is not None]
            if not line:
                continue
            ours = line[0].get("ours")
            axis.plot(
                [row["x"] for row in line],
                [row[result.y] * scale for row in line],
                "s--" if ours and "in place" in series else "o-",
                color=_OURS if ours else next(others),
                label=series,
            )
        axis.set_title(name, loc="left", fontsize=9, fontweight="bold")
        axis.set(xlabel=result.x_label or name.partition(":")[0], ylabel=unit)
        if logarithmic:
            axis.set(xscale="log", yscale="log")
            for formatter in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
                formatter(pyplot.FuncFormatter(lambda value, _: f"{value:g}"))
        else:
            axis.set_ylim(bottom=0)
        sizes = sorted({row["x"] for row in rows})
        axis.set_xticks(sizes, [f"{size:,}" for size in sizes], minor=False)
        axis.xaxis.set_minor_locator(pyplot.NullLocator())
        axis.tick_params(axis="x", labelsize=8)
        axis.legend(frameon=False, fontsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    return figure
