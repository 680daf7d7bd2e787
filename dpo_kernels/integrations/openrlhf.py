"""Patches OpenRLHF so that its models compute log-probabilities and entropies with these kernels.

```python
from dpo_kernels.integrations import openrlhf

openrlhf.apply()  # in the process that trains, before training
```

OpenRLHF's models give a log-probability for every token of a batch, from float32 logits. The DPO trainer then multiplies those of
prompts and padding by 0. With the patch it announces which tokens count before it calls the model, so the logits of the other
tokens are not read, and the gradient is written over the logits. Tested with OpenRLHF 0.8 to 0.11.

Two things differ from the original functions. A label of -100 gives 0 instead of an error. A temperature does not divide the
logits in place; no code of OpenRLHF reads them afterwards.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ..logps import token_logps
from .patch import Patch, Target, entropy_of, small_logits, takes

#: The tokens of the DPO trainer's forward pass that is running: (attention mask, mask of the completions), [2P, T] bool each.
_batch: ContextVar[tuple[Tensor, Tensor] | None] = ContextVar("_batch", default=None)


def _scored(labels: Tensor) -> tuple[Tensor, bool]:
    """The labels with -100 at tokens that the running DPO step multiplies by 0, and whether such a step runs.

    OpenRLHF's labels are its input ids, rolled to the left by one. The mask, rolled like them, fits to those of a padded batch;
    a packed batch has no padding.
    """
    batch = _batch.get()
    if batch is None:
        return labels, False
    attention, completion = batch
    mask = completion.roll(-1, dims=1)
    if labels.shape[0] == 1 and labels.shape != mask.shape:
        mask = mask[attention].unsqueeze(0)
    if labels.shape != mask.shape:
        return labels, False  # with ring attention a process has a part of the row; all of its tokens are scored
    return torch.where(mask, labels, -100), True


def _log_probs_from_logits(theirs: Callable[..., Tensor]) -> Callable[..., Tensor]:
    # The mask is not part of a graph that DeepSpeed compiles.
    @torch.compiler.disable
    def log_probs_from_logits(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
        if not takes(logits):
            return theirs(logits, labels, temperature=temperature)
        labels, dpo = _scored(labels)
        # The DPO trainer does not use the logits after this.
        logps = token_logps(logits, labels, temperature=temperature, inplace_backward=dpo)
        assert isinstance(logps, Tensor)
        return logps.to(logits.dtype)

    return log_probs_from_logits


def _compute_entropy(theirs: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @torch.compiler.disable
    def compute_entropy(logits: Tensor) -> Tensor:
        return entropy_of(logits).to(logits.dtype) if takes(logits) else theirs(logits)

    return compute_entropy


def _concatenated_forward(theirs: Callable[..., Any]) -> Callable[..., Any]:
    def concatenated_forward(
        self: Any,
        model: Any,
        chosen_ids: Tensor,
        c_mask: Tensor,
        reject_ids: Tensor,
        r_mask: Tensor,
        prompt_id_lens: Any,
    ) -> Any:
        _, attention, lengths = self.concatenated_inputs(chosen_ids, c_mask, reject_ids, r_mask, prompt_id_lens)
        attention = attention.bool()
        completion = attention.clone()
        for row, length in zip(completion, lengths, strict=False):  # as in _get_batch_logps
            row[:length] = False
        previous = _batch.set((attention, completion))
        try:
            return theirs(self, model, chosen_ids, c_mask, reject_ids, r_mask, prompt_id_lens)
        finally:
            _batch.reset(previous)

    return concatenated_forward


@contextmanager
def _no_flash_attention() -> Iterator[None]:
    """OpenRLHF takes its PyTorch branch: flash-attn's cross entropy cannot compute the examples, which are on the CPU."""
    name = "flash_attn.ops.triton.cross_entropy"
    before = {name: sys.modules[name]} if name in sys.modules else {}
    sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[name]
        sys.modules.update(before)


def _log_probs_example(temperature: float, dtype: torch.dtype) -> Callable[..., list[Tensor]]:
    def example(call: Callable[..., Tensor]) -> list[Tensor]:
        logits, labels = small_logits()
        leaf = logits.to(dtype).requires_grad_()
        with _no_flash_attention():
            logps = call(leaf * 1, labels, temperature=temperature)
        logps.float().cos().sum().backward()
        assert leaf.grad is not None
        # Rounding errors of 16-bit results exceed the tolerance; their dtypes are compared.
        return [logps.detach(), leaf.grad] if dtype == torch.float32 else [torch.zeros_like(logps.detach())]

    return example


def _entropy_example(call: Callable[..., Tensor]) -> list[Tensor]:
    leaf = small_logits()[0].requires_grad_()
    # The original is wrapped by torch.compile; here its eager code is enough.
    entropy = getattr(call, "_torchdynamo_orig_callable", call)(leaf)
    entropy.cos().sum().backward()
    assert leaf.grad is not None
    return [entropy.detach(), leaf.grad]


def _dpo_example(call: Callable[..., Any]) -> list[Tensor]:
    """The trainer's sums and mean with a model that gives 0 for unscored tokens, like `log_probs_from_logits` above."""
    trainer = sys.modules["openrlhf.trainer.dpo_trainer"].DPOTrainer.__new__(
        sys.modules["openrlhf.trainer.dpo_trainer"].DPOTrainer
    )
    trainer.strategy = SimpleNamespace(ring_attn_group=None)
    trainer.tokenizer = SimpleNamespace(pad_token_id=0)
    ids = torch.arange(1, 25).view(2, 2, 6)
    lengths = torch.tensor([[6, 4], [5, 6]])
    masks = (torch.arange(6) < lengths.unsqueeze(-1)).long()

    def model(ids: Tensor, **_: Any) -> tuple[Tensor, dict[str, Any]]:
        labels, _known = _scored(ids.roll(-1, dims=1))
        return torch.where(labels == -100, 0.0, -(ids % 7 + 1.0))[:, :-1], {}

    chosen, rejected, _, nll = call(trainer, model, ids[0], masks[0], ids[1][:, :5], masks[1][:, :5], [3, 2])
    return [chosen, rejected, nll]


_PATCH = Patch(
    "openrlhf",
    lambda: [
        Target(
            "openrlhf.models.utils",
            "log_probs_from_logits",
            ("logits, labels, temperature",),
            _log_probs_from_logits,
            tuple(_log_probs_example(t, dtype) for t in (1.0, 0.7) for dtype in (torch.float32, torch.bfloat16)),
        ),
        Target("openrlhf.models.utils", "compute_entropy", ("logits",), _compute_entropy, (_entropy_example,)),
        Target(
            "openrlhf.trainer.dpo_trainer",
            "DPOTrainer.concatenated_forward",
            ("self, model, chosen_ids, c_mask, reject_ids, r_mask, prompt_id_lens",),
            _concatenated_forward,
            (_dpo_example,),
        ),
    ],
)


def apply() -> Callable[[], None]:
    """Replaces OpenRLHF's functions in this process, also in modules that have already imported them.

    A version whose functions have other arguments or results is left as it is, with one RuntimeWarning.

    Returns:
        A function that puts the originals back.

    Raises:
        ImportError: OpenRLHF cannot be imported.
    """
    return _PATCH.apply()


applied = _PATCH.applied
