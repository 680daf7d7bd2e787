"""The GPU session kit on a CPU: everything runs except the GPU itself, for which tests/gpu_session_stub.py stands in."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import gpu_pack, gpu_session, gpu_stages, gpu_summary, readme_table, roofline

ROOT = Path(__file__).resolve().parent.parent
STUB = "gpu_session_stub:CpuMachine"
CALLS = list(gpu_session.CALLS)


@pytest.fixture
def on_cpu(monkeypatch) -> None:
    """Make child processes use the stub and one thread."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.syspath_prepend(str(ROOT / "tests"))


@pytest.fixture
def in_process(on_cpu, monkeypatch):
    """Run stages in this process, which has already imported torch, because there are two dozen of them."""

    def run(name, machine, out, limit, environment):
        begin = time.monotonic()
        with monkeypatch.context() as patch:
            for key, value in environment.items():
                patch.setenv(key, value)
            patch.setattr(gpu_stages, "PARTIAL", None)
            patch.setattr(gpu_stages, "count_compilations", list)
            gpu_session.run_one(name, machine, out, gpu_session.INNER * limit)
            result = json.loads(gpu_stages.PARTIAL.read_text())
            gpu_stages.PARTIAL.unlink()
        return {"took": round(time.monotonic() - begin, 1), "limit": limit, "result": result}

    return run


@pytest.fixture
def tools(tmp_path, monkeypatch):
    """Stand-ins for compute-sanitizer and ncu that record their arguments and run the program that they are given."""
    folder = tmp_path / "tools"
    folder.mkdir()
    for name in ("compute-sanitizer", "ncu"):
        tool = folder / name
        tool.write_text(
            f'#!/bin/sh\necho "$0 $*" >> {folder}/calls\n'
            f'while [ "$1" != {sys.executable} ]; do shift; done\nexec "$@"\n'
        )
        tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder / "calls"


def test_the_stages_fit_their_calls_and_leave_a_rest_of_every_limit():
    assert {name: seconds for name, (seconds, _) in gpu_session.CALLS.items()} == {"headline": 560, "depth": 230}
    for seconds, limits in gpu_session.CALLS.values():
        # The rest of a call's time is for starting, unpacking and writing.
        assert 0.9 * seconds <= sum(limits.values()) <= seconds - 20
        assert set(limits) <= set(gpu_stages.STAGES)
    assert gpu_session.INNER == 0.85


def test_a_headline_session_measures_and_says_what_it_did(in_process, tmp_path):
    out = tmp_path / "out"
    calls = gpu_session.session(STUB, out, ["headline"], run=in_process)
    results = json.loads((out / "results.json").read_text())
    assert results["calls"] == calls
    assert list(calls["headline"]) == list(gpu_session.CALLS["headline"][1])
    rows = gpu_summary.stage(calls, "timing")["rows"]
    assert {key.split(":")[0] for key in rows} == {"cpu", "eager"}
    assert all(row["low"] <= row["median"] <= row["high"] for row in rows.values())
    # The step is measured first, so that a call that is cut short has it.
    assert next(iter(rows)) == "cpu: step: policy, reference, gradient [16x1000]"
    assert rows["cpu: token_logps [16x1000]"]["replayed"]
    assert not rows["eager: token_logps [16x1000]"]["replayed"]
    assert "token_logps [16x1000]" in results["seconds"]
    ceilings = gpu_summary.stage(calls, "ceilings")
    assert min(ceilings["copy_bytes_per_second"], ceilings["read_bytes_per_second"]) > 0
    assert {"logits of 8 tokens, H 16, V 200", "dW of 8 tokens, H 16, V 200"} <= set(ceilings["products"])
    steps = gpu_summary.stage(calls, "latency")["steps"]
    assert steps["dpo_kernels (cpu)"]["microseconds"] >= steps["dpo_kernels (cpu)"]["host microseconds"] > 0
    (linear, frozen) = gpu_summary.stage(calls, "linear")["tables"].values()
    assert {"ours", "eager", "torch_lce", "liger_scaled_ce", gpu_summary.FLOOR} <= set(linear["rows"])
    assert (linear["products"], frozen["products"]) == (4, 3)
    assert all(row["gradient"]["right"] for name, row in linear["rows"].items() if name != gpu_summary.FLOOR)
    assert linear["not run"]["liger"] == "left out"
    peers = gpu_summary.stage(calls, "peers")["tables"]
    assert list(peers) == ["[4x8x500]", "[2x4x300]"]
    first = peers["[4x8x500]"]
    assert next(iter(first["rows"])) == "ours_inplace (cpu)"
    assert first["rows"]["ours_inplace (cpu)"]["gradient"]["right"]
    assert first["rows"]["ours_inplace (cpu)"]["again"] > 0
    assert first["not run"]["trl_triton"] == "runs on GPUs only"
    assert first["failed"] == {}
    text = (out / "summary.md").read_text()
    assert all(f"| {name} |" in text for name in gpu_session.CALLS["headline"][1])
    for question in (
        "Correct?",
        "How close to the memory's speed?",
        "How fast against other methods?",
        "What to tune?",
        "What ran",
    ):
        assert f"## {question}" in text
    assert "all 84 cases right" in text
    assert "| eager | 42 of 42 | - |" in text
    assert "* trl_triton: not run: runs on GPUs only" in text
    assert "not run: a CPU runs no Triton kernels" in text
    assert "Call depth: not run." in text
    assert "FAILED" not in text
    assert (out / "trace.json.gz").stat().st_size > 0
    files = list(out.iterdir())
    assert len(files) <= 8
    assert all(f.stat().st_size < gpu_session.MAX_FILE for f in files)


