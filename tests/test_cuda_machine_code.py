"""Checks properties of the CUDA kernels' machine code on which their speed depends. Needs nvcc but no GPU.

`python -m benchmarks.machine_code_cuda` rewrites the committed figures (benchmarks/results/machine_code_cuda.json).
"""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from benchmarks import machine_code, machine_code_cuda
from dpo_kernels import _build

# Most instructions in the main loop per logit read. They include the update of the running maximum (2 x 9 instructions in a
# loop over 32 logits, twice that for a pair). It is inside the loop, but is skipped except in the first tiles of a row.
SLOTS = {
    "alone": 7.0,
    "entropy": 7.5,
    "entropy+accuracy+mean": 8.25,
    "log_sum_sq": 7.5,
    "reference+kl": 7.5,
    "reference, all statistics": 8.5,
    "reference, all statistics, log_sum_sq": 9.0,
    # Rows may begin at any element. So 32 logits need 20 loads and 16 shifts, while 4 loads suffice for aligned rows.
    "alone, V odd": 7.0,
    "entropy+accuracy+mean, V odd": 9.25,
    "reference, all statistics, V odd": 9.25,
    "logits_grad": 7.0,
    # Per logit read; two logits read (policy and reference) give one entry of the gradient.
    "logits_grad kl": 6.5,
    "logits_grad both divergences": 8.25,
    # Loading a float32 logit takes twice the time of a 16-bit logit, so more instructions are allowed.
    "fp32 reference, all statistics": 9.25,
    "softcap": 30.0,  # an accurate tanh costs 15 to 20
}
# Bytes in flight per SM that the newest card of an architecture needs for full bandwidth at a latency of 700 ns.
NEEDED = {80: 13 << 10, 90: 25 << 10, 100: 38 << 10}
# Resident threads per SM that these variants need; all other variants need 768.
THREADS = {"alone": 1024, "alone, V odd": 1024, "logits_grad": 1024, "logits_grad kl": 1024}


RELEASE = machine_code_cuda.nvcc_release()
if RELEASE is None and os.environ.get("CI"):
    raise RuntimeError("CI must have nvcc: the machine-code checks may not be skipped there")
needs_nvcc = pytest.mark.skipif(RELEASE is None, reason="no nvcc on this machine: the CUDA kernels cannot be compiled")


@functools.cache
def figures(arch: int) -> list[machine_code.Figures]:
    return [machine_code.inspect(kernel) for kernel in machine_code.cuda_kernels(arch)]


@pytest.fixture(scope="module", params=machine_code.ARCHITECTURES)
def rows(request) -> list[machine_code.Figures]:
    return figures(request.param)


def variant(name: str) -> str:
    """The key of SLOTS for a row's name."""
    if "softcap" in name:
        return "softcap"
    _, stage, _, *kind = name.split(maxsplit=3)
    return " ".join(kind if stage == "token_logps" else [stage, *kind])


@needs_nvcc
def test_nothing_spills_and_nothing_lives_in_local_memory(rows):
    assert {row.name for row in rows if row.spills or row.local_bytes} == set()


@needs_nvcc
def test_main_loops_stream(rows):
    """Only 128-bit accesses (32-bit ones in unaligned rows), no barrier, no shuffle, no float64."""
    streaming = [row for row in rows if row.loop_instructions is not None]
    assert len(streaming) == 22
    for row in streaming:
        if row.name.endswith("V odd"):
            assert (row.loads_128, row.loads_narrower) == (0, 20), row.name  # five 32-bit loads for each group of four
            rest = row.loop_barriers, row.loop_shuffles, row.loop_doubles
            assert rest == (0,) * 3, row.name
            continue
        assert row.loads_128 in (4, 8), row.name  # a thread has 4 in flight; the compiler may unroll once more
        stores = row.loads_128 if "logits_grad" in row.name else 0
        pair = variant(row.name).endswith("kl") or "both divergences" in row.name
        assert row.stores_128 == stores // (2 if pair else 1), row.name
        rest = row.loads_narrower, row.stores_narrower, row.loop_barriers, row.loop_shuffles, row.loop_doubles
        assert rest == (0,) * 5, row.name


