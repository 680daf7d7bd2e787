"""The operator table: the inputs on which every backend must equal the float64 reference.

Sizes are chosen around the kernels' boundaries: vocabularies below, at and just past one vector, one tile and one 2,048-logit
block; odd vocabularies, whose rows start unaligned; single-token and empty sequences. They are small because the Triton
interpreter runs them too. tests/test_large.py tests real vocabularies.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dpo_kernels import DPOOutput, dpo_loss


@dataclass(frozen=True)
class Case:
    """One row of the table. `options` are keyword arguments of `dpo_loss`."""

    name: str
    vocab: int = 260
    pairs: int = 2
    length: int = 5
    dtype: torch.dtype = torch.float32
    packed: bool = False
    strided: bool = False
    reference: str | None = "logits"
    spread: float = 3.0
    weighted: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name


def loss_of(logits: Tensor, labels: Tensor, **keywords: Any) -> DPOOutput:
    """`dpo_loss`, with reference sums of 0 unless the test gives a reference."""
    if "ref_logits" not in keywords and "ref_logps" not in keywords:
        cu_seqlens = keywords.get("cu_seqlens")
        sequences = len(labels) if cu_seqlens is None else len(cu_seqlens) - 1
        keywords["ref_logps"] = torch.zeros(sequences, device=logits.device)
    return dpo_loss(logits, labels, **keywords)


@dataclass
class Inputs:
    """A case's tensors, ready for `dpo_loss`."""

    logits: Tensor
    labels: Tensor
    keywords: dict[str, Any]


def make_inputs(case: Case, device: torch.device | str = "cpu", seed: int = 0) -> Inputs:
    """Random inputs of a case, with ignored prompts and padding, and one empty sequence if the batch is large enough."""
    g = torch.Generator().manual_seed(seed)
    sequences, length = 2 * case.pairs, case.length
    lengths = torch.randint(1, length + 1, (sequences,), generator=g)
    lengths[0] = length
    if sequences > 4:
        lengths[3] = 0
    prompt = torch.randint(0, 2, (sequences,), generator=g).clamp(max=1)
    position = torch.arange(length)
    scored = (position >= prompt[:, None]) & (position < lengths[:, None])
    shape = (sequences, length)
    labels = torch.where(scored, torch.randint(0, case.vocab, shape, generator=g), -100)
    labels[0, -1] = case.vocab - 1

    def random_logits() -> Tensor:
        width = length + 1 if case.strided else length
        x = torch.randn(sequences, width, case.vocab, generator=g, dtype=torch.float64) * case.spread
        return x.to(case.dtype)

    logits, ref_logits = random_logits(), random_logits()
    weights = torch.rand(shape, generator=g) + 0.5
    keywords: dict[str, Any] = dict(case.options)
    if case.packed:
        keep = position < lengths[:, None]
        logits, ref_logits, labels, weights = (
            logits[:, :length][keep],
            ref_logits[:, :length][keep],
            labels[keep],
            weights[keep],
        )
        keywords["cu_seqlens"] = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).to(device)
    logits, ref_logits = logits.to(device), ref_logits.to(device)
    if case.strided:
        logits, ref_logits = logits[:, :-1], ref_logits[:, :-1]
    if case.weighted:
        keywords["token_weights"] = weights.to(device)
        keywords["pair_weights"] = (torch.rand(case.pairs, generator=g) + 0.5).to(device)
        keywords["beta"] = (torch.rand(case.pairs, generator=g) * 0.3 + 0.05).to(device)
        keywords["label_smoothing"] = (torch.rand(case.pairs, generator=g) * 0.3).to(device)
    if case.reference == "logits":
        keywords["ref_logits"] = ref_logits
    elif case.reference == "logps":
        keywords["ref_logps"] = torch.randn(sequences, generator=g).mul(5).sub(20).to(device)
    return Inputs(logits, labels.to(device), keywords)


_F32, _BF16, _F16, _F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64

CASES = [
    Case("float32"),
    Case("bfloat16", dtype=_BF16),
    Case("float16", dtype=_F16),
    Case("float64", dtype=_F64),
    Case("one_token_vocab", vocab=1),
    Case("vocab_below_a_vector", vocab=7),
    Case("odd_vocab", vocab=1021, pairs=1, length=3),
    Case("odd_vocab_bfloat16", vocab=1021, pairs=1, length=3, dtype=_BF16),
    Case("past_one_block", vocab=2049, pairs=1, length=2),
    Case("past_one_block_bfloat16", vocab=2057, pairs=1, length=2, dtype=_BF16),
    Case("two_blocks_exactly", vocab=4096, pairs=1, length=2),
    Case("with_an_empty_sequence", pairs=3),
    Case("packed", packed=True, pairs=3),
    Case("packed_bfloat16", packed=True, pairs=3, dtype=_BF16),
    Case("strided_view", strided=True),
    Case("strided_view_odd", strided=True, vocab=131, dtype=_BF16),
    Case("ref_logps", reference="logps"),
    Case("reference_free", reference=None, options={"loss_type": "cpo"}),
    Case("weights_everywhere", weighted=True),
    Case("weights_everywhere_packed", weighted=True, packed=True, pairs=3),
    Case("scale_and_softcap", options={"logit_scale": 0.7, "logit_softcap": 5.0}),
    Case("softcap_bfloat16", dtype=_BF16, options={"logit_softcap": 30.0}, spread=15.0),
    Case("confident", spread=12.0),
    Case("label_smoothing", options={"label_smoothing": 0.2}),
    Case("robust", options={"loss_type": "robust", "label_smoothing": 0.2}),
    Case("hinge", options={"loss_type": "hinge"}),
    Case("ipo", options={"loss_type": "ipo"}),
    Case("two_objectives", options={"loss_type": ["sigmoid", "ipo"], "loss_weights": [1.0, 0.3]}),
    Case("sum_reduction", options={"reduction": "sum"}),
]