def test_a_depth_session_watches_sweeps_and_trains(in_process, tools, tmp_path):
    def run(name, *arguments):
        # The trainer stage patches TRL, so it runs in a separate process. The stage "tests" needs a GPU.
        if name == "tests":
            return {"took": 0, "result": {"not run": "no GPU"}}
        return (gpu_session.run_stage if name == "trainer" else in_process)(name, *arguments)

    out = tmp_path / "out"
    calls = gpu_session.session(STUB, out, ["depth"], scale=3, run=run)
    stages = calls["depth"]
    assert list(stages) == list(gpu_session.CALLS["depth"][1])
    assert gpu_summary.stage(calls, "memcheck")["clean"]
    called = tools.read_text()
    assert "compute-sanitizer --tool memcheck" in called
    assert "ncu --clock-control none" in called  # locking clocks would affect other users of the card
    assert gpu_summary.stage(calls, "ncu") == {"status": 0, "file": "ncu.txt"}
    sweep = gpu_summary.stage(calls, "sweep")
    assert [run["settings"] for run in sweep["runs"]] == ["default", "DPO_ROW_THREADS=128", "DPO_MAX_CLUSTER=0"]
    assert "no such cluster" in sweep["runs"][-1]["failed"]
    assert "token_logps [4x1000]" in {row["kernel"] for row in sweep["best"]}
    assert "cpu: token_logps [8x2001]" in gpu_summary.stage(calls, "more_shapes")["rows"]
    assert "1x8x16x201" in gpu_summary.stage(calls, "small_heads")["tables"]
    trainer = gpu_summary.stage(calls, "trainer")
    assert trainer["failed"] == {} == trainer["not run"], (out / "log.txt").read_text()[-2000:]
    ours, theirs = (trainer["rows"][name]["losses"] for name in ("ours", "trl"))
    assert ours == pytest.approx(theirs, rel=1e-4)
    text = (out / "summary.md").read_text()
    assert "| memcheck |" in text
    assert "Variants that failed: DPO_MAX_CLUSTER=0." in text
    assert "Call headline: not run." in text
    # Both calls are merged into one page, which is then committed.
    other = tmp_path / "other"
    other.mkdir()
    report = {"took": 1, "limit": 2, "result": {"torch": "2.99", "device": {"name": "A card"}, "backends": {}}}
    (other / "results.json").write_text(json.dumps({"calls": {"headline": {"environment": report}}}))
    gpu_session.merge([other, out], tmp_path / "merged")
    merged = json.loads((tmp_path / "merged" / "results.json").read_text())["calls"]
    assert list(merged) == CALLS
    assert "# GPU session on A card" in (tmp_path / "merged" / "summary.md").read_text()
    assert (tmp_path / "merged" / "ncu.txt").exists()
    # A stage that runs again, in a later folder, replaces only its own result.
    again = {"took": 9, "limit": 9, "result": {"not run": "no counters"}}
    (other / "results.json").write_text(json.dumps({"calls": {"depth": {"ncu": again}}}))
    gpu_session.merge([out, other], tmp_path / "joined")
    joined = json.loads((tmp_path / "joined" / "results.json").read_text())["calls"]["depth"]
    assert joined == {**json.loads(json.dumps(stages)), "ncu": again}


