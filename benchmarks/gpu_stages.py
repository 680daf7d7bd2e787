"""The stages of a GPU session, one function each: it gets the device boundary, a folder and its seconds, and returns JSON.

A stage needs only torch, triton and this tree. If something else is missing (a library, a peer, a profiler, time), the stage
reports that part as not run and does the rest. It writes its results row by row, so a stage that is stopped loses none.
"""

from __future__ import annotations

import contextlib
import gzip
import importlib.util
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

from benchmarks import gpu_compile, gpu_pack
from benchmarks.gpu_cases import failure, reason, run_table
from benchmarks.gpu_summary import FLOOR
from benchmarks.roofline import CEILINGS

ROOT = Path(__file__).resolve().parent.parent
MAX_FILE = 16 << 20


class CudaMachine:
    """The device boundary: everything that only a GPU can do. Tests replace it with a CPU stand-in (--machine)."""

    device = "cuda"
    backends = ("cuda", "triton", "eager")
    without: tuple[str, ...] = ()  # peers that are left out
    shapes = ((8192, 128256),)  # [tokens, V] of the kernels' timing
    more_shapes = (
        (1024, 49152),
        (4096, 50257),
        (4096, 151669),
        (16384, 32000),
    )  # few rows, odd V, rows of one tile or a few
    step_shapes = ((8, 1024, 128256), (8, 512, 49152))  # [2P, T, V] of the comparison with peers on the logits path
    linear_shapes = ((4, 512, 4096, 128256), (4, 512, 1024, 128256))  # pairs, length, H, V
    small_heads = ((4, 512, 576, 49152), (4, 512, 2048, 50257))
    latency_vocab, latency_repeats = 32000, 100
    trace_vocab = 49152
    product = 8192  # of the square matrix product
    small_vocabs = (33, 5003)  # of the sample that compute-sanitizer watches
    head_shapes: tuple[tuple[int, int, int], ...] | None = None  # those of head_rates
    sweep_tokens = (64, 4096)  # rows of the sweep, at the vocabulary of `shapes`
    trainer_config: ClassVar[dict[str, int]] = {
        "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 4, "num_attention_heads": 8,
        "num_key_value_heads": 4, "vocab_size": 128256,
    }  # fmt: skip
    trainer_steps, trainer_batch = 6, 8

    def prepare(self) -> None:
        """Load the packed CUDA library, before anything else in a stage's process. Raises NoDevice without a GPU."""
        import torch

        if not torch.cuda.is_available():
            raise NoDevice(f"torch {torch.__version__} sees no GPU")
        if (pack := gpu_pack.in_use()) and "DPO_VARIANT" not in os.environ:
            pack.load()

    def describe(self) -> dict[str, Any]:
        """Name, size and state of the GPU."""
        import torch

        p = torch.cuda.get_device_properties(0)
        found = {"name": p.name, "sms": p.multi_processor_count, "memory": p.total_memory, "cuda": torch.version.cuda}
        if tool := shutil.which("nvidia-smi"):
            fields = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,temperature.gpu,power.limit"
            _, found["state"] = self.command([tool, f"--query-gpu={fields}", "--format=csv"], 10)
        return found

    def packed_variants(self) -> list[str]:
        """The CUDA libraries of the pack, the default one first."""
        pack = gpu_pack.in_use()
        return pack.variants() if pack else []

    def load_variant(self, name: str) -> Any:
        """The CUDA backend's stages on a library of the pack, in a process that has loaded no other (see `prepare`)."""
        pack = gpu_pack.in_use()
        if pack is None:
            raise RuntimeError("no pack is in use")
        pack.load(name)
        return _stage_module("cuda", self)

    def compile_target(self) -> tuple[Any, Any]:
        """Triton's target on this machine, and the class that makes its launchers."""
        import triton

        driver = triton.runtime.driver.active
        return driver.get_current_target(), driver.launcher_cls

    def triton_serves(self) -> str | None:
        """None if the Triton backend serves this machine's tensors, else why not."""
        from dpo_kernels import backends

        return backends.why_not("triton", self.device)

    def synchronize(self) -> None:
        """Wait for everything that was launched."""
        import torch

        torch.cuda.synchronize()

    def free_memory(self) -> int:
        """Bytes that can be allocated."""
        import torch

        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]

    def peak(self, work: Callable[[], object]) -> int | None:
        """Peak of the bytes that a call allocates, above what was allocated before it."""
        from benchmarks.method import peak_memory

        return peak_memory(work, self.device)[0]

    def seconds(self, work: Callable[[], object], repeats: int = 9) -> list[float]:
        """Time of each of `repeats` calls (benchmarks/head_rates.py takes this)."""
        return self.measure(work, repeats)["times"]

    def measure(
        self,
        work: Callable[[], object],
        repeats: int = 9,
        prepare: Callable[[], None] = lambda: None,
        replay: bool = False,
    ) -> dict[str, Any]:
        """Seconds that each call takes on the device, and seconds on the host (until the call returns, with an idle device).

        Before each call `prepare` runs, then a read that exceeds the L2 cache (a write would leave dirty lines, which the timed
        kernel would have to write back). The call is enqueued while the read is still running, so launch gaps do not count
        unless the host is slower than the device. replay: capture the call in a CUDA graph and time its replay, which has no
        gaps.
        """
        import torch

        host = []
        for _ in range(3):
            prepare()
            self.synchronize()
            begin = time.perf_counter()
            work()
            host.append(time.perf_counter() - begin)
        self.synchronize()
        run, uncaptured = work, None
        if replay:
            try:
                run = self._captured(work)
            except RuntimeError as error:  # a call that waits for the device is not captured: its time has gaps
                uncaptured = reason(error)
                self.synchronize()
        flush = torch.ones(64 << 20, dtype=torch.int32, device=self.device)
        times = []
        for _ in range(repeats):
            prepare()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.sum()
            flush.sum()
            begin.record()
            run()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) * 1e-3)
        found = {"times": times, "host": statistics.median(host), "replayed": run is not work}
        return found if uncaptured is None else {**found, "not captured": uncaptured}

    def _captured(self, work: Callable[[], object]) -> Callable[[], None]:
        import torch

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            work()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        return graph.replay

    def command(self, arguments: list[str], seconds: float) -> tuple[int, str]:
        """Run a tool and show its output as it comes. Returns its exit status (124: stopped at its limit) and the output."""
        output: list[str] = []
        process = subprocess.Popen(
            arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
            errors="replace",
        )  # fmt: skip

        TOOLS.add(process.pid)
        timer = threading.Timer(seconds, _kill_group, [process.pid])
        timer.start()
        assert process.stdout is not None
        for line in process.stdout:
            output.append(line)
            print(line, end="", flush=True)
        status = process.wait()
        TOOLS.discard(process.pid)
        late = not timer.is_alive()
        timer.cancel()
        return 124 if late and status < 0 else status, "".join(output)


