"""The stages as Triton kernels, for NVIDIA GPUs from compute capability 8.0 on (and, interpreted, for tests on a CPU).

Beside the four stages: `linear_logps`, the LM head and stage 1 in one kernel, and `linear_grad`, its gradient without the
blocks of the softmax that hold no probability (dpo_kernels/linear/fused.py puts them together).

Imported only when the backend is asked for, so that `import dpo_kernels` does not load Triton.
"""

from __future__ import annotations

import torch

from .. import BackendUnavailable
from . import linear_grad
from .device import INTERPRETED
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


def check_available(device_type: str) -> None:
    """Raise BackendUnavailable where the kernels cannot run on tensors of this device type."""
    if INTERPRETED.value:
        return
    if device_type != "cuda":
        raise BackendUnavailable(
            f"Triton kernels run on CUDA tensors, not on {device_type} ones "
            "(set TRITON_INTERPRET=1 before importing triton to interpret them on a CPU)"
        )
    if torch.version.hip is not None:
        raise BackendUnavailable("the kernels hold NVIDIA PTX and do not run under ROCm")
    if torch.cuda.get_device_capability() < (8, 0):
        raise BackendUnavailable("the kernels need compute capability 8.0 or newer (bfloat16 pairs)")
