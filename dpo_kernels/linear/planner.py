"""Which strategy the linear path takes, and in which chunks, for a memory budget: pure functions of sizes.

Nothing here touches a tensor, so tests enumerate plans and `describe()` explains them. N counts scored tokens (those with
a label and a weight), H is the hidden size, V the vocabulary. One product of [N, H] with the head [V, H] costs 2NHV flops.

    strategy       when                                                              products (policy)
    forward        nothing needs a gradient                                          1
    whole_pairs    a scalar loss of objectives that see one pair at a time           3 (+ recomputation of what did not fit)
    frozen_head    the head needs no gradient                                        2
    filtered       the gradient is filtered (16-bit default)                         1 and a sparse rest
    kept_logits    any gradient; the scored tokens' logits fit in the budget         3
    two_pass       any gradient; the backward projects again                         4

What is particular to a GPU is in gpu.py.

A reference that is projected too (`ref_hidden`) adds one product to each. A differentiated token-level KL (kl_coef, TDPO)
takes whole_pairs or two_pass, whose recomputation then covers the reference as well.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from .gpu import BLOCK, GPU_SHARE, fused_row_bytes, row_stride

#: What the planner assumes. Nothing else in this module is a guess or a matter of taste.
#:
#: default budget, at least, in bytes; and at least for a trainer's step, whose activations take gigabytes.
_FLOOR, _STEP_FLOOR = 64 * 2**20, 256 * 2**20
#: Rows of a chunk beyond which torch's products on a CPU gain little; half as many cost 10%, as each packs the whole head.
_WIDE_ROWS = 512
#: Columns of dW that a 16-bit gradient is widened by at a time on CPU (see linear/products.py).
WIDENED_COLUMNS = 2048
#: Small float64 values per token in flight: log-probabilities, statistics, weights, indices.
_SMALL_BYTES = 16 * 8

_UNITS = {"": 1, "b": 1, "kb": 2**10, "mb": 2**20, "gb": 2**30, "kib": 2**10, "mib": 2**20, "gib": 2**30}
#: Strategies whose chunks are gone before a gradient of the head is made, if one ever is.
_CHUNKS_ALONE = ("forward", "frozen_head", "filtered")


def default_budget(hidden_size: int, vocab: int, wide_bytes: int = 0, memory: int = 0) -> int:
    """Half of what a float32 gradient of the head takes, at least 64 MiB, in bytes; on a GPU at least GPU_SHARE of `memory`.

    A step that trains the head holds that gradient anyway, so the chunks never decide whether a batch fits. Chunks that
    never meet it may take `wide_bytes`, but no more than it would. A GPU's call asks for its budget before it starts, and
    takes smaller chunks where the card has less to give (memory.py).

    Args:
        memory: bytes of the card, 0 on a CPU.
    """
    gradient = 4 * hidden_size * vocab
    return max(_FLOOR, gradient // 2, min(gradient, wide_bytes), int(GPU_SHARE * memory))


def step_budget(hidden_size: int, vocab: int, memory: int = 0) -> int:
    """What a trainer's step takes where nobody says, in bytes: `default_budget`, but at least 256 MiB.

    Its activations take gigabytes beside which a larger buffer is cheap: a pair of 600 tokens is whole here (V = 49,152,
    float32, with a KL), or 1,300 tokens' logits are kept for the backward, and none is projected twice. On an 80 GB card the
    16-bit logits of 8,192 tokens wait at V = 128k.
    """
    return max(_STEP_FLOOR, default_budget(hidden_size, vocab, memory=memory))


def budget_of(memory_budget: int | str | None, head: Head, strategy: str, memory: int = 0) -> int:
    """The bytes that a call may use: as given, or the strategy's default. Raises as `parse_budget`."""
    if memory_budget is None:
        wide = _WIDE_ROWS * head.row_bytes * (strategy in _CHUNKS_ALONE)
        return default_budget(head.hidden_size, head.vocab, wide, memory)
    return parse_budget(memory_budget, head.hidden_size, head.vocab)


def parse_budget(memory_budget: int | str | None, hidden_size: int, vocab: int) -> int:
    """Bytes from an int, a text such as "256MB" (1 MB = 2^20 bytes here), or None for `default_budget`.

    Raises:
        ValueError, TypeError: not positive, or not readable.
    """
    if memory_budget is None:
        return default_budget(hidden_size, vocab)
    if isinstance(memory_budget, str):
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", memory_budget)
        unit = None if found is None else _UNITS.get(found[2].lower())
        if found is None or unit is None:
            raise ValueError(f'memory_budget must read like "256MB" or "1.5GB"; got {memory_budget!r}')
        memory_budget = int(float(found[1]) * unit)
    if isinstance(memory_budget, bool) or not isinstance(memory_budget, int):
        raise TypeError(f"memory_budget must be bytes (int), a text such as '256MB', or None; got {memory_budget!r}")
    if memory_budget <= 0:
        raise ValueError(f"memory_budget must be positive; got {memory_budget}")
    return memory_budget


