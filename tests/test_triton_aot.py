"""Limits on the Triton kernels' machine code for sm_80, sm_90 and sm_100, on which their speed depends. Needs no GPU.

Compiling needs a process without Triton's interpreter, so the figures come from `python -m benchmarks.machine_code`.
"""

import fcntl
import json
import os
import subprocess
import sys

import pytest

from benchmarks import machine_code
from benchmarks.machine_code import (
    CARDS,
    Card,
    Kernel,
    Listing,
    Loop,
    bandwidth_share,
    loads_before_use,
    main_loop,
    occupancy,
)
from benchmarks.tritons import OLDER, ROOT, environment, installed

ARCHITECTURES = (80, 90, 100)

#: Most issue slots per logit in a streaming kernel's main loop, for all three architectures. The limits are tight on sm_80,
#: the oldest. A B200 has 8.8 slots per bfloat16 logit. Unaligned rows are loaded word by word. A softcap adds a tanh.
LIMITS = {
    "triton token_logps bf16 alone": 5.5,
    "triton token_logps bf16 entropy+accuracy+mean": 8.0,
    "triton token_logps bf16 log_sum_sq": 7.0,
    "triton token_logps bf16 reference+kl": 6.6,
    "triton token_logps bf16 reference, all statistics": 8.0,
    "triton token_logps bf16 reference, all statistics, log_sum_sq": 8.5,
    "triton token_logps bf16 alone, V odd": 6.6,
    "triton token_logps bf16 reference, all statistics, V odd": 8.8,
    "triton token_logps bf16 alone, softcap": 25.0,
    "triton token_logps fp16 alone": 5.5,
    "triton token_logps fp32 alone": 5.6,
    "triton token_logps fp32 reference, all statistics": 7.7,
    "triton logits_grad bf16": 5.7,
    "triton logits_grad bf16 V odd": 5.7,
    "triton logits_grad bf16 V odd, shifted rows": 6.9,
    "triton logits_grad bf16 softcap": 14.1,
    "triton logits_grad fp16": 5.7,
    "triton logits_grad fp32": 5.0,
    "triton logits_grad bf16 both KL": 8.0,
    "triton logits_grad fp32 both KL": 7.2,
}

#: Smallest predicted share of a card's bandwidth, for warps in lock step and for independent warps. An exponential takes a
#: scheduler 8 cycles, so 32 bfloat16 logits cost at least 8.25 cycles. Memory needs 17.7 cycles for them on an H100, 12.4 on
#: an H200 and 8.8 on a B200. On a B200, lock step leaves the memory idle for a third of the time or more.
LOWEST = {"A100": (0.95, 0.95), "H100": (0.95, 0.95), "H200": (0.85, 0.95), "B200": (0.5, 0.7)}

#: Kernels with unaligned reads, or with computations that have no cheap form, have weaker limits.
UNALIGNED_LOADS = ("token_logps bf16 alone, V odd", "all statistics, V odd", "shifted rows")


#: The matrix products of the LM head's gradient.
PRODUCTS = ("logits", "hidden", "weight")


#: Every run tests the oldest and the installed Triton; None stands for the installed one.
VERSIONS = [OLDER[0], *(pytest.param(version, marks=pytest.mark.slow) for version in OLDER[1:]), None]


