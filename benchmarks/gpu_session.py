"""One command for the first minutes on a GPU: builds, tests, measures, and writes down what it did and what it did not.

    python benchmarks/gpu_session.py --out DIR --minutes M

Every stage (benchmarks/gpu_stages.py) runs in a process of its own with its share of the minutes; one that fails or hangs
does not stop the next. The folder then holds at most 8 files: results.json, summary.md, log.txt, trace.json.gz, ncu.txt.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if not __package__:  # run as a file: this folder leaves the path, where its profile.py hides the standard library's
    sys.path[0] = str(ROOT)

from benchmarks import gpu_stages  # noqa: E402
from benchmarks.gpu_stages import MAX_FILE, STAGES  # noqa: E402
from benchmarks.roofline import works  # noqa: E402

#: Stage and its share of the session.
SHARES = {
    "environment": 0.02,
    "build": 0.12,
    "correctness": 0.06,
    "tests": 0.13,
    "sanitizer": 0.08,
    "ceilings": 0.03,
    "timing": 0.14,
    "peers": 0.10,
    "linear": 0.09,
    "head_rates": 0.03,
    "latency": 0.03,
    "sweep": 0.10,
    "trace": 0.02,
    "ncu": 0.05,
}


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
    if status != 0:  # what it had found until then is kept
        report["failed"] = "ran out of its time" if status == 124 else f"exit status {status}, see log.txt"
    return report


def roofline_seconds(stages: dict[str, Any], backend: str) -> dict[str, float]:
    """The measured column of benchmarks/roofline.py."""
    rows = stages.get("timing", {}).get("result", {}).get("rows", {})
    prefix = f"{backend}: "
    return {
        key.removeprefix(prefix): row["median"]
        for key, row in rows.items()
        if key.startswith(prefix) and "median" in row
    }


def _outcome(name: str, report: dict[str, Any] | None) -> str:
    if report is None:
        return "not run: the time was over"
    result = report.get("result", {})
    if "not run" in result and isinstance(result["not run"], str):
        return f"not run: {result['not run']}"
    outcome = "done"
    if name == "tests":
        outcome = "passed" if result.get("passed") else f"FAILED (status {result.get('status')})"
    elif name == "correctness":
        table = result.get("table", {})
        wrong = sum(len(row.get("failed", {})) for row in table.values())
        outcome = f"{wrong} cases WRONG" if wrong else "all cases right"
    elif name == "sanitizer":
        dirty = [check for check, row in result.items() if not row["clean"]]
        outcome = f"{', '.join(dirty)} NOT clean" if dirty else "clean"
    return (
        f"{report['failed']}; until then: {outcome}" if "failed" in report and result else report.get("failed", outcome)
    )


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    if not rows:
        return ["Not measured.", ""]
    rule = "|" + "|".join("---:" if i else "---" for i in range(len(head))) + "|"
    return [f"| {' | '.join(head)} |", rule, *(f"| {' | '.join(row)} |" for row in rows), ""]


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.3f} ms"


def _correctness(stages: dict[str, Any]) -> list[str]:
    rows = []
    for name, row in stages.get("correctness", {}).get("result", {}).get("table", {}).items():
        if "does not serve" in row:
            rows.append([name, "-", f"does not serve: {row['does not serve']}"])
        else:
            wrong = "; ".join(f"{case}: {why}" for case, why in row["failed"].items())
            rows.append([name, f"{row['cases'] - len(row['failed'])} of {row['cases']}", wrong or "-"])
    return ["## Correct?", "", *_table(["backend", "cases right against float64", "wrong"], rows)]


def _kernels(stages: dict[str, Any], backends: tuple[str, ...]) -> list[str]:
    bandwidth = stages.get("ceilings", {}).get("result", {}).get("copy_bytes_per_second")
    measured = {name: roofline_seconds(stages, name) for name in backends}
    rows = []
    for work in works():
        if not any(work.key in found for found in measured.values()):
            continue
        row = [work.key, _milliseconds(work.bytes / bandwidth) if bandwidth else "-"]
        for name in backends:
            seconds = measured[name].get(work.key)
            share = f" ({work.bytes / seconds / bandwidth:.0%})" if seconds and bandwidth else ""
            row.append(f"{_milliseconds(seconds)}{share}" if seconds else "-")
        rows.append(row)
    copy = f"{bandwidth / 1e12:.2f} TB/s" if bandwidth else "not measured"
    lines = ["## How fast against the floor?", "", f"Measured copy bandwidth: {copy}. In brackets the share of it.", ""]
    lines += _table(["path", "floor", *backends], rows)
    timing = stages.get("timing", {}).get("result", {})
    lines += _missing({name: row["failed"] for name, row in timing.get("rows", {}).items() if "failed" in row})
    left_out = timing.get("left out", [])
    return [*lines, f"Left out for lack of memory or time: {', '.join(left_out) or 'nothing'}.", ""]


def _contenders(rows: dict[str, Any], floor: float | None, ours: str | None, right: dict[str, Any]) -> list[str]:
    """A table of times, against the floor and against the quickest of ours, with memory."""
    lines = []
    for name, row in sorted(rows.items(), key=lambda item: item[1]["median"]):
        extra = row.get("extra bytes")
        gradient = right.get(name)
        lines.append([
            name, _milliseconds(row["median"]), f"{row['median'] / floor:.2f}x" if floor else "-",
            f"{row['times'][ours]:.2f}x" if ours else "-", "-" if extra is None else f"{extra / 2**20:,.0f} MiB",
            "-" if gradient is None else "right" if gradient["right"] else f"WRONG ({gradient['error']:.1e})",
        ])  # fmt: skip
    return _table(["method", "time", "over the floor", "over ours", "memory beside the inputs", "gradient"], lines)


def _missing(found: dict[str, str]) -> list[str]:
    return [*(f"* not measured: {name}: {why}" for name, why in found.items()), *([""] if found else [])]


def _against(stages: dict[str, Any]) -> list[str]:
    bandwidth = stages.get("ceilings", {}).get("result", {}).get("copy_bytes_per_second")
    lines = ["## Against whom?", ""]
    step = stages.get("peers", {}).get("result")
    if step is None or "rows" not in step:
        lines += ["Logits path: not measured.", ""]
    else:
        rows = step["rows"]
        ours = min((n for n in rows if n.startswith("ours_inplace (")), key=lambda n: rows[n]["median"], default=None)
        lines += [f"Logits path, bfloat16 {step['shape']}, loss and gradient:", ""]
        lines += _contenders(rows, step["bytes"] / bandwidth if bandwidth else None, ours, step["gradients"])
        lines += _missing(step["missing"])
    linear = stages.get("linear", {}).get("result", {})
    for key, table in linear.get("tables", {}).items():
        if "rows" not in table:
            lines += [f"Linear path, {key}: not run: {table['not run']}.", ""]
            continue
        rows = table["rows"]
        floor = rows.get("floor: the products alone", {}).get("median")
        lines += [f"Linear path, {key} (pairs x length x H x V), {table['scored']} scored tokens; the floor is its "
                  f"{table['products']} products by cuBLAS:", ""]  # fmt: skip
        lines += [*_contenders(rows, floor, "ours" if "ours" in rows else None, {}), *_missing(table["missing"])]
    if not linear.get("tables"):
        lines += ["Linear path: not measured.", ""]
    latency = stages.get("latency", {}).get("result", {})
    rows = []
    for name, row in latency.get("steps", {}).items():
        times = [f"{row[key]:.0f} us" for key in ("microseconds", "host microseconds") if key in row]
        rows.append([name, *(times or [row["failed"], "-"])])
    lines += [f"Latency of a step, {latency.get('shape', '2 pairs x 64 tokens')}:", ""]
    return [*lines, *_table(["method", "until done", "until the host is free"], rows)]


def _tune(stages: dict[str, Any]) -> list[str]:
    result = stages.get("sweep", {}).get("result", {})
    rows = [
        [row["backend"], row["kernel"], _milliseconds(row["default"]), _milliseconds(row["best"]), row["settings"],
         f"{row['gain']:.2f}x"]
        for row in result.get("best", [])
    ]  # fmt: skip
    lines = ["## What to tune?", "", *_table(["backend", "kernel", "default", "best", "with", "gain"], rows)]
    failed = [f"{run['backend']} {run['settings']}" for run in result.get("runs", []) if "failed" in run]
    lines += [f"Variants that failed: {', '.join(failed)}.", ""] if failed else []
    rates = stages.get("head_rates", {}).get("result", {}).get("rows")
    if rates:
        from benchmarks.head_rates import table

        lines += ["What the planner assumes of the linear path's products:", "", *table(rates).splitlines(), ""]
    return [*lines, f"Variants not tried: {', '.join(result.get('left out', [])) or 'none'}.", ""]


def summary(stages: dict[str, Any], backends: tuple[str, ...]) -> str:
    """The session as markdown, for someone who was not there: correct? how fast? against whom? what to tune? what not run?"""
    device = stages.get("environment", {}).get("result", {})
    about = ", ".join(f"{k} {v}" for k, v in device.items() if isinstance(v, str) and "/" not in v)
    name = device.get("device", {}).get("name", "an unknown device")
    lines = [f"# GPU session on {name}", "", about or "Versions: not known.", ""]
    rows = []
    for stage in SHARES:
        report = stages.get(stage)
        rows.append([stage, "-" if report is None else str(report["took"]), _outcome(stage, report)])
    for part in (_correctness(stages), _kernels(stages, backends), _against(stages), _tune(stages)):
        lines += part
    return "\n".join([*lines, "## What ran, what did not", "", *_table(["stage", "seconds", "outcome"], rows)])


def session(machine: str, out: Path, minutes: float) -> dict[str, Any]:
    """Run all stages, writing results and summary after each, so that a cut session keeps what it has."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "log.txt").write_text("")
    end = time.monotonic() + 60 * minutes
    backends = _machine(machine).backends
    stages: dict[str, Any] = {}
    left = dict(SHARES)
    for name in SHARES:
        # Time that earlier stages did not use is shared by the later ones.
        seconds = max(0.0, end - time.monotonic()) * left[name] / sum(left.values())
        del left[name]
        if seconds < 1:
            continue
        stages[name] = run_stage(name, machine, out, seconds)
        report = {"stages": stages, "seconds": roofline_seconds(stages, backends[0])}
        (out / "results.json").write_text(json.dumps(report, indent=1) + "\n")
        (out / "summary.md").write_text(summary(stages, backends))
    log = out / "log.txt"
    if log.stat().st_size > MAX_FILE:
        log.write_bytes(log.read_bytes()[-MAX_FILE // 2 :])
    return stages


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/gpu_session"))
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument(
        "--machine", default="benchmarks.gpu_stages:CudaMachine", help="module:class, the device boundary"
    )
    parser.add_argument("--stage", choices=list(STAGES), help="run this stage alone, in this process")
    parser.add_argument("--seconds", type=float, default=120.0, help="time of that stage")
    arguments = parser.parse_args()
    if arguments.stage:
        arguments.out.mkdir(parents=True, exist_ok=True)
        gpu_stages.PARTIAL = arguments.out / f".{arguments.stage}.json"
        gpu_stages.keep(STAGES[arguments.stage](_machine(arguments.machine), arguments.out, arguments.seconds))
        return
    session(arguments.machine, arguments.out, arguments.minutes)
    print((arguments.out / "summary.md").read_text())


if __name__ == "__main__":
    main()
