"""The CUDA library's rows of the machine-code registry: the kernels, and how they are compiled.

    python -m benchmarks.machine_code_cuda     rewrites the committed figures, which tests/test_cuda_machine_code.py checks

One call of nvcc per source and architecture compiles all rows (no GPU is needed); the symbol finds a row in its cubin.
"""

from __future__ import annotations

import functools
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from dpo_kernels import _build

from .machine_code import ARCHITECTURES, Binary, Kernel, inspect

COMMITTED = Path(__file__).parent / "results" / "machine_code_cuda.json"

#: Threads of a block: kRowThreads of token_logps.cuh, kGradThreads of logits_grad.cu.
ROW_THREADS = 256
GRAD_THREADS = 256

_NAMES = {"bf16": "__nv_bfloat16", "fp16": "__half", "fp32": "float"}
_SIZES = {"bf16": 2, "fp16": 2, "fp32": 4}

# name, policy, reference, entropy, mean, squares, softcap. The loop's loads give the logits of an iteration.
FORWARD = (
    ("alone", "bf16", None, False, False, False, False),
    ("entropy", "bf16", None, True, False, False, False),
    ("entropy+accuracy+mean", "bf16", None, True, True, False, False),
    ("log_sum_sq", "bf16", None, False, False, True, False),
    ("reference+kl", "bf16", "bf16", False, False, False, False),
    ("reference, all statistics", "bf16", "bf16", True, True, False, False),
    ("reference, all statistics, log_sum_sq", "bf16", "bf16", True, True, True, False),
    ("all statistics, softcap", "bf16", None, True, True, False, True),
    ("alone", "fp16", None, False, False, False, False),
    ("alone", "fp32", None, False, False, False, False),
    ("reference, all statistics", "fp32", "fp32", True, True, False, False),
)

#: The same kernels' loops for rows that begin at any element; most of their loads hit L1.
SHIFTED = (
    ("alone", None, False, False, False, False),
    ("entropy+accuracy+mean", None, True, True, False, False),
    ("reference, all statistics", "bf16", True, True, False, False),
)


def _mangled(name: str) -> str:
    plain = _NAMES[name]
    return "f" if plain == "float" else f"{len(plain)}{plain}"


def _symbol(stage: str, traits: str, params: str, policy: str, reference: str | None, *flags: bool) -> str:
    """A row kernel's symbol (Itanium C++ ABI)."""
    if reference is None:
        second = "NS0_11NoReferenceE"
    elif reference == policy and policy != "fp32":
        second = "S3_"  # the same class type again
    else:
        second = _mangled(reference)
    booleans = "".join(f"Lb{int(f)}E" for f in flags)
    kernel, argument = f"{stage}_kernel", f"{len(params)}{params}"
    return f"_ZN3dpo4cuda{len(kernel)}{kernel}INS0_{len(traits)}{traits}I{_mangled(policy)}{second}{booleans}EEEEvNS0_{argument}E"


def _traits(policy: str, reference: str | None, *flags: bool) -> tuple[str, str]:
    """A forward kernel's template argument in C++, and its symbol."""
    other = "NoReference" if reference is None else _NAMES[reference]
    source = f"Traits<{_NAMES[policy]}, {other}, {', '.join(str(f).lower() for f in flags)}>"
    return source, _symbol("token_logps", "Traits", "TokenLogpsParams", policy, reference, *flags)


# name, dtype, reference, softcap, forward KL. Traffic per logit with a reference: two reads and a write.
BACKWARD = (
    ("", "bf16", None, False, False),
    ("softcap", "bf16", None, True, False),
    ("", "fp16", None, False, False),
    ("", "fp32", None, False, False),
    ("kl", "bf16", "bf16", False, False),
    ("both divergences", "bf16", "bf16", False, True),
    ("both divergences", "fp32", "fp32", False, True),
    ("both divergences, softcap", "bf16", "bf16", True, True),
)


