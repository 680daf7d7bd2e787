"""A GPU session's results as markdown, with predictions next to measurements, and as rows for report.py.

The predictions were written before any card had run these kernels: from the machine code's instructions per logit and bytes
in flight (benchmarks/machine_code.py), and for the linear path from products and traffic (benchmarks/roofline.py).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.roofline import works

#: Predicted share of the measured bandwidth (`bandwidth_of`) at [8192 x 128256] bfloat16, by card: (least, most).
PREDICTIONS: dict[str, dict[str, tuple[float, float]]] = {
    "token_logps": {"H100": (0.90, 0.97), "H200": (0.88, 0.94)},
    "token_logps with statistics": {"H100": (0.83, 0.92), "H200": (0.75, 0.85)},
    "logits_grad": {"H100": (0.93, 1.00), "H200": (0.90, 0.97)},
    "step: policy, reference, gradient": {"H100": (0.88, 0.93), "H200": (0.85, 0.90)},
}
PREDICTED_SHAPE = "[8192x128256]"
#: Predicted seconds of our exact linear path, (least, most), on either card: H 4,096, V 128,256, 2,048 scored tokens.
LINEAR_PREDICTION = {"4x512x4096x128256": (14e-3, 17e-3)}
#: Published figures of other projects, for comparison.
ANCHORS = (
    "quack, cross-entropy forward at V 65k to 131k: 3.0 to 3.2 TB/s on an H100",
    "Liger's CuTe per-token head with gradients at 4,096 tokens, H 4,096, V 131,072: 26.2 ms on an H100, 24.9 ms on an H200",
    "three matrix products at 8,192 tokens, V 151,936: 42 ms on an H100",
)


#: The chart's file, in the folder of the session.
CHART = "methods.svg"
#: The failure that is reported for a stage that found no GPU.
NO_GPU = "no GPU"


def stage(calls: dict[str, Any], name: str) -> dict[str, Any]:
    """A stage's result, from the call that has it; empty if no call has it."""
    for stages in calls.values():
        if result := stages.get(name, {}).get("result"):
            return result
    return {}


def bandwidth_of(calls: dict[str, Any]) -> float | None:
    """Measured memory bandwidth of the card, bytes/s: the higher one of copy and read."""
    found = stage(calls, "ceilings")
    rates = [found[key] for key in ("copy_bytes_per_second", "read_bytes_per_second") if key in found]
    return max(rates, default=None)


def _kernel_rows(calls: dict[str, Any]) -> dict[str, Any]:
    return {**stage(calls, "timing").get("rows", {}), **stage(calls, "more_shapes").get("rows", {})}


def backends_of(calls: dict[str, Any]) -> list[str]:
    """The backends that were tried, in the session's order."""
    return list(stage(calls, "environment").get("backends", {}))


def roofline_seconds(calls: dict[str, Any]) -> dict[str, float]:
    """The measured column of benchmarks/roofline.py: the times of our faster backend."""
    found: dict[str, float] = {}
    for key, row in _kernel_rows(calls).items():
        backend, _, path = key.partition(": ")
        if backend != "eager" and "median" in row:
            found[path] = min(row["median"], found.get(path, row["median"]))
    return found


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    if not rows:
        return ["Not measured.", ""]
    rule = "|" + "|".join("---:" if i else "---" for i in range(len(head))) + "|"
    return [f"| {' | '.join(head)} |", rule, *(f"| {' | '.join(row)} |" for row in rows), ""]


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1e3 * seconds:.3f} ms"


