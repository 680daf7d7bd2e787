"""A run that was killed at any moment and is started again gives the same metrics and model, bit by bit."""

import json
import os
import shutil
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from . import forked
from .tiny import build_pairs

# "whole": logs and checkpoints at different steps, so that checkpoints are written within logging windows; an objective with
# a running mean; a reference that is updated between checkpoints; samples at evaluations.
# "adapter": precomputed and cached reference log-probabilities, one checkpoint is kept, a log at every step.
_COMMON = """
model: {model}
train_data: pairs.jsonl
eval_data: held_out.jsonl
output_dir: run
per_device_train_batch_size: 2
learning_rate: 1.0e-3
seed: 3
use_cpu: true
write_report: {report}
"""
CONFIGS = {
    "whole": """
max_steps: 14
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
""",
    "adapter": """
max_steps: 8
logging_steps: 1
save_steps: 3
save_total_limit: 1
eval_steps: 4
precompute_ref_log_probs: true
lora: {r: 4, target_modules: [q_proj, v_proj]}
""",
}
STEPS = {"whole": 14, "adapter": 8}

Kill = tuple[str, str, int, str]  # the config, the place, the number of the call, and "before", "after" or "half"


def _kills() -> list[Kill]:
    """Fifty moments during steps, evaluations, sampling, every part of a checkpoint, and the final save."""
    moments: dict[tuple[str, str], tuple[str, ...]] = {
        ("whole", "computing"): ("1 before", "3 after", "7 before", "12 after", "14 before", "17 after"),
        ("whole", "evaluating"): ("0 before", "1 after", "2 before", "3 after"),
        ("whole", "sampling"): ("0 before", "1 before", "2 after", "3 after"),
        ("whole", "logging"): ("1 half", "4 before", "8 half", "12 half"),
        ("whole", "saving the model"): ("0 half", "1 half", "1 after", "2 before", "2 after", "3 half", "3 after"),
        ("whole", "saving with torch"): ("0 half", "3 half", "5 half", "7 after", "9 half"),
        ("whole", "saving the state"): ("1 before", "2 after"),
        ("whole", "writing digests"): ("0 before", "1 after"),
        ("whole", "renaming"): ("0 after", "4 before"),
        ("whole", "writing a text"): ("0 half", "3 half", "5 half"),
        ("whole", "finishing"): ("0 before", "0 after"),
        ("whole", "writing the card"): ("0 before",),
        ("whole", "reporting"): ("2 before",),
        ("adapter", "caching references"): ("0 before", "0 after", "1 after"),
        ("adapter", "rotating"): ("1 before", "1 after", "2 after"),
        ("adapter", "finishing"): ("0 before",),
    }
    return [
        (config, place, int(moment.split()[0]), moment.split()[1])
        for (config, place), found in moments.items()
        for moment in found
    ]


KILLS = _kills()
SAMPLE: list[Kill] = [
    ("whole", "sampling", 2, "after"),
    ("whole", "evaluating", 2, "before"),
    ("whole", "saving with torch", 3, "half"),
    ("whole", "saving the model", 3, "half"),
    ("adapter", "caching references", 0, "after"),
    ("adapter", "rotating", 1, "before"),
]


def make_run(folder: Path, config: str, model: Path, *, report: bool = False) -> Path:
    """A folder with the config and its data."""
    folder.mkdir()
    for name, pairs in (("pairs", build_pairs(48)), ("held_out", build_pairs(8, seed=1))):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    text = _COMMON.format(model=model, report=str(report).lower()) + CONFIGS[config]
    (folder / "config.yaml").write_text(text)
    return folder


def end_at(place: str, call: int, when: str) -> None:
    """Have this process killed at this place."""
    forked.at(place, call, forked.tear if when == "half" else forked.kill, after=when == "after")


def timeless(path: Path) -> list[dict[str, Any]]:
    """The records without values that depend on time or memory."""
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    clocks = ("runtime", "second", "_mib")
    return [{key: value for key, value in record.items() if not key.endswith(clocks)} for record in records]


def finish(folder: Path) -> None:
    """Run the same command until the run has finished."""
    code, said = forked.run(folder, "--quiet")
    assert (code, said) == (0, "")


def steps_of(run: Path, planned: int) -> tuple[int, int]:
    """(missing steps, repeated steps) of a finished run."""
    summary = json.loads((run / "summary.json").read_text())
    last = max(int(path.name.partition("-")[2]) for path in run.glob("checkpoint-*"))
    state = json.loads((run / f"checkpoint-{last}" / "trainer_state.json").read_text())
    counts = (summary["steps"], state["global_step"], last)
    return max(0, *(planned - count for count in counts)), max(0, *(count - planned for count in counts))