@dataclass(frozen=True)
class Head:
    """The sizes that a plan depends on.

    Attributes:
        hidden_size, vocab: H and V.
        item_size: bytes per logit (the dtype that the projection computes in).
        needs_hidden, needs_weight: whose gradient is wanted (needs_weight covers the bias).
        projects_reference: a reference is projected as well.
        kl: policy and reference logits are needed side by side.
        widens: 16-bit products whose dW is accumulated by widening on the CPU.
        kl_gradient: a token-level KL is differentiated, so a gradient needs both models' logits of a token at once.
        fused: the products are the fused kernels', which leave out the gradient's blocks without probability.
        device_type: "cpu", or the GPU's.
        float16: logits and their gradient are float16, whose smallest number is 6e-8.
    """

    hidden_size: int
    vocab: int
    item_size: int
    needs_hidden: bool = True
    needs_weight: bool = True
    projects_reference: bool = False
    kl: bool = False
    widens: bool = False
    kl_gradient: bool = False
    fused: bool = False
    device_type: str = "cpu"
    float16: bool = False

    @property
    def row_bytes(self) -> int:
        """Working bytes per token of a chunk: its logits, and what the stages and products need beside them."""
        if self.fused:
            return fused_row_bytes(self.hidden_size, self.vocab, self.item_size) + _SMALL_BYTES
        row = row_stride(self.vocab, self.item_size, self.device_type) * self.item_size
        logits = row * (2 if self.kl and self.projects_reference else 1)
        gathered = 3 * self.hidden_size * self.item_size
        widened = 4 * (min(self.vocab, WIDENED_COLUMNS) + self.hidden_size) if self.widens and self.needs_weight else 0
        return logits + gathered + widened + _SMALL_BYTES

    @property
    def product(self) -> int:
        """Flops of one product per token."""
        return 2 * self.hidden_size * self.vocab


@dataclass(frozen=True)
class Group:
    """Pairs `first .. last - 1`, whose tokens are consecutive in the plan's order, cut into chunks at `bounds`."""

    first: int
    last: int
    bounds: tuple[int, ...]

    @property
    def chunks(self) -> list[tuple[int, int]]:
        """(begin, end) of each chunk."""
        return list(pairwise(self.bounds))


@dataclass(frozen=True)
class Plan:
    """What the linear path will do.

    Attributes:
        strategy: see the module's table.
        groups: for whole_pairs, the pairs taken together; otherwise one group with all tokens.
        rows: rows of the one logits buffer, at most the budget's.
        tokens: N.
        bytes: working memory at its peak: everything but the caller's tensors, the gradients, and for `filtered` the kept
            entries.
        flops: of all dense products, forward and backward.
        budget: bytes.
        reason: why this strategy.
    """

    strategy: str
    groups: tuple[Group, ...]
    rows: int
    tokens: int
    bytes: int
    flops: int
    budget: int
    reason: str

    def describe(self) -> str:
        """One line for people: strategy, chunks, memory, work, and why."""
        chunks = sum(len(group.chunks) for group in self.groups)
        return (
            f"{self.strategy}: {self.tokens} scored tokens in {chunks} chunks of at most {self.rows}, "
            f"{self.bytes / 2**20:.1f} MiB of {self.budget / 2**20:.1f} MiB, {self.flops / 1e9:.1f} GFLOP dense; {self.reason}"
        )


def choose_strategy(head: Head, *, scalar_loss: bool, couples_pairs: bool, filtered: bool) -> tuple[str, str]:
    """(strategy, reason), from what is known before the tokens are counted.

    Args:
        scalar_loss: the caller wants one number whose gradient is known up to a factor; False for per-pair losses and
            for token log-probabilities with any upstream gradient.
        couples_pairs: a pair's loss may depend on other pairs, or on a callable that this library cannot judge.
        filtered: the gradient is filtered.
    """
    if not (head.needs_hidden or head.needs_weight):
        return "forward", "nothing needs a gradient"
    # A loss scale comes with the upstream gradient, in the backward: too late for a gradient that has been rounded to 0.
    whole_pairs = scalar_loss and not couples_pairs and not head.float16
    if head.kl_gradient:
        # Neither kept entries nor unscaled rows of dH hold what the KL's gradient needs.
        if whole_pairs:
            return "whole_pairs", "the KL's gradient joins while the logits of policy and reference are in memory"
        return "two_pass", "the KL's gradient needs the logits of policy and reference again, in the backward"
    if not head.needs_weight:
        return "frozen_head", "the head is frozen, and d logp / d hidden needs no coefficients"
    if filtered:
        return "filtered", "the gradient is filtered, and its kept entries are saved"
    if whole_pairs:
        return "whole_pairs", "a pair's coefficients are known while its logits are still in memory"
    if couples_pairs:
        return "two_pass", "the objective may couple pairs, so coefficients exist only after all log-probabilities"
    if scalar_loss:
        return "two_pass", "in float16 the loss scale must reach the gradient before it is rounded"
    return "two_pass", "the upstream gradient is known only in the backward"


