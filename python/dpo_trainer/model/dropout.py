"""Dropout off: every number that makes a model draw at random is set to 0, and the model is asked whether it still draws."""

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

#: Attributes that count only in training. PhiMoE's `router_jitter_noise` is none: it is a threshold in evaluation too.
_NAMES = re.compile(r".*drop.*|(input_)?jitter_noise|moe_jitter_eps")
_CLASSES = re.compile(r".*(Dropout|DropPath|StochasticDepth).*")
_PROBABILITIES = ("p", "drop_prob", "drop_rate", "rate")
#: Random states that are tried. Layers that are left out with a small probability show in some of them only.
_TRIES = 8


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout probability in the model to 0: of dropout modules, and kept as plain numbers by any module.

    Layers that are left out (`layerdrop`), paths (`drop_path`) and noise on a router's input (`jitter_noise`) count too.
    """
    for module in model.modules():
        names: Any = _PROBABILITIES if _CLASSES.fullmatch(type(module).__name__) else ()
        for name, value in list(vars(module).items()):
            if name not in names and not _NAMES.fullmatch(name):
                continue
            if isinstance(value, float):
                setattr(module, name, 0.0)
            elif isinstance(value, dict):  # peft: by adapter
                value.update({key: 0.0 for key, item in value.items() if isinstance(item, float)})


def settle(model: nn.Module, forward: Callable[[], Tensor], name: str) -> None:
    """See to it that two forwards in training mode agree, and with one in evaluation, or say which module is why not.

    Some models read dropout from their config at every forward. Where a model still draws, it is set to 0 there as well,
    with a line, since it is saved so.

    Args:
        forward: computes an answer of the model, of any shape, from a small batch.
        name: the model in the line.
    """
    if what_draws(model, forward) is None:
        return
    if changed := _disable_in_configs(model):
        logger.info("%s: reads dropout from its config; set to 0 there, and saved so: %s", name, ", ".join(changed))
    if (found := what_draws(model, forward)) is not None:
        logger.warning(
            "%s: in training, though disable_dropout is on, %s: policy and reference differ by that, and losses do not begin "
            "at that of equal models",
            name,
            found,
        )


def _disable_in_configs(model: nn.Module) -> list[str]:
    """Set dropout to 0 in the configs that modules hold; returns the names that were not 0."""
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
    """What makes an answer in training differ from another one, or from that in evaluation, in words; None where nothing does.

    Runs the model a few times on the same question, twice where it asks for no random number. Random states, buffers (running
    means) and modes are afterwards as they were. No gradient is computed.

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
        return f"it answers otherwise than in evaluation, {where}"


def _first_that_differs(
    model: nn.Module, forward: Callable[[], Tensor], generators: list[torch.Generator], *runs: tuple[bool, int]
) -> str:
    """The innermost module that gives something else for the same in two runs, each a (mode, seed)."""
    calls = zip(*(_recorded(model.train(mode), forward, generators, seed) for mode, seed in runs), strict=False)
    for (name, inputs, outputs), (_, other_inputs, other_outputs) in calls:
        if _agree(inputs, other_inputs) and not _agree(outputs, other_outputs):
            return f"first in {name}"
    return "in a module that was not found"


def _answer(
    _model: nn.Module, forward: Callable[[], Tensor], generators: list[torch.Generator], seed: int
) -> tuple[Tensor, bool]:
    """The answer of the model, in the mode that it is in, under a random state, and whether that state has moved."""
    before = _seed(generators, seed)
    answer = forward().clone()
    return answer, before != _states(generators)


def _recorded(
    model: nn.Module, forward: Callable[[], Tensor], generators: list[torch.Generator], seed: int
) -> list[tuple[str, Tensor, Tensor]]:
    """Every module's name and fingerprints of what it took and gave, in the order in which they finished."""
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
    """Sum and norm, float64 [2n], of the n floating-point tensors in an argument or an answer."""
    if isinstance(value, Tensor):
        numbers = value.detach().double() if value.is_floating_point() else value.new_empty(0, dtype=torch.float64)
        return torch.stack([numbers.sum(), numbers.norm()]).cpu()
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    return torch.cat([torch.empty(0, dtype=torch.float64), *map(_fingerprint, parts)])


def _agree(one: Tensor, other: Tensor, limit: float = 0.0) -> bool:
    """Whether two tensors are equal up to what another order of additions changes, or up to `limit`, relative to the largest."""
    if one.shape != other.shape or not one.numel():
        return one.shape == other.shape
    limit = max(limit, 16 * torch.finfo(one.dtype).eps, 1e-6)
    return not bool(((one - other).abs() > limit * one.abs().amax()).any())


# --- random states -------------------------------------------------------------------------------------------------


def _generators(model: nn.Module) -> list[torch.Generator]:
    """Torch's generators that a forward may draw from: the CPU's and those of the model's GPUs."""
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
    """A context that leaves random states, the model's buffers and its modules' modes as they were."""
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
