"""The table with a row for every setting of `dpo-train`, and the checks that need no torch."""

from __future__ import annotations

import dataclasses
import enum
import typing
from collections.abc import Mapping
from functools import cache
from types import SimpleNamespace
from typing import Any

from ..errors import ConfigError, did_you_mean
from . import objective, trl
from .checks import as_mapping, check_together
from .diagnoses import Limits
from .fields import DPOFields, RunSettings
from .inherited import training_arguments
from .reading import ReadingSettings
from .table import INHERITED, Setting, check_fields, row_of


@cache
def settings_table() -> dict[str, Setting]:
    """Every setting by name: first those of the run and of DPOConfig, then the rest of TrainingArguments (group "")."""
    rows = _rows_of(RunSettings)
    for name, field in training_arguments().items():
        row = INHERITED.get(name, Setting())
        said = row.help or " ".join(field.help.split())
        rows.setdefault(name, dataclasses.replace(row, name=name, hint=field.hint, default=field.default, help=said))
    ours = _rows_of(DPOFields)
    rows |= {name: row for name, row in ours.items() if name not in RunSettings.__annotations__}
    own = {*RunSettings.__annotations__, *ReadingSettings.__annotations__, *DPOFields.__annotations__}
    return {name: rows[name] for name in sorted(rows, key=lambda name: name not in own)}


def _rows_of(owner: Any) -> dict[str, Setting]:
    """The rows of one of our dataclasses."""
    hints, rows = typing.get_type_hints(owner), {}
    for field in dataclasses.fields(owner):
        default = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
        said = " ".join(field.metadata["help"].split())
        rows[field.name] = dataclasses.replace(
            row_of(field, INHERITED), name=field.name, hint=hints[field.name], default=default, help=said
        )
    return rows


def check_given(settings: Mapping[str, Any]) -> None:
    """Raise ConfigError for settings of a run that are out of range or contradict each other. Imports no torch.

    DPOConfig repeats these checks and adds those that need torch.

    Args:
        settings: values of the types in the table.
    """
    rows = settings_table()
    config = SimpleNamespace(**{name: row.default for name, row in rows.items()} | dict(settings))
    trl.check_values(config)
    check_fields(config, rows)
    objective.check_names(config)
    check_together(config)
    _check_optimizer(str(config.optim), rows["optim"].hint)
    Limits.of(as_mapping("diagnostics", config.diagnostics))


def _check_optimizer(given: str, hint: Any) -> None:
    """Raise ConfigError for an optimizer that the installed transformers does not have."""
    known = [
        item.value
        for kind in typing.get_args(hint)
        if isinstance(kind, type) and issubclass(kind, enum.Enum)
        for item in kind
    ]
    if known and given not in known:
        meant = "adamw_torch" if given.lower() in ("adam", "adamw") else given.lower()
        raise ConfigError(f"optim: unknown '{given}'{did_you_mean(meant, known)}; known are {', '.join(known)}")
