"""Relations that must hold between calls, independent of the true values."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from dpo_kernels import dpo_loss, linear_dpo_loss

from .conftest import examples
from .strategies import DTYPES, GPU, choice

STATISTICS = ("entropy", "kl", "accuracy", "mean_logits")


@dataclass(frozen=True)
class Batch:
    """The structure of a call: sizes, dtype and options."""

    seed: int
    dtype: torch.dtype
    pairs: int
    length: int
    vocab: int
    weighted: bool
    loss_type: str
    kl_coef: float
    cap: float | None
    # The rounding of torch's float64 exponentials depends on an element's position: vectorised, or scalar at the end.
    bitwise: bool

    def make(self) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
        """(logits, reference, labels, keywords)."""
        g = torch.Generator().manual_seed(self.seed)
        shape = (2 * self.pairs, self.length)
        x, ref = (torch.randn(*shape, self.vocab, generator=g).mul(3).to(self.dtype) for _ in range(2))
        labels = torch.randint(0, self.vocab, shape, generator=g)
        labels = labels.masked_fill(torch.rand(shape, generator=g) < 0.25, -100)
        keywords: dict[str, Any] = {"loss_type": self.loss_type, "kl_coef": self.kl_coef, "logit_softcap": self.cap}
        keywords["reduction"] = "sum"
        if self.weighted:
            keywords["token_weights"] = torch.rand(shape, generator=g) + 0.5
            keywords["pair_weights"] = torch.rand(self.pairs, generator=g) + 0.5
            keywords["beta"] = torch.rand(self.pairs, generator=g) * 0.4 + 0.05
        return x, ref, labels, keywords


def batches(engine: str, *, pairs: tuple[int, ...] = (2, 1, 3), dtypes: Any = None) -> st.SearchStrategy[Batch]:
    small = engine in GPU
    return st.builds(
        Batch,
        seed=st.integers(0, 999),
        dtype=choice(*(dtypes or DTYPES[: 3 if small else 4])),
        pairs=choice(*(pairs[:2] if small else pairs)),
        length=choice(1, 2, *([] if small else [6])),
        vocab=choice(2, 9, *([] if small else [33, 130, 2051])),
        weighted=choice(False, True),
        # Objectives without coupling between pairs. The first two have their own kernels.
        loss_type=choice("sigmoid", "robust", "ipo", "rpo", "tdpo2"),
        kl_coef=choice(0.0, 0.2),
        cap=choice(None, 6.0),
        bitwise=st.just(engine != "eager"),
    )


@dataclass
class Run:
    """Results of a call."""

    losses: Tensor
    logps: Tensor
    rewards: Tensor
    statistics: Tensor
    grad: Tensor


def run(x: Tensor, ref: Tensor, labels: Tensor, keywords: dict[str, Any], *, inplace: bool = False) -> Run:
    leaf = x.clone().requires_grad_()
    out = dpo_loss(leaf, labels, ref_logits=ref, statistics=STATISTICS, inplace_backward=inplace, **keywords)
    out.loss.backward()
    return Run(
        out.losses,
        torch.stack([out.chosen_logps, out.rejected_logps]),
        torch.stack([out.chosen_rewards, out.rejected_rewards]),
        torch.stack([getattr(out, name).view(2, -1) for name in STATISTICS]),
        leaf.grad,
    )


def check_equal(
    one: Run,
    other: Run,
    *,
    pairs: Any = slice(None),
    rows: Any = slice(None),
    of: Any = slice(None),
    bitwise: bool = True,
) -> None:
    """Assert equality, bitwise or up to float64 rounding.

    `of` selects pairs of `one`; `pairs` and `rows` select what they must equal in `other`.
    """

    def equal(one: Tensor, other: Tensor) -> bool:
        return torch.equal(one, other) if bitwise else torch.allclose(one, other, rtol=1e-12, atol=1e-13)

    assert equal(one.losses[of], other.losses[pairs]), "losses"
    for name in ("logps", "rewards", "statistics"):
        a, b = getattr(one, name)[..., of], getattr(other, name)[..., pairs]
        assert equal(a.nan_to_num(7.0), b.nan_to_num(7.0)), name
    assert equal(one.grad, other.grad[rows]), "gradient"


def both(pairs: Tensor, count: int) -> Tensor:
    """Indices of both sequences of the pairs."""
    return torch.cat([pairs, pairs + count])


def moved(keywords: dict[str, Any], order: Tensor, count: int) -> dict[str, Any]:
    """The keywords for the pairs in another order."""
    found = dict(keywords)
    for name in ("pair_weights", "beta"):
        if isinstance(found.get(name), Tensor):
            found[name] = found[name][order]
    if "token_weights" in found:
        found["token_weights"] = found["token_weights"][both(order, count)]
    return found


def close(one: Tensor, other: Tensor, dtype: torch.dtype, *, times: float = 64.0) -> None:
    eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    torch.testing.assert_close(one, other, rtol=times * eps, atol=times * eps)


# --- bitwise ----------------------------------------------------------------------------------------------------------


def pairs_in_another_order(batch: Batch) -> None:
    """Without the KL term, because it is a mean over all tokens of the call."""
    x, ref, labels, keywords = batch.make()
    order = torch.randperm(batch.pairs, generator=torch.Generator().manual_seed(batch.seed))
    rows = both(order, batch.pairs)
    there = run(x[rows], ref[rows], labels[rows], moved(keywords, order, batch.pairs))
    check_equal(there, run(x, ref, labels, keywords), pairs=order, rows=rows, bitwise=batch.bitwise)


def padding_and_packing(batch: Batch) -> None:
    """Padding before, after or between tokens, or packed sequences."""
    x, ref, labels, keywords = batch.make()
    plain = run(x, ref, labels, keywords)
    (packed_equals if batch.seed % 2 else padded_equals)(batch, plain, x, ref, labels, keywords)


def padded_equals(batch: Batch, plain: Run, x: Tensor, ref: Tensor, labels: Tensor, keywords: dict[str, Any]) -> None:
    g = torch.Generator().manual_seed(batch.seed)
    wide = batch.length + 2
    places = torch.randperm(wide, generator=g)[: batch.length].sort().values

    def spread(t: Tensor, fill: float) -> Tensor:
        out = torch.full((t.shape[0], wide, *t.shape[2:]), fill, dtype=t.dtype)
        out[:, places] = t
        return out

    given = dict(keywords)
    if batch.weighted:
        given["token_weights"] = spread(keywords["token_weights"], 3.0)
    padded = run(spread(x, 7.0), spread(ref, -3.0), spread(labels, -100), given)
    check_equal(
        plain,
        Run(padded.losses, padded.logps, padded.rewards, padded.statistics, padded.grad[:, places]),
        bitwise=batch.bitwise,
    )


def packed_equals(batch: Batch, plain: Run, x: Tensor, ref: Tensor, labels: Tensor, keywords: dict[str, Any]) -> None:
    """In half of the batches ignored tokens are left out. A token that belongs to no sequence comes last."""
    keep = (labels != -100) if batch.seed % 4 == 1 else torch.ones_like(labels, dtype=torch.bool)
    bounds = torch.cat([torch.zeros(1, dtype=torch.int64), keep.sum(-1).cumsum(0)])
    given = dict(keywords, cu_seqlens=bounds)
    if batch.weighted:
        given["token_weights"] = torch.cat([keywords["token_weights"][keep], torch.ones(1)])
    behind = [torch.cat([t[keep], t[0, :1]]) for t in (x, ref)]
    packed = run(*behind, torch.cat([labels[keep], torch.zeros(1, dtype=torch.int64)]), given)
    assert bool((packed.grad[-1] == 0).all())
    grad = torch.zeros_like(x)
    grad[keep] = packed.grad[:-1]
    check_equal(plain, Run(packed.losses, packed.logps, packed.rewards, packed.statistics, grad), bitwise=batch.bitwise)


def ignored_tokens_may_hold_anything(batch: Batch) -> None:
    x, ref, labels, keywords = batch.make()
    plain = run(x, ref, labels, keywords)
    ignored = (labels == -100).unsqueeze(-1)
    bad = (math.nan, math.inf, -math.inf)[batch.seed % 3]
    there = run(x.masked_fill(ignored, bad), ref.masked_fill(ignored, bad), labels, keywords)
    check_equal(plain, there)
    assert bool((there.grad.masked_select(ignored) == 0).all())


def weights_of_ignored_tokens_may_be_anything(batch: Batch) -> None:
    x, ref, labels, keywords = batch.make()
    keywords.setdefault("token_weights", torch.ones(labels.shape))
    plain = run(x, ref, labels, keywords)
    bad = (math.nan, math.inf, -1.0)[batch.seed % 3]
    given = dict(keywords, token_weights=keywords["token_weights"].masked_fill(labels == -100, bad))
    check_equal(plain, run(x, ref, labels, given))


def a_neighbour_does_not_matter(batch: Batch) -> None:
    """If one pair's logits become huge, no bit of the other pairs changes, padded or packed."""
    x, ref, labels, keywords = batch.make()
    keywords["kl_coef"] = 0.0  # it is divided by the number of tokens of the whole batch
    bounds = torch.arange(0, labels.numel() + 1, batch.length)
    others = torch.arange(1, batch.pairs)
    rows = both(others, batch.pairs)
    big = 1e20 if torch.finfo(batch.dtype).max > 1e21 else 6e4
    changed = x.clone()
    changed[0] = x[0].sign() * big
    if batch.seed % 2:
        given = dict(keywords, cu_seqlens=bounds)
        if batch.weighted:
            given["token_weights"] = keywords["token_weights"].reshape(-1)
        flat = [t.reshape(-1, batch.vocab) for t in (x, changed, ref)]
        before, after = (run(t, flat[2], labels.reshape(-1), given) for t in flat[:2])
        before.grad, after.grad = (each.grad.view(x.shape) for each in (before, after))
    else:
        before, after = run(x, ref, labels, keywords), run(changed, ref, labels, keywords)
    before.grad = before.grad[rows]
    check_equal(before, after, of=others, pairs=others, rows=rows, bitwise=batch.bitwise)


