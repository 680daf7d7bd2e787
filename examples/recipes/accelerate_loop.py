"""DPO with Accelerate (any number of processes, mixed precision) and precomputed log-probabilities of the reference.

accelerate launch examples/recipes/accelerate_loop.py MODEL PAIRS.jsonl
"""

import sys

import torch
from accelerate import Accelerator
from pairs import collate, load_pairs
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_kernels import DPOLoss, sequence_logps

name, data = sys.argv[1:3]
accelerator = Accelerator()
tokenizer, model = AutoTokenizer.from_pretrained(name), AutoModelForCausalLM.from_pretrained(name)
pairs = load_pairs(data, tokenizer)
model.to(accelerator.device).eval()
for pair in pairs:  # before training, the policy is the reference, so no second model is needed
    batch = {key: value.to(accelerator.device) for key, value in collate([pair]).items()}
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        pair["ref_logps"] = sequence_logps(logits, batch["labels"]).cpu()


def collate_with_reference(pairs):
    """The batch of `collate`, and the reference's sums [2P], chosen first."""
    return {**collate(pairs), "ref_logps": torch.stack([pair["ref_logps"] for pair in pairs], dim=1).flatten()}


loss_fn = DPOLoss(beta=0.1)
loader = torch.utils.data.DataLoader(pairs, batch_size=4, shuffle=True, collate_fn=collate_with_reference)
optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-5)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
for step, batch in enumerate(loader):
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    out = loss_fn(logits, batch["labels"], ref_logps=batch["ref_logps"])
    accelerator.backward(out.loss)
    optimizer.step()
    optimizer.zero_grad()
    accelerator.print(step, {key: round(value, 4) for key, value in {"loss": out.loss.item(), **out.metrics()}.items()})
