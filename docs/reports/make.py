"""Five runs whose right verdict is known, and pictures of their reports: `python docs/reports/make.py [RUN ...]`.

A small model, which this script makes, learns to prefer kind reviews to unkind ones: a few seconds a run. The runs are in
runs/reports. Chromium takes the pictures, which lie next to this script.
"""

from __future__ import annotations

import functools
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dpo_trainer import DPOConfig, DPOTrainer

HERE = Path(__file__).resolve().parent
RUNS = HERE.parents[1] / "runs/reports"

KIND = ["warm", "funny", "clever", "moving", "fresh", "honest", "bright", "gentle", "lively", "rich"]
UNKIND = ["dull", "slow", "loud", "cheap", "bleak", "messy", "stale", "cold", "clumsy", "hollow"]
THINGS = ["plot", "cast", "script", "music", "ending", "pace", "humour", "camera", "sound", "story"]
TITLES = ["harbour", "orchard", "engine", "lantern", "winter", "island", "letter", "station", "garden", "mirror"]
OTHERS = ["review", "of", "the", ":", "was", "and", "a", "but", "very", ",", "."]
END = "<end>"

#: What is wrong with each run: settings, and whether its labels are flipped or its weights have 16 bits.
WRONG: dict[str, dict[str, Any]] = {
    "healthy": {},
    "flipped-labels": {"flipped": True},
    "learning-rate-too-high": {"learning_rate": 1e-2},
    "learning-rate-too-low": {"learning_rate": 1e-7},
    "updates-lost": {"half": True, "learning_rate": 1e-5},
}
#: The pictures: options of Chromium, width and height, by what their names end in.
LIGHT = {"": ("", 1240, 1000)}
OF_THE_HEALTHY = {**LIGHT, "-dark": ("--blink-settings=preferredColorScheme=0", 1240, 1000), "-phone": ("", 390, 1600)}


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word."""
    words = {word: place for place, word in enumerate([END, "<unk>", *KIND, *UNKIND, *THINGS, *TITLES, *OTHERS])}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token=END, pad_token=END, unk_token="<unk>")


def review(chance: random.Random, kindness: float) -> str:
    """Two sentences whose adjectives are kind with this probability, each by itself."""
    things = chance.sample(THINGS, 4)
    words = [chance.choice(KIND if chance.random() < kindness else UNKIND) for _ in range(4)]
    first, second = zip(things[:2], words[:2], strict=True), zip(things[2:], words[2:], strict=True)
    return (
        " , ".join(" and ".join(f"the {thing} was {word}" for thing, word in half) for half in (first, second)) + " ."
    )


def pairs(count: int, seed: int) -> list[dict[str, str]]:
    """Pairs of which the chosen review is the kinder one mostly, as people's labels are right mostly."""
    chance = random.Random(seed)
    return [
        {
            "prompt": f"a review of the {chance.choice(TITLES)} and the {chance.choice(TITLES)} :",
            "chosen": " " + review(chance, 0.7),
            "rejected": " " + review(chance, 0.35),
        }
        for _ in range(count)
    ]


@functools.cache
def taught() -> dict[str, torch.Tensor]:
    """The weights of a small model that writes reviews of either kind."""
    made, reader = model(), tokenizer()
    texts = [f"{row['prompt']}{row[side]} {END}" for row in pairs(512, seed=2) for side in ("chosen", "rejected")]
    batches = reader(texts, return_tensors="pt", padding=True)["input_ids"].split(64)
    optimizer = torch.optim.AdamW(made.parameters(), lr=3e-3)
    for batch in batches * 6:
        made(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return made.state_dict()


def model() -> Any:
    """A small Llama."""
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    words = len(tokenizer())
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=words, max_position_embeddings=64, tie_word_embeddings=True, **shape)
    )


def train(name: str, folder: Path) -> DPOTrainer:
    """Make one of the runs in `folder / name`."""
    settings = dict(WRONG[name])
    flipped, half = settings.pop("flipped", False), settings.pop("half", False)
    policy = model()
    policy.load_state_dict(taught())
    rows = pairs(640, seed=0)
    if flipped:
        rows = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    args = DPOConfig(
        output_dir=str(folder / name),
        per_device_train_batch_size=8,
        **{"learning_rate": 1.5e-4, **settings},
        warmup_steps=8,
        logging_steps=4,
        eval_strategy="steps",
        eval_steps=0.1,
        eval_on_start=True,
        save_strategy="no",
        sample_prompts=8,
        sample_max_new_tokens=24,
        use_cpu=True,
        disable_tqdm=True,
        log_level="error",
    )
    trainer = DPOTrainer(
        policy.bfloat16() if half else policy,
        args=args,
        train_dataset=rows,
        eval_dataset=pairs(200, seed=1),
        processing_class=tokenizer(),
    )
    trainer.train()
    return trainer


def picture(page: Path, name: str, options: str, width: int, height: int) -> None:
    """Write docs/reports/NAME.png: the top of the page in a window of this size, in a palette of 128 colours."""
    with tempfile.TemporaryDirectory() as folder:
        shot = Path(folder) / "shot.png"
        command = ["chromium", "--headless", "--no-sandbox", "--hide-scrollbars", f"--user-data-dir={folder}/profile"]
        command += [
            *options.split(),
            f"--screenshot={shot}",
            f"--window-size={width},{height}",
            page.resolve().as_uri(),
        ]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
        with Image.open(shot) as image:
            image.convert("RGB").quantize(128, dither=Image.Dither.NONE).save(HERE / f"{name}.png", optimize=True)


def main() -> None:
    for name in sys.argv[1:] or WRONG:
        train(name, RUNS)
        for ending, how in (OF_THE_HEALTHY if name == "healthy" else LIGHT).items():
            picture(RUNS / name / "report.html", name + ending, *how)


if __name__ == "__main__":
    main()
