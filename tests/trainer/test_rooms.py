"""The layers ("rooms") of dpo_trainer: modules import only lower layers, without cycles, and no file exceeds 400 lines."""

import ast
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import dpo_trainer

ROOT = Path(dpo_trainer.__file__).parent
#: From the lowest to the highest. A module may import from its own room and from the rooms before it.
ROOMS = (
    "errors",
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


def test_the_picture_in_the_docs_names_every_room_and_file() -> None:
    picture = (Path(__file__).resolve().parents[2] / "docs/rooms.svg").read_text(encoding="utf-8")
    words = set(re.findall(r"[a-z_]+", re.sub(r"<desc.*?</desc>|<style.*?</style>", "", picture, flags=re.DOTALL)))
    names = {part for name in MODULES for part in name.split(".")} - {"__init__", "__main__"}
    assert names <= words, names - words


def test_no_file_is_longer_than_400_lines() -> None:
    lengths = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in MODULES.items()}
    assert {name: length for name, length in lengths.items() if length > 400} == {}
