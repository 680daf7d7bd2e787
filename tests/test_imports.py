"""`import dpo_kernels` brings nothing heavy beside torch itself, and torch only when it is used."""

import subprocess
import sys

import pytest

import dpo_kernels

CODE = """
import sys, time
begin = time.process_time()
import torch
middle = time.process_time()
before = set(sys.modules)
import dpo_kernels
for name in dpo_kernels.__all__:
    getattr(dpo_kernels, name)
end = time.process_time()
roots = {name.partition(".")[0] for name in set(sys.modules) - before}
print(end - middle, middle - begin, *sorted(roots))
"""
LAZY = """
import sys
import dpo_kernels
listed = set(dir(dpo_kernels)) >= set(dpo_kernels.__all__)
print(dpo_kernels.__version__, listed, "torch" in sys.modules, dpo_kernels.linear.__name__, "torch" in sys.modules)
"""


def run(code: str) -> list[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()


def test_all_of_it_costs_little_beside_torch():
    """In processor time: at most 0.3 s, and 0.3 of torch's. An import of torch's compiler takes as long as the rest of torch."""
    runs = []
    for _ in range(3):
        ours, theirs, *roots = run(CODE)
        assert roots == ["dpo_kernels"]
        runs.append((float(ours), float(theirs)))
    assert min(ours for ours, _ in runs) < 0.3
    assert min(ours for ours, _ in runs) < 0.3 * min(theirs for _, theirs in runs)


def test_names_are_imported_when_they_are_used():
    assert run(LAZY) == [dpo_kernels.__version__, "True", "False", "dpo_kernels.linear", "True"]


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'dpo_kernels' has no attribute 'dpo_los'"):
        dpo_kernels.dpo_los  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'dpo_los' from 'dpo_kernels'"):
        from dpo_kernels import dpo_los  # noqa: F401


def test_names_without_torch_are_those_of_the_code():
    from dpo_kernels import backends, functional, names, objectives

    assert backends.NAMES == names.BACKENDS
    assert functional.LINEAR_STATISTICS == names.LINEAR_STATISTICS
    assert tuple(objectives.OBJECTIVES) == names.OBJECTIVES
