"""Settings of how rows are read and which tokens are scored: columns, weights from scores, the chat template."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from ..data.rows import RESERVED
from ..errors import ConfigError
from .table import Range, setting

_data = partial(setting, group="data")


@dataclass
class ReadingSettings:
    """The fields of DPOConfig about reading rows."""

    columns: dict[str, Any] | str | None = _data(
        None,
        "The data's column names by our names, e.g. --columns.prompt question or columns: {prompt: question, weight: margin}.",
    )
    weight_from: dict[str, Any] | str | None = _data(
        None,
        "Compute weights from scores in columns: {chosen: score_chosen, rejected: score_rejected} or {margin: column}. With "
        "scale, power and floor, the weight is max(2 p - 1, floor)^power with p = sigmoid(margin / scale).",
    )
    chat_template_path: str | None = _data(
        None, "A file with a chat template, or the folder of a tokenizer with one. None: that of the model's tokenizer."
    )
    chat_template_kwargs: dict[str, Any] | str | None = _data(
        None,
        "Arguments of the chat template, e.g. {enable_thinking: false}. A row's column of this name takes precedence.",
    )
    assistant_only_loss: bool = _data(
        True,
        "In completions with several messages, score only the assistant's messages, not those of users and tools. False: score "
        "everything after the prompt.",
    )
    val_split: float | None = _data(
        None,
        "Hold out a part of train_data and evaluate on it: below 1 a share of its pairs, from 1 a number of them. Pairs with "
        "the same prompt stay together; the seed (data_seed) chooses the prompts.",
        Range(
            "must be a share below 1 or a whole number of pairs",
            lambda size: 0 < size < 1 or (1 <= size < math.inf and size % 1 == 0),
        ),
    )

    def check_reading(self, as_mapping: Callable[[str, Any], dict[str, Any] | None]) -> None:
        """Convert settings that are JSON text to mappings. Raises ConfigError for invalid values."""
        from ..data.known import Reading  # imports torch

        for name in ("columns", "weight_from", "chat_template_kwargs"):
            setattr(self, name, as_mapping(name, getattr(self, name)))
        Reading(self.columns, self.weight_from)  # type: ignore[arg-type]
        for name in self.chat_template_kwargs or ():
            if name in RESERVED:
                raise ConfigError(f"chat_template_kwargs: cannot contain '{name}', which the trainer sets")