def _outcome(name: str, report: dict[str, Any] | None, why_none: str = "the time was over") -> str:
    if report is None:
        return f"not run: {why_none}"
    result = report.get("result", {})
    if isinstance(result.get("not run"), str):
        return f"not run: {result['not run']}"
    outcome = "done"
    if name == "tests":
        said = (result.get("tail", "").strip().splitlines() or ["no output"])[-1]
        outcome = f"passed: {said}" if result.get("passed") else f"FAILED: {said}"
    elif name == "correctness":
        wrong = sum(len(row.get("failed", {})) for row in result.get("table", {}).values())
        cases = sum(row.get("cases", 0) for row in result.get("table", {}).values())
        outcome = f"{wrong} cases WRONG" if wrong else f"all {cases} cases right" if cases else "no case ran"
    elif name == "memcheck" and "clean" in result:
        outcome = "clean" if result["clean"] else "NOT clean"
    elif name == "compile" and "kernels" in result:
        done = result["compiled"] + result["cached"]
        outcome = f"{done} of {result['kernels']} kernels in {result.get('seconds', 0)} s"
        outcome += f", {len(result['failed'])} FAILED" if result["failed"] else ""
    elif result.get("failed") and "rows" in result:
        outcome = f"{len(result['rows'])} measured, {len(result['failed'])} FAILED: {', '.join(result['failed'])}"
    if late := result.get("kernels compiled late"):
        outcome += f" ({late} kernels compiled late)"
    for ending in ("stopped", "failed"):
        if end := report.get(ending) or (result.get(ending) if ending == "stopped" else None):
            end = f"stopped {end}" if ending == "stopped" else f"FAILED: {end}"
            return f"{end}; until then: {outcome}" if result else end
    return outcome


def _correctness(calls: dict[str, Any]) -> list[str]:
    rows = []
    for name, row in stage(calls, "correctness").get("table", {}).items():
        if "cases" not in row:
            rows.append([name, "-", f"not run: {row['not run']}"])
            continue
        wrong = [f"{case}: {why}" for case, why in list(row["failed"].items())[:2]]
        wrong += [f"{len(row['failed']) - 2} more, all in results.json"] if len(row["failed"]) > 2 else []
        wrong += [f"not run: {row['not run']}"] if "not run" in row else []
        rows.append([name, f"{row['cases'] - len(row['failed'])} of {row['cases']}", "; ".join(wrong) or "-"])
    return ["## Correct?", "", *_table(["backend", "cases right against float64", "wrong"], rows)]


def _card(calls: dict[str, Any]) -> str | None:
    name = stage(calls, "environment").get("device", {}).get("name", "")
    return next((card for card in ("H100", "H200") if card in name), None)


def verdict(value: float, predicted: tuple[float, float], unit: str = "") -> str:
    """A prediction as text, and whether the value lies in it."""
    low, high = predicted
    where = "as predicted" if low <= value <= high else "below" if value < low else "above"
    text = f"{low:.0%} to {high:.0%}" if not unit else f"{1e3 * low:.0f} to {1e3 * high:.0f} {unit}"
    return f"{text}: {where}"


def _kernels(calls: dict[str, Any]) -> list[str]:
    ceilings = stage(calls, "ceilings")
    copied, read = ceilings.get("copy_bytes_per_second"), ceilings.get("read_bytes_per_second")
    bandwidth = bandwidth_of(calls)
    measured, backends, card = _kernel_rows(calls), backends_of(calls), _card(calls)
    rows = []
    for work in works():
        found = {name: measured.get(f"{name}: {work.key}", {}) for name in backends}
        if not any("median" in row for row in found.values()):
            continue
        line = [work.key]
        best = None
        for name, row in found.items():
            seconds = row.get("median")
            share = work.bytes / seconds / bandwidth if seconds and bandwidth else None
            if share is not None and name != "eager":
                best = max(share, best or 0.0)
            line.append(_milliseconds(seconds) + (f" ({share:.0%})" if share is not None else ""))
        ours = [row["host"] for name, row in found.items() if name != "eager" and "host" in row]
        line.append(f"{1e6 * min(ours):.0f} us" if ours else "-")
        predicted = PREDICTIONS.get(work.path, {}).get(card or "") if work.key.endswith(PREDICTED_SHAPE) else None
        line.append(verdict(best, predicted) if predicted and best is not None else "-")
        rows.append(line)
    lines = ["## How close to the memory's speed?", ""]
    for name, rate in (("copy (read + write)", copied), ("read", read)):
        lines.append(f"* Bandwidth of a {name}: {f'{rate / 1e12:.2f} TB/s' if rate else 'not measured'}.")
    lines += [
        "", "Time of each path, and in parentheses the share of the higher bandwidth that it reaches. Our backends are timed as "
        "the replay of a CUDA graph, so without gaps between launches. The host's time is that of the quicker of our calls.", "",
        *_table(["path", *backends, "host", "predicted share"], rows),
    ]  # fmt: skip
    lines += _missing(measured)
    if products := ceilings.get("products"):
        lines += _table(
            ["product by cuBLAS, bfloat16", "time", "TFLOP/s"],
            [[name, _milliseconds(p["seconds"]), f"{p['flops'] / 1e12:.0f}"] for name, p in products.items()],
        )
    return lines


