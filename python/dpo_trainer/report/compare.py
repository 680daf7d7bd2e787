"""`dpo-train compare RUN RUN ...`: several runs over one another, on one page and in a table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import OutputError
from ..run_folder.metrics import evaluation_prefixes, evaluation_records, training_records
from ..run_folder.records import METRICS, SUMMARY, read_records, write_aside
from .charts import CHARTS, COLOURS, Curve, draw
from .page import template

OUTPUT = "comparison.html"
#: Of each chart the one metric to lay over one another, held out where the runs have it.
_METRICS = {
    "loss": "loss",
    "accuracy": "rewards/accuracies",
    "margins": "rewards/margins",
    "kl": "kl",
    "win_rate": "win_rate",
    "entropy": "entropy",
    "throughput": "tokens_per_second",
    "learning_rate": "learning_rate",
}
_FIGURES = (
    ("held-out loss", "eval", "loss"),
    ("held-out accuracy", "eval", "rewards/accuracies"),
    ("held-out margin", "eval", "rewards/margins"),
    ("held-out KL", "eval", "kl"),
    ("win rate", "eval", "win_rate"),
    ("training loss", "train", "loss"),
    ("tokens/s", "train", "tokens_per_second"),
    ("steps", "train", "step"),
)


class Run:
    """What a run's folder says.

    Raises:
        OutputError: the folder holds no run.
    """

    def __init__(self, folder: Path, name: str) -> None:
        records = read_records(folder / METRICS)
        if not records:
            raise OutputError(f"'{folder}': holds no run (no {METRICS} with records)")
        self.name = name
        prefixes = evaluation_prefixes(records)
        self.records = {
            "train": training_records(records),
            "eval": evaluation_records(records, prefixes[0]) if prefixes else [],
        }
        try:
            self.settings: dict[str, Any] = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))[
                "changed_settings"
            ]
        except (OSError, ValueError, KeyError):
            self.settings = {}  # not finished

    def last(self, source: str, metric: str) -> Any:
        """The last value of a metric, or None."""
        values = [r[metric] for r in self.records[source] if r.get(metric) is not None]
        return values[-1] if values else None


def compare(folders: Sequence[str], output: Path) -> str:
    """Write the page; returns the table for the terminal.

    Raises:
        OutputError: fewer than two runs, more than there are colours for, or a folder that holds none.
    """
    if not 2 <= len(folders) <= COLOURS:
        raise OutputError(f"compare: give 2 to {COLOURS} folders of runs, got {len(folders)}")
    runs = [Run(Path(folder).expanduser(), name) for folder, name in zip(folders, _names(folders), strict=True)]
    import pandas
    from markupsafe import Markup

    charts = []
    for chart in CHARTS:
        metric = _METRICS.get(chart.key)
        if metric is None:
            continue
        svg = draw(chart, _curves(runs, metric))
        if svg is not None:
            held_out = any(run.records["eval"] and run.last("eval", metric) is not None for run in runs)
            charts.append({"title": chart.title + (", held out" if held_out else ""), "svg": Markup(svg)})
    rows = _rows(runs)
    names = sorted({key for run in runs for key in run.settings if key != "output_dir"})
    different = [key for key in names if len({json.dumps(run.settings.get(key)) for run in runs}) > 1]
    settings = [(key, [run.settings.get(key, "default") for run in runs]) for key in different]
    page = template("comparison.html.j2").render(
        names=[run.name for run in runs], charts=charts, rows=rows, settings=settings
    )
    write_aside(output, page)
    return pandas.DataFrame(dict(rows), [run.name for run in runs]).T.to_string()


def _names(folders: Sequence[str]) -> list[str]:
    """Short names that tell the runs apart: the folder's own, with as many parents as it takes."""
    parts = [Path(folder).expanduser().resolve().parts for folder in folders]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-count:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise OutputError("compare: the same folder was given twice")


def _curves(runs: Sequence[Run], metric: str) -> list[Curve]:
    """One curve a run: held out where the run was evaluated, else of training, dashed where others are held out."""
    found = []
    for index, run in enumerate(runs):
        evaluated = run.last("eval", metric) is not None
        records = run.records["eval" if evaluated else "train"]
        points = [(r["step"], r[metric]) for r in records if r.get(metric) is not None]
        if points:
            found.append((evaluated, Curve(points, run.name, index + 1)))
    mixed = len({evaluated for evaluated, _ in found}) > 1
    return [
        Curve(c.points, c.label + (" (training)" if mixed and not evaluated else ""), c.colour, mixed and not evaluated)
        for evaluated, c in found
    ]


def _rows(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    rows = []
    for label, source, metric in _FIGURES:
        values = [run.last(source, metric) for run in runs]
        if any(value is not None for value in values):
            rows.append((label, ["-" if value is None else _figure(metric, value) for value in values]))
    return rows


def _figure(metric: str, value: float) -> str:
    if metric in ("rewards/accuracies", "win_rate"):
        return f"{value:.1%}"
    return f"{value:,.0f}" if metric in ("tokens_per_second", "step") else f"{value:.4f}"
