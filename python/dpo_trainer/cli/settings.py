"""The settings of `dpo-train`: from a YAML file and the command line into the types of the table, and the help.

pydantic fits values to types. The words are read here, because no parser at hand does what is wanted of them.
HfArgumentParser knows no nested keys, and no type such as `str | list[str] | None`. tyro reads no YAML. jsonargparse reads
both, but it takes null for every type, and no number for text, no single word for a list and no 1e3 for an integer. To
mend that, and to translate its errors, takes as many lines as `_fit` and the loop in `read_settings`.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import enum
import functools
import json
import re
import shutil
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from ..errors import ConfigError, did_you_mean, first_line
from ..settings.config import RunSettings, settings_table
from ..settings.table import GROUPS

USAGE = "dpo-train [CONFIG.yaml] [--key value ...] [--resume | --overwrite]"
INSPECT = "dpo-train inspect [CONFIG.yaml] [--key value ...]"
COMPARE = "dpo-train compare RUN RUN ... [--output FILE]"
COMPARE_ABOUT = """\
Prints the last figures of 2 to 8 runs, each the output_dir of one, and the settings and data that differ. A star marks a
best that is better by more than two standard errors. Writes a page with their curves: comparison.html in the first
run's folder, unless --output names another file."""
ABOUT = """\
Trains a language model on preference pairs with Direct Preference Optimization. Settings come from the YAML file
and from the command line, which wins. Nested settings are written with dots, lists as '[a, b]'. Defaults stand in
brackets. Example:

  dpo-train --model ./my-model --train_data pairs.jsonl --output_dir runs/first --learning_rate 5e-6"""
MORE = "All settings of transformers.TrainingArguments may be given. --help-all lists them, and the rest of ours."

#: Keys of a run besides the fields of DPOConfig, and their help.
RUN_KEYS = {field.name: field.metadata["help"] for field in dataclasses.fields(RunSettings)}
#: Settings that may be paths, and how shtab is told to complete one (`shtab.FILE`).
_PATHS = ("model", "ref_model", "train_data", "eval_data", "output_dir", "ref_cache_dir")
_FILE = {"bash": "_shtab_compgen_files", "zsh": "_files", "tcsh": "f"}
REQUIRED = ("model", "train_data", "output_dir")
SWITCHES = {
    "--resume": "Go on from the last checkpoint in output_dir, also with other settings or other data than before.",
    "--overwrite": "Delete the run that output_dir holds.",
    "--quiet": "Print nothing but errors.",
    "--json": "Print one JSON object a line on standard output for every log, diagnosis, sample and the summary.",
    "--help": "Show the settings that most runs need.",
    "--help-all": "Show every setting, also those inherited from transformers.TrainingArguments.",
}


def read_settings(arguments: Sequence[str], required: Sequence[str] = REQUIRED) -> tuple[dict[str, Any], set[str]]:
    """Merge the YAML file and the command line into checked settings; also returns the switches given.

    Raises:
        ConfigError: an unknown key (with the nearest known one), a value of the wrong type, an unreadable file.
    """
    settings: dict[str, Any] = {}
    switches: set[str] = set()
    rest = list(arguments)
    if rest and not rest[0].startswith("-"):
        settings = read_yaml(rest.pop(0))
    known = hints()
    while rest:
        word = rest.pop(0)
        if word in SWITCHES:
            switches.add(word)
            continue
        if not word.startswith("--"):
            raise ConfigError(f"'{word}': expected --key value; a list is one word, '[a, b]' (usage: {USAGE})")
        key, equals, text = word[2:].partition("=")
        key = key.replace("-", "_")
        if not equals:
            if rest and not re.match(r"--[a-zA-Z]", rest[0]):
                text = rest.pop(0)
            elif bool in (known.get(key), *typing.get_args(known.get(key))):
                text = "true"
            else:
                raise ConfigError(f"--{key}: a value is missing")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            value = text
        _set(settings, key, value)
    settings = {key: check_setting(key, value, known) for key, value in settings.items()}
    for key in required:
        if settings.get(key) is None:
            raise ConfigError(f"{key}: not given; {RUN_KEYS[key][0].lower()}{RUN_KEYS[key][1:]}")
    return settings, switches


