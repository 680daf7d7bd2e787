"""The sdist and the wheels of `make dist`: their names, their contents, and the systems on which their library runs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from dpo_kernels import _build
from dpo_kernels.backends import cpu

ROOT = Path(__file__).resolve().parent.parent
#: The newest symbol versions that the tag manylinux_2_34 allows. An x86-64 wheel built by g++ 12 has this tag.
NEWEST = {"GLIBC": (2, 34), "GLIBCXX": (3, 4, 29), "CXXABI": (1, 3, 13), "GCC": (12, 0, 0)}

cpu.check_available("cpu")


def call_hook(hook: str, folder: Path, target: Path, **environment: str) -> Path:
    """Call a hook of the build backend in a separate process, as installers do, and return the file that it built."""
    code = f"from setuptools import build_meta; print(build_meta.{hook}({str(target)!r}))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return target / done.stdout.split()[-1]


@pytest.fixture(scope="module")
def clean_folder(tmp_path_factory) -> Path:
    """A folder with only the sdist's files and the CPU library that this machine has compiled from them."""
    folder = tmp_path_factory.mktemp("dist")
    checkout = folder / "checkout"
    ignore = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info")
    for name in ("dpo_kernels", "csrc", "python"):
        shutil.copytree(ROOT / name, checkout / name, ignore=ignore)
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, checkout)
    with tarfile.open(call_hook("build_sdist", checkout, folder)) as packed:
        packed.extractall(folder / "sdist", filter="data")
    (unpacked,) = (folder / "sdist").iterdir()
    library = _build.find_or_build("cpu", _build.build_cpu, print)
    shutil.copy(library, unpacked / "dpo_kernels" / _build.library_path("cpu").name)
    return unpacked


@pytest.fixture(scope="module")
def wheels(clean_folder) -> dict[str, Path]:
    dist = clean_folder / "dist"
    return {kind: call_hook("build_wheel", clean_folder, dist, DPO_KERNELS_WHEEL=kind) for kind in ("cpu", "any")}


def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as packed:
        return set(packed.namelist())


def about(wheel: Path) -> str:
    with zipfile.ZipFile(wheel) as packed:
        return packed.read(next(name for name in packed.namelist() if name.endswith("/WHEEL"))).decode()


def test_wheels_say_what_they_carry(wheels):
    library = f"dpo_kernels/{_build.library_path('cpu').name}"
    assert re.fullmatch(r"dpo_kernels-[\d.]+-py3-none-any\.whl", wheels["any"].name)
    assert re.fullmatch(r"dpo_kernels-[\d.]+-py3-none-(?!any)\w+\.whl", wheels["cpu"].name)
    assert "Root-Is-Purelib: true" in about(wheels["any"])
    assert "Root-Is-Purelib: false" in about(wheels["cpu"])
    # The platform wheel was built first in the same folder. Its library must not get into the next wheel.
    assert {name for name in names(wheels["any"]) if name.endswith(".so")} == set()
    assert {name for name in names(wheels["cpu"]) if name.endswith(".so")} == {library}
    assert names(wheels["cpu"]) - names(wheels["any"]) == {library}


def test_every_source_travels(wheels):
    sources = {f"dpo_kernels/csrc/{path.relative_to(_build.CSRC)}" for path in _build.CSRC.rglob("*.*")}
    python = {f"dpo_kernels/{path.relative_to(_build.PACKAGE)}" for path in _build.PACKAGE.rglob("*.py")}
    assert sources | python <= names(wheels["any"])


@pytest.mark.skipif(sys.platform != "linux", reason="ELF files are Linux's")
def test_the_library_runs_where_the_tag_says(wheels, tmp_path):
    with zipfile.ZipFile(wheels["cpu"]) as packed:
        library = packed.extract(f"dpo_kernels/{_build.library_path('cpu').name}", tmp_path)
    told = subprocess.run(
        ["readelf", "--wide", "--dynamic", "--version-info", library], capture_output=True, text=True, check=True
    ).stdout
    assert set(re.findall(r"\(NEEDED\).*\[(.+?)\]", told)) <= {
        "libtorch_cpu.so", "libstdc++.so.6", "libm.so.6", "libgcc_s.so.1", "libc.so.6",
    }  # fmt: skip
    assert "RPATH" not in told
    assert "RUNPATH" not in told
    needed = re.findall(r"Name: ([A-Z]+)_([\d.]+)", told)
    assert {name for name, _ in needed} >= {"GLIBC", "GLIBCXX"}
    for name, version in needed:
        assert tuple(map(int, version.split("."))) <= NEWEST[name], f"{name}_{version}"


def test_an_installed_wheel_needs_no_compiler(wheels, tmp_path):
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--target",
        str(tmp_path / "site"),
    ]
    subprocess.run([*command, str(wheels["cpu"])], check=True, capture_output=True)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "PATH": "", "CXX": "", "DPO_KERNELS_JIT": "0"}
    environment["DPO_KERNELS_CACHE"] = str(tmp_path / "cache")
    # A sample of the operator table; `make dist-check` runs all of it.
    code = """
import sys
from dpo_kernels import __main__ as command, selfcheck
sys.exit(command.check("cpu", "cpu", selfcheck.TABLE[::20]))
"""
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, env=environment, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    right, every = re.fullmatch(r"cpu: (\d+) of (\d+) cases right\n", done.stdout).groups()
    assert right == every


def test_a_wheel_of_another_kind_is_refused(clean_folder):
    done = subprocess.run(
        [sys.executable, "setup.py", "--name"],
        cwd=clean_folder,
        env={**os.environ, "DPO_KERNELS_WHEEL": "rocm"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "DPO_KERNELS_WHEEL must be one of any, cpu, cuda, not 'rocm'" in done.stderr


@pytest.mark.slow
def test_the_sdist_compiles_from_a_clean_folder_and_the_cuda_wheel_carries_both(clean_folder, tmp_path):
    fresh = tmp_path / "fresh"
    shutil.copytree(clean_folder, fresh, ignore=shutil.ignore_patterns("*.so", "dist", "build"))
    wheel = call_hook("build_wheel", fresh, tmp_path / "dist", DPO_KERNELS_WHEEL="cuda")
    assert re.fullmatch(r"dpo_kernels-[\d.]+\+cu\d+-py3-none-(?!any)\w+\.whl", wheel.name)
    held = {name for name in names(wheel) if name.endswith(".so")}
    assert held == {f"dpo_kernels/{_build.library_path(name).name}" for name in ("cpu", "cuda")}
