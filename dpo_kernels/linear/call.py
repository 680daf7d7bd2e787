"""A call of the linear path: all its arguments except the tensors that may need a gradient."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from .. import backends
from ..arguments import check_tensor, refuse_transforms
from ..stages import KL_TERMS, Stages, Transform, all_rows, from_uniform
from . import planner


class LMHead(NamedTuple):
    """An LM head: weight [V, H], and bias [V] or None."""

    weight: Tensor
    bias: Tensor | None

    @property
    def vocab(self) -> int:
        """V; 0 if the weight is not a tensor with dimensions, for which `check` raises."""
        return self.weight.shape[0] if isinstance(self.weight, Tensor) and self.weight.dim() else 0

    def check(self, hidden: Tensor, vocab: int | None = None, prefix: str = "") -> None:
        """Raise unless shape, device and dtype of the head fit its hidden states and the vocabulary.

        `prefix` precedes the argument names in errors ("ref_" for the reference).
        """
        name, weight = f"{prefix}weight", self.weight
        if not isinstance(weight, Tensor) or weight.dim() != 2:
            got = list(weight.shape) if isinstance(weight, Tensor) else type(weight).__name__
            raise ValueError(f"{name} must be the LM head's weight [V, H]; got {got}")
        rows = weight.shape[0] if vocab is None else vocab
        if rows == 0:
            raise ValueError(f"{name} has an empty vocabulary: {list(weight.shape)}")
        why = f"[V, H], with H of {prefix}hidden"
        check_tensor(name, weight, (rows, hidden.shape[-1]), hidden.device, why)
        refuse_transforms(name, weight)
        if self.bias is not None:
            refuse_transforms(f"{prefix}bias", self.bias)
            check_tensor(f"{prefix}bias", self.bias, (rows,), hidden.device, f"one per row of {name}")
        if weight.dtype != hidden.dtype and not torch.is_autocast_enabled(hidden.device.type):
            raise TypeError(
                f"{name} is {weight.dtype}, {prefix}hidden is {hidden.dtype}; cast one of them, or use torch.autocast"
            )


class Reference(NamedTuple):
    """The reference's hidden states [B, T, Hr], head [V, Hr] and bias [V]; all None without a reference."""

    hidden: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None


class Needs(NamedTuple):
    """Which of the tensors need a gradient."""

    hidden: bool = False
    weight: bool = False
    bias: bool = False


NO_REFERENCE = Reference()


@dataclass(frozen=True)
class Call:
    """All arguments of a call except the tensors that may need a gradient.

    Attributes:
        labels: [B, T] int64.
        reference: the reference's tensors.
        transform: the map from logits to z.
        statistics: names of stage 1's statistics, and possibly "grad_dropped_mass".
        terms: the token-level divergences that the loss depends on (a subset of stages.KL_TERMS), or ("entropy",).
        compute_dtype: dtype of the products and logits.
        backend: the backend's name.
        strategy, reason: see planner.py.
        sizes: the sizes that the plan depends on.
        needs: the tensors that need a gradient.
        budget: bytes.
        eps: filter threshold on probabilities; 0 for exact gradients.
    """

    labels: Tensor
    reference: Reference
    transform: Transform
    statistics: tuple[str, ...]
    terms: tuple[str, ...]
    compute_dtype: torch.dtype
    backend: str
    strategy: str
    sizes: planner.Head
    needs: Needs
    budget: int
    reason: str = ""
    eps: float = 0.0

    @property
    def fused(self) -> bool:
        """Whether the fused Triton kernels compute the products (fused.py); they skip blocks of negligible probability."""
        return self.sizes.fused

    @property
    def stages(self) -> Stages:
        """The backend's stage functions."""
        return backends.load(self.backend, self.labels.device.type)  # type: ignore[return-value]

    @property
    def rows(self) -> tuple[str, ...]:
        """Names of the per-token results."""
        return all_rows(self.reference.hidden is not None, self.statistics, self.terms)

    def without_reference(self) -> Call:
        """The call without its reference, for a backward pass of log-probabilities only, which does not need it."""
        sizes = replace(self.sizes, projects_reference=False, kl=False, kl_gradient=False)
        return replace(self, reference=NO_REFERENCE, statistics=(), terms=(), sizes=sizes)


def sizes_of(
    hidden: Tensor,
    vocab: int,
    reference: Reference,
    statistics: tuple[str, ...],
    terms: tuple[str, ...],
    compute_dtype: torch.dtype,
    needs: Needs,
) -> planner.Head:
    """The sizes of a call with hidden states [B, T, H], for the planner; `fused` is decided later."""
    device = hidden.device.type
    return planner.Head(
        hidden.shape[-1],
        vocab,
        compute_dtype.itemsize,
        needs_hidden=needs.hidden,
        needs_weight=needs.weight or needs.bias,
        projects_reference=reference.hidden is not None,
        kl=not {*statistics, *terms}.isdisjoint(KL_TERMS),
        widens=device == "cpu" and compute_dtype.itemsize == 2,
        kl_gradient=bool(terms),
        device_type=device,
        float16=compute_dtype == torch.float16,
    )


class KLGradients(NamedTuple):
    """The input of a backward pass for the gradients of token-level KL divergences; shapes as the log-probabilities.

    Attributes:
        ref_logps, ref_max, ref_log_sum, kl: rows of stage 1.
        grad_kl: gradient of the loss with respect to KL(policy || reference), or None.
        grad_forward_kl: gradient of the loss with respect to KL(reference || policy), or None.
    """

    ref_logps: Tensor
    ref_max: Tensor
    ref_log_sum: Tensor
    kl: Tensor
    grad_kl: Tensor | None
    grad_forward_kl: Tensor | None

    @classmethod
    def of(cls, rows: dict[str, Tensor], grads: Mapping[str, Tensor | None], vocab: int) -> KLGradients:
        """From the rows of stage 1 and the gradients of the loss, both by name.

        Without a reference, the divergence "kl" is that from a uniform distribution, which gives the gradient of the entropy.
        """
        if "ref_logps" in rows:
            reference = rows["ref_logps"], rows["ref_max"], rows["ref_log_sum"], rows["kl"]
        else:
            reference = from_uniform(rows["entropy"], vocab)
        return cls(*reference, grads.get("kl"), grads.get("forward_kl"))

    def at(self, tokens: Tensor | slice) -> KLGradients:
        """The values of these tokens (flat indices)."""

        def part(values: Tensor | None) -> Tensor | None:
            return None if values is None else values.reshape(-1)[tokens]

        return KLGradients(*map(part, self))  # type: ignore

    def moves(self) -> Tensor:
        """True where one of the gradients is not 0."""
        grads = [grad != 0 for grad in (self.grad_kl, self.grad_forward_kl) if grad is not None]
        return grads[0] if len(grads) == 1 else grads[0] | grads[1]
