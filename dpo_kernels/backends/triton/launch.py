"""Host side of the Triton kernels: how a tensor's rows lie in memory, and a launch as a value that can be run or compiled.

A stage builds a `Launch` from its tensors; running it and compiling it ahead of time (benchmarks/machine_code.py) start
from the same object, so the machine code that is inspected is the machine code that runs.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .device import FOLDED, INTERPRETED, LOG2E, SCALED, SOFTCAPPED, TARGET

#: One argued configuration, no autotuning (a first-call stall, and results that depend on who tuned).
#: 4 warps x 4 loads of 16 bytes: a block has 8 KB in flight (16 KB where it reads the reference too). Registers let 9 to
#: 16 blocks be resident per SM (4 or 5 with the reference), so 64 KB and more are in flight where a B200 needs 40. A tile
#: is 8 KB (4,096 16-bit logits): small enough that a vocabulary of 32,000 still has 7 of them, so that the masked tile of
#: the label stays a small part. More warps per row would lengthen the merge at the end of every row; fewer would need more
#: rows to fill the machine.
LANES = 128
NUM_WARPS = LANES // (32 if TARGET == "cuda" else 64)  # AMD's wavefronts have 64 lanes
#: The interpreter takes a quarter of that tile, so that small vocabularies reach every loop.
UNROLL = 1 if INTERPRETED.value else 4

#: Fused multiply-add is part of the numerics (the maximum is subtracted without rounding the product first).
OPTIONS = {"num_warps": NUM_WARPS, "enable_fp_fusion": True}


#: Tensors of a few bytes a token or a sequence, read and written an element at a time. Their alignment may differ from call
#: to call, so no kernel may be specialised on it: compiling it anew would stop a training run for seconds.
SMALL = [
    "labels", "weights", "values", "other_values", "cu_seqlens", "scratch", "other_scratch", "ref_scratch", "counts",
    "logps", "max", "log_sum", "ref_logps", "ref_max", "ref_log_sum", "entropy", "kl", "accuracy", "mean_logits", "log_sum_sq",
    "grad_logps", "grad_kl", "grad_forward_kl", "tail",
    "beta", "label_smoothing", "given_ref_sums", "losses", "sums", "ref_sums", "coef",
]  # fmt: skip


@dataclass(frozen=True)
class Launch:
    """One kernel call: `kernel[grid](**arguments, **options)`."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, Any] = field(default_factory=lambda: OPTIONS)

    def run(self, device_of: Tensor) -> None:
        """Launch on the current stream of the device that holds `device_of`; nothing to do for an empty grid."""
        if math.prod(self.grid) > 0:
            with torch.cuda.device_of(device_of):
                self.kernel[self.grid](**self.arguments, **self.options)

    def signature(self) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int, ...], list[list[Any]]]]:
        """(argument types, constants, attributes) for triton.compiler.ASTSource, specialised as a real call would be."""
        types: dict[str, str] = {}
        constants: dict[str, Any] = {}
        attributes: dict[tuple[int, ...], list[list[Any]]] = {}
        for index, parameter in enumerate(self.kernel.params):
            name, value = parameter.name, self.arguments[parameter.name]
            if parameter.is_constexpr or value is None:
                types[name] = "constexpr"
                constants[name] = value
            elif hasattr(value, "data_ptr"):
                types[name] = "*" + _TRITON_TYPE[value.dtype]
                if value.data_ptr() % 16 == 0 and not parameter.do_not_specialize_on_alignment:
                    attributes[(index,)] = [["tt.divisibility", 16]]
            else:
                types[name] = parameter.annotation_type or ("i32" if isinstance(value, int) else "fp32")
                if isinstance(value, int) and value % 16 == 0 and not parameter.do_not_specialize:
                    attributes[(index,)] = [["tt.divisibility", 16]]
        return types, constants, attributes


_TRITON_TYPE = {
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int8: "i8",
}


@dataclass(frozen=True)
class Tile:
    """How a product with the head is cut: a program computes [n tokens, v entries], h of the inner dimension at a time.

    A product's threads, not its rows, hide the latency of memory: `stages` steps of the inner dimension are under way.
    """

    n: int
    v: int
    h: int
    warps: int
    stages: int

    @property
    def options(self) -> dict[str, Any]:
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}

    def blocks(self) -> dict[str, int]:
        """The kernels' constants."""
        return {"BLOCK_N": self.n, "BLOCK_V": self.v, "BLOCK_H": self.h}


