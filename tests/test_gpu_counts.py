"""Host synchronisations, launches and bytes of a call on a GPU: counted here, committed, and shown in docs/gpu.md."""

import json

import pytest

from benchmarks import gpu_counts
from benchmarks.readme_table import with_block

COMMITTED = {(row["case"], row["backend"]): row for row in json.loads(gpu_counts.RESULTS.read_text())}
REFRESH = "run: python -m benchmarks.gpu_counts --write"


@pytest.mark.parametrize("backend_name", ["triton", "cuda"])
@pytest.mark.parametrize("case", gpu_counts.CASES)
def test_counts_are_the_committed_ones(case, backend_name):
    found = gpu_counts.count(case, backend_name)
    assert found == COMMITTED.get((case, backend_name)), REFRESH


def test_nothing_else_is_committed():
    assert len(COMMITTED) == 2 * len(gpu_counts.CASES), REFRESH


def test_the_logits_path_never_waits():
    assert all(row["waits"] == 0 for row in COMMITTED.values() if row["case"].startswith("dpo_loss"))


def test_the_linear_path_waits_once_a_call_however_many_chunks():
    linear = [row for row in COMMITTED.values() if row["case"].startswith("linear")]
    assert {row["waits"] for row in linear} == {1}


def test_a_call_is_three_launches_of_the_cuda_backend_whatever_is_asked_for():
    """One launch each for the rows of logits, the pairs and the gradient."""
    asked = ("dpo_loss", "dpo_loss, reference sums given", "dpo_loss, packed", "dpo_loss, every statistic")
    assert {COMMITTED[case, "cuda"]["kernels"] for case in asked} == {3}


def test_the_page_shows_the_committed_counts():
    page = gpu_counts.PAGE.read_text(encoding="utf-8")
    rows = [COMMITTED[case, name] for case in gpu_counts.CASES for name in ("triton", "cuda")]
    assert page == with_block(page, gpu_counts.render(rows), gpu_counts.MARKERS), REFRESH
