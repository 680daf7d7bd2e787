"""The benchmarks measure what they claim to measure (truth, wrong peers, interleaving, memory), and run from end to end."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import bars, charts, compare, gpu_summary, machine, method, reasons, report
from benchmarks.linear_problem import LinearCase, LinearProblem, LinearTruth
from benchmarks.method import Contender, Samples
from benchmarks.peers import PEERS
from benchmarks.peers.linear import LINEAR_PEERS
from benchmarks.problem import BETA, LogitsProblem, Truth, error_budget
from benchmarks.test_scaling import exponent
from dpo_kernels import _build, reference

ROOT = Path(__file__).resolve().parent.parent
SHAPE = (4, 7, 501)


@pytest.fixture(scope="module")
def problem() -> LogitsProblem:
    return LogitsProblem(SHAPE, torch.float32)


@pytest.fixture(scope="module")
def truth(problem: LogitsProblem) -> Truth:
    return Truth(problem)


def test_truth_is_the_reference(problem: LogitsProblem, truth: Truth) -> None:
    logits = problem.logits.detach().double().requires_grad_()
    loss = reference.dpo_loss(logits, problem.labels, ref_logits=problem.ref_logits.double(), beta=BETA)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert truth.loss == pytest.approx(loss.item(), rel=1e-13)
    assert truth.error_of(gradient).worst < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [name for name in PEERS if name != "compiled"])
def test_peers_are_right_except_for_sums_in_sixteen_bits(name: str, dtype: torch.dtype) -> None:
    # Sequences are long, because rounding each log-probability to 16 bits is only visible in a sum of many.
    problem = LogitsProblem((2, 128, 501), dtype)
    truth = Truth(problem)
    problem.next()
    error = truth.error_of(PEERS[name](problem).step())
    wrong = name == "trl_old" and dtype == torch.bfloat16
    assert (error.worst > error_budget(dtype)) == wrong


@pytest.mark.parametrize("kind", [kind for kinds in (PEERS, LINEAR_PEERS) for kind in kinds.values() if kind.needs])
def test_a_missing_peer_names_the_line_that_brings_it(kind, monkeypatch: pytest.MonkeyPatch) -> None:
    assert kind.why_missing() is None
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert kind.why_missing() == f"{kind.needs} is not installed (pip install -e .[peers])"


def _zeroed(gradient: Tensor, labels: Tensor) -> Tensor:
    return torch.zeros_like(gradient)


def _others_zeroed(gradient: Tensor, labels: Tensor) -> Tensor:
    index = labels.unsqueeze(-1)
    return torch.zeros_like(gradient).scatter(-1, index, gradient.gather(-1, index))


def _one_row_zeroed(gradient: Tensor, labels: Tensor) -> Tensor:
    gradient = gradient.clone()
    gradient[1, 2] = 0
    return gradient


def _label_off_by_one(gradient: Tensor, labels: Tensor) -> Tensor:
    return gradient.roll(1, -1)


FAULTS = (
    _zeroed,
    lambda gradient, labels: -gradient,
    lambda gradient, labels: 1.05 * gradient,
    _others_zeroed,
    _one_row_zeroed,
    _label_off_by_one,
    lambda gradient, labels: gradient * float("nan"),
    lambda gradient, labels: gradient[:, :-1],
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_gradient_is_wrong(fault, dtype: torch.dtype, problem: LogitsProblem, truth: Truth) -> None:
    right = truth.gradient.to(dtype)
    assert truth.error_of(right).worst <= error_budget(dtype)
    assert not truth.error_of(fault(right, problem.labels)).worst <= error_budget(dtype)


@pytest.fixture(scope="module")
def linear() -> tuple[LinearProblem, LinearTruth]:
    problem = LinearProblem(LinearCase("", 2, 16, hidden_size=32, vocab=501, source="random"))
    return problem, LinearTruth(problem)


def _scored_row_zeroed(problem: LinearProblem, hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    hidden[problem.labels != -100] *= (torch.arange(32) != 5)[:, None]
    return hidden, weight


def _prompt_touched(problem: LinearProblem, hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    hidden[0, 0] = 1e-6
    return hidden, weight


LINEAR_FAULTS = (
    _scored_row_zeroed,
    _prompt_touched,
    lambda problem, hidden, weight: (1.05 * hidden, weight),
    lambda problem, hidden, weight: (hidden, 1.05 * weight),
    lambda problem, hidden, weight: (-hidden, weight),
    lambda problem, hidden, weight: (hidden, torch.zeros_like(weight)),
    lambda problem, hidden, weight: (hidden, weight * float("nan")),
)


def test_linear_truth_is_eager_and_ours_but_for_rounding(linear: tuple[LinearProblem, LinearTruth]) -> None:
    problem, truth = linear
    eager = truth.error_of(LINEAR_PEERS["eager"](problem).step())
    assert max(eager.hidden, eager.weight) < 1e-4
    assert truth.error_of(LINEAR_PEERS["ours"](problem).step()).within(eager)


@pytest.mark.parametrize("filtered", [False, True])
@pytest.mark.parametrize("fault", LINEAR_FAULTS)
def test_a_faulty_linear_gradient_is_wrong(fault, filtered: bool, linear: tuple[LinearProblem, LinearTruth]) -> None:
    problem, truth = linear
    assert truth.weight is not None
    eager = truth.error_of(LINEAR_PEERS["eager"](problem).step())
    right = truth.hidden.float(), truth.weight.float()
    assert truth.error_of(right).within(eager, filtered)
    assert not truth.error_of(fault(problem, *(part.clone() for part in right))).within(eager, filtered)


def test_restored_logits_are_what_they_were() -> None:
    problem = LogitsProblem(SHAPE, torch.float32)
    before, first = problem.logits.detach().clone(), problem.logits.data_ptr()
    addresses = set()
    while True:
        addresses.add(problem.logits.data_ptr())
        with torch.no_grad():
            problem.logits.zero_()
        problem.next()
        if problem.logits.data_ptr() == first:
            break
    assert torch.equal(problem.logits.detach(), before)
    # All copies together exceed the cache, so no contender finds its inputs there.
    assert len(addresses) * 2 * problem.nbytes >= 4 * machine.cache_bytes()


def test_rounds_interleave_and_rotate() -> None:
    order: list[str] = []
    contenders = [Contender(name, lambda name=name: order.append(name)) for name in "abc"]
    found = method.interleave(contenders, rounds=3, warmup=1)
    assert "".join(order) == "abc" + "abc" + "bca" + "cab" + "abc" + "abc"
    assert all(len(samples.seconds) == 3 for samples in found.values())


def test_preparation_is_not_timed() -> None:
    import time

    found = method.interleave([Contender("a", lambda: None, lambda: time.sleep(0.02))], rounds=3)
    assert min(found["a"].seconds) < 0.02


def test_ratio_is_taken_within_rounds() -> None:
    # Other load slowed the second round of both by a factor of ten: the ratio stays the same.
    assert method.ratio(Samples([2.0, 20.0, 2.0]), Samples([1.0, 10.0, 1.0])) == 2.0


def test_peak_memory_sees_what_is_allocated_and_freed_inside() -> None:
    kept = [torch.ones(1 << 16) for _ in range(1024)]
    del kept  # malloc keeps these 256 MiB and could reuse them
    extra, faults = method.peak_memory(lambda: torch.ones(16 << 20).sum().item())
    assert extra is not None
    # The system counts resident pages in batches per thread.
    assert 60 << 20 <= extra <= 72 << 20
    assert faults > 0


def test_the_peak_of_a_process_is_its_own() -> None:
    # The parent holds 256 MiB more than a child that has the same imports and does almost nothing else.
    held = torch.ones(64 << 20)
    script = "from benchmarks.method import peak_resident; print(peak_resident())"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True)
    assert int(done.stdout) < method.peak_resident() - held.nbytes // 2


def test_exponent_of_a_power_is_its_power() -> None:
    assert exponent([1, 2, 4, 8], [3 * x**1.5 for x in (1, 2, 4, 8)]) == pytest.approx(1.5)


def _row(title: str, ratio: float, peer: str = "eager PyTorch", case: str = "a", test: str = "test_x[a]") -> dict:
    return {"title": title, "case": case, "vs_best": ratio, "best_peer": peer, "select": test, "median_s": 1.0}


def test_headline_is_the_weakest_row_of_all() -> None:
    fast, slow = _row("dpo_kernels", 3.0), _row("dpo_kernels, in place", 0.8, "torch.compile", "b")
    peer = {"title": "eager PyTorch", "case": "a"}
    found = report.headline(report.compared([("x", [fast, peer]), ("y", [slow])]))
    assert (found["ratio"], found["benchmark"]) == (0.8, "y")
    assert found["line"] == (
        "dpo_kernels is behind the best peer in 1 of 2 comparisons. "
        "The weakest (y): dpo_kernels, in place reaches 0.80 times the speed of torch.compile (b)"
    )
    assert report.headline([]) == {}


def test_losses_are_said_once_with_their_reason_or_the_lack_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [_row("ours", 0.5), _row("ours", 0.75), _row("won", 1.5)]
    lost = report.compared([("x", rows)])
    said = "Behind a peer (x): ours reaches 0.50 to 0.75 times the speed of eager PyTorch (a). "
    assert report.below_one(lost) == [f"{said}No reason is known yet."]
    monkeypatch.setattr(reasons, "REASONS", (reasons.Reason("x", "test_x[*]", "It reads more."),))
    assert report.below_one(lost) == [f"{said}It reads more."]
    assert reasons.explain("another", rows[0]) is None
    assert reasons.explain("x", rows[2]) is None


def test_the_first_table_says_who_won() -> None:
    assert report.answer("q", [{"title": "a"}]) == ("q", "not compared with a peer", "-")
    won, lost = _row("exact", 2.0), _row("filtered", 0.5)
    assert report.answer("q", [won, {"title": "a peer"}])[1:] == ("2.00 times the speed of eager PyTorch", "faster")
    assert report.answer("q", [won, lost])[1:] == (
        "0.50 to 2.00 times the speed of eager PyTorch",
        "faster (slower: filtered)",
    )
    assert report.answer("q", [lost])[2] == "slower in 1 of 1 row"
    # A row without a time has a ratio of memory: half the ratio is twice the memory.
    del lost["median_s"]
    assert report.answer("q", [lost])[1:] == ("2.00 times the memory of eager PyTorch", "more memory in 1 of 1 row")


def test_rounds_that_disagree_are_no_loss() -> None:
    row = _row("ours", 0.97) | {"vs_range": [0.9, 1.1]}
    assert reasons.explain("x", row) == "It won some of the rounds: no difference was seen."
    assert reasons.explain("x", row | {"vs_range": [0.9, 0.99]}) is None


def _collect(*options: str) -> dict[str, list[str]]:
    """benchmark -> its tests."""
    command = [sys.executable, "-m", "pytest", "benchmarks/", "--collect-only", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, list[str]] = {}
    for line in done.stdout.splitlines():
        path, _, test = line.partition("::")
        if test:
            found.setdefault(Path(path).stem.removeprefix("test_"), []).append(test)
    return found


@pytest.fixture(scope="module")
def collected() -> dict[str, dict[str, list[str]]]:
    """size -> benchmark -> its tests."""
    return {sizes: _collect("--sizes", sizes) for sizes in ("small", "default", "full")}


def test_every_reason_is_about_a_row_that_exists(collected: dict[str, dict[str, list[str]]]) -> None:
    known = {name: [test for found in collected.values() for test in found.get(name, ())] for name in collected["full"]}
    for calls in gpu_summary.sessions(report.RESULTS).values():
        for name, rows in gpu_summary.compared_tables(calls).values():
            known.setdefault(name, []).extend(row["select"] for row in rows)
    for reason in reasons.REASONS:
        fitting = [test for test in known[reason.benchmark] if reason.fits(reason.benchmark, test)]
        assert fitting, f"{reason.benchmark}: no row is called {reason.pattern}"


def test_every_question_has_its_place_on_the_pages(collected: dict[str, dict[str, list[str]]]) -> None:
    assert set(report.ORDER) == set(collected["default"])


#: The words for `-k` in docs/benchmarks.md, and the benchmark that each selects.
WORDS = {
    "logits": "logits_path", "logps": "logps",
    "linear": "linear_path", "trainer": "trainer", "memory": "memory", "products": "products",
    "objectives": "objectives", "statistics": "statistics", "reference": "reference_modes", "prefix": "prefix_sharing",
    "scaling": "scaling", "latency": "latency", "threads": "threads", "startup": "startup",
}  # fmt: skip


@pytest.mark.parametrize("word", WORDS)
def test_a_word_picks_one_question(word: str, collected: dict[str, dict[str, list[str]]]) -> None:
    for sizes, found in collected.items():
        hit = {
            name for name, tests in found.items() if word in f"test_{name}.py" or any(word in test for test in tests)
        }
        assert hit == {WORDS[word]}, f"--sizes {sizes} -k {word}"
    assert f"`{word}`" in (ROOT / "docs" / "benchmarks.md").read_text()


def test_pytest_agrees_on_what_a_word_picks() -> None:
    found = _collect("--sizes", "small", "-k", "logits")
    assert list(found) == ["logits_path"]
    assert {test.partition("[")[0] for test in found["logits_path"]} == {"test_loss_and_gradient", "test_loss_alone"}


def test_small_is_small(collected: dict[str, dict[str, list[str]]]) -> None:
    small = collected["small"]
    assert sum(map(len, small.values())) < 120
    # Compilers take many seconds; test_compile only tests for graph breaks.
    compiled = re.compile(r"compiled|-cce\]")
    assert [test for name, tests in small.items() if name != "compile" for test in tests if compiled.search(test)] == []
    shapes = {part for tests in small.values() for test in tests for part in re.findall(r"\d+(?:x\d+)+", test)}
    assert "4x32x8192" in shapes
    assert max(math.prod(map(int, shape.split("x"))) for shape in shapes) <= 2**24


@pytest.mark.parametrize("chart", ["bars", "lines"])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("extra", [None, 0, 1 << 30])
def test_every_result_can_be_drawn(chart: str, scale: float, extra: int | None, tmp_path: Path) -> None:
    # Floors far below and far above the bars; memory unknown, zero and large: a machine under load can measure all of these.
    pytest.importorskip("matplotlib")
    rows = [
        {"case": "float32 [4, 32, 8192], loss and gradient", "title": f"method {name}", "ours": name == "b", "x": size}
        | {"median_s": 1e-3 * size, "floor_s": 1e-3 * scale, "extra_bytes": extra}
        for name in "ab"
        for size in (1, 8)
    ]
    result = report.Result("x", "?", [report.Column("title", "method")], rows, chart=chart)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path = charts.draw(result, tmp_path / "x.svg")
    assert path is not None
    assert "method b" in path.read_text()


@pytest.mark.parametrize("floor", [0.0, 0.5, 0.9, 0.95, 1.0, 1.02, 1.1, 1.3, 3.0])
@pytest.mark.parametrize("narrow", [False, True])
def test_no_floor_strikes_through_a_figure(floor: float, narrow: bool) -> None:
    panel = bars.Panel("h", ["time, ms", "MiB"], [bars.Bar("a", True, [(1.0, "1,234"), (3.0, "3")], floor)], "why")
    drawn = bars.draw([panel], narrow=narrow)
    assert ">why<" in drawn
    (tick, _) = (float(x) for x in re.findall(r'd="M([\d.]+) ', drawn))
    (figure,) = (float(x) for x in re.findall(r'<text x="([\d.]+)"[^>]*>1,234<', drawn))
    assert not figure - 2 < tick < figure + 5 * bars.CHARACTER
    assert figure + 5 * bars.CHARACTER < (bars.NARROW if narrow else bars.WIDTH)


def test_a_chart_holds_every_figure_in_both_themes() -> None:
    panel = bars.Panel("h & h", ["time, ms"], [bars.Bar("<b>", False, [None]), bars.Bar("c", True, [(2.0, "2")])])
    light, dark, both = (bars.draw([panel], theme=theme) for theme in ("light", "dark", None))
    assert "h &amp; h" in light
    assert "&lt;b&gt;" in light
    assert "not known" in light
    assert bars.LIGHT["page"] in light
    assert bars.DARK["page"] not in light
    assert bars.DARK["page"] in dark
    assert bars.LIGHT["page"] in both
    assert f"prefers-color-scheme:dark){{.page{{fill:{bars.DARK['page']}}}" in both


def test_machine_name_is_a_folder_name() -> None:
    assert set(machine.machine_name("cpu")) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")


def test_benchmarks_run_from_end_to_end(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pytest", "benchmarks/test_logits_path.py", "benchmarks/test_statistics.py"]
    options = ["--sizes", "small", "--peers", "eager,ours_inplace", "--dtype", "float32", "--report", str(tmp_path)]
    done = subprocess.run(
        [*command, *options, "-q", "-p", "no:cacheprovider"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout + done.stderr
    # Each method has a progress line, and the headline is the very last line.
    before, _, after = done.stdout.partition("= Summary =")
    for line in ("logits_path: eager: first call", "logits_path: ours_inplace: ", "statistics: entropy: "):
        assert f"  {line}" in before
        assert f"  {line}" not in after
    assert done.stdout.splitlines()[-1].startswith("dpo_kernels is behind the best peer in ")
    (folder,) = tmp_path.iterdir()
    result = json.loads((folder / "logits_path.json").read_text())
    by_peer = {row["peer"]: row for row in result["rows"] if row["part"] == "step"}
    assert set(by_peer) == {"eager", "ours_inplace"}
    assert by_peer["ours_inplace"]["vs_best"] == by_peer["ours_inplace"]["vs_eager"] > 0
    assert by_peer["eager"]["ours_faster"] == by_peer["ours_inplace"]["vs_eager"]
    # A row's own command runs only the row and the peer that it is compared with.
    expression = by_peer["ours_inplace"]["select"]
    assert f"-k '{expression}'" in by_peer["ours_inplace"]["command"]
    listed = subprocess.run(
        [*command[:4], *options[:2], "-k", expression, "--collect-only", "-q"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    ).stdout
    names = [line.partition("::")[2] for line in listed.splitlines() if "::" in line]
    case = "float32-4x32x8192"
    assert names == [f"test_loss_and_gradient[{case}-{peer}]" for peer in ("eager", "ours_inplace")]
    assert by_peer["ours_inplace"]["verdict"] == "right"
    assert result["machine"]["name"] == folder.name
    names = {path.name for path in folder.iterdir()}
    assert {f"{name}.{kind}" for name in ("logits_path", "statistics") for kind in ("json", "md", "svg")} <= names
    # The folder's first page answers each question and shows the roofline of both.
    assert {"README.md", "roofline.svg"} <= names
    index = (folder / "README.md").read_text()
    for name in ("logits_path", "statistics"):
        found = json.loads((folder / f"{name}.json").read_text())
        assert found["summary"]
        assert f": {found['summary']}" in index
        assert f"]({name}.md) | " in index
    assert index.splitlines()[2] == "| question | result against the best peer | verdict |"
    # The pages can be written again from the JSON alone.
    pages = {path: path.read_text() for path in folder.glob("*.md")}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.report", str(folder)], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert {path: path.read_text() for path in folder.glob("*.md")} == pages


def test_the_interval_holds_the_change_and_narrows_with_agreement() -> None:
    median, low, high = compare.interval([0.5] * 9)
    assert (median, low, high) == (0.5, 0.5, 0.5)
    median, low, high = compare.interval([0.8, 1.2, 0.9, 1.1, 1.0, 0.7, 1.3])
    assert low < median < high
    assert (low, high) != (0.7, 1.3)


class _Clockwork:
    """Replaces a Revision; every call reports the given time."""

    def __init__(self, order: list[str], name: str, seconds: float) -> None:
        self.order, self.name, self.seconds = order, name, seconds

    def call(self, case: dict | None = None) -> float:
        self.order.append(self.name)
        return self.seconds


@pytest.mark.parametrize(("after", "verdict"), [(0.5, "faster"), (2.0, "slower"), (1.0, "no change seen")])
def test_revisions_take_turns_and_the_change_is_named(after: float, verdict: str) -> None:
    order: list[str] = []
    sides = _Clockwork(order, "a", 1.0), _Clockwork(order, "b", after)
    found = compare.compare(*sides, {"case": {}}, rounds=4)["case"]  # type: ignore[arg-type]
    assert (found["ratio"], found["verdict"]) == (after, verdict)
    assert "".join(order) == "ab" + "ba" + "ab" + "ba" + "ab"


def test_a_revision_runs_the_sources_of_its_own_tree(tmp_path: Path) -> None:
    side = compare.Revision("here", ROOT, _build.cache_folder())
    try:
        assert side.call(compare.SMALL["logits float32"]) > 0
        assert side.call() > 0
    finally:
        side.close()
    # A tree without the package would import the installed one, so a revision would be compared with itself.
    with pytest.raises(RuntimeError, match="was imported from"):
        compare.Revision("empty", tmp_path, tmp_path)


def test_an_unknown_revision_is_named(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no-such-revision"):
        compare.checked_out("no-such-revision", tmp_path / "tree")


def test_profile_names_its_ranges_after_the_stages(tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    command = [sys.executable, "-m", "benchmarks.profile", "dpo_loss", "--shape", "2,8,512", "--calls", "2"]
    options = ["--device", "cpu", "--trace", str(trace)]
    done = subprocess.run([*command, *options], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    events = json.loads(trace.read_text())["traceEvents"]
    ranges = [event["name"] for event in events if event.get("cat") == "user_annotation"]
    assert sorted(ranges) == sorted(2 * ["preference_forward", "preference_backward"])
    assert "perf record" in done.stdout


def test_profile_of_the_linear_path_shows_memory_and_the_filter(tmp_path: Path) -> None:
    memory = tmp_path / "memory.json"
    command = [sys.executable, "-m", "benchmarks.profile", "linear_dpo_loss", "--shape", "2,16,4096", "--hidden", "32"]
    options = ["--grad-filter", "1e-3", "--calls", "1", "--device", "cpu", "--memory", str(memory)]
    done = subprocess.run([*command, *options], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    found = json.loads(memory.read_text())
    linear = {"filter", "filtered_grad_hidden", "filtered_grad_weight"}
    assert {name for name, *_ in found["stages"]} == {"token_logps", "preference_loss"} | linear
    held = [count for _, count in found["ms_and_bytes"]]
    # The peak is at least a chunk's logits (16 scored tokens in one pair); at the end all memory is freed.
    assert max(held) >= 16 * 4096 * 4
    assert held[-1] == 0


def test_an_unknown_peer_is_refused_with_the_known_ones() -> None:
    command = [sys.executable, "-m", "pytest", "benchmarks/test_logits_path.py", "--peers", "nobody"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode != 0
    assert "unknown name 'nobody'; known: all, eager" in done.stdout + done.stderr


def test_markdown_and_terminal_hold_the_same_cells() -> None:
    columns = [report.Column("a", "first"), report.Column("b", "second", "ratio"), report.Column("c", "empty")]
    rows = [{"a": "x", "b": 1.5}, {"a": "y", "b": None}]
    text, marked = report.text_table(columns, rows), report.markdown_table(columns, rows)
    assert [line.split() for line in text[2:]] == [["x", "1.50x"], ["y", "-"]]
    assert marked[2:] == ["| x | 1.50x |", "| y | - |"]
    # Our rows are in bold.
    assert report.markdown_table(columns, [rows[0] | {"ours": True}])[2:] == ["| **x** | 1.50x |"]
