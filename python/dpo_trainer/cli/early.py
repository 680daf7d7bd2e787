"""Checks before torch and transformers are imported, which takes seconds."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..data import FORMATS
from ..errors import ConfigError, DataError, is_hub_name
from ..model.places import source_of
from ..settings.inherited import lora_fields
from ..settings.rows import check_given
from ..watch.signals import is_first
from .packages import check_packages
from .settings import REQUIRED, check_lora_names, read_settings


def settings_of(arguments: Sequence[str], required: Sequence[str] = REQUIRED) -> tuple[dict[str, Any], set[str]]:
    """The settings and switches of a run, with all checks that need no torch.

    Raises:
        UsageError: one line about an error.
    """
    settings, switches = read_settings(arguments, required)
    check_given(settings)
    check_evaluation(settings)
    check_paths(settings)
    check_packages(settings)
    if settings.get("lora") and (known := lora_fields()):
        check_lora_names(settings["lora"], known)
    return settings, switches


def check_evaluation(settings: Mapping[str, Any]) -> None:
    """Raise ConfigError for settings that need evaluations of a run that has none."""
    held_out = settings.get("eval_data") is not None or settings.get("val_split") is not None
    evaluates = settings.get("eval_strategy", "steps" if held_out else "no")
    if not held_out:
        for name in ("eval_strategy", "eval_on_start", "load_best_model_at_end", "sample_prompts"):
            if settings.get(name) in ("steps", "epoch", True) or (name == "sample_prompts" and settings.get(name)):
                raise ConfigError(f"{name}: there are no held-out pairs; give eval_data, or set val_split: 0.1")
    best = settings.get("save_strategy") == "best"
    if best and not (settings.get("metric_for_best_model") or settings.get("load_best_model_at_end")):
        raise ConfigError("save_strategy: 'best' needs metric_for_best_model, such as loss")
    if best and evaluates == "no":
        raise ConfigError("save_strategy: 'best' needs evaluations; give eval_data, or set val_split: 0.1")
    if held_out and settings.get("load_best_model_at_end") and settings.get("save_strategy") != "best":
        if evaluates == "no":
            raise ConfigError("load_best_model_at_end: eval_strategy is 'no', so no evaluation tells which is best")
        if settings.get("save_strategy", "steps") != evaluates:
            raise ConfigError(
                f"load_best_model_at_end: evaluations need checkpoints of the same steps; set save_strategy: {evaluates}"
            )


def check_paths(settings: Mapping[str, Any]) -> None:
    """Raise UsageError for models and data that do not exist. Names on the hub are checked when they are loaded."""
    for key in ("train_data", "eval_data"):
        path = settings.get(key)
        if path is None or Path(path).expanduser().exists():
            continue
        name = path.partition(":")[0]
        if not is_hub_name(name) or Path(name).suffix in FORMATS:
            raise DataError(f"{path}: no such file")
    for key in ("model", "ref_model"):
        if settings.get(key) is not None:
            source_of(settings[key])


def tell_loading(switches: set[str]) -> None:
    """Print that torch and transformers are being loaded, unless they already are, or --quiet or --json is given."""
    if switches.isdisjoint({"--quiet", "--json"}) and is_first() and "transformers" not in sys.modules:
        print("loading torch and transformers", file=sys.stderr, flush=True)


def set_up_logging(*, quiet: bool) -> None:
    """Write our log lines to standard error, but only errors of libraries."""
    logging.basicConfig(level=logging.ERROR if quiet else logging.INFO, format="%(message)s", stream=sys.stderr)
    for noisy in ("accelerate", "datasets", "httpx", "huggingface_hub", "matplotlib", "torch"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")  # libraries' warnings are for developers; ours go through logging