@needs_nvcc
def test_issue_slots_occupancy_and_bytes_in_flight(rows):
    for row in rows:
        if row.loop_instructions is None:
            continue
        kind = variant(row.name)
        limit = SLOTS[kind] if "fp32" not in row.name else SLOTS.get(f"fp32 {kind}", SLOTS[kind])
        assert row.slots_per_logit <= limit, f"{row.name}: {row.slots_per_logit}"
        assert row.resident_threads >= THREADS.get(kind, 768), row.name
        if kind != "softcap":
            assert row.bytes_in_flight >= NEEDED[row.arch], row.name


@needs_nvcc
def test_predicted_shares_of_the_large_forward_are_those_argued_in_its_source():
    """The figures for [8192, 128256] bf16 at the head of csrc/cuda/token_logps.cuh match the compiled kernel."""
    shares = {}
    for arch in (90, 100):
        row = next(r for r in figures(arch) if r.name == "cuda token_logps bf16 alone")
        assert row.resident_threads == 1024
        assert (row.loop_instructions, row.bytes_in_flight) == (177, 64 << 10)
        shares |= row.bandwidth_share
    assert {card: tuple(round(s, 2) for s in pair) for card, pair in shares.items()} == {
        "H100": (0.98, 0.99),
        "H200": (0.84, 0.98),
        "B200": (0.58, 0.89),
    }


@needs_nvcc
def test_figures_are_the_committed_ones(rows):
    """The same compiler gives the same code in any folder, so every figure except the kernel's length must be equal.

    The loop, not the kernel's length, determines the speed. Any edit outside the loop, even of another kernel in the file,
    changes the length by an instruction or two. So the length may differ by 1 %.
    """
    committed = json.loads(machine_code_cuda.COMMITTED.read_text())
    held = {(row["name"], row["arch"]): row for row in committed["kernels"]}
    for row in rows:
        before = held[row.name, row.arch]
        now = json.loads(json.dumps(asdict(row)))
        if committed["nvcc"] == RELEASE:
            assert now.pop("instructions") == pytest.approx(before.pop("instructions"), rel=0.01), row.name
            assert now == before, f"{row.name}, sm_{row.arch}: python -m benchmarks.machine_code_cuda, if this is meant"
        else:  # another compiler may differ a little
            assert (now["slots_per_logit"] or 0) <= 1.1 * (before["slots_per_logit"] or 0), row.name


def listing(*arguments: str) -> str:
    return subprocess.run(
        [machine_code.tool("cuobjdump"), *arguments], capture_output=True, text=True, check=True
    ).stdout


@needs_nvcc
def test_ptx_runs_on_later_cards(cuda_library):
    """PTX of 100a would run on a B200, but on no later card."""
    compiled = set(re.findall(r"sm_\w+(?=\.cubin)", listing("-lelf", str(cuda_library))))
    # The linker adds an empty part for nvcc's default architecture.
    assert {f"sm_{arch}" for arch in _build.CUDA_ARCHS} <= compiled
    assert not any(arch.endswith(("a", "f")) for arch in compiled)
    assert set(re.findall(r"sm_\w+(?=\.ptx)", listing("-lptx", str(cuda_library)))) == {f"sm_{_build.CUDA_ARCHS[-1]}"}


@needs_nvcc
def test_no_variant_for_any_architecture_uses_the_stack(cuda_library):
    """`rows` covers only the common variants."""
    parts = re.split(r"arch = sm_(\w+)", listing("-res-usage", str(cuda_library)))[1:]
    by_arch: dict[str, list[tuple[str, str, str]]] = {}
    for arch, text in zip(parts[::2], parts[1::2], strict=True):
        by_arch.setdefault(arch, []).extend(re.findall(r"Function (\w+):\s+REG:\d+ STACK:(\d+) \S+ LOCAL:(\d+)", text))
    # The linker adds an empty part for nvcc's default architecture.
    assert {arch for arch, functions in by_arch.items() if functions} == set(_build.CUDA_ARCHS)
    assert all(len(by_arch[arch]) >= 80 for arch in _build.CUDA_ARCHS)
    frames = [frame for functions in by_arch.values() for frame in functions]
    assert {name for name, stack, local in frames if (stack, local) != ("0", "0")} == set()


