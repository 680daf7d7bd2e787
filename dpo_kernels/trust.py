"""Whether a GPU backend may serve a call: the self-check at first use, its verdicts, and where they are kept.

A variant (backends.Variant) is checked when a process first needs it on a device: its case of the operator table
(selfcheck.py) runs beside the call, in a thread of its own, so that no mode of the caller reaches it (autocast, grad mode,
fake tensors of a compiler that is tracing). A verdict is kept in the user's cache under the device, its driver, torch, Triton
and the sources, so that the next process has nothing to run. A failed backend serves nothing more on that device.

DPO_KERNELS_SELFCHECK: "0" checks nothing; "1" also checks kernels that run on a CPU (Triton's interpreter). It is read when a
variant is first needed.
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
#: How often a check could not run. A variant is served unchecked from then on: a check a call would cost more than it tells.
_failures: Counter[tuple[Any, ...]] = Counter()
TRIES = 3


def decide(name: str, device_type: str, index: int | None, variant: Variant, *, asked: bool) -> str:
    """The backend that serves a call: `name`, or where its check fails the next that passes its own.

    Raises BackendUnavailable where `name` fails and the user `asked` for it.
    """
    device = torch.device(device_type) if index is None else torch.device(device_type, index)
    # Autograd has one thread for a device's backward. A check runs a backward of its own, so a call from inside one (a
    # recomputation, a hook) would wait for its own thread: it starts no check, and waits for nobody else's.
    if not _lock.acquire(blocking=not _in_backward()):
        return name
    try:
        case = case_of(variant)
        if serves(name, case):
            reason = _verdict(name, device, variant)
        elif asked:
            return name  # the call itself says what is missing
        else:
            reason = f"the {name} kernels do not have this call ({case})"
        if reason is None:
            return name
        if asked:
            raise BackendUnavailable(f"{reason}. Choose another backend; DPO_KERNELS_SELFCHECK=0 uses it all the same.")
        instead = "eager"
        for other in backends.candidates(device_type):
            if other != name and serves(other, case) and _verdict(other, device, variant) is None:
                instead = other
                break
        _warn_once(f"dpo-kernels: {reason}. The {instead} backend serves instead.")
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
    """None if the backend may serve, else the sentence that says why not."""
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
                f"({case}); they serve unchecked"
            )
            return None
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            # A check launches, allocates and waits, none of which a capture allows. The next call outside is checked.
            _warn_once(
                f"dpo-kernels: the {name} kernels are captured in a CUDA graph before their self-check has run "
                f"({case}); call once before capturing"
            )
            return None
        try:
            result = _in_a_clean_thread(name, device, case)
        except Exception as error:  # out of memory, or a fault of the check itself: it says nothing about the kernels
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
            # An error may come from this process's surroundings (no compiler, a broken context); wrong numbers do not.
            store.add(case, reason if result.budget < float("inf") else None, right=False)
            return reason
        store.add(case, None, right=True)
        logger.debug("%s on %s passed its self-check: %s", name, device, result)
    backends.trusted.add(served)
    return None


# --- running ----------------------------------------------------------------------------------------------------------


def _in_a_clean_thread(name: str, device: torch.device, case: Case) -> selfcheck.Result:
    """A case's worst result. Autocast, grad mode, a compiler's fake tensors and function modes belong to a thread: here there
    are none. The caller's stream is used, behind what it has already been given, so that its memory is reused later."""
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
    """Without the process-wide settings that would refuse what the definition computes; they come back afterwards."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    default_dtype = torch.get_default_dtype()
    sync_debug = torch.cuda.get_sync_debug_mode() if torch.cuda.is_initialized() else 0
    compiling, torch.compiler._is_compiling_flag = torch.compiler._is_compiling_flag, False
    # Not torch.use_deterministic_algorithms, which would also set what the compiler has been told.
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
    """What the device calls itself."""
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
    """Of everything that a check runs: this package's Python, and the CUDA sources."""
    digest = hashlib.sha256(_build.source_hash("cuda").encode() if name == "cuda" else b"")
    for path in sorted(_build.PACKAGE.rglob("*.py")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def identity(name: str, device: torch.device) -> dict[str, str]:
    """What a verdict depends on."""
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
    """The verdicts on one backend and one kind of device, in a file of the user's cache."""

    def __init__(self, name: str, device: torch.device) -> None:
        self.identity = identity(name, device)
        tag = hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()[:16]
        try:
            folder = _build.cache_folder()
        except RuntimeError:  # a user without a home folder: nothing can be kept
            folder = Path(os.devnull)
        self.path = folder / "selfcheck" / f"{name}.{tag}.json"
        #: Names of the cases that passed; the sentence about one that did not.
        self.right: set[str] = set()
        self.wrong: str | None = None
        self._read()

    def _read(self) -> None:
        """Join what the file says; a file that cannot be read, or says something else, says nothing."""
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
        """Keep a verdict; a cache that cannot be written costs the next process a check."""
        self._read()  # what other processes have found meanwhile
        if right:
            self.right.add(str(case))
        self.wrong = self.wrong or wrong
        held = {"identity": self.identity, "right": sorted(self.right), "wrong": self.wrong}
        try:
            _build.make_private(self.path.parent.parent)  # where libraries may be kept later
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
            logger.debug("verdict not kept: %s", error)
