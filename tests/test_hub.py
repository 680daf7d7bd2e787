"""The kernel for the Hugging Face Hub: its layout, and what it computes when the `kernels` package has loaded it.

`kernels` is installed into a folder of its own (`make test` does it), and loads the kernel in a process that also uses the
installed package.
"""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from frameworks import matrix

import dpo_kernels
from dpo_kernels import _build
from hub import build

ROOT = Path(__file__).resolve().parent.parent
KERNELS = "kernels==0.17.2"
REPOSITORY = "somebody/dpo-kernels"

#: What a process finds that uses the package twice: as the installed `dpo_kernels`, and as `theirs`, which argv[1] loads. It
#: may set `extra`.
COMPARE = """
import json, os, sys, warnings
from pathlib import Path
warnings.filterwarnings("error", "dpo-kernels")
import torch
import dpo_kernels as ours

extra = None
exec(sys.argv[1])

generator = torch.Generator().manual_seed(0)
logits, hidden, weight = (torch.randn(*shape, generator=generator) for shape in ((2, 7, 50), (2, 7, 16), (50, 16)))
labels = torch.randint(50, (2, 7), generator=generator)
labels[:, :2] = -100
upstream = torch.randn(2, 7, generator=generator)


def values(package, compiled=False):
    calls = {
        "token_logps": (lambda x: package.token_logps(x, labels, temperature=0.7), (logits,)),
        "linear_logps": (lambda h, w: package.linear_logps(h, w, labels), (hidden, weight)),
        "sequence_logps": (lambda x: package.sequence_logps(x, labels)[:, None], (logits,)),
        "dpo_loss": (lambda x: package.dpo_loss(x, labels, ref_logits=logits.flip(-1)).loss, (logits,)),
        "linear_dpo_loss": (
            lambda h, w: package.linear_dpo_loss(h, w, labels, ref_logps=torch.zeros(2)).loss, (hidden, weight)
        ),
    }
    found = {}
    for name, (call, inputs) in calls.items():
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        result = (torch.compile(call, fullgraph=True) if compiled else call)(*leaves)
        (result * (upstream if result.dim() else 1.0)).sum().backward()
        found[name] = [result.detach(), *(leaf.grad for leaf in leaves)]
    return found


def differences(some, others):
    # Python's max would skip a NaN that is not the first value.
    return {
        name: float(torch.stack([(a - b).abs().max() for a, b in zip(some[name], others[name])]).max()) for name in some
    }


found, own = values(theirs), values(ours)
their_ops = sys.modules[f"{theirs.__name__}._ops"].ops
print(json.dumps({
    "name": theirs.__name__,
    "file": theirs.__file__,
    "namespaces": [torch.ops.dpo_kernels.name, their_ops.name],
    "operators": [hasattr(torch.ops.dpo_kernels, "linear_logps"), hasattr(their_ops, "linear_logps")],
    "differences": differences(own, found),
    "compiled": differences(values(theirs, compiled=True), found) if len(sys.argv) > 2 else None,
    "backends": [package.backends.resolve("cpu", torch.float32) for package in (ours, theirs)],
    "zeros": float(found["token_logps"][0][:, :2].abs().max()),
    "triton": f"{theirs.__name__}.backends.triton" in sys.modules,
    "missing": [name for name in theirs.__all__ if not hasattr(theirs, name)],
    "extra": eval(extra) if extra else None,
}))
"""

LOAD = """
import kernels
from kernels._rust import Build, Digest, DigestAlgorithm, Metadata
folder = Path(os.environ["LOCAL_KERNELS"].partition("=")[2])
theirs = kernels.get_local_kernel(folder)
variant = Path(theirs.__file__).parent
metadata = Metadata.read_from_file(variant / "metadata.json")
metadata.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, variant))
extra = '''{
    "id": metadata.id,
    "version": metadata.version,
    "license": metadata.license,
    "same": kernels.get_kernel(os.environ["LOCAL_KERNELS"].partition("=")[0], version=0) is theirs,
    "declared": [str(backend) for backend in Build.open(folder).general.backends],
}'''
"""


