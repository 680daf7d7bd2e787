"""The matrix products of the linear path: native kernels on CPU where they are quicker, else torch's library."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import Parameter

from .. import backends
from . import planner


def multiply(
    backend: str, a: Tensor, b: Tensor, out: Tensor, *, bias: Tensor | None = None, add: bool = False
) -> Tensor:
    """a b (+ bias) into `out`, or onto it.

    Args:
        backend: the call's. "cpu" may multiply by itself (csrc/cpu/products.cpp).
        a, b: [M, K] and [K, N] of one dtype, in any orientation.
        out: [M, N] with unit stride on N: of that dtype, or the float32 sums of 16-bit products, unrounded.
        bias: [N], for every row; not together with `add`.
        add: add to what is there.
    """
    # A subclass of Tensor, such as quantised weights, multiplies in its own way.
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
    # The library's 16-bit products on CPU are rounded to 16 bits. Widened operands keep the sum over chunks in float32.
    b = b.to(out.dtype)
    for begin in range(0, a.shape[0], planner.WIDENED_COLUMNS):
        part = slice(begin, begin + planner.WIDENED_COLUMNS)
        _library(a[part].to(out.dtype), b, out[part], None, add)
    return out
