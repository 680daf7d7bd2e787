"""Adapters of peft: continuing, merging or adding one, and what the model is without it."""

from __future__ import annotations

import logging
import re
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import ConfigError, ModelError, did_you_mean, first_line
from .adapter_kinds import active_configs, active_names
from .split import Batch, SplitModel, evaluating, unwrap_adapter

logger = logging.getLogger("dpo_trainer")

#: Folder in `output_dir` of the model that a new adapter belongs to, where an older adapter was merged into its base.
BASE = "base"
#: Parts of a weight's name by which peft moves it down where it wraps a module.
_WRAPPED = re.compile(r"\b(original_module|token_adapter|base_layer)\.")


@dataclass(frozen=True)
class Attached:
    """A model with the adapter that is to be trained, or a plain one.

    Attributes:
        is_new: whether the trainer put the adapter around a plain model.
        keeps_base: whether the model without the adapter still is the plain model. Some adapters rewrite its weights.
        merged: whether an older adapter was merged into the model before.
        names: of the weights of the plain model under a new adapter.
    """

    model: Any
    is_new: bool = False
    keeps_base: bool = True
    merged: bool = False
    names: frozenset[str] = frozenset()


def attach(model: Any, peft_config: Any, adapter: str | None, *, loaded: bool) -> Attached:
    """The model with its own adapter, or a new one, or none.

    Args:
        adapter: what becomes of the adapter that the model brings: "continue" trains it, "merge" merges it into its base.
            None: it is continued, or merged where the trainer loaded it and there is a `peft_config` for a new one.
        loaded: whether the trainer loaded the model from a path.

    Raises:
        ConfigError, ModelError: the adapter and the settings contradict each other.
    """
    if type(model).__name__ == "PeftMixedModel":
        raise ModelError("model: peft saves no model of mixed adapters (PeftMixedModel); pass a PeftModel")
    if not hasattr(model, "peft_config") or not hasattr(model, "get_base_model"):
        _check_layers(model, peft_config, adapter)
        if adapter is not None:
            raise ConfigError(f"adapter: '{adapter}' needs a model that brings an adapter, and this one brings none")
        return Attached(model) if peft_config is None else _with_new_adapter(model, peft_config)
    merge = adapter == "merge" or (adapter is None and peft_config is not None and loaded)
    names = ", ".join(f"'{name}'" for name in model.active_adapters)
    if not merge:
        if peft_config is not None and adapter is not None:
            raise ConfigError(
                "adapter: 'continue' trains the adapter that the model brings, so give no config for a new one"
            )
        if peft_config is not None:
            raise ModelError("peft_config: the model has an adapter already; pass the plain model or no peft_config")
        if any(
            getattr(config, "rank_pattern", None) and hasattr(config, "total_step") for config in active_configs(model)
        ):
            raise ModelError(
                "adapter: AdaLoRA has cut the ranks of this one already, and peft cannot load what is saved of it after "
                "more training; adapter: merge merges it into the model"
            )
        if loaded:
            logger.info("adapter: %s goes on training (adapter: merge would merge it into the model)", names)
        return Attached(model)
    if not hasattr(model.base_model, "merge_and_unload"):
        raise ModelError(f"adapter: {type(model.base_model).__name__} cannot merge this kind of adapter into its model")
    expected = _answer(model)
    model = model.merge_and_unload().requires_grad_(peft_config is None)
    _check_merged(expected, _answer(model))
    if peft_config is None:
        logger.info("adapter: %s is merged into the model, and all of its weights train", names)
        return Attached(model, merged=True)
    logger.info("adapter: %s is merged into the model, and a new one starts on top of it", names)
    if getattr(peft_config, "layer_replication", None):
        raise ModelError(
            "peft_config: layer_replication changes the merged model; merge and save the older adapter beforehand"
        )
    plain = frozenset(model.state_dict())
    found = _with_new_adapter(model, peft_config)
    if not found.keeps_base:
        raise ModelError(
            "peft_config: this adapter rewrites the merged model; merge and save the older adapter beforehand"
        )
    return Attached(found.model, is_new=True, merged=True, names=plain)


