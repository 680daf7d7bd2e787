"""Shared parts of the examples around a training run: the control, standard errors, machine facts, table, files."""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import platform
import random
from collections.abc import Callable, Hashable, Mapping, Sequence
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch
import transformers

Row = dict[str, Any]

# The rows that a README shows of a results file: title, key in the summary, format. Keys that an example lacks are left out.
FIGURES = (
    ("held-out loss (starts at log 2 = 0.6931)", "held_out_loss", ".4f"),
    ("held-out accuracy", "held_out_accuracy", ".1%"),
    ("sentiment of fresh samples, before", "sentiment_before", ".3f"),
    ("sentiment of fresh samples, after", "sentiment_after", ".3f"),
    ("its change", "sentiment_change", "+.3f"),
    ("KL from the reference, nats a continuation", "kl", ".2f"),
    ("KL from the reference, nats a token", "kl_per_token", ".3f"),
    ("steps of 8 pairs", "steps", "d"),
    ("training pairs", "training_pairs", "d"),
    ("held-out pairs", "held_out_pairs", "d"),
    ("share of pairs whose right answer is the longer one", "right_answer_longer", ".0%"),
    ("seconds of training, a run", "training_seconds", ".0f"),
    ("seconds in all, a run", "seconds", ".0f"),
    ("tokens per second", "tokens_per_second", ",.0f"),
)
# Number of the control's seeds, each trained twice; small, so that the wait is short.
SEEDS = 3
RESULTS_START, RESULTS_END = "<!-- results.json -->", "<!-- end of results.json -->"


def read_rows(path: Path) -> list[Row]:
    """The rows of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def flip_labels(rows: Sequence[Row], seed: int, *, other_half: bool = False) -> list[Row]:
    """Swap chosen and rejected in a random half of the rows, so that labels carry no information about preference.

    Exactly half, instead of each row with probability 1/2: all pairs prefer the same quality, so a surplus of unswapped
    rows, which independent draws leave, would still be a signal.

    Args:
        other_half: swap exactly the rows that the same seed does not swap otherwise.
    """
    drawn = set(random.Random(seed).sample(range(len(rows)), len(rows) // 2))
    swapped = set(range(len(rows))) - drawn if other_half else drawn
    return [
        {**row, "chosen": row["rejected"], "rejected": row["chosen"]} if index in swapped else dict(row)
        for index, row in enumerate(rows)
    ]


def mean_and_error(
    values: Sequence[float], clusters: Sequence[Hashable] | None = None, crossed: Sequence[Hashable] | None = None
) -> tuple[float, float]:
    """Mean of the values and its standard error.

    Args:
        values: one number per observation.
        clusters: the cluster of each observation. Pairs that share a prompt are not independent, so deviations from the
            mean are first summed within a cluster (the sandwich estimator of a mean, with C / (C - 1)).
        crossed: the cluster of each observation in a second clustering. The variance is the sum of both clusterings'
            variances minus that of their intersections (Cameron, Gelbach and Miller 2011, equation 2.11).
    """
    array = np.asarray(values, dtype=np.float64)
    clusters = range(len(array)) if clusters is None else clusters
    variance = _variance_of_mean(array, clusters)
    if crossed is not None:
        parts = variance, _variance_of_mean(array, crossed)
        both = _variance_of_mean(array, list(zip(clusters, crossed, strict=True)))
        # This difference of estimates can be too small; the error is at least that of each clustering.
        variance = max(sum(parts) - both, *parts)
    return float(array.mean()), math.sqrt(variance)


def _variance_of_mean(array: np.ndarray, clusters: Sequence[Hashable]) -> float:
    groups: dict[Hashable, float] = {}
    for key, deviation in zip(clusters, array - array.mean(), strict=True):
        groups[key] = groups.get(key, 0.0) + float(deviation)
    count = len(groups)
    if count < 2:
        return math.nan
    return count / (count - 1) * sum(total * total for total in groups.values()) / len(array) ** 2


class Observed(NamedTuple):
    """The numbers whose mean is a figure, and the cluster of each."""

    values: Sequence[float]
    prompts: Sequence[Hashable]


def held_out(rewards: np.ndarray, prompts: Sequence[Hashable]) -> dict[str, Observed]:
    """DPO's loss and accuracy on held-out pairs.

    Args:
        rewards: `[pairs, 2]`, implicit rewards of the chosen and the rejected side.
        prompts: one per pair.
    """
    margins = (rewards[:, 0] - rewards[:, 1]).astype(np.float64)
    return {
        "held_out_loss": Observed(np.logaddexp(0.0, -margins), prompts),
        # A tie counts as half right, so an untrained model scores 50 %, not 0.
        "held_out_accuracy": Observed((margins > 0) + 0.5 * (margins == 0), prompts),
    }


def figures(observed: Mapping[str, Observed]) -> dict[str, float]:
    """For each name, its mean under `name`, and the standard error, clustered by prompt, under `name_error`."""
    found = {}
    for name, (values, prompts) in observed.items():
        found[name], found[f"{name}_error"] = mean_and_error(values, prompts)
    return found


def over_runs(runs: Sequence[Mapping[str, Any]], observed: Sequence[Mapping[str, Observed]]) -> dict[str, Any]:
    """One summary of the control's runs: means, with standard errors over prompts and over seeds.

    A run's training may shift all held-out pairs in the same direction by chance. The error over one run's prompts does not
    contain this shift; the spread between seeds does. The two runs of a seed swap opposite halves of the labels, so their
    shifts are opposite, and their mean mostly keeps what training does whatever the labels are.

    Args:
        runs: the runs' summaries.
        observed: for each run, the observations whose means are its figures.

    Returns:
        The first run's summary, with means in place of the figures, `seeds` in place of `seed`, and every run's own figures
        under `runs`.
    """
    own = ("seed", "other_half")
    summary = {key: value for key, value in runs[0].items() if key not in (*own, "training")}
    names = [key for key, value in summary.items() if isinstance(value, float)]
    seeds = list(dict.fromkeys(run["seed"] for run in runs))
    for key in names:
        if not key.endswith("_error"):
            summary[key] = float(np.mean([run[key] for run in runs]))
    for key in observed[0]:
        values = [value for one in observed for value in one[key].values]
        prompts = [prompt for one in observed for prompt in one[key].prompts]
        by_seed = [run["seed"] for run, one in zip(runs, observed, strict=True) for _ in one[key].values]
        crossed = by_seed if len(seeds) > 1 else None
        summary[key], summary[f"{key}_error"] = mean_and_error(values, prompts, crossed)
    each = [{key: run[key] for key in (*own, *names)} for run in runs]
    return rounded({**summary, "seeds": seeds, "runs": each})


def learnt_nothing(control: Mapping[str, Any]) -> bool:
    """Whether the control's held-out accuracy is 50 % within two standard errors."""
    return abs(control["held_out_accuracy"] - 0.5) <= 2 * control["held_out_accuracy_error"]


