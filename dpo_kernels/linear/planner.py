"""The planner of the linear path: strategy and chunks for a memory budget, as pure functions of sizes.

No function here reads a tensor. N is the number of scored tokens (label other than ignore_index, weight other than 0), H the
hidden size, V the vocabulary size. One product of [N, H] with the head [V, H] costs 2NHV flops.

    strategy       used if                                                           products (policy)
    forward        nothing needs a gradient                                          1
    whole_pairs    scalar loss of objectives that depend on one pair at a time       3 (+ recomputation of what did not fit)
    frozen_head    the head needs no gradient                                        2
    filtered       the gradient is filtered (default for 16-bit dtypes on a CPU)     1, and sparse products
    kept_logits    any upstream gradient; the logits fit in the budget               3
    two_pass       any upstream gradient; the backward pass projects again           4

A reference that is projected too (`ref_hidden`) adds one product to each. A loss that depends on a token-level KL (kl_coef,
TDPO) uses whole_pairs or two_pass; logits that are computed again then include the reference's. The rules for GPUs are in
gpu.py.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from .gpu import BLOCK, GPU_SHARE, fused_row_bytes, row_stride

# The constants of the planner:
#: Smallest default budget in bytes, of a call and of a trainer's step, whose activations take gigabytes.
_FLOOR, _STEP_FLOOR = 64 * 2**20, 256 * 2**20
#: Rows of a chunk above which torch's products on a CPU become hardly faster. With half as many rows they take 10% longer,
#: because each product packs the whole head.
_WIDE_ROWS = 512
#: Columns of a 16-bit dz that are converted to float32 at a time on a CPU (see linear/products.py).
WIDENED_COLUMNS = 2048
#: Bytes per token of small float64 values: log-probabilities, statistics, weights, indices.
_SMALL_BYTES = 16 * 8

_UNITS = {"": 1, "b": 1, "kb": 2**10, "mb": 2**20, "gb": 2**30, "kib": 2**10, "mib": 2**20, "gib": 2**30}
#: Strategies that do not hold chunks of logits and a dense gradient of the head at the same time.
_CHUNKS_ALONE = ("forward", "frozen_head", "filtered")


def default_budget(hidden_size: int, vocab: int, wide_bytes: int = 0, memory: int = 0) -> int:
    """The default budget in bytes: half of a float32 gradient of the head, but at least 64 MiB.

    A step that trains the head needs that gradient anyway, so chunks of half its size hardly matter for whether a batch fits.
    On a GPU the budget is at least GPU_SHARE of `memory`. If less memory is available at the call, it uses smaller chunks
    (memory.py).

    Args:
        hidden_size: H.
        vocab: V.
        wide_bytes: lower bound for strategies that hold no such gradient together with chunks; limited to the gradient's size.
        memory: bytes of the GPU's memory; 0 on a CPU.
    """
    gradient = 4 * hidden_size * vocab
    return max(_FLOOR, gradient // 2, min(gradient, wide_bytes), int(GPU_SHARE * memory))


def step_budget(hidden_size: int, vocab: int, memory: int = 0) -> int:
    """The default budget of a trainer's step in bytes: `default_budget`, but at least 256 MiB.

    The activations of a step take gigabytes, so a larger buffer matters little. At V = 49,152 in float32, 256 MiB hold a whole
    pair of 600 tokens with a KL, or keep the logits of 1,300 tokens for the backward pass, so none is projected twice. On an
    80 GB GPU the budget holds the 16-bit logits of 8,192 tokens at V = 128k.
    """
    return max(_STEP_FLOOR, default_budget(hidden_size, vocab, memory=memory))


def budget_of(memory_budget: int | str | None, head: Head, strategy: str, memory: int = 0) -> int:
    """The budget of a call in bytes: the given one, or the default of the strategy. Raises as `parse_budget`."""
    if memory_budget is None:
        wide = _WIDE_ROWS * head.row_bytes * (strategy in _CHUNKS_ALONE)
        return default_budget(head.hidden_size, head.vocab, wide, memory)
    return parse_budget(memory_budget, head.hidden_size, head.vocab)


def parse_budget(memory_budget: int | str | None, hidden_size: int, vocab: int) -> int:
    """Bytes from an int, a text such as "256MB" (1 MB = 2^20 bytes here), or None for `default_budget`.

    Raises:
        TypeError: neither an int, nor a text, nor None.
        ValueError: the text has another form, or the budget is not positive.
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
        item_size: bytes per logit (of the compute dtype).
        needs_hidden: the hidden states need a gradient.
        needs_weight: the weight or the bias needs a gradient.
        projects_reference: a reference is projected as well.
        kl: policy and reference logits are needed at the same time.
        widens: on a CPU, the operands of dW are converted from 16 bits to float32.
        kl_gradient: the loss depends on a token-level KL, so its gradient needs both models' logits of a token; or on the
            entropy, so it needs the policy's.
        fused: the fused kernels compute the products and skip blocks of negligible probability.
        device_type: "cpu", or torch's name of the GPU.
        float16: logits and their gradient are float16, whose smallest positive number is 6e-8.
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
        """Working bytes per token of a chunk: its logits, and the temporaries of stages and products."""
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
    """Pairs `first .. last - 1`; their tokens are consecutive in the plan's order and form chunks with these `bounds`."""

    first: int
    last: int
    bounds: tuple[int, ...]

    @property
    def chunks(self) -> list[tuple[int, int]]:
        """(begin, end) of each chunk."""
        return list(pairwise(self.bounds))


