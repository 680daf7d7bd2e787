"""README.md of a trained model: what it was trained from, on what, with which objective, and how it does held out."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ..run import Run
from ..run_folder.metrics import evaluation_prefixes, evaluation_records
from ..run_folder.records import EVENTS, METRICS, read_records, write_aside
from ..run_folder.summary import summarize
from ..settings import objective
from .page import LABELS, template

TAGS = ("dpo", "preference-optimization", "dpo-kernels")


def write_card(run: Run, folder: Path, given: dict[str, Any]) -> None:
    """Write the card into the folder.

    Args:
        given: what `transformers.Trainer.create_model_card` takes: language, license, tags, model_name, finetuned_from,
            dataset and so on.
    """
    write_aside(folder / "README.md", render_card(run, given))


def render_card(run: Run, given: dict[str, Any]) -> str:
    """The card's text: metadata that model hubs read, then prose and tables in Markdown."""
    import yaml

    summary = summarize(run, finished=True)
    adapter = hasattr(run.policy.model, "peft_config")
    config = getattr(run.policy.model, "config", None)
    origin = str(given.get("finetuned_from") or getattr(config, "_name_or_path", None) or "")
    # A model hub may know a name or owner/name that is no folder of this machine.
    on_hub = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", origin) and not Path(origin).exists()
    base = origin or summary["architecture"]
    name = given.get("model_name") or run.args.run_folder.resolve().name
    metadata = {
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "text-generation",
        "base_model": origin if on_hub else None,
        "model_name": name,
        "language": given.get("language"),
        "license": given.get("license"),
        "datasets": given.get("dataset_tags") or given.get("dataset"),
        "tags": list(dict.fromkeys([*TAGS, *_as_list(given.get("tags")), *_as_list(given.get("tasks"))])),
    }
    folder = run.args.run_folder
    records = read_records(folder / METRICS)
    built: Any = objective.build(run.args)
    weights = run.args.loss_weights or [1.0] * len(built)
    return template("model_card.md.j2").render(
        metadata=yaml.safe_dump({key: value for key, value in metadata.items() if value}, sort_keys=False).strip(),
        name=name,
        base=Path(base).name if Path(base).is_absolute() else base,
        adapter=adapter,
        summary=summary,
        objectives=[(item.info, weight) for item, weight in zip(built, weights, strict=True)],
        beta=run.args.beta,
        evaluations={prefix: evaluation_records(records, prefix) for prefix in evaluation_prefixes(records)},
        labels=LABELS,
        events=read_records(folder / EVENTS),
    )


def _as_list(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value or [])