def compare(killed: Path, whole: Path) -> None:
    """Assert that all files of two runs are equal bit by bit."""
    assert timeless(killed / "metrics.jsonl") == timeless(whole / "metrics.jsonl")
    assert (killed / "events.jsonl").read_text() == (whole / "events.jsonl").read_text()
    patterns = ("*.safetensors", "samples.jsonl", "checkpoint-*/*.safetensors", "checkpoint-*/scheduler.pt")
    names = [str(path.relative_to(whole)) for pattern in patterns for path in whole.glob(pattern)]
    assert len(names) >= 3
    for name in names:
        assert (killed / name).read_bytes() == (whole / name).read_bytes(), name
    assert {path.name for path in killed.iterdir()} == {path.name for path in whole.iterdir()}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> dict[str, Path]:
    """An uninterrupted run of each config."""
    root = tmp_path_factory.mktemp("undisturbed")
    folders = {config: make_run(root / config, config, model_folder) for config in CONFIGS}
    for folder in folders.values():
        finish(folder)
    return folders


def try_kill(folder: Path, kill: Kill, undisturbed: dict[str, Path], model: Path) -> tuple[int, int]:
    """Kill a run at this moment, start it again, and return the numbers of missing and repeated steps."""
    config, place, call, when = kill
    make_run(folder, config, model)
    code, said = forked.run(folder, "--quiet", prepare=partial(end_at, place, call, when))
    assert code == -signal.SIGKILL, f"{kill}: the run ended with {code}: {said}"
    finish(folder)
    compare(folder / "run", undisturbed[config] / "run")
    return steps_of(folder / "run", STEPS[config])


@pytest.mark.parametrize("kill", SAMPLE, ids=lambda kill: " ".join(map(str, kill)))
def test_a_kill_leaves_no_trace(tmp_path: Path, kill: Kill, undisturbed: dict[str, Path], model_folder: Path) -> None:
    assert kill in KILLS
    assert try_kill(tmp_path / "killed", kill, undisturbed, model_folder) == (0, 0)


def test_three_kills_of_one_run_leave_no_trace(
    tmp_path: Path, undisturbed: dict[str, Path], model_folder: Path
) -> None:
    killed = make_run(tmp_path / "killed", "whole", model_folder)
    for moment, newest in (("computing 8", 5), ("saving the state 0", 5), ("computing 7", 10)):
        place, _, call = moment.rpartition(" ")
        code, said = forked.run(killed, "--quiet", prepare=partial(end_at, place, int(call), "before"))
        assert code == -signal.SIGKILL, said
        found = {path.name for path in (killed / "run").glob("checkpoint-*")}
        assert max(int(name.partition("-")[2]) for name in found) == newest, "half a checkpoint must not look like one"
    finish(killed)
    compare(killed / "run", undisturbed["whole"] / "run")


@pytest.mark.slow
def test_fifty_kills_lose_no_step_and_take_none_too_many(
    tmp_path: Path, undisturbed: dict[str, Path], model_folder: Path
) -> None:
    assert len(set(KILLS)) == 50
    lost = extra = 0
    for number, kill in enumerate(KILLS):
        found = try_kill(tmp_path / f"killed-{number}", kill, undisturbed, model_folder)
        lost, extra = lost + found[0], extra + found[1]
        shutil.rmtree(tmp_path / f"killed-{number}")
    record("kills", {"kills": len(KILLS), "lost_steps": lost, "extra_steps": extra})
    assert (lost, extra) == (0, 0)


def record(name: str, found: dict[str, int]) -> None:
    """Write figures to the file in the environment variable RUNS_JSON, if set. This makes benchmarks/results/runs.json."""
    if path := os.environ.get("RUNS_JSON"):
        file = Path(path)
        known = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps({**known, name: found}, indent=1, sort_keys=True) + "\n")


def test_the_committed_figures_are_of_these_tests_and_nothing_was_lost() -> None:
    found = json.loads((Path(__file__).parents[2] / "benchmarks/results/runs.json").read_text())
    assert found["kills"] == {"kills": len(KILLS), "lost_steps": 0, "extra_steps": 0}
    for tried, answered in (("damaged_files", "tried"), ("disk_full", "places")):
        assert found[tried]["answered"] == found[tried][answered] >= 20
