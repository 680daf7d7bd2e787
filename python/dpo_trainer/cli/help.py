"""The help of `dpo-train`: the first lines, the help pages, the versions, and suggestions for a mistyped command."""

from __future__ import annotations

import argparse
import functools
import json
import platform
import shutil
from pathlib import Path

from dpo_kernels import __version__

from ..errors import ConfigError, did_you_mean
from ..settings.rows import settings_table
from ..settings.table import GROUPS, HELP, Setting
from .settings import SWITCHES, USAGE

INSPECT = "dpo-train inspect [CONFIG.yaml] [--key value ...]"
INIT = "dpo-train init [CASE] [--output FILE]"
COMPARE = "dpo-train compare RUN RUN ... [--output FILE]"
DOCTOR = "dpo-train doctor"
#: The commands with their own help: usage and description.
COMMANDS = {
    "inspect": (
        INSPECT,
        """\
Shows the data that a run would train on, and its expected memory and time. Trains nothing and writes nothing. Takes the
same settings as dpo-train; output_dir may be left out.""",
    ),
    "init": (
        INIT,
        """\
Writes a YAML file with comments for a case: full (the whole model on one GPU, the default), lora, small-cpu or multi-gpu.
The file is CASE.yaml, unless --output names another file. An existing file is not overwritten.""",
    ),
    "compare": (
        COMPARE,
        """\
Prints the last figures of 2 to 8 runs, and the settings and data that differ. RUN is a run's output_dir. A star marks a
best figure that is better than the rest by more than two standard errors. Writes a page with the runs' curves:
comparison.html in the first run's folder, unless --output names another file.""",
    ),
    "doctor": (
        DOCTOR,
        """\
Shows devices, backends, libraries, versions and what is missing, with the command that installs it. Exit code: 0 if
a run can start, else 1.""",
    ),
}
START = """\
dpo-train trains a language model on preference pairs with Direct Preference Optimization.
  dpo-train --model MODEL --train_data PAIRS.jsonl --output_dir RUN   train: a folder or hub name, a file, a new folder
  dpo-train init           write a YAML file with comments (full, lora, small-cpu, multi-gpu); then: dpo-train FILE.yaml
  dpo-train inspect ...    show a run's data, and its expected memory and time
  dpo-train doctor         show devices, backends, versions and what is missing
  dpo-train compare RUN RUN   compare runs
  dpo-train --help         the settings that most runs need (--help-all: every setting)"""
ABOUT = """\
Trains a language model on preference pairs with Direct Preference Optimization. Settings come from the YAML file
and from the command line, which overrides the file. Nested settings are written with dots, lists as '[a, b]'. Defaults
are in brackets. Names from other tools (--lr, --epochs) are understood. Example:

  dpo-train --model ./my-model --train_data pairs.jsonl --output_dir runs/first --learning_rate 5e-6"""
MORE = "All settings of transformers.TrainingArguments are accepted. --help-all lists every setting."

#: Settings that may be paths, and how shtab is told to complete one (`shtab.FILE`).
_PATHS = ("model", "ref_model", "train_data", "eval_data", "output_dir", "ref_cache_dir")
_FILE = {"bash": "_shtab_compgen_files", "zsh": "_files", "tcsh": "f"}


def versions() -> str:
    """Versions of dpo-kernels, torch, transformers and Python, one per line. Imports none of these packages."""
    found = [
        f"dpo-kernels {__version__}",
        *map(_version, ("torch", "transformers")),
        f"Python {platform.python_version()}",
    ]
    return "\n".join(found)


def _version(name: str) -> str:
    from importlib import metadata

    try:
        return f"{name} {metadata.version(name)}"
    except metadata.PackageNotFoundError:
        return f"{name} is not installed"


def about(command: str) -> str:
    """The help of a command in COMMANDS."""
    usage, text = COMMANDS[command]
    return f"usage: {usage}\n\n{text}"


def check_command(word: str) -> None:
    """Raise ConfigError for a word that is neither a command nor a file, but similar to a command."""
    known = (*COMMANDS, "help", "train")
    if word in known or word.startswith("-") or Path(word).exists():
        return
    if near := did_you_mean(word.lower(), known):
        raise ConfigError(f"'{word}': no such command or file{near}")


def help_parser(*, everything: bool = True) -> argparse.ArgumentParser:
    """A parser of every setting in its group, or of those in HELP. It writes the help, and shtab makes completions."""
    width = min(shutil.get_terminal_size((100, 24)).columns, 110)
    parser = argparse.ArgumentParser(
        "dpo-train",
        usage="\n       ".join([USAGE, *(usage for usage, _ in COMMANDS.values())]),
        description=ABOUT,
        epilog=None if everything else MORE,
        add_help=False,
        formatter_class=functools.partial(argparse.RawDescriptionHelpFormatter, max_help_position=34, width=width),
    )
    config = parser.add_argument("config", nargs="?", help=argparse.SUPPRESS)
    config.complete = _FILE  # type: ignore[attr-defined]
    table = settings_table()
    if everything:
        titles = {**GROUPS, "": "Other settings of transformers.TrainingArguments"}
        sections = {title: [row for row in table.values() if row.group == key] for key, title in titles.items()}
    else:
        sections = {title: [table[name] for name in names] for title, names in HELP.items()}
    for title, rows in sections.items():
        group = parser.add_argument_group(title)
        for row in rows:
            _add(group, row)
    switches = parser.add_argument_group("Switches")
    for word, text in SWITCHES.items():
        switches.add_argument(word, action="store_true", help=text)
    return parser


def _add(group: argparse._ArgumentGroup, row: Setting) -> None:
    default = "" if row.default is None else f" [{json.dumps(row.default, default=str)}]"
    said = f"{row.help}{default}".replace("%", "%%")
    option = group.add_argument(f"--{row.name}", metavar="", help=said, choices=tuple(row.choices) or None)
    if row.name in _PATHS:
        option.complete = _FILE  # type: ignore[attr-defined]
