"""Reads the compiled GPU kernels' figures from their cubins, to argue about their speed on a machine without a GPU.

    python -m benchmarks.machine_code [--arch 80 90 100] [--only TEXT] [--json FILE]
    python -m benchmarks.machine_code --markdown          the tables of docs/gpu.md, from the committed results
    python -m benchmarks.machine_code --markdown --write  put them between the page's markers

One registry of compiled kernels (`SOURCES`) drives the table, the JSON and the tests. For every kernel it reads registers,
spills, shared memory and occupancy; for its main loop (the loop that streams logits without masks) also instructions and
MUFU per logit, barriers, shuffles, 128-bit loads and stores, and loads issued before the first use.

Each figure depends on the compiler, and torch decides which Triton a user has: benchmarks/tritons.py lists the versions.

How the share of a card's bandwidth is predicted (`bandwidth_share`; csrc/cuda/token_logps.cuh uses the same terms).
Each SM has four schedulers, each with w = resident threads / 128 warps. One iteration of the main loop costs a warp

    think   the latency of its loads, 700 ns, once for each batch of loads that it issues before it uses one
    work    max(instructions, 8 x MUFU) cycles of its scheduler: one instruction per cycle, one MUFU (4 lanes) per 8 cycles

The w warps of a scheduler take turns at the work. How long they wait for one another depends on how they are spread in
time, so there are two figures. t is the time of an iteration, in which each scheduler streams w iterations' bytes:

    low     lock step: all warps wait for memory together, then all compute.     t = think + w x work
    high    warps arrive independently of one another. A warp that becomes ready finds as many warps before it as there
            are on average with w - 1 warps in total (exact mean-value analysis; Reiser and Lavenberg, JACM 27, 1980):
            t(w) = think + work x (1 + (w - 1) x (t(w - 1) - think) / t(w - 1))

In both cases a scheduler finishes at most one iteration in `work` cycles. supply = bytes that an SM streams in t / bytes that
its share of the card's bandwidth delivers in t. Two corrections follow. First, at a row's begin and end its block loads
nothing for about 2 us (label, its logit, first tile; merge and finish); this time is spread over the row's iterations as
think. Second, at the end of the launch blocks run out of rows, evenly over one row's time. The memory stays busy until less
than 1 / supply of the blocks are left. So with `rounds` = rows / resident blocks

    share = rounds / (rounds + 0.5 / supply^2) if supply >= 1, else supply x rounds / (rounds + 0.5)

The model leaves out losses of the memory itself (refresh, row misses, reads between writes). A copy has the same losses, so
the predicted share applies to measured copy bandwidth at least as well as to the peak figures below.
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
#: {version of Triton: figures of its kernels}.
RESULTS = Path(__file__).parent / "results" / "machine_code.json"
#: The same figures at commit bab60ca, whose tiles had three dimensions.
BEFORE = Path(__file__).parent / "results" / "machine_code_before.json"

PAGE = Path(__file__).parent.parent / "docs" / "gpu.md"
BEGIN, END = "<!-- machine-code:begin -->", "<!-- machine-code:end -->"

#: Seconds from issuing a load until its data arrives, in a loaded memory system.
LATENCY = 700e-9
#: Seconds at the two ends of a row in which its block loads almost nothing: three dependent loads, a merge and the finish.
ROW_ENDS = 2e-6
#: The launch that a prediction is for.
ROWS, VOCAB = 8192, 128256


@dataclass(frozen=True)
class Card:
    """Peak figures of a card: SMs, clock in Hz, memory bandwidth in bytes/s; and the architecture whose code it runs."""

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
    """A cubin, the bytes of shared memory that a launch adds to the cubin's own, and the PTX if there is one."""

    code: bytes
    dynamic_shared: int = 0
    ptx: str = ""


