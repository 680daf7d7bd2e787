"""The Triton kernels compiled for AMD GPUs: 16-byte loads, no scratch memory, no exchange between lanes.

No GPU is needed. Whether the kernels compute the right numbers must be tested on such a card.
"""

import json
import subprocess
import sys

import pytest

from benchmarks.machine_code_amd import ARCHITECTURES, listing, main_loop
from benchmarks.tritons import ROOT, environment

STAGES = ("token_logps", "logits_grad", "preference_loss", "sequence_sums")

#: Most instructions per logit and lane, by stage. An MI300X has 304 compute units x 4 SIMDs x 16 lanes x 2.1 GHz for
#: 5.3 TB/s, which is time for 15.4 instructions per bfloat16 logit read once. A softcap adds a tanh.
SLOTS = {"token_logps": 9.5, "logits_grad": 11.0}
SOFTCAP = 30.0


@pytest.fixture(
    scope="module", params=[ARCHITECTURES[0], *(pytest.param(a, marks=pytest.mark.slow) for a in ARCHITECTURES[1:])]
)
def rows(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("amd") / "figures.json"
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.machine_code_amd", "--arch", request.param]
    command += ["--json", str(path), "--only", *STAGES]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    # LLVM continues after assembly that it cannot translate.
    assert "error:" not in done.stderr, done.stderr[-2000:]
    return json.loads(path.read_text())


def streaming(rows):
    return [row for row in rows if row["slots_per_logit"] is not None]


def test_every_stage_is_compiled_and_brings_no_assembly_of_its_own(rows):
    assert {row["name"].split()[1].rstrip(",") for row in rows} == set(STAGES)
    assert len(streaming(rows)) == len(rows) - 3
    assert [row["name"] for row in rows if row["inline_assembly"]] == []


def test_nothing_spills_and_nothing_lies_in_scratch(rows):
    assert [row["name"] for row in rows if row["spills"] or row["scratch_bytes"]] == []


def test_main_loops_read_16_bytes_a_load_and_stay_within_a_lane(rows):
    for row in streaming(rows):
        logit_bytes = 4 if "fp32" in row["name"] else 2
        rest = row["loop_barriers"], row["loop_lds"], row["stores_narrower"]
        assert rest == (0, 0, 0), row["name"]
        if "V odd" in row["name"] and "logits_grad" not in row["name"]:
            # One more word for each group. These loads need only word alignment, so LLVM merges four of them.
            assert row["loads_128"] * 16 == row["logits_per_iteration"] * logit_bytes, row["name"]
            continue
        if "shifted" not in row["name"]:
            assert row["loads_narrower"] == 0, row["name"]
        assert row["loads_128"] * 16 == row["logits_per_iteration"] * logit_bytes, row["name"]


def test_no_two_threads_hold_the_same_logits(rows):
    """A wavefront has 64 lanes, twice as many as a warp, so a block needs half as many wavefronts."""
    assert [row["name"] for row in streaming(rows) if row["copies"] != 1] == []


def test_main_loops_stay_within_their_issue_slots(rows):
    for row in streaming(rows):
        limit = SOFTCAP if "softcap" in row["name"] else SLOTS[row["name"].split()[1]]
        assert row["slots_per_logit"] <= limit, f"{row['name']}: {row['slots_per_logit']}"


def test_two_waves_fit_on_a_simd(rows):
    """One wavefront loads while the other computes."""
    assert [row["name"] for row in rows if row["waves_per_simd"] < 2] == []


def test_a_loop_is_read_from_a_listing():
    assembly = """
kernel:                                 ; @kernel
\ts_load_dwordx2 s[0:1], s[0:1], 0x0
.LBB0_1:                                ; a loop that forks for a mask
\ts_and_saveexec_b64 s[2:3], vcc
\tglobal_load_dwordx4 v[0:3], v[8:9], off
\tglobal_load_dwordx4 v[4:7], v[8:9], off
\ts_cbranch_scc1 .LBB0_1
.LBB0_2:                                ; the main loop
\t.loc\t1 2 3
\tglobal_load_dwordx4 v[0:3], v[8:9], off ; with a comment
\ts_waitcnt vmcnt(0)
.Ltmp1:
\tv_exp_f32_e32 v0, v0
\ts_cbranch_scc1 .LBB0_2
\ts_endpgm
"""
    code, labels = listing(assembly)
    assert labels == {".LBB0_1": 1, ".LBB0_2": 5}
    assert main_loop(code, labels) == code[5:9]
    assert code[5] == "global_load_dwordx4 v[0:3], v[8:9], off"
