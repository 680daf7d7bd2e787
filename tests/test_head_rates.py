"""The benchmark of products and block filter runs on a CPU with interpreted kernels. Its figures there mean nothing."""

import time

import pytest

from benchmarks import head_rates

from conftest import DEVICE


def seconds_of(job):
    begin = time.perf_counter()
    job()
    return [time.perf_counter() - begin]


def test_the_rates_and_whole_steps_are_measured():
    rows = head_rates.measure(seconds_of, DEVICE, "triton", [(16, 16, 160)])
    (times,) = rows.values()
    assert {"library product", "fused forward", "exact step", "filtered step"} < times.keys()
    assert times["fused share"] == times["library product"] / times["fused forward"]
    # A tenth of the vocabulary is likely and is in one block: one of five blocks of 32 entries, or on a GPU one of two of 128.
    assert times["live share"] == pytest.approx(0.2 if DEVICE == "cpu" else 0.5)
    (line,) = head_rates.table(rows).splitlines()
    assert line.startswith("[16x160x16]: library")
    assert "filtered step" in line
