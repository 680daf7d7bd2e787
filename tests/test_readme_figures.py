"""All figures in the README come from the committed results."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benchmarks import gpu_session, gpu_summary, readme_table, reasons, report, trust_page

PAGES = sorted([*report.RESULTS.glob("*/*.md"), *report.RESULTS.glob("full/*/*.md"), readme_table.PAGE])


@pytest.mark.parametrize("path", readme_table.wanted(), ids=lambda path: path.name)
def test_what_is_filled_from_the_results_shows_them(path: Path) -> None:
    assert path.read_text(encoding="utf-8") == readme_table.wanted()[path], (
        "run: python -m benchmarks.readme_table --write"
    )


@pytest.mark.parametrize("path", PAGES, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_a_page_opens_with_the_verdict_and_its_tables_have_six_columns_at_most(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    first = 4 if path == readme_table.PAGE else 2  # the documentation's page says first what it is for
    assert text.splitlines()[first] == "| question | result against the best peer | verdict |"
    assert max(line.count("|") - 1 for line in text.splitlines() if line.startswith("|")) <= 6
    for word in (
        "times ours",
        "over ours",
        "beside the",
        "nobody can avoid",
        "x floor",
        "so many times",
        "No reason is known yet.",
    ):
        assert word not in text, f"{path} is not in plain words"


@pytest.mark.parametrize(
    "path",
    [path for path in PAGES if path.with_suffix(".json").is_file()],
    ids=lambda path: f"{path.parent.name}-{path.stem}",
)
def test_a_page_shows_its_json(path: Path) -> None:
    found = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    assert path.read_text() == report.markdown(report.restored(found), found["machine"], f"{path.stem}.svg"), (
        f"run: python -m benchmarks.report {path.parent}"
    )


@pytest.mark.parametrize("name", gpu_summary.sessions(report.RESULTS))
def test_the_page_of_a_gpu_session_shows_its_json(name: str, tmp_path: Path) -> None:
    gpu_session.save(tmp_path, gpu_summary.sessions(report.RESULTS)[name])
    for file in tmp_path.iterdir():
        committed = report.RESULTS / name / file.name
        assert committed.read_text() == file.read_text(), f"run: python -m benchmarks.report {committed.parent}"


def test_the_readme_is_short_and_its_links_lead_somewhere() -> None:
    block = readme_table.render()
    assert len(block.splitlines()) <= 14
    links = re.findall(r'(?:srcset|src)="([^"]+)"', block) + re.findall(r"\]\(([^)]+)\)", block)
    assert len(links) == 5
    for link in links:
        path, _, anchor = link.partition("#")
        assert (readme_table.ROOT / path).is_file(), link
        if anchor:
            assert f"## {readme_table.BEHIND}" in (readme_table.ROOT / path).read_text()


def test_links_of_the_performance_page_stay_in_docs() -> None:
    links = re.findall(r"\]\(([^)]+)\)", readme_table.page())
    assert {"benchmarks.md", "gpu.md", "charts/logits_path.svg"} <= set(links)
    for link in links:
        assert not link.startswith((".", "/"))
        assert (readme_table.PAGE.parent / link).is_file(), link


@pytest.mark.parametrize(
    "path", sorted(report.RESULTS.glob("*/*.json")), ids=lambda path: f"{path.parent.name}-{path.stem}"
)
def test_every_committed_loss_against_a_peer_has_its_reason(path: Path) -> None:
    rows = json.loads(path.read_text(encoding="utf-8")).get("rows", [])
    lost = [row for _, row in report.compared([(path.stem, rows)]) if row["vs_best"] < 1]
    # The registry's reason counts, not that in the file, because a reason may be found after the measurement.
    unexplained = [row["select"] for row in lost if not reasons.explain(path.stem, row)]
    assert unexplained == [], "say why in benchmarks/reasons.py"


def test_readme_table_has_results_to_show() -> None:
    assert readme_table.render(), "no benchmarks/results/<machine>/logits_path.json: run make bench"


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A made-up machine with two rows."""
    machine = {
        "name": "m",
        "cpu": "Some CPU",
        "threads": 2,
        "instruction_set": "avx2",
        "torch": "2.13",
        "date": "2026-01-01",
    }
    row = {"case": "float32 [8, 128, 49152]", "part": "step", "median_s": 0.5, "verdict": "right", "ours": False}
    ours = {"peer": "ours_inplace", "title": "dpo_kernels", "ours": True, "median_s": 0.0625, "extra_bytes": 2**20}
    rows = [
        row | {"peer": "eager", "title": "eager PyTorch", "ours_faster": 8.0, "extra_bytes": 3 * 2**20},
        row | ours | {"vs_best": 8.0, "best_peer": "eager PyTorch", "times_floor": 1.25},
        {"case": row["case"], "part": "step", "peer": "trl_old", "title": "TRL", "verdict": "WRONG", "ours": False},
        {"case": row["case"], "part": "step", "peer": "gone", "title": "Gone", "verdict": "missing: pip install gone"},
        row | {"case": "bfloat16", "peer": "eager", "title": "another case's peer"},
    ]
    content = {
        "benchmark": "logits_path",
        "machine": machine,
        "question": "Logits path: how",
        "rows": rows,
        "notes": ["a note"],
    }
    folder, older = tmp_path / "m", tmp_path / "older"
    for place, about in ((folder, machine), (older, machine | {"cpu": "Another CPU", "date": "2025-12-31"})):
        place.mkdir()
        (place / "logits_path.json").write_text(json.dumps(content | {"machine": about}))
    trained = {
        "case": "pairs",
        "title": "dpo_trainer",
        "peer": "ours",
        "vs_best": 0.75,
        "best_peer": "TRL",
        "ours": True,
    }
    trained |= {"tokens_per_second": 1234.0, "peak_bytes": 3 * 2**20, "select": "test_trainer[ours]", "median_s": 2.0}
    trained |= {"memory_share": 1.5, "verdict": "agree"}
    theirs = {"case": "pairs", "title": "TRL", "peer": "trl", "ours": False, "median_s": 1.5, "peak_bytes": 2 * 2**20}
    content = content | {"benchmark": "trainer", "question": "Trainer: how", "rows": [trained, theirs], "notes": []}
    (folder / "trainer.json").write_text(json.dumps(content))
    full = tmp_path / "full" / "m"
    full.mkdir(parents=True)
    (full / "trainer.json").write_text(json.dumps(content | {"rows": [trained | {"vs_best": 1.75}, theirs]}))
    return tmp_path