def offer(folder: Path) -> dict[str, str]:
    """Environment variables of a process in which `kernels.get_kernel` finds the kernel of `folder`, without a network."""
    package = matrix.folder(KERNELS)
    assert package.is_dir(), "run: make .venv/.kernels"
    path = os.pathsep.join(map(str, (ROOT, ROOT / "python", package)))
    return {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "LOCAL_KERNELS": f"{REPOSITORY}={folder}"}


def compare(environment: dict[str, str], load: str, *compiled: str) -> dict:
    done = subprocess.run(
        [sys.executable, "-c", COMPARE, load, *compiled],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def layout(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "kernel"
    build.write(folder, REPOSITORY)
    return folder


@pytest.fixture(scope="module")
def identity() -> str:
    return build.identity("cpu", build.sources())


@pytest.fixture(scope="module")
def loaded(layout) -> dict:
    return compare(offer(layout), LOAD, "compiled")


def test_the_loader_takes_the_kernel_under_its_own_name(loaded, layout, identity):
    assert loaded["name"] == identity
    assert Path(loaded["file"]) == layout / "build" / "torch-cpu" / "__init__.py"
    assert loaded["extra"] == {
        "id": identity,
        "version": int(dpo_kernels.__version__.partition(".")[0]),
        "license": "Apache-2.0",
        "same": True,
        "declared": ["cpu", "cuda", "rocm"],
    }
    assert loaded["missing"] == []


def test_the_kernel_and_the_installed_package_have_namespaces_of_their_own(loaded, identity):
    assert loaded["namespaces"] == ["dpo_kernels", identity]
    assert loaded["operators"] == [True, True]


def test_the_kernel_computes_what_the_package_computes(loaded):
    """On a CPU: the package with its C++ kernels, the kernel with plain PyTorch and without a warning."""
    assert loaded["backends"] == ["cpu", "eager"]
    assert set(loaded["differences"]) == {
        "token_logps",
        "linear_logps",
        "sequence_logps",
        "dpo_loss",
        "linear_dpo_loss",
    }
    assert max(loaded["differences"].values()) < 2e-6
    assert loaded["zeros"] == 0


def test_torch_compile_takes_the_kernel_as_one_graph(loaded):
    assert max(loaded["compiled"].values()) < 2e-6


def test_triton_serves_the_kernel(layout):
    """In Triton's interpreter, which runs the GPU's kernels on a CPU."""
    found = compare({**offer(layout), "TRITON_INTERPRET": "1", "DPO_KERNELS_BACKEND": "triton"}, LOAD)
    assert found["backends"] == ["triton", "triton"]
    assert found["triton"]
    assert max(found["differences"].values()) < 1e-6


# --- the files ---------------------------------------------------------------------------------------------------------


def modules(folder: Path) -> Iterator[tuple[Path, ast.Module]]:
    for path in sorted(folder.rglob("*.py")):
        yield path, ast.parse(path.read_text(encoding="utf-8"))


def absolute_imports(tree: ast.Module) -> set[str]:
    """The first parts of the names of all modules that are imported by an absolute name."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module or "")
    return {name.partition(".")[0] for name in names}


def test_no_module_imports_the_package_by_its_name():
    """Else a copy under another name would use the installed package's modules."""
    found = {path.name for path, tree in modules(ROOT / "dpo_kernels") if "dpo_kernels" in absolute_imports(tree)}
    assert found == set()


def test_no_module_names_the_operators_namespace():
    """Neither torch.ops.dpo_kernels... nor "dpo_kernels::..." nor a module's full name, except in docstrings."""
    found = []
    for path, tree in modules(ROOT / "dpo_kernels"):
        docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            name = (
                node.attr if isinstance(node, ast.Attribute) else node.value if isinstance(node, ast.Constant) else ""
            )
            known = (
                ("dpo_kernels::", "dpo_kernels.", "dpo_kernels_c") if isinstance(node, ast.Constant) else "dpo_kernels"
            )
            if isinstance(name, str) and name.startswith(known) and id(node) not in docstrings:
                found.append(f"{path.name}:{node.lineno} {name}")
    assert found == []


def test_the_kernel_imports_torch_triton_and_the_standard_library_only(layout):
    known = {*sys.stdlib_module_names, "torch", "triton"}
    for path, tree in modules(layout):
        assert absolute_imports(tree) <= known, path


def test_the_layout_is_the_package_without_what_is_left_out(layout):
    kernel = {path.relative_to(layout / "torch-ext" / "dpo_kernels") for path, _ in modules(layout / "torch-ext")}
    package = {path.relative_to(ROOT / "dpo_kernels"): path for path, _ in modules(ROOT / "dpo_kernels")}
    assert {Path("logps.py"), Path("linear/tokens.py"), Path("backends/triton/token_logps.py")} <= kernel
    assert kernel.isdisjoint({Path("_ops.py"), Path("doctor.py"), Path("integrations/trl.py"), Path("backends/cpu.py")})
    for backend in build.BACKENDS:
        variant = layout / "build" / f"torch-{backend}"
        assert {path.relative_to(variant) for path, _ in modules(variant)} == kernel | {Path("_ops.py")}
        for name in kernel:
            assert (variant / name).read_bytes() == package[name].read_bytes()
        about = json.loads((variant / "metadata.json").read_text())
        assert about["backend"] == {"type": backend}
    assert (layout / "README.md").read_text() == (layout / "build" / "CARD.md").read_text()
    assert f'get_kernel("{REPOSITORY}", version=0' in (layout / "README.md").read_text()


def test_a_changed_file_changes_the_name(identity):
    files = build.sources()
    assert identity.isidentifier()
    assert build.identity("cpu", {**files, "logps.py": files["logps.py"] + b"\n"}) != identity
    assert build.identity("cuda", files).replace("_cuda_", "_cpu_") == identity


def test_an_option_is_not_taken_for_a_folder(tmp_path):
    command = [sys.executable, "-m", "hub.build", "--help"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode
    assert "python -m hub.build [FOLDER]" in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_second_build_replaces_the_first_and_nothing_else(tmp_path):
    folder = tmp_path / "kernel"
    build.write(folder)
    stale = folder / "torch-ext" / "dpo_kernels" / "gone.py"
    for path in (stale, folder / ".git" / "config"):
        path.parent.mkdir(exist_ok=True)
        path.write_text("")
    build.write(folder)
    assert not stale.exists()
    assert (folder / ".git" / "config").exists()
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "build").mkdir()
    with pytest.raises(FileExistsError, match="name another folder"):
        build.write(tmp_path / "theirs")
    assert (tmp_path / "theirs" / "build").exists()


@pytest.mark.slow
def test_a_copy_under_another_name_has_a_native_library_of_its_own(tmp_path):
    """The package with its C++ sources, vendored by another package: it compiles a library with namespaces of its own."""
    copy = tmp_path / "vendor" / "copied"
    shutil.copytree(ROOT / "dpo_kernels", copy, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    shutil.copytree(ROOT / "csrc", copy / "csrc")
    cache = tmp_path / "cache"
    cache.mkdir(mode=0o700)
    shutil.copy(_build.find_or_build("cpu", _build.build_cpu, print), cache / _build.library_path("cpu").name)
    environment = {
        "PYTHONPATH": os.pathsep.join(map(str, (tmp_path, ROOT, ROOT / "python"))),
        "DPO_KERNELS_CACHE": str(cache),
    }
    load = (
        "import vendor.copied as theirs\n"
        "extra = 'torch.ops.dpo_kernels_cpu.isa(), torch.ops.vendor_copied_cpu.isa(), theirs._build.source_hash(\"cpu\")'"
    )
    found = compare(environment, load)
    assert found["namespaces"] == ["dpo_kernels", "vendor_copied"]
    assert found["backends"] == ["cpu", "cpu"]
    assert max(found["differences"].values()) == 0
    ours, theirs, digest = found["extra"]
    assert ours == theirs
    assert digest != _build.source_hash("cpu")
    assert (cache / f"_cpu.{digest}.so").is_file()
