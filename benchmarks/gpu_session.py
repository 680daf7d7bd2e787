"""A quarter of an hour on a GPU, in two calls: `headline` checks results and times them against floors and peers; `depth`
runs a memory checker, counters and odd shapes.

    python benchmarks/gpu_session.py --pack runs/pack --arch 90 --python 3.12    where nvcc and a network are: once
    python benchmarks/gpu_session.py --only headline --from runs/pack --out runs/headline    on the GPU: at most 560 s
    python benchmarks/gpu_session.py --only depth --from runs/pack --out runs/depth          on the GPU: at most 230 s
    python benchmarks/gpu_session.py --merge runs/headline runs/depth --out benchmarks/results/CARD

Every stage (benchmarks/gpu_stages.py) runs in a process of its own with a limit of seconds. If a stage fails or hangs, the
next one still runs, and its results until then are kept. A folder of results holds at most 8 files: results.json, summary.md,
methods.svg, log.txt, trace.json.gz, ncu.txt. The card's clocks, power limits and modes are not changed.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

BEGIN = time.monotonic()  # before the slow imports: they are part of a stage's time
ROOT = Path(__file__).resolve().parent.parent
if not __package__:  # run as a file: this folder leaves the path, where its profile.py hides the standard library's
    sys.path[0] = str(ROOT)

from benchmarks import bars, gpu_pack, gpu_stages  # noqa: E402
from benchmarks.gpu_stages import MAX_FILE, STAGES, write  # noqa: E402
from benchmarks.gpu_summary import CHART, NO_GPU, panels, roofline_seconds, summary  # noqa: E402
from dpo_kernels._build import BuildError  # noqa: E402

#: The calls: total seconds, and the stages with their limits, in order. The limits sum to less than the total, which leaves
#: time for starting, unpacking and writing. Later stages share the time that a stage does not use.
CALLS: dict[str, tuple[float, dict[str, float]]] = {
    "headline": (
        560,
        {
            "environment": 25,
            "compile": 80,
            "correctness": 80,
            "ceilings": 30,
            "timing": 45,
            "peers": 105,
            "linear": 115,
            "latency": 35,
            "trace": 20,
        },
    ),
    "depth": (
        230,
        {
            "environment": 12,
            "compile": 28,
            "memcheck": 40,
            "sweep": 32,
            "ncu": 30,
            "more_shapes": 18,
            "small_heads": 18,
            "trainer": 20,
            "head_rates": 8,
            "tests": 2,
        },
    ),
}
#: The share of a stage's limit that the stage may use; the rest is for starting Python and for writing its results.
INNER = 0.85
#: Exit status of a stage that found no GPU; the session then ends, since no other stage would find one.
NO_DEVICE = 3


class KitError(RuntimeError):
    """The command cannot run as it was given; the message says why in one line."""


def _machine(name: str) -> Any:
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)()


def _show(stream: Any, log: Any) -> None:
    for line in stream:
        log.write(line)
        log.flush()
        sys.stdout.write(line)
        sys.stdout.flush()


def _stop(process: subprocess.Popen[str]) -> int:
    """End a stage: ask first, so that it also ends the tools it runs, then kill it."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(2)
    return process.wait()


def run_stage(
    name: str, machine: str, out: Path, limit: float, environment: dict[str, str] | None = None
) -> dict[str, Any]:
    """Run a stage in a process of its own and show and log its output as it comes. Returns its result, or how it ended."""
    result = out / f".{name}.json"
    result.unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.gpu_session", "--stage", name, "--machine", machine, "--out", str(out)]
    command += ["--seconds", str(INNER * limit)]
    begin = time.monotonic()
    with (out / "log.txt").open("a") as log:
        _show([f"== {name} ({limit:.0f} s)\n"], log)
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **(environment or {}), "PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        reader = threading.Thread(target=_show, args=(process.stdout, log), daemon=True)
        reader.start()
        stopped = False
        try:
            status = process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            stopped = True
            status = _stop(process)
        reader.join(5)  # a grandchild that outlives the stage may hold the pipe
    report: dict[str, Any] = {"took": round(time.monotonic() - begin, 1), "limit": round(limit, 1)}
    if result.exists():
        report["result"] = json.loads(result.read_text())
        result.unlink()
    if stopped:
        report["stopped"] = f"at its limit of {limit:.0f} s"
    elif status != 0:  # its results until then are kept
        report["failed"] = NO_GPU if status == NO_DEVICE else f"exit status {status}, see log.txt"
    return report


