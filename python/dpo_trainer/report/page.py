"""The page report.html of a run, made from the files in its folder."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..run import Run
from ..run_folder.metrics import evaluation_prefixes, evaluation_records, training_records
from ..run_folder.records import EVENTS, METRICS, REPORT, SAMPLES, SUMMARY, read_records, write_aside
from ..run_folder.summary import summarize
from ..watch.evaluated import EvaluatedPairs
from .charts import CHARTS, GROUPS
from .drawing import curves_of, draw, draw_margins
from .evaluation import Figures, figures_of
from .figures import LABELS, duration, figure, template, with_error
from .verdict import by_cause, grouped, holds, judge

#: Number of samples of each evaluation dataset that the page shows.
_SAMPLES_SHOWN = 6


def write_report(run: Run, *, finished: bool) -> Path | None:
    """Write `summary.json` if the run is finished, and `report.html` unless it is turned off. Returns the report's path."""
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
    if finished:  # written last, since it marks the run as finished
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
    """The report as one HTML page that needs no other files.

    Args:
        summary: the result of `summarize`.
        records: the records of metrics.jsonl.
        name: title of the run.
        events: the records of events.jsonl, which are the diagnoses.
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
    answers = _last_samples(samples)
    verdict = judge(summary, evals, events, next(iter(answers.values()), []))
    found = figures_of(summary, evals)
    held = [event for event in events if holds(event, summary, found)]
    diagnoses = [(event, follow) for event, follow in grouped(held) if event.get("name") != verdict.cause]
    return template("report.html.j2").render(
        name=name,
        summary=summary,
        model=Path(summary["model"]).name if Path(summary["model"]).is_absolute() else summary["model"],
        took=duration(summary["seconds"]),
        verdict=verdict,
        consequences=next((follow for event, follow in grouped(held) if event.get("name") == verdict.cause), []),
        diagnoses=diagnoses,
        past=[event for event in by_cause(events) if event not in held],
        cards=_cards(summary, found, evals, next(iter((evaluated or {}).values()), None)),
        charts={
            group: [
                {"title": chart.title, "healthy": chart.healthy, "svg": svg}
                for chart, svg in drawn
                if svg and chart.group == group
            ]
            for group in GROUPS
        },
        pairs=[
            (prefix, pairs, draw_margins(f"margins{number}", pairs.before, pairs.after))
            for number, (prefix, pairs) in enumerate((evaluated or {}).items())
        ],
        evaluations=evaluations,
        held_out="Evaluated" if summary.get("trained_on") else "Held-out",
        labels={name: label for name, label in LABELS.items() if any(name in row for row in evals)},
        samples=answers,
        samples_shown=_SAMPLES_SHOWN,
    )


def _last_samples(samples: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The policy's last answers, by the evaluation's prefix."""
    answers = [record for record in samples if "policy" in record]
    last = {record["evaluation"]: record["step"] for record in answers}
    return {
        prefix: [record for record in answers if (record["evaluation"], record["step"]) == (prefix, step)]
        for prefix, step in last.items()
    }


def _cards(
    summary: dict[str, Any], found: Figures | None, evals: list[dict[str, Any]], pairs: EvaluatedPairs | None
) -> list[dict[str, str]]:
    """The main figures before and after training, for the tiles: held out if there is held-out data, else of training."""
    if found is not None:
        kind, of = ("evaluation" if found.known else "held-out"), f"of {found.pairs:,} pairs"
        first, last = found.first, found.final
    elif evals:
        kind, of, first, last = "held-out", "before training", {}, evals[-1]
    else:
        kind, of, first, last = "training", "of the last log", summary["first"], summary["last"]
    start = {"loss": summary["initial_loss"], "kl": 0.0 if found is not None else None, **first}
    cards = []

    def card(label: str, before: Any, after: Any, error: float | None, note: str, metric: str = "") -> None:
        value, _, uncertain = with_error(after, error, metric).partition(" \u00b1 ")
        cards.append(
            {"label": label, "before": figure(before, metric), "value": value, "error": uncertain, "note": note}
        )

    for metric, unit in (("loss", of), ("rewards/accuracies", f"{of}; guessing is 50 %"), ("kl", "nats per token")):
        if (value := last.get(metric)) is not None:
            value = round(value, 4)  # a KL divergence of 0 may be a tiny number from rounding
            card(f"{kind} {LABELS[metric]}", start.get(metric), value, last.get(f"{metric}_se"), unit, metric)
    if (chosen := last.get("logps/chosen")) is not None:
        gained = pairs.gained if pairs is not None and found is not None and last is evals[-1] else {}
        before = first.get("logps/chosen", chosen - gained["chosen"][0] if gained else None)
        rejected = " \u2192 ".join(_nats(record.get("logps/rejected")) for record in (first, last))
        cards.append(
            {
                "label": f"{kind} chosen log-probability",
                "before": _nats(before),
                "value": _nats(chosen),
                "error": f"{gained['chosen'][1]:.1f}" if gained and gained["chosen"][1] >= 0.05 else "",
                "note": f"nats; rejected: {rejected}",
            }
        )
    if last.get("win_rate") is not None:
        card("win rate", None, last["win_rate"], last.get("win_rate_se"), "answers that the scorer prefers", "win_rate")
    return cards


def _nats(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}".replace("-", "\N{MINUS SIGN}")