def test_stages_can_be_run_by_name(in_process, tmp_path):
    calls = gpu_session.session(STUB, tmp_path, ["environment", "latency"], run=in_process)
    assert {call: list(stages) for call, stages in calls.items()} == {
        "headline": ["environment", "latency"], "depth": ["environment"],
    }  # fmt: skip


#: Stands in for Python: one stage fails, one hangs (with a partial result and a child process), one succeeds.
STAGE = """#!/bin/sh
out="$8/.$4.json"
case $4 in
environment) echo "no such device"; exit 1;;
memcheck) echo '{"launches": 7}' > $out; echo "about to hang"; sleep 60 & sleep 60;;
trace) echo '{"bytes": 1}' > $out; echo "the time is ${10}";;
esac
"""


def test_a_failing_and_a_hanging_stage_do_not_stop_the_session(tmp_path, monkeypatch, capfd):
    program = tmp_path / "program"
    program.write_text(STAGE)
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(gpu_session.sys, "executable", str(program))
    limits = {"environment": 2.0, "memcheck": 2.0, "trace": 8.0}
    monkeypatch.setattr(gpu_session, "CALLS", {"headline": (12, limits)})
    out = tmp_path / "out"
    stages = gpu_session.session(STUB, out, ["headline"])["headline"]
    assert stages["environment"]["failed"] == "exit status 1, see log.txt"
    assert stages["memcheck"]["stopped"].startswith("at its limit of")
    assert stages["memcheck"]["result"] == {"launches": 7}
    assert stages["memcheck"]["took"] < 30
    assert stages["trace"]["result"] == {"bytes": 1}
    text = (out / "summary.md").read_text()
    assert "stopped at its limit of 2 s; until then: done" in text
    assert "| FAILED: exit status 1, see log.txt |" in text
    # The output of a stage before it hung is in the log and on the screen.
    assert "about to hang" in (out / "log.txt").read_text()
    assert "about to hang" in capfd.readouterr().out
    assert {path.name for path in out.iterdir()} == {"log.txt", "results.json", "summary.md"}


def test_a_stage_keeps_each_row_when_it_has_it(on_cpu, tmp_path, monkeypatch):
    from gpu_session_stub import CpuMachine

    class Stopped(CpuMachine):
        left = 8  # two copies and two reads, launched and replayed

        def measure(self, *arguments, **keywords):
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
            return super().measure(*arguments, **keywords)

    monkeypatch.setattr(gpu_stages, "PARTIAL", tmp_path / ".ceilings.json")
    with pytest.raises(KeyboardInterrupt):
        gpu_stages.ceilings(Stopped(), tmp_path, 10)
    assert json.loads((tmp_path / ".ceilings.json").read_text())["copy_bytes_per_second"] > 0


def test_what_never_ran_is_said_so():
    text = gpu_session.summary({"headline": {}}, {"headline": ["peers"], "depth": ["ncu"]})
    assert "| peers | - | - | not run: the time was over |" in text
    assert "Call depth: not run." in text
    assert "FAILED" not in text


def test_a_stage_is_told_less_than_its_limit(on_cpu, tmp_path, monkeypatch):
    commands = []

    class Process:
        stdout = ()

        def __init__(self, command, **_):
            commands.append(command)

        def wait(self, timeout):
            assert timeout == 100
            return 0

    monkeypatch.setattr(gpu_session.subprocess, "Popen", Process)
    gpu_session.run_stage("trace", STUB, tmp_path, 100)
    assert float(commands[0][commands[0].index("--seconds") + 1]) == 85


def test_rows_without_time_or_memory_are_not_run_and_never_failed(on_cpu, monkeypatch):
    from gpu_session_stub import CpuMachine

    machine = CpuMachine()
    rows = gpu_stages.timing(machine, Path(), -1)["rows"]
    assert all(row == {"not run": "no time left"} for row in rows.values())
    tables = gpu_stages.linear(machine, Path(), -1)["tables"]
    assert all(set(table["not run"].values()) == {"no time left"} for table in tables.values())
    monkeypatch.setattr(CpuMachine, "free_memory", lambda self: 0)
    assert gpu_stages.timing(machine, Path(), 9)["rows"]["cpu [16x1000]"] == {"not run": "not enough memory"}
    text = "\n".join(gpu_summary._missing(rows))
    assert "not run" in text
    assert "FAILED" not in text


