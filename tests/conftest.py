"""Shared set-up of the tests: the backends that this machine can run, and one thread for a reproducible duration."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

# Without a GPU the Triton kernels run in Triton's interpreter; the variable must be set before triton is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
from filelock import FileLock

from dpo_kernels import _build, backends

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = [name for name in backends.NAMES if backends.why_not(name, DEVICE) is None]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run tests that take `backend` on every backend available here; test_backends.py checks which must be available.

    In a module with a fixture `emulated`, the tests also run on the emulated CUDA sources.
    """
    if "backend" in metafunc.fixturenames:
        emulated = ["cuda"] if hasattr(metafunc.module, "emulated") and "cuda" not in BACKENDS else []
        metafunc.parametrize("backend", BACKENDS + emulated)


@pytest.fixture(autouse=True)
def same_random_numbers_every_time() -> None:
    """Seed the global generators, so that a test draws the same random numbers in every run and order."""
    torch.manual_seed(0)


@pytest.fixture
def device() -> torch.device:
    """Where the operator tests run: the GPU if there is one."""
    return torch.device(DEVICE)


def built_once(name: str, variant: str, build: Callable[[Path], None]) -> Path:
    """Compile a slow library once for all processes of a run, and keep it until a source changes."""
    target = _build.cache_folder() / _build.library_path(name, variant).name
    _build.make_private(target.parent)
    _build.check_private(target)
    with FileLock(target.with_suffix(".lock")):
        if not target.is_file():
            build(target)
    return target


@pytest.fixture(scope="session")
def cuda_library() -> Path:
    """The CUDA library for all default architectures. This needs nvcc but no GPU."""
    installed = _build.library_path("cuda")
    if installed.is_file():
        return installed
    return built_once("cuda", ".all", partial(_build.build_cuda, archs=_build.CUDA_ARCHS))
