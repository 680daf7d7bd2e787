"""Reading, checking and tokenising pairs: the boundary is right, truncation keeps one prompt, bad rows are named."""

import copy
import itertools
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_trainer import ConfigError, DataError, load_pairs
from dpo_trainer.data import prepare as prepare_module
from dpo_trainer.data.account import FILTERS, hold_out
from dpo_trainer.data.files import reading_of, stream_of, stream_pairs
from dpo_trainer.data.prepare import Preparation, PreparedStream, prepare_dataset
from dpo_trainer.data.rows import split_row
from dpo_trainer.data.tokens import tokenize_pair, truncate

from .tiny import build_pairs, build_tokenizer

ROW = {"prompt": "review:", "chosen": " great", "rejected": " awful"}


# --- the boundary --------------------------------------------------------------------------------------------------

# Tokens that cross the boundary: prompts ending in a space, completions without one, merges inside a word, an empty prompt.
BOUNDARIES = [
    ("review:", " great", " awful"),
    ("review: ", "great", "awful"),
    ("review:", "great", "awful"),
    ("the great", "est", " film"),
    ("the goodn", "ess", "e"),
    ("the film ", " good", "bad"),
    ("", "good", "bad"),
    ("the film\n", "\ngood", "bad"),
]


@pytest.mark.parametrize("kind", ["plain", "bos", "eos", "bos+eos"])
@pytest.mark.parametrize(("prompt", "chosen", "rejected"), BOUNDARIES)
def test_tokens_are_those_of_the_joined_text_with_one_end(
    tokenizers: dict[str, Any], kind: str, prompt: str, chosen: str, rejected: str
) -> None:
    tokenizer = tokenizers[kind]
    row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    ids = tokenize_pair(row, tokenizer)
    for side in ("chosen", "rejected"):
        joined = ids["prompt_ids"] + ids[f"{side}_ids"]
        text = tokenizer(prompt + row[side], add_special_tokens=False)["input_ids"]
        start = [tokenizer.bos_token_id] if "bos" in kind else []
        assert joined == [*start, *text, tokenizer.eos_token_id]
        assert len(ids[f"{side}_ids"]) > 0


WORDS = st.lists(
    st.sampled_from([" ", "\n", "good", " good", "ness", "great", "est", "g", " f", "ilm", "é"]), max_size=4
)


@pytest.mark.parametrize("kind", ["plain", "bos", "eos", "bos+eos"])
@given(WORDS, WORDS, WORDS)
def test_no_text_is_tokenised_otherwise_than_as_a_whole(
    tokenizers: dict[str, Any], kind: str, prompt: list[str], chosen: list[str], rejected: list[str]
) -> None:
    tokenizer = tokenizers[kind]
    row = {"prompt": "".join(prompt), "chosen": "".join(chosen), "rejected": "".join(rejected)}
    ids = tokenize_pair(row, tokenizer)
    for side in ("chosen", "rejected"):
        text = tokenizer(row["prompt"] + row[side], add_special_tokens=False)["input_ids"]
        start = [tokenizer.bos_token_id] if "bos" in kind else []
        assert ids["prompt_ids"] + ids[f"{side}_ids"] == [*start, *text, tokenizer.eos_token_id]
    assert row["prompt"].startswith(tokenizer.decode(ids["prompt_ids"], skip_special_tokens=True).rstrip("\ufffd"))


@pytest.mark.parametrize("kind", ["plain", "bos", "eos", "bos+eos"])
def test_without_append_eos_a_text_ends_as_the_tokenizer_leaves_it(tokenizers: dict[str, Any], kind: str) -> None:
    tokenizer = tokenizers[kind]
    ids = tokenize_pair(ROW, tokenizer, append_eos=False)
    for side in ("chosen", "rejected"):
        joined = ids["prompt_ids"] + ids[f"{side}_ids"]
        assert joined == tokenizer(ROW["prompt"] + ROW[side])["input_ids"]
        assert (joined[-1] == tokenizer.eos_token_id) == ("eos" in kind)


def test_clean_boundary_keeps_the_whole_prompt(tokenizers: dict[str, Any]) -> None:
    tokenizer = tokenizers["plain"]
    assert tokenize_pair(ROW, tokenizer)["prompt_ids"] == tokenizer(ROW["prompt"])["input_ids"]


