"""`dpo-train init`: writes a YAML file with comments for a case, which the user completes."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from ..errors import ConfigError, OutputError, did_you_mean

START = """\
# {title}
#
#   dpo-train inspect {file}   # shows the data, and the expected memory and time of the run
#   {launch}
#
# The command line overrides this file, e.g. --beta 0.05. dpo-train --help-all explains every setting.

# The model: a folder or a name on the hub (owner/name). It should already be fine-tuned on instructions (SFT).
model: ./my-model
# Pairs: one JSON object per line, {{"prompt": ..., "chosen": ..., "rejected": ...}}, as text or as chat messages.
train_data: train.jsonl
# A tenth of the pairs is held out, to show whether the model learns more than the training pairs. If you have a file of
# held-out pairs, replace this line by eval_data: eval.jsonl.
val_split: 0.1
# A new folder for the model, checkpoints and report.html.
output_dir: runs/{name}
"""
OBJECTIVE = """\

# How strongly the model is kept near its reference, which is the model before training. 0.1 suits most runs.
beta: 0.1
# The objective. sigmoid is DPO.
loss_type: sigmoid
"""
END = """\

# Passes over the pairs. With more than one to three, the model memorises the pairs.
num_train_epochs: 1
# Longer pairs are cut to this number of tokens.
max_length: 1024
seed: 42
"""
ACCELERATE = """\

# accelerate launch --num_processes 8 --module dpo_trainer.cli starts the same run.
"""
WHOLE = """\

# Whole models need small learning rates, 5e-7 to 5e-6.
learning_rate: 1.0e-6
lr_scheduler_type: cosine
# Share of the run in which the learning rate rises.
warmup_steps: 0.1
"""
ADAPTER = """\

# Trains small matrices that are added to these layers, not the whole model. The reference is the model without them.
lora:
  r: 16
  lora_alpha: 32
  target_modules: all-linear
# Adapters need larger learning rates than whole models, 1e-5 to 1e-4.
learning_rate: 2.0e-5
lr_scheduler_type: cosine
# Share of the run in which the learning rate rises.
warmup_steps: 0.1
"""
ON_GPU = """\

# 16-bit arithmetic on float32 weights. Remove it on a GPU without bfloat16.
bf16: true
# A step has batch x accumulation x devices pairs. If memory is short, halve the batch and double the accumulation.
per_device_train_batch_size: 8
gradient_accumulation_steps: {accumulation}
# Computes activations again in the backward pass: less memory, but a third more time.
gradient_checkpointing: {checkpointing}
"""
ON_CPU = """\

# Trains on the CPU, even if there is a GPU.
use_cpu: true
# Pairs in a step. A few steps are enough to see that everything works; remove max_steps to train on all pairs.
per_device_train_batch_size: 4
max_steps: 50
"""
#: Cases by name: title, command, and the file's contents.
CASES = {
    "full": (
        "DPO of a whole model on one GPU.",
        "dpo-train {file}",
        WHOLE + OBJECTIVE + ON_GPU.format(accumulation=4, checkpointing="false") + END,
    ),
    "lora": (
        "DPO of a LoRA adapter on one GPU: the least memory.",
        "dpo-train {file}",
        ADAPTER + OBJECTIVE + ON_GPU.format(accumulation=4, checkpointing="false") + END,
    ),
    "small-cpu": (
        "DPO of a small model (up to some hundred million parameters) on a CPU: to try things out.",
        "dpo-train {file}",
        WHOLE + OBJECTIVE + ON_CPU + END.replace("1024", "512"),
    ),
    "multi-gpu": (
        "DPO of a whole model on several GPUs of one machine, each with a copy of the model.",
        "torchrun --nproc-per-node 8 -m dpo_trainer.cli {file}   # 8 GPUs",
        ACCELERATE + WHOLE + OBJECTIVE + ON_GPU.format(accumulation=1, checkpointing="true") + END,
    ),
}


def init(words: Sequence[str], output: Path | None) -> str:
    """Write the file of a case. Returns a text about the next steps.

    Args:
        words: the case; "full" if it is empty.
        output: the file; CASE.yaml if it is None.

    Raises:
        ConfigError: the case is unknown.
        OutputError: the file exists.
    """
    case = words[0] if words else "full"
    if case not in CASES:
        raise ConfigError(f"init: unknown case '{case}'{did_you_mean(case, CASES)}; known are {', '.join(CASES)}")
    if len(words) > 1:
        raise ConfigError(f"init: takes one case and --output FILE, got '{' '.join(words)}'")
    path = output or Path(f"{case}.yaml")
    title, launch, rest = CASES[case]
    file = shlex.quote(str(path))
    launch = launch.format(file=file)
    text = START.format(title=title, file=file, launch=launch, name=case) + rest
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("x", encoding="utf-8") as stream:
            stream.write(text)
    except FileExistsError as error:
        raise OutputError(f"init: {error.filename} exists; choose another name with --output") from error
    return f"{path}: set model, train_data and output_dir there; then\n  {launch}"
