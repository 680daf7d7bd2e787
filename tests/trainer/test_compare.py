"""`dpo-train compare`, and the report's parts about single pairs and diagnoses."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import dpo_trainer
from dpo_trainer.cli.main import main
from dpo_trainer.report.compare import compare
from dpo_trainer.run_folder.records import json_line
from dpo_trainer.watch.evaluated import look_at

from .tiny import build_pairs, build_trainer


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two finished runs, "slow" and "fast"; the tests only read it."""
    folder = tmp_path_factory.mktemp("runs")
    for name, rate in (("slow", 1e-4), ("fast", 1e-3)):
        evaluation = {"eval_dataset": build_pairs(10, seed=1), "eval_strategy": "steps", "eval_steps": 3}
        trainer = build_trainer(folder / name, **evaluation, learning_rate=rate, max_steps=6, write_report=True)
        trainer.train()
    return folder


def test_two_runs_on_one_page_and_in_one_table(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "both.html"
    assert main(["compare", str(runs / "slow"), str(runs / "fast"), "--output", str(output)]) == 0
    shown = capsys.readouterr().out
    header, *rows = shown.splitlines()
    assert header.split() == ["slow", "fast"]
    records = [json.loads(line) for line in (runs / "fast" / "metrics.jsonl").read_text().splitlines()]
    last = [record["eval_loss"] for record in records if "eval_loss" in record][-1]
    (held_out,) = [row for row in rows if row.startswith("held-out loss")]
    assert f" {last:.4f} ± " in held_out
    assert held_out.endswith(" *"), "the better one, by more than the errors"
    assert "learning_rate" in shown
    page = output.read_text()
    assert "http" not in page.replace("http://www.w3.org", "")
    assert page.count("<svg") >= 5
    assert "learning_rate" in page
    assert "0.0001" in page
    for name in ("slow", "fast"):
        assert f">{name}</text>" in page, "every curve has its label"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["{slow}"], "give 2 to 8 folders of runs, got 1"),
        (["{slow}", "{slow}"], "the same folder was given twice"),
        (["{slow}", "nowhere"], "'nowhere': holds no run"),
        (["{slow}", "{fast}", "--sort"], "unknown option '--sort'"),
        (["{slow}", "{fast}", "--output"], "--output: a value is missing"),
    ],
)
def test_mistakes_get_one_line(
    words: list[str], said: str, runs: Path, tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names = {"slow": str(runs / "slow"), "fast": str(runs / "fast")}
    assert main(["compare", *(word.format(**names) for word in words)]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert said in line
    assert not list(tmp_path.iterdir())


def test_settings_of_dpo_train_and_the_whole_run_s_throughput_are_compared(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [shutil.copytree(runs / name, tmp_path / name) for name in ("slow", "fast")]
    for folder, rank in zip(folders, (4, 8), strict=True):
        (folder / "settings.json").write_text(json.dumps({"model": "same", "lora": {"r": rank}}))
    assert main(["compare", *map(str, folders), "--output", str(tmp_path / "both.html")]) == 0
    (row,) = [row for row in capsys.readouterr().out.splitlines() if row.startswith("tokens/s")]
    rates = [json.loads((folder / "summary.json").read_text())["tokens_per_second"] for folder in folders]
    assert row.split()[1:] == [f"{rate:,.0f}" for rate in rates]
    page = (tmp_path / "both.html").read_text()
    assert ">lora<" in page
    assert ">model<" not in page, "which is the same in both"


def test_the_page_is_in_the_first_run_s_folder(runs: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    folders = [str(shutil.copytree(runs / name, tmp_path / name)) for name in ("slow", "fast")]
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert main(["compare", *folders]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith(str(tmp_path / "slow" / "comparison.html"))
    assert (tmp_path / "slow" / "comparison.html").exists()
    assert not list((tmp_path / "here").iterdir())


def test_a_difference_within_errors_has_no_star(runs: Path, tmp_path: Path) -> None:
    folders = [str(shutil.copytree(runs / "slow", tmp_path / name)) for name in ("a", "b")]
    path = tmp_path / "b" / "metrics.jsonl"
    path.write_text(re.sub(r'"eval_loss": 0\.(\d)', r'"eval_loss": 0.5', path.read_text()))
    told: list[str] = []
    compare(folders, tell=told.append)
    assert "held-out loss" in told[0]
    assert re.search(r"^held-out loss .* \*$", told[0], re.MULTILINE), "far apart"
    path.write_text(re.sub(r'"eval_loss_se": [\d.]+', '"eval_loss_se": 0.2', path.read_text()))
    compare(folders, tell=told.append)
    assert "*" not in told[1]


def test_a_run_that_failed_is_not_the_best(runs: Path, tmp_path: Path) -> None:
    folders = [shutil.copytree(runs / name, tmp_path / name) for name in ("slow", "fast")]
    told: list[str] = []
    compare([str(folder) for folder in folders], tell=told.append)
    event = {"step": 1, "name": "not_finite", "title": "x", "seen": "y", "remedy": "z"}
    (folders[1] / "events.jsonl").write_text(json_line(event))
    compare([str(folder) for folder in folders], tell=told.append)
    assert "*" in told[0]
    assert "*" not in told[1]
    assert re.search(r"^verdict .* failed$", told[1], re.MULTILINE)


def test_data_that_differ_are_told_and_nothing_is_best(runs: Path, tmp_path: Path) -> None:
    folders = [shutil.copytree(runs / name, tmp_path / name) for name in ("slow", "fast")]
    for folder, digest in zip(folders, ("a" * 64, "b" * 64), strict=True):
        settings = {"eval_data": "eval.jsonl", "data_sha256": {"eval_data 'eval.jsonl'": digest}}
        (folder / "settings.json").write_text(json.dumps(settings))
    told: list[str] = []
    compare([str(folder) for folder in folders], tell=told.append)
    assert re.search(r"eval_data +eval.jsonl \(SHA-256 aaaaaaaaaaaa\) +eval.jsonl \(SHA-256 bbbbbbbbbbbb\)", told[0])
    assert "The runs were evaluated on different data" in told[0]
    assert "*" not in told[0]


def copies(runs: Path, tmp_path: Path) -> list[Path]:
    return [shutil.copytree(runs / name, tmp_path / name) for name in ("slow", "fast")]


def table_of(folders: list[Path]) -> str:
    told: list[str] = []
    compare([str(folder) for folder in folders], tell=told.append)
    return told[0]


@pytest.mark.parametrize("changed", [{"loss_type": "ipo"}, {"beta": 0.5}, {"label_smoothing": 0.3}])
def test_losses_of_different_objectives_have_no_star(runs: Path, tmp_path: Path, changed: dict[str, Any]) -> None:
    folders = copies(runs, tmp_path)
    path = folders[0] / "summary.json"
    summary = json.loads(path.read_text())
    path.write_text(json.dumps({**summary, "changed_settings": {**summary["changed_settings"], **changed}}))
    told = table_of(folders)
    assert "The runs have different objectives, so their losses cannot be compared." in told
    assert not re.search(r"^held-out loss .* \*$", told, re.MULTILINE)


def test_a_run_that_is_not_finished_is_compared_by_the_file_that_it_evaluates(runs: Path, tmp_path: Path) -> None:
    folders = copies(runs, tmp_path)
    for folder in folders:
        settings = {"eval_data": "eval.jsonl", "data_sha256": {"eval_data 'eval.jsonl'": "a" * 64}}
        (folder / "settings.json").write_text(json.dumps(settings))
    (folders[0] / "summary.json").unlink()
    told = table_of(folders)
    assert "different data" not in told
    assert re.search(r"^held-out loss .* \*$", told, re.MULTILINE)


def test_a_run_whose_settings_are_not_known_says_so(runs: Path, tmp_path: Path) -> None:
    folders = copies(runs, tmp_path)
    (folders[0] / "summary.json").unlink()
    told = table_of(folders)
    assert "The evaluation data of some runs are unknown" in told
    assert re.search(r"^learning_rate +not known +0.001$", told, re.MULTILINE)
    (folders[0] / "summary.json").write_text('{"steps": 6}')  # of another version
    assert re.search(r"^verdict +not known ", table_of(folders), re.MULTILINE)


def test_a_last_loss_that_is_not_finite_is_not_replaced_by_an_earlier_one(runs: Path, tmp_path: Path) -> None:
    folders = copies(runs, tmp_path)
    path = folders[0] / "metrics.jsonl"
    last = re.findall(r'"eval_loss": [\d.]+', path.read_text())[-1]
    path.write_text(path.read_text().replace(last, '"eval_loss": null'))
    assert re.search(r"^held-out loss +- ", table_of(folders), re.MULTILINE)


def test_the_page_may_go_into_a_folder(runs: Path, tmp_path: Path) -> None:
    assert compare([str(runs / "slow"), str(runs / "fast")], tmp_path, str) == tmp_path / "comparison.html"


def test_the_table_needs_neither_torch_nor_matplotlib(runs: Path, tmp_path: Path) -> None:
    """The package's __init__ is skipped, because it imports the trainer."""
    script = f"""
import sys, types
package = types.ModuleType("dpo_trainer")
package.__path__ = [{str(Path(dpo_trainer.__file__).parent)!r}]
sys.modules["dpo_trainer"] = package
from pathlib import Path
from dpo_trainer.report.compare import compare
def tell(table):
    print(table)
    print("loaded:", sorted({{"torch", "transformers", "pandas", "numpy", "matplotlib"}} & set(sys.modules)))
compare([{str(runs / "slow")!r}, {str(runs / "fast")!r}], Path({str(tmp_path / "page.html")!r}), tell)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    assert "held-out loss" in done.stdout
    assert done.stdout.endswith("loaded: []\n")


def test_hardest_and_most_improved_pairs_are_those_of_the_evaluation(tmp_path: Path) -> None:
    pairs = build_pairs(10, seed=1)
    trainer = build_trainer(tmp_path / "run", eval_dataset=pairs, learning_rate=1e-3, max_steps=6, write_report=True)
    trainer.train()
    trainer.evaluate()
    found = trainer.evaluated["eval"]
    # Each margin of the policy is equal to the margin from an evaluation of that pair alone.
    for index in (0, 7):
        batch = trainer._prepare_inputs(trainer.data_collator([trainer.eval_dataset[index]]))
        with torch.no_grad():
            alone = trainer.pair_loss(batch, torch.ones(1))
        assert found.after[index] == pytest.approx((alone.chosen_logps - alone.rejected_logps).item(), abs=1e-4)
        assert found.before[index] == pytest.approx(
            (alone.ref_chosen_logps - alone.ref_rejected_logps).item(), abs=1e-4
        )
    gains = sorted(
        (after - before, index) for index, (before, after) in enumerate(zip(found.before, found.after, strict=True))
    )
    hard = sorted((margin, index) for index, margin in enumerate(found.after) if margin < 0)
    assert [example.after for example in found.hardest] == [margin for margin, _ in hard[:4]]
    assert [example.chosen for example in found.hardest] == [pairs[index]["chosen"].strip() for _, index in hard[:4]]
    assert [example.rejected for example in found.improved] == [
        pairs[index]["rejected"].strip() for _, index in gains[::-1][:4]
    ]
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Most improved pairs" in page
    assert "Margins before and after" in page


def test_texts_are_escaped_and_diagnoses_shown(tmp_path: Path) -> None:
    rows = [{**row, "chosen": row["chosen"] + " <b>&"} for row in build_pairs(6, seed=1)]
    trainer = build_trainer(tmp_path / "run", eval_dataset=rows, max_steps=1, write_report=True)
    trainer.train()
    event = {"step": 1, "name": "x", "title": "A thing", "seen": "was <seen>", "remedy": "do something"}
    with (tmp_path / "run" / "events.jsonl").open("a") as file:
        file.write(json_line(event))
    trainer.evaluate()
    page = (tmp_path / "run" / "report.html").read_text()
    assert "&lt;b&gt;&amp;" in page
    assert "<b>&" not in page
    assert "was &lt;seen&gt;" in page
    assert "do something" in page


def test_no_pairs_where_rows_and_outputs_do_not_correspond(tmp_path: Path) -> None:
    trainer = build_trainer(tmp_path / "run", eval_dataset=build_pairs(6, seed=1), max_steps=1)
    trainer.evaluate()
    batch = trainer._prepare_inputs(trainer.data_collator([trainer.eval_dataset[0]]))
    with torch.no_grad():
        output = trainer.pair_loss(batch, torch.ones(1))
    assert look_at(output, trainer.eval_dataset, trainer.processing_class) is None
    assert look_at(output, object(), trainer.processing_class) is None


def test_runs_whose_losses_all_end_in_nan_are_compared(tmp_path: Path) -> None:
    for name in ("a", "b"):
        folder = tmp_path / name
        folder.mkdir()
        records = [{"step": 0, "eval_loss": 0.69}, {"step": 1, "loss": 0.6}, {"step": 2, "eval_loss": None}]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    told: list[str] = []
    compare([str(tmp_path / "a"), str(tmp_path / "b")], tell=told.append)
    assert "0.6900 at step 0" in told[0]
