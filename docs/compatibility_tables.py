"""Writes the tables of docs/compatibility.md: `python docs/compatibility_tables.py`.

The settings come from TRL's class and ours (TRL must be installed). The results of TRL's tests come from
benchmarks/results/trl_suite.json, which `tests/trl_suite.py` writes; those of the architectures come from
benchmarks/results/architectures.json, which tests/trainer/test_architectures.py writes. Each table is between two markers
with its name.
"""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from dpo_trainer import DPOConfig
from dpo_trainer.settings.trl import ANSWERS, DIFFERENT, OTHER_MEANING

DOCS = Path(__file__).resolve().parent
PAGE = DOCS / "compatibility.md"
RESULTS = DOCS.parent / "benchmarks" / "results"
SUITE, ARCHITECTURES, ADAPTERS = (RESULTS / f"{name}.json" for name in ("trl_suite", "architectures", "adapters"))
#: How a model or an adapter can run here, the best outcome first.
ORDER = ("supported", "slower", "refused")
AHEAD, FULL = "a later token changes the logits before it", "prompts are shared, and the head is fused"


def defaults(kind: Any) -> dict[str, Any]:
    """Default values of a dataclass's init fields, by field."""
    return {
        item.name: getattr(value, "value", value)
        for item in dataclasses.fields(kind)
        if item.init
        for value in [item.default if item.default_factory is dataclasses.MISSING else item.default_factory()]
    }


def of_trl() -> dict[str, Any]:
    """Defaults of TRL's DPOConfig, for fields that it declares or changes, and fields whose default differs from ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from trl import DPOConfig as Theirs
    whole, base = defaults(Theirs), defaults(TrainingArguments)
    whole["bf16"] = DIFFERENT["bf16"][0] if whole["bf16"] is None else whole["bf16"]  # None is True unless fp16 is set
    return {
        name: value
        for name, value in whole.items()
        if name not in base or value != base[name] or name in DIFFERENT or name in OTHER_MEANING
    }


def ours_of(name: str, value: Any) -> Any:
    """Our default, in the form of TRL's."""
    ours = defaults(DPOConfig)[name]
    return [ours] if isinstance(value, list) and isinstance(ours, str) else ours


def status(name: str, value: Any) -> str:
    """What TRL's field does here."""
    if name not in defaults(DPOConfig):
        return f"told: {ANSWERS[name]}"
    if name in OTHER_MEANING:
        return OTHER_MEANING[name]
    return "the same, with another default (above)" if name in DIFFERENT else "the same"


def shown(value: Any) -> str:
    """A default as a user would write it."""
    return f"`{json.dumps(value, default=str)}`"


def row(*cells: str) -> str:
    """A row of a Markdown table."""
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def differing() -> str:
    """The table of defaults that differ."""
    lines = ["| setting | TRL | here | why |", "|---|---|---|---|"]
    for name, (theirs, why, _) in DIFFERENT.items():
        lines.append(row(f"`{name}`", shown(theirs), shown(defaults(DPOConfig)[name]), why))
    lines.append(
        row("`filters`", "none", shown(defaults(DPOConfig)["filters"]), "Such pairs teach nothing. `[]` keeps all.")
    )
    return "\n".join(lines) + "\n"


def fields() -> str:
    """The table of fields of TRL's DPOConfig."""
    lines = ["| field | TRL's default | here |", "|---|---|---|"]
    lines += [row(f"`{name}`", shown(value), status(name, value)) for name, value in of_trl().items()]
    return "\n".join(lines) + "\n"


def older() -> str:
    """The table of settings of older versions of TRL."""
    theirs = of_trl()
    lines = ["| field | instead |", "|---|---|"]
    lines += [
        row(f"`{name}`", text)
        for name, text in ANSWERS.items()
        if name not in theirs and name not in defaults(DPOConfig)
    ]
    return "\n".join(lines) + "\n"


