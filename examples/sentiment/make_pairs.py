"""Remakes train.jsonl and held_out.jsonl: the model continues prompts, VADER ranks its continuations.

    python examples/sentiment/make_pairs.py

This is the controlled-sentiment experiment of the DPO paper (Rafailov et al., 2023, section 5.1) with a model that is small
enough for two CPU cores. The pairs are on-policy (the model wrote both sides) and the judge is exact, so the effect of
training can be measured on fresh samples. Sampling takes about five minutes on two cores. The files are committed because
the text depends on the machine's float32 rounding.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import zlib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import smollm2
from vader import pair_up

from dpo_trainer import load_model, load_tokenizer

HERE = Path(__file__).resolve().parent

TEMPERATURE = 0.7
TOKENS = 14
SAMPLES = 48
PROMPTS_PER_BATCH = 4
HELD_OUT_PROMPTS = 32
PAIRS_PER_PROMPT = 10
GAP = 0.6
SEED = 0


def split_prompts(prompts: list[str]) -> dict[str, list[str]]:
    """Hold out randomly chosen prompts, with all their pairs, for measuring."""
    shuffled = random.Random(SEED).sample(prompts, len(prompts))
    return {"held_out": shuffled[:HELD_OUT_PROMPTS], "train": shuffled[HELD_OUT_PROMPTS:]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--output-dir", type=Path, default=HERE, help="where train.jsonl and held_out.jsonl are written"
    )
    folder = parser.parse_args().output_dir
    prompts = (HERE / "prompts.txt").read_text(encoding="utf-8").splitlines()
    model_folder = smollm2.model_folder()
    model, tokenizer = load_model(model_folder).eval(), load_tokenizer(model_folder)
    folder.mkdir(parents=True, exist_ok=True)
    for split, chosen_prompts in split_prompts(prompts).items():
        rows = []
        for first in range(0, len(chosen_prompts), PROMPTS_PER_BATCH):
            batch = chosen_prompts[first : first + PROMPTS_PER_BATCH]
            continuations = smollm2.sample(
                model,
                tokenizer,
                batch,
                count=SAMPLES,
                tokens=TOKENS,
                temperature=TEMPERATURE,
                seed=zlib.crc32(batch[0].encode()),
            )
            texts = smollm2.decode(tokenizer, continuations)
            for index, prompt in enumerate(batch):
                own = texts[index * SAMPLES : (index + 1) * SAMPLES]
                rows += [
                    {"prompt": prompt, "chosen": chosen, "rejected": rejected, "gap": gap}
                    for chosen, rejected, gap in pair_up(own, gap=GAP, limit=PAIRS_PER_PROMPT)
                ]
            print(f"{split}: {first + len(batch)} prompts, {len(rows)} pairs", flush=True)
        # A pair's weight is proportional to VADER's difference; the mean weight is 1, so the learning rate keeps its meaning.
        mean = sum(row["gap"] for row in rows) / len(rows)
        for row in rows:
            row["weight"] = round(row["gap"] / mean, 4)
        with (folder / f"{split}.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    main()
