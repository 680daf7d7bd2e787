"""Options of `pytest benchmarks/`, and how results reach pytest-benchmark, the terminal and `--report`.

A fixture times all contenders together, interleaved. Each test then replays its own samples into pytest-benchmark, so
`--benchmark-json`, `--benchmark-compare` and the plugin's other options work on these measurements.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from . import machine, method, reasons, report
from .method import Samples
from .peers import ABSENT, PEERS
from .peers.linear import LINEAR_PEERS

#: The names that --peers takes; a name may mean a peer on the logits path, on the linear path, or on both.
PEER_NAMES = {**PEERS, **LINEAR_PEERS}

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

#: Peers that compile for many seconds. `--sizes small` runs them only if `--peers` names them.
COMPILED = ("compiled", "liger_compiled", "cce")

#: Rounds for each of `--sizes`.
ROUNDS = {"small": 2, "default": 3, "full": 15}


@dataclass(frozen=True)
class Settings:
    """The options of the command line."""

    sizes: str
    peers: tuple[str, ...]
    dtypes: tuple[str, ...]
    device: str

    @property
    def rounds(self) -> int:
        return ROUNDS[self.sizes]

    @classmethod
    def of(cls, config: pytest.Config) -> Settings:
        def chosen(option: str, known: dict[str, Any], every: tuple[str, ...]) -> tuple[str, ...]:
            value = config.getoption(option)
            names = every if value == "all" else tuple(value.split(","))
            for name in names:
                if name not in known:
                    raise pytest.UsageError(f"{option}: unknown name {name!r}; known: all, {', '.join(known)}")
            return names

        device = config.getoption("--device")
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cuda" and not torch.cuda.is_available():
            raise pytest.UsageError("--device cuda: torch sees no CUDA device")
        sizes = config.getoption("--sizes")
        return cls(
            sizes=sizes,
            peers=chosen(
                "--peers", PEER_NAMES, tuple(name for name in PEER_NAMES if sizes != "small" or name not in COMPILED)
            ),
            dtypes=chosen("--dtype", DTYPES, ("float32", "bfloat16")),
            device=device,
        )


class Replay:
    """A clock that advances by measured durations: pytest-benchmark's timer for samples taken elsewhere."""

    def __init__(self) -> None:
        self._now = 0.0

    def now(self) -> float:
        return self._now

    def play(self, benchmark: Any, samples: Samples) -> None:
        """Make the `benchmark` fixture record these samples as its own."""
        durations = iter(samples.seconds)

        def step() -> None:
            self._now += next(durations)

        benchmark.pedantic(step, rounds=len(samples.seconds), iterations=1)


_REPLAY = Replay()
_RESULTS: dict[str, report.Result] = {}
#: The benchmark that is running.
_CURRENT = [""]


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("dpo-kernels benchmarks")
    help_sizes = "small: check that everything runs (a minute); full: shapes of the goals, more rounds, all variants"
    group.addoption("--sizes", choices=("small", "default", "full"), default="default", help=help_sizes)
    group.addoption("--peers", default="all", metavar="NAMES", help=f"all, or some of: {','.join(PEER_NAMES)}")
    group.addoption("--dtype", default="all", metavar="NAMES", help=f"all, or some of: {','.join(DTYPES)}")
    group.addoption("--device", choices=("auto", "cpu", "cuda"), default="auto")
    group.addoption("--pairs", metavar="FILE", help="preference pairs of the trainers' benchmark; default: the demo's")
    group.addoption("--pairs-per-step", type=int, help="the trainers' batch; default: 4, or 8 for --sizes full")
    group.addoption("--report", metavar="DIR", help="write JSON, markdown and SVG into DIR/<machine name>")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    # Our tables show the ratios; --benchmark-verbose also prints pytest-benchmark's own table.
    config.option.benchmark_quiet = True


def pytest_sessionstart(session: pytest.Session) -> None:
    """Write progress straight to the terminal, whatever pytest captures, and run the small size on one thread.

    On a busy machine, threads waiting for each other would take most of the small size's minute.
    """
    if session.config.getoption("--sizes") == "small":
        torch.set_num_threads(1)
        os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that benchmarks start
    terminal = session.config.pluginmanager.get_plugin("terminalreporter")
    capture = session.config.pluginmanager.get_plugin("capturemanager")

    def show(line: str) -> None:
        with capture.global_and_fixture_disabled():
            terminal.ensure_newline()
            terminal.write_line(f"  {_CURRENT[0]}: {line}")
            terminal.flush()

    method.announce[:] = [show] if terminal is not None else []


def pytest_runtest_setup(item: pytest.Item) -> None:
    _CURRENT[0] = item.path.stem.removeprefix("test_")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "benchmark" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.benchmark(timer=_REPLAY.now))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    settings = Settings.of(metafunc.config)
    if "dtype" in metafunc.fixturenames:
        metafunc.parametrize("dtype", settings.dtypes, indirect=True, scope="module")
    if "shape" in metafunc.fixturenames:
        shapes = metafunc.module.SHAPES[settings.sizes]
        ids = ["x".join(map(str, shape)) for shape in shapes]
        metafunc.parametrize("shape", shapes, indirect=True, scope="module", ids=ids)
    if "case" in metafunc.fixturenames:
        cases = metafunc.module.CASES[settings.sizes]
        ids = [case.key for case in cases]
        metafunc.parametrize("case", cases, indirect=True, scope="module", ids=ids)
    if "name" in metafunc.fixturenames and hasattr(metafunc.module, "NAMES"):
        metafunc.parametrize("name", metafunc.module.NAMES[settings.sizes])
    if "size" in metafunc.fixturenames:
        metafunc.parametrize("size", metafunc.module.CHOSEN[settings.sizes], indirect=True, scope="module")
    if "trainer" in metafunc.fixturenames:
        metafunc.parametrize("trainer", metafunc.module.TRAINERS[settings.sizes])
    if "peer" in metafunc.fixturenames:
        metafunc.parametrize("peer", [name for name in PEERS if name in settings.peers])
    if "forward_peer" in metafunc.fixturenames:
        names = [name for name in PEERS if name in settings.peers and PEERS[name].forward_passes is not None]
        metafunc.parametrize("forward_peer", names)
    if "linear_peer" in metafunc.fixturenames:
        metafunc.parametrize("linear_peer", [name for name in LINEAR_PEERS if name in settings.peers])


