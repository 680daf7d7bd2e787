"""The same command continues a run that was killed, damaged, started twice or interrupted, or whose weights are not finite."""

import copy
import getpass
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import TrainerCallback

from dpo_trainer import ConfigError, DPOConfig, OutputError, progress
from dpo_trainer.cli.main import main
from dpo_trainer.run_folder.checkpoints import checkpoints, fault, sound_checkpoint
from dpo_trainer.settings import pace

from . import forked, tiny
from .test_kills import record

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
    """A run that ends during its final save does not count as finished."""
    from dpo_trainer import run_trainer

    def fail(*_: Any) -> None:
        raise ValueError("as a kill would")

    with monkeypatch.context() as patch:
        patch.setattr(run_trainer, "write_card", fail)
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
    # A finished run continues if the command asks for it.
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


# --- the lock ------------------------------------------------------------------------------------------------------


def pause(folder: str) -> None:
    """Wait in the middle of a step until the file `go` exists."""

    def wait(*_: Any, **__: Any) -> None:
        Path(folder, "waiting").touch()
        while not Path(folder, "go").exists():
            time.sleep(0.01)

    forked.at("computing", 3, wait)


def wait_for(path: Path) -> None:
    for _ in range(6000):
        if path.exists():
            return
        time.sleep(0.01)
    raise AssertionError(f"{path} did not come")


