"""The native CPU library under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer (g++, Linux)."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from benchmarks import instructions
from dpo_kernels import _build
from dpo_kernels.backends import cpu

from conftest import built_once

TESTS = Path(__file__).resolve().parent
SANITIZERS = [
    "-O1",
    "-g1",
    "-fno-omit-frame-pointer",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=undefined",
]
ISAS = [isa for isa, *_ in _build.X86_ISAS if isa != "avx512" or cpu.instruction_set() == "avx512"]
# Load this library before the package loads its own. Its operators are then already registered.
RUN = "import sys, torch, pytest; torch.ops.load_library({library!r}); sys.exit(pytest.main({arguments!r}))"

cpu.check_available("cpu")


def runtime(name: str) -> str:
    """The path of one of the compiler's libraries."""
    return subprocess.run(
        [_build.cxx_compiler(), f"-print-file-name={name}"], capture_output=True, text=True, check=True
    ).stdout.strip()


def sanitized(code: str, isa: str) -> subprocess.CompletedProcess[str]:
    """Run code in a new interpreter with the sanitized CPU library; `{library!r}` in the code is its path."""
    library = built_once("cpu", ".sanitized", partial(_build.build_cpu, flags=SANITIZERS))
    environment = {
        **os.environ,
        # The interpreter is not sanitized, so the runtime must be loaded first. With libstdc++ it intercepts exceptions.
        "LD_PRELOAD": f"{runtime('libasan.so')} {runtime('libstdc++.so')}",
        "ASAN_OPTIONS": "detect_leaks=0",
        "PYTHONMALLOC": "malloc",
        "DPO_KERNELS_ISA": isa,
    }
    return subprocess.run(
        [sys.executable, "-c", code.replace("{library!r}", repr(str(library)))],
        capture_output=True,
        text=True,
        env=environment,
        cwd=TESTS,
        check=False,
    )


def passes(isa: str, *arguments: str) -> None:
    """Assert that `arguments` select tests and that they pass on the sanitized library."""
    words = ["-q", "-x", "-p", "no:cacheprovider", *arguments]
    done = sanitized(RUN.replace("{arguments!r}", repr(words)), isa)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.mark.parametrize("isa", ISAS)
def test_operators_under_address_and_undefined_behaviour_sanitizers(isa):
    passes(isa, "test_operators.py", "-k", "cpu and loss_and_gradient")


@pytest.mark.slow
@pytest.mark.parametrize("isa", ISAS)
def test_everything_native_under_address_and_undefined_behaviour_sanitizers(isa):
    passes(isa, "test_operators.py", "test_linear_filter.py", "test_large.py", "test_whole_call.py", "-m", "not slow",
           "-k", "not triton and not eager and not instruction_set")  # fmt: skip


OUTSIDE = """
import torch; torch.ops.load_library({library!r})
values = torch.ones(2, 2, dtype=torch.float64)
torch.ops.dpo_kernels_cpu.sequence_sums(values, torch.ones(1, 2, dtype=torch.float64), None, torch.empty(2, dtype=torch.float64))
"""


def test_the_sanitizer_sees_what_the_library_reads():
    """With weights for one of two sequences, the library reads out of bounds, because it relies on checks in Python."""
    done = sanitized(OUTSIDE, "baseline")
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr


@pytest.fixture(scope="module")
def threaded(tmp_path_factory):
    """Compile the kernels of the widest instruction set for ThreadSanitizer, and return a function that runs the driver."""
    folder = tmp_path_factory.mktemp("threads")
    isa, march, width = next(row for row in _build.X86_ISAS if row[0] == cpu.instruction_set())
    flags = [*_build.CXX_FLAGS, "-O1", "-g1", "-fsanitize=thread", f"-march={march}"]
    flags += [f"-DDPO_ISA={isa}", f"-DDPO_VECTOR_BYTES={width}"]
    sources = [
        _build.CSRC / "cpu" / source for source in dict.fromkeys(source for source, _ in instructions.STAGES.values())
    ]
    objects = [str(folder / f"{source.stem}.o") for source in sources]
    cxx = _build.cxx_compiler()
    _build.run_all([[cxx, *flags, "-c", str(s), "-o", o] for s, o in zip(sources, objects, strict=True)])

    def run(*defines: str) -> subprocess.CompletedProcess[str]:
        program = folder / f"program{len(list(folder.iterdir()))}"
        driver = str(instructions.HERE / "instructions.cpp")
        _build.run_all([[cxx, *flags, *defines, driver, *objects, "-pthread", "-o", str(program)]])
        environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1"}
        return subprocess.run([str(program)], capture_output=True, text=True, env=environment, check=False)

    return run


def test_threads_that_share_a_call_meet_nowhere(threaded):
    """ops.cpp gives each thread a part of the work. The driver runs only the kernels, to see whether the parts overlap."""
    done = threaded("-DDPO_THREADS=4")
    assert done.returncode == 0, done.stderr[:3000]
    stages = {line.split("\t")[0] for line in done.stdout.splitlines()}
    assert stages == set(instructions.STAGES)


def test_threads_that_do_meet_are_noticed(threaded):
    done = threaded("-DDPO_THREADS=4", "-DDPO_OVERLAP=1")
    assert done.returncode != 0
    assert "data race" in done.stderr
    assert f"dpo::cpu::{cpu.instruction_set()}::token_logps" in done.stderr


REFUSES = """
#include <stdlib.h>
#include <unistd.h>
static int failing;
void fail_aligned(int on) { failing = on; }
void *aligned_alloc(size_t alignment, size_t size) {
  void *memory = 0;
  return failing || posix_memalign(&memory, alignment, size) ? 0 : memory;
}
"""
PRODUCT = """
import ctypes, torch
from dpo_kernels.backends import cpu
cpu.check_available("cpu")
a, b, out = torch.ones(500, 500), torch.ones(500, 500), torch.empty(500, 500)
hold = ctypes.CDLL(None)
for _ in range(2):
    hold.fail_aligned(1)
    try:
        cpu.product(a, b, out)
    except RuntimeError as error:
        print(error)
    hold.fail_aligned(0)
    cpu.product(a, b, out)
    assert out[3, 4] == 500
"""


def test_a_product_without_memory_raises_and_the_next_one_works(tmp_path):
    source, library = tmp_path / "refuses.c", tmp_path / "refuses.so"
    source.write_text(REFUSES)
    _build.run_all([[_build.cxx_compiler(), "-x", "c", "-shared", "-fPIC", str(source), "-o", str(library)]])
    done = subprocess.run(
        [sys.executable, "-c", PRODUCT],
        capture_output=True,
        text=True,
        env={**os.environ, "LD_PRELOAD": str(library)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("no memory left for") == 2