#: Process groups of the tools that this process is running.
TOOLS: set[int] = set()


def _kill_group(group: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, 9)


def end_with_tools() -> None:
    """End this process and the tools it runs: they are in process groups of their own, and would go on using the GPU."""
    for group in TOOLS:
        _kill_group(group)
    os._exit(143)


#: The file of a stage's results so far, which are kept if the stage is stopped.
PARTIAL: Path | None = None


def write(path: Path, text: str) -> None:
    """Write a file atomically (temporary file, then rename)."""
    draft = path.with_name(path.name + ".tmp")
    draft.write_text(text)
    os.replace(draft, path)


def keep(result: dict[str, Any]) -> None:
    """Write a stage's results so far."""
    if PARTIAL is not None:
        write(PARTIAL, json.dumps(result))


def count_compilations() -> list[str]:
    """A list that grows by a name whenever Triton compiles a kernel in this process that was not in its cache."""
    late: list[str] = []
    with contextlib.suppress(ImportError):
        import triton

        triton.knobs.compilation.listener = lambda src, cache_hit, **_: None if cache_hit else late.append(src.name)
    return late


class NoDevice(RuntimeError):
    """There is no GPU to measure on; the message says what reported that."""


class Deadline:
    """When a stage's time ends."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds until then."""
        return self.end - time.monotonic()


NO_TIME = "no time left"
NO_MEMORY = "not enough memory"


def _median(found: dict[str, Any]) -> dict[str, Any]:
    times = sorted(found["times"])
    rest = {key: value for key, value in found.items() if key != "times"}
    return {"median": statistics.median(times), "low": times[0], "high": times[-1], **rest}


def _child(machine: Any, stage: str) -> list[str]:
    """The command that runs a stage as a separate program, for tools that watch a process."""
    spec = f"{type(machine).__module__}:{type(machine).__name__}"
    scratch = tempfile.mkdtemp(prefix="dpo_gpu_session_")
    return [sys.executable, "-m", "benchmarks.gpu_session", "--stage", stage, "--machine", spec, "--out", scratch]


def _served(machine: Any) -> list[str]:
    from dpo_kernels import backends

    return [name for name in machine.backends if backends.why_not(name, machine.device) is None]


def _stage_module(backend: str, machine: Any) -> Any:
    from dpo_kernels import backends

    return backends.load(backend, machine.device)


def _tensors(machine: Any, tokens: int, vocab: int) -> tuple[Any, ...]:
    import torch

    g = torch.Generator(machine.device).manual_seed(0)
    logits = torch.empty(1, tokens, vocab, dtype=torch.bfloat16, device=machine.device)
    ref = torch.empty_like(logits)
    for row in range(0, tokens, 512):  # in slices: the whole would not fit in float32
        shape = (1, min(512, tokens - row), vocab)
        logits[:, row : row + 512] = torch.randn(shape, generator=g, device=machine.device) * 2
        ref[:, row : row + 512] = logits[:, row : row + 512] + 0.1
    labels = torch.randint(vocab, (1, tokens), generator=g, device=machine.device)
    return logits, ref, labels


# ---- stages: each returns what goes into results.json under its name ----


def environment(machine: Any, out: Path, seconds: float) -> dict[str, Any]:
    """Versions, the device, the pack, and which backends serve."""
    import torch

    from dpo_kernels import backends

    found: dict[str, Any] = {"torch": torch.__version__, "python": sys.version.split()[0], "device": machine.describe()}
    with contextlib.suppress(ImportError):
        import triton

        found["triton"] = triton.__version__
    for tool in ("nvcc", "compute-sanitizer", "ncu"):
        found[tool] = shutil.which(tool)
    found["pack"] = pack.describe() if (pack := gpu_pack.in_use()) else "none"
    keep(found)
    found["backends"] = {name: backends.why_not(name, machine.device) or "serves" for name in machine.backends}
    return found


