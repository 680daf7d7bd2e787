"""Every code block of README, docs and examples does what it says.

The blocks of a page run one after the other in one folder, as a reader would paste them. Python runs unchanged, in a namespace
of its own; `dpo-train` runs on a tiny model with the name that the page uses; the trainer's reader reads YAML, and its loader
JSON rows. Blocks that cannot run here are checked as far as possible, or are in UNCHECKED with the reason.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from frameworks import matrix
from packaging.requirements import Requirement

from dpo_kernels.__main__ import main as show_backends
from dpo_kernels.integrations import trl
from dpo_trainer import load_pairs
from dpo_trainer.cli.main import main
from dpo_trainer.cli.settings import read_settings
from hub import build

from .tiny import build_pairs
from docs_pages import PAGES, ROOT, Block, blocks, indented_code, name_of, prose

#: Languages of blocks that are not run.
NOT_CODE = {"text": "a drawing, a formula or an output", "bibtex": "an entry for a bibliography"}
#: First words of commands that are not run, and why.
UNCHECKED = {
    "git": "needs the network",
    "open": "shows a file on a screen; that the file is there is checked",
    "eval": "completes words by shtab, which is no dependency (tests/trainer/test_cli.py has the parser)",
    "source": "changes the reader's shell",
    "pre-commit": "changes the repository's hooks",
    "swift": "ms-swift's command; tests/test_integrations_ms_swift.py runs it",
    "tune": "torchtune's command needs a model from a hub; tests/frameworks/steps/torchtune.py runs the recipe",
    "kernel-builder": "uploads to the Hub, and is no Python package",
}
#: Commands that bash runs, in the page's folder.
BASH = {"cat", "echo", "mkdir", "cd", "head", "export"}
#: Launchers: words before a command that start it in other processes. The started module is checked; test_launchers runs two.
LAUNCHERS = {"torchrun", "accelerate", "srun"}
#: Verbs of dpo-train that train nothing.
VERBS = {"inspect", "compare", "init", "doctor"}
EXTRAS = re.findall(
    r"^(\w+) = \[",
    (ROOT / "pyproject.toml").read_text().partition("optional-dependencies]")[2].partition("\n[")[0],
    re.M,
)


def commands(text: str) -> Iterator[str]:
    """The commands of a shell block: lines, with continuation lines joined, and the text of their here-documents (`<<END`)."""
    lines = iter(text.splitlines())
    for line in lines:
        while line.endswith("\\"):
            line = line[:-1] + next(lines)
        if handed := re.search(r"<<-?\s*['\"]?(\w+)", line):
            for inner in lines:
                line += "\n" + inner
                if inner.strip() == handed.group(1):
                    break
        if line.strip() and not line.lstrip().startswith("#"):
            yield line.strip()


def check_launch(words: list[str]) -> list[str]:
    """The words after `-m dpo_trainer.cli` of a launcher's command: they are checked as the trainer reads them."""
    place = words.index("-m")
    assert importlib.util.find_spec(words[place + 1]) is not None, f"no module {words[place + 1]}"
    read_settings(words[place + 2 :])
    return words[place + 2 :]


def check_pip(words: list[str]) -> None:
    """`pip install` names extras that exist and valid package names."""
    assert words[:1] == ["install"]
    for word in words[1:]:
        if word.startswith("-"):
            assert word in ("-e", "--editable", "--no-deps", "--no-build-isolation", "--upgrade", "-U"), word
        elif word.startswith("."):
            extras = re.fullmatch(r"\.(?:\[([\w,]+)\])?", word)
            assert extras, word
            assert set((extras.group(1) or "").split(",")) - {""} <= set(EXTRAS), word
        else:
            asked = Requirement(word)
            assert asked.name != "dpo-kernels" or asked.extras <= set(EXTRAS), word


def check_flags(words: list[str], sources: list[Path]) -> None:
    """Every option of a command occurs in its sources."""
    text = "".join(path.read_text(encoding="utf-8") for path in sources)
    for word in words:
        flag = word.partition("=")[0]
        assert not flag.startswith("--") or f'"{flag}"' in text, f"{flag} is no option of {sources[0].name}"


def run_python(words: list[str]) -> None:
    """`python FILE` or `python -m MODULE` exists and accepts these options. `python -m dpo_kernels` is run."""
    if words == ["-m", "dpo_kernels"]:
        assert show_backends([]) == 0
    elif words[0] == "-m":
        spec = importlib.util.find_spec(words[1])
        assert spec is not None, f"no module {words[1]}"
        assert spec.origin is not None
        if Path(spec.origin).is_relative_to(ROOT):
            main_file = Path(spec.origin).with_name("__main__.py") if spec.submodule_search_locations else None
            check_flags(words[2:], [main_file or Path(spec.origin)])
        elif words[1] == "pytest":
            check_pytest(words[2:])
    else:
        assert words[0].endswith(".py"), words
        sources = [ROOT / words[0], *(ROOT / words[0]).parent.parent.glob("*.py")]
        check_flags(words[1:], sources)


