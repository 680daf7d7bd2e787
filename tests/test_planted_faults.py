"""Each fault of planted_faults.py makes the test fail that must catch it.

One fault is planted into a copy of the tree, and the fault's tests run there in a separate process. They must fail with the
fault and pass without it. The slow tests plant every fault and, if DPO_WRITE_RESULTS is 1, write
benchmarks/results/planted_faults.json.
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
    """Copy the files that the tests need to `target`, without benchmark results."""
    ignored = shutil.ignore_patterns("__pycache__", "results", "*.whl")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, target / folder, ignore=ignored)
    for file in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / file, target / file)
    return target


def plant(fault: Fault, tree: Path) -> None:
    """Write the fault into the copy."""
    path = tree / fault.file
    path.write_text(path.read_text().replace(fault.old, fault.new))


def run(tree: Path, test: tuple[str, ...], *, compiles: bool = False) -> subprocess.CompletedProcess[str]:
    """Run the tests on the copy's modules. `compiles`: compile a library that the fault changes into the copy."""
    env = dict(os.environ, PYTHONPATH=f"{tree}{os.pathsep}{tree / 'python'}", PYTHONDONTWRITEBYTECODE="1")
    env |= {"CUDA_VISIBLE_DEVICES": "", "DPO_WRITE_RESULTS": "0"}
    if compiles:
        env |= {"DPO_KERNELS_CACHE": str(tree / "cache"), "DPO_EMULATOR_CACHE": str(tree / "cache")}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *test]
    return subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True, check=False)


def check_sound(test: tuple[str, ...], folder: Path) -> None:
    """Check that the tests pass in a copy without a fault. Each selection of tests runs once."""
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
    # Exit status 1: tests failed. Any other status is an error of the fault itself, such as a module that does not import.
    assert done.returncode == 1, f"not caught: {fault.wrong}\n{done.stdout[-3000:]}{done.stderr[-1000:]}"
    broken = re.search("BuildError|BackendUnavailable|does not compile|SyntaxError|NameError", done.stdout)
    assert broken is None, done.stdout[-3000:]
    return re.search(r"^FAILED (\S+)", done.stdout, re.MULTILINE)[1]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_each_fault_has_one_place(fault):
    """If an edit of the sources removes a fault's text, the table needs another text."""
    assert (ROOT / fault.file).read_text().count(fault.old) == 1
    assert fault.old != fault.new


def test_names_differ():
    assert len({fault.name for fault in FAULTS}) == len(FAULTS) >= 30


SAMPLE = [fault for fault in FAULTS if fault.always]


@pytest.fixture(scope="module")
def sound_sample(tmp_path_factory):
    """Check in one process that the tests of the sample pass without a fault."""
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
        # In the order of the table, without faults that are no longer in it.
        kept = {fault.name: found[fault.name] for fault in FAULTS if fault.name in found}
        RESULTS.write_text(json.dumps(kept, indent=1) + "\n")


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_every_fault_is_caught(fault, tmp_path, results):
    started = time.monotonic()
    test = check(fault, tmp_path)
    seconds = round(time.monotonic() - started, 1)
    caught[fault.name] = {"file": fault.file, "wrong": fault.wrong, "caught_by": test, "seconds": seconds}
