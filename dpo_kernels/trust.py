"""The self-check of GPU backends at first use, and the cache of its verdicts.

A kernel variant (backends.Variant) is checked when a process first needs it on a device: its case of the operator table
(selfcheck.py) runs before the call. It runs in a separate thread, which does not inherit the caller's modes (autocast, grad
mode, fake tensors of a tracing compiler). The verdict is stored in the user's cache under the device, its driver, the versions
of torch and Triton, and the sources, so later processes skip the check. A backend that failed serves no more calls on that
device.

DPO_KERNELS_SELFCHECK=0 turns the checks off; DPO_KERNELS_SELFCHECK=1 also checks kernels that run on a CPU (Triton's
interpreter). The variable is read when a variant is first needed.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import tempfile
import threading
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from . import _build, backends, selfcheck
from .backends import BackendUnavailable, Variant
from .check_table import Case, case_of, serves

logger = logging.getLogger(__name__)

_lock = threading.Lock()
_stores: dict[tuple[str, torch.device], _Store] = {}
#: How often the check of a variant could not run. After TRIES failures the variant is used unchecked, because trying again at
#: every call would be too slow.
_failures: Counter[tuple[Any, ...]] = Counter()
TRIES = 3


def decide(name: str, device_type: str, index: int | None, variant: Variant, *, asked: bool) -> str:
    """The backend for a call: `name` if its self-check passes, else the next candidate that passes, else "eager".

    Raises BackendUnavailable if `name` fails and the user `asked` for it.
    """
    device = torch.device(device_type) if index is None else torch.device(device_type, index)
    # Autograd runs the backward passes of a device in one thread. A check contains a backward pass, so a call from inside one
    # (a recomputation, a hook) would deadlock: it neither starts a check nor waits for the check of another thread.
    if not _lock.acquire(blocking=not _in_backward()):
        return name
    try:
        case = case_of(variant)
        if serves(name, case):
            reason = _verdict(name, device, variant)
        elif asked:
            return name  # the call raises an error that names what is missing
        else:
            reason = f"the {name} kernels do not support this call ({case})"
        if reason is None:
            return name
        if asked:
            raise BackendUnavailable(f"{reason}. Choose another backend; DPO_KERNELS_SELFCHECK=0 uses it unchecked.")
        instead = "eager"
        for other in backends.candidates(device_type):
            if other != name and serves(other, case) and _verdict(other, device, variant) is None:
                instead = other
                break
        _warn_once(f"dpo-kernels: {reason}. The {instead} backend is used instead.")
        return instead
    finally:
        _lock.release()


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


@functools.cache
def _warn_once(text: str) -> None:
    warnings.warn(text, RuntimeWarning, stacklevel=5)


def _switched_on(device: torch.device) -> bool:
    wish = os.environ.get("DPO_KERNELS_SELFCHECK", "")
    return wish != "0" and (device.type == "cuda" or wish == "1")


def _verdict(name: str, device: torch.device, variant: Variant) -> str | None:
    """None if the backend may be used, else the reason why not, as a sentence."""
    key = (name, device.type, device.index)
    served = (*key, variant)
    if name not in backends.GPU_BACKENDS:
        return None
    case = case_of(variant)
    if not _switched_on(device):
        backends.trusted.add(served)
        return None
    store = _stores.get((name, device))
    if store is None:
        store = _stores[name, device] = _Store(name, device)
        if store.wrong is not None:
            backends.refused[key] = store.wrong
    if key in backends.refused:
        return backends.refused[key]
    if str(case) not in store.right:
        if _in_backward():
            _warn_once(
                f"dpo-kernels: the {name} kernels are first called inside a backward pass, where their self-check cannot run "
                f"({case}); they are used unchecked"
            )
            return None
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            # A check allocates and synchronizes, which is illegal during a capture. The next call outside one is checked.
            _warn_once(
                f"dpo-kernels: the {name} kernels are captured in a CUDA graph before their self-check has run "
                f"({case}); call once before capturing"
            )
            return None
        try:
            result = _in_a_clean_thread(name, device, case)
        except Exception as error:  # out of memory, or a fault of the check itself; neither is a fault of the kernels
            _failures[served] += 1
            if _failures[served] == 1:
                text = f"dpo-kernels: the self-check could not run ({case}): {type(error).__name__}: {error}"
                warnings.warn(text[:500], RuntimeWarning, stacklevel=5)
            elif _failures[served] == TRIES:
                backends.trusted.add(served)
            return None
        if not result.ok:
            where = f"{device} ({device_name(device)})"
            reason = f"the {name} kernels failed their self-check on {where}: {result}"
            backends.refused[key] = reason
            # Wrong numbers are stored. An error is not, because its cause may be temporary (no compiler, a broken context).
            store.add(case, reason if result.budget < float("inf") else None, right=False)
            return reason
        store.add(case, None, right=True)
        logger.debug("%s on %s passed its self-check: %s", name, device, result)
    backends.trusted.add(served)
    return None


# --- running ----------------------------------------------------------------------------------------------------------


def _in_a_clean_thread(name: str, device: torch.device, case: Case) -> selfcheck.Result:
    """The worst result of a case, computed in a new thread, which has none of the caller's thread-local modes.

    Such modes are autocast, grad mode, fake tensors and function modes. The check runs on the caller's stream, so the caching
    allocator can reuse its memory for the caller.
    """
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None

    def run() -> selfcheck.Result:
        with _ordinary_settings(), contextlib.ExitStack() as stack:
            if stream is not None:
                stack.enter_context(torch.cuda.device(device))
                stack.enter_context(torch.cuda.stream(stream))
            return selfcheck.worst(selfcheck.run_case(case, name, device))

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(run).result()


@contextlib.contextmanager
def _ordinary_settings() -> Iterator[None]:
    """A context with default values of process-wide settings under which the reference could fail; restores them at exit."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    default_dtype = torch.get_default_dtype()
    sync_debug = torch.cuda.get_sync_debug_mode() if torch.cuda.is_initialized() else 0
    compiling, torch.compiler._is_compiling_flag = torch.compiler._is_compiling_flag, False
    # Not torch.use_deterministic_algorithms, which would also change the compiler's configuration.
    torch._C._set_deterministic_algorithms(False)
    torch.set_default_dtype(torch.float32)
    if sync_debug:
        torch.cuda.set_sync_debug_mode(0)
    try:
        yield
    finally:
        torch._C._set_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.compiler._is_compiling_flag = compiling
        torch.set_default_dtype(default_dtype)
        if sync_debug:
            torch.cuda.set_sync_debug_mode(sync_debug)