@needs_nvcc
def test_library_loads_without_a_gpu(cuda_library):
    """The operators are registered, import works, and CPU tensors are refused."""
    script = (
        f"import torch; torch.ops.load_library({str(cuda_library)!r})\n"
        "x = torch.zeros(1, 1, dtype=torch.float64)\n"
        "try:\n    torch.ops.dpo_kernels_cuda.sequence_sums(x, x, None, x[0])\n"
        "except NotImplementedError as error:\n    print('refused', 'CPU' in str(error))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "refused True", done.stderr


def test_architectures_follow_the_environment(monkeypatch, tmp_path):
    fake = tmp_path / "nvcc"
    fake.write_text("#!/bin/sh\nprintf 'compute_80\\ncompute_90\\ncompute_100\\n'\n")
    fake.chmod(0o755)
    for name in ("DPO_KERNELS_CUDA_ARCHS", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    assert _build.cuda_archs(str(fake)) == ["80", "90", "100"]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;9.0a+PTX;9.0")
    assert _build.cuda_archs(str(fake)) == ["80", "90"]
    monkeypatch.setenv("DPO_KERNELS_CUDA_ARCHS", "100")
    assert _build.cuda_archs(str(fake)) == ["100"]
    monkeypatch.setenv("DPO_KERNELS_CUDA_ARCHS", "7.0")
    with pytest.raises(_build.BuildError, match="70"):
        _build.cuda_archs(str(fake))
    for device, arch in {(8, 0): "80", (8, 9): "80", (9, 0): "90", (10, 3): "100", (12, 0): "100"}.items():
        assert _build.arch_for_device(str(fake), device) == arch
    with pytest.raises(_build.BuildError, match=r"7\.5"):
        _build.arch_for_device(str(fake), (7, 5))
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    with pytest.raises(_build.BuildError, match="CUDA_HOME"):
        _build.nvcc_compiler()


@pytest.mark.parametrize(
    ("variables", "devices", "built"),
    [
        ({}, None, []),
        ({}, [(9, 0)], [".sm_90"]),
        ({}, [(7, 5), (8, 6), (9, 0)], [".sm_86", ".sm_90"]),
        ({}, [(7, 5)], []),
        ({}, [], [""]),
        ({"DPO_KERNELS_BUILD_CUDA": "1"}, None, [""]),
        ({"DPO_KERNELS_CUDA_ARCHS": "90"}, None, [""]),
        ({"DPO_KERNELS_CUDA_ARCHS": "90"}, [(8, 0)], [""]),
        ({"DPO_KERNELS_BUILD_CUDA": "0"}, [(9, 0)], []),
        ({"DPO_KERNELS_BUILD_CUDA": "0", "DPO_KERNELS_CUDA_ARCHS": "90"}, None, []),
    ],
)
def test_an_installation_compiles_cuda_for_the_gpu_in_sight_or_where_it_is_asked_to(
    variables, devices, built, monkeypatch
):
    for name in ("DPO_KERNELS_BUILD_CUDA", "DPO_KERNELS_CUDA_ARCHS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(_build, "devices_in_sight", lambda: devices)
    expected = [_build.library_path("cpu"), *(_build.library_path("cuda", variant) for variant in built)]
    assert list(_build.installed_libraries()) == expected


def test_the_gpus_in_sight_are_what_nvidia_smi_says(monkeypatch, tmp_path):
    smi = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", str(tmp_path))
    for answer, found in (("9.0\\n8.0\\n9.0\\n", [(8, 0), (9, 0)]), ("12.1\\n", [(12, 1)])):
        smi.write_text(f"#!/bin/sh\nprintf '{answer}'\n")
        smi.chmod(0o755)
        assert _build.devices_in_sight() == found
    # If nvidia-smi fails, the device files show whether there is a GPU.
    smi.write_text("#!/bin/sh\nexit 9\n")
    monkeypatch.setattr(Path, "glob", lambda self, pattern: iter([Path("/dev/nvidia0")]))
    assert _build.devices_in_sight() == []
    monkeypatch.setattr(Path, "glob", lambda self, pattern: iter(()))
    assert _build.devices_in_sight() is None


def test_a_library_for_the_gpu_at_hand_is_found_where_the_installation_put_it(monkeypatch, tmp_path):
    monkeypatch.setattr(_build, "PACKAGE", tmp_path)
    theirs = _build.library_path("cuda", _build.variant_of((8, 0)))
    ours = _build.library_path("cuda", _build.variant_of((9, 0)))
    for path in (theirs, ours):
        path.write_bytes(b"")
    assert _build.find_or_build("cuda", pytest.fail, pytest.fail, _build.variant_of((9, 0))) == ours