def session(
    machine: str,
    out: Path,
    names: list[str],
    pack: Path | None = None,
    scale: float = 1.0,
    run: Callable[..., dict[str, Any]] = run_stage,
) -> dict[str, dict[str, Any]]:
    """Run the named calls and stages. Results and summary are written after each, so an interrupted session keeps them.

    Returns call -> stage -> report. scale multiplies every limit. run: the function that runs a stage.
    """
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="dpo_gpu_pack_") as scratch:
        # A stage checks the kernels, so they are not checked at first use. A missing library is not compiled within a limit.
        environment = {"DPO_KERNELS_SELFCHECK": "0", "DPO_KERNELS_JIT": "0"}
        if pack is not None:
            environment |= gpu_pack.unpack(pack, Path(scratch))
        out.mkdir(parents=True, exist_ok=True)
        (out / "log.txt").write_text("")
        for call, (_, limits) in CALLS.items():
            left = {name: limit for name, limit in limits.items() if call in names or name in names}
            if not left:
                continue
            found[call] = {}
            end = time.monotonic() + scale * sum(left.values())
            for name in list(left):
                limit = max(0.0, end - time.monotonic()) * left[name] / sum(left.values())
                del left[name]
                if limit < 1:
                    continue
                found[call][name] = run(name, machine, out, limit, environment)
                save(out, found)
                if found[call][name].get("failed") == NO_GPU:
                    return found
    log = out / "log.txt"
    if log.stat().st_size > MAX_FILE:
        log.write_bytes(log.read_bytes()[-MAX_FILE // 2 :])
    return found


def save(out: Path, calls: dict[str, dict[str, Any]]) -> None:
    """Write results.json, summary.md and, if peers were measured, the chart."""
    write(out / "results.json", json.dumps({"seconds": roofline_seconds(calls), "calls": calls}, indent=1) + "\n")
    if found := panels(calls):
        write(out / CHART, bars.draw(found, title="Time and memory of each method"))
    write(out / "summary.md", summary(calls, {call: list(limits) for call, (_, limits) in CALLS.items()}))


def merge(folders: list[Path], out: Path) -> None:
    """Put the stages of several folders into one results.json and summary.md. A later folder's stage replaces an earlier one.

    The trace and the counters are copied.
    """
    for folder in folders:
        if not (folder / "results.json").is_file():
            raise KitError(f"{folder} holds no results of a session")
    out.mkdir(parents=True, exist_ok=True)
    calls: dict[str, dict[str, Any]] = {}
    for folder in folders:
        for call, stages in json.loads((folder / "results.json").read_text())["calls"].items():
            calls[call] = {**calls.get(call, {}), **stages}
        for name in ("trace.json.gz", "ncu.txt"):
            if (folder / name).is_file():
                (out / name).write_bytes((folder / name).read_bytes())
    save(out, calls)


def run_one(stage: str, machine_name: str, out: Path, seconds: float) -> None:
    """Run one stage in this process; its result, and partial results before that, go into a file of the folder."""
    out.mkdir(parents=True, exist_ok=True)
    gpu_stages.PARTIAL = out / f".{stage}.json"
    machine = _machine(machine_name)
    try:
        machine.prepare()
    except gpu_stages.NoDevice as reason:
        print(reason)
        sys.exit(NO_DEVICE)
    late = gpu_stages.count_compilations()
    result = STAGES[stage](machine, out, seconds)
    if late and stage != "compile":
        result["kernels compiled late"] = len(late)
    gpu_stages.keep(result)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--out", type=Path, default=Path("runs/gpu_session"))
    known = list(dict.fromkeys([*CALLS, *(name for _, limits in CALLS.values() for name in limits)]))
    parser.add_argument("--only", choices=known, nargs="+", metavar="NAME", default=list(CALLS),
                        help=f"calls and stages to run, of {', '.join(known)}; everything if not given")  # fmt: skip
    parser.add_argument("--from", dest="pack", type=Path, help="folder that --pack has filled")
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies every stage's limit of seconds")
    parser.add_argument(
        "--pack", dest="make", type=Path, metavar="DIR", help="collect library and wheels into DIR; no run"
    )
    parser.add_argument("--arch", type=_architecture, default="90", help="of the card, for --pack: 80, 90, 100 ...")
    parser.add_argument("--python", default="3.12", help="of the GPU's machine, for --pack")
    parser.add_argument("--no-variants", action="store_true", help="--pack without the sweep's libraries")
    parser.add_argument(
        "--merge", type=Path, nargs="+", metavar="DIR", help="join the results of these folders in --out"
    )
    parser.add_argument(
        "--machine", default="benchmarks.gpu_stages:CudaMachine", help="module:class, the device boundary"
    )
    parser.add_argument("--stage", choices=list(STAGES), help="run this stage alone, in this process")
    parser.add_argument("--seconds", type=float, default=120.0, help="time of that stage")
    return parser


def _architecture(text: str) -> str:
    if not re.fullmatch(r"[1-9]\d+[af]?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a compute capability; give it without its point, such as 90")
    return text


def main() -> int:
    """Run the command line. The exit status is 1 if a stage failed, 2 if the command could not run."""
    arguments = parser().parse_args()
    try:
        return _run(arguments)
    except (KitError, gpu_pack.PackError, BuildError) as reason:
        print(f"gpu_session: {reason}", file=sys.stderr)
        return 2


def _run(arguments: argparse.Namespace) -> int:
    if arguments.stage:
        signal.signal(signal.SIGTERM, lambda *_: gpu_stages.end_with_tools())
        left = arguments.seconds - (time.monotonic() - BEGIN)
        run_one(arguments.stage, arguments.machine, arguments.out, left)
    elif arguments.make:
        print("\n".join(gpu_pack.make(arguments.make, arguments.arch, arguments.python, not arguments.no_variants)))
    elif arguments.merge:
        merge(arguments.merge, arguments.out)
    else:
        found = session(arguments.machine, arguments.out, arguments.only, arguments.pack, arguments.scale)
        print((arguments.out / "summary.md").read_text())
        return int(any("failed" in report for stages in found.values() for report in stages.values()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
