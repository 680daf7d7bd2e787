"""DPO in transformers.Trainer: a compute_loss of a few lines, from logits.

python examples/recipes/transformers_trainer.py MODEL PAIRS.jsonl OUTPUT_DIR
"""

import copy
import sys

import torch
from pairs import collate, load_pairs
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from dpo_kernels import DPOLoss


class PreferenceTrainer(Trainer):
    """A Trainer whose batches are pairs, and whose reference is a frozen copy of the model."""

    def __init__(self, *arguments, loss_fn, **keywords):
        super().__init__(*arguments, **keywords)
        self.reference = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.loss_fn = loss_fn

    def compute_loss(self, model, inputs, return_outputs=False, **_):
        """The pair loss; the gradient is written over the logits."""
        labels = inputs.pop("labels")
        with torch.no_grad():
            ref_logits = self.reference(**inputs).logits
        outputs = model(**inputs)
        out = self.loss_fn(outputs.logits, labels, ref_logits=ref_logits)
        self.log(out.metrics())
        return (out.loss, outputs) if return_outputs else out.loss


name, data, folder = sys.argv[1:4]
tokenizer = AutoTokenizer.from_pretrained(name)
trainer = PreferenceTrainer(
    model=AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32),
    args=TrainingArguments(
        folder,
        per_device_train_batch_size=4,
        num_train_epochs=1,
        learning_rate=1e-5,
        logging_steps=1,
        report_to="none",
        remove_unused_columns=False,
    ),
    train_dataset=load_pairs(data, tokenizer),
    data_collator=collate,
    loss_fn=DPOLoss(beta=0.1, loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.1], inplace_backward=True),
)
trainer.train()
trainer.save_model(folder)
