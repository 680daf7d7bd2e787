"""Fills docs/trust.md with the figures of benchmarks/results/*.json, so that none is typed by hand.

python -m benchmarks.trust_page            print the page's table
python -m benchmarks.trust_page --write    put it between the page's markers
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from .readme_table import with_block
from .report import RESULTS

PAGE = Path(__file__).resolve().parent.parent / "docs" / "trust.md"
MARKERS = ("<!-- trust:begin -->", "<!-- trust:end -->")


def _properties(found: dict[str, Any]) -> list[tuple[str, str]]:
    return [
        (
            f"random calls, {name} backend",
            f"{counts['examples']:,}, of which {counts['violations']} gave a wrong result",
        )
        for name, counts in found.items()
    ]


def _planted_faults(found: dict[str, Any]) -> list[tuple[str, str]]:
    caught = sum(bool(fault["caught_by"]) for fault in found.values())
    return [("mistakes planted in the sources", f"{len(found)}, of which the tests caught {caught}")]


def _runs(found: dict[str, Any]) -> list[tuple[str, str]]:
    kills, files, disk = found["kills"], found["damaged_files"], found["disk_full"]
    return [
        (
            "runs that were killed and started again",
            f"{kills['kills']}, with {kills['lost_steps']} steps lost and {kills['extra_steps']} taken twice",
        ),
        (
            "checkpoint files with flipped bits, or cut short",
            f"{files['tried']:,}, of which {files['answered']:,} were named in one line",
        ),
        (
            "moments at which the disk was full",
            f"{disk['places']}, of which {disk['answered']} ended in one clear line",
        ),
    ]


def _coverage(found: dict[str, Any]) -> list[tuple[str, str]]:
    names = {"python": "Python", "native": "C++ and CUDA (on the emulator)"}
    return [
        (f"source lines that the tests run, {names[name]}", f"{part['percent']:.1f} %") for name, part in found.items()
    ]


PARTS = {"properties": _properties, "planted_faults": _planted_faults, "runs": _runs, "coverage": _coverage}


def render(results: Path = RESULTS) -> str:
    """The table of checks and their results; a check without results is left out."""
    rows = [("what was tried", "result"), ("---", "---")]
    for name, part in PARTS.items():
        path = results / f"{name}.json"
        if path.is_file():
            rows += part(json.loads(path.read_text(encoding="utf-8")))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="fill docs/trust.md")
    block = render()
    if parser.parse_args().write:
        PAGE.write_text(with_block(PAGE.read_text(encoding="utf-8"), block, MARKERS), encoding="utf-8")
    else:
        print(block)


if __name__ == "__main__":
    main()