def test_a_tool_that_outlasts_its_time_is_stopped_with_its_children(on_cpu, capfd):
    from gpu_session_stub import CpuMachine

    begin = time.monotonic()
    status, output = CpuMachine().command(["sh", "-c", "echo begun; sleep 60 & sleep 60"], 1.0)
    assert (status, output) == (124, "begun\n")
    assert time.monotonic() - begin < 20
    assert "begun" in capfd.readouterr().out
    assert CpuMachine().command(["sh", "-c", "exit 3"], 10.0) == (3, "")


def test_a_fault_that_ends_the_process_is_told_with_the_case_before_it():
    lines = '{"case": "float32", "wrong": null}\n{"case": "packed", "wrong": "loss off"}\n'
    ended = gpu_stages._verdicts(-6, lines + "an illegal memory access was encountered")
    assert ended["cases"] == 2
    assert ended["failed"]["packed"] == "loss off"
    assert "exit status -6" in ended["failed"]["after packed"]
    assert "illegal memory access" in ended["failed"]["after packed"]
    assert gpu_stages._verdicts(124, lines)["not run"] == "the cases after packed: no time left"
    assert gpu_stages._verdicts(0, lines) == {"cases": 2, "failed": {"packed": "loss off"}}


ENDED = """
import signal, sys
sys.path.insert(0, "tests")
from benchmarks import gpu_stages
from gpu_session_stub import CpuMachine

signal.signal(signal.SIGTERM, lambda *_: gpu_stages.end_with_tools())
CpuMachine().command(["sh", "-c", "sleep 300 & echo begun; sleep 300"], 250.0)
"""


def test_a_stage_that_is_ended_takes_its_tool_along():
    process = subprocess.Popen(
        [sys.executable, "-c", ENDED], cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout.readline() == "begun\n"
    begin = time.monotonic()
    assert gpu_session._stop(process) == 143
    assert process.stdout.read() == ""  # returns when the last process with the pipe has ended
    assert time.monotonic() - begin < 60


def test_a_machine_without_pytest_or_tools_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_stages.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(gpu_stages.shutil, "which", lambda name: None)
    for name in ("tests", "memcheck", "ncu", "trainer"):
        assert "is not installed" in gpu_stages.STAGES[name](None, tmp_path, 100.0)["not run"]


COMPILE = """
import itertools, sys
sys.path.insert(0, "tests")
import triton
from gpu_session_stub import CompilingMachine
from benchmarks import gpu_compile, gpu_stages

machine = CompilingMachine()
assert machine.triton_serves() is None
calls = gpu_stages._triton_calls(machine)
launches, stopped = gpu_compile.record(calls if sys.argv[1] == "all" else itertools.islice(calls, 9))
assert not stopped, stopped
if sys.argv[1] == "all":
    kernels = {launch.kernel.__name__ for launch in launches}
    assert {"preference_loss_kernel", "sequence_sums_kernel"} <= kernels, kernels
    assert len(launches) > 30
    sys.exit()
some = [next(l for l in launches if l.kernel.__name__ == name) for name in ("logits_grad_kernel", "token_logps_kernel")]
if sys.argv[1] == "ahead":
    short = gpu_compile.compile_all(launches, *machine.compile_target(), 1, 0, lambda part: None)
    assert short["not run"], short
    assert len(short["not run"]) + short["compiled"] == short["kernels"] == len(launches)
    parts = []
    found = gpu_compile.compile_all(some, *machine.compile_target(), 2, 240, lambda part: parts.append(dict(part)))
    assert found["compiled"] + found["cached"] == 2 == len(parts), found
    assert (found["failed"], found["not run"]) == ({}, []), found
else:  # another process, the launches in another order
    triton.runtime.driver.set_active(gpu_compile.CompileOnlyDriver(machine.compile_target()[0]))
    late = gpu_stages.count_compilations()
    for launch in reversed(some):
        launch.kernel.warmup(grid=launch.grid, **launch.arguments, **launch.options)
    assert late == [], late
    other = next(l for l in launches if l not in some)
    other.kernel.warmup(grid=other.grid, **other.arguments, **other.options)
    assert len(late) == 1, late
"""


def run_compile(turn, cache):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT), "DPO_KERNELS_SELFCHECK": "0"}
    command = [sys.executable, "-c", COMPILE, turn]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


