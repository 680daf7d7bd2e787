"""The charts of the report and of the comparison: what each shows, and drawing them as SVG that a page can colour."""

from __future__ import annotations

import contextlib
import html
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Line:
    """A curve: metric name, label, the records it comes from ("train" or "eval") and the number of its colour."""

    metric: str
    label: str
    source: str
    colour: int


@dataclass(frozen=True)
class Chart:
    """A chart of the report: what it shows, what a healthy one looks like, and perhaps a level to compare it with."""

    key: str
    title: str
    healthy: str
    lines: tuple[Line, ...]
    level: float | None = None
    level_label: str = ""
    percent: bool = False


def _both(metric: str) -> tuple[Line, ...]:
    return Line(metric, "training", "train", 1), Line(metric, "held out", "eval", 2)


CHARTS = (
    Chart(
        "loss",
        "Loss",
        "Starts at log 2 = 0.6931, where policy and reference agree, and falls. Judge by the held-out curve: "
        "training loss that keeps falling while held-out loss turns up is memorising. Stuck at log 2 means that "
        "nothing moves: raise the learning rate.",
        _both("loss"),
    ),
    Chart(
        "accuracy",
        "Accuracy",
        "Share of pairs whose chosen answer gained more over the reference than the rejected one. Around 50 % is "
        "guessing; held out, 60 to 80 % is usual on human data. 100 % in training with a flat held-out curve is "
        "overfitting; well below 50 % suggests swapped columns.",
        _both("rewards/accuracies"),
        level=0.5,
        level_label="guessing",
        percent=True,
    ),
    Chart(
        "rewards",
        "Rewards",
        "Beta times (log-prob under the policy minus under the reference). Both start at 0 and part: chosen above"
        " rejected. Often both fall; if chosen falls far, the model unlearns good answers too: lower the learning"
        " rate or raise beta.",
        (Line("rewards/chosen", "chosen", "train", 3), Line("rewards/rejected", "rejected", "train", 4)),
        level=0.0,
    ),
    Chart(
        "margins",
        "Reward margin",
        "Chosen minus rejected reward. Grows steadily and slows; a held-out margin that lags far behind training "
        "is overfitting.",
        _both("rewards/margins"),
        level=0.0,
    ),
    Chart(
        "kl",
        "KL from the reference",
        "Exact, per completion token, in nats. Rises slowly from 0; the price paid for the margin. A sudden climb"
        " means the policy is running away from the model it started as: lower the learning rate, raise beta, or "
        "stop earlier.",
        _both("kl"),
    ),
    Chart(
        "logps",
        "Log-probabilities",
        "Summed over a completion. A widening gap is the aim; both falling quickly is likelihood displacement.",
        (Line("logps/chosen", "chosen", "train", 3), Line("logps/rejected", "rejected", "train", 4)),
    ),
    Chart(
        "win_rate",
        "Win rate",
        "Share of held-out prompts on which the scorer prefers what the policy writes. Against the answers before training "
        "it starts at 50 %. Margins that grow while this does not are learnt about the data's answers only.",
        (Line("win_rate", "held out", "eval", 2),),
        level=0.5,
        level_label="even",
        percent=True,
    ),
    Chart(
        "entropy",
        "Entropy",
        "Of the next token, in nats, over the completions. Roughly level; a collapse towards 0 means one answer "
        "to everything.",
        _both("entropy"),
    ),
    Chart(
        "grad_norm",
        "Gradient norm",
        "Before clipping. Even, within a factor of a few; lone spikes point to odd pairs, steady growth to a "
        "learning rate that is too high.",
        (Line("grad_norm", "training", "train", 1),),
    ),
    Chart(
        "memory",
        "Memory",
        "Of the process (resident; on a GPU what the allocator holds), in MiB, at each log. Level after the first steps; a "
        "steady climb is a leak, jumps are longer batches.",
        (Line("memory_mib", "MiB", "train", 5),),
    ),
    Chart(
        "throughput",
        "Throughput",
        "Real tokens (no padding) per second of training, evaluations and checkpoints left out. Level, apart from"
        " the first step.",
        (Line("tokens_per_second", "tokens / s", "train", 5),),
    ),
    Chart(
        "learning_rate",
        "Learning rate",
        "The schedule as it was applied.",
        (Line("learning_rate", "learning rate", "train", 5),),
    ),
)

