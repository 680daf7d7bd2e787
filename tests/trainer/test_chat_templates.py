"""Chat templates: their arguments, the choice of template, the scored tokens, and rows without scored tokens."""

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from dpo_trainer import ConfigError, DataError, DPOConfig, PairCollator
from dpo_trainer.data.prepare import Preparation, PreparedStream, prepare_dataset
from dpo_trainer.data.template import with_chat_template
from dpo_trainer.data.tokens import MASKS, TOKENS, tokenize_pair
from dpo_trainer.model.reference_cache import data_fingerprint

from .tiny import CHAT_TEMPLATE, build_pairs, build_tokenizer

#: Like Qwen3's: an empty thinking block if thinking is off, and before answers to the last question.
THINKING = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}<|start|>{{ m.role }}\n{% if m.role == 'assistant' and "
    "loop.index0 > ns.last %}<think>\n\n</think>\n\n{% endif %}{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}({{ c.function.arguments | tojson }}){% endfor %}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
#: With generation marks around the assistant's text and the end of its turn.
MARKED = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|end|>"
    "{% endgeneration %}{% else %}{{ m.content }}<|end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
#: Like Mistral's: nothing after a question, and an end token only after an answer.
BARE = (
    "{% for m in messages %}{% if m.role == 'user' %}[Q] {{ m.content }} [/Q]{% else %} {{ m.content }}<|end|>{% endif %}"
    "{% endfor %}"
)


def message(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": text}


def chat(*chosen: dict[str, Any], **columns: Any) -> dict[str, Any]:
    rejected = [message("assistant", "bad")]
    return {"prompt": [message("user", "the film")], "chosen": list(chosen), "rejected": rejected, **columns}


def with_template(template: str) -> Any:
    tokenizer = copy.copy(build_tokenizer())
    tokenizer.chat_template = template
    return tokenizer


SIMPLE = chat(message("assistant", "good"))
TURNS = chat(message("assistant", "good"), message("user", "the review"), message("assistant", "great"))
CALL = {"type": "function", "function": {"name": "look", "arguments": json.dumps({"film": "a"})}}
CALLS = chat(
    {"role": "assistant", "tool_calls": [CALL]},
    message("tool", "fine"),
    message("tool", "bad"),
    message("assistant", "good"),
)


# --- arguments of the template -----------------------------------------------------------------------------------------


def text(tokenizer: Any, ids: dict[str, Any]) -> list[str]:
    return [tokenizer.decode(ids[name]) for name in TOKENS]


@pytest.mark.parametrize("form", ["object", "JSON text", "setting", "row over setting"])
@pytest.mark.parametrize("source", ["list", "dataset", "stream"])
def test_an_empty_thinking_block_stands_in_the_prompt_where_thinking_is_off(form: str, source: str) -> None:
    tokenizer = with_template(THINKING)
    told: Any = {"enable_thinking": False}
    row = (
        SIMPLE
        if form == "setting"
        else {**SIMPLE, "chat_template_kwargs": json.dumps(told) if "text" in form else told}
    )
    run = told if form == "setting" else {"enable_thinking": True} if "over" in form else None
    preparation = Preparation(chat_template_kwargs=run)
    if source == "stream":
        stored = datasets.Dataset.from_list([row]).to_iterable_dataset()
        ids = next(iter(PreparedStream(stored, tokenizer, preparation, name="x")))
    else:
        rows = [row] if source == "list" else datasets.Dataset.from_list([row])
        ids = prepare_dataset(rows, tokenizer, preparation, name="x")[0][0]
    prompt = "<|start|>user\nthe film<|end|>\n<|start|>assistant\n<think>\n\n</think>\n\n"
    assert text(tokenizer, ids) == [prompt, "good<|end|>\n", "bad<|end|>\n"]


def test_rows_that_tell_the_template_different_things_keep_them_apart() -> None:
    """A datasets table would give every row the keys of all rows."""
    tokenizer = with_template("{{ a | default('-') }}{{ b | default('-') }}" + CHAT_TEMPLATE)
    rows = [{**SIMPLE, "chat_template_kwargs": told} for told in ({"a": 1}, {"b": "x"}, {"a": "y"})]
    found = prepare_dataset(rows, tokenizer, Preparation(), name="x")[0]
    assert [tokenizer.decode(row["prompt_ids"])[:2] for row in found] == ["1-", "-x", "y-"]


def test_what_the_template_is_told_is_in_the_name_of_the_tokens() -> None:
    tokenizer = with_template(THINKING)
    for told, block in (({"enable_thinking": False}, True), (None, False), ({"enable_thinking": True}, False)):
        row = prepare_dataset([SIMPLE], tokenizer, Preparation(chat_template_kwargs=told), name="x")[0][0]
        assert tokenizer.decode(row["prompt_ids"]).endswith("</think>\n\n") == block


def test_a_name_that_the_template_does_not_know_is_told(
    make_trainer: Callable[..., Any], caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    (tmp_path / "a.jinja").write_text(THINKING)
    settings = {"chat_template_path": str(tmp_path / "a.jinja"), "chat_template_kwargs": {"enable_thinkin": False}}
    make_trainer(train_dataset=[SIMPLE], eval_dataset=[SIMPLE], **settings)
    line = "chat_template_kwargs: the chat template does not use 'enable_thinkin' (did you mean 'enable_thinking'?)"
    assert caplog.messages.count(line) == 1, "training and evaluation data have the same template"
    caplog.clear()
    make_trainer(train_dataset=build_pairs(3), chat_template_kwargs={"enable_thinking": False})
    assert "chat_template_kwargs: not used, because rows are text" in caplog.messages


def test_what_the_template_leaves_out_is_told(caplog: pytest.LogCaptureFixture) -> None:
    def said(template: str, row: dict[str, Any]) -> list[str]:
        return prepare_dataset([row], with_template(template), Preparation(), name="x")[1].remarks

    thought = {**message("assistant", "good"), "reasoning_content": "fine"}
    line = "the chat template does not use the rows' {}; the model will not see it"
    tools = [{"type": "function", "function": {"name": "look"}}]
    assert said(CHAT_TEMPLATE, CALLS) == [line.format("tool_calls")]
    assert said(CHAT_TEMPLATE, {**chat(thought), "tools": tools}) == [line.format("reasoning_content, tools")]
    assert said(THINKING, CALLS) == []
    assert said("{% if false %}{{ thinking }}{% endif %}" + CHAT_TEMPLATE, chat(thought)) == [], (
        "transformers gives it all three names"
    )


# --- tool calls --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", ['{"n": [1, null]}', {"n": [1, None]}, "no JSON", '"text"', ""], ids=str)
@pytest.mark.parametrize("source", ["list", "dataset"])
def test_arguments_that_are_json_text_reach_the_template_as_objects(arguments: Any, source: str) -> None:
    call = {"type": "function", "function": {"name": "look", "arguments": arguments}}
    rows: Any = [chat({"role": "assistant", "tool_calls": [call]})]
    if source == "dataset":
        rows = datasets.Dataset.from_list(rows)
    tokenizer = with_template(THINKING.replace("<think>\n\n</think>\n\n", ""))
    row = prepare_dataset(rows, tokenizer, Preparation(), name="x")[0][0]
    expected = '{"n": [1, null]}' if "n" in arguments and "no" not in arguments else json.dumps(arguments)
    assert tokenizer.decode(row["chosen_ids"]) == f"look({expected})<|end|>\n"


# --- scored tokens -----------------------------------------------------------------------------------------------------


def scored(tokenizer: Any, row: dict[str, Any], **settings: Any) -> tuple[str, str]:
    """The text of the chosen completion, and the text of its scored tokens."""
    ids = tokenize_pair(row, tokenizer, **settings)
    mask = ids.get("chosen_mask", [True] * len(ids["chosen_ids"]))
    kept = [token for token, keep in zip(ids["chosen_ids"], mask, strict=True) if keep]
    return tokenizer.decode(ids["chosen_ids"]), tokenizer.decode(kept)


BLOCK = "<think>\n\n</think>\n\n"


@pytest.mark.parametrize(
    ("template", "row", "words"),
    [
        (CHAT_TEMPLATE, SIMPLE, "good<|end|>\n"),
        (CHAT_TEMPLATE, TURNS, "good<|end|>\ngreat<|end|>\n"),
        (CHAT_TEMPLATE, chat(*TURNS["chosen"][:2]), "good<|end|>\n"),
        (BARE, TURNS, " good<|end|> great<|end|>"),
        (MARKED, SIMPLE, "good<|end|>"),
        (MARKED, TURNS, "good<|end|>great<|end|>"),
        (THINKING, TURNS, f"good<|end|>\n{BLOCK}great<|end|>\n"),
        (THINKING, CALLS, f'{BLOCK}look({{"film": "a"}})<|end|>\n{BLOCK}good<|end|>\n'),
        (
            THINKING,
            chat(*CALLS["chosen"], message("user", "more"), message("assistant", "fine")),
            f'look({{"film": "a"}})<|end|>\ngood<|end|>\n{BLOCK}fine<|end|>\n',
        ),
    ],
    ids=[
        "one",
        "turns",
        "ends with the user",
        "no header",
        "marks",
        "marks, turns",
        "thinking",
        "tools",
        "tools, turns",
    ],
)
def test_words_of_users_and_tools_are_not_scored(template: str, row: dict[str, Any], words: str) -> None:
    tokenizer = with_template(template)
    assert scored(tokenizer, row)[1] == words
    whole, everything = scored(tokenizer, row, assistant_only_loss=False)
    assert whole == everything == scored(tokenizer, row)[0]


def test_a_completion_may_begin_with_a_tools_answer() -> None:
    row = {
        "prompt": [message("user", "the film"), {"role": "assistant", "tool_calls": [CALL], "content": ""}],
        "chosen": [message("tool", "fine"), message("assistant", "good")],
        "rejected": [message("tool", "bad"), message("assistant", "bad")],
    }
    tokenizer = with_template(CHAT_TEMPLATE)
    ids = tokenize_pair(row, tokenizer)
    assert tokenizer.decode(ids["prompt_ids"]).endswith("<|start|>assistant\n<|end|>\n")
    assert scored(tokenizer, row)[1] == "good<|end|>\n"


def test_an_answer_that_changes_beyond_recognition_is_refused() -> None:
    template = (
        "{% for m in messages %}{{ m.role }}:{{ m.content if loop.last else m.content | upper }}<|end|>{% endfor %}"
    )
    template += "{% if add_generation_prompt %}assistant:{% endif %}"
    row = {**TURNS, "prompt": [message("user", "FILM")]}
    tokenizer = with_template(template)
    with pytest.raises(
        DataError, match=r"x row 1: .* differently once message 3 follows it.*assistant_only_loss: false"
    ):
        prepare_dataset([row], tokenizer, Preparation(), name="x")
    assert prepare_dataset([row], tokenizer, Preparation(assistant_only_loss=False), name="x")[1].kept == 1


def test_masks_are_kept_only_where_something_is_not_scored() -> None:
    tokenizer = with_template(CHAT_TEMPLATE)
    prepared = prepare_dataset([SIMPLE, TURNS], tokenizer, Preparation(), name="x")[0]
    assert set(MASKS) <= set(prepared.column_names)
    assert prepared[0]["chosen_mask"] == [True] * len(prepared[0]["chosen_ids"])
    assert not all(prepared[1]["chosen_mask"])
    plain = prepare_dataset([SIMPLE], tokenizer, Preparation(), name="x")[0]
    assert not set(MASKS) & set(plain.column_names)


@pytest.mark.parametrize("most", [30, 36, 44])
def test_masks_are_cut_as_their_tokens_are(most: int) -> None:
    tokenizer = with_template(CHAT_TEMPLATE)
    whole = tokenize_pair(TURNS, tokenizer)
    ids = tokenize_pair(TURNS, tokenizer, max_length=most, truncation_mode="keep_start")
    length = len(ids["chosen_ids"])
    assert length < len(whole["chosen_ids"])
    assert ids.get("chosen_mask", [True] * length) == whole["chosen_mask"][:length]


def test_a_completion_cut_to_words_of_a_user_counts_as_nothing_left() -> None:
    tokenizer = with_template(CHAT_TEMPLATE)
    row = {
        "prompt": [message("user", "the film"), message("assistant", "fine")],
        "chosen": [message("tool", "the film " * 9), message("assistant", "good")],
        "rejected": [message("tool", "the review " * 9), message("assistant", "bad")],
    }
    cut = {"max_length": 40, "truncation_mode": "keep_start"}
    rows = [row, SIMPLE]
    account = prepare_dataset(rows, tokenizer, Preparation(**cut), name="x")[1]
    assert account.describe().endswith("dropped 1 with nothing of a completion left after truncation")


@pytest.mark.parametrize("layout", ["padded", "prefix_shared", "sequences"])
def test_the_collator_leaves_out_what_is_not_scored_and_nothing_else(layout: str) -> None:
    tokenizer = with_template(CHAT_TEMPLATE)
    rows = prepare_dataset([TURNS, SIMPLE], tokenizer, Preparation(), name="x")[0].to_list()
    plain = [{name: value for name, value in row.items() if name not in MASKS} for row in rows]
    batch, whole = (PairCollator(layout=layout)(given) for given in (rows, plain))
    keep = torch.tensor([mark for name in MASKS for row in rows for mark in row[name]])
    for name in ("positions", "labels"):
        assert torch.equal(batch[name], whole[name][keep]), name
    for name in set(whole) - {"positions", "labels", "cu_seqlens"}:
        assert torch.equal(batch[name], whole[name]), name
    counts = [sum(row[name]) for name in MASKS for row in rows]
    assert batch["cu_seqlens"].diff().tolist() == counts
    all_true = [{**row, **{name: [True] * len(row[name]) for name in MASKS}} for row in rows]
    assert torch.equal(PairCollator(layout=layout)(all_true)["labels"], whole["labels"])


@pytest.mark.parametrize("precompute", [False, True])
def test_logps_are_sums_over_the_answers_words_alone(precompute: bool, make_trainer: Any, make_model: Any) -> None:
    """Equal to a plain float64 forward over the whole conversation."""
    model = make_model("llama-untied").double()
    trainer = make_trainer(
        model=model,
        train_dataset=[TURNS, {**SIMPLE, "prompt": TURNS["prompt"]}, CHAT_TURNS],
        precompute_ref_log_probs=precompute,
        bf16=False,
    )
    dataset = trainer.train_dataset
    batch = trainer._prepare_inputs(trainer.data_collator([dict(row) for row in dataset]))
    with torch.no_grad():
        output = trainer.pair_loss(batch, torch.ones(len(dataset)))
    for side, found in (("chosen", output.chosen_logps), ("rejected", output.rejected_logps)):
        for row, logp in zip(dataset, found.tolist(), strict=True):
            ids = torch.tensor([row["prompt_ids"] + row[f"{side}_ids"]])
            with torch.no_grad():
                logps = trainer.model(input_ids=ids).logits.double().log_softmax(-1)[0]
            start, mask = len(row["prompt_ids"]), row[f"{side}_mask"]
            expected = sum(
                logps[start + place - 1, ids[0, start + place]].item() for place, keep in enumerate(mask) if keep
            )
            assert logp == pytest.approx(expected, abs=1e-9)
    assert output.loss.item() / len(dataset) == pytest.approx(math.log(2), abs=1e-6)


CHAT_TURNS = {
    "prompt": [message("system", "the answer"), message("user", "the film")],
    "chosen": [message("assistant", "fine"), message("user", "the question"), message("assistant", "good great")],
    "rejected": [message("assistant", "awful"), message("user", "the review"), message("assistant", "bad")],
}


def test_kept_log_probabilities_know_what_is_scored() -> None:
    tokenizer = with_template(CHAT_TEMPLATE)
    masked, whole = (
        prepare_dataset([TURNS], tokenizer, Preparation(assistant_only_loss=only), name="x")[0]
        for only in (True, False)
    )
    assert data_fingerprint(masked) != data_fingerprint(whole)
    assert data_fingerprint(masked.remove_columns(list(MASKS))) == data_fingerprint(whole)


def test_a_stream_scores_what_its_list_scores() -> None:
    tokenizer = with_template(CHAT_TEMPLATE)
    stream = PreparedStream(
        datasets.Dataset.from_list([TURNS, SIMPLE]).to_iterable_dataset(), tokenizer, Preparation(), name="x"
    )
    listed = prepare_dataset([TURNS, SIMPLE], tokenizer, Preparation(), name="x")[0].to_list()
    assert list(stream) == listed


# --- the end of an answer ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "told"),
    [
        (CHAT_TEMPLATE, False),
        (MARKED, False),
        (CHAT_TEMPLATE.replace("<|end|>", ""), True),
        (MARKED.replace("<|end|>{% endgeneration %}", "{% endgeneration %}<|end|>"), True),
    ],
    ids=["end", "marked end", "no end", "end outside the marks"],
)
def test_a_template_without_an_end_token_is_told_once(
    template: str, told: bool, tmp_path: Path, make_trainer: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a.jinja").write_text(template)
    data = {"train_dataset": [SIMPLE, TURNS], "eval_dataset": [SIMPLE]}
    make_trainer(**data, chat_template_path=str(tmp_path / "a.jinja"))
    assert sum("no end token after an answer" in line for line in caplog.messages) == told


# --- choice of the template --------------------------------------------------------------------------------------------


def test_a_template_from_a_file_or_a_folder_is_used_and_saved(
    tmp_path: Path, make_trainer: Callable[..., Any], tokenizer: Any
) -> None:
    (tmp_path / "a.jinja").write_text(BARE)
    with_template(BARE).save_pretrained(tmp_path / "folder")
    for path in ("a.jinja", "folder"):
        trainer = make_trainer(train_dataset=[SIMPLE], chat_template_path=str(tmp_path / path))
        assert tokenizer.decode(trainer.train_dataset[0]["prompt_ids"]) == "[Q] the film [/Q]"
        trainer.save_model()
        assert trainer.processing_class.chat_template == BARE
        assert (tmp_path / "run" / "chat_template.jinja").read_text() == BARE
    assert tokenizer.chat_template == CHAT_TEMPLATE, "the caller's own is as it was"


def test_a_template_that_is_none_is_refused(tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    (tmp_path / "bad.jinja").write_text("{% for m in messages %}")
    (tmp_path / "empty.jinja").write_text("")
    untemplated = copy.copy(tokenizer)
    untemplated.chat_template = None
    untemplated.save_pretrained(tmp_path / "folder")
    for path, said in (
        ("none.jinja", "cannot be read"),
        ("bad.jinja", "is not a Jinja template"),
        ("empty.jinja", "contains no chat template"),
        ("folder", "contains no chat template"),
    ):
        with pytest.raises(ConfigError, match=rf"chat_template_path: '.*{path}' {said}"):
            with_chat_template(tokenizer, str(tmp_path / path))


# --- nothing to score --------------------------------------------------------------------------------------------------

LONG = {"prompt": "film " * 30, "chosen": " good", "rejected": " bad"}
CUT = {"max_length": 12, "truncation_mode": "keep_start", "filters": []}


@pytest.mark.parametrize("form", ["list", "stream"])
def test_rows_with_nothing_to_score_may_come_first(form: str, make_trainer: Any, make_model: Any) -> None:
    """Two batches of one row have no scored token. Their logging windows contain no means, not NaN."""
    ok = build_pairs(1)[0]
    losses = []
    for rows in ([LONG, LONG, ok], [ok, LONG, LONG]):
        data = rows if form == "list" else datasets.Dataset.from_list(rows).to_iterable_dataset()
        trainer = make_trainer(
            model=make_model(), train_dataset=data, **CUT, max_steps=3, per_device_train_batch_size=1,
            train_sampling_strategy="sequential", learning_rate=0.0,
        )  # fmt: skip
        trainer.train()
        records = [record for record in trainer.state.log_history if "learning_rate" in record]
        assert len(records) == 3
        assert all(math.isfinite(v) for record in records for v in record.values() if isinstance(v, float))
        assert sum("entropy" in record for record in records) == 1, "of the row that has tokens to score"
        assert sum("rewards/margins" in record for record in records) == 1
        losses.append(sorted(record["loss"] for record in records))
    assert losses[0] == pytest.approx(losses[1])


def test_nothing_to_score_at_all_is_refused(make_trainer: Any) -> None:
    with pytest.raises(DataError, match="no pair has tokens of both completions left to score; raise max_length"):
        make_trainer(train_dataset=[LONG, LONG], **CUT)


def test_settings_may_be_json_text(tmp_path: Path) -> None:
    config = DPOConfig(output_dir=str(tmp_path), chat_template_kwargs='{"enable_thinking": false}')
    assert config.chat_template_kwargs == {"enable_thinking": False}