def in_place_or_not(batch: Batch) -> None:
    x, ref, labels, keywords = batch.make()
    check_equal(run(x, ref, labels, keywords, inplace=True), run(x, ref, labels, keywords))


def policy_equal_to_reference(batch: Batch) -> None:
    x, _, labels, keywords = batch.make()
    keywords |= {"loss_type": "robust" if batch.loss_type == "robust" else "sigmoid"}
    found = run(x, x.clone(), labels, keywords)
    log_two = torch.tensor(math.log(2), dtype=torch.float64).to(found.losses.dtype)
    assert torch.equal(found.losses, log_two.expand(batch.pairs))
    assert bool((found.rewards == 0).all())


# --- to rounding ------------------------------------------------------------------------------------------------------


def a_constant_added_to_every_logit(batch: Batch) -> None:
    """The logits are multiples of 1/8, so that adding the constant is exact in every dtype."""
    x, ref, labels, keywords = batch.make()
    keywords["logit_softcap"] = None
    x, ref = (t.double().mul(8).round().div(8).clamp(-7, 7).to(batch.dtype) for t in (x, ref))
    shift = float(batch.seed % 9 - 4)
    plain, there = run(x, ref, labels, keywords), run(x + shift, ref + shift, labels, keywords)
    close(plain.losses, there.losses, batch.dtype, times=256)
    close(plain.logps, there.logps, batch.dtype)
    close(plain.statistics[:3], there.statistics[:3], batch.dtype, times=256)
    close(plain.grad.double(), there.grad.double(), batch.dtype, times=256 if batch.dtype.itemsize > 2 else 2e5)


