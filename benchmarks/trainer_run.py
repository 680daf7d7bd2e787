"""Runs one trainer for a few steps on real pairs, in a process of its own, so that the peak of memory is the trainer's.

    python -m benchmarks.trainer_run ours --pairs pairs.jsonl --model FOLDER --steps 4 --batch 8 --max-length 256

Prints one JSON object: seconds from the end of each step to the end of the next, losses, tokens of each step, bytes.
`benchmarks/test_trainer.py` starts these processes one after the other and compares their output.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import importlib
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .method import peak_resident

#: Settings of every trainer, under names that all of them accept.
LEARNING_RATE = 1e-5


def pick(path: Path, tokenizer: Any, count: int, max_length: int) -> list[dict[str, Any]]:
    """The file's first `count` pairs whose prompt leaves room for an answer; both trainers would drop other pairs.

    Raises:
        ValueError: the file holds fewer.
    """
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        row = {name: value for name, value in json.loads(line).items() if name in ("prompt", "chosen", "rejected")}
        prompt = row["prompt"]
        ids = tokenizer(prompt) if isinstance(prompt, str) else tokenizer.apply_chat_template(prompt, return_dict=True)
        if len(ids["input_ids"]) <= max_length - 16:
            found.append(row)
        if len(found) == count:
            return found
    raise ValueError(f"{path}: {len(found)} pairs with prompts of at most {max_length - 16} tokens, {count} needed")


def token_counts(dataset: Any, batch: int, max_length: int) -> list[int]:
    """Tokens of each step without padding: prompts and completions of both sides, truncated at max_length."""
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    prompts, *sides = (dataset[name] for name in names)
    pairs = [
        sum(min(len(prompt) + len(side[index]), max_length) for side in sides) for index, prompt in enumerate(prompts)
    ]
    return [sum(pairs[begin : begin + batch]) for begin in range(0, len(pairs), batch)]


def common_arguments(scratch: str, steps: int, batch: int, max_length: int, device: str = "cpu") -> dict[str, Any]:
    """The configuration that all trainers share."""
    return {
        "output_dir": scratch,
        "max_steps": steps,
        "per_device_train_batch_size": batch,
        "max_length": max_length,
        "truncation_mode": "keep_start",
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": device == "cpu",
    }


def build_ours(model: Path, rows: list[dict[str, Any]], common: dict[str, Any], **own: Any) -> Any:
    """Our trainer with its defaults, except for `common` and `own`."""
    from dpo_trainer import DPOConfig, DPOTrainer

    # No filters, since TRL leaves out no pair.
    arguments = DPOConfig(**common, filters=[], **own, log_level="error")
    return DPOTrainer(str(model), args=arguments, train_dataset=rows)


def build_trl(model: Path, rows: list[dict[str, Any]], common: dict[str, Any]) -> Any:
    """TRL's trainer, in float32 and without gradient checkpointing, like ours."""
    import datasets
    from trl import DPOConfig, DPOTrainer

    arguments = DPOConfig(
        **common,
        model_init_kwargs={"dtype": "float32"},
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
    )
    return DPOTrainer(str(model), args=arguments, train_dataset=datasets.Dataset.from_list(rows))


def build_trl_patched(model: Path, rows: list[dict[str, Any]], common: dict[str, Any]) -> Any:
    """TRL's trainer with our kernels in place of its fused LM head, as in a script that begins with `apply_to_trl()`."""
    from dpo_kernels.integrations.trl import apply_to_trl

    apply_to_trl()
    return build_trl(model, rows, common)


def floor(trainer: Any, batch: int) -> float:
    """Seconds of a step's matrix products and attention alone: the least time of any trainer that trains the whole model
    against a frozen copy.

    Every linear layer has four products (policy, reference, gradients of input and weight). The backbone's layers run over
    every token once, shared prompts included, the head over scored tokens, attention over every sequence. The number of
    tokens is the mean step's. Buffers are reused at once, so the caches are as warm as possible.
    """
    import torch

    dataset = trainer.train_dataset
    prompts, chosen, rejected = (
        [len(ids) for ids in dataset[name]] for name in ("prompt_ids", "chosen_ids", "rejected_ids")
    )
    steps = len(dataset) / batch
    # A completion's last token is predicted, not read.
    tokens = round((sum(prompts) + sum(chosen) + sum(rejected) - 2 * len(dataset)) / steps)
    scored = round((sum(chosen) + sum(rejected)) / steps)
    backbone, head = trainer.policy.backbone, trainer.policy.head
    layers = [module for module in backbone.modules() if isinstance(module, torch.nn.Linear)]
    shapes = collections.Counter((tokens, *layer.weight.shape) for layer in layers)
    shapes[(scored, *head.weight.shape)] += 1
    seconds = sum(count * _products(*shape) for shape, count in shapes.items())
    config = backbone.config
    heads, shared, width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    pairs = zip(prompts, chosen, rejected, strict=True)
    attention = sum(_attention(p, c - 1, r - 1, heads, shared, width) for p, c, r in pairs)
    return seconds + config.num_hidden_layers * attention / steps


