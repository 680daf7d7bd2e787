"""What the scripts of the frameworks train: a Llama with random weights, a reference that differs, a tokenizer and pairs.

Works with every transformers from 4.46 on.
"""

from __future__ import annotations

import random
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from .compare import Size

PAD, END = "<pad>", "<end>"


def tokenizer_of(size: Size) -> PreTrainedTokenizerFast:
    """A tokenizer whose words are "w2", "w3" and so on; token 0 pads and token 1 ends a text."""
    vocab = {PAD: 0, END: 1} | {f"w{index}": index for index in range(2, size.vocab)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, bos_token=END, unk_token=PAD, model_max_length=2048
    )


def model_of(size: Size, seed: int = 0) -> LlamaForCausalLM:
    """A float32 Llama with random weights; another seed gives another model of the same shape."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=size.vocab,
        hidden_size=size.hidden,
        intermediate_size=2 * size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
        tie_word_embeddings=True,
        attention_dropout=0.0,
    )
    model = LlamaForCausalLM(config)
    # Larger than the usual initial weights: with those all probabilities would be nearly equal, which hides errors.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.float()


def pairs_of(size: Size, seed: int = 0) -> list[dict[str, str]]:
    """P rows of prompt, chosen and rejected, as text. Lengths differ by up to a quarter, so batches have padding."""
    draw = random.Random(seed)

    def text(tokens: int) -> str:
        count = draw.randint(max(1, 3 * tokens // 4), tokens)
        return " ".join(f"w{draw.randrange(2, size.vocab)}" for _ in range(count))

    return [
        {"prompt": text(size.prompt), "chosen": " " + text(size.completion), "rejected": " " + text(size.completion)}
        for _ in range(size.pairs)
    ]


def step_of_trainer(trainer: Any, batch: dict[str, Any]) -> tuple[float, dict[str, torch.Tensor]]:
    """One step of a trainer that has TRL's `compute_loss`: its loss, and the gradients of the policy."""
    model = trainer.model
    model.zero_grad()
    loss = trainer.compute_loss(model, dict(batch))
    loss.backward()
    return loss.item(), gradients(model)


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The gradients of the parameters by name."""
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