def _cut(begin: int, end: int, rows: int) -> tuple[int, ...]:
    """Bounds of the fewest chunks of at most `rows`, as even as possible: a short last chunk wastes the product's blocks."""
    count = max(1, -(-(end - begin) // rows))
    return tuple(begin + (end - begin) * i // count for i in range(count + 1))


def _rows(head: Head, budget: int) -> int:
    rows = budget // head.row_bytes
    if head.fused and rows > BLOCK:
        rows -= rows % BLOCK
    if rows < 1:
        raise ValueError(
            f"memory_budget of {budget} bytes cannot hold the logits of one token: a vocabulary of {head.vocab} needs at "
            f"least {head.row_bytes} bytes"
        )
    return rows


def plan_pairs(head: Head, counts: Sequence[int], budget: int, reason: str = "") -> Plan:
    """The whole_pairs plan: as many whole pairs a group as fit; a pair that does not fit is cut and partly recomputed.

    Args:
        counts: scored tokens of each sequence [2P], chosen first.
        budget: bytes.

    In a group of several chunks only the last one's logits are still in memory when its coefficients are known; the
    others are projected again.

    Raises:
        ValueError: the budget cannot hold one token's logits.
    """
    pairs = len(counts) // 2
    sizes = [counts[p] + counts[pairs + p] for p in range(pairs)]
    rows = _rows(head, budget)
    spans: list[list[int]] = []  # first pair, last pair, first token, last token
    token = 0
    for p, size in enumerate(sizes):
        if spans and token + size - spans[-1][2] <= rows:
            spans[-1][1], spans[-1][3] = p + 1, token + size
        else:
            spans.append([p, p + 1, token, token + size])
        token += size
    groups = []
    again = 0
    for first, last, begin, end in spans:
        bounds = _cut(begin, end, rows)
        # All but the last `rows` tokens lose their logits, so the last chunk is as large as the budget allows.
        if len(bounds) > 2:
            bounds = (*_cut(begin, end - rows, rows), end)
            again += end - rows - begin
        groups.append(Group(first, last, bounds))
    largest = max((b - a for group in groups for a, b in group.chunks), default=0)
    products = 1 + head.needs_hidden + head.needs_weight + head.projects_reference
    flops = head.product * (token * products + again * (1 + head.kl_gradient))
    if again:
        reason = f"{reason}; {again} tokens of pairs beyond the budget are projected twice"
    return Plan("whole_pairs", tuple(groups), largest, token, largest * head.row_bytes, flops, budget, reason)


def plan_tokens(
    head: Head, strategy: str, tokens: int, budget: int, reason: str = "", *, may_keep: bool = True
) -> Plan:
    """The plan of every other strategy: chunks of tokens in any order.

    Args:
        strategy: from `choose_strategy`; "two_pass" becomes "kept_logits" where all logits fit in the budget.
        tokens: N.
        may_keep: False where nothing of unknown size may be saved (torch.compile).

    Raises:
        ValueError: the budget cannot hold one token's logits.
    """
    rows = _rows(head, budget)
    if strategy == "two_pass" and may_keep and tokens <= rows and not head.kl and not head.fused:
        strategy = "kept_logits"
        reason = f"{reason}; all scored tokens' logits fit in the budget and wait there"
    bounds = _cut(0, tokens, rows)
    largest = max(b - a for a, b in pairwise(bounds))
    flops = token_flops(head, strategy, tokens)
    return Plan(strategy, (Group(0, 0, bounds),), largest, tokens, largest * head.row_bytes, flops, budget, reason)


def token_flops(head: Head, strategy: str, tokens: int) -> int:
    """Flops of all dense products of a strategy other than whole_pairs, forward and backward."""
    gradients = head.needs_hidden + head.needs_weight
    policy = {
        "forward": 1,
        "frozen_head": 2,
        "filtered": 1,
        "kept_logits": 1 + gradients,
        "two_pass": 2 + gradients,
    }[strategy]
    reference = head.projects_reference * (1 + (head.kl_gradient and strategy == "two_pass"))
    return head.product * tokens * (policy + reference)
