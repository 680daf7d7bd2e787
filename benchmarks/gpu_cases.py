"""The operator table of a GPU session: every backend against float64, loss and gradients, case by case, in plain Python."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def reason(error: BaseException) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {error}"[:300]


def failure(call: Callable[[], object]) -> str | None:
    """Why the call fails, or None. A failure is a result too: the session goes on with the next case."""
    try:
        call()
    except Exception as error:
        return reason(error)
    return None


def run_table(backend: str, device: str) -> Iterator[tuple[str, str | None]]:
    """Yields (case, None or what is wrong) for every case on one backend: first the logits path, then the linear path."""
    yield from _logits_table(backend, device)
    yield from _linear_table(backend, device)


def _logits_table(backend: str, device: str) -> Iterator[tuple[str, str | None]]:
    import torch

    sys.path.insert(0, str(ROOT / "tests"))
    from cases import CASES, Case

    divergences = [
        Case("kl_term", options={"kl_coef": 0.3}),
        Case("tdpo_bfloat16", dtype=torch.bfloat16, options={"loss_type": "tdpo", "kl_coef": 0.2}),
    ]
    for case in [*CASES, *divergences]:
        if case.dtype != torch.float64:
            yield case.name, failure(lambda case=case: _check_logits(backend, case, torch.device(device)))


def _check_logits(backend: str, case: Any, device: Any) -> None:
    import torch

    from dpo_kernels import dpo_loss, reference, use_backend

    from cases import make_inputs
    from checks import check_gradient

    inputs = make_inputs(case, device)
    found = []
    for dtype in (torch.float64, torch.float32):
        leaf = inputs.logits.detach().to(dtype).requires_grad_()
        keywords = {
            k: v.to(dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() else v
            for k, v in inputs.keywords.items()
        }
        loss = reference.dpo_loss(leaf, inputs.labels, **keywords)
        loss.sum().backward()
        found.append((loss.detach().double(), leaf.grad))
    (truth, truth_grad), (eager, eager_grad) = found
    logits = inputs.logits.detach().requires_grad_()
    with use_backend(backend):
        loss = dpo_loss(logits, inputs.labels, **inputs.keywords).loss
        loss.backward()
    allowed = (eager - truth).abs().max() + 2**-23 * truth.abs().max().clamp(min=0.5)
    error = (loss.detach().double() - truth).abs().max()
    if not error <= allowed:
        raise AssertionError(f"loss off by {error:.2e}, allowed {allowed:.2e}")
    if case.vocab > 1:
        check_gradient(logits.grad, truth_grad, eager_grad.to(case.dtype), inputs.labels)


def _linear_table(backend: str, device: str) -> Iterator[tuple[str, str | None]]:
    import torch

    from benchmarks.linear_problem import LinearCase

    for dtype in (torch.float32, torch.bfloat16):
        # Vocabularies: one whose rows are multiples of 16 bytes, and an odd one, whose rows must be padded.
        for vocab in (2048, 1021):
            for settings in ({}, {"frozen": True}, {"reference": "precomputed"}):
                case = LinearCase("", 2, 24, 0.5, 64, vocab, source="random", **settings)
                name = f"linear {case.key} {str(dtype).removeprefix('torch.')}"
                yield name, failure(lambda case=case, dtype=dtype: _check_linear(backend, case, device, dtype))


def _check_linear(backend: str, case: Any, device: str, dtype: Any) -> None:
    from benchmarks.linear_problem import LinearProblem, LinearTruth
    from benchmarks.peers.linear import LINEAR_PEERS
    from dpo_kernels import use_backend

    problem = LinearProblem(case, device, dtype)
    truth = LinearTruth(problem)
    eager = truth.error_of(LINEAR_PEERS["eager"](problem).step())
    with use_backend(backend):
        ours = truth.error_of(LINEAR_PEERS["ours"](problem).step())
    if not ours.within(eager):
        raise AssertionError(f"gradients off: {ours}; eager PyTorch: {eager}")
