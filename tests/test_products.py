"""The matrix products of the native CPU library (csrc/cpu/products.cpp) and their place in the linear path."""

from __future__ import annotations

import itertools
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dpo_kernels import _build, linear_dpo_loss
from dpo_kernels.backends import BackendUnavailable, cpu
from dpo_kernels.linear.products import multiply

TESTS = Path(__file__).resolve().parent
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: Largest relative rounding error: half a unit in the last place.
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}

try:
    cpu.check_available("cpu")
except BackendUnavailable as unavailable:
    pytest.skip(str(unavailable), allow_module_level=True)


def matrix(rows: int, columns: int, dtype: torch.dtype, seed: int, *, transposed: bool) -> Tensor:
    """A random matrix with a row stride (or column stride) that is three elements larger than necessary."""
    generator = torch.Generator().manual_seed(seed)
    shape = (columns, rows + 3) if transposed else (rows, columns + 3)
    values = torch.randn(shape, generator=generator).to(dtype)
    return values[:, :rows].t() if transposed else values[:, :columns]


def check_against_float64() -> None:
    """Check every dtype, orientation and kind of sum, at sizes just below and above the tiles' sizes."""
    sizes = ((1, 1, 1), (6, 16, 8), (7, 17, 9), (13, 31, 321), (130, 300, 97), (1100, 33, 40), (3, 5, 1000))
    cases = itertools.product(sizes, DTYPES, DTYPES, (False, True), (False, True))
    for seed, ((rows, columns, depth), dtype, out_dtype, turned_a, turned_b) in enumerate(cases):
        a = matrix(rows, depth, dtype, seed, transposed=turned_a)
        b = matrix(depth, columns, dtype, seed + 1, transposed=turned_b)
        room = torch.full((rows, columns + 2), 3.0, dtype=out_dtype)
        out = room[:, :columns]
        add = out_dtype == torch.float32 and seed % 2 == 0
        bias = None if add or seed % 3 == 0 else torch.randn(columns).to(dtype)
        truth = a.double() @ b.double() + (3.0 if add else 0.0) + (0.0 if bias is None else bias.double())
        cpu.product(a, b, out, bias, add)
        terms = a.double().abs() @ b.double().abs() + 4
        allowed = 1e-6 * terms + truth.abs() * ROUNDING[out_dtype] + (2.0**-25 if out_dtype == torch.float16 else 0.0)
        assert bool(((out.double() - truth).abs() <= allowed).all()), (rows, columns, depth, dtype, out_dtype)
        assert bool((room[:, columns:] == 3.0).all()), "wrote beside the product"


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_products_equal_the_float64_truth(isa):
    code = "import test_products as t; t.check_against_float64()"
    environment = {**os.environ, "DPO_KERNELS_ISA": isa}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=TESTS, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "isa", [isa for isa, *_ in _build.X86_ISAS if isa != "avx512" or "avx512" in cpu.instruction_set()]
)
def test_no_product_reads_or_writes_outside_its_matrices(isa, tmp_path):
    if platform.machine().lower() not in ("x86_64", "amd64"):
        pytest.skip("the instruction sets of other machines are one, which the test above runs")
    march, width = next((march, width) for name, march, width in _build.X86_ISAS if name == isa)
    program = tmp_path / "edges"
    flags = [*_build.CXX_FLAGS, "-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize=alignment"]
    flags += [f"-march={march}", f"-DDPO_ISA={isa}", f"-DDPO_VECTOR_BYTES={width}"]
    _build.run_all([[_build.cxx_compiler(), *flags, str(TESTS / "products_edges.cpp"), "-o", str(program)]])
    done = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("210 products\n")


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_entry_has_the_same_bits_in_every_shape_and_on_any_number_of_threads(dtype):
    a = matrix(90, 700, dtype, 0, transposed=False)
    b = matrix(700, 500, dtype, 1, transposed=True)
    full = torch.empty(90, 500)
    cpu.product(a, b, full)
    for rows, columns in (
        (slice(5, 6), slice(0, 500)),
        (slice(3, 80), slice(17, 300)),
        (slice(0, 90), slice(499, 500)),
    ):
        part = torch.empty(rows.stop - rows.start, columns.stop - columns.start)
        cpu.product(a[rows], b[:, columns], part)
        assert torch.equal(part, full[rows, columns])
    threads = torch.get_num_threads()
    try:
        for count in (1, 3, 4):
            torch.set_num_threads(count)
            again = torch.empty(90, 500)
            cpu.product(a, b, again)
            assert torch.equal(again, full)
    finally:
        torch.set_num_threads(threads)


