"""The reference's log-probabilities: of a frozen model, of the policy without its adapter, or computed beforehand."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dpo_kernels import linear_dpo_loss, sequence_logps

from ..errors import ModelError
from .split import Batch, SplitModel, evaluating


class _Reference:
    """What all references share.

    Attributes:
        split: the model that answers.
        kind: the reference in words.
        copied: whether it began as the policy did, in a copy.
    """

    split: SplitModel
    kind: str
    copied = False

    def whole_model(self) -> contextlib.AbstractContextManager[Any]:
        """A context in which the reference can be called as one model, which it gives."""
        return contextlib.nullcontext(self.split.model)

    @torch.no_grad()
    def packed_logits(self, batch: Batch) -> Tensor:
        """Reference logits `[N, V]` of the batch's scored tokens, without gradient."""
        with self.whole_model():
            return self.split.packed_logits(batch)

    @torch.no_grad()
    def packed_hidden(self, batch: Batch) -> Tensor:
        """Hidden states `[N, H]` of the batch's scored tokens, without gradient."""
        with self.whole_model():
            return self.split.packed_hidden(batch)


class FrozenReference(_Reference):
    """A second model that never changes; the exact KL can be computed against its logits.

    Args:
        model: the reference. It is put into evaluation mode and needs no gradient from here on.
    """

    kind = "a frozen model"

    def __init__(self, model: nn.Module) -> None:
        self.split = SplitModel(model.eval().requires_grad_(False))

    @classmethod
    def copy_of(
        cls, model: nn.Module, change: Callable[[nn.Module], nn.Module] | None = None, *, shared: bool = True
    ) -> FrozenReference:
        """The model as it is now: the usual reference of DPO. Or what `change` makes of its copy.

        Args:
            shared: whether weights that do not train are the model's own, so that they stand in memory once.
        """
        frozen = [value for value in model.parameters() if not value.requires_grad] if shared else []
        try:
            copied = copy.deepcopy(model, {id(value): value for value in frozen})
        except RuntimeError as error:
            if "deepcopy" not in str(error):
                raise
            # Such as LoRA's with ensure_weight_tying, whose head holds a view of the embeddings' factors.
            raise ModelError(
                "reference: the model holds tensors that torch cannot copy; set precompute_ref_log_probs or give a ref_model"
            ) from error
        reference = cls(copied if change is None else change(copied))
        reference.copied = True
        return reference


class AdapterOffReference(_Reference):
    """The policy with its peft adapter switched off: no second copy of the weights.

    Args:
        policy: the split of a peft model.
    """

    kind = "the model without its adapter"

    def __init__(self, policy: SplitModel) -> None:
        self.split = policy

    @contextlib.contextmanager
    def whole_model(self) -> Any:
        """A context in which the adapter is off."""
        model: Any = self.split.model
        with evaluating(model), model.disable_adapter():
            yield model


#: None where no reference is in memory.
Reference = FrozenReference | AdapterOffReference | None


def reference_logps(
    source: SplitModel | _Reference,
    dataset: Any,
    collate: Callable[[list[dict[str, Any]]], Batch],
    *,
    batch_size: int,
    device: torch.device,
    context: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    advance: Callable[[int], None] = lambda _: None,
) -> tuple[list[float], list[float]]:
    """Summed log-probabilities of all chosen and all rejected completions, in the dataset's order.

    `advance` is told the number of pairs of each batch once it is done.

    Rows are visited sorted by length, so that batches carry little padding; a row's result does not depend on its
    neighbours beyond the rounding of matrix products. Logits exist a chunk at a time where the head allows it.
    """
    found = torch.empty(2, len(dataset), dtype=torch.float64)
    for indices in torch.tensor(list(dataset["length"])).argsort(stable=True).split(batch_size):
        rows = [dataset[index] for index in indices.tolist()]
        batch = {name: value.to(device) for name, value in collate(rows).items()}
        with torch.no_grad(), context():
            found[:, indices] = _sums(source, batch).view(2, -1).cpu().double()
        advance(len(rows))
    chosen, rejected = found.tolist()
    return chosen, rejected


def _sums(source: SplitModel | _Reference, batch: Batch) -> Tensor:
    """Log-probabilities [2P] of a batch's completions."""
    split = source if isinstance(source, SplitModel) else source.split
    options: dict[str, Any] = {"cu_seqlens": batch["cu_seqlens"], **split.after_head}
    if split.obstacle_to_linear:
        return sequence_logps(source.packed_logits(batch), batch["labels"], **options)

    def sums(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # Any objective without a reference: the sums, made as training makes the policy's, are what is wanted.
        output = linear_dpo_loss(hidden, weight, batch["labels"], bias=bias, loss_type="cpo", **options)
        return torch.cat([output.chosen_logps, output.rejected_logps])

    return split.through_head(sums, source.packed_hidden(batch))
