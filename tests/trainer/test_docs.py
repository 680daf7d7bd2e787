"""The docs match the code: it generates the tables of diagnoses, settings and errors, and all settings in them exist."""

import dataclasses
import re

import pytest

from dpo_trainer.cli.settings import RUN_KEYS, SWITCHES
from dpo_trainer.settings.config import DPOConfig
from dpo_trainer.settings.diagnoses import DIAGNOSES, Limits

from .docs_scripts import DOCS, load_script


def test_the_tables_of_diagnoses_are_the_code_s() -> None:
    page = (DOCS / "trainer.md").read_text(encoding="utf-8")
    assert load_script("trainer_tables").filled(page) == page, "run: python docs/trainer_tables.py"


def test_the_page_of_settings_is_the_table_s() -> None:
    assert load_script("trainer_tables").settings() == (DOCS / "settings.md").read_text(encoding="utf-8"), (
        "run: python docs/trainer_tables.py"
    )


def test_every_threshold_belongs_to_a_diagnosis_and_says_what_it_means() -> None:
    names = {item.name for item in dataclasses.fields(Limits)}
    used = {limit for diagnosis in DIAGNOSES.values() for limit in diagnosis.limits}
    assert used <= names
    assert names - used == {"windows", "probe_pairs", "probe_tokens"}, "which belong to all of them"
    assert all(item.metadata["help"] for item in dataclasses.fields(Limits))


#: Pages that show settings with a value, such as `beta: 0.1`, and the least number of such settings.
SHOWING = {"trainer": 5, "data": 4, "models": 4, "command-line": 1, "watch": 1, "troubleshooting": 10}


@pytest.mark.parametrize("name", SHOWING)
def test_settings_that_a_page_shows_with_a_value_exist(name: str) -> None:
    page = (DOCS / f"{name}.md").read_text(encoding="utf-8")
    known = {item.name for item in dataclasses.fields(DPOConfig)} | set(RUN_KEYS)
    lines = [line for line in page.splitlines() if not line.startswith(("  ", '{"'))]
    found = re.findall(r"(?:`|^)([a-z_]+(?:\.[a-z_]+)?): [^`]+?(?:`|$)", "\n".join(lines), re.MULTILINE)
    shown = {setting.partition(".")[0] for setting in found}
    assert shown <= known, shown - known
    assert len(shown) >= SHOWING[name]


def test_switches_that_the_page_of_the_trainer_shows_exist() -> None:
    page = (DOCS / "trainer.md").read_text(encoding="utf-8")
    assert set(re.findall(r"`(--[a-z]+)`", page)) <= set(SWITCHES)


def test_the_page_of_numerics_shows_the_committed_errors() -> None:
    page = (DOCS / "numerics.md").read_text(encoding="utf-8")
    assert load_script("numerics_tables").filled(page) == page, "run: python docs/numerics_tables.py"
