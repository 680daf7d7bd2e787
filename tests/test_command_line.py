"""`python -m dpo_kernels` and its commands."""

import re
import types
from pathlib import Path

import pytest
import torch

from dpo_kernels import __main__ as command
from dpo_kernels import backends, bench, selfcheck
from dpo_kernels.backends import eager

CASES = selfcheck.TABLE[:4]


@pytest.mark.parametrize("arguments", [[], ["doctor"]], ids=str)
def test_without_a_command_it_reports(arguments, capsys):
    assert command.main(arguments) == 0
    out = capsys.readouterr().out
    for said in (
        "backend used for cpu tensors: ",
        "\ndevices\n  cpu ",
        "\nlibraries\n  ",
        "\ncompilers\n  C++ ",
        "\nto fix\n",
    ):
        assert said in out


def test_check_counts_the_cases_of_every_backend_that_serves(capsys):
    assert command.check(None, "cpu", CASES) == 0
    assert capsys.readouterr().out == "".join(f"{name}: 4 of 4 cases right\n" for name in backends.candidates("cpu"))


def test_check_names_what_is_wrong_and_exits_1(capsys, monkeypatch):
    def too_long(logits, labels, logps, top, log_sum, grad_logps, transform, out, token_kl=None):
        eager.logits_grad(logits, labels, logps, top, log_sum, grad_logps, transform, out, token_kl)
        out.mul_(1.05)

    stages = types.SimpleNamespace(**{**vars(eager), "logits_grad": too_long})
    monkeypatch.setattr(backends, "_attempt", lambda name, kind: stages if name == "cpu" else eager)
    monkeypatch.setattr(command, "check", lambda name, device: check(name, device, CASES))
    assert command.main(["check", "--backend", "cpu", "--device", "cpu"]) == 1
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "cpu: 0 of 4 cases right"
    assert len(out) == 5
    assert all(
        re.match(r"  wrong: case '.*': gradient, label entries off by 0\.05, allowed ", line) for line in out[1:]
    )


check = command.check


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["check", "--backend", "tpu"], "unknown backend 'tpu'; known: eager, cpu, triton, cuda"),
        (["check", "--backend", "cuda", "--device", "cpu"], "backend 'cuda' cannot be used for cpu tensors: "),
        (["check", "--device", "99"], "there is no cuda:99: this torch sees "),
        (["check", "--device", "mps"], "no kernels for mps devices"),
        (["check", "--device", "elsewhere"], "unknown device 'elsewhere'"),
        (["bench", "--shape", "8192"], "--shape must be TOKENSxVOCAB"),
        (["bench", "--shape", "8x0"], "--shape must be TOKENSxVOCAB"),
        (["bench", "--shape", "7x100"], "must be even"),
        (["bench", "--shape", "3x4x100"], "must be even"),
        (["bench", "--seconds", "-3"], "--seconds must not be negative: -3"),
        (
            ["bench", "--shape", "80000000x128256", "--device", "cpu"],
            r"needs .* GB together with eager PyTorch, but cpu has",
        ),
    ],
    ids=str,
)
def test_what_cannot_run_is_said_in_one_line_with_exit_status_2(arguments, said, capsys):
    assert command.main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert re.search(said, printed.err)


@pytest.mark.parametrize("arguments", [[], ["check"], ["bench"]], ids=str)
def test_an_unknown_backend_in_the_environment_is_said_in_one_line(arguments, capsys, monkeypatch):
    monkeypatch.setenv("DPO_KERNELS_BACKEND", "tpu")
    assert command.main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.endswith("DPO_KERNELS_BACKEND: unknown backend 'tpu'; known: eager, cpu, triton, cuda\n")


def test_shapes_are_read_as_tokens_or_sequences():
    assert bench.parse_shape("8192x128256") == (16, 512, 128256)
    assert bench.parse_shape("2X3x5") == (2, 3, 5)
    assert bench.parse_shape("6x5") == (2, 3, 5)


def test_bench_prints_times_and_shares(capsys):
    assert (
        command.main(["bench", "--shape", "4x8x512", "--dtype", "bfloat16", "--device", "cpu", "--seconds", "0"]) == 0
    )
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("[32 x 512] bfloat16, ")
    assert [line.split()[0] for line in out[2:]] == ["loss", "gradient", "both"]
    assert all(re.search(r"\d\.\d{3} +\d+\.\d+-\d+\.\d+ +\d+%.*\d+\.\d\d x$", line) for line in out[2:])


def test_the_table_is_arithmetic_on_the_times():
    seconds = {"copy": 1.0, "loss": 2.0, "gradient": 1.0, "eager loss": 8.0, "eager gradient": 4.0}
    times = {name: [value] * 3 for name, value in seconds.items()}
    lines = bench.table(times, (2, 50, 1000), torch.float32, "here")
    assert lines[0] == "[100 x 1000] float32, here, 3 rounds; copy 0.0008 GB/s"
    assert [line.split() for line in lines[2:]] == [
        ["loss", "2000.000", "2000.000-2000.000", "50%", "8000.000", "8000.000-8000.000", "12%", "4.00", "x"],
        ["gradient", "1000.000", "1000.000-1000.000", "100%", "4000.000", "4000.000-4000.000", "25%", "4.00", "x"],
        ["both", "3000.000", "3000.000-3000.000", "67%", "12000.000", "12000.000-12000.000", "17%", "4.00", "x"],
    ]


def test_every_variable_is_in_the_table():
    """docs/environment.md has one line for each of our variables that a source file reads."""
    root = Path(__file__).resolve().parent.parent
    sources = [
        path for folder in ("dpo_kernels", "csrc", "python", "benchmarks") for path in (root / folder).rglob("*.*")
    ]
    read = {
        name
        for path in [*sources, root / "setup.py"]
        if path.suffix in (".py", ".cpp", ".h", ".cu")
        for name in re.findall(r"\bDPO_KERNELS_[A-Z_]+\b", path.read_text())
    }
    table = set(
        re.findall(r"^\| `(DPO_KERNELS_[A-Z_]+)`", (root / "docs" / "environment.md").read_text(), re.MULTILINE)
    )
    assert read == table
    assert set(command.VARIABLES) <= table
