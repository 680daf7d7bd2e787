"""What the compiled GPU kernels look like, read from their cubins: the speed argument that a machine without a GPU can check.

    python -m benchmarks.machine_code [--arch 80 90 100] [--only TEXT] [--json FILE]

One registry of compiled kernels (`SOURCES`) drives the table, the JSON and the tests. For every kernel: registers,
spills, shared memory, occupancy, and for its main loop (the one that streams logits without masks): instructions and
MUFU per logit, barriers, shuffles, 128-bit loads and stores, loads issued before the first use.

A streaming kernel reaches the memory's rate only if its instructions issue faster than its bytes arrive and if enough
bytes are under way (Little's law), so the share of a card's bandwidth is predicted as

    min(1, issue budget / slots, MUFU budget / MUFU, bytes in flight / bytes needed)

with, per logit and at full bandwidth, issue budget = SMs x 4 x 32 x clock / (bandwidth / bytes moved per logit), MUFU
budget likewise with 16 lanes per SM, and bytes needed = bandwidth x latency / SMs, the share of it that is reads. Bytes
in flight are an average over an iteration: a warp's loads are under way for the latency, and not while it computes.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ARCHITECTURES = (80, 90, 100)
RESULTS = Path(__file__).parent / "results" / "machine_code.json"

#: Time from issuing a load to its data under a loaded memory system, seconds.
LATENCY = 700e-9


@dataclass(frozen=True)
class Card:
    """Peak figures of a card: SMs, clock in Hz, memory bandwidth in bytes/s, for which architecture's code."""

    sms: int
    clock: float
    bandwidth: float
    arch: int


CARDS = {
    "A100": Card(108, 1.41e9, 2.0e12, 80),
    "H100": Card(132, 1.755e9, 3.35e12, 90),
    "H200": Card(132, 1.755e9, 4.8e12, 90),
    "B200": Card(148, 1.85e9, 8.0e12, 100),
}

#: Per SM: registers, shared memory in bytes, resident threads and blocks.
_REGISTERS = 65536
_SHARED = {80: 164 << 10, 90: 228 << 10, 100: 228 << 10}
_MAX_THREADS = 2048
_MAX_BLOCKS = 32


@dataclass(frozen=True)
class Binary:
    """A cubin, and the bytes of shared memory that a launch adds to the cubin's own."""

    code: bytes
    dynamic_shared: int = 0


@dataclass(frozen=True)
class Kernel:
    """One compiled kernel of the registry.

    name: what the table calls it. arch: 80, 90, 100. cubin: returns the binary, compiling it if need be.
    threads: per block. logit_bytes: size of one logit. moved_bytes: read and written per logit that is read.
    function: the kernel's symbol where the cubin holds several, else None. logits_per_iteration: of the main loop, per
    thread; None to take it from the widths of the loop's loads (every logit loaded once). streams: False for kernels that
    read no logits, which have no main loop to judge. multiplies: a product of matrices, judged by its tensor instructions
    and asynchronous copies. narrow: judge the loop for rows that 128-bit loads cannot read.
    """

    name: str
    arch: int
    cubin: Callable[[], Binary]
    threads: int
    logit_bytes: int = 2
    moved_bytes: int = 2
    function: str | None = None
    logits_per_iteration: int | None = None
    streams: bool = True
    narrow: bool = False
    multiplies: bool = False


@dataclass(frozen=True)
class Figures:
    """What a cubin shows; *_loop and per-logit figures are of the main loop, None for kernels that stream nothing."""

    name: str
    arch: int
    registers: int
    spills: int
    local_bytes: int
    shared_bytes: int
    threads: int
    resident_threads: int
    instructions: int
    loop_instructions: int | None
    logits_per_iteration: int | None
    slots_per_logit: float | None
    mufu_per_logit: float | None
    loop_barriers: int | None
    loop_shuffles: int | None
    loop_doubles: int | None
    loads_128: int | None
    loads_narrower: int | None
    stores_128: int | None
    stores_narrower: int | None
    loads_before_use: int | None
    bytes_in_flight: int | None
    bandwidth_share: dict[str, float] | None
    tensor_instructions: int | None = None
    async_copies: int | None = None
    async_narrower: int | None = None


def tool(name: str) -> str:
    """Path of nvdisasm or cuobjdump: the ones Triton ships."""
    import triton.backends.nvidia

    return str(Path(triton.backends.nvidia.__file__).parent / "bin" / name)


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


