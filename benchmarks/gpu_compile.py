"""Compiles the Triton kernels of a session in many processes at once, into Triton's own cache.

The calls that later stages make are made here with `Launch.run` replaced by a recorder, so the launches and everything that
Triton specialises on (dtypes, alignment, constants) are those of the real calls. Each launch is then compiled by the JIT's own
path with a driver that only names its target. A process that compiles therefore needs no GPU, and the later launch finds its
kernel in the cache.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from typing import Any


class CompileOnlyDriver:
    """What Triton's JIT asks of a driver while it compiles."""

    def __init__(self, target: Any) -> None:
        self.target = target

    def get_current_device(self) -> int:
        """The device whose kernels are kept apart in a process."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """No launch follows: the default stream."""
        return 0

    def get_current_target(self) -> Any:
        """What to compile for."""
        return self.target


@contextlib.contextmanager
def recorded() -> Iterator[list[Any]]:
    """Launches inside the block are collected, not run: outputs keep whatever their memory held."""
    from dpo_kernels.backends.triton.launch import Launch

    found: list[Any] = []
    run = Launch.run
    Launch.run = lambda self, device_of: found.append(self)  # type: ignore[method-assign]
    try:
        yield found
    finally:
        Launch.run = run  # type: ignore[method-assign]


def specialization(launch: Any) -> tuple[Any, ...]:
    """What decides whether two launches share a compiled kernel: finer than Triton's own key where in doubt."""
    found: list[Any] = [launch.kernel.__name__, repr(sorted(launch.options.items()))]
    for parameter in launch.kernel.params:
        value = launch.arguments.get(parameter.name)
        if hasattr(value, "data_ptr"):
            found.append((str(value.dtype), value.data_ptr() % 16 == 0))
        elif isinstance(value, bool) or not isinstance(value, int) or parameter.is_constexpr:
            found.append("float" if isinstance(value, float) and not parameter.is_constexpr else repr(value))
        elif parameter.do_not_specialize:
            found.append(abs(value) >= 2**31)
        else:
            found.append((value == 1, value % 16 == 0, abs(value) >= 2**31))
    return tuple(found)


def record(calls: Iterable[tuple[str, Callable[[], object]]]) -> tuple[list[Any], dict[str, str]]:
    """The different launches of the named calls, and why a call could not be recorded to its end.

    Uninitialised outputs may stop a call that looks at them; what it launched until then counts.
    """
    launches: dict[tuple[Any, ...], Any] = {}
    stopped = {}
    with recorded() as found:  # making the calls ready launches too
        for name, call in calls:
            try:
                call()
            except Exception as error:
                stopped[name] = f"{type(error).__name__}: {error}"[:300]
            for launch in found:
                launches.setdefault(specialization(launch), launch)
            found.clear()
    return list(launches.values()), stopped


#: Set before the processes are forked: launches hold functions and tensors, which do not travel.
_launches: list[Any] = []
_target: Any = None
_launcher: Callable[[Any, Any], object] | None = None


def compile_launch(launch: Any, launcher: Callable[[Any, Any], object] | None = None) -> bool:
    """Compile one launch for the active driver's target; True if it was in the cache already.

    launcher: the real driver's `launcher_cls`. Triton 3.6 calls the C compiler for every signature when it makes one.
    """
    import triton

    hits: list[bool] = []
    previous = triton.knobs.compilation.listener
    triton.knobs.compilation.listener = lambda **found: hits.append(bool(found["cache_hit"]))
    try:
        kernel = launch.kernel.warmup(grid=launch.grid, **launch.arguments, **launch.options)
        if launcher is not None:
            launcher(kernel.src, kernel.metadata)
    finally:
        triton.knobs.compilation.listener = previous
    return all(hits)  # no call at all: this process has compiled the same before


def _start_worker() -> None:
    import triton

    triton.runtime.driver.set_active(CompileOnlyDriver(_target))


def _work(index: int) -> tuple[float, bool]:
    begin = time.perf_counter()
    hit = compile_launch(_launches[index], _launcher)
    return time.perf_counter() - begin, hit


def compile_all(
    launches: list[Any],
    target: Any,
    launcher: Callable[[Any, Any], object] | None,
    processes: int,
    seconds: float,
    found_so_far: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Compile the launches side by side; what was compiled, was cached, failed, and was not reached in `seconds`.

    target: what to compile for. launcher: as `compile_launch` takes it.
    """
    global _launches, _target, _launcher
    _launches, _target, _launcher = launches, target, launcher
    result: dict[str, Any] = {"kernels": len(launches), "compiled": 0, "cached": 0, "failed": {}, "not run": []}
    deadline, begin = time.monotonic() + seconds, time.monotonic()
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("fork"), _start_worker)
    # In the order of the stages that launch them: if time runs out, the first stages have theirs.
    waiting: dict[Future, int] = {pool.submit(_work, index): index for index in range(len(launches))}
    with contextlib.suppress(futures.TimeoutError):  # in Python 3.10 another one than the built-in
        for future in as_completed(list(waiting), timeout=max(1.0, deadline - time.monotonic())):
            index = waiting.pop(future)
            name = f"{index} {launches[index].kernel.__name__}"
            if error := future.exception():
                result["failed"][name] = f"{type(error).__name__}: {error}"[:300]
            else:
                result["cached" if future.result()[1] else "compiled"] += 1
            result["seconds"] = round(time.monotonic() - begin, 1)
            found_so_far(result)
    result["not run"] = [f"{index} {launches[index].kernel.__name__}" for index in waiting.values()]
    pool.shutdown(wait=False, cancel_futures=True)
    if waiting:
        for process in multiprocessing.active_children():
            process.kill()
    return result
