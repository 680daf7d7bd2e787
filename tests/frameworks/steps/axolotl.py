"""Axolotl's AxolotlDPOTrainer, after axolotl has patched TRL as it does at the start of a run.

Its packages for quantization, multipacking and telemetry are not needed for the step; mocks stand for them.
"""

from __future__ import annotations

import importlib.machinery
import importlib.metadata
import sys
from collections.abc import Callable
from types import SimpleNamespace
from unittest import mock

from torch import Tensor

from ..compare import Size
from .trl import step_with

for _name in ("bitsandbytes", "bitsandbytes.nn", "bitsandbytes.functional", "numba", "posthog"):
    sys.modules[_name] = mock.MagicMock(__spec__=importlib.machinery.ModuleSpec(_name, None), __path__=[])


def step_of(size: Size) -> Callable[[], tuple[float, dict[str, Tensor]]]:
    from axolotl.core.trainers.dpo.args import AxolotlDPOConfig
    from axolotl.core.trainers.dpo.trainer import AxolotlDPOTrainer
    from axolotl.loaders.patch_manager import PatchManager

    PatchManager._apply_trl_trainer_utils_patches(SimpleNamespace(cfg=SimpleNamespace(rl="dpo")))
    return step_with(AxolotlDPOTrainer, AxolotlDPOConfig, size)


def versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("axolotl", "trl", "transformers")}