def test_a_straddling_token_belongs_to_both_completions(tokenizers: dict[str, Any]) -> None:
    """ "greatest" is one token: the prompt "the great" cannot keep its own "great" on either side."""
    tokenizer = tokenizers["plain"]
    assert len(tokenizer(" greatest")["input_ids"]) == 1
    ids = tokenize_pair({"prompt": "the great", "chosen": "est", "rejected": " film"}, tokenizer)
    assert tokenizer.decode(ids["prompt_ids"]) == "the"
    assert tokenizer.decode(ids["chosen_ids"]) == " greatest<|end|>"
    assert tokenizer.decode(ids["rejected_ids"]) == " great film<|end|>"


def test_end_token_is_not_added_twice(tokenizers: dict[str, Any]) -> None:
    row = {**ROW, "chosen": " great<|end|>"}
    assert tokenize_pair(row, tokenizers["plain"])["chosen_ids"].count(0) == 1


# --- chat ----------------------------------------------------------------------------------------------------------

CHAT = {
    "prompt": [{"role": "system", "content": "the answer"}, {"role": "user", "content": "the film"}],
    "chosen": [{"role": "assistant", "content": "good"}],
    "rejected": [{"role": "assistant", "content": "bad"}],
}


def test_chat_rows_follow_the_template(tokenizer: Any) -> None:
    ids = tokenize_pair(CHAT, tokenizer)
    assert (
        tokenizer.decode(ids["prompt_ids"])
        == "<|start|>system\nthe answer<|end|>\n<|start|>user\nthe film<|end|>\n<|start|>assistant\n"
    )
    assert tokenizer.decode(ids["chosen_ids"]) == "good<|end|>\n"


def test_an_open_assistant_turn_is_continued(tokenizer: Any) -> None:
    row = {**CHAT, "prompt": [*CHAT["prompt"], {"role": "assistant", "content": "the answer:"}]}
    row["chosen"] = [{"role": "assistant", "content": " good"}]
    ids = tokenize_pair(row, tokenizer)
    assert tokenizer.decode(ids["prompt_ids"]).endswith("<|start|>assistant\nthe answer:")
    assert tokenizer.decode(ids["chosen_ids"]) == " good<|end|>\n"


def test_a_generation_prompt_that_answers_lack_is_shortened(tokenizer: Any) -> None:
    """As in templates that begin with an empty thinking block: the common part is the prompt."""
    template = tokenizer.chat_template
    tokenizer.chat_template = template.replace(
        "<|start|>assistant\n{% endif %}", "<|start|>assistant\n[think]{% endif %}"
    )
    try:
        ids = tokenize_pair(CHAT, tokenizer)
    finally:
        tokenizer.chat_template = template
    assert tokenizer.decode(ids["prompt_ids"]).endswith("<|start|>assistant\n")
    assert tokenizer.decode(ids["chosen_ids"]) == "good<|end|>\n"


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (None, "no chat template"),
        ("{{ raise_exception('no system role') }}", "no system role"),
        (
            "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}",
            "renders the prompt differently",
        ),
    ],
)
def test_unusable_templates_are_explained(tokenizers: dict[str, Any], template: str | None, said: str) -> None:
    tokenizer = copy.deepcopy(tokenizers["plain"])
    tokenizer.chat_template = template
    with pytest.raises(DataError, match=said) as caught:
        prepare(datasets.Dataset.from_list([CHAT]), tokenizer)
    assert "train_dataset row 1" in str(caught.value)


# --- truncation ----------------------------------------------------------------------------------------------------

TOKENS = st.lists(st.integers(2, 50), max_size=12)


@given(
    TOKENS,
    TOKENS,
    TOKENS,
    st.integers(2, 20),
    st.none() | st.integers(1, 8),
    st.sampled_from(["keep_end", "keep_start"]),
)
def test_truncation_fits_and_keeps_one_prompt(
    prompt: list[int], chosen: list[int], rejected: list[int], most: int, most_prompt: int | None, mode: str
) -> None:
    p, c, r = truncate(prompt, chosen, rejected, max_length=most, max_prompt_length=most_prompt, mode=mode)
    assert len(p) + max(len(c), len(r)) <= most
    assert most_prompt is None or len(p) <= most_prompt
    assert c == chosen[: len(c)]
    assert r == rejected[: len(r)]
    assert p == (prompt[len(prompt) - len(p) :] if mode == "keep_end" else prompt[: len(p)])
    if len(prompt) + max(len(chosen), len(rejected)) <= most and (most_prompt is None or len(prompt) <= most_prompt):
        assert (p, c, r) == (prompt, chosen, rejected)
    if prompt and mode == "keep_end":
        assert p, "a completion needs something to be predicted from"


