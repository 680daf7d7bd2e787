"""The committed docs/objectives.md and its plots are equal to the output of docs/objectives.py."""

import re
import runpy
from pathlib import Path

import pytest

from dpo_kernels.objectives import OBJECTIVES

DOCS = Path(__file__).resolve().parent.parent / "docs"
NUMBER = re.compile(r"-?\d+\.\d+")


@pytest.fixture(scope="module")
def rendered():
    return runpy.run_path(str(DOCS / "objectives.py"))["render"]()


def test_the_page_is_up_to_date(rendered):
    committed = (DOCS / "objectives.md").read_text(encoding="utf-8")
    assert committed == rendered["objectives.md"], "run: python docs/objectives.py"


def test_every_plot_is_there_and_none_is_left_over(rendered):
    committed = {f"objectives/{path.name}" for path in (DOCS / "objectives").glob("*.svg")}
    assert committed == set(rendered) - {"objectives.md"} == {f"objectives/{name}.svg" for name in OBJECTIVES}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_plot_is_up_to_date(rendered, name):
    """Coordinates are rounded to 0.1 pixel and may differ by that, because math libraries differ in the last bit."""
    committed, now = (DOCS / "objectives" / f"{name}.svg").read_text(), rendered[f"objectives/{name}.svg"]
    assert NUMBER.sub("#", committed) == NUMBER.sub("#", now), "run: python docs/objectives.py"
    pairs = zip(NUMBER.findall(committed), NUMBER.findall(now), strict=True)
    assert max(abs(float(a) - float(b)) for a, b in pairs) < 0.15, "run: python docs/objectives.py"
