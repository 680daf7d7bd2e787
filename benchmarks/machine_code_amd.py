"""Reads the figures of Triton's kernels for AMD's GPUs from their assembly; neither a GPU nor ROCm is needed.

    python -m benchmarks.machine_code_amd [--arch gfx942 gfx950] [--only TEXT ...] [--json FILE]

The kernels are those of benchmarks/machine_code.py's registry, in the form without NVIDIA assembly that
DPO_KERNELS_TRITON_TARGET=hip selects; this program sets the variable. For every kernel it reads registers, spills, scratch
and LDS memory and occupancy; for its main loop (the loop that streams logits without masks) also instructions per logit,
barriers, LDS accesses, 16-byte loads and stores. An instruction serves 64 lanes; a SIMD issues it in four cycles of 16 lanes.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ARCHITECTURES = ("gfx942", "gfx950")
WAVEFRONT = 64

#: Bytes per lane, by the last word of a memory instruction's name.
_WIDTHS = {"dwordx4": 16, "b128": 16, "dwordx3": 12, "dwordx2": 8, "b64": 8, "dword": 4, "b32": 4}


@dataclass(frozen=True)
class Figures:
    """The figures of one kernel's assembly. *_loop and per-logit figures are None for kernels that stream nothing.

    inline_assembly: number of assembly pieces in the kernel's source. It must be 0, because they are written for NVIDIA:
    LLVM only prints a message on stderr for a piece that it cannot translate, and returns a kernel without it. spills: of
    vector registers, to memory (scalar registers spill to a lane of a vector register). copies: threads that hold the same
    logits; 1 unless a block has more threads than its tiles have lanes.
    """

    name: str
    arch: str
    inline_assembly: int
    vgprs: int
    sgprs: int
    spills: int
    scratch_bytes: int
    lds_bytes: int
    waves_per_simd: int
    instructions: int
    copies: int | None
    loop_instructions: int | None
    logits_per_iteration: int | None
    slots_per_logit: float | None
    loop_barriers: int | None
    loop_lds: int | None
    loads_128: int | None
    loads_narrower: int | None
    stores_128: int | None
    stores_narrower: int | None


@dataclass(frozen=True)
class Tile:
    """The tile of a block: logits per lane, bytes of one logit, lanes of the tile, and the block's threads."""

    logits: int
    logit_bytes: int
    lanes: int
    threads: int


def listing(assembly: str) -> tuple[list[str], dict[str, int]]:
    """Instructions in order, and for every label the index of the instruction after it."""
    code: list[str] = []
    labels: dict[str, int] = {}
    for line in assembly.splitlines():
        if label := re.match(r"(\.LBB\w+):", line):
            labels[label.group(1)] = len(code)
        elif instruction := re.match(r"\s+([a-z]\w*(?:\s[^;]*)?)", line):
            code.append(instruction.group(1).strip())
    return code, labels


def _width(instruction: str) -> int:
    """Bytes per lane of a memory instruction."""
    last = instruction.split()[0].split("_")[-1]
    return _WIDTHS.get(last, 2)


def _accesses(loop: list[str], kind: str) -> list[int]:
    """Widths of a loop's loads or stores of global memory."""
    return [_width(i) for i in loop if re.match(rf"(global|buffer|flat)_{kind}_", i)]


def main_loop(code: list[str], labels: dict[str, int]) -> list[str]:
    """Of the innermost loops without a branch for a mask (s_and_saveexec), the one that reads most bytes of global memory."""
    spans = []
    for end, instruction in enumerate(code):
        target = re.match(r"s_c?branch\w*\s+(\.LBB\w+)", instruction)
        if target and labels.get(target.group(1), end + 1) <= end:
            spans.append((labels[target.group(1)], end))
    loops = [
        code[begin : end + 1]
        for begin, end in spans
        if not any(begin <= b and e <= end and (b, e) != (begin, end) for b, e in spans)
    ]
    free = [loop for loop in loops if not any("_saveexec_" in instruction for instruction in loop)]
    return max(free, key=lambda loop: sum(_accesses(loop, "load")), default=[])


def _number(pattern: str, assembly: str) -> int:
    found = re.search(pattern + r":?\s*(\d+)", assembly)
    if found is None:
        raise ValueError(f"the assembly does not contain {pattern}")
    return int(found.group(1))


