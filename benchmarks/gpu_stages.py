"""What a GPU session does, a function a stage: each gets the device boundary, a folder and its seconds, and returns JSON.

Nothing beyond torch, triton and this tree is taken for granted: what a stage misses (pytest, nvcc, a peer, a profiler), it
names in its result, and does the rest.
"""

from __future__ import annotations

import contextlib
import gzip
import importlib
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

from benchmarks.roofline import CEILINGS, LINEAR_PATHS, works

ROOT = Path(__file__).resolve().parent.parent
MAX_FILE = 16 << 20


class CudaMachine:
    """The device boundary: everything that only a GPU can do. Tests put a CPU stand-in here (--machine)."""

    device = "cuda"
    backends = ("cuda", "triton", "eager")
    shapes = None  # those of the roofline
    without: tuple[str, ...] = ()  # peers that are left out
    step_shape = (8, 512, 128256)  # [2P, T, V] of the comparison with peers on the logits path
    linear_shapes = ((4, 512, 2048, 128256), (4, 512, 4096, 128256))  # pairs, length, H, V
    head_shapes: tuple[tuple[int, int, int], ...] | None = None  # those of head_rates
    variants: ClassVar[dict[str, tuple[dict[str, int], ...]]] = {
        "cuda": (
            {}, {"DPO_ROW_THREADS": 128}, {"DPO_ROW_THREADS": 512}, {"DPO_ROW_UNROLL": 8}, {"DPO_MAX_CLUSTER": 1},
            {"DPO_MAX_CLUSTER": 8, "DPO_ROW_THREADS": 512}, {"DPO_GRAD_THREADS": 128}, {"DPO_GRAD_THREADS": 512},
        ),
        "triton": ({}, {"NUM_WARPS": 2}, {"NUM_WARPS": 8}, {"UNROLL": 2}, {"UNROLL": 8}),
    }  # fmt: skip

    def describe(self) -> dict[str, Any]:
        """Name and size of the GPU."""
        import torch

        p = torch.cuda.get_device_properties(0)
        return {"name": p.name, "sms": p.multi_processor_count, "memory": p.total_memory, "cuda": torch.version.cuda}

    def synchronize(self) -> None:
        """Wait for everything that was launched."""
        import torch

        torch.cuda.synchronize()

    def free_memory(self) -> int:
        """Bytes that can be allocated."""
        import torch

        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]

    def seconds(self, work: Callable[[], object], repeats: int = 9) -> list[float]:
        """Time of each of `repeats` calls by events, after two to warm up; the L2 cache is overwritten before each."""
        import torch

        flush = torch.empty(128 << 20, dtype=torch.int8, device="cuda")
        for _ in range(2):
            work()
        times = []
        for _ in range(repeats):
            flush.zero_()
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            work()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) * 1e-3)
        return times

    def command(self, arguments: list[str], seconds: float) -> tuple[int, str]:
        """Exit status and output of a tool of the machine (pytest on the GPU, compute-sanitizer, ncu)."""
        with tempfile.TemporaryFile("w+") as output:
            try:
                status = subprocess.run(
                    arguments, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, timeout=seconds
                ).returncode
            except subprocess.TimeoutExpired:
                status = 124
            output.seek(0)
            return status, output.read()


#: Where a stage leaves what it has so far; a stage that is cut off keeps that.
PARTIAL: Path | None = None


def keep(result: dict[str, Any]) -> None:
    """Write a stage's result so far."""
    if PARTIAL is not None:
        PARTIAL.write_text(json.dumps(result))


def _child(machine: Any, stage: str, *more: str) -> list[str]:
    """The command that runs a stage as a program of its own, for tools that watch a process."""
    spec = f"{type(machine).__module__}:{type(machine).__name__}"
    scratch = tempfile.mkdtemp(prefix="dpo_gpu_session_")
    return [
        sys.executable,
        "-m",
        "benchmarks.gpu_session",
        "--stage",
        stage,
        "--machine",
        spec,
        "--out",
        scratch,
        *more,
    ]


def _served(machine: Any) -> list[str]:
    from dpo_kernels import backends

    return [name for name in machine.backends if backends.why_not(name, machine.device) is None]


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:300]


