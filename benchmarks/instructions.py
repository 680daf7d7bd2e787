"""Instructions of each CPU kernel per unit of work, counted by callgrind: figures without noise, checked against a budget.

    python -m benchmarks.instructions            count, and print the counts next to the budget
    python -m benchmarks.instructions --write    make the counts the new budget (benchmarks/instructions.json)

A unit is a logit for the kernels that read logits, a product of kept entry and hidden unit for the filtered gradients, a
multiply-add for the matrix products, a token for the preference loss. The kernels' objects are compiled as the package
compiles them and linked with a small driver (instructions.cpp), because torch under callgrind takes minutes to start.
Valgrind does not support AVX-512, so the AVX2 and baseline sets are counted: their source is the same, with vectors of half or
a quarter of the width, and the count is the same on every x86-64 machine with AVX2. Counts depend on the compiler. The budget
names its compiler; another compiler's counts have a larger upper limit and no lower one.

Instructions per logit on AVX2 for the arithmetic alone. All loads that an instruction can fold are folded; loops, constants
that do not fit into registers, and sums of a block are not counted:

    token_logps   float32 2.1, bfloat16 2.2, float16 2.1; of these, 16 per vector of 8 are for the exponential and its sum
    logits_grad   float32 2.3, bfloat16 1.6, float16 1.8; that is 18, 12.5 and 14.5 per vector

Per multiply-add: product 0.21, which is 20 instructions for a tile's step of 6 x 16 multiply-adds. Packing is extra.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from dpo_kernels import _build

HERE = Path(__file__).resolve().parent
BUDGET = HERE / "instructions.json"
TOLERANCE = 0.03
#: Stage -> (its source file, its unit of work).
STAGES = {
    "token_logps": ("token_logps.cpp", "logit"),
    "logits_grad": ("logits_grad.cpp", "logit"),
    "filter_count": ("filtered_grad.cpp", "logit"),
    "filter_fill": ("filtered_grad.cpp", "logit"),
    "filtered_grad_hidden": ("filtered_grad.cpp", "product"),
    "filtered_grad_weight": ("filtered_grad.cpp", "product"),
    "product": ("products.cpp", "multiply-add"),
    "preference_loss": ("preference_loss.cpp", "token"),
}
#: How much more a compiler other than the budget's may need, as a share of the budget.
OTHER_COMPILER = 0.25


class CannotCount(RuntimeError):
    """Counting is impossible on this machine; the message says what is missing."""


def compiler_name() -> str:
    """Compiler and major version, such as "g++ 12"."""
    cxx = _build.cxx_compiler()
    done = subprocess.run([cxx, "-dumpversion"], capture_output=True, text=True, check=True)
    return f"{Path(cxx).name} {done.stdout.strip().split('.')[0]}"


def countable() -> dict[str, tuple[str | None, int]]:
    """Instruction sets that valgrind can run here: name -> (-march, vector bytes). Raises CannotCount."""
    if not shutil.which("valgrind"):
        raise CannotCount("valgrind is not installed (Debian, Ubuntu: apt-get install valgrind)")
    if platform.machine().lower() not in ("x86_64", "amd64"):
        raise CannotCount(f"the committed budget is for x86-64, this is {platform.machine()}")
    return {isa: (march, width) for isa, march, width in _build.X86_ISAS if isa != "avx512"}


def count(isa: str) -> dict[str, float]:
    """Instructions per unit for each case of instructions.cpp, by "stage, case". Raises CannotCount, BuildError."""
    march, width = countable()[isa]
    flags = [*_build.CXX_FLAGS, f"-DDPO_ISA={isa}", f"-DDPO_VECTOR_BYTES={width}"]
    flags += ["-DDPO_FLOAT64"] if isa == "baseline" else []
    cxx, sources = _build.cxx_compiler(), _build.CSRC / "cpu"
    with tempfile.TemporaryDirectory() as scratch:
        rows = [sources / source for source in dict.fromkeys(source for source, _ in STAGES.values())]
        # Stage 2 and the driver are compiled for the oldest processor: only the row kernels differ between the sets.
        jobs = [(source, [] if source.stem == "preference_loss" else [f"-march={march}"]) for source in rows]
        jobs.append((HERE / "instructions.cpp", []))
        objects = [f"{scratch}/{source.stem}.o" for source, _ in jobs]
        _build.run_all(
            [
                [cxx, *flags, *extra, "-c", str(source), "-o", target]
                for (source, extra), target in zip(jobs, objects, strict=True)
            ]
        )
        driver = f"{scratch}/driver"
        # Symbols are bound at the start; otherwise binding would count for the first case.
        _build.run_all([[cxx, "-Wl,-z,now", *objects, "-o", driver]])
        done = subprocess.run(
            [
                "valgrind",
                "--tool=callgrind",
                "--collect-atstart=no",
                *(f"--toggle-collect=dpo::cpu::{isa}::{stage}(*" for stage in STAGES if stage != "preference_loss"),
                "--toggle-collect=dpo::cpu::preference_loss(*",
                "--dump-after=case_done",
                f"--callgrind-out-file={scratch}/counts",
                driver,
            ],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise CannotCount(f"valgrind failed: {done.stderr.strip().splitlines()[-1]}")
        found = {}
        for index, line in enumerate(done.stdout.splitlines(), start=1):
            stage, case, units = line.split("\t")
            totals = re.search(r"^totals: (\d+)", Path(f"{scratch}/counts.{index}").read_text(), re.MULTILINE)
            if totals is None or int(totals.group(1)) == 0:
                raise CannotCount(f"callgrind counted nothing for {stage}, {case}")
            found[f"{stage}, {case}"] = round(int(totals.group(1)) / int(units), 3)
    return found


def read_budget() -> dict[str, Any]:
    """The committed budget: "compiler", and "instructions_per_unit" by instruction set and case."""
    return json.loads(BUDGET.read_text())


def unit(case: str) -> str:
    """The unit that the case's instructions are divided by."""
    return STAGES.get(case.partition(",")[0], ("", "unit"))[1]


def deviations(counted: dict[str, float], budget: dict[str, float], same_compiler: bool = True) -> list[str]:
    """One line for each case that left its budget, is missing from it, or is no longer counted.

    With the budget's compiler a count may differ by TOLERANCE either way (if there are fewer instructions, the count
    becomes the new budget). With another compiler it may exceed the budget by OTHER_COMPILER.
    """
    lines = [f"{case}: no budget" for case in counted if case not in budget]
    lines += [f"{case}: not counted" for case in budget if case not in counted]
    for case, limit in budget.items():
        change = counted.get(case, limit) / limit - 1
        if abs(change) > TOLERANCE if same_compiler else change > OTHER_COMPILER:
            lines.append(f"{case}: {counted[case]:.3f} instructions a {unit(case)}, budget {limit:.3f}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="make the counts the new budget")
    arguments = parser.parse_args()
    counted = {isa: count(isa) for isa in countable()}
    if arguments.write:
        content = {"compiler": compiler_name(), "instructions_per_unit": counted}
        BUDGET.write_text(json.dumps(content, indent=1) + "\n")
    budget = read_budget()
    print(f"instructions a logit, a product or a token; compiler {compiler_name()}, budget by {budget['compiler']}")
    for isa, cases in counted.items():
        for case, value in cases.items():
            limit = budget["instructions_per_unit"].get(isa, {}).get(case)
            print(
                f"{isa:9s} {case:40s} {value:8.3f} a {unit(case):8s}{'' if limit is None else f'{value / limit - 1:+.1%}'}"
            )


if __name__ == "__main__":
    main()
