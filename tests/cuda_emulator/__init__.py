"""Runs csrc/cuda on the CPU: builds the emulator library and calls the backend's stages in it.

`Emulator()` has the functions of `dpo_kernels.backends.cuda` under the same names, so tests can use it as a backend. The
library is compiled once for each state of the sources and each variant, into the folder `DPO_EMULATOR_CACHE` or the
temporary folder. `DPO_EMULATOR_FLAGS` holds additional compiler flags, for example to measure coverage
(benchmarks/coverage.py).
"""

from __future__ import annotations

import ctypes
import enum
import hashlib
import os
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dpo_kernels import _build, backends
from dpo_kernels.backends import cuda
from dpo_kernels.stages import STATISTICS, TokenKL, Transform, token_rows

HERE = Path(__file__).resolve().parent
CSRC = HERE.parent.parent / "csrc"
SANITIZERS = "address,undefined"
DTYPES = {torch.float32: 0, torch.bfloat16: 2, torch.float16: 3}

# Number of SMs that the launch heuristics see by default: an H100's.
SM_COUNT = 132


class Order(enum.IntEnum):
    """The order in which the emulator resumes threads and blocks."""

    FORWARD = 0
    REVERSE = 1
    RANDOM = 2


def cuda_include() -> Path:
    """Folder of CUDA's host headers (cuda_bf16.h). Raises RuntimeError if CUDA is not installed."""
    nvcc = shutil.which("nvcc")
    roots = [os.environ.get("CUDA_HOME"), str(Path(nvcc).resolve().parent.parent) if nvcc else None, "/usr/local/cuda"]
    for root in filter(None, roots):
        if (Path(root) / "include" / "cuda_bf16.h").exists():
            return Path(root) / "include"
    raise RuntimeError("the CUDA emulator needs CUDA's headers: install the CUDA toolkit or set CUDA_HOME")


#: Translation units and their flags: those of the real build, and harness.cpp with the exported functions.
UNITS = (*((CSRC / "cuda" / source, flags) for source, flags in _build.CUDA_UNITS), (HERE / "harness.cpp", []))


def build_operators(emulator: Path | None = None) -> Path:
    """Compile csrc/cuda/ops.cpp over the emulator: `torch.ops.dpo_kernels_cuda_emulated`, for CPU tensors.

    With this library in place of the real one, all of `dpo_kernels.backends.cuda` runs, from Python to the kernels.
    """
    # As in `build`, coverage files of other variants would replace those of the default variant.
    further = os.environ.get("DPO_EMULATOR_FLAGS", "").split() if emulator is None else []
    emulator = emulator or build()
    target = emulator.with_name(emulator.stem.replace("emulator", "operators") + ".so")
    if not target.exists():
        torch_dir = _build.torch_folder()
        command = [
            _build.cxx_compiler(), "-std=c++17", "-fPIC", "-O1", "-shared", "-DDPO_EMULATOR", *_build.ABI_FLAGS,
            *_build.include_flags(torch_dir), f"-I{HERE}", "-isystem", str(cuda_include()), str(CSRC / "cuda" / "ops.cpp"),
            str(emulator), f"-Wl,-rpath,{emulator.parent}", f"-L{torch_dir / 'lib'}", "-ltorch_cpu",
            *further, "-o", f"{target}.{os.getpid()}",
        ]  # fmt: skip
        _run(*command)
        os.replace(f"{target}.{os.getpid()}", target)
    return target


def serve_backend(patch: pytest.MonkeyPatch) -> None:
    """Make the backend "cuda" run CPU tensors on the emulator, until the patch ends."""
    torch.ops.load_library(str(build_operators()))
    Emulator().configure()
    patch.setattr(cuda, "_kernels", torch.ops.dpo_kernels_cuda_emulated)
    original = backends._attempt
    patch.setattr(backends, "_attempt", lambda name, kind: cuda if name == "cuda" else original(name, kind))


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"the emulator does not compile:\n{done.stderr[-4000:]}")


