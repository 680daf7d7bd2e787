"""`import dpo_kernels` imports no heavy module except torch."""

import subprocess
import sys

CODE = """
import sys, time
begin = time.perf_counter()
import torch
middle = time.perf_counter()
before = set(sys.modules)
import dpo_kernels
end = time.perf_counter()
roots = {name.partition(".")[0] for name in set(sys.modules) - before}
print(end - middle, middle - begin, *sorted(roots))
"""


def test_import_costs_little_beside_torch():
    """Measured: 0.16 s in addition to torch's 1.7 s. Importing torch's compiler would take as long as the rest of torch."""
    runs = []
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
        ours, theirs, *roots = done.stdout.split()
        assert roots == ["dpo_kernels"]
        runs.append((float(ours), float(theirs)))
    assert min(ours for ours, _ in runs) < 0.3 * min(theirs for _, theirs in runs)
