"""What do the linear path's matrix products cost, by the native CPU kernels and by torch's library?

A step has three products: `Z` (the logits, rows W^T), `dH` (dZ W) and `dW` (dZ^T rows, into float32).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from dpo_kernels import backends
from dpo_kernels.linear.chunk import logits_buffer
from dpo_kernels.linear.products import multiply

from . import method
from .conftest import DTYPES, Settings, wanted
from .method import Contender, Samples
from .report import BEST_PEER, SPREAD, TIME, VS_BEST, Column, Result, listed

HIDDEN, VOCAB = 576, 49152


class ProductCase(NamedTuple):
    """One size of the benchmark."""

    dtype: str
    tokens: int

    @property
    def key(self) -> str:
        """Identifies the case in a test's name."""
        return f"{self.dtype}-{self.tokens}"


#: torch's library takes seconds for dH in a 16-bit format for which the CPU has no instruction.
CASES = {
    "small": [ProductCase("float32", 8)],
    "default": [ProductCase("float32", 32), ProductCase("float32", 128), ProductCase("bfloat16", 16)],
    "full": [
        *(ProductCase("float32", tokens) for tokens in (16, 32, 64, 128, 256, 512, 1024)),
        ProductCase("bfloat16", 64),
        ProductCase("float16", 64),
    ],
}
KINDS = ("Z", "dH", "dW")
CONTENDERS = {
    "ours": "native kernels",
    "library": "torch's library",
    # The library multiplies W rows^T faster than rows W^T; its result is then transposed.
    "library_turned": "torch's library, transposed",
}
COLUMNS = [
    Column("title", "method"),
    TIME,
    SPREAD,
    Column("rate", "GFLOP/s", "count"),
    VS_BEST,
    BEST_PEER,
]


class Operands:
    """Matrices of one size, in the linear path's memory layout."""

    def __init__(self, dtype: torch.dtype, tokens: int, vocab: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.weight = torch.randn(vocab, HIDDEN, generator=generator).to(dtype)
        self.rows = torch.randn(tokens, HIDDEN, generator=generator).to(dtype)
        self.logits = logits_buffer(tokens, vocab, dtype, self.rows.device)
        self.logits.copy_(torch.randn(tokens, vocab, generator=generator))
        self.turned = torch.empty(vocab, tokens, dtype=dtype)
        self.grad_rows = torch.empty_like(self.rows)
        self.grad_weight = torch.empty(vocab, HIDDEN)

    def product(self, kind: str, name: str) -> Callable[[], Tensor]:
        if name == "library_turned":
            return lambda: torch.mm(self.weight, self.rows.t(), out=self.turned)
        backend = "cpu" if name == "ours" else "eager"
        operands = {
            "Z": (self.rows, self.weight.t(), self.logits),
            "dH": (self.logits, self.weight, self.grad_rows),
            "dW": (self.logits.t(), self.rows, self.grad_weight),
        }[kind]
        return lambda: multiply(backend, *operands)


def summary(rows: list[dict[str, Any]]) -> str:
    """The range of our speed-ups, by dtype."""
    by_dtype: dict[str, list[float]] = {}
    for row in rows:
        if row.get("vs_best"):
            by_dtype.setdefault(row["dtype"], []).append(row["vs_best"])
    if not by_dtype:
        return ""
    parts = [f"{min(found):.2f} to {max(found):.2f} times the speed in {dtype}" for dtype, found in by_dtype.items()]
    return f"Against torch's library the native products reach {listed(parts)}."


RESULT = partial(
    Result,
    "products",
    "Matrix products: the linear path's logits Z, and its gradients dH and dW",
    COLUMNS,
    summary=summary,
)


@pytest.fixture(scope="module")
def samples(
    case: ProductCase,
    settings: Settings,
    publish: Callable[[Result], Result],
    request: pytest.FixtureRequest,
) -> dict[str, Samples]:
    """By "kind-contender"."""
    dtype, tokens = case
    if settings.device != "cpu" or backends.why_not("cpu", "cpu") is not None:
        pytest.skip("the native products are the CPU library's")
    names = wanted(request, "test_products", "product", case=case)
    operands = Operands(DTYPES[dtype], tokens, 4096 if settings.sizes == "small" else VOCAB)
    found: dict[str, Samples] = {}
    rows = []
    for kind in KINDS:
        mine = [name for name in names if name.startswith(f"{kind}-")]
        racers = [Contender(name, operands.product(kind, name.partition("-")[2])) for name in mine]
        if not racers:
            continue
        here = method.interleave(racers, settings.rounds if dtype == "float32" else 2, device="cpu")
        found |= here
        for name in mine:
            contender = name.partition("-")[2]
            sample = here[name]
            flops = 2 * tokens * operands.weight.numel()
            select = f"test_products[{dtype}-{tokens}-{name}]"
            row: dict[str, Any] = {
                "case": f"{kind}: {dtype}, {tokens} tokens, H = {HIDDEN}, V = {len(operands.weight):,}",
                "title": CONTENDERS[contender], "ours": contender == "ours", "dtype": dtype,
                "median_s": sample.median, "spread": sample.spread, "rate": flops / sample.median / 1e9,
                "select": select,
            }  # fmt: skip
            if contender == "ours" and (best := method.best_ratio(here, name, [n for n in mine if n != name])):
                row |= best.row(CONTENDERS[best.peer.partition("-")[2]])
                row["select"] += f" or test_products[{dtype}-{tokens}-{best.peer}]"
            rows.append(row)
    publish(RESULT(rows=rows))
    return found


@pytest.mark.parametrize(
    "product",
    [f"{kind}-{name}" for kind in KINDS for name in CONTENDERS if kind == "Z" or name != "library_turned"],
)
def test_products(samples: dict[str, Samples], product: str, replay: Callable[[Samples], None]) -> None:
    replay(samples[product])
