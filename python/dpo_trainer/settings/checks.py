"""The checks across the rows of DPOConfig: settings that are valid alone, but contradict each other."""

import contextlib
import json
import math
from collections.abc import Mapping
from typing import Any

from ..errors import ConfigError


def check_together(config: Any) -> None:
    """Raise ConfigError if settings contradict each other."""
    if config.sync_ref_model and config.precompute_ref_log_probs:
        raise ConfigError(
            "sync_ref_model: the reference moves during training, so its log-probabilities cannot be precomputed; "
            "leave precompute_ref_log_probs off"
        )
    if config.max_length is not None and (config.max_prompt_length or 0) >= config.max_length:
        raise ConfigError(
            f"max_prompt_length: {config.max_prompt_length} leaves no room for a completion "
            f"within max_length {config.max_length}"
        )
    if config.max_steps == 0 or config.max_steps < -1:
        raise ConfigError(f"max_steps: must be at least 1, or -1 for whole epochs, got {config.max_steps}")
    if config.max_steps == -1 and not 0 < config.num_train_epochs < math.inf:
        raise ConfigError(f"num_train_epochs: must be positive, got {config.num_train_epochs}")
    for pair in (config.optim_args or "").replace(" ", "").split(","):
        if pair and not pair.partition("=")[2]:
            raise ConfigError(f"optim_args: expected name=value, separated by commas, got '{config.optim_args}'")
    if config.win_rate_scorer is not None and not config.sample_prompts:
        raise ConfigError("win_rate_scorer: there is nothing to score; set sample_prompts, e.g. to 32")
    if isinstance(config.grad_filter, str) and config.grad_filter != "auto":
        raise ConfigError(f"grad_filter: must be 'auto', None or a probability, got '{config.grad_filter}'")


def check_budget(config: Any) -> None:
    """Raise ConfigError for a memory budget that the kernels cannot read."""
    from dpo_kernels.linear.planner import parse_budget

    try:
        parse_budget(config.memory_budget, 1, 1)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"memory_budget: {error}") from error


def as_mapping(name: str, value: Mapping[str, Any] | str | None) -> dict[str, Any] | None:
    """A mapping, from itself or its JSON text, which transformers accepts too. Raises ConfigError for anything else."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = json.loads(value)
    if value is not None and not isinstance(value, dict):
        raise ConfigError(f"{name}: expected a mapping, got {value!r}")
    return value
