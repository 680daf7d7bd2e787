"""The gradient checks, in a form that can fail.

Why so strict: in this field's usual recipes (one flat tolerance, or one norm over the whole tensor) a gradient whose
non-label entries are all zero passes, since each of them is about 1/V. So here
  * truth is float64,
  * the label's entry and all other entries of a row are compared apart, each relative to its own norm,
  * every row is compared alone,
  * rows without weight must be exactly zero,
  * the budget is a stated multiple of what eager PyTorch loses in the same dtype on the same rows.
tests/test_the_tests.py plants faults and requires each to be caught.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

#: Our error may be this multiple of eager's, on the label entries and on the others. The CPU kernels stay under 1; the
#: GPU kernels fold log2(e) into the subtraction of the maximum, one instruction a logit less for up to 2.5 times eager's
#: rounding.
BUDGET = 3.0


@dataclass
class GradientErrors:
    """Relative errors per scored row, [rows] each, in float64."""

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
    """Assert that `grad` is no further from the float64 `truth` than BUDGET times `eager` (same dtype), row by row.

    eager: the textbook gradient in the dtype of `grad`. A row's budget takes the worst row of eager, because one row's
    rounding is luck; half a unit in the last place of the stored dtype is granted for entries that eager happens to hit.
    """
    assert grad.dtype == eager.dtype, f"gradient dtype {grad.dtype}, expected {eager.dtype}"
    assert grad.shape == truth.shape, f"gradient shape {tuple(grad.shape)}, expected {tuple(truth.shape)}"
    ours, theirs = row_errors(grad, truth, labels, ignore_index), row_errors(eager, truth, labels, ignore_index)
    # bfloat16 and float16 round each entry once; float32 entries pass through a handful of operations.
    rounding = torch.finfo(grad.dtype).eps
    for part in ("label", "others"):
        mine, other = getattr(ours, part), getattr(theirs, part)
        if mine.numel() == 0:
            continue
        # float64 eager is the truth itself, with error 0; ours may differ from it by a libm's last bits.
        floor = 1e-13 if grad.dtype == torch.float64 else rounding
        budget = BUDGET * max(float(other.max()), floor)
        # Never so wide that a fault of a few per cent fits in.
        budget = min(budget, 0.02)
        worst = int(mine.argmax())
        assert float(mine[worst]) <= budget, (
            f"{part} entries: relative error {float(mine[worst]):.3g} in scored row {worst}, "
            f"budget {budget:.3g} ({BUDGET} x eager's {float(other.max()):.3g})"
        )