def _missing(rows: dict[str, Any]) -> list[str]:
    """A line for each row that has a reason or an error instead of a time."""
    lines = [f"* {name}: not run: {row['not run']}" for name, row in rows.items() if "not run" in row]
    lines += [f"* {name}: FAILED: {row['failed']}" for name, row in rows.items() if "failed" in row]
    return [*lines, ""] if lines else []


def _contenders(found: dict[str, Any], floor: float | None, ours: str | None) -> list[str]:
    """A table of times (also relative to the floor and to our fastest method) and memory; then what did not run or failed."""
    rows = found.get("rows", {})
    lines = []
    for name, row in sorted(rows.items(), key=lambda item: item[1]["median"]):
        extra, gradient = row.get("extra bytes"), row.get("gradient")
        again = f" (again {_milliseconds(row['again'])})" if "again" in row else ""
        wrong = "" if gradient is None or gradient["right"] else f", gradient WRONG by {gradient['error']:.1e}"
        lines.append([
            title(name) + wrong, _milliseconds(row["median"]) + again, _milliseconds(row.get("host")),
            f"{row['median'] / floor:.2f}x" if floor else "-",
            f"{row['median'] / rows[ours]['median']:.2f}x" if ours else "-",
            "-" if extra is None else f"{extra / 2**20:,.0f} MiB",
        ])  # fmt: skip
    head = ["method", "time", "host", "time / floor", "time / dpo_kernels", "extra memory"]
    missing = {name: {kind: why} for kind in ("not run", "failed") for name, why in found.get(kind, {}).items()}
    checked = [row["gradient"]["right"] for row in rows.values() if row.get("gradient")]
    right = ["All gradients were compared with float64, and all are right.", ""] if checked and all(checked) else []
    return [*_table(head, lines), *right, *_missing(missing)]


def quickest(rows: dict[str, Any], prefix: str) -> str | None:
    """The name of the fastest row whose name starts with this text."""
    named = [name for name in rows if name.startswith(prefix)]
    return min(named, key=lambda name: rows[name]["median"], default=None)


FLOOR = "floor: the products alone"


def _linear_lines(key: str, found: dict[str, Any]) -> list[str]:
    rows = found.get("rows", {})
    lines = [
        f"Linear path, {key} (pairs x length x H x V), {found['scored']} scored tokens. The floor is the time of its "
        f"{found['products']} matrix products by cuBLAS alone:", "",
        *_contenders(found, rows.get(FLOOR, {}).get("median"), "ours" if "ours" in rows else None),
    ]  # fmt: skip
    if key in LINEAR_PREDICTION and "ours" in rows:
        said = verdict(rows["ours"]["median"], LINEAR_PREDICTION[key], "ms")
        lines += [f"Predicted for dpo_kernels: {said}.", ""]
    return lines


def _against(calls: dict[str, Any]) -> list[str]:
    bandwidth = bandwidth_of(calls)
    lines = ["## How fast against other methods?", ""]
    for shape, found in stage(calls, "peers").get("tables", {}).items():
        ours = quickest(found["rows"], "ours_inplace (")
        floor = found["bytes"] / bandwidth if bandwidth and "bytes" in found else None
        lines += [
            f"Logits path, bfloat16 {shape}, loss and gradient. The floor is the time of the memory traffic alone:",
            "",
        ]
        lines += _contenders(found, floor, ours)
    for name in ("linear", "small_heads"):
        for key, found in stage(calls, name).get("tables", {}).items():
            lines += _linear_lines(key, found)
    if len(lines) == 2:
        lines += ["Not measured.", ""]
    lines += ["What other projects have published:", "", *(f"* {anchor}." for anchor in ANCHORS), ""]
    latency = stage(calls, "latency")
    rows = []
    for name, row in latency.get("steps", {}).items():
        keys = ("device microseconds", "host microseconds", "microseconds")
        times = [f"{row[key]:.0f} us" if key in row else "-" for key in keys]
        rows.append([name, *times, row.get("failed", "-")])
    lines += [f"Latency of a step, {latency.get('shape', '2 pairs x 64 tokens')}:", ""]
    lines += _table(["method", "device", "host", "until done", "failed"], rows)
    trainer = stage(calls, "trainer")
    rows = [[name, _milliseconds(row["step"])] for name, row in trainer.get("rows", {}).items()]
    missing = {name: {kind: why} for kind in ("not run", "failed") for name, why in (trainer.get(kind) or {}).items()
               if isinstance(trainer.get(kind), dict)}  # fmt: skip
    return [*lines, "A trainer's step:", "", *_table(["trainer", "step"], rows), *_missing(missing)]