def compile(machine: Any, out: Path, seconds: float) -> dict[str, Any]:
    """Compile every Triton kernel that later stages launch, in as many processes as there are cores (at most 16)."""
    if why := machine.triton_serves():
        return {"not run": why}
    target, launcher = machine.compile_target()
    begin = time.monotonic()
    launches, stopped = gpu_compile.record(_triton_calls(machine))
    result: dict[str, Any] = {"recorded in": round(time.monotonic() - begin, 1), "not recorded": stopped}
    keep(result)
    processes = min(16, len(os.sched_getaffinity(0)))
    left = seconds - (time.monotonic() - begin)
    found = gpu_compile.compile_all(launches, target, launcher, processes, left, lambda part: keep({**result, **part}))
    return {**result, **found, "processes": processes, "target": str(target)}


def _triton_calls(machine: Any) -> Iterator[tuple[str, Callable[[], object]]]:
    """The calls by which stages launch Triton kernels, with few rows: a kernel does not depend on the number of rows."""
    import torch

    from benchmarks.linear_problem import LinearCase, LinearProblem
    from benchmarks.peers.linear import LINEAR_PEERS
    from dpo_kernels import use_backend

    stages = _stage_module("triton", machine)
    vocabs = {v for _, v in (*machine.shapes, *machine.more_shapes)} | {v for *_, v in machine.step_shapes}
    for vocab in sorted(vocabs | {machine.latency_vocab, machine.trace_vocab}):
        logits, ref, labels = _tensors(machine, 16, vocab)
        for path, job in _jobs(stages, logits, labels, ref).items():
            yield f"{path} {vocab}", job
        for inplace in (True, False):
            yield f"step {vocab}", _step("triton", logits, labels, ref, inplace)[0]
        watched = _step("triton", logits, labels, ref, True, ("entropy", "mean_logits", "accuracy"))[0]
        yield f"step with statistics {vocab}", watched
    yield "table", lambda: list(run_table("triton", machine.device))
    # Last, because the filtered gradient reads the output of its first kernel, which is not run here.
    for name in ("ours", "ours_filtered"):
        for _, _, hidden, vocab in (*machine.linear_shapes, *machine.small_heads):
            for frozen in (False, True):
                case = LinearCase("", 1, 64, 0.5, hidden, vocab, frozen=frozen, source="random")
                problem = LinearProblem(case, machine.device, torch.bfloat16)

                def run(name: str = name, problem: Any = problem) -> object:
                    with use_backend("triton"):
                        return LINEAR_PEERS[name](problem).step()

                yield f"{name} {case.key}", run


def table(machine: Any, out: Path, seconds: float) -> dict[str, Any]:
    """Print the operator table of the backend that $DPO_TABLE names, one JSON line per case."""
    for case, wrong in run_table(os.environ["DPO_TABLE"], machine.device):
        print(json.dumps({"case": case, "wrong": wrong}), flush=True)
    return {}


def correctness(machine: Any, out: Path, seconds: float) -> dict[str, Any]:
    """Check the operator table and the linear path's gradients against float64, each backend in a process of its own.

    So a fault that makes the GPU unusable for one process does not hide the results of the other backends.
    """
    from dpo_kernels import backends

    deadline = Deadline(seconds)
    tables: dict[str, Any] = {}
    for name in machine.backends:
        if why := backends.why_not(name, machine.device):
            tables[name] = {"not run": why}
        elif deadline.left < 5:
            tables[name] = {"not run": NO_TIME}
        else:
            command = ["env", f"DPO_TABLE={name}", *_child(machine, "table")]
            tables[name] = _verdicts(*machine.command(command, deadline.left))
        keep({"table": tables})
    return {"table": tables}


def _verdicts(status: int, output: str) -> dict[str, Any]:
    """The results that a process running `table` printed."""
    said = [json.loads(line) for line in output.splitlines() if line.startswith('{"case"')]
    row = {"cases": len(said), "failed": {one["case"]: one["wrong"] for one in said if one["wrong"]}}
    last = said[-1]["case"] if said else "none"
    if status == 124:
        row["not run"] = f"the cases after {last}: {NO_TIME}"
    elif status != 0:
        row["failed"][f"after {last}"] = f"exit status {status}: {output.strip()[-300:]}"
    return row


def tests(machine: Any, out: Path, seconds: float) -> dict[str, Any]:
    """Run `pytest -m gpu`: streams, graphs, sizes past 32 bits."""
    if importlib.util.find_spec("pytest") is None:
        return {"not run": "pytest is not installed"}
    if seconds < 20:
        return {"not run": NO_TIME}
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "--maxfail=20", "tests/test_cuda_gpu.py"]
    status, output = machine.command(command, seconds)
    # pytest counts a run in which all tests are skipped as a success.
    return {
        "passed": status == 0 and bool(re.search(r"\b[1-9]\d* passed", output)),
        "status": status,
        "tail": output[-3000:],
    }


def small(machine: Any, out: Path, seconds: float) -> dict[str, Any]:
    """Run every kernel of the first two backends once, with heads, tails, clusters and several blocks, for memcheck."""
    import torch

    from dpo_kernels.stages import STATISTICS, TokenKL, Transform

    launches = 0
    for name in [name for name in _served(machine) if name != "eager"]:
        stages = _stage_module(name, machine)
        for dtype in (torch.float32, torch.bfloat16):
            for vocab in machine.small_vocabs:
                logits, ref, labels = _tensors(machine, 12, vocab)
                logits, ref, labels = (t.view(4, 3, *t.shape[2:]) for t in (logits.to(dtype), ref.to(dtype), labels))
                for job in _jobs(stages, logits, labels, ref).values():
                    job()
                    launches += 1
                tokens = stages.token_logps(logits, labels, ref, Transform(), STATISTICS)
                ones = torch.ones_like(tokens[0])
                both = TokenKL(ref, *tokens[3:6], tokens[7], ones, ones)
                stages.logits_grad(logits, labels, *tokens[:3], ones, Transform(), logits, both)
                machine.synchronize()
                print(f"{name} {dtype} V {vocab}: done", flush=True)
    return {"launches": launches}


