"""Checks whether a model can be trained on pairs: it must give logits for every token, and no token may see a later one."""

from __future__ import annotations

import logging
import re
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.auto import modeling_auto

from ..errors import ModelError, UsageError, first_line
from .adapter_kinds import active_configs, moved
from .split import Batch, SplitModel, evaluating, unwrap_adapter

logger = logging.getLogger("dpo_trainer")

_CAUSAL = ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES")
#: transformers' tables of model classes and the kind of model that each lists, in the order in which they are searched.
_OTHERS = {
    "MODEL_FOR_MASKED_LM_MAPPING_NAMES": "a masked language model",
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES": "a classifier of sequences",
    "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES": "a classifier of tokens",
    "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES": "a model that marks answers in a text",
    "MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES": "a classifier of choices",
    "MODEL_FOR_CTC_MAPPING_NAMES": "a speech model",
    "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES": "a speech model",
    "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES": "a speech model",
    "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES": "a classifier of images",
    "MODEL_MAPPING_NAMES": "a backbone without a head for tokens",
}
_WANTED = "a causal language model is needed, as AutoModelForCausalLM.from_pretrained returns"


def check_class(model: Any, name: str = "model") -> None:
    """Raise ModelError if transformers lists the model's class as another kind than a causal language model."""
    found = type(unwrap_adapter(model)).__name__
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ModelError(f"{name}: {found} is an encoder-decoder; only causal language models are supported")
    if any(found in _classes(table) for table in _CAUSAL):
        return
    for table, what in _OTHERS.items():
        if found in _classes(table):
            raise ModelError(f"{name}: {found} is {what}; {_WANTED}")


def _classes(table: str) -> set[str]:
    names = getattr(modeling_auto, table, {}).values()
    return {name for entry in names for name in ([entry] if isinstance(entry, str) else entry)}


@torch.no_grad()
def check_answers(split: SplitModel, batch: Batch, name: str = "model") -> None:
    """Check that the model gives logits for every token and does not look ahead.

    Runs the whole model on a small padded batch twice. The second time, the last token of the first row is a different one
    and masked as padding. Logits before it must not change: a model that looks ahead sees the answer that it has to predict,
    or the answer's length. If the logits of the other rows change, a warning says so.

    Args:
        split: the model.
        batch: a small padded batch.
        name: the model's name in messages.

    Raises:
        ModelError: the model cannot be run on tokens, does not give logits for every token, or looks ahead.
    """
    kind = type(unwrap_adapter(split.model)).__name__
    length = int(batch["attention_mask"][0].sum())
    changed = batch["input_ids"].clone()
    changed[0, length - 1] = (changed[0, length - 1] + 1) % max(int(changed.max()), 2)
    mask = batch["attention_mask"].clone()
    mask[0, length - 1] = 0
    without: Batch = {**batch, "input_ids": changed, "attention_mask": mask}
    try:
        with evaluating(split.model), moved(split.model):
            whole, other = (split.whole_logits(asked) for asked in (batch, without))
    except UsageError:
        raise
    except Exception as error:  # a model may raise anything
        raise ModelError(
            f"{name}: {kind} cannot be run on a batch of tokens ({type(error).__name__}: {first_line(error)})"
        ) from error
    greatest = int(max(batch["labels"].max(), batch["input_ids"].max())) if batch["labels"].numel() else 0
    if whole is None or whole.dim() != 3 or whole.shape[:2] != changed.shape or whole.shape[2] <= greatest:
        shape = "no logits" if whole is None else f"logits of shape {tuple(whole.shape)}"
        raise ModelError(
            f"{name}: {kind} gives {shape} for tokens {tuple(changed.shape)}, not one score per token; {_WANTED}"
        )
    trained = any(value.requires_grad for value in split.model.parameters())
    if trained and not _head_returns_gradient(split.head):
        raise ModelError(
            f"{name}: {kind}'s head {type(split.head).__name__} has no gradient; use a quantisation that can be trained "
            "(bitsandbytes), or leave the head out of the quantisation"
        )
    limit = _limit(split.model, whole)
    if _differ(whole[0, : length - 1], other[0, : length - 1], limit):
        adapters = " and ".join(config.peft_type.value for config in active_configs(split.model))
        if adapters and not _looks_ahead_without(split, batch, without, length, limit):
            raise ModelError(
                f"{name}: its adapter {adapters} looks ahead: a later token changes the logits before it; use another kind"
            )
        raise ModelError(
            f"{name}: {kind} looks ahead: a later token changes the logits before it, so it sees the tokens that it has to "
            f"predict; {_WANTED} (for BERT-like models, with is_decoder=True)"
        )
    real = batch["attention_mask"][1:].bool()
    if _differ(whole[1:][real], other[1:][real], limit):
        logger.warning(
            "%s: the logits of a row depend on the other rows of its batch, so log-probabilities change with the batch",
            kind,
        )


def _looks_ahead_without(split: SplitModel, batch: Batch, without: Batch, length: int, limit: float) -> bool:
    """Whether the model looks ahead with its adapter off."""
    model: Any = split.model
    with evaluating(model), model.disable_adapter():
        whole, other = (split.whole_logits(asked) for asked in (batch, without))
    return _differ(whole[0, : length - 1], other[0, : length - 1], limit)


def _head_returns_gradient(head: Any) -> bool:
    """Whether the head passes a gradient back. A plain `nn.Linear` is not tested."""
    if not hasattr(head, "in_features") or type(head).forward is nn.Linear.forward:
        return True
    weight = next(iter([*head.parameters(), *head.buffers()]), torch.empty(0))
    with torch.enable_grad():
        hidden = torch.ones(1, head.in_features, device=weight.device, requires_grad=True)
        try:
            torch.autograd.grad(head(hidden).sum(), hidden)
        except RuntimeError as error:
            return "dtype" in str(error)  # the head expects another dtype; it has already run on real hidden states
    return True


def _limit(model: nn.Module, logits: Tensor) -> float:
    """How far equal logits may differ, relative to their norm. Quantisation by batch makes them differ a little."""
    quantised = any(re.search("quant|bitsandbytes", type(part).__module__) for part in model.modules())
    exact = torch.finfo(logits.dtype).bits >= 32 and torch.get_float32_matmul_precision() == "highest"
    return 1e-4 if exact and not quantised else 0.05


def _differ(one: Tensor, other: Tensor, limit: float) -> bool:
    one, other = one.double(), other.double()
    return bool(((one - other).norm(dim=-1) > limit * one.norm(dim=-1)).any())
