"""The README's figures are those of the committed results, and of nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import readme_table, report


def test_readme_shows_the_committed_results() -> None:
    text = readme_table.README.read_text(encoding="utf-8")
    wanted = readme_table.with_block(text, readme_table.render())
    assert text == wanted, "run: python -m benchmarks.readme_table --write"


@pytest.mark.parametrize(
    "path", sorted(report.RESULTS.glob("*/*.json")), ids=lambda path: f"{path.parent.name}-{path.stem}"
)
def test_every_committed_loss_against_a_peer_has_its_reason(path: Path) -> None:
    rows = json.loads(path.read_text(encoding="utf-8")).get("rows", [])
    unexplained = [row["title"] for row in rows if row.get("vs_best", 1) < 1 and not row.get("explanation")]
    assert unexplained == []


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
    rows = [
        row | {"peer": "eager", "title": "eager PyTorch"},
        row | {"peer": "ours", "title": "dpo_kernels", "median_s": 0.0625, "vs_eager": 8.0, "extra_bytes": 2**20},
        {
            "case": row["case"],
            "part": "step",
            "peer": "trl_old",
            "title": "TRL",
            "verdict": "WRONG",
            "gradient_error": 0.17,
        },
    ]
    folder = tmp_path / "m"
    folder.mkdir()
    rows[1] |= {"vs_best": 8.0, "best_peer": "eager PyTorch"}
    content = {"machine": machine, "question": "Logits path: how", "rows": rows, "notes": ["a note", "Bar: none"]}
    (folder / "logits_path.json").write_text(json.dumps(content))
    older = tmp_path / "older"
    older.mkdir()
    content = content | {"machine": machine | {"cpu": "Another CPU", "date": "2025-12-31"}}
    (older / "logits_path.json").write_text(json.dumps(content))
    trained = {"case": "pairs", "title": "dpo_trainer", "peer": "ours", "vs_best": 0.75, "best_peer": "TRL"}
    trained |= {"tokens_per_second": 1234.0, "memory_share": 0.625}
    content = {"machine": machine, "question": "Trainer: how", "rows": [trained], "notes": ["another note"]}
    (folder / "trainer.json").write_text(json.dumps(content))
    return tmp_path


def test_every_figure_comes_from_the_json(results: Path) -> None:
    block = readme_table.render(results)
    for shown in (
        "Some CPU",
        "2026-01-01",
        "500 ms",
        "62.5 ms",
        "8.00x",
        "1 MiB",
        "WRONG",
        "1.7e-01",
        "* a note",
        "* another note",
        "1,234",
        "62.5 %",
        "over 2 rows: 0.75x (trainer: dpo_trainer against TRL, pairs); 1 below 1.0",
        "NOT EXPLAINED",
        "[older](benchmarks/results/older)",
    ):
        assert shown in block
    assert "Bar: " not in block
    # One machine, the one measured last.
    assert "Another CPU" not in block


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
