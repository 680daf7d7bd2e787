"""README.md of a trained model: its base model, data, objective, settings and held-out figures."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from transformers import ProcessorMixin

from ..run import Run
from ..run_folder.metrics import evaluation_prefixes, evaluation_records
from ..run_folder.records import EVENTS, METRICS, SETTINGS, read_object, read_records, write_aside
from ..run_folder.summary import summarize
from ..settings import objective
from .figures import LABELS, template

#: Fields of the hub's front matter about the licence.
_LICENSE = ("license", "license_name", "license_link")
TAGS = ("dpo", "preference-optimization", "dpo-kernels")


def write_card(run: Run, folder: Path, given: dict[str, Any]) -> None:
    """Write the card into the folder.

    Args:
        given: arguments of `transformers.Trainer.create_model_card`: language, license, tags, model_name,
            finetuned_from, dataset and so on.
    """
    write_aside(folder / "README.md", render_card(run, given))


def render_card(run: Run, given: dict[str, Any]) -> str:
    """The card's text: metadata for model hubs, then text and tables in Markdown."""
    import yaml

    summary = summarize(run, finished=True)
    adapter = hasattr(run.policy.model, "peft_config")
    vision = isinstance(run.processing_class, ProcessorMixin)
    config = getattr(run.policy.model, "config", None)
    origin = str(given.get("finetuned_from") or getattr(config, "_name_or_path", None) or "")
    hub_name = _hub_name(origin)
    base = hub_name or origin or summary["architecture"]
    name = given.get("model_name") or run.args.run_folder.resolve().name
    base_card = _base_card(origin, hub_name)
    data = _hub_name(str(read_object(run.args.run_folder / SETTINGS).get("train_data") or "").partition(":")[0])
    metadata = {
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "image-text-to-text" if vision else "text-generation",
        "base_model": hub_name,
        "base_model_relation": ("adapter" if adapter else "finetune") if hub_name else None,
        "model_name": name,
        "language": given.get("language"),
        **{key: given.get(key) or base_card.get(key) for key in _LICENSE},
        "datasets": given.get("dataset_tags") or given.get("dataset") or ([data] if data else None),
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
        auto_class="AutoModelForImageTextToText" if vision else "AutoModelForCausalLM",
        auto_reader="AutoProcessor" if vision else "AutoTokenizer",
        reader="processor" if vision else "tokenizer",
        summary=summary,
        objectives=[(item.info, weight) for item, weight in zip(built, weights, strict=True)],
        beta=run.args.beta,
        evaluations={prefix: evaluation_records(records, prefix) for prefix in evaluation_prefixes(records)},
        labels=LABELS,
        events=read_records(folder / EVENTS),
    )


def _hub_name(name: str) -> str | None:
    """The name of a model or a dataset on a hub, "owner/name" or "name". None for anything else.

    For a folder in the hub's cache, it is the name in the folder's path.
    """
    if cached := re.search(r"(?:models|datasets)--([\w.-]+?)--([\w.-]+)/snapshots/", name):
        return f"{cached[1]}/{cached[2]}"
    return name if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) and not Path(name).exists() else None


def _base_card(origin: str, hub_name: str | None) -> dict[str, Any]:
    """The metadata of the base model's card, from its folder or the hub's cache. Nothing is downloaded."""
    import yaml
    from huggingface_hub import try_to_load_from_cache

    card = Path(origin) / "README.md"
    if not card.is_file():
        cached = try_to_load_from_cache(hub_name, "README.md") if hub_name else None
        if not isinstance(cached, str):
            return {}
        card = Path(cached)
    head = re.match(r"---\r?\n(.*?)\r?\n---", card.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    try:
        found = yaml.safe_load(head[1]) if head else {}
    except yaml.YAMLError:
        return {}
    return found if isinstance(found, dict) else {}


def _as_list(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value or [])