# Listing --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Listing:
    """A kernel's SASS: instructions in order, and for every label the index of the instruction after it."""

    code: list[str]
    labels: dict[str, int]

    def loops(self) -> Iterator[list[str]]:
        """The body of every loop, from its label to its backward branch, that holds no smaller loop."""
        spans = []
        for end, instruction in enumerate(self.code):
            target = re.search(r"\bBRA\b.*?(\.L_x_\d+)", instruction)
            if target and self.labels.get(target.group(1), end + 1) <= end:
                spans.append((self.labels[target.group(1)], end))
        for begin, end in spans:
            if self.code[end] != self.code[begin] and not any(
                begin <= b and e <= end and (b, e) != (begin, end) for b, e in spans
            ):
                yield self.code[begin : end + 1]


def disassemble(path: str, function: str | None) -> Listing:
    """The SASS of one kernel of a cubin file."""
    code: list[str] = []
    labels: dict[str, int] = {}
    inside = function is None
    for line in _output(tool("nvdisasm"), "-c", path).splitlines():
        if section := re.match(r"\s*\.section\s+\.text\.([^,\s]+)", line):
            inside = function is None or section.group(1) == function
        elif not inside:
            continue
        elif label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label.group(1)] = len(code)
        elif instruction := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            code.append(instruction.group(1).strip())
    return Listing(code, labels)


def opcode(instruction: str) -> str:
    """The operation with its modifiers, the guarding predicate removed: "LDG.E.128"."""
    return re.sub(r"^@!?U?P\w+\s+", "", instruction).split()[0]


def _width(instruction: str) -> int:
    """Bytes per thread of a memory instruction."""
    parts = opcode(instruction).split(".")
    for bits in (256, 128, 64):
        if str(bits) in parts:
            return bits // 8
    return {"U8": 1, "S8": 1, "U16": 2, "S16": 2}.get(
        next((p for p in parts if p[:1] in "US" and p[1:].isdigit()), ""), 4
    )


def _is_load(instruction: str) -> bool:
    return opcode(instruction).split(".")[0] in ("LDG", "LDGSTS", "UBLKCP", "UTMALDG")


def main_loop(listing: Listing, narrow: bool = False) -> list[str]:
    """The loop that streams logits: the one that reads most bytes from global memory without a predicate on the load.

    A kernel may hold one for aligned rows and another for all rows; `narrow` asks for the latter, without 128-bit loads.
    """

    def unguarded_bytes(loop: list[str]) -> tuple[int, int, int, int]:
        loads = [instruction for instruction in loop if _is_load(instruction)]
        free = [_width(i) for i in loads if not i.startswith("@")]
        return sum(w for w in free if w == 16), sum(free), sum(map(_width, loads)), -len(loads)

    def wide(loop: list[str]) -> bool:
        return any(_is_load(i) and _width(i) == 16 for i in loop)

    return max((loop for loop in listing.loops() if not (narrow and wide(loop))), key=unguarded_bytes, default=[])


def _registers_of(instruction: str) -> Iterator[str]:
    yield from re.findall(r"\bR\d+\b", instruction)