def run_inspection(path, *arguments: str, version: str | None = None) -> list[dict]:
    """The figures of an inspection with that Triton. A lock makes parallel test processes compile only once."""
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            command = [sys.executable, "-W", "ignore", "-m", "benchmarks.machine_code", *arguments, "--json", str(path)]
            done = subprocess.run(
                command, cwd=ROOT, env=environment(version), capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    figures = json.loads(path.read_text())
    assert list(figures) == [version or installed()]
    return figures[version or installed()]


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory):
    """One folder for all processes of a run (pytest-xdist gives each process a subfolder of it)."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="module", params=VERSIONS, ids=lambda version: version or "installed")
def version(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def report(version, shared_folder):
    """Figures of the kernels compiled by one version of Triton."""
    path = shared_folder / f"machine_code_{version or 'installed'}.json"
    return run_inspection(path, "--only", "triton", version=version)


@pytest.fixture(scope="module")
def yardstick(shared_folder):
    (row,) = run_inspection(shared_folder / "yardstick.json", "--only", "yardstick", "--arch", "90")
    return row


def streaming(report):
    return [row for row in report if row["slots_per_logit"] is not None]


def name(row):
    return f"{row['name']}, sm_{row['arch']}"


def test_every_streaming_kernel_is_compiled_for_three_architectures_and_has_a_limit(report):
    assert {row["name"] for row in streaming(report)} == set(LIMITS)
    for architecture in ARCHITECTURES:
        found = {row["name"] for row in report if row["arch"] == architecture}
        assert {"triton preference_loss", "triton sequence_sums"} < found
        assert {"triton linear_logps bf16 alone", *(f"triton linear_grad bf16 {d}" for d in PRODUCTS)} < found
        assert sum("token_logps" in kernel for kernel in found) >= 8
        assert sum("logits_grad" in kernel for kernel in found) >= 4


#: Allowed register spills, none of them in a main loop: a dozen instructions per tile, in addition to the 64 steps of its
#: product, or a few numbers per row before and after its main loop.
SPILLS = {
    "triton linear_logps bf16 stored in order, sm_90": 16,
    "triton linear_logps fp32 alone, sm_90": 12,
    "triton logits_grad bf16 both KL, sm_90": 8,
    **{f"triton token_logps {kind}, sm_{arch}": 4
       for kind in ("bf16 reference+kl", "bf16 reference, all statistics", "fp32 reference, all statistics")
       for arch in ARCHITECTURES},
}  # fmt: skip
SPILLS_OF = {("3.8.0", "triton linear_logps fp32 alone, sm_100"): 2, ("3.7.1", "triton preference_loss, sm_90"): 4}


def test_nothing_spills(report, version):
    for row in report:
        allowed = SPILLS_OF.get((version, name(row)), SPILLS.get(name(row), 0))
        assert row["spills"] <= allowed, name(row)
        assert row["local_bytes"] <= 4 * allowed, name(row)


def test_main_loops_hold_no_barrier_no_shuffle_and_no_float64(report):
    for row in streaming(report):
        assert row["loop_barriers"] == row["loop_shuffles"] == row["loop_doubles"] == 0, name(row)


def test_float64_is_little_or_the_first_warps(report):
    """On cards with one float64 unit per 64 float32 units, an instruction takes a warp 16 cycles. A program has four warps."""
    for row in streaming(report):
        if "token_logps" in row["name"]:
            # All warps add up the row. All also take part in the second pass over extreme rows, which is rare but in float64.
            moments = any(statistic in row["name"] for statistic in ("entropy", "kl", "all statistics"))
            assert row["doubles_by_all"] is not None, name(row)
            assert row["doubles_by_all"] <= (145 if moments else 45), name(row)
        else:
            assert row["doubles"] <= (135 if "KL" in row["name"] else 95 if "softcap" in row["name"] else 60), name(row)


def test_main_loops_stay_within_their_issue_slots(report):
    for row in streaming(report):
        assert row["slots_per_logit"] <= LIMITS[row["name"]], name(row)


def test_one_exponential_a_logit_and_little_else_in_the_special_function_unit(report):
    for row in streaming(report):
        # A softcap needs an additional exponential and reciprocal.
        allowed = 3.1 if "softcap" in row["name"] else 1.1
        assert row["mufu_per_logit"] <= allowed, name(row)


def test_global_accesses_are_128_bit(report):
    for row in streaming(report):
        logit_bytes = 4 if "fp32" in row["name"] else 2
        if row["name"].endswith(UNALIGNED_LOADS):
            # GROUP / 2 + 1 words of 32 bits for every 16 bytes. The backward's stores are aligned.
            assert row["loads_narrower"] * 4 * 16 == row["logits_per_iteration"] * logit_bytes * 20, name(row)
        else:
            assert row["loads_narrower"] == 0, name(row)
            assert row["loads_128"] * 16 == row["logits_per_iteration"] * logit_bytes, name(row)
        if "logits_grad" in row["name"]:
            assert row["stores_narrower"] == 0, name(row)
            # With a KL, two logits (policy and reference) are read for each gradient entry that is written.
            written = row["logits_per_iteration"] // (2 if "KL" in row["name"] else 1)
            assert row["stores_128"] * 16 == written * logit_bytes, name(row)


#: Most narrow copies per wide copy. Triton 3.6 copies twice as many indices in one kernel as later versions.
NARROW = 0.75
NARROW_OF = {("3.6.0", f"triton linear_grad bf16 hidden, sm_{architecture}"): 1.0 for architecture in ARCHITECTURES}


def test_products_run_on_the_tensor_cores_from_copies_under_way(report, version):
    """Only tensor cores multiply, and their operands arrive in asynchronous 16-byte copies."""
    products = [row for row in report if row["tensor_instructions"] is not None]
    assert len(products) == 6 * len(ARCHITECTURES)
    for row in products:
        assert row["tensor_instructions"] > 0, name(row)
        assert row["async_copies"] >= 8, name(row)
        # Indices of live blocks and of rows of the head are copied one by one.
        assert row["async_narrower"] <= NARROW_OF.get((version, name(row)), NARROW) * row["async_copies"], name(row)
        # Registers allow one resident block of 8 warps. Its asynchronous copies, not other warps, hide the memory latency.
        assert row["resident_threads"] >= 256, name(row)


def test_predicted_bandwidth(report):
    for row in streaming(report):
        if "softcap" in row["name"]:
            continue  # bound by instruction issue; its slots are tested above
        for card, (low, high) in row["bandwidth_share"].items():
            assert low >= LOWEST[card][0], f"{name(row)}: {card} {low}"
            assert high >= LOWEST[card][1], f"{name(row)}: {card} {high}"


def test_committed_figures_hold(report, version):
    """The committed figures are those of this tree. For a Triton without committed figures, only the limits are tested."""
    committed = machine_code.read_json()
    assert set(OLDER) < set(committed)
    version = version or installed()
    if version not in committed:
        return
    then = {(row["name"], row["arch"]): row for row in committed[version] if row["name"].startswith("triton")}
    now = {(row["name"], row["arch"]): row for row in report}
    assert then.keys() == now.keys()
    for key, row in now.items():
        # ptxas is deterministic. The tolerance allows for small edits.
        assert row["registers"] <= 1.1 * then[key]["registers"] + 4, name(row)
        assert row["instructions"] <= 1.1 * then[key]["instructions"], name(row)
        if row["slots_per_logit"] is not None:
            assert row["slots_per_logit"] <= 1.03 * then[key]["slots_per_logit"], name(row)
            assert row["bytes_in_flight"] >= 0.75 * then[key]["bytes_in_flight"], name(row)


def test_the_page_shows_the_committed_figures():
    page = machine_code.PAGE.read_text(encoding="utf-8")
    assert page == machine_code.with_tables(page), "run: python -m benchmarks.machine_code --markdown --write"


def test_the_inspection_can_fail(yardstick):
    """The usual form of such a kernel exceeds the limits, and the inspection detects it."""
    assert yardstick["loop_barriers"] > 0
    assert yardstick["loop_shuffles"] > 0
    assert yardstick["slots_per_logit"] > 10


def test_loops_and_loads_are_read_from_a_listing():
    code = [
        "MOV R1, c[0x0][0x28]",
        "@!P0 LDG.E.128 R4, desc[UR4][R2.64]",  # a masked loop
        "@P1 BRA `(.L_x_1)",
        "LDG.E.128 R8, desc[UR4][R2.64]",  # the main loop
        "LDG.E.64 R12, desc[UR4][R2.64+0x10]",
        "IADD3 R2, R2, 0x20, RZ",
        "FADD R20, R20, R12",
        "LDG.E.128 R16, desc[UR4][R2.64+0x20]",
        "@P0 BRA `(.L_x_2)",
        "EXIT",
        "BRA `(.L_x_3)",  # the trap after the end, a loop of one instruction
    ]
    listing = Listing(code, {".L_x_1": 1, ".L_x_2": 3, ".L_x_3": 10})
    assert main_loop(listing) == code[3:9]
    assert loads_before_use(code[3:9]) == (2, 24)


@pytest.mark.parametrize(
    ("registers", "threads", "shared", "arch", "expected"),
    [
        (32, 128, 0, 90, 2048),  # limited by threads
        (40, 128, 0, 90, 1536),
        (64, 256, 0, 80, 1024),
        (255, 128, 0, 90, 256),
        (32, 128, 100 << 10, 90, 256),  # shared memory: two blocks of 101 KB in 228
        (32, 32, 0, 100, 1024),  # 32 blocks
    ],
)
def test_occupancy(registers, threads, shared, arch, expected):
    assert occupancy(registers, threads, shared, arch) == expected


def predicted(
    card: Card, instructions: int = 160, mufu: int = 33, resident: int = 1024, asked: int = 64, rows: int = 8192
):
    kernel = Kernel("a kernel", card.arch, lambda: None, 128)
    return bandwidth_share(kernel, card, Loop(instructions, mufu, 32, asked), resident, rows)


def test_prediction_at_its_ends():
    """The prediction agrees with limits that are known without the model."""
    slow_memory = Card(132, 1.755e9, 1e11, 90)
    low, high = predicted(slow_memory)
    assert low == pytest.approx(1.0, abs=2e-3)
    assert high == pytest.approx(1.0, abs=2e-3)
    # With fast memory, the schedulers are never idle: 64 bytes for each of 32 lanes take one of 4 schedulers 160 cycles.
    fast = Card(132, 1.755e9, 1e15, 90)
    bound = 132 * 1.755e9 * 4 * 32 * 64 / 160 / fast.bandwidth
    low, high = predicted(fast, mufu=0, resident=2048, rows=10**9)
    assert 0.5 * bound < low < high <= bound + 5e-4
    # A single warp per scheduler does not wait for other warps: only latency, ends of rows and its own work count.
    h100 = CARDS["H100"]
    alone = (700e-9 + 2e-6 * 32 * 128 / 128256) * h100.clock + 400
    expected = 128 * 64 / alone / (h100.bandwidth / h100.sms / h100.clock)
    assert predicted(h100, instructions=400, resident=128, rows=10**9) == pytest.approx((expected, expected), abs=1e-3)


def test_prediction_counts_the_warps_that_share_a_scheduler():
    """With 10 warps per scheduler, an iteration takes the time of all 10, limited by instructions or by exponentials."""
    h200 = CARDS["H200"]
    issue, exponentials = predicted(h200, instructions=264, mufu=0), predicted(h200, instructions=160, mufu=33)
    assert issue == exponentials
    assert issue[0] < 0.9 < issue[1]
    low, high = zip(*(predicted(h200, instructions=n, mufu=0) for n in (100, 200, 300, 400)), strict=True)
    assert sorted(low, reverse=True) == list(low)
    assert sorted(high, reverse=True) == list(high)
    assert all(a <= b for a, b in zip(low, high, strict=True))


def test_few_rows_end_early():
    assert predicted(CARDS["H100"], rows=1024) < predicted(CARDS["H100"], rows=8192)
