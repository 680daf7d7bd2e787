"""Writes the README's figures, docs/performance.md and docs/charts from benchmarks/results, so that none is typed by hand.

python -m benchmarks.readme_table            print the README's block
python -m benchmarks.readme_table --write    put it between the README's markers, and write the page and the charts
python -m benchmarks.readme_table --check    exit 1 if the README, the page or a chart differs from the results

README and page show the machine that was measured last and every GPU session; the page has a table for each other machine.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from . import bars, charts, gpu_summary, report
from .report import RESULTS, SLOWER, TIME, Column, answer_table, below_one, compared, headline, markdown_table, read

ROOT = Path(__file__).resolve().parent.parent
README, PAGE, CHARTS = ROOT / "README.md", ROOT / "docs" / "performance.md", ROOT / "docs" / "charts"
BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
#: Heading of the page's section on lost comparisons; the README links to it.
BEHIND = "Where dpo_kernels is behind"

#: The questions of the README, by benchmark: in words, and our row that answers them, from the first case.
QUESTIONS = {
    "logits_path": ("Loss and gradient from logits", "ours_inplace"),
    "linear_path": ("Loss and gradients from hidden states and LM head", "ours"),
    "trainer": ("Training step of SmolLM2-135M", "ours"),
}
GPU_COLUMNS = [
    Column("title", "method"),
    TIME,
    Column("times_floor", "time / floor", "ratio"),
    SLOWER,
    report.EXTRA,
    Column("verdict", "gradient"),
]


def _memory(row: dict[str, Any]) -> tuple[str, float | None]:
    """(what the row's memory figure is called, its bytes)."""
    return ("peak memory", row["peak_bytes"]) if "peak_bytes" in row else ("extra memory", row.get("extra_bytes"))


def _row(rows: Sequence[dict[str, Any]], peer: str) -> dict[str, Any] | None:
    """The method's row, if it was compared with a peer."""
    return next((row for row in rows if row.get("peer") == peer and row.get("vs_best")), None)


def _larger(folder: Path | None, name: str) -> list[dict[str, Any]]:
    """The first case of the same machine's run at larger shapes (`--sizes full`); empty without one."""
    path = folder.parent / "full" / folder.name / f"{name}.json" if folder else Path()
    return _first_case(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else []


def _answer(
    question: str, ours: dict[str, Any], rows: Sequence[dict[str, Any]], where: str, other: dict[str, Any] | None
) -> report.Answer:
    """A row of the README's table: our method against the fastest peer, and against the peer that needs least memory.

    where, other: another shape in words, and the same method's row at that shape.
    """
    said = f"{ours['title']}: {ours['vs_best']:.2f} times the speed of {ours['best_peer']}"
    verdict = _compare(ours["vs_best"], "faster", "slower", "as fast")
    if other:
        peer = "" if other["best_peer"] == ours["best_peer"] else f" that of {other['best_peer']}"
        said += f" ({where} {other['vs_best']:.2f} times{peer})"
        there = _compare(other["vs_best"], "faster", "slower", "as fast")
        verdict += f" ({there} {where})" if there != verdict else ""
    kind, mine = _memory(ours)
    others = [held for row in rows if not row["ours"] and row.get("median_s") and (held := _memory(row)[1]) is not None]
    if mine is not None and others:
        said += f"; {mine / 2**20:,.0f} MiB of {kind} (the least of a peer: {min(others) / 2**20:,.0f} MiB)"
        # The system counts pages in batches, so differences of less than a MiB mean nothing.
        ratio = max(min(others), 2**20) / max(mine, 2**20)
        verdict += f", {_compare(ratio, 'less memory', 'more memory', 'about as much memory')}"
    return question, said, verdict


def _compare(ratio: float, better: str, worse: str, same: str) -> str:
    return better if ratio > 1.1 else worse if ratio < 0.9 else same


def _first_case(found: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of a benchmark's first case, without peers that are missing or fail in it."""
    rows = [row for row in found["rows"] if row["case"] == found["rows"][0]["case"]]
    return [row for row in rows if not row.get("verdict", "").startswith(("missing", "fails"))]


def _gpu_name(calls: dict[str, Any], folder: str) -> str:
    name = gpu_summary.stage(calls, "environment").get("device", {}).get("name", folder)
    return str(name).removeprefix("NVIDIA ")


def _gpu_answer(calls: dict[str, Any], folder: str) -> Iterator[report.Answer]:
    """The step from logits at the session's first shape, by the fastest backend that was right in every case."""
    names = {f"ours_inplace ({backend})" for backend in gpu_summary.right_backends(calls)}
    tables = [rows for name, rows in gpu_summary.compared_tables(calls).values() if name == "gpu_logits_path"]
    mine = [[row for row in rows if row["name"] in names and "vs_best" in row] for rows in tables]
    if mine and mine[0]:
        ours = mine[0][0]  # the fastest row comes first
        smaller = next((row for rows in mine[1:] for row in rows if row["name"] == ours["name"]), None)
        question = f"{QUESTIONS['logits_path'][0]}, {_gpu_name(calls, folder)}"
        yield _answer(question, ours, tables[0], "at a smaller shape", smaller)


def latest(results: Path) -> Path | None:
    """The folder of the machine whose logits path was measured last; None without one."""

    def date(folder: Path) -> str:
        return json.loads((folder / "logits_path.json").read_text(encoding="utf-8"))["machine"]["date"]

    folders = [folder for folder in sorted(results.glob("*/")) if (folder / "logits_path.json").is_file()]
    return max(folders, key=date, default=None)


def _answers(results: Path) -> list[report.Answer]:
    folder = latest(results)
    answers = []
    for name, found in read(folder).items() if folder else ():
        if name in QUESTIONS:
            question, peer = QUESTIONS[name]
            rows = _first_case(found)
            if mine := _row(rows, peer):
                answers.append(
                    _answer(f"{question}, CPU", mine, rows, "at a larger shape", _row(_larger(folder, name), peer))
                )
    for name, calls in gpu_summary.sessions(results).items():
        answers += _gpu_answer(calls, name)
    return answers


def _places(results: Path) -> Iterator[tuple[str, list[report.Compared]]]:
    """For each machine, its short name and everything that was compared on it."""
    if folder := latest(results):
        yield "the CPU", compared((name, found.get("rows", ())) for name, found in read(folder).items())
    for name, calls in gpu_summary.sessions(results).items():
        yield f"the {_gpu_name(calls, name)}", compared(gpu_summary.compared_tables(calls).values())


def _behind(results: Path) -> str:
    """One sentence: the number of comparisons that we lose on each machine, and the worst ratio."""
    parts = []
    for place, everything in _places(results):
        if everything:
            lost = sum(row["vs_best"] < 1 for _, row in everything)
            worst = headline(everything)["said"]
            parts.append(f"in {lost} of {report.counted(len(everything), 'comparison')} on {place} (at worst {worst})")
    return f"dpo_kernels is behind the best peer {report.listed(parts)}" if parts else ""


def _measured(results: Path) -> str:
    """One sentence: the machines, dates and versions of the measurements."""
    folder = latest(results)
    parts = []
    if folder:
        machine = read(folder)["logits_path"]["machine"]
        parts.append(f"{report.place(machine)} ({machine['date']}, torch {machine['torch']})")
    for name, calls in gpu_summary.sessions(results).items():
        about = gpu_summary.stage(calls, "environment")
        versions = f"torch {about.get('torch')}, Triton {about.get('triton', 'not installed')}"
        parts.append(f"{_gpu_name(calls, name)} ({versions})")
    return (
        f"Measured on {report.listed(parts)}. Within a table all methods took turns in one run. A ratio is the "
        "median of the ratios within each round, so it can differ a little from the quotient of two median times."
    )


def render(results: Path = RESULTS) -> str:
    """The text between the README's markers, without the markers: at most 14 lines."""
    folder = latest(results)
    if folder is None:
        return ""
    panels = peers(folder)
    sources = "".join(
        f'<source media="{narrow}(prefers-color-scheme: {theme})" srcset="docs/charts/{_peers_file(theme, bool(narrow))}">'
        for narrow in ("(max-width: 600px) and ", "")
        for theme in ("dark", "light")
        if narrow or theme == "dark"
    )
    image = f'<img src="docs/charts/{_peers_file("light", False)}" alt="{alternative(panels)}">'
    lines = [f"<picture>{sources}{image}</picture>", "", *answer_table(_answers(results)), ""]
    more = f"All tables, and every reason: [docs/performance.md](docs/performance.md#{_anchor(BEHIND)})."
    return "\n".join([*lines, f"{_measured(results)} {_behind(results)}. {more}"])


def _anchor(heading: str) -> str:
    return heading.lower().replace(" ", "-")


def _peers_file(theme: str, narrow: bool) -> str:
    return f"peers-{'narrow-' if narrow else ''}{theme}.svg"


def peers(folder: Path) -> list[bars.Panel]:
    """The README's chart: time and memory of every method, for the first case of each path and of the trainer."""
    panels = []
    for name, found in read(folder).items():
        if name not in QUESTIONS:
            continue
        rows = sorted((row for row in _first_case(found) if row.get("median_s")), key=lambda row: row["median_s"])
        if rows:
            (panel,) = charts.bar_panels(report.Result(name, "", [], rows))
            heading = f"{QUESTIONS[name][0]} ({panel.heading.removesuffix(', loss and gradient')})"
            plain = [bars.Bar(bar.title, bar.ours, bar.values) for bar in panel.bars]
            panels.append(bars.Panel(heading, panel.columns, plain))
    return panels


def alternative(panels: Sequence[bars.Panel]) -> str:
    """A chart's figures in words: for each panel, our methods and the fastest other method."""
    parts = []
    for panel in panels:
        other = next((bar for bar in panel.bars if not bar.ours), None)
        said = []
        for bar in (bar for bar in panel.bars if bar.ours or bar is other):
            figures = []
            for column, value in zip(panel.columns, bar.values, strict=True):
                what, _, unit = column.rpartition(", ")
                figures += [f"{what} {value[1]} {unit}"] if value else []
            said.append(f"{bar.title}: {report.listed(figures)}")
        parts.append(f"{panel.heading}. {'; '.join(said)}")
    return f"Time and memory of dpo_kernels and of other methods. {'. '.join(parts)}.".replace('"', "")


def drawings(results: Path = RESULTS) -> dict[str, str]:
    """The charts of README and page as SVG, by file name."""
    found = {}
    if folder := latest(results):
        panels = peers(folder)
        for theme in ("light", "dark"):
            for narrow in (False, True):
                found[_peers_file(theme, narrow)] = bars.draw(
                    panels, theme=theme, narrow=narrow, title=alternative(panels)
                )
        for name, one in read(folder).items():
            if name in QUESTIONS and (panels := charts.bar_panels(report.restored(one))):
                found[f"{name}.svg"] = bars.draw(panels, title=alternative(panels[:1]))
    for name, calls in gpu_summary.sessions(results).items():
        panels = gpu_summary.panels(calls)
        found[f"{name}.svg"] = bars.draw(panels, title=alternative(panels[:1]))
    return found


def page(results: Path = RESULTS) -> str:
    """The text of docs/performance.md. Its links work in the repository and on the site, whose root is docs/."""
    folder = latest(results)
    if folder is None:
        return ""
    found = read(folder)
    lines = [
        "# Performance",
        "",
        "This page says how fast dpo_kernels and its trainer are, and how much memory they take, compared with other methods.",
        "",
    ]
    rows = [
        report.answer(f"{one['question']} (CPU)", one["rows"]) for one in found.values() if report.has_peer(one["rows"])
    ]
    gpus = gpu_summary.sessions(results)
    for name, calls in gpus.items():
        rows += [report.answer(f"{heading} ({_gpu_name(calls, name)})", table)
                 for heading, (_, table) in gpu_summary.compared_tables(calls).items() if report.has_peer(table)]  # fmt: skip
    lines += [*answer_table(rows), "", _measured(results), ""]
    lines += ["A peer is another way to the same result: PyTorch itself, TRL, Liger, Cut Cross-Entropy. [How it is measured]"
              "(benchmarks.md) says how times and memory are taken, and gives the commands.", ""]  # fmt: skip
    for one in found.values():
        if summary := report.restored(one).summary(one["rows"]):
            lines.append(f"* **{_title(one)}.** {summary}")
    lines += ["", "## Charts", ""]
    shown = [f"{name}.svg" for name in (*QUESTIONS, *gpus)]
    for file in (file for file in shown if file in drawings(results)):
        stem = file.removesuffix(".svg")
        title = _title(found[stem]) + ", CPU" if stem in found else _gpu_name(gpus[stem], stem)
        lines += [f"**{title}**", "", f"![{title}](charts/{file})", ""]
    lines += [f"## {BEHIND}", "", f"{_behind(results)}.", ""]
    lines += [f"* {sentence}" for _, everything in _places(results) for sentence in below_one(everything)]
    lines.append("")
    lines += [f"## Tables: {report.place(found['logits_path']['machine'])}", ""]
    for name in QUESTIONS:
        if name in found:
            result = report.restored(found[name])
            lines += [f"**{_title(found[name])}: {result.rows[0]['case']}**", ""]
            lines += [*markdown_table(result.columns, _first_case(found[name])), ""]
    lines += [f"More cases, and every figure: `{_path(folder)}`.", ""]
    for name, calls in gpus.items():
        lines += _gpu_part(name, calls, results)
    lines += _others(results, folder)
    return "\n".join(lines).rstrip() + "\n"


def _title(found: dict[str, Any]) -> str:
    return found["question"].partition(":")[0]


def _path(folder: Path) -> str:
    return str(folder.relative_to(ROOT)) if folder.is_relative_to(ROOT) else str(folder)


def _gpu_part(name: str, calls: dict[str, Any], results: Path) -> list[str]:
    lines = [f"## Tables: {_gpu_name(calls, name)}", ""]
    table = gpu_summary.stage(calls, "correctness").get("table", {})
    wrong = [f"{backend} {len(row['failed'])} of {row['cases']}" for backend, row in table.items() if row.get("failed")]
    if wrong:
        lines += [f"Test cases that were wrong in this measurement: {report.listed(wrong)}. [On a GPU](gpu.md) says what was "
                  "fixed. The gradients of the tables below were all compared with float64.", ""]  # fmt: skip
    lines += gpu_summary.bandwidth_table(calls)
    for heading, (_, rows) in gpu_summary.compared_tables(calls).items():
        if report.has_peer(rows):
            lines += [f"**{heading}**", "", *markdown_table(GPU_COLUMNS, rows), ""]
    lines += ["The floor of the tables from logits is the time of the necessary memory traffic alone. The floor of the tables "
              "from hidden states is the time of all matrix products alone. Every row, and what did not run: "
              f"`{_path(results / name)}`.", ""]  # fmt: skip
    return lines


def _others(results: Path, shown: Path) -> list[str]:
    """A table for each other folder of results, including those at larger shapes."""
    lines = []
    for path in sorted({*results.glob("*/*.json"), *results.glob("full/*/*.json")}):
        folder = path.parent
        if folder == shown or (folder / "results.json").is_file() or path != sorted(folder.glob("*.json"))[0]:
            continue
        found = read(folder)
        machine = next(iter(found.values()))["machine"]
        large = ", larger shapes" if folder.parent.name == "full" else ""
        lines += [f"## {report.place(machine)}{large}, {machine['date']}", ""]
        lines += [
            *answer_table(
                report.answer(f"{_title(one)}: {one['rows'][0]['case']}", one["rows"]) for one in found.values()
            ),
            "",
        ]
        lines += [f"* **{_title(one)}.** {report.restored(one).summary(one['rows'])}" for one in found.values()]
        lines += ["", f"Every figure: `{_path(folder)}`.", ""]
    return lines


def with_block(text: str, block: str, markers: tuple[str, str] = (BEGIN, END)) -> str:
    """The page's text with the block between its markers. Raises ValueError if a marker is missing or occurs twice."""
    begin, end = markers
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"the page must hold {begin} and {end} once each")
    before, rest = text.split(begin)
    after = rest.split(end)[1]
    return f"{before}{begin}\n{block}\n{end}{after}" if block else f"{before}{begin}\n{end}{after}"


def wanted(results: Path = RESULTS) -> dict[Path, str]:
    """Every file that is filled from the results, with the text that it should contain."""
    found = {README: with_block(README.read_text(encoding="utf-8"), render(results)), PAGE: page(results)}
    return found | {CHARTS / name: text for name, text in drawings(results).items()}


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--write", action="store_true", help="write README.md, docs/performance.md and docs/charts")
    action.add_argument("--check", action="store_true", help="exit 1 if one of them differs from the results")
    arguments = parser.parse_args()
    if not arguments.write and not arguments.check:
        print(render())
        return 0
    stale = [path for path, text in wanted().items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    for path in stale:
        if arguments.write:
            path.parent.mkdir(exist_ok=True)
            path.write_text(wanted()[path], encoding="utf-8")
        else:
            print(f"{path.relative_to(ROOT)} does not show the figures of benchmarks/results")
    if stale and arguments.check:
        print("run: python -m benchmarks.readme_table --write")
    return int(bool(stale) and arguments.check)


if __name__ == "__main__":
    sys.exit(main())
