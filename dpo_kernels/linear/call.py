"""What a call of the linear path is, but for the tensors that may need a gradient, and the names of what it finds per token."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import ModuleType

import torch
from torch import Tensor

from .. import backends, planner

#: Names of a stage-1 result, in its order, and of what this module adds.
STAGE_OUTPUTS = ("logps", "lse", "ref_logps", "entropy", "kl", "accuracy", "mean_logits", "log_sum_sq")
TOKEN_OUTPUTS = (*STAGE_OUTPUTS, "grad_dropped_mass", "forward_kl")
#: Those that a loss may be differentiated by: KL(policy || reference) and KL(reference || policy) where a term, and these.
KL_TERMS = ("kl", "forward_kl")

#: What `grad_filter="auto"` means on a CPU: the threshold whose error in dH stays below the dtype's own rounding
#: (docs/linear.md). On a GPU it means exact.
AUTO_FILTER = {torch.bfloat16: 2.0**-16, torch.float16: 2.0**-20}


@dataclass(frozen=True)
class Call:
    """Everything about a call but the tensors that may need a gradient; labels and weights are [B, T].

    Attributes:
        ref_hidden: [B, T, Hr] or None; with ref_weight [V, Hr] and ref_bias [V] or None.
        statistics: names of stage 1's statistics.
        terms: the divergences that the loss reads of each token, differentiable: "kl" and "forward_kl".
        compute_dtype: what the products and logits are in.
        eps: filter threshold on probabilities, 0 for exact gradients.
        fused: the products are the fused Triton kernels' (fused.py), which leave out blocks without probability.
    """

    labels: Tensor
    ref_hidden: Tensor | None
    ref_weight: Tensor | None
    ref_bias: Tensor | None
    ignore_index: int
    logit_scale: float
    logit_softcap: float
    statistics: tuple[str, ...]
    compute_dtype: torch.dtype
    budget: int
    backend: str
    strategy: str
    terms: tuple[str, ...] = ()
    reason: str = ""
    eps: float = 0.0
    fused: bool = False
    needs_hidden: bool = False
    needs_weight: bool = False
    needs_bias: bool = False

    @property
    def stages(self) -> ModuleType:
        """The backend's stage functions."""
        return backends.load(self.backend, self.labels.device.type)

    @property
    def given(self) -> frozenset[str]:
        """Names of everything that is found per token beside logps, lse and ref_logps."""
        return frozenset((*self.statistics, *self.terms))

    @property
    def kl_gradient(self) -> bool:
        """Whether a token-level KL is differentiated."""
        return bool(self.terms)

    def without_reference(self) -> Call:
        """The call for a backward of log-probabilities alone: the reference needs no second projection."""
        return replace(self, ref_hidden=None, ref_weight=None, ref_bias=None, statistics=(), terms=())

    def sizes(self, hidden_size: int, vocab: int) -> planner.Head:
        """What the planner needs to know."""
        return planner.Head(
            hidden_size,
            vocab,
            self.compute_dtype.itemsize,
            self.needs_hidden,
            self.needs_weight or self.needs_bias,
            self.ref_hidden is not None,
            not self.given.isdisjoint(KL_TERMS),
            self.labels.device.type == "cpu" and self.compute_dtype.itemsize == 2,
            self.kl_gradient,
            self.fused,
            self.labels.device.type,
        )


@dataclass(frozen=True)
class KLGradients:
    """What a backward needs to differentiate token-level KL divergences as well; shapes as the log-probabilities'.

    Attributes:
        ref_logps, kl: of stage 1.
        grad_kl, grad_forward_kl: gradients of the loss by KL(policy || reference) and KL(reference || policy), or None.
    """

    ref_logps: Tensor
    kl: Tensor
    grad_kl: Tensor | None
    grad_forward_kl: Tensor | None

    def at(self, tokens: Tensor | slice) -> KLGradients:
        """Those of the tokens."""

        def part(values: Tensor | None) -> Tensor | None:
            return None if values is None else values.reshape(-1)[tokens]

        return KLGradients(*map(part, (self.ref_logps, self.kl, self.grad_kl, self.grad_forward_kl)))  # type: ignore

    def moves(self) -> Tensor:
        """Where one of the gradients is not 0."""
        grads = [grad != 0 for grad in (self.grad_kl, self.grad_forward_kl) if grad is not None]
        return grads[0] if len(grads) == 1 else grads[0] | grads[1]
