"""Trains SmolLM2-135M-Instruct to write more cheerfully, and measures it on prompts that training never sees.

    python examples/sentiment/run.py           # about four minutes on two CPU cores
    python examples/sentiment/run.py --flip    # the control: random labels, three seeds, two runs each

It writes the aligned model, report.html, metrics.jsonl and summary.json into runs/sentiment. The control writes the same,
without the model, into one folder per run in runs/sentiment-control, and a summary.json of all runs next to them.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import measure
import smollm2
from make_pairs import TEMPERATURE, TOKENS
from vader import score

from dpo_kernels import dpo_loss
from dpo_trainer import DPOConfig, DPOTrainer, load_model, load_tokenizer

HERE = Path(__file__).resolve().parent
STEPS = 60
LEARNING_RATE = 2e-5
PAIRS_PER_STEP = 8
PAIRS_PER_BATCH = 16  # when measuring
SAMPLES_PER_PROMPT = 8  # fresh continuations of every held-out prompt, before and after


def settings(folder: Path, options: argparse.Namespace, **others: Any) -> DPOConfig:
    """The demo's settings; `others` adds or replaces fields of DPOConfig."""
    fields = {
        "output_dir": str(folder),
        "max_steps": options.steps,
        "per_device_train_batch_size": PAIRS_PER_STEP,
        "per_device_eval_batch_size": PAIRS_PER_BATCH,
        "learning_rate": options.learning_rate,
        "warmup_steps": max(options.steps // 10, 1),
        "beta": 0.1,
        # The continuations were cut at a fixed length. With an end token, the model would learn to stop at that length.
        "append_eos": False,
        # Every pair counts, even if both sides have the same tokens: such a pair is right half of the time.
        "filters": [],
        "seed": options.seed,
        "logging_steps": 4,
        "save_strategy": "no",
        "log_level": "error",
    }
    return DPOConfig(**{**fields, **others})


def pairs_only(rows: list[measure.Row]) -> list[measure.Row]:
    """Rows without their weights, since all held-out pairs count the same."""
    return [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in rows]


def fresh_samples(
    model: Any, tokenizer: Any, prompts: list[str], seed: int
) -> tuple[torch.Tensor, list[str], list[float]]:
    """Sample `SAMPLES_PER_PROMPT` continuations per prompt. Returns them as token ids and as text, and their VADER scores."""
    model.eval()
    tokens = smollm2.sample(
        model, tokenizer, prompts, count=SAMPLES_PER_PROMPT, tokens=TOKENS, temperature=TEMPERATURE, seed=seed
    )
    texts = smollm2.decode(tokenizer, tokens)
    return tokens, texts, [score(text) for text in texts]


@torch.inference_mode()
def divergence(trainer: DPOTrainer, tokenizer: Any, prompts: list[str], samples: torch.Tensor) -> list[float]:
    """KL(policy || reference) of a whole continuation in nats, one number per fresh sample of the policy.

    At every token of a sample, the KL of the two next-token distributions is computed exactly, over the whole
    vocabulary, at the temperature the sample was drawn at. Its sum, averaged over samples, is an unbiased estimate of
    the KL between the two samplers, with far less spread than the usual difference of log-probabilities.
    """
    found = []
    # Two samples of one prompt form a pair; which of them is called chosen does not affect the KL.
    for start in range(0, len(samples), 2 * PAIRS_PER_BATCH):
        pairs = [
            {
                "prompt_ids": tokenizer(prompts[row // SAMPLES_PER_PROMPT])["input_ids"],
                "chosen_ids": samples[row].tolist(),
                "rejected_ids": samples[row + 1].tolist(),
            }
            for row in range(start, min(start + 2 * PAIRS_PER_BATCH, len(samples)), 2)
        ]
        batch = trainer.data_collator(pairs)
        output = dpo_loss(
            trainer.policy.packed_logits(batch),
            batch["labels"],
            ref_logits=trainer.reference.packed_logits(batch),
            cu_seqlens=batch["cu_seqlens"],
            logit_scale=1.0 / TEMPERATURE,
            statistics=("kl",),
        )
        found += torch.stack((output.kl * output.token_counts).chunk(2), dim=1).flatten().tolist()
    return found


def run(options: argparse.Namespace) -> tuple[dict[str, Any], dict[str, measure.Observed]]:
    """Sample, train, measure, sample again. Returns the figures, as in summary.json, and the observations of their means."""
    folder = options.output_dir
    started = time.perf_counter()

    model_folder = smollm2.model_folder()
    model, tokenizer = load_model(model_folder), load_tokenizer(model_folder)
    train_rows = measure.read_rows(HERE / "train.jsonl")
    held_out_rows = measure.read_rows(HERE / "held_out.jsonl")
    if options.flip:
        train_rows = measure.flip_labels(train_rows, options.seed, other_half=options.other_half)
    prompts = list(dict.fromkeys(row["prompt"] for row in held_out_rows))
    prompt_of_sample = [prompt for prompt in prompts for _ in range(SAMPLES_PER_PROMPT)]

    print(f"before: sampling on {len(prompts)} prompts that training never sees ...", flush=True)
    _, texts_before, scores_before = fresh_samples(model, tokenizer, prompts, options.seed)

    rewards = measure.Rewards()
    trainer = DPOTrainer(
        model,
        args=settings(folder, options),
        train_dataset=train_rows,
        eval_dataset=pairs_only(held_out_rows),
        processing_class=tokenizer,
        compute_metrics=rewards,
    )
    print(f"training: {options.steps} steps of {PAIRS_PER_STEP} pairs, from {len(train_rows)} ...", flush=True)
    trainer.train()

    print(f"after: {len(held_out_rows)} held-out pairs, sampling, KL ...", flush=True)
    trainer.evaluate()
    samples, texts_after, scores_after = fresh_samples(trainer.model, tokenizer, prompts, options.seed)
    kl = divergence(trainer, tokenizer, prompts, samples)
    if not options.flip:
        trainer.save_model()
    training = json.loads((folder / "summary.json").read_text(encoding="utf-8"))

    observed = {
        **measure.held_out(rewards.values, [row["prompt"] for row in held_out_rows]),
        "sentiment_before": measure.Observed(scores_before, prompt_of_sample),
        "sentiment_after": measure.Observed(scores_after, prompt_of_sample),
        "sentiment_change": measure.Observed(np.subtract(scores_after, scores_before), prompt_of_sample),
        "kl": measure.Observed(kl, prompt_of_sample),
    }
    summary = measure.rounded(
        {
            **measure.figures(observed),
            "sentiment_before_deviation": float(np.std(scores_before)),
            "sentiment_after_deviation": float(np.std(scores_after)),
            "kl_per_token": float(np.mean(kl)) / TOKENS,
            "first_loss": training["first"]["loss"],
            "tokens_per_second": training["tokens_per_second"],
            "training_seconds": training["seconds"],
            "seconds": time.perf_counter() - started,
            "steps": options.steps,
            "pairs_per_step": PAIRS_PER_STEP,
            "learning_rate": f"{options.learning_rate:g}",
            "beta": trainer.args.beta,
            "seed": options.seed,
            "labels_flipped": options.flip,
            "training_pairs": len(train_rows),
            "held_out_pairs": len(held_out_rows),
            "held_out_prompts": len(prompts),
            "fresh_samples": len(scores_after),
            "peak_memory_mib": training["peak_memory_mib"],
            **measure.environment(),
        }
    )
    measure.write_json(folder / "summary.json", {**summary, "training": training})
    show_samples(prompts, texts_before, texts_after)
    print(f"report  {folder / 'report.html'}\n")
    return summary, observed


def show_samples(prompts: list[str], before: list[str], after: list[str]) -> None:
    """Print a few continuations."""
    print()
    for index in range(0, len(prompts), len(prompts) // 3):
        row = index * SAMPLES_PER_PROMPT
        print(f"{prompts[index]}")
        print(f"  before: ...{' '.join(before[row].split())}")
        print(f"  after:  ...{' '.join(after[row].split())}")


def show(summary: dict[str, Any]) -> None:
    """Print the table."""

    def both(name: str, form: str) -> str:
        return f"{summary[name]:{form}} ± {summary[name + '_error']:{form.lstrip('+')}}"

    spread = [f"{summary[f'sentiment_{when}_deviation']:.3f}" for when in ("before", "after")]
    rows = [
        ("held-out loss", f"{summary['first_loss']:.4f}", both("held_out_loss", ".4f")),
        ("held-out accuracy", "-", both("held_out_accuracy", ".1%")),
        ("sentiment of fresh samples", both("sentiment_before", ".3f"), both("sentiment_after", ".3f")),
        ("  spread (standard deviation)", *spread),
        ("  change", "", both("sentiment_change", "+.3f")),
        ("KL from the reference, nats", "0", both("kl", ".2f")),
        ("  per token", "0", f"{summary['kl_per_token']:.3f}"),
        ("seconds of training", "", f"{summary['training_seconds']:.0f}"),
        ("seconds in all", "", f"{summary['seconds']:.0f}"),
        ("tokens per second", "", f"{summary['tokens_per_second']:,.0f}"),
    ]
    title = "control, labels flipped" if summary["labels_flipped"] else "sentiment"
    print(measure.table((title, "before", "after"), rows))
    print(
        f"{summary['held_out_pairs']} pairs and {summary['fresh_samples']} fresh samples on "
        f"{summary['held_out_prompts']} prompts that training never saw."
    )
    if summary["labels_flipped"]:
        print(measure.control_note(summary))
    else:
        print("± is the standard error, clustered by prompt.")


def main() -> None:
    options = measure.read_options(
        __doc__.splitlines()[0], steps=STEPS, learning_rate=LEARNING_RATE, folder=Path("runs/sentiment")
    )
    show(measure.run_example(run, options, name="demo", results=HERE / "results.json"))


if __name__ == "__main__":
    main()
