"""Selection of the backend: the implementation of the stages that serves a call.

A backend is a module with the functions `token_logps`, `sequence_sums`, `preference_loss` and `logits_grad`. They take and
return plain tensors and do not use autograd; the simplest implementation is `eager.py`. A backend is imported when it is first
needed, so `import dpo_kernels` needs neither a compiler nor Triton.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
import pkgutil
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from types import ModuleType
from typing import NamedTuple, ParamSpec, TypeVar

import torch

#: Every backend.
NAMES = ("eager", "cpu", "triton", "cuda")
#: Those of this copy of the package. A copy for the Hugging Face Hub has no compiled ones (hub/build.py).
_HERE = {module.name for module in pkgutil.iter_modules(__path__)}
#: For each device type, the order in which they are tried.
PREFERENCE = {
    "cpu": tuple(name for name in ("cpu", "eager") if name in _HERE),
    "cuda": tuple(name for name in ("triton", "cuda", "eager") if name in _HERE),
}
#: Backends that accept float64 logits, which serve for checks; GPU kernels do not.
FLOAT64 = ("eager", "cpu")

#: Backends with a self-check at first use, because their kernels are compiled for the user's GPU by the user's compiler.
GPU_BACKENDS = ("triton", "cuda")

#: The backend that `use_backend` has set in this thread or task.
_forced: ContextVar[str | None] = ContextVar("dpo_kernels_backend", default=None)
#: The backend after the last entry or exit of `use_backend` in any thread. torch.compile cannot read a ContextVar; it reads this
#: variable and traces again when it changes.
_latest: str | None = None

_Given = ParamSpec("_Given")
_Result = TypeVar("_Result")

#: (backend, device type, index, variant) that need no further check.
trusted: set[tuple[str, str, int | None, Variant]] = set()
#: Backends that failed their self-check -> the reason.
refused: dict[tuple[str, str, int | None], str] = {}


class BackendUnavailable(RuntimeError):
    """A backend cannot serve a call; the message gives the reason."""


def announce(line: str) -> None:
    """Print a line to standard error, unless logging shows only errors (such as under `dpo-train --quiet`)."""
    if logging.getLogger(__name__).isEnabledFor(logging.WARNING):
        print(line, file=sys.stderr)


def check_name(name: str) -> str:
    """Return `name`. Raises ValueError, which lists the known backends, if it is unknown."""
    if name not in NAMES:
        raise ValueError(f"unknown backend {name!r}; known: {', '.join(NAMES)}")
    return name


def load_library(path: Path, namespace: str, operators: tuple[str, ...]) -> None:
    """Load a native library. Raises BackendUnavailable if it does not load or lacks one of the operators."""
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        raise BackendUnavailable(str(error)) from error
    missing = [name for name in operators if not hasattr(getattr(torch.ops, namespace), name)]
    if missing:
        raise BackendUnavailable(
            f"{path} has no operator {namespace}::{missing[0]}; delete it, and it will be compiled again"
        )


@functools.cache
def _attempt(name: str, device_type: str) -> ModuleType | str:
    if name not in _HERE:
        return "this copy of the package does not contain it; the package from pip does"
    try:
        module = importlib.import_module(f"{__package__}.{name}")
        module.check_available(device_type)
    except BackendUnavailable as reason:
        return str(reason)
    except Exception as error:  # for example an old Triton or a broken driver; another backend is used
        return f"{type(error).__name__}: {error}"
    return module


def load(name: str, device_type: str) -> ModuleType:
    """The backend's module. Raises BackendUnavailable, with the reason, if it cannot serve this device type."""
    found = _attempt(name, device_type)
    if isinstance(found, str):
        raise BackendUnavailable(f"backend {name!r} cannot be used for {device_type} tensors: {found}")
    return found


def why_not(name: str, device_type: str) -> str | None:
    """None if the backend can serve this device type, else the reason why not."""
    found = _attempt(name, device_type)
    return found if isinstance(found, str) else None


class LinearVariant(NamedTuple):
    """The additional properties of a call of the linear path that determine its kernels.

    Attributes:
        strategy: see `dpo_kernels.linear.planner`.
        fused: the fused kernels compute the products.
        bias: the head has a bias.
        hidden: the hidden states need a gradient.
        weight: the weight needs a gradient.
    """

    strategy: str
    fused: bool = False
    bias: bool = False
    hidden: bool = True
    weight: bool = True


class Variant(NamedTuple):
    """The properties of a call that determine which kernels of a backend it runs; the key of the self-check.

    Attributes:
        dtype: dtype of the logits, or of the linear path's products.
        reference: dtype of the reference's logits, "sums" if its sums are given, or None.
        aligned: every row of V logits starts at a multiple of 8 elements.
        statistics: statistics per token.
        terms: the token-level divergences that the loss depends on ("kl", "forward_kl").
        loss: "sigmoid" or "robust", which the kernels compute, or "sums" for losses that are computed from the sums.
        packed: the layout is packed (cu_seqlens).
        softcap: the logits have a softcap.
        negative_scale: logit_scale is negative.
        grad: a gradient is needed.
        few_rows: fewer than MANY_ROWS tokens, for which a kernel may split a row among several blocks.
        linear: the properties of a call of the linear path, or None.
    """

    dtype: torch.dtype
    reference: torch.dtype | str | None = None
    aligned: bool = True
    statistics: tuple[str, ...] = ()
    terms: tuple[str, ...] = ()
    loss: str = "sigmoid"
    packed: bool = False
    softcap: bool = False
    negative_scale: bool = False
    grad: bool = True
    few_rows: bool = True
    linear: LinearVariant | None = None

    def __str__(self) -> str:
        """A text that is unique for each variant."""
        words = [_name_of(self.dtype), "aligned" if self.aligned else "odd V"]
        words += [] if self.reference is None else [f"reference {_name_of(self.reference)}"]
        words += [*self.statistics, *(f"d {name}" for name in self.terms), self.loss]
        flags = ("packed", "softcap", "negative_scale", "grad")
        words += [name.replace("_", " ") for name in flags if getattr(self, name)]
        words += [] if self.few_rows else ["many rows"]
        if self.linear is not None:
            parts = ("fused", "bias", "hidden", "weight")
            words += ["linear", self.linear.strategy, *(name for name in parts if getattr(self.linear, name))]
        return ", ".join(words)


