"""Reads preference pairs for the recipes: from JSON lines {"prompt", "chosen", "rejected"} to batches of ids and labels."""

import json
from pathlib import Path

import torch

from dpo_kernels import shift_labels


def load_pairs(path, tokenizer, max_length=512):
    """A list of {"chosen": (token ids, prompt length), "rejected": (token ids, prompt length)}."""
    pairs = []
    for row in map(json.loads, Path(path).read_text().splitlines()):
        prompt = tokenizer(row["prompt"])["input_ids"]
        answers = {side: tokenizer(row[side], add_special_tokens=False)["input_ids"] for side in ("chosen", "rejected")}
        ends = [tokenizer.eos_token_id]
        pairs.append({side: ((prompt + ids + ends)[:max_length], len(prompt)) for side, ids in answers.items()})
    return pairs


def collate(pairs):
    """{"input_ids", "attention_mask", "labels"}, [2P, T] each: the chosen answers first, padded on the right."""
    rows = [pair["chosen"] for pair in pairs] + [pair["rejected"] for pair in pairs]
    length = torch.tensor([len(ids) for ids, _ in rows])[:, None]
    prompt = torch.tensor([start for _, start in rows])[:, None]
    position = torch.arange(int(length.max()))
    input_ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids, _ in rows], batch_first=True)
    attention_mask = position < length
    labels = shift_labels(input_ids, attention_mask & (position >= prompt))
    return {"input_ids": input_ids, "attention_mask": attention_mask.long(), "labels": labels}