class Rewards:
    """A `compute_metrics` for the trainer that keeps every pair's rewards, from which standard errors are computed."""

    def __init__(self) -> None:
        self.values = np.empty((0, 2))

    def __call__(self, prediction: Any) -> dict[str, float]:
        self.values = np.asarray(prediction.predictions)
        return {}


# --- starting ------------------------------------------------------------------------------------------------------


def read_options(
    description: str, *, steps: int, learning_rate: float, folder: Path, has_control: bool = True
) -> argparse.Namespace:
    """Parse the examples' common command line. `output_dir` gets a default, which differs for the control."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--steps", type=int, default=steps, help="optimizer steps (%(default)s)")
    parser.add_argument("--learning-rate", type=float, default=learning_rate, help="at its peak (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="for the pairs' order, samples and flips (%(default)s)")
    parser.set_defaults(flip=False, other_half=False, seeds=None)
    if has_control:
        parser.add_argument(
            "--flip", action="store_true", help="the control: swap the sides of half the training pairs"
        )
        seeds = f"seeds of the control, from --seed upwards, each trained twice ({SEEDS})"
        parser.add_argument("--seeds", type=int, help=seeds)
    parser.add_argument("--output-dir", type=Path, help=f"default: {folder}, with --flip {folder}-control")
    parser.add_argument("--save-results", action="store_true", help="also write results.json, which the docs quote")
    options = parser.parse_args()
    if options.steps < 1:
        parser.error(f"--steps: must be at least 1, got {options.steps}")
    if options.seeds is not None and not options.flip:
        parser.error("--seeds: repeats the control; give --flip too")
    options.seeds = SEEDS if options.seeds is None else options.seeds
    if options.seeds < 1:
        parser.error(f"--seeds: must be at least 1, got {options.seeds}")
    if options.output_dir is None:
        options.output_dir = Path(f"{folder}-control") if options.flip else folder
    return options


#: An example: trains, measures and writes summary.json; returns that summary and the observations whose means are its figures.
Run = Callable[[argparse.Namespace], tuple[dict[str, Any], dict[str, Observed]]]


def run_control(run: Run, options: argparse.Namespace) -> dict[str, Any]:
    """Run the control twice per seed, each run in a folder of its own in `output_dir`. Returns the result of `over_runs`."""
    runs, observed = [], []
    for seed in range(options.seed, options.seed + options.seeds):
        for other_half in (False, True):
            half = "other-half" if other_half else "half"
            print(f"control, seed {seed}, {half} ({len(runs) + 1} of {2 * options.seeds})", flush=True)
            own = {"seed": seed, "other_half": other_half, "output_dir": options.output_dir / f"seed-{seed}-{half}"}
            summary, values = run(argparse.Namespace(**{**vars(options), **own}))
            runs.append({**summary, "other_half": other_half})
            observed.append(values)
            gc.collect()  # a trainer is in a reference cycle; its models must be freed before the next run's are made
    summary = over_runs(runs, observed)
    write_json(options.output_dir / "summary.json", summary)
    return summary


def run_example(run: Run, options: argparse.Namespace, *, name: str, results: Path) -> dict[str, Any]:
    """Run the example, or its control, quietly. Returns the summary; `--save-results` also stores it in `results`."""
    keep_quiet()
    summary = run_control(run, options) if options.flip else run(options)[0]
    if options.save_results:
        save_result(results, "control" if options.flip else name, summary)
    return summary


def keep_quiet() -> None:
    """Silence other libraries, so that only the run's own lines appear."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()