@dataclass(frozen=True)
class Kernel:
    """One compiled kernel of the registry.

    name: its name in the table. arch: 80, 90, 100. cubin: returns the binary, and compiles it if necessary.
    threads: per block. logit_bytes: size of one logit. moved_bytes: read and written per logit that is read.
    function: the kernel's symbol if the cubin holds several kernels, else None. logits_per_iteration: of the main loop, per
    thread; None to compute it from the widths of the loop's loads (every logit is loaded once). streams: False for kernels
    that read no logits and so have no main loop to judge. multiplies: a product of matrices, judged by its tensor
    instructions and asynchronous copies. narrow: judge the loop for rows that 128-bit loads cannot read. tensors: number of
    logit tensors that are read: 2 if the reference's row is read as well as the policy's.
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
    tensors: int = 1


@dataclass(frozen=True)
class Figures:
    """The figures of a cubin. loop_* and per-logit figures are those of the main loop; None for kernels that stream nothing."""

    name: str
    arch: int
    registers: int
    spills: int
    local_bytes: int
    shared_bytes: int
    threads: int
    resident_threads: int
    instructions: int
    doubles: int
    doubles_by_all: int | None
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
    bandwidth_share: dict[str, tuple[float, float]] | None
    tensor_instructions: int | None = None
    async_copies: int | None = None
    async_narrower: int | None = None


def tool(name: str) -> str:
    """Path of nvdisasm or cuobjdump as shipped with Triton."""
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
        """The bodies of the innermost loops, each from its label to its backward branch."""
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


@dataclass(frozen=True)
class Loop:
    """Figures of one iteration of a main loop, per thread; bytes_asked: by loads issued before the first use of a load."""

    instructions: int
    mufu: int
    logits: int
    bytes_asked: int


def _is_load(instruction: str) -> bool:
    return opcode(instruction).split(".")[0] in ("LDG", "LDGSTS", "UBLKCP", "UTMALDG")


def main_loop(listing: Listing, narrow: bool = False) -> list[str]:
    """The loop that streams logits: the loop that reads most bytes from global memory without a predicate on the load.

    A kernel may hold one loop for aligned rows and another for all rows; `narrow` selects the loop without 128-bit loads.
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
    """(loads, bytes per thread) issued before the first instruction that waits for one of them."""
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
    """Resident threads per SM. Each warp gets registers in units of 256; each block takes 1 KB more shared memory."""
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


def bandwidth_share(
    kernel: Kernel, card: Card, loop: Loop, resident_threads: int, rows: int = ROWS, vocab: int = VOCAB
) -> tuple[float, float]:
    """(low, high): predicted share of a card's bandwidth for logits [rows, vocab], by the model at the head of this file.

    low: the warps of a scheduler compute in lock step. high: they are independent of one another.
    """
    warps = resident_threads // 128
    tile_bytes = loop.logits * kernel.logit_bytes
    per_row = max(1.0, vocab * kernel.tensors / (loop.logits * kernel.threads))
    think = (LATENCY * tile_bytes / loop.bytes_asked + ROW_ENDS / per_row) * card.clock
    work = max(loop.instructions, 8 * loop.mufu)
    lock_step = think + warps * work
    independent = think + work
    for others in range(1, warps):
        independent = think + work * (1 + others * (independent - think) / independent)
    blocks = card.sms * resident_threads // kernel.threads
    rounds = rows / blocks
    moved = resident_threads * loop.logits * kernel.moved_bytes

    def share(cycles: float) -> float:
        supply = moved / (cycles * card.bandwidth / card.sms / card.clock)
        dry = 0.5 / supply**2 if supply >= 1 else 0.5
        return round(min(1.0, supply) * rounds / (rounds + dry), 3)

    return share(lock_step), share(independent)


def _doubles(code: list[str]) -> int:
    """Number of float64 instructions, each counted once."""
    return sum(opcode(i).split(".")[0] in ("DADD", "DMUL", "DFMA", "DSETP") for i in code)


