"""Reasons why our rows may be slower, or need more memory, than the best peer: one registry for all benchmarks.

A row is identified by the test that measures it. If our row is behind a peer and has no reason here, its result says so,
and a test fails once the result is committed. A test also fails if a reason fits no benchmark test.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Reason:
    """text: why rows of the benchmark may lose if their test's name fits the pattern, in which * matches anything."""

    benchmark: str
    pattern: str
    text: str

    def fits(self, benchmark: str, test: str) -> bool:
        expression = ".*".join(map(re.escape, self.pattern.split("*")))
        return self.benchmark == benchmark and re.fullmatch(expression, test) is not None


REASONS = (
    Reason(
        "logits_path",
        "test_loss_and_gradient[*-ours]",
        "Writing a gradient into new memory takes page faults, whatever the kernel does. inplace_backward=True writes it over "
        "the logits instead.",
    ),
    Reason(
        "compile",
        "test_compile[whole-compiled]",
        "In a compiled graph the gradient cannot be written over the logits, because the graph owns them. It goes into new "
        "memory, as the textbook's does.",
    ),
    Reason(
        "memory",
        "test_memory[whole-ours]",
        "It allocates the gradient and nothing else. Less is possible only where the gradient is written over the logits, as "
        "inplace_backward=True does.",
    ),
    Reason(
        "memory",
        "test_memory[hidden-ours]",
        "Both hold dW and the logits of one chunk. dpo_kernels also holds the blocks into which its matrix products pack their "
        "operands, one MiB per thread.",
    ),
    Reason(
        "gpu_logits_path",
        "[8x512x49152]-*",
        "At this size the GPU waits for the host, and our calls took the host longer than the peer's. A default call of the CUDA "
        "backend now has fewer launches, which no card has measured yet.",
    ),
    Reason(
        "gpu_linear_path",
        "*-ours_filtered",
        "The hidden states are random, so almost no gradient entry is small and the filter saves nothing, while each block that "
        "it keeps costs more than in a plain product. The default on a GPU is the exact gradient.",
    ),
    Reason("startup", "test_startup[ours]", "The first call loads the native library. A process does that once."),
)


def explain(benchmark: str, row: dict[str, Any]) -> str | None:
    """Why the row lost to its best peer; None if no reason is known, or if it did not lose."""
    if row.get("vs_best") is None or row["vs_best"] >= 1:
        return None
    # The row's own test comes first in the expression that runs it with its peer.
    test = row.get("select", "").partition(" or ")[0]
    for reason in REASONS:
        if reason.fits(benchmark, test):
            return reason.text
    if row.get("vs_range", (0.0, 0.0))[1] >= 1:
        return "It won some of the rounds: no difference was seen."
    return None
