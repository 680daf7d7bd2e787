"""Patches verl so that its workers compute log-probabilities and entropies with these kernels.

```python
from dpo_kernels.integrations import verl

verl.apply()  # in every worker; docs/migration/verl.md says where
```

The patch replaces the functions for logits in `verl.utils.torch_functional` and, for hidden states (`use_fused_kernels`), the
PyTorch backend `FusedLinearForPPO`. It does not change the Triton and Liger backends of `use_fused_kernels`, nor the functions
for logits that Megatron shards along the vocabulary. Tested with verl 0.4 to 0.9.

Results of 16-bit logits are float32, as from verl's functions with flash-attn or under autocast. A label of -100 gives 0.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from .. import linear, ops
from ..logps import linear_logps, token_logps
from .patch import Patch, Target, entropy_of, small_logits

_LOGITS = "verl.utils.torch_functional"
_HIDDEN = "verl.utils.experimental.torch_functional"


def _logprobs_from_logits(theirs: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def logprobs_from_logits(logits: Tensor, labels: Tensor, inplace_backward: bool = True) -> Tensor:
        if not ops.is_plain(logits):  # sharded or nested
            return theirs(logits, labels, inplace_backward=inplace_backward)
        # verl allows the overwriting by default. With logits [B, T, V] it also computes the entropy from the same logits; then
        # flash-attn overwrites only a copy. With logits [N, V] it forbids the overwriting if it needs the logits again.
        inplace = inplace_backward and logits.dim() == 2 and not logits.is_leaf
        logps = token_logps(logits, labels.reshape(logits.shape[:-1]), inplace_backward=inplace)
        assert isinstance(logps, Tensor)
        return logps

    return logprobs_from_logits


def _entropy_from_logits(theirs: Callable[..., Tensor]) -> Callable[..., Tensor]:
    # verl wraps the function by torch.compile, which has nothing to fuse here.
    @torch.compiler.disable
    def entropy_from_logits(logits: Tensor) -> Tensor:
        return entropy_of(logits) if ops.is_plain(logits) else theirs(logits)

    return entropy_from_logits


def _entropy_with_chunking(theirs: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @torch.compiler.disable
    def entropy_from_logits_with_chunking(logits: Tensor, chunk_size: int = 2048) -> Tensor:
        return entropy_of(logits).float() if ops.is_plain(logits) else theirs(logits, chunk_size)

    return entropy_from_logits_with_chunking


def _fused_forward(theirs: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    hidden, weight, labels = _small_head(torch.bfloat16)
    with _no_flash_attention():
        # Log-probabilities have the dtype of the hidden states in verl up to 0.7, and are float32 since.
        narrow = theirs(_MODULE, hidden, weight, labels)[0].dtype == torch.bfloat16

    def forward(
        self: Any, hidden_states: Tensor, vocab_weights: Tensor, input_ids: Tensor, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        backend = getattr(self, "impl_backend", "torch")
        if backend != "torch" or not (ops.is_plain(hidden_states) and ops.is_plain(vocab_weights)):
            return theirs(self, hidden_states, vocab_weights, input_ids, temperature)
        vocab, hidden_size = vocab_weights.shape
        budget = linear.planner.step_budget(hidden_size, vocab, linear.card_memory(hidden_states.device))
        logps, found = linear_logps(
            hidden_states,
            vocab_weights,
            input_ids.to(torch.int64),
            statistics=("entropy",),
            temperature=float(temperature),
            memory_budget=budget,
            differentiable_entropy=True,
        )
        entropy: Tensor = found["entropy"]  # type: ignore[call-overload]
        return logps.to(hidden_states.dtype if narrow else torch.float32), entropy.to(hidden_states.dtype)

    return forward


#: What the oldest and the newest `FusedLinearForPPO.forward` read of their module.
_MODULE = SimpleNamespace(chunk_size=512, impl_backend="torch")


@contextmanager
def _no_flash_attention() -> Iterator[None]:
    """verl takes its PyTorch branch: flash-attn's cross entropy cannot compute the examples, which are on the CPU."""
    flags = {_LOGITS: "FLAH_ATTN_CROSS_ENTROPY_LOSS_AVAILABLE", _HIDDEN: "_FLASH_ATTN_CROSS_ENTROPY_AVAILABLE"}
    there = [(sys.modules[name], flag) for name, flag in flags.items() if hasattr(sys.modules.get(name), flag)]
    before = [getattr(module, flag) for module, flag in there]
    for module, flag in there:
        setattr(module, flag, False)
    try:
        yield
    finally:
        for (module, flag), value in zip(there, before, strict=True):
            setattr(module, flag, value)


def _small_head(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """(hidden [22, 4], weight [11, 4], labels [22]) of an example."""
    values, labels = small_logits(rows=2, tokens=11)
    return values[..., :4].flatten(0, 1).to(dtype), values[0, :, 4:8].to(dtype), labels.flatten()


def _logprobs_example(shape: tuple[int, ...], inplace_backward: bool) -> Callable[..., list[Tensor]]:
    def example(call: Callable[..., Tensor]) -> list[Tensor]:
        logits, labels = small_logits()
        leaf = logits.view(*shape, -1).requires_grad_()
        with _no_flash_attention():
            logps = call(leaf * 1, labels.view(shape), inplace_backward=inplace_backward)
        logps.cos().sum().backward()
        assert leaf.grad is not None
        return [logps.detach(), leaf.grad]

    return example


def _entropy_example(shape: tuple[int, ...]) -> Callable[..., list[Tensor]]:
    def example(call: Callable[..., Tensor]) -> list[Tensor]:
        leaf = small_logits()[0].view(*shape, -1).requires_grad_()
        entropy = call(leaf)
        entropy.cos().sum().backward()
        assert leaf.grad is not None
        return [entropy.detach(), leaf.grad]

    return example


def _fused_example(call: Callable[..., tuple[Tensor, Tensor]]) -> list[Tensor]:
    hidden, weight, labels = _small_head()
    hidden.requires_grad_()
    weight.requires_grad_()
    with _no_flash_attention():
        logps, entropy = call(_MODULE, hidden, weight, labels, 0.7)
        (logps.cos().sum() + entropy.sin().sum()).backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return [logps.detach(), entropy.detach(), hidden.grad, weight.grad]


_PATCH = Patch(
    "verl",
    lambda: [
        Target(
            _LOGITS,
            "logprobs_from_logits",
            ("logits, labels, inplace_backward",),
            _logprobs_from_logits,
            (_logprobs_example((2, 5), True), _logprobs_example((10,), True), _logprobs_example((10,), False)),
        ),
        Target(
            _LOGITS,
            "entropy_from_logits",
            ("logits",),
            _entropy_from_logits,
            (_entropy_example((2, 5)), _entropy_example((10,))),
        ),
        Target(
            _LOGITS,
            "entropy_from_logits_with_chunking",
            ("logits, chunk_size",),
            _entropy_with_chunking,
            (_entropy_example((10,)),),
        ),
        Target(
            _HIDDEN,
            "FusedLinearForPPO.forward",
            ("self, hidden_states, vocab_weights, input_ids, temperature",),
            _fused_forward,
            (_fused_example,),
        ),
    ],
)


def apply() -> Callable[[], None]:
    """Replaces verl's functions in this process, also in modules that have already imported them.

    Call it before the workers build their engines: an engine keeps the entropy function that it finds when it is built. A version
    whose functions have other arguments or results is left as it is, with one RuntimeWarning.

    Returns:
        A function that puts the originals back.

    Raises:
        ImportError: verl cannot be imported.
    """
    return _PATCH.apply()


applied = _PATCH.applied
