"""`dpo-train compare RUN RUN ...`: several runs in one table and in the same charts on one page.

Imports no torch, and matplotlib only after the table is printed, so that the command answers at once.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..errors import OutputError
from ..run_folder.metrics import evaluation_prefixes, evaluation_records, throughput, training_records
from ..run_folder.records import EVENTS, METRICS, SETTINGS, SUMMARY, read_object, read_records, write_aside
from ..settings.rows import settings_table
from .charts import CHARTS
from .drawing import COLOURS, Curve, draw, points_of
from .figures import BETTER, LABELS, figure, template, with_error
from .verdict import judge

OUTPUT = "comparison.html"
#: Rows of the table: label, source of the records, metric.
_ROWS = (
    *((f"held-out {label}", "eval", metric) for metric, label in LABELS.items()),
    ("training loss", "train", "loss"),
    ("tokens/s", "run", "tokens_per_second"),
    ("steps", "train", "step"),
)
#: Settings that always differ between two runs and are not shown.
_OF_THE_FOLDER = ("output_dir", "data_sha256", "logging_dir", "run_name")


class RunFolder:
    """The contents of a run's folder.

    Attributes:
        verdict: the word of its report's verdict.
        known: whether its settings are; an unfinished run from Python has not written them.
        settings: those that are not at their defaults, and the data: the runs of `dpo-train` name files and their digests.

    Raises:
        OutputError: the folder contains no run.
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
        summary, given = read_object(folder / SUMMARY), read_object(folder / SETTINGS)
        self.verdict = "not finished"
        self.known = bool(summary or given)
        if summary:
            self.verdict = "not known"  # a summary of another version
            with contextlib.suppress(KeyError):
                self.verdict = judge(summary, self.records["eval"], read_records(folder / EVENTS)).word.lower()
        # The trainer's own settings, of a finished run, and those that dpo-train was given.
        self.settings: dict[str, Any] = dict(summary.get("changed_settings", {}))
        self.settings |= {key: value for key, value in given.items() if value is not None}
        for line in summary.get("data", []):
            dataset, _, contents = str(line).partition(": ")
            self.settings[dataset] = contents
        for words, digest in (given.get("data_sha256") or {}).items():
            key, _, path = words.partition(" ")
            self.settings[key] = f"{path.strip(chr(39))} (SHA-256 {digest[:12]})"

    def evaluated_like(self, other: RunFolder) -> bool:
        """Whether the evaluation data are the same, as far as known: of an unfinished run, not what was left out of them."""
        kept, theirs = (
            [str(value) for key, value in run.settings.items() if key.startswith("eval_dataset")]
            for run in (self, other)
        )
        if self._source() != other._source() or not (self.known and other.known):
            return False
        return kept == theirs or (any(self._source()) and not (kept and theirs))

    def _source(self) -> tuple[Any, ...]:
        """What its held-out pairs are read from, without the path: a file's digest, or what `val_split` chooses them by."""
        digests = [str(self.settings.get(key, "")).rpartition("(SHA-256 ")[2] for key in ("eval_data", "train_data")]
        if self.settings.get("val_split") is None:
            return (digests[0],)
        return (digests[1], *(self.settings.get(name) for name in ("val_split", "seed", "data_seed")))

    def objective(self) -> dict[str, Any]:
        """The settings that decide what the loss is."""
        rows = settings_table().items()
        return {name: self.settings.get(name, row.default) for name, row in rows if row.group == "objective"}

    def points(self, source: str, metric: str) -> list[tuple[float, float]]:
        """(step, value) of a metric in the records of training ("train"), evaluations ("eval") or the whole run ("run")."""
        return points_of(self.records.get(source, []), metric)

    def last(self, source: str, metric: str) -> tuple[float | None, float]:
        """The metric's last value, None if there is none, and its standard error, NaN if that is not known."""
        # A value that is not finite is null: it is the last one, and not known.
        found = [record for record in self.records.get(source, []) if metric in record]
        error = found[-1].get(f"{metric}_se") if found else None
        return found[-1][metric] if found else None, math.nan if error is None else error


