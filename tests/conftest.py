"""Shared set-up of the tests: which backends this machine can run, and one thread for reproducible timing of the suite."""

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
    """Tests that take `backend` run on every backend that can serve here; test_backends.py holds which must.

    In a module with a fixture `emulated` they run on the CUDA sources as well.
    """
    if "backend" in metafunc.fixturenames:
        emulated = ["cuda"] if hasattr(metafunc.module, "emulated") and "cuda" not in BACKENDS else []
        metafunc.parametrize("backend", BACKENDS + emulated)


@pytest.fixture(autouse=True)
def same_random_numbers_every_time() -> None:
    """A test that draws without a generator of its own draws the same in every run and order."""
    torch.manual_seed(0)


@pytest.fixture
def device() -> torch.device:
    """Where the operator tests run: the GPU if there is one."""
    return torch.device(DEVICE)


def built_once(name: str, variant: str, build: Callable[[Path], None]) -> Path:
    """A library that takes long to compile: once for all processes of a run, and kept until a source changes."""
    target = _build.cache_folder() / _build.library_path(name, variant).name
    _build.make_private(target.parent)
    _build.check_private(target)
    with FileLock(target.with_suffix(".lock")):
        if not target.is_file():
            build(target)
    return target


@pytest.fixture(scope="session")
def cuda_library() -> Path:
    """The CUDA library for every architecture of the default. No GPU is needed, but nvcc is."""
    installed = _build.library_path("cuda")
    if installed.is_file():
        return installed
    return built_once("cuda", ".all", partial(_build.build_cuda, archs=_build.CUDA_ARCHS))