def loads_before_use(loop: list[str]) -> tuple[int, int]:
    """(loads, bytes per thread) asked for before the first instruction that waits for one of them."""
    pending: set[int] = set()
    count = asked = 0
    for instruction in loop:
        used = {int(r[1:]) for r in _registers_of(instruction)}
        if _is_load(instruction):
            destination = int(next(_registers_of(instruction), "R0")[1:])
            if opcode(instruction).startswith("LDG."):
                if (used - {destination}) & pending:
                    break
                pending |= set(range(destination, destination + max(1, _width(instruction) // 4)))
            count += 1
            asked += _width(instruction)
        elif used & pending:
            break
    return count, asked


# Figures --------------------------------------------------------------------------------------------------------------


def occupancy(registers: int, threads: int, shared: int, arch: int) -> int:
    """Resident threads per SM. Registers are handed out 256 at a time to each warp, shared memory with 1 KB a block."""
    warps = -(-threads // 32)
    per_warp = -(-registers * 32 // 256) * 256
    blocks = min(
        _REGISTERS // (per_warp * warps),
        _SHARED[arch] // (shared + 1024),
        _MAX_THREADS // (warps * 32),
        _MAX_BLOCKS,
    )
    return blocks * warps * 32


def _resources(path: str, function: str | None) -> dict[str, int]:
    current = None
    for line in _output(tool("cuobjdump"), "--dump-resource-usage", path).splitlines():
        if name := re.match(r"\s*Function\s+(\S+?):?$", line):
            current = name.group(1)
        elif "REG:" in line and (function is None or current == function):
            return {key: int(value) for key, value in re.findall(r"([A-Z]+(?:\[\d\])?):(\d+)", line)}
    raise ValueError(f"{path}: no resource usage of {function or 'a kernel'}")


def bandwidth_share(kernel: Kernel, slots: float, mufu: float, in_flight: int, instructions: int) -> dict[str, float]:
    """Predicted share of the memory bandwidth, for the cards of this kernel's architecture."""
    shares = {}
    for name, card in CARDS.items():
        if card.arch == kernel.arch:
            cycles = card.sms * card.clock * kernel.moved_bytes / card.bandwidth
            needed = card.bandwidth * LATENCY / card.sms * kernel.logit_bytes / kernel.moved_bytes
            waiting = LATENCY / (LATENCY + instructions / card.clock)
            shares[name] = round(min(1.0, cycles * 128 / slots, cycles * 16 / mufu, in_flight * waiting / needed), 3)
    return shares


def inspect(kernel: Kernel) -> Figures:
    """Compile a kernel of the registry, if need be, and read its figures."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        binary = kernel.cubin()
        file.write(binary.code)
        file.flush()
        resources = _resources(file.name, kernel.function)
        listing = disassemble(file.name, kernel.function)
    shared = resources.get("SHARED", 0) + binary.dynamic_shared
    resident = occupancy(resources["REG"], kernel.threads, shared, kernel.arch)
    spills = sum(opcode(i).split(".")[0] in ("LDL", "STL") for i in listing.code)
    figures: dict[str, Any] = {
        "name": kernel.name,
        "arch": kernel.arch,
        "registers": resources["REG"],
        "spills": spills,
        "local_bytes": resources.get("LOCAL", 0) + resources.get("STACK", 0),
        "shared_bytes": shared,
        "threads": kernel.threads,
        "resident_threads": resident,
        "instructions": sum(opcode(i) != "NOP" for i in listing.code),
    }
    if kernel.multiplies:
        operations = [opcode(i) for i in listing.code]
        copies = [i for i in listing.code if opcode(i).split(".")[0] == "LDGSTS"]
        figures |= {
            "tensor_instructions": sum(o.split(".")[0] in ("HMMA", "HGMMA", "UTCHMMA") for o in operations),
            "async_copies": sum(_width(i) == 16 for i in copies),
            "async_narrower": sum(_width(i) < 16 for i in copies),
        }
    if not kernel.streams:
        return Figures(**figures, **{name: None for name in Figures.__dataclass_fields__ if name not in figures})
    loop = main_loop(listing, kernel.narrow)
    operations = [opcode(i).split(".")[0] for i in loop]
    loads = [_width(i) for i in loop if _is_load(i)]
    stores = [_width(i) for i in loop if opcode(i).split(".")[0] == "STG"]
    logits = kernel.logits_per_iteration or sum(loads) // kernel.logit_bytes
    if not logits:
        raise ValueError(f"{kernel.name}, sm_{kernel.arch}: no loop that loads logits was found")
    slots = len(loop) / logits
    mufu = operations.count("MUFU") / logits
    waiting, asked = loads_before_use(loop)
    # In unaligned rows neighbouring loads share words, which are under way once.
    in_flight = min(asked, logits * kernel.logit_bytes) * resident
    return Figures(
        **figures,
        loop_instructions=len(loop),
        logits_per_iteration=logits,
        slots_per_logit=round(slots, 3),
        mufu_per_logit=round(mufu, 3),
        loop_barriers=sum(o in ("BAR", "SYNCS", "WARPSYNC") for o in operations),
        loop_shuffles=operations.count("SHFL"),
        loop_doubles=sum(o in ("DADD", "DMUL", "DFMA", "DSETP") for o in operations),
        loads_128=sum(width == 16 for width in loads),
        loads_narrower=sum(width < 16 for width in loads),
        stores_128=sum(width == 16 for width in stores),
        stores_narrower=sum(width < 16 for width in stores),
        loads_before_use=waiting,
        bytes_in_flight=in_flight,
        bandwidth_share=bandwidth_share(kernel, slots, mufu, in_flight, len(loop)),
    )


# Registry -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _TritonCubin:
    """Compiles one of the backend's launches ahead of time; no GPU is needed."""

    launch: Any
    arch: int

    def __call__(self) -> Binary:
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        types, constants, attributes = self.launch.signature()
        source = ASTSource(self.launch.kernel, types, constants, attributes)
        compiled = triton.compile(source, target=GPUTarget("cuda", self.arch, 32), options=self.launch.options)
        return Binary(compiled.asm["cubin"], compiled.metadata.shared)


def triton_kernels(arch: int) -> Iterator[Kernel]:
    """The Triton backend's kernels, built from the launches that a real call would make, on tensors without data."""
    import torch

    from dpo_kernels.backends.eager import TokenKL
    from dpo_kernels.backends.triton.launch import LANES
    from dpo_kernels.backends.triton.logits_grad import logits_grad_launch
    from dpo_kernels.backends.triton.preference_loss import preference_loss_launches, sequence_sums_launches
    from dpo_kernels.backends.triton.token_logps import token_logps_launch

    def empty(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    labels, small = empty(8, 1024, dtype=torch.int64), empty(8, 1024)
    names = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
    plain = {"ignore_index": -100, "logit_scale": 1.0, "logit_softcap": 0.0}
    capped = dict(plain, logit_softcap=30.0)

    def streaming(name: str, launch: Any, logit_bytes: int, moved_bytes: int) -> Kernel:
        tensors = 1 if launch.arguments.get("ref_logits") is None else 2
        logits = launch.arguments["UNROLL"] * launch.arguments["GROUP"] * tensors
        cubin = _TritonCubin(launch, arch)
        return Kernel(name, arch, cubin, LANES, logit_bytes, moved_bytes, logits_per_iteration=logits)

    def forward(name: str, dtype: torch.dtype, statistics: str, vocab: int = 128256, **settings: float) -> Kernel:
        logits = empty(8, 1024, vocab, dtype=dtype)
        outputs = ("logps", "lse", "ref_logps", "entropy", "kl", "accuracy", "mean_logits", "log_sum_sq")
        asked: dict[str, Any] = dict.fromkeys(outputs)
        for one in ["logps", "lse", *statistics.split()]:
            asked[one] = small
        if asked["kl"] is not None:
            asked["ref_logps"] = small
        reference = logits if asked["kl"] is not None else None
        launch = token_logps_launch(logits, labels, reference, tuple(asked.values()), **(settings or plain))
        return streaming(f"triton token_logps {names[dtype]} {name}", launch, dtype.itemsize, dtype.itemsize)

    def backward(
        name: str, dtype: torch.dtype, vocab: int = 128256, shifted: bool = False, kl: bool = False, **settings: float
    ) -> Kernel:
        whole = empty(8, 1025 if shifted else 1024, vocab, dtype=dtype)
        logits = whole[:, :-1] if shifted else whole
        out = empty(8, 1024, vocab, dtype=dtype)
        token_kl = TokenKL(logits, small, small, small, small) if kl else None
        launch = logits_grad_launch(logits, labels, small, small, small, out, token_kl=token_kl, **(settings or plain))
        # Per logit that is read: with a KL there are two for each that is written.
        moved = (3 if kl else 4) * dtype.itemsize // 2
        return streaming(f"triton logits_grad {names[dtype]} {name}".strip(), launch, dtype.itemsize, moved)

    everything = "entropy kl accuracy mean_logits"
    yield forward("alone", torch.bfloat16, "")
    yield forward("entropy+accuracy+mean", torch.bfloat16, "entropy accuracy mean_logits")
    yield forward("log_sum_sq", torch.bfloat16, "log_sum_sq")
    yield forward("reference+kl", torch.bfloat16, "kl")
    yield forward("reference, all statistics", torch.bfloat16, everything)
    yield forward("alone, V odd", torch.bfloat16, "", vocab=50257)
    yield forward("reference, all statistics, V odd", torch.bfloat16, everything, vocab=50257)
    yield forward("alone", torch.float32, "")
    yield forward("reference, all statistics", torch.float32, everything)
    yield backward("", torch.bfloat16)
    yield backward("V odd", torch.bfloat16, vocab=50257)
    yield backward("V odd, shifted rows", torch.bfloat16, vocab=50257, shifted=True)
    yield backward("", torch.float32)
    yield backward("both KL", torch.bfloat16, kl=True)
    yield backward("both KL", torch.float32, kl=True)
    if arch == 90:
        # What differs from the above in a conversion or a few operations a logit is inspected for one architecture.
        yield forward("alone", torch.float16, "")
        yield forward("alone, softcap", torch.bfloat16, "", **capped)
        yield forward("reference, all statistics, log_sum_sq", torch.bfloat16, f"{everything} log_sum_sq")
        yield backward("", torch.float16)
        yield backward("softcap", torch.bfloat16, **capped)

    pairs, sequences, bounds = empty(4), empty(8), empty(9, dtype=torch.int64)
    outputs = (pairs, sequences, sequences, sequences)
    long = empty(1, 1 << 16)
    family = (pairs, pairs, False, outputs)
    launches = preference_loss_launches(small, small, small, bounds, None, *family)
    launches += preference_loss_launches(long, long, long, bounds, None, *family)
    launches += sequence_sums_launches(small, small, None, sequences)
    kernels = ("preference_loss", "compact", "preference_loss, long", "sequence_sums")
    for name, launch in zip(kernels, launches, strict=True):
        yield Kernel(f"triton {name}", arch, _TritonCubin(launch, arch), LANES, streams=False)
    yield from _fused_kernels(arch)


def _fused_kernels(arch: int) -> Iterator[Kernel]:
    """The products of the LM head, at H = 4,096 and V = 128,256."""
    import torch

    from dpo_kernels.backends.triton import linear_grad
    from dpo_kernels.backends.triton.linear_logps import Order, linear_logps_launches, segments_of

    tokens, hidden_size, vocab = 4096, 4096, 128256

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def kernel(name: str, launch: Any, multiplies: bool = True) -> Kernel:
        cubin = _TritonCubin(launch, arch)
        threads = 32 * launch.options["num_warps"]
        return Kernel(f"triton {name}", arch, cubin, threads, streams=False, multiplies=multiplies)

    labels = empty(tokens, dtype=torch.int64)
    order = Order(empty(vocab, dtype=torch.int32), empty(vocab, dtype=torch.int32))

    def forward(dtype: torch.dtype, names: str, stored: bool = False) -> tuple[Any, Any]:
        hidden, weight = empty(tokens, hidden_size, dtype=dtype), empty(vocab, hidden_size, dtype=dtype)
        outputs = {name: empty(tokens, dtype=torch.float64) for name in ("logps", "lse", *names.split())}
        return linear_logps_launches(
            hidden, weight, None, labels, outputs, empty(len(outputs) + 1, tokens, segments_of(vocab)),
            order=order if stored else None,
            logits=empty(tokens, linear_grad.padded(vocab, dtype), dtype=dtype) if stored else None,
            logit_scale=1.0, logit_softcap=0.0, wide=not (names or stored), arch=arch,
        )  # fmt: skip

    project, merge = forward(torch.bfloat16, "")
    yield kernel("linear_logps bf16 alone", project)
    yield kernel("linear_logps merge", merge, multiplies=False)
    yield kernel("linear_logps bf16 entropy+accuracy", forward(torch.bfloat16, "entropy accuracy")[0])
    yield kernel("linear_logps bf16 stored in order", forward(torch.bfloat16, "", stored=True)[0])
    yield kernel("linear_logps fp32 alone", forward(torch.float32, "")[0], multiplies=False)

    def gradient(dtype: torch.dtype, stored: bool) -> Iterator[tuple[str, Any]]:
        hidden, weight = empty(tokens, hidden_size, dtype=dtype), empty(vocab, hidden_size, dtype=dtype)
        call = linear_grad.HeadCall(weight, None, order, 1.0, 0.0, 2.0**-16)
        dz = empty(tokens, linear_grad.padded(vocab, dtype), dtype=dtype)
        rows, columns = tokens // 128, dz.shape[1] // 128
        live, dropped = empty(rows, columns, dtype=torch.int8), empty(tokens, columns)
        by_row = (empty(tokens), empty(tokens), empty(tokens))
        logits = dz if stored else None
        yield (
            "logits",
            linear_grad.logits_block_grad_launch(call, hidden, labels, by_row, logits, dz, live, (dropped, None)),
        )
        if stored:
            return
        lists = (empty(rows, columns, dtype=torch.int32), empty(rows, dtype=torch.int32))
        out = empty(1, tokens, hidden_size)
        yield "hidden", linear_grad.hidden_grad_launch(call, dz, lists, empty(tokens), empty(hidden_size), out)
        lists = (empty(columns, rows, dtype=torch.int32), empty(columns, dtype=torch.int32))
        yield "weight", linear_grad.weight_grad_launch(call, dz, hidden, lists, None, empty(vocab, hidden_size), True)

    for name, launch in gradient(torch.bfloat16, stored=False):
        yield kernel(f"linear_grad bf16 {name}", launch)
    for name, launch in gradient(torch.bfloat16, stored=True):
        yield kernel(f"linear_grad bf16 {name}, stored", launch, multiplies=False)


def cuda_kernels(arch: int) -> Iterator[Kernel]:
    """The CUDA library's kernels; none where nvcc is missing."""
    from dpo_kernels import _build

    try:
        _build.nvcc_compiler()
    except _build.BuildError:
        return
    from . import machine_code_cuda

    yield from machine_code_cuda.cuda_kernels(arch)


def yardstick(arch: int) -> Iterator[Kernel]:
    """What the same inspection says of the usual form of such a kernel; not ours, and nothing is asked of it."""
    import torch

    from benchmarks.usual_form import lse_kernel
    from dpo_kernels.backends.triton.launch import LANES, Launch

    logits = torch.empty(8192, 128256, dtype=torch.bfloat16, device="meta")
    lse = torch.empty(8192, device="meta")
    arguments = {"logits": logits, "lse": lse, "stride": 128256, "vocab": 128256, "BLOCK": 8 * LANES}
    launch = Launch(lse_kernel, (8192,), arguments)
    yield Kernel("yardstick lse bf16", arch, _TritonCubin(launch, arch), LANES, logits_per_iteration=8)


#: The registry: each source yields the kernels it has for an architecture.
SOURCES: list[Callable[[int], Iterable[Kernel]]] = [triton_kernels, cuda_kernels, yardstick]


def kernels(architectures: Iterable[int] = ARCHITECTURES) -> list[Kernel]:
    """Every kernel of the registry for these architectures."""
    return [kernel for arch in architectures for source in SOURCES for kernel in source(arch)]


def table(rows: Iterable[Figures]) -> str:
    """The figures as one plain-text table."""
    head = ("kernel", "sm", "regs", "spill", "smem", "threads/SM", "instr", "loop", "slots/logit", "mufu/logit", "bar", "shfl",
            "ld128", "ld<128", "st128", "st<128", "in flight", "bandwidth")  # fmt: skip
    lines = [head]
    for row in rows:
        shares = "  ".join(f"{card} {share:.0%}" for card, share in (row.bandwidth_share or {}).items())
        cells = (
            row.name, row.arch, row.registers, row.spills, row.shared_bytes, row.resident_threads, row.instructions,
            row.loop_instructions, row.slots_per_logit, row.mufu_per_logit, row.loop_barriers, row.loop_shuffles,
            row.loads_128, row.loads_narrower, row.stores_128, row.stores_narrower,
            None if row.bytes_in_flight is None else f"{row.bytes_in_flight / 1024:.0f} KB", shares,
        )  # fmt: skip
        lines.append(
            tuple("-" if cell is None else f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in cells)
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    left = (0, len(head) - 1)
    return "\n".join(
        "  ".join(c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    )


def _inspect_numbered(job: tuple[int, int]) -> Figures:
    """Worker: a kernel is named by its place in the registry, since what compiles it does not travel between processes."""
    arch, index = job
    return inspect(kernels([arch])[index])


def write_json(path: Path, rows: Iterable[Figures]) -> None:
    """Write the figures, in the place of what the file says of the same kernels; its other rows stay."""
    import triton

    report = json.loads(path.read_text()) if path.exists() else {"tools": {}, "kernels": []}
    found = {(row["name"], row["arch"]): row for row in report["kernels"]}
    found.update({(row.name, row.arch): asdict(row) for row in rows})
    report["tools"]["triton"] = triton.__version__
    report["kernels"] = [found[key] for key in sorted(found)]
    path.write_text(json.dumps(report, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arch", type=int, nargs="+", default=list(ARCHITECTURES), choices=ARCHITECTURES)
    parser.add_argument("--only", default="", help="kernels whose name contains this text")
    parser.add_argument("--json", type=Path, help="write the figures here; rows of kernels not inspected now are kept")
    parser.add_argument("--jobs", type=int, default=min(4, len(os.sched_getaffinity(0))))
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("machine code cannot be compiled under TRITON_INTERPRET=1: unset it")
    jobs = [
        (arch, index)
        for arch in arguments.arch
        for index, kernel in enumerate(kernels([arch]))
        if arguments.only in kernel.name
    ]
    with ProcessPoolExecutor(max_workers=arguments.jobs) as pool:
        rows = list(pool.map(_inspect_numbered, jobs))
    print(table(rows))
    if arguments.json:
        write_json(arguments.json, rows)


if __name__ == "__main__":
    main()
