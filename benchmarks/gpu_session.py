"""One command for the first minutes on a GPU: builds, tests, measures, and writes down what it did and what it did not.

    python -m benchmarks.gpu_session --out DIR --minutes M

Every stage runs in a process of its own with its share of the minutes; one that fails or hangs does not stop the next. The
folder then holds at most 8 files: results.json, summary.md, log.txt, trace.json.gz and ncu.txt.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import importlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .roofline import CEILINGS, LINEAR_PATHS, works

ROOT = Path(__file__).resolve().parent.parent
MAX_FILE = 16 << 20

#: Stage and its share of the session.
SHARES = {
    "environment": 0.02,
    "build": 0.20,
    "tests": 0.25,
    "sanitizer": 0.10,
    "ceilings": 0.04,
    "timing": 0.22,
    "sweep": 0.07,
    "trace": 0.04,
    "ncu": 0.06,
}


class CudaMachine:
    """The device boundary: everything that only a GPU can do. Tests put a CPU stand-in here (--machine)."""

    device = "cuda"
    backends = ("cuda", "triton", "eager")
    shapes = None  # those of the roofline

    def describe(self) -> dict[str, Any]:
        """Name and size of the GPU."""
        import torch

        p = torch.cuda.get_device_properties(0)
        return {"name": p.name, "sms": p.multi_processor_count, "memory": p.total_memory, "cuda": torch.version.cuda}

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
    return dict(PLAIN, entropy=on, kl=on, accuracy=on, mean_logits=on)


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


def tests(machine: Any, out: Path, seconds: float) -> dict[str, Any]:
    """The GPU tests and the operator table on every backend that serves."""
    chosen = ["tests/test_cuda_gpu.py", "tests/test_operators.py"]
    status, output = machine.command([sys.executable, "-m", "pytest", "-q", "--maxfail=20", *chosen], seconds)
    return {"passed": status == 0, "status": status, "tail": output[-3000:]}


def sanitizer(machine: Any, out: Path, seconds: float) -> dict[str, Any]:
    """compute-sanitizer (memcheck, then racecheck) over a reduced set."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return {"not run": "compute-sanitizer is not installed"}
    found = {}
    for check in ("memcheck", "racecheck"):
        arguments = [tool, "--tool", check, "--error-exitcode", "9", sys.executable, "-m", "pytest", "-q", "-x"]
        status, output = machine.command([*arguments, "tests/test_cuda_gpu.py", "-k", "fused or float32"], seconds / 2)
        found[check] = {"clean": status == 0, "status": status, "tail": output[-1500:]}
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
    """The kernels to time, by the names of the roofline's paths."""
    import torch

    logps, lse, *_ = stages.token_logps(logits, labels, None, **_options(False))
    weights, gradient = torch.ones_like(logps), torch.empty_like(logits)
    statistics_alone = dict(_options(True), kl=False)
    return {
        "token_logps": lambda: stages.token_logps(logits, labels, None, **_options(False)),
        "token_logps with statistics": lambda: stages.token_logps(logits, labels, None, **statistics_alone),
        "token_logps with reference": lambda: stages.token_logps(logits, labels, ref, **_options(False)),
        "token_logps with reference and kl": lambda: stages.token_logps(logits, labels, ref, **_options(True)),
        "logits_grad": lambda: stages.logits_grad(logits, labels, logps, lse, weights, **PLAIN, out=gradient),
    }


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
            try:
                jobs = _jobs(_stage_module(name, machine), logits, labels, ref)
                for path, job in jobs.items():
                    times = sorted(machine.seconds(job))
                    rows[f"{name}: {path} [{tokens}x{vocab}]"] = {
                        "median": statistics.median(times), "low": times[0], "high": times[-1]
                    }  # fmt: skip
            except Exception as error:  # a backend that fails on one shape is a result, the others go on
                rows[f"{name} [{tokens}x{vocab}]"] = {"failed": repr(error)[:300]}
    return {"rows": rows, "left out": left_out}