def doubles_by_all(ptx: str) -> int | None:
    """Float64 instructions before the point where only a program's first warp continues (device.first_warp); None without one."""
    ptx = re.sub(r"^\s*\.loc\b.*\n", "", ptx, flags=re.MULTILINE)
    turn = re.search(r"// begin inline asm\s+mov\.u32\s+%r\d+, %tid\.x;\s+// end inline asm", ptx)
    arithmetic = r"^\s+(?:add|sub|mul|fma|div|neg|setp)\.\S*f64\b"
    if turn is None:
        return None
    branch = re.search(r"\bbra\b", ptx[turn.end() :])
    first = re.search(arithmetic, ptx[turn.end() :], re.MULTILINE)
    if branch is None or first is None or first.start() < branch.start():
        return None
    return len(re.findall(arithmetic, ptx[: turn.end()], re.MULTILINE))


def inspect(kernel: Kernel) -> Figures:
    """Compile a kernel of the registry if necessary, and read its figures."""
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
        "doubles": _doubles(listing.code),
        "doubles_by_all": doubles_by_all(binary.ptx),
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
    # In unaligned rows neighbouring loads share words, which are transferred once.
    asked = min(asked, logits * kernel.logit_bytes)
    measured = Loop(len(loop), operations.count("MUFU"), logits, asked)
    return Figures(
        **figures,
        loop_instructions=len(loop),
        logits_per_iteration=logits,
        slots_per_logit=round(slots, 3),
        mufu_per_logit=round(mufu, 3),
        loop_barriers=sum(o in ("BAR", "SYNCS", "WARPSYNC") for o in operations),
        loop_shuffles=operations.count("SHFL"),
        loop_doubles=_doubles(loop),
        loads_128=sum(width == 16 for width in loads),
        loads_narrower=sum(width < 16 for width in loads),
        stores_128=sum(width == 16 for width in stores),
        stores_narrower=sum(width < 16 for width in stores),
        loads_before_use=waiting,
        bytes_in_flight=asked * resident,
        bandwidth_share={
            name: bandwidth_share(kernel, card, measured, resident)
            for name, card in CARDS.items()
            if card.arch == kernel.arch
        },
    )


# Registry -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TritonCubin:
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
        return Binary(compiled.asm["cubin"], compiled.metadata.shared, compiled.asm["ptx"])