def test_nan_and_infinity_stay_in_their_row_and_column():
    a, b = matrix(20, 50, torch.float32, 0, transposed=False), matrix(50, 40, torch.float32, 1, transposed=True)
    clean = torch.empty(20, 40)
    cpu.product(a, b, clean)
    a[4, 7], b[9, 33] = float("nan"), float("inf")
    out = torch.empty(20, 40)
    cpu.product(a, b, out)
    hit = torch.zeros(20, 40, dtype=torch.bool)
    hit[4], hit[:, 33] = True, True
    assert not bool(out[hit].isfinite().any())
    assert torch.equal(out[~hit], clean[~hit])


def test_what_a_product_refuses():
    a, b, out = torch.randn(4, 5), torch.randn(5, 6), torch.empty(4, 6)
    with pytest.raises(RuntimeError, match="shapes"):
        cpu.product(a, torch.randn(4, 6), out)
    with pytest.raises(RuntimeError, match="unit stride"):
        cpu.product(a, b, torch.empty(6, 4).t())
    with pytest.raises(RuntimeError, match="float32"):
        cpu.product(a.double(), b.double(), out)
    with pytest.raises(RuntimeError, match="float32"):
        cpu.product(a, b, out.bfloat16(), add=True)
    # A matrix without a unit stride is copied first. A contiguous matrix has none if it is one entry wide.
    single = torch.ones(2, 2)[::2, ::2]
    assert single.is_contiguous()
    cpu.product(single, single, one := torch.empty(1, 1))
    assert one.item() == 1.0
    row = torch.arange(15.0).view(5, 3)[:, 1:2].t()
    cpu.product(row, b, wide := torch.empty(1, 6))
    assert torch.allclose(wide, row @ b, atol=1e-5)
    cpu.product(b.t(), row.t(), tall := torch.empty(6, 2)[:, :1])
    assert torch.allclose(tall, b.t() @ row.t(), atol=1e-5)
    cpu.product(torch.randn(4, 10)[:, ::2].copy_(a), b, out)
    assert torch.allclose(out, a @ b, atol=1e-5)


@pytest.mark.parametrize("server", ["cpu", "eager"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_multiply_serves_every_backend(server, dtype):
    a, b = matrix(33, 40, dtype, 0, transposed=False), matrix(40, 5000, dtype, 1, transposed=True)
    truth = a.double() @ b.double()
    out = torch.empty(33, 5000, dtype=dtype)
    multiply(server, a, b, out, bias=torch.ones(5000, dtype=dtype))
    assert torch.allclose(out.double(), truth + 1, rtol=2 * ROUNDING[dtype], atol=1e-4)
    # The sum over tokens is float32 for operands of any dtype.
    sums = torch.ones(5000, 40)
    multiply(server, b.t().contiguous()[:, :33], a[:, :40], sums[:, :40], add=True)
    assert torch.allclose(sums.double(), 1 + b.t().double()[:, :33] @ a.double(), atol=1e-4)


@pytest.mark.skipif(not cpu.multiplies(torch.float32), reason="this CPU's products are the library's")
def test_a_sequence_has_the_same_loss_bits_alone_and_in_a_batch():
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(8, 11, 24, generator=generator), torch.randn(700, 24, generator=generator)
    labels = torch.randint(700, (8, 11), generator=generator)
    labels[:, :3] = -100
    given = {"reduction": "none", "loss_type": "simpo"}
    both = linear_dpo_loss(hidden, weight, labels, **given)
    alone = linear_dpo_loss(hidden[[2, 6]], weight, labels[[2, 6]], **given)
    assert torch.equal(alone.loss, both.loss[2:3])


def test_a_subclass_of_tensor_multiplies_in_its_own_way():
    asked = []

    class Quantised(Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            asked.append(func)
            return super().__torch_function__(func, types, args, kwargs or {})

    a, b = torch.randn(4, 5), torch.randn(5, 6)
    out = multiply("cpu", a, b.as_subclass(Quantised), torch.empty(4, 6))
    assert torch.mm in asked
    assert torch.allclose(out.as_subclass(Tensor), a @ b, atol=1e-5)
