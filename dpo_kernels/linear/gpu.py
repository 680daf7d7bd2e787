"""What the planner knows of a GPU: its memory, how rows of logits lie, and where the fused kernels serve.

On a GPU the products are the library's, with the stages between them. The fused kernels (backends/triton: linear_logps,
linear_grad) keep logits on chip and leave out blocks of the gradient; they serve where the caller gives a threshold (`fuse`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from .. import backends

if TYPE_CHECKING:
    from .planner import Head

#: Share of a card's memory that a call may borrow unasked: 2.4 GiB of 80 GB, 8,192 tokens' 16-bit logits at V = 128k.
GPU_SHARE = 0.03
#: Bytes of a CPU's cache line, and elements that rows of logits on a GPU are a multiple of.
_LINE, _GPU_ROW = 64, 64
#: How the fused kernels cut: blocks, segments, partial results a segment, and splits of the vocabulary.
BLOCK, _SEGMENT, _PARTS, _SPLITS = 128, 2048, 7, 4


@dataclass(frozen=True)
class Device:
    """Where a call runs.

    Attributes:
        type: torch's name, "cpu" or "cuda".
        memory: bytes of the card, 0 on a CPU.
        fused: whether the fused kernels can run.
    """

    type: str = "cpu"
    memory: int = 0
    fused: bool = False


CPU = Device()


def row_stride(vocab: int, item_size: int, device_type: str = "cpu") -> int:
    """Elements from one row of a logits buffer to the next.

    CPU: an odd number of cache lines. Where rows lie a multiple of 4 KB apart, as with V = 49,152, a column of them falls into
    one set of the first-level cache, and products that go down columns evict what they are about to use.
    GPU: a multiple of 64 elements. Rows of an odd V, such as 50,257 or 151,669, would otherwise start at any address, and
    cuBLAS and the kernels read them an element at a time instead of 16 bytes.
    """
    if device_type != "cpu":
        return -(-vocab // _GPU_ROW) * _GPU_ROW
    lines = -(-vocab * item_size // _LINE)
    return (lines + 1 - lines % 2) * _LINE // item_size


def card_memory(device: torch.device) -> int:
    """Bytes of the GPU's memory, of which a call's default budget is a share; 0 on other devices."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0


def device_of(backend: str, device: torch.device, dtype: torch.dtype) -> Device:
    """What the planner knows of the device: its memory, and whether this backend's products may be the fused Triton kernels.

    They serve the cuda backend too, where Triton is there; and in Triton's interpreter a CPU.
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
    """(whether the fused kernels multiply and filter the gradient by blocks, why or why not) on a GPU; (False, "") elsewhere.

    Args:
        strategy: from `choose_strategy` without a filter.
        eps: the threshold that the caller gave, or 0. Without one the gradient is exact: no card has measured yet where
            the blocks pay.
    """
    if (device.type == "cpu" and not device.fused) or strategy not in ("whole_pairs", "two_pass"):
        return False, ""
    if eps == 0:
        return False, "the gradient is exact"
    if not device.fused or head.kl or head.kl_gradient:
        return False, "the gradient is exact, for the block filter cannot serve here"
    return True, "blocks of the gradient without probability are left out"
