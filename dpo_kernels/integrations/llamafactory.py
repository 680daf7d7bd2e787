"""Puts these kernels under LLaMA-Factory's DPO, KTO, ORPO and SimPO trainers, and under its DFT and ASFT losses.

```python
from dpo_kernels.integrations import llamafactory

llamafactory.apply()  # once, before training; or: with llamafactory.applied(): ...
```

LLaMA-Factory's preference trainers (0.9.1 to 0.9.5) get the log-probabilities of all sequences from one function,
`get_batch_logps`. The replacement skips prompts and padding, and allocates nothing of the logits' size in the forward pass. The
trainers' copy of 16-bit logits to float32 is left out, because the kernels compute in float32 from 16-bit logits.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..logps import token_logps
from .patch import Patch, Target, small_logits, takes

__all__ = ["applied", "apply"]

Function = Callable[..., Any]


def _get_batch_logps(inplace_backward: bool) -> Callable[[Function], Function]:
    def replacement(theirs: Function) -> Function:
        @functools.wraps(theirs)
        def get_batch_logps(
            logits: Tensor, labels: Tensor, label_pad_token_id: int = -100, ld_alpha: float | None = None
        ) -> tuple[Tensor, Tensor]:
            if not takes(logits):
                return theirs(logits, labels, label_pad_token_id, *(() if ld_alpha is None else (ld_alpha,)))
            if logits.shape[:-1] != labels.shape:
                raise ValueError(
                    "Logits (batchsize x seqlen) and labels must have the same shape; "
                    f"got {list(logits.shape)} and {list(labels.shape)}"
                )
            # The labels move instead of the logits: the gradient of a slice would need a second tensor of the logits' size.
            labels = functional.pad(labels[:, 1:], (0, 1), value=label_pad_token_id)
            counted = labels != label_pad_token_id
            lengths = counted.sum(-1)
            logps = token_logps(logits, labels, ignore_index=label_pad_token_id, inplace_backward=inplace_backward)
            assert isinstance(logps, Tensor)
            if ld_alpha is not None:
                # LD-DPO (https://arxiv.org/abs/2409.06411): tokens beyond the length of the pair's shorter answer weigh less.
                chosen, rejected = lengths.chunk(2)
                end = counted.int().argmax(1) + torch.minimum(chosen, rejected).repeat(2)
                shared = torch.arange(labels.shape[1], device=labels.device) < end.unsqueeze(1)
                logps = torch.where(shared, logps, ld_alpha * logps)
            return logps.sum(-1), lengths

        get_batch_logps.reads_16_bits = True  # type: ignore[attr-defined]
        return get_batch_logps

    return replacement


class _Uncast:
    """A model, its output or its logits, except that `model(...).logits.to(torch.float32)` does not copy 16-bit logits."""

    def __init__(self, whole: Any) -> None:
        self._whole = whole

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return _Uncast(self._whole(*arguments, **named))

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._whole, name)
        return _Uncast(found) if name == "logits" else found

    def to(self, *arguments: Any, **named: Any) -> Any:
        whole = self._whole
        keep = (
            type(whole) is Tensor and arguments == (torch.float32,) and whole.dtype in (torch.bfloat16, torch.float16)
        )
        return whole if keep else whole.to(*arguments, **named)


def _without_copy(theirs: Function) -> Function:
    @functools.wraps(theirs)
    def forward(self: Any, model: Any, batch: Any, *rest: Any, **named: Any) -> Any:
        logps = theirs.__globals__.get("get_batch_logps")  # type: ignore[attr-defined]
        # Their own function would compute 16-bit logits in 16 bits.
        return theirs(self, _Uncast(model) if hasattr(logps, "reads_16_bits") else model, batch, *rest, **named)

    return forward


def _dft_cross_entropy(theirs: Function) -> Function:
    @functools.wraps(theirs)
    def dft_cross_entropy(
        source: Tensor, target: Tensor, num_items_in_batch: Tensor | int | None = None, ignore_index: int = -100
    ) -> Tensor:
        if not takes(source):
            return theirs(source, target, num_items_in_batch, ignore_index)
        counted = (target != ignore_index).sum()
        if not counted:
            return torch.tensor(0.0, device=source.device, dtype=source.dtype)
        # DFT (https://arxiv.org/abs/2508.05629): each token's loss times its probability. Ignored tokens get the loss 0.
        logps = token_logps(source, target, ignore_index=ignore_index)
        assert isinstance(logps, Tensor)
        total = -(logps * logps.detach().exp()).sum()
        if num_items_in_batch is None:
            return total / counted
        return total / (
            num_items_in_batch.to(total.device) if torch.is_tensor(num_items_in_batch) else num_items_in_batch
        )

    return dft_cross_entropy


# --- examples: what original and replacement must agree on --------------------------------------------------------


def _labelled() -> tuple[Tensor, Tensor]:
    """(logits [4, 7, 11] with a gradient, labels [4, 7]) of two pairs; one sequence has no label that counts."""
    logits, labels = small_logits(rows=4, tokens=7)
    for row, (first, end) in enumerate([(2, 7), (0, 4), (7, 7), (3, 6)]):
        labels[row, :first] = labels[row, end:] = -100
    return logits.requires_grad_(), labels


def _logps_of_batch(function: Function) -> Any:
    logits, labels = _labelled()
    logps, lengths = function(logits, labels)
    (logps * torch.arange(1.0, 5.0)).sum().backward()
    return logps, lengths, logits.grad


def _logps_desensitized(function: Function) -> Any:
    logits, labels = _labelled()
    if "ld_alpha" not in inspect.signature(function).parameters:  # before 0.9.3
        return function(logits, labels)
    return function(logits, labels, ld_alpha=0.3)


def _dft(function: Function) -> Any:
    logits, labels = _labelled()
    rows, targets = logits.flatten(0, 1), labels.flatten()
    loss = function(rows, targets)
    loss.backward()
    return loss, function(rows, targets, 5), function(rows, torch.full_like(targets, -100)), logits.grad


def _targets(inplace_backward: bool = False) -> tuple[Target, ...]:
    return (
        Target(
            "llamafactory.train.trainer_utils",
            "get_batch_logps",
            ("logits, labels, label_pad_token_id", "logits, labels, label_pad_token_id, ld_alpha"),
            _get_batch_logps(inplace_backward),
            (_logps_of_batch, _logps_desensitized),
        ),
        Target(
            "llamafactory.train.trainer_utils",
            "_dft_cross_entropy",
            ("source, target, num_items_in_batch, ignore_index",),
            _dft_cross_entropy,
            (_dft,),
        ),
        # Both run their own code, so there is nothing to compare: only the model that they get is another.
        Target(
            "llamafactory.train.dpo.trainer",
            "CustomDPOTrainer.concatenated_forward",
            ("self, model, batch", "self, model, batch, is_ref_model"),
            _without_copy,
            (),
        ),
        Target(
            "llamafactory.train.kto.trainer",
            "CustomKTOTrainer.forward",
            ("self, model, batch, prefix",),
            _without_copy,
            (),
        ),
    )


_PATCH = Patch("llamafactory", _targets)


def apply(*, inplace_backward: bool = False) -> Callable[[], None]:
    """Makes LLaMA-Factory's trainers use these kernels, in this process.

    A LLaMA-Factory whose functions have other arguments or results is left as it is; a RuntimeWarning says why. A second call
    first undoes the previous one.

    Args:
        inplace_backward: lets the backward pass of `get_batch_logps` write the gradient into the memory of the logits, which
            saves a tensor of their size. Code that reads the logits after `loss.backward()` then finds gradients in them;
            LLaMA-Factory's own trainers read them before.

    Returns:
        A function that puts LLaMA-Factory's functions back.

    Raises:
        ImportError: LLaMA-Factory cannot be imported.
    """
    return _PATCH.apply(inplace_backward=inplace_backward)


applied = _PATCH.applied