def check_pytest(words: list[str]) -> None:
    """The files exist, and the options are those of pytest or of the benchmarks."""
    taken = {"-m", "-k", "-n", "--sizes", "--report", "--peers", "--dtype", "--device", "--pairs"}
    check_flags([word for word in words if word not in ("-q", "-x", "-v")], [ROOT / "benchmarks/conftest.py"])
    values = {place + 1 for place, word in enumerate(words) if word in taken}
    for place, word in enumerate(words):
        if place not in values and not word.startswith("-"):
            assert (ROOT / word).exists(), word


def run_command(command: str, page: str) -> None:
    """Run one command of a shell block, or check it."""
    words = shlex.split(command, comments=True)
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words.pop(0)  # an environment variable for the command
    if not words or re.match(r"\w+=\$\(", command):
        return
    first, rest = words[0].rpartition("/")[2], words[1:]
    if first in BASH:
        assert first != "cd" or page == "README.md", "a page's commands run in one folder"
        if first != "cd":
            subprocess.run(["bash", "-ec", command], check=True, env={**os.environ, "PATH": os.environ["PATH"]})
    elif first == "dpo-train":
        trains = bool(rest) and rest[0] not in VERBS and not {"--help", "--help-all", "--version"} & set(rest)
        assert main([*rest, "--use_cpu"] if trains else rest) == (0 if rest else 2)
    elif first in ("python", "python3"):
        run_python(rest)
    elif first == "pytest":
        check_pytest(rest)
    elif first == "pip":
        check_pip(rest)
    elif first == "make":
        subprocess.run(["make", "--dry-run", "--silent", *rest], cwd=ROOT, check=True, capture_output=True)
    elif first in LAUNCHERS:
        check_launch(words)
    else:
        assert first in UNCHECKED, f"nothing checks '{command}'"
        if first == "open":
            assert Path(rest[0]).is_file(), f"{rest[0]} is not there after the commands before"


def rows_of(text: str) -> Iterator[object]:
    """The JSON values of a block; each is on one line or on several lines."""
    while text := text.lstrip():
        row, end = json.JSONDecoder().raw_decode(text)
        yield row
        text = text[end:]


def run_block(block: Block) -> None:
    """Run or check one block in the working directory."""
    if block.language == "python":
        exec(compile(block.text, str(block), "exec"), {"__name__": "__main__"})
    elif block.language in ("bash", "shell", "sh"):
        text = re.sub(r"<[a-z ]+>", "FILLED_IN", block.text)  # placeholders, such as <this repository>
        subprocess.run(["bash", "-n"], input=text, text=True, check=True)
        for command in commands(text):
            run_command(command, block.page)
    elif block.language in ("yaml", "yml"):
        name = re.match(r"# (\S+\.ya?ml)\n", block.text)
        place = Path(name.group(1) if name else "block.yaml")
        place.write_text(block.text, encoding="utf-8")
        read_settings([str(place)], required=())
    elif block.language in ("json", "jsonl"):
        rows = list(rows_of(block.text))
        Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        assert len(load_pairs("rows.jsonl")) == len(rows) > 0
    elif block.language == "diff":
        exec("\n".join(line[1:] for line in block.text.splitlines() if line[0] in "+ "), {})
    else:
        assert block.language in NOT_CODE, f"the fence has the language '{block.language}', which nothing checks"


