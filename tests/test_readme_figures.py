"""The README's figures are those of the committed results, and of nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import readme_table, reasons, report, trust_page


def test_readme_shows_the_committed_results() -> None:
    text = readme_table.README.read_text(encoding="utf-8")
    wanted = readme_table.with_block(text, readme_table.render())
    assert text == wanted, "run: python -m benchmarks.readme_table --write"


@pytest.mark.parametrize(
    "path", sorted(report.RESULTS.glob("*/*.json")), ids=lambda path: f"{path.parent.name}-{path.stem}"
)
def test_every_committed_loss_against_a_peer_has_its_reason(path: Path) -> None:
    rows = json.loads(path.read_text(encoding="utf-8")).get("rows", [])
    lost = [row for _, row in report.compared([(path.stem, rows)]) if row["vs_best"] < 1]
    # The reason may have been found after the measurement: the registry counts, not the file.
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
    row = {"case": "float32 [8, 128, 49152]", "part": "step", "median_s": 0.5, "verdict": "right"}
    ours = {"peer": "ours", "title": "dpo_kernels", "ours": True, "median_s": 0.0625, "extra_bytes": 2**20}
    rows = [
        row | {"peer": "eager", "title": "eager PyTorch", "ours_faster": 8.0},
        row | ours | {"vs_best": 8.0, "best_peer": "eager PyTorch"},
        {"case": row["case"], "part": "step", "peer": "trl_old", "title": "TRL", "verdict": "WRONG"},
        {"case": row["case"], "part": "step", "peer": "gone", "title": "Gone", "verdict": "missing: pip install gone"},
        row | {"case": "bfloat16", "peer": "eager", "title": "another case's peer"},
    ]
    content = {"machine": machine, "question": "Logits path: how", "rows": rows, "notes": ["a note"]}
    folder, older = tmp_path / "m", tmp_path / "older"
    for place, about in ((folder, machine), (older, machine | {"cpu": "Another CPU", "date": "2025-12-31"})):
        place.mkdir()
        found = content | {"machine": about, "summary": "bfloat16: 2.36 times the floor."}
        (place / "logits_path.json").write_text(json.dumps(found))
    trained = {"case": "pairs", "title": "dpo_trainer", "peer": "ours", "vs_best": 0.75, "best_peer": "TRL"}
    trained |= {"tokens_per_second": 1234.0, "peak_bytes": 3 * 2**20, "select": "test_trainer[ours]"}
    content = {"machine": machine, "question": "Trainer: how", "rows": [trained], "notes": []}
    (folder / "trainer.json").write_text(json.dumps(content))
    return tmp_path


def test_every_figure_comes_from_the_json(results: Path) -> None:
    block = readme_table.render(results)
    for shown in (
        "Some CPU",
        "2026-01-01",
        "| eager PyTorch | 500 ms | - | 8.00x | right |",
        "| **dpo_kernels** | 62.5 ms | 1 MiB | - | right |",
        "| TRL | - | - | - | WRONG |",
        "* **Logits path.** bfloat16: 2.36 times the floor.",
        "| dpo_trainer | 1,234 | 3 MiB |",
        "over 2 rows: 0.75x (trainer: dpo_trainer against TRL, pairs); 1 below 1.0",
        "NOT EXPLAINED",
        "[older](benchmarks/results/older)",
    ):
        assert shown in block
    # One machine, the one measured last; its first case; who was there. The rest is a link away.
    for hidden in ("Another CPU", "another case's peer", "Gone", "a note"):
        assert hidden not in block


def test_a_changed_figure_is_noticed(results: Path) -> None:
    text = f"# Title\n{readme_table.BEGIN}\n{readme_table.END}\nrest\n"
    filled = readme_table.with_block(text, readme_table.render(results))
    assert filled.endswith("rest\n")
    assert filled.startswith("# Title\n")
    assert readme_table.with_block(filled, readme_table.render(results)) == filled
    edited = filled.replace("62.5 ms", "52.5 ms")
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
