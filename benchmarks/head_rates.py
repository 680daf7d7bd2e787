"""Does the block filter make steps faster on a GPU? The library's rate, the fused forward's share of it, and whole steps.

    python -m benchmarks.head_rates [--json FILE]

Inputs are bfloat16, and a tenth of the vocabulary is likely. `fused share` is the fused forward's rate over the rate of the
library's product alone. `live share` is the share of the gradient's blocks that are multiplied (benchmarks/live_blocks.py
measures it for a real model). `grad_filter="auto"` is exact on GPUs until a card has shown where `filtered step` is faster.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dpo_kernels import backends, linear_logps, use_backend

#: Tokens, H, V: SmolLM2-135M's head, a narrow and a wide one with Llama 3's vocabulary.
SHAPES = ((4096, 576, 49152), (4096, 1024, 128256), (4096, 4096, 128256))
EPS = 2.0**-12


def _step(backend: str, eps: float | None, hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> None:
    with use_backend(backend):
        logps = linear_logps(hidden, weight, labels, bias=bias, grad_filter=eps)
        torch.autograd.grad(logps.sum(), [hidden, weight])


def _live_share(kernels: Any, hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> float:
    plain = {"logit_scale": 1.0, "logit_softcap": 0.0}
    order = kernels.linear_grad.order_by_mean_logit(weight, bias, hidden.float().mean(0), 1.0)
    call = kernels.linear_grad.HeadCall(weight, bias, order, 1.0, 0.0, EPS)
    found = kernels.linear_logps(hidden, weight, bias, labels, frozenset(), **plain)
    return float(
        kernels.linear_grad.logits_block_grad(
            call, hidden, labels, found["logps"], found["max"], found["log_sum"], None
        )
        .live.float()
        .mean()
    )


def measure(
    seconds_of: Callable[[Callable[[], object]], Sequence[float]],
    device: str,
    backend: str,
    shapes: Sequence[tuple[int, int, int]] = SHAPES,
) -> dict[str, dict[str, float]]:
    """Median seconds by shape and name, and the two shares.

    seconds_of runs a function several times and returns the seconds of each call, the device's queue included.
    """
    fused = backends.why_not("triton", device) is None
    rows = {}
    for tokens, hidden_size, vocab in shapes:
        generator = torch.Generator(device).manual_seed(0)
        draw = functools.partial(torch.randn, device=device, dtype=torch.bfloat16, generator=generator)
        hidden, weight = draw(tokens, hidden_size), draw(vocab, hidden_size).mul_(2 / hidden_size**0.5)
        bias = torch.where(torch.arange(vocab, device=device) % 10 == 0, 0.0, -20.0).bfloat16()
        labels = torch.randint(vocab // 10, (tokens,), device=device, generator=generator) * 10
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        jobs: dict[str, Callable[[], object]] = {
            "library product": functools.partial(torch.mm, hidden, weight.t()),
            "exact step": functools.partial(_step, backend, None, *leaves, bias, labels),
            "filtered step": functools.partial(_step, backend, EPS, *leaves, bias, labels),
        }
        if fused:
            kernels = backends.load("triton", device)
            plain = {"logit_scale": 1.0, "logit_softcap": 0.0, "wide": True}
            jobs["fused forward"] = functools.partial(
                kernels.linear_logps, hidden, weight, bias, labels, frozenset(), **plain
            )
        times = {name: statistics.median(seconds_of(job)) for name, job in jobs.items()}
        if fused:
            times["fused share"] = times["library product"] / times["fused forward"]
            times["live share"] = _live_share(kernels, hidden, weight, bias, labels)
        rows[f"[{tokens}x{vocab}x{hidden_size}]"] = times
    return rows


def table(rows: dict[str, dict[str, float]]) -> str:
    """One line per shape, with the library's rate."""
    lines = []
    for shape, times in rows.items():
        tokens, vocab, hidden_size = map(int, shape.strip("[]").split("x"))
        rate = 2 * tokens * vocab * hidden_size / times["library product"]
        cells = [f"{name} {value:.3g}" for name, value in times.items()]
        lines.append(f"{shape}: library {rate / 1e12:.3g} TFLOP/s; {', '.join(cells)}")
    return "\n".join(lines)


def main() -> None:
    from .gpu_stages import CudaMachine

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    machine = CudaMachine()
    rows = measure(machine.seconds, machine.device, backends.default(machine.device))
    print(table(rows))
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine.describe(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
