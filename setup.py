"""Builds the native libraries while the package is installed, where a compiler and torch are in sight.

Nothing here can fail an installation: a library that could not be built is compiled on first use (see
dpo_kernels/_build.py), or another backend serves. No network is touched. Which libraries are built says
`installed_libraries` there.
"""

import importlib.util
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


def load_recipe(package: Path):
    """dpo_kernels/_build.py by its path: importing the package would need torch."""
    spec = importlib.util.spec_from_file_location("_build", package / "_build.py")
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    return recipe


class BuildWithKernels(build_py):
    """Copies the Python files, then compiles the libraries beside them (into the checkout, for an editable install)."""

    def run(self):
        super().run()
        editable = getattr(self, "editable_mode", False)
        package = (ROOT if editable else Path(self.build_lib)) / "dpo_kernels"
        recipe = load_recipe(package)
        for name in ("cpu", "cuda"):
            for stale in package.glob(f"_{name}.*.so"):
                if not stale.name.startswith(recipe.library_path(name).stem):
                    stale.unlink()
        for target, build in recipe.installed_libraries().items():
            if target.is_file():
                continue
            try:
                build(target)
            except recipe.BuildError as reason:
                print(f"dpo-kernels: {target.name} not built now: {reason}", file=sys.stderr)


setup(cmdclass={"build_py": BuildWithKernels})
