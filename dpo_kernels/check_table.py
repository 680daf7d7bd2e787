"""The operator table: the cases on which selfcheck.py checks the kernels of a device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from .backends import LinearVariant, Variant
from .stages import STATISTICS as _ALL

IGNORE = -100


@dataclass(frozen=True)
class Case:
    """A small call: the kernels that it runs (`variant`), and the special properties of its input.

    Attributes:
        variant: the kernels.
        vocab: V, or None for a size at which every loop of the device's kernels runs.
        infinite: a tenth of the logits are -inf.
        confident: the label's probability is close to 1.
        empty: one of the sequences has no scored token.
        strided: the logits are a view with gaps between its rows.
        weighted: the tokens have different weights, some of them 0.
    """

    variant: Variant
    vocab: int | None = None
    infinite: bool = False
    confident: bool = False
    empty: bool = False
    strided: bool = False
    weighted: bool = False

    def __str__(self) -> str:
        hostile = [name for name in ("infinite", "confident", "empty", "strided", "weighted") if getattr(self, name)]
        size = [] if self.vocab is None else [f"V = {self.vocab}"]
        return ", ".join([str(self.variant), *size, *hostile])


def case_of(variant: Variant) -> Case:
    """The case that checks the kernels of a call's variant."""
    return Case(variant)


def serves(backend: str, case: Case) -> bool:
    """Whether the backend implements the case's kernels; without them, a call raises its own error."""
    need = case.variant.linear
    if need is not None and need.fused and backend not in ("triton", "cuda"):
        return False
    # The CUDA kernels take the maximum before the scale, so with a negative scale they would subtract the minimum.
    return not (backend == "cuda" and case.variant.negative_scale)


_F32, _BF16, _F16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = (_F32, _BF16, _F16)


def _logits_cases(dtype: torch.dtype) -> Iterator[Case]:
    plain = Variant(dtype, reference=dtype)
    everything = plain._replace(statistics=_ALL)
    for aligned in (True, False):
        for packed in (False, True):
            for statistics in ((), *((name,) for name in _ALL), _ALL):
                yield Case(plain._replace(aligned=aligned, packed=packed, statistics=statistics))
        for terms in (("kl",), ("forward_kl",), ("kl", "forward_kl")):
            yield Case(plain._replace(aligned=aligned, terms=terms))
            yield Case(everything._replace(aligned=aligned, terms=terms, loss="sums"))
        for other in DTYPES:
            if other != dtype:
                yield Case(everything._replace(aligned=aligned, reference=other))
                yield Case(plain._replace(aligned=aligned, reference=other, terms=("kl", "forward_kl")))
        for negative_scale in (False, True):
            yield Case(everything._replace(aligned=aligned, softcap=True, negative_scale=negative_scale))
        yield Case(plain._replace(aligned=aligned, softcap=True, terms=("kl", "forward_kl")))
        yield Case(everything._replace(aligned=aligned, negative_scale=True))
        yield Case(everything._replace(aligned=aligned), infinite=True)
        yield Case(everything._replace(aligned=aligned), confident=True)
        yield Case(everything._replace(aligned=aligned), strided=True, weighted=True)
    for packed in (False, True):
        yield Case(everything._replace(packed=packed), weighted=True, empty=True)
        for loss in ("sigmoid", "robust", "sums"):
            yield Case(plain._replace(packed=packed, loss=loss, reference="sums"), weighted=True)
        yield Case(plain._replace(packed=packed, loss="robust"))
        yield Case(plain._replace(packed=packed, loss="sums", reference=None, statistics=("entropy",)))
    for vocab in (1, 7, 33, 1021):
        yield Case(everything._replace(aligned=False), vocab=vocab)
    yield Case(everything._replace(few_rows=False), vocab=1032)
    yield Case(everything._replace(few_rows=False, aligned=False), vocab=1035)
    yield Case(everything._replace(grad=False))


def _linear_cases(dtype: torch.dtype) -> Iterator[Case]:
    def case(aligned: bool, strategy: str, **changes: Any) -> Case:
        needs = {name: changes.pop(name) for name in ("fused", "bias", "hidden", "weight") if name in changes}
        loss = "sigmoid" if strategy == "whole_pairs" else "sums"
        variant = Variant(dtype, aligned=aligned, loss=loss, linear=LinearVariant(strategy, **needs))
        return Case(variant._replace(**changes))

    nothing = {"hidden": False, "weight": False}
    for aligned in (True, False):
        for bias in (False, True):
            yield case(aligned, "whole_pairs", bias=bias, reference=dtype)
            yield case(aligned, "two_pass", bias=bias)
            yield case(aligned, "forward", bias=bias, statistics=_ALL, reference=dtype, **nothing)
            yield case(aligned, "whole_pairs", bias=bias, fused=True, reference=dtype)
            yield case(aligned, "two_pass", bias=bias, fused=True)
        yield case(aligned, "whole_pairs", statistics=_ALL, reference=dtype, softcap=True)
        yield case(aligned, "frozen_head", weight=False)
        yield case(aligned, "two_pass", terms=("kl", "forward_kl"), reference=dtype)
        some = tuple(name for name in _ALL if name != "kl")
        yield case(aligned, "whole_pairs", fused=True, statistics=some, reference=dtype, softcap=True)


#: Every case; `serves` excludes those that a backend does not implement.
TABLE: tuple[Case, ...] = tuple(
    dict.fromkeys(case for dtype in DTYPES for cases in (_logits_cases, _linear_cases) for case in cases(dtype))
)
