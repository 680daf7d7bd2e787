"""Which lines the tests run: Python by coverage.py, the C++ of csrc by gcov and gcovr (make coverage).

    python -m benchmarks.coverage native      csrc/cpu and csrc/common, and csrc/cuda on the emulator; one process
    python -m benchmarks.coverage python      dpo_kernels and dpo_trainer; words after `--` are pytest's

Each command writes its part of benchmarks/results/coverage.json and keeps the other part. `native` compiles its own
libraries, without optimisation, and runs the tests below once for each instruction set: a line counts as run if any of
them runs it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from dpo_kernels import _build

ROOT = Path(__file__).resolve().parent.parent
RESULT = Path(__file__).parent / "results" / "coverage.json"
WORK = ROOT / "build" / "coverage"
CPU_TESTS = (
    "test_operators.py",
    "test_linear_filter.py",
    "test_products.py",
    "test_bad_bounds.py",
    "test_whole_call.py",
    "test_hostile.py",
)
CUDA_TESTS = ("test_cuda_emulator.py", "test_hostile.py")
#: Loads the instrumented library first: the package then finds the operators' names registered and loads no other.
RUN = "import sys, torch, pytest; torch.ops.load_library(sys.argv[1]); sys.exit(pytest.main(sys.argv[2:]))"


def run(*command: str, **environment: str) -> None:
    """Run a command. Raises SystemExit if it fails: coverage of failed tests means nothing."""
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, check=False)
    if done.returncode != 0:
        raise SystemExit(f"coverage: {' '.join(command[:4])} ... ended with status {done.returncode}")


def flags(name: str) -> list[str]:
    """Compiler options that put notes and counts under WORK, because objects are compiled in temporary folders."""
    return ["--coverage", "-O0", "-fprofile-update=atomic", "-dumpdir", f"{WORK / name}-"]


def tests(names: tuple[str, ...]) -> list[str]:
    return ["-q", "-m", "not slow", "-k", "not triton", "-p", "no:cacheprovider", *(f"tests/{name}" for name in names)]


def native() -> dict[str, Any]:
    """Run the tests of the native code; returns which lines they ran."""
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir(parents=True)
    library = WORK / "cpu.so"
    _build.build_cpu(library, flags("cpu"))
    for isa, *_ in _build.X86_ISAS:
        selected = [*tests(CPU_TESTS), "-k", "not triton and not eager"]
        run(sys.executable, "-c", RUN, str(library), *selected, DPO_KERNELS_ISA=isa)
    emulator = {"DPO_EMULATOR_CACHE": str(WORK / "emulator"), "DPO_EMULATOR_FLAGS": " ".join(flags("cuda"))}
    run(sys.executable, "-m", "pytest", *tests(CUDA_TESTS), **emulator)
    return read_native()


def read_native() -> dict[str, Any]:
    """The lines that the tests have run so far. A line of a template counts as run if any instance runs it."""
    summary = WORK / "summary.json"
    run(sys.executable, "-m", "gcovr", "--root", str(ROOT), "--filter", "csrc/", "--merge-lines", "--json-summary", str(summary),
        "--gcov-ignore-parse-errors", "--merge-mode-functions=merge-use-line-min", str(WORK))  # fmt: skip
    read = json.loads(summary.read_text())
    files = {each["filename"]: [each["line_covered"], each["line_total"]] for each in read["files"]}
    return described(files)


def python(arguments: list[str]) -> dict[str, Any]:
    """Run the tests that are not slow, or those named; returns which lines of the two packages they ran."""
    summary = WORK / "python.json"
    WORK.mkdir(parents=True, exist_ok=True)
    words = arguments or ["-n", "2", "-m", "not slow"]
    run(sys.executable, "-m", "pytest", "-q", *words, "--cov", "--cov-report", f"json:{summary}")
    files = {
        name: [each["summary"]["covered_lines"], each["summary"]["num_statements"]]
        for name, each in json.loads(summary.read_text())["files"].items()
    }
    return {"tests": " ".join(words), **described(files)}


def described(files: dict[str, list[int]]) -> dict[str, Any]:
    """(lines run, lines) in total, by folder and by file."""
    folders: dict[str, list[int]] = {}
    for name, (covered, total) in files.items():
        folder = folders.setdefault(str(Path(name).parent), [0, 0])
        folder[0] += covered
        folder[1] += total
    covered, total = (sum(pair[i] for pair in files.values()) for i in (0, 1))
    return {"percent": round(100 * covered / total, 1), "lines": [covered, total], "folders": folders, "files": files}


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.coverage", description="Measure which lines the tests run.")
    parser.add_argument("part", choices=("native", "python"))
    parser.add_argument("pytest", nargs="*", help="after --: arguments for pytest, instead of all fast tests")
    given = parser.parse_args(words)
    found = native() if given.part == "native" else python(given.pytest)
    held = json.loads(RESULT.read_text()) if RESULT.is_file() else {}
    RESULT.write_text(json.dumps({**held, given.part: found}, indent=1) + "\n")
    print(f"{given.part}: {found['percent']} % of {found['lines'][1]} lines")


if __name__ == "__main__":
    main()
