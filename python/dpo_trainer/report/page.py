"""report.html of a run, made from the files in its folder."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..run import Run
from ..run_folder.metrics import evaluation_prefixes, evaluation_records, training_records
from ..run_folder.records import EVENTS, METRICS, REPORT, SAMPLES, SUMMARY, read_records, write_aside
from ..run_folder.summary import summarize
from ..watch.evaluated import EvaluatedPairs
from .charts import CHARTS, curves_of, draw, draw_histogram


def write_report(run: Run, *, finished: bool) -> Path | None:
    """Write `summary.json` (once the run is finished) and, if asked for, `report.html`; returns the report's path."""
    folder = Path(str(run.args.output_dir))
    folder.mkdir(parents=True, exist_ok=True)
    summary = summarize(run, finished=finished)
    if run.args.write_report:
        page = render_report(
            summary,
            read_records(folder / METRICS),
            name=folder.resolve().name,
            events=read_records(folder / EVENTS),
            evaluated=run.evaluated,
            samples=read_records(folder / SAMPLES),
        )
        write_aside(folder / REPORT, page)
    if finished:  # last: it says that nothing is left to do
        write_aside(folder / SUMMARY, json.dumps(summary, indent=2) + "\n")
    return folder / REPORT if run.args.write_report else None


def render_report(
    summary: dict[str, Any],
    records: list[dict[str, Any]],
    *,
    name: str,
    events: Sequence[dict[str, Any]] = (),
    evaluated: dict[str, EvaluatedPairs] | None = None,
    samples: Sequence[dict[str, Any]] = (),
) -> str:
    """The report as one HTML page that needs nothing else.

    Args:
        summary: what `summarize` returns.
        records: the records of metrics.jsonl.
        name: title of the run.
        events: the records of events.jsonl, what the diagnostics said.
        evaluated: pairs of the last evaluations by the prefix of their metrics.
        samples: the records of samples.jsonl.
    """
    from markupsafe import Markup

    train = training_records(records)
    prefixes = evaluation_prefixes(records)
    evals = evaluation_records(records, prefixes[0]) if prefixes else []
    start = summary["initial_loss"]
    log2 = start is not None and math.isclose(start, math.log(2))
    levels = {} if start is None else {"loss": (start, "log 2" if log2 else f"start ({start:.4g})")}
    charts = [(chart, draw(chart, curves_of(chart, train, evals), *levels.get(chart.key, ()))) for chart in CHARTS]
    return template("report.html.j2").render(
        name=name,
        summary=summary,
        model=Path(summary["model"]).name if Path(summary["model"]).is_absolute() else summary["model"],
        cards=_cards(summary, evals),
        charts=[{"title": c.title, "healthy": c.healthy, "svg": Markup(svg)} for c, svg in charts if svg],
        events=events,
        pairs=[(prefix, pairs, Markup(_margins(prefix, pairs))) for prefix, pairs in (evaluated or {}).items()],
        evaluations=[(prefix, evaluation_records(records, prefix)) for prefix in prefixes],
        evaluation_columns=[
            column
            for column in _EVALUATION_COLUMNS
            if column[0] != "win_rate" or any("win_rate" in row for row in evals)
        ],
        samples=_last_samples(samples),
    )


def template(name: str) -> Any:
    """One of this package's page templates."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("dpo_trainer.report", "templates"),
        autoescape=not name.endswith(".md.j2"),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters["figure"] = _figure
    return environment.get_template(name)


def _margins(prefix: str, pairs: EvaluatedPairs) -> str:
    groups = [("reference", pairs.before, 5), ("policy", pairs.after, 1)]
    unit = "log-probability of chosen minus rejected, nats"
    return draw_histogram(f"margins-of-{prefix}", "Margins of the held-out pairs", groups, unit)


_EVALUATION_COLUMNS = (
    ("loss", "loss"),
    ("rewards/accuracies", "accuracy"),
    ("rewards/margins", "margin"),
    ("rewards/chosen", "chosen reward"),
    ("rewards/rejected", "rejected reward"),
    ("kl", "KL"),
    ("entropy", "entropy"),
    ("win_rate", "win rate"),
)
#: Samples of each evaluation dataset that the page shows.
_SAMPLES_SHOWN = 6


def _last_samples(samples: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The policy's last answers, by the evaluation's prefix."""
    found: dict[str, list[dict[str, Any]]] = {}
    for record in samples:
        if "policy" in record:
            kept = found.setdefault(record["evaluation"], [])
            if kept and kept[-1]["step"] != record["step"]:
                kept.clear()
            kept.append(record)
    return {prefix: records[:_SAMPLES_SHOWN] for prefix, records in found.items()}


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
    if last.get("win_rate") is not None:
        error = last.get("win_rate_se")
        note = "answers the scorer prefers" + (f", ± {error:.1%}" if error is not None else "")
        cards.append({"label": "win rate", "value": _figure(last["win_rate"], "win_rate"), "note": note})
    if summary["tokens_per_second"]:
        note = f"{summary['tokens']:,} tokens in {_duration(summary['seconds'])}"
        cards.append({"label": "tokens per second", "value": f"{summary['tokens_per_second']:,.0f}", "note": note})
    return cards


def _figure(value: Any, metric: str = "") -> str:
    if value is None:
        return "-"
    if metric.endswith(("accuracies", "win_rate")):
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
