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
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import torch

#: Every backend, and for each device type the order in which they are tried.
NAMES = ("eager", "cpu", "triton", "cuda")
PREFERENCE = {"cpu": ("cpu", "eager"), "cuda": ("triton", "cuda", "eager")}
#: float64 logits are the checking path; GPU kernels do not have it.
FLOAT64 = ("eager", "cpu")

_forced: str | None = None


class BackendUnavailable(RuntimeError):
    """A backend cannot serve here; the message says why."""


def check_name(name: str) -> str:
    """Return `name`, or raise ValueError listing the known backends."""
    if name not in NAMES:
        raise ValueError(f"unknown backend {name!r}; known: {', '.join(NAMES)}")
    return name


@functools.cache
def _attempt(name: str, device_type: str) -> ModuleType | str:
    try:
        module = importlib.import_module(f"dpo_kernels.backends.{name}")
        module.check_available(device_type)
    except BackendUnavailable as reason:
        return str(reason)
    except ImportError as error:
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


@functools.cache
def default(device_type: str) -> str:
    """The first backend of the device's preference that serves it; eager always does."""
    order = PREFERENCE.get(device_type, ("eager",))
    for name in order:
        reason = why_not(name, device_type)
        if reason is None:
            return name
        if name == order[0]:
            warnings.warn(f"dpo-kernels: {name} backend not used: {reason}", RuntimeWarning, stacklevel=3)
    return "eager"


@torch.compiler.assume_constant_result
def _automatic(device_type: str) -> tuple[str, bool]:
    """(backend, whether the user named it)."""
    wish = os.environ.get("DPO_KERNELS_BACKEND")
    return (check_name(wish), True) if wish else (default(device_type), False)


def resolve(device_type: str, dtype: torch.dtype) -> str:
    """The backend's name for logits of this kind: `use_backend`, then DPO_KERNELS_BACKEND, then the default.

    Raises TypeError if the backend that was asked for has no float64 and the logits are float64; a default gives way to
    eager instead.
    """
    name, asked = (_forced, True) if _forced is not None else _automatic(device_type)
    if dtype == torch.float64 and name not in FLOAT64:
        if asked:
            raise TypeError(f"backend {name!r} has no float64 arithmetic; use one of {', '.join(FLOAT64)}")
        return "eager"
    return name


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Serve all calls inside the `with` block by one backend: "eager", "cpu", "triton" or "cuda".

    Raises ValueError for an unknown name; a call whose tensors it cannot serve raises BackendUnavailable.
    The choice is one per process, like torch's own backend flags, and a graph keeps it for its backward.
    """
    global _forced
    previous, _forced = _forced, check_name(name)
    try:
        yield
    finally:
        _forced = previous
