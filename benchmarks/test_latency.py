"""What does a small call cost apart from its kernels? Loss and gradient at sizes where the host's work matters.

A call takes microseconds, so a round times many calls; times are per call, with warm caches.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from dpo_kernels import backends, dpo_loss
from dpo_kernels.backends.whole_call import Family, Weighting
from dpo_kernels.stages import Transform

from . import method
from .conftest import Settings, wanted
from .method import Contender, Samples
from .peers.eager import dpo_from_sums
from .problem import BETA
from .report import BEST_PEER, SPREAD, TIME, VS_BEST, Column, Result

#: (pairs, tokens of a sequence, vocabulary, calls per round), by name.
SIZES = {"2x16x1000": (2, 16, 1000, 50), "packed-2x16x1000": (2, 16, 1000, 50), "2x64x32000": (2, 64, 32000, 2)}
CHOSEN = {"small": ["2x16x1000"], "default": list(SIZES), "full": list(SIZES)}
STATISTICS = ("entropy", "kl", "accuracy")
#: (title, whether it also computes the statistics).
CONTENDERS = {
    "eager": ("eager PyTorch", False),
    "compiled": ("eager PyTorch, compiled", False),
    "ours": ("dpo_loss", False),
    "native": ("dpo_loss's C++ alone", False),
    "eager_stats": ("eager PyTorch, with statistics", True),
    "ours_stats": ("dpo_loss, with statistics", True),
}
#: The small size leaves out torch.compile.
NAMES = {
    "small": [name for name in CONTENDERS if name != "compiled"], "default": list(CONTENDERS), "full": list(CONTENDERS),
}  # fmt: skip
COLUMNS = [
    Column("title", "method"),
    TIME,
    SPREAD,
    VS_BEST,
    BEST_PEER,
    Column("vs_native", "time / its C++ alone", "ratio"),
]


class Small:
    """Tensors of one size, and every contender's step on them."""

    def __init__(self, pairs: int, tokens: int, vocab: int, *, packed: bool, device: str) -> None:
        generator = torch.Generator(device).manual_seed(0)
        policy = torch.randn(2 * pairs, tokens, vocab, generator=generator, device=device)
        ref = policy + 0.1 * torch.randn(policy.shape, generator=generator, device=device)
        labels = torch.randint(vocab, policy.shape[:2], generator=generator, device=device)
        self.cu_seqlens = None
        if packed:
            policy, ref, labels = policy.flatten(0, 1), ref.flatten(0, 1), labels.flatten()
            self.cu_seqlens = torch.arange(0, labels.numel() + 1, tokens, device=device)
            self.owner = torch.arange(2 * pairs, device=device).repeat_interleave(tokens)
        self.logits, self.ref_logits, self.labels, self.pairs = policy.requires_grad_(), ref, labels, pairs

    def _sums(self, log_p: Tensor) -> Tensor:
        each = log_p.gather(-1, self.labels.unsqueeze(-1)).squeeze(-1)
        return (
            each.sum(-1) if self.cu_seqlens is None else each.new_zeros(2 * self.pairs).index_add(0, self.owner, each)
        )

    def textbook(self, logits: Tensor, ref_logits: Tensor) -> Tensor:
        """The loss."""
        with torch.no_grad():
            ref_sums = self._sums(ref_logits.log_softmax(-1))
        return dpo_from_sums(self._sums(logits.log_softmax(-1)), ref_sums)

    def textbook_with_statistics(self) -> Tensor:
        """The loss, and means of the statistics."""
        log_p = self.logits.log_softmax(-1)
        with torch.no_grad():
            log_q = self.ref_logits.log_softmax(-1)
            ref_sums, p = self._sums(log_q), log_p.exp()
            _ = (-(p * log_p).sum(-1).mean(), (p * (log_p - log_q)).sum(-1).mean())
            _ = (self.logits.argmax(-1) == self.labels).float().mean()
        return dpo_from_sums(self._sums(log_p), ref_sums)

    def ours(self, statistics: tuple[str, ...] = ()) -> Tensor:
        """The loss by dpo_loss."""
        words: dict[str, Any] = {"ref_logits": self.ref_logits, "cu_seqlens": self.cu_seqlens, "statistics": statistics}
        return dpo_loss(self.logits, self.labels, beta=BETA, **words).loss

    def native(self) -> Tensor:
        """The gradient by the CPU library's two calls alone."""
        stages: Any = backends.load("cpu", "cpu")
        logits, ref, labels = self.logits.detach(), self.ref_logits, self.labels
        if self.cu_seqlens is not None:
            logits, ref, labels = logits.unsqueeze(0), ref.unsqueeze(0), labels.unsqueeze(0)
        weighting = Weighting(None, self.cu_seqlens, None, "mean")
        family = Family(None, None, BETA, None, 0.0, False)
        tokens, sequences, _, loss = stages.preference_forward(logits, labels, ref, Transform(), (), weighting, family)
        out = torch.empty_like(logits)
        stages.preference_backward(
            logits, labels, tokens, sequences, torch.ones_like(loss), Transform(), weighting, out
        )
        return out

    def step(self, name: str) -> Callable[[], object]:
        """Loss and gradient by a contender."""
        losses: dict[str, Callable[[], Tensor]] = {
            "eager": lambda: self.textbook(self.logits, self.ref_logits),
            "eager_stats": self.textbook_with_statistics,
            "ours": self.ours,
            "ours_stats": lambda: self.ours(STATISTICS),
        }
        if name == "native":
            return self.native
        if name == "compiled":
            compiled = torch.compile(self.textbook)
            losses[name] = lambda: compiled(self.logits, self.ref_logits)
        return lambda: torch.autograd.grad(losses[name](), self.logits)


