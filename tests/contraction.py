"""Makes Triton's interpreter contract products and sums into fused multiply-adds, as a compiler may.

A fused multiply-add keeps the product exact, while the interpreter rounds it. A kernel must be right in both cases. For
example, on a GPU `c - m * scale` with an earlier rounded c = m * scale is not 0 but the rounding error, and 2 to the power of
it may be inf.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

#: Operations that only reshape an operand. A compiler contracts across them.
_LAYOUT = ("create_expand_dims", "create_broadcast", "create_reshape", "create_splat", "create_unsplat")


def _wide(handle: Any) -> Any:
    return handle.data.astype(np.longdouble)


@contextlib.contextmanager
def fused_products(first: str = "left") -> Iterator[None]:
    """A context in which a floating-point sum uses one of its products unrounded.

    first: "left" or "right", the operand that stays unrounded if both are products.
    """
    builder = interpreter.InterpreterBuilder
    names = ("create_fmul", "create_fadd", "create_fsub", *(name for name in _LAYOUT if hasattr(builder, name)))
    original = {name: getattr(builder, name) for name in names}

    def multiply(self: Any, lhs: Any, rhs: Any) -> Any:
        result = original["create_fmul"](self, lhs, rhs)
        result.product = _wide(lhs) * _wide(rhs)
        return result

    def joining(name: str, sign: int) -> Any:
        def join(self: Any, lhs: Any, rhs: Any) -> Any:
            result = original[name](self, lhs, rhs)
            products = [side for side, operand in (("left", lhs), ("right", rhs)) if hasattr(operand, "product")]
            if products:
                joins = first if first in products else products[0]
                a, b = (lhs.product, _wide(rhs)) if joins == "left" else (_wide(lhs), rhs.product)
                result.data = np.asarray(a + sign * b).astype(result.data.dtype)
            return result

        return join

    def looking_through(name: str) -> Any:
        def layout(self: Any, *arguments: Any) -> Any:
            result = original[name](self, *arguments)
            source = arguments[1] if name == "create_splat" else arguments[0]
            if hasattr(source, "product"):
                # Apply the same operation to the elements' indices, to find where each element comes from.
                place = np.arange(source.data.size, dtype=np.int32).reshape(source.data.shape)
                numbers = interpreter.TensorHandle(place, tl.int32)
                moved = original[name](self, *(numbers if argument is source else argument for argument in arguments))
                result.product = source.product.reshape(-1)[moved.data]
            return result

        return layout

    patched = {
        "create_fmul": multiply,
        "create_fadd": joining("create_fadd", 1),
        "create_fsub": joining("create_fsub", -1),
    }
    patched |= {name: looking_through(name) for name in names[3:]}
    for name, function in patched.items():
        setattr(builder, name, function)
    try:
        yield
    finally:
        for name, function in original.items():
            setattr(builder, name, function)
