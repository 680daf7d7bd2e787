"""The Triton backend, for NVIDIA GPUs of compute capability 8.0 or later and AMD's CDNA GPUs; on a CPU in Triton's interpreter.

It has two kernels beyond the stages: `linear_logps` computes the LM head and stage 1, and `linear_grad` computes the gradient of
the head without softmax blocks of negligible probability (dpo_kernels/linear/fused.py uses both).

This package is imported only when the backend is used, so `import dpo_kernels` does not import Triton.
"""

from __future__ import annotations

import sys

import torch
from triton.runtime.jit import JITFunction

from .. import BackendUnavailable
from . import linear_grad
from .device import INTERPRETED, TARGET
from .linear_logps import linear_logps
from .logits_grad import logits_grad
from .preference_loss import preference_loss, sequence_sums
from .token_logps import token_logps

__all__ = [
    "check_available",
    "linear_grad",
    "linear_logps",
    "logits_grad",
    "preference_loss",
    "sequence_sums",
    "token_logps",
]


def _settle_cache_keys() -> None:
    """Compute the cache keys of all kernels in a fixed order, before any is launched.

    In Triton 3.6 and 3.7 the key of a function depends on whether the keys of the functions that it calls were computed before.
    Without a fixed order, a process that launches kernels in another order than the process that compiled them would miss
    Triton's disk cache and compile everything again.
    """
    for name in sorted(module for module in sys.modules if module.startswith(__name__)):
        for _, function in sorted(vars(sys.modules[name]).items()):
            if isinstance(function, JITFunction):
                _ = function.cache_key


_settle_cache_keys()

#: The AMD GPUs that the kernels support: CDNA 2, 3 and 4.
WAVE64 = ("gfx90a", "gfx942", "gfx950")


def check_available(device_type: str) -> None:
    """Raise BackendUnavailable if the kernels cannot run on tensors of this device type."""
    if INTERPRETED.value:
        return
    if device_type != "cuda":
        raise BackendUnavailable(
            f"Triton kernels run on CUDA tensors, not on {device_type} ones "
            "(set TRITON_INTERPRET=1 before importing triton to interpret them on a CPU)"
        )
    if not torch.cuda.is_available():
        raise BackendUnavailable("this torch sees no GPU")
    if TARGET == "hip":
        name = torch.cuda.get_device_properties().gcnArchName.split(":")[0]
        if name not in WAVE64:
            raise BackendUnavailable(
                f"the kernels need a GPU with wavefronts of 64 lanes ({', '.join(WAVE64)}), not {name}"
            )
    elif torch.cuda.get_device_capability() < (8, 0):
        raise BackendUnavailable("the kernels need compute capability 8.0 or newer (bfloat16 pairs)")