def test_every_figure_of_the_readme_comes_from_the_json(results: Path) -> None:
    block = readme_table.render(results)
    for shown in (
        "Some CPU",
        "2026-01-01",
        "dpo_kernels: time 62.5 ms and extra memory 1 MiB; eager PyTorch: time 500 ms and extra memory 3 MiB",
        "| dpo_kernels: 8.00 times the speed of eager PyTorch; 1 MiB of extra memory (the least of a peer: 3 MiB)"
        " | faster, less memory |",
        "| dpo_trainer: 0.75 times the speed of TRL (at a larger shape 1.75 times); 3 MiB of peak memory"
        " (the least of a peer: 2 MiB) | slower (faster at a larger shape), more memory |",
        "behind the best peer in 1 of 2 comparisons on the CPU (at worst 0.75 times the speed of TRL)",
    ):
        assert shown in block
    # Only the first case of the machine that was measured last; links lead to the other results.
    for hidden in ("Another CPU", "another case's peer", "Gone", "a note"):
        assert hidden not in block


def test_every_figure_of_the_page_comes_from_the_json(results: Path) -> None:
    text = readme_table.page(results)
    for shown in (
        "| Logits path: how (CPU) | 8.00 times the speed of eager PyTorch | faster |",
        "| Trainer: how (CPU) | 0.75 times the speed of TRL | slower in 1 of 1 row |",
        "| eager PyTorch | 500 ms | - | 8.00x | 3 MiB | right |",
        "| **dpo_kernels** | 62.5 ms | 1.25x | - | 1 MiB | right |",
        "| TRL | - | - | - | - | WRONG |",
        "| **dpo_trainer** | 1,234 | 2 s | 0.75x | 3 MiB | agree |",
        "dpo_kernels is 8.0 times as fast as eager PyTorch; it takes 1.25 times as long as memory traffic alone.",
        "No reason is known yet.",
        "## Another CPU, 2 threads, avx2, 2025-12-31",
        "larger shapes",
    ):
        assert shown in text
    assert "Gone" not in text


def test_the_charts_hold_the_figures_of_the_json(results: Path) -> None:
    drawn = readme_table.drawings(results)
    assert set(drawn) == {
        *(f"peers-{kind}.svg" for kind in ("light", "dark", "narrow-light", "narrow-dark")),
        "logits_path.svg",
        "trainer.svg",
    }
    for chart in drawn.values():
        assert ">2<" in chart or ">62.5<" in chart
    assert ">62.5<" in drawn["peers-light.svg"]
    assert ">500<" in drawn["peers-narrow-dark.svg"]


def test_a_changed_figure_is_noticed(results: Path) -> None:
    text = f"# Title\n{readme_table.BEGIN}\n{readme_table.END}\nrest\n"
    filled = readme_table.with_block(text, readme_table.render(results))
    assert filled.endswith("rest\n")
    assert filled.startswith("# Title\n")
    assert readme_table.with_block(filled, readme_table.render(results)) == filled
    edited = filled.replace("8.00 times", "9.00 times")
    assert edited != filled
    assert readme_table.with_block(edited, readme_table.render(results)) != edited


def test_a_readme_without_markers_is_an_error() -> None:
    with pytest.raises(ValueError, match="benchmarks:begin"):
        readme_table.with_block("no markers", "block")


@pytest.mark.parametrize(
    ("kind", "value", "text"),
    [
        ("time", 2.5, "2.5 s"),
        ("time", 0.1284, "128 ms"),
        ("time", 0.0000123, "12.3 us"),
        ("ratio", 9.876, "9.88x"),
        ("ratio", 15.04, "15.0x"),
        ("percent", 0.123, "12.3 %"),
        ("bytes", 200 * 2**20, "200 MiB"),
    ],
)
def test_values_are_written_as_people_read_them(kind: str, value: float, text: str) -> None:
    assert report.Column("key", "heading", kind).write({"key": value}) == text


def test_a_missing_value_is_a_dash() -> None:
    assert report.Column("key", "heading", "time").write({}) == "-"


def test_the_page_on_trust_shows_the_committed_results() -> None:
    text = trust_page.PAGE.read_text(encoding="utf-8")
    assert text == readme_table.with_block(text, trust_page.render(), trust_page.MARKERS), (
        "run: python -m benchmarks.trust_page --write"
    )