NEEDS_TRITON = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton has no wheel for this system"
)


@pytest.mark.slow
@NEEDS_TRITON
def test_everything_that_stages_launch_is_recorded(tmp_path):
    run_compile("all", tmp_path)


@NEEDS_TRITON
def test_a_launch_finds_the_kernel_that_was_compiled_ahead(tmp_path):
    for turn in ("ahead", "later"):
        run_compile(turn, tmp_path)


# ---- the pack ----


@pytest.fixture
def packed(tmp_path, monkeypatch):
    """A pack with stand-ins for its libraries and wheel, which needs neither nvcc nor a network."""
    built = []

    def build_cuda(target, archs, defines):
        built.append((archs, defines))
        target.write_bytes(b"library " + " ".join(defines).encode())

    def download(command, **_):
        folder = Path(command[command.index("--dest") + 1])
        assert command[command.index("--python-version") + 1] == "3.12"
        assert "--no-deps" in command
        with zipfile.ZipFile(folder / "some_peer-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr("some_peer_of_the_kit.py", "ANSWER = 42\n")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(gpu_pack._build, "build_cuda", build_cuda)
    monkeypatch.setattr(gpu_pack.subprocess, "run", download)
    lines = gpu_pack.make(tmp_path / "pack", "90", "3.12")
    assert built == [(["90"], defines) for defines in gpu_pack.VARIANTS]
    assert "in all, of 64.0 MiB" in lines[-1]
    return tmp_path / "pack"


def test_a_pack_travels_and_is_used_without_a_network(packed, tmp_path, monkeypatch):
    environment = gpu_pack.unpack(packed, tmp_path / "there")
    monkeypatch.setenv(gpu_pack.VARIABLE, environment[gpu_pack.VARIABLE])
    pack = gpu_pack.in_use()
    assert pack.variants()[0] == gpu_pack.DEFAULT
    assert "sm_90" in pack.describe()
    assert [pack.serves(capability) for capability in ((8, 0), (9, 0), (10, 0))] == [False, True, True]
    loaded = []
    monkeypatch.setattr("torch.ops.load_library", lambda path: loaded.append(Path(path).read_bytes()))
    pack.load()
    pack.load("DPO_ROW_THREADS=128")
    assert loaded == [b"library ", b"library DPO_ROW_THREADS=128"]
    first = environment["PYTHONPATH"].split(os.pathsep)[0]
    monkeypatch.syspath_prepend(first)
    assert importlib.import_module("some_peer_of_the_kit").ANSWER == 42


def test_a_library_of_other_sources_is_left_aside(packed, tmp_path, monkeypatch):
    environment = gpu_pack.unpack(packed, tmp_path / "there")
    monkeypatch.setenv(gpu_pack.VARIABLE, environment[gpu_pack.VARIABLE])
    monkeypatch.setattr(gpu_pack._build, "source_hash", lambda folder: "another")
    pack = gpu_pack.in_use()
    assert "other sources" in pack.describe()
    monkeypatch.setattr("torch.ops.load_library", lambda path: pytest.fail("loaded all the same"))
    pack.load()
    with pytest.raises(gpu_pack.PackError, match="other sources"):
        pack.load("DPO_ROW_THREADS=128")


def test_a_pack_that_is_too_large_says_what_takes_the_room(packed, monkeypatch):
    with (packed / "large.whl").open("wb") as file:
        file.truncate(gpu_pack.LIMIT)
    with pytest.raises(gpu_pack.PackError, match=r"64\.0 MiB  large\.whl"):
        gpu_pack.sizes(packed)


def test_a_pack_that_lost_a_library_is_refused(packed, tmp_path):
    folder = tmp_path / "half"
    shutil.copytree(packed, folder)
    next(folder.glob("cuda.*.so.xz")).unlink()
    with pytest.raises(gpu_pack.PackError, match=r"lacks cuda\..*copy it again"):
        gpu_pack.unpack(folder, tmp_path / "into")


def test_a_pack_that_could_not_be_made_is_none(packed, monkeypatch):
    def fail(*_):
        raise gpu_pack._build.BuildError("no compiler")

    monkeypatch.setattr(gpu_pack._build, "build_cuda", fail)
    with pytest.raises(gpu_pack._build.BuildError):
        gpu_pack.make(packed, "90", "3.12")
    with pytest.raises(gpu_pack.PackError, match="holds no pack"):
        gpu_pack.unpack(packed, packed / "into")


@pytest.mark.skipif(torch.cuda.is_available(), reason="the machine has a GPU")
def test_without_a_gpu_the_first_stage_says_so_and_is_the_last(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", ["gpu_session.py", "--only", "headline", "--out", str(tmp_path / "out")])
    assert gpu_session.main() == 1
    said = capfd.readouterr().out
    assert "sees no GPU" in said
    assert "Traceback" not in said
    assert said.count("not run: no GPU") == len(gpu_session.CALLS["headline"][1]) - 1


@pytest.mark.parametrize("option", ["--from", "--merge"])
def test_a_folder_that_is_not_there_is_said_in_one_line(option, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["gpu_session.py", option, str(tmp_path / "none"), "--out", str(out)])
    assert gpu_session.main() == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not out.exists()


def test_nothing_but_skipped_tests_has_not_passed():
    machine = SimpleNamespace(command=lambda arguments, seconds: (0, "144 skipped in 3.1s"))
    assert not gpu_stages.tests(machine, None, 100)["passed"]
    machine = SimpleNamespace(command=lambda arguments, seconds: (0, "140 passed, 4 skipped in 3.1s"))
    assert gpu_stages.tests(machine, None, 100)["passed"]


def test_a_folder_without_a_pack_is_refused(tmp_path):
    with pytest.raises(gpu_pack.PackError, match="holds no pack"):
        gpu_pack.unpack(tmp_path, tmp_path / "there")


def test_the_packed_peers_are_those_of_the_project():
    listed = re.search(r"^peers = \[(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.DOTALL | re.MULTILINE)
    versions = re.findall(r'"([\w-]+==[\d.]+)', listed.group(1))
    assert len(versions) == 3
    assert set(versions) <= set(gpu_pack.WHEELS)


# ---- documentation and summaries ----


def documented_commands() -> list[str]:
    pages = [gpu_session.__doc__, *(page.read_text(encoding="utf-8") for page in (ROOT / "docs").glob("*.md"))]
    return [line for page in pages for line in re.findall(r"python benchmarks/gpu_session\.py[^\n`#]*", page)]


@pytest.mark.parametrize("command", documented_commands())
def test_the_documented_commands_are_the_kits(command):
    words = shlex.split(re.split(r"\s{2,}", command)[0])
    arguments = gpu_session.parser().parse_args(words[2:])
    assert set(arguments.only) <= {*CALLS, *gpu_stages.STAGES}


def test_the_kit_starts_as_a_file():
    done = subprocess.run(
        [sys.executable, "benchmarks/gpu_session.py", "--help"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "--pack" in done.stdout


def test_wrong_cases_and_wrong_gradients_are_shouted():
    stages = {
        "environment": {"took": 1, "result": {"backends": {"cuda": "serves", "triton": "no triton"}}},
        "correctness": {"took": 1, "result": {"table": {
            "cuda": {"cases": 30, "failed": {"packed": "loss off"}}, "triton": {"not run": "no triton"}}}},
        "peers": {"took": 1, "result": {"tables": {"[2x4x8]": {
            "shape": [2, 4, 8], "bytes": 8, "not run": {"liger": "not there"}, "failed": {"cce": "no such thing"},
            "rows": {"ours_inplace (cuda)": {"median": 1.0, "extra bytes": 0},
                     "eager": {"median": 3.0, "host": 0.5, "extra bytes": 2**20,
                               "gradient": {"right": False, "error": 0.3}}}}}}},
    }  # fmt: skip
    text = gpu_session.summary({"headline": stages}, {"headline": ["correctness"]})
    assert "1 cases WRONG" in text
    assert "| cuda | 29 of 30 | packed: loss off |" in text
    assert "| triton | - | not run: no triton |" in text
    assert "| eager PyTorch, gradient WRONG by 3.0e-01 | 3000.000 ms | 500.000 ms | - | 3.00x | 1 MiB |" in text
    assert "all are right" not in text
    assert "* liger: not run: not there" in text
    assert "* cce: FAILED: no such thing" in text


def measured_calls(card: str) -> dict:
    """A session in which every kernel takes 1 / 0.95 of the time at the read bandwidth, and the linear path 15 ms."""
    rows = {f"cuda: {work.key}": {"median": work.bytes / 3e12 / 0.95, "host": 3e-5} for work in roofline.works()}
    table = {
        "scored": 2048, "products": 4, "not run": {}, "failed": {},
        "rows": {"ours": {"median": 15e-3, "gradient": {"right": True}}, "eager": {"median": 45e-3}},
    }  # fmt: skip
    results = {
        "environment": {"torch": "2.99", "triton": "9.9", "device": {"name": card}, "backends": {"cuda": "serves"}},
        "ceilings": {"copy_bytes_per_second": 2e12, "read_bytes_per_second": 3e12},
        "timing": {"rows": rows},
        "linear": {"tables": {"4x512x4096x128256": table}},
    }
    return {"headline": {name: {"took": 1, "limit": 2, "result": result} for name, result in results.items()}}


def test_predictions_stand_beside_what_was_measured():
    text = gpu_session.summary(measured_calls("NVIDIA H100 80GB HBM3"), {"headline": ["timing"]})
    (alone,) = (line for line in text.splitlines() if line.startswith("| token_logps [8192x128256]"))
    assert "(95%)" in alone
    assert "| 30 us | 90% to 97%: as predicted |" in alone
    (step,) = (
        line for line in text.splitlines() if line.startswith("| step: policy, reference, gradient [8192x128256]")
    )
    assert "88% to 93%: above" in step
    assert "Predicted for dpo_kernels: 14 to 17 ms: as predicted." in text
    other = gpu_session.summary(measured_calls("Another card"), {"headline": ["timing"]})
    assert "90% to 97%" not in other
    assert gpu_summary.verdict(0.5, (0.9, 1.0)) == "90% to 100%: below"


def test_the_pages_get_their_tables_from_a_session(tmp_path):
    assert gpu_summary.sessions(tmp_path) == {}
    folder = tmp_path / "h100"
    folder.mkdir()
    gpu_session.save(folder, measured_calls("NVIDIA H100"))
    (calls,) = gpu_summary.sessions(tmp_path).values()
    assert "| step: policy, reference, gradient | 2.949 ms | 95% |" in gpu_summary.bandwidth_table(calls)
    ((name, rows),) = gpu_summary.compared_tables(calls).values()
    assert name == "gpu_linear_path"
    assert [(row["title"], row["median_s"]) for row in rows] == [
        ("dpo_kernels, exact", 15e-3),
        ("eager PyTorch", 45e-3),
    ]
    assert (rows[0]["vs_best"], rows[1]["ours_faster"]) == (pytest.approx(3), pytest.approx(3))
    question = "From hidden states: 4 pairs x 512 tokens, H = 4096, V = 128,256"
    opening = (folder / "summary.md").read_text().splitlines()[2:5]
    assert opening[2] == f"| {question} | 3.00 times the speed of eager PyTorch | faster |"
    # On the page it stands behind the machine that was measured last.
    cpu = "amd-epyc-2-cores-avx2"
    (tmp_path / cpu).mkdir()
    measured = (readme_table.RESULTS / cpu / "logits_path.json").read_bytes()
    (tmp_path / cpu / "logits_path.json").write_bytes(measured)
    page = readme_table.page(tmp_path)
    assert page.index("## Tables: AMD EPYC") < page.index("## Tables: H100")
    assert "| eager PyTorch | 45 ms | 3.00x | - |" in page
    assert "torch 2.99, Triton 9.9" in page


def test_where_a_method_was_measured_twice_the_slower_time_counts():
    calls = measured_calls("NVIDIA H100")
    calls["headline"]["linear"]["result"]["tables"]["4x512x4096x128256"]["rows"]["ours"]["again"] = 90e-3
    ((_, rows),) = gpu_summary.compared_tables(calls).values()
    assert {row["name"]: row["median_s"] for row in rows} == {"ours": 90e-3, "eager": 45e-3}
    assert rows[-1]["vs_best"] == pytest.approx(0.5)


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