def _failure(call: Callable[[], object]) -> str | None:
    """Why the call fails, or None: here one failure is a result, and the others are still wanted."""
    try:
        call()
    except Exception as error:
        return _reason(error)
    return None


def _stage_module(backend: str, machine: Any) -> Any:
    from dpo_kernels import backends

    return backends.load(backend, machine.device)


def _tensors(machine: Any, tokens: int, vocab: int) -> tuple[Any, ...]:
    import torch

    g = torch.Generator(machine.device).manual_seed(0)
    logits = torch.empty(1, tokens, vocab, dtype=torch.bfloat16, device=machine.device)
    ref = torch.empty_like(logits)
    for row in range(0, tokens, 512):  # in slices: a float32 draft of the whole would not fit
        shape = (1, min(512, tokens - row), vocab)
        logits[:, row : row + 512] = torch.randn(shape, generator=g, device=machine.device) * 2
        ref[:, row : row + 512] = logits[:, row : row + 512] + 0.1
    labels = torch.randint(vocab, (1, tokens), generator=g, device=machine.device)
    return logits, ref, labels


PLAIN = {"ignore_index": -100, "logit_scale": 1.0, "logit_softcap": 0.0}


def _options(on: bool) -> dict[str, Any]:
    return dict(PLAIN, entropy=on, kl=on, accuracy=on, mean_logits=on, log_sum_sq=False)


# ---- stages: each returns what goes into results.json under its name ----


def environment(machine: Any, out: Path, seconds: float) -> dict[str, Any]:
    """Versions and the device."""
    import torch

    found: dict[str, Any] = {"torch": torch.__version__, "python": sys.version.split()[0], "device": machine.describe()}
    with contextlib.suppress(ImportError):
        import triton

        found["triton"] = triton.__version__
    for tool in ("nvcc", "compute-sanitizer", "ncu"):
        found[tool] = shutil.which(tool)
    return found


def build(machine: Any, out: Path, seconds: float) -> dict[str, Any]:
    """Load every backend, compiling what is missing; the reason where one does not serve."""
    from dpo_kernels import backends

    begin = time.monotonic()
    served = {name: backends.why_not(name, machine.device) or "serves" for name in machine.backends}
    return {"seconds": time.monotonic() - begin, "backends": served}


def correctness(machine: Any, out: Path, seconds: float) -> dict[str, Any]:
    """The operator table on every backend against the float64 reference, in plain Python: a bare machine has no pytest."""
    import torch

    sys.path.insert(0, str(ROOT / "tests"))
    from dpo_kernels import backends, dpo_loss, reference, use_backend

    from cases import CASES, Case, make_inputs
    from checks import check_gradient

    divergences = [
        Case("kl_term", options={"kl_coef": 0.3}),
        Case("tdpo_bfloat16", dtype=torch.bfloat16, options={"loss_type": "tdpo", "kl_coef": 0.2}),
    ]
    device = torch.device(machine.device)

    def check(name: str, case: Case) -> None:
        inputs = make_inputs(case, device)
        found = []
        for dtype in (torch.float64, torch.float32):
            leaf = inputs.logits.detach().to(dtype).requires_grad_()
            keywords = {
                k: v.to(dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() else v
                for k, v in inputs.keywords.items()
            }
            loss = reference.dpo_loss(leaf, inputs.labels, **keywords)
            loss.sum().backward()
            found.append((loss.detach().double(), leaf.grad))
        (truth, truth_grad), (eager, eager_grad) = found
        logits = inputs.logits.detach().requires_grad_()
        with use_backend(name):
            loss = dpo_loss(logits, inputs.labels, **inputs.keywords).loss
            loss.backward()
        allowed = (eager - truth).abs().max() + 2**-23 * truth.abs().max().clamp(min=0.5)
        error = (loss.detach().double() - truth).abs().max()
        if not error <= allowed:
            raise AssertionError(f"loss off by {error:.2e}, allowed {allowed:.2e}")
        if case.vocab > 1:
            check_gradient(logits.grad, truth_grad, eager_grad.to(case.dtype), inputs.labels)

    table: dict[str, Any] = {}
    for name in machine.backends:
        if reason := backends.why_not(name, machine.device):
            table[name] = {"does not serve": reason}
            continue
        failed = {}
        cases = [case for case in [*CASES, *divergences] if case.dtype != torch.float64]
        for case in cases:
            if reason := _failure(lambda name=name, case=case: check(name, case)):
                failed[case.name] = reason
        table[name] = {"cases": len(cases), "failed": failed}
        keep({"table": table})
    return {"table": table}


def tests(machine: Any, out: Path, seconds: float) -> dict[str, Any]:
    """`pytest -m gpu`: the operator table on every backend, streams, graphs, sizes past 32 bits."""
    if importlib.util.find_spec("pytest") is None:
        return {"not run": "pytest is not installed; the stage correctness needs none"}
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "--maxfail=20", "tests/test_cuda_gpu.py"]
    status, output = machine.command(command, seconds)
    return {"passed": status == 0, "status": status, "tail": output[-3000:]}


