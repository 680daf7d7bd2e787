"""TRL's DPOTrainer on these kernels: one added line, everything else unchanged.

pip install "trl>=1.15"
python examples/recipes/trl_trainer.py MODEL PAIRS.jsonl OUTPUT_DIR
"""

import sys

from dpo_kernels.integrations.trl import apply_to_trl  # isort: skip - first, so that large CPU tensors get 2 MB pages

import torch
from datasets import load_dataset
from transformers import AutoTokenizer
from trl import DPOConfig, DPOTrainer

apply_to_trl()

name, data, folder = sys.argv[1:4]
trainer = DPOTrainer(
    model=name,
    args=DPOConfig(
        folder,
        per_device_train_batch_size=4,
        num_train_epochs=1,
        learning_rate=1e-5,
        logging_steps=1,
        report_to="none",
        bf16=torch.cuda.is_available(),
    ),
    train_dataset=load_dataset("json", data_files=data, split="train"),
    processing_class=AutoTokenizer.from_pretrained(name),
)
trainer.train()
