"""Which trainer processes most tokens per second, padding not counted, and how much memory does it need?

Each trainer trains SmolLM2-135M for a few steps on the same pairs, in the same order, with the same optimizer. Every run is
a process of its own; runs follow one another, in rounds. Tokens are counted from the tokenised pairs, without padding. They
must be the same for all trainers, and so must the loss curves, up to rounding. One of the trainers is TRL's own after
`apply_to_trl()`, which is one line in its user's script.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from . import method
from .conftest import Settings, wanted
from .linear_problem import NO_MODEL, ROOT, TEXT, model_folder, tiny_model
from .method import Best, Samples
from .peers.base import PEERS_EXTRA
from .report import SPREAD, TIMES_PRODUCTS, Column, Result, counted

#: (rounds, steps of each round, of which the first is not timed).
ROUNDS = {"small": (1, 2), "default": (1, 2), "full": (3, 4)}
MAX_LENGTH = 256

TITLES = {
    "ours": "dpo_trainer",
    "ours_padded": "dpo_trainer, padded",
    "ours_shared": "dpo_trainer, prefix shared",
    "ours_whole": "dpo_trainer, loss from logits",
    "ours_precomputed": "dpo_trainer, reference precomputed",
    "trl_patched": "TRL 1.16 after apply_to_trl()",
    "trl": "TRL 1.16",
}
BASELINE = "trl"
#: These trainers answer the question; the other variants take minutes more.
MAIN = ("ours", "trl_patched", BASELINE)
TRAINERS = {"small": ("ours", BASELINE), "default": MAIN, "full": tuple(TITLES)}
#: Pairs of a step, unless --pairs-per-step is given.
BATCH = {"small": 2, "default": 4, "full": 8}
#: Goals relative to TRL: tokens per second of our trainer, and of TRL's on our kernels (at least); our memory (at most).
SPEED_BAR, PATCH_BAR, MEMORY_BAR = 2.5, 1.5, 0.75
#: The curves are means of the same float32 numbers, summed in another order; a missed token or pair changes them by more.
LOSS_TOLERANCE = 1e-3

COLUMNS = [
    Column("title", "trainer"),
    Column("tokens_per_second", "tokens per second", "count"),
    Column("median_s", "time of a step", "time"),
    Column("vs_best", "faster than TRL by", "ratio"),
    Column("peak_bytes", "peak memory", "bytes"),
    Column("verdict", "losses against TRL's"),
]
DETAILS = [
    Column("title", "trainer"),
    SPREAD,
    TIMES_PRODUCTS,
    Column("memory_share", "memory / TRL's", "percent"),
    Column("first_step_s", "first step", "time"),
    Column("loss_difference", "largest difference from TRL's losses", "error"),
]


def run(name: str, model: Path, pairs: Path, batch: int, steps: int) -> dict[str, Any] | str:
    """The JSON that `benchmarks.trainer_run` prints about one run, or the last line of its error."""
    command = [sys.executable, "-m", "benchmarks.trainer_run", name, "--pairs", str(pairs), "--model", str(model)]
    command += ["--steps", str(steps), "--batch", str(batch), "--max-length", str(MAX_LENGTH)]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "HF_HUB_OFFLINE": "1"}, check=False
    )
    if done.returncode != 0:
        return (done.stderr.strip().splitlines() or ["no output"])[-1]
    return json.loads(done.stdout.strip().splitlines()[-1])


def deviation(found: dict[str, Any], baseline: dict[str, Any]) -> float:
    """Largest difference of the losses, over all steps. Raises ValueError if the runs did not see the same tokens."""
    if found["tokens"] != baseline["tokens"]:
        raise ValueError(f"{found['contender']} saw {found['tokens']} tokens, {BASELINE} {baseline['tokens']}")
    return max(abs(a - b) for a, b in zip(found["losses"], baseline["losses"], strict=True))


def summary(rows: list[dict[str, Any]]) -> str:
    """Our trainer against TRL's, both with their defaults."""
    known = {row["peer"]: row for row in rows if row.get("vs_best")}
    if (ours := known.get("ours")) is None:
        return ""
    said = (
        f"{ours['title']} trains on {ours['vs_best']:.2f} times as many tokens a second as {ours['best_peer']}, with "
        f"{100 * ours['memory_share']:.0f} % of its peak memory; their losses {ours['verdict']}."
    )
    if "ours_whole" in known:
        faster = ours["tokens_per_second"] / known["ours_whole"]["tokens_per_second"]
        said += f" Its step from hidden states is {faster:.2f} times as fast as its step from whole logits."
    if "trl_patched" in known:
        said += f" `apply_to_trl()` makes TRL's own step {known['trl_patched']['vs_best']:.2f} times as fast."
    return said


RESULT = partial(
    Result,
    "trainer",
    "Trainer: training steps of SmolLM2-135M, padding not counted, and peak memory of the process",
    COLUMNS,
    details=DETAILS,
    floor="the time of a step's matrix products and attention alone",
    summary=summary,
)


