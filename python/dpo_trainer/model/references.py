"""The reference: a frozen model or the policy without its adapter, and the precomputation of its log-probabilities."""

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
    """Base class of all references.

    Attributes:
        split: the model that computes the reference's logits.
        kind: the reference in words.
        copied: whether the reference is a copy that computes the same as the policy before the first update.
    """

    split: SplitModel
    kind: str
    copied = False

    def whole_model(self) -> contextlib.AbstractContextManager[Any]:
        """A context that yields the reference as one callable model."""
        return contextlib.nullcontext(self.split.model)

    @torch.no_grad()
    def packed_logits(self, batch: Batch) -> Tensor:
        """Logits `[N, V]` of the batch's scored tokens, without gradient."""
        with self.whole_model():
            return self.split.packed_logits(batch)

    @torch.no_grad()
    def packed_hidden(self, batch: Batch) -> Tensor:
        """Hidden states `[N, H]` of the batch's scored tokens, without gradient."""
        with self.whole_model():
            return self.split.packed_hidden(batch)


class FrozenReference(_Reference):
    """A second model that training does not change.

    Args:
        model: the reference. It is set to evaluation mode, and its parameters require no gradient.
    """

    kind = "a frozen model"

    def __init__(self, model: nn.Module) -> None:
        self.split = SplitModel(model.eval().requires_grad_(False))

    @classmethod
    def copy_of(
        cls, model: nn.Module, change: Callable[[nn.Module], nn.Module] | None = None, *, shared: bool = True
    ) -> FrozenReference:
        """A frozen copy of the model as it is now, the usual reference of DPO.

        Args:
            model: the model to copy.
            change: gets the copy and returns the reference. None: the copy is the reference.
            shared: whether the copy shares the weights that are not trained, which saves memory.

        Raises:
            ModelError: torch cannot copy the model.
        """
        frozen = [value for value in model.parameters() if not value.requires_grad] if shared else []
        try:
            copied = copy.deepcopy(model, {id(value): value for value in frozen})
        except RuntimeError as error:
            if "deepcopy" not in str(error):
                raise
            # For example LoRA with ensure_weight_tying, whose head holds a view of the embeddings' factors.
            raise ModelError(
                "reference: the model holds tensors that torch cannot copy; set precompute_ref_log_probs or give a ref_model"
            ) from error
        reference = cls(copied if change is None else change(copied))
        reference.copied = True
        return reference


class AdapterOffReference(_Reference):
    """The policy with its peft adapter switched off, without a second copy of the weights.

    Args:
        policy: the policy, a peft model.
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


#: None if no reference is in memory.
Reference = FrozenReference | AdapterOffReference | None


def reference_logps(
    source: SplitModel | _Reference,
    dataset: Any,
    collate: Callable[[list[dict[str, Any]]], Batch],
    *,
    batch_size: int,
    device: torch.device,
    context: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
) -> tuple[list[float], list[float]]:
    """Compute the summed log-probabilities of all completions of a dataset.

    Rows are sorted by length, so that batches need little padding. The other rows of a batch affect a row's result only by
    the rounding of matrix products. Logits are computed one chunk at a time if the head allows it.

    Args:
        source: the reference, or a model.
        dataset: a tokenised dataset with the column `length`.
        collate: makes a batch of rows.
        batch_size: pairs per batch.
        device: the model's device.
        context: returns the context in which the model is run.

    Returns:
        the sums of all chosen and of all rejected completions, in nats, in the dataset's order.
    """
    found = torch.empty(2, len(dataset), dtype=torch.float64)
    for indices in torch.tensor(list(dataset["length"])).argsort(stable=True).split(batch_size):
        rows = [dataset[index] for index in indices.tolist()]
        batch = {name: value.to(device) for name, value in collate(rows).items()}
        with torch.no_grad(), context():
            found[:, indices] = _sums(source, batch).view(2, -1).cpu().double()
    chosen, rejected = found.tolist()
    return chosen, rejected


def _sums(source: SplitModel | _Reference, batch: Batch) -> Tensor:
    """Log-probabilities [2P] of a batch's completions."""
    split = source if isinstance(source, SplitModel) else source.split
    options: dict[str, Any] = {"cu_seqlens": batch["cu_seqlens"], **split.after_head}
    if split.obstacle_to_linear:
        return sequence_logps(source.packed_logits(batch), batch["labels"], **options)

    def sums(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # CPO needs no reference. Its loss is not used, only the log-probabilities, computed as in training.
        output = linear_dpo_loss(hidden, weight, batch["labels"], bias=bias, loss_type="cpo", **options)
        return torch.cat([output.chosen_logps, output.rejected_logps])

    return split.through_head(sums, source.packed_hidden(batch))
