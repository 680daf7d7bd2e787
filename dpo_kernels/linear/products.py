"""The matrix products of the linear path: native kernels on a CPU where they are faster, else torch's library."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import Parameter

from .. import backends
from . import planner


def multiply(
    backend: str, a: Tensor, b: Tensor, out: Tensor, *, bias: Tensor | None = None, add: bool = False
) -> Tensor:
    """Writes a @ b (+ bias) to `out`, or adds it to `out`.

    Args:
        backend: the call's backend. "cpu" may use its own kernels (csrc/cpu/products.cpp).
        a: [M, K], row- or column-major.
        b: [K, N] of the same dtype, row- or column-major.
        out: [M, N] with unit stride on N, of the same dtype; or float32 for 16-bit a and b, whose products are then summed
            without rounding to 16 bits.
        bias: [N], added to every row; not together with `add`.
        add: add to `out` instead of overwriting it.

    Returns:
        `out`.
    """
    # Subclasses of Tensor, such as quantized weights, have products of their own.
    plain = type(a) in (Tensor, Parameter) and type(b) in (Tensor, Parameter)
    if backend == "cpu" and plain:
        native = backends.load("cpu", "cpu")
        if native.multiplies(a.dtype):
            native.product(a, b, out, bias, add)
            return out
    if a.dtype != out.dtype:
        return _widened(a, b, out, add)
    return _library(a, b, out, bias, add)


def _library(a: Tensor, b: Tensor, out: Tensor, bias: Tensor | None, add: bool) -> Tensor:
    if add:
        return out.addmm_(a, b)
    return torch.mm(a, b, out=out) if bias is None else torch.addmm(bias, a, b, out=out)


def _widened(a: Tensor, b: Tensor, out: Tensor, add: bool) -> Tensor:
    if out.device.type == "cuda":
        return torch.addmm(out, a, b, out_dtype=out.dtype, beta=int(add), out=out)
    # On a CPU the library rounds 16-bit products to 16 bits. With operands converted to float32, the sum over chunks is float32.
    b = b.to(out.dtype)
    for begin in range(0, a.shape[0], planner.WIDENED_COLUMNS):
        part = slice(begin, begin + planner.WIDENED_COLUMNS)
        _library(a[part].to(out.dtype), b, out[part], None, add)
    return out
