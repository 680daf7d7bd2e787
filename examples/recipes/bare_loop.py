"""DPO in a bare PyTorch loop, from hidden states: the logits of a batch never exist as a whole.

python examples/recipes/bare_loop.py MODEL PAIRS.jsonl
"""

import copy
import sys

import torch
from pairs import collate, load_pairs
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_kernels import LinearDPOLoss

name, data = sys.argv[1:3]
tokenizer, policy = AutoTokenizer.from_pretrained(name), AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
reference = copy.deepcopy(policy).eval().requires_grad_(False)
loss_fn = LinearDPOLoss(beta=0.1, loss_type="sigmoid", statistics=("kl",))
optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-5)
loader = torch.utils.data.DataLoader(load_pairs(data, tokenizer), batch_size=4, shuffle=True, collate_fn=collate)

for step, batch in enumerate(loader):
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    hidden = policy.base_model(**inputs).last_hidden_state
    with torch.no_grad():
        ref_hidden = reference.base_model(**inputs).last_hidden_state
    head, ref_head = policy.get_output_embeddings().weight, reference.get_output_embeddings().weight
    out = loss_fn(hidden, head, batch["labels"], ref_hidden=ref_hidden, ref_weight=ref_head)
    out.loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(step, {key: round(value, 4) for key, value in {"loss": out.loss.item(), **out.metrics()}.items()})