def _forward_source() -> str:
    lines = ['#include "token_logps.cuh"', "namespace dpo::cuda {"]
    for _, *arguments in FORWARD:
        traits, _symbol = _traits(*arguments)
        lines.append(
            f"template __global__ void token_logps_kernel<{traits}>(const __grid_constant__ TokenLogpsParams);"
        )
    return "\n".join([*lines, "}", ""])


@functools.cache
def _compile(source: str, arch: int) -> bytes:
    """The cubin of a file of csrc/cuda, or of all forward kernels of the table ("forward")."""
    nvcc = _build.nvcc_compiler()
    folder = _build.CSRC / "cuda"
    with tempfile.TemporaryDirectory() as scratch:
        path = folder / source
        if source == "forward":
            path = Path(scratch) / "forward.cu"
            path.write_text(_forward_source())
        cubin = Path(scratch) / "kernels.cubin"
        command = [
            nvcc,
            "-O3",
            "-std=c++17",
            f"-arch=sm_{arch}",
            f"-I{folder}",
            "-cubin",
            "-o",
            str(cubin),
            str(path),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"nvcc could not compile {source} for sm_{arch}:\n{done.stderr[-2000:]}")
        return cubin.read_bytes()


@dataclass(frozen=True)
class _Cubin:
    source: str
    arch: int

    def __call__(self) -> Binary:
        return Binary(_compile(self.source, self.arch))


def cuda_kernels(arch: int) -> Iterator[Kernel]:
    """The CUDA library's kernels for an architecture."""
    for name, policy, reference, *flags in FORWARD:
        size = _SIZES[policy]
        yield Kernel(
            f"cuda token_logps {policy} {name}", arch, _Cubin("forward", arch), ROW_THREADS, size, moved_bytes=size,
            function=_traits(policy, reference, *flags)[1], tensors=1 if reference is None else 2,
        )  # fmt: skip
    for name, reference, *flags in SHIFTED:
        yield Kernel(
            f"cuda token_logps bf16 {name}, V odd", arch, _Cubin("forward", arch), ROW_THREADS, 2, moved_bytes=2,
            function=_traits("bf16", reference, *flags)[1], logits_per_iteration=32, narrow=True,
            tensors=1 if reference is None else 2,
        )  # fmt: skip
    for name, dtype, reference, *flags in BACKWARD:
        size = _SIZES[dtype]
        # Bytes per logit that is read: with a reference, two logits are read for each that is written.
        moved = 2 * size if reference is None else 3 * size // 2
        yield Kernel(
            f"cuda logits_grad {dtype} {name}".strip(), arch, _Cubin("logits_grad.cu", arch), GRAD_THREADS, size,
            moved_bytes=moved, tensors=1 if reference is None else 2,
            function=_symbol("logits_grad", "GradTraits", "LogitsGradParams", dtype, reference, *flags),
        )  # fmt: skip
    for stage, threads, params in (
        ("preference_loss", 512, "PreferenceLossParams"),
        ("sequence_sums", 256, "SequenceSumsParams"),
    ):
        kernel = f"{stage}_kernel"
        symbol = f"_ZN3dpo4cuda{len(kernel)}{kernel}ENS0_{len(params)}{params}E"
        yield Kernel(f"cuda {stage}", arch, _Cubin("preference_loss.cu", arch), threads, function=symbol, streams=False)


def nvcc_release() -> str | None:
    """Release of the CUDA compiler ("13.0"), or None if there is none."""
    try:
        nvcc = _build.nvcc_compiler()
    except _build.BuildError:
        return None
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"release ([\d.]+)", text)
    return found.group(1) if found else "unknown"


def main() -> None:
    rows = [asdict(inspect(kernel)) for arch in ARCHITECTURES for kernel in cuda_kernels(arch)]
    COMMITTED.write_text(json.dumps({"nvcc": nvcc_release(), "kernels": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
