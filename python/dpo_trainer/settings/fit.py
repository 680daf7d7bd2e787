"""Checks before a run is set up: whether model, reference, tokenizer, data and settings fit together."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dpo_kernels.backends import why_not

from ..batch.sampler import Batching
from ..data.images import has_images
from ..data.prepare import Preparation
from ..data.tokens import TOKENS
from ..errors import ConfigError, ModelError, did_you_mean
from ..model.adapter_kinds import check_adapter, virtual_tokens
from ..model.split import unwrap_adapter
from ..model.vision import takes_images
from .checks import as_mapping
from .config import DPOConfig

#: Settings that are read only when the trainer is made: those of the data, and these.
READ_ONCE = (
    *(item.name for item in fields(Preparation)),
    "pad_to_multiple_of",
    "pad_token",
    "batch_layout",
    "disable_dropout",
    "precompute_ref_log_probs",
    "sync_ref_model",
)
logger = logging.getLogger("dpo_trainer")

#: Values of model_type whose prompt tokens attend to later prompt tokens, so that prompt and answer are not one text.
PREFIX_MODELS = ("paligemma",)


def check_fit(
    config: DPOConfig, model: nn.Module, ref_model: nn.Module | None, tokenizer: Any, datasets: Sequence[Any]
) -> None:
    """Raise ConfigError or ModelError for parts that are valid alone but fail together.

    Args:
        datasets: tokenised datasets, the training data first.
    """
    if config.backend is not None and (reason := why_not(config.backend, config.device.type)):
        raise ConfigError(f"backend: '{config.backend}' cannot be used: {reason}")
    if ref_model is not None:
        ours, others = _vocabulary(model), _vocabulary(ref_model)
        if None not in (ours, others) and ours != others:
            raise ModelError(
                f"ref_model: has a vocabulary of {others} tokens, but the model has {ours}; both must have the same tokenizer"
            )
    adapted = hasattr(model, "peft_config") or getattr(model, "_hf_peft_config_loaded", False)
    if getattr(model, "is_quantized", False) and not adapted:
        raise ModelError(
            "model: quantised weights do not train; train an adapter on them (lora, in Python peft_config)"
        )
    check_adapter(model, gradient_checkpointing=bool(config.gradient_checkpointing))
    if not datasets:
        return
    Batching(1, config.max_tokens, config.padded_to).check(max(datasets[0]["length"]))
    embeddings = _embeddings(model)
    if embeddings is not None and len(tokenizer) > embeddings.num_embeddings:
        greatest = max(max(ids, default=0) for dataset in datasets for name in TOKENS for ids in dataset[name])
        if greatest >= embeddings.num_embeddings:
            raise ModelError(
                f"model: has embeddings for {embeddings.num_embeddings} tokens, but the data need token {greatest} "
                f"({tokenizer.decode([greatest])!r}): model and tokenizer do not belong together"
            )
    _check_positions(model, max(max(dataset["length"]) for dataset in datasets))


def check_model_init(config: DPOConfig, model: Any) -> None:
    """Raise ConfigError for arguments that contradict a `model_init`."""
    if model is not None:
        raise ConfigError("model_init: makes the model, and a model is given as well; leave one of them out")
    if config.precompute_ref_log_probs:
        raise ConfigError("precompute_ref_log_probs: needs one model, and model_init makes a new one for every run")


def init_of(config: DPOConfig, model: Any, ref_model: Any, quantization: Any) -> dict[str, Any]:
    """Keyword arguments of from_pretrained for the models that are given as paths.

    Raises:
        ConfigError: `quantization` is given without a path, or twice.
    """
    found = dict(as_mapping("model_init_kwargs", config.model_init_kwargs) or {})
    if quantization is not None:
        if not isinstance(model, (str, Path)):
            raise ConfigError(
                "quantization_config: is for a model that is given as a path; this model is loaded already"
            )
        if "quantization_config" in found:
            raise ConfigError("quantization_config: is given twice, also in model_init_kwargs; leave one out")
        found["quantization_config"] = quantization
    if found and not any(isinstance(part, (str, Path)) for part in (model, ref_model)):
        logger.warning("model_init_kwargs: not used, because no model is given as a path")
    if config.trust_remote_code:
        found.setdefault("trust_remote_code", True)
    return found


def check_images(config: DPOConfig, model: Any, ref_model: Any, datasets: Sequence[Any]) -> bool:
    """Whether the data have images. Raises ModelError or ConfigError if models or settings do not support them."""
    if not any(map(has_images, datasets)):
        return False
    for name, part in (("model", model), ("ref_model", ref_model)):
        base = unwrap_adapter(part)
        if base is not None and not takes_images(base):
            raise ModelError(f"{name}: {type(base).__name__} reads no images, but the data have images")
        if getattr(getattr(base, "config", None), "model_type", "") in PREFIX_MODELS:
            raise ModelError(
                f"{name}: {type(base).__name__} reads prompts differently from answers, which is not supported"
            )
    if config.batch_layout == "prefix_shared":
        raise ConfigError(
            "batch_layout: 'prefix_shared' is not possible with images, because the model computes positions itself; "
            "use 'auto' or 'padded'"
        )
    return True


def check_best_metric(config: DPOConfig, names: Sequence[str]) -> None:
    """Raise ConfigError for a metric_for_best_model that evaluations lack: the first evaluation would end the run.

    Args:
        names: the names that the run's evaluations log, without the prefix "eval_".
    """
    metric = (config.metric_for_best_model or "").removeprefix("eval_")
    if metric and config.eval_strategy != "no" and metric not in names:
        raise ConfigError(
            f"metric_for_best_model: unknown '{metric}'{did_you_mean(metric, names)}; known are {', '.join(names)}"
        )


def _check_positions(model: Any, longest: int) -> None:
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    limit = getattr(config, "max_position_embeddings", None)
    longest += virtual_tokens(model)
    if not isinstance(limit, int) or not 0 < limit < longest:
        return
    # Learned positions have an end. Some models keep one or two rows more than they use.
    tables = [part for part in model.modules() if isinstance(part, nn.Embedding) and part is not _embeddings(model)]
    own = f" (of them {virtual} of the adapter)" if (virtual := virtual_tokens(model)) else ""
    if any(limit <= table.num_embeddings <= limit + 2 for table in tables):
        raise ConfigError(
            f"max_length: the longest pair has {longest} tokens{own}, but the model has positions for {limit}; "
            f"set max_length to {limit - virtual_tokens(model)} or less"
        )
    logger.warning("the longest pair has %d tokens, but the model was made for %d (max_length)", longest, limit)


def _embeddings(model: Any) -> nn.Embedding | None:
    found = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    return found if isinstance(found, nn.Embedding) else None


def _vocabulary(model: Any) -> int | None:
    head: Any = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if isinstance(
        size := getattr(head, "out_features", None), int
    ):  # a quantised weight may have another shape, or be a method
        return size
    weight = getattr(head, "weight", None)
    return len(weight) if isinstance(weight, Tensor) else None
