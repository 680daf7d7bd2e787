"""The kernels compute the same numbers with the older Tritons that supported versions of torch install.

test_triton_aot.py tests their machine code. A missing Triton is an error, not a skip, because `make test` installs it.
"""

import os
import re
import subprocess
import sys

import pytest

from benchmarks.tritons import OLDER, ROOT, environment, folder

# Some tests of every stage and of the LM head's products, which another interpreter could refuse or compute differently.
SAMPLE = " or ".join(
    (
        "test_stages_equal_the_float64_truth_around_the_tile",
        "test_gradient_in_place_out_of_place",
        "test_minus_infinity_carries_no_mass",
        "test_ties_go_to_the_first_entry",
        "test_preference_loss_equals_its_formulas",
        "test_filtered_gradients_equal_their_definition and bfloat16",
    )
)
RUN = """
import sys, pytest, triton
version, *arguments = sys.argv[1:]
assert triton.__version__ == version, f"{triton.__version__} from {triton.__file__}, wanted {version}"
sys.exit(pytest.main(arguments))
"""


def run_kernel_tests(version: str, *arguments: str) -> None:
    wanted = environment(version, TRITON_INTERPRET="1", DPO_KERNELS_BACKEND="")
    clean = {name: value for name, value in wanted.items() if not name.startswith("PYTEST_")}
    files = ("tests/test_triton_kernels.py", "tests/test_triton_linear.py")
    command = [sys.executable, "-c", RUN, version, "-q", "-p", "no:cacheprovider", "-m", "not slow", *arguments, *files]
    done = subprocess.run(command, cwd=ROOT, env=clean, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert re.search(r"\b\d+ passed", done.stdout), done.stdout[-1000:]


def test_the_oldest_triton_computes_the_same_numbers():
    run_kernel_tests(OLDER[0], "-k", SAMPLE)


@pytest.mark.slow
@pytest.mark.parametrize("version", OLDER)
def test_every_older_triton_passes_the_kernels_tests(version):
    run_kernel_tests(version)


def test_the_build_description_asks_for_the_oldest_triton_or_newer():
    (bound,) = re.findall(r'"triton>=([\d.]+);', (ROOT / "pyproject.toml").read_text())
    assert OLDER[0].startswith(bound + ".")


def test_an_older_triton_comes_first_on_the_path_and_a_missing_one_is_an_error():
    assert environment(OLDER[0])["PYTHONPATH"].split(os.pathsep)[0] == str(folder(OLDER[0]))
    with pytest.raises(FileNotFoundError, match=r"python -m benchmarks.tritons install 3\.5\.1"):
        environment("3.5.1")
