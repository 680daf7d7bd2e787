"""The CPU kernels keep their instruction budgets, a check of their speed that has no timing noise."""

from __future__ import annotations

import re

import pytest

from benchmarks import instructions

try:
    ISAS = tuple(instructions.countable())
    REASON = ""
except instructions.CannotCount as reason:
    ISAS, REASON = ("baseline", "avx2"), str(reason)


@pytest.mark.skipif(bool(REASON), reason=REASON)
@pytest.mark.parametrize("isa", ISAS)
def test_kernels_keep_their_budget(isa: str) -> None:
    budget = instructions.read_budget()
    same = instructions.compiler_name() == budget["compiler"]
    left = instructions.deviations(instructions.count(isa), budget["instructions_per_unit"][isa], same)
    assert not left, "\n".join([*left, "if this is meant: python -m benchmarks.instructions --write"])


@pytest.mark.parametrize(
    ("counted", "same_compiler", "said"),
    [
        ({"a": 10.2}, True, 0),
        ({"a": 10.4}, True, 1),
        ({"a": 9.6}, True, 1),
        ({"a": 12.4}, False, 0),
        ({"a": 12.6}, False, 1),
        ({"a": 8.0}, False, 0),
        ({}, True, 1),
        ({"a": 10.0, "b": 1.0}, True, 1),
    ],
)
def test_a_count_that_leaves_the_budget_is_named(counted: dict[str, float], same_compiler: bool, said: int) -> None:
    assert len(instructions.deviations(counted, {"a": 10.0}, same_compiler)) == said


def test_every_vector_set_that_ships_has_a_budget() -> None:
    shipped = {isa for isa, *_ in instructions._build.X86_ISAS} - {"avx512"}
    assert set(instructions.read_budget()["instructions_per_unit"]) == shipped


def test_every_native_kernel_has_a_budget() -> None:
    declared = set()
    for header in ("stages.h", "filtered_grad.h", "products.h", "preference_loss.h"):
        text = (instructions._build.CSRC / "cpu" / header).read_text()
        declared |= set(
            re.findall(
                r"void (\w+)\(const \w+Params& params, (?:int64_t begin, int64_t end|const Rectangle& part)\);", text
            )
        )
    assert declared == set(instructions.STAGES)
    for cases in instructions.read_budget()["instructions_per_unit"].values():
        assert {case.partition(",")[0] for case in cases} == declared
