"""The patch itself: what is put back, in which order, and what a failure leaves behind."""

import functools
import sys
import types

import pytest

from dpo_kernels.integrations.patch import Patch, Target


@pytest.fixture
def package(monkeypatch):
    """A package whose module `home` defines two functions, and whose module `user` has imported them by name."""
    modules = {name: types.ModuleType(name) for name in ("framework", "framework.home", "framework.user")}
    home, user = modules["framework.home"], modules["framework.user"]
    exec("def first(x): return x\ndef second(x): return x", vars(home))
    user.first, user.second = home.first, home.second
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return home, user


def wrapped(theirs):
    @functools.wraps(theirs)
    def ours(x):
        return theirs(x)

    return ours


def patch_of(*names):
    return Patch("framework", lambda: [Target("framework.home", name, ("x",), wrapped) for name in names])


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_patches_of_one_function_are_undone_in_any_order(package, order):
    home, user = package
    original = home.first
    undo = [patch_of("first").apply(), patch_of("first").apply()]
    undo[order[0]]()
    assert home.first is user.first is not original
    undo[order[1]]()
    assert home.first is user.first is original


def test_a_patch_that_is_applied_again_below_another(package):
    home, user = package
    original = home.first
    below, above = patch_of("first"), patch_of("first")
    below.apply()
    undo = above.apply()
    again = below.apply()
    undo()
    again()
    assert home.first is user.first is original


def test_an_error_while_replacing_leaves_nothing_replaced(package, monkeypatch):
    class ReadOnly(types.ModuleType):
        def __setattr__(self, name, value):
            raise TypeError("read-only")

    home, user = package
    originals = home.first, home.second
    closed = ReadOnly("framework.closed")
    vars(closed)["second"] = home.second
    monkeypatch.setitem(sys.modules, "framework.closed", closed)
    with pytest.raises(TypeError, match="read-only"):
        patch_of("first", "second").apply()
    assert (home.first, home.second) == (user.first, user.second) == originals


class Refusing:
    """Like the lazy modules of the package `py`, which import all that they have when they are asked for their contents."""

    @property
    def __dict__(self):
        raise ImportError("no such module")


@pytest.mark.parametrize("odd", [None, 3, Refusing()], ids=["None", "number", "lazy"])
def test_objects_among_the_modules_that_are_none(package, monkeypatch, odd):
    home, user = package
    original = home.first
    monkeypatch.setitem(sys.modules, "framework.odd", odd)
    undo = patch_of("first").apply()
    assert user.first is not original
    undo()
    assert user.first is original


def test_a_module_that_a_version_lacks_is_left_out_and_an_incomplete_installation_is_an_error(tmp_path, monkeypatch):
    folder = tmp_path / "incomplete"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "there.py").write_text("def first(x): return x")
    (folder / "broken.py").write_text("import incomplete.gone")
    monkeypatch.syspath_prepend(tmp_path)

    def patch_of(*modules):
        return Patch("incomplete", lambda: [Target(f"incomplete.{name}", "first", ("x",), wrapped) for name in modules])

    undo = patch_of("there", "elsewhere.first").apply()
    assert hasattr(sys.modules["incomplete.there"].first, "__wrapped__")
    undo()
    with pytest.raises(ModuleNotFoundError, match=r"incomplete\.gone"):
        patch_of("there", "broken").apply()
    assert not hasattr(sys.modules["incomplete.there"].first, "__wrapped__")