def read(name: str, arch: str, ttir: str, assembly: str, tile: Tile | None) -> Figures:
    """The figures of one kernel from Triton's IR and from its assembly.

    tile: the tile of an iteration of the source's loop; None for a kernel that streams no logits. LLVM may unroll that
    loop; its loads show by how much.
    """
    code, labels = listing(assembly)
    figures: dict[str, Any] = {
        "name": name,
        "arch": arch,
        "inline_assembly": ttir.count("tt.elementwise_inline_asm"),
        "vgprs": _number(r"\.vgpr_count", assembly),
        "sgprs": _number(r"\.sgpr_count", assembly),
        "spills": _number(r"\.vgpr_spill_count", assembly),
        "scratch_bytes": _number(r"\.private_segment_fixed_size", assembly),
        "lds_bytes": _number(r"\.group_segment_fixed_size", assembly),
        "waves_per_simd": _number(r"; Occupancy", assembly),
        "instructions": len(code),
    }
    if tile is None:
        return Figures(**figures, **{field: None for field in Figures.__dataclass_fields__ if field not in figures})
    loop = main_loop(code, labels)
    loads, stores = _accesses(loop, "load"), _accesses(loop, "store")
    if not loads:
        raise ValueError(f"{name}, {arch}: no loop that loads logits was found")
    logits = tile.logits * max(1, round(sum(loads) / (tile.logits * tile.logit_bytes)))
    return Figures(
        **figures,
        copies=tile.threads // tile.lanes,
        loop_instructions=len(loop),
        logits_per_iteration=logits,
        slots_per_logit=round(len(loop) / logits, 3),
        loop_barriers=sum(i.startswith("s_barrier") for i in loop),
        loop_lds=sum(i.startswith("ds_") for i in loop),
        loads_128=sum(width == 16 for width in loads),
        loads_narrower=sum(width < 16 for width in loads),
        stores_128=sum(width == 16 for width in stores),
        stores_narrower=sum(width < 16 for width in stores),
    )


def kernels() -> Iterator[Any]:
    """The registry's Triton kernels, as machine_code.Kernel; their arguments are the same for all architectures."""
    from .machine_code import triton_kernels

    return triton_kernels(90)


def inspect(kernel: Any, arch: str) -> Figures:
    """Compile a kernel of the registry for one of AMD's architectures and read its figures."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    launch = kernel.cubin.launch
    source = ASTSource(launch.kernel, *launch.signature())
    compiled = triton.compile(source, target=GPUTarget("hip", arch, WAVEFRONT), options=launch.options)
    tile = None
    if kernel.streams:
        threads = WAVEFRONT * launch.options["num_warps"]
        tile = Tile(kernel.logits_per_iteration, kernel.logit_bytes, launch.arguments["LANES"], threads)
    return read(kernel.name, arch, compiled.asm["ttir"], compiled.asm["amdgcn"], tile)


def _inspect_numbered(job: tuple[str, int]) -> Figures | str:
    """Worker: the kernel is given by its index in the registry. Returns the error's text if it does not compile."""
    arch, index = job
    kernel = list(kernels())[index]
    try:
        return inspect(kernel, arch)
    except Exception as error:
        return f"{kernel.name}, {arch}: {type(error).__name__}: {error}"


def table(rows: list[Figures]) -> str:
    """The figures as one plain-text table."""
    fields = list(Figures.__dataclass_fields__)
    lines = [fields, *([str("-" if cell is None else cell) for cell in asdict(row).values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arch", nargs="+", default=list(ARCHITECTURES))
    parser.add_argument("--only", nargs="+", default=[""], help="kernels whose name contains one of these texts")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--jobs", type=int, default=min(4, len(os.sched_getaffinity(0))))
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("machine code cannot be compiled under TRITON_INTERPRET=1: unset it")
    os.environ["DPO_KERNELS_TRITON_TARGET"] = "hip"  # before the kernels are imported
    jobs = [
        (arch, index)
        for arch in arguments.arch
        for index, kernel in enumerate(kernels())
        if any(text in kernel.name for text in arguments.only)
    ]
    with ProcessPoolExecutor(max_workers=arguments.jobs) as pool:
        results = list(pool.map(_inspect_numbered, jobs))
    rows = [result for result in results if isinstance(result, Figures)]
    print(table(rows))
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    if failed := [result for result in results if isinstance(result, str)]:
        sys.exit("these kernels do not compile:\n" + "\n".join(failed))


if __name__ == "__main__":
    main()