def _tune(calls: dict[str, Any]) -> list[str]:
    result = stage(calls, "sweep")
    rows = [
        [
            row["kernel"],
            _milliseconds(row["default"]),
            _milliseconds(row["best"]),
            row["settings"],
            f"{row['gain']:.2f}x",
        ]
        for row in result.get("best", [])
    ]
    lines = ["## What to tune?", "", *_table(["CUDA kernel", "default", "best", "with", "gain"], rows)]
    failed = [f"{run['settings']}" for run in result.get("runs", []) if "failed" in run]
    lines += [f"Variants that failed: {', '.join(failed)}.", ""] if failed else []
    lines += [f"Variants not run: {', '.join(result['left out'])}.", ""] if result.get("left out") else []
    if rates := stage(calls, "head_rates").get("rows"):
        from benchmarks.head_rates import table

        lines += ["Rates of the linear path's products:", "", *table(rates).splitlines(), ""]
    return lines


def _answers(calls: dict[str, Any]) -> list[str]:
    from benchmarks import report

    tables = compared_tables(calls)
    if not tables:
        return []
    everything = report.compared(tables.values())
    lines = [*report.answer_table(report.answer(heading, rows) for heading, (_, rows) in tables.items()), ""]
    lines += [f"{report.headline(everything)['line']}.", ""] if everything else []
    lines += [*(f"* {sentence}" for sentence in report.below_one(everything)), ""]
    return [*lines, *([f"![Time and memory of each method]({CHART})", ""] if everything else [])]


def summary(calls: dict[str, Any], planned: dict[str, list[str]]) -> str:
    """The session as markdown. It opens with the comparison with the best peers.

    calls: call -> stage -> report. planned: the stages of each call.
    """
    device = stage(calls, "environment")
    about = ", ".join(f"{k} {v}" for k, v in device.items() if isinstance(v, str) and "/" not in v)
    name = device.get("device", {}).get("name", "an unknown device")
    lines = [f"# GPU session on {name}", "", *_answers(calls), about or "Versions: not known.", ""]
    for part in (_correctness, _kernels, _against, _tune):
        lines += part(calls)
    lines += ["## What ran, what did not", ""]
    for call, stages in planned.items():
        if call not in calls:
            lines += [f"Call {call}: not run.", ""]
            continue
        no_gpu = any(report.get("failed") == NO_GPU for report in calls[call].values())
        rows = []
        for one in stages:
            report = calls[call].get(one)
            seconds = ["-", "-"] if report is None else [str(report["took"]), str(report.get("limit", "-"))]
            rows.append([one, *seconds, _outcome(one, report, NO_GPU if no_gpu else "the time was over")])
        lines += [f"Call {call}:", "", *_table(["stage", "seconds", "limit", "outcome"], rows)]
    return "\n".join(lines)


def sessions(results: Path) -> dict[str, dict[str, Any]]:
    """The calls of every GPU session below a folder of results, by the session's folder."""
    found = {}
    for file in sorted(results.glob("*/results.json")):
        if calls := json.loads(file.read_text(encoding="utf-8")).get("calls"):
            found[file.parent.name] = calls
    return found


def bandwidth_table(calls: dict[str, Any]) -> list[str]:
    """For each path over the logits at the predicted shape: the time of our faster backend, and its share of the bandwidth."""
    bandwidth, seconds, rows = bandwidth_of(calls), roofline_seconds(calls), []
    for work in works():
        if bandwidth and work.key in seconds and work.key.endswith(PREDICTED_SHAPE):
            share = work.bytes / seconds[work.key] / bandwidth
            rows.append([work.path, _milliseconds(seconds[work.key]), f"{share:.0%}"])
    if not bandwidth or not rows:
        return []
    heading = f"**Share of the memory's bandwidth: bfloat16 logits {PREDICTED_SHAPE}, the faster backend**"
    said = f"The card's measured bandwidth is {bandwidth / 1e12:.2f} TB/s."
    return [heading, "", *_table(["path", "time", "share of that bandwidth"], rows), said, ""]