def _median(once: Callable[[], object]) -> float:
    samples = []
    for _ in range(3):
        begin = time.perf_counter()
        once()
        samples.append(time.perf_counter() - begin)
    return statistics.median(samples)


def _products(rows: int, outputs: int, inputs: int) -> float:
    """Seconds of one linear layer's four products."""
    import torch

    x, w, dy = torch.randn(rows, inputs), torch.randn(outputs, inputs), torch.randn(rows, outputs)
    y, dx, dw = torch.empty_like(dy), torch.empty_like(x), torch.empty_like(w)

    def once() -> None:
        torch.mm(x, w.T, out=y)
        torch.mm(x, w.T, out=y)
        torch.mm(dy, w, out=dx)
        torch.mm(dy.T, x, out=dw)

    return _median(once)


def _attention(prompt: int, chosen: int, rejected: int, heads: int, shared: int, width: int) -> float:
    """Seconds of one layer's attention for a pair, policy and reference: prompt + chosen, then rejected after the prompt."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    def part(count: int, tokens: int) -> torch.Tensor:
        return torch.randn(1, count, tokens, width, requires_grad=True)

    whole = [part(count, prompt + chosen) for count in (heads, shared, shared)]
    behind = [part(heads, rejected), *(part(shared, prompt + rejected) for _ in range(2))]
    mask = torch.ones(rejected, prompt + rejected, dtype=torch.bool).tril(prompt)

    def forward() -> list[torch.Tensor]:
        return [
            scaled_dot_product_attention(*whole, is_causal=True, enable_gqa=True),
            scaled_dot_product_attention(*behind, mask, enable_gqa=True),
        ]

    def once() -> None:
        with torch.no_grad():
            forward()
        found = forward()
        torch.autograd.grad(found, [*whole, *behind], found)

    return _median(once)


#: name -> function that builds the trainer from the model's folder, the rows and the settings that all share.
CONTENDERS: dict[str, Callable[..., Any]] = {
    "ours": build_ours,
    "ours_padded": lambda *a: build_ours(*a, batch_layout="padded"),
    "ours_shared": lambda *a: build_ours(*a, batch_layout="prefix_shared"),
    "ours_whole": lambda *a: build_ours(*a, loss_path="logits"),
    "ours_precomputed": lambda *a: build_ours(*a, precompute_ref_log_probs=True),
    "trl": build_trl,
    "trl_patched": build_trl_patched,
}


def run(arguments: argparse.Namespace, scratch: str) -> dict[str, Any]:
    """Build the trainer, train, and return the measurements."""
    if arguments.contender != "trl":
        # Imported first, as in dpo-train: how large tensors are allocated can only be chosen before torch's first tensor.
        # TRL's own run imports nothing of ours.
        importlib.import_module(
            "dpo_kernels.integrations.trl" if arguments.contender == "trl_patched" else "dpo_trainer"
        )
    from transformers import AutoTokenizer, TrainerCallback

    class Stopwatch(TrainerCallback):
        ends: list[float] = []  # noqa: RUF012 - one instance a process

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.ends.append(time.perf_counter())

    begin = time.perf_counter()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model, local_files_only=True)
    rows = pick(arguments.pairs, tokenizer, arguments.steps * arguments.batch, arguments.max_length)
    common = common_arguments(scratch, arguments.steps, arguments.batch, arguments.max_length)
    trainer = CONTENDERS[arguments.contender](arguments.model, rows, common)
    watch = Stopwatch()
    trainer.add_callback(watch)
    built = time.perf_counter()
    trainer.train()
    return {
        "contender": arguments.contender,
        "start_s": built - begin,
        "first_step_s": watch.ends[0] - built,
        # End to end: with optimizer, logging and loading of the next batch.
        "step_s": [b - a for a, b in zip(watch.ends, watch.ends[1:], strict=False)],
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "tokens": token_counts(trainer.train_dataset, arguments.batch, arguments.max_length),
        "peak_bytes": peak_resident(),
        "floor_s": floor(trainer, arguments.batch) if arguments.contender == "ours" else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("contender", choices=CONTENDERS)
    parser.add_argument("--pairs", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--batch", type=int, default=8, help="pairs a step")
    parser.add_argument("--max-length", type=int, default=256)
    arguments = parser.parse_args()
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    # The trainers' own output is kept off the real stdout, which gets only the last line.
    with (
        tempfile.TemporaryDirectory() as scratch,
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
    ):
        found = run(arguments, scratch)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
