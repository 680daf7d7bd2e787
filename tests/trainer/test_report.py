"""report.html and summary.json: one self-contained page that describes the run, however it went."""

import json
import math
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from dpo_trainer import DPOTrainer
from dpo_trainer.report.charts import CHARTS
from dpo_trainer.report.drawing import Curve, curves_of, draw
from dpo_trainer.report.page import render_report
from dpo_trainer.run_folder.records import read_records
from dpo_trainer.watch.callbacks import ProgressLine

from .tiny import build_pairs, build_trainer

Make = Callable[..., DPOTrainer]
VOID = {"meta", "br", "img", "link", "input", "hr"}


class Checker(HTMLParser):
    """Collects ids and external references, and fails on tags that do not match."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.open: list[str] = []
        self.external: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(str(value))
            if name in ("src", "href", "xlink:href", "data") and not str(value).startswith("#"):
                self.external.append(str(value))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one finished run; the tests only read it."""
    folder = tmp_path_factory.mktemp("report") / "run"
    evaluation = {"eval_dataset": build_pairs(6, seed=1), "eval_strategy": "steps", "eval_steps": 3}
    samples = {
        "sample_prompts": 3,
        "sample_max_new_tokens": 4,
        "scorer": lambda prompts, answers: list(map(len, answers)),
    }
    build_trainer(folder, **evaluation, **samples, eval_on_start=True, max_steps=6, write_report=True).train()
    return folder


def test_the_page_is_well_formed_and_needs_nothing_else(run: Path) -> None:
    page = (run / "report.html").read_text()
    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    assert checker.external == []
    assert len(set(checker.ids)) == len(checker.ids), "drawings on one page must not share ids"
    assert "<script" not in page
    assert "@import" not in page
    addresses = set(re.findall(r"https?://[^\"' <)]+", page))
    assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    for reference in re.findall(r"(?:xlink:href=\"#|url\(#)([^\")]+)", page):
        assert reference in checker.ids
    assert len(page) < 400_000


def test_the_page_shows_every_curve_with_its_caption(run: Path) -> None:
    page = (run / "report.html").read_text()
    for chart in CHARTS:
        assert f'aria-label="{chart.title}"' in page
        assert chart.healthy[:40] in page
    for text in (
        "log 2",
        "guessing",
        "held-out loss",
        "held-out accuracy",
        "tokens per second",
        "train_dataset: 24 of 24",
    ):
        assert text in page
    assert page.count("<svg") == len(CHARTS) + 1  # the additional chart shows the margins of the held-out pairs


def test_colours_come_from_the_page_in_light_and_dark(run: Path) -> None:
    page = (run / "report.html").read_text()
    assert "prefers-color-scheme: dark" in page
    drawings = "".join(re.findall(r"<svg.*?</svg>", page, re.DOTALL))
    assert "var(--series-1)" in drawings
    assert "var(--ink)" in drawings
    assert set(re.findall(r"#[0-9a-f]{6}\b", drawings)) == set(), "a fixed colour would vanish on one of the grounds"


def test_the_summary_agrees_with_the_metrics(run: Path, read_jsonl: Any) -> None:
    summary = json.loads((run / "summary.json").read_text())
    records = read_jsonl(run / "metrics.jsonl")
    train = [record for record in records if "loss" in record]
    assert summary["last"]["loss"] == train[-1]["loss"]
    assert summary["tokens"] == sum(record["tokens"] for record in train)
    seconds = sum(record["tokens"] / record["tokens_per_second"] for record in train)
    assert summary["tokens_per_second"] == pytest.approx(summary["tokens"] / seconds, rel=1e-3)
    assert summary["eval_first"]["step"] == 0
    assert summary["eval_last"]["loss"] == [r["eval_loss"] for r in records if "eval_loss" in r][-1]
    assert summary["initial_loss"] == pytest.approx(0.6931471805599453)
    assert {"python", "torch", "transformers"} <= set(summary["versions"])


def test_a_model_that_has_not_moved_has_no_accuracy(run: Path) -> None:
    """Ties are not mistakes: neither the curve nor a card may start at 0 %."""
    summary = json.loads((run / "summary.json").read_text())
    assert "rewards/accuracies" not in summary["eval_first"]
    assert "rewards/accuracies" in summary["eval_last"]
    assert "from 0.0%" not in (run / "report.html").read_text()


