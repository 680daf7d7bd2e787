"""Samples during evaluation: right answers to the same prompts each time, no effect on training, a correct win rate."""

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

from dpo_trainer import ConfigError, DPOConfig, DPOTrainer
from dpo_trainer.watch.samples import generate, load_scorer, score, win_rate

Make = Callable[..., DPOTrainer]
LORA = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
SAMPLED = {"sample_prompts": 4, "sample_max_new_tokens": 6}


def niceness(prompts: list[str], completions: list[str]) -> list[float]:
    return [
        sum(map(text.count, ("good", "great", "fine"))) - sum(map(text.count, ("bad", "awful"))) for text in completions
    ]


def timeless(path: Path) -> list[dict[str, Any]]:
    clocks = ("runtime", "second", "_mib")
    own = ("win_rate", "win_rate_se", "score")
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in record.items() if not key.endswith((*clocks, *own))} for record in records]


# --- writing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama-tied", "gpt2-learned-positions"])
def test_greedy_answers_are_those_of_each_prompt_alone(kind: str, make_model: Any, tokenizer: Any) -> None:
    """Left padding must not matter: a plain loop over single prompts gives the same tokens."""
    model = make_model(kind).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # so that rounding decides no tie
    prompts = [[5, 9, 11, 40, 7], [33], [12, 14, 100]]
    answers = generate(model, tokenizer, prompts, max_new_tokens=5, temperature=0.0, seed=0)
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.tensor([prompt])
        for _ in range(5):
            token = model(input_ids=ids).logits[0, -1].argmax()
            ids = torch.cat([ids, token.view(1, 1)], 1)
            if token == tokenizer.eos_token_id:
                break
        assert answer == tokenizer.decode(ids[0, len(prompt) :], skip_special_tokens=True)


def test_sampling_repeats_itself_and_leaves_the_random_numbers_alone(make_model: Any, tokenizer: Any) -> None:
    model = make_model()
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first, second, other = (
        generate(model, tokenizer, [[5, 9], [3]], max_new_tokens=8, temperature=1.0, seed=seed) for seed in (1, 1, 2)
    )
    assert torch.equal(torch.rand(3), expected)
    assert first == second != other
    assert model.training, "the mode is put back"


def test_an_empty_prompt_is_answered_too(make_model: Any, tokenizer: Any) -> None:
    answers = generate(make_model(), tokenizer, [[], [4]], max_new_tokens=3, temperature=0.0, seed=0)
    assert len(answers) == 2


# --- in a run ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", [None, LORA], ids=["whole", "lora"])
def test_a_sampled_run_is_bitwise_the_run_without(
    adapter: Any, make_trainer: Make, make_model: Any, pairs: Any, tmp_path: Path
) -> None:
    """With dropout on, training would change if sampling used its random numbers."""
    runs = []
    for name, sampled in (("without", {}), ("with", {**SAMPLED, "sample_temperature": 1.0, "scorer": niceness})):
        torch.manual_seed(0)
        trainer = make_trainer(
            model=make_model("gpt2-learned-positions" if adapter is None else "llama-tied"),
            peft_config=adapter and LoraConfig(**{**adapter.to_dict(), "lora_dropout": 0.3}),
            output_dir=str(tmp_path / name),
            eval_dataset=pairs(9, seed=1),
            eval_strategy="steps",
            eval_steps=2,
            eval_on_start=True,
            max_steps=5,
            disable_dropout=False,
            **sampled,
        )
        trainer.train()
        runs.append((timeless(tmp_path / name / "metrics.jsonl"), trainer.model.state_dict()))
    (records, weights), (sampled_records, sampled_weights) = runs
    assert sampled_records == records
    for name, value in weights.items():
        assert torch.equal(value, sampled_weights[name]), name
    samples = [json.loads(line) for line in (tmp_path / "with" / "samples.jsonl").read_text().splitlines()]
    assert [(r["step"], r["row"]) for r in samples if "policy" in r] == [
        (step, row) for step in (0, 2, 4, 5) for row in (0, 2, 4, 6)
    ]
    for record in samples:
        first = next(r for r in samples if r["row"] == record["row"])
        assert (record["prompt"], record["reference"], record["chosen"]) == (
            first["prompt"],
            first["reference"],
            first["chosen"],
        )
    assert all(r["policy"] == r["reference"] for r in samples if r["step"] == 0 and "policy" in r)


def test_training_towards_nice_words_wins(make_trainer: Make, make_model: Any, pairs: Any) -> None:
    trainer = make_trainer(
        model=make_model(),
        train_dataset=pairs(64),
        eval_dataset=pairs(16, seed=1),
        eval_strategy="steps",
        eval_on_start=True,
        per_device_train_batch_size=8,
        learning_rate=5e-3,
        max_steps=24,
        eval_steps=24,
        loss_type=["sigmoid", "sft"],
        sample_prompts=16,
        sample_max_new_tokens=6,
        scorer=niceness,
    )
    trainer.train()
    rates = [record for record in trainer.state.log_history if "eval_win_rate" in record]
    assert [record["eval_win_rate"] for record in rates] == [0.5, pytest.approx(1.0, abs=0.2)]
    assert rates[0]["eval_win_rate_se"] == 0.0
    assert rates[1]["eval_score"] > rates[0]["eval_score"]


