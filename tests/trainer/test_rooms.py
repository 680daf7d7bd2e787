"""The layers ("rooms") of dpo_trainer: modules import only lower layers, without cycles, and no file exceeds 400 lines."""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import dpo_trainer

ROOT = Path(dpo_trainer.__file__).parent
#: From the lowest to the highest. A module may import from its own room and from the rooms before it.
ROOMS = (
    "errors",
    "progress",
    "data",
    "batch",
    "model",
    "settings",
    "run",
    "run_folder",
    "watch",
    "report",
    "pair_trainer",
    "reference_trainer",
    "run_trainer",
    "loss_trainer",
    "trainer",
    "cli",
)
#: Modules that import no torch and nothing else that takes long, so that the command line answers at once.
LIGHT = (
    "errors",
    "model.places",
    *(f"settings.{name}" for name in ("aliases", "checks", "combinations", "diagnoses", "fields", "inherited")),
    *(f"settings.{name}" for name in ("objective", "pace", "reading", "rows", "table", "trl")),
    *(f"run_folder.{name}" for name in ("checkpoints", "lock", "metrics", "output_dir", "records")),
    "watch.signals",
    *(f"report.{name}" for name in ("charts", "compare", "drawing", "evaluation", "figures", "verdict")),
    *(f"cli.{name}" for name in ("doctor", "early", "help", "init", "main", "packages", "settings")),
)
HEAVY = (
    "torch",
    "transformers",
    "accelerate",
    "datasets",
    "peft",
    "matplotlib",
    "pandas",
    "numpy",
    "pyarrow",
    "pydantic",
    "jinja2",
)
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for path in sorted(ROOT.rglob("*.py"))
    if path != ROOT / "__init__.py"  # __init__.py imports from every room
}


def imports(name: str, source: str) -> Iterator[str]:
    """The modules of the package that a module imports anywhere, including inside functions and for type checkers."""
    package = ["dpo_trainer", *name.split(".")[:-1]]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            stem = ".".join([*base, *filter(None, [node.module])])
            found = [stem, *(f"{stem}.{alias.name}" for alias in node.names)]
        else:
            continue
        for target in found:
            if target.removeprefix("dpo_trainer.") in MODULES:
                yield target.removeprefix("dpo_trainer.")


def room_of(name: str) -> int:
    return ROOMS.index(name.partition(".")[0])


def graph() -> dict[str, set[str]]:
    return {
        name: set(imports(name, path.read_text(encoding="utf-8"))) - {name, name.removesuffix(".__init__")}
        for name, path in MODULES.items()
    }


def test_no_module_imports_one_above_it() -> None:
    found = graph()
    assert sum(map(len, found.values())) > 100, "the imports are not seen"
    assert [(name, other) for name in found for other in found[name] if room_of(other) > room_of(name)] == []


def test_no_imports_go_round_in_a_circle() -> None:
    assert len(list(TopologicalSorter(graph()).static_order())) == len(MODULES)


def test_imports_are_seen_wherever_they_stand() -> None:
    source = "def f():\n    from ..watch import samples\nif TYPE_CHECKING:\n    import dpo_trainer.trainer\n"
    assert set(imports("model.split", source)) == {"watch.samples", "trainer"}


def test_what_the_command_line_needs_at_first_imports_no_torch() -> None:
    code = f"""
import importlib, sys
import dpo_trainer
for name in {LIGHT!r}:
    importlib.import_module("dpo_trainer." + name)
print(*sorted(set({HEAVY!r}) & set(sys.modules)))
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.split() == []
    assert set(LIGHT) <= set(MODULES)
    assert {name for name in MODULES if name.startswith("settings.")} - {*LIGHT, "settings.__init__"} == {
        "settings.config",
        "settings.fit",
    }


def test_large_pages_are_asked_for_before_torch_is_imported() -> None:
    code = "import os, sys, dpo_trainer; print(os.environ['THP_MEM_ALLOC_ENABLE'], 'torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    environment.pop("THP_MEM_ALLOC_ENABLE", None)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.split() == ["1", "False"]


def test_the_package_s_names_are_all_there() -> None:
    for name in dpo_trainer.__all__:
        assert getattr(dpo_trainer, name).__name__ == name
    assert set(dpo_trainer.__all__) <= set(dir(dpo_trainer))
    assert dpo_trainer.settings.config.DPOConfig is dpo_trainer.DPOConfig


def test_the_picture_in_the_docs_names_every_room_and_file() -> None:
    picture = (Path(__file__).resolve().parents[2] / "docs/rooms.svg").read_text(encoding="utf-8")
    words = set(re.findall(r"[a-z_]+", re.sub(r"<desc.*?</desc>|<style.*?</style>", "", picture, flags=re.DOTALL)))
    names = {part for name in MODULES for part in name.split(".")} - {"__init__", "__main__"}
    assert names <= words, names - words


def test_no_file_is_longer_than_400_lines() -> None:
    lengths = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in MODULES.items()}
    assert {name: length for name, length in lengths.items() if length > 400} == {}