def set_up(folder: Path, text: str, model: Path) -> None:
    """Make the files that a reader already has: the models and data that the page names and does not make."""
    made = set(re.findall(r"output_dir(?: |: |=)['\"]?([\w./-]+)", text))
    for name in re.findall(
        r"(?:--model[ =]|\bmodel: |(?:DPOTrainer|from_pretrained|load_model)\(\s*['\"])([\w./-]+)", text
    ):
        if name not in made and not (folder / name).exists():
            shutil.copytree(model, folder / name)
    for seed, name in enumerate(re.findall(r"(?:train|eval)_data(?: |: |=)([\w./-]+\.jsonl)", text)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in build_pairs(16, seed)), encoding="utf-8")


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=name_of)
def test_every_block_does_what_it_says(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, model_folder: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["python"])
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    set_up(tmp_path, page.read_text(encoding="utf-8"), model_folder)
    request.addfinalizer(trl.PATCH.undo)  # for blocks that patch TRL
    if page.name == "hub.md":  # its reader has `kernels`, and the Hub has the kernel
        monkeypatch.syspath_prepend(matrix.folder("kernels==0.17.2"))
        monkeypatch.setenv("LOCAL_KERNELS", f"somebody/dpo-kernels={tmp_path / 'kernel'}")
        build.write(tmp_path / "kernel")
    framework = page.stem if page.parent.name == "migration" else None
    entry = next((entry for entry in matrix.ENTRIES if entry.sample and entry.framework == framework), None)
    for block in blocks(page):
        print(f"\n--- the block at {block}")  # pytest's output then shows which block failed
        if entry is not None and block.language == "python":
            # In a process of its own: the framework's packages must not be imported beside those of the environment.
            command = [sys.executable, "-W", "error:dpo_kernels:RuntimeWarning", "-c", block.text]
            subprocess.run(command, env=matrix.environment(entry), check=True)
        else:
            run_block(block)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_block_says_its_language(page: Path) -> None:
    assert [str(block) for block in blocks(page) if not block.language] == []
    assert indented_code(prose(page)) == [], "code by indentation has no language: use a fence"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_targets_of_make_that_the_text_names_exist(page: Path) -> None:
    named = {target for _, line in prose(page) for target in re.findall(r"`make ([a-z-]+)", line)}
    rules = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert named <= set(rules)


@pytest.mark.parametrize(
    ("language", "text"),
    [
        ("python", "print(undefined)"),
        ("yaml", "learning_rat: 1"),
        ("json", '{"prompt": "a", "chosen": "b"}'),
        ("bash", "dpo-train --no_such_setting 1"),
        ("bash", "echo 'an open quote"),
        ("bash", "false"),
        ("bash", "open runs/report.html"),
        ("bash", "make no-such-target"),
        ("bash", 'pip install ".[no_such_extra]"'),
        ("bash", "python examples/no_such.py"),
        ("bash", "python examples/sentiment/run.py --no-such-option"),
        ("bash", "python -m benchmarks.no_such"),
        ("bash", "pytest benchmarks/no_such.py"),
        ("bash", "torchrun --nproc-per-node 2 -m dpo_trainer.cli gone.yaml"),
        ("brainfuck", "+"),
    ],
)
def test_a_block_that_is_wrong_is_noticed(
    language: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises((Exception, SystemExit)):
        run_block(Block("page.md", 1, language, text + "\n"))


@pytest.mark.slow
def test_the_launchers_of_the_page_train_on_two_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_folder: Path
) -> None:
    """torchrun and Accelerate run the commands of docs/command-line.md on two CPU processes."""
    monkeypatch.chdir(tmp_path)
    page = ROOT / "docs" / "command-line.md"
    set_up(tmp_path, page.read_text(encoding="utf-8"), model_folder)
    ran = set()
    for block in blocks(page):
        if block.language == "yaml":
            run_block(block)
        launches = [command for command in commands(block.text) if command.startswith(("torchrun", "accelerate"))]
        for command in launches if block.language == "bash" else []:
            launcher, *words = shlex.split(command)
            if launcher == "accelerate":
                words.insert(1, "--cpu")
            program = str(Path(sys.executable).with_name(launcher))
            path = os.pathsep.join([str(ROOT), str(ROOT / "python")])
            subprocess.run(
                [program, *words, "--use_cpu", "--output_dir", f"runs/{launcher}"],
                check=True,
                env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
                timeout=300,
            )
            ran.add(launcher)
            assert Path(f"runs/{launcher}/model.safetensors").is_file()
    assert ran == {"torchrun", "accelerate"}


def test_the_notebook_runs_from_top_to_bottom(capsys: pytest.CaptureFixture[str]) -> None:
    """The notebook's cells run in order in one namespace; the notebook is stored without outputs."""
    notebook = json.loads((ROOT / "examples" / "dpo_in_ten_minutes.ipynb").read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["outputs"] for cell in cells] == [[]] * len(cells)
    namespace: dict[str, object] = {"__name__": "__main__"}
    for cell in cells:
        exec(compile("".join(cell["source"]), f"notebook {cell['id']}", "exec"), namespace)
    shown = capsys.readouterr().out
    assert "the loss is 0.6931 = log 2" in shown
    evaluations = [record for record in namespace["records"] if "eval_loss" in record]  # type: ignore[attr-defined]
    assert evaluations[-1]["eval_rewards/accuracies"] > 0.9
    assert Path(str(namespace["folder"]), "report.html").is_file()