def _check_layers(model: Any, peft_config: Any, adapter: str | None) -> None:
    """Raise ModelError or ConfigError for a model that is no peft model and whose layers hold an adapter that would be lost."""
    if not any(hasattr(part, "adapter_layer_names") for part in model.modules()):
        return
    added = getattr(model, "_hf_peft_config_loaded", False)  # by transformers, which saves it as an adapter
    if not added and isinstance(model, PreTrainedModel):
        raise ModelError(
            "model: its layers hold an adapter of peft, which is saved only with the peft model around it; pass that one, or "
            "the model that its merge_and_unload() or unload() gives"
        )
    if peft_config is not None:
        raise ModelError("peft_config: the model has an adapter already; pass the plain model or no peft_config")
    if adapter is not None:
        raise ConfigError(
            f"adapter: '{adapter}' is for peft models and paths of adapters; what add_adapter added goes on training"
        )


@torch.no_grad()
def _answer(model: Any) -> Tensor | None:
    """Logits [1, T, V] of a few tokens from all over the vocabulary.

    None where they cannot be had: of quantised weights, which merging rounds; of weights that are elsewhere; of a model that
    does not take tokens alone.
    """
    values = list(model.parameters())
    if any(value.is_meta or not value.numel() or value.dtype.itemsize == 1 for value in values):
        return None
    try:
        count = unwrap_adapter(model).config.get_text_config().vocab_size
        ids = torch.arange(0, count, max(count // 32, 1), device=values[0].device)[None, :32]
        with evaluating(model):
            return model(input_ids=ids).logits
    except Exception:  # whatever a model's own code raises; whether it can be trained is asked later
        return None


def _check_merged(expected: Tensor | None, found: Tensor | None) -> None:
    """Raise ModelError where a merged model answers otherwise than the model with its adapter did, beyond rounding."""
    if expected is None or found is None:
        return
    exact = torch.finfo(expected.dtype).bits >= 32
    differ = ((found.double() - expected.double()).norm() / expected.double().norm()).item()
    if differ > (1e-3 if exact else 0.1):
        raise ModelError(
            f"adapter: it cannot be merged: afterwards the model's logits differ by {differ:.2g} of their norm. Modules that "
            "share one weight (head and embeddings, replicated layers) cannot take an update for one of them. adapter: "
            "continue, without a config for a new one, trains it as it is"
        )


def _with_new_adapter(model: Any, peft_config: Any) -> Attached:
    from peft import PeftConfig, get_peft_model

    if not isinstance(peft_config, PeftConfig):
        raise ConfigError(
            f"peft_config: expected a config of peft, such as LoraConfig, got {type(peft_config).__name__}"
        )
    before = [(value, _sum(value)) for value in model.parameters()]
    try:
        wrapped = get_peft_model(model, peft_config)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"peft_config: {first_line(error)}") from error
    keeps_base = all(_sum(value) == total for value, total in before)
    if getattr(peft_config, "layer_replication", None):
        logger.info("peft_config: layer_replication repeats layers of the model; the reference repeats them too")
    init = str(getattr(peft_config, "init_lora_weights", ""))
    if not keeps_base and "niter" in init:
        logger.warning(
            "peft_config: init_lora_weights '%s' rewrites the model at random, so the saved adapter does not fit what "
            "from_pretrained makes of the model; 'pissa' does not draw",
            init,
        )
    return Attached(wrapped, is_new=True, keeps_base=keeps_base)


def _sum(value: Tensor) -> float:
    """The sum of a tensor's elements, or of its bytes where its type has no sum. 0 for a tensor without memory."""
    if value.is_meta:
        return 0.0
    value = value.detach() if value.dtype.itemsize > 1 else value.detach().view(torch.uint8)
    return value.sum(dtype=torch.float64).item()


def named_adapter(model: Any, name: str, setting: str) -> Any:
    """The model with the adapter of this name switched on. Raises ConfigError, which begins with the setting."""
    known = list(getattr(model, "peft_config", {}))
    if name not in known:
        shown = f"it has {', '.join(known)}" if known else "it has none"
        raise ConfigError(f"{setting}: the model has no adapter '{name}'; {shown}{did_you_mean(name, known)}")
    model.set_adapter(name)
    return model


def without_adapter(model: Any) -> Any:
    """The plain model that a peft model was made of, which it is no longer afterwards."""
    tuner: Any = model.base_model
    return tuner.unload() if hasattr(tuner, "unload") else model.get_base_model()


def save_base(attached: Attached, folder: Path) -> None:
    """Save the plain model under a new adapter."""
    base = attached.model.get_base_model()
    found = {_WRAPPED.sub("", name): value for name, value in base.state_dict().items()}
    if missing := sorted(attached.names.difference(found)):
        raise ModelError(
            f"peft_config: the merged model cannot be saved, since '{missing[0]}' is not found under this adapter; merge and "
            "save the older adapter beforehand"
        )
    base.save_pretrained(folder, state_dict={name: found[name] for name in attached.names})


# --- what the model is without its adapter -------------------------------------------------------------------------


def reached(output: Tensor) -> set[int]:
    """The ids of the leaf tensors whose gradient a result has. Computes no gradient: only its graph is walked."""
    seen: set[Any] = set()
    waiting, found = [output.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if (leaf := getattr(node, "variable", None)) is not None:
            found.add(id(leaf))
        waiting += [following for following, _ in node.next_functions]
    return found


def trainable_in(policy: SplitModel, batch: Batch, *, adapter: bool = True) -> list[str]:
    """Names of the trainable parameters that the batch's logits depend on, with the model's adapter or without it."""
    trainable = [(name, value) for name, value in policy.model.named_parameters() if value.requires_grad]
    model: Any = policy.model
    with evaluating(model), torch.enable_grad(), nullcontext() if adapter else model.disable_adapter():
        found = reached(policy.packed_logits(batch))
        with torch.no_grad():
            policy.packed_logits(
                batch
            )  # models that keep a state between calls would keep its graph, and not be copied
    return [name for name, value in trainable if id(value) in found]


def obstacle_to_training(policy: SplitModel, batch: Batch) -> str | None:
    """Why no step could change the loss, judged by a batch; None if one could."""
    named = [name for name, value in policy.model.named_parameters() if value.requires_grad]
    if not named:
        hint = ""
        if hasattr(policy.model, "peft_config"):
            hint = "; load an adapter with PeftModel.from_pretrained(..., is_trainable=True), or by its path"
        return f"model: nothing would be trained, since no parameter requires a gradient{hint}"
    if not trainable_in(policy, batch):
        return (
            f"model: nothing would be trained, since the loss does not depend on what is trainable ('{named[0]}' first)"
        )
    return None


def unsaved(model: Any, beside: list[str]) -> list[str]:
    """The names, of trainable parameters beside a peft model's adapter, of those that peft does not save with it."""
    if not beside:
        return []
    from peft import get_peft_model_state_dict

    states = [
        get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False) for name in active_names(model)
    ]
    saved = {value.data_ptr() for state in states for value in state.values()}
    return [name for name in beside if model.get_parameter(name).data_ptr() not in saved]


@torch.no_grad()
def effect(policy: SplitModel, batch: Batch) -> float:
    """How far the model's logits are from those without its adapter, relative to their norm; 0 where they agree to the bit."""
    model: Any = policy.model
    with evaluating(model):
        found = policy.packed_logits(batch)
        with model.disable_adapter():
            expected = policy.packed_logits(batch)
    if torch.equal(found, expected):
        return 0.0
    return max(((found.double() - expected.double()).norm() / expected.double().norm()).item(), 1e-30)


def covers_embeddings(model: Any) -> bool:
    """Whether an adapter covers the embeddings: a batch shows nothing of tokens that it does not hold. True if unknown."""
    base = unwrap_adapter(model)
    return not hasattr(base, "get_input_embeddings") or not isinstance(base.get_input_embeddings(), nn.Embedding)
