"""The settings of `dpo-train`: from a YAML file and the command line into the types of the table.

pydantic fits values to types. The words are read here, because no parser at hand does what is wanted of them.
HfArgumentParser knows no nested keys, and no type such as `str | list[str] | None`. tyro reads no YAML. jsonargparse reads
both, but it takes null for every type, and no number for text, no single word for a list and no 1e3 for an integer. To
work around that, and to translate its errors, takes as many lines as `_fit` and the loop in `read_settings`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import re
import sys
import types
import typing
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ..data import FORMATS
from ..errors import ConfigError, did_you_mean, first_line
from ..settings.aliases import ALIASES, objective_of, setting_of
from ..settings.fields import RunSettings
from ..settings.rows import settings_table
from ..watch.signals import is_first

USAGE = "dpo-train [CONFIG.yaml] [--key value ...] [--resume | --overwrite]"

#: Settings of a run that are not fields of DPOConfig, with their help.
RUN_KEYS = {field.name: field.metadata["help"] for field in dataclasses.fields(RunSettings)}
REQUIRED = ("model", "train_data", "output_dir")
SWITCHES = {
    "--resume": "Resume from the last checkpoint in output_dir, even if settings or data have changed.",
    "--overwrite": "Delete the run in output_dir.",
    "--quiet": "Print only errors.",
    "--json": "Print every log, diagnosis, sample and the summary as a line of JSON on standard output.",
    "--help": "Show the settings that most runs need.",
    "--help-all": "Show every setting, including those of transformers.TrainingArguments.",
    "--version": "Show the versions of dpo-kernels, torch, transformers and Python.",
}


def read_settings(arguments: Sequence[str], required: Sequence[str] = REQUIRED) -> tuple[dict[str, Any], set[str]]:
    """Merge the YAML file and the command line into checked settings. Also returns the given switches.

    Names from other tools are replaced by ours. A line on standard error reports each, unless --quiet or --json is given.

    Raises:
        ConfigError: a key is unknown, a required key is missing, a value has the wrong type, or the file cannot be read.
    """
    rest = list(arguments)
    file = Given("", read_yaml(rest.pop(0)) if rest and not rest[0].startswith("-") else ())
    known = hints()
    words, switches = _read_words(rest, known)
    line = Given("--", words)
    settings: dict[str, Any] = {}
    for given in (file, line):
        # A mapping before what is added to it: in YAML the order means nothing.
        for key, value in sorted(given.ours(known), key=lambda item: item[0].count(".")):
            _set(settings, key, value)
    settings = {key: check_setting(key, value, known) for key, value in settings.items()}
    if settings.get("lora") is None:
        settings.pop("lora", None)
    for key in required:
        if settings.get(key) is None:
            raise ConfigError(f"{key}: not given; {RUN_KEYS[key][0].lower()}{RUN_KEYS[key][1:]}")
    if switches.isdisjoint({"--quiet", "--json"}) and is_first():
        for text in (*file.told, *line.told):
            print(text, file=sys.stderr)
    return settings, switches


class Given:
    """The settings from one source: the file or the command line.

    Attributes:
        told: a line for each name that is another tool's.
    """

    def __init__(self, mark: str, items: Iterable[tuple[str, Any]]) -> None:
        self.mark, self.items = mark, list(items)
        self.told: list[str] = []

    def ours(self, known: Iterable[str]) -> Iterator[tuple[str, Any]]:
        """The settings by our names. Raises ConfigError if two names mean the same setting."""
        given: dict[str, str] = {}
        nulls: dict[str, str] = {}
        for key, value in self.items:
            if key in ("use_peft", "use_lora") and value is False:
                nulls["lora"] = f"{key}: false"
                yield "lora", None
            setting = setting_of(key, value, known)
            if setting is None:
                self.told.append(f"{self.mark}{key} is not needed")
                continue
            if setting != key:
                self.told.append(f"{self.mark}{key} is read as {setting}")
            if given.setdefault(setting, key) != key:
                raise ConfigError(
                    f"{self.mark}{given[setting]} and {self.mark}{key} are the same setting; give one of them"
                )
            if value is None:
                nulls[setting] = f"{key}: null"
            if setting == "loss_type":
                value = self._objectives(value)
            yield setting, value
        for setting, key in given.items():
            null = nulls.get(setting.partition(".")[0])
            if null is not None and null != f"{key}: null":
                raise ConfigError(f"{self.mark}{key} contradicts {self.mark}{null}; give one of them")

    def _objectives(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self._objectives(entry) for entry in value]
        if not isinstance(value, str) or (ours := objective_of(value)) == value:
            return value
        self.told.append(f"loss_type {value} is read as {ours}")
        return ours


def _read_words(rest: list[str], known: Mapping[str, Any]) -> tuple[list[tuple[str, Any]], set[str]]:
    """(key, value) of each setting on the command line, and the switches. Raises ConfigError for other arguments."""
    found: list[tuple[str, Any]] = []
    switches: set[str] = set()
    while rest:
        word = rest.pop(0)
        if word in SWITCHES:
            switches.add(word)
            continue
        if not word.startswith("--"):
            raise ConfigError(f"'{word}': expected --key value; a list is one word, '[a, b]' (usage: {USAGE})")
        key, equals, text = word[2:].partition("=")
        key = key.replace("-", "_")
        hint = known.get(ALIASES.get(key, key))
        if not equals:
            if rest and not re.match(r"--[a-zA-Z]", rest[0]):
                text = rest.pop(0)
            elif hint is None or bool in (hint, *typing.get_args(hint)):
                text = "true"
            else:
                raise ConfigError(f"--{key}: a value is missing")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            value = text
        found.append((key, value))
    return found, switches


def read_yaml(path: str) -> list[tuple[str, Any]]:
    """(key, value) of a YAML file's top-level mapping. Raises a ConfigError that names file and line."""
    if (ending := Path(path).suffix) in FORMATS and ending != ".json":
        raise ConfigError(f"{path}: holds data, not settings; give it as --train_data {path}")
    if Path(path).expanduser().is_dir():
        raise ConfigError(f"{path}: is a folder; expected a YAML file (dpo-train compare takes folders of runs)")
    try:
        value = yaml.safe_load(Path(path).expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f":{mark.line + 1}" if mark is not None else ""
        raise ConfigError(f"{path}{place}: not YAML: {getattr(error, 'problem', None) or first_line(error)}") from error
    if not isinstance(value, dict | None):
        raise ConfigError(f"{path}: expected 'key: value' lines, found {type(value).__name__}")
    return [(str(key), item) for key, item in (value or {}).items()]


def _set(settings: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    place = settings
    for parent in parents:
        inner = place[parent] = {} if place.get(parent) is None else place[parent]
        if not isinstance(inner, dict):
            raise ConfigError(f"--{key}: '{parent}' is already set to {inner!r}")
        place = inner
    place[last] = value


def hints() -> dict[str, Any]:
    """The type of every setting, by name."""
    return {name: row.hint for name, row in settings_table().items()}


def check_setting(key: str, value: Any, hints: dict[str, Any]) -> Any:
    """The value converted to the setting's type. Raises ConfigError for an unknown key or a value of another type."""
    if key not in hints:
        raise ConfigError(f"unknown setting '{key}'{did_you_mean(key, hints)}")
    fitted, fits = _fit(value, hints[key])
    if not fits:
        raise ConfigError(f"{key}: expected {_describe(hints[key])}, got {value!r}")
    return fitted


def _fit(value: Any, hint: Any) -> tuple[Any, bool]:
    """(value in the hinted type, whether it fits). A single item becomes a list of one."""
    if isinstance(value, bytes | set):
        return value, False  # YAML has these types, and pydantic would convert them to texts and lists
    if isinstance(value, dict) and dict in {typing.get_origin(kind) or kind for kind in (hint, *typing.get_args(hint))}:
        return value, True  # keys and values are checked where the mapping is used
    if value is False and any(member.value == "no" for choice in _enums(hint) for member in choice):
        value = "no"  # YAML reads no as false, and save_strategy: no is common
    if isinstance(value, str) and {int, float} & {hint, *typing.get_args(hint)}:
        with contextlib.suppress(ValueError):
            value = float(value)  # YAML reads 1e-5 as text
    if not isinstance(value, list) and type(value) in _choices(hint):
        return value, True
    from pydantic import ConfigDict, ValidationError, create_model  # the import takes as long as everything else here

    config = ConfigDict(coerce_numbers_to_str=True, arbitrary_types_allowed=True, extra="forbid")
    model: Any = create_model("Setting", __config__=config, value=(hint, ...))
    for candidate in (value, [value]):
        with contextlib.suppress(ValidationError):
            fitted = model(value=candidate).value
            if _booleans(fitted) == _booleans(candidate):  # pydantic converts true to 1 and 1 to true
                return _plain(fitted), True
    return value, False


def _choices(hint: Any) -> tuple[Any, ...]:
    """The types of a union, else the type alone."""
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _plain(value: Any) -> Any:
    """The values of enumerations as texts, because the table's enumerations are copies of transformers' own."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value.value if isinstance(value, enum.Enum) else value


def _booleans(value: Any) -> list[bool]:
    """Whether a value, or each item of a list, is a boolean."""
    return [isinstance(item, bool) for item in (value if isinstance(value, list) else [value])]


def _enums(hint: Any) -> list[Any]:
    """The enumerations among the types of a hint."""
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


def check_lora_names(values: Iterable[str], known: Collection[str]) -> None:
    """Raise ConfigError for a key of `lora` that peft's LoraConfig does not have."""
    for key in values:
        if key not in known:
            if (called := ALIASES.get(key, "")).startswith("lora."):
                raise ConfigError(f"lora.{key}: is called {called}")
            raise ConfigError(
                f"unknown setting 'lora.{key}'{did_you_mean(f'lora.{key}', [f'lora.{k}' for k in known])}"
            )


def lora_config(values: dict[str, Any]) -> Any:
    """peft's LoraConfig from the setting `lora`. Raises ConfigError for keys and values that it does not accept."""
    from peft import LoraConfig

    types_of = typing.get_type_hints(LoraConfig)
    hints = {f"lora.{item.name}": types_of[item.name] for item in dataclasses.fields(LoraConfig) if item.init}
    check_lora_names(values, {item.removeprefix("lora.") for item in hints})
    fitted = {key: check_setting(f"lora.{key}", value, hints) for key, value in values.items()}
    try:
        return LoraConfig(**{"task_type": "CAUSAL_LM", **fitted})
    except (ValueError, TypeError) as error:
        raise ConfigError(f"lora: {first_line(error)}") from error