def triton_kernels(arch: int) -> Iterator[Kernel]:
    """The Triton backend's kernels, from the launches that real calls make, on tensors without data."""
    import torch

    from dpo_kernels.backends.triton.launch import LANES
    from dpo_kernels.backends.triton.logits_grad import logits_grad_launch
    from dpo_kernels.backends.triton.preference_loss import preference_loss_launches, sequence_sums_launches
    from dpo_kernels.backends.triton.token_logps import token_logps_launch
    from dpo_kernels.stages import STATISTICS, TokenKL, Transform, token_rows

    def empty(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    labels, small = empty(8, 1024, dtype=torch.int64), empty(8, 1024)
    names = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
    plain, capped = Transform(), Transform(softcap=30.0)

    def streaming(name: str, launch: Any, logit_bytes: int, moved_bytes: int) -> Kernel:
        tensors = 1 if launch.arguments.get("ref_logits") is None else 2
        logits = launch.arguments["UNROLL"] * launch.arguments["GROUP"] * tensors
        cubin = TritonCubin(launch, arch)
        return Kernel(
            name, arch, cubin, LANES, logit_bytes, moved_bytes, logits_per_iteration=logits, tensors=tensors
        )  # fmt: skip

    def forward(
        name: str, dtype: torch.dtype, *statistics: str, vocab: int = 128256, transform: Transform = plain
    ) -> Kernel:
        logits = empty(8, 1024, vocab, dtype=dtype)
        reference = logits if "kl" in statistics else None
        rows = dict.fromkeys(token_rows(reference is not None, statistics), small)
        launch = token_logps_launch(logits, labels, reference, rows, transform)
        return streaming(f"triton token_logps {names[dtype]} {name}", launch, dtype.itemsize, dtype.itemsize)

    def backward(
        name: str, dtype: torch.dtype, vocab: int = 128256, shifted: bool = False, kl: bool = False,
        transform: Transform = plain,
    ) -> Kernel:  # fmt: skip
        whole = empty(8, 1025 if shifted else 1024, vocab, dtype=dtype)
        logits = whole[:, :-1] if shifted else whole
        out = empty(8, 1024, vocab, dtype=dtype)
        token_kl = TokenKL(logits, *[small] * 6) if kl else None
        launch = logits_grad_launch(logits, labels, *[small] * 4, transform, out, token_kl)
        # Bytes per logit that is read: with a KL, two logits are read for each that is written.
        moved = (3 if kl else 4) * dtype.itemsize // 2
        return streaming(f"triton logits_grad {names[dtype]} {name}".strip(), launch, dtype.itemsize, moved)

    reported = ("entropy", "kl", "accuracy", "mean_logits")
    yield forward("alone", torch.bfloat16)
    yield forward("entropy+accuracy+mean", torch.bfloat16, "entropy", "accuracy", "mean_logits")
    yield forward("log_sum_sq", torch.bfloat16, "log_sum_sq")
    yield forward("reference+kl", torch.bfloat16, "kl")
    yield forward("reference, all statistics", torch.bfloat16, *reported)
    yield forward("alone, V odd", torch.bfloat16, vocab=50257)
    yield forward("reference, all statistics, V odd", torch.bfloat16, *reported, vocab=50257)
    yield forward("alone", torch.float32)
    yield forward("reference, all statistics", torch.float32, *reported)
    yield backward("", torch.bfloat16)
    yield backward("V odd", torch.bfloat16, vocab=50257)
    yield backward("V odd, shifted rows", torch.bfloat16, vocab=50257, shifted=True)
    yield backward("", torch.float32)
    yield backward("both KL", torch.bfloat16, kl=True)
    yield backward("both KL", torch.float32, kl=True)
    if arch == 90:
        # Variants that differ from those above by a conversion or a few operations per logit are inspected for one architecture.
        yield forward("alone", torch.float16)
        yield forward("alone, softcap", torch.bfloat16, transform=capped)
        yield forward("reference, all statistics, log_sum_sq", torch.bfloat16, *STATISTICS)
        yield backward("", torch.float16)
        yield backward("softcap", torch.bfloat16, transform=capped)

    pairs, sequences, bounds = empty(4), empty(8), empty(9, dtype=torch.int64)
    outputs = (pairs, sequences, sequences, sequences)
    long = empty(1, 1 << 16)
    family = (pairs, pairs, False, outputs)
    launches = preference_loss_launches(small, small, small, bounds, None, *family)
    launches += preference_loss_launches(long, long, long, bounds, None, *family)
    launches += sequence_sums_launches(small, small, None, sequences)
    kernels = ("preference_loss", "compact", "preference_loss, long", "sequence_sums")
    for name, launch in zip(kernels, launches, strict=True):
        yield Kernel(f"triton {name}", arch, TritonCubin(launch, arch), LANES, streams=False)
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
        cubin = TritonCubin(launch, arch)
        threads = 32 * launch.options["num_warps"]
        return Kernel(f"triton {name}", arch, cubin, threads, streams=False, multiplies=multiplies)

    labels = empty(tokens, dtype=torch.int64)
    order = Order(empty(vocab, dtype=torch.int32), empty(vocab, dtype=torch.int32))

    def forward(dtype: torch.dtype, names: str, stored: bool = False) -> tuple[Any, Any]:
        hidden, weight = empty(tokens, hidden_size, dtype=dtype), empty(vocab, hidden_size, dtype=dtype)
        outputs = {name: empty(tokens, dtype=torch.float64) for name in ("logps", "max", "log_sum", *names.split())}
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
    """The CUDA library's kernels; none if nvcc is missing."""
    from dpo_kernels import _build

    try:
        _build.nvcc_compiler()
    except _build.BuildError:
        return
    from . import machine_code_cuda

    yield from machine_code_cuda.cuda_kernels(arch)


def yardstick(arch: int) -> Iterator[Kernel]:
    """The usual form of such a kernel, for comparison; it is not ours, and no requirement applies to it."""
    import torch

    from benchmarks.usual_form import lse_kernel
    from dpo_kernels.backends.triton.launch import LANES, Launch

    logits = torch.empty(8192, 128256, dtype=torch.bfloat16, device="meta")
    lse = torch.empty(8192, device="meta")
    arguments = {"logits": logits, "lse": lse, "stride": 128256, "vocab": 128256, "BLOCK": 8 * LANES}
    launch = Launch(lse_kernel, (8192,), arguments)
    yield Kernel("yardstick lse bf16", arch, TritonCubin(launch, arch), LANES, logits_per_iteration=8)


#: The registry: each source yields its kernels for an architecture.
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
        shares = "  ".join(
            f"{card} {low:.0%} to {high:.0%}" for card, (low, high) in (row.bandwidth_share or {}).items()
        )
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


def _inspect_numbered(job: tuple[int, int]) -> Figures | str:
    """Worker: the kernel is given by its index in the registry, since its compile function cannot be pickled.

    Returns the error's text if it does not compile, so that the figures of other kernels are not lost.
    """
    arch, index = job
    kernel = kernels([arch])[index]
    try:
        return inspect(kernel)
    except Exception as error:
        return f"{kernel.name}, sm_{arch}: {type(error).__name__}: {error}"


def read_json(path: Path = RESULTS) -> dict[str, list[dict[str, Any]]]:
    """The figures in a file, by version of Triton."""
    return json.loads(path.read_text()) if path.exists() else {}


def write_json(path: Path, rows: Iterable[Figures]) -> None:
    """Write the figures into the file. They replace rows of the same kernels and Triton; other rows stay."""
    import triton

    report = read_json(path)
    found = {(row["name"], row["arch"]): row for row in report.get(triton.__version__, [])}
    found.update({(row.name, row.arch): asdict(row) for row in rows})
    report[triton.__version__] = [found[key] for key in sorted(found)]
    # A line for each kernel, so that a diff shows which kernel changed.
    versions = (
        f"{json.dumps(version)}: [\n" + ",\n".join(map(json.dumps, report[version])) + "\n]"
        for version in sorted(report)
    )
    path.write_text("{\n" + ",\n".join(versions) + "\n}\n")


# The page -------------------------------------------------------------------------------------------------------------


def _cell(rows: dict[tuple[str, int], dict[str, Any]], key: tuple[str, int], shuffles: bool) -> str:
    if key not in rows:
        return "-"
    row = rows[key]
    note = f" ({row['loop_shuffles']})" if shuffles and row["loop_shuffles"] else ""
    return f"{row['slots_per_logit']:.2f}{note}"


def markdown() -> str:
    """The tables of docs/gpu.md: issue slots per logit before and after, by Triton and architecture, and predicted shares."""

    def streaming(path: Path) -> dict[str, dict[tuple[str, int], dict[str, Any]]]:
        return {
            version: {(row["name"], row["arch"]): row for row in rows if row["slots_per_logit"] is not None}
            for version, rows in read_json(path).items()
        }

    now, before = streaming(RESULTS), streaming(BEFORE)
    names = sorted({name for rows in now.values() for name, _ in rows if name.startswith("triton")})
    versions = sorted(now, key=lambda version: [int(number) for number in re.findall(r"\d+", version)])
    lines = [
        "Issue slots (warp instructions) a logit in the main loop, for each Triton that a supported torch brings; fewer are",
        "better. *before*: tiles of three dimensions, whose layout the compiler chose. In parentheses: shuffles in that loop.",
    ]
    for arch in ARCHITECTURES:
        columns = [
            (f"{version} {when}", rows.get(version, {}))
            for version in sorted(now)
            for when, rows in (("before", before), ("now", now))
        ]
        lines += ["", f"**sm_{arch}**", "", "| kernel | " + " | ".join(head for head, _ in columns) + " |"]
        lines.append("|---|" + "---:|" * len(columns))
        for name in names:
            cells = [_cell(rows, (name, arch), shuffles=True) for _, rows in columns]
            if any(cell != "-" for cell in cells):
                lines.append(f"| {name.removeprefix('triton ')} | " + " | ".join(cells) + " |")
    newest = versions[-1]
    lines += [
        "",
        f"Predicted share of a card's memory bandwidth at [{ROWS:,} x {VOCAB:,}], Triton {newest}. The two figures are bounds:",
        "the warps of a scheduler compute in lock step, or independently of one another (the model is written down in",
        "`benchmarks/machine_code.py`). No GPU has measured it.",
        "",
        "| kernel | " + " | ".join(CARDS) + " |",
        "|---|" + "---:|" * len(CARDS),
    ]
    for name in names:
        cells = []
        for card, figures in CARDS.items():
            share = now[newest].get((name, figures.arch), {}).get("bandwidth_share", {}).get(card)
            cells.append("-" if share is None else f"{share[0]:.0%} to {share[1]:.0%}")
        lines.append(f"| {name.removeprefix('triton ')} | " + " | ".join(cells) + " |")
    lines += [
        "",
        f"Float64 instructions of a row, sm_90, Triton {newest}: what all four warps of a program execute, and what its first",
        "warp executes alone. Where a card has one float64 unit for 64 of float32 (GeForce, B300), each instruction takes a",
        "multiprocessor 16 cycles a warp. With entropy or KL most of the first column is a second look at the row, which only",
        "rows that hold -inf get.",
        "",
        "| kernel | all warps | first warp alone |",
        "|---|---:|---:|",
    ]
    for name in names:
        if row := now[newest].get((name, 90)):
            everywhere = row["doubles"] if row["doubles_by_all"] is None else row["doubles_by_all"]
            lines.append(f"| {name.removeprefix('triton ')} | {everywhere} | {row['doubles'] - everywhere} |")
    return "\n".join(lines)


def with_tables(page: str) -> str:
    """The page with the text between its markers regenerated."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{PAGE} lacks the markers {BEGIN} and {END}")
    return f"{before}{begin}\n\n{markdown()}\n\n{end}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arch", type=int, nargs="+", default=list(ARCHITECTURES), choices=ARCHITECTURES)
    parser.add_argument("--only", default="", help="kernels whose name contains this text")
    parser.add_argument("--json", type=Path, help="write the figures here; rows of kernels not inspected now are kept")
    parser.add_argument("--jobs", type=int, default=min(4, len(os.sched_getaffinity(0))))
    parser.add_argument("--markdown", action="store_true", help="print the tables of docs/gpu.md; nothing is compiled")
    parser.add_argument("--write", action="store_true", help="with --markdown: put them into the page")
    arguments = parser.parse_args()
    if arguments.markdown:
        if arguments.write:
            PAGE.write_text(with_tables(PAGE.read_text()))
        else:
            print(markdown())
        return
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("machine code cannot be compiled under TRITON_INTERPRET=1: unset it")
    jobs = [
        (arch, index)
        for arch in arguments.arch
        for index, kernel in enumerate(kernels([arch]))
        if arguments.only in kernel.name
    ]
    with ProcessPoolExecutor(max_workers=arguments.jobs) as pool:
        results = list(pool.map(_inspect_numbered, jobs))
    rows = [result for result in results if isinstance(result, Figures)]
    print(table(rows))
    if arguments.json:
        write_json(arguments.json, rows)
    if failed := [result for result in results if isinstance(result, str)]:
        sys.exit("these kernels do not compile:\n" + "\n".join(failed))


if __name__ == "__main__":
    main()
