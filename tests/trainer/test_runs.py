"""No run is lost: what a killed, damaged, doubled, interrupted or spoilt run leaves, and what the same command makes of it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from dpo_trainer.cli import main

SETTINGS = {
    "max_steps": 6,
    "save_steps": 2,
    "per_device_train_batch_size": 2,
    "logging_steps": 1,
    "learning_rate": 1.0e-3,
    "lr_scheduler_type": "constant",
    "use_cpu": True,
    "write_report": False,
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pairs: Callable[..., Any], model_folder: Path) -> Path:
    """A folder with a config and its data, as the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs(24)))
    config = {"model": str(model_folder), "train_data": "train.jsonl", "output_dir": "run", **SETTINGS}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    return tmp_path


def steps(run: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]


# --- killed after the last step ------------------------------------------------------------------------------------


def test_a_run_killed_before_its_final_save_takes_no_step_more(here: Path) -> None:
    run = here / "run"
    assert main(["config.yaml", "--quiet"]) == 0
    weights, records = (run / "model.safetensors").read_bytes(), (run / "metrics.jsonl").read_bytes()
    for name in ("model.safetensors", "summary.json", "README.md"):
        (run / name).unlink()
    assert main(["config.yaml", "--quiet"]) == 0
    assert (run / "model.safetensors").read_bytes() == weights == (run / "checkpoint-6/model.safetensors").read_bytes()
    assert (run / "metrics.jsonl").read_bytes() == records
    assert json.loads((run / "summary.json").read_text())["steps"] == 6
    assert "step" in (run / "README.md").read_text()
    assert not (run / "checkpoint-7").exists()


def test_a_summary_is_there_only_when_the_model_is(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that ends in the middle of its final save is not taken for a finished one."""
    from dpo_trainer import trainer

    def fail(*_: Any) -> None:
        raise ValueError("as a kill would")

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "write_card", fail)
        with pytest.raises(ValueError, match="as a kill would"):
            main(["config.yaml", "--quiet"])
    assert not (here / "run/summary.json").exists()
    assert main(["config.yaml", "--quiet"]) == 0
    assert (here / "run/summary.json").exists()
    assert steps(here / "run") == [1, 2, 3, 4, 5, 6]


def test_a_run_stopped_by_a_diagnosis_and_killed_stays_stopped(here: Path) -> None:
    stop = ["--diagnostics.kl_level", "1e-9", "--stop_on", "[kl_exploding]"]
    assert main(["config.yaml", "--quiet", *stop]) == 0
    run = here / "run"
    stopped_at = json.loads((run / "summary.json").read_text())["steps"]
    assert 0 < stopped_at < 6
    (run / "summary.json").unlink()
    assert main(["config.yaml", "--quiet", *stop]) == 0
    assert json.loads((run / "summary.json").read_text())["steps"] == stopped_at
    # Asked to go on, a finished run does.
    assert main(["config.yaml", "--quiet", *stop, "--resume"]) == 0
    assert steps(run) == [1, 2, 3, 4, 5, 6]


DAMAGED = (
    b'\x00\xff{"step": 1}\n{}\nnull\n[1]\n{"step": "two"}\n{"step": 1}\n{"step": 1, "loss": null}\n{"step": 2, "lo'
)


@pytest.mark.parametrize("name", ["metrics.jsonl", "events.jsonl", "samples.jsonl"])
def test_damaged_records_do_not_stop_a_resume(here: Path, name: str) -> None:
    words = "--quiet --eval_data train.jsonl --eval_steps 3 --sample_prompts 2 --sample_max_new_tokens 2 --write_report true"
    assert main(["config.yaml", *words.split(), "--max_steps", "2"]) == 0
    (here / "run" / name).write_bytes(DAMAGED)
    assert main(["config.yaml", *words.split(), "--max_steps", "3", "--resume"]) == 0
    assert json.loads((here / "run/summary.json").read_text())["steps"] == 3
    assert "<svg" in (here / "run/report.html").read_text()
