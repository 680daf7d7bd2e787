"""Compilation of the native libraries, at `pip install` or at first use.

`setup.py` loads this file by its path, because torch may be missing there; `backends/cpu.py` and `backends/cuda.py` import it.
Compilers are called directly: each library consists of a few files and needs no Python header (PyTorch's stable ABI). A
finished library is moved into place by an atomic rename, so several processes may build at the same time.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
#: The namespace of the operators of this copy of the package: the name under which it is imported. So two copies, such as an
#: installed one and one that Hugging Face's `kernels` has loaded, can be used in one process. The libraries use NAMESPACE_cpu
#: and NAMESPACE_cuda.
NAMESPACE = re.sub(r"\W", "_", __package__ or "dpo_kernels")
# An installed package contains the sources; in a checkout they are next to the package.
CSRC = next((p for p in (PACKAGE / "csrc", PACKAGE.parent / "csrc") if p.is_dir()), PACKAGE / "csrc")

# The libraries use the stable ABI of torch 2.10.0, which newer versions keep.
ABI_FLAGS = ["-DTORCH_TARGET_VERSION=0x020a000000000000"]
# No -ffast-math: the exponential relies on (x + magic) - magic, and NaN must stay NaN.
CXX_FLAGS = ["-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi"]

# (name, -march, register width in bytes). The row kernels are compiled once for each; ops.cpp selects one at run time.
X86_ISAS = (("baseline", "x86-64", 16), ("avx2", "x86-64-v3", 32), ("avx512", "x86-64-v4", 64))
OTHER_ISAS = (("baseline", None, 16),)


class BuildError(RuntimeError):
    """A native library could not be compiled; the message is one line with the reason."""


def torch_folder() -> Path:
    """The folder of the installed torch, found without importing it. Raises BuildError if there is none."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise BuildError("torch is not installed in the Python environment of this build")
    return Path(spec.origin).parent


def cxx_compiler() -> str:
    """The C++ compiler ($CXX, else g++, c++ or clang++). Raises BuildError if there is none."""
    for name in filter(None, (os.environ.get("CXX"), "g++", "c++", "clang++")):
        if found := shutil.which(name):
            return found
    raise BuildError("no C++ compiler found (set CXX, or install g++ or clang++)")


def run_all(commands: Sequence[Sequence[str]]) -> None:
    """Run compiler commands in parallel. Raises BuildError with the first output line of a failed one that says "error"."""

    def run(command: Sequence[str]) -> None:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            lines = (done.stderr or done.stdout).strip().splitlines() or ["no output"]
            reason = next((line for line in lines if "error" in line.lower()), lines[-1])
            raise BuildError(f"{Path(command[0]).name} failed: {reason.strip()}")

    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        list(pool.map(run, commands))


def publish(library: str, target: Path) -> None:
    """Move a finished library into place by an atomic rename. Only its owner may write to it, whatever the umask is."""
    os.chmod(library, 0o755)
    os.replace(library, target)


def include_flags(torch_dir: Path) -> list[str]:
    """The include path of torch's stable headers."""
    return [f"-I{torch_dir / 'include'}"]


def build_cpu(target: Path, flags: Sequence[str] = ()) -> None:
    """Compile csrc/cpu into the shared library `target`; `flags` are added to compiler and linker, for example sanitizers."""
    cxx, torch_dir = cxx_compiler(), torch_folder()
    isas = X86_ISAS if platform.machine().lower() in ("x86_64", "amd64") else OTHER_ISAS
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        commands, objects = [], []

        def compile_one(source: str, tag: str, own: list[str]) -> None:
            objects.append(f"{scratch}/{Path(source).stem}.{tag}.o")
            commands.append([cxx, *CXX_FLAGS, *own, *flags, "-c", str(CSRC / "cpu" / source), "-o", objects[-1]])

        for source in ("token_logps.cpp", "logits_grad.cpp", "filtered_grad.cpp", "products.cpp"):
            for isa, march, width in isas:
                own = [f"-DDPO_ISA={isa}", f"-DDPO_VECTOR_BYTES={width}"]
                own += [f"-march={march}"] if march else []
                own += ["-DDPO_FLOAT64"] if isa == "baseline" else []
                compile_one(source, isa, own)
        compile_one("preference_loss.cpp", "any", [])
        compile_one("ops.cpp", "any", [*ABI_FLAGS, *include_flags(torch_dir), f"-DDPO_LIBRARY={NAMESPACE}_cpu"])
        run_all(commands)
        library = f"{scratch}/library.so"
        run_all([[cxx, "-shared", *flags, *objects, "-o", library, f"-L{torch_dir / 'lib'}", "-ltorch_cpu"]])
        publish(library, target)


