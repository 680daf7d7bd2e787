"""Fresh memory for what is large and written once: the gradient of logits, of a head, a chunk's logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

#: Below this many bytes the pages are few.
LARGE = 8 << 20


def fresh(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """`torch.empty`, with large pages where a CPU has them: mapping small ones costs more than writing to them.

    With 4 KB pages a gradient of 200 MB costs 49,000 page faults, three to five times the time of writing it.
    """
    tensor = torch.empty(shape, dtype=dtype, device=device)
    # Without the CPU library (the eager backend alone) torch's own memory has to do; so it has for a compiler's stand-ins.
    if type(tensor) is Tensor and tensor.device.type == "cpu" and tensor.nbytes >= LARGE:
        prefer = getattr(torch.ops.dpo_kernels_cpu, "prefer_huge_pages", None)
        if prefer is not None:
            prefer(tensor)
    return tensor
