"""Why a row of ours may be slower, or need more memory, than the best peer: one registry for all benchmarks.

A row is named by the test that measures it. A loss without a reason here is printed as NOT EXPLAINED, and fails a test once
its result is committed; a reason that fits no test fails one as well.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Reason:
    """text: why rows of the benchmark may lose whose test fits the pattern, in which * stands for anything."""

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
        "A gradient in memory of its own is paid in page faults, which no kernel can avoid; inplace_backward=True writes it "
        "over the logits.",
    ),
    Reason(
        "compile",
        "test_compile[logits-compiled]",
        "A compiled graph owns its tensors, so the gradient cannot take the logits' memory: it is written into fresh pages, "
        "as the textbook's is.",
    ),
    Reason(
        "memory",
        "test_memory[logits-ours]",
        "The gradient itself is all that it allocates; a peer can need no less unless it overwrites the logits, as "
        "inplace_backward=True does.",
    ),
    Reason(
        "memory",
        "test_memory[linear-ours]",
        "Beside dW and the logits of one chunk, which the best peer holds too, there are the blocks that the products are packed "
        "in, a MiB a thread.",
    ),
    Reason("startup", "test_startup[ours]", "The first call loads the native library, which a process does once."),
)


def explain(benchmark: str, row: dict[str, Any]) -> str | None:
    """Why the row lost to its best peer; None if nobody has said, or if it did not lose."""
    if row.get("vs_best") is None or row["vs_best"] >= 1:
        return None
    # The row's own test comes first in the expression that runs it beside its peer.
    test = row.get("select", "").partition(" or ")[0]
    for reason in REASONS:
        if reason.fits(benchmark, test):
            return reason.text
    if row.get("vs_range", (0.0, 0.0))[1] >= 1:
        return "It won some of the rounds: no difference was seen."
    return None
