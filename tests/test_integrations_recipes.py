"""Every recipe of examples/recipes runs from the command line on a tiny model, and its loss starts at log 2."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from trainer.tiny import build_model, build_pairs, build_tokenizer

RECIPES = Path(__file__).resolve().parent.parent / "examples" / "recipes"
RUNNABLE = sorted(path.stem for path in RECIPES.glob("*.py") if path.stem != "pairs")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipes")
    tokenizer = build_tokenizer()
    build_model("llama-untied", len(tokenizer)).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in build_pairs(8)))
    return folder


# One recipe runs always. Each needs a new process that imports everything, so the other recipes are slow tests.
SLOW = [name for name in RUNNABLE if name != "bare_loop"]


@pytest.mark.parametrize("recipe", ["bare_loop", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_the_recipe_runs(recipe, inputs):
    if recipe == "trl_trainer":
        pytest.importorskip("trl", reason="pip install --no-deps trl==1.16.0 (the extra `peers`)")
    command = [sys.executable, RECIPES / f"{recipe}.py", inputs / "model", inputs / "pairs.jsonl"]
    if "OUTPUT_DIR" in (RECIPES / f"{recipe}.py").read_text():
        command.append(inputs / "out")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    losses = [float(found) for found in re.findall(r"'loss': '?(\d+\.\d+)", done.stdout)]
    assert len(losses) >= 2, done.stdout
    # transformers_trainer adds a likelihood term. The other recipes are plain DPO and start with policy = reference.
    if recipe != "transformers_trainer":
        assert losses[0] == pytest.approx(math.log(2), abs=1e-3)
