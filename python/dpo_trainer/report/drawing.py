"""Charts as SVG that takes its colours from the page, shows values on hover, and has a description for screen readers."""

from __future__ import annotations

import contextlib
import html
import io
import math
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .charts import Chart
from .figures import figure, with_error

# Placeholder colours, which are replaced by CSS variables, so that the page chooses light or dark.
_INK, _GRID = "#010203", "#010204"
COLOURS = 8
_SERIES = {number: f"#0a0b0{number}" for number in range(1, COLOURS + 1)}
_VARIABLES = {_INK: "ink", _GRID: "grid", **{colour: f"series-{number}" for number, colour in _SERIES.items()}}
_STYLE: Any = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 9.5,
    "lines.linewidth": 1.8,
    "lines.markersize": 3.5,
    "lines.solid_capstyle": "round",
    "figure.figsize": (4.5, 2.65),
    "figure.constrained_layout.use": True,
    "savefig.transparent": True,
    "axes.axisbelow": True,
    "axes.edgecolor": _GRID,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": _GRID,
    "legend.frameon": False,
    "legend.handlelength": 1.6,
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "axes.spines.left"), False),
    **dict.fromkeys(("xtick.major.size", "ytick.major.size"), 0),
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), _INK),
}
#: Style of a horizontal or vertical line with which the curves are compared.
_LEVEL: Any = {"color": _INK, "linewidth": 1, "linestyle": (0, (4, 3))}


@dataclass(frozen=True)
class Curve:
    """Points (step, value) with a label, the number of a colour, and whether the line is dashed.

    `errors` are the known standard errors of the values, by step.
    """

    points: Sequence[tuple[float, float]]
    label: str
    colour: int
    dashed: bool = False
    errors: Mapping[float, float] = field(default_factory=dict)


def points_of(records: Sequence[dict[str, Any]], metric: str) -> list[tuple[float, float]]:
    """(step, value) of the records that have the metric."""
    return [(record["step"], record[metric]) for record in records if record.get(metric) is not None]


def curves_of(chart: Chart, train: list[dict[str, Any]], evals: list[dict[str, Any]]) -> list[Curve]:
    """The chart's curves from records of training steps and of evaluations. Curves without a point are left out."""
    sources = {"train": train, "eval": evals}
    found = [
        Curve(
            points_of(sources[line.source], line.metric),
            line.label,
            line.colour,
            errors=dict(points_of(sources[line.source], f"{line.metric}_se")),
        )
        for line in chart.lines
    ]
    return [curve for curve in found if curve.points]


def draw(chart: Chart, curves: Sequence[Curve]) -> str | None:
    """The chart as inline SVG that takes its colours and font from the page. None without curves."""
    if not curves:
        return None
    from matplotlib.ticker import MaxNLocator

    values = [value for curve in curves for _, value in curve.points]
    with _axes(chart.key) as axes:
        for curve in curves:
            steps, line = zip(*curve.points, strict=True)
            axes.plot(
                steps,
                line,
                color=_SERIES[curve.colour],
                linestyle=(0, (4, 2)) if curve.dashed else "-",
                marker="o" if len(curve.points) <= 30 else None,
                label=curve.label,
            )
            if curve.errors:
                errors = [curve.errors.get(step, 0.0) for step in steps]
                band = [[value + sign * error for value, error in zip(line, errors, strict=True)] for sign in (-1, 1)]
                axes.fill_between(steps, *band, color=_SERIES[curve.colour], alpha=0.15, linewidth=0)
        if chart.level is not None:
            axes.axhline(chart.level, label=chart.level_label or None, **_LEVEL)
        axes.set_xlabel("step")
        axes.margins(x=0.02, y=0.12)  # before any limit is set, since a limit ends autoscaling
        if chart.percent:
            axes.set_ylim(-0.03, 1.03)
        elif chart.key in ("throughput", "memory"):
            axes.set_ylim(0, 1.15 * max(values) or 1.0)
        elif chart.key == "learning_rate":
            axes.set_ylim(bottom=0)
        low, high = axes.get_ylim()
        # An axis spans at least a fiftieth of the greatest value, so that rounding errors do not look like changes.
        if (least := 0.02 * max(map(abs, values))) > 0 and high - low < least:
            axes.set_ylim((low + high - least) / 2, (low + high + least) / 2)
        last = max(step for curve in curves for step, _ in curve.points) or 1
        axes.set_xlim(-0.02 * last, 1.02 * last)  # the same for all charts of a page
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7, min_n_ticks=1))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
        _label_ticks(axes, percent=chart.percent)
        spots = [
            (step, value, f"{curve.label}, step {step:,}: {_said(value, chart, curve.errors.get(step))}", curve.colour)
            for curve in curves
            for step, value in _some(curve.points)
        ]
        return _inline(axes, chart.key, chart.title, _in_words(chart, curves), spots)


#: Number of a curve's points that show their value on hover. More would make the page large.
_SPOTS = 60


def _some(points: Sequence[tuple[float, float]]) -> Sequence[tuple[float, float]]:
    """The points that show their value: all, or `_SPOTS` evenly spaced ones and the lowest and the highest."""
    if len(points) <= _SPOTS:
        return points
    places = {round(place * (len(points) - 1) / (_SPOTS - 1)) for place in range(_SPOTS)}
    order = sorted(range(len(points)), key=lambda place: points[place][1])
    return [points[place] for place in sorted(places | {order[0], order[-1]})]


