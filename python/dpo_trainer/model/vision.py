"""Recognises models that read images, and chooses the classes that load them and their processors."""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, ProcessorMixin
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
)

from ..errors import first_line

logger = logging.getLogger("dpo_trainer")

#: Arguments of from_pretrained that determine which files of a model are found.
_FINDING = ("trust_remote_code", "revision", "token", "cache_dir", "subfolder", "local_files_only")


def takes_images(model: Any) -> bool:
    """Whether a transformers model reads images. A peft model has to be unwrapped first."""
    forward = getattr(type(model), "forward", None)
    return forward is not None and "pixel_values" in inspect.signature(forward).parameters


def auto_class(folder: str, options: Mapping[str, Any]) -> Any:
    """The transformers auto class that loads a model, for vision-language or for causal models.

    If a model type has both forms, the architecture named in the checkpoint decides, so that no weights are lost.

    Args:
        folder: a folder or hub name of a model or of a peft adapter.
        options: keyword arguments for `from_pretrained`.
    """
    try:
        adapter = Path(folder, "adapter_config.json")
        if adapter.exists() and not Path(folder, "config.json").exists():
            folder = json.loads(adapter.read_text(encoding="utf-8"))["base_model_name_or_path"]
        config = AutoConfig.from_pretrained(folder, **{key: options[key] for key in _FINDING if key in options})
    except Exception:  # loading the model reports the error
        return AutoModelForCausalLM
    causal = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    held = getattr(config, "architectures", None) or [""]
    if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and not (causal and held[0].endswith("ForCausalLM")):
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


def load_processor(folder: str, **kwargs: Any) -> Any:
    """The processor of a vision-language model; None if there is none, or (with a warning) if it cannot be loaded."""
    try:
        found = AutoProcessor.from_pretrained(folder, **kwargs)
    except Exception as error:  # a package that the processor needs may be missing, such as torchvision
        logger.warning(
            "model '%s': its processor cannot be loaded (%s: %s); it can be trained on text, not on images",
            folder,
            type(error).__name__,
            first_line(error),
        )
        return None
    return found if isinstance(found, ProcessorMixin) else None