def another_order_of_the_vocabulary(batch: Batch) -> None:
    x, ref, labels, keywords = batch.make()
    order = torch.randperm(batch.vocab, generator=torch.Generator().manual_seed(batch.seed))
    place = order.argsort()
    there_labels = torch.where(labels == -100, labels, place[labels.clamp(min=0)])
    plain, there = run(x, ref, labels, keywords), run(x[..., order], ref[..., order], there_labels, keywords)
    close(plain.losses, there.losses, batch.dtype, times=256)
    close(plain.logps, there.logps, batch.dtype)
    close(
        plain.grad[..., order].double(),
        there.grad.double(),
        batch.dtype,
        times=256 if batch.dtype.itemsize > 2 else 2e5,
    )


def chosen_and_rejected_exchanged(batch: Batch) -> None:
    """-log sigmoid(-x) = -log sigmoid(x) + x. The rewards are exchanged bit by bit."""
    x, ref, labels, keywords = batch.make()
    keywords |= {"loss_type": "sigmoid", "kl_coef": 0.0}
    given = dict(keywords)
    if batch.weighted:
        given["token_weights"] = keywords["token_weights"].roll(batch.pairs, 0)
    plain = run(x, ref, labels, keywords)
    there = run(*(t.roll(batch.pairs, 0) for t in (x, ref, labels)), given)
    assert torch.equal(plain.rewards, there.rewards.flip(0))
    margin = plain.rewards[0].double() - plain.rewards[1].double()
    difference = there.losses.double() - plain.losses.double()
    size = float(plain.rewards.abs().max()) if batch.pairs else 1.0
    torch.testing.assert_close(difference, margin, rtol=1e-5, atol=1e-6 * (1 + size))


