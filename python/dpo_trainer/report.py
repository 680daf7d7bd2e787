"""summary.json and report.html of a run, both made from what lies in its folder."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import platform
import re
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .callbacks import without_ties
from .model import unwrap_adapter
from .records import METRICS, read_records, write_aside

if TYPE_CHECKING:
    import torch

    from .config import DPOConfig
    from .trainer import DPOTrainer

SUMMARY = "summary.json"
REPORT = "report.html"

# --- the summary ---------------------------------------------------------------------------------------------------


def summarize(trainer: DPOTrainer, *, finished: bool) -> dict[str, Any]:
    """Facts of a run: data, first and last figures, throughput, settings, versions. Plain JSON values."""
    records = read_records(Path(str(trainer.args.output_dir)) / METRICS)
    train, evals = training_records(records), evaluation_records(records)
    seconds = sum(r["tokens"] / r["tokens_per_second"] for r in train if r.get("tokens_per_second"))
    tokens = sum(r.get("tokens") or 0 for r in train)
    model = trainer.policy.model
    parameters = list(model.parameters())
    return {
        "finished": finished,
        "model": getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__,
        "architecture": type(unwrap_adapter(model)).__name__,
        "parameters": sum(p.numel() for p in parameters),
        "trainable_parameters": sum(p.numel() for p in parameters if p.requires_grad),
        "reference": trainer.reference_kind,
        "data": [account.describe() for account in trainer.accounts],
        "pairs": {account.name: account.kept for account in trainer.accounts},
        "steps": trainer.state.global_step,
        "initial_loss": initial_loss(trainer.args),
        "planned_steps": trainer.state.max_steps,
        "epochs": trainer.state.epoch,
        "seconds": round(seconds, 3),
        "tokens": int(tokens),
        "tokens_per_second": round(tokens / seconds, 2) if seconds else None,
        "peak_memory_mib": _peak_memory_mib(),
        "first": train[0] if train else {},
        "last": train[-1] if train else {},
        "eval_first": evals[0] if evals else {},
        "eval_last": evals[-1] if evals else {},
        "device": _device(trainer.args.device),
        "changed_settings": _changed(trainer.args),
        "settings": json.loads(json.dumps(trainer.args.to_sanitized_dict(), default=str)),
        "versions": _versions(),
    }


def initial_loss(args: DPOConfig) -> float:
    """The objective's value where policy and reference agree (log 2 for DPO)."""
    import torch

    from dpo_kernels.objectives import Pairs, build, mix

    zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    beta, smoothing = (torch.tensor(value, dtype=torch.float64) for value in (args.beta, args.label_smoothing))
    nothing = zero.repeat(2)
    pairs = Pairs.from_sums(nothing, nothing, one.repeat(2), beta, smoothing, kl_sums=nothing)
    return mix(pairs, build(args.loss_type), args.loss_weights).item()


def write_report(trainer: DPOTrainer, *, finished: bool) -> Path | None:
    """Write `summary.json` (once the run is finished) and, if asked for, `report.html`; returns the report's path."""
    folder = Path(str(trainer.args.output_dir))
    folder.mkdir(parents=True, exist_ok=True)
    summary = summarize(trainer, finished=finished)
    if finished:
        write_aside(folder / SUMMARY, json.dumps(summary, indent=2) + "\n")
    if not trainer.args.write_report:
        return None
    write_aside(folder / REPORT, render_report(summary, read_records(folder / METRICS), name=folder.resolve().name))
    return folder / REPORT