def test_text_from_the_run_is_escaped(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    summary["model"] = "<script>alert(1)</script>"
    summary["data"] = ["a & b <i>"]
    page = render_report(summary, read_records(run / "metrics.jsonl"), name="<b>run</b>")
    assert "<script>" not in page
    assert "<b>run</b>" not in page
    assert "a &amp; b &lt;i&gt;" in page


@pytest.mark.parametrize("keep", [0, 1])
def test_a_run_with_almost_no_records_still_has_a_page(run: Path, keep: int) -> None:
    summary = json.loads((run / "summary.json").read_text())
    summary.update(first={}, last={}, tokens_per_second=None, finished=False)
    records = [record for record in read_records(run / "metrics.jsonl") if "loss" in record][:keep]
    page = render_report(summary, records, name="run")
    assert "not finished" in page


def test_tiny_values_are_written_in_full_at_each_tick() -> None:
    drawing = draw(CHARTS[0], [Curve([(step, step * 1e-8) for step in (1, 2, 3)], "training", 1)])
    assert drawing is not None
    ticks = re.findall(r">([^<>]*)</text>", drawing)
    assert "1e\N{MINUS SIGN}08" in ticks
    assert not any(tick.strip().startswith(("1e\N{MINUS SIGN}8", "1e-8", "\N{MULTIPLICATION SIGN}")) for tick in ticks)


def ticks_of(drawing: str) -> list[str]:
    return re.findall(r">([^<>]*)</text>", drawing)


def test_a_run_with_one_log_has_whole_steps_and_ticks_that_differ() -> None:
    drawing = draw(CHARTS[0], [Curve([(1, math.log(2))], "training", 1)])
    assert drawing is not None
    ticks = [text for text in ticks_of(drawing) if re.fullmatch(r"[\d.]+", text)]
    assert {"0", "1"} <= set(ticks), "the steps"
    assert len(set(ticks)) == len(ticks)


def test_rounding_does_not_look_like_movement() -> None:
    drawing = draw(CHARTS[0], [Curve([(step, 0.6931 + 1e-6 * (step % 2)) for step in range(9)], "training", 1)])
    assert drawing is not None
    values = [float(text) for text in ticks_of(drawing) if re.fullmatch(r"0\.\d+", text)]
    assert max(values) - min(values) > 0.005


def test_charts_tell_their_values_under_the_mouse_and_in_words() -> None:
    curve = Curve([(0, 0.6931), (10, 0.5), (20, 0.55)], "held out", 2, errors={10: 0.02, 20: 0.03})
    drawing = draw(CHARTS[0], [curve])
    assert drawing is not None
    assert "<title>held out, step 10: 0.5000 ± 0.0200</title>" in drawing
    assert drawing.count("<circle") == 3
    words = re.search(r'aria-describedby="loss-words"><desc id="loss-words">(.*?)</desc>', drawing)
    assert words is not None
    said = "held out: 0.6931 at step 0, 0.5500 ± 0.0300 at step 20; lowest 0.5000 at step 10, highest 0.6931 at step 0."
    assert said in words[1]


def test_a_long_curve_tells_its_first_last_and_extreme_values() -> None:
    points = [(step, 1.0 / (1 + step)) for step in range(1, 1000)]
    points[500] = (501, 3.0)
    drawing = draw(CHARTS[0], [Curve(points, "training", 1)])
    assert drawing is not None
    assert drawing.count("<circle") <= 62
    for step in ("1:", "501: 3.0000", "999:"):
        assert f"training, step {step}" in drawing


def test_the_tiles_hold_both_ends_and_the_errors(run: Path) -> None:
    page = (run / "report.html").read_text()
    tiles = page.partition('aria-label="Main figures">')[2].partition("</section>")[0]
    summary = json.loads((run / "summary.json").read_text())
    last = summary["eval_last"]
    assert f'<span class="value">{last["loss"]:.4f}</span><span class="error"> &plusmn; {last["loss_se"]:.4f}' in tiles
    assert '<div class="began">0.6931</div>' in tiles
    assert "of 6 pairs" in tiles
    for end in ("eval_first", "eval_last"):
        assert f"{summary[end]['logps/chosen']:.1f}".replace("-", "\N{MINUS SIGN}") in tiles


def test_charts_stand_under_their_questions(run: Path) -> None:
    page = (run / "report.html").read_text()
    places = [page.index(f"<h2>{question}</h2>") for question in ("Did it learn?", "Is it drifting?", "Health")]
    assert places == sorted(places)
    assert places[0] < page.index('aria-label="Accuracy"') < places[1] < page.index('aria-label="Entropy"') < places[2]


def test_empty_answers_of_the_policy_are_counted(run: Path) -> None:
    records = [record for record in read_records(run / "samples.jsonl") if "policy" in record and record["step"] == 6]
    empty = [{**record, "policy": " \n"} for record in records]
    page = render_report(
        json.loads((run / "summary.json").read_text()), read_records(run / "metrics.jsonl"), name="run", samples=empty
    )
    assert "3 of these 3 answers are empty." in page
    assert "Failed: the model&#39;s answers are empty" in page


def test_what_did_not_hold_to_the_end_is_folded(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    events = [
        {"step": 2, "name": name, "title": f"Title of {name}", "seen": "seen", "remedy": "remedy"}
        for name in ("grad_spike", "kl_exploding")
    ]
    page = render_report(summary, read_records(run / "metrics.jsonl"), name="run", events=events)
    folded = page.partition("1 diagnosis that no longer held at the end:")[2].partition("</details>")[0]
    assert "Title of kl_exploding" in folded
    assert "Title of grad_spike" not in folded


def test_missing_and_nan_values_leave_gaps(run: Path) -> None:
    records = [{"step": 1, "loss": 0.69}, {"step": 2, "loss": None}, {"step": 3, "loss": 0.6}]
    drawing = draw(CHARTS[0], curves_of(CHARTS[0], records, []))
    assert drawing is not None
    assert "nan" not in drawing.lower().replace("nance", "")
    kl = next(chart for chart in CHARTS if chart.key == "kl")
    assert draw(kl, curves_of(kl, records, [])) is None


def test_the_start_line_follows_the_objective(make_trainer: Make, tmp_path: Path) -> None:
    make_trainer(loss_type="hinge", max_steps=2, write_report=True).train()
    page = (tmp_path / "run" / "report.html").read_text()
    assert "start (1)" in page


def test_checkpoints_refresh_the_report(make_trainer: Make, tmp_path: Path) -> None:
    seen = []
    trainer = make_trainer(max_steps=4, save_strategy="steps", save_steps=2, write_report=True)
    written = trainer.write_report

    def write(*, finished: bool) -> Any:
        path = written(finished=finished)
        seen.append(
            (finished, "This run is not finished" in path.read_text(), (tmp_path / "run/summary.json").exists())
        )
        return path

    trainer.write_report = write
    trainer.train()
    assert seen == [(False, True, False), (True, False, True)]


def test_the_progress_line_rewrites_itself_on_a_terminal(make_trainer: Make) -> None:
    import io

    stream = io.StringIO()
    make_trainer(max_steps=3, callbacks=[ProgressLine(stream, live=True)]).train()
    shown = stream.getvalue()
    assert shown.count("\n") == 1
    assert "step 2/3  66%  loss 0." in shown
    assert "tok/s" in shown
    assert shown.endswith("\n")


def test_samples_stand_beside_the_answers_before_training(run: Path) -> None:
    page = (run / "report.html").read_text()
    records = [record for record in read_records(run / "samples.jsonl") if "policy" in record]
    assert "Answers to held-out prompts at step 6" in page
    for label in ("before training, score", "policy, score", "chosen in the data"):
        assert page.count(label) == 3
    assert records[-1]["step"] == 6
    hostile = {**records[-1], "policy": "<script>alert(1)</script>", "reference": ""}
    page = render_report(
        json.loads((run / "summary.json").read_text()),
        read_records(run / "metrics.jsonl"),
        name="run",
        samples=[hostile],
    )
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert "(nothing)" in page


def test_an_objective_without_a_reference_has_no_line_at_its_start(make_trainer: Make, tmp_path: Path) -> None:
    """The initial loss of such an objective depends on the model."""
    make_trainer(loss_type="simpo", beta=2.0, max_steps=2, write_report=True).train()
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["initial_loss"] is None
    assert "start (" not in (tmp_path / "run" / "report.html").read_text()
