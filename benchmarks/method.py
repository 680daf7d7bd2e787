"""How things are timed: interleaved rounds, cold inputs, peak memory and floors measured in the same run.

All contenders run in one loop, one after the other, and the starting place rotates. So other load or a hot processor slows
all of them alike. Ratios are taken within each round and their median is reported, so common noise cancels. Absolute times
on a shared machine mean nothing.
"""

from __future__ import annotations

import ctypes
import gc
import resource
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Contender:
    """One thing to time.

    Attributes:
        name: how it appears in tables.
        run: the timed call. What it returns is dropped after the clock has stopped.
        prepare: called before each run, not timed (restores inputs that `run` overwrites).
    """

    name: str
    run: Callable[[], object]
    prepare: Callable[[], None] = lambda: None


@dataclass
class Samples:
    """The measurements of one contender; seconds: one entry per round, in order."""

    seconds: list[float] = field(default_factory=list)
    first_call: float = 0.0
    extra_bytes: int | None = None
    page_faults: int = 0

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles, divided by the median."""
        if len(self.seconds) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return (high - low) / 2 / self.median


class Clock:
    """Times one call on a device: the wall clock on a CPU, events on a GPU (after flushing its L2 cache)."""

    def __init__(self, device: str) -> None:
        self.device = device
        # 256 MiB is more than any L2; writing it evicts the last contender's data.
        self._flush = torch.empty(256 << 20, dtype=torch.uint8, device=device) if device == "cuda" else None

    def time(self, call: Callable[[], object]) -> float:
        """Seconds of one call."""
        if self._flush is not None:
            self._flush.zero_()
            torch.cuda.synchronize()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            result = call()
            end.record()
            torch.cuda.synchronize()
            del result
            return start.elapsed_time(end) / 1e3
        begin = time.perf_counter()
        result = call()
        seconds = time.perf_counter() - begin
        del result
        return seconds


#: Functions that show a line about each method as soon as it is known; conftest.py adds pytest's terminal.
announce: list[Callable[[str], None]] = []


def tell(line: str) -> None:
    """Show a line of progress."""
    for show in announce:
        show(line)


def interleave(
    contenders: Sequence[Contender], rounds: int, *, warmup: int = 1, device: str = "cpu", called: bool = False
) -> dict[str, Samples]:
    """Time all contenders in the same loop; round k starts with contender k.

    The first call of each contender is timed apart, because compilers run in it; there is none if all were `called` before.
    Then follow `warmup` rounds, `rounds` timed rounds, and one more run of each for its peak memory.
    """
    clock = Clock(device)
    found = {contender.name: Samples() for contender in contenders}
    for contender in () if called else contenders:
        contender.prepare()
        begin = time.perf_counter()
        contender.run()
        if device == "cuda":
            torch.cuda.synchronize()
        found[contender.name].first_call = time.perf_counter() - begin
        if found[contender.name].first_call > 1:
            tell(f"{contender.name}: first call {found[contender.name].first_call:.3g} s")
    # A garbage collection inside a timed region would count for the contender that is running.
    gc.collect()
    gc.disable()
    # The objects alive now are exempt from collection: peak_memory collects before each call, slow with many objects.
    gc.freeze()
    try:
        for index in range(warmup + rounds):
            shift = index % len(contenders)
            for contender in [*contenders[shift:], *contenders[:shift]]:
                contender.prepare()
                seconds = clock.time(contender.run)
                if index >= warmup:
                    found[contender.name].seconds.append(seconds)
        gc.enable()
        for contender in contenders:
            contender.prepare()
            samples = found[contender.name]
            samples.extra_bytes, samples.page_faults = peak_memory(contender.run, device)
            extra = "" if samples.extra_bytes is None else f", {samples.extra_bytes / 2**20:,.0f} MiB"
            tell(f"{contender.name}: {1e3 * samples.median:.3g} ms{extra}")
    finally:
        gc.enable()
        gc.unfreeze()
    return found


def ratios(slow: Samples, fast: Samples) -> list[float]:
    """How many times longer `slow` takes than `fast`, within each round."""
    return [a / b for a, b in zip(slow.seconds, fast.seconds, strict=True)]


def ratio(slow: Samples, fast: Samples) -> float:
    """How many times longer `slow` takes than `fast`: the median over rounds of the ratio within a round."""
    return statistics.median(ratios(slow, fast))


class Best(NamedTuple):
    """The fastest peer against ours: its name, and how many times longer it takes (median, least and most of the rounds)."""

    ratio: float
    peer: str
    low: float
    high: float

    def row(self, title: str) -> dict[str, Any]:
        """The comparison as keys of a result's row; title: the peer's."""
        return {"vs_best": self.ratio, "best_peer": title, "vs_range": [self.low, self.high]}


def best_ratio(samples: Mapping[str, Samples], ours: str, peers: Iterable[str]) -> Best | None:
    """The fastest of the measured peers, against `ours`; None if no peer was measured."""
    found = {peer: ratios(samples[peer], samples[ours]) for peer in peers if peer in samples}
    if not found:
        return None
    peer = min(found, key=lambda name: statistics.median(found[name]))
    return Best(statistics.median(found[peer]), peer, min(found[peer]), max(found[peer]))


def _status_kib(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1])
    raise KeyError(key)


def peak_resident() -> int:
    """Peak of this process's resident memory in bytes.

    Read from VmHWM, which starts from zero in a new program. `ru_maxrss` does not: a child inherits the peak of its parent,
    so all trainers that a large test process starts would show that process's peak.
    """
    try:
        return _status_kib("VmHWM") * 1024
    except (OSError, KeyError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _trim() -> None:
    """Give freed heap pages back to the system: a call that reuses memory kept by malloc would seem to allocate nothing."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        # Without glibc only mapped blocks are seen; all large blocks are mapped.
        return