RELATIONS = (
    pairs_in_another_order,
    padding_and_packing,
    ignored_tokens_may_hold_anything,
    weights_of_ignored_tokens_may_be_anything,
    a_neighbour_does_not_matter,
    in_place_or_not,
    policy_equal_to_reference,
    a_constant_added_to_every_logit,
    another_order_of_the_vocabulary,
    chosen_and_rejected_exchanged,
)


@pytest.mark.parametrize("relation", RELATIONS, ids=lambda relation: relation.__name__)
def test_relation(engine, effort, relation):
    drawn = batches(engine, pairs=(2, 3) if relation is a_neighbour_does_not_matter else (2, 1, 3))
    examples(engine, effort, 0.02, drawn, relation)


def chunks_change_rounding_only(batch: Batch) -> None:
    """On the linear path with chunks of one token, of a few tokens, or of all tokens."""
    g = torch.Generator().manual_seed(batch.seed)
    _, _, labels, keywords = batch.make()
    size = 5
    hidden, ref = (torch.randn(*labels.shape, size, generator=g).to(batch.dtype) for _ in range(2))
    weight = torch.randn(batch.vocab, size, generator=g).to(batch.dtype)
    results = []
    for rows in (1, 3, 1000):
        budget = rows * (40 * batch.vocab + 64 * size + 8192)
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        out = linear_dpo_loss(h, w, labels, ref_hidden=ref, memory_budget=budget, grad_filter=None, **keywords)
        out.loss.backward()
        results.append((out.losses.detach(), h.grad.double(), w.grad.double()))
    wide = 256 if batch.dtype.itemsize > 2 else 3e5  # products of 16-bit numbers are rounded to 16 bits
    for found in results[1:]:
        for one, other in zip(results[0], found, strict=True):
            size_of = float(other.abs().max()) if other.numel() else 1.0
            close(one / (1 + size_of), other / (1 + size_of), batch.dtype, times=wide)


def test_chunks_change_rounding_only(engine, effort):
    examples(engine, effort, 0.02, batches(engine), chunks_change_rounding_only)
