"""FSDP2: the loss and gradients of a trainer whose policy is sharded over two processes are those of plain forwards.

If DPO_WRITE_RESULTS is 1, the results are written to benchmarks/results/combinations_sharded.json for docs/compatibility.md.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from .combinations import DIMENSIONS, REFUSED, stated

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks/results/combinations_sharded.json"
#: What sharding is tried with, each alone and with LoRA. The rest needs `train`, which shards on accelerators only.
BESIDE = [
    *(name for dimension in ("reference", "layout", "loss path", "data") for name in DIMENSIONS[dimension]),
    *("simpo", "tdpo2", "aot", "kl_coef", "use_weighting", "bf16"),
]
CASES = [
    *([name] for name in BESIDE if name != "sync_ref_model"),
    *(["LoRA", name] for name in BESIDE if stated(["LoRA", name])[0] != REFUSED),
    *([name] for name in DIMENSIONS["adapter"]),
]

_WORKER = """
import json, sys
from pathlib import Path
import torch
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from dpo_trainer.model.split import unwrap_adapter
from tests.trainer.combinations import PAIRS, VALUES, build, expected, stated
from tests.trainer.test_sharded_combinations import CASES

torch.set_num_threads(1)
found = []
for index, names in enumerate(CASES):
    trainer, _ = build(names, Path(sys.argv[1]) / str(index))
    assert trainer.accelerator.num_processes == 2
    wanted, gradients = expected(names, trainer)
    model = trainer.policy.model
    for part in [*unwrap_adapter(model).model.layers, model]:
        fully_shard(part)
    batch = trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[i] for i in range(len(PAIRS))]))
    total = trainer._get_num_items_in_batch([batch], trainer.args.device)
    model.train()
    loss = trainer.compute_loss(model, batch, num_items_in_batch=total)
    loss.backward()
    tolerance = 0.1 if any(VALUES[name].rounds for name in names) else 2e-4
    assert abs(loss.item() - wanted) <= tolerance * (1 + abs(wanted)) / 2, (names, loss.item(), wanted)
    norm = sum(value.square().sum() for value in gradients.values()) ** 0.5
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor), (names, name)
        if name in gradients:
            gap = (parameter.grad.full_tensor().double() - gradients[name]).norm()
            assert gap <= tolerance * norm, (names, name, gap / norm)
    found.append([*names, stated(names)[0]])
Path(sys.argv[1], f"done-{trainer.args.process_index}.json").write_text(json.dumps(found))
"""


@pytest.mark.slow
def test_a_sharded_policy_equals_a_whole_one(tmp_path: Path) -> None:
    (tmp_path / "worker.py").write_text(_WORKER)
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [
            sys.executable,
            *["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
            "worker.py",
            str(tmp_path),
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(root), *sys.path]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    zero, one = (json.loads((tmp_path / f"done-{rank}.json").read_text()) for rank in range(2))
    assert zero == one
    assert len(zero) == len(CASES)
    if os.environ.get("DPO_WRITE_RESULTS") == "1":
        RESULTS.write_text(json.dumps(zero) + "\n", encoding="utf-8")
