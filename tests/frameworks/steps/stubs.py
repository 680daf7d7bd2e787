"""Stand-ins for packages that some frameworks import, but that need a GPU or many other packages."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor


def stub(name: str, module: Any = None, **contents: Any) -> None:
    """Makes `name` importable: a module with these contents and no others, or the given object."""
    module = ModuleType(name) if module is None else module
    module.__spec__, module.__path__ = ModuleSpec(name, None, is_package=True), []
    vars(module).update(contents)
    sys.modules[name] = module


def _unpad_input(hidden: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor, Tensor, int, None]:
    """flash-attn's function of that name: rows of real tokens, their flat positions, the bounds of the sequences."""
    indices = attention_mask.flatten().nonzero().flatten()
    bounds = torch.nn.functional.pad(attention_mask.sum(-1).cumsum(0), (1, 0))
    return hidden.flatten(0, 1)[indices], indices, bounds, int(attention_mask.sum(-1).max()), None


def _pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """flash-attn's function of that name: the inverse of `_unpad_input`, with zeros at padding."""
    full = hidden_states.new_zeros(batch * seqlen, *hidden_states.shape[1:])
    return full.index_put((indices,), hidden_states).unflatten(0, (batch, seqlen))


def flash_attn() -> None:
    """A flash-attn whose functions for padding work on a CPU. It has no attention and no cross entropy."""
    stub("flash_attn")
    stub(
        "flash_attn.bert_padding",
        index_first_axis=lambda rows, indices: rows[indices],
        pad_input=_pad_input,
        rearrange=lambda rows, pattern: rows.flatten(0, 1),
        unpad_input=_unpad_input,
    )
    stub("flash_attn.utils")
    stub("flash_attn.utils.distributed", all_gather=None)
