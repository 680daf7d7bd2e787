"""A fault in the sources makes the test fail that is meant to catch it (the table: planted_faults.py).

A copy of the tree gets one fault, and the named tests run there in a process of their own. They must fail with it and pass
without. The slow tests plant every fault and write benchmarks/results/planted_faults.json where DPO_WRITE_RESULTS is 1.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from planted_faults import FAULTS, Fault

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("dpo_kernels", "csrc", "python", "tests", "benchmarks", "examples")
RESULTS = ROOT / "benchmarks" / "results" / "planted_faults.json"
CLEAN: set[tuple[str, ...]] = set()
caught: dict[str, dict[str, object]] = {}


def copy_tree(target: Path) -> Path:
    """What the tests need, in `target`; results of benchmarks are not."""
    ignored = shutil.ignore_patterns("__pycache__", "results", "*.whl")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, target / folder, ignore=ignored)
    for file in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / file, target / file)
    return target


def plant(fault: Fault, tree: Path) -> None:
    """Edit the copy."""
    path = tree / fault.file
    path.write_text(path.read_text().replace(fault.old, fault.new))


def run(tree: Path, test: tuple[str, ...], *, compiles: bool = False) -> subprocess.CompletedProcess[str]:
    """The tests, with the copy's modules; `compiles`: a library that the fault changes is compiled into the copy."""
    env = dict(os.environ, PYTHONPATH=f"{tree}{os.pathsep}{tree / 'python'}", PYTHONDONTWRITEBYTECODE="1")
    env |= {"CUDA_VISIBLE_DEVICES": "", "DPO_WRITE_RESULTS": "0"}
    if compiles:
        env |= {"DPO_KERNELS_CACHE": str(tree / "cache"), "DPO_EMULATOR_CACHE": str(tree / "cache")}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *test]
    return subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True, check=False)


def check_sound(test: tuple[str, ...], folder: Path) -> None:
    """The tests pass in a copy without a fault; each selection runs once."""
    if test in CLEAN:
        return
    tree = copy_tree(folder / "sound")
    done = run(tree, test)
    shutil.rmtree(tree)
    assert done.returncode == 0, f"fails without a fault\n{done.stdout[-3000:]}{done.stderr[-1000:]}"
    CLEAN.add(test)


def check(fault: Fault, folder: Path) -> str:
    """Plant a fault, and return the test that caught it."""
    check_sound(fault.test, folder)
    tree = copy_tree(folder / "faulty")
    plant(fault, tree)
    done = run(tree, fault.test, compiles=fault.file.startswith("csrc/"))
    shutil.rmtree(tree)
    # 1: tests failed. Anything else is an error of the planting, such as a module that cannot be imported.
    assert done.returncode == 1, f"not caught: {fault.wrong}\n{done.stdout[-3000:]}{done.stderr[-1000:]}"
    broken = re.search("BuildError|BackendUnavailable|does not compile|SyntaxError|NameError", done.stdout)
    assert broken is None, done.stdout[-3000:]
    return re.search(r"^FAILED (\S+)", done.stdout, re.MULTILINE)[1]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_each_fault_has_one_place(fault):
    """An edit of the sources may move a fault's place away: then the table needs another text."""
    assert (ROOT / fault.file).read_text().count(fault.old) == 1
    assert fault.old != fault.new


def test_names_differ():
    assert len({fault.name for fault in FAULTS}) == len(FAULTS) >= 30


SAMPLE = [fault for fault in FAULTS if fault.always]


@pytest.fixture(scope="module")
def sound_sample(tmp_path_factory):
    """The sample's tests pass without a fault: one process for all of them."""
    check_sound(tuple(argument for fault in SAMPLE for argument in fault.test), tmp_path_factory.mktemp("sample"))
    CLEAN.update(fault.test for fault in SAMPLE)


@pytest.mark.parametrize("fault", SAMPLE, ids=lambda fault: fault.name)
def test_a_sample_is_caught(fault, tmp_path, sound_sample):
    check(fault, tmp_path)


@pytest.fixture(scope="module")
def results():
    yield
    if os.environ.get("DPO_WRITE_RESULTS") == "1":
        before = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        found = {**before, **caught}
        # In the table's order, without faults that it no longer has.
        kept = {fault.name: found[fault.name] for fault in FAULTS if fault.name in found}
        RESULTS.write_text(json.dumps(kept, indent=1) + "\n")


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_every_fault_is_caught(fault, tmp_path, results):
    started = time.monotonic()
    test = check(fault, tmp_path)
    seconds = round(time.monotonic() - started, 1)
    caught[fault.name] = {"file": fault.file, "wrong": fault.wrong, "caught_by": test, "seconds": seconds}
