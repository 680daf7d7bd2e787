"""summary.json and report.html of a run, both made from what lies in its folder."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..model.split import unwrap_adapter
from ..run_folder.records import EVENTS, METRICS, SAMPLES, SUMMARY, read_records, write_aside
from ..watch.callbacks import without_ties
from .charts import CHARTS, curves_of, draw, draw_histogram

if TYPE_CHECKING:
    import torch

    from ..settings.config import DPOConfig
    from ..trainer import DPOTrainer
    from ..watch.evaluated import EvaluatedPairs

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


def initial_loss(args: DPOConfig) -> float | None:
    """The objective's value where policy and reference agree (log 2 for DPO); None where it depends on the model."""
    import torch

    from dpo_kernels.objectives import Pairs, build, mix

    zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    beta, smoothing = (torch.tensor(value, dtype=torch.float64) for value in (args.beta, args.label_smoothing))
    values = []
    for sums in (zero.repeat(2), torch.tensor([-3.0, -7.0], dtype=torch.float64)):
        pairs = Pairs.from_sums(sums, sums, 2 * one.repeat(2), beta, smoothing, kl_sums=zero.repeat(2))
        values.append(mix(pairs, build(args.loss_type), args.loss_weights).item())
    return values[0] if math.isclose(*values, abs_tol=1e-12) else None


def write_report(trainer: DPOTrainer, *, finished: bool) -> Path | None:
    """Write `summary.json` (once the run is finished) and, if asked for, `report.html`; returns the report's path."""
    folder = Path(str(trainer.args.output_dir))
    folder.mkdir(parents=True, exist_ok=True)
    summary = summarize(trainer, finished=finished)
    if trainer.args.write_report:
        page = render_report(
            summary,
            read_records(folder / METRICS),
            name=folder.resolve().name,
            events=read_records(folder / EVENTS),
            evaluated=trainer.evaluated,
            samples=read_records(folder / SAMPLES),
        )
        write_aside(folder / REPORT, page)
    if finished:  # last: it says that nothing is left to do
        write_aside(folder / SUMMARY, json.dumps(summary, indent=2) + "\n")
    return folder / REPORT if trainer.args.write_report else None


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


def evaluation_prefixes(records: list[dict[str, Any]]) -> list[str]:
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
    """The most resident memory that this program has had."""
    # Linux hands ru_maxrss on to children: a run started by a large process would be told that process's peak.
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return round(next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 2**10, 1)
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


# --- the page ------------------------------------------------------------------------------------------------------


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