# --- keeping ----------------------------------------------------------------------------------------------------------


def device_name(device: torch.device) -> str:
    """The name that the device reports."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()


def _driver(device: torch.device) -> str:
    if device.type != "cuda":
        return ""
    for path in ("/proc/driver/nvidia/version", "/sys/module/amdgpu/version"):
        with contextlib.suppress(OSError):
            return Path(path).read_text().splitlines()[0].strip()
    return str(getattr(torch._C, "_cuda_getDriverVersion", lambda: "unknown")())


@functools.cache
def _source_hash(name: str) -> str:
    """Hash of all code that a check runs: this package's Python files, and for the cuda backend its sources."""
    digest = hashlib.sha256(_build.source_hash("cuda").encode() if name == "cuda" else b"")
    for path in sorted(_build.PACKAGE.rglob("*.py")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def identity(name: str, device: torch.device) -> dict[str, str]:
    """Everything that a verdict depends on; part of the name of its cache file."""
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = "none"
    return {
        "backend": name,
        "device": f"{device.type}: {device_name(device)}",
        "driver": _driver(device),
        "torch": torch.__version__,
        "triton": triton,
        "sources": _source_hash(name),
    }


class _Store:
    """The verdicts on one backend and one type of device, stored in a file of the user's cache."""

    def __init__(self, name: str, device: torch.device) -> None:
        self.identity = identity(name, device)
        tag = hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()[:16]
        try:
            folder = _build.cache_folder()
        except RuntimeError:  # the user has no home folder, so no verdict can be stored
            folder = Path(os.devnull)
        self.path = folder / "selfcheck" / f"{name}.{tag}.json"
        #: Names of the cases that passed, and the sentence about a failed case.
        self.right: set[str] = set()
        self.wrong: str | None = None
        self._read()

    def _read(self) -> None:
        """Add the verdicts from the file; a file that is missing, damaged or of another identity is ignored."""
        try:
            held: Any = json.loads(self.path.read_text())
            right, wrong = held["right"], held["wrong"]
            fits = held["identity"] == self.identity and all(isinstance(case, str) for case in right)
            fits = fits and (wrong is None or isinstance(wrong, str))
        except (OSError, ValueError, KeyError, TypeError):
            return
        if fits and isinstance(right, list):
            self.right.update(right)
            self.wrong = self.wrong or wrong

    def add(self, case: Case, wrong: str | None, *, right: bool) -> None:
        """Store a verdict. If the cache cannot be written, the next process repeats the check."""
        self._read()  # adds verdicts that other processes have stored meanwhile
        if right:
            self.right.add(str(case))
        self.wrong = self.wrong or wrong
        held = {"identity": self.identity, "right": sorted(self.right), "wrong": self.wrong}
        try:
            _build.make_private(self.path.parent.parent)  # compiled libraries may be stored in it later
            self.path.parent.mkdir(exist_ok=True)
            # Atomic write: temporary file, then rename.
            handle, draft = tempfile.mkstemp(dir=self.path.parent, suffix=".tmp")
            try:
                with os.fdopen(handle, "w") as file:
                    json.dump(held, file, indent=1)
                os.replace(draft, self.path)
            except OSError:
                Path(draft).unlink(missing_ok=True)
                raise
        except OSError as error:
            logger.debug("verdict not stored: %s", error)
