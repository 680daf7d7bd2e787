"""Turns dropout off: sets every dropout probability of a model to 0 and tests whether the model is still random."""

from __future__ import annotations

import contextlib
import logging
import random
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PretrainedConfig

logger = logging.getLogger("dpo_trainer")

#: Attributes that matter only in training. PhiMoE's `router_jitter_noise` is excluded: evaluation uses it as a threshold.
_NAMES = re.compile(r".*drop.*|(input_)?jitter_noise|moe_jitter_eps")
_CLASSES = re.compile(r".*(Dropout|DropPath|StochasticDepth).*")
_PROBABILITIES = ("p", "drop_prob", "drop_rate", "rate")
#: Number of random seeds to try. Layers that are skipped with a small probability show up under some seeds only.
_TRIES = 8


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout probability in the model to 0, in dropout modules and in number attributes of other modules.

    This includes skipped layers (`layerdrop`), skipped paths (`drop_path`) and noise on a router's input (`jitter_noise`).
    """
    for module in model.modules():
        names: Any = _PROBABILITIES if _CLASSES.fullmatch(type(module).__name__) else ()
        for name, value in list(vars(module).items()):
            if name not in names and not _NAMES.fullmatch(name):
                continue
            if isinstance(value, float):
                setattr(module, name, 0.0)
            elif isinstance(value, dict):  # peft keeps one probability for each adapter
                value.update({key: 0.0 for key, item in value.items() if isinstance(item, float)})


def settle(model: nn.Module, forward: Callable[[], Tensor], name: str) -> None:
    """Make forward passes in training mode equal each other and those in evaluation mode, or warn which module differs.

    Some models read dropout from their config at every forward pass. If the model is still random, dropout is set to 0 in
    the config too. This is logged, because the config is saved with the model.

    Args:
        model: the model, after `disable_dropout`.
        forward: computes an output of the model, of any shape, from a small batch.
        name: the model's name in messages.
    """
    if what_draws(model, forward) is None:
        return
    if changed := _disable_in_configs(model):
        logger.info("%s: reads dropout from its config; set to 0 there, and saved as 0: %s", name, ", ".join(changed))
    if (found := what_draws(model, forward)) is not None:
        logger.warning(
            "%s: in training, although disable_dropout is on, %s; so policy and reference differ, and the first loss is not "
            "that of equal models",
            name,
            found,
        )


def _disable_in_configs(model: nn.Module) -> list[str]:
    """Set dropout to 0 in the configs that modules hold. Returns the names of the settings that were not 0."""
    configs = {id(config): config for config in (getattr(module, "config", None) for module in model.modules())}
    changed = []
    for config in configs.values():
        for name, value in list(vars(config).items()) if isinstance(config, PretrainedConfig) else ():
            if "drop" in name and isinstance(value, float) and value != 0.0:
                setattr(config, name, 0.0)
                changed.append(name)
    return sorted(set(changed))


@torch.no_grad()
def what_draws(model: nn.Module, forward: Callable[[], Tensor]) -> str | None:
    """Describe why outputs in training mode differ from each other or from those in evaluation mode; None if they agree.

    Runs the model several times on the same input, or twice if it draws no random number. Random states, buffers (running
    means) and modes are restored. No gradient is computed.

    Args:
        forward: as for `settle`.
    """
    generators = _generators(model)
    with _left_alone(model, generators):
        expected, _ = _answer(model.eval(), forward, generators, 0)
        first, drawn = _answer(model.train(), forward, generators, 0)
        for seed in range(1, _TRIES if drawn else 1):
            if not _agree(first, _answer(model, forward, generators, seed)[0]):
                return f"it draws at random, {_first_that_differs(model, forward, generators, (True, 0), (True, seed))}"
        if _agree(expected, first, limit=1e-4):
            return None
        where = _first_that_differs(model, forward, generators, (False, 0), (True, 0))
        return f"its output differs from that in evaluation, {where}"


def _first_that_differs(
    model: nn.Module, forward: Callable[[], Tensor], generators: list[torch.Generator], *runs: tuple[bool, int]
) -> str:
    """The innermost module that returns different outputs for the same inputs in two runs, each a (training, seed)."""
    calls = zip(*(_recorded(model.train(mode), forward, generators, seed) for mode, seed in runs), strict=False)
    for (name, inputs, outputs), (_, other_inputs, other_outputs) in calls:
        if _agree(inputs, other_inputs) and not _agree(outputs, other_outputs):
            return f"first in {name}"
    return "in a module that was not found"


def _answer(
    _model: nn.Module, forward: Callable[[], Tensor], generators: list[torch.Generator], seed: int
) -> tuple[Tensor, bool]:
    """The model's output in its current mode under a random seed, and whether random numbers were drawn."""
    before = _seed(generators, seed)
    answer = forward().clone()
    return answer, before != _states(generators)


