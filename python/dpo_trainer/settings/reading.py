"""Settings that say how rows are read and what of them is scored: names of columns, weights from scores, the chat template."""

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
    """Fields of DPOConfig."""

    columns: dict[str, Any] | str | None = _data(
        None,
        "The data's columns by our names, e.g. --columns.prompt question or columns: {prompt: question, weight: margin}.",
    )
    weight_from: dict[str, Any] | str | None = _data(
        None,
        "Weights from scores: the columns {chosen: score_chosen, rejected: score_rejected} or {margin: column}, and scale, "
        "power, floor: max(2 p - 1, floor)^power with p = sigmoid(margin / scale).",
    )
    chat_template_path: str | None = _data(
        None, "A file with the chat template, or the folder of a tokenizer that has it. None: the tokenizer's own."
    )
    chat_template_kwargs: dict[str, Any] | str | None = _data(
        None, "What the chat template is told, e.g. {enable_thinking: false}; a column of this name wins, row by row."
    )
    assistant_only_loss: bool = _data(
        True,
        "Score only the assistant's words of completions with several messages, not those of users and tools. False: all that "
        "follows the prompt.",
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
        """Make mappings of those that are JSON text. Raises ConfigError for what cannot be meant."""
        from ..data.known import Reading  # imports torch

        for name in ("columns", "weight_from", "chat_template_kwargs"):
            setattr(self, name, as_mapping(name, getattr(self, name)))
        Reading(self.columns, self.weight_from)  # type: ignore[arg-type]
        for name in self.chat_template_kwargs or ():
            if name in RESERVED:
                raise ConfigError(f"chat_template_kwargs: cannot hold '{name}', which the trainer sets")
