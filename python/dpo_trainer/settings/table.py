"""The rows of the table of settings. Checks, command line and docs use the table.

A row has a setting's name, type, default, range or choices, help and group.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError, did_you_mean

#: Titles of the groups, in the order in which help shows them.
GROUPS = {
    "run": "The run",
    "optimizer": "The optimizer",
    "objective": "The objective",
    "data": "The data",
    "model": "The models",
    "kernels": "The kernels",
    "watch": "What is watched",
}
#: The settings that `--help` shows, by section.
HELP = {
    "Start here": (
        "model",
        "train_data",
        "eval_data",
        "val_split",
        "output_dir",
        "lora",
        "learning_rate",
        "num_train_epochs",
        "max_steps",
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "max_length",
        "bf16",
    ),
    "Data": ("columns", "weight_from", "max_prompt_length", "truncation_mode", "filters", "streaming"),
    "Objective": ("beta", "loss_type", "loss_weights", "label_smoothing"),
    "Reference": ("ref_model", "precompute_ref_log_probs", "sync_ref_model"),
    "Memory": ("gradient_checkpointing", "max_tokens", "memory_budget", "model_init_kwargs"),
    "Watching": ("eval_steps", "save_steps", "logging_steps", "report_to", "sample_prompts", "diagnostics", "stop_on"),
}
SHOWN = frozenset(name for names in HELP.values() for name in names)


@dataclass(frozen=True)
class Range:
    """The condition on a number: in words, and as a function that tells whether a value meets it."""

    words: str
    holds: Callable[[float], bool]


ANY = Range("must be a number", lambda _: True)
POSITIVE = Range("must be positive", lambda value: value > 0)
NOT_NEGATIVE = Range("must not be negative", lambda value: value >= 0)
FINITE_POSITIVE = Range("must be a positive number", lambda value: 0 < value < math.inf)
FINITE_NOT_NEGATIVE = Range("must not be negative", lambda value: 0 <= value < math.inf)
PROBABILITY = Range("a probability lies in (0, 1)", lambda value: 0 < value < 1)
SHARE = Range("must lie in [0, 1]", lambda value: 0 <= value <= 1)
POSITIVE_SHARE = Range("must lie in (0, 1]", lambda value: 0 < value <= 1)
DECAY = Range("must lie in [0, 1)", lambda value: 0 <= value < 1)
COUNT = Range("must be a whole number from 1", lambda value: value >= 1 and value % 1 == 0)
INTERVAL = Range(
    "must be a number of steps, or a share of the run below 1", lambda value: 0 < value < 1 or value % 1 == 0 < value
)
SEED = Range("must lie in [0, 2**32)", lambda value: 0 <= value < 2**32)


def at_least(least: float) -> Range:
    """The range of numbers from `least` upwards."""
    return Range(f"must be at least {least}", lambda value: value >= least)


@dataclass(frozen=True)
class Setting:
    """A row of the table.

    Attributes:
        rule: the range of its numbers.
        group: a key of GROUPS, or "" for the rest of TrainingArguments.
        choices: the texts that are allowed for the setting, or for its items if it is a list.
        called: the word for a choice in an error message.
        name: of the dataclass field, as `hint` and `default` are. `settings_table` fills them in.
        hint: type of the field.
        default: default of the field.
        help: help of the field, unless the row has its own.
    """

    rule: Range | None = None
    group: str = ""
    choices: Iterable[str] = ()
    called: str = ""
    name: str = ""
    hint: Any = None
    default: Any = None
    help: str = ""


#: Rows of settings of TrainingArguments, which does not check most values: their ranges, and the help and group of some.
INHERITED = {
    **dict.fromkeys(
        ("weight_decay", "max_grad_norm", "adam_epsilon", "dataloader_num_workers"), Setting(rule=NOT_NEGATIVE)
    ),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), Setting(rule=DECAY)),
    **dict.fromkeys(("seed", "data_seed"), Setting(rule=SEED)),
    "per_device_eval_batch_size": Setting(rule=at_least(1)),
    "per_device_train_batch_size": Setting(at_least(1), "optimizer", help="Pairs in a batch, on each device."),
    "gradient_accumulation_steps": Setting(at_least(1), "optimizer", help="Batches that make an optimizer step."),
    "max_steps": Setting(None, "optimizer", help="Optimizer steps of the run. -1: as many as num_train_epochs has."),
    "bf16": Setting(None, "optimizer", help="Compute in bfloat16. The weights keep their type, float32 unless set."),
    "gradient_checkpointing": Setting(
        None, "model", help="Compute activations again in the backward pass: less memory, but a third more time."
    ),
}


class Help(str):
    """The help text of a field, with the field's row of the table as an attribute.

    The row cannot be an entry of the field's metadata: `HfArgumentParser` passes all entries to argparse, which does not
    accept a `row`.
    """

    row: Setting


def setting(default: Any, text: str, rule: Range | None = None, **row: Any) -> Any:
    """A dataclass field with its default and its row of the table. A default that is a list is copied for each object."""
    metadata = {"help": Help(text)}
    metadata["help"].row = Setting(rule, **row)
    if isinstance(default, list):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def row_of(field: dataclasses.Field[Any], inherited: Mapping[str, Setting]) -> Setting:
    """The row of a dataclass field: its own, else that in `inherited`, else an empty one."""
    own = getattr(field.metadata.get("help"), "row", None)
    return own or inherited.get(field.name, Setting())


def check_choice(name: str, value: Any, choices: Iterable[str], called: str = "") -> None:
    """Raise ConfigError for a value that is not a choice. The message names the nearest choice and all choices."""
    if value not in (known := tuple(choices)):
        raise ConfigError(
            f"{name}: unknown {called + ' ' if called else ''}'{value}'{did_you_mean(str(value), known)}; "
            f"known are {', '.join(known)}"
        )


def read_words(config: Any, rows: Mapping[str, Setting]) -> None:
    """Convert texts to numbers and None in settings that may be text too: command-line parsers give them texts.

    Only settings with a group are converted, except `report_to`, for which "none" is a value.
    """
    for name, row in rows.items():
        value, kinds = getattr(config, name, None), typing.get_args(row.hint)
        if not row.group or name == "report_to" or not isinstance(value, str) or str not in kinds:
            continue
        if type(None) in kinds and value.lower() in ("none", "null"):
            setattr(config, name, None)
            continue
        for kind in (int, float):
            if kind in kinds:
                with contextlib.suppress(ValueError):
                    setattr(config, name, kind(value))
                    break


def check_fields(config: Any, rows: Mapping[str, Setting]) -> None:
    """Raise ConfigError for the first attribute whose value its row does not allow.

    Args:
        rows: the rows by attribute, with hints. They are an argument because a subclass may declare a field again.
    """
    for name, row in rows.items():
        if row.rule is None and not row.choices:
            continue
        value, kinds = getattr(config, name), (row.hint, *typing.get_args(row.hint))
        if value is None and type(None) in kinds:
            continue
        if row.choices:
            listed = typing.get_origin(row.hint) is list
            if listed and (isinstance(value, str) or not isinstance(value, Iterable)):
                raise ConfigError(f"{name}: expected a list of text, got {value!r}")
            for item in value if listed else [value]:
                check_choice(name, item, row.choices, row.called)
        if row.rule and not (isinstance(value, str) and str in kinds):
            if (number := _number(value)) is None:
                raise ConfigError(f"{name}: expected a number, got {value!r}")
            if not row.rule.holds(number):
                raise ConfigError(f"{name}: {row.rule.words}, got {value}")


def _number(value: Any) -> float | None:
    """A number of any type as a float. None for text and for other values that are not numbers."""
    try:
        return None if isinstance(value, str) else float(value)
    except (TypeError, ValueError):
        return None