@pytest.mark.parametrize(
    "settings", [{"precompute_ref_log_probs": True}, {"peft_config": LORA}, {"loss_type": "simpo"}]
)
def test_a_resumed_run_still_knows_the_first_answers(
    settings: dict[str, Any], make_trainer: Make, make_model: Any, pairs: Any, tmp_path: Path
) -> None:
    common = {
        "eval_dataset": pairs(6, seed=1), "eval_strategy": "steps", "eval_steps": 4, "max_steps": 4, "save_steps": 2,
        "save_strategy": "steps", "scorer": niceness, **SAMPLED, **settings,
    }  # fmt: skip
    torch.manual_seed(0)
    make_trainer(model=make_model(), output_dir=str(tmp_path / "whole"), **common).train()
    torch.manual_seed(0)
    make_trainer(model=make_model(), output_dir=str(tmp_path / "cut"), **common).train()
    resumed = make_trainer(model=make_model(seed=0), output_dir=str(tmp_path / "cut"), **common)
    resumed.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-2"))
    whole, cut = ((tmp_path / name / "samples.jsonl").read_text() for name in ("whole", "cut"))
    assert cut == whole
    last = [record for record in resumed.state.log_history if "eval_win_rate" in record][-1]
    assert last["step"] == 4


def test_answers_can_be_compared_with_the_chosen_ones(make_trainer: Make, pairs: Any, tmp_path: Path) -> None:
    trainer = make_trainer(
        eval_dataset={"near": pairs(3, seed=1), "far": pairs(2, seed=2)},
        win_rate_against="chosen",
        scorer=niceness,
        **SAMPLED,
    )
    found = trainer.evaluate()
    assert found["eval_near_win_rate"] == 0.0, "a random model writes nothing as nice"
    assert found["eval_far_win_rate_se"] == 0.0
    records = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert {record["evaluation"] for record in records} == {"eval_near", "eval_far"}
    assert all(record["chosen_score"] > record["policy_score"] for record in records if "policy" in record)


# --- judging -------------------------------------------------------------------------------------------------------


def test_a_tie_is_half_a_win_and_the_error_is_that_of_a_mean() -> None:
    rate, error = win_rate([1, 2, 3, 4], [0, 2, 5, 1])
    assert rate == 0.625  # win, tie, loss, win
    wins = torch.tensor([1.0, 0.5, 0.0, 1.0])
    assert error == pytest.approx(wins.std().item() / 2)
    assert math.isnan(win_rate([1], [0])[1])


def failing(prompts: list[str], completions: list[str]) -> list[float]:
    raise KeyError("no such\nword")


@pytest.mark.parametrize(
    ("scorer", "said"),
    [
        (failing, "scorer: failed .KeyError: "),
        (lambda prompts, completions: [1.0], "gave 1 scores for 2"),
        (lambda prompts, completions: [math.nan] * 2, "not a number"),
        (lambda prompts, completions: ["high", "low"], "scorer: failed .ValueError"),
    ],
)
def test_a_scorer_that_does_not_score_is_named_in_a_line(scorer: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        score(scorer, ["a", "b"], ["c", "d"])
    assert "\n" not in str(caught.value)


def test_scorers_are_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "my_judge.py").write_text(
        "def length(prompts, completions):\n    return [len(c) for c in completions]\n"
    )
    assert load_scorer("my_judge:length")(["a"], ["bcd"]) == [3]
    for name, said in (
        ("my_judge", "expected 'module:function'"),
        ("my_judge:width", "cannot be imported"),
        ("no_such_judge:length", "cannot be imported"),
        ("my_judge:__name__", "is not callable"),
    ):
        with pytest.raises(ConfigError, match=said):
            load_scorer(name)


def test_settings_that_make_no_samples_are_explained(make_trainer: Make, pairs: Any, tmp_path: Path) -> None:
    for settings, said in (
        ({"win_rate_scorer": "a:b"}, "set sample_prompts"),
        ({"win_rate_against": "reference_model"}, "did you mean 'reference'"),
        ({"sample_prompts": -1}, "sample_prompts: must be at least 0"),
        ({"sample_temperature": -0.1}, "sample_temperature: must be at least 0"),
    ):
        with pytest.raises(ConfigError, match=said):
            DPOConfig(output_dir=str(tmp_path), **settings)
    with pytest.raises(ConfigError, match="set sample_prompts"):
        make_trainer(scorer=niceness, eval_dataset=pairs(2))
    with pytest.raises(ConfigError, match="no evaluation dataset"):
        make_trainer(sample_prompts=2)
