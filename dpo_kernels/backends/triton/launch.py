"""Host side of the Triton kernels: alignment of rows, launch configuration, and kernel launches as objects.

A stage builds a `Launch` from its tensors. The same object is run and compiled ahead of time (benchmarks/machine_code.py), so
the inspected machine code is the code that runs.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .device import FOLDED, INTERPRETED, LOG2E, SCALED, SOFTCAPPED, TARGET

#: One fixed configuration. Autotuning would delay the first call and make results depend on the tuning run.
#: With 4 warps x 4 loads of 16 bytes a block has 8 KB in flight (16 KB if it also reads the reference). The register count
#: allows 9 to 16 resident blocks per SM (4 or 5 with the reference), so at least 64 KB are in flight; a B200 needs 40 KB. A tile
#: is 8 KB (4,096 16-bit logits), so a vocabulary of 32,000 still has 7 tiles, and the masked tile of the label is a small part
#: of the work. More warps per row would make the merge at the end of a row longer; fewer would need more rows to occupy the GPU.
LANES = 128
NUM_WARPS = LANES // (32 if TARGET == "cuda" else 64)  # AMD's wavefronts have 64 lanes
#: In the interpreter a tile has a quarter of that size, so small vocabularies reach every loop.
UNROLL = 1 if INTERPRETED.value else 4

#: The kernels rely on fused multiply-add: the maximum is subtracted from a product that is not rounded before.
OPTIONS = {"num_warps": NUM_WARPS, "enable_fp_fusion": True}


#: Tensors of a few bytes per token or sequence, read and written element by element. Their alignment may differ from call to
#: call. Kernels are not specialized on it, because a recompilation would stop a training run for seconds.
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
        """Launch on the current stream of `device_of`'s device; an empty grid is not launched."""
        if math.prod(self.grid) > 0:
            with torch.cuda.device_of(device_of):
                self.kernel[self.grid](**self.arguments, **self.options)

    def signature(self) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int, ...], list[list[Any]]]]:
        """(argument types, constants, attributes) for triton.compiler.ASTSource, with the specialization of a real call."""
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
    """Tile of a product with the head: a program computes [n tokens, v entries], in steps of h along the inner dimension.

    Memory latency is hidden by software pipelining: `stages` steps of the inner dimension are in flight.
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
        """The tile's sizes as constants of a kernel."""
        return {"BLOCK_N": self.n, "BLOCK_V": self.v, "BLOCK_H": self.h}


#: 16-bit products: [128, 128] logits take 64 float32 registers in each of 256 threads, which leaves registers for the epilogue.
#: Three stages of 64 take 96 KB of shared memory, and each byte from L2 is used for 64 flops. If only log-sum-exps are needed,
#: Hopper has registers for twice the entries, because its tensor cores write accumulators asynchronously: 85 flops per byte.
#: float32 products run on CUDA cores as 4 x 4 outer products, for which a small tile is better. The interpreter's tile is
#: smaller still, so that small vocabularies reach every loop.
_TILE, _WIDE = Tile(128, 128, 64, 8, 3), Tile(128, 256, 64, 8, 3)
_FLOAT32 = Tile(64, 128, 16, 8, 3)
if INTERPRETED.value:
    _TILE = _WIDE = _FLOAT32 = Tile(16, 32, 16, 4, 1)


def tile_of(dtype: torch.dtype, wide: bool = False) -> Tile:
    """The tile for products of this dtype; `wide` for a kernel with little arithmetic on the logits."""
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
    """A tensor's address rounded down to 16 bytes, so that Triton uses 128-bit loads."""

    address: int
    dtype: torch.dtype

    def data_ptr(self) -> int:
        return self.address


def aligned_base(tensor: Tensor) -> tuple[Any, int]:
    """(pointer that is 16-byte aligned, offset of the tensor's first element from it)."""
    past = tensor.data_ptr() % 16
    if past == 0 or INTERPRETED.value:
        return tensor, 0
    return _AlignedPointer(tensor.data_ptr() - past, tensor.dtype), past // tensor.element_size()


def group_size(*tensors: Tensor | None) -> int:
    """Logits per group: 16 bytes of the widest dtype. With equal groups a thread holds the same columns of every tensor."""
    return min(16 // tensor.element_size() for tensor in tensors if tensor is not None)


def _row_strides(tensor: Tensor) -> tuple[int, int]:
    # The stride of a dimension of size 1 is arbitrary and not used.
    return (tensor.stride(0) if tensor.shape[0] > 1 else 0, tensor.stride(1) if tensor.shape[1] > 1 else 0)


def rows_aligned(tensor: Tensor, group: int) -> bool:
    """Whether every row starts at a group boundary."""
    _, base = aligned_base(tensor)
    return all(n % group == 0 for n in (base, *_row_strides(tensor)))


def shifted_alike(tensor: Tensor, other: Tensor, group: int) -> bool:
    """Whether corresponding rows of both tensors have the same offset from a group boundary."""
    _, base = aligned_base(tensor)
    _, other_base = aligned_base(other)
    strides = zip(_row_strides(tensor), _row_strides(other), strict=True)
    return (base - other_base) % group == 0 and all((a - b) % group == 0 for a, b in strides)


def round_to_float32(value: float) -> float:
    """The nearest float32 as a Python float, the value of a float32 kernel argument."""
    return struct.unpack("f", struct.pack("f", value))[0]


def exponent_map(logit_scale: float, logit_softcap: float) -> tuple[int, float, float]:
    """(MAP, unit, log2_scale) of the kernels' variable x, with z = unit * x and exp(z) = 2^(x * log2_scale).

    FOLDED: x is the stored logit; SOFTCAPPED: x is the tanh; SCALED: x is z. log2_scale = float32(unit log2 e).
    """
    if logit_softcap:
        mapping, unit = SOFTCAPPED, logit_softcap
    elif logit_scale <= 0:
        mapping, unit = SCALED, 1.0
    else:
        mapping, unit = FOLDED, logit_scale
    return mapping.value, unit, round_to_float32(unit * LOG2E.value)