def peak_memory(call: Callable[[], object], device: str = "cpu") -> tuple[int | None, int]:
    """(peak bytes above what was held before the call, minor page faults). None if the system cannot tell.

    On a CPU the peak is the kernel's high-water mark of resident memory (VmHWM), reset before the call. On a GPU it comes
    from the caching allocator's statistics.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        torch.cuda.synchronize()
        del result
        return torch.cuda.max_memory_allocated() - before, 0
    _trim()
    try:
        Path("/proc/self/clear_refs").write_text("5")
        before = _status_kib("VmRSS")
    except (OSError, KeyError):
        before = None
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    result = call()
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
    extra = None if before is None else max(0, _status_kib("VmHWM") - before) * 1024
    del result
    return extra, faults


#: Names of the contenders that measure the machine itself; `floor_contenders` makes them, `Floors.of` reads them.
FLOOR_NAMES = ("memory copy", "memory read", "memory write")


def floor_contenders(source: Tensor, scratch: Tensor) -> list[Contender]:
    """Copy, read and write of memory as large as `source`; they take part in the rounds like all contenders.

    `scratch` was written before, so the floors contain no page faults.
    """
    plain, target = source.detach(), scratch.detach()
    # Read eight bytes at a time, whatever the dtype: the read must wait for memory, not for arithmetic.
    words = plain.reshape(-1).view(torch.int64) if plain.nbytes % 8 == 0 else plain.reshape(-1).view(torch.int16)
    names = dict(zip(FLOOR_NAMES, (lambda: target.copy_(plain), words.sum, lambda: target.fill_(1.0)), strict=True))
    return [Contender(name, call) for name, call in names.items()]


@dataclass(frozen=True)
class Floors:
    """Speeds of the machine, bytes or operations per second, measured among the contenders."""

    copy: float
    read: float
    write: float

    @classmethod
    def of(cls, samples: Mapping[str, Samples], nbytes: int) -> Floors:
        copy, read, write = (samples[name].median for name in FLOOR_NAMES)
        return cls(copy=2 * nbytes / copy, read=nbytes / read, write=nbytes / write)


def passes_over_copy(samples: Mapping[str, Samples], name: str, passes: int) -> float:
    """Time of a contender as a multiple of its bandwidth floor, within each round: `passes` reads or writes of the
    tensor that "memory copy" reads once and writes once."""
    return statistics.median(
        seconds / (copy * passes / 2)
        for seconds, copy in zip(samples[name].seconds, samples[FLOOR_NAMES[0]].seconds, strict=True)
    )


def gemm_rate(device: str = "cpu", dtype: torch.dtype = torch.float32, size: int = 1024) -> float:
    """Operations per second of a square matrix product: the best of five runs."""
    if device == "cuda":
        size *= 8
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    clock = Clock(device)
    return 2 * size**3 / min(clock.time(lambda: a @ b) for _ in range(5))
