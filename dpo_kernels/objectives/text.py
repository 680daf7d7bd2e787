"""The forms of `loss_type`: a name, a text such as "simpo(gamma=1.0, beta=2)", a callable, or a sequence of these."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import cast

from .named import BoundObjective, Named, RunningObjective, objective
from .pairs import Objective
from .registry import OBJECTIVES

_DEFAULTS: dict[str, BoundObjective] = {
    row.name: cast(BoundObjective, objective(row.name)) for row in OBJECTIVES.values() if row.observe is None
}
_CALL = re.compile(r"\s*(\w+)\s*\((.*)\)\s*", re.DOTALL)


def parse(text: str) -> Named:
    """The objective that a text names: "simpo", or with hyper-parameters "simpo(gamma=1.0, beta=2)".

    Raises:
        ValueError: the text has another form, or see `objective`.
    """
    if text in _DEFAULTS:
        return _DEFAULTS[text]
    call = _CALL.fullmatch(text)
    if call is None:
        return objective(text.strip())
    keywords: dict[str, float | str] = {}
    for item in filter(None, (part.strip() for part in call[2].split(","))):
        key, equals, value = (part.strip() for part in item.partition("="))
        if not equals:
            raise ValueError(f"cannot read {item!r} in loss_type {text!r}; write name(key=value, ...)")
        try:
            keywords[key] = float(value)
        except ValueError:
            keywords[key] = value.strip("'\"")
    return objective(call[1], **keywords)  # type: ignore[arg-type]


def as_list(loss_type: str | Objective | Sequence[str | Objective]) -> list[str | Objective]:
    """One objective or several, as a list."""
    return [loss_type] if isinstance(loss_type, str) or callable(loss_type) else list(loss_type)


def build(loss_type: str | Objective | Sequence[str | Objective]) -> list[Objective]:
    """The objectives in `loss_type` as callables. Named ones with state are created here, for the caller to keep."""
    found: list[Objective] = []
    for entry in as_list(loss_type):
        if not isinstance(entry, str) and not callable(entry):
            raise TypeError(f"loss_type must hold names or callables on Pairs; got {type(entry).__name__}")
        found.append(parse(entry) if isinstance(entry, str) else entry)
    if not found:
        raise ValueError("loss_type is empty; name at least one objective")
    return found


def resolve(loss_type: str | Objective | Sequence[str | Objective]) -> list[Objective]:
    """Like `build`, but raises for a name whose objective has state, because the state would be lost after the call.

    Raises:
        TypeError: an entry is neither a text nor a callable.
        ValueError: `loss_type` is empty, names an objective with state, or see `parse`.
    """
    found = build(loss_type)
    for entry, made in zip(as_list(loss_type), found, strict=True):
        if isinstance(made, RunningObjective) and isinstance(entry, str):
            raise ValueError(
                f"loss_type {entry!r} keeps a running mean between calls: create it once, "
                f"kept = objective({made.info.name!r}), and pass loss_type=kept each time (DPOLoss does that for you)"
            )
    return found