#: 16-bit products: [128, 128] logits are 64 float32 registers in each of 256 threads, which leaves room for what happens to
#: them there; three stages of 64 take 96 KB of shared memory, and every byte from L2 serves 64 flops. Where nothing but lse is
#: wanted Hopper, whose accumulators the tensor cores write asynchronously, has room for twice the entries: 85 flops a byte.
#: float32 runs on the ordinary cores, whose 4 x 4 outer products ask for a small tile. The interpreter's is smaller still, so
#: that small vocabularies reach every loop.
_TILE, _WIDE = Tile(128, 128, 64, 8, 3), Tile(128, 256, 64, 8, 3)
_FLOAT32 = Tile(64, 128, 16, 8, 3)
if INTERPRETED.value:
    _TILE = _WIDE = _FLOAT32 = Tile(16, 32, 16, 4, 1)


def tile_of(dtype: torch.dtype, wide: bool = False) -> Tile:
    """The tile for products of this dtype; `wide` where a tile's logits meet little arithmetic."""
    if dtype == torch.float32:
        return _FLOAT32
    return _WIDE if wide else _TILE


def arch_of(device: torch.device) -> int:
    """Compute capability as one number, 90 for 9.0; 0 for the interpreter."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@dataclass(frozen=True)
class _AlignedPointer:
    """A tensor's address rounded down to 16 bytes: what Triton needs to know to use 128-bit loads."""

    address: int
    dtype: torch.dtype

    def data_ptr(self) -> int:
        return self.address


def aligned_base(tensor: Tensor) -> tuple[Any, int]:
    """(pointer that is 16-byte aligned, elements from it to the tensor's first)."""
    past = tensor.data_ptr() % 16
    if past == 0 or INTERPRETED.value:
        return tensor, 0
    return _AlignedPointer(tensor.data_ptr() - past, tensor.dtype), past // tensor.element_size()


def group_size(*tensors: Tensor | None) -> int:
    """Logits per group: 16 bytes of the widest dtype, so that one thread holds the same columns of every tensor."""
    return min(16 // tensor.element_size() for tensor in tensors if tensor is not None)


def _row_strides(tensor: Tensor) -> tuple[int, int]:
    # The stride of a dimension of size 1 is arbitrary and never used.
    return (tensor.stride(0) if tensor.shape[0] > 1 else 0, tensor.stride(1) if tensor.shape[1] > 1 else 0)


def rows_aligned(tensor: Tensor, group: int) -> bool:
    """True if every row starts at a group boundary."""
    _, base = aligned_base(tensor)
    return all(n % group == 0 for n in (base, *_row_strides(tensor)))


def shifted_alike(tensor: Tensor, other: Tensor, group: int) -> bool:
    """True if corresponding rows of both tensors have the same distance to a group boundary."""
    _, base = aligned_base(tensor)
    _, other_base = aligned_base(other)
    strides = zip(_row_strides(tensor), _row_strides(other), strict=True)
    return (base - other_base) % group == 0 and all((a - b) % group == 0 for a, b in strides)


def round_to_float32(value: float) -> float:
    """The nearest float32, as a Python float: what a float32 kernel argument will hold."""
    return struct.unpack("f", struct.pack("f", value))[0]


def exponent_map(logit_scale: float, logit_softcap: float) -> tuple[int, float, float]:
    """(MAP, unit, log2_scale): the kernels' variable x stands for the logit z = unit * x, its exponent is x * log2_scale.

    FOLDED: x is the logit as stored; SOFTCAPPED: x is the tanh; SCALED: x is z. log2_scale = float32(unit log2 e).
    """
    if logit_softcap:
        mapping, unit = SOFTCAPPED, logit_softcap
    elif logit_scale <= 0:
        mapping, unit = SCALED, 1.0
    else:
        mapping, unit = FOLDED, logit_scale
    return mapping.value, unit, round_to_float32(unit * LOG2E.value)