def test_bos_survives_a_cut_prompt() -> None:
    p, c, r = truncate([1, 5, 6, 7], [8], [9, 9], max_length=4, max_prompt_length=None, mode="keep_end", bos_token_id=1)
    assert (p, c, r) == ([1, 7], [8], [9, 9])


# --- prompts within texts and conversations ------------------------------------------------------------------------


def test_whole_texts_share_their_beginning_as_the_prompt(tokenizers: dict[str, Any]) -> None:
    """Also if the texts first differ inside a token: "good" and "goodness" are one token each."""
    tokenizer = tokenizers["bos"]
    for chosen, rejected, prompt in (
        ("the film: good", "the film: bad", "the film:"),
        ("the film: good", "the film: goodness", "the film:"),
        ("the film:\n\ngood", "the film:\n\nbad", "the film:\n\n"),
    ):
        ids = tokenize_pair({"chosen": chosen, "rejected": rejected}, tokenizer)
        assert tokenizer.decode(ids["prompt_ids"], skip_special_tokens=True) == prompt
        for side, text in (("chosen", chosen), ("rejected", rejected)):
            joined = ids["prompt_ids"] + ids[f"{side}_ids"]
            assert joined == [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]


@given(st.text("ab :", max_size=8), st.text("ab ", max_size=6), st.text("ab ", max_size=6))
def test_a_shared_beginning_loses_no_character(prompt: str, chosen: str, rejected: str) -> None:
    pair = split_row({"chosen": prompt + chosen, "rejected": prompt + rejected})
    start, sides = pair.prompt, (pair.chosen, pair.rejected)
    assert [start + side for side in sides] == [prompt + chosen, prompt + rejected]
    assert start.startswith(prompt)
    assert not (sides[0] and sides[1]) or sides[0][0] != sides[1][0]


def conversation(*words: str) -> list[dict[str, str]]:
    roles = ("system", "user", "assistant", "user", "assistant")
    return [{"role": role, "content": word} for role, word in zip(roles, words, strict=False)]


MULTI_TURN = ("the answer", "the film", "fine", "the review")


@pytest.mark.parametrize(
    "row",
    [
        {"chosen": conversation(*MULTI_TURN, "good"), "rejected": conversation(*MULTI_TURN, "bad")},
        {
            "prompt": conversation(*MULTI_TURN),
            "chosen": conversation(*MULTI_TURN, "good"),
            "rejected": conversation(*MULTI_TURN, "bad"),
        },
        {
            "prompt": "the review",
            "chosen": conversation(*MULTI_TURN, "good"),
            "rejected": conversation(*MULTI_TURN, "bad"),
        },
    ],
    ids=["no prompt", "prompt and whole conversations", "prompt as text"],
)
def test_whole_conversations_equal_prompt_and_answers(row: dict[str, Any], tokenizer: Any) -> None:
    """With a system prompt and several turns, the common messages are the prompt and the last messages are the answers."""
    answers = {
        side: [{"role": "assistant", "content": word}] for side, word in (("chosen", "good"), ("rejected", "bad"))
    }
    explicit = tokenize_pair({"prompt": conversation(*MULTI_TURN), **answers}, tokenizer)
    stored = datasets.Dataset.from_list([row])[0]
    assert tokenize_pair(row, tokenizer) == tokenize_pair(stored, tokenizer) == explicit
    assert tokenizer.decode(explicit["chosen_ids"]) == "good<|end|>\n"
    assert tokenizer.decode(explicit["prompt_ids"]).count("<|start|>") == 5


def test_conversations_may_part_before_several_turns(tokenizer: Any) -> None:
    row = {
        "chosen": conversation("the answer", "the film", "good", "the review", "fine"),
        "rejected": conversation("the answer", "the film", "bad"),
    }
    ids = tokenize_pair(row, tokenizer)
    assert tokenizer.decode(ids["rejected_ids"]) == "bad<|end|>\n"
    assert tokenizer.decode(ids["chosen_ids"]).startswith("good<|end|>\n<|start|>user\nthe review<|end|>\n")


