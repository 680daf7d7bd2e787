"""Counts the launches, waits for the device and bytes of a call on a GPU; no GPU is needed.

    python -m benchmarks.gpu_counts            print the table
    python -m benchmarks.gpu_counts --write    into results/gpu_counts.json and docs/gpu.md

The tensors pretend to be on a GPU (tests/pretend_gpu.py). Shapes are small, because counts do not depend on them.
tests/test_gpu_counts.py checks that the committed figures are those of this tree.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

os.environ.setdefault("TRITON_INTERPRET", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "tests"))

import torch  # noqa: E402
from pretend_gpu import PretendGPU  # noqa: E402
from torch import Tensor  # noqa: E402

from dpo_kernels import dpo_loss, linear_dpo_loss, linear_logps, use_backend  # noqa: E402
from dpo_kernels.backends import cuda  # noqa: E402

from .readme_table import with_block  # noqa: E402
from .report import Column, markdown_table  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "gpu_counts.json"
PAGE = ROOT / "docs" / "gpu.md"
MARKERS = "<!-- gpu-counts:begin -->", "<!-- gpu-counts:end -->"

PAIRS, LENGTH, VOCAB, HIDDEN = 4, 8, 64, 32
EVERYTHING = ("entropy", "kl", "accuracy", "mean_logits")


def _logits(gpu: PretendGPU, *, packed: bool = False, given: bool = False, **settings: Any) -> Callable[[], Tensor]:
    shape = (2 * PAIRS * LENGTH,) if packed else (2 * PAIRS, LENGTH)
    logits = gpu.tensor(torch.randn(*shape, VOCAB)).requires_grad_()
    labels = gpu.tensor(torch.randint(VOCAB, shape))
    if packed:
        settings["cu_seqlens"] = gpu.tensor(torch.arange(2 * PAIRS + 1) * LENGTH)
    if given:
        settings["ref_logps"] = gpu.tensor(torch.zeros(2 * PAIRS))
    else:
        settings["ref_logits"] = gpu.tensor(torch.randn(*shape, VOCAB))
    return lambda: dpo_loss(logits, labels, inplace_backward=True, **settings).loss


def _linear(gpu: PretendGPU, *, frozen: bool = False, tokens: bool = False, **settings: Any) -> Callable[[], Tensor]:
    hidden = gpu.tensor(torch.randn(2 * PAIRS, LENGTH, HIDDEN).bfloat16()).requires_grad_()
    weight = gpu.tensor(torch.randn(VOCAB, HIDDEN).bfloat16()).requires_grad_(not frozen)
    labels = gpu.tensor(torch.randint(VOCAB, (2 * PAIRS, LENGTH)))
    if tokens:
        return lambda: linear_logps(hidden, weight, labels, **settings).sum()
    ref_logps = gpu.tensor(torch.zeros(2 * PAIRS))
    return lambda: linear_dpo_loss(hidden, weight, labels, ref_logps=ref_logps, **settings).loss


#: The calls by name; each function builds its tensors and returns the call to count.
CASES: dict[str, Callable[[PretendGPU], Callable[[], Tensor]]] = {
    "dpo_loss": _logits,
    "dpo_loss, reference sums given": lambda gpu: _logits(gpu, given=True),
    "dpo_loss, packed": lambda gpu: _logits(gpu, packed=True),
    "dpo_loss, every statistic": lambda gpu: _logits(gpu, statistics=EVERYTHING),
    "dpo_loss, ipo": lambda gpu: _logits(gpu, loss_type="ipo"),
    "linear_dpo_loss": _linear,
    "linear_dpo_loss, many chunks": lambda gpu: _linear(gpu, memory_budget=3 * LENGTH * VOCAB * 2),
    "linear_dpo_loss, frozen head": lambda gpu: _linear(gpu, frozen=True),
    "linear_logps": lambda gpu: _linear(gpu, tokens=True),
}


#: Launches per operator of the CUDA library (csrc/cuda/ops.cpp); tests/test_cuda_emulator.py counts them.
CUDA_LAUNCHES = {
    **{name: (name,) for name in ("token_logps", "sequence_sums", "preference_loss", "logits_grad")},
    "preference_forward": ("token_logps", "preference_loss"),
    "preference_backward": ("logits_grad",),
}


def _cuda_operators(gpu: PretendGPU) -> SimpleNamespace:
    """Stand-ins for the CUDA library's operators that only count launches; their outputs are zeros."""

    def operator(name: str) -> Callable[..., None]:
        def run(*arguments: Any) -> None:
            gpu.launches.extend(f"cuda::{launch}" for launch in CUDA_LAUNCHES[name])
            for value in arguments:
                if isinstance(value, Tensor) and value.dtype == torch.float64 and value.grad_fn is None:
                    value.inner.zero_()

        run.default = run  # type: ignore[attr-defined]
        return run

    return SimpleNamespace(**{name: operator(name) for name in CUDA_LAUNCHES})


def count(case: str, backend: str) -> dict[str, Any]:
    """Counts for forward and backward of a call: our kernels, matrix products, other launches, waits for the device."""
    with (
        PretendGPU() as gpu,
        use_backend(backend),
        mock.patch.object(cuda, "_kernels", _cuda_operators(gpu)),
        mock.patch.object(cuda, "check_available", return_value=None),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        call = CASES[case](gpu)
        gpu.reset()
        call().backward()
        ours = sum("::" in name for name in gpu.launches)
        products = len(gpu.products)
        return {
            "case": case,
            "backend": backend,
            "kernels": ours,
            "products": products,
            "others": len(gpu.launches) - ours - products,
            "waits": len(gpu.syncs),
        }


def count_all() -> list[dict[str, Any]]:
    """A row for each call and GPU backend."""
    return [count(case, backend) for case in CASES for backend in ("triton", "cuda")]


def render(rows: list[dict[str, Any]]) -> str:
    """The table of docs/gpu.md."""
    columns = [
        Column("case", "call, forward and backward"),
        Column("backend", "backend"),
        Column("kernels", "our kernels", "count"),
        Column("products", "matrix products", "count"),
        Column("others", "other launches", "count"),
        Column("waits", "waits for the device", "count"),
    ]
    return "\n".join(markdown_table(columns, rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write the JSON and the table of docs/gpu.md")
    arguments = parser.parse_args()
    rows = count_all()
    print(render(rows))
    if arguments.write:
        RESULTS.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        PAGE.write_text(with_block(PAGE.read_text(encoding="utf-8"), render(rows), MARKERS), encoding="utf-8")


if __name__ == "__main__":
    main()