def training_records(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records of training steps."""
    return [without_ties(record) for record in records if "loss" in record]


def evaluation_records(records: list[dict[str, Any]], prefix: str = "eval") -> list[dict[str, Any]]:
    """The records of evaluations, without the prefix of their metrics' names, the last one of each step."""
    found = {}
    for record in records:
        own = {name[len(prefix) + 1 :]: value for name, value in record.items() if name.startswith(prefix + "_")}
        if "loss" in own:
            found[record["step"]] = {"step": record["step"], "epoch": record.get("epoch"), **without_ties(own)}
    return list(found.values())


def _evaluation_prefixes(records: list[dict[str, Any]]) -> list[str]:
    prefixes: list[str] = []
    for record in records:
        for name in record:
            if name.startswith("eval") and name.endswith("_loss") and name[: -len("_loss")] not in prefixes:
                prefixes.append(name[: -len("_loss")])
    return prefixes


def _device(device: torch.device) -> str:
    import torch

    if device.type == "cpu":
        threads = torch.get_num_threads()
        return f"a CPU with {threads} thread{'s' if threads > 1 else ''}"
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def _peak_memory_mib() -> float | None:
    try:
        import resource
    except ImportError:  # not on Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if platform.system() == "Darwin" else 2**10), 1)


def _changed(args: Any) -> dict[str, Any]:
    changed = {}
    for item in dataclasses.fields(args):
        value = getattr(args, item.name)
        value = getattr(value, "value", value)
        default = item.default_factory() if item.default_factory is not dataclasses.MISSING else item.default
        default = getattr(default, "value", default)
        derived = item.name in (
            "disable_tqdm",
            "dataloader_pin_memory",
            "eval_steps",
            "local_rank",
            "hub_token",
            "accelerator_config",
        )
        same = value == default or (value in (None, [], {}, False) and default in (None, "none", "", [], {}, False))
        if not derived and not same:
            changed[item.name] = value
    return json.loads(json.dumps(changed, default=str))


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    installed = {distribution.name: distribution.version for distribution in metadata.distributions()}
    for name in ("dpo-kernels", "torch", "transformers", "accelerate", "datasets", "peft", "triton"):
        if name in installed:
            versions[name] = installed[name]
    versions["system"] = f"{platform.system()} {platform.machine()}"
    return versions


# --- the charts ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """A curve: metric name, label, the records it comes from ("train" or "eval") and the number of its colour."""

    metric: str
    label: str
    source: str
    colour: int


@dataclass(frozen=True)
class Chart:
    """A chart of the report: what it shows and what a healthy one looks like."""

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
_SERIES = {number: f"#0a0b0{number}" for number in range(1, 6)}
_SERIES_NAMES = {
    "#010203": "var(--ink)",
    "#010204": "var(--grid)",
    **{c: f"var(--series-{n})" for n, c in _SERIES.items()},
}


def draw(
    chart: Chart,
    train: list[dict[str, Any]],
    evals: list[dict[str, Any]],
    level: float | None = None,
    level_label: str = "",
) -> str | None:
    """The chart as inline SVG that takes its colours and font from the page; None if there is nothing to draw.

    Args:
        chart: what to draw.
        train, evals: records of training steps and of evaluations.
        level, level_label: a horizontal line, where the run and not the chart knows it.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter, StrMethodFormatter

    curves = []
    for line in chart.lines:
        records = train if line.source == "train" else evals
        points = [(r["step"], r[line.metric]) for r in records if r.get(line.metric) is not None]
        if points:
            curves.append((line, points))
    if not curves:
        return None

    style: Any = {"svg.fonttype": "none", "svg.hashsalt": chart.key, "font.size": 9.5}
    style |= dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), _INK)
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(4.5, 2.65), layout="constrained")
        axes = figure.add_subplot()
        for line, points in curves:
            few = len(points) <= 30
            steps, values = zip(*points, strict=True)
            axes.plot(
                steps,
                values,
                color=_SERIES[line.colour],
                linewidth=1.8,
                marker="o" if few else None,
                markersize=3.5,
                label=line.label,
                solid_capstyle="round",
            )
        level, label = (chart.level, chart.level_label) if level is None else (level, level_label)
        if level is not None:
            axes.axhline(level, color=_INK, linewidth=1, linestyle=(0, (4, 3)), label=label or None)
        if len(axes.get_legend_handles_labels()[0]) > 1:
            # Above the plot: a legend inside hides points wherever it is put.
            axes.legend(
                loc="lower left",
                bbox_to_anchor=(-0.02, 1.0),
                ncols=3,
                frameon=False,
                borderaxespad=0.1,
                handlelength=1.6,
            )
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
        # In full at every tick: matplotlib's own formatter would put a common factor where the legend is.
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.5g}".replace("-", "\N{MINUS SIGN}")))
        if chart.percent:
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
            axes.set_ylim(-0.03, 1.03)
        elif chart.key == "throughput":
            axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
            axes.set_ylim(bottom=0)
        elif chart.key == "learning_rate":
            axes.set_ylim(bottom=0)
        axes.margins(x=0.02, y=0.12)
        axes.grid(axis="y", color=_GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        axes.spines["bottom"].set_color(_GRID)
        axes.tick_params(length=0)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})

    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    for colour, variable in _SERIES_NAMES.items():
        svg = svg.replace(colour, variable)
    # Several drawings share a page: their ids must not meet.
    svg = re.sub(r'id="([^"]+)"', rf'id="{chart.key}-\1"', svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\g<1>{chart.key}-", svg)
    svg = re.sub(
        r'<svg[^>]*?viewBox="([^"]+)"[^>]*>', rf'<svg viewBox="\1" role="img" aria-label="{chart.title}">', svg, count=1
    )
    return svg


# --- the page ------------------------------------------------------------------------------------------------------


def render_report(summary: dict[str, Any], records: list[dict[str, Any]], *, name: str) -> str:
    """The report as one HTML page that needs nothing else.

    Args:
        summary: what `summarize` returns.
        records: the records of metrics.jsonl.
        name: title of the run.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    train = training_records(records)
    prefixes = _evaluation_prefixes(records)
    evals = evaluation_records(records, prefixes[0]) if prefixes else []
    start = summary["initial_loss"]
    levels = {"loss": (start, "log 2" if math.isclose(start, math.log(2)) else f"start ({start:.4g})")}
    charts = [(chart, draw(chart, train, evals, *levels.get(chart.key, ()))) for chart in CHARTS]
    environment = Environment(
        loader=PackageLoader("dpo_trainer", "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters["figure"] = _figure
    return environment.get_template("report.html.j2").render(
        name=name,
        summary=summary,
        model=Path(summary["model"]).name if Path(summary["model"]).is_absolute() else summary["model"],
        cards=_cards(summary, evals),
        charts=[{"title": c.title, "healthy": c.healthy, "svg": Markup(svg)} for c, svg in charts if svg],
        evaluations=[(prefix, evaluation_records(records, prefix)) for prefix in prefixes],
        evaluation_columns=_EVALUATION_COLUMNS,
    )


_EVALUATION_COLUMNS = (
    ("loss", "loss"),
    ("rewards/accuracies", "accuracy"),
    ("rewards/margins", "margin"),
    ("rewards/chosen", "chosen reward"),
    ("rewards/rejected", "rejected reward"),
    ("kl", "KL"),
    ("entropy", "entropy"),
)


def _cards(summary: dict[str, Any], evals: list[dict[str, Any]]) -> list[dict[str, str]]:
    """The figures a reader looks for first: held out if there is such data, else of training."""
    kind = "held-out" if evals else "training"
    first, last = (evals[0], evals[-1]) if evals else (summary["first"], summary["last"])
    same = first == last
    cards = []
    for metric, label in (("loss", "loss"), ("rewards/accuracies", "accuracy"), ("kl", "KL from the reference")):
        if last.get(metric) is not None:
            note = f"from {_figure(first[metric], metric)}" if first.get(metric) is not None and not same else ""
            if metric == "kl":
                note = "nats per completion token"
            elif metric == "rewards/accuracies" and not note:
                note = "guessing is 50 %"
            cards.append({"label": f"{kind} {label}", "value": _figure(last[metric], metric), "note": note})
    if summary["tokens_per_second"]:
        note = f"{summary['tokens']:,} tokens in {_duration(summary['seconds'])}"
        cards.append({"label": "tokens per second", "value": f"{summary['tokens_per_second']:,.0f}", "note": note})
    return cards


def _figure(value: Any, metric: str = "") -> str:
    if value is None:
        return "-"
    if metric.endswith("accuracies"):
        return f"{value:.1%}"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4f}" if 1e-3 <= abs(value) < 1e4 or value == 0 else f"{value:.3g}"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
