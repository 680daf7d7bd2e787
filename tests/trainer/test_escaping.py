"""Pages and the model card show names, prompts and figures as text, whatever characters they contain."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from dpo_trainer.report.compare import compare
from dpo_trainer.report.model_card import render_card
from dpo_trainer.report.page import render_report
from dpo_trainer.run_folder.records import read_records
from dpo_trainer.watch.evaluated import EvaluatedPairs, Example

from .tiny import build_pairs, build_trainer

#: Ends an attribute, an element and a comment, contains each kind of code that a page runs, and breaks matplotlib's formulas.
EVIL = "\"'>--></svg></style></title><script>document.title='run'</script><img src=x onerror=\"document.title='run'\">$\\frac{$"
#: EVIL as a folder's name.
EVIL_NAME = EVIL.replace("/", "")[:200]


class Foreign(HTMLParser):
    """Finds elements and attributes that run or load something, which a page must not have."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.seen = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("script", "img", "iframe", "object", "embed", "link", "base", "form"):
            self.found.append(tag)
        for name, value in attrs:
            if name.startswith("on") or (value or "").strip().lower().startswith(("javascript:", "data:text")):
                self.found.append(f"{tag} {name}={value}")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)

    def handle_data(self, data: str) -> None:
        self.seen += data.count("document.title='run'")


def foreign(page: str) -> Foreign:
    parser = Foreign()
    parser.feed(page)
    parser.close()
    return parser


def poisoned(value: Any) -> Any:
    """The value with EVIL appended to every string."""
    if isinstance(value, dict):
        return {key: poisoned(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [poisoned(each) for each in value]
    return value + EVIL if isinstance(value, str) else value


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("escaping") / "run"
    evaluation = {"eval_dataset": build_pairs(6, seed=1), "eval_strategy": "steps", "eval_steps": 2}
    build_trainer(folder, **evaluation, max_steps=4, write_report=True).train()
    return folder


@pytest.fixture(scope="module")
def page(run: Path) -> str:
    records = read_records(run / "metrics.jsonl")
    # Add evaluations of a data set with this name to those of the run.
    records += [
        {re.sub("^eval_", lambda _: f"eval_{EVIL}_", key): each for key, each in record.items()} for record in records
    ]
    example = Example(EVIL, EVIL, EVIL, -1.0, 1.0)
    shown = EvaluatedPairs([0.0, 1.0], [1.0, 2.0], [example], [example])
    return render_report(
        poisoned(json.loads((run / "summary.json").read_text())),
        records,
        name=EVIL,
        events=[{"step": 1, "title": EVIL, "seen": EVIL, "remedy": EVIL, "severity": "warning"}],
        evaluated={"eval": shown, f"eval_{EVIL}": shown},
        samples=poisoned(
            [{"step": 4, "evaluation": "eval", "prompt": "p", "policy": "a", "start": "b", "reference": "c"}]
        ),
    )


def test_nothing_in_a_report_runs(page: str) -> None:
    parser = foreign(page)
    assert parser.found == []
    assert parser.seen > 10, "the texts must be on the page, as texts"


def test_the_check_sees_what_is_not_escaped(page: str) -> None:
    found = foreign(page.replace("&lt;script&gt;", "<script>", 1)).found
    assert found == ["script"]
    assert foreign(f"<p>{EVIL}</p>").found != []


def test_nothing_in_a_comparison_runs(run: Path, tmp_path: Path) -> None:
    for name in (EVIL_NAME, "other"):
        shutil.copytree(run, tmp_path / name)
    compare([str(tmp_path / EVIL_NAME), str(tmp_path / "other")], tmp_path / "page.html")
    parser = foreign((tmp_path / "page.html").read_text())
    assert parser.found == []
    assert parser.seen > 0


def test_nothing_in_a_model_card_runs(tmp_path: Path) -> None:
    """Markdown does not escape HTML, except between backticks or fences."""
    torch.manual_seed(0)
    trainer = build_trainer(tmp_path / "run", max_steps=1)
    trainer.train()
    card = render_card(trainer, {"model_name": EVIL, "finetuned_from": EVIL})
    body = card.split("\n---\n", 1)[1]
    text = re.sub(r"```.*?```|`[^`\n]*`", "", body, flags=re.DOTALL)
    assert "&lt;script&gt;" in text
    assert foreign(text).found == []


def browser() -> str | None:
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.slow
def test_a_browser_runs_nothing_of_a_report(page: str, tmp_path: Path) -> None:
    """The page's title does not change, although every text on the page tries to change it."""
    program = browser()
    if program is None:
        pytest.skip("no Chromium here: make browser installs one on Debian and Ubuntu")

    def title(content: str) -> str:
        (tmp_path / "page.html").write_text(content)
        command = [program, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=2000", "--dump-dom"]
        done = subprocess.run(
            [*command, f"--user-data-dir={tmp_path / 'profile'}", (tmp_path / "page.html").as_uri()],
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        )
        return re.search(r"<title>(.*?)</title>", done.stdout, re.DOTALL).group(1)

    assert title(f"<title>plain</title><p>{EVIL}</p>") == "run", "this browser runs scripts"
    assert title(page).endswith(": DPO run")
