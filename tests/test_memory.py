"""Large new tensors request large pages. Small ones, and all tensors without the CPU library, come from torch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dpo_kernels import backends, memory
from dpo_kernels.memory import LARGE, fresh

THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def flags_at(address: int) -> set[str]:
    """The Linux kernel's flags of the memory mapping that contains an address."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if "-" in words[0] and not words[0].endswith(":"):
            first, last = (int(part, 16) for part in words[0].split("-"))
            inside = first <= address < last
        elif inside and words[0] == "VmFlags:":
            return set(words[1:])
    raise AssertionError("no mapping holds the address")


@pytest.mark.skipif(not THP.exists(), reason="no transparent huge pages here: not Linux, or built without them")
def test_large_tensors_ask_for_large_pages(monkeypatch):
    monkeypatch.setattr(memory, "_keeps_large_pages", lambda: True)
    if backends.why_not("cpu", "cpu"):
        pytest.skip(f"the cpu backend does not serve: {backends.why_not('cpu', 'cpu')}")
    large = fresh((LARGE // 4 + 1, 2), torch.float32, "cpu")
    assert "hg" in flags_at(large.data_ptr() + large.nbytes // 2)
    assert large.shape == (LARGE // 4 + 1, 2)
    assert large.is_contiguous()
    large.fill_(1.0)
    assert float(large.sum(dtype=torch.float64)) == large.numel()


@pytest.mark.parametrize(
    ("content", "large"), [("9\n", False), ("0\n", False), ("4294967295\n", True), ("", True), (None, True)]
)
def test_no_large_pages_where_free_ones_go_back_to_a_host(content, large, tmp_path, monkeypatch):
    """If no host reclaims pages, Linux reports -1 as an unsigned number."""
    order = tmp_path / "page_reporting_order"
    if content is not None:
        order.write_text(content)
    asked = []
    monkeypatch.setattr(memory, "_REPORTING", order)
    monkeypatch.setattr(memory, "_keeps_large_pages", memory._keeps_large_pages.__wrapped__)
    monkeypatch.setattr(torch.ops.dpo_kernels_cpu, "prefer_huge_pages", asked.append, raising=False)
    fresh((LARGE,), torch.uint8, "cpu")
    assert bool(asked) == large


@pytest.mark.parametrize("size", [0, 1, LARGE - 1])
def test_small_ones_are_plain(size, monkeypatch):
    def refuse(_):
        raise AssertionError("asked for large pages")

    monkeypatch.setattr(torch.ops.dpo_kernels_cpu, "prefer_huge_pages", refuse, raising=False)
    assert fresh((size,), torch.uint8, "cpu").nbytes == size


@pytest.mark.skipif(not THP.exists(), reason="no transparent huge pages here: not Linux, or built without them")
@pytest.mark.parametrize(("setting", "large"), [(None, True), ("0", False)])
@pytest.mark.parametrize("module", ["dpo_trainer", "dpo_kernels.integrations.trl"])
def test_a_trainers_tensors_ask_for_large_pages_unless_told_not_to(module, setting, large):
    """Runs in a separate process, because torch reads the setting once."""
    program = (
        f"import sys; sys.path.insert(0, 'tests'); import {module}, torch; from test_memory import flags_at; "
        "x = torch.empty(1 << 25); print('hg' in flags_at(x.data_ptr() + x.nbytes // 2))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}
    if setting is not None:
        environment["THP_MEM_ALLOC_ENABLE"] = setting
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run([sys.executable, "-c", program], env=environment, cwd=root, capture_output=True, text=True)
    assert done.stdout.strip() == str(large), done.stderr
