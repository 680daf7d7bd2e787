"""How the native libraries are compiled: one recipe for `pip install`, and for the first use where none was built.

`setup.py` loads this file by its path (torch may be missing there), `backends/cpu.py` and `backends/cuda.py` import it.
Compilers are called directly: each library is a handful of files, needs no Python header (PyTorch's stable ABI), and
appears by an atomic rename, so that several processes may build at once.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
# Installed, the sources lie inside the package; in a checkout they lie beside it.
CSRC = next((p for p in (PACKAGE / "csrc", PACKAGE.parent / "csrc") if p.is_dir()), PACKAGE / "csrc")

# The oldest torch whose stable ABI the libraries use (2.10.0); newer ones keep it.
ABI_FLAGS = ["-DTORCH_TARGET_VERSION=0x020a000000000000"]
# No -ffast-math: the exponential relies on (x + magic) - magic, and NaN must stay NaN.
CXX_FLAGS = ["-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi"]

# name, -march, register width in bytes. One copy of the row kernels for each; ops.cpp picks at run time.
X86_ISAS = (("baseline", "x86-64", 16), ("avx2", "x86-64-v3", 32), ("avx512", "x86-64-v4", 64))
OTHER_ISAS = (("baseline", None, 16),)


class BuildError(RuntimeError):
    """A native library could not be compiled; the message is one line that says why."""


def torch_folder() -> Path:
    """Where torch is installed, without importing it. Raises BuildError where there is none."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise BuildError("torch is not visible to this build")
    return Path(spec.origin).parent


def cxx_compiler() -> str:
    """The C++ compiler ($CXX, else g++, c++ or clang++). Raises BuildError where there is none."""
    for name in filter(None, (os.environ.get("CXX"), "g++", "c++", "clang++")):
        if found := shutil.which(name):
            return found
    raise BuildError("no C++ compiler found (set CXX, or install g++ or clang++)")


def run_all(commands: Sequence[Sequence[str]]) -> None:
    """Run compiler commands side by side; raise BuildError with the first line that says `error`."""

    def run(command: Sequence[str]) -> None:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            lines = (done.stderr or done.stdout).strip().splitlines() or ["no output"]
            reason = next((line for line in lines if "error" in line.lower()), lines[-1])
            raise BuildError(f"{Path(command[0]).name} failed: {reason.strip()}")

    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        list(pool.map(run, commands))


def include_flags(torch_dir: Path) -> list[str]:
    """The include path of torch's stable headers."""
    return [f"-I{torch_dir / 'include'}"]


def build_cpu(target: Path) -> None:
    """Compile csrc/cpu into the shared library `target`."""
    cxx, torch_dir = cxx_compiler(), torch_folder()
    isas = X86_ISAS if platform.machine().lower() in ("x86_64", "amd64") else OTHER_ISAS
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        commands, objects = [], []

        def compile_one(source: str, tag: str, flags: list[str]) -> None:
            objects.append(f"{scratch}/{Path(source).stem}.{tag}.o")
            commands.append([cxx, *CXX_FLAGS, *flags, "-c", str(CSRC / "cpu" / source), "-o", objects[-1]])

        for source in ("token_logps.cpp", "logits_grad.cpp"):
            for isa, march, width in isas:
                flags = [f"-DDPO_ISA={isa}", f"-DDPO_VECTOR_BYTES={width}"]
                flags += [f"-march={march}"] if march else []
                flags += ["-DDPO_FLOAT64"] if isa == "baseline" else []
                compile_one(source, isa, flags)
        compile_one("preference_loss.cpp", "any", [])
        compile_one("ops.cpp", "any", ABI_FLAGS + include_flags(torch_dir))
        run_all(commands)
        library = f"{scratch}/library.so"
        run_all([[cxx, "-shared", *objects, "-o", library, f"-L{torch_dir / 'lib'}", "-ltorch_cpu"]])
        os.replace(library, target)


def source_hash(folder: str) -> str:
    """Names a library after its sources and recipe, so that an edited kernel never meets a stale build."""
    digest = hashlib.sha256(Path(__file__).read_bytes())
    for path in sorted((CSRC / "common").glob("*")) + sorted((CSRC / folder).glob("*")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def cache_folder() -> Path:
    """Where libraries compiled on first use are kept: $DPO_KERNELS_CACHE, else the user's cache."""
    if wish := os.environ.get("DPO_KERNELS_CACHE"):
        return Path(wish)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dpo_kernels"


def library_path(name: str) -> Path:
    """Where `pip install` puts the library `name` ("cpu" or "cuda")."""
    return PACKAGE / f"_{name}.{source_hash(name)}.so"


def find_or_build(name: str, build: Callable[[Path], None], announce: Callable[[str], None]) -> Path:
    """The library built at installation, else the cached one, else (unless DPO_KERNELS_JIT=0) compile it now."""
    cached = cache_folder() / library_path(name).name
    for path in (library_path(name), cached):
        if path.is_file():
            return path
    if os.environ.get("DPO_KERNELS_JIT", "1") == "0":
        raise BuildError(f"no prebuilt {name} library, and DPO_KERNELS_JIT=0 forbids compiling one")
    announce(f"dpo-kernels: compiling the {name} library once, into {cached}")
    try:
        build(cached)
    except OSError as error:
        raise BuildError(f"cannot write {cached}: {error}") from error
    return cached


#: Every native library and its recipe; setup.py builds them all.
LIBRARIES: dict[str, Callable[[Path], None]] = {"cpu": build_cpu}