def read_yaml(path: str) -> dict[str, Any]:
    """The top-level mapping of a YAML file. Raises ConfigError naming file and line."""
    try:
        value = yaml.safe_load(Path(path).expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        hint = did_you_mean(path, ("inspect", "compare"))
        raise ConfigError(f"{path}: cannot be read ({error.strerror}){hint}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f":{mark.line + 1}" if mark is not None else ""
        raise ConfigError(f"{path}{place}: not YAML: {getattr(error, 'problem', None) or first_line(error)}") from error
    if not isinstance(value, dict | None):
        raise ConfigError(f"{path}: expected 'key: value' lines, found {type(value).__name__}")
    settings: dict[str, Any] = {}
    for key, item in (value or {}).items():
        _set(settings, str(key), item)
    return settings


def _set(settings: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    place = settings
    for parent in parents:
        inner = place.setdefault(parent, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"--{key}: '{parent}' is already set to {inner!r}")
        place = inner
    place[last] = value


def hints() -> dict[str, Any]:
    """Type of every key that may be set."""
    return {name: row.hint for name, row in settings_table().items()}


def check_setting(key: str, value: Any, hints: dict[str, Any]) -> Any:
    """The value in the type that the key wants. Raises ConfigError for an unknown key or a value that does not fit."""
    if key not in hints:
        raise ConfigError(f"unknown setting '{key}'{did_you_mean(key, hints)}")
    fitted, fits = _fit(value, hints[key])
    if not fits:
        raise ConfigError(f"{key}: expected {_describe(hints[key])}, got {value!r}")
    return fitted


def _fit(value: Any, hint: Any) -> tuple[Any, bool]:
    """(value in the hinted type, whether it fits). A single item stands for a list of one."""
    from pydantic import ConfigDict, ValidationError, create_model

    if isinstance(value, bytes | set):
        return value, False  # of YAML's own types; pydantic would make texts and lists of them
    if isinstance(value, dict) and dict in {typing.get_origin(kind) or kind for kind in (hint, *typing.get_args(hint))}:
        return value, True  # its keys and values are for whoever takes the mapping
    if value is False and any(member.value == "no" for choice in _enums(hint) for member in choice):
        value = "no"  # YAML reads no as false, and save_strategy: no is common
    if isinstance(value, str) and {int, float} & {hint, *typing.get_args(hint)}:
        with contextlib.suppress(ValueError):
            value = float(value)  # YAML reads 1e-5 as text
    config = ConfigDict(coerce_numbers_to_str=True, arbitrary_types_allowed=True, extra="forbid")
    model: Any = create_model("Setting", __config__=config, value=(hint, ...))
    for candidate in (value, [value]):
        with contextlib.suppress(ValidationError):
            fitted = model(value=candidate).value
            if _booleans(fitted) == _booleans(candidate):  # pydantic takes true for 1, and 1 for true
                return fitted, True
    return value, False


def _booleans(value: Any) -> list[bool]:
    """Of a value, or of each item of a list, whether it is a boolean."""
    return [isinstance(item, bool) for item in (value if isinstance(value, list) else [value])]


def _enums(hint: Any) -> list[Any]:
    """The enumerations that a value of the type may belong to."""
    choices = (hint, *typing.get_args(hint))
    return [choice for choice in choices if isinstance(choice, type) and issubclass(choice, enum.Enum)]


def _describe(hint: Any) -> str:
    """The type in words."""
    origin, choices = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        shown = _enums(hint) or [choice for choice in choices if choice is not type(None)]
        words = list(dict.fromkeys(map(_describe, shown)))
        return " or ".join(words + (["null"] if type(None) in choices else []))
    if origin is typing.Literal:
        return "one of " + ", ".join(map(str, choices))
    if hint is list or origin is list:
        return f"a list of {_describe((*choices, Any)[0])}"
    if _enums(hint):
        return "one of " + ", ".join(str(member.value) for member in hint)
    names = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "text",
        dict: "a mapping",
        Any: "anything",
    }
    return names.get(origin or hint, getattr(hint, "__name__", str(hint)))


def lora_config(values: dict[str, Any]) -> Any:
    """peft's LoraConfig from the `lora` mapping. Raises ConfigError for keys and values it does not take."""
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ConfigError("lora: needs the package 'peft', which is not installed") from error
    types_of = typing.get_type_hints(LoraConfig)
    hints = {f"lora.{item.name}": types_of[item.name] for item in dataclasses.fields(LoraConfig) if item.init}
    fitted = {key: check_setting(f"lora.{key}", value, hints) for key, value in values.items()}
    try:
        return LoraConfig(**{"task_type": "CAUSAL_LM", **fitted})
    except (ValueError, TypeError) as error:
        raise ConfigError(f"lora: {first_line(error)}") from error


def help_parser(*, everything: bool = True) -> argparse.ArgumentParser:
    """A parser of every setting in its group, or of the common ones. It writes the help, and shtab makes completions of it."""
    width = min(shutil.get_terminal_size((100, 24)).columns, 110)
    parser = argparse.ArgumentParser(
        "dpo-train",
        usage=f"{USAGE}\n       {INSPECT}\n       {COMPARE}",
        description=ABOUT,
        epilog=None if everything else MORE,
        add_help=False,
        formatter_class=functools.partial(argparse.RawDescriptionHelpFormatter, max_help_position=34, width=width),
    )
    config = parser.add_argument("config", nargs="?", help=argparse.SUPPRESS)
    config.complete = _FILE  # type: ignore[attr-defined]
    for key, title in {**GROUPS, "": "Other settings of transformers.TrainingArguments"}.items():
        group = parser.add_argument_group(title)
        for row in settings_table().values():
            if row.group == key and (everything or row.common):
                default = "" if row.default is None else f" [{json.dumps(row.default, default=str)}]"
                said = f"{row.help}{default}".replace("%", "%%")
                option = group.add_argument(f"--{row.name}", metavar="", help=said, choices=tuple(row.choices) or None)
                if row.name in _PATHS:
                    option.complete = _FILE  # type: ignore[attr-defined]
    switches = parser.add_argument_group("Switches")
    for word, text in SWITCHES.items():
        switches.add_argument(word, action="store_true", help=text)
    return parser