def summary(rows: list[dict[str, Any]]) -> str:
    """Our worst and best ratio against eager PyTorch."""
    against = [row["vs_best"] for row in rows if row["ours"] and row.get("vs_best")]
    return (
        f"Small calls, where Python takes its share of the time, reach {min(against):.2f} to {max(against):.2f} times the speed "
        "of the best peer."
        if against
        else ""
    )


RESULT = partial(Result, "latency", "Latency: loss and gradient of small calls, float32", COLUMNS, summary=summary)


@pytest.fixture(scope="module")
def size(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def samples(
    size: str, settings: Settings, publish: Callable[[Result], Result], request: pytest.FixtureRequest
) -> dict[str, Samples]:
    pairs, tokens, vocab, calls = SIZES[size]
    calls = 1 if settings.sizes == "small" else calls
    small = Small(pairs, tokens, vocab, packed=size.startswith("packed"), device=settings.device)
    names = [
        name
        for name in wanted(request, "test_latency", "name", size=size)
        if name != "native" or backends.why_not("cpu", settings.device) is None
    ]

    def repeated(step: Callable[[], object]) -> Callable[[], None]:
        def run() -> None:
            for _ in range(calls):
                step()

        return run

    torch._dynamo.reset()
    contenders = [Contender(name, repeated(small.step(name))) for name in names]
    found = method.interleave(contenders, 3 * settings.rounds, device=settings.device, warmup=2)
    for sample in found.values():
        sample.seconds = [seconds / calls for seconds in sample.seconds]
    rows = []
    heading = f"{pairs} pairs x {tokens} tokens, V = {vocab:,}{', packed' if size.startswith('packed') else ''}"
    for name in names:
        title, with_statistics = CONTENDERS[name]
        ours = name.startswith("ours")
        row: dict[str, Any] = {
            "case": heading, "title": title, "ours": ours or name == "native",
            "median_s": found[name].median, "spread": found[name].spread,
            "select": f"test_latency[{size}-{name}]",
        }  # fmt: skip
        peers = [peer for peer in ("eager", "compiled", "eager_stats") if CONTENDERS[peer][1] == with_statistics]
        if ours and (best := method.best_ratio(found, name, peers)):
            row |= best.row(CONTENDERS[best.peer][0])
            row["select"] += f" or test_latency[{size}-{best.peer}]"
        if ours and "native" in found and not with_statistics:
            row["vs_native"] = method.ratio(found[name], found["native"])
        rows.append(row)
    publish(RESULT(rows=rows))
    return found


def test_latency(samples: dict[str, Samples], name: str, replay: Callable[[Samples], None]) -> None:
    if name not in samples:
        pytest.skip("the CPU library serves CPU tensors only")
    replay(samples[name])