def test_a_second_run_in_one_folder_is_refused_and_told_whose_it_is(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = forked.Started(here, prepare=partial(pause, str(here)))
    wait_for(here / "waiting")
    for arguments in ([], ["--resume"], ["--overwrite"]):
        assert main(["config.yaml", *arguments]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        who = rf"process {first.process.pid} of {getpass.getuser()} on {re.escape(socket.gethostname())}, since [-\d]+ [\d:]+"
        assert re.search(rf"^dpo-train: output_dir 'run': a run is using it \({who}\); wait for its end", line)
    with pytest.raises(OutputError, match=f"process {first.process.pid} of "):  # in Python, too
        tiny.build_trainer(here / "run").train()
    (here / "go").touch()
    assert first.end()[0] == 0
    assert steps(here / "run") == [1, 2, 3, 4, 5, 6]
    assert not (here / "run/run.lock").exists()


def test_the_lock_of_a_killed_run_is_no_obstacle(here: Path) -> None:
    assert forked.run(here, prepare=partial(forked.at, "computing", 3, forked.kill))[0] == -signal.SIGKILL
    assert (here / "run/run.lock").exists()
    assert main(["config.yaml", "--quiet"]) == 0
    assert steps(here / "run") == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("left", ["", "{", "[1]", '{"pid": 7}'])
def test_a_lock_of_another_host_or_damaged_says_how_to_go_on(
    here: Path, capsys: pytest.CaptureFixture[str], left: str
) -> None:
    lock = here / "run/run.lock"
    lock.parent.mkdir()
    lock.write_text(json.dumps({"pid": 7, "user": "ann", "host": "elsewhere", "since": "2026-01-01 00:00:00"}))
    assert main(["config.yaml", "--quiet"]) == 2
    line = capsys.readouterr().err
    assert "a run on another host still uses it, or ended with an error (process 7 of ann on elsewhere" in line
    assert "if it has ended, remove 'run/run.lock'" in line.replace(f"{here}/", "")
    lock.write_text(left)  # a lock whose process cannot be checked
    assert main(["config.yaml", "--quiet"]) == (2 if "pid" in left else 0)


# --- damaged checkpoints -------------------------------------------------------------------------------------------


@pytest.fixture
def two_checkpoints(here: Path) -> Path:
    """The folder of a run that stopped with checkpoint-2 and checkpoint-4."""
    assert main(["config.yaml", "--quiet", "--max_steps", "4", "--save_total_limit", "9"]) == 0
    return here / "run"


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << place % 8
    path.write_bytes(content)


def harms(path: Path, every: int) -> Iterator[tuple[str, bytes]]:
    """(name, content) of damaged versions of a file: one flipped bit, at every `every`-th byte; truncated; all zeros."""
    content = path.read_bytes()
    for place in sorted({*range(0, len(content), every), len(content) - 1}):
        yield f"byte {place}", content[:place] + bytes([content[place] ^ (1 << place % 8)]) + content[place + 1 :]
    for size in sorted({0, 1, len(content) // 2, len(content) - 1}):
        yield f"cut at {size}", content[:size]
    yield "zeros", bytes(len(content))


def try_harms(run: Path, caplog: pytest.LogCaptureFixture, most: int) -> tuple[int, int]:
    """(damages tried, damages answered): with a line that names the file, and the use of the checkpoint before it."""
    tried = answered = 0
    for path in sorted((run / "checkpoint-4").iterdir()):
        content = path.read_bytes()
        for what, harmed in harms(path, max(len(content) // most, 1)):
            path.write_bytes(harmed)
            caplog.clear()
            found = sound_checkpoint(run)
            line = [record.getMessage() for record in caplog.records]
            tried += 1
            if found.name == "checkpoint-2" and len(line) == 1 and str(path) in line[0]:
                answered += 1
            else:
                print(path, what, line)
        path.write_bytes(content)
        path.rename(path.with_name("gone"))
        assert sound_checkpoint(run).name == ("checkpoint-4" if path.name == "SHA256SUMS" else "checkpoint-2")
        path.with_name("gone").rename(path)
    assert sound_checkpoint(run).name == "checkpoint-4"
    return tried, answered


def test_a_damaged_file_is_named_and_the_checkpoint_before_is_taken(
    two_checkpoints: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = {path.name for path in (two_checkpoints / "checkpoint-4").iterdir()}
    assert {"model.safetensors", "optimizer.pt", "trainer_state.json", "SHA256SUMS", "dpo_state_0.pt"} <= files
    tried, answered = try_harms(two_checkpoints, caplog, 5)
    assert tried > 9 * len(files)
    assert answered == tried


@pytest.mark.parametrize("name", ["optimizer.pt", "model.safetensors", "SHA256SUMS"])
def test_a_run_falls_back_and_ends_as_if_nothing_had_happened(
    here: Path, two_checkpoints: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    assert main(["config.yaml", "--quiet", "--output_dir", "whole"]) == 0
    flip(two_checkpoints / "checkpoint-4" / name, 100)
    assert main(["config.yaml", "--resume"]) == 0
    lines = [record.getMessage() for record in caplog.records if "checkpoint-2" in record.getMessage()]
    assert re.fullmatch(rf"run/checkpoint-4/{name}: (damaged|changed .*); resuming from checkpoint-2", lines[0])
    assert (here / "run/model.safetensors").read_bytes() == (here / "whole/model.safetensors").read_bytes()
    assert steps(here / "run") == [1, 2, 3, 4, 5, 6]
    assert sound_checkpoint(two_checkpoints).name == "checkpoint-6"


def test_where_no_checkpoint_is_sound_all_damages_are_in_one_line(
    two_checkpoints: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flip(two_checkpoints / "checkpoint-4/scheduler.pt", 9)
    (two_checkpoints / "checkpoint-2/rng_state.pth").unlink()
    assert main(["config.yaml", "--resume"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line == (
        "dpo-train: output_dir 'run': no checkpoint can be used (run/checkpoint-4/scheduler.pt: changed since it was "
        "written (SHA-256); run/checkpoint-2/rng_state.pth: missing); --overwrite it"
    )
    assert main(["config.yaml", "--output_dir", "b", "--resume_from_checkpoint", "run/checkpoint-4", "--quiet"]) == 2
    assert (
        "resume_from_checkpoint 'run/checkpoint-4': run/checkpoint-4/scheduler.pt: changed" in capsys.readouterr().err
    )


def test_a_checkpoint_of_an_older_version_is_taken_if_it_can_be_read(
    two_checkpoints: Path, caplog: pytest.LogCaptureFixture
) -> None:
    old = two_checkpoints / "checkpoint-4"
    (old / "SHA256SUMS").unlink()
    assert sound_checkpoint(two_checkpoints) == old
    assert "has no SHA256SUMS" in caplog.text
    for name in ("model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json"):
        content = (old / name).read_bytes()
        (old / name).write_bytes(content[:-20])
        assert sound_checkpoint(two_checkpoints).name == "checkpoint-2"
        (old / name).write_bytes(content)
    (old / "trainer_state.json").write_text('{"global_step": 4, "of_another": "trainer"}')
    assert sound_checkpoint(two_checkpoints).name == "checkpoint-2"
    (old / "model.safetensors").unlink()
    assert sound_checkpoint(two_checkpoints).name == "checkpoint-2"


def test_the_digests_are_those_that_sha256sum_checks(two_checkpoints: Path) -> None:
    checked = subprocess.run(
        ["sha256sum", "--check", "--strict", "SHA256SUMS"],
        cwd=two_checkpoints / "checkpoint-4",
        capture_output=True,
        text=True,
        check=False,
    )
    assert checked.returncode == 0, checked.stderr
    assert "optimizer.pt: OK" in checked.stdout


# --- changed data --------------------------------------------------------------------------------------------------


def test_changed_data_are_told_and_refused_unless_asked_for(
    here: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    forked.run(here, prepare=partial(forked.at, "computing", 3, forked.kill))
    assert (here / "run/checkpoint-2").exists()
    (here / "train.jsonl").write_text((here / "train.jsonl").read_text().replace("good", "great"))
    assert main(["config.yaml"]) == 2
    assert capsys.readouterr().err == (
        "dpo-train: output_dir 'run': train_data 'train.jsonl' changed since the run began (last checkpoint: "
        "checkpoint-2); --resume continues with the new contents, --overwrite starts again\n"
    )
    assert main(["config.yaml", "--resume"]) == 0
    assert "train_data 'train.jsonl' changed since the run began; continuing with the new contents" in caplog.text


def test_data_of_the_same_contents_are_the_same_data(here: Path) -> None:
    forked.run(here, prepare=partial(forked.at, "computing", 3, forked.kill))
    content = (here / "train.jsonl").read_bytes()
    (here / "train.jsonl").unlink()
    (here / "train.jsonl").write_bytes(content)
    assert main(["config.yaml", "--quiet"]) == 0


# --- signals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_a_run_after_its_step_with_a_checkpoint(here: Path, signum: int, code: int) -> None:
    assert main(["config.yaml", "--quiet", "--output_dir", "whole"]) == 0
    run = forked.Started(here, prepare=partial(pause, str(here)))
    wait_for(here / "waiting")
    os.kill(run.process.pid, signum)
    (here / "go").touch()
    ended, said = run.end()
    assert ended == code
    assert "Traceback" not in said
    assert "stopped; the same command, or train(resume_from_checkpoint=True), resumes from run/checkpoint-4" in said
    assert not (here / "run/summary.json").exists()
    assert not (here / "run/model.safetensors").exists()
    assert main(["config.yaml", "--quiet"]) == 0
    assert steps(here / "run") == [1, 2, 3, 4, 5, 6]
    assert (here / "run/model.safetensors").read_bytes() == (here / "whole/model.safetensors").read_bytes()


def test_a_second_signal_ends_at_once(here: Path) -> None:
    run = forked.Started(here, prepare=partial(pause, str(here)))
    wait_for(here / "waiting")
    os.kill(run.process.pid, signal.SIGTERM)
    time.sleep(0.3)
    os.kill(run.process.pid, signal.SIGTERM)
    assert run.end()[0] == -signal.SIGTERM
    assert not (here / "run/checkpoint-4").exists()


def signal_at(place: str, call: int, signum: int) -> None:
    forked.at(place, call, lambda *_, **__: os.kill(os.getpid(), signum))


def test_a_signal_before_the_first_step_promises_no_checkpoint(here: Path) -> None:
    code, said = forked.run(here, prepare=partial(signal_at, "writing a text", 0, signal.SIGTERM))
    assert code == 143
    assert "SIGTERM: stopped before training; nothing was lost" in said
    shutil.rmtree(here / "run", ignore_errors=True)
    code, said = forked.run(here, prepare=partial(signal_at, "writing a text", 1, signal.SIGINT))
    assert code == 130
    assert "SIGINT: stopped before the first checkpoint, so there is nothing to resume from" in said
    assert main(["config.yaml", "--quiet"]) == 0


def test_a_signal_in_an_evaluation_ends_after_it(here: Path) -> None:
    words = ["--eval_data", "train.jsonl", "--eval_steps", "3"]
    code, said = forked.run(here, *words, prepare=partial(signal_at, "evaluating", 4, signal.SIGTERM))
    assert code == 143
    assert "resumes from run/checkpoint-3" in said
    assert main(["config.yaml", "--quiet", *words]) == 0
    records = [json.loads(line) for line in (here / "run/metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "eval_loss" in r] == [0, 3, 6]


def test_a_signal_in_the_last_step_lets_the_run_finish(here: Path) -> None:
    assert forked.run(here, prepare=partial(signal_at, "computing", 5, signal.SIGTERM))[0] == 0
    assert (here / "run/summary.json").exists()


def test_in_python_a_signal_raises_after_a_checkpoint_and_handlers_are_as_before(tmp_path: Path) -> None:
    trainer = tiny.build_trainer(tmp_path / "run", max_steps=6)
    handlers = [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "compute_loss", killing(trainer.compute_loss, signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
    assert trainer.state.global_step == 1
    assert (tmp_path / "run/checkpoint-1/SHA256SUMS").exists()
    assert [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)] == handlers
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 6


def killing(real: Callable[..., Any], signum: int) -> Callable[..., Any]:
    def loss(*args: Any, **kwargs: Any) -> Any:
        os.kill(os.getpid(), signum)
        return real(*args, **kwargs)

    return loss


# --- weights that are not finite -----------------------------------------------------------------------------------


def poison(trainer: Any, place: int | slice = slice(5, 9)) -> None:
    with torch.no_grad():
        trainer.model.get_input_embeddings().weight[place] = float("nan")


def spoil_at(step: int) -> TrainerCallback:
    """From a step on, make weights that the data use not finite, as in a run whose weights overflow."""

    class Spoil(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            if state.global_step == step:
                model.get_input_embeddings().register_forward_hook(lambda *found: found[-1] * float("nan"))

    return Spoil()


def test_not_finite_stops_before_the_update_that_would_spoil_the_weights(tmp_path: Path) -> None:
    settings = {"max_steps": 6, "stop_on": ["not_finite"], "save_strategy": "steps", "save_steps": 1}
    trainer = tiny.build_trainer(tmp_path / "run", **settings)
    poison(trainer, tiny.build_tokenizer().encode(" good")[0])  # one of six words; every second answer contains it
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.train()
    assert trainer.diagnostics.stopped_by == "not_finite"
    finite = [value.isfinite() for value in trainer.model.state_dict().values()]
    assert sum(int((~mask).sum()) for mask in finite) <= 2 * 32, "the row, in the embeddings and in the tied head"
    for folder in (tmp_path / "run").glob("checkpoint-*"):
        weights = load_file(folder / "model.safetensors")
        assert sum(not value.isfinite().all() for value in weights.values()) <= 1, folder
    assert trainer.state.global_step == 0
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value.nan_to_num(), before[name].nan_to_num()), name


def test_the_run_that_stops_before_an_update_has_the_steps_before_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {"stop_on": ["not_finite"], "save_strategy": "steps", "save_steps": 2, "logging_steps": 4}
    good = tiny.build_trainer(tmp_path / "good", max_steps=3, lr_scheduler_type="constant", **settings)
    good.train()
    trainer = tiny.build_trainer(tmp_path / "run", max_steps=6, lr_scheduler_type="constant", **settings)
    trainer.add_callback(spoil_at(3))
    trainer.train()
    assert trainer.state.global_step == 3
    assert "the gradient norm of step 4 is nan; its update was not made" in caplog.text
    for name, value in good.model.state_dict().items():
        assert torch.equal(value, trainer.model.state_dict()[name]), name
    assert json.loads((tmp_path / "run/summary.json").read_text())["steps"] == 3
    # The run continues from the checkpoint of the last good step, as if the bad step had not happened.
    (tmp_path / "run/summary.json").unlink()
    whole = tiny.build_trainer(tmp_path / "whole", max_steps=6, lr_scheduler_type="constant", **settings)
    whole.train()
    again = tiny.build_trainer(tmp_path / "run", max_steps=6, lr_scheduler_type="constant", logging_steps=4)
    again.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-3"))
    curves = [[r["loss"] for r in t.state.log_history if "loss" in r] for t in (whole, again)]
    assert curves[0] == curves[1]


def test_a_resumed_run_stops_again_before_the_update(tmp_path: Path) -> None:
    settings = {"stop_on": ["not_finite"], "save_strategy": "steps", "save_steps": 2, "max_steps": 6}
    for resume in (False, True, True):
        trainer = tiny.build_trainer(tmp_path / "run", **settings)
        trainer.add_callback(spoil_at(3))
        trainer.train(resume_from_checkpoint=resume)
        assert trainer.state.global_step == 3
        assert all(value.isfinite().all() for value in trainer.model.state_dict().values())
        assert (tmp_path / "run/events.jsonl").read_text().count('"not_finite"') == 1


def test_a_checkpoint_with_weights_that_are_not_finite_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = tiny.build_trainer(tmp_path / "run", max_steps=1, save_strategy="steps", save_steps=1)
    poison(trainer)
    trainer.train()
    assert "checkpoint-1: contains weights that are not finite, first in 'model.embed_tokens.weight'" in caplog.text


# --- a full disk ---------------------------------------------------------------------------------------------------

Full = tuple[str, int, int]  # (place, call, limit): from this call at this place on, no file may exceed `limit` bytes
FULL: list[Full] = [
    *(("saving the model", call, limit) for call in (0, 1, 2) for limit in (0, 50_000)),
    *(("saving with torch", call, limit) for call in (0, 4, 5, 6) for limit in (0, 700)),
    ("saving the state", 1, 0),
    ("writing digests", 1, 300),
    ("computing", 3, 0),
    ("logging", 4, 900),
    ("finishing", 0, 50_000),
    ("writing the card", 0, 0),
]
FULL_SAMPLE = [FULL[3], FULL[9], FULL[15], FULL[18]]


def fill_at(place: str, call: int, limit: int) -> None:
    forked.at(place, call, partial(forked.fill_the_disk, limit))


def try_full_disk(here: Path, full: Full, whole: Path) -> None:
    """The command prints one line that names a file, checkpoints stay intact, and with space the same command continues."""
    code, said = forked.run(here, "--quiet", prepare=partial(fill_at, *full))
    assert code == 2, (full, said)
    (line,) = said.splitlines()
    assert re.fullmatch(r"dpo-train: run\S*: cannot be written \(.+\); .*give the same command again", line), line
    run = here / "run"
    for folder in checkpoints(run):
        assert fault(folder) is None, full
        assert (folder / "SHA256SUMS").exists()
    assert not list(here.rglob("*.part"))
    assert not (run / "summary.json").exists()
    assert forked.run(here, "--quiet") == (0, "")
    assert (run / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert steps(run) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("full", FULL_SAMPLE, ids=lambda full: " ".join(map(str, full)))
def test_a_full_disk_is_one_line_and_costs_no_checkpoint(here: Path, full: Full) -> None:
    assert main(["config.yaml", "--quiet", "--output_dir", "whole"]) == 0
    try_full_disk(here, full, here / "whole")


@pytest.mark.slow
def test_a_disk_full_at_twenty_places(here: Path) -> None:
    assert len(set(FULL)) == 20
    assert main(["config.yaml", "--quiet", "--output_dir", "whole"]) == 0
    for full in FULL:
        try_full_disk(here, full, here / "whole")
        shutil.rmtree(here / "run")
    record("disk_full", {"places": len(FULL), "answered": len(FULL)})


@pytest.mark.slow
def test_thousands_of_damages_are_answered(two_checkpoints: Path, caplog: pytest.LogCaptureFixture) -> None:
    tried, answered = try_harms(two_checkpoints, caplog, 4000)
    assert tried > 20_000
    record("damaged_files", {"tried": tried, "answered": answered})
    assert answered == tried


def test_a_trainer_with_other_arguments_leaves_the_first_run_alone(make_trainer: Any, tmp_path: Path) -> None:
    trainer = make_trainer(max_steps=2, save_steps=1, save_strategy="steps")
    trainer.train()
    before = {path: path.read_bytes() for path in sorted((tmp_path / "run").rglob("*")) if path.is_file()}
    trainer.args = copy.copy(trainer.args)
    trainer.args.output_dir = str(tmp_path / "second")
    trainer.train()
    assert {path: path.read_bytes() for path in sorted((tmp_path / "run").rglob("*")) if path.is_file()} == before
    names = {path.name for path in (tmp_path / "second").iterdir()}
    assert {"metrics.jsonl", "events.jsonl", "summary.json", "checkpoint-2"} <= names
    assert json.loads((tmp_path / "second" / "summary.json").read_text())["last"]["step"] == 2


# --- pairs that are held out ---------------------------------------------------------------------------------------


def test_a_part_of_the_data_is_held_out_and_the_same_one_when_the_run_goes_on(
    here: Path, read_jsonl: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [json.loads(line) for line in (here / "train.jsonl").read_text().splitlines()]
    words = ["--val_split", "0.25", "--eval_steps", "2"]
    assert main(["config.yaml", *words, "--output_dir", "whole", "--quiet"]) == 0
    code, said = forked.run(here, *words)
    assert code == 0
    pairs = json.loads((here / "run/summary.json").read_text())["pairs"]
    assert pairs["train_dataset"] + pairs["eval_dataset"] == len(rows)
    assert pairs["eval_dataset"] >= 6
    told = f"val_split: {pairs['train_dataset']} pairs to train on, {pairs['eval_dataset']} held out"
    assert said.count(told) == 1
    for name in ("summary.json", "model.safetensors"):
        (here / "run" / name).unlink()
    shutil.rmtree(here / "run/checkpoint-6")
    for other in (["--val_split", "0.5"], ["--val_split", "0.25", "--seed", "7"]):
        assert main(["config.yaml", *other, "--eval_steps", "2", "--resume"]) == 2
        assert "would hold out pairs that this run was trained on" in capsys.readouterr().err
    assert main(["config.yaml", *words, "--quiet"]) == 0
    curves = [
        [(r["step"], r["eval_loss"]) for r in read_jsonl(here / name / "metrics.jsonl") if "eval_loss" in r]
        for name in ("whole", "run")
    ]
    assert [step for step, _ in curves[0]] == [0, 2, 4, 6]
    assert curves[1] == curves[0]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("--eval_data train.jsonl", "val_split: eval_data is given too; leave one of them out"),
        ("--streaming", "val_split: needs all pairs before training; not supported with a stream"),
        ("--val_split 24", "val_split: 24 leaves nothing to train on: there are 24 pairs with"),
        ("--val_split 1.5", "val_split: must be a share below 1 or a whole number of pairs, got 1.5"),
        ("--val_split 0", "val_split: must be a share below 1 or a whole number of pairs, got 0"),
        ("--val_split .inf", "val_split: must be a share below 1 or a whole number of pairs, got inf"),
    ],
)
def test_a_split_that_cannot_be_is_one_line(
    here: Path, capsys: pytest.CaptureFixture[str], words: str, line: str
) -> None:
    assert main(["config.yaml", "--val_split", "0.25", *words.split()]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"dpo-train: {line}")
    assert not (here / "run/settings.json").exists()


def test_a_trainer_holds_out_pairs_and_their_reference_with_them(tmp_path: Path, caplog: Any) -> None:
    trainer = tiny.build_trainer(tmp_path / "run", val_split=8, max_steps=1, precompute_ref_log_probs=True)
    assert len(trainer.eval_dataset) >= 8
    assert len(trainer.train_dataset) + len(trainer.eval_dataset) == 24
    assert not set(trainer.train_dataset["prompt_digest"]) & set(trainer.eval_dataset["prompt_digest"])
    assert [account.kept for account in trainer.accounts] == [len(trainer.train_dataset), len(trainer.eval_dataset)]
    assert [account.trained_on for account in trainer.accounts] == [0, 0]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(0.6931472)
    with pytest.raises(ConfigError, match="val_split: an eval_dataset is given too"):
        tiny.build_trainer(tmp_path / "run", val_split=8, eval_dataset=tiny.build_pairs(3))


def test_pairs_and_prompts_that_are_trained_on_are_counted_apart(tmp_path: Path, caplog: Any) -> None:
    rows = [{"prompt": f"review {n}:", "chosen": " good", "rejected": " bad"} for n in range(8)]
    others = [{**row, "chosen": " great"} for row in rows[:3]]
    new = [{**rows[0], "prompt": "answer:"}]
    with caplog.at_level("INFO", "dpo_trainer"):
        trainer = tiny.build_trainer(tmp_path / "run", train_dataset=rows, eval_dataset=rows[:2] + others + new)
    account = trainer.accounts[1]
    assert (account.trained_on, account.prompts_trained_on) == (2, 3)
    assert "eval_dataset: 2 of 6 pairs are training pairs too" in caplog.text
    assert "eval_dataset: 3 of 6 pairs have the prompt of a training pair, with other answers" in caplog.text


# --- how often -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "expected"), [(1, 1), (19, 1), (40, 2), (60, 3), (200, 10), (100_000, 10)])
def test_logs_are_twenty_and_at_most_ten_steps_apart(steps: int, expected: int) -> None:
    assert pace.logging_steps(steps) == expected


@pytest.mark.parametrize(
    ("steps", "evaluations", "expected"),
    [(1, None, 1), (40, None, 4), (95, None, 10), (100_000, None, 500), (100, 3, 9), (100, 20, 20)],
)
def test_checkpoints_are_a_tenth_of_the_run_apart(steps: int, evaluations: int | None, expected: int) -> None:
    assert pace.save_steps(steps, evaluations) == expected


@pytest.mark.parametrize(
    ("evaluated", "sampled", "points"),
    [(10, 0, 20), (100, 0, 7), (1000, 0, 2), (100, 32, 3)],
)
def test_evaluations_take_a_quarter_of_the_time_at_most_where_two_are_not_too_many(
    evaluated: int, sampled: int, points: int
) -> None:
    every = pace.eval_steps(1000, 1000, evaluated, sampled)
    assert -(-1000 // every) == points


def test_a_run_has_a_curve_evaluations_and_two_checkpoints_without_a_word_about_them(
    here: Path, read_jsonl: Any
) -> None:
    config = {k: v for k, v in yaml.safe_load((here / "config.yaml").read_text()).items() if k[-6:] != "_steps"}
    (here / "config.yaml").write_text(yaml.safe_dump(config))
    (here / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tiny.build_pairs(6, seed=1)))
    words = ["--max_steps", "40", "--eval_data", "eval.jsonl", "--quiet"]
    assert main(["config.yaml", *words]) == 0
    records = read_jsonl(here / "run/metrics.jsonl")
    assert [r["step"] for r in records if "loss" in r] == [1, *range(2, 41, 2)]
    # 80 training pairs; an evaluation of 6 pairs counts as 2.
    assert [r["step"] for r in records if "eval_loss" in r] == list(range(0, 41, 4))
    assert sorted(path.name for path in (here / "run").glob("checkpoint-*")) == ["checkpoint-36", "checkpoint-40"]
    # A given setting wins, even if transformers derives it from another.
    assert main(["config.yaml", *words, "--logging_steps", "20", "--save_steps", "0.25", "--output_dir", "b"]) == 0
    records = read_jsonl(here / "b/metrics.jsonl")
    assert [r["step"] for r in records if "loss" in r] == [1, 20, 40]
    assert [r["step"] for r in records if "eval_loss" in r] == list(range(0, 41, 4))
    assert len(list((here / "b").glob("checkpoint-*"))) == 4


def test_with_the_best_model_at_the_end_every_checkpoint_is_of_an_evaluation(tmp_path: Path, read_jsonl: Any) -> None:
    settings = {"eval_strategy": "steps", "save_strategy": "steps", "save_steps": 4, "logging_steps": None}
    trainer = tiny.build_trainer(
        tmp_path, eval_dataset=tiny.build_pairs(13, seed=1), max_steps=24, load_best_model_at_end=True, **settings
    )
    trainer.train()
    evaluated = {record["step"] for record in read_jsonl(tmp_path / "metrics.jsonl") if "eval_loss" in record}
    assert {int(path.name[11:]) for path in tmp_path.glob("checkpoint-*")} <= evaluated
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-24")


def test_a_script_that_says_how_often_is_followed(tmp_path: Path) -> None:
    args = DPOConfig(output_dir=str(tmp_path), logging_steps=7, eval_strategy="steps", save_steps=9)
    assert (args.logging_steps, args.eval_steps, args.save_steps) == (7, 7, 9)
    args = DPOConfig(output_dir=str(tmp_path), eval_strategy="steps", load_best_model_at_end=True)
    assert (args.logging_steps, args.eval_steps, args.save_steps) == (None, None, None)


# --- what a run says ------------------------------------------------------------------------------------------------


def test_a_run_says_what_it_is_loading_before_it_does(here: Path) -> None:
    def said_with(*words: str) -> list[str]:
        code, said = forked.run(here, "--eval_data", "train.jsonl", "--max_steps", "1", *words)
        assert code == 0
        return said.splitlines()

    said = said_with("--precompute_ref_log_probs")
    model = yaml.safe_load((here / "config.yaml").read_text())["model"]
    lines = [
        "train_data: reading train.jsonl",
        "eval_data: reading train.jsonl",
        f"model: loading {model}",
        "train_dataset: tokenising 24 pairs",
        "eval_dataset: tokenising 24 pairs",
        "eval_dataset: 24 of 24 pairs are training pairs too, so its figures are not held-out figures",
    ]
    assert [line for line in said if not line.startswith("rows are text, ")][: len(lines)] == lines
    assert [line.partition(": computing")[0] for line in said if ": computing" in line] == [
        "reference log-probabilities of 24 train pairs"
    ]
    assert f"reference: loading {model}" in said_with("--ref_model", model, "--overwrite")
    assert "reference: a frozen copy of the model" in said_with("--overwrite")


def test_in_a_log_long_phases_print_lines_with_the_time_left(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (
        "--eval_data train.jsonl --precompute_ref_log_probs --sample_prompts 2 --sample_max_new_tokens 2 --max_steps 2"
    )
    assert main(["config.yaml", *words.split()]) == 0
    said = capsys.readouterr().err
    assert "step 1/2" not in said
    assert " left" not in said
    monkeypatch.setattr(progress, "IN_A_LOG", 0.0)
    assert main(["config.yaml", *words.split(), "--overwrite", "--ref_cache_dir", "null"]) == 0
    said = capsys.readouterr().err
    for line in (
        r"reference log-probabilities of the train pairs: 8 of 24 pairs  33%  0:0\d left",
        r"evaluating: 1 of 3 batches  33%  0:0\d left",
        r"sampling answers: 2 of 2 prompts  100%  0:00 left",
        r"step 1/2  50%  0:0\d left",
    ):
        assert re.search(f"^{line}", said, re.MULTILINE), line
    assert "\r" not in said
    for silent in ("--quiet", "--json"):
        assert main(["config.yaml", *words.split(), "--overwrite", silent]) == 0
        assert " left" not in capsys.readouterr().err


def test_work_in_another_librarys_loop_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "IN_A_LOG", 0.001)
    stream = io.StringIO()
    with progress.counted(progress.Phase(progress.Line(stream), "tokenising", 200, "pairs")):
        for _ in range(100):
            progress.count()
            time.sleep(0.001)
    shown = [int(done) for done in re.findall(r"^tokenising: (\d+) of 200 pairs", stream.getvalue(), re.MULTILINE)]
    assert shown == sorted(shown)
    assert len(shown) > 1
    assert 0 < shown[-1] <= 100
    lines = len(stream.getvalue())
    time.sleep(0.01)
    assert len(stream.getvalue()) == lines, "the phase is over"


def test_on_a_terminal_a_phase_rewrites_its_line_and_removes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "ON_A_TERMINAL", 0.0)
    stream = io.StringIO()
    with progress.Phase(progress.Line(stream, live=True), "evaluating", 4, "batches") as phase:
        phase.advance()
        phase.advance(2)
    shown = stream.getvalue()
    assert "evaluating: 3 of 4 batches  75%" in shown
    assert "\n" not in shown
    assert shown.endswith("\r\x1b[2K")
