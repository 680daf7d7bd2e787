"""Writes the tables of frameworks in README.md and docs/migration.md: `python docs/frameworks_tables.py`.

The figures come from benchmarks/results/frameworks.json, which `python tests/frameworks/matrix.py write` measures. Each table is
between two markers.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "frameworks.json"
#: Module in dpo_kernels.integrations, which is also the name of the page in docs/migration -> the framework's name.
FRAMEWORKS = {
    "trl": "TRL",
    "llamafactory": "LLaMA-Factory",
    "openrlhf": "OpenRLHF",
    "verl": "verl",
    "ms_swift": "ms-swift",
    "torchtune": "torchtune",
    "axolotl": "axolotl",
    "unsloth": "Unsloth",
    "liger": "Liger's loss class",
}
GIB = 2**30


def results() -> dict[str, list[dict[str, Any]]]:
    """The entries of each framework, the oldest version first."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in FRAMEWORKS}
    for entry in json.loads(RESULTS.read_text(encoding="utf-8")).values():
        found[entry["framework"]].append(entry)
    for entries in found.values():
        entries.sort(key=lambda entry: order(version_of(entry)))
    return found


def order(version: str) -> tuple[int, ...]:
    """A version as a key for sorting."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


def version_of(entry: dict[str, Any]) -> str:
    """The framework's version: the first that its script names."""
    return next(version for name, version in entry["versions"].items() if name != "torch")


def span(entries: list[dict[str, Any]]) -> str:
    """The versions that were run, as text."""
    versions = list(dict.fromkeys(map(version_of, entries)))
    return versions[0] if len(versions) == 1 else f"{versions[0]} to {versions[-1]} ({len(versions)} versions)"


def speed_of(measured: dict[str, Any]) -> str:
    """The ratio of the times as text."""
    return f"{measured['speed']:.2f} times the speed"


def memory_of(measured: dict[str, Any]) -> str:
    """Both peaks as text."""
    return f"{measured['extra_bytes_with'] / GIB:.2f} of {measured['extra_bytes_without'] / GIB:.2f} GiB"


def gain(entries: list[dict[str, Any]]) -> str:
    """What the newest measured version gains."""
    measured = [entry["measured"] for entry in entries if "measured" in entry]
    return f"{speed_of(measured[-1])}, {memory_of(measured[-1])}" if measured else "not measured"


def short(folder: str) -> str:
    """The table of the README: one row a framework."""
    rows = [
        f"| [{title}]({folder}{name}.md) | {span(entries) if entries else 'see its page'} | `{name}` | {gain(entries)} |"
        for name, entries in results().items()
        for title in [FRAMEWORKS[name]]
    ]
    head = [
        "| framework | versions that were run | `NAME` | its own training step with our kernels, CPU: speed, extra memory |"
    ]
    return "\n".join([*head, "|---|---|---|---|", *rows])


def long() -> str:
    """The table of the page: one row a version."""
    lines = [
        "| framework | with | loss differs by | gradient differs by | speed | extra memory of a step |",
        "|---|---|---|---|---|---|",
    ]
    for name, entries in results().items():
        for entry in entries:
            rest = list(entry["versions"].items())
            beside = ", ".join(f"{package} {version}" for package, version in rest if package != "torch")
            measured = entry.get("measured")
            figures = (speed_of(measured), memory_of(measured)) if measured else ("", "")
            numbers = f"{entry['loss_difference']:.1g} | {entry['grad_difference']:.1g}"
            lines.append(f"| {FRAMEWORKS[name]} | {beside} | {numbers} | {' | '.join(figures)} |")
    return "\n".join(lines)


def filled(text: str, block: str, table: str) -> str:
    """The text with a table between the markers of a block."""
    begin, end = f"<!-- {block}:begin -->", f"<!-- {block}:end -->"
    assert {begin, end} <= set(text.splitlines()), f"the markers of {block} are missing"
    return text[: text.index(begin) + len(begin)] + "\n" + table + "\n" + text[text.index(end) :]


def wanted() -> dict[Path, str]:
    """What each page must contain."""
    readme, page = ROOT / "README.md", ROOT / "docs" / "migration.md"
    return {
        readme: filled(readme.read_text(encoding="utf-8"), "frameworks", short("docs/migration/")),
        page: filled(page.read_text(encoding="utf-8"), "frameworks", long()),
    }


if __name__ == "__main__":
    for path, text in wanted().items():
        path.write_text(text, encoding="utf-8")