# --- writing it down -----------------------------------------------------------------------------------------------


def environment() -> dict[str, Any]:
    """Date, machine and versions, without which a figure means little."""
    return {
        "date": date.today().isoformat(),
        "machine": {
            "cpu": _cpu_name(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "threads": torch.get_num_threads(),
            "instructions": torch.backends.cpu.get_cpu_capability(),
            "system": platform.platform(terse=True),
        },
        "versions": {
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in ("dpo-kernels", "torch", "transformers")},
        },
    }


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def rounded(values: Mapping[str, Any], digits: int = 4) -> dict[str, Any]:
    """A copy with floats rounded, at any depth; NaN and infinities become None, because JSON has neither."""

    def clean(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: clean(item) for key, item in value.items()}
        if isinstance(value, list):
            return [clean(item) for item in value]
        if isinstance(value, float):
            return round(value, digits) if math.isfinite(value) else None
        return value

    return {key: clean(value) for key, value in values.items()}


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".part")
    aside.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    aside.replace(path)


def save_result(path: Path, name: str, summary: Mapping[str, Any]) -> None:
    """Put a run's summary under its name into a results file, and its figures into the README next to that file."""
    results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    results[name] = {key: value for key, value in summary.items() if key != "training"}
    write_json(path, results)
    put_between_marks(path.with_name("README.md"), results_table(results))


def put_between_marks(page: Path, table: str) -> None:
    """Replace the text between a page's two marks, so that no figure on it is typed by hand."""
    before, start, rest = page.read_text(encoding="utf-8").partition(RESULTS_START)
    _, end, after = rest.partition(RESULTS_END)
    page.write_text(f"{before}{start}\n{table}\n{end}{after}", encoding="utf-8")


def results_table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown table of the runs in a results file, one column each, and the machines they were made on."""
    lines = [f"| | {' | '.join(results)} |", "|---|" + "---:|" * len(results)]
    for title, key, form in FIGURES:
        if all(run.get(key) is not None for run in results.values()):
            cells = []
            for run in results.values():
                error = f" ± {run[key + '_error']:{form.lstrip('+')}}" if key + "_error" in run else ""
                cells.append(f"{run[key]:{form}}{error}")
            lines.append(f"| {title} | {' | '.join(cells)} |")
    lines.append("")
    for name, run in results.items():
        machine, versions = run["machine"], run["versions"]
        lines.append(
            f"{name}: {run['date']}, {machine['threads']} threads on {machine['cores']} cores of {machine['cpu']} "
            f"({machine['instructions']}), torch {versions['torch']}, transformers {versions['transformers']}, "
            f"{_seeds(run)}.  "
        )
    return "\n".join(lines)


def _seeds(run: Mapping[str, Any]) -> str:
    """In words: the seeds of a result and the meaning of its ±; for several runs, also the figures of each."""
    runs = run.get("runs", [run])
    if len(runs) == 1:
        return f"seed {runs[0]['seed']}, ± over prompts"
    each = []
    for seed in run["seeds"]:
        own = " and ".join(f"{one['held_out_accuracy']:.1%}" for one in runs if one["seed"] == seed)
        each.append(f"{own} ({seed})")
    errors = "prompts and seeds" if len(run["seeds"]) > 1 else "prompts"
    return (
        f"means of {len(runs)} runs, ± over {errors}; held-out accuracy with one half of the labels swapped and with the other "
        f"(seed): {', '.join(each)}"
    )


def control_note(summary: Mapping[str, Any]) -> str:
    """The control's result in one line for the terminal."""
    verdict = "is" if learnt_nothing(summary) else "is NOT"
    return f"{_seeds(summary)}. Accuracy {verdict} 50 % within two standard errors."


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table for the terminal: the first column is left-aligned, all others are right-aligned."""
    lines = [list(header), *[list(row) for row in rows]]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    text = [
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    return "\n".join([text[0], "-" * len(text[0]), *text[1:]])
