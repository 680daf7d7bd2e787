"""The GPU session kit on a CPU: everything runs but the device itself (tests/gpu_session_stub.py)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gpu_session, gpu_stages, roofline

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def on_cpu(monkeypatch) -> None:
    """Child processes find the stub, and run on one thread."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.syspath_prepend(str(ROOT / "tests"))


def test_a_session_measures_and_says_what_it_did(on_cpu, tmp_path):
    stages = gpu_session.session("gpu_session_stub:CpuMachine", tmp_path, minutes=10)
    failed = {name: report["failed"] for name, report in stages.items() if "failed" in report}
    assert failed == {}, (tmp_path / "log.txt").read_text()[-2000:]
    results = json.loads((tmp_path / "results.json").read_text())
    rows = results["stages"]["timing"]["result"]["rows"]
    assert {key.split(":")[0] for key in rows} == {"cpu", "eager"}
    assert all(row["low"] <= row["median"] <= row["high"] for row in rows.values())
    assert "token_logps [16x1000]" in results["seconds"]
    assert results["stages"]["ceilings"]["result"]["copy_bytes_per_second"] > 0
    steps = results["stages"]["latency"]["result"]["steps"]
    assert steps["dpo_kernels (cpu)"]["microseconds"] >= steps["dpo_kernels (cpu)"]["host microseconds"] > 0
    (linear, frozen) = results["stages"]["linear"]["result"]["tables"].values()
    assert {"ours", "eager", "floor: the products alone"} <= set(linear["rows"])
    assert (linear["products"], frozen["products"]) == (4, 3)
    peers = results["stages"]["peers"]["result"]
    assert peers["gradients"]["ours_inplace (cpu)"]["right"]
    text = (tmp_path / "summary.md").read_text()
    assert all(f"| {name} |" in text for name in gpu_session.SHARES)
    for question in ("Correct?", "How fast against the floor?", "Against whom?", "What to tune?", "What ran"):
        assert f"## {question}" in text
    assert "all cases right" in text
    assert "| eager | 30 of 30 | - |" in text
    assert "| cpu | token_logps [4x1000] | 1000.000 ms | 500.000 ms | DPO_ROW_THREADS=128 | 2.00x |" in text
    assert "| cpu | logits_grad [4x1000] | 1000.000 ms | 1000.000 ms | default | 1.00x |" in text
    assert "Variants that failed: cpu DPO_MAX_CLUSTER=0." in text
    assert "| sanitizer | 0" in text or "not run: compute-sanitizer is not installed" in text
    files = list(tmp_path.iterdir())
    assert len(files) <= 8
    assert all(f.stat().st_size < gpu_session.MAX_FILE for f in files)


def test_a_failing_and_a_hanging_stage_do_not_stop_the_session(on_cpu, tmp_path, monkeypatch):
    kept = {name: gpu_session.SHARES[name] for name in ("environment", "tests", "build")}
    monkeypatch.setattr(gpu_session, "SHARES", dict(kept, tests=0.2, environment=0.5, build=1.0))
    stages = gpu_session.session("gpu_session_stub:BrokenMachine", tmp_path, minutes=1)
    assert "exit status" in stages["environment"]["failed"]
    assert stages["tests"]["failed"] == "ran out of its time"
    assert "result" in stages["build"]
    text = (tmp_path / "summary.md").read_text()
    assert "ran out of its time" in text


def test_a_stage_that_is_cut_off_keeps_what_it_had(on_cpu, tmp_path):
    report = gpu_session.run_stage("correctness", "gpu_session_stub:SlowMachine", tmp_path, 45)
    assert report["failed"] == "ran out of its time"
    assert report["result"]["table"]["eager"]["failed"] == {}
    text = gpu_session.summary({"correctness": report}, ("eager", "cpu"))
    assert "ran out of its time; until then: all cases right" in text


def test_the_programs_that_tools_watch_run_the_kernels_and_nothing_else(on_cpu, tmp_path, monkeypatch):
    for name in ("small", "kernels"):
        report = gpu_session.run_stage(name, "gpu_session_stub:CpuMachine", tmp_path, 300)
        assert "failed" not in report, (tmp_path / "log.txt").read_text()[-2000:]
    monkeypatch.setenv("DPO_VARIANT", json.dumps({"backend": "cpu", "settings": {}}))
    report = gpu_session.run_stage("variant", "gpu_session_stub:CpuMachine", tmp_path, 300)
    assert report["result"]["logits_grad with kl [4x1000]"] > 0
    assert gpu_stages._last_object((tmp_path / "log.txt").read_text())["seconds"] == report["result"]


def test_a_machine_without_pytest_or_tools_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_stages.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(gpu_stages.shutil, "which", lambda name: None)
    for name in ("tests", "sanitizer", "ncu"):
        assert "is not installed" in gpu_stages.STAGES[name](None, tmp_path, 1.0)["not run"]


def test_the_kit_starts_as_a_file():
    done = subprocess.run(
        [sys.executable, "benchmarks/gpu_session.py", "--help"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "--minutes" in done.stdout


def test_wrong_cases_and_wrong_gradients_are_shouted():
    stages = {
        "correctness": {"took": 1, "result": {"table": {
            "cuda": {"cases": 30, "failed": {"packed": "loss off"}}, "triton": {"does not serve": "no triton"}}}},
        "peers": {"took": 1, "result": {
            "shape": [2, 4, 8], "bytes": 8, "missing": {"liger": "not there"},
            "rows": {"ours_inplace (cuda)": {"median": 1.0, "extra bytes": 0, "times": {"ours_inplace (cuda)": 1.0}},
                     "eager": {"median": 3.0, "extra bytes": 2**20, "times": {"ours_inplace (cuda)": 3.0}}},
            "gradients": {"eager": {"right": False, "error": 0.3}}}},
    }  # fmt: skip
    text = gpu_session.summary(stages, ("cuda", "triton"))
    assert "1 cases WRONG" in text
    assert "| cuda | 29 of 30 | packed: loss off |" in text
    assert "| triton | - | does not serve: no triton |" in text
    assert "| eager | 3000.000 ms | - | 3.00x | 1 MiB | WRONG (3.0e-01) |" in text
    assert "* not measured: liger: not there" in text


def test_summary_compares_with_the_measured_copy():
    work = next(w for w in roofline.works() if w.path == "token_logps")
    stages = {
        "ceilings": {"took": 1, "result": {"copy_bytes_per_second": 3e12}},
        "timing": {
            "took": 1,
            "result": {"rows": {f"cuda: {work.key}": {"median": work.bytes / 1.5e12}}, "left out": []},
        },
    }
    text = gpu_session.summary(stages, ("cuda", "triton"))
    assert "(50%) | - |" in text
    assert "| tests | - | not run: the time was over |" in text


def test_roofline_arithmetic():
    rows = {w.key: w for w in roofline.works()}
    forward = rows["token_logps [8192x128256]"]
    assert forward.bytes == 2 * 8192 * 128256
    assert forward.floor(roofline.CEILINGS["H100"]) == pytest.approx(0.627e-3, rel=1e-3)
    exact = rows["linear exact [8192x128256x4096]"]
    assert exact.flops == 8 * 8192 * 128256 * 4096
    assert exact.floor(roofline.CEILINGS["H100"]) == exact.flops / 798e12
    assert "not measured" in roofline.table(list(rows.values()), {})
    assert "1.000 ms" in roofline.table([forward], {forward.key: 1e-3})
