"""Backends: the expected ones are available, a missing one reports why, and the library is compiled on first use."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dpo_kernels import BackendUnavailable, _build, backends, dpo_loss, use_backend

from conftest import BACKENDS

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = """
import torch, dpo_kernels
z, y = torch.randn(2, 3, 11), torch.zeros(2, 3, dtype=torch.long)
print("loss", dpo_kernels.dpo_loss(z, y, ref_logits=z).loss.item())
from dpo_kernels import backends
print("served by", backends.resolve("cpu", torch.float32))
"""


def run_fresh(tmp_path, path=None, code=SCRIPT, **environment):
    """Run code in a new interpreter on a copy of the package without compiled libraries, so that the first use compiles."""
    copy = tmp_path / "site"
    if not copy.exists():
        ignore = shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(ROOT / "dpo_kernels", copy / "dpo_kernels", ignore=ignore)
        shutil.copytree(ROOT / "csrc", copy / "dpo_kernels" / "csrc", ignore=ignore)
    env = {**os.environ, "PYTHONPATH": str(copy), "DPO_KERNELS_CACHE": str(tmp_path / "cache"), **environment}
    env.pop("TRITON_INTERPRET", None)
    if path is not None:
        env["PATH"] = path
    return subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, env=env, cwd=tmp_path, check=False
    )


def test_every_backend_that_this_machine_can_run_is_tested():
    """The suite must not skip a backend unnoticed."""
    expected = {"eager"}
    if torch.cuda.is_available():
        expected |= {"triton", "cuda"}
    else:
        expected |= {"cpu", "triton"}
    assert expected <= set(BACKENDS), {name: backends.why_not(name, "cpu") for name in expected - set(BACKENDS)}


def test_use_backend_is_undone_also_after_an_error():
    with pytest.raises(ValueError, match="eager, cpu, triton, cuda"), use_backend("tpu"):
        pass
    before = backends.resolve("cpu", torch.float32)

    def fail() -> None:
        assert backends.resolve("cpu", torch.float32) == "eager"
        raise KeyError

    with pytest.raises(KeyError), use_backend("eager"):
        fail()
    assert backends.resolve("cpu", torch.float32) == before


def test_a_backend_that_cannot_serve_says_why():
    z, y = torch.randn(2, 3, 11), torch.zeros(2, 3, dtype=torch.long)
    if not torch.cuda.is_available():
        with use_backend("cuda"), pytest.raises(BackendUnavailable, match="'cuda' cannot be used for cpu tensors: "):
            dpo_loss(z, y, ref_logits=z)


def test_a_backend_is_asked_only_when_those_before_it_do_not_serve(monkeypatch):
    """Asking the cuda backend may compile its library for minutes. A GPU that Triton serves must not wait for this."""
    asked = []

    def attempt(name, device_type):
        asked.append(name)
        return object()

    monkeypatch.setattr(backends, "_attempt", attempt)
    assert backends.default("cuda") == "triton"
    assert set(asked) == {"triton"}


def test_a_backend_whose_import_fails_in_any_way_is_not_used(monkeypatch):
    """An old Triton lacks attributes that the kernels use on import."""

    def fail(name):
        raise AttributeError("module 'triton' has no attribute 'knobs'")

    monkeypatch.setattr(backends.importlib, "import_module", fail)
    assert backends._attempt.__wrapped__("triton", "cuda") == "AttributeError: module 'triton' has no attribute 'knobs'"


def test_first_use_compiles_into_the_cache_in_one_line_and_the_next_is_silent(tmp_path):
    first = run_fresh(tmp_path)
    assert first.returncode == 0, first.stderr
    assert "served by cpu" in first.stdout
    assert "loss 0.693147" in first.stdout
    assert first.stderr.count("\n") == 1
    assert "compiling the cpu library once" in first.stderr
    built = list((tmp_path / "cache").glob("_cpu.*.so"))
    assert len(built) == 1
    second = run_fresh(tmp_path)
    assert "served by cpu" in second.stdout
    assert second.stderr == ""

    # Without a compiler or with JIT off, eager serves and the reason is printed once. (The cache is emptied first.)
    built[0].unlink()
    for environment, reason in (
        ({"path": str(Path(sys.executable).parent), "CXX": ""}, "no C++ compiler found"),
        ({"DPO_KERNELS_JIT": "0"}, "DPO_KERNELS_JIT=0"),
        ({"CXX": shutil.which("false") or "false"}, "failed"),
    ):
        done = run_fresh(tmp_path, **environment)
        assert done.returncode == 0, done.stderr
        assert "served by eager" in done.stdout
        assert "loss 0.693147" in done.stdout
        assert done.stderr.count("cpu backend not used") == 1
        assert reason in done.stderr


def cached_library(tmp_path, monkeypatch) -> Path:
    """A file in a separate cache folder, under the name that `find_or_build` looks for."""
    monkeypatch.setenv("DPO_KERNELS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(_build, "library_path", lambda name, variant="": tmp_path / "package" / f"_{name}{variant}.so")
    found = _build.find_or_build("cpu", lambda target: target.write_bytes(b""), lambda line: None)
    assert found == tmp_path / "cache" / "_cpu.so"
    return found


def look_up() -> Path:
    return _build.find_or_build("cpu", lambda target: pytest.fail("compiled again"), lambda line: None)


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="this system's files have no such modes")
def test_the_cache_is_for_its_owner_alone(tmp_path, monkeypatch):
    library = cached_library(tmp_path, monkeypatch)
    assert library.parent.stat().st_mode & 0o777 == 0o700
    assert look_up() == library
    for place, mode in ((library, 0o666), (library, 0o775), (library.parent, 0o777), (library.parent, 0o1777)):
        before = place.stat().st_mode
        place.chmod(mode)
        with pytest.raises(_build.BuildError, match=f"other users may write to {place}; run chmod go-w on it"):
            look_up()
        place.chmod(before)
    assert look_up() == library


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="this system's files have no such modes")
def test_a_library_of_another_user_is_not_loaded(tmp_path, monkeypatch):
    library = cached_library(tmp_path, monkeypatch)
    if os.getuid() == 0:
        os.chown(library, 1234, 1234)
    else:
        monkeypatch.setattr(os, "getuid", lambda: 1234)
    with pytest.raises(_build.BuildError, match=r"belongs to user \d+; delete it, or set DPO_KERNELS_CACHE"):
        look_up()


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="this system's files have no such modes")
def test_a_link_is_followed_and_an_open_folder_is_not_compiled_into(tmp_path, monkeypatch):
    library = cached_library(tmp_path, monkeypatch)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o777)
    elsewhere.chmod(0o777)
    library.rename(elsewhere / "real.so")
    library.symlink_to(elsewhere / "real.so")
    with pytest.raises(_build.BuildError, match=f"other users may write to {elsewhere}"):
        look_up()
    library.unlink()
    library.parent.chmod(0o777)
    with pytest.raises(_build.BuildError, match=f"other users may write to {library.parent}"):
        look_up()


def test_a_system_without_owners_loads_what_lies_there(tmp_path, monkeypatch):
    library = cached_library(tmp_path, monkeypatch)
    library.chmod(0o666)
    monkeypatch.delattr(os, "getuid", raising=False)
    assert look_up() == library


def test_a_library_without_our_operators_is_refused_by_name(tmp_path):
    other = tmp_path / "other.so"
    source = tmp_path / "other.cpp"
    source.write_text("int nothing;")
    _build.run_all([[_build.cxx_compiler(), "-shared", "-fPIC", str(source), "-o", str(other)]])
    with pytest.raises(BackendUnavailable, match=f"{other} has no operator not_there::token_logps; delete it"):
        backends.load_library(other, "not_there", ("token_logps",))
    other.write_text("no library at all")
    with pytest.raises(BackendUnavailable, match=str(other)):
        backends.load_library(other, "not_there", ("token_logps",))


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_every_operator_that_the_sources_register_is_asked_for(name):
    module = importlib.import_module(f"dpo_kernels.backends.{name}")
    registered = re.findall(r'm\.impl\("(\w+)"', (_build.CSRC / name / "ops.cpp").read_text())
    assert sorted(module.OPERATORS) == sorted(registered)


def test_report_names_every_backend_and_its_reason(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "dpo_kernels"], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    assert "backend used for cpu tensors: cpu" in done.stdout
    for name in backends.NAMES:
        assert f"\n  {name} " in done.stdout


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set_gives_the_same_numbers(isa, tmp_path):
    """The instruction set is chosen at start-up, so each set gets its own interpreter."""
    code = """
