"""Continues, merges or adds a peft adapter, and compares a model with and without its adapter."""

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

#: Folder in `output_dir` for the base model of a new adapter, used if an older adapter was merged into the base model.
BASE = "base"
#: Name parts that peft inserts into the name of a weight when it wraps the weight's module.
_WRAPPED = re.compile(r"\b(original_module|token_adapter|base_layer)\.")


@dataclass(frozen=True)
class Attached:
    """A model with the adapter that is to be trained, or a model without one.

    Attributes:
        model: the peft model, or the plain model.
        is_new: whether the trainer added the adapter to a plain model.
        keeps_base: whether the base model's weights are unchanged. Some adapters rewrite them.
        merged: whether an older adapter was merged into the model.
        names: names of the plain model's weights, if an older adapter was merged and a new one added.
    """

    model: Any
    is_new: bool = False
    keeps_base: bool = True
    merged: bool = False
    names: frozenset[str] = frozenset()


def attach(model: Any, peft_config: Any, adapter: str | None, *, loaded: bool) -> Attached:
    """Prepare the model's own adapter, a new adapter or no adapter for training.

    Args:
        model: a transformers or peft model.
        peft_config: the config of a new adapter. None: no new adapter.
        adapter: what to do with the adapter that the model comes with: "continue" trains it, "merge" merges it into its base
            model. None: continue, or merge if the trainer loaded the adapter and `peft_config` asks for a new one.
        loaded: whether the trainer loaded the model from a path.

    Raises:
        ConfigError: the settings contradict each other or the model.
        ModelError: the adapter cannot be continued, merged or added.
    """
    if type(model).__name__ == "PeftMixedModel":
        raise ModelError("model: peft cannot save a model of mixed adapters (PeftMixedModel); pass a PeftModel")
    if not hasattr(model, "peft_config") or not hasattr(model, "get_base_model"):
        _check_layers(model, peft_config, adapter)
        if adapter is not None:
            raise ConfigError(f"adapter: '{adapter}' needs a model with an adapter, and this model has none")
        return Attached(model) if peft_config is None else _with_new_adapter(model, peft_config)
    merge = adapter == "merge" or (adapter is None and peft_config is not None and loaded)
    names = ", ".join(f"'{name}'" for name in model.active_adapters)
    if not merge:
        if peft_config is not None and adapter is not None:
            raise ConfigError("adapter: 'continue' trains the model's own adapter, so give no config for a new one")
        if peft_config is not None:
            raise ModelError("peft_config: the model has an adapter already; pass the plain model or no peft_config")
        if any(
            getattr(config, "rank_pattern", None) and hasattr(config, "total_step") for config in active_configs(model)
        ):
            raise ModelError(
                "adapter: AdaLoRA has already reduced the ranks of this adapter, and peft could not load it after more "
                "training; set adapter: merge to merge it into the model"
            )
        if loaded:
            logger.info("adapter: %s continues training (adapter: merge would merge it into the model)", names)
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
    """Raise ModelError or ConfigError if layers of a model that is not a peft model hold an adapter that would be lost."""
    if not any(hasattr(part, "adapter_layer_names") for part in model.modules()):
        return
    added = getattr(model, "_hf_peft_config_loaded", False)  # added by transformers, which saves it as an adapter
    if not added and isinstance(model, PreTrainedModel):
        raise ModelError(
            "model: its layers hold a peft adapter, which only the peft model around it can save; pass the peft model, or the "
            "model that its merge_and_unload() or unload() returns"
        )
    if peft_config is not None:
        raise ModelError("peft_config: the model has an adapter already; pass the plain model or no peft_config")
    if adapter is not None:
        raise ConfigError(
            f"adapter: '{adapter}' is for peft models and paths of adapters; an adapter from add_adapter is always continued"
        )