def small(machine: Any, out: Path, seconds: float) -> dict[str, Any]:
    """Every CUDA kernel once at sizes with heads, tails, clusters and several blocks: what compute-sanitizer watches."""
    import torch

    from dpo_kernels.backends.eager import TokenKL

    stages = _stage_module(machine.backends[0], machine)
    launches = 0
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for vocab in (33, 5003, 20000):
            logits, ref, labels = _tensors(machine, 12, vocab)
            logits, ref, labels = (t.view(4, 3, *t.shape[2:]) for t in (logits.to(dtype), ref.to(dtype), labels))
            for job in _jobs(stages, logits, labels, ref).values():
                job()
                launches += 1
            tokens = stages.token_logps(logits, labels, ref, **dict(_options(True), log_sum_sq=True))
            ones = torch.ones_like(tokens[0])
            both = TokenKL(ref, tokens[2], tokens[4], ones, ones)
            stages.logits_grad(logits, labels, *tokens[:2], ones, **PLAIN, out=logits, token_kl=both)
    machine.synchronize()
    return {"launches": launches}


def sanitizer(machine: Any, out: Path, seconds: float) -> dict[str, Any]:
    """compute-sanitizer over the reduced set of `small`."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return {"not run": "compute-sanitizer is not installed"}
    found = {}
    checks = ("memcheck", "racecheck", "synccheck")
    for check in checks:
        arguments = [tool, "--tool", check, "--error-exitcode", "9", *_child(machine, "small")]
        status, output = machine.command(arguments, seconds / len(checks))
        found[check] = {"clean": status == 0, "status": status, "tail": output[-1500:]}
        keep(found)
    return found


def ceilings(machine: Any, out: Path, seconds: float) -> dict[str, Any]:
    """Copy bandwidth (read + write) and bfloat16 matmul rate of this device, the yardsticks of everything else."""
    import torch

    size = min(2 << 30, machine.free_memory() // 8)
    source = torch.empty(size, dtype=torch.int8, device=machine.device)
    target = torch.empty_like(source)
    copy = statistics.median(machine.seconds(lambda: target.copy_(source)))
    n = 8192 if machine.free_memory() > 8 << 30 else 256
    a = torch.randn(n, n, device=machine.device).bfloat16()
    product = statistics.median(machine.seconds(lambda: a @ a))
    return {"copy_bytes_per_second": 2 * size / copy, "matmul_flops": 2 * n**3 / product, "data sheet": {
        name: {"bandwidth": c.bandwidth, "matmul": c.matmul} for name, c in CEILINGS.items()}}  # fmt: skip


def _jobs(stages: Any, logits: Any, labels: Any, ref: Any) -> dict[str, Callable[[], object]]:
    """The kernels to time, by the names of the roofline's paths where they have one."""
    import torch

    from dpo_kernels.backends.eager import TokenKL

    logps, lse, ref_logps, _, kl, *_ = stages.token_logps(logits, labels, ref, **dict(_options(False), kl=True))
    weights, gradient = torch.ones_like(logps), torch.empty_like(logits)
    statistics_alone = dict(_options(True), kl=False)
    token_kl = TokenKL(ref, ref_logps, kl, weights, None)
    jobs = {
        "token_logps": lambda: stages.token_logps(logits, labels, None, **_options(False)),
        "token_logps with statistics": lambda: stages.token_logps(logits, labels, None, **statistics_alone),
        "token_logps with reference": lambda: stages.token_logps(logits, labels, ref, **_options(False)),
        "token_logps with reference and kl": lambda: stages.token_logps(logits, labels, ref, **_options(True)),
        "logits_grad": lambda: stages.logits_grad(logits, labels, logps, lse, weights, **PLAIN, out=gradient),
        "logits_grad with kl": lambda: stages.logits_grad(
            logits, labels, logps, lse, weights, **PLAIN, out=gradient, token_kl=token_kl
        ),
    }
    if hasattr(stages, "fused_forward"):
        bounds = torch.tensor([0, logps.numel() // 2, logps.numel()], device=logits.device)
        pair = torch.full((1,), 0.1, dtype=torch.float64, device=logits.device)
        flat = [t.view(1, -1, *t.shape[2:]) for t in (logits, labels, ref, weights)]
        jobs["single-launch forward with reference"] = lambda: stages.fused_forward(
            *flat, bounds, None, pair, pair, False, **_options(False)
        )
    return jobs


def kernels(machine: Any, out: Path, seconds: float) -> dict[str, Any]:
    """The main kernels of cuda and triton, twice each, and nothing else: what ncu watches."""
    vocab = 128256 if machine.shapes is None else machine.shapes[0][1]
    logits, ref, labels = _tensors(machine, 2048 if machine.shapes is None else machine.shapes[0][0], vocab)
    for name in [name for name in _served(machine) if name != "eager"]:
        for job in _jobs(_stage_module(name, machine), logits, labels, ref).values():
            job()
    machine.synchronize()
    return {}


def _step(backend: str, logits: Any, labels: Any, ref: Any) -> Callable[[], object]:
    """The public loss of one pair of long sequences and its gradient, in place but for eager."""
    import torch

    from dpo_kernels import dpo_loss, use_backend

    rows = logits.shape[1] // 2 * 2
    leaf, target, other = (t[:, :rows].view(2, rows // 2, *t.shape[2:]) for t in (logits, labels, ref))
    leaf = leaf.detach().requires_grad_()

    def run() -> object:
        with use_backend(backend):
            loss = dpo_loss(leaf, target, ref_logits=other, inplace_backward=backend != "eager").loss
            return torch.autograd.grad(loss, leaf)

    return run


def timing(machine: Any, out: Path, seconds: float) -> dict[str, Any]:
    """Median and spread of each stage, shape and backend, interleaved; seconds of the default backend for the roofline."""
    deadline = time.monotonic() + 0.9 * seconds
    rows: dict[str, Any] = {}
    left_out = []
    shapes = machine.shapes or sorted(
        {(w.tokens, w.vocab) for w in works() if w.path not in LINEAR_PATHS}, key=lambda s: s[0] * s[1]
    )
    for tokens, vocab in shapes:
        if time.monotonic() > deadline or 8 * tokens * vocab > machine.free_memory():
            left_out.append(f"[{tokens}x{vocab}]")
            continue
        logits, ref, labels = _tensors(machine, tokens, vocab)
        for name in machine.backends:
            # Eager needs about six float32 copies of the logits.
            if name == "eager" and 24 * tokens * vocab > machine.free_memory():
                left_out.append(f"eager [{tokens}x{vocab}]")
                continue
            if time.monotonic() > deadline:
                left_out.append(f"{name} [{tokens}x{vocab}]")
                continue
            try:
                jobs = _jobs(_stage_module(name, machine), logits, labels, ref)
                jobs["step: policy, reference, gradient"] = _step(name, logits, labels, ref)
                for path, job in jobs.items():
                    times = sorted(machine.seconds(job))
                    rows[f"{name}: {path} [{tokens}x{vocab}]"] = {
                        "median": statistics.median(times), "low": times[0], "high": times[-1]
                    }  # fmt: skip
            except Exception as error:  # a backend that fails on one shape is a result, the others go on
                rows[f"{name} [{tokens}x{vocab}]"] = {"failed": _reason(error)}
        keep({"rows": rows, "left out": left_out})
    return {"rows": rows, "left out": left_out}


def _compare(
    machine: Any, contenders: dict[str, Callable[[], object]], prepare: Callable[[], None], rounds: int
) -> tuple[dict[str, Any], dict[str, str]]:
    """Interleaved times and peak memory of the contenders that run at all, and why the others do not."""
    from benchmarks.method import Contender, interleave, ratio

    running, missing = [], {}
    for name, run in contenders.items():

        def once(run: Callable[[], object] = run) -> None:
            prepare()
            run()
            machine.synchronize()

        if reason := _failure(once):
            missing[name] = reason
        else:
            running.append(Contender(name, run, prepare))
    samples = interleave(running, rounds, device=machine.device) if running else {}
    rows = {
        name: {
            "median": found.median, "low": min(found.seconds), "high": max(found.seconds), "extra bytes": found.extra_bytes,
            "times": {other: ratio(found, samples[other]) for other in samples},
        }
        for name, found in samples.items()
    }  # fmt: skip
    return rows, missing


def peers(machine: Any, out: Path, seconds: float) -> dict[str, Any]:
    """Loss and gradient from logits, end to end, against every peer that is installed; gradients checked on a small batch."""
    import torch

    from benchmarks.peers import PEERS
    from benchmarks.problem import LogitsProblem, Truth, error_budget
    from dpo_kernels import use_backend

    batch, tokens, vocab = machine.step_shape
    while tokens > 1 and 20 * batch * tokens * vocab > machine.free_memory():  # eager's float32 copies
        tokens //= 2
    problem = LogitsProblem((batch, tokens, vocab), torch.bfloat16, machine.device, rotating_bytes=0)
    tiny = LogitsProblem((2, 8, vocab), torch.bfloat16, machine.device, rotating_bytes=0)
    truth = Truth(tiny)
    contenders: dict[str, Callable[[], object]] = {}
    missing, gradients = {}, {}

    def under(backend: str, step: Callable[[], object]) -> Callable[[], object]:
        def run() -> object:
            with use_backend(backend):
                return step()

        return run

    for name, peer in PEERS.items():
        if reason := "left out" if name in machine.without else peer.why_missing():
            missing[name] = reason
            continue
        served = [b for b in _served(machine) if b != "eager"] if peer.ours else [None]
        for backend in served:
            title = name if backend is None else f"{name} ({backend})"
            try:
                tiny.next()
                step, check = peer(problem).step, peer(tiny).step
                if backend is not None:
                    step, check = under(backend, step), under(backend, check)
                error = truth.error_of(check()).worst
                gradients[title] = {"error": error, "right": error <= error_budget(torch.bfloat16)}
                contenders[title] = step
            except Exception as error:  # as above
                missing[title] = _reason(error)
    rows, failed = _compare(machine, contenders, problem.next, rounds=7)
    return {
        "shape": [batch, tokens, vocab], "bytes": 4 * problem.nbytes, "rows": rows, "gradients": gradients,
        "missing": {**missing, **failed},
    }  # fmt: skip


def linear(machine: Any, out: Path, seconds: float) -> dict[str, Any]:
    """Loss and gradients from hidden states and the LM head: exact, filtered, frozen head, peers, and the cuBLAS floor."""
    import torch

    from benchmarks.linear_problem import LinearCase, LinearProblem
    from benchmarks.peers.linear import LINEAR_PEERS

    deadline = time.monotonic() + 0.8 * seconds
    tables: dict[str, Any] = {}
    for pairs, length, hidden, vocab in machine.linear_shapes:
        for frozen in (False, True):
            case = LinearCase("", pairs, length, 0.5, hidden, vocab, frozen=frozen, source="random")
            if time.monotonic() > deadline or 40 * vocab * hidden > machine.free_memory():
                tables[case.key] = {"not run": "no time or memory left"}
                continue
            problem = LinearProblem(case, machine.device, torch.bfloat16)
            contenders: dict[str, Callable[[], object]] = {}
            missing = {}
            for name, peer in LINEAR_PEERS.items():
                if reason := "left out" if name in machine.without else peer.why_missing():
                    missing[name] = reason
                    continue
                try:
                    contenders[name] = peer(problem).step
                except Exception as error:  # as above
                    missing[name] = _reason(error)
            rows = problem.hidden.detach()[problem.labels != -100]
            head = problem.weight.detach()

            def floor(rows: Any = rows, head: Any = head, products: int = case.products) -> None:
                for _ in range(products):
                    rows @ head.t()

            contenders["floor: the products alone"] = floor
            found, failed = _compare(machine, contenders, lambda: None, rounds=5)
            tables[case.key] = {
                "rows": found, "missing": {**missing, **failed}, "products": case.products, "scored": case.scored
            }  # fmt: skip
            keep({"tables": tables})
            del problem, contenders
    return {"tables": tables}


def head_rates(machine: Any, out: Path, seconds: float) -> dict[str, Any]:
    """What the planner of the linear path assumes of this device's products, measured (benchmarks/head_rates.py)."""
    from benchmarks.head_rates import SHAPES, measure
    from dpo_kernels import backends

    rows: dict[str, Any] = {}
    for shape in machine.head_shapes or SHAPES:
        rows |= measure(machine.seconds, machine.device, backends.default(machine.device), [shape])
        keep({"rows": rows})
    return {"rows": rows}


def latency(machine: Any, out: Path, seconds: float) -> dict[str, Any]:
    """Microseconds of a step of 2 pairs x 64 tokens, where the host decides: until done, and until the host is free."""
    import torch

    from benchmarks.peers.eager import textbook_loss
    from dpo_kernels import dpo_loss, use_backend

    vocab, repeats = (32000, 100) if machine.shapes is None else (machine.shapes[0][1], 10)
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

    for name, step in {**steps, "eager PyTorch": textbook}.items():
        if reason := _failure(lambda name=name, step=step: measure(name, step)):
            found[name] = {"failed": reason}
    return {"shape": [4, 64, vocab], "steps": found}


# ---- the sweep of launch parameters: every variant in a process of its own ----


def _configure(backend: str, settings: dict[str, int]) -> None:
    """Make this process run other launch parameters than the default."""
    import torch

    if backend == "cuda" and settings:
        from dpo_kernels import _build

        arch = "{}{}".format(*torch.cuda.get_device_capability())
        library = Path(tempfile.mkdtemp(prefix="dpo_variant_")) / "cuda.so"
        defines = [f"{name}={value}" for name, value in settings.items()]
        _build.build_cuda(library, [arch + "a" if arch == "90" else arch], defines)
        torch.ops.load_library(str(library))
    elif backend == "triton" and settings:
        from dpo_kernels.backends.triton import launch

        warps = settings.get("NUM_WARPS", launch.NUM_WARPS)
        launch.OPTIONS["num_warps"] = warps
        for name in ("token_logps", "logits_grad"):
            module = sys.modules[f"dpo_kernels.backends.triton.{name}"]
            module.LANES, module.UNROLL = 32 * warps, settings.get("UNROLL", launch.UNROLL)  # type: ignore[attr-defined]


def variant(machine: Any, out: Path, seconds: float) -> dict[str, Any]:
    """Seconds of every kernel at few and at many rows under the launch parameters in $DPO_VARIANT; printed as JSON."""
    import torch

    from dpo_kernels.backends import eager

    wish = json.loads(os.environ["DPO_VARIANT"])
    _configure(wish["backend"], wish["settings"])
    stages = _stage_module(wish["backend"], machine)
    rows, vocab = ((64, 4096), 128256) if machine.shapes is None else ((4, 8), machine.shapes[0][1])
    found: dict[str, float] = {}
    for tokens in rows:
        logits, ref, labels = _tensors(machine, tokens, vocab)
        few = (logits[:, :4], labels[:, :4].contiguous(), None)
        ours, theirs = (s.token_logps(*few, **_options(False))[0] for s in (stages, eager))
        if not bool(torch.isclose(ours, theirs, rtol=1e-4, atol=1e-4).all()):
            raise AssertionError("wrong log-probabilities under these parameters")
        for path, job in _jobs(stages, logits, labels, ref).items():
            found[f"{path} [{tokens}x{vocab}]"] = statistics.median(machine.seconds(job))
    print(json.dumps({"seconds": found}))
    return found


def _last_object(output: str) -> dict[str, Any] | None:
    for line in reversed(output.splitlines()):
        if line.startswith("{"):
            with contextlib.suppress(ValueError):
                return json.loads(line)
    return None


def _variants(machine: Any) -> Iterator[tuple[str, dict[str, int]]]:
    """Defaults first, then the backends in turns, so that a short session has seen something of each."""
    lists = [[(name, v) for v in machine.variants.get(name, ())] for name in _served(machine)]
    for turn in range(max(map(len, lists), default=0)):
        yield from (each[turn] for each in lists if turn < len(each))


def sweep(machine: Any, out: Path, seconds: float) -> dict[str, Any]:
    """Every kernel under other launch parameters, and the best beside the default."""
    deadline = time.monotonic() + 0.95 * seconds
    runs, not_run = [], []
    for backend, settings in _variants(machine):
        named = " ".join(f"{k}={v}" for k, v in settings.items()) or "default"
        left = deadline - time.monotonic()
        if left < 5:
            not_run.append(f"{backend} {named}")
            continue
        wish = json.dumps({"backend": backend, "settings": settings})
        status, output = machine.command(["env", f"DPO_VARIANT={wish}", *_child(machine, "variant")], left)
        answer = _last_object(output)
        if status != 0 or answer is None:
            runs.append({"backend": backend, "settings": named, "failed": output[-300:] or f"status {status}"})
        else:
            runs.append({"backend": backend, "settings": named, **answer})
        keep({"runs": runs, "not run": not_run, "best": best_variants(runs)})
    return {"runs": runs, "left out": not_run, "best": best_variants(runs)}


def best_variants(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each backend and kernel the quickest parameters, and how many times quicker than the default they are."""
    best = []
    for backend in dict.fromkeys(run["backend"] for run in runs):
        of_backend = [run for run in runs if run["backend"] == backend and "seconds" in run]
        default = next((run["seconds"] for run in of_backend if run["settings"] == "default"), {})
        for path, seconds in default.items():
            quickest = min(of_backend, key=lambda run: run["seconds"].get(path, float("inf")))
            best.append({
                "backend": backend, "kernel": path, "default": seconds, "best": quickest["seconds"][path],
                "settings": quickest["settings"], "gain": seconds / quickest["seconds"][path],
            })  # fmt: skip
    return best


def trace(machine: Any, out: Path, seconds: float) -> dict[str, Any]:
    """A torch.profiler trace of two DPO steps through the public function."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    from dpo_kernels import dpo_loss, use_backend

    vocab = 49152 if machine.shapes is None else machine.shapes[0][1]
    logits = torch.randn(4, 128, vocab, device=machine.device, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(vocab, (4, 128), device=machine.device)
    ref = logits.detach().clone()
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if machine.device == "cuda" else [])

    def step() -> None:
        with use_backend(machine.backends[0]):
            dpo_loss(logits, labels, ref_logits=ref).loss.backward()

    step()
    with profile(activities=activities) as profiler:
        for _ in range(2):
            step()
    with tempfile.TemporaryDirectory() as scratch:
        raw = Path(scratch) / "trace.json"
        profiler.export_chrome_trace(str(raw))
        packed = gzip.compress(raw.read_bytes())
    if len(packed) < MAX_FILE:
        (out / "trace.json.gz").write_bytes(packed)
    return {"file": "trace.json.gz", "bytes": len(packed)}


def ncu(machine: Any, out: Path, seconds: float) -> dict[str, Any]:
    """Nsight Compute's account of the main kernels and nothing else, where it is installed and permitted."""
    tool = shutil.which("ncu")
    if tool is None:
        return {"not run": "ncu is not installed"}
    arguments = [tool, "--kernel-name", "regex:token_logps|logits_grad", "--launch-count", "24", "--set", "detailed"]
    status, output = machine.command([*arguments, *_child(machine, "kernels")], seconds)
    (out / "ncu.txt").write_text(output[-MAX_FILE // 4 :])
    if "ERR_NVGPUCTRPERM" in output:
        return {"not run": "this machine does not let users read performance counters", "file": "ncu.txt"}
    return {"status": status, "file": "ncu.txt"}


#: Stages of the session by name; `small`, `kernels` and `variant` are programs that tools of other stages run.
STAGES: dict[str, Callable[[Any, Path, float], dict[str, Any]]] = {
    stage.__name__: stage
    for stage in (
        environment, build, correctness, tests, sanitizer, ceilings, timing, peers, linear, head_rates, latency, sweep,
        trace, ncu, small, kernels, variant,
    )
}  # fmt: skip