@pytest.fixture(scope="module")
def dtype(request: pytest.FixtureRequest) -> str:
    """Name of the dtype that this test runs with."""
    return request.param


@pytest.fixture(scope="module")
def shape(request: pytest.FixtureRequest) -> tuple[int, int, int]:
    """[2P, T, V] that this test runs with, from the module's SHAPES."""
    return request.param


@pytest.fixture(scope="module")
def case(request: pytest.FixtureRequest) -> Any:
    """The case that this test runs with, from the module's CASES."""
    return request.param


@pytest.fixture(scope="session")
def settings(request: pytest.FixtureRequest) -> Settings:
    return Settings.of(request.config)


def wanted(request: pytest.FixtureRequest, test: str, parameter: str, **where: Any) -> list[Any]:
    """The values of `parameter` in the tests that `-k` selected, in order: only these contenders are timed.

    where: values of other parameters that the tests must have.
    """
    found = []
    for item in request.session.items:
        if isinstance(item, pytest.Function) and item.module is request.module and item.originalname == test:
            values = item.callspec.params
            if all(values[name] == value for name, value in where.items()):
                found.append(values[parameter])
    return list(dict.fromkeys(found))


@pytest.fixture
def replay(benchmark: Any) -> Callable[[Samples], None]:
    """A function that hands measured samples to pytest-benchmark."""
    return lambda samples: _REPLAY.play(benchmark, samples)


@pytest.fixture(scope="session")
def publish(request: pytest.FixtureRequest) -> Callable[[report.Result], report.Result]:
    """A function that takes a result (or more rows of a known one), for the terminal's summary and for `--report`."""
    defaults = {"--sizes": "default", "--dtype": "all", "--device": "auto", "--pairs": None, "--pairs-per-step": None}
    asked = {name: request.config.getoption(name) for name in defaults}
    options = "".join(f" {name} {value}" for name, value in asked.items() if value != defaults[name])

    def take(result: report.Result) -> report.Result:
        for row in result.rows:
            if "select" in row:
                row["command"] = f"pytest {result.file}{options} -k '{row['select']}'"
            if reason := reasons.explain(result.name, row):
                row["explanation"] = reason
        known = _RESULTS.setdefault(result.name, result)
        if known is not result:
            known.rows += result.rows
            known.notes += result.notes
            for key, value in result.extra.items():
                known.extra[key] = known.extra.get(key, {}) | value
        return known

    return take


def _compared() -> list[report.Compared]:
    return report.compared((result.name, result.rows) for result in _RESULTS.values())


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if not _RESULTS:
        return
    settings = Settings.of(config)
    about = machine.describe(settings.device)
    write = terminalreporter.write_line
    for result in _RESULTS.values():
        terminalreporter.write_sep("=", result.question)
        write(report.machine_line(about))
        for group, rows in result.groups().items():
            write("")
            write(f"{group}", bold=True)
            for line in report.text_table(result.columns, rows):
                write(line)
            if config.getoption("verbose") > 0:
                for line in report.text_table(result.details, rows) if result.details else ():
                    write(line)
                write("the command that measures each row alone:")
                for command in dict.fromkeys(row["command"] for row in rows if "command" in row):
                    write(f"  {command}")
        write("")
        for sentence in result.sentences():
            write(sentence)
    if target := config.getoption("--report"):
        folder = Path(target) / about["name"]
        report.write([(result, about) for result in _RESULTS.values()], folder)
    terminalreporter.write_sep("=", "Summary")
    for result in _RESULTS.values():
        if summary := result.summary(result.rows):
            write(f"{result.name}: {summary}")
    # Being slower at tiny shapes means nothing, so no reason is given.
    for line in report.below_one(_compared()) if settings.sizes != "small" else ():
        write(line)
    for name, why in ABSENT.items():
        write(f"Not compared: {name} {why}.")
    if settings.sizes == "small":
        left_out = ", ".join(COMPILED)
        write(
            f"--sizes small checks that everything runs; its times say little. It uses one thread, without {left_out}."
        )
    write("-v prints the command that measures each row alone; --report DIR writes it.")
    if target:
        write(f"Written to {folder}: begin with {folder / 'README.md'}")


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> Generator[None, Any, Any]:
    """Print the headline as the very last line, below pytest's own summaries of warnings, skips and counts."""
    done = yield
    terminal = session.config.pluginmanager.get_plugin("terminalreporter")
    if terminal is not None and (line := report.headline(_compared()).get("line")):
        small = " At --sizes small this says little." if session.config.getoption("--sizes") == "small" else ""
        terminal.write_line(f"{line}.{small}", bold=True)
    return done
