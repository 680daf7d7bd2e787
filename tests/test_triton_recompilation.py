"""Steps with other sequence lengths or tensor addresses must not recompile Triton kernels during training.

Triton compiles a kernel for every specialisation of its arguments, which takes seconds. These tests compute specialisations
with Triton's own code for a GPU, which need not exist. They use a separate process without the interpreter.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent

#: Settings of runs. A run compiles its kernels in the first step, and no others in 50 steps.
RUNS = {
    "bfloat16": {},
    "float32, packed": {"dtype": "float32", "packed": True},
    "every statistic": {"statistics": ["entropy", "kl", "accuracy", "mean_logits"]},
    "odd vocabulary": {"vocab": 1001},
    "given sums, robust": {"ref": "sums", "loss_type": "robust", "label_smoothing": 0.1},
    "divergence": {"kl_coef": 0.1},
    "packed, another objective": {"packed": True, "loss_type": "ipo"},
    # The longer steps have several chunks of rows. The rows of the logits are padded.
    "linear": {"linear": {"memory_budget": 1 << 19}, "vocab": 257},
    "linear, packed, divergence": {"linear": {}, "vocab": 257, "packed": True, "kl_coef": 0.1},
    "linear, frozen head, another objective": {"linear": {"frozen": True}, "vocab": 257, "loss_type": "ipo"},
}
STEPS = 50


def specialisations(run: dict) -> list[list[str]]:
    """Specialisations of every step. Launches are recorded and not run. Call this in a separate process."""
    import pretend_gpu
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    from dpo_kernels import backends, dpo_loss, linear_dpo_loss, use_backend
    from dpo_kernels.backends import triton as stages
    from dpo_kernels.backends.triton.launch import Launch

    backend = make_backend(GPUTarget("cuda", 90, 32))
    found: list[str] = []

    def record(launch: Launch, _) -> None:
        binder = create_function_from_signature(launch.kernel.signature, launch.kernel.params, backend)
        _, specialisation, options = binder(**launch.arguments, **launch.options, debug=False)
        found.append(repr((launch.kernel.fn.__name__, specialisation, options)))

    stages.check_available = lambda device_type: None
    Launch.run = pretend_gpu._run_launch = record
    backends._attempt.cache_clear()
    dtype, vocab = getattr(torch, run.get("dtype", "bfloat16")), run.get("vocab", 1000)
    packed, has_logits = run.get("packed", False), run.get("ref", "logits") == "logits"
    settings = {key: run[key] for key in ("statistics", "loss_type", "label_smoothing", "kl_coef") if key in run}
    generator = torch.Generator().manual_seed(0)

    def place(tensor: torch.Tensor) -> torch.Tensor:
        """A copy at an address that is a multiple of the item size, but a multiple of 16 bytes only by chance."""
        start = int(torch.randint(1, 8, (), generator=generator))
        whole = torch.empty(tensor.numel() + 8, dtype=tensor.dtype)
        return whole[start : start + tensor.numel()].view(tensor.shape).copy_(tensor)

    def on_gpu(tensor: torch.Tensor) -> pretend_gpu.OnGPU:
        return pretend_gpu.OnGPU(place(tensor))

    def linear_step(shape: tuple[int, ...], bounds: torch.Tensor | None) -> None:
        """A step on the pretend GPU, because the linear path chunks and pads differently on a CPU."""
        words = dict(run["linear"])
        head_learns = not words.pop("frozen", False)
        hidden, ref_hidden = (pretend_gpu.OnGPU(torch.zeros(*shape, 64, dtype=dtype)) for _ in range(2))
        head = pretend_gpu.OnGPU(torch.zeros(vocab, 64, dtype=dtype))
        with pretend_gpu.PretendGPU():
            if bounds is not None:
                words["cu_seqlens"] = on_gpu(bounds)
            out = linear_dpo_loss(
                hidden.requires_grad_(),
                head.requires_grad_(head_learns),
                on_gpu(torch.zeros(shape, dtype=torch.int64)),
                ref_hidden=ref_hidden,
                ref_weight=head.detach(),
                **words,
                **settings,
            )
            out.loss.backward()

    steps = []
    for _ in range(STEPS):
        pairs, length = (int(n) for n in torch.randint(1, 40, (2,), generator=generator))
        shape = (2 * pairs * length,) if packed else (2 * pairs, length)
        bounds = torch.arange(2 * pairs + 1) * length if packed else None
        if "linear" in run:
            found.clear()
            with use_backend("triton"):
                linear_step(shape, bounds)
            steps.append(sorted(set(found)))
            continue
        logits = torch.zeros(*shape, vocab, dtype=dtype).requires_grad_()
        reference = {"ref_logits": torch.zeros(*shape, vocab, dtype=dtype)}
        if not has_logits:
            reference = {"ref_logps": place(torch.zeros(2 * pairs, dtype=torch.float64))}
        if bounds is not None:
            reference["cu_seqlens"] = place(bounds)
        found.clear()
        with use_backend("triton"):
            out = dpo_loss(
                logits,
                place(torch.zeros(shape, dtype=torch.int64)),
                beta=place(torch.full((pairs,), 0.1, dtype=torch.float64)),
                **reference,
                **settings,
            )
            out.loss.backward()
        steps.append(sorted(set(found)))
    return steps


@pytest.fixture(scope="module")
def recorded():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests"), environment.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", __file__], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("run", RUNS)
def test_no_step_after_the_first_compiles(run, recorded):
    first, *others = recorded[run]
    assert len(first) >= 3  # forward, pair loss, gradient
    for step, kernels in enumerate(others, start=1):
        new = [kernel for kernel in kernels if kernel not in first]
        assert not new, f"step {step} compiles again: {new[0]}, where the first step compiled {first}"


if __name__ == "__main__":
    print(json.dumps({name: specialisations(run) for name, run in RUNS.items()}))