def build(*, sanitize: bool = False, defines: tuple[str, ...] = ()) -> Path:
    """Compile the emulator library, unless it is up to date, and return its path."""
    sources = sorted([*HERE.glob("*.h"), *HERE.glob("*.cuh"), *HERE.glob("*.cpp")])
    sources += sorted([*(CSRC / "cuda").glob("*.*"), *(CSRC / "common").glob("*.h")])
    flags = [
        "-std=c++17",
        "-fPIC",
        "-DDPO_EMULATOR",
        "-Wno-unknown-pragmas",
        f"-I{HERE}",
        "-isystem",
        str(cuda_include()),
    ]
    # Sanitized code is not optimised, because it then compiles three times faster and its table is small.
    flags += ["-O0", "-g1", f"-fsanitize={SANITIZERS}", "-fno-sanitize-recover=undefined"] if sanitize else ["-O1"]
    flags += [f"-D{d}" for d in defines]
    if not (sanitize or defines):  # coverage files of other variants would replace those of this one
        flags += os.environ.get("DPO_EMULATOR_FLAGS", "").split()
    digest = hashlib.sha256(" ".join(flags).encode())
    for path in sources:
        digest.update(path.name.encode() + path.read_bytes())
    folder = Path(os.environ.get("DPO_EMULATOR_CACHE") or Path(tempfile.gettempdir()) / f"dpo_emulator_{os.getuid()}")
    _build.make_private(folder)
    _build.check_private(folder / "emulator.so")
    target = folder / f"emulator_{digest.hexdigest()[:16]}.so"
    if target.exists():
        return target
    cxx = os.environ.get("CXX", "g++")

    with tempfile.TemporaryDirectory(dir=folder) as scratch, ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = [f"{scratch}/{i}.o" for i in range(len(UNITS))]

        def compile_unit(i: int) -> None:
            source, own = UNITS[i]
            _run(cxx, *flags, *own, "-x", "c++", "-c", str(source), "-o", objects[i])

        list(pool.map(compile_unit, range(len(UNITS))))
        library = f"{scratch}/library.so"
        _run(cxx, "-shared", *flags, *objects, "-o", library)
        os.replace(library, target)
    return target


def _struct(name: str, fields: str) -> type[ctypes.Structure]:
    """A ctypes.Structure from lines of "type name" as in csrc/cuda/params.h."""
    types = {
        "ptr": ctypes.c_void_p,
        "i64": ctypes.c_int64,
        "int": ctypes.c_int,
        "f32": ctypes.c_float,
        "f64": ctypes.c_double,
    }
    parsed = []
    for field in fields.split(";"):
        kind, names = field.split(maxsplit=1)
        parsed += [(n.strip(), globals()[kind] if kind[0].isupper() else types[kind]) for n in names.split(",")]
    return type(name, (ctypes.Structure,), {"_fields_": parsed})


Logits = _struct("Logits", "ptr data; int dtype; i64 stride_b, stride_t")
Weights = _struct("Weights", "ptr labels; i64 ignore_index; ptr given")
ROWS = token_rows(True, STATISTICS)
TokenLogpsParams = _struct(
    "TokenLogpsParams",
    f"Logits policy, reference; ptr labels, {', '.join(ROWS)};"
    "i64 batch, tokens, vocab, ignore_index; f32 logit_scale, logit_softcap; ptr to_clear",
)
PreferenceLossParams = _struct(
    "PreferenceLossParams",
    "ptr logps, ref_logps; i64 tokens; Weights weights; ptr cu_seqlens, given_ref_sums, betas, label_smoothings;"
    "f64 beta, label_smoothing; i64 pairs; int robust; ptr losses, sums, ref_sums, coef, rewards, counts, means;"
    "ptr first_values; i64 values; int statistics; ptr pair_weights; f64 divisor; ptr loss, pairs_done",
)
SequenceSumsParams = _struct("SequenceSumsParams", "ptr values, weights, cu_seqlens, sums; i64 sequences, tokens")
SpreadParams = _struct(
    "SpreadParams",
    "Weights weights; ptr cu_seqlens, coef, grad_loss; i64 grad_stride; ptr pair_weights; f64 divisor; i64 pairs",
)
LogitsGradParams = _struct(
    "LogitsGradParams",
    "Logits logits; ptr out; i64 out_stride_b, out_stride_t; ptr labels, logps, max, log_sum, grad_logps;"
    "SpreadParams spread; Logits reference; ptr ref_logps, ref_max, ref_log_sum, kl, grad_kl, grad_forward_kl;"
    "i64 batch, tokens, vocab, ignore_index; f32 logit_scale, logit_softcap",
)


class EmulatorError(RuntimeError):
    """A launch that would fail, hang or have undefined behaviour on a GPU."""


def _address(tensor: Tensor | None) -> int | None:
    # An empty tensor has no storage, but "given and empty" must not look like "not given".
    if tensor is None:
        return None
    return tensor.data_ptr() or ctypes.addressof(_PLACEHOLDER)


_PLACEHOLDER = ctypes.c_double()


def _logits(tensor: Tensor | None) -> ctypes.Structure:
    if tensor is None:
        return Logits(None, 0, 0, 0)
    return Logits(_address(tensor), DTYPES[tensor.dtype], tensor.stride(0), tensor.stride(1))


