"""`dpo-train compare RUN RUN ...`: several runs over one another, on one page and in a table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from ..errors import OutputError
from ..run_folder.metrics import evaluation_prefixes, evaluation_records, throughput, training_records
from ..run_folder.output_dir import SETTINGS
from ..run_folder.records import METRICS, SUMMARY, read_object, read_records, write_aside
from ..settings.fields import RunSettings
from .charts import CHARTS, COLOURS, Curve, draw, points_of
from .page import LABELS, figure, template

OUTPUT = "comparison.html"
#: Rows of the table: label, records that they come from, metric.
_ROWS = (
    *((f"held-out {label}", "eval", metric) for metric, label in LABELS.items()),
    ("training loss", "train", "loss"),
    ("tokens/s", "run", "tokens_per_second"),
    ("steps", "train", "step"),
)


class RunFolder:
    """What a run's folder says.

    Raises:
        OutputError: the folder holds no run.
    """

    def __init__(self, folder: Path, name: str) -> None:
        records = read_records(folder / METRICS)
        if not records:
            raise OutputError(f"'{folder}': holds no run (no {METRICS} with records)")
        self.name = name
        first = next(iter(evaluation_prefixes(records)), "eval")
        self.records = {"train": training_records(records), "eval": evaluation_records(records, first)}
        tokens, seconds = throughput(self.records["train"])
        if seconds:
            self.records["run"] = [{"step": self.records["train"][-1]["step"], "tokens_per_second": tokens / seconds}]
        # The trainer's own settings, of a finished run, and those that dpo-train has besides.
        self.settings = dict(read_object(folder / SUMMARY).get("changed_settings", {}))
        given = read_object(folder / SETTINGS)
        self.settings |= {name: given[name] for name in RunSettings.__annotations__ if given.get(name) is not None}

    def points(self, source: str, metric: str) -> list[tuple[float, float]]:
        """(step, value) of a metric in the records of training ("train"), of evaluations ("eval") or of the whole ("run")."""
        return points_of(self.records.get(source, []), metric)


def read_runs(folders: Sequence[str]) -> list[RunFolder]:
    """The runs in these folders, with short names that tell them apart.

    Raises:
        OutputError: fewer than two runs, more than there are colours for, or a folder that holds none.
    """
    if not 2 <= len(folders) <= COLOURS:
        raise OutputError(f"compare: give 2 to {COLOURS} folders of runs, got {len(folders)}")
    return [RunFolder(Path(folder).expanduser(), name) for folder, name in zip(folders, _names(folders), strict=True)]


def _rows(runs: Sequence[RunFolder]) -> dict[str, list[str]]:
    """The last figures of the runs, by label; those that no run has are left out."""
    rows = {}
    for label, source, metric in _ROWS:
        found = [run.points(source, metric) for run in runs]
        if any(found):
            rows[label] = [figure(points[-1][1] if points else None, metric) for points in found]
    return rows


def table(runs: Sequence[RunFolder]) -> str:
    """The last figures of the runs as text for a terminal: a column a run."""
    lines = [["", *(run.name for run in runs)], *([label, *values] for label, values in _rows(runs).items())]
    first, *widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join([label.ljust(first), *(value.rjust(width) for value, width in zip(values, widths, strict=True))])
        for label, *values in lines
    )


def write_page(runs: Sequence[RunFolder], output: Path) -> None:
    """Write the page that overlays the runs' curves and lists the settings that differ. Raises OutputError."""
    charts = []
    for chart in CHARTS:
        metric = chart.lines[0].metric
        if any(line.metric != metric for line in chart.lines):
            continue  # the runs' colours leave none to tell metrics apart
        held_out = ", held out" if any(run.points("eval", metric) for run in runs) else ""
        if svg := draw(chart, _curves(runs, metric)):
            charts.append({"title": chart.title + held_out, "svg": svg, "healthy": None})
    names = sorted({key for run in runs for key in run.settings if key != "output_dir"})
    different = [key for key in names if len({json.dumps(run.settings.get(key)) for run in runs}) > 1]
    settings = {key: [run.settings.get(key, "default") for run in runs] for key in different}
    page = template("comparison.html.j2").render(
        names=[run.name for run in runs], charts=charts, rows=_rows(runs), settings=settings
    )
    write_aside(output, page)


def _names(folders: Sequence[str]) -> list[str]:
    """Short names that tell the runs apart: the folder's own, with as many parents as it takes."""
    parts = [Path(folder).expanduser().resolve().parts for folder in folders]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-count:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise OutputError("compare: the same folder was given twice")


def _curves(runs: Sequence[RunFolder], metric: str) -> list[Curve]:
    """One curve a run: held out where the run was evaluated, else of training, dashed where others are held out."""
    held_out = [run.points("eval", metric) for run in runs]
    found = []
    for number, (run, points) in enumerate(zip(runs, held_out, strict=True), start=1):
        if points:
            found.append(Curve(points, run.name, number))
        elif points := run.points("train", metric):
            mixed = any(held_out)
            found.append(Curve(points, run.name + (" (training)" if mixed else ""), number, mixed))
    return found
