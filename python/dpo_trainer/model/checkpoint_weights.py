"""Loads weights that transformers' trainer does not restore from a checkpoint.

For many models, such as most vision-language models and mixtures of experts, transformers saves the weights with the names
and shapes of the first release and translates them in `from_pretrained`. Its trainer does not translate them when it resumes:
it skips every weight whose name it does not find.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..errors import OutputError
from .adapter_kinds import active_names


def load_translated(model: Any, folder: str | Path) -> bool:
    """Load a checkpoint's weights with `from_pretrained` if it has names that the model lacks; else do nothing.

    While it loads, a second copy of the weights is in memory.

    Returns:
        whether the weights were loaded.
    """
    if not isinstance(model, PreTrainedModel) or saved_names(Path(folder)) <= set(model.state_dict()):
        return False
    dtype = next(value.dtype for value in model.parameters() if value.is_floating_point())
    found = type(model).from_pretrained(folder, config=copy.deepcopy(model.config), dtype=dtype)
    model.load_state_dict(found.state_dict())
    return True


def check_kind(model: Any, folder: str | Path) -> None:
    """Raise OutputError if a checkpoint holds an adapter but the model is not a peft model, or the reverse."""
    held = any(next(Path(folder).glob(place), None) for place in ("adapter_config.json", "*/adapter_config.json"))
    if held != hasattr(model, "get_base_model"):
        kinds = ("a whole model", "an adapter of peft")
        raise OutputError(
            f"{folder}: holds {kinds[held]}, but the run trains {kinds[not held]}; resume with the model and the settings lora "
            "and adapter of the run that saved it"
        )


def load_adapters(model: Any, folder: str | Path) -> bool:
    """Load a peft model's active adapters from a checkpoint, unless "default" is the only one.

    transformers loads only the first of several adapters. As the best model of a run, it loads the file of "default" into
    an adapter of any name.

    Returns:
        whether the adapters were loaded.
    """
    names = active_names(model)
    if names in ([], ["default"]):
        return False
    from peft import load_peft_weights, set_peft_model_state_dict

    for name in names:  # peft saves "default" in the folder itself
        place = Path(folder) / ("" if name == "default" else name)
        set_peft_model_state_dict(model, load_peft_weights(str(place), device="cpu"), adapter_name=name)
    return True


def saved_names(folder: Path) -> set[str]:
    """The names of the weights in a checkpoint's safetensors files; empty without such files."""
    if (folder / SAFE_WEIGHTS_INDEX_NAME).exists():
        return set(json.loads((folder / SAFE_WEIGHTS_INDEX_NAME).read_text(encoding="utf-8"))["weight_map"])
    if not (folder / SAFE_WEIGHTS_NAME).exists():
        return set()
    with safe_open(folder / SAFE_WEIGHTS_NAME, framework="pt") as file:
        return set(file.keys())