def _recorded(
    model: nn.Module, forward: Callable[[], Tensor], generators: list[torch.Generator], seed: int
) -> list[tuple[str, Tensor, Tensor]]:
    """Every module's name and fingerprints of its inputs and outputs, in the order in which the modules finished."""
    calls: list[tuple[str, Tensor, Tensor]] = []

    def watch(label: str, module: nn.Module) -> RemovableHandle:
        def hook(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            calls.append((label, _fingerprint([args, kwargs]), _fingerprint(output)))

        return module.register_forward_hook(hook, with_kwargs=True)

    handles = [watch(f"'{name}' ({type(part).__name__})", part) for name, part in model.named_modules()]
    try:
        _seed(generators, seed)
        forward()
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _fingerprint(value: Any) -> Tensor:
    """Sum and norm, float64 [2n], of the n floating-point tensors in an input or output."""
    if isinstance(value, Tensor):
        numbers = value.detach().double() if value.is_floating_point() else value.new_empty(0, dtype=torch.float64)
        return torch.stack([numbers.sum(), numbers.norm()]).cpu()
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    return torch.cat([torch.empty(0, dtype=torch.float64), *map(_fingerprint, parts)])


def _agree(one: Tensor, other: Tensor, limit: float = 0.0) -> bool:
    """Whether two tensors differ by at most rounding, or by at most `limit` relative to the largest element."""
    if one.shape != other.shape or not one.numel():
        return one.shape == other.shape
    limit = max(limit, 16 * torch.finfo(one.dtype).eps, 1e-6)
    return not bool(((one - other).abs() > limit * one.abs().amax()).any())


# --- random states -------------------------------------------------------------------------------------------------


def _generators(model: nn.Module) -> list[torch.Generator]:
    """The torch generators that a forward pass may use: the CPU's and those of the model's GPUs."""
    indices = {value.device.index for value in model.parameters() if value.device.type == "cuda"}
    return [torch.default_generator, *(torch.cuda.default_generators[index] for index in sorted(indices))]


def _states(generators: list[torch.Generator]) -> tuple[bytes, ...]:
    """All random states, in a form that can be compared."""
    return (*(item.get_state().numpy().tobytes() for item in generators), repr(random.getstate()).encode())


def _seed(generators: list[torch.Generator], seed: int) -> tuple[bytes, ...]:
    for generator in generators:
        generator.manual_seed(seed)
    random.seed(seed)
    return _states(generators)


@contextlib.contextmanager
def _left_alone(model: nn.Module, generators: list[torch.Generator]) -> Iterator[None]:
    """A context that restores random states, the model's buffers and the modes of its modules."""
    buffers = [(value, value.clone()) for value in model.buffers()]
    modes = [(module, module.training) for module in model.modules()]
    states, python = [item.get_state() for item in generators], random.getstate()
    try:
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
        random.setstate(python)
        for value, before in buffers:
            value.copy_(before)
        for module, training in modes:
            module.training = training
