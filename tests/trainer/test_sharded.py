"""FSDP2: two processes with half of every weight get the loss, gradients and moving reference of a single process."""

import subprocess
import sys
from pathlib import Path

_WORKER = """
import sys
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from dpo_kernels import linear_dpo_loss
from dpo_trainer import PairCollator
from dpo_trainer.model.split import SplitModel, call_through
from dpo_trainer.model.moving_reference import MovingReference
from tests.trainer.tiny import build_model

rank, store = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
rows = [
    {"prompt_ids": [5, 6, 7 + i], "chosen_ids": [9, 10 + i], "rejected_ids": [11, 12, 13]}
    for i in range(4)
]
collate = PairCollator()

def loss(split, batch):
    def of(hidden, weight, bias):
        out = linear_dpo_loss(
            hidden, weight, batch["labels"], bias=bias, cu_seqlens=batch["cu_seqlens"], ref_logps=torch.arange(4.0)
        )
        return out.loss, out
    return split.through_head(of, split.packed_hidden(batch))[0]

# An untied head gets a shard group of its own; a tied head's weight is gathered by the root.
for kind in ("llama-tied", "llama-untied"):
    model, plain = build_model(kind, 340), build_model(kind, 340)
    for part in [*model.model.layers, *([model.lm_head] if kind == "llama-untied" else []), model]:
        fully_shard(part)
    split = SplitModel(model)
    assert split.obstacle_to_linear is None
    mine = call_through(model, model, lambda batch: loss(split, batch), collate(rows[2 * rank : 2 * rank + 2]))
    mine.backward()

    whole = sum(loss(SplitModel(plain), collate(half)) for half in (rows[:2], rows[2:])) / 2
    whole.backward()
    mean = mine.detach().clone()
    dist.all_reduce(mean)
    torch.testing.assert_close(mean / 2, whole.detach())
    assert not torch.equal(mine.detach(), whole.detach())
    wanted = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor), name
        # FSDP averages gradients over the processes.
        torch.testing.assert_close(parameter.grad.full_tensor(), wanted[name].grad, rtol=1e-4, atol=1e-6)

    # A reference that moves takes the policy's whole weights.
    reference = build_model(kind, 340, seed=3)
    moved = {name: 0.25 * wanted[name].detach() + 0.75 * p.detach() for name, p in reference.named_parameters()}
    MovingReference(model, reference.requires_grad_(False), alpha=0.25, every=1).update()
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(parameter, moved[name])
dist.destroy_process_group()
"""


def test_two_processes_with_sharded_weights_equal_one(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", _WORKER, str(rank), str(tmp_path / "store")],
            cwd=root,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [worker.communicate(timeout=300)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0, 0], "\n".join(said)