class Emulator:
    """Runs the backend's stages with the emulated kernels.

    order, seed, resident: the schedule. sm_count, clusters: the device that the launch heuristics see. code_arch: the
    architecture for which the kernels seem to be compiled, which may be older than the device.
    """

    def __init__(
        self,
        library: Path | None = None,
        *,
        order: Order = Order.FORWARD,
        seed: int = 0,
        resident: int = 2,
        sm_count: int = SM_COUNT,
        clusters: bool = True,
        code_arch: int = 90,
    ) -> None:
        self.lib = ctypes.CDLL(str(library or build()))
        self.lib.emu_error.restype = ctypes.c_char_p
        self.lib.emu_launches.restype = ctypes.c_int64
        self.lib.emu_memsets.restype = ctypes.c_int64
        self.schedule = (int(order), ctypes.c_uint64(seed), resident, code_arch)
        self.device = (sm_count, int(clusters))

    def configure(self) -> None:
        """Use this schedule for all following launches, including those of `build_operators`' library."""
        self.lib.emu_configure(*self.schedule)

    def call(self, name: str, *args: object) -> None:
        """Run an exported function. If it fails, raise EmulatorError with the emulator's reason."""
        self.configure()
        code = getattr(self.lib, name)(*args)
        if code != 0:
            raise EmulatorError(f"{name}: error {code}: {self.lib.emu_error().decode()}")

    def launches(self) -> int:
        """Kernel launches so far."""
        return self.lib.emu_launches()

    def memsets(self) -> int:
        """Asynchronous memsets so far."""
        return self.lib.emu_memsets()

    def plan_rows(self, rows: int, vocab: int, logits_per_thread: int, max_threads: int = 256) -> tuple[int, int]:
        """(threads per block, blocks) for each row."""
        out = (ctypes.c_int * 2)()
        self.lib.emu_plan_rows(
            ctypes.c_int64(rows), ctypes.c_int64(vocab), logits_per_thread, max_threads, *self.device, out
        )
        return out[0], out[1]

    def token_logps(
        self,
        logits: Tensor,
        labels: Tensor,
        ref_logits: Tensor | None,
        transform: Transform,
        statistics: tuple[str, ...],
        *,
        vocab: int | None = None,
    ) -> Tensor:
        """Stage 1. vocab: a wrong vocabulary size that is passed to the kernel."""
        names = token_rows(ref_logits is not None, statistics)
        # Filled with NaN, so that an output that a kernel does not write is noticed.
        tokens = torch.full((len(names), *labels.shape), float("nan"), dtype=torch.float64)
        addresses = dict(zip(names, map(_address, tokens.unbind(0)), strict=True))
        params = TokenLogpsParams(
            _logits(logits), _logits(ref_logits), _address(labels), *map(addresses.get, ROWS),
            *logits.shape[:2], vocab or logits.shape[2], *transform,
        )  # fmt: skip
        self.call("emu_token_logps", ctypes.byref(params), *self.device)
        return tokens

    def preference_loss(
        self,
        logps: Tensor,
        ref_logps: Tensor | None,
        weights: Tensor,
        cu_seqlens: Tensor | None,
        ref_sums: Tensor | None,
        beta: Tensor,
        label_smoothing: Tensor,
        robust: bool,
    ) -> tuple[Tensor, ...]:
        """Stage 2: (losses, sums, ref_sums, coef)."""
        pairs = beta.shape[0]
        outputs = tuple(torch.full((n,), float("nan"), dtype=torch.float64) for n in (pairs, *[2 * pairs] * 3))
        params = PreferenceLossParams(
            _address(logps), _address(ref_logps), logps.shape[1], Weights(given=_address(weights)),
            *map(_address, (cu_seqlens, ref_sums, beta, label_smoothing)), 0.0, 0.0, pairs, int(robust),
            *map(_address, outputs),
        )  # fmt: skip
        self.call("emu_preference_loss", ctypes.byref(params))
        return outputs

    def sequence_sums(self, values: Tensor, weights: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        """Weighted sum over each sequence."""
        sequences = values.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        sums = torch.full((sequences,), float("nan"), dtype=torch.float64)
        params = SequenceSumsParams(
            _address(values), _address(weights), _address(cu_seqlens), _address(sums), sequences, values.shape[1]
        )
        self.call("emu_sequence_sums", ctypes.byref(params))
        return sums

    def logits_grad(
        self,
        logits: Tensor,
        labels: Tensor,
        logps: Tensor,
        top: Tensor,
        log_sum: Tensor,
        grad_logps: Tensor,
        transform: Transform,
        out: Tensor,
        token_kl: TokenKL | None = None,
    ) -> None:
        """Stage 3: writes the gradient into `out`, which may be `logits`."""
        ref_logits, *of_reference = (None,) * len(TokenKL._fields) if token_kl is None else token_kl
        params = LogitsGradParams(
            _logits(logits), _address(out), out.stride(0), out.stride(1), _address(labels), _address(logps),
            _address(top), _address(log_sum), _address(grad_logps), SpreadParams(),
            _logits(ref_logits), *map(_address, of_reference), *logits.shape, *transform,
        )  # fmt: skip
        self.call("emu_logits_grad", ctypes.byref(params), *self.device)