def _label_ticks(axes: Any, *, percent: bool) -> None:
    """Fix the ticks of the y axis and label them with as few digits as tell them apart."""
    low, high = axes.get_ylim()
    ticks = [tick for tick in axes.yaxis.get_major_locator().tick_values(low, high) if low <= tick <= high]
    if percent:
        labels = [f"{tick:.0%}" for tick in ticks]
    elif max(map(abs, ticks), default=0.0) >= 1000:
        labels = [f"{tick:,.0f}" for tick in ticks]
    else:
        # Every tick shows the full number: matplotlib's formatter would put a common factor where the legend is.
        near = 1e-9 * (high - low)
        decimals = (n for n in range(7) if all(math.isclose(round(tick, n), tick, abs_tol=near) for tick in ticks))
        form = "g" if (found := next(decimals, None)) is None else f".{found}f"
        labels = [format(0.0 if abs(tick) < near else tick, form) for tick in ticks]
    axes.set_yticks(ticks, [label.replace("-", "\N{MINUS SIGN}") for label in labels])


def _said(value: float, chart: Chart, error: float | None = None) -> str:
    return with_error(value, error, "win_rate" if chart.percent else chart.lines[0].metric)


def _in_words(chart: Chart, curves: Sequence[Curve]) -> str:
    """A description of the chart for screen readers: the first, last, lowest and highest value of every curve."""
    said = []
    for curve in curves:
        (first, began), (last, ended) = curve.points[0], curve.points[-1]
        least, most = (pick(curve.points, key=lambda point: point[1]) for pick in (min, max))
        text = f"{curve.label}: {_said(began, chart)} at step {first:,}"
        if last != first:
            text += (
                f", {_said(ended, chart, curve.errors.get(last))} at step {last:,}; lowest {_said(least[1], chart)} at step "
                f"{least[0]:,}, highest {_said(most[1], chart)} at step {most[0]:,}"
            )
        said.append(text + ".")
    return f"{chart.title} by step. " + " ".join(said)


def draw_margins(key: str, before: Sequence[float], after: Sequence[float]) -> str:
    """The distributions of the pairs' margins, in nats, under the reference and under the policy, as inline SVG.

    Args:
        key: a name that is unique on the page.
        before: the margins under the reference.
        after: the margins under the policy.
    """
    from matplotlib.ticker import MaxNLocator

    values = sorted([*before, *after])
    # The middle 98 %, so that one extreme pair does not put all others into one bar. Values outside join the outer bins.
    low, high = values[len(values) // 100], values[-1 - len(values) // 100]
    with _axes(key) as axes:
        for label, group, colour in (("reference", before, 5), ("policy", after, 1)):
            inside = [min(max(value, low), high) for value in group]
            axes.hist(inside, bins=24, range=(low, high), color=_SERIES[colour], alpha=0.55, label=label)
        axes.axvline(0.0, **_LEVEL)
        axes.set_xlabel("log-probability of chosen minus rejected, nats")
        axes.set_ylabel("pairs")
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
        share = [sum(value > 0 for value in group) / max(len(group), 1) for group in (before, after)]
        middle = [statistics.median(group) for group in (before, after)]
        words = (
            f"Margins of {len(after):,} pairs. Reference: median {figure(middle[0])} nats, {share[0]:.1%} above 0. "
            f"Policy: median {figure(middle[1])} nats, {share[1]:.1%} above 0."
        )
        return _inline(axes, key, "Margins of the held-out pairs", words)


@contextlib.contextmanager
def _axes(key: str) -> Iterator[Any]:
    """A context with axes in this module's style."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": key}):
        yield Figure().add_subplot()


def _inline(axes: Any, key: str, title: str, words: str, spots: Sequence[tuple[float, float, str, int]] = ()) -> str:
    """The drawing as SVG for a page, with a description (`words`) and spots (x, y, text, colour) that show text on hover."""
    if len(axes.get_legend_handles_labels()[0]) > 1:
        # Above the plot, since a legend inside hides points. As many columns as are wide enough for the labels.
        longest = max(map(len, axes.get_legend_handles_labels()[1]))
        columns = next((count for count in (3, 2) if count * (longest + 8) <= 54), 1)
        axes.legend(ncols=columns, loc="lower left", bbox_to_anchor=(-0.02, 1.0), borderaxespad=0.1)
    buffer, canvas = io.StringIO(), axes.figure
    canvas.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var(--{variable})")
    # Several drawings share a page, so their ids must differ.
    svg = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{key}-", svg)
    head = f'role="img" aria-label="{html.escape(title)}" aria-describedby="{key}-words"><desc id="{key}-words">'
    head += f"{html.escape(words)}</desc>"
    svg = re.sub(r'<svg[^>]*?viewBox="([^"]+)"[^>]*>', lambda found: f'<svg viewBox="{found[1]}" {head}', svg, count=1)
    return svg.replace("</svg>", _spots(axes, spots) + "</svg>")


def _spots(axes: Any, spots: Sequence[tuple[float, float, str, int]]) -> str:
    """Circles that appear on hover and show their text. They need no script."""
    points, height = 72 / axes.figure.dpi, axes.figure.get_figheight() * 72
    drawn = []
    for x, y, text, colour in spots:
        across, up = axes.transData.transform((x, y)) * points
        drawn.append(
            f'<circle cx="{across:.1f}" cy="{height - up:.1f}" r="5" style="fill: var(--series-{colour})">'
            f"<title>{html.escape(text)}</title></circle>"
        )
    return f'<g class="spots">{"".join(drawn)}</g>' if drawn else ""