# The row kernels are compiled once per dtype of the policy's logits, in parallel (DType in csrc/common/params.h).
CUDA_UNITS = (
    *((source, [f"-DDPO_POLICY={dtype}"]) for source in ("token_logps.cu", "logits_grad.cu") for dtype in (0, 2, 3)),
    ("preference_loss.cu", []),
)
#: Default target architectures, if nvcc knows them. PTX of the newest is included for later GPUs.
CUDA_ARCHS = ("80", "90", "100")
NVCC_FLAGS = ["-O3", "-std=c++17", "-Xcompiler", "-fPIC,-fvisibility=hidden"]


def nvcc_compiler() -> str:
    """nvcc ($CUDA_HOME/bin, else PATH, else /usr/local/cuda). Raises BuildError if there is none."""
    for folder in filter(None, (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"))):
        if found := shutil.which("nvcc", path=str(Path(folder) / "bin")):
            return found
    if found := shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin"):
        return found
    raise BuildError("no CUDA compiler found (install the CUDA toolkit, or set CUDA_HOME)")


def known_archs(nvcc: str) -> set[str]:
    """The architectures that this nvcc compiles for, such as "90"."""
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=False).stdout
    return {line.strip().removeprefix("compute_").rstrip("af") for line in listed.splitlines()} - {""}


def cuda_archs(nvcc: str) -> list[str]:
    """Target architectures such as "80": $DPO_KERNELS_CUDA_ARCHS, else $TORCH_CUDA_ARCH_LIST, else CUDA_ARCHS.

    Both variables accept "9.0" or "90", separated by blanks, commas or semicolons. "9.0a" and "10.0f" mean 90 and 100: the
    kernels use no feature of these special targets, whose PTX would run on no later GPU. Raises BuildError for an
    architecture that nvcc does not know.
    """
    known = known_archs(nvcc)
    wish = os.environ.get("DPO_KERNELS_CUDA_ARCHS") or os.environ.get("TORCH_CUDA_ARCH_LIST") or ""
    items = [item.removesuffix("+PTX").replace(".", "") for item in re.split(r"[;,\s]+", wish) if item]
    if not items:
        return [arch for arch in CUDA_ARCHS if arch in known]
    named = list(dict.fromkeys(item.rstrip("af") for item in items))
    for arch in named:
        if arch not in known:
            raise BuildError(f"nvcc does not know architecture {arch!r}; it knows {' '.join(sorted(known, key=int))}")
    return named


def arch_for_device(nvcc: str, capability: tuple[int, int]) -> str:
    """The target architecture for a GPU of this compute capability: its own, or the newest older one that nvcc knows.

    The GPU's driver can compile the PTX of an older architecture. Raises BuildError if nvcc knows none from 8.0 up to the GPU's.
    """
    device = 10 * capability[0] + capability[1]
    usable = [int(arch) for arch in known_archs(nvcc) if 80 <= int(arch) <= device]
    if not usable:
        raise BuildError(f"nvcc has no architecture that runs on compute capability {capability[0]}.{capability[1]}")
    return str(max(usable))


def devices_in_sight() -> list[tuple[int, int]] | None:
    """Compute capabilities of this machine's NVIDIA GPUs, without importing torch.

    An empty list if there is a GPU of unknown capability; None if there is no GPU.
    """
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        listed = subprocess.run(query, capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        listed = ""
    if found := re.findall(r"(\d+)\.(\d+)", listed):
        return sorted({(int(major), int(minor)) for major, minor in found})
    return [] if any(Path("/dev").glob("nvidia[0-9]*")) else None


def build_cuda(target: Path, archs: Sequence[str] | None = None, defines: Sequence[str] = ()) -> None:
    """Compile csrc/cuda into the shared library `target`; needs nvcc, but no GPU and no CUDA build of torch.

    The CUDA runtime is linked statically and torch_cuda is looked up at first use, so the library loads with any build of
    torch.

    Args:
        archs: target architectures, by default those of `cuda_archs`.
        defines: macros that change the launch configuration, such as "DPO_ROW_THREADS=128" (csrc/cuda/plan.h).
    """
    nvcc, torch_dir = nvcc_compiler(), torch_folder()
    archs = list(archs or cuda_archs(nvcc))
    newest = max(archs, key=int)
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    targets.append(f"-gencode=arch=compute_{newest},code=compute_{newest}")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        commands, objects = [], []
        for index, (source, flags) in enumerate(CUDA_UNITS):
            objects.append(f"{scratch}/{index}.o")
            own = [*flags, *(f"-D{define}" for define in defines)]
            commands.append([nvcc, *NVCC_FLAGS, *targets, *own, "-c", str(CSRC / "cuda" / source), "-o", objects[-1]])
        objects.append(f"{scratch}/ops.o")
        # Compiled by nvcc too, because it knows where its headers are, even if a wrapper script hides them.
        commands.append(
            [
                nvcc,
                *NVCC_FLAGS,
                *ABI_FLAGS,
                *include_flags(torch_dir),
                f"-DDPO_LIBRARY={NAMESPACE}_cuda",
                "-c",
                str(CSRC / "cuda" / "ops.cpp"),
                "-o",
                objects[-1],
            ]
        )
        run_all(commands)
        library = f"{scratch}/library.so"
        run_all([[nvcc, "-shared", *objects, "-o", library, f"-L{torch_dir / 'lib'}", "-ltorch_cpu", "-ldl"]])
        publish(library, target)


def source_hash(folder: str) -> str:
    """Hash of a library's sources, namespace and build; part of the file's name, so edited sources never use an old build."""
    digest = hashlib.sha256(Path(__file__).read_bytes() + NAMESPACE.encode())
    for path in sorted((CSRC / "common").glob("*")) + sorted((CSRC / folder).glob("*")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def cache_folder() -> Path:
    """The folder of libraries compiled at first use: $DPO_KERNELS_CACHE, else dpo_kernels in the user's cache."""
    if wish := os.environ.get("DPO_KERNELS_CACHE"):
        return Path(wish)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dpo_kernels"


def make_private(folder: Path) -> None:
    """Create `folder` with access for this user only. An existing folder keeps its mode."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)


def check_private(path: Path) -> None:
    """Raise BuildError if another user owns `path` or its folder, or may write to them.

    Loading a library runs its code, so it must come from this user. Files owned by root are trusted. Windows has no such
    modes, so nothing is checked there.
    """
    if not hasattr(os, "getuid"):
        return
    real = path.resolve()
    for place in dict.fromkeys((path.parent, real.parent, real)):
        if not place.exists():  # the library is not compiled yet
            continue
        status = place.stat()
        if status.st_uid not in (os.getuid(), 0):
            raise BuildError(
                f"{place} belongs to user {status.st_uid}; delete it, or set DPO_KERNELS_CACHE to a folder of your own"
            )
        if status.st_mode & 0o022:
            raise BuildError(
                f"other users may write to {place}; run chmod go-w on it, or set DPO_KERNELS_CACHE to a folder of your own"
            )


def library_path(name: str, variant: str = "") -> Path:
    """Path of the library `name` ("cpu" or "cuda") after `pip install`; `variant` as in `find_or_build`."""
    return PACKAGE / f"_{name}.{source_hash(name)}{variant}.so"


def find_or_build(name: str, build: Callable[[Path], None], announce: Callable[[str], None], variant: str = "") -> Path:
    """Path of the library built at installation, else of the cached one, else of one that is compiled now.

    DPO_KERNELS_JIT=0 forbids compiling.

    Args:
        name: "cpu" or "cuda".
        build: compiles the library to a path.
        announce: receives a message before a compilation.
        variant: suffix of the library's name, such as the architecture that it is compiled for.

    Raises:
        BuildError: there is no library and it cannot be compiled, or other users may write to the cached one.
    """
    # Only the cache is checked: a user who can write to the installed package could change its Python files as well.
    for path in (library_path(name), library_path(name, variant)):
        if path.is_file():
            return path
    cached = cache_folder() / library_path(name, variant).name
    try:
        if cached.is_file():
            check_private(cached)
            return cached
        if os.environ.get("DPO_KERNELS_JIT", "1") == "0":
            raise BuildError(f"no prebuilt {name} library, and DPO_KERNELS_JIT=0 forbids compiling one")
        make_private(cached.parent)
        check_private(cached)
        announce(f"dpo-kernels: compiling the {name} library once, into {cached}")
        build(cached)
    except OSError as error:
        raise BuildError(f"cannot write {cached}: {error}") from error
    return cached


def variant_of(capability: tuple[int, int]) -> str:
    """Name suffix of a CUDA library that is compiled for GPUs of this compute capability."""
    return ".sm_{}{}".format(*capability)


def build_for_device(capability: tuple[int, int]) -> Callable[[Path], None]:
    """A function that compiles the CUDA library for GPUs of this compute capability only."""
    return lambda target: build_cuda(target, [arch_for_device(nvcc_compiler(), capability)])


def installed_libraries() -> dict[Path, Callable[[Path], None]]:
    """The libraries that an installation compiles: path -> function that compiles it.

    The CPU library is always compiled. The CUDA library takes minutes, so it is compiled only in two cases: for the GPUs of
    this machine, if there are any; or for every architecture of `cuda_archs`, if $DPO_KERNELS_CUDA_ARCHS or
    DPO_KERNELS_BUILD_CUDA=1 is set. DPO_KERNELS_BUILD_CUDA=0 skips it.
    """
    libraries: dict[Path, Callable[[Path], None]] = {library_path("cpu"): build_cpu}
    wish = os.environ.get("DPO_KERNELS_BUILD_CUDA")
    if wish == "0":
        return libraries
    devices = None if wish or os.environ.get("DPO_KERNELS_CUDA_ARCHS") else devices_in_sight()
    if devices:
        # GPUs before compute capability 8.0 are too old for the kernels.
        usable = [capability for capability in devices if capability >= (8, 0)]
        libraries |= {library_path("cuda", variant_of(device)): build_for_device(device) for device in usable}
    elif wish or os.environ.get("DPO_KERNELS_CUDA_ARCHS") or devices is not None:
        libraries[library_path("cuda")] = build_cuda
    return libraries
