"""What a call of the linear path is, but for the tensors that may need a gradient."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from .. import backends
from ..arguments import check_tensor, refuse_transforms
from ..stages import KL_TERMS, Stages, Transform, all_rows
from . import planner


class LMHead(NamedTuple):
    """A head: weight [V, H], and bias [V] or None."""

    weight: Tensor
    bias: Tensor | None

    @property
    def vocab(self) -> int:
        """V; 0 where the weight is no matrix, which `check` says."""
        return self.weight.shape[0] if isinstance(self.weight, Tensor) and self.weight.dim() else 0

    def check(self, hidden: Tensor, vocab: int | None = None, prefix: str = "") -> None:
        """Raise unless the head goes with its hidden states and the vocabulary; `prefix` is that of the caller's names."""
        name, weight = f"{prefix}weight", self.weight
        if not isinstance(weight, Tensor) or weight.dim() != 2:
            got = list(weight.shape) if isinstance(weight, Tensor) else type(weight).__name__
            raise ValueError(f"{name} must be the head's weight [V, H]; got {got}")
        rows = weight.shape[0] if vocab is None else vocab
        if rows == 0:
            raise ValueError(f"{name} has an empty vocabulary: {list(weight.shape)}")
        why = f"[V, H], H being that of {prefix}hidden"
        check_tensor(name, weight, (rows, hidden.shape[-1]), hidden.device, why)
        refuse_transforms(name, weight)
        if self.bias is not None:
            refuse_transforms(f"{prefix}bias", self.bias)
            check_tensor(f"{prefix}bias", self.bias, (rows,), hidden.device, f"one per row of {name}")
        if weight.dtype != hidden.dtype and not torch.is_autocast_enabled(hidden.device.type):
            raise TypeError(
                f"{name} is {weight.dtype}, {prefix}hidden is {hidden.dtype}; cast one, or call under torch.autocast"
            )


class Reference(NamedTuple):
    """The reference's hidden states [B, T, Hr] and head [V, Hr], or nothing."""

    hidden: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None


class Needs(NamedTuple):
    """Whose gradients are wanted."""

    hidden: bool = False
    weight: bool = False
    bias: bool = False


NO_REFERENCE = Reference()


@dataclass(frozen=True)
class Call:
    """Everything about a call but the tensors that may need a gradient.

    Attributes:
        labels: [B, T].
        statistics: names of stage 1's statistics, and "grad_dropped_mass".
        terms: the divergences that the loss reads of each token, differentiable (stages.KL_TERMS).
        compute_dtype: what the products and logits are in.
        strategy, reason: see planner.py.
        sizes: what the planner knows of the head.
        budget: bytes.
        eps: filter threshold on probabilities, 0 for exact gradients.
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
        """The products are the fused Triton kernels' (fused.py), which leave out blocks without probability."""
        return self.sizes.fused

    @property
    def stages(self) -> Stages:
        """The backend's stage functions."""
        return backends.load(self.backend, self.labels.device.type)  # type: ignore[return-value]

    @property
    def rows(self) -> tuple[str, ...]:
        """Names of what is found of each token."""
        return all_rows(self.reference.hidden is not None, self.statistics, self.terms)

    def without_reference(self) -> Call:
        """The call for a backward of log-probabilities alone: the reference needs no second projection."""
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
    """What the planner needs to know of a call with hidden states [B, T, H]; `fused` is its own decision."""
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
    """What a backward needs to differentiate token-level KL divergences as well; shapes as the log-probabilities'.

    Attributes:
        ref_logps, ref_max, ref_log_sum, kl: of stage 1.
        grad_kl, grad_forward_kl: gradients of the loss by KL(policy || reference) and KL(reference || policy), or None.
    """

    ref_logps: Tensor
    ref_max: Tensor
    ref_log_sum: Tensor
    kl: Tensor
    grad_kl: Tensor | None
    grad_forward_kl: Tensor | None

    @classmethod
    def of(cls, rows: dict[str, Tensor], grads: dict[str, Tensor]) -> KLGradients:
        """From stage 1's rows and the gradients of the loss, both by name."""
        reference = rows["ref_logps"], rows["ref_max"], rows["ref_log_sum"]
        return cls(*reference, rows["kl"], grads.get("kl"), grads.get("forward_kl"))

    def at(self, tokens: Tensor | slice) -> KLGradients:
        """Those of the tokens."""

        def part(values: Tensor | None) -> Tensor | None:
            return None if values is None else values.reshape(-1)[tokens]

        return KLGradients(*map(part, self))  # type: ignore

    def moves(self) -> Tensor:
        """Where one of the gradients is not 0."""
        grads = [grad != 0 for grad in (self.grad_kl, self.grad_forward_kl) if grad is not None]
        return grads[0] if len(grads) == 1 else grads[0] | grads[1]