import torch
from dpo_kernels import reference, dpo_loss
from dpo_kernels.backends import cpu
cpu.check_available("cpu")
g = torch.Generator().manual_seed(0)
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for vocab in (33, 2051, 5000):
        z, r = (torch.randn(2, 3, vocab, generator=g).mul(3).to(dtype) for _ in range(2))
        y = torch.randint(0, vocab, (2, 3), generator=g)
        x, t = z.clone().requires_grad_(), z.double().requires_grad_()
        out = dpo_loss(x, y, ref_logits=r, statistics=("kl", "entropy"), logit_softcap=20.0)
        out.loss.backward()
        truth = reference.dpo_loss(t, y, ref_logits=r.double(), logit_softcap=20.0)
        truth.backward()
        assert abs(out.loss.item() - truth.item()) < 1e-6 * max(1, truth.item())
        budget = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype]
        assert float((x.grad.double() - t.grad).norm() / t.grad.norm()) < budget, (dtype, vocab)
print("runs", cpu.instruction_set())
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "DPO_KERNELS_ISA": isa},
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    # A CPU without this set must use the widest set that it has, never an illegal instruction.
    order = ["baseline", "avx2", "avx512"]
    assert order.index(done.stdout.split()[-1]) <= order.index(isa)


def test_sources_travel_with_the_package():
    """pyproject.toml must list the extension of every file under csrc, so that all sources are packaged."""
    listed = (ROOT / "pyproject.toml").read_text()
    for path in _build.CSRC.rglob("*"):
        if path.is_file():
            assert f'"*{path.suffix}"' in listed, path


def test_the_lock_holds_one_exact_version_of_every_dependency():
    lines = (ROOT / "requirements-ci.lock").read_text().splitlines()[1:]
    locked = dict(line.split("==") for line in lines)
    assert len(locked) == len(lines)
    assert all(re.fullmatch(r"[\w.+]+", version) for version in locked.values())
    stated = [re.match(r"[\w-]+", requirement).group() for requirement in importlib.metadata.requires("dpo-kernels")]
    assert len(stated) > 15
    plain = {name.lower().replace("_", "-") for name in locked}
    assert {name.lower().replace("_", "-") for name in stated} - plain == {"torch"}
