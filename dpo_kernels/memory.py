"""Memory for what is large and written once, the gradient of logits, of a head, a chunk's logits, and whether it is there."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

#: Below this many bytes the pages are few.
LARGE = 8 << 20


#: The size from which Linux hands free memory back, as a power of two of pages; more than _LARGEST_ORDER where it does not.
_REPORTING = Path("/sys/module/page_reporting/parameters/page_reporting_order")
_LARGEST_ORDER = 10


@functools.cache
def _keeps_large_pages() -> bool:
    """Whether a large page that was freed can be had again at once.

    A virtual machine with free page reporting hands large free pages back to its host within seconds. The next touch of each
    then waits for the host: 100 MB took 150 to 250 ms so, 45 ms in small pages, and 10 ms in large ones that were still there.
    """
    try:
        return int(_REPORTING.read_text()) > _LARGEST_ORDER
    except (OSError, ValueError):
        return True


def fresh(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """`torch.empty`, with large pages where a CPU has them: mapping small ones costs more than writing to them.

    With 4 KB pages a gradient of 200 MB costs 49,000 page faults, three to five times the time of writing it. A machine that
    hands free large pages away (`_keeps_large_pages`) is left to its small ones.
    """
    tensor = torch.empty(shape, dtype=dtype, device=device)
    # Without the CPU library (the eager backend alone) torch's own memory has to do; so it has for a compiler's stand-ins.
    if type(tensor) is Tensor and tensor.device.type == "cpu" and tensor.nbytes >= LARGE and _keeps_large_pages():
        prefer = getattr(torch.ops.dpo_kernels_cpu, "prefer_huge_pages", None)
        if prefer is not None:
            prefer(tensor)
    return tensor


#: GPUs that once had less to give than a call asked for.
_short: set[torch.device] = set()


def available(device: torch.device, *sizes: int) -> bool:
    """Whether these blocks, in bytes, can be had together now. They are asked for and given back, to torch's allocator.

    On a CPU the answer is yes. On a GPU asking costs nothing where the allocator holds the memory already. Where it fails,
    torch has returned all its free memory to the driver, which waits for the device; so a GPU that was once short is asked
    for its free memory first.
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
