"""dpo-train: a whole run from files; every mistake of a user is answered with one clear line and exit code 2."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from dpo_trainer import ConfigError
from dpo_trainer.cli.main import main
from dpo_trainer.cli.settings import SWITCHES, check_setting, hints, read_settings
from dpo_trainer.settings.fields import DPOFields, RunSettings
from dpo_trainer.settings.rows import settings_table
from dpo_trainer.settings.table import HELP

SETTINGS = {
    "per_device_train_batch_size": 4,
    "max_steps": 4,
    "logging_steps": 1,
    "save_steps": 2,
    "learning_rate": "1e-3",  # text, because YAML reads 1e-3 as text
    "use_cpu": True,
    "write_report": False,  # here drawing would take longer than training
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pairs: Callable[..., Any], model_folder: Path) -> Path:
    """A folder with a config and two data files, as the working directory."""
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "train.jsonl", pairs(24))
    write_jsonl(tmp_path / "eval.jsonl", pairs(6, seed=1))
    config = {"model": str(model_folder), "train_data": "train.jsonl", "output_dir": "run", **SETTINGS}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    return tmp_path


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# --- runs ----------------------------------------------------------------------------------------------------------


def test_a_run_leaves_model_metrics_summary_and_report(here: Path, read_jsonl: Any) -> None:
    assert main(["config.yaml", "--eval_data", "eval.jsonl", "--eval_steps", "2", "--write_report", "true"]) == 0
    run = here / "run"
    assert {"config.json", "model.safetensors", "tokenizer.json", "metrics.jsonl", "summary.json", "report.html"} <= {
        path.name for path in run.iterdir()
    }
    assert (run / "checkpoint-2").is_dir()
    records = read_jsonl(run / "metrics.jsonl")
    assert [record["step"] for record in records if "loss" in record] == [1, 2, 3, 4]
    assert [record["step"] for record in records if "eval_loss" in record] == [0, 2, 4]
    summary = json.loads((run / "summary.json").read_text())
    assert summary["finished"]
    assert summary["steps"] == 4
    assert round(summary["first"]["loss"], 7) == 0.6931472
    assert summary["eval_last"]["loss"] < summary["eval_first"]["loss"]
    assert summary["changed_settings"]["learning_rate"] == 1e-3
    assert summary["pairs"] == {"train_dataset": 24, "eval_dataset": 6}


def test_the_command_line_wins_and_reaches_nested_keys(here: Path) -> None:
    words = "config.yaml --learning_rate=2e-3 --beta 0.5 --lora.r 4 --lora.target_modules [q_proj,v_proj] --bf16"
    settings, switches = read_settings([*words.split(), "--quiet"])
    assert settings["learning_rate"] == 2e-3
    assert settings["beta"] == 0.5
    assert settings["lora"] == {"r": 4, "target_modules": ["q_proj", "v_proj"]}
    assert settings["bf16"] is True
    assert switches == {"--quiet"}


def test_nested_keys_may_be_dotted_in_the_file_too(here: Path) -> None:
    config = yaml.safe_load((here / "config.yaml").read_text())
    (here / "dotted.yaml").write_text(
        yaml.safe_dump({**config, "lora.r": 4, "diagnostics.kl_level": None, "lora.lora_alpha": 8})
    )
    settings, _ = read_settings(["dotted.yaml", "--lora.r", "2"])
    assert settings["lora"] == {"r": 2, "lora_alpha": 8}
    assert settings["diagnostics"] == {"kl_level": None}


def test_a_list_in_several_words_is_told_how_to_be_written(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config.yaml", "--filters", "identical", "empty"]) == 2
    assert "'empty': expected --key value; a list is one word, '[a, b]'" in capsys.readouterr().err


def test_a_single_word_stands_for_a_list_of_one(here: Path) -> None:
    settings, _ = read_settings(
        ["config.yaml", "--filters", "identical", "--stop_on", "kl_exploding", "--loss_weights", "2"]
    )
    assert (settings["filters"], settings["stop_on"], settings["loss_weights"]) == (
        ["identical"],
        ["kl_exploding"],
        [2],
    )


def test_keys_of_lora_by_another_name_are_answered(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config.yaml", "--lora", "{lora_rank: 8}"]) == 2
    assert "lora.lora_rank: is called lora.r" in capsys.readouterr().err


def test_help_of_compare(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "--output" in shown
    assert "--beta" not in shown


def test_lora_saves_an_adapter(here: Path) -> None:
    assert (
        main(["config.yaml", "--lora.r", "4", "--lora.target_modules", "[q_proj]", "--max_steps", "1", "--quiet"]) == 0
    )
    assert (here / "run" / "adapter_config.json").exists()
    assert not (here / "run" / "model.safetensors").exists()


def test_resume_after_an_interruption_gives_the_uninterrupted_run(here: Path, read_jsonl: Any) -> None:
    assert main(["config.yaml", "--output_dir", "whole", "--quiet"]) == 0
    # The state after a kill at step 3: the checkpoint of step 2, metrics up to step 3, no summary.
    assert main(["config.yaml", "--quiet"]) == 0
    run = here / "run"
    for name in ("summary.json", "model.safetensors", "config.json"):
        (run / name).unlink()
    for path in sorted((run / "checkpoint-4").iterdir()):
        path.unlink()
    (run / "checkpoint-4").rmdir()
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join([*lines[:3], lines[3][:20]]))
    assert main(["config.yaml", "--resume", "--quiet"]) == 0
    curves = [[record["loss"] for record in read_jsonl(here / name / "metrics.jsonl")] for name in ("whole", "run")]
    assert len(curves[0]) == 4
    assert curves[1] == curves[0]


def test_overwrite_removes_the_old_run_and_nothing_else(here: Path) -> None:
    assert main(["config.yaml", "--quiet"]) == 0
    (here / "run" / "notes.txt").write_text("mine")
    assert main(["config.yaml", "--max_steps", "1", "--overwrite", "--quiet"]) == 0
    assert (here / "run" / "notes.txt").read_text() == "mine"
    assert not (here / "run" / "checkpoint-4").exists()
    assert json.loads((here / "run" / "summary.json").read_text())["steps"] == 1


def test_a_bad_run_with_overwrite_throws_nothing_away(here: Path) -> None:
    assert main(["config.yaml", "--max_steps", "1", "--quiet"]) == 0
    before = tree(here)
    assert main(["config.yaml", "--overwrite", "--train_data", "none.jsonl"]) == 2
    assert tree(here) == before


def test_dropped_pairs_are_accounted_for(here: Path, pairs: Any, capsys: pytest.CaptureFixture[str]) -> None:
    rows = pairs(10)
    rows[3]["rejected"] = rows[3]["chosen"]
    write_jsonl(here / "train.jsonl", rows)
    assert main(["config.yaml", "--max_steps", "1"]) == 0
    summary = json.loads((here / "run" / "summary.json").read_text())
    assert summary["data"][0].startswith("train_dataset: 9 of 10 pairs kept")
    assert "1 with chosen equal to rejected" in summary["data"][0]


def test_progress_off_a_terminal_is_a_few_whole_lines(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config.yaml", "--eval_data", "eval.jsonl", "--eval_steps", "4"]) == 0
    shown = capsys.readouterr().err
    assert "\r" not in shown
    assert "step     0  eval: loss 0.6931" in shown
    assert "step     4  trained in" in shown
    assert len(shown.splitlines()) <= 14


def test_json_is_all_that_stands_on_standard_output(
    here: Path, read_jsonl: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "chatty.py").write_text(
        "def judge(prompts, completions):\n    print('judging')\n    return [len(c) for c in completions]\n"
    )
    monkeypatch.setattr(sys, "path", list(sys.path))
    words = "--json --eval_data eval.jsonl --eval_steps 2 --sample_prompts 2 --sample_max_new_tokens 3"
    assert main(["config.yaml", *words.split(), "--win_rate_scorer", "chatty:judge"]) == 0
    shown = capsys.readouterr()
    lines = [json.loads(line) for line in shown.out.splitlines()]
    kinds = [line.pop("type") for line in lines]

    def of(kind: str) -> list[dict[str, Any]]:
        return [line for line, its in zip(lines, kinds, strict=True) if its == kind]

    run = here / "run"
    assert of("log") == read_jsonl(run / "metrics.jsonl")
    assert of("event") == read_jsonl(run / "events.jsonl") != []
    assert of("sample") == read_jsonl(run / "samples.jsonl")
    assert [line["step"] for line in of("sample")] == [0] * 4 + [2] * 2 + [4] * 2
    at = [
        (kind, line["step"]) for kind, line in zip(kinds, lines, strict=True) if "eval_loss" in line or kind == "sample"
    ]
    assert at == [("log", 0), *[("sample", 0)] * 4, ("log", 2), *[("sample", 2)] * 2, ("log", 4), *[("sample", 4)] * 2]
    assert of("summary") == [json.loads((run / "summary.json").read_text())]
    assert kinds[-1] == "summary"
    assert "judging" in shown.err
    assert "\r" not in shown.err


def test_quiet_prints_nothing_and_json_stays(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config.yaml", "--max_steps", "1", "--quiet"]) == 0
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", "")
    assert main(["config.yaml", "--max_steps", "1", "--quiet", "--json", "--overwrite"]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    assert [json.loads(line)["type"] for line in shown.out.splitlines()][-1] == "summary"


# --- mistakes: the table is test_mistakes.py -----------------------------------------------------------------------


def test_the_process_exits_with_2_and_no_traceback(here: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "dpo_trainer.cli", "config.yaml", "--betta", "1"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr == "dpo-train: unknown setting 'betta' (did you mean 'beta'?)\n"
    assert not (here / "run").exists()


# --- types ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "wanted"),
    [
        ("learning_rate", "1e-5", 1e-5),
        ("learning_rate", 1, 1.0),
        ("max_steps", "7", 7),
        ("max_length", None, None),
        ("loss_type", "ipo", "ipo"),
        ("loss_type", ["sigmoid", "ipo"], ["sigmoid", "ipo"]),
        ("loss_weights", [1, "0.5"], [1.0, 0.5]),
        ("report_to", "tensorboard", "tensorboard"),
        ("eval_strategy", "steps", "steps"),
        ("save_strategy", False, "no"),
        ("lr_scheduler_kwargs", {"min_lr": 1}, {"min_lr": 1}),
        ("model_init_kwargs", {1: True, "a": "1"}, {1: True, "a": "1"}),
        ("model", 7, "7"),
    ],
)
def test_values_come_in_the_type_of_their_setting(key: str, value: Any, wanted: Any) -> None:
    found = check_setting(key, value, hints())
    assert found == wanted
    assert type(found) is type(wanted)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("max_steps", True),
        ("bf16", 1),
        ("learning_rate", None),
        ("beta", [1]),
        ("loss_weights", [True]),
        ("model", b"hi"),
        ("stop_on", {"kl_exploding"}),
        ("optim", False),
    ],
)
def test_values_of_another_type_are_refused(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"{key}: expected "):
        check_setting(key, value, hints())


def test_help_shows_the_settings_that_people_set_in_sections(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    settings = shown.partition("\nSwitches:\n")[0]
    assert re.findall(r"^  --(\w+) ", settings, re.MULTILINE) == [name for names in HELP.values() for name in names]
    for title in HELP:
        assert f"\n{title}:\n" in shown
    assert 10 <= len(HELP["Start here"]) <= 14
    for word in ("dpo-train inspect [CONFIG.yaml]", "dpo-train compare RUN RUN", "--model ./my-model", *SWITCHES):
        assert word in shown
    assert "pairs. [1.0]" in " ".join(shown.split())
    assert max(map(len, shown.splitlines())) <= 120


def test_help_all_shows_every_setting_those_of_transformers_last(capsys: pytest.CaptureFixture[str]) -> None:
    own = [row for row in settings_table().values() if row.group]
    assert main(["--help-all"]) == 0
    shown = capsys.readouterr().out
    ours, title, theirs = shown.partition("\nOther settings of transformers.TrainingArguments:\n")
    assert title
    assert "--dataloader_num_workers " in theirs
    for row in own:
        assert f"  --{row.name} " in ours
        assert row.help.split()[0] in ours
    assert {row.name for row in own} >= {
        field.name for part in (RunSettings, DPOFields) for field in dataclasses.fields(part)
    }
    assert max(map(len, shown.splitlines())) <= 120
