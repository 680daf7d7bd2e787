"""Support for kinds of peft adapters that need more than their layers: virtual tokens, hooks, tasks, changing ranks."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from ..errors import ConfigError, ModelError

logger = logging.getLogger("dpo_trainer")

#: Kinds of adapters of which a part runs in modules around the model, not inside it.
_AROUND = {
    "XLORA": "X-LoRA weighs its experts in a forward of its own",
    "POLY": "Poly hands tasks to its layers",
    "SHADOW": "Shadow runs a network beside the model",
}
#: Kinds of adapters that pass keys and values to the model as a cache.
_CACHED = ("PREFIX_TUNING", "CARTRIDGE")


def active_configs(model: Any) -> list[Any]:
    """The peft configs of a model's active adapters; empty for a model that is not a peft model."""
    if not hasattr(model, "get_base_model"):
        return []
    own, inner = model.active_adapter, model.active_adapters  # of X-LoRA, active_adapters are the experts
    names = dict.fromkeys([*([own] if isinstance(own, str) else own), *inner])
    return [model.peft_config[name] for name in names if name in model.peft_config]


def active_names(model: Any) -> list[str]:
    """Names of a peft model's active adapters that have weights in its layers; empty for other models."""
    if not hasattr(model, "get_base_model"):
        return []
    return [name for name in model.active_adapters if name in model.peft_config]


def own_forward(model: Any) -> str | None:
    """Describe what an active adapter does in the peft model's own forward, which calling backbone and head would skip.

    Returns:
        the description; None if the whole adapter is in the model's layers.
    """
    for config in active_configs(model):
        if config.is_prompt_learning:
            return f"{config.peft_type.value} puts {config.num_virtual_tokens} virtual tokens in front of every row"
        if config.peft_type.value in _AROUND:
            return _AROUND[config.peft_type.value]
        if getattr(config, "alora_invocation_tokens", None):
            return "aLoRA looks for its invocation tokens in every row"
    return None


def virtual_tokens(model: Any) -> int:
    """Number of virtual tokens that prompt-learning adapters put in front of every row."""
    return sum(config.num_virtual_tokens for config in active_configs(model) if config.is_prompt_learning)


def needs_task(model: Any) -> bool:
    """Whether the peft model's forward needs `task_ids`."""
    return any(config.peft_type.value in ("MULTITASK_PROMPT_TUNING", "POLY") for config in active_configs(model))


def check_adapter(model: Any, *, gradient_checkpointing: bool) -> None:
    """Check that the adapters can be trained on pairs, and log which parts of their methods are not supported.

    Raises:
        ModelError: an adapter needs a task for every pair.
        ConfigError: an adapter cannot be trained with gradient checkpointing.
    """
    for config in active_configs(model):
        kind = config.peft_type.value
        tasks = getattr(config, "num_tasks", getattr(config, "n_tasks", 1))
        if needs_task(model) and tasks > 1:
            raise ModelError(
                f"peft_config: {kind} with {tasks} tasks needs the task of every pair, which the data do not have; set one task"
            )
        if kind in _CACHED and gradient_checkpointing:
            raise ConfigError(
                f"gradient_checkpointing: recomputed layers use no cache, but {kind} passes its parameters in a cache; turn "
                "gradient_checkpointing off"
            )
        if getattr(config, "orth_reg_weight", 0):
            logger.info(
                "%s: the regulariser that keeps its factors orthogonal (orth_reg_weight) is not added to the loss", kind
            )
        if kind == "SHADOW" and config.auxiliary_loss_weight:
            logger.info("%s: its auxiliary loss (auxiliary_loss_weight) is not added to the loss", kind)


@contextlib.contextmanager
def moved(model: nn.Module) -> Iterator[None]:
    """A context in which the trainable parameters of a peft model are perturbed at random; then they are restored bit by bit.

    Most adapters start without any effect. Perturbed adapters show whether they have an effect at all, and whether two ways
    of calling the model agree. Does not use the global random state.
    """
    parameters = [value for value in model.parameters() if value.requires_grad] if active_configs(model) else []
    # Of a sharded parameter, each process perturbs its own shard.
    parts = [getattr(value, "_local_tensor", value).data for value in parameters if value.is_floating_point()]
    before = [part.clone() for part in parts]
    for part in parts:
        generator = torch.Generator(part.device).manual_seed(0)
        part.add_(torch.randn(part.shape, generator=generator, device=part.device).to(part.dtype), alpha=0.05)
    try:
        yield
    finally:
        for part, value in zip(parts, before, strict=True):
            part.copy_(value)


class AllocateRanks(TrainerCallback):
    """Lets an adapter redistribute its ranks between layers after every update (AdaLoRA, AdaMSS).

    peft requires training loops to call `update_and_allocate` between the optimizer's step and the next `zero_grad`.
    """

    @staticmethod
    def wanted(model: Any) -> bool:
        """Whether the model has an adapter that redistributes its ranks."""
        return bool(active_configs(model)) and hasattr(type(model.base_model), "update_and_allocate")

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Warn if the run ends before the adapter has reached its final ranks."""
        for config in active_configs(kwargs["model"]):
            end = (getattr(config, "total_step", None) or 0) - getattr(config, "tfinal", 0)
            if end > state.max_steps:
                logger.warning(
                    "%s: reaches target_r at step %d (total_step - tfinal), but the run has %d steps; lower total_step",
                    config.peft_type.value,
                    end,
                    state.max_steps,
                )

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Redistribute the ranks. transformers calls this between the optimizer's step and `zero_grad`."""
        kwargs["model"].base_model.update_and_allocate(state.global_step)


#: Attributes of AdaLoRA's rank allocator that hold running means for each parameter.
_IMPORTANCE = ("ipt", "exp_avg_ipt", "exp_avg_unc")


def allocation_state(model: Any) -> dict[str, Any]:
    """AdaLoRA's rank pattern and importance scores, which peft does not save in a checkpoint; empty for other models."""
    allocator = getattr(model.base_model, "rankallocator", None) if active_configs(model) else None
    if allocator is None:
        return {}
    pattern = model.peft_config[model.base_model.trainable_adapter_name].rank_pattern
    return {"rank_pattern": pattern, **{name: dict(getattr(allocator, name)) for name in _IMPORTANCE}}


@contextlib.contextmanager
def all_ranks(model: Any) -> Iterator[None]:
    """A context in which peft saves all of AdaLoRA's ranks, also those that are 0 now and may return in a resumed run."""
    configs = [config for config in active_configs(model) if config.peft_type.value == "ADALORA"]
    patterns = [config.rank_pattern for config in configs]
    for config in configs:
        config.rank_pattern = None
    try:
        yield
    finally:
        for config, pattern in zip(configs, patterns, strict=True):
            config.rank_pattern = pattern


def take_allocation_state(model: Any, state: dict[str, Any]) -> None:
    """Restore what `allocation_state` returned."""
    if not state:
        return
    model.peft_config[model.base_model.trainable_adapter_name].rank_pattern = state["rank_pattern"]
    device = next(model.parameters()).device
    for name in _IMPORTANCE:
        values = {key: value.to(device) for key, value in state[name].items()}
        setattr(model.base_model.rankallocator, name, values)