#: 4 rows per multiprocessor of the largest supported GPU, a B200. With fewer rows, some kernels split a row among blocks.
MANY_ROWS = 600


def _name_of(dtype: torch.dtype | str) -> str:
    return str(dtype).removeprefix("torch.")


def candidates(device_type: str) -> Iterator[str]:
    """The backends that can serve a device type, in order of preference; "eager" is always among them.

    A backend is imported only when the iteration reaches it, because importing the cuda backend may compile its library.
    """
    order = PREFERENCE.get(device_type, ("eager",))
    reason = why_not(order[0], device_type)
    if reason is not None:
        _warn_once(f"dpo-kernels: {order[0]} backend not used: {reason}")
    yield from (name for name in order if why_not(name, device_type) is None)


def _constant(function: Callable[_Given, _Result]) -> Callable[_Given, _Result]:
    """Like torch.compiler.assume_constant_result, which sets the same attribute but imports the whole compiler."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@functools.cache
def _warn_once(text: str) -> None:
    warnings.warn(text, RuntimeWarning, stacklevel=4)


def default(device_type: str, index: int | None = None) -> str:
    """The most preferred backend that can serve the device and has not failed its self-check."""
    first = PREFERENCE.get(device_type, ("eager",))[0]
    if (first, device_type, index) not in refused and why_not(first, device_type) is None:
        return first
    return next(name for name in candidates(device_type) if (name, device_type, index) not in refused)


@_constant
def _automatic(device_type: str, index: int | None = None) -> tuple[str, bool]:
    """(backend, whether the user selected it by DPO_KERNELS_BACKEND)."""
    wish = os.environ.get("DPO_KERNELS_BACKEND")
    return (check_name(wish), True) if wish else (default(device_type, index), False)


def _wish() -> str | None:
    """The backend that `use_backend` has set, or None."""
    return _latest if torch.compiler.is_compiling() else _forced.get()


def resolve(device: torch.device | str, dtype: torch.dtype) -> str:
    """The name of the backend for logits of this device and dtype.

    `use_backend` takes precedence over DPO_KERNELS_BACKEND, and that over the default. For float64 logits, the default is
    replaced by "eager" if it has no float64.

    Raises:
        TypeError: the logits are float64, and the backend that the user selected has no float64.
    """
    if isinstance(device, str):
        device = torch.device(device)
    forced = _wish()
    name, asked = (forced, True) if forced is not None else _automatic(device.type, device.index)
    if dtype == torch.float64 and name not in FLOAT64:
        if asked:
            raise TypeError(f"backend {name!r} has no float64 arithmetic; use one of {', '.join(FLOAT64)}")
        return "eager"
    return name


@_constant
def _checked(
    forced: str | None, name: str, device_type: str, index: int | None, fields: tuple, linear: tuple | None
) -> str:
    # The arguments are plain tuples, because torch.compile passes only constants of built-in types when it traces a call.
    variant = Variant._make((*fields, None if linear is None else LinearVariant._make(linear)))
    if (name, device_type, index, variant) in trusted:
        return name
    from .. import trust  # imported only if there is something to check

    asked = forced is not None or bool(os.environ.get("DPO_KERNELS_BACKEND"))
    return trust.decide(name, device_type, index, variant, asked=asked)


def checked(name: str, device: torch.device, variant: Variant) -> str:
    """`name` if the kernels that a call needs pass the self-check, else the backend that is used instead.

    A variant is checked once, when a process first needs it on a device (dpo_kernels/trust.py). Later calls cost one look-up in
    a set.

    Raises:
        BackendUnavailable: the check failed, and the user selected this backend.
    """
    if name not in GPU_BACKENDS:
        return name
    linear = None if variant.linear is None else tuple(variant.linear)
    return _checked(_wish(), name, device.type, device.index, tuple(variant[:-1]), linear)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Context manager that selects the backend of all calls inside a `with` block.

    The choice applies to this thread or asyncio task only. The backward pass uses the backend of its forward pass. Code that
    torch.compile traces uses the most recent choice of any thread. A call whose tensors the backend cannot serve raises
    `BackendUnavailable`.

    Example:
        ```python
        with use_backend("eager"):
            out = dpo_loss(logits, labels, ref_logits=ref_logits)
        ```

    Args:
        name: "eager", "cpu", "triton" or "cuda".

    Raises:
        ValueError: the name is unknown.
    """
    global _latest
    token = _forced.set(check_name(name))
    _latest = name
    try:
        yield
    finally:
        _forced.reset(token)
        _latest = _forced.get()