@torch.no_grad()
def _answer(model: Any) -> Tensor | None:
    """Logits [1, T, V] of a few tokens spread over the vocabulary.

    None if the weights are quantised (merging rounds them) or not in memory, or if the model needs more inputs than tokens.
    """
    values = list(model.parameters())
    if any(value.is_meta or not value.numel() or value.dtype.itemsize == 1 for value in values):
        return None
    try:
        count = unwrap_adapter(model).config.get_text_config().vocab_size
        ids = torch.arange(0, count, max(count // 32, 1), device=values[0].device)[None, :32]
        with evaluating(model):
            return model(input_ids=ids).logits
    except Exception:  # a model may raise anything; check_answers tests later whether it can be trained
        return None


def _check_merged(expected: Tensor | None, found: Tensor | None) -> None:
    """Raise ModelError if merging the adapter changed the model's logits by more than rounding."""
    if expected is None or found is None:
        return
    exact = torch.finfo(expected.dtype).bits >= 32
    differ = ((found.double() - expected.double()).norm() / expected.double().norm()).item()
    if differ > (1e-3 if exact else 0.1):
        raise ModelError(
            f"adapter: it cannot be merged: afterwards the model's logits differ by {differ:.2g} of their norm. Modules that "
            "share a weight (head and embeddings, replicated layers) cannot take an update for only one of them. Set "
            "adapter: continue, without a config for a new adapter, to train it as it is"
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
    except (ValueError, TypeError, RuntimeError) as error:  # RuntimeError: modules_to_save of a quantised layer
        raise ConfigError(f"peft_config: {first_line(error)}") from error
    keeps_base = all(_sum(value) == total for value, total in before)
    if getattr(peft_config, "layer_replication", None):
        logger.info("peft_config: layer_replication repeats layers of the model; the reference repeats them too")
    init = str(getattr(peft_config, "init_lora_weights", ""))
    if not keeps_base and "niter" in init:
        logger.warning(
            "peft_config: init_lora_weights '%s' rewrites the model with random numbers, so the saved adapter does not fit "
            "the model that from_pretrained loads; 'pissa' uses no random numbers",
            init,
        )
    return Attached(wrapped, is_new=True, keeps_base=keeps_base)


def _sum(value: Tensor) -> float:
    """The sum of a tensor's elements, or of its bytes if its dtype has one byte. 0 for a meta tensor.

    Also 0 for a quantised tensor of a class that has no sum, such as torchao's. An adapter cannot rewrite such a tensor.
    """
    if value.is_meta:
        return 0.0
    value = value.detach() if value.dtype.itemsize > 1 else value.detach().view(torch.uint8)
    try:
        return value.sum(dtype=torch.float64).item()
    except NotImplementedError:
        return 0.0


def keep_trainable(model: nn.Module) -> None:
    """Keep bitsandbytes from packing the 4-bit weights of a model on a CPU.

    On CPUs with AVX512-BF16 it packs them at the first forward in evaluation, and packed weights pass no gradient on: later
    training steps would change nothing, without an error (bitsandbytes 0.50).

    Raises:
        ModelError: weights are packed already.
    """
    for name, part in model.named_modules():
        if getattr(part, "support_avx512bf16_for_cpu", False):
            part.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
            if getattr(getattr(part.weight, "quant_state", None), "packing_format_for_cpu", False):
                raise ModelError(
                    f"model: bitsandbytes has packed the weights of '{name}' for evaluation, and they pass no gradient on; "
                    "load the model again, and pass it before its first use"
                )


def named_adapter(model: Any, name: str, setting: str) -> Any:
    """Activate the model's adapter of this name and return the model. Raises ConfigError that names the setting."""
    known = list(getattr(model, "peft_config", {}))
    if name not in known:
        shown = f"it has {', '.join(known)}" if known else "it has none"
        raise ConfigError(f"{setting}: the model has no adapter '{name}'; {shown}{did_you_mean(name, known)}")
    model.set_adapter(name)
    return model


def without_adapter(model: Any) -> Any:
    """Remove the adapter from a peft model in place and return the plain model."""
    tuner: Any = model.base_model
    return tuner.unload() if hasattr(tuner, "unload") else model.get_base_model()


def save_base(attached: Attached, folder: Path) -> None:
    """Save the base model of a new adapter, without the adapter. Raises ModelError if a weight is not found."""
    base = attached.model.get_base_model()
    found = {_WRAPPED.sub("", name): value for name, value in base.state_dict().items()}
    if missing := sorted(attached.names.difference(found)):
        raise ModelError(
            f"peft_config: the merged model cannot be saved, because '{missing[0]}' is not found under this adapter; merge and "
            "save the older adapter beforehand"
        )
    base.save_pretrained(folder, state_dict={name: found[name] for name in attached.names})


# --- the model with and without its adapter ------------------------------------------------------------------------


def reached(output: Tensor) -> set[int]:
    """The ids of the leaf tensors that a result depends on. Walks the autograd graph without computing a gradient."""
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
    """Names of the trainable parameters that the batch's logits depend on, with the model's adapter on or off."""
    trainable = [(name, value) for name, value in policy.model.named_parameters() if value.requires_grad]
    model: Any = policy.model
    with evaluating(model), torch.enable_grad(), nullcontext() if adapter else model.disable_adapter():
        found = reached(policy.packed_logits(batch))
        with torch.no_grad():
            policy.packed_logits(
                batch
            )  # a model that keeps a state between calls would keep its autograd graph and could not be copied
    return [name for name, value in trainable if id(value) in found]


def obstacle_to_training(policy: SplitModel, batch: Batch) -> str | None:
    """Why no training step could change the loss of this batch; None if a step could."""
    named = [name for name, value in policy.model.named_parameters() if value.requires_grad]
    if not named:
        hint = ""
        if hasattr(policy.model, "peft_config"):
            hint = "; load an adapter with PeftModel.from_pretrained(..., is_trainable=True), or by its path"
        return f"model: nothing would be trained, because no parameter requires a gradient{hint}"
    if not trainable_in(policy, batch):
        return f"model: nothing would be trained, because the loss depends on no trainable parameter (such as '{named[0]}')"
    return None


def unsaved(model: Any, beside: list[str]) -> list[str]:
    """Those of the parameter names in `beside` that peft does not save with the model's adapter.

    Args:
        beside: names of trainable parameters that do not belong to the adapter.
    """
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
    """Distance of the logits with and without the adapter, relative to the norm without it; 0 if they agree bit by bit."""
    model: Any = policy.model
    with evaluating(model):
        found = policy.packed_logits(batch)
        with model.disable_adapter():
            expected = policy.packed_logits(batch)
    if torch.equal(found, expected):
        return 0.0
    return max(((found.double() - expected.double()).norm() / expected.double().norm()).item(), 1e-30)


def covers_embeddings(model: Any) -> bool:
    """Whether an adapter wraps the embeddings, where a batch shows the effect on its own tokens only. True if unknown."""
    base = unwrap_adapter(model)
    return not hasattr(base, "get_input_embeddings") or not isinstance(base.get_input_embeddings(), nn.Embedding)
