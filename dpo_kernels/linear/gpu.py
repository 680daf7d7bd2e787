"""The planner's rules for GPUs: memory, the stride of logits, and the use of the fused kernels.

By default a GPU uses the library's matrix products, with the stages between them. If the caller gives a filter threshold, the
fused kernels (backends/triton: linear_logps, linear_grad) are used (`fuse`): they keep logits on chip and skip blocks of the
gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from .. import backends

if TYPE_CHECKING:
    from .planner import Head

#: Share of a GPU's memory in the default budget: 2.4 GiB of 80 GB, the 16-bit logits of 8,192 tokens at V = 128k.
GPU_SHARE = 0.03
#: Bytes of a CPU's cache line, and the number of elements of which a logits row on a GPU is a multiple.
_LINE, _GPU_ROW = 64, 64
#: Sizes in the fused kernels: rows and columns of a block, columns of a segment, partial results per segment, vocabulary splits.
BLOCK, _SEGMENT, _PARTS, _SPLITS = 128, 2048, 7, 4


@dataclass(frozen=True)
class Device:
    """The device of a call.

    Attributes:
        type: torch's name, "cpu" or "cuda".
        memory: bytes of a GPU's memory; 0 on a CPU.
        fused: whether the fused kernels can run.
    """

    type: str = "cpu"
    memory: int = 0
    fused: bool = False


CPU = Device()


def row_stride(vocab: int, item_size: int, device_type: str = "cpu") -> int:
    """Row stride of a logits buffer, in elements.

    CPU: an odd number of cache lines. With a stride that is a multiple of 4 KB, as for V = 49,152, the entries of a column map
    to the same set of the first-level cache, and products that walk down columns evict data that they still need.

    GPU: a multiple of 64 elements. With an odd stride, as for V = 50,257 or 151,669, rows would be unaligned, and cuBLAS and
    the kernels would load single elements instead of 16 bytes.
    """
    if device_type != "cpu":
        return -(-vocab // _GPU_ROW) * _GPU_ROW
    lines = -(-vocab * item_size // _LINE)
    return (lines + 1 - lines % 2) * _LINE // item_size


def card_memory(device: torch.device) -> int:
    """Bytes of the GPU's memory; 0 on other devices."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0


def device_of(backend: str, device: torch.device, dtype: torch.dtype) -> Device:
    """The device as the planner sees it: its memory, and whether the fused Triton kernels can run.

    They can run with the triton backend, with the cuda backend if Triton is installed, and on a CPU in Triton's interpreter.
    """
    if torch.compiler.is_compiling():
        return Device(device.type)
    fused = backend in ("triton", "cuda") and dtype != torch.float64 and backends.why_not("triton", device.type) is None
    return Device(device.type, card_memory(device), fused)


def fused_row_bytes(hidden_size: int, vocab: int, item_size: int) -> int:
    """Working bytes per token of a chunk of the fused kernels."""
    parts = 4 * _PARTS * -(-vocab // _SEGMENT)
    columns = -(-vocab // BLOCK)
    dropped = 2 * 4 * columns
    gradient = 4 * (_SPLITS + 2) * hidden_size
    rows = 2 * hidden_size * item_size
    return columns * BLOCK * item_size + rows + parts + dropped + gradient


def fuse(head: Head, strategy: str, device: Device, eps: float) -> tuple[bool, str]:
    """(whether to use the fused kernels, which filter the gradient by blocks; the reason). (False, "") where they cannot run.

    Args:
        head: the sizes.
        strategy: from `choose_strategy` without a filter.
        device: the device.
        eps: the caller's threshold, or 0. Without a threshold the gradient is exact: it has not been measured yet on which
            GPUs the block filter is faster.
    """
    if (device.type == "cpu" and not device.fused) or strategy not in ("whole_pairs", "two_pass"):
        return False, ""
    if eps == 0:
        return False, "the gradient is exact"
    if not device.fused or head.kl or head.kl_gradient:
        return False, "the gradient is exact, because the block filter does not support this call"
    return True, "blocks of the gradient with negligible probability are skipped"
