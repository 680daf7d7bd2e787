"""A tiny tokenizer, tiny random models and a preference that can be learned, all made here without downloads."""

import random
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from dpo_trainer import DPOConfig, DPOTrainer

CHAT_TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
NICE, NASTY, SUBJECTS = ("good", "great", "fine"), ("bad", "awful"), ("the", "film", "review", "answer", "question")


@cache
def build_tokenizer(*, bos: bool = False, eos: bool = False) -> PreTrainedTokenizerFast:
    """Byte-level BPE with its end token as padding token, like SmolLM2's. It may add BOS or EOS to every text."""
    words = " ".join((*NICE, *NASTY, *SUBJECTS, "greatest", "goodness"))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=["<|end|>", "<|start|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([f"{words} {word}:" for word in words.split()] * 20, trainer)
    if bos or eos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=("<|start|> " if bos else "") + "$A" + (" <|end|>" if eos else ""),
            special_tokens=[("<|start|>", 1), ("<|end|>", 0)],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|end|>",
        pad_token="<|end|>",
        bos_token="<|start|>" if bos else None,
        chat_template=CHAT_TEMPLATE,
    )


COMMON = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 128}
LLAMA = {**COMMON, "intermediate_size": 64, "num_key_value_heads": 2}
#: One model for each operation that models apply between the last hidden state and the logits.
MODELS: dict[str, Callable[[int], torch.nn.Module]] = {
    "llama-tied": lambda v: LlamaForCausalLM(LlamaConfig(vocab_size=v, tie_word_embeddings=True, **LLAMA)),
    "llama-untied": lambda v: LlamaForCausalLM(LlamaConfig(vocab_size=v, tie_word_embeddings=False, **LLAMA)),
    "gpt-neox": lambda v: GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=v, intermediate_size=64, **COMMON)),
    "gpt2-learned-positions": lambda v: GPT2LMHeadModel(
        GPT2Config(vocab_size=v, n_embd=32, n_layer=2, n_head=4, n_positions=128, bos_token_id=0, eos_token_id=0)
    ),
    "gemma2-softcap": lambda v: Gemma2ForCausalLM(
        Gemma2Config(vocab_size=v, head_dim=8, final_logit_softcapping=0.5, pad_token_id=0, **LLAMA)
    ),
    "cohere-scale": lambda v: CohereForCausalLM(CohereConfig(vocab_size=v, logit_scale=0.25, pad_token_id=0, **LLAMA)),
    "granite-divisor": lambda v: GraniteForCausalLM(GraniteConfig(vocab_size=v, logits_scaling=4.0, **LLAMA)),
}


def build_model(kind: str, vocab: int, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return MODELS[kind](vocab)


def build_pairs(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Pairs with chosen completions of nice words and rejected ones of nasty words. Lengths are independent of the side."""
    generator = random.Random(seed)
    return [
        {
            "prompt": " ".join(generator.choices(SUBJECTS, k=generator.randint(1, 6))),
            "chosen": "".join(f" {word}" for word in generator.choices(NICE, k=generator.randint(1, 5))),
            "rejected": "".join(f" {word}" for word in generator.choices(NASTY, k=generator.randint(1, 5))),
        }
        for _ in range(count)
    ]


def build_trainer(folder: Path, **settings: Any) -> DPOTrainer:
    """A trainer with tiny model and data. Keywords that DPOTrainer takes go there, all others into DPOConfig."""
    of_trainer = {
        "model",
        "ref_model",
        "train_dataset",
        "eval_dataset",
        "peft_config",
        "processing_class",
        "callbacks",
        "compute_metrics",
        "scorer",
    }
    given = {key: settings.pop(key) for key in list(settings) if key in of_trainer}
    tokenizer = build_tokenizer()
    given.setdefault("model", build_model("llama-tied", len(tokenizer)))
    given.setdefault("train_dataset", build_pairs(24))
    given.setdefault("processing_class", tokenizer)
    defaults = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "write_report": False,
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return DPOTrainer(**given, args=DPOConfig(**{**defaults, **settings}))