@dataclass(frozen=True)
class Plan:
    """The plan of a call of the linear path.

    Attributes:
        strategy: a name in the table of `dpo_kernels.linear.planner`.
        groups: for whole_pairs, groups of pairs that are processed together; otherwise one group with all tokens.
        rows: rows of the logits buffer.
        tokens: N, the number of scored tokens.
        bytes: peak working memory: everything except the caller's tensors, the gradients and, for `filtered`, the kept
            entries.
        flops: flops of all dense products, forward and backward.
        budget: the budget in bytes.
        reason: the reason for the strategy, as text.
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
        """One line of text: strategy, chunks, memory, flops and reason."""
        chunks = sum(len(group.chunks) for group in self.groups)
        return (
            f"{self.strategy}: {self.tokens} scored tokens in {chunks} chunks of at most {self.rows}, "
            f"{self.bytes / 2**20:.1f} MiB of {self.budget / 2**20:.1f} MiB, {self.flops / 1e9:.1f} GFLOP dense; {self.reason}"
        )


def choose_strategy(head: Head, *, scalar_loss: bool, couples_pairs: bool, filtered: bool) -> tuple[str, str]:
    """(strategy, reason); independent of the number of tokens.

    Args:
        head: the sizes.
        scalar_loss: the loss is one number, so its gradient is known up to a factor. False for per-pair losses and for
            token log-probabilities.
        couples_pairs: the loss of a pair may depend on other pairs, as in any user callable that does not deny it.
        filtered: the gradient is filtered.
    """
    if not (head.needs_hidden or head.needs_weight):
        return "forward", "nothing needs a gradient"
    # A loss scale is part of the upstream gradient, which arrives in the backward pass. A float16 gradient that was computed in
    # the forward pass could already be rounded to 0.
    whole_pairs = scalar_loss and not couples_pairs and not head.float16
    if head.kl_gradient:
        # The KL's gradient needs the logits; neither kept entries nor rows of dH are enough.
        if whole_pairs:
            return "whole_pairs", "the KL's gradient is computed while the logits of policy and reference are in memory"
        if not head.projects_reference:
            return "two_pass", "the entropy's gradient needs the logits again, in the backward pass"
        return "two_pass", "the KL's gradient needs the logits of policy and reference again, in the backward pass"
    if not head.needs_weight:
        return "frozen_head", "the head is frozen, and d logp / d hidden does not depend on the loss"
    if filtered:
        return "filtered", "the gradient is filtered, and its kept entries are saved"
    if whole_pairs:
        return "whole_pairs", "a pair's coefficients are known while its logits are still in memory"
    if couples_pairs:
        return "two_pass", "the objective may couple pairs, so the coefficients depend on all log-probabilities"
    if scalar_loss:
        return "two_pass", "in float16 the loss scale must multiply the gradient before it is rounded"
    return "two_pass", "the upstream gradient is known only in the backward pass"


def _cut(begin: int, end: int, rows: int) -> tuple[int, ...]:
    """Bounds of as few chunks of at most `rows` as possible, evenly sized, because a short last chunk makes products slow."""
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
    """The whole_pairs plan: each group holds as many whole pairs as fit in the budget.

    A pair that does not fit is a group of several chunks. When its coefficients are known, only the logits of its last chunk are
    still in memory; the other chunks are projected again.

    Args:
        head: the sizes.
        counts: [2P], scored tokens of each sequence; the chosen sequences come first.
        budget: bytes.
        reason: the reason for the strategy.

    Raises:
        ValueError: the budget cannot hold the logits of one token.
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
        # Only the last chunk keeps its logits, so it is as large as the budget allows.
        if len(bounds) > 2:
            bounds = (*_cut(begin, end - rows, rows), end)
            again += end - rows - begin
        groups.append(Group(first, last, bounds))
    largest = max((b - a for group in groups for a, b in group.chunks), default=0)
    products = 1 + head.needs_hidden + head.needs_weight + head.projects_reference
    flops = head.product * (token * products + again * (1 + head.kl_gradient))
    if again:
        reason = f"{reason}; {again} tokens of pairs that exceed the budget are projected twice"
    return Plan("whole_pairs", tuple(groups), largest, token, largest * head.row_bytes, flops, budget, reason)


def plan_tokens(
    head: Head, strategy: str, tokens: int, budget: int, reason: str = "", *, may_keep: bool = True
) -> Plan:
    """The plan of every other strategy: chunks of tokens in any order.

    Args:
        head: the sizes.
        strategy: from `choose_strategy`; "two_pass" becomes "kept_logits" if all logits fit in the budget.
        tokens: N.
        budget: bytes.
        reason: the reason for the strategy.
        may_keep: False if no tensor of data-dependent size may be saved (torch.compile).

    Raises:
        ValueError: the budget cannot hold the logits of one token.
    """
    rows = _rows(head, budget)
    if strategy == "two_pass" and may_keep and tokens <= rows and not head.kl and not head.fused:
        strategy = "kept_logits"
        reason = f"{reason}; the logits of all scored tokens fit in the budget and are kept"
    bounds = _cut(0, tokens, rows)
    largest = max(b - a for a, b in pairwise(bounds))
    flops = token_flops(head, strategy, tokens)
    return Plan(strategy, (Group(0, 0, bounds),), largest, tokens, largest * head.row_bytes, flops, budget, reason)


def token_flops(head: Head, strategy: str, tokens: int) -> int:
    """Flops of all dense products, forward and backward, of a strategy other than whole_pairs."""
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
