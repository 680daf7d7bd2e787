"""Compiles the Triton kernels of a session in many processes at once, into Triton's own cache.

It makes the same calls as later stages, with `Launch.run` replaced by a recorder. So the recorded launches have the dtypes,
alignment and constants of the real calls, on which Triton specialises. Triton's JIT then compiles each launch with a driver
that only names its target. The compiling processes therefore need no GPU, and the real launch finds its kernel in the cache.
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
    """The methods of a driver that Triton's JIT calls while it compiles."""

    def __init__(self, target: Any) -> None:
        self.target = target

    def get_current_device(self) -> int:
        """The device's index: Triton keeps compiled kernels by device."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """The default stream, since nothing is launched."""
        return 0

    def get_current_target(self) -> Any:
        """The target to compile for."""
        return self.target


@contextlib.contextmanager
def recorded() -> Iterator[list[Any]]:
    """Collect launches inside the block and do not run them: outputs stay uninitialised."""
    from dpo_kernels.backends.triton.launch import Launch

    found: list[Any] = []
    run = Launch.run
    Launch.run = lambda self, device_of: found.append(self)  # type: ignore[method-assign]
    try:
        yield found
    finally:
        Launch.run = run  # type: ignore[method-assign]


def specialization(launch: Any) -> tuple[Any, ...]:
    """Key by which two launches share a compiled kernel; finer than Triton's own key in doubtful cases."""
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
    """The distinct launches of the named calls, and the error of each call that could not be recorded to its end.

    A call that reads outputs may fail, since they are uninitialised; its launches before that are kept.
    """
    launches: dict[tuple[Any, ...], Any] = {}
    stopped = {}
    with recorded() as found:  # preparing a call also launches kernels
        for name, call in calls:
            try:
                call()
            except Exception as error:
                stopped[name] = f"{type(error).__name__}: {error}"[:300]
            for launch in found:
                launches.setdefault(specialization(launch), launch)
            found.clear()
    return list(launches.values()), stopped


#: Set before the processes are forked: launches hold functions and tensors, which cannot be pickled.
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
    return all(hits)  # no hits at all: this process has compiled the launch before


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
    """Compile the launches in parallel. Returns which were compiled, cached, failed, or not reached in `seconds`.

    target: what to compile for. launcher: as in `compile_launch`.
    """
    global _launches, _target, _launcher
    _launches, _target, _launcher = launches, target, launcher
    result: dict[str, Any] = {"kernels": len(launches), "compiled": 0, "cached": 0, "failed": {}, "not run": []}
    deadline, begin = time.monotonic() + seconds, time.monotonic()
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("fork"), _start_worker)
    # In the order of the stages that launch them: if time runs out, the first stages have their kernels.
    waiting: dict[Future, int] = {pool.submit(_work, index): index for index in range(len(launches))}
    with contextlib.suppress(futures.TimeoutError):  # not the built-in TimeoutError in Python 3.10
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
