"""Draws results as SVG: bars of methods, lines over sizes, and a roofline of all methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import bars

if TYPE_CHECKING:
    from .report import Result

_OURS, _INK, _FAINT = "#1b6ca8", "#333a42", "#e3e6ea"
#: Colours of the lines in a chart, in order: for our methods and for other methods.
_OUR_LINES, _OTHER_LINES = ("#1b6ca8", "#57a3d9"), ("#8a8f98", "#d1873d", "#7a9a5b", "#a06a9e", "#b0564f")

#: The dark theme's replacement for each colour; the lines' other colours are legible on both backgrounds.
_DARK = {"#ffffff": "#0d1117", _INK: "#f0f6fc", _FAINT: "#30363d", _OURS: "#4493f8"}

#: What charts can show: row key -> (axis label, factor).
SCALES = {
    "median_s": ("time, ms", 1e3),
    "extra_bytes": ("extra memory, MiB", 2.0**-20),
    "peak_bytes": ("peak memory, MiB", 2.0**-20),
}


def _scale(key: str, rows: Sequence[Mapping[str, Any]]) -> tuple[str, float]:
    """The unit in which these rows are drawn: seconds if they take many seconds."""
    if key == "median_s" and max((row.get(key) or 0.0) for row in rows) >= 2:
        return "time, s", 1.0
    return SCALES[key]


def _label(key: str, value: float) -> str:
    """The text of a bar's figure: whole MiB (the system counts pages in batches), times to three digits, as in the tables."""
    return f"{value:,.0f}" if value >= 100 or key != "median_s" else f"{value:.3g}"


def _pyplot(salt: str) -> Any:
    """matplotlib.pyplot, configured; None if it is not installed."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    # The same figures must give the same file: no random ids, no date.
    matplotlib.rcParams.update({"svg.hashsalt": salt, "svg.fonttype": "none", "font.size": 11})
    matplotlib.rcParams.update({"text.color": _INK, "axes.edgecolor": _INK, "axes.labelcolor": _INK})
    matplotlib.rcParams.update({"xtick.color": _INK, "ytick.color": _INK, "axes.titlesize": 11})
    from matplotlib import pyplot

    return pyplot


def _save(figure: Any, path: Path, pyplot: Any) -> Path:
    """Write the figure as SVG; its colours follow the theme of the reader's system."""
    figure.savefig(path, metadata={"Date": None}, bbox_inches="tight", facecolor="white")
    pyplot.close(figure)
    rules = "".join(
        f'[style*="{kind}: {light}"]{{{kind}:{dark}!important}}'
        for light, dark in _DARK.items()
        for kind in ("fill", "stroke")
    )
    text = path.read_text(encoding="utf-8")
    path.write_text(
        text.replace("</style>", f"@media(prefers-color-scheme:dark){{{rules}}}</style>", 1), encoding="utf-8"
    )
    return path


def draw(result: Result, path: Path) -> Path | None:
    """The result's chart; None if nothing was measured, or if it is a line chart and matplotlib is not installed."""
    if result.chart == "bars":
        panels = bar_panels(result)
        if not panels:
            return None
        path.write_text(bars.draw(panels, title=result.question), encoding="utf-8")
        return path
    pyplot = _pyplot(result.name)
    figure = None if pyplot is None else _lines(result, pyplot)
    return None if figure is None else _save(figure, path, pyplot)


def bar_panels(result: Result) -> list[bars.Panel]:
    """A panel for each group: time, and memory if it was measured."""
    shown = [key for key in SCALES if any(row.get(key) is not None for row in result.rows)]
    panels = []
    for name, rows in result.groups().items():
        timed = [row for row in rows if row.get("median_s")]
        if not timed:
            continue
        scales = [_scale(key, timed) for key in shown]

        def value(row: Mapping[str, Any], key: str, scale: float) -> tuple[float, str] | None:
            return None if row.get(key) is None else (row[key] * scale, _label(key, row[key] * scale))

        found = [
            bars.Bar(
                row["title"],
                bool(row.get("ours")),
                [value(row, key, scale) for key, (_, scale) in zip(shown, scales, strict=True)],
                row["floor_s"] * scales[0][1] if row.get("floor_s") else None,
            )
            for row in timed
        ]
        floor = f"floor: {result.floor}" if result.floor else ""
        panels.append(bars.Panel(name, [unit for unit, _ in scales], found, floor))
    return panels


