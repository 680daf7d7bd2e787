"""Builds the native libraries during installation, if a compiler and torch are available.

A failed build does not fail the installation: the library is then compiled on first use (see dpo_kernels/_build.py), or
another backend serves. `installed_libraries` in that file chooses the libraries to build. No network is used.

`make dist` sets DPO_KERNELS_WHEEL to the contents of a wheel. A library that cannot be built is then an error.
"any": no library. "cpu": the CPU library. "cuda": the CPU library and the CUDA library for every architecture, with a local
version such as +cu13.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
WHEELS = {"any": (), "cpu": ("cpu",), "cuda": ("cpu", "cuda")}
WHEEL = os.environ.get("DPO_KERNELS_WHEEL")
if WHEEL and WHEEL not in WHEELS:
    sys.exit(f"DPO_KERNELS_WHEEL must be one of {', '.join(WHEELS)}, not {WHEEL!r}")


def load_recipe(package: Path):
    """Import dpo_kernels/_build.py by its path, because importing the package needs torch."""
    spec = importlib.util.spec_from_file_location("_build", package / "_build.py")
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    return recipe


def local_version() -> str:
    """The local version of a wheel with a CUDA library, such as +cu13, from the release of the statically linked runtime."""
    if WHEEL != "cuda":
        return ""
    nvcc = load_recipe(ROOT / "dpo_kernels").nvcc_compiler()
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    return "+cu" + re.search(r"release (\d+)", said).group(1)


class BuildWithKernels(build_py):
    """Copies the Python files, then compiles the libraries into the same folder (the checkout, for an editable install)."""

    def run(self):
        super().run()
        editable = getattr(self, "editable_mode", False)
        package = (ROOT if editable else Path(self.build_lib)) / "dpo_kernels"
        recipe = load_recipe(package)
        if WHEEL:
            wanted = {recipe.library_path(name): getattr(recipe, f"build_{name}") for name in WHEELS[WHEEL]}
        else:
            wanted = recipe.installed_libraries()
        for name in ("cpu", "cuda"):
            for stale in package.glob(f"_{name}.*.so"):
                if (WHEEL and stale not in wanted) or not stale.name.startswith(recipe.library_path(name).stem):
                    stale.unlink()
        for target, build in wanted.items():
            if target.is_file():
                continue
            ready = ROOT / "dpo_kernels" / target.name
            if ready.is_file():  # already compiled in the checkout, from the same sources
                shutil.copy2(ready, target)
                continue
            try:
                build(target)
            except recipe.BuildError as reason:
                if WHEEL:
                    raise
                print(f"dpo-kernels: {target.name} not built now: {reason}", file=sys.stderr)


class TaggedWheel(bdist_wheel):
    """Tags a wheel that contains a library for this platform and every Python 3, because no Python header is used."""

    def run(self):
        self.run_command("build")
        if any((Path(self.get_finalized_command("build_py").build_lib) / "dpo_kernels").glob("_*.so")):
            self.root_is_pure = False
            self.distribution.has_ext_modules = lambda: (
                True
            )  # installs the package into the folder for platform-specific files
        super().run()

    def get_tag(self):
        _, _, platform = super().get_tag()
        return "py3", "none", platform


setup(
    cmdclass={"build_py": BuildWithKernels, "bdist_wheel": TaggedWheel},
    options={"egg_info": {"tag_build": local_version()}},
)
