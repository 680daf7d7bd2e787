"""Which implementation of the stages serves a device, and why the others do not.

A backend is a module with four functions, `token_logps`, `sequence_sums`, `preference_loss` and `logits_grad` (plain
tensors in and out, no autograd; `eager.py` is the shortest to read). It is imported when first needed, so that
`import dpo_kernels` needs neither a compiler nor Triton.
"""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from types import ModuleType
from typing import NamedTuple, ParamSpec, TypeVar

import torch

#: Every backend, and for each device type the order in which they are tried.
NAMES = ("eager", "cpu", "triton", "cuda")
PREFERENCE = {"cpu": ("cpu", "eager"), "cuda": ("triton", "cuda", "eager")}
#: float64 logits are the checking path; GPU kernels do not have it.
FLOAT64 = ("eager", "cpu")

#: Those whose kernels are compiled for the device at hand by compilers that we have not met: their first use is checked.
GPU_BACKENDS = ("triton", "cuda")

#: What `use_backend` asks for in this thread or task.
_forced: ContextVar[str | None] = ContextVar("dpo_kernels_backend", default=None)
#: What a `use_backend` that was entered or left last left behind, in any thread: torch.compile cannot look at a ContextVar, and
#: retraces when this changes.
_latest: str | None = None

_Given = ParamSpec("_Given")
_Result = TypeVar("_Result")

#: (backend, device type, index, variant) that need no further thought, and the backends that failed, with the sentence.
trusted: set[tuple[str, str, int | None, Variant]] = set()
refused: dict[tuple[str, str, int | None], str] = {}


class BackendUnavailable(RuntimeError):
    """A backend cannot serve here; the message says why."""


def check_name(name: str) -> str:
    """Return `name`, or raise ValueError listing the known backends."""
    if name not in NAMES:
        raise ValueError(f"unknown backend {name!r}; known: {', '.join(NAMES)}")
    return name


def load_library(path: Path, namespace: str, operators: tuple[str, ...]) -> None:
    """Load a native library. Raises BackendUnavailable where it does not load, or lacks one of our operators."""
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        raise BackendUnavailable(str(error)) from error
    missing = [name for name in operators if not hasattr(getattr(torch.ops, namespace), name)]
    if missing:
        raise BackendUnavailable(
            f"{path} has no operator {namespace}::{missing[0]}; delete it, to have it compiled anew"
        )


@functools.cache
def _attempt(name: str, device_type: str) -> ModuleType | str:
    try:
        module = importlib.import_module(f"dpo_kernels.backends.{name}")
        module.check_available(device_type)
    except BackendUnavailable as reason:
        return str(reason)
    except Exception as error:  # an old Triton, a broken driver: another backend serves, and the reason is told
        return f"{type(error).__name__}: {error}"
    return module


def load(name: str, device_type: str) -> ModuleType:
    """The backend's module. Raises BackendUnavailable with the reason where it cannot serve this device type."""
    found = _attempt(name, device_type)
    if isinstance(found, str):
        raise BackendUnavailable(f"backend {name!r} cannot serve {device_type} tensors: {found}")
    return found


def why_not(name: str, device_type: str) -> str | None:
    """None if the backend serves this device type, else the reason why it does not."""
    found = _attempt(name, device_type)
    return found if isinstance(found, str) else None


class LinearVariant(NamedTuple):
    """What of a call of the linear path decides which kernels it runs, beside what `Variant` says."""

    strategy: str
    fused: bool = False
    bias: bool = False
    hidden: bool = True
    weight: bool = True