# --- tools ---------------------------------------------------------------------------------------------------------

TOOLS = [
    {"type": "function", "function": {"name": "look", "parameters": {"film": {"default": None, "n": 1}}}},
    {"type": "function", "function": {"name": "ask", "parameters": {"question": {"n": "one"}}}},
]
CALL = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "look", "arguments": {"n": 1}}}]}
TOOL_TEMPLATE = (
    "{% if tools %}{{ tools | tojson }};{% endif %}{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}"
    "{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %};{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.mark.parametrize("source", ["list", "jsonl", "stream", "text in parquet"])
def test_tools_reach_the_template_as_they_were_written(source: str, tokenizers: dict[str, Any], tmp_path: Path) -> None:
    """Two rows whose tools have different keys and types: the table must not add missing keys to a tool."""
    tokenizer = copy.deepcopy(tokenizers["plain"])
    tokenizer.chat_template = TOOL_TEMPLATE
    rows = [{**CHAT, "tools": [tool], "rejected": [CALL]} for tool in TOOLS]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    if source == "list":
        found = list(prepare(rows, tokenizer)[0])
    elif source == "jsonl":
        found = list(prepare(load_pairs(tmp_path / "a.jsonl"), tokenizer)[0])
    elif source == "stream":
        found = list(PreparedStream(stream_pairs(tmp_path / "a.jsonl"), tokenizer, Preparation(), name="train_dataset"))
    else:
        texts = [{**row, "tools": json.dumps(row["tools"])} for row in rows]
        datasets.Dataset.from_list(texts).to_parquet(tmp_path / "a.parquet")
        found = list(prepare(load_pairs(tmp_path / "a.parquet"), tokenizer)[0])
    for ids, tool in zip(found, TOOLS, strict=True):
        shown, _, rest = tokenizer.decode(ids["prompt_ids"]).partition(";")
        assert json.loads(shown) == [tool]
        assert rest == "system:the answer;user:the film;assistant:"
        assert json.loads(tokenizer.decode(ids["rejected_ids"]).strip(";")) == CALL["tool_calls"]


# --- the account ---------------------------------------------------------------------------------------------------


def prepare(dataset: Any, tokenizer: Any, **settings: Any) -> Any:
    return prepare_dataset(dataset, tokenizer, Preparation(**settings), name="train_dataset")


#: One row for every filter, by the filter's name, and some rows that are kept.
REASONS: dict[str, list[dict[str, Any]]] = {
    "": [ROW, {**ROW, "prompt": "the film:"}, {**ROW, "chosen": " fine"}],
    "identical": [{**ROW, "rejected": ROW["chosen"]}],
    "empty": [{**ROW, "rejected": "  "}, {**ROW, "chosen": ""}],
    "truncated": [{**ROW, "prompt": "the film " * 20}],
    "duplicates": [dict(ROW), {**ROW, "chosen": " fine"}],
}
FILTERED = [{**row, "weight": 1 / (1 + i)} for i, row in enumerate(itertools.chain(*REASONS.values()))]


@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize("form", ["list", "stream"])
def test_each_filter_drops_and_counts_its_rows_and_can_be_switched_off(name: str, form: str, tokenizer: Any) -> None:
    def account(filters: list[str]) -> Any:
        settings = Preparation(max_length=12, truncation_mode="keep_start", filters=filters)
        if form == "list":
            dataset, found = prepare_dataset(FILTERED, tokenizer, settings, name="train_dataset")
            assert len(dataset) == found.kept
            return found
        stream = PreparedStream(
            datasets.Dataset.from_list(FILTERED).to_iterable_dataset(), tokenizer, settings, name="train_dataset"
        )
        assert len(list(stream)) == stream.account.kept
        return stream.account

    everything = account(list(FILTERS))
    assert (everything.rows, everything.kept) == (9, 3)
    assert everything.reasons == {FILTERS[key]: len(rows) for key, rows in REASONS.items() if key}
    assert account([other for other in FILTERS if other != name]).kept == 3 + len(REASONS[name])
    only = account([name])
    assert only.dropped == len(REASONS[name])
    assert f"{only.kept} of 9 pairs kept" in only.describe()
    assert f"; dropped {len(REASONS[name])} {FILTERS[name]}" in only.describe()
    assert account([]).dropped == 0


def test_pairs_of_little_confidence_are_dropped_and_counted(tokenizer: Any) -> None:
    dataset, account = prepare(
        [{**ROW, "prompt": f"{i}", "weight": i / 4} for i in range(5)], tokenizer, min_weight=0.5
    )
    assert dataset["weight"] == [0.5, 0.75, 1.0]
    assert account.describe().startswith("train_dataset: 3 of 5 pairs kept, ")
    assert account.describe().endswith("; dropped 2 with a weight below 0.5")
    with pytest.raises(ConfigError, match="min_weight: the pairs of train_dataset have no column 'weight'"):
        prepare([ROW], tokenizer, min_weight=0.5)


def test_an_account_with_several_reasons_reads_as_a_sentence(tokenizer: Any) -> None:
    _, account = prepare(FILTERED, tokenizer, max_length=12, truncation_mode="keep_start")
    assert account.describe().endswith(
        "; dropped 1 with chosen equal to rejected, 2 with an empty completion, 1 with nothing of a completion left after "
        "truncation and 2 that repeat an earlier one"
    )


def test_pairs_kept_without_filters_train(make_trainer: Any) -> None:
    """Pairs with equal sides or nothing to score have a loss of log 2; repeated pairs have a gradient like any pair."""
    trainer = make_trainer(train_dataset=FILTERED, filters=[], max_length=12, truncation_mode="keep_start", max_steps=3)
    trainer.train()
    assert all(record["loss"] == record["loss"] for record in trainer.state.log_history if "loss" in record)
    assert trainer.accounts[0].kept == len(FILTERED)


def test_nothing_left_is_an_error(tokenizer: Any) -> None:
    with pytest.raises(DataError, match="nothing is left"):
        prepare([{**ROW, "rejected": ROW["chosen"]}], tokenizer)
    stream = datasets.Dataset.from_list([{**ROW, "rejected": ROW["chosen"]}]).to_iterable_dataset()
    with pytest.raises(DataError, match="nothing is left"):
        PreparedStream(stream, tokenizer, Preparation(), name="train_dataset")


# --- the cache -----------------------------------------------------------------------------------------------------


def test_tokens_are_made_once_for_the_same_data_tokenizer_and_settings(
    tokenizers: dict[str, Any], pairs: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    calls: list[Any] = []
    real = prepare_module.tokenize_pair
    monkeypatch.setattr(prepare_module, "tokenize_pair", lambda *a, **k: calls.append(1) or real(*a, **k))
    rows, plain = pairs(7, seed=5), tokenizers["plain"]

    def made(rows: Any, tokenizer: Any, **settings: Any) -> int:
        calls.clear()
        prepare(rows, tokenizer, **settings)
        return len(calls)

    first, _ = prepare(rows, plain)
    assert made(rows, plain) == 0
    assert made(rows, build_tokenizer.__wrapped__()) == 0, "the same tokenizer made anew"
    assert made(rows, plain, filters=[]) == 0, "filters come after"
    assert made(rows, plain, max_length=9) == 7
    assert made(rows, tokenizers["bos"]) == 7
    assert made([*rows[:-1], {**rows[-1], "chosen": " fine"}], plain) == 7
    other = copy.deepcopy(plain)
    other.chat_template = TOOL_TEMPLATE
    assert made(rows, other) == 7
    assert prepare(rows, plain)[0].to_list() == first.to_list()
    datasets.disable_caching()
    try:
        assert made(rows, plain) == 7
    finally:
        datasets.enable_caching()


def test_several_processes_make_the_same_tokens(tokenizer: Any, pairs: Callable[..., Any]) -> None:
    rows = pairs(20, seed=8)
    one, two = prepare(rows, tokenizer), prepare(rows, tokenizer, dataset_num_proc=2)
    assert two[0].to_list() == one[0].to_list()
    assert two[1] == one[1]
    strict = copy.deepcopy(tokenizer)
    strict.chat_template = "{% if messages[0]['content'] == 'film 11' %}{{ raise_exception('no film 11') }}{% endif %}"
    chats = [{**CHAT, "prompt": [{"role": "user", "content": f"film {i}"}]} for i in range(20)]
    with pytest.raises(DataError, match=r"train_dataset row 12: the chat template refuses these messages: no film 11"):
        prepare(chats, strict, dataset_num_proc=2)


def test_lists_and_datasets_give_the_same_tokens(tokenizer: Any, pairs: Callable[..., Any]) -> None:
    rows = pairs(5)
    listed, _ = prepare(rows, tokenizer)
    stored, _ = prepare(datasets.Dataset.from_list([{**row, "extra": 1} for row in rows]), tokenizer)
    assert listed.to_list() == stored.to_list()


@pytest.mark.parametrize("kind", ["torch", "numpy", "pandas", "arrow"])
def test_a_dataset_s_format_changes_nothing(kind: str, tokenizer: Any, pairs: Callable[..., Any]) -> None:
    rows = [{**row, "weight": 0.5} for row in pairs(4)]
    dataset = datasets.Dataset.from_list(rows)
    assert prepare(dataset.with_format(kind), tokenizer)[0].to_list() == prepare(dataset, tokenizer)[0].to_list()
    assert isinstance(prepare(dataset.with_format(kind), tokenizer)[0][0]["prompt_ids"], list)


def test_a_dataset_s_transform_is_for_its_rows(tokenizer: Any, pairs: Callable[..., Any]) -> None:
    by_hand = [{**row, "prompt": row["prompt"] + " so"} for row in pairs(4)]
    dataset = datasets.Dataset.from_list(pairs(4)).with_transform(
        lambda rows: {**rows, "prompt": [text + " so" for text in rows["prompt"]]}
    )
    assert prepare(dataset, tokenizer)[0].to_list() == prepare(by_hand, tokenizer)[0].to_list()


def test_tokenised_datasets_pass_through(tokenizer: Any, pairs: Callable[..., Any]) -> None:
    dataset, _ = prepare(pairs(5), tokenizer)
    again, account = prepare(dataset, tokenizer)
    assert again.to_list() == dataset.to_list()
    assert account.kept == 5


# --- files ---------------------------------------------------------------------------------------------------------


def test_every_format_gives_the_same_rows(tmp_path: Path, pairs: Callable[..., Any]) -> None:
    rows = [{**row, "weight": 0.5 + index} for index, row in enumerate(pairs(4))]
    dataset = datasets.Dataset.from_list(rows)
    (tmp_path / "a.jsonl").write_text("\n\n".join(map(json.dumps, rows)))
    (tmp_path / "a.json").write_text(json.dumps(rows))
    dataset.to_parquet(tmp_path / "a.parquet")
    dataset.to_csv(tmp_path / "a.csv")
    dataset.save_to_disk(tmp_path / "folder")
    for name in ("a.jsonl", "a.json", "a.parquet", "a.csv", "folder"):
        assert load_pairs(tmp_path / name).to_list() == rows, name


@pytest.mark.parametrize("streaming", [False, True])
def test_hub_names_and_splits_are_found(streaming: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = {"train": datasets.Dataset.from_list([ROW, ROW]), "test": datasets.Dataset.from_list([ROW])}

    def load(name: str, split: str | None, streaming: bool) -> Any:
        assert name == "owner/pairs"
        found = {key: data.to_iterable_dataset() if streaming else data for key, data in hub.items()}
        return found[split] if split else found

    monkeypatch.setattr(datasets, "load_dataset", load)
    read = stream_pairs if streaming else load_pairs
    assert list(read("owner/pairs:train")) == [ROW, ROW]
    with pytest.raises(DataError, match=r"holds several splits \(train, test\); name one, e.g. owner/pairs:train"):
        read("owner/pairs")
    del hub["test"]
    assert list(read("owner/pairs")) == [ROW, ROW]


def test_chat_rows_survive_parquet(tmp_path: Path, tokenizer: Any) -> None:
    datasets.Dataset.from_list([CHAT]).to_parquet(tmp_path / "a.parquet")
    assert tokenize_pair(load_pairs(tmp_path / "a.parquet")[0], tokenizer) == tokenize_pair(CHAT, tokenizer)


def test_other_programs_files_are_read(tmp_path: Path) -> None:
    """A byte-order mark, blank lines, columns in another order and unused columns."""
    row = {"id": 7, "rejected": " awful", "chosen": " great", "prompt": "review:"}
    (tmp_path / "a.jsonl").write_text(
        "\ufeff" + json.dumps(row) + "\n\n" + json.dumps({**row, "id": "x"}), encoding="utf-8"
    )
    (tmp_path / "a.json").write_text("\ufeff" + json.dumps([row, row]), encoding="utf-8")
    for name in ("a.jsonl", "a.json"):
        assert load_pairs(tmp_path / name).to_list() == [ROW, ROW]


# --- streams -------------------------------------------------------------------------------------------------------


def test_streams_bring_the_rows_of_their_files(tmp_path: Path, pairs: Callable[..., Any]) -> None:
    rows = [{**row, "weight": 0.5 + index} for index, row in enumerate(pairs(4))]
    dataset = datasets.Dataset.from_list(rows)
    (tmp_path / "a.jsonl").write_text("\n\n".join(map(json.dumps, rows)))
    dataset.to_parquet(tmp_path / "a.parquet")
    dataset.to_csv(tmp_path / "a.csv")
    dataset.save_to_disk(tmp_path / "folder")
    for name in ("a.jsonl", "a.parquet", "a.csv", "folder"):
        stream = stream_pairs(tmp_path / name)
        assert list(stream) == list(stream) == rows, name
    assert list(stream_of(dataset.to_iterable_dataset(), "x")) == rows


def test_a_stream_of_pairs_trains_and_resumes_as_itself(make_trainer: Any, make_model: Any, tmp_path: Path) -> None:
    """The pass over 27 rows does not end with a full step; the remaining rows join the next pass."""
    settings = {
        "train_dataset": datasets.Dataset.from_list(build_pairs(27)).to_iterable_dataset(),
        "max_tokens": 100,
        "gradient_accumulation_steps": 2,
        "max_steps": 9,
        "save_strategy": "steps",
        "save_steps": 6,
    }
    whole = make_trainer(model=make_model(), **settings)
    whole.train()
    losses = [record["loss"] for record in whole.state.log_history if "loss" in record]
    assert round(losses[0], 7) == 0.6931472
    assert losses[-1] < 0.68
    resumed = make_trainer(model=make_model(), **{**settings, "save_strategy": "no"})
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-6"))
    assert [record["loss"] for record in resumed.state.log_history if "loss" in record] == losses
    assert "27 of 27 pairs kept so far (a stream)" in whole.accounts[0].describe()


def test_a_stream_in_file_order_equals_the_file_in_order(make_trainer: Any, make_model: Any) -> None:
    curves = []
    for data in (build_pairs(24), datasets.Dataset.from_list(build_pairs(24)).to_iterable_dataset()):
        trainer = make_trainer(
            model=make_model(),
            train_dataset=data,
            train_sampling_strategy="sequential",
            max_steps=6,
            num_train_epochs=1,
        )
        trainer.train()
        curves.append([record["loss"] for record in trainer.state.log_history if "loss" in record])
    assert curves[0] == curves[1]


def test_a_worker_brings_the_batches_of_a_stream_in_order(make_trainer: Any) -> None:
    stream = datasets.Dataset.from_list(build_pairs(50)).to_iterable_dataset()
    found = []
    for workers in (0, 2):
        loader = make_trainer(train_dataset=stream, max_steps=1, dataloader_num_workers=workers).get_train_dataloader()
        found.append([batch["labels"].tolist() for batch in itertools.islice(loader, 40)])
    assert found[0] == found[1]


def test_a_bad_row_of_a_stream_is_named_when_it_is_reached(tmp_path: Path, make_trainer: Any) -> None:
    rows = [*build_pairs(70), {"prompt": "a", "chosen": "b"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    trainer = make_trainer(train_dataset=stream_pairs(tmp_path / "a.jsonl"), max_steps=200)
    with pytest.raises(DataError, match=r"a\.jsonl:71: no column 'rejected'"):
        trainer.train()


def test_what_a_stream_cannot_do_is_said(make_trainer: Any) -> None:
    stream = datasets.Dataset.from_list(build_pairs(8)).to_iterable_dataset()
    with pytest.raises(ConfigError, match="max_steps: must be given with a stream"):
        make_trainer(train_dataset=stream)
    with pytest.raises(ConfigError, match="precompute_ref_log_probs: needs all pairs"):
        make_trainer(train_dataset=stream, max_steps=1, precompute_ref_log_probs=True)
    with pytest.raises(ConfigError, match=r"precompute_ref_log_probs: .*\(eval_dataset held_out\)"):
        make_trainer(eval_dataset={"held_out": stream}, precompute_ref_log_probs=True)
    with pytest.raises(DataError, match="train_dataset: no rows"):
        make_trainer(train_dataset=stream.take(0), max_steps=1)


def test_a_loaded_dataset_is_checked_again_only_once_it_is_changed(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(ROW))
    dataset = load_pairs(tmp_path / "a.jsonl")
    assert reading_of(dataset) is not None
    assert reading_of(datasets.Dataset.from_list([ROW])) is None
    spoilt = dataset.map(lambda row: {**row, "chosen": 3})
    assert reading_of(spoilt) is None
    with pytest.raises(DataError, match="row 1: 'chosen' must be text or a list of messages, found a number"):
        prepare(spoilt, tokenizer)
    dataset.set_transform(lambda rows: {**rows, "rejected": [3]})
    assert reading_of(dataset) is None


def test_library_errors_are_value_errors_that_name_the_row(tokenizer: Any) -> None:
    with pytest.raises(
        ValueError, match="train_dataset row 2: 'chosen' must be text or a list of messages, found a number"
    ):
        prepare([ROW, {**ROW, "chosen": 3}], tokenizer)
    with pytest.raises(ValueError, match="train_dataset: no column 'chosen'"):
        prepare(datasets.Dataset.from_list([{"prompt": "a", "rejected": "b"}]), tokenizer)
    with pytest.raises(ValueError, match=r"expected a datasets.Dataset or a list of rows, found dict"):
        prepare({"prompt": ["a"]}, tokenizer)


# --- a part that is held out ---------------------------------------------------------------------------------------


def rows_of_prompts(prompts: int, each: int) -> list[dict[str, Any]]:
    """Different pairs: a number of pairs for each of a number of prompts, with the prompts in turn."""
    return [
        {"prompt": f"review {prompt}:", "chosen": f" good {number}", "rejected": f" bad {number}"}
        for number in range(each)
        for prompt in range(prompts)
    ]


def divided(rows: list[dict[str, Any]], size: float, seed: int = 0) -> tuple[list[Any], list[Any]]:
    """(training rows, held-out rows)."""
    dataset, account = prepare_dataset(rows, build_tokenizer(), Preparation(), name="rows")
    assert account.kept == len(rows)
    places = hold_out(dataset, size, seed)
    assert places == sorted(set(places))
    return [row for place, row in enumerate(rows) if place not in places], [rows[place] for place in places]


def as_conversation(row: dict[str, Any]) -> dict[str, Any]:
    """The row as two conversations with the same beginning."""
    asked = {"role": "user", "content": row["prompt"]}
    return {side: [asked, {"role": "assistant", "content": row[side]}] for side in ("chosen", "rejected")}


@pytest.mark.parametrize("form", ["text", "conversations"])
@pytest.mark.parametrize(("size", "least"), [(0.25, 15), (7, 7), (0.001, 1)])
def test_no_prompt_stands_on_both_sides_of_a_split(form: str, size: float, least: int) -> None:
    rows = rows_of_prompts(20, 3)
    given = rows if form == "text" else list(map(as_conversation, rows))
    train, held_out = divided(given, size)
    asked = [{json.dumps(row.get("prompt", row["chosen"][0])) for row in side} for side in (train, held_out)]
    assert len(train) + len(held_out) == 60
    assert least <= len(held_out) < least + 3
    assert not asked[0] & asked[1]


def test_a_split_depends_on_the_pairs_and_the_seed_and_not_on_their_order() -> None:
    rows = rows_of_prompts(20, 3)
    _, first = divided(rows, 0.2)
    _, other_order = divided(rows[::-1], 0.2)
    _, other_seed = divided(rows, 0.2, seed=1)
    assert first == other_order[::-1]
    assert first != other_seed


def test_a_split_that_leaves_nothing_to_train_on_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"val_split: 0\.1 leaves nothing to train on: there are 3 pairs with 1 different"
    ):
        divided(rows_of_prompts(1, 3), 0.1)
    with pytest.raises(ConfigError, match="val_split: 9 leaves nothing to train on"):
        divided(rows_of_prompts(3, 3), 9)


def test_text_rows_beside_a_chat_template_are_told(
    make_trainer: Any, caplog: pytest.LogCaptureFixture, pairs: Any
) -> None:
    caplog.set_level(logging.INFO, "dpo_trainer")
    make_trainer(train_dataset=pairs(4))
    assert "rows are text, so the chat template is not used" in caplog.text