def memcheck(machine: Any, out: Path, seconds: float) -> dict[str, Any]:
    """Run compute-sanitizer's memcheck on `small`, with every tensor in an allocation of its own."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return {"not run": "compute-sanitizer is not installed"}
    arguments = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", tool, "--tool", "memcheck", "--error-exitcode", "9"]
    status, output = machine.command([*arguments, *_child(machine, "small")], seconds)
    found = {"status": status, "tail": output[-3000:]}
    return (
        {**found, "stopped": f"at its limit of {seconds:.0f} s"} if status == 124 else {**found, "clean": status == 0}
    )


def _bandwidths(machine: Any, size: int) -> tuple[float, float]:
    """Bytes per second of a copy (read + write) and of a read, over `size` bytes."""
    import torch

    source = torch.randn(size // 4, device=machine.device)
    target = torch.empty_like(source)

    # Copies and reductions reach different shares of the memory's rate; the fastest is the ceiling. A replayed copy_ runs
    # on the copy engine, which reached two thirds of a kernel's rate on an H200.
    def quickest(*jobs: Callable[[], object]) -> float:
        return min(_median(machine.measure(job, replay=replay))["median"] for job in jobs for replay in (False, True))

    copy = quickest(lambda: target.copy_(source), lambda: torch.neg(source, out=target))
    return 2 * source.nbytes / copy, source.nbytes / quickest(source.sum, source.amax)


def ceilings(machine: Any, out: Path, seconds: float) -> dict[str, Any]:
    """Measured rates of this device: bandwidth of a copy (read + write) and of a read, and cuBLAS at the session's shapes."""
    import torch

    copied, read = _bandwidths(machine, min(2 << 30, machine.free_memory() // 8))
    found: dict[str, Any] = {
        "copy_bytes_per_second": copied, "read_bytes_per_second": read, "products": {},
        "data sheet": {name: {"bandwidth": c.bandwidth, "matmul": c.matmul} for name, c in CEILINGS.items()},
    }  # fmt: skip
    keep(found)
    n = machine.product
    shapes = {f"[{n}x{n}]x[{n}x{n}]": (n, n, n)}
    for pairs, length, hidden, vocab in (*machine.linear_shapes, *machine.small_heads):
        shapes[f"logits of {pairs * length} tokens, H {hidden}, V {vocab}"] = (pairs * length, hidden, vocab)
        shapes[f"dH of {pairs * length} tokens, H {hidden}, V {vocab}"] = (pairs * length, vocab, hidden)
        shapes[f"dW of {pairs * length} tokens, H {hidden}, V {vocab}"] = (vocab, pairs * length, hidden)
    for name, (m, k, n) in shapes.items():
        # As in training: the head is stored as [V, H], so the logits' product reads it transposed, and dW reads dz transposed.
        a = torch.randn(m, k, device=machine.device, dtype=torch.bfloat16)
        b = torch.randn(k, n, device=machine.device, dtype=torch.bfloat16)
        a = a.t().contiguous().t() if name.startswith("dW") else a
        b = b.t().contiguous().t() if name.startswith("logits") else b
        seconds_of = _median(machine.measure(lambda a=a, b=b: torch.mm(a, b), repeats=5, replay=True))["median"]
        found["products"][name] = {"seconds": seconds_of, "flops": 2 * m * k * n / seconds_of}
        keep(found)
    found["matmul_flops"] = next(iter(found["products"].values()))["flops"]
    return found


def _jobs(stages: Any, logits: Any, labels: Any, ref: Any) -> dict[str, Callable[[], object]]:
    """The kernels to time, by their paths' names in the roofline."""
    import torch

    from dpo_kernels import STATISTICS
    from dpo_kernels.backends.whole_call import Family, Weighting
    from dpo_kernels.stages import TokenKL, Transform

    plain, alone = Transform(), tuple(name for name in STATISTICS if name != "kl")
    *small, ref_logps, ref_max, ref_log_sum, kl = stages.token_logps(logits, labels, ref, plain, ("kl",))
    weights, gradient = torch.ones_like(kl), torch.empty_like(logits)
    backward = (logits, labels, *small, weights, plain, gradient)
    token_kl = TokenKL(ref, ref_logps, ref_max, ref_log_sum, kl, weights, None)
    jobs = {
        "token_logps": lambda: stages.token_logps(logits, labels, None, plain, ()),
        "token_logps with statistics": lambda: stages.token_logps(logits, labels, None, plain, alone),
        "token_logps with reference": lambda: stages.token_logps(logits, labels, ref, plain, ()),
        "token_logps with reference and kl": lambda: stages.token_logps(logits, labels, ref, plain, STATISTICS),
        "logits_grad": lambda: stages.logits_grad(*backward),
        "logits_grad with kl": lambda: stages.logits_grad(*backward, token_kl),
    }
    if hasattr(stages, "preference_forward"):
        bounds = torch.tensor([0, kl.numel() // 2, kl.numel()], device=logits.device)
        flat = tuple(t.view(1, -1, *t.shape[2:]) for t in (logits, labels, ref))
        whole = Weighting(None, bounds, None, "mean")
        family = Family(None, None, 0.1, None, 0.0, False)
        jobs["forward of a call with reference"] = lambda: stages.preference_forward(*flat, plain, (), whole, family)
    return jobs


def kernels(machine: Any, out: Path, seconds: float) -> dict[str, Any]:
    """Run the main kernels of cuda and triton, twice each, and nothing else, for ncu."""
    tokens, vocab = machine.shapes[0]
    logits, ref, labels = _tensors(machine, min(tokens, 2048), vocab)
    for name in [name for name in _served(machine) if name != "eager"]:
        for job in _jobs(_stage_module(name, machine), logits, labels, ref).values():
            job()
    machine.synchronize()
    return {}


def _step(
    backend: str, logits: Any, labels: Any, ref: Any, inplace: bool = True, watched: tuple[str, ...] = ()
) -> tuple[Callable[[], object], Callable[[], None]]:
    """(a call of the public loss and its gradient on one pair of long sequences, a function that restores the logits)."""
    import torch

    from dpo_kernels import dpo_loss, use_backend

    rows = logits.shape[1] // 2 * 2
    leaf, target, other = (t[:, :rows].view(2, rows // 2, *t.shape[2:]) for t in (logits, labels, ref))
    pristine = leaf.clone() if inplace else None
    leaf = leaf.detach().requires_grad_()

    def run() -> object:
        with use_backend(backend):
            loss = dpo_loss(leaf, target, ref_logits=other, inplace_backward=inplace, statistics=watched).loss
            return torch.autograd.grad(loss, leaf)

    def restore() -> None:
        if pristine is not None:
            with torch.no_grad():
                leaf.copy_(pristine)

    return run, restore


STEP = "step: policy, reference, gradient"


def _time_kernels(machine: Any, seconds: float, shapes: Any) -> dict[str, Any]:
    """Seconds of each backend's step and stages at these shapes, the step first; eager takes part if memory suffices."""
    deadline = Deadline(seconds)
    rows: dict[str, Any] = {}
    for tokens, vocab in shapes:
        shape = f"[{tokens}x{vocab}]"
        for name in machine.backends:
            title = f"{name} {shape}"
            # Two inputs, a gradient, a copy to restore from; eager needs about six more float32 copies of the logits.
            if (40 if name == "eager" else 12) * tokens * vocab > machine.free_memory():
                rows[title] = {"not run": NO_MEMORY}
            elif deadline.left < 0:
                rows[title] = {"not run": NO_TIME}
            elif name not in _served(machine):
                rows[title] = {"not run": "this backend does not serve here"}
            else:
                why = failure(lambda name=name, at=(tokens, vocab): _time_backend(machine, name, *at, rows, deadline))
                if why:
                    rows[title] = {"failed": why}
            keep({"rows": rows})
    return {"rows": rows}


def _time_backend(machine: Any, name: str, tokens: int, vocab: int, rows: dict[str, Any], deadline: Deadline) -> None:
    logits, ref, labels = _tensors(machine, tokens, vocab)
    ours = name != "eager"
    run, restore = _step(name, logits, labels, ref, inplace=ours)
    rows[f"{name}: {STEP} [{tokens}x{vocab}]"] = _median(machine.measure(run, prepare=restore, replay=ours))
    keep({"rows": rows})
    restore()
    del run, restore
    for path, job in _jobs(_stage_module(name, machine), logits, labels, ref).items():
        title = f"{name}: {path} [{tokens}x{vocab}]"
        try:
            timed = deadline.left > 0
            rows[title] = _median(machine.measure(job, replay=ours)) if timed else {"not run": NO_TIME}
        except Exception as error:  # a failure is a result, and the next kernel is still timed
            rows[title] = {"failed": reason(error)}
        keep({"rows": rows})


def timing(machine: Any, out: Path, seconds: float) -> dict[str, Any]:
    """Time the kernels at the shape that the predictions are for."""
    return _time_kernels(machine, seconds, machine.shapes)


def more_shapes(machine: Any, out: Path, seconds: float) -> dict[str, Any]:
    """Time the kernels at few rows, odd vocabularies and short rows."""
    return _time_kernels(machine, seconds, machine.more_shapes)


def _compare(
    machine: Any,
    contenders: Iterator[tuple[str, Callable[[], tuple[Callable[[], object], Any]]]],
    prepare: Callable[[], None],
    deadline: Deadline,
    found: dict[str, Any],
    save: Callable[[], None],
) -> None:
    """Time contenders one after the other and measure their peak memory; each result is kept at once.

    contenders: (name, function that builds it and returns its call and the verdict on its gradient). Each is built when its
    turn comes. The first is timed again at the end, which shows how far the machine's speed drifted.
    """
    first = None
    for name, build in contenders:
        if deadline.left < 0:
            found["not run"][name] = NO_TIME
            continue
        try:
            run, gradient = build()
            prepare()
            row = _median(machine.measure(run, repeats=7, prepare=prepare))
            prepare()
            row["extra bytes"] = machine.peak(run)
            found["rows"][name] = {**row, "gradient": gradient}
            first = first or (name, run)
        except Exception as error:  # a failure is a result, and the next contender still runs
            found["failed"][name] = reason(error)
        save()
    if first is not None:
        found["rows"][first[0]]["again"] = _median(machine.measure(first[1], repeats=7, prepare=prepare))["median"]


def peers(machine: Any, out: Path, seconds: float) -> dict[str, Any]:
    """Time loss and gradient from logits against every installed peer; gradients are checked on a small batch."""
    import torch

    from benchmarks.peers import GPU_PEERS, PEERS
    from benchmarks.problem import LogitsProblem, Truth, error_budget
    from dpo_kernels import use_backend

    deadline = Deadline(seconds)
    tables: dict[str, Any] = {}
    everyone = {**PEERS, **GPU_PEERS}
    # Our methods first, in place before the others; methods that compile for half a minute last.
    order = sorted(everyone, key=lambda name: (name == "compiled", not everyone[name].ours, name != "ours_inplace"))
    for batch, tokens, vocab in machine.step_shapes:
        found: dict[str, Any] = {"shape": [batch, tokens, vocab], "rows": {}, "failed": {}, "not run": {}}
        tables[f"[{batch}x{tokens}x{vocab}]"] = found
        if 24 * batch * tokens * vocab > machine.free_memory():
            found["not run"]["all of them"] = NO_MEMORY
            continue
        problem = LogitsProblem((batch, tokens, vocab), torch.bfloat16, machine.device, rotating_bytes=0)
        tiny = LogitsProblem((2, 8, vocab), torch.bfloat16, machine.device, rotating_bytes=0)
        truth = Truth(tiny)
        found["bytes"] = 4 * problem.nbytes

        def contenders(
            problem: Any = problem, tiny: Any = tiny, truth: Any = truth, found: Any = found
        ) -> Iterator[tuple[str, Any]]:
            for name in order:
                peer = everyone[name]
                if why := "left out" if name in machine.without else peer.why_missing():
                    found["not run"][name] = why
                    continue
                for backend in [b for b in _served(machine) if b != "eager"] if peer.ours else [None]:

                    def build(peer: Any = peer, backend: Any = backend) -> tuple[Callable[[], object], Any]:
                        def under(step: Callable[[], Any]) -> Any:
                            with use_backend(backend) if backend else contextlib.nullcontext():
                                return step()

                        step = peer(problem).step
                        tiny.next()
                        error = truth.error_of(under(peer(tiny).step)).worst
                        verdict = {"error": error, "right": error <= error_budget(torch.bfloat16)}
                        return lambda: under(step), verdict

                    yield name if backend is None else f"{name} ({backend})", build

        _compare(machine, contenders(), problem.next, deadline, found, lambda: keep({"tables": tables}))
        del problem, tiny, truth
    return {"tables": tables}


def _linear_tables(machine: Any, seconds: float, shapes: Any) -> dict[str, Any]:
    """Time loss and gradients from hidden states and LM head: exact, filtered, frozen head, peers, and the products alone."""
    import torch

    from benchmarks.linear_problem import LinearCase, LinearProblem, LinearTruth
    from benchmarks.peers.linear import LINEAR_PEERS

    deadline = Deadline(seconds)
    tables: dict[str, Any] = {}
    order = sorted(LINEAR_PEERS, key=lambda name: not LINEAR_PEERS[name].ours)
    cases = [
        LinearCase("", pairs, length, 0.5, hidden, vocab, frozen=frozen, source="random")
        for frozen in (False, True)
        for pairs, length, hidden, vocab in shapes
    ]
    # Methods that compile for half a minute come after all other rows of all tables, and only for the first table.
    turns = [(case, [name for name in order if "compiled" not in name]) for case in cases]
    turns.append((cases[0], [name for name in order if "compiled" in name]))
    for case, names in turns:
        empty = {"rows": {}, "failed": {}, "not run": {}, "products": case.products, "scored": case.scored}
        found = tables.setdefault(case.key, empty)
        if deadline.left < 0 or 48 * case.vocab * case.hidden_size > machine.free_memory():
            why = NO_TIME if deadline.left < 0 else NO_MEMORY
            found["not run"] |= dict.fromkeys(names, why)
            continue
        problem = LinearProblem(case, machine.device, torch.bfloat16)
        truth = LinearTruth(problem)
        yardstick = truth.error_of(LINEAR_PEERS["eager"](problem).step())

        def contenders(
            names: list[str] = names, problem: Any = problem, truth: Any = truth, yardstick: Any = yardstick,
            found: Any = found,
        ) -> Iterator[tuple[str, Any]]:  # fmt: skip
            for name in names:
                peer = LINEAR_PEERS[name]
                if why := "left out" if name in machine.without else peer.why_missing():
                    found["not run"][name] = why
                    continue

                def build(peer: Any = peer) -> tuple[Callable[[], object], Any]:
                    step = peer(problem).step
                    error = truth.error_of(step())
                    right = error.within(yardstick, peer.filtered)
                    return step, {"error": max(error.rows, error.weight), "right": right}

                yield name, build
                if name == "ours":
                    yield FLOOR, lambda: (_products(problem), None)

        _compare(machine, contenders(), lambda: None, deadline, found, lambda: keep({"tables": tables}))
        del problem, truth
    return {"tables": tables}


def _products(problem: Any) -> Callable[[], None]:
    """The dense products that exact gradients require, by cuBLAS, over the scored rows."""
    import torch

    rows = problem.hidden.detach()[problem.labels != -100]
    head = problem.weight.detach()
    logits = torch.mm(rows, head.t())
    grad_rows, grad_head = torch.empty_like(rows), torch.empty_like(head)

    def run() -> None:
        for _ in range(2 if problem.case.reference == "hidden" else 1):
            torch.mm(rows, head.t(), out=logits)
        torch.mm(logits, head, out=grad_rows)
        if not problem.case.frozen:
            torch.mm(logits.t(), rows, out=grad_head)

    return run


def linear(machine: Any, out: Path, seconds: float) -> dict[str, Any]:
    """Time the linear path at a wide and a narrow head with Llama 3's vocabulary."""
    return _linear_tables(machine, seconds, machine.linear_shapes)


def small_heads(machine: Any, out: Path, seconds: float) -> dict[str, Any]:
    """Time the linear path at SmolLM2-135M's head, and at an odd vocabulary."""
    return _linear_tables(machine, seconds, machine.small_heads)


def head_rates(machine: Any, out: Path, seconds: float) -> dict[str, Any]:
    """Measure the rates of products that the linear path's planner assumes (benchmarks/head_rates.py)."""
    from benchmarks.head_rates import SHAPES, measure
    from dpo_kernels import backends

    deadline = Deadline(seconds)
    rows: dict[str, Any] = {}
    not_run = []
    for shape in machine.head_shapes or SHAPES:
        if deadline.left < 0:
            not_run.append(str(shape))
            continue
        rows |= measure(machine.seconds, machine.device, backends.default(machine.device), [shape])
        keep({"rows": rows})
    return {"rows": rows, "left out": not_run}


def latency(machine: Any, out: Path, seconds: float) -> dict[str, Any]:
    """Microseconds of a step of 2 pairs x 64 tokens: on the device (a graph's replay), on the host, and from start to end."""
    import torch

    from benchmarks.peers.eager import textbook_loss
    from dpo_kernels import dpo_loss, use_backend

    vocab, repeats = machine.latency_vocab, machine.latency_repeats
    logits = torch.randn(4, 64, vocab, device=machine.device, dtype=torch.bfloat16).requires_grad_()
    ref = logits.detach() + 0.1
    labels = torch.randint(vocab, (4, 64), device=machine.device)

    def ours(backend: str) -> Callable[[], object]:
        def run() -> object:
            with use_backend(backend):
                return torch.autograd.grad(dpo_loss(logits, labels, ref_logits=ref).loss, logits)

        return run

    def textbook() -> object:
        return torch.autograd.grad(textbook_loss(logits, ref, labels), logits)

    found: dict[str, dict[str, Any]] = {}
    steps = {f"dpo_kernels ({name})": ours(name) for name in _served(machine) if name != "eager"}

    def measure(name: str, step: Callable[[], object]) -> None:
        for _ in range(3):
            step()
        machine.synchronize()
        begin = time.perf_counter()
        for _ in range(repeats):
            step()
        host = time.perf_counter() - begin
        machine.synchronize()
        done = time.perf_counter() - begin
        found[name] = {"microseconds": 1e6 * done / repeats, "host microseconds": 1e6 * host / repeats}
        keep({"shape": [4, 64, vocab], "steps": found})
        found[name]["device microseconds"] = 1e6 * _median(machine.measure(step, replay=True))["median"]
        keep({"shape": [4, 64, vocab], "steps": found})

    for name, step in {**steps, "eager PyTorch": textbook}.items():
        if why := failure(lambda name=name, step=step: measure(name, step)):
            found.setdefault(name, {})["failed"] = why
    return {"shape": [4, 64, vocab], "steps": found}


# ---- the sweep of launch parameters: each variant runs in a process of its own ----


def variant(machine: Any, out: Path, seconds: float) -> dict[str, Any]:
    """Print as JSON the seconds of the CUDA kernels at few and many rows, with the packed library that $DPO_VARIANT names."""
    import torch

    from dpo_kernels.backends import eager
    from dpo_kernels.stages import Transform

    stages = machine.load_variant(os.environ["DPO_VARIANT"])
    vocab = machine.shapes[0][1]
    found: dict[str, float] = {}
    for tokens in machine.sweep_tokens:
        logits, ref, labels = _tensors(machine, tokens, vocab)
        few = (logits[:, :4], labels[:, :4].contiguous(), None)
        ours, theirs = (s.token_logps(*few, Transform(), ())[0] for s in (stages, eager))
        if not bool(torch.isclose(ours, theirs, rtol=1e-4, atol=1e-4).all()):
            raise AssertionError("wrong log-probabilities under these parameters")
        for path, job in _jobs(stages, logits, labels, ref).items():
            found[f"{path} [{tokens}x{vocab}]"] = _median(machine.measure(job, replay=True))["median"]
    print(json.dumps({"seconds": found}), flush=True)
    return found


def _last_object(output: str) -> dict[str, Any] | None:
    for line in reversed(output.splitlines()):
        if line.startswith("{"):
            with contextlib.suppress(ValueError):
                return json.loads(line)
    return None


def sweep(machine: Any, out: Path, seconds: float) -> dict[str, Any]:
    """Time the CUDA kernels with every library of the pack (other launch parameters); compare the best with the default."""
    names = machine.packed_variants()
    if not names:
        return {"not run": "no pack, or a pack without variants (--pack DIR builds them)"}
    deadline = Deadline(seconds)
    runs: list[dict[str, Any]] = []
    not_run = []
    for name in names:
        if deadline.left < 5:
            not_run.append(name)
            continue
        status, output = machine.command(["env", f"DPO_VARIANT={name}", *_child(machine, "variant")], deadline.left)
        answer = _last_object(output)
        if status == 124:
            not_run.append(name)
        elif status != 0 or answer is None:
            runs.append({"settings": name, "failed": output[-300:] or f"status {status}"})
        else:
            runs.append({"settings": name, **answer})
        keep({"runs": runs, "left out": not_run, "best": best_variants(runs)})
    return {"runs": runs, "left out": not_run, "best": best_variants(runs)}


def best_variants(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each kernel, the fastest parameters and how many times faster they are than the default."""
    timed = [run for run in runs if "seconds" in run]
    default = next((run["seconds"] for run in timed if run["settings"] == gpu_pack.DEFAULT), {})
    best = []
    for path, seconds in default.items():
        quickest = min(timed, key=lambda run: run["seconds"].get(path, float("inf")))
        least = quickest["seconds"][path]
        best.append({
            "kernel": path, "default": seconds, "best": least, "settings": quickest["settings"], "gain": seconds / least
        })  # fmt: skip
    return best


def trace(machine: Any, out: Path, seconds: float) -> dict[str, Any]:
    """Write a torch.profiler trace of two DPO steps through the public function."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    from dpo_kernels import dpo_loss, use_backend

    vocab = machine.trace_vocab
    logits = torch.randn(4, 128, vocab, device=machine.device, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(vocab, (4, 128), device=machine.device)
    ref = logits.detach().clone()
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if machine.device == "cuda" else [])
    backend = _served(machine)[0]

    def step() -> None:
        with use_backend(backend):
            dpo_loss(logits, labels, ref_logits=ref).loss.backward()

    step()
    with profile(activities=activities) as profiler:
        for _ in range(2):
            step()
        machine.synchronize()
    with tempfile.TemporaryDirectory() as scratch:
        raw = Path(scratch) / "trace.json"
        profiler.export_chrome_trace(str(raw))
        packed = gzip.compress(raw.read_bytes())
    if len(packed) > MAX_FILE:
        return {"not run": f"the trace has {len(packed)} bytes, more than {MAX_FILE}"}
    (out / "trace.json.gz").write_bytes(packed)
    return {"file": "trace.json.gz", "bytes": len(packed), "backend": backend}


def ncu(machine: Any, out: Path, seconds: float) -> dict[str, Any]:
    """Run Nsight Compute on the main kernels alone, without changing the card's clocks."""
    tool = shutil.which("ncu")
    if tool is None:
        return {"not run": "ncu is not installed"}
    arguments = [tool, "--clock-control", "none", "--kernel-name", "regex:token_logps|logits_grad|preference_loss"]
    arguments += ["--launch-count", "16", "--kill", "yes"]
    for section in ("SpeedOfLight", "LaunchStats", "Occupancy", "MemoryWorkloadAnalysis", "WarpStateStats"):
        arguments += ["--section", section]
    status, output = machine.command([*arguments, *_child(machine, "kernels")], seconds)
    write(out / "ncu.txt", output[-MAX_FILE // 4 :])
    if "ERR_NVGPUCTRPERM" in output:
        return {"not run": "this machine does not let users read performance counters", "file": "ncu.txt"}
    found = {"status": status, "file": "ncu.txt"}
    return {**found, "stopped": f"at its limit of {seconds:.0f} s"} if status == 124 else found


def trainer(machine: Any, out: Path, seconds: float) -> dict[str, Any]:
    """Time steps of a small random Llama with our trainer, with TRL's, and with TRL's on our kernels, on the same pairs."""
    import torch

    for module in ("transformers", "accelerate", "datasets"):
        if importlib.util.find_spec(module) is None:
            return {"not run": f"{module} is not installed"}
    for folder in ("tests", "python"):
        sys.path.insert(0, str(ROOT / folder))
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    from trainer.tiny import build_pairs, build_tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

    from benchmarks.trainer_run import CONTENDERS, common_arguments

    deadline = Deadline(seconds)
    steps, batch = machine.trainer_steps, machine.trainer_batch
    found: dict[str, Any] = {"rows": {}, "failed": {}, "not run": {}}
    with tempfile.TemporaryDirectory() as scratch:
        model = Path(scratch) / "model"
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(tie_word_embeddings=False, **machine.trainer_config)).save_pretrained(model)
        build_tokenizer().save_pretrained(model)
        pairs = build_pairs(steps * batch)
        os.environ["DPO_TRAINER_CACHE"] = f"{scratch}/cache"
        for name in ("ours", "trl", "trl_patched"):  # last, because the patch stays in force
            if deadline.left < 0:
                found["not run"][name] = NO_TIME
                continue
            if name.startswith("trl") and importlib.util.find_spec("trl") is None:
                found["not run"][name] = "trl is not installed"
                continue

            class Stopwatch(TrainerCallback):
                def __init__(self) -> None:
                    self.ends: list[float] = []

                def on_step_end(self, *_: Any, **__: Any) -> None:
                    machine.synchronize()
                    self.ends.append(time.perf_counter())

            watch = Stopwatch()

            def run(name: str = name, watch: Any = watch) -> None:
                common = common_arguments(f"{scratch}/{name}", steps, batch, 128, machine.device)
                made = CONTENDERS[name](model, pairs, common)
                made.add_callback(watch)
                made.train()
                times = [b - a for a, b in zip(watch.ends, watch.ends[1:], strict=False)]
                losses = [entry["loss"] for entry in made.state.log_history if "loss" in entry]
                found["rows"][name] = {"step": statistics.median(times), "losses": losses}

            if why := failure(run):
                found["failed"][name] = why
            keep(found)
    return found


#: All stages by name; other stages run `table`, `small`, `kernels` and `variant` as programs of their own.
STAGES: dict[str, Callable[[Any, Path, float], dict[str, Any]]] = {
    stage.__name__: stage
    for stage in (
        environment, compile, correctness, ceilings, timing, peers, linear, latency, trace, memcheck, sweep, ncu,
        more_shapes, small_heads, head_rates, trainer, tests, table, small, kernels, variant,
    )
}  # fmt: skip