def compare(folders: Sequence[str], output: Path | None = None, tell: Callable[[str], Any] = print) -> Path:
    """Print the table, then write the page.

    Args:
        output: the page's path; if not given, `comparison.html` in the first run's folder.
        tell: a function that prints the table.

    Returns:
        the page's path.

    Raises:
        OutputError: there are fewer than two runs, or more runs than colours, or a folder contains no run.
    """
    if not 2 <= len(folders) <= COLOURS:
        raise OutputError(f"compare: give 2 to {COLOURS} folders of runs, got {len(folders)}")
    runs = [RunFolder(Path(folder).expanduser(), name) for folder, name in zip(folders, _names(folders), strict=True)]
    comparable = all(run.evaluated_like(runs[0]) for run in runs)
    one_loss = all(run.objective() == runs[0].objective() for run in runs)
    rows, settings = _figures(runs, comparable=comparable, one_loss=one_loss), _differences(runs)
    remarks = []
    if any(cell.endswith("*") for row in rows.values() for cell in row):
        remarks.append("* best of the runs that did not fail, by more than two standard errors of the difference")
    if not all(run.known for run in runs):
        remarks.append(
            "The evaluation data of some runs are unknown, so their held-out figures may be of different data."
        )
    elif not comparable:
        remarks.append("The runs were evaluated on different data, so their held-out figures cannot be compared.")
    elif not one_loss:
        remarks.append("The runs have different objectives, so their losses cannot be compared.")
    names = [run.name for run in runs]
    table = _lines({"": names, **rows}) + ["", *remarks] * bool(remarks)
    tell("\n".join([*table, *(["", "settings that differ", *_lines(settings)] if settings else [])]))

    charts = []
    for chart in CHARTS:
        metric = chart.lines[0].metric
        if any(line.metric != metric for line in chart.lines):
            continue  # colours tell runs apart, so a chart can show one metric only
        held_out = ", held out" if any(run.points("eval", metric) for run in runs) else ""
        if svg := draw(chart, _curves(runs, metric)):
            charts.append({"title": chart.title + held_out, "svg": svg, "healthy": None})
    page = template("comparison.html.j2").render(
        names=names, charts={"Curves": charts}, rows=rows, settings=settings, remarks=remarks
    )
    output = output or Path(folders[0]).expanduser()
    output = output / OUTPUT if output.is_dir() else output
    write_aside(output, page)
    return output


def _figures(runs: Sequence[RunFolder], *, comparable: bool, one_loss: bool) -> dict[str, list[str]]:
    """The table's cells by the row's label, with a star at a best that is one beyond errors."""
    rows = {}
    for label, source, metric in _ROWS:
        found = [run.last(source, metric) for run in runs]
        if not any(run.points(source, metric) for run in runs):
            continue
        rows[label] = [with_error(value, error, metric) for value, error in found]
        sound = [pair if run.verdict != "failed" else (None, math.nan) for run, pair in zip(runs, found, strict=True)]
        comparable_here = comparable and (one_loss or metric != "loss")
        if (
            metric in BETTER
            and source == "eval"
            and comparable_here
            and (best := _best(sound, BETTER[metric])) is not None
        ):
            rows[label][best] += " *"
    best_of = [
        min(points, key=lambda point: point[1]) if points else None
        for points in (r.points("eval", "loss") for r in runs)
    ]
    if any(best_of):
        cells = ["-" if best is None else f"{figure(best[1])} at step {best[0]}" for best in best_of]
        rows = {"held-out loss": rows["held-out loss"], "least held-out loss": cells, **rows}
    return {"verdict": [run.verdict for run in runs], **rows}


def _best(found: Sequence[tuple[float | None, float]], sign: int) -> int | None:
    """Index of the value that is better than every other value by more than two standard errors, or None."""
    known = {place: (value, error) for place, (value, error) in enumerate(found) if value is not None}
    if len(known) < 2:
        return None
    best = max(known, key=lambda place: sign * known[place][0])
    value, error = known.pop(best)
    clear = all(abs(value - other) > 2 * math.hypot(error, its) for other, its in known.values())
    return best if clear else None


def _differences(runs: Sequence[RunFolder]) -> dict[str, list[str]]:
    """The settings and data that are not the same in all runs."""
    names = sorted({key for run in runs for key in run.settings if key not in _OF_THE_FOLDER})
    different = [key for key in names if len({json.dumps(run.settings.get(key)) for run in runs}) > 1]
    return {
        key: [str(run.settings.get(key, "default" if run.known else "not known")) for run in runs] for key in different
    }


def _lines(rows: dict[str, list[str]]) -> list[str]:
    """The rows as lines of aligned columns."""
    table = [[label, *cells] for label, cells in rows.items()]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]).rstrip()
        for row in table
    ]


def _names(folders: Sequence[str]) -> list[str]:
    """Short, unique names of the runs: the folder's name, with as many parents as needed."""
    parts = [Path(folder).expanduser().resolve().parts for folder in folders]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-count:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise OutputError("compare: the same folder was given twice")


def _curves(runs: Sequence[RunFolder], metric: str) -> list[Curve]:
    """One curve for each run: held out if the run was evaluated, else of training, dashed if other curves are held out."""
    held_out = [run.points("eval", metric) for run in runs]
    found = []
    for number, (run, points) in enumerate(zip(runs, held_out, strict=True), start=1):
        if points:
            found.append(Curve(points, run.name, number))
        elif points := run.points("train", metric):
            mixed = any(held_out)
            found.append(Curve(points, run.name + (" (training)" if mixed else ""), number, mixed))
    return found
