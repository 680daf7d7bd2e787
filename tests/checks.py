"""Strict gradient checks.

With the usual checks (one flat tolerance, or one norm over the whole tensor), a gradient passes even if all of its non-label
entries are zero, because each of them is about 1/V. So here
  * the true gradient is computed in float64,
  * the label's entry and the other entries of a row are compared separately, each relative to its own norm,
  * every row is compared separately,
  * rows without weight must be exactly zero,
  * the error budget is a multiple (BUDGET) of eager PyTorch's error in the same dtype on the same rows.
tests/test_the_tests.py plants faults and requires that each is caught.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

#: Our error may be this multiple of eager's, on the label entries and on the other entries. The CPU kernels stay below 1.
#: The GPU kernels fold log2(e) into the subtraction of the maximum. This saves one instruction per logit and makes the
#: rounding error up to 2.5 times eager's.
BUDGET = 3.0


@dataclass
class GradientErrors:
    """Relative errors of the scored rows, [rows] each, float64."""

    label: Tensor
    others: Tensor


def row_errors(grad: Tensor, truth: Tensor, labels: Tensor, ignore_index: int = -100) -> GradientErrors:
    """Relative error of each scored row's label entry, and of its other entries as a vector.

    grad, truth: [..., V]; labels: [...]. Rows whose true gradient vanishes must vanish exactly.
    """
    vocab = truth.shape[-1]
    grad, truth, labels = grad.reshape(-1, vocab).double(), truth.reshape(-1, vocab).double(), labels.reshape(-1)
    dead = (labels == ignore_index) | (truth == 0).all(-1)
    assert bool((grad[dead] == 0).all()), "a token without weight received gradient"
    grad, truth, index = grad[~dead], truth[~dead], labels[~dead].unsqueeze(-1)
    label_grad, label_truth = grad.gather(-1, index).squeeze(-1), truth.gather(-1, index).squeeze(-1)
    difference = (grad - truth).scatter(-1, index, 0.0).norm(dim=-1)
    size = truth.scatter(-1, index, 0.0).norm(dim=-1)
    tiny = torch.finfo(torch.float64).tiny
    return GradientErrors(
        (label_grad - label_truth).abs() / label_truth.abs().clamp(min=tiny), difference / size.clamp(min=tiny)
    )


def check_gradient(grad: Tensor, truth: Tensor, eager: Tensor, labels: Tensor, ignore_index: int = -100) -> None:
    """Assert that no row of `grad` has more than BUDGET times the error of `eager`, both against the float64 `truth`.

    eager: the textbook gradient in the dtype of `grad`. The budget of every row is based on eager's worst row, because the
    rounding of a single row is random. It allows at least the rounding of the stored dtype, for entries that eager happens
    to have exactly right.
    """
    assert grad.dtype == eager.dtype, f"gradient dtype {grad.dtype}, expected {eager.dtype}"
    assert grad.shape == truth.shape, f"gradient shape {tuple(grad.shape)}, expected {tuple(truth.shape)}"
    ours, theirs = row_errors(grad, truth, labels, ignore_index), row_errors(eager, truth, labels, ignore_index)
    # bfloat16 and float16 round each entry once; float32 entries are rounded by several operations.
    rounding = torch.finfo(grad.dtype).eps
    for part in ("label", "others"):
        mine, other = getattr(ours, part), getattr(theirs, part)
        if mine.numel() == 0:
            continue
        # In float64, eager is the truth itself, with error 0. Ours may differ by the last bits of the math library.
        floor = 1e-13 if grad.dtype == torch.float64 else rounding
        budget = BUDGET * max(float(other.max()), floor)
        # A fault of a few per cent must never fit into the budget.
        budget = min(budget, 0.02)
        worst = int(mine.argmax())
        assert float(mine[worst]) <= budget, (
            f"{part} entries: relative error {float(mine[worst]):.3g} in scored row {worst}, "
            f"budget {budget:.3g} ({BUDGET} x eager's {float(other.max()):.3g})"
        )
