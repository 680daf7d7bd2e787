"""Shared set-up of the tests: which backends this machine can run, and one thread for reproducible timing of the suite."""

import os

import torch

# Without a GPU the Triton kernels run in Triton's interpreter; the variable must be set before triton is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest

from dpo_kernels import backends

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = [name for name in backends.NAMES if backends.why_not(name, DEVICE) is None]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Tests that take `backend` run on every backend that can serve here; test_backends.py holds which must."""
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", BACKENDS)


@pytest.fixture(autouse=True)
def same_random_numbers_every_time() -> None:
    """A test that draws without a generator of its own draws the same in every run and order."""
    torch.manual_seed(0)


@pytest.fixture
def device() -> torch.device:
    """Where the operator tests run: the GPU if there is one."""
    return torch.device(DEVICE)
