"""dpo-train's answers before torch is loaded: help, versions, mistakes, comparisons, init, doctor, missing packages."""

import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from dpo_trainer import ConfigError, OutputError
from dpo_trainer.cli.early import settings_of
from dpo_trainer.cli.help import COMMANDS
from dpo_trainer.cli.init import CASES, init
from dpo_trainer.cli.main import main
from dpo_trainer.cli.packages import OPTIMIZERS, TRACKERS, TRAINER, line_of_error
from dpo_trainer.cli.settings import read_settings
from dpo_trainer.settings.inherited import training_arguments

HEAVY = ("torch", "transformers", "accelerate", "datasets", "peft", "matplotlib", "pandas", "numpy", "pyarrow")
#: Runs the command; prints its exit code and the heavy packages that it imported. Modules named in HIDDEN are not found.
CODE = """
import os, sys
for name in os.environ.get("HIDDEN", "").split():
    sys.modules[name] = None
from dpo_trainer.cli import main
code = main(sys.argv[1:])
print(code, *sorted(name for name in {heavy} if sys.modules.get(name)), file=sys.stderr)
"""


def command(*words: str, hidden: str = "", cwd: Path | None = None) -> tuple[int, list[str], list[str], str]:
    """Run dpo-train in a process: (exit code, imported heavy packages, lines on standard error, standard output)."""
    code = CODE.replace("{heavy}", repr(HEAVY))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "HIDDEN": hidden}
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, env=environment, cwd=cwd
    )
    assert "Traceback" not in done.stderr, done.stderr
    *lines, last = done.stderr.splitlines()
    returned, *loaded = last.split()
    return int(returned), loaded, lines, done.stdout


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pairs: Callable[..., Any], model_folder: Path) -> Path:
    """A working directory with a config, data, a model and two runs."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs(24)))
    (tmp_path / "my-model").symlink_to(model_folder)
    config = {"model": "my-model", "train_data": "train.jsonl", "output_dir": "run", "use_cpu": True}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    for name, loss in (("a", 0.5), ("b", 0.25)):
        (tmp_path / name).mkdir()
        records = [{"step": step, "loss": loss, "eval_loss": loss} for step in (1, 2)]
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "a" / "summary.json").write_text("{}")
    return tmp_path


# --- at once -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "returned", "said"),
    [
        ("", 2, "dpo-train --help"),
        ("--version", 0, "transformers "),
        ("--help", 0, "Start here:"),
        ("--help-all", 0, "--dataloader_num_workers"),
        ("config.yaml --help", 0, "Start here:"),
        ("help", 0, "Start here:"),
        ("compare --help", 0, "usage: dpo-train compare"),
        ("config.yaml --betta 1", 2, "unknown setting 'betta' (did you mean 'beta'?)"),
        (
            "config.yaml --lora.target_module q",
            2,
            "unknown setting 'lora.target_module' (did you mean 'lora.target_modules'?)",
        ),
        ("none.yaml", 2, "none.yaml: cannot be read"),
        ("config.yaml --beta high", 2, "beta: expected a number, got 'high'"),
        ("config.yaml --save_strategy 3 --eval_strategy [a]", 2, "eval_strategy: expected"),
        ("config.yaml --beta -1", 2, "beta: must be a positive number"),
        ("config.yaml --max_steps 0", 2, "max_steps: must be at least 1"),
        ("config.yaml --loss_type sigmod", 2, "unknown objective 'sigmod' (did you mean 'sigmoid'?)"),
        ("config.yaml --diagnostics.kl_levl 1", 2, "unknown threshold 'kl_levl'"),
        ("config.yaml --train_data missing.jsonl", 2, "missing.jsonl: no such file"),
        ("config.yaml --eval_data ../missing", 2, "../missing: no such file"),
        ("config.yaml --model ./missing", 2, "model './missing': no such folder"),
        ("config.yaml --output_dir a", 2, "holds a finished run"),
        ("inspect config.yaml --model ./missing", 2, "model './missing': no such folder"),
        ("train.jsonl", 2, "train.jsonl: holds data, not settings; give it as --train_data train.jsonl"),
        ("compare", 2, "compare: no runs given; usage: dpo-train compare RUN RUN"),
        ("a", 2, "a: is a folder; expected a YAML file"),
        ("compare a nowhere", 2, "'nowhere': holds no run"),
        ("compare a b --sort", 2, "unknown option '--sort'"),
        ("init lroa", 2, "unknown case 'lroa' (did you mean 'lora'?)"),
        ("init lora", 0, "lora.yaml"),
        ("init lora full", 2, "init: takes one case and --output FILE, got 'lora full'"),
        ("init lora --output=mine.yaml", 0, "mine.yaml"),
        ("inspct config.yaml", 2, "'inspct': no such command or file (did you mean 'inspect'?)"),
        ("trian config.yaml", 2, "'trian': no such command or file (did you mean 'train'?)"),
        ("Compare a b", 2, "(did you mean 'compare'?)"),
        ("train config.yaml --beta high", 2, "beta: expected a number, got 'high'"),
    ],
)
def test_an_answer_needs_no_torch(here: Path, words: str, returned: int, said: str) -> None:
    code, loaded, lines, out = command(*words.split(), cwd=here)
    assert (code, loaded) == (returned, [])
    assert said in "\n".join([*lines, out])
    if code and words:
        assert len(lines) == 1
        assert out == ""


def test_a_comparison_s_table_comes_before_its_page(here: Path) -> None:
    code, loaded, lines, out = command("compare", "a", "b", hidden="matplotlib", cwd=here)
    assert out.splitlines()[0].split() == ["a", "b"]
    assert ["training", "loss", "0.5000", "0.2500"] in [line.split() for line in out.splitlines()]
    assert (code, loaded) == (2, [])
    assert lines == [
        "dpo-train: needs the package 'matplotlib', which is not installed; pip install 'dpo-kernels[trainer]'"
    ]


@pytest.mark.parametrize(
    "words", [["--help-all"], ["config.yaml", "--beta", "high"], ["compare", "a", "nowhere"]], ids=str
)
def test_an_answer_takes_less_than_half_a_second(here: Path, words: list[str]) -> None:
    """The limit is processor time, which does not depend on other load; the least of three runs counts."""
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        command(*words, cwd=here)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(seconds) < 0.5


def test_a_run_says_what_it_loads(here: Path) -> None:
    words = ("config.yaml", "--max_steps", "1", "--write_report", "false")
    code, loaded, lines, _ = command(*words, cwd=here)
    assert code == 0
    assert "torch" in loaded
    assert lines[0] == "loading torch and transformers"
    _, _, lines, _ = command(*words, "--json", "--output_dir", "other", cwd=here)
    assert "loading torch and transformers" not in lines


def test_without_words_it_says_in_eight_lines_what_it_does(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert len(shown.err.splitlines()) <= 8
    for word in ("--train_data", *COMMANDS, "--help"):
        assert word in shown.err


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--help"]) == 0
    assert capsys.readouterr().out.startswith(f"usage: dpo-train {name}")


def test_the_version_names_what_it_stands_on(capsys: pytest.CaptureFixture[str]) -> None:
    import torch
    import transformers

    import dpo_kernels

    assert main(["--version"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"dpo-kernels {dpo_kernels.__version__}",
        f"torch {torch.__version__}",
        f"transformers {transformers.__version__}",
        f"Python {sys.version.split()[0]}",
    ]


# --- init ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_init_writes_a_file_that_is_read_without_a_complaint(
    case: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["init", case, "--output", "new/mine.yaml"]) == 0
    assert "new/mine.yaml" in capsys.readouterr().out
    text = (here / "new" / "mine.yaml").read_text()
    settings, _ = settings_of(["new/mine.yaml"])
    assert settings["output_dir"] == f"runs/{case}"
    assert len(re.findall(r"^#", text, re.MULTILINE)) >= 15
    assert capsys.readouterr().err == ""
    assert ("lora" in settings) == (case == "lora")
    assert ("use_cpu" in settings) == (case == "small-cpu")
    assert ("torchrun" in text and "-m dpo_trainer.cli new/mine.yaml" in text) == (case == "multi-gpu")


def test_the_commands_in_a_file_of_init_can_be_pasted(here: Path) -> None:
    assert "dpo-train 'my runs/a.yaml'" in init([], Path("my runs/a.yaml"))
    assert "dpo-train inspect 'my runs/a.yaml' " in Path("my runs/a.yaml").read_text()


def test_init_overwrites_nothing(here: Path) -> None:
    init([], None)
    before = (here / "full.yaml").read_text()
    assert "one GPU" in before
    with pytest.raises(OutputError, match="exists; choose another name with --output"):
        init(["full"], None)
    assert (here / "full.yaml").read_text() == before


@pytest.mark.parametrize("case", ["small-cpu", "lora"])
def test_what_init_writes_trains(case: str, here: Path) -> None:
    init([case], None)
    assert main([f"{case}.yaml", "--use_cpu", "--max_steps", "2", "--write_report", "false", "--quiet"]) == 0
    saved = "adapter_model.safetensors" if case == "lora" else "model.safetensors"
    assert (here / "runs" / case / saved).exists()


# --- missing packages ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", TRAINER)
def test_a_missing_package_of_the_extra_is_told_with_the_command(module: str, here: Path) -> None:
    code, loaded, lines, _ = command("config.yaml", hidden=module, cwd=here)
    assert (code, loaded) == (2, [])
    assert lines == [
        f"dpo-train: the trainer needs packages that are not installed ({module}); pip install 'dpo-kernels[trainer]'"
    ]


def test_the_packages_of_the_extra_are_those_of_pyproject() -> None:
    text = (Path(__file__).resolve().parents[2] / "pyproject.toml").read_text()
    listed = re.findall(r'"([a-z0-9]+)>=', re.search(r"^trainer = \[(.*?)^\]", text, re.DOTALL | re.MULTILINE)[1])  # type: ignore[index]
    assert sorted("yaml" if name == "pyyaml" else name for name in listed) == sorted(TRAINER)


@pytest.mark.parametrize(
    ("words", "hidden", "said"),
    [
        (
            "--report_to wandb",
            "wandb",
            "report_to wandb: needs the package 'wandb', which is not installed; pip install wandb",
        ),
        ("--report_to [none,mlflow]", "mlflow", "report_to mlflow: needs the package 'mlflow'"),
        ("--report_to tensorboard", "tensorboard tensorboardX", "pip install tensorboard"),
        (
            "--deepspeed zero.json",
            "deepspeed",
            "deepspeed: needs the package 'deepspeed', which is not installed; pip install",
        ),
        ("--optim paged_adamw_8bit", "bitsandbytes", "optim paged_adamw_8bit: needs the package 'bitsandbytes'"),
        ("--optim adamw_torch_8bit", "torchao", "optim adamw_torch_8bit: needs the package 'torchao'"),
        ("--load_in_8bit true", "bitsandbytes", "quantization_config: needs the package 'bitsandbytes'"),
        ("--attn_implementation flash_attention_2", "flash_attn", "pip install flash-attn"),
        ("--use_liger_kernel", "liger_kernel", "pip install liger-kernel"),
        ("--model a.gguf", "gguf", "model 'a.gguf': needs the package 'gguf'"),
        ("--ref_model quantised", "bitsandbytes", "ref_model 'quantised': needs the package 'bitsandbytes'"),
    ],
)
def test_a_missing_package_of_a_setting_is_told_with_the_command(
    here: Path, words: str, hidden: str, said: str
) -> None:
    (here / "a.gguf").touch()
    (here / "quantised").mkdir()
    (here / "quantised" / "config.json").write_text('{"quantization_config": {"quant_method": "bitsandbytes"}}')
    code, loaded, lines, _ = command("config.yaml", *words.split(), hidden=hidden, cwd=here)
    assert (code, loaded) == (2, [])
    assert said in lines[-1]


def test_optimizers_and_trackers_are_those_of_transformers() -> None:
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
    from transformers.training_args import OptimizerNames

    names = [member.value for member in OptimizerNames]
    assert all(any(part in name for name in names) for part in OPTIMIZERS if part != "anyprecision")
    assert not any(
        part in name for part in OPTIMIZERS for name in ("adamw_torch", "adamw_torch_fused", "sgd", "adafactor")
    )
    assert set(TRACKERS) == set(INTEGRATION_TO_CALLBACK)


def test_what_a_library_does_not_find_is_told_with_the_command() -> None:
    assert line_of_error(ModuleNotFoundError("no", name="einops.layers")).endswith(
        "'einops', which is not installed; pip install einops"
    )
    said = "\nXProcessor requires the Torchvision library but it was not found in your environment.\nSee its page."
    assert line_of_error(ImportError(said)) == f"{said.splitlines()[1]}; pip install torchvision"
    assert line_of_error(ImportError("do: pip install x")) == "do: pip install x"


# --- doctor --------------------------------------------------------------------------------------------------------


def test_doctor_says_that_a_run_can_start(capfd: pytest.CaptureFixture[str]) -> None:
    code, _, _, out = command("doctor")
    assert code == 0
    assert out.splitlines()[-1] == "dpo-train can run"
    for word in (
        "torch ",
        "transformers ",
        "backend used for cpu tensors",
        "C++ ",
        "cache of libraries",
        "bitsandbytes",
    ):
        assert word in out
    assert re.search(r"^  cpu +baseline.*_cpu\..*\.so$", out, re.MULTILINE)


@pytest.mark.parametrize("module", ["transformers", "yaml", "torch"])
def test_doctor_names_what_is_missing_and_what_mends_it(module: str) -> None:
    code, _, _, out = command("doctor", hidden=module)
    assert code == 1
    package = "dpo-kernels" if module == "torch" else "'dpo-kernels[trainer]'"
    assert f"  {module} is not installed; pip install {package}" in out.splitlines()


def test_doctor_takes_no_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "now"]) == 2
    assert "doctor: unknown word 'now'" in capsys.readouterr().err


# --- settings that are read without transformers -------------------------------------------------------------------


def test_the_settings_of_transformers_are_read_from_its_source_as_they_are() -> None:
    import dataclasses
    import enum
    import typing

    from transformers import TrainingArguments

    def shape(hint: Any) -> Any:
        """A type, with enumerations replaced by their members and other classes by their names."""
        if isinstance(hint, type) and issubclass(hint, enum.Enum):
            return {member.name: member.value for member in hint}
        if args := typing.get_args(hint):
            return (typing.get_origin(hint), *(shape(arg) for arg in args))
        return hint.__name__ if isinstance(hint, type) else hint

    read = training_arguments()
    fields = {field.name: field for field in dataclasses.fields(TrainingArguments) if field.init}
    hints = typing.get_type_hints(TrainingArguments)
    assert list(read) == list(fields)
    for name, field in fields.items():
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        assert (read[name].default, read[name].help) == (default, field.metadata["help"]), name
        assert shape(read[name].hint) == shape(hints[name]), name
    assert read["optim"].hint != hints["optim"], "it was the source that was read"


def test_a_source_that_cannot_be_read_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    from dpo_trainer.settings import inherited

    def broken(folder: Path) -> Any:
        raise ValueError("another form")

    wanted = {name: (field.default, field.help) for name, field in training_arguments().items()}
    monkeypatch.setattr(inherited, "_read", broken)
    assert {name: (field.default, field.help) for name, field in training_arguments().items()} == wanted


def test_values_of_enumerations_become_text(here: Path) -> None:
    settings, _ = read_settings(["config.yaml", "--debug", "[underflow_overflow]", "--optim", "sgd"])
    assert (settings["debug"], settings["optim"]) == (["underflow_overflow"], "sgd")
    assert [type(settings["debug"][0]), type(settings["optim"])] == [str, str]
    with pytest.raises(ConfigError, match="debug: expected"):
        read_settings(["config.yaml", "--debug", "[overflow]"])