def sweep(machine: Any, out: Path, seconds: float) -> dict[str, Any]:
    """Few to many rows of the largest vocabulary: where clusters take over and where bandwidth is reached."""
    deadline = time.monotonic() + 0.9 * seconds
    vocab = 128256 if machine.shapes is None else machine.shapes[0][1]
    found = {}
    for tokens in (1, 4, 16, 64, 256, 1024, 4096):
        if time.monotonic() > deadline or 8 * tokens * vocab > machine.free_memory():
            break
        logits, ref, labels = _tensors(machine, tokens, vocab)
        for name in machine.backends[:2]:
            with contextlib.suppress(Exception):
                times = machine.seconds(_jobs(_stage_module(name, machine), logits, labels, ref)["token_logps"])
                found[f"{name} [{tokens}x{vocab}]"] = statistics.median(times)
    return found


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
    """Nsight Compute's summary of the main kernels, where it is installed and permitted."""
    tool = shutil.which("ncu")
    if tool is None:
        return {"not run": "ncu is not installed"}
    arguments = [tool, "--kernel-name", "regex:token_logps|logits_grad", "--launch-count", "4", "--set", "detailed"]
    status, output = machine.command(
        [*arguments, sys.executable, "-m", "benchmarks.gpu_session", "--stage", "sweep"], seconds
    )
    (out / "ncu.txt").write_text(output[-MAX_FILE // 4 :])
    return {"status": status, "file": "ncu.txt"}


# ---- the session ----


def _machine(name: str) -> Any:
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)()


def run_stage(name: str, machine: str, out: Path, seconds: float) -> dict[str, Any]:
    """One stage in a process of its own; its result, or how it ended."""
    result = out / f".{name}.json"
    result.unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.gpu_session", "--stage", name, "--machine", machine, "--out", str(out)]
    command += ["--seconds", str(seconds)]
    begin = time.monotonic()
    with (out / "log.txt").open("a") as log:
        log.write(f"== {name} ({seconds:.0f} s)\n")
        log.flush()
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            status = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait()
            status = 124
    report: dict[str, Any] = {"took": round(time.monotonic() - begin, 1)}
    if result.exists():
        report["result"] = json.loads(result.read_text())
        result.unlink()
    else:
        report["failed"] = "ran out of its time" if status == 124 else f"exit status {status}, see log.txt"
    return report


def roofline_seconds(stages: dict[str, Any], backend: str) -> dict[str, float]:
    """The measured column of benchmarks/roofline.py."""
    rows = stages.get("timing", {}).get("result", {}).get("rows", {})
    prefix = f"{backend}: "
    return {key.removeprefix(prefix): row["median"] for key, row in rows.items() if key.startswith(prefix)}


def summary(stages: dict[str, Any], backend: str) -> str:
    """The session as markdown: what ran, what did not, and each kernel against the measured copy bandwidth."""
    lines = ["# GPU session", "", "| stage | seconds | outcome |", "|---|---:|---|"]
    for name in SHARES:
        report = stages.get(name)
        if report is None:
            lines.append(f"| {name} | - | not run |")
            continue
        result = report.get("result", {})
        outcome = report.get("failed") or result.get("not run") or "done"
        if name == "tests" and not result.get("passed", True):
            outcome = f"tests failed (status {result['status']})"
        lines.append(f"| {name} | {report['took']} | {outcome} |")
    bandwidth = stages.get("ceilings", {}).get("result", {}).get("copy_bytes_per_second")
    measured = roofline_seconds(stages, backend)
    lines += ["", "| path | seconds | share of measured copy bandwidth |", "|---|---:|---:|"]
    for work in works():
        if work.key in measured:
            share = f"{work.bytes / measured[work.key] / bandwidth:.0%}" if bandwidth else "not measured"
            lines.append(f"| {work.key} | {measured[work.key]:.6f} | {share} |")
    left_out = stages.get("timing", {}).get("result", {}).get("left out", [])
    lines += ["", f"Left out for lack of memory or time: {', '.join(left_out) or 'nothing'}.", ""]
    return "\n".join(lines)


def session(machine: str, out: Path, minutes: float) -> dict[str, Any]:
    """Run all stages, writing results and summary after each, so that a cut session keeps what it has."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "log.txt").write_text("")
    end = time.monotonic() + 60 * minutes
    backend = _machine(machine).backends[0]
    stages: dict[str, Any] = {}
    left = dict(SHARES)
    for name in SHARES:
        # Time that earlier stages did not use is shared by the later ones.
        seconds = max(0.0, end - time.monotonic()) * left[name] / sum(left.values())
        del left[name]
        if seconds < 1:
            continue
        stages[name] = run_stage(name, machine, out, seconds)
        report = {"stages": stages, "seconds": roofline_seconds(stages, backend)}
        (out / "results.json").write_text(json.dumps(report, indent=1) + "\n")
        (out / "summary.md").write_text(summary(stages, backend))
    log = out / "log.txt"
    if log.stat().st_size > MAX_FILE:
        log.write_bytes(log.read_bytes()[-MAX_FILE // 2 :])
    return stages


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/gpu_session"))
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument(
        "--machine", default="benchmarks.gpu_session:CudaMachine", help="module:class, the device boundary"
    )
    parser.add_argument("--stage", choices=list(SHARES), help="run this stage alone, in this process")
    parser.add_argument("--seconds", type=float, default=120.0, help="time of that stage")
    arguments = parser.parse_args()
    if arguments.stage:
        arguments.out.mkdir(parents=True, exist_ok=True)
        result = globals()[arguments.stage](_machine(arguments.machine), arguments.out, arguments.seconds)
        (arguments.out / f".{arguments.stage}.json").write_text(json.dumps(result))
        return
    session(arguments.machine, arguments.out, arguments.minutes)
    print((arguments.out / "summary.md").read_text())


if __name__ == "__main__":
    main()
