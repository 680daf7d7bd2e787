"""A pretend GPU: CPU tensors that claim to be on "cuda", and counts of the work that a real device would get.

    with PretendGPU() as gpu:
        hidden = gpu.tensor(torch.randn(4, 8, 16)).requires_grad_()
        gpu.reset()
        ...                                   # forward, backward
    assert gpu.syncs == ["tolist"]

Every aten operation runs on the CPU. Triton kernels run in Triton's interpreter (conftest.py turns it on), so the counts cover
the same host code that launches kernels on a real GPU. The counts are

* `syncs`: names of calls that make the host wait for the stream: `item`, `bool`, `tolist`, `.cpu()`, `nonzero`, indexing by
  a mask, `bincount`, `repeat_interleave` without `output_size`, and copies to or from pageable memory.
* `launches`: names of operations that start at least one kernel. Views, allocations, copies from the host and operations
  on empty tensors do not count. An aten operation counts once, although some (sort, nonzero) start several kernels. A Triton
  kernel's name begins with `triton::`.
* `bytes`: bytes that aten operations read and write, each tensor once; `bytes_of` gives them by name. Matrix products are
  not included. They are in `products`, as (name, operands) with the operands' shapes, strides and dtypes. Triton kernels
  are in neither.

An operation on both CPU and GPU tensors is refused, as on a real device.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map_only

DEVICE = torch.device("cuda", 0)
_aten = torch.ops.aten
_SYNCS = {
    "_local_scalar_dense": "item",
    **{name: name for name in ("nonzero", "masked_select", "bincount", "_unique2", "unique_dim", "equal", "histc")},
}
_PRODUCTS = {"mm", "addmm", "addmm_", "bmm", "baddbmm", "mv", "addmv", "dot"}
_ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "resize_", "_pin_memory"}
#: In-place operations that do not read what they overwrite.
_OVERWRITES = {"copy_", "zero_", "fill_", "normal_", "uniform_", "random_", "bernoulli_", "exponential_"}


class OnGPU(torch.Tensor):
    """A CPU tensor, `inner`, that claims in Python to be on a GPU. C++ code sees the true device."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> OnGPU:
        wrapper = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype
        )
        wrapper.inner = inner
        return wrapper

    device = property(lambda self: DEVICE)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    def __repr__(self) -> str:
        return f"OnGPU({self.inner!r})"

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def get_device(self) -> int:
        return DEVICE.index

    def to(self, *args: Any, copy: bool = False, **kwargs: Any) -> Tensor:
        if args and isinstance(args[0], Tensor):
            return self.to(args[0].device, args[0].dtype, copy=copy)
        device, dtype, _, _ = torch._C._nn._parse_to(*args, **kwargs)
        moved = super().to(self.dtype if dtype is None else dtype, copy=copy)
        return moved.cpu() if device is not None and device.type == "cpu" else moved

    def cpu(self) -> Tensor:
        PretendGPU.active().syncs.append("cpu")
        return self.inner.detach().clone()

    def numpy(self) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def tolist(self) -> Any:
        PretendGPU.active().syncs.append("tolist")
        return self.inner.tolist()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.to and not isinstance(args[0], OnGPU):
            return args[0].to(args[1].device, args[1].dtype)
        return super().__torch_function__(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return PretendGPU.active().run(func, args, kwargs or {})


class PretendGPU(TorchDispatchMode):
    """See the module's docstring.

    Args:
        memory: the card's memory in bytes.
        largest: an allocation of more bytes than this raises torch.cuda.OutOfMemoryError.
        capability: the card's compute capability.
    """

    _active: PretendGPU | None = None

    def __init__(
        self, memory: int = 80 * 10**9, largest: int | None = None, capability: tuple[int, int] = (9, 0)
    ) -> None:
        super().__init__()
        self.memory, self.largest, self.capability = memory, largest, capability
        self._patches: list[Any] = []
        self._depth = 0
        self.reset()

    def reset(self) -> None:
        """Set all counts to zero."""
        self.syncs: list[str] = []
        self.launches: list[str] = []
        self.bytes_of: Counter[str] = Counter()
        self.products: list[tuple[str, list[SimpleNamespace]]] = []
        self.allocated: list[int] = []

    @property
    def bytes(self) -> int:
        """Bytes that operations other than matrix products have read and written."""
        return sum(self.bytes_of.values())

    @classmethod
    def active(cls) -> PretendGPU:
        """The pretend GPU whose `with` block is active."""
        if cls._active is None:
            raise RuntimeError("a pretend GPU's tensor outlived its `with PretendGPU()` block")
        return cls._active

    def tensor(self, values: Tensor) -> Tensor:
        """A copy of the CPU tensor on the GPU, not counted."""
        return OnGPU(values.detach().clone())

    def __enter__(self) -> PretendGPU:
        if self._depth == 0:
            # torch.tensor(list, device=...) makes a CPU tensor and copies it. With this setting the copy is dispatched.
            torch._C._set_only_lift_cpu_tensors(True)
            PretendGPU._active = self
            cuda = {
                "_lazy_init": lambda: None,
                "is_available": lambda: True,
                "current_device": lambda: 0,
                "device_count": lambda: 1,
                "get_device_capability": lambda *_: self.capability,
                "get_device_properties": lambda *_: SimpleNamespace(
                    total_memory=self.memory, multi_processor_count=132, name="pretend"
                ),
                "mem_get_info": lambda *_: (self.memory if self.largest is None else self.largest, self.memory),
                "memory_reserved": lambda *_: 0,
                "memory_allocated": lambda *_: 0,
                "is_current_stream_capturing": lambda: False,
                "current_stream": lambda *_: SimpleNamespace(cuda_stream=0),
                "synchronize": lambda *_: self.syncs.append("synchronize"),
            }
            self._patches = [mock.patch.object(torch.cuda, name, value) for name, value in cuda.items()]
            # The self-check at the first use must not be counted.
            self._patches.append(mock.patch.dict(os.environ, {"DPO_KERNELS_SELFCHECK": "0"}))
            launch = sys.modules.get("dpo_kernels.backends.triton.launch")
            if launch is None:
                from dpo_kernels import backends

                if backends.why_not("triton", "cuda") is None:
                    launch = sys.modules["dpo_kernels.backends.triton.launch"]
            if launch is not None:
                self._patches.append(mock.patch.object(launch.Launch, "run", _run_launch))
            for patch in self._patches:
                patch.start()
        self._depth += 1
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._depth -= 1
        if self._depth == 0:
            for patch in reversed(self._patches):
                patch.stop()
            torch._C._set_only_lift_cpu_tensors(False)
            PretendGPU._active = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.run(func, args, kwargs or {})

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one operation on the CPU, and count it if it involves the GPU."""
        if func.namespace == "dpo_kernels":
            # Our operators are Python code: count the operations that they call.
            with self:
                return func._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args, **kwargs)
        name = func._schema.name.partition("::")[2]
        flat = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor)]
        mine = [value for value in flat if isinstance(value, OnGPU)]
        device = kwargs.get("device")
        device = None if device is None else torch.device(device)
        # Autograd's C++ code sees CPU tensors and so requests CPU copies of GPU tensors; they must stay on the GPU. Python's
        # `.cpu()` and `.to("cpu")` are not dispatched here.
        on_gpu = bool(mine) or (device is not None and device.type == "cuda") or (not flat and _autograd_asks())
        if device is not None and device.type == "cuda":
            kwargs = {**kwargs, "device": torch.device("cpu")}
        pins = bool(kwargs.get("pin_memory")) or name == "_pin_memory"
        if "pin_memory" in kwargs:
            kwargs = {**kwargs, "pin_memory": False}
        inner_args, inner_kwargs = tree_map_only(OnGPU, lambda value: value.inner, (args, kwargs))
        if name == "_pin_memory":
            out = args[0].clone()
        elif name in ("mm", "addmm") and func._overloadname.startswith("dtype"):
            out = _widened_product(name, inner_args, inner_kwargs)
        else:
            out = func(*inner_args, **inner_kwargs)
        if pins:
            out.is_pretend_pinned = True
        if not on_gpu:
            return out
        self._refuse_strangers(name, args, flat, mine)
        self._count(func, name, args, kwargs, flat, mine, out)
        return self._wrapped(func, args, kwargs, out)

    def _wrapped(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        # If an operation mutates and returns an argument, return the same tensor object.
        known = {id(value.inner): value for value in tree_flatten((args, kwargs))[0] if isinstance(value, OnGPU)}
        return tree_map_only(Tensor, lambda value: known[id(value)] if id(value) in known else OnGPU(value), out)

    def _refuse_strangers(self, name: str, args: tuple[Any, ...], flat: list[Tensor], mine: list[Tensor]) -> None:
        strangers = [value for value in flat if not isinstance(value, OnGPU) and value.dim() > 0]
        if mine and strangers and name not in ("copy_", "index", "index_put_", "index_put"):
            raise RuntimeError(f"aten::{name}: expected all tensors on {DEVICE}, found one on the CPU {args}")

    def _count(
        self,
        func: Any,
        name: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        flat: list[Tensor],
        mine: list[Tensor],
        out: Any,
    ) -> None:
        outs = [value for value in tree_flatten(out)[0] if isinstance(value, Tensor)]
        if name in _SYNCS:
            self.syncs.append(_SYNCS[name])
        if name == "repeat_interleave" and kwargs.get("output_size") is None:
            self.syncs.append(name)
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            indices = [value for value in args[1] if value is not None]
            if any(value.dtype in (torch.bool, torch.uint8) for value in indices):
                self.syncs.append("indexing by a mask")
            if any(not isinstance(value, OnGPU) for value in indices):
                self.syncs.append("indices from pageable memory")
        if name in ("_to_copy", "copy_"):
            source = args[1] if name == "copy_" else args[0]
            to_gpu = name != "copy_" or isinstance(args[0], OnGPU)
            if isinstance(source, OnGPU) != to_gpu:
                host = source if to_gpu else args[0]
                free = kwargs.get("non_blocking") or (len(args) > 2 and args[2])
                if not (free and getattr(host, "is_pretend_pinned", False)):
                    self.syncs.append("copy to the device" if to_gpu else "copy to the host")
                return
        returns = func._schema.returns
        views = bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        if views or name in ("detach", "_local_scalar_dense", "lift_fresh", "_unsafe_view"):
            return
        if name in _ALLOCATIONS or name in ("zeros", "ones", "full", "new_zeros", "zeros_like", "new_full"):
            size = sum(value.nbytes for value in outs)
            if self.largest is not None and size > self.largest:
                raise torch.cuda.OutOfMemoryError(f"pretend: {size} bytes asked for, {self.largest} free")
            self.allocated.append(size)
        if name in _ALLOCATIONS or not any(value.numel() for value in (*outs, *mine)):
            return
        self.launches.append(name)
        if name in _PRODUCTS:
            self.products.append((name, [_describe(value) for value in (*flat, *outs)]))
            return
        self.bytes_of[name] += self._moved(func, name, args, kwargs, outs)

    def _moved(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], outs: list[Tensor]) -> int:
        read, written = 0, 0
        given = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)} | kwargs
        for argument in func._schema.arguments:
            tensors = [v for v in tree_flatten(given.get(argument.name))[0] if isinstance(v, OnGPU)]
            size = sum(_bytes(value.inner) for value in tensors)
            if argument.alias_info is not None and argument.alias_info.is_write:
                written += size
                read += 0 if argument.is_out or name in _OVERWRITES else size
            elif name not in ("index", "index_select", "gather", "embedding") or argument.name != "self":
                read += size
        if name in ("index_put_", "_index_put_impl_"):
            values = _bytes(given["values"].inner) if isinstance(given["values"], OnGPU) else 0
            return 2 * values + sum(_bytes(v.inner) for v in given["indices"] if isinstance(v, OnGPU))
        if not written:
            written = sum(_bytes(value) for value in outs)
        if name in ("index", "index_select", "gather", "embedding"):
            read += written
        return read + written


def _autograd_asks() -> bool:
    """Whether autograd's C++ code creates a tensor (zeros for a missing gradient), which it believes to be on the CPU."""
    frame = sys._getframe(2)
    while frame.f_back is not None and (
        frame.f_code.co_filename == __file__ or frame.f_code.co_filename.endswith(("_compile.py", "eval_frame.py"))
    ):
        frame = frame.f_back
    return frame.f_code.co_name == "_engine_run_backward"


def _bytes(tensor: Tensor) -> int:
    """Bytes of the elements in memory; an expanded dimension counts once."""
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride or not size else 1
    return count * tensor.element_size()


def _widened_product(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """`torch.mm(a, b, out_dtype=...)` of 16-bit matrices with a wider result, which torch does not support on a CPU."""
    *tensors, dtype = args
    *base, a, b = tensors
    found = torch.mm(a.to(dtype), b.to(dtype))
    if name == "addmm" and kwargs.get("beta", 1):
        found = found * kwargs.get("alpha", 1) + base[0].to(dtype) * kwargs.get("beta", 1)
    return found if kwargs.get("out") is None else kwargs["out"].copy_(found)


def _describe(tensor: Tensor) -> SimpleNamespace:
    return SimpleNamespace(shape=tuple(tensor.shape), stride=tuple(tensor.stride()), dtype=tensor.dtype)


def _run_launch(launch: Any, device_of: Tensor) -> None:
    gpu = PretendGPU.active()
    if 0 in launch.grid:
        return
    gpu.launches.append(f"triton::{getattr(launch.kernel, '__name__', launch.kernel)}")
    arguments = {name: getattr(value, "inner", value) for name, value in launch.arguments.items()}
    with _disable_current_modes():
        launch.kernel[launch.grid](**arguments, **launch.options)