def compared_tables(calls: dict[str, Any]) -> dict[str, tuple[str, list[dict[str, Any]]]]:
    """The tables of methods in report.py's form: heading -> (benchmark, rows), the fastest method first.

    If a method was measured twice, the slower time counts.
    """
    found = {}
    for name in ("peers", "linear", "small_heads"):
        for key, table in stage(calls, name).get("tables", {}).items():
            if table.get("rows"):
                heading = _heading(name, key, table)
                found[heading] = (
                    "gpu_logits_path" if name == "peers" else "gpu_linear_path",
                    _rows(key, heading, table, calls),
                )
    return found


def _heading(stage_name: str, key: str, table: dict[str, Any]) -> str:
    if stage_name == "peers":
        return f"From logits: bfloat16 {key}"
    pairs, length, hidden, vocab = key.partition("-")[0].split("x")
    frozen = ", frozen head" if key.endswith("-frozen") else ""
    return f"From hidden states: {pairs} pairs x {length} tokens, H = {hidden}, V = {int(vocab):,}{frozen}"


def _rows(key: str, heading: str, table: dict[str, Any], calls: dict[str, Any]) -> list[dict[str, Any]]:
    measured, bandwidth = table["rows"], bandwidth_of(calls)
    floor = measured[FLOOR]["median"] if FLOOR in measured else None
    if bandwidth and "bytes" in table:
        floor = table["bytes"] / bandwidth
    time = {name: max(row["median"], row.get("again", 0.0)) for name, row in measured.items() if name != FLOOR}
    peers = [name for name in time if not name.startswith("ours")]
    ours = quickest({name: {"median": seconds} for name, seconds in time.items()}, "ours")
    rows = []
    for name in sorted(time, key=time.__getitem__):
        row, gradient = measured[name], measured[name].get("gradient")
        found = {
            "case": heading,
            "name": name,
            "title": title(name),
            "ours": name.startswith("ours"),
            "select": f"{key}-{name}",
        }
        found |= {"median_s": time[name], "host_s": row.get("host"), "extra_bytes": row.get("extra bytes")}
        found["verdict"] = "-" if gradient is None else "right" if gradient["right"] else "WRONG"
        if floor:
            found |= {"floor_s": floor, "times_floor": time[name] / floor}
        if found["ours"] and peers:
            best = min(peers, key=time.__getitem__)
            found |= {"vs_best": time[best] / time[name], "best_peer": title(best), "best": best}
        elif ours:
            found["ours_faster"] = time[name] / time[ours]
        rows.append(found)
    return rows


def panels(calls: dict[str, Any]) -> list[Any]:
    """The tables that contain a peer, as panels of a chart (bars.py)."""
    from benchmarks import charts, report

    found = []
    for heading, (name, rows) in compared_tables(calls).items():
        floor = report.TRAFFIC if name == "gpu_logits_path" else report.PRODUCTS
        if report.has_peer(rows):
            found += charts.bar_panels(report.Result(name, heading, [], rows, floor=floor))
    return found


def title(name: str) -> str:
    """A method's name in words, with the backend in parentheses if the name has one."""
    from benchmarks.peers import GPU_PEERS, PEERS
    from benchmarks.peers.linear import LINEAR_PEERS

    method, _, backend = name.partition(" (")
    if name == FLOOR:
        return "floor: the matrix products alone"
    if method == "ours" and not backend:
        return LINEAR_PEERS["ours"].title
    if method == "ours_filtered":
        return "dpo_kernels, filtered by blocks"
    known = {**LINEAR_PEERS, **PEERS, **GPU_PEERS}
    words = known[method].title if method in known else method
    return f"{words} ({backend}" if backend else words


def right_backends(calls: dict[str, Any]) -> list[str]:
    """Our backends whose results were right in every case of the session."""
    table = stage(calls, "correctness").get("table", {})
    return [name for name, row in table.items() if name != "eager" and row.get("cases") and not row["failed"]]
