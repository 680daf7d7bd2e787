"""Construction of the trainer from the settings of `dpo-train`, for the commands `train` and `inspect`."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import datasets
import transformers

from ..data.files import load_pairs, stream_pairs
from ..errors import ConfigError, OutputError, UsageError, did_you_mean, first_line
from ..pair_trainer import check_val_split
from ..settings.config import DPOConfig
from ..settings.trl import hush
from ..trainer import DPOTrainer
from .packages import line_of_error
from .settings import RUN_KEYS, lora_config

logger = logging.getLogger("dpo_trainer")

AnyTrainer = TypeVar("AnyTrainer", bound=DPOTrainer)


def build_trainer(
    kind: type[AnyTrainer], settings: dict[str, Any], switches: set[str], *, resumes: bool = False
) -> AnyTrainer:
    """Load the model, read and tokenise the data, and make the trainer.

    Args:
        resumes: whether the run resumes from a checkpoint in output_dir.

    Raises:
        UsageError: a setting, the model or the data cannot be used.
    """
    hush()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    fields: dict[str, Any] = {"log_level": "error", "disable_tqdm": not switches.isdisjoint({"--quiet", "--json"})}
    fields |= {key: value for key, value in settings.items() if key not in RUN_KEYS or key == "output_dir"}
    held_out = settings.get("eval_data") is not None
    if settings.get("val_split") is not None:
        check_val_split(given=held_out, stream=bool(settings.get("streaming")), what="eval_data")
    if held_out or settings.get("val_split") is not None:
        fields.setdefault("eval_strategy", "steps")
    # An eval_steps that is not given must not become logging_steps, as it does in transformers.
    paced = fields.get("eval_strategy") == "steps" and fields.get("eval_steps") is None
    if paced:
        fields["eval_steps"] = fields.get("save_steps") or 1
    with _named(fields):
        config = DPOConfig(**fields)
    if paced:
        config.eval_steps = None
    given = config.resume_from_checkpoint
    if given and not resumes and not (Path(given) / "trainer_state.json").exists():
        raise OutputError(f"resume_from_checkpoint '{given}': not a checkpoint")
    peft_config = lora_config(settings["lora"]) if settings.get("lora") is not None else None
    if settings.get("streaming") and config.max_steps <= 0:
        raise ConfigError("max_steps: must be given with streaming, since the number of pairs is not known")
    reading: Any = {"columns": config.columns, "weight_from": config.weight_from}
    logger.info("train_data: reading %s", settings["train_data"])
    train_data = (stream_pairs if settings.get("streaming") else load_pairs)(settings["train_data"], **reading)
    eval_data = None
    if held_out:
        logger.info("eval_data: reading %s", settings["eval_data"])
        eval_data = load_pairs(settings["eval_data"], **reading)
    with _named(fields):
        return kind(
            settings["model"],
            settings.get("ref_model"),
            args=config,
            train_dataset=train_data,
            eval_dataset=eval_data,
            peft_config=peft_config,
        )


@contextlib.contextmanager
def _named(settings: dict[str, Any]) -> Iterator[None]:
    """Turn a library's error about a setting into a line with the setting's name and the nearest valid value."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        if isinstance(error, UsageError) or getattr(error, "strerror", None):
            raise  # `main` handles these
        if isinstance(error, ImportError):
            raise ConfigError(line_of_error(error)) from error
        text = first_line(error)
        for key, value in settings.items():
            if isinstance(value, str) and re.match(rf"'?{re.escape(value)}\b", text, re.IGNORECASE):
                near = did_you_mean(value, re.findall(r"[\w.-]+", text[len(value) + 1 :]))
                raise ConfigError(f"{key}: {text}{near}") from error
        raise ConfigError(text) from error
