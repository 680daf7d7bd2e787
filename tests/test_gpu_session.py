"""The GPU session kit on a CPU: everything runs but the device itself (tests/gpu_session_stub.py)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import gpu_session, roofline

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
    text = (tmp_path / "summary.md").read_text()
    assert all(f"| {name} |" in text for name in gpu_session.SHARES)
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


def test_summary_compares_with_the_measured_copy():
    work = next(w for w in roofline.works() if w.path == "token_logps")
    stages = {
        "ceilings": {"took": 1, "result": {"copy_bytes_per_second": 3e12}},
        "timing": {
            "took": 1,
            "result": {"rows": {f"cuda: {work.key}": {"median": work.bytes / 1.5e12}}, "left out": []},
        },
    }
    text = gpu_session.summary(stages, "cuda")
    assert "| 50% |" in text
    assert "| tests | - | not run |" in text


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
