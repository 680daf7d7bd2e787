"""Puts our log-probabilities under torchtune's DPO, PPO and GRPO recipes.

```python
import dpo_kernels.integrations.torchtune

dpo_kernels.integrations.torchtune.apply()  # before the recipe trains
```

torchtune's recipes compute all logits, and get log-probabilities from the functions of `torchtune.rlhf`, which copy the logits
several times. Ours make no copy in the forward pass and one, the gradient, in the backward pass. They do not read prompts and
padding. The results are torchtune's, with two differences:

  - `get_batch_log_probs` returns float32 for 16-bit logits. torchtune rounds the sums to 16 bits.
  - A sequence without a label has the mean 0; torchtune 0.5 and older return NaN.

Also exchanged: `logits_to_logprobs` (PPO), and `batched_logits_to_logprobs` (GRPO) where torchtune has it. Recipes, models,
losses and saved files do not change. Tested with torchtune 0.4.0 to 0.6.1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..logps import selective_log_softmax, sequence_logps, shift_labels
from .patch import Example, Patch, Target, small_logits, takes

_MODULE = "torchtune.rlhf.sequence_processing"


def _batch_log_probs(theirs: Callable[..., Tensor], inplace_backward: bool) -> Callable[..., Tensor]:
    def get_batch_log_probs(
        logits: Tensor, labels: Tensor, label_pad_token_id: int = -100, return_average_logprobs: bool = False
    ) -> Tensor:
        """Log-probabilities [b] in nats of the labels [b, s], which logits [b, s, v] predict one position earlier."""
        if not takes(logits):
            return theirs(logits, labels, label_pad_token_id, return_average_logprobs)
        scored = labels != label_pad_token_id
        # Labels are shifted instead of logits: the gradient of a slice of the logits would be copied into one of all.
        sums = sequence_logps(
            logits,
            shift_labels(labels, scored, label_pad_token_id),
            ignore_index=label_pad_token_id,
            # full_dpo_distributed passes both halves of one tensor; autograd refuses the second if the first was overwritten.
            inplace_backward=inplace_backward and not logits._is_view(),
        )
        return sums / scored[:, 1:].sum(-1).clamp(min=1) if return_average_logprobs else sums

    return get_batch_log_probs


def _token_log_probs(theirs: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def logits_to_logprobs(logits: Tensor, sequences: Tensor, temperature: float = 1.0) -> Tensor:
        """Log-probabilities [b, s] in nats of the tokens [b, s] for logits [b, s, v], in the dtype of the logits."""
        if not takes(logits) or sequences.shape != logits.shape[:-1]:  # torch.gather accepts fewer tokens than logits
            return theirs(logits, sequences, temperature)
        return selective_log_softmax(logits, sequences, temperature)

    return logits_to_logprobs


def _batched(theirs: Callable[..., Tensor]) -> Callable[..., Tensor]:
    exchanged = _token_log_probs(theirs)

    def batched_logits_to_logprobs(
        logits: Tensor, sequences: Tensor, temperature: float = 1.0, chunk_size: int = 4
    ) -> Tensor:
        """`logits_to_logprobs` in float32; chunk_size has no effect."""
        return exchanged(logits, sequences, temperature).float()

    return batched_logits_to_logprobs


def _example(*, gradient: bool = True, masked: bool = False, **options: Any) -> Example:
    """A call with small logits: its results and the gradient of their weighted sum."""

    def example(function: Callable[..., Tensor]) -> Any:
        logits, labels = small_logits(rows=3)
        if masked:
            ignored = options.get("label_pad_token_id", -100)
            labels[labels == ignored] = 1
            labels[:, :2] = ignored
            labels[1, -1] = ignored
        with torch.enable_grad():
            leaf = logits.requires_grad_()
            # The function gets a tensor that is not a leaf: a gradient may be written into its memory.
            found = function(leaf * 1.0, labels, **options)
            weights = torch.arange(1.0, found.numel() + 1).view(found.shape)
            return found.detach(), torch.autograd.grad((found * weights).sum(), leaf)

    return example


def _targets(inplace_backward: bool = False) -> tuple[Target, ...]:
    return (
        Target(
            _MODULE,
            "get_batch_log_probs",
            ("logits, labels, label_pad_token_id, return_average_logprobs",),
            lambda theirs: _batch_log_probs(theirs, inplace_backward),
            (
                _example(masked=True),
                _example(masked=True, label_pad_token_id=3, return_average_logprobs=True),
            ),
        ),
        Target(
            _MODULE,
            "logits_to_logprobs",
            ("logits, sequences, temperature",),
            _token_log_probs,
            (_example(), _example(temperature=0.7)),
        ),
        Target(
            _MODULE,
            "batched_logits_to_logprobs",
            ("logits, sequences, temperature, chunk_size",),
            _batched,
            (_example(), _example(temperature=0.7, chunk_size=1)),
        ),
    )


_PATCH = Patch("torchtune", _targets)


def apply(*, inplace_backward: bool = False) -> Callable[[], None]:
    """Exchanges torchtune's functions for log-probabilities from logits, in this process.

    A torchtune whose functions have other arguments or results is left as it is; a RuntimeWarning says why. A second call first
    undoes the previous one.

    Args:
        inplace_backward: lets the backward pass of `get_batch_log_probs` write the gradient into the memory of the logits, which
            saves a tensor of their size. Code that reads the logits after `loss.backward()` then finds gradients in them.
            torchtune's own recipes read them before. A view of other logits, as in full_dpo_distributed, is never written to.

    Returns:
        A function that puts torchtune's functions back.

    Raises:
        ImportError: torchtune cannot be imported.
    """
    return _PATCH.apply(inplace_backward=inplace_backward)


applied = _PATCH.applied