def suite() -> str:
    """The results of TRL's tests."""
    found = json.loads(SUITE.read_text(encoding="utf-8"))
    counted = found["tests"] - len(found["skipped"])
    lines = [
        f"{len(found['passed'])} of {counted} tests pass (TRL {found['suite']}'s tests, TRL {found['trl']} installed). "
        f"{len(found['skipped'])} more are skipped where they ran, because they need packages or a GPU; {found['apart']} tests "
        "of vision-language models are counted apart. These fail:",
        "",
        "| test | why |",
        "|---|---|",
    ]
    reasons: dict[str, list[str]] = {}
    for entry in found["failed"]:
        reasons.setdefault(entry["reason"] or entry["error"], []).append(entry["test"].partition("::")[2])
    lines += [row(", ".join(f"`{test}`" for test in tests), reason) for reason, tests in reasons.items()]
    return "\n".join(lines) + "\n"


def kind_of(found: dict[str, Any]) -> tuple[str, str]:
    """(how an architecture runs, why), from the trainer's messages about it."""
    if refused := found.get("refused"):
        why = AHEAD if "looks ahead" in refused else refused.partition(": ")[2]
        return "refused", why.replace(found["class"], "it", 1).partition(";")[0]
    reasons = []
    if found["head"] == "logits":
        reasons.append("its logits are not one matrix product of its hidden states, so whole logits are computed")
    if found["layout"] == "padded":
        said = " ".join(found["said"])
        why = "its code takes no such batch" if "it refuses" in said else "a sequence in a shared row has other answers"
        reasons.append(f"batches are padded, because {why}")
    elif found["layout"] == "shared rows":
        reasons.append("prompts are shared under a mask, because its attention is not sdpa's")
    return ("slower", "; ".join(reasons)) if reasons else ("supported", FULL)


def groups_of(entries: Iterable[tuple[str, tuple[str, str]]], title: str) -> list[str]:
    """A table with a row for each outcome and reason, from entries (name, (outcome, reason))."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name, group in entries:
        groups.setdefault(group, []).append(name)
    lines = [f"| result | why | {title} |", "|---|---|---|"]
    for what, why in sorted(groups, key=lambda group: (ORDER.index(group[0]), -len(groups[group]))):
        lines.append(row(what, why, ", ".join(f"`{name}`" for name in groups[what, why])))
    return lines


def architectures() -> str:
    """How each architecture of transformers that can be made tiny runs."""
    whole = json.loads(ARCHITECTURES.read_text(encoding="utf-8"))
    lines = [
        f"{len(whole['architectures'])} architectures of transformers {whole['transformers']}, by their model types. "
        f"{len(whole['not_tried'])} more could not be made small enough to try, most of them because they need images or sound.",
        "",
        *groups_of(((name, kind_of(found)) for name, found in whole["architectures"].items()), "architectures"),
    ]
    return "\n".join(lines) + "\n"


def kind_of_adapter(found: dict[str, str]) -> tuple[str, str]:
    """(how a kind of adapter runs, why)."""
    if refused := found.get("refused"):
        return "refused", AHEAD if "looks ahead" in refused else refused
    if why := found["why"]:
        return "slower", "virtual tokens stand in front of every row" if "virtual tokens" in why else why
    return "supported", FULL


def adapters() -> str:
    """How each kind of adapter runs."""
    whole = json.loads(ADAPTERS.read_text(encoding="utf-8"))
    absent = ", ".join(f"`{name}` ({package})" for name, package in whole["not_tried"].items())
    lines = [
        f"{len(whole['kinds'])} kinds of peft {whole['peft']}. Not tried, because a package was missing: {absent}.",
        "",
        *groups_of(((name, kind_of_adapter(found)) for name, found in whole["kinds"].items()), "kinds"),
    ]
    return "\n".join(lines) + "\n"


TABLES: dict[str, Callable[[], str]] = {
    "differing": differing,
    "fields": fields,
    "older": older,
    "suite": suite,
    "architectures": architectures,
    "adapters": adapters,
}


def filled(page: str) -> str:
    """The page with each table between its markers."""
    for name, table in TABLES.items():
        begin, end = f"<!-- {name}:begin -->\n", f"<!-- {name}:end -->"
        before, rest = page.split(begin)
        page = before + begin + table() + end + rest.partition(end)[2]
    return page


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