def _lines(result: Result, pyplot: Any) -> Any:
    """A panel for each group: `y` over `x`, one line per title. Times have logarithmic axes: the slope is the exponent."""
    groups = {name: [row for row in rows if row.get(result.y) is not None] for name, rows in result.groups().items()}
    groups = {name: rows for name, rows in groups.items() if rows}
    if not groups:
        return None
    unit, scale = SCALES[result.y]
    logarithmic = result.y == "median_s"
    figure, axes = pyplot.subplots(
        1, len(groups), figsize=(4.6 * len(groups), 4.4), squeeze=False, layout="constrained"
    )
    for axis, (name, rows) in zip(axes[0], groups.items(), strict=True):
        ours, others = iter(_OUR_LINES), iter(_OTHER_LINES)
        for series in dict.fromkeys(row["title"] for row in rows):
            line = [row for row in rows if row["title"] == series]
            mine = line[0].get("ours")
            x, y = [row["x"] for row in line], [row[result.y] * scale for row in line]
            style = {"marker": "s" if mine else "o", "markersize": 4.5, "linewidth": 2 if mine else 1.4}
            axis.plot(x, y, color=next(ours if mine else others), label=series, zorder=3 if mine else 2, **style)
        axis.set_title(name, loc="left", fontweight="bold")
        axis.set(xlabel=result.x_label or name.partition(":")[0], ylabel=unit)
        if logarithmic:
            axis.set(xscale="log", yscale="log")
            # Ticks at 1, 2 and 5: an axis of less than a decade would have almost no ticks otherwise.
            axis.yaxis.set_major_locator(pyplot.matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_minor_locator(pyplot.NullLocator())
            axis.yaxis.set_major_formatter(pyplot.FuncFormatter(lambda value, _: f"{value:g}"))
        else:
            axis.set_ylim(bottom=-0.02 * max(row[result.y] * scale for row in rows))
        sizes = sorted({row["x"] for row in rows})
        axis.set_xticks(sizes, [f"{size:,}" for size in sizes], minor=False)
        axis.xaxis.set_minor_locator(pyplot.NullLocator())
        axis.grid(color=_FAINT, linewidth=0.8)
        axis.set_axisbelow(True)
        # Below the axes, where no line can cross it.
        axis.legend(frameon=False, fontsize=9.5, loc="upper center", bbox_to_anchor=(0.5, -0.2))
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def roofline(results: Mapping[str, Mapping[str, Any]], path: Path) -> Path | None:
    """Roofline: a point for each row with `flops`, `bytes` and a time, below the measured speed of the machine.

    Horizontal: operations per byte of the task itself, so all methods for one task stand in one column. Vertical:
    operations per second. The roof is the measured speed of a plain copy and of a plain matrix product; a method at the
    roof does only the necessary work. A filtered gradient leaves products out, so it may lie above the roof.

    Args:
        results: results from JSON, by name. Their `roofs` are {dtype: {"copy": bytes/s, "gemm": operations/s}}.

    Returns:
        The SVG; None without matplotlib, without points, or if a roof was not measured.
    """
    points = [
        (row["case"], bool(row.get("ours")), row["flops"] / row["bytes"], row["flops"] / row["median_s"])
        for found in results.values()
        for row in found.get("rows", ())
        if row.get("flops") and row.get("bytes") and row.get("median_s")
    ]
    roofs = [roof for found in results.values() for roof in found.get("roofs", {}).values()]
    copy = max((roof["copy"] for roof in roofs if "copy" in roof), default=None)
    gemm = max((roof["gemm"] for roof in roofs if "gemm" in roof), default=None)
    pyplot = _pyplot("roofline")
    if pyplot is None or not points or copy is None or gemm is None:
        return None
    figure, axis = pyplot.subplots(figsize=(8.4, 4.6), layout="constrained")
    ridge = gemm / copy
    intensities = [ridge, *(point[2] for point in points)]
    left, right = min(intensities) / 6, max(intensities) * 6
    axis.plot([left, ridge, right], [left * copy / 1e9, gemm / 1e9, gemm / 1e9], color=_INK, linewidth=1.4)
    axis.annotate(f"matrix product {gemm / 1e9:,.0f} GFLOP/s", (ridge, gemm / 1e9), (4, 4), textcoords="offset points")
    axis.annotate(f"copy {copy / 1e9:.0f} GB/s", (ridge, gemm / 1e9), (-8, 4), textcoords="offset points", ha="right")
    for case in dict.fromkeys(point[0] for point in points):
        here = [point for point in points if point[0] == case]
        place = {"xycoords": ("data", "axes fraction"), "xytext": (-5, 4), "textcoords": "offset points"}
        axis.axvline(here[0][2], color=_INK, linewidth=0.6, linestyle=":", zorder=0)
        title = case.removesuffix(", loss and gradient")
        axis.annotate(title, (here[0][2], 0), fontsize=9, rotation=90, ha="right", va="bottom", **place)
    for mine, marker, colour, label in ((False, "o", "#8a8f98", "other methods"), (True, "s", _OURS, "dpo_kernels")):
        here = [point for point in points if point[1] == mine]
        x, y = [point[2] for point in here], [point[3] / 1e9 for point in here]
        axis.plot(x, y, marker, color=colour, markersize=5.5, label=label)
    axis.legend(frameon=False, loc="lower right", fontsize=10)
    axis.set(
        xscale="log",
        yscale="log",
        xlabel="operations per byte that the work has to move",
        ylabel="billion operations a second",
    )
    axis.set_xlim(left, right)
    axis.set_title(
        "Roofline: speed of each method under the speed of the machine; one column a case",
        loc="left",
        fontweight="bold",
    )
    for each in (axis.xaxis, axis.yaxis):
        each.set_major_formatter(pyplot.FuncFormatter(lambda value, _: f"{value:,g}"))
        each.set_minor_formatter(pyplot.NullFormatter())
    axis.grid(color=_FAINT, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    return _save(figure, path, pyplot)


def memory(points: Sequence[tuple[float, int]], spans: Sequence[tuple[str, float, float]], path: Path) -> Path | None:
    """Plot of bytes over time, (milliseconds, bytes), with (stage, begin, end) shaded; None if matplotlib is not installed."""
    pyplot = _pyplot("memory")
    if pyplot is None:
        return None
    figure, axis = pyplot.subplots(figsize=(8.4, 3.2), layout="constrained")
    axis.step([at for at, _ in points], [held / 2**20 for _, held in points], where="post", color=_INK, linewidth=1.2)
    colours = dict(zip(dict.fromkeys(name for name, *_ in spans), (_OURS, *_OTHER_LINES[1:], "#57a3d9"), strict=False))
    for name, colour in colours.items():
        for index, (_, begin, end) in enumerate(span for span in spans if span[0] == name):
            axis.axvspan(begin, end, color=colour, alpha=0.25, linewidth=0, label=None if index else name)
    axis.set(xlabel="ms", ylabel="MiB of tensors, from the start")
    if colours:
        axis.legend(frameon=False, fontsize=9.5, loc="upper left", bbox_to_anchor=(1, 1))
    axis.spines[["top", "right"]].set_visible(False)
    return _save(figure, path, pyplot)
