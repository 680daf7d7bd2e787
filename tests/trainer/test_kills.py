"""Killed at any moment, the same command goes on as if nothing had happened: same metrics, same model, bit for bit."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from .tiny import build_pairs

# dpo-train that kills itself (SIGKILL: no handler, no clean-up) at a step, while computing or while saving.
_RUN = """
import os, signal, sys
from dpo_trainer import DPOTrainer
from dpo_trainer.cli import main

where, step = sys.argv[1].partition(" ")[::2]
target = {"computing": "compute_loss", "saving": "_save_optimizer_and_scheduler"}.get(where)
if target:
    real = getattr(DPOTrainer, target)
    def deadly(self, *args, **kwargs):
        if self.state.global_step == int(step):
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, *args, **kwargs)
    setattr(DPOTrainer, target, deadly)
sys.exit(main(["config.yaml", "--quiet"]))
"""

# Logs and checkpoints at different steps, so that checkpoints fall into logging windows; an objective with a running mean,
# a reference that moves between checkpoints, answers sampled at evaluations.
_CONFIG = """
model: {model}
train_data: pairs.jsonl
eval_data: held_out.jsonl
output_dir: run
max_steps: 14
per_device_train_batch_size: 2
logging_steps: 4
logging_first_step: false
save_steps: 5
eval_steps: 6
loss_type: bco_running
sync_ref_model: true
ref_model_sync_steps: 4
sample_prompts: 3
sample_max_new_tokens: 4
sample_temperature: 1.0
learning_rate: 1.0e-3
seed: 3
"""


def train(folder: Path, moment: str) -> int:
    """Run the command in the folder; returns its exit code, -9 if it was killed."""
    done = subprocess.run(
        [sys.executable, "-c", _RUN, moment], cwd=folder, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return done.returncode


def timeless(path: Path) -> list[dict[str, Any]]:
    """The records without what a clock or the memory's state decides."""
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    clocks = ("runtime", "second", "_mib")
    return [{key: value for key, value in record.items() if not key.endswith(clocks)} for record in records]


def test_three_kills_leave_no_trace(tmp_path: Path, model_folder: Path) -> None:
    folders = [tmp_path / "whole", tmp_path / "killed"]
    for folder in folders:
        folder.mkdir()
        for name, pairs in (("pairs", build_pairs(48)), ("held_out", build_pairs(8, seed=1))):
            lines = "".join(json.dumps(row) + "\n" for row in pairs)
            (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
        (folder / "config.yaml").write_text(_CONFIG.format(model=model_folder), encoding="utf-8")
    whole, killed = folders
    assert train(whole, "never") == 0

    assert train(killed, "computing 7") == -signal.SIGKILL
    assert (killed / "run" / "checkpoint-5").exists()
    assert train(killed, "saving 10") == -signal.SIGKILL
    assert not (killed / "run" / "checkpoint-10").exists(), "half a checkpoint must not look like one"
    assert train(killed, "computing 13") == -signal.SIGKILL
    assert (killed / "run" / "checkpoint-10").exists()
    assert train(killed, "never") == 0

    expected = timeless(whole / "run" / "metrics.jsonl")
    assert [record["step"] for record in expected if "learning_rate" in record] == [4, 8, 12, 14]
    assert timeless(killed / "run" / "metrics.jsonl") == expected
    files = (
        "model.safetensors",
        "samples.jsonl",
        "checkpoint-10/reference.safetensors",
        "checkpoint-14/reference.safetensors",
    )
    for name in (*files, "checkpoint-10/model.safetensors", "checkpoint-14/model.safetensors"):
        assert (killed / "run" / name).read_bytes() == (whole / "run" / name).read_bytes(), name
    assert not list((killed / "run").glob("*.part"))