class Variant(NamedTuple):
    """What of a call decides which of a backend's kernels it runs: the self-check's key.

    Attributes:
        dtype: of the logits, or of the linear path's products.
        reference: dtype of the reference's logits, "sums" where its sums are given, or None.
        aligned: every row of V logits starts at a multiple of 8 elements.
        statistics, terms: results per token, and the divergences that are differentiated ("kl", "forward_kl").
        loss: "sigmoid" or "robust", which the kernels know, or "sums" for everything that is built on sums.
        few_rows: fewer than MANY_ROWS tokens, for which a kernel may share a row among several blocks.
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
        """Distinct for distinct variants."""
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


#: 4 rows for each multiprocessor of the largest GPU at hand, a B200: below, some kernels share a row among blocks.
MANY_ROWS = 600


def _name_of(dtype: torch.dtype | str) -> str:
    return str(dtype).removeprefix("torch.")


def candidates(device_type: str) -> Iterator[str]:
    """The backends that serve a device type, in the order in which they are tried; eager always does.

    One is asked only when those before it were not enough: to ask the cuda backend may compile its library.
    """
    order = PREFERENCE.get(device_type, ("eager",))
    reason = why_not(order[0], device_type)
    if reason is not None:
        _warn_once(f"dpo-kernels: {order[0]} backend not used: {reason}")
    yield from (name for name in order if why_not(name, device_type) is None)


def _constant(function: Callable[_Given, _Result]) -> Callable[_Given, _Result]:
    """torch.compiler.assume_constant_result, which sets this mark too, but imports the whole compiler for it."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@functools.cache
def _warn_once(text: str) -> None:
    warnings.warn(text, RuntimeWarning, stacklevel=4)


def default(device_type: str, index: int | None = None) -> str:
    """The first backend of the device's preference that serves it and that its self-check has not refused."""
    first = PREFERENCE.get(device_type, ("eager",))[0]
    if (first, device_type, index) not in refused and why_not(first, device_type) is None:
        return first
    return next(name for name in candidates(device_type) if (name, device_type, index) not in refused)


@_constant
def _automatic(device_type: str, index: int | None = None) -> tuple[str, bool]:
    """(backend, whether the user named it)."""
    wish = os.environ.get("DPO_KERNELS_BACKEND")
    return (check_name(wish), True) if wish else (default(device_type, index), False)


def _wish() -> str | None:
    """The backend that `use_backend` asks for, or None."""
    return _latest if torch.compiler.is_compiling() else _forced.get()


def resolve(device: torch.device | str, dtype: torch.dtype) -> str:
    """The backend's name for logits of this kind: `use_backend`, then DPO_KERNELS_BACKEND, then the default.

    Raises TypeError if the backend that was asked for has no float64 and the logits are float64; a default gives way to
    eager instead.
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
    # Plain tuples: the constants that torch.compile hands over when it traces a call must be of built-in types.
    variant = Variant._make((*fields, None if linear is None else LinearVariant._make(linear)))
    if (name, device_type, index, variant) in trusted:
        return name
    from .. import trust  # only where there is something to check

    asked = forced is not None or bool(os.environ.get("DPO_KERNELS_BACKEND"))
    return trust.decide(name, device_type, index, variant, asked=asked)


def checked(name: str, device: torch.device, variant: Variant) -> str:
    """`name` if the self-check finds the kernels that a call needs right, else the backend that serves in its place.

    Each variant is checked once, when a process first needs it on a device (dpo_kernels/trust.py); later calls cost a
    look-up in a set. Raises BackendUnavailable if a backend that the user named fails.
    """
    if name not in GPU_BACKENDS:
        return name
    linear = None if variant.linear is None else tuple(variant.linear)
    return _checked(_wish(), name, device.type, device.index, tuple(variant[:-1]), linear)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Serve all calls inside the `with` block by one backend: "eager", "cpu", "triton" or "cuda".

    Raises ValueError for an unknown name; a call whose tensors it cannot serve raises BackendUnavailable.
    The choice holds in this thread (or asyncio task) alone, and a graph keeps it for its backward. What torch.compile traces
    takes the choice that was made last in any thread.
    """
    global _latest
    token = _forced.set(check_name(name))
    _latest = name
    try:
        yield
    finally:
        _forced.reset(token)
        _latest = _forced.get()
