"""Runs a framework's own DPO step with and without our kernels, and prints what differs as one JSON object.

    python -m tests.frameworks.compare trl              loss and gradients of a tiny model
    python -m tests.frameworks.compare trl --measure    also time and memory, at a real vocabulary

The script of a framework, tests/frameworks/steps/NAME.py, defines

    step_of(size: Size) -> Callable[[], tuple[float, dict[str, Tensor]]]
        builds the framework's trainer (or its loss and model, where it has no trainer) with a policy that differs from its
        reference, and returns a function. Each call of the function runs one DPO step without an optimizer (forward, loss,
        backward) on the same batch, and returns the loss and the gradients of the policy's parameters by name.
    versions() -> dict[str, str]
        the versions of the framework and of what it stands on.
"""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from unittest import mock

import torch
from torch import Tensor

from benchmarks import machine, method

Step = Callable[[], tuple[float, dict[str, Tensor]]]


@dataclass(frozen=True)
class Size:
    """Of the model and the batch.

    Attributes:
        vocab, hidden, layers: of a Llama model with random weights.
        pairs: P; each has one chosen and one rejected sequence.
        prompt, completion: tokens of each prompt and of each completion, roughly.
    """

    vocab: int
    hidden: int
    layers: int
    pairs: int
    prompt: int
    completion: int


TINY = Size(vocab=340, hidden=32, layers=2, pairs=2, prompt=6, completion=8)
#: SmolLM2-135M's vocabulary and width with few layers: the loss's share of a step is larger than in the whole model.
REAL = Size(vocab=49152, hidden=576, layers=4, pairs=4, prompt=64, completion=64)


def calls_counted(stack: ExitStack) -> list[tuple[str, bool]]:
    """A list that grows with every call of our kernels for logits or for hidden states: (name, whether it needs a gradient)."""
    from dpo_kernels import linear, ops

    calls: list[tuple[str, bool]] = []
    for module, name in (
        (ops, "token_logps"),
        (ops, "preference_forward"),
        (linear, "linear_logps"),
        (linear, "whole_pairs"),
    ):
        whole = getattr(module, name)

        def counted(rows: Tensor, *arguments: object, whole=whole, name=name, **named: object) -> object:
            calls.append((name, rows.requires_grad and torch.is_grad_enabled()))
            return whole(rows, *arguments, **named)

        stack.enter_context(mock.patch.object(module, name, counted))
    return calls


def relative(mine: Tensor, theirs: Tensor) -> float:
    """The norm of the difference over the norm of theirs."""
    return float((mine.double() - theirs.double()).norm() / theirs.double().norm().clamp(min=1e-30))


def compare(step: Step, apply: Callable[[], Callable[[], None]]) -> dict[str, object]:
    """Loss and gradients without our kernels, with them, and without them again."""
    plain_loss, plain = step()
    with ExitStack() as stack:
        calls = calls_counted(stack)
        undo = apply()
        calls.clear()  # those of the examples
        loss, grads = step()
        used = sorted({name for name, needs_gradient in calls if needs_gradient})  # those of the policy
        undo()
        calls.clear()
        after_loss, after = step()
        left = len(calls)
    return {
        "loss": plain_loss,
        "loss_difference": abs(loss - plain_loss),
        # Python's max would skip a NaN that is not the first value.
        "grad_difference": float(torch.tensor([relative(grads[name], plain[name]) for name in plain]).max()),
        "grad_norm": float(torch.stack([g.double().norm() for g in plain.values()]).norm()),
        "same_parameters": grads.keys() == plain.keys(),
        "kernels_used": used,
        "kernels_used_after_undo": left,
        "undone": after_loss == plain_loss and all(torch.equal(after[name], plain[name]) for name in plain),
    }


def measure(step: Step, apply: Callable[[], Callable[[], None]], rounds: int) -> dict[str, object]:
    """Time and memory of the step with and without our kernels, in turns."""
    undo: list[Callable[[], None]] = []

    def on() -> None:
        off()
        undo.append(apply())

    def off() -> None:
        while undo:
            undo.pop()()

    contenders = [method.Contender("without", step, off), method.Contender("with", step, on)]
    found = method.interleave(contenders, rounds)
    off()
    without, ours = found["without"], found["with"]
    return {
        "seconds_without": without.median,
        "seconds_with": ours.median,
        "speed": method.ratio(without, ours),
        "extra_bytes_without": without.extra_bytes,
        "extra_bytes_with": ours.extra_bytes,
        "rounds": rounds,
        "size": asdict(REAL),
        "machine": machine.machine_name("cpu"),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("framework")
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(2)
    script = importlib.import_module(f"tests.frameworks.steps.{options.framework}")
    integration = importlib.import_module(f"dpo_kernels.integrations.{options.framework}")
    found = {"framework": options.framework, "versions": {"torch": torch.__version__, **script.versions()}}
    found |= compare(script.step_of(TINY), integration.apply)
    if options.measure:
        found["measured"] = measure(script.step_of(REAL), integration.apply, options.rounds)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
