"""Random calls: hypothesis draws the structure and a seed, and torch the numbers, so that a failure shrinks to its structure.

`DPO_PROPERTIES_LEAVE_OUT` names choices that are not drawn ("label_masked,masked_min"), to find further faults beside a known
one.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from .truth import OBJECTIVES, Settings

LEFT_OUT = set(filter(None, os.environ.get("DPO_PROPERTIES_LEAVE_OUT", "").split(",")))
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
GPU = ("triton", "cuda")
STATISTICS = ("entropy", "kl", "accuracy", "mean_logits")

REGIMES = (
    "usual",
    "confident",
    "far",
    "constant",
    "huge",
    "masked_inf",
    "masked_min",
    "masked_1e15",
    "label_masked",
    "denormal",
)
LAYOUTS = ("contiguous", "sliced", "transposed", "vocabulary_strided", "expanded")


def choice(*values: Any) -> st.SearchStrategy[Any]:
    """One of the values, without those that are left out. It shrinks to the first."""
    return st.sampled_from([value for value in values if value not in LEFT_OUT])


@dataclass(frozen=True)
class Problem:
    """The structure of a call."""

    seed: int
    dtype: torch.dtype
    pairs: int
    length: int
    vocab: int
    regime: str
    layout: str
    packed: bool
    ignored: str
    ignore_index: int
    poison: str
    token_weights: str
    pair_weights: bool
    beta: str
    smoothing: str
    names: tuple[str, ...]
    reference: str
    statistics: tuple[str, ...]
    kl_coef: float
    weighting: bool
    scale: float
    cap: float | None
    reduction: str
    inplace: bool
    upstream: str
    hidden: int
    bias: bool
    rows_budget: int | None
    frozen: str
    grad_filter: str | None


def sizes(backend: str) -> tuple[st.SearchStrategy[int], st.SearchStrategy[int], st.SearchStrategy[int]]:
    """(pairs, length, vocabulary), tiny if an interpreter or emulator runs the kernels."""
    if backend in GPU:
        return choice(1, 1, 1, 2, 2, 0), choice(1, 1, 1, 2, 2, 3, 0), choice(2, 1, 9, 33, 130)
    return choice(1, 1, 2, 2, 3, 3, 0), choice(1, 1, 2, 2, 5, 5, 0), choice(2, 1, 3, 8, 33, 130, 257, 2051)


@st.composite
def problems(
    draw: Any, backend: str, *, names: Sequence[str] | None = None, regime: str | None = None, linear: bool = False
) -> Problem:
    """A call that the backend supports. `names` fixes the objectives, `regime` the kind of logits."""
    pairs, length, vocab = (draw(each) for each in sizes(backend))
    if linear:
        vocab = min(vocab, 257)
    dtype = draw(choice(*DTYPES[: 3 if backend in GPU else 4]))
    reference = draw(choice("logits", "sums", "none"))
    if names is None:
        usual = draw(choice("sigmoid", "sigmoid", "robust", "any", "mix"))
        count = {"any": 1, "mix": 2}.get(usual, 0)
        names = tuple(draw(choice(*OBJECTIVES)) for _ in range(count)) or (usual,)
    if any(OBJECTIVES[name].divergence for name in names):
        reference = "logits"
    if reference == "none" and any(OBJECTIVES[name].reference for name in names):
        reference = "sums"
    beside = reference == "logits"
    known = [name for name in STATISTICS if (name != "kl" or beside) and name not in LEFT_OUT]
    statistics = tuple(name for name in known if draw(choice(False, True)))
    regime = draw(choice(*REGIMES)) if regime is None else regime
    smoothings = [OBJECTIVES[name].smoothing for name in names if len(OBJECTIVES[name].smoothing) > 1]
    allowed = [e for e in (0.0, 0.1, 1.0) if all(e in each or 0 < e < 0.5 for each in smoothings)]
    smoothing = [str(e) for e in allowed] + (["each"] if smoothings else [])
    return Problem(
        seed=draw(st.integers(0, 999)),
        dtype=dtype,
        pairs=pairs,
        length=length,
        vocab=vocab,
        regime=regime,
        layout=draw(choice(*LAYOUTS)),
        packed=draw(choice(False, True)),
        ignored=draw(choice("some", "none", "some", "none", "some", "none", "all")),
        ignore_index=draw(choice(-100, -1, 0, 7000)),
        poison=draw(choice("none", "nan", "inf")),
        token_weights=draw(choice("none", "some", "zeros", "nan_weights")),
        pair_weights=draw(choice(False, True)),
        beta=draw(choice("number", "each", "tensor", "small")),
        smoothing=draw(choice(*smoothing)) if smoothings else "0.0",
        names=names,
        reference=reference,
        statistics=statistics,
        kl_coef=draw(choice(0.0, 0.3)) if beside else 0.0,
        weighting=draw(choice(False, False, True)),
        # A negative scale makes masked tokens the most likely. A large scale turns the lowest number into -inf. The CUDA
        # kernels refuse negative scales.
        scale=draw(choice(1.0, 0.5, *([] if "masked" in regime else [2.5] if backend == "cuda" else [2.5, -0.7]))),
        cap=draw(choice(None, None, 5.0, 30.0)),
        reduction=draw(choice("mean", "sum", "none")),
        inplace=draw(choice(False, True)),
        upstream=draw(choice("one", "random", "loss_scaled")),
        hidden=draw(choice(1, 4, 17)),
        bias=draw(choice(False, True)),
        rows_budget=draw(choice(None, 1, 3)),
        frozen=draw(choice("nothing", "weight", "hidden")),
        grad_filter=draw(choice(None, "auto")),
    )


@dataclass
class Call:
    """The tensors of a problem, for the tested function and for the truth.

    Attributes:
        x, ref_x: logits [N, V], stored as float64 with the values that they have in their dtype.
        labels, token_weights: [N].
        spans: begin and end of each sequence.
        logits, given_labels: arguments of dpo_loss, in the problem's layout.
        keywords: all other arguments of dpo_loss.
        upstream: gradient of the loss, [] or [P].
    """

    x: Tensor
    ref_x: Tensor | None
    labels: Tensor
    token_weights: Tensor | None
    spans: list[tuple[int, int]]
    settings: Settings
    logits: Tensor
    given_labels: Tensor
    keywords: dict[str, Any]
    upstream: Tensor
    extra: dict[str, Any] = field(default_factory=dict)


def laid_out(x: Tensor, layout: str) -> Tensor:
    """A tensor with the same values and another memory layout."""
    if layout == "sliced":
        padding = [(1, 2)] * (x.dim() - 1) + [(3, 2)]
        wide = torch.full([size + a + b for size, (a, b) in zip(x.shape, padding, strict=True)], torch.nan).to(x.dtype)
        view = wide[tuple(slice(a, a + size) for size, (a, _) in zip(x.shape, padding, strict=True))]
        view.copy_(x)
        return view
    if layout == "transposed" and x.dim() == 3:
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "vocabulary_strided":
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "expanded" and x.dim() == 3 and x.shape[1] > 0:
        return x[:, :1].expand(x.shape)
    return x.clone()


def _numbers(
    problem: Problem, shape: tuple[int, ...], g: torch.Generator, labels: Tensor, masked: Tensor, special: Tensor
) -> Tensor:
    """Logits [..., V], float64 numbers that the problem's dtype can represent. Rows in `special` follow its regime."""
    info = torch.finfo(problem.dtype)
    big = 1e30 if info.max > 1e31 else 6e4
    least = max(info.min, torch.finfo(torch.float32).min)
    x = torch.randn(*shape, problem.vocab, generator=g, dtype=torch.float64) * 3
    at = labels.clamp(0, problem.vocab - 1).unsqueeze(-1)
    sure = x.scatter(-1, at, x.amax(-1, keepdim=True) + 4.0 * (1 + problem.seed % 6))
    filled = {
        "confident": sure,
        "far": x + 300 * (1 - 2 * (problem.seed // 2 % 2)),
        "constant": torch.full_like(x, 1.5),
        "huge": x.sign() * big,
        "masked_inf": x.masked_fill(masked, -torch.inf),
        "masked_min": x.masked_fill(masked, least),
        "label_masked": x.masked_fill(masked, least),
        "masked_1e15": x.masked_fill(masked, max(-1e15, least)),
        "denormal": x * 1e-40,
    }.get(problem.regime, x)
    return torch.where(special, filled, x).to(problem.dtype).double()


def make(problem: Problem) -> Call:
    """The problem's tensors."""
    g = torch.Generator().manual_seed(problem.seed)
    sequences, length, vocab = 2 * problem.pairs, problem.length, problem.vocab
    shape = (sequences, length)
    columns = torch.arange(vocab)
    # Mask every third column, all but the last two columns, or the last half; never all columns.
    patterns = (columns % 3 == 1, columns < max(vocab - 2, vocab // 2), columns >= (vocab + 1) // 2)
    masked = patterns[problem.seed % 3]
    free = columns if problem.regime == "label_masked" else columns[~masked]
    free = free[free != problem.ignore_index]
    labels = torch.full(shape, problem.ignore_index)
    if free.numel():
        labels = free[torch.randint(0, free.numel(), shape, generator=g)]
    chance = {"some": 0.3, "none": 0.0, "all": 1.0}[problem.ignored]
    skipped = torch.rand(shape, generator=g) < chance
    lengths = torch.randint(0, length + 1, (sequences,), generator=g)
    if problem.ignored == "none":
        lengths[:] = length
    inside = torch.arange(length) < lengths[:, None]
    labels = torch.where(skipped, problem.ignore_index, labels)
    special = torch.rand(*shape, 1, generator=g) < (0.6 if problem.seed % 2 else 1.0)
    x, ref_x = (_numbers(problem, shape, g, labels, masked, special) for _ in range(2))
    weights = None
    if problem.token_weights != "none":
        weights = torch.rand(shape, generator=g, dtype=torch.float64) + 0.5
        if problem.token_weights == "zeros":
            weights = weights * (torch.rand(shape, generator=g) < 0.6)

    if problem.packed:
        behind = torch.randint(0, 3, (), generator=g).item()  # tokens that belong to no sequence
        keep = inside.reshape(-1).nonzero().squeeze(-1)
        keep = torch.cat([keep, keep[:1].repeat(behind)])
        x, ref_x = (each.reshape(-1, vocab)[keep] for each in (x, ref_x))
        labels = labels.reshape(-1)[keep]
        weights = None if weights is None else weights.reshape(-1)[keep]
        bounds = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        spans = list(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True))
    else:
        labels = torch.where(inside, labels, problem.ignore_index)
        spans = [(s * length, (s + 1) * length) for s in range(sequences)]
        if problem.layout == "expanded" and length:
            x, ref_x = (each[:, :1].expand(each.shape) for each in (x, ref_x))
    unscored = labels == problem.ignore_index
    if weights is not None:
        if problem.token_weights == "nan_weights":
            weights = weights.masked_fill(unscored, torch.nan)
        else:
            unscored = unscored | (weights == 0)
    if problem.poison != "none" and (problem.layout != "expanded" or problem.packed):
        bad = torch.nan if problem.poison == "nan" else torch.inf
        x, ref_x = (each.masked_fill(unscored.unsqueeze(-1), bad) for each in (x, ref_x))

    def each(low: float, high: float) -> Tensor:
        return torch.rand(problem.pairs, generator=g, dtype=torch.float64) * (high - low) + low

    one = torch.tensor(0.3, dtype=torch.float64)
    beta = {"number": 0.25, "each": each(0.05, 0.5), "tensor": one, "small": 1e-3}[problem.beta]
    smoothing = each(0.05, 0.4) if problem.smoothing == "each" else float(problem.smoothing)
    pair_weights = each(0.0, 2.0) if problem.pair_weights else None
    ref_sums = -torch.rand(sequences, generator=g, dtype=torch.float64) * 5 * length
    loss_weights = None if len(problem.names) == 1 else [1.0, 0.3]
    full = torch.ones(problem.pairs, dtype=torch.float64)
    settings = Settings(
        problem.names,
        loss_weights,
        beta * full,
        smoothing * full,
        pair_weights,
        ref_sums
        if problem.reference == "sums"
        else torch.zeros(sequences).double()
        if problem.reference == "none"
        else None,
        problem.kl_coef,
        problem.weighting,
        problem.reduction,
        problem.scale,
        problem.cap,
    )
    keywords: dict[str, Any] = {
        "beta": beta,
        "loss_weights": loss_weights,
        "label_smoothing": smoothing,
        "pair_weights": pair_weights,
        "token_weights": weights,
        "ignore_index": problem.ignore_index,
        "logit_scale": problem.scale,
        "logit_softcap": problem.cap,
        "statistics": problem.statistics,
        "kl_coef": problem.kl_coef,
        "use_weighting": problem.weighting,
        "reduction": problem.reduction,
    }
    if problem.packed:
        keywords["cu_seqlens"] = bounds.to(torch.int32 if problem.seed % 3 else torch.int64)
    if problem.reference == "sums":
        keywords["ref_logps"] = ref_sums
    upstream = torch.ones(())
    if problem.upstream != "one":
        number = 65536.0 if problem.upstream == "loss_scaled" else float(torch.rand((), generator=g)) * 4 - 2
        upstream = torch.tensor(number)
    if problem.reduction == "none":
        upstream = upstream * (torch.rand(problem.pairs, generator=g) + 0.5)
    flat = (-1, vocab)
    return Call(
        x.reshape(flat),
        ref_x.reshape(flat) if problem.reference == "logits" else None,
        labels.reshape(-1),
        None if weights is None else weights.reshape(-1),
        spans,
        settings,
        laid_out(x.to(problem.dtype), problem.layout),
        labels.to(torch.int32 if problem.seed % 5 == 0 else torch.int64),
        keywords,
        upstream,
        {"ref_logits": ref_x, "unscored": unscored, "lengths": lengths},
    )
