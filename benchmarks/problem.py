"""The inputs of all contenders of the logits path, and the float64 truth for checking their gradients."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dpo_kernels import dpo_loss
from dpo_kernels.objectives import Pairs, sigmoid

from .machine import cache_bytes

BETA = 0.1


class LogitsProblem:
    """Policy logits, reference logits and labels of P pairs, in rotating copies that together exceed the cache.

    Args:
        rotating_bytes: least size of all copies together; four times the largest cache if not given. Several
            problems that take turns may divide it among them.

    Attributes:
        logits: [2P, T, V], the current copy; a leaf that requires grad.
        ref_logits: [2P, T, V], the current copy.
        labels: [2P, T] int64; every token is scored, so that all contenders need the same memory traffic.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        device: str = "cpu",
        seed: int = 0,
        rotating_bytes: int | None = None,
    ) -> None:
        batch, tokens, vocab = shape
        self.shape, self.dtype, self.device = shape, dtype, device
        generator = torch.Generator(device).manual_seed(seed)

        def draw(scale: float) -> Tensor:
            return torch.randn(shape, generator=generator, device=device) * scale

        policy = draw(2.0)
        # A reference close to the policy, as in training: the pair losses stay near log 2 and no sigmoid saturates.
        ref = policy + draw(0.1)
        self.labels = torch.randint(vocab, (batch, tokens), generator=generator, device=device)
        self._pristine = policy.to(dtype)
        ref = ref.to(dtype)
        if rotating_bytes is None:
            rotating_bytes = 4 * cache_bytes()
        slots = max(1, math.ceil(rotating_bytes / (2 * self.nbytes)))
        self._logits = [self._pristine.clone().requires_grad_() for _ in range(slots)]
        self._ref = [ref, *(ref.clone() for _ in range(slots - 1))]
        self._slot = 0

    @property
    def nbytes(self) -> int:
        """Bytes of one [2P, T, V] tensor."""
        return self._pristine.nbytes

    @property
    def logits(self) -> Tensor:
        return self._logits[self._slot]

    @property
    def ref_logits(self) -> Tensor:
        return self._ref[self._slot]

    def next(self) -> None:
        """Restore the logits, which a contender may have overwritten, and switch to the least recently used copy."""
        with torch.no_grad():
            self.logits.copy_(self._pristine)
        self._slot = (self._slot + 1) % len(self._logits)


def step(problem: LogitsProblem, *, reference: bool = True, **keywords: Any) -> Tensor:
    """Our loss and its gradient, written over the logits; keywords: as in `dpo_loss`."""
    out = dpo_loss(
        problem.logits,
        problem.labels,
        ref_logits=problem.ref_logits if reference else None,
        inplace_backward=True,
        **{"beta": BETA, **keywords},
    )
    return torch.autograd.grad(out.loss, problem.logits)[0]


@dataclass(frozen=True)
class GradientError:
    """Distance of a gradient from the truth: relative norms of the worst sequence.

    Label entries and all other entries have separate norms: at a vocabulary of 49,152, a gradient with zeros in all other
    entries would be off by only a percent as a whole.
    """

    label: float
    others: float

    @property
    def worst(self) -> float:
        return max(self.label, self.others)


class Truth:
    """Loss and gradient of a problem in float64, one sequence at a time.

    The formula is that of `dpo_kernels.reference`, differentiated by autograd; tests/test_benchmarks.py checks that the two
    are equal. Only what the gradient needs is computed, because a float64 pass over 50 million logits takes seconds.
    """

    def __init__(self, problem: LogitsProblem) -> None:
        self.problem = problem
        logits, ref, labels = problem.logits.detach(), problem.ref_logits, problem.labels
        self.gradient = torch.empty(problem.shape, dtype=torch.float64, device=logits.device)
        sums = logits.new_zeros(len(labels), dtype=torch.float64)
        ref_sums = torch.zeros_like(sums)
        for s in range(len(labels)):
            z = logits[s].double().requires_grad_()
            total = self._logps(z, labels[s]).sum()
            sums[s], ref_sums[s] = total.detach(), self._logps(ref[s].double(), labels[s]).sum()
            # The gradient of the sequence's sum S; the loss's gradient is this times dL/dS, which needs all sums first.
            self.gradient[s] = torch.autograd.grad(total, z)[0]
        sums.requires_grad_()
        lengths = torch.full_like(ref_sums, labels.shape[1])
        pairs = Pairs.from_sums(sums, ref_sums, lengths, sums.new_tensor(BETA), sums.new_tensor(0.0))
        loss = sigmoid(pairs).mean()
        self.loss = loss.item()
        (coefficients,) = torch.autograd.grad(loss, sums)
        self.gradient *= coefficients[:, None, None]

    @staticmethod
    def _logps(z: Tensor, labels: Tensor) -> Tensor:
        return z.log_softmax(-1).gather(-1, labels.unsqueeze(-1))

    def error_of(self, gradient: Tensor) -> GradientError:
        """How far a gradient [2P, T, V] is from the truth; infinite for a wrong shape, NaN or infinity."""
        if gradient.shape != self.gradient.shape or not bool(torch.isfinite(gradient).all()):
            return GradientError(math.inf, math.inf)
        label_error = other_error = 0.0
        for found, true, labels in zip(gradient, self.gradient, self.problem.labels, strict=True):
            index = labels.unsqueeze(-1)
            difference = found.double() - true
            at_label, true_label = difference.gather(-1, index), true.gather(-1, index)
            label_error = max(label_error, float(at_label.norm() / true_label.norm()))
            rest = difference.scatter_(-1, index, 0.0).norm()
            true_rest = (true.norm() ** 2 - true_label.norm() ** 2).sqrt()
            other_error = max(other_error, float(rest / true_rest))
        return GradientError(label_error, other_error)


def error_budget(dtype: torch.dtype) -> float:
    """Largest allowed error of a gradient: one unit of the output's rounding, plus 1e-4 for arithmetic.

    Eager PyTorch uses a quarter of it in bfloat16 and a tenth in float32: the sums of log-probabilities are rounded, and
    through beta that reaches every entry. Real faults (a zeroed row, a factor, a shifted label) cause errors of percents.
    """
    return torch.finfo(dtype).eps + 1e-4
