"""The stages as Triton kernels, for NVIDIA GPUs from compute capability 8.0 on and AMD's CDNA (and, interpreted, on a CPU).

Beside the four stages: `linear_logps`, the LM head and stage 1 in one kernel, and `linear_grad`, its gradient without the
blocks of the softmax that hold no probability (dpo_kernels/linear/fused.py puts them together).

Imported only when the backend is asked for, so that `import dpo_kernels` does not load Triton.
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
    """Compute the cache keys of all kernels in one fixed order, before any is launched.

    In Triton 3.6 and 3.7 a function's key holds the constants of a function that it calls only if that one's key was computed
    before. A process that launches in another order than the one that compiled would miss Triton's disk cache, and compile
    everything again.
    """
    for name in sorted(module for module in sys.modules if module.startswith(__name__)):
        for _, function in sorted(vars(sys.modules[name]).items()):
            if isinstance(function, JITFunction):
                _ = function.cache_key


_settle_cache_keys()

#: AMD's GPUs that the kernels compile for: CDNA 2, 3 and 4.
WAVE64 = ("gfx90a", "gfx942", "gfx950")


def check_available(device_type: str) -> None:
    """Raise BackendUnavailable where the kernels cannot run on tensors of this device type."""
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
                f"the kernels are compiled for wavefronts of 64 ({', '.join(WAVE64)}), not for {name}"
            )
    elif torch.cuda.get_device_capability() < (8, 0):
        raise BackendUnavailable("the kernels need compute capability 8.0 or newer (bfloat16 pairs)")
