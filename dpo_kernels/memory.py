"""Allocation of large tensors that are written once (gradients, chunks of logits), and a test for available memory."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ._build import NAMESPACE

_kernels = getattr(torch.ops, f"{NAMESPACE}_cpu")

#: Bytes from which page faults matter.
LARGE = 8 << 20


#: Linux reports free blocks of 2^order pages to the host of a virtual machine; an order above _LARGEST_ORDER turns that off.
_REPORTING = Path("/sys/module/page_reporting/parameters/page_reporting_order")
_LARGEST_ORDER = 10


@functools.cache
def _keeps_large_pages() -> bool:
    """Whether the system keeps large pages after they are freed.

    A virtual machine with free page reporting returns large free pages to its host within seconds. The next access to such a
    page waits for the host. Touching 100 MB took 150 to 250 ms in returned large pages, 45 ms in small pages, and 10 ms in
    large pages that had not been returned.
    """
    try:
        return int(_REPORTING.read_text()) > _LARGEST_ORDER
    except (OSError, ValueError):
        return True


def fresh(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """`torch.empty`, but large tensors on a CPU get 2 MB pages where the system has them.

    With 4 KB pages a gradient of 200 MB causes 49,000 page faults, which take three to five times as long as writing it. A
    machine that returns free large pages to its host (`_keeps_large_pages`) keeps small ones.
    """
    tensor = torch.empty(shape, dtype=dtype, device=device)
    # Fake tensors of a compiler have no memory. Without the CPU library (eager backend only) torch's own pages are used.
    if type(tensor) is Tensor and tensor.device.type == "cpu" and tensor.nbytes >= LARGE and _keeps_large_pages():
        prefer = getattr(_kernels, "prefer_huge_pages", None)
        if prefer is not None:
            prefer(tensor)
    return tensor


#: GPUs on which an allocation has failed.
_short: set[torch.device] = set()


def available(device: torch.device, *sizes: int) -> bool:
    """Whether blocks of these sizes, in bytes, can be allocated together now; always True on a CPU.

    On a GPU the blocks are allocated and freed, which is cheap if torch's caching allocator already holds the memory. A failed
    allocation is expensive: torch returns all its cached memory to the driver, which synchronizes. So after the first failure
    on a GPU its free memory is queried first.
    """
    if device.type != "cuda":
        return True
    if device in _short:
        free = torch.cuda.mem_get_info(device)[0]
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        if sum(sizes) > free:
            return False
    try:
        blocks = [torch.empty(size, dtype=torch.uint8, device=device) for size in sizes]
    except torch.cuda.OutOfMemoryError:
        _short.add(device)
        return False
    del blocks
    return True
