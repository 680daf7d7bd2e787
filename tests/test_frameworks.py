"""The DPO step of every framework is the same with our kernels as without them, in float32.

Each entry of tests/frameworks/matrix.py is one version of a framework, which runs its own code in a process of its own.
"""

import pytest
from frameworks import matrix


@pytest.mark.parametrize(
    "entry",
    [pytest.param(entry, id=entry.name, marks=() if entry.sample else pytest.mark.slow) for entry in matrix.ENTRIES],
)
def test_the_step_is_the_same(entry):
    missing = [package for package in entry.packages if not matrix.folder(package).is_dir()]
    assert not missing, f"run: python tests/frameworks/matrix.py install {entry.name}"
    found = matrix.run(entry)
    assert found["kernels_used"]
    assert found["same_parameters"]
    assert found["grad_norm"] > 0
    assert found["loss_difference"] < 1e-5 * max(1, abs(found["loss"]))
    assert found["grad_difference"] < 1e-4
    assert found["undone"]
    assert found["kernels_used_after_undo"] == 0
