"""The Triton kernels' machine code for sm_80, sm_90 and sm_100: limits that carry the speed argument, held without a GPU.

Compiling needs a process in which Triton is not interpreted, so the figures come from `python -m benchmarks.machine_code`.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.machine_code import RESULTS, Listing, loads_before_use, main_loop, occupancy

ROOT = Path(__file__).parent.parent
ARCHITECTURES = (80, 90, 100)

#: Most issue slots a logit that a streaming kernel's main loop may take (held for all three; they are tight on sm_80,
#: the oldest; a B200 has 8.8 slots a bfloat16 logit). Unaligned rows load word by word; a softcap adds a tanh.
LIMITS = {
    "triton token_logps bf16 alone": 5.5,
    "triton token_logps bf16 entropy+accuracy+mean": 8.0,
    "triton token_logps bf16 log_sum_sq": 7.0,
    "triton token_logps bf16 reference+kl": 6.6,
    "triton token_logps bf16 reference, all statistics": 8.0,
    "triton token_logps bf16 reference, all statistics, log_sum_sq": 8.5,
    "triton token_logps bf16 alone, V odd": 6.6,
    "triton token_logps bf16 reference, all statistics, V odd": 8.8,
    "triton token_logps bf16 alone, softcap": 23.5,
    "triton token_logps fp16 alone": 5.5,
    "triton token_logps fp32 alone": 5.6,
    "triton token_logps fp32 reference, all statistics": 7.7,
    "triton logits_grad bf16": 5.7,
    "triton logits_grad bf16 V odd": 5.7,
    "triton logits_grad bf16 V odd, shifted rows": 6.9,
    "triton logits_grad bf16 softcap": 14.1,
    "triton logits_grad fp16": 5.7,
    "triton logits_grad fp32": 5.0,
    "triton logits_grad bf16 both KL": 7.5,
    "triton logits_grad fp32 both KL": 6.7,
}

#: What a kernel reads that is not 16-byte aligned, or computes that has no cheap form, is allowed less than the rest.
UNALIGNED_LOADS = ("token_logps bf16 alone, V odd", "all statistics, V odd", "shifted rows")


#: The products of the LM head's gradient.
PRODUCTS = ("logits", "hidden", "weight")


def run_inspection(*arguments: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.machine_code", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    path = tmp_path_factory.mktemp("machine_code") / "figures.json"
    run_inspection("--only", "triton", "--json", str(path))
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def yardstick(tmp_path_factory):
    path = tmp_path_factory.mktemp("machine_code") / "yardstick.json"
    run_inspection("--only", "yardstick", "--arch", "90", "--json", str(path))
    (row,) = json.loads(path.read_text())["kernels"]
    return row


def streaming(report):
    return [row for row in report["kernels"] if row["slots_per_logit"] is not None]


def name(row):
    return f"{row['name']}, sm_{row['arch']}"


def test_every_streaming_kernel_is_compiled_for_three_architectures_and_has_a_limit(report):
    assert {row["name"] for row in streaming(report)} == set(LIMITS)
    for architecture in ARCHITECTURES:
        found = {row["name"] for row in report["kernels"] if row["arch"] == architecture}
        assert {"triton preference_loss", "triton sequence_sums"} < found
        assert {"triton linear_logps bf16 alone", *(f"triton linear_grad bf16 {d}" for d in PRODUCTS)} < found
        assert sum("token_logps" in kernel for kernel in found) >= 8
        assert sum("logits_grad" in kernel for kernel in found) >= 4


#: The one exception: on sm_90 a dozen instructions once a tile, beside the 64 steps of its product.
SPILLS = {"triton linear_logps bf16 stored in order, sm_90": 16}


def test_nothing_spills(report):
    for row in report["kernels"]:
        assert row["spills"] <= SPILLS.get(name(row), 0), name(row)
        assert row["local_bytes"] <= 4 * SPILLS.get(name(row), 0), name(row)


def test_main_loops_hold_no_barrier_no_shuffle_and_no_float64(report):
    for row in streaming(report):
        assert row["loop_barriers"] == row["loop_shuffles"] == row["loop_doubles"] == 0, name(row)


def test_main_loops_stay_within_their_issue_slots(report):
    for row in streaming(report):
        assert row["slots_per_logit"] <= LIMITS[row["name"]], name(row)


def test_one_exponential_a_logit_and_little_else_in_the_special_function_unit(report):
    for row in streaming(report):
        # A softcap is an exponential and a reciprocal more.
        allowed = 3.1 if "softcap" in row["name"] else 1.1
        assert row["mufu_per_logit"] <= allowed, name(row)


def test_global_accesses_are_128_bit(report):
    for row in streaming(report):
        logit_bytes = 4 if "fp32" in row["name"] else 2
        if row["name"].endswith(UNALIGNED_LOADS):
            # GROUP / 2 + 1 words of 32 bits for every 16 bytes; the backward's stores stay aligned.
            assert row["loads_narrower"] * 4 * 16 == row["logits_per_iteration"] * logit_bytes * 20, name(row)
        else:
            assert row["loads_narrower"] == 0, name(row)
            assert row["loads_128"] * 16 == row["logits_per_iteration"] * logit_bytes, name(row)
        if "logits_grad" in row["name"]:
            assert row["stores_narrower"] == 0, name(row)
            # With a KL two logits are read, the policy's and the reference's, for each that is written.
            written = row["logits_per_iteration"] // (2 if "KL" in row["name"] else 1)
            assert row["stores_128"] * 16 == written * logit_bytes, name(row)


def test_products_run_on_the_tensor_cores_from_copies_under_way(report):
    """Nothing but the tensor cores multiplies, and what they read comes in 16-byte copies that no thread waits for."""
    products = [row for row in report["kernels"] if row["tensor_instructions"] is not None]
    assert len(products) == 6 * len(ARCHITECTURES)
    for row in products:
        assert row["tensor_instructions"] > 0, name(row)
        assert row["async_copies"] >= 8, name(row)
        # Indices of live blocks and rows of the head come one by one, beside them.
        assert row["async_narrower"] <= 0.75 * row["async_copies"], name(row)
        # Registers let one block of 8 warps be resident; its copies, not other warps, hide the memory.
        assert row["resident_threads"] >= 256, name(row)


def test_predicted_bandwidth(report):
    for row in streaming(report):
        if "softcap" in row["name"]:
            continue  # issue-bound, and said so: its slots are held above
        for card, share in row["bandwidth_share"].items():
            assert share >= 0.9, f"{name(row)}: {card} {share}"


def test_committed_figures_hold(report):
    """What is committed is what this tree compiles to. Another Triton brings another compiler: then only limits apply."""
    committed = json.loads(RESULTS.read_text())
    then = {(row["name"], row["arch"]): row for row in committed["kernels"] if row["name"].startswith("triton")}
    now = {(row["name"], row["arch"]): row for row in report["kernels"]}
    assert then.keys() == now.keys()
    if committed["tools"]["triton"] != report["tools"]["triton"]:
        return
    for key, row in now.items():
        # ptxas is deterministic; the slack is for edits too small to argue about.
        assert row["registers"] <= 1.1 * then[key]["registers"] + 4, name(row)
        assert row["instructions"] <= 1.1 * then[key]["instructions"], name(row)
        if row["slots_per_logit"] is not None:
            assert row["slots_per_logit"] <= 1.03 * then[key]["slots_per_logit"], name(row)
            assert row["bytes_in_flight"] >= 0.75 * then[key]["bytes_in_flight"], name(row)


def test_the_inspection_can_fail(yardstick):
    """The usual form of such a kernel breaks the limits, and the inspection sees it."""
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
        "BRA `(.L_x_3)",  # the trap after the end, a loop of one
    ]
    listing = Listing(code, {".L_x_1": 1, ".L_x_2": 3, ".L_x_3": 10})
    assert main_loop(listing) == code[3:9]
    assert loads_before_use(code[3:9]) == (2, 24)


@pytest.mark.parametrize(
    ("registers", "threads", "shared", "arch", "expected"),
    [
        (32, 128, 0, 90, 2048),  # thread-bound
        (40, 128, 0, 90, 1536),
        (64, 256, 0, 80, 1024),
        (255, 128, 0, 90, 256),
        (32, 128, 100 << 10, 90, 256),  # shared memory: two blocks of 101 KB in 228
        (32, 32, 0, 100, 1024),  # 32 blocks
    ],
)
def test_occupancy(registers, threads, shared, arch, expected):
    assert occupancy(registers, threads, shared, arch) == expected
