"""Puts these kernels under ms-swift's preference trainers (`swift rlhf`).

```python
from dpo_kernels.integrations import ms_swift

ms_swift.apply()  # once, before training; or: with ms_swift.applied(): ...
```

ms-swift's DPO and KTO trainers (3.12 to 4.6) get log-probabilities and mean logits from the method `get_per_token_logps`. Its
GRPO trainer, and the ORPO and CPO trainers that it takes from TRL, use TRL's `selective_log_softmax` and `entropy_from_logits`.
All three are replaced. With sequence parallelism ms-swift's own method runs, which uses `selective_log_softmax` from 4.6 on.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ..logps import token_logps
from .patch import Patch, Target, small_logits, takes
from .trl import ENTROPY, SELECTIVE

__all__ = ["applied", "apply"]

Function = Callable[..., Any]


def _get_per_token_logps(inplace_backward: bool) -> Callable[[Function], Function]:
    def replacement(theirs: Function) -> Function:
        @functools.wraps(theirs)
        def get_per_token_logps(
            self: Any, logits: Tensor, labels: Tensor, label_pad_token_id: int = -100, reduction: str = "mean"
        ) -> tuple[Tensor, Tensor, Tensor]:
            if self.template.sequence_parallel_size != 1 or not takes(logits):
                return theirs(self, logits, labels, label_pad_token_id, reduction)
            if logits.shape[:-1] != labels.shape:
                raise ValueError(
                    f"Logits (batch and sequence length dim) {list(logits.shape[:-1])} and labels must have the same shape "
                    f"{list(labels.shape)}"
                )
            if reduction not in ("mean", "sum"):
                raise ValueError(f"Invalid reduction: {reduction}")
            logps, found = token_logps(
                logits,
                labels,
                statistics=("mean_logits",),
                ignore_index=label_pad_token_id,
                inplace_backward=inplace_backward,
            )
            logits_of_token = found["mean_logits"] * (logits.shape[-1] if reduction == "sum" else 1)
            return logps, logits_of_token, labels != label_pad_token_id

        return get_per_token_logps

    return replacement


# --- examples: what original and replacement must agree on --------------------------------------------------------


def _per_token(function: Function) -> Any:
    logits, labels = small_logits()
    labels[0, :3] = labels[1, -1] = -100
    logits.requires_grad_()
    trainer = SimpleNamespace(template=SimpleNamespace(sequence_parallel_size=1))
    logps, mean, mask = function(trainer, logits, labels)
    _, total, _ = function(trainer, logits, labels, reduction="sum")
    (logps * torch.arange(5.0)).sum().backward()
    return logps, mean, total, mask, logits.grad


def _targets(inplace_backward: bool = False) -> tuple[Target, ...]:
    per_token = (
        ("self, logits, labels, label_pad_token_id, reduction",),
        _get_per_token_logps(inplace_backward),
        (_per_token,),
    )
    return (
        Target("swift.rlhf_trainers.rlhf_mixin", "RLHFTrainerMixin.get_per_token_logps", *per_token),
        Target("swift.trainers.rlhf_trainer.rlhf_mixin", "RLHFTrainerMixin.get_per_token_logps", *per_token),
        Target("trl.trainer.utils", "selective_log_softmax", *SELECTIVE),
        Target("trl.trainer.utils", "entropy_from_logits", *ENTROPY),
    )


_PATCH = Patch("ms-swift", _targets)


def apply(*, inplace_backward: bool = False) -> Callable[[], None]:
    """Makes ms-swift's trainers use these kernels, in this process.

    A version whose functions have other arguments or results is left as it is; a RuntimeWarning says why. A second call first
    undoes the previous one.

    Log-probabilities and mean logits of DPO and KTO steps are float32 for 16-bit logits, where ms-swift's are in 16 bits. The
    mean logits, which ms-swift only logs, have no gradient.

    Args:
        inplace_backward: lets the backward pass of `get_per_token_logps` write the gradient into the memory of the logits, which
            saves a tensor of their size. Code that reads the logits after `loss.backward()` then finds gradients in them;
            ms-swift's own trainers read them before.

    Returns:
        A function that puts the originals back.

    Raises:
        ImportError: ms-swift cannot be imported.
    """
    return _PATCH.apply(inplace_backward=inplace_backward)


applied = _PATCH.applied
