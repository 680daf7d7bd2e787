"""Reading, checking and tokenising pairs: the boundary is right, truncation keeps one prompt, bad rows are named."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_trainer import DataError, load_pairs
from dpo_trainer.data import prepare_dataset, tokenize_pair, truncate

ROW = {"prompt": "review:", "chosen": " great", "rejected": " awful"}


# --- the boundary --------------------------------------------------------------------------------------------------

# Where tokens straddle: prompts ending in a space, completions without one, merges inside a word, an empty prompt.
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
        joined = ids["prompt_input_ids"] + ids[f"{side}_input_ids"]
        text = tokenizer(prompt + row[side], add_special_tokens=False)["input_ids"]
        start = [tokenizer.bos_token_id] if "bos" in kind else []
        assert joined == [*start, *text, tokenizer.eos_token_id]
        assert len(ids[f"{side}_input_ids"]) > 0


@pytest.mark.parametrize("kind", ["plain", "bos", "eos", "bos+eos"])
def test_without_append_eos_a_text_ends_as_the_tokenizer_leaves_it(tokenizers: dict[str, Any], kind: str) -> None:
    tokenizer = tokenizers[kind]
    ids = tokenize_pair(ROW, tokenizer, append_eos=False)
    for side in ("chosen", "rejected"):
        joined = ids["prompt_input_ids"] + ids[f"{side}_input_ids"]
        assert joined == tokenizer(ROW["prompt"] + ROW[side])["input_ids"]
        assert (joined[-1] == tokenizer.eos_token_id) == ("eos" in kind)


def test_clean_boundary_keeps_the_whole_prompt(tokenizers: dict[str, Any]) -> None:
    tokenizer = tokenizers["plain"]
    assert tokenize_pair(ROW, tokenizer)["prompt_input_ids"] == tokenizer(ROW["prompt"])["input_ids"]


def test_a_straddling_token_belongs_to_both_completions(tokenizers: dict[str, Any]) -> None:
    """ "greatest" is one token: the prompt "the great" cannot keep its own "great" on either side."""
    tokenizer = tokenizers["plain"]
    assert len(tokenizer(" greatest")["input_ids"]) == 1
    ids = tokenize_pair({"prompt": "the great", "chosen": "est", "rejected": " film"}, tokenizer)
    assert tokenizer.decode(ids["prompt_input_ids"]) == "the"
    assert tokenizer.decode(ids["chosen_input_ids"]) == " greatest<|end|>"
    assert tokenizer.decode(ids["rejected_input_ids"]) == " great film<|end|>"


def test_end_token_is_not_added_twice(tokenizers: dict[str, Any]) -> None:
    row = {**ROW, "chosen": " great<|end|>"}
    assert tokenize_pair(row, tokenizers["plain"])["chosen_input_ids"].count(0) == 1


# --- chat ----------------------------------------------------------------------------------------------------------

CHAT = {
    "prompt": [{"role": "system", "content": "the answer"}, {"role": "user", "content": "the film"}],
    "chosen": [{"role": "assistant", "content": "good"}],
    "rejected": [{"role": "assistant", "content": "bad"}],
}


def test_chat_rows_follow_the_template(tokenizer: Any) -> None:
    ids = tokenize_pair(CHAT, tokenizer)
    assert (
        tokenizer.decode(ids["prompt_input_ids"])
        == "<|start|>system\nthe answer<|end|>\n<|start|>user\nthe film<|end|>\n<|start|>assistant\n"
    )
    assert tokenizer.decode(ids["chosen_input_ids"]) == "good<|end|>\n"


def test_an_open_assistant_turn_is_continued(tokenizer: Any) -> None:
    row = {**CHAT, "prompt": [*CHAT["prompt"], {"role": "assistant", "content": "the answer:"}]}
    row["chosen"] = [{"role": "assistant", "content": " good"}]
    ids = tokenize_pair(row, tokenizer)
    assert tokenizer.decode(ids["prompt_input_ids"]).endswith("<|start|>assistant\nthe answer:")
    assert tokenizer.decode(ids["chosen_input_ids"]) == " good<|end|>\n"


def test_a_generation_prompt_that_answers_lack_is_shortened(tokenizer: Any) -> None:
    """As templates do that open with an empty thinking block: the common part is the prompt."""
    template = tokenizer.chat_template
    tokenizer.chat_template = template.replace(
        "<|start|>assistant\n{% endif %}", "<|start|>assistant\n[think]{% endif %}"
    )
    try:
        ids = tokenize_pair(CHAT, tokenizer)
    finally:
        tokenizer.chat_template = template
    assert tokenizer.decode(ids["prompt_input_ids"]).endswith("<|start|>assistant\n")
    assert tokenizer.decode(ids["chosen_input_ids"]) == "good<|end|>\n"


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
    import copy

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


# --- the account ---------------------------------------------------------------------------------------------------


def prepare(dataset: Any, tokenizer: Any, **limits: Any) -> Any:
    limits = {"max_length": None, "max_prompt_length": None, "truncation_mode": "keep_end", **limits}
    return prepare_dataset(dataset, tokenizer, name="train_dataset", **limits)


def test_identical_and_cut_pairs_are_dropped_and_counted(tokenizer: Any) -> None:
    rows = [ROW, {**ROW, "rejected": ROW["chosen"]}, {**ROW, "prompt": "the film " * 20}]
    dataset, account = prepare(rows, tokenizer, max_length=12, truncation_mode="keep_start")
    assert len(dataset) == 1
    assert (account.rows, account.kept, account.identical, account.cut) == (3, 1, 1, 1)
    assert "1 of 3 pairs kept" in account.describe()
    assert "1 with chosen equal to rejected" in account.describe()


def test_nothing_left_is_an_error(tokenizer: Any) -> None:
    with pytest.raises(DataError, match="nothing is left"):
        prepare([{**ROW, "rejected": ROW["chosen"]}], tokenizer)


def test_lists_and_datasets_give_the_same_tokens(tokenizer: Any, pairs: Callable[..., Any]) -> None:
    rows = pairs(5)
    listed, _ = prepare(rows, tokenizer)
    stored, _ = prepare(datasets.Dataset.from_list([{**row, "extra": 1} for row in rows]), tokenizer)
    assert listed.to_list() == stored.to_list()


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


def test_chat_rows_survive_parquet(tmp_path: Path, tokenizer: Any) -> None:
    datasets.Dataset.from_list([CHAT]).to_parquet(tmp_path / "a.parquet")
    assert tokenize_pair(load_pairs(tmp_path / "a.parquet")[0], tokenizer) == tokenize_pair(CHAT, tokenizer)


GOOD = json.dumps(ROW)


def changed(**changes: Any) -> str:
    return json.dumps({key: value for key, value in {**ROW, **changes}.items() if value is not ...})


#: (file name, content, what the one line must say)
BAD_FILES = [
    ("a.jsonl", f'{GOOD}\n\n{{"prompt": \n', "a.jsonl:3: not JSON"),
    ("a.jsonl", f"{GOOD}\n[1, 2]\n", "a.jsonl:2: expected an object with prompt, chosen, rejected, found a list"),
    ("a.jsonl", f"{GOOD}\n{changed(rejected=...)}\n", "a.jsonl:2: no column 'rejected'; it has prompt, chosen"),
    ("a.jsonl", changed(chosen=..., choosen=" good"), "did you mean 'choosen'?"),
    ("a.jsonl", f"{GOOD}\n{changed(chosen='  ')}\n", "a.jsonl:2: empty completion in 'chosen'"),
    ("a.jsonl", changed(chosen=None), "a.jsonl:1: 'chosen' must be text or a list of messages, found nothing (null)"),
    ("a.jsonl", changed(prompt=7), "'prompt' must be text or a list of messages, found a number"),
    ("a.jsonl", changed(chosen=[{"role": "assistant", "content": "x"}]), "text and chat are mixed"),
    ("a.jsonl", json.dumps({**CHAT, "prompt": []}), "empty prompt in 'prompt' (no messages)"),
    (
        "a.jsonl",
        json.dumps({**CHAT, "chosen": [{"content": "x"}]}),
        "message 1 of 'chosen' must be an object with role",
    ),
    ("a.jsonl", json.dumps({**CHAT, "chosen": [{"role": "assistant", "content": ""}]}), "empty completion in 'chosen'"),
    ("a.jsonl", json.dumps({**CHAT, "chosen": [{"role": "a", "content": 3}]}), "has no text in 'content'"),
    ("a.jsonl", changed(weight="high"), "a.jsonl:1: 'weight' must be a finite number, found 'high'"),
    ("a.jsonl", changed(weight=-1), "'weight' must not be negative, found -1"),
    ("a.jsonl", changed(weight=float("nan")), "'weight' must be a finite number, found nan"),
    ("a.jsonl", f"{changed(weight=1)}\n{GOOD}\n", "a.jsonl:2: no column 'weight', which earlier rows have"),
    ("a.jsonl", changed(ref_chosen_logps=-3.0), "no column 'ref_rejected_logps'"),
    ("a.jsonl", b"\xff\xfe\n", "a.jsonl:1: not UTF-8 text"),
    ("a.jsonl", "", "a.jsonl: no rows"),
    ("a.json", "[]", "a.json: no rows"),
    ("a.json", f"{GOOD}\n{GOOD}", "use the ending .jsonl"),
    ("a.json", GOOD, "a.json: expected a list of objects, found an object"),
    ("a.json", f'[{GOOD},\n{{"prompt" 1}}]', "a.json:2: not JSON"),
    ("a.json", f"[{GOOD}, {changed(chosen='')}]", "a.json: row 2: empty completion in 'chosen'"),
    ("a.csv", "prompt,chosen\na,b\n", "a.csv: no column 'rejected'; it has prompt, chosen"),
    ("a.csv", "prompt,chosen,rejected\na,b,\n", "a.csv: row 1: empty completion in 'rejected'"),
    ("a.csv", "", "a.csv: not readable as csv"),
    ("a.parquet", "text", "a.parquet: not readable as parquet"),
    ("a.txt", GOOD, "unknown format '.txt'; known are .jsonl, .json, .parquet, .csv"),
]


@pytest.mark.parametrize(("name", "content", "said"), BAD_FILES)
def test_bad_files_are_named_in_one_line(tmp_path: Path, name: str, content: str | bytes, said: str) -> None:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError) as caught:
        load_pairs(path)
    message = str(caught.value)
    assert said in message
    assert message.startswith(str(path))
    assert "\n" not in message


def test_missing_files_and_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        load_pairs(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="not a folder saved by datasets"):
        load_pairs(tmp_path)


def test_library_errors_are_value_errors_that_name_the_row(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="train_dataset row 2: empty completion in 'chosen'"):
        prepare([ROW, {**ROW, "chosen": ""}], tokenizer)
    with pytest.raises(ValueError, match="train_dataset: no column 'chosen'"):
        prepare(datasets.Dataset.from_list([{"prompt": "a", "rejected": "b"}]), tokenizer)
    with pytest.raises(ValueError, match=r"expected a datasets.Dataset"):
        prepare(datasets.Dataset.from_list([ROW]).to_iterable_dataset(), tokenizer)
