"""docs/trainer.md says what the code does: its tables of diagnoses are made from it, and the settings it names exist."""

import dataclasses
import re

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


def test_settings_that_the_page_shows_with_a_value_exist() -> None:
    page = (DOCS / "trainer.md").read_text(encoding="utf-8")
    known = {item.name for item in dataclasses.fields(DPOConfig)} | set(RUN_KEYS)
    shown = {name.partition(".")[0] for name in re.findall(r"`([a-z_]+(?:\.[a-z_]+)?): [^`]+`", page)}
    assert shown <= known, shown - known
    assert set(re.findall(r"`(--[a-z]+)`", page)) <= set(SWITCHES)
    assert len(shown) > 10
