"""report.html of a run, made from the files in its folder."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..run_folder.metrics import evaluation_prefixes, evaluation_records, training_records
from ..run_folder.records import EVENTS, METRICS, REPORT, SAMPLES, SUMMARY, read_records, write_aside
from .charts import CHARTS, curves_of, draw, draw_margins
from .verdict import by_cause, judge

if TYPE_CHECKING:  # they import torch, and `dpo-train compare` uses this module without
    from ..run import Run
    from ..watch.evaluated import EvaluatedPairs

#: Labels of an evaluation's metrics, on all pages.
LABELS = {
    "loss": "loss",
    "rewards/accuracies": "accuracy",
    "rewards/margins": "reward margin",
    "rewards/chosen": "chosen reward",
    "rewards/rejected": "rejected reward",
    "kl": "KL from the reference",
    "entropy": "entropy",
    "win_rate": "win rate",
}
#: Samples of each evaluation dataset that the page shows.
_SAMPLES_SHOWN = 6


def write_report(run: Run, *, finished: bool) -> Path | None:
    """Write `summary.json` (once the run is finished) and, if asked for, `report.html`; returns the report's path."""
    from ..run_folder.summary import summarize

    folder = run.args.run_folder
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
    train = training_records(records)
    evaluations = {prefix: evaluation_records(records, prefix) for prefix in evaluation_prefixes(records)}
    evals = next(iter(evaluations.values()), [])
    loss, *others = CHARTS
    if (start := summary["initial_loss"]) is not None:
        log2 = math.isclose(start, math.log(2))
        loss = replace(loss, level=start, level_label="log 2" if log2 else f"start ({start:.4g})")
    drawn = [(chart, draw(chart, curves_of(chart, train, evals))) for chart in (loss, *others)]
    return template("report.html.j2").render(
        name=name,
        summary=summary,
        model=Path(summary["model"]).name if Path(summary["model"]).is_absolute() else summary["model"],
        verdict=judge(summary, evals, events),
        cards=_cards(summary, evals),
        charts=[{"title": chart.title, "healthy": chart.healthy, "svg": svg} for chart, svg in drawn if svg],
        events=by_cause(events),
        pairs=[
            (prefix, pairs, draw_margins(f"margins{number}", pairs.before, pairs.after))
            for number, (prefix, pairs) in enumerate((evaluated or {}).items())
        ],
        evaluations=evaluations,
        held_out="Evaluated" if summary.get("trained_on") else "Held-out",
        labels={name: label for name, label in LABELS.items() if any(name in row for row in evals)},
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
    environment.filters["figure"] = figure
    return environment.get_template(name)


def _last_samples(samples: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The policy's last answers, by the evaluation's prefix."""
    answers = [record for record in samples if "policy" in record]
    last = {record["evaluation"]: record["step"] for record in answers}
    return {
        prefix: [record for record in answers if (record["evaluation"], record["step"]) == (prefix, step)][
            :_SAMPLES_SHOWN
        ]
        for prefix, step in last.items()
    }


def _cards(summary: dict[str, Any], evals: list[dict[str, Any]]) -> list[dict[str, str]]:
    """The figures a reader looks for first: held out if there is such data, else of training."""
    kind = ("evaluation" if summary.get("trained_on") else "held-out") if evals else "training"
    first, last = (evals[0], evals[-1]) if evals else (summary["first"], summary["last"])
    cards = []
    for metric, unit in (("loss", ""), ("rewards/accuracies", "guessing is 50 %"), ("kl", "nats per completion token")):
        if last.get(metric) is not None:
            began = metric != "kl" and first != last and first.get(metric) is not None
            note = f"from {figure(first[metric], metric)}" if began else unit
            cards.append({"label": f"{kind} {LABELS[metric]}", "value": figure(last[metric], metric), "note": note})
    if last.get("win_rate") is not None:
        error = last.get("win_rate_se")
        note = "answers the scorer prefers" + (f", ± {error:.1%}" if error is not None else "")
        cards.append({"label": LABELS["win_rate"], "value": figure(last["win_rate"], "win_rate"), "note": note})
    if speed := summary["tokens_per_second"]:
        note = f"{summary['tokens']:,} tokens in {duration(summary['seconds'])}"
        cards.append({"label": "tokens per second", "value": figure(speed, "tokens_per_second"), "note": note})
    return cards


def figure(value: Any, metric: str = "") -> str:
    """A value as all pages show it: a share as a percentage, a count in full, other numbers to four places or digits."""
    if value is None:
        return "-"
    if metric.endswith(("accuracies", "win_rate")):
        return f"{value:.1%}"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, int) or metric == "tokens_per_second":
        return f"{value:,.0f}"
    return f"{value:.4f}" if 1e-3 <= abs(value) < 1e4 or value == 0 else f"{value:.3g}"


def duration(seconds: float) -> str:
    """A time in the two largest units that it has."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
