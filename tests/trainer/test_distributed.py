"""Two processes under torchrun give the loss curve, metrics and model of one process, up to rounding."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset

from dpo_trainer.run_folder.checkpoints import fault

from .tiny import build_model, build_pairs, build_tokenizer, build_trainer

#: Settings of two processes. A single process accumulates twice as many batches. 27 pairs in batches of 2 x 2 leave an odd
#: rest, of which the second process gets 3, 1 or 0 pairs. Lengths (5 to 30 tokens) and weights differ.
CASES: dict[str, dict[str, Any]] = {
    "pairs": {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "max_steps": 9,
        "write_report": True,
    },
    "accumulated": {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "max_steps": 6},
    "tokens": {"max_tokens": 90, "gradient_accumulation_steps": 2, "max_steps": 6},
    "moving": {
        "per_device_train_batch_size": 2,
        "max_steps": 4,
        "sync_ref_model": True,
        "ref_model_sync_steps": 2,
        "sample_prompts": 3,
        "sample_max_new_tokens": 3,
        "scorer": lambda prompts, answers: [text.count("e") for text in answers],
    },
    "stream": {"per_device_train_batch_size": 3, "max_steps": 6},
    "random": {"per_device_train_batch_size": 13, "train_sampling_strategy": "random", "max_steps": 3},
}
COMPARED = ("loss", "rewards/margins", "rewards/accuracies", "logps/chosen", "kl", "entropy", "tokens", "grad_norm")

_WORKER = """
import sys
from pathlib import Path
from dpo_trainer.cli.main import main
from tests.trainer.test_distributed import CASES, record, trainer_of

for name, settings in CASES.items():
    trainer = trainer_of(Path(sys.argv[1]) / name, settings)
    assert trainer.accelerator.num_processes == 2
    trainer.train()
    record(trainer, Path(sys.argv[1]) / f"{name}-{trainer.args.process_index}.json")

for _ in range(2):
    assert main([str(Path(sys.argv[1]) / "config.yaml"), "--overwrite"]) == 0
"""


def trainer_of(folder: Path, settings: dict[str, Any]) -> Any:
    vocab = len(build_tokenizer())
    rows = Dataset.from_list([{**row, "weight": 0.25 + index % 4} for index, row in enumerate(build_pairs(27))])
    return build_trainer(
        folder,
        model=build_model("llama-tied", vocab),
        ref_model=build_model("llama-tied", vocab, seed=5),
        train_dataset=rows.to_iterable_dataset() if folder.name.startswith("stream") else rows,
        eval_dataset=[{**row, "weight": 1.0 + index % 3} for index, row in enumerate(build_pairs(7, seed=1))],
        per_device_eval_batch_size=2,
        learning_rate=3e-4,
        **settings,
    )


def record(trainer: Any, path: Path) -> None:
    model = trainer.accelerator.unwrap_model(trainer.model)
    evaluated = {name: value for name, value in trainer.evaluate().items() if not name.endswith(("time", "second"))}
    evaluated.pop("epoch")  # depends on the number of batches
    found = {
        "history": [entry for entry in trainer.state.log_history if "loss" in entry],
        "evaluated": evaluated,
        "predicted": trainer.predict(build_pairs(9, seed=2)).predictions.tolist(),
        "single": {prefix: dataclasses.asdict(pairs) for prefix, pairs in trainer.evaluated.items()},
        "norms": {name: value.double().norm().item() for name, value in model.named_parameters()},
    }
    path.write_text(json.dumps(found))


def test_two_processes_train_as_one(tmp_path: Path, model_folder: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    (tmp_path / "worker.py").write_text(_WORKER)
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in build_pairs(9)))
    config = {
        "model": str(model_folder),
        "train_data": str(tmp_path / "pairs.jsonl"),
        "output_dir": str(tmp_path / "run"),
    }
    (tmp_path / "config.yaml").write_text(json.dumps({**config, "logging_steps": 1, "use_cpu": True}))
    done = subprocess.run(
        [*torchrun, str(tmp_path / "worker.py"), str(tmp_path)],
        cwd=root,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(root), *sys.path]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    assert done.stderr.count("train_dataset: 9 of 9 pairs kept") == 2, "one process speaks"
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 1
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 1
    for name, settings in CASES.items():
        alone = {**settings, "gradient_accumulation_steps": 2 * settings.get("gradient_accumulation_steps", 1)}
        trainer = trainer_of(tmp_path / f"{name}-alone", alone)
        trainer.train()
        record(trainer, tmp_path / f"{name}-alone.json")
        expected = json.loads((tmp_path / f"{name}-alone.json").read_text())
        for process in range(2):
            found = json.loads((tmp_path / f"{name}-{process}.json").read_text())
            for one, two in zip(expected["history"], found["history"], strict=True):
                for key in COMPARED:
                    assert two[key] == pytest.approx(one[key], rel=2e-5, abs=2e-6), (name, one["step"], key)
            assert found["norms"] == pytest.approx(expected["norms"], rel=1e-6)
            assert np.allclose(found["predicted"], expected["predicted"], rtol=2e-4, atol=2e-6), name
            assert found["single"].keys() == expected["single"].keys()
            for prefix, one in expected["single"].items():
                two = found["single"][prefix]
                for when in ("before", "after"):
                    assert two[when] == pytest.approx(one[when], rel=2e-5, abs=2e-5), (name, prefix)
                for kind in ("hardest", "improved"):
                    assert [row["chosen"] for row in two[kind]] == [row["chosen"] for row in one[kind]], (name, prefix)
            assert found["evaluated"] == pytest.approx(expected["evaluated"], rel=2e-5, abs=2e-6), name
        assert len(expected["history"]) == settings["max_steps"]
        assert expected["single"].keys() == ({"eval", "test"} if settings.get("write_report") else set())
    assert "Most improved pairs" in (tmp_path / "pairs" / "report.html").read_text()


def test_a_signal_ends_two_processes_after_the_same_step(tmp_path: Path, model_folder: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in build_pairs(24)))
    config = {"model": str(model_folder), "train_data": "pairs.jsonl", "output_dir": "run", "save_steps": 10_000}
    settings = {"max_steps": 10_000, "logging_steps": 1, "use_cpu": True, "write_report": False}
    (tmp_path / "config.yaml").write_text(json.dumps({**config, **settings}))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run = subprocess.Popen(
        [*torchrun, "-m", "dpo_trainer.cli", "config.yaml"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(root), *sys.path]), "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics = tmp_path / "run/metrics.jsonl"
    for _ in range(6000):
        if metrics.exists() and metrics.read_text().count("\n") > 1:
            break
        time.sleep(0.02)
    run.send_signal(signal.SIGTERM)
    said = run.communicate(timeout=120)[1]
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    assert said.count("stopped; the same command") == 1, said[-3000:]
    assert f"resumes from run/{checkpoint.name}" in said
    assert fault(checkpoint) is None
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= {path.name for path in checkpoint.iterdir()}
    assert not (tmp_path / "run/run.lock").exists()