# Colours are drawn as these stand-ins and become CSS variables, so that the page chooses light or dark.
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
#: Of a horizontal or vertical line that the curves are to be compared with.
_LEVEL: Any = {"color": _INK, "linewidth": 1, "linestyle": (0, (4, 3))}


@dataclass(frozen=True)
class Curve:
    """Points (step, value) with a label and the number of a colour; dashed where it stands beside a solid twin."""

    points: Sequence[tuple[float, float]]
    label: str
    colour: int
    dashed: bool = False


def points_of(records: Sequence[dict[str, Any]], metric: str) -> list[tuple[float, float]]:
    """(step, value) of the records that have the metric."""
    return [(record["step"], record[metric]) for record in records if record.get(metric) is not None]


def curves_of(chart: Chart, train: list[dict[str, Any]], evals: list[dict[str, Any]]) -> list[Curve]:
    """The chart's curves from records of training steps and of evaluations; those without a point are left out."""
    sources = {"train": train, "eval": evals}
    found = [Curve(points_of(sources[line.source], line.metric), line.label, line.colour) for line in chart.lines]
    return [curve for curve in found if curve.points]


def draw(chart: Chart, curves: Sequence[Curve]) -> str | None:
    """The chart as inline SVG that takes its colours and font from the page; None if there is nothing to draw."""
    if not curves:
        return None
    from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter, StrMethodFormatter

    with _axes(chart.key) as axes:
        for curve in curves:
            axes.plot(
                *zip(*curve.points, strict=True),
                color=_SERIES[curve.colour],
                linestyle=(0, (4, 2)) if curve.dashed else "-",
                marker="o" if len(curve.points) <= 30 else None,
                label=curve.label,
            )
        if chart.level is not None:
            axes.axhline(chart.level, label=chart.level_label or None, **_LEVEL)
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
        # In full at every tick: matplotlib's own formatter would put a common factor where the legend is.
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.5g}".replace("-", "\N{MINUS SIGN}")))
        axes.margins(x=0.02, y=0.12)  # before any limit: a limit ends autoscaling
        if chart.percent:
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
            axes.set_ylim(-0.03, 1.03)
        elif chart.key in ("throughput", "memory"):
            axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
            axes.set_ylim(0, 1.15 * max(value for curve in curves for _, value in curve.points) or 1.0)
        elif chart.key == "learning_rate":
            axes.set_ylim(bottom=0)
        return _inline(axes, chart.key, chart.title)


def draw_margins(key: str, before: Sequence[float], after: Sequence[float]) -> str:
    """The distributions of the pairs' margins, in nats, under the reference and under the policy, as inline SVG.

    Args:
        key: unique on the page.
        before, after: under the reference and under the policy.
    """
    from matplotlib.ticker import MaxNLocator

    values = sorted([*before, *after])
    # The middle 98 %: one extreme pair must not flatten all others into one bar; what lies outside joins the outer bins.
    low, high = values[len(values) // 100], values[-1 - len(values) // 100]
    with _axes(key) as axes:
        for label, group, colour in (("reference", before, 5), ("policy", after, 1)):
            inside = [min(max(value, low), high) for value in group]
            axes.hist(inside, bins=24, range=(low, high), color=_SERIES[colour], alpha=0.55, label=label)
        axes.axvline(0.0, **_LEVEL)
        axes.set_xlabel("log-probability of chosen minus rejected, nats")
        axes.set_ylabel("pairs")
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
        return _inline(axes, key, "Margins of the held-out pairs")


@contextlib.contextmanager
def _axes(key: str) -> Iterator[Any]:
    """Axes to draw on in this module's style."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": key}):
        yield Figure().add_subplot()


def _inline(axes: Any, key: str, title: str) -> str:
    if len(axes.get_legend_handles_labels()[0]) > 1:
        # Above the plot: a legend inside hides points wherever it is put.
        axes.legend(ncols=3, loc="lower left", bbox_to_anchor=(-0.02, 1.0), borderaxespad=0.1)
    buffer = io.StringIO()
    axes.figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var(--{variable})")
    # Several drawings share a page: their ids must not meet.
    svg = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{key}-", svg)
    head = f'role="img" aria-label="{html.escape(title)}">'
    return re.sub(r'<svg[^>]*?viewBox="([^"]+)"[^>]*>', lambda found: f'<svg viewBox="{found[1]}" {head}', svg, count=1)
