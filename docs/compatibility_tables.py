"""Writes the tables of docs/compatibility.md: `python docs/compatibility_tables.py`.

The settings come from TRL's class and ours (TRL must be installed). The results of TRL's tests come from
benchmarks/results/trl_suite.json, which `tests/trl_suite.py` writes; those of the architectures come from
benchmarks/results/architectures.json, which tests/trainer/test_architectures.py writes. What combines with what comes from
the files *combinations*.json there, which the tests *combinations.py write. Each table is between two markers
with its name.
"""

from __future__ import annotations

import dataclasses
import json
import re
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
COMBINATIONS, QUANTISED, SHARDED, LIBRARY = (
    RESULTS / f"{name}.json"
    for name in ("combinations", "combinations_quantised", "combinations_sharded", "library_combinations")
)
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


#: By outcome of a combination, the worst last: the mark in a cell.
MARKS = {"works": "yes", "slower": "slower", "no effect": "warned", "refused": "no"}


class Combinations:
    """What combines with what, from the file that the tests write."""

    def __init__(self) -> None:
        self.whole = json.loads(COMBINATIONS.read_text(encoding="utf-8"))
        self.alone = {name: tuple(found) for name, found in self.whole["alone"].items()}
        self.together = {frozenset(pair): tuple(found) for *pair, (*found,) in self._pairs()}

    def _pairs(self) -> Iterable[tuple[str, str, list[str]]]:
        return ((one, other, [kind, line]) for one, other, kind, line in self.whole["together"])

    def outcome(self, one: str, other: str) -> str:
        """How a pair of values turns out."""
        kinds = [self.alone.get(name, ("works",))[0] for name in (one, other)]
        kinds += [self.together.get(frozenset((one, other)), ("works",))[0]]
        return max(kinds, key=list(MARKS).index)

    def matrix(self, rows: str, columns: Iterable[str]) -> list[str]:
        """A table with a row for all values of one dimension with the same outcomes, and a column for each value of others."""
        across = [value for name in columns for value in self.whole["dimensions"][name]]
        groups: dict[tuple[str, ...], list[str]] = {}
        for value in self.whole["dimensions"][rows]:
            groups.setdefault(tuple(self.outcome(value, other) for other in across), []).append(value)
        lines = [row(rows, *(f"`{name}`" for name in across)), "|---" * (len(across) + 1) + "|"]
        for outcomes, values in groups.items():
            lines.append(row(", ".join(f"`{value}`" for value in values), *(MARKS[kind] for kind in outcomes)))
        return lines

    def reasons(self) -> list[str]:
        """A table of what does not simply work, with the trainer's words."""
        groups: dict[tuple[str, str, str], dict[str, None]] = {}
        for name, (kind, line) in self.alone.items():
            groups[kind, line, ""] = {name: None}
        for one, other, (kind, line) in self._pairs():
            said = line.partition(". ")[0].replace(f"loss_type {one}", "loss_type ...").replace(f"'{one}'", "'...'")
            said = re.sub(rf"^{re.escape(one)}:", "...:", said)
            groups.setdefault((kind, said, other), {})[one] = None
        lines = ["| value | with | result | what the trainer says |", "|---|---|---|---|"]
        merged: dict[tuple[str, str, tuple[str, ...]], list[str]] = {}
        for (kind, said, other), ones in groups.items():
            merged.setdefault((kind, said, tuple(ones)), []).append(other)
        for (kind, said, names), others in merged.items():
            cells = (", ".join(f"`{name}`" for name in part if name) for part in (names, others))
            lines.append(row(*cells, MARKS[kind], said))
        return lines


def combinations() -> str:
    """What combines with what in a run."""
    found = Combinations()
    lines = [
        f"{found.whole['pairs']} pairs of values and {found.whole['more']} combinations of more, tried with torch "
        f"{found.whole['torch']}, transformers {found.whole['transformers']} and peft {found.whole['peft']}.",
        "",
        *found.matrix("loss", ["loss setting"]),
        "",
        *found.matrix("loss", ["reference"]),
        "",
        *found.matrix("adapter", ["reference", "layout", "loss path"]),
        "",
        "Every other pair of these values works, with each other and with every loss:",
        "",
        *(
            f"* {name}: {', '.join(f'`{value}`' for value in values)}"
            for name, values in found.whole["dimensions"].items()
            if name != "loss"
        ),
        "",
        "What does not simply work:",
        "",
        *found.reasons(),
    ]
    return "\n".join(lines) + "\n"


def quantised() -> str:
    """What combines with quantised weights."""
    lines = ["| weights | tried | slower | no |", "|---|---:|---|---|"]
    for name, found in json.loads(QUANTISED.read_text(encoding="utf-8")).items():
        odd = {
            kind: ", ".join(f"`{names}`" for names, (other, _) in found["exceptions"].items() if other == kind)
            for kind in ("slower", "refused")
        }
        lines.append(row(f"{name} ({found['version']})", str(found["tried"]), odd["slower"], odd["refused"]))
    return "\n".join(lines) + "\n"


def sharded() -> str:
    """What combines with a sharded policy."""
    cases = json.loads(SHARDED.read_text(encoding="utf-8"))
    named = ", ".join(" + ".join(f"`{name}`" for name in names) for *names, _ in cases)
    return f"{len(cases)} combinations: {named}.\n"


def library() -> str:
    """What combines with what in calls of the library's functions."""
    functions = json.loads(LIBRARY.read_text(encoding="utf-8"))["functions"]
    lines = [row("way of calling", *(f"`{name}`" for name in functions)), "|---" * (len(functions) + 1) + "|"]
    lines += [
        row(way, *("no" if ways[way] else "yes" for ways in functions.values()))
        for way in next(iter(functions.values()))
    ]
    said: dict[str, list[str]] = {}
    for ways in functions.values():
        for way, line in ways.items():
            if line:
                said.setdefault(line.partition(";")[0], []).append(way)
    lines += ["", "What a refused call says:", ""]
    lines += [f"* {', '.join(dict.fromkeys(ways))}: `{line}`" for line, ways in said.items()]
    return "\n".join(lines) + "\n"


TABLES: dict[str, Callable[[], str]] = {
    "differing": differing,
    "fields": fields,
    "older": older,
    "suite": suite,
    "architectures": architectures,
    "adapters": adapters,
    "combinations": combinations,
    "quantised": quantised,
    "sharded": sharded,
    "library": library,
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
