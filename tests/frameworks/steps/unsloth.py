"""The DPOTrainer that Unsloth compiles from TRL's. Unsloth runs on a CPU if UNSLOTH_FORCE_CPU is 1 (matrix.py sets it)."""

from __future__ import annotations

import importlib.metadata
import os
import tempfile
from collections.abc import Callable

from torch import Tensor

from ..compare import Size
from .trl import step_with

_FOLDER = tempfile.TemporaryDirectory()
os.environ["UNSLOTH_COMPILE_LOCATION"] = _FOLDER.name

import unsloth  # noqa: E402  before transformers and TRL, as its documentation says
import unsloth.models.rl  # noqa: E402, F401  compiles TRL's trainers


def step_of(size: Size) -> Callable[[], tuple[float, dict[str, Tensor]]]:
    from trl import DPOConfig, DPOTrainer

    assert "Unsloth" in DPOTrainer.__name__
    return step_with(DPOTrainer, DPOConfig, size)


def versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("unsloth", "unsloth_zoo", "trl", "transformers")}
