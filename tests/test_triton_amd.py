"""The Triton kernels compile for AMD's GPUs: 16-byte accesses, nothing in scratch memory. No GPU is needed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

COMPILE = r"""
import json, re, sys
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from dpo_kernels.backends.triton.launch import NUM_WARPS
from dpo_kernels.backends.triton.logits_grad import logits_grad_launch
from dpo_kernels.backends.triton.preference_loss import preference_loss_launch
from dpo_kernels.backends.triton.token_logps import token_logps_launch

logits = torch.empty(2, 64, 128256, dtype=torch.bfloat16, device="meta")
labels = torch.empty(2, 64, dtype=torch.int64, device="meta")
x = torch.empty(2, 64, dtype=torch.float64, device="meta")
pair = torch.empty(1, dtype=torch.float64, device="meta")
both = torch.empty(2, dtype=torch.float64, device="meta")
plain = {"ignore_index": -100, "logit_scale": 1.0, "logit_softcap": 0.0}
launches = {
    "token_logps": token_logps_launch(logits, labels, None, (x, x, *[None] * 6), **plain),
    "logits_grad": logits_grad_launch(logits, labels, x, x, x, logits, **plain),
    "preference_loss": preference_loss_launch(x, x, x, None, None, pair, pair, False, (pair, both, both, both)),
}
found = {"warps": NUM_WARPS}
for name, launch in launches.items():
    source = ASTSource(launch.kernel, *launch.signature())
    asm = triton.compile(source, target=GPUTarget("hip", sys.argv[1], 64), options=launch.options).asm["amdgcn"]
    found[name] = {
        "loads": len(re.findall(r"(?:global|buffer)_load_dwordx4", asm)),
        "stores": len(re.findall(r"(?:global|buffer)_store_dwordx4", asm)),
        "scratch": int(re.search(r"\.private_segment_fixed_size: *(\d+)", asm).group(1)),
        "spills": int(re.search(r"\.vgpr_spill_count: *(\d+)", asm).group(1)),
    }
print(json.dumps(found))
"""


@pytest.mark.parametrize("arch", ["gfx942", "gfx950"])
def test_kernels_compile_for_amd_with_wide_accesses_and_without_scratch(arch):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "DPO_KERNELS_TRITON_TARGET": "hip"}
    if "PYTHONPATH" in os.environ:
        environment["PYTHONPATH"] += os.pathsep + os.environ["PYTHONPATH"]
    command = [sys.executable, "-W", "ignore", "-c", COMPILE, arch]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout)
    # A thread holds one group of a load.
    assert found.pop("warps") * 64 == 128
    assert all(kernel["scratch"] == kernel["spills"] == 0 for kernel in found.values()), found
    # Four loads in the masked loop and four in the main one; the compiler may copy a loop's first iteration out of it.
    assert found["token_logps"]["loads"] >= 8, found
    assert found["logits_grad"]["loads"] >= 8, found
    assert found["logits_grad"]["stores"] >= 8, found
