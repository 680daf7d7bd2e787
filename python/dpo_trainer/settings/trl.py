"""Differences from TRL: defaults that differ, and settings that are not accepted.

The facts are those of TRL 1.16. A test compares them with the installed TRL, and docs/compatibility.md shows them.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Mapping
from typing import Any

from ..errors import ConfigError

logger = logging.getLogger("dpo_trainer")

#: Fields with another default in TRL: TRL's default, the reason for ours, and whether the log of a run mentions it.
DIFFERENT: dict[str, tuple[Any, str, bool]] = {
    "num_train_epochs": (3.0, "More than one pass over preference pairs memorises them.", True),
    "bf16": (
        True,
        "float32 is exact on every device. Set bf16=True on a GPU: it is faster and takes less memory.",
        True,
    ),
    "gradient_checkpointing": (
        True,
        "It costs a third more time, and the fused head needs little memory. Set it if memory is short.",
        False,
    ),
    "truncation_mode": (
        "keep_start",
        "keep_end shortens the prompt and keeps whole answers, which the loss compares.",
        True,
    ),
    "train_sampling_strategy": ("random", "Pairs of similar length in a step need little padding.", True),
    "logging_steps": (
        10,
        "None logs every twentieth of the run, or every 10 steps if that is more often: short runs have a curve too.",
        False,
    ),
    "save_steps": (
        500,
        "None saves every tenth of the run, or every 500 steps if that is more often: short runs can be resumed too.",
        False,
    ),
    "logging_first_step": (False, "The loss of the first step must be log 2: a quick check of the reference.", False),
    "logging_nan_inf_filter": (True, "A loss that is not a number should be seen.", False),
    "remove_unused_columns": (True, "Neither value has an effect: tokenising keeps the columns that it needs.", False),
}
#: Fields with another meaning than in TRL, and their meaning here.
OTHER_MEANING = {
    "label_smoothing": "counts in every objective that has it, also in sigmoid (conservative DPO), where TRL ignores it.",
    "eval_on_start": "None evaluates before training in a new run that evaluates. The report compares the last evaluation "
    "with this first one.",
    "eval_steps": "None is logging_steps if that is given, else a twentieth of the run, or more so that evaluations take at "
    "most a quarter of the training time.",
    "save_total_limit": "None keeps the two newest checkpoints if save_steps is not given, else all.",
    "padding_free": "True has no effect, since batch_layout 'auto' does it on any attention; refused with batch_layout 'padded'.",
    "pad_to_multiple_of": "'auto' is None.",
    "pad_token": "sets the tokenizer's pad token, and is not deprecated.",
    "activation_offloading": "True is refused; gradient_checkpointing saves this memory too.",
    "use_liger_kernel": "True is refused on a CPU, where Liger's kernels cannot run.",
    "precompute_ref_batch_size": "None is per_device_eval_batch_size for all data, and results are kept in ref_cache_dir.",
    "remove_unused_columns": "has no effect: tokenising keeps the columns that it needs.",
    "max_length": "cuts pairs so that both sides keep the same prompt; TRL cuts each side separately.",
    "f_divergence_type": "does not change an entry of loss_type that sets its own divergence.",
    "discopop_tau": "does not change an entry of loss_type that sets its own tau.",
}
#: Settings of TRL 1.16, and of older versions of TRL and transformers, that DPOConfig does not accept, and what to use.
ANSWERS = {
    "padding_value": "is not needed; set pad_token",
    "label_pad_token_id": "is not needed; labels never leave the trainer",
    "max_completion_length": "is not supported; set max_length and max_prompt_length, which leave the rest to the completion",
    "max_target_length": "is not supported; there are no encoder-decoder models here",
    "is_encoder_decoder": "is not needed; there are no encoder-decoder models here",
    "use_logits_to_keep": "is not needed; only completion tokens pass through the head",
    "use_num_logits_to_keep": "is not needed; only completion tokens pass through the head",
    "use_liger_loss": "is not needed; the loss is fused with the head already (loss_path)",
    "base_model_attribute_name": "is not needed; the backbone is found automatically",
    "reference_free": "is not supported; use an objective without a reference, e.g. loss_type='simpo' or 'cpo'",
    "force_use_ref_model": "is not needed; a ref_model that is given is used",
    "ref_model_init_kwargs": "is not supported; model_init_kwargs are for both models, or pass ref_model as a model",
    "rpo_alpha": "is not supported; set loss_type='rpo(alpha=...)'",
    "generate_during_eval": "is not supported; set sample_prompts",
    "tools": "is not supported; give the data a column 'tools'",
    "warmup_ratio": "is not a setting of the installed transformers; set warmup_steps to the share, such as 0.1",
    "evaluation_strategy": "is called eval_strategy",
    "logging_dir": "is not a setting of the installed transformers; set the environment variable TENSORBOARD_LOGGING_DIR",
    "no_cuda": "is called use_cpu",
}
#: Whether this process has logged the differences, or need not.
_told = False


def check_known(settings: Mapping[str, Any], fields: Iterable[str]) -> None:
    """Raise ConfigError for a setting of TRL that is not in `fields`. The message says what to use."""
    known = set(fields)
    for name in settings:
        if name in ANSWERS and name not in known:
            raise ConfigError(f"{name}: {ANSWERS[name]}")


def check_values(config: Any) -> None:
    """Convert TRL's values of shared settings to ours. Raises ConfigError for values that are not supported."""
    if config.pad_to_multiple_of == "auto":
        config.pad_to_multiple_of = None
    if isinstance(config.pad_to_multiple_of, str):
        raise ConfigError(f"pad_to_multiple_of: expected a whole number or 'auto', got '{config.pad_to_multiple_of}'")
    if config.padding_free and config.batch_layout == "padded":
        raise ConfigError("padding_free: contradicts batch_layout 'padded'; leave batch_layout at 'auto'")
    if config.activation_offloading:
        raise ConfigError("activation_offloading: is not supported; set gradient_checkpointing=True to save memory")
    config.remove_unused_columns = False


def check_accelerator(config: Any) -> None:
    """Refuse or ignore accelerate's settings for data loaders, since training does not use its loaders."""
    if config.split_batches:
        raise ConfigError(
            "accelerator_config.split_batches: is not supported; per_device_train_batch_size is the batch of one device"
        )
    if config.dispatch_batches:
        logger.warning(
            "accelerator_config.dispatch_batches: ignored; every process makes its own batches, which are the same"
        )
        config.dispatch_batches = None


def differences(config: Any) -> list[str]:
    """The run's settings that are at our default and differ from TRL's default, as `name=ours (TRL: theirs)`."""
    defaults = {field.name: field for field in dataclasses.fields(config)}
    found = []
    for name, (theirs, _, told) in DIFFERENT.items():
        ours = getattr(config, name)
        if told and ours == defaults[name].default:
            found.append(f"{name}={ours} (TRL: {theirs})")
    if config.filters:
        found.append("filters leave out pairs that teach nothing (TRL: none)")
    if config.label_smoothing and "sigmoid" in str(config.loss_type):
        found.append("label_smoothing counts in sigmoid (TRL: not)")
    return found


def tell_differences(config: Any) -> None:
    """Log the differences once per process, unless `log_level` asks for errors only."""
    if not told() and config.get_process_log_level() <= logging.WARNING and (found := differences(config)):
        logger.warning("differs from TRL's default: %s; see docs/compatibility.md", ", ".join(found))
    hush()


def told() -> bool:
    """Whether the process has logged the differences, or need not."""
    return _told


def hush() -> None:
    """Log no differences in this process. The command line calls it, since its users have no code for TRL."""
    global _told
    _told = True