def table(runs: dict[str, list[dict[str, Any]]], missing: dict[str, str], heading: str) -> Result:
    """One row per trainer; runs: name -> one entry per round."""
    result = RESULT()
    rates = {
        name: [sum(one["tokens"][1:]) / sum(one["step_s"]) for one in rounds] for name, rounds in runs.items() if rounds
    }
    floors = [one["floor_s"] for one in runs.get("ours", ())]
    for name in [*runs, *missing]:
        row: dict[str, Any] = {"case": heading, "peer": name, "title": TITLES[name], "ours": name != BASELINE}
        row["select"] = f"test_trainer[{name}]"
        result.rows.append(row)
        if name in missing:
            row["verdict"] = missing[name]
            continue
        samples = Samples([seconds for one in runs[name] for seconds in one["step_s"]])
        row |= {
            "tokens_per_second": statistics.median(rates[name]),
            "median_s": samples.median,
            "samples_s": samples.seconds,
            "spread": samples.spread,
            "peak_bytes": statistics.median(one["peak_bytes"] for one in runs[name]),
            "first_step_s": statistics.median(one["first_step_s"] for one in runs[name]),
            "losses": runs[name][0]["losses"],
            "tokens": runs[name][0]["tokens"],
        }
        if floors:
            row |= {"floor_s": statistics.median(floors), "times_floor": samples.median / statistics.median(floors)}
        if name == BASELINE and "ours" in rates:
            row["ours_faster"] = statistics.median(a / b for a, b in zip(rates["ours"], rates[name], strict=True))
        if name == BASELINE or BASELINE not in rates:
            continue
        rounds = [a / b for a, b in zip(rates[name], rates[BASELINE], strict=True)]
        best = Best(statistics.median(rounds), BASELINE, min(rounds), max(rounds))
        theirs = statistics.median(one["peak_bytes"] for one in runs[BASELINE])
        row |= {
            **best.row(TITLES[BASELINE]),
            "memory_share": row["peak_bytes"] / theirs,
            "loss_difference": deviation(runs[name][0], runs[BASELINE][0]),
        }
        row["verdict"] = "agree" if row["loss_difference"] <= LOSS_TOLERANCE else "WRONG"
        row["select"] += f" or test_trainer[{BASELINE}]"
    return result


def bars(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The goals and the measured values."""
    measured = {row["peer"]: row for row in rows if row.get("vs_best")}
    found = []
    for name, bar in (("ours", SPEED_BAR), ("trl_patched", PATCH_BAR)):
        if name in measured:
            speed, what = measured[name]["vs_best"], f"{TITLES[name]}, times TRL's tokens a second"
            # The ceiling is TRL's time over the floor: the ratio of a trainer that does nothing else.
            ceiling = measured[name]["vs_best"] * measured[name]["times_floor"] if name == "ours" else None
            found.append({"what": what, "bar": bar, "measured": speed, "met": speed >= bar, "ceiling": ceiling})
    if "ours" in measured:
        memory = measured["ours"]["memory_share"]
        what = "dpo_trainer, peak memory over TRL's"
        found.append({"what": what, "bar": MEMORY_BAR, "measured": memory, "met": memory <= MEMORY_BAR})
    return found


@pytest.fixture(scope="module")
def measured(
    settings: Settings, publish: Callable[[Result], Result], request: pytest.FixtureRequest
) -> dict[str, dict[str, Any]]:
    """The rows, by contender."""
    if settings.device != "cpu":
        pytest.skip("the trainers are compared on a CPU")
    pytest.importorskip("transformers", reason="transformers is not installed (pip install -e .[trainer])")
    small = settings.sizes == "small"
    model = tiny_model(request.getfixturevalue("tmp_path_factory").mktemp("tiny")) if small else model_folder()
    if model is None:
        pytest.skip(NO_MODEL)
    names = wanted(request, "test_trainer", "trainer")
    missing: dict[str, str] = {}
    try:
        import trl  # noqa: F401
    except ImportError:
        missing = {name: f"missing: trl is not installed ({PEERS_EXTRA})" for name in names if "trl" in name}
    pairs = Path(request.config.getoption("--pairs") or TEXT)
    batch = request.config.getoption("--pairs-per-step") or BATCH[settings.sizes]
    rounds, steps = ROUNDS[settings.sizes]
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names if name not in missing}
    for index in range(rounds):
        shift = index % max(len(runs), 1)
        for name in [*list(runs)[shift:], *list(runs)[:shift]]:
            found = run(name, model, pairs, batch, steps)
            step = found if isinstance(found, str) else f"{statistics.median(found['step_s']):.3g} s a step"
            method.tell(f"{name}: {step}")
            if isinstance(found, str):
                missing[name] = f"fails: {found}"
            else:
                runs[name].append(found)
    runs = {name: found for name, found in runs.items() if name not in missing}
    heading = f"{pairs.name}, {counted(batch, 'pair')} a step, at most {MAX_LENGTH} tokens, float32"
    heading += ", a tiny random model" if small else ""
    result = table(runs, missing, heading)
    tokens = next((row["tokens"] for row in result.rows if "tokens" in row), None)
    if tokens:
        result.notes.append(
            f"{heading}: {statistics.mean(tokens):.0f} tokens a step without padding, {counted(rounds, 'round')} of {steps} "
            f"steps, of which the first is not timed; AdamW, constant learning rate, the same pairs in the same order. The floor "
            f"is the time of a step's matrix products and attention alone: policy and reference, each token once."
        )
    result.extra["bars"] = bars(result.rows) if settings.sizes == "full" else []
    publish(result)
    return {row["peer"]: row for row in result.rows}


def test_trainer(measured: dict[str, dict[str, Any]], trainer: str, replay: Callable[[Samples], None]) -> None:
    row = measured[trainer]
    if "samples_s" not in row:
        missing = row["verdict"].startswith("missing")
        (pytest.fail if row["ours"] and not missing else pytest.skip)(row["verdict"])
    assert row.get("verdict") != "WRONG", f"losses differ from TRL's by {row['loss_difference']:.2g}"
    replay(Samples(row["samples_s"]))
