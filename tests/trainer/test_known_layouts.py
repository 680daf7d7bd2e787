"""Data layouts of other programs: each gives the tokens of equivalent hand-written rows, and unused columns are reported."""

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy
import pandas
import pytest

from dpo_kernels.confidence import confidence_weights, preference_probability
from dpo_trainer import ConfigError, DataError, DPOConfig, load_pairs
from dpo_trainer.cli.main import main
from dpo_trainer.data.files import stream_of, stream_pairs
from dpo_trainer.data.prepare import Preparation, PreparedStream, prepare_dataset

from .tiny import build_pairs, build_tokenizer

Rows = list[dict[str, Any]]


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def answer(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def system(text: str) -> dict[str, Any]:
    return {"role": "system", "content": text}


CALL = {"type": "function", "function": {"name": "look", "arguments": {"film": "a", "year": None}}}
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"film": {"default": None}}}}]
TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}({{ c.function.arguments | tojson }}){% endfor %}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def sharegpt(sender: str, text: str) -> dict[str, Any]:
    return {"from": sender, "value": text}


CHATS = [
    {"prompt": [system("terse"), user("the film")], "chosen": [answer("good")], "rejected": [answer("bad")]},
    {"prompt": [user("the review")], "chosen": [answer("great")], "rejected": [answer("awful")]},
]
#: By the name of the layout, or the logged line: (rows in this layout, equivalent hand-written rows).
LAYOUTS: dict[str, tuple[Rows, Rows]] = {
    "'history' earlier turns": (
        [
            {"instruction": "the film", "chosen": "good", "rejected": "bad", "system": "", "history": [["a", "b"]]},
            {"instruction": "the review", "chosen": "fine", "rejected": "awful", "system": "terse", "history": []},
        ],
        [
            {
                "prompt": [user("a"), answer("b"), user("the film")],
                "chosen": [answer("good")],
                "rejected": [answer("bad")],
            },
            {
                "prompt": [system("terse"), user("the review")],
                "chosen": [answer("fine")],
                "rejected": [answer("awful")],
            },
        ],
    ),
    "role 'human' and role 'gpt'; read as role and content": (
        [
            {
                "prompt": [system("terse"), {"role": "human", "content": "the film"}],
                "chosen": [{"role": "gpt", "content": "good"}],
                "rejected": [{"role": "gpt", "content": "bad"}],
            }
        ],
        CHATS[:1],
    ),
    "read as Orca rows": (
        [
            {"system": "terse", "question": "the film", "chosen": "good", "rejected": "bad"},
            {"system": "", "question": "the review", "chosen": "great", "rejected": "awful"},
        ],
        CHATS,
    ),
    "read as rows with a system text": (
        [
            {"system": "terse", "prompt": "the film", "chosen": "good", "rejected": "bad"},
            {"system": None, "prompt": "the review", "chosen": "great", "rejected": "awful"},
        ],
        CHATS,
    ),
    "'system' is the system's message": (
        [{"system": text, **row, "prompt": row["prompt"][-1:]} for text, row in zip(("terse", ""), CHATS, strict=True)],
        CHATS,
    ),
    "read as alpaca rows": (
        [
            {"instruction": "sum up", "input": "the film", "chosen": "good", "rejected": "bad"},
            {"instruction": "the review", "input": "", "chosen": "great", "rejected": "awful"},
        ],
        [{**CHATS[0], "prompt": [user("sum up\nthe film")]}, CHATS[1]],
    ),
    "read as ShareGPT rows": (
        [
            {
                "conversations": [sharegpt("system", "terse"), sharegpt("human", "the film")],
                "chosen": sharegpt("gpt", "good"),
                "rejected": sharegpt("gpt", "bad"),
            },
            {
                "conversations": [sharegpt("human", "the review")],
                "chosen": sharegpt("gpt", "great"),
                "rejected": sharegpt("gpt", "awful"),
            },
        ],
        CHATS,
    ),
    "'conversations' is the prompt": (
        [
            {
                "conversations": [sharegpt("human", "the film")],
                "chosen": [sharegpt("gpt", "good")],
                "rejected": [sharegpt("gpt", "bad")],
                "system": "terse",
            },
        ],
        CHATS[:1],
    ),
    "'from' and 'value'; read as role and content": (
        [
            {
                "chosen": [sharegpt("human", "the film"), sharegpt("gpt", "good")],
                "rejected": [sharegpt("human", "the film"), sharegpt("gpt", "bad")],
            }
        ],
        [{**CHATS[0], "prompt": [user("the film")]}],
    ),
    "read as OpenAI rows": (
        [
            {
                "input": {"messages": [user("the film")], "tools": TOOLS},
                "preferred_output": [{"role": "assistant", "tool_calls": [CALL]}],
                "non_preferred_output": [answer("bad")],
            }
        ],
        [
            {
                "prompt": [user("the film")],
                "chosen": [{"role": "assistant", "tool_calls": [CALL]}],
                "rejected": [answer("bad")],
                "tools": TOOLS,
            }
        ],
    ),
    "content in parts; read as role and content": (
        [
            {
                "prompt": [
                    {"role": "user", "content": [{"type": "text", "text": "the "}, {"type": "text", "text": "film"}]}
                ],
                "chosen": [{"role": "assistant", "content": [{"type": "text", "text": "good"}]}],
                "rejected": [{"role": "assistant", "content": [{"type": "text", "text": "bad"}]}],
            }
        ],
        [{**CHATS[0], "prompt": [user("the film")]}],
    ),
}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    tokenizer = build_tokenizer.__wrapped__()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def tokens(rows: Any, tokenizer: Any, **settings: Any) -> Rows:
    """The tokenised rows of a list, a Dataset or a stream."""
    preparation = Preparation(**settings)
    if isinstance(rows, list | datasets.Dataset):
        found = prepare_dataset(rows, tokenizer, preparation, name="train_dataset")[0].to_list()
    else:
        found = list(PreparedStream(rows, tokenizer, preparation, name="train_dataset"))
    return [{name: value for name, value in row.items() if not name.endswith("_mask")} for row in found]


def forms(rows: Rows, folder: Path, **reading: Any) -> Iterator[tuple[str, Any]]:
    """The rows in every form that a user may pass."""
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "a.json").write_text(json.dumps(rows))
    texts = [
        {name: value if isinstance(value, str) else json.dumps(value) for name, value in row.items()} for row in rows
    ]
    empty = [{name: "" if value == "null" else value for name, value in row.items()} for row in texts]
    pandas.DataFrame(empty).to_csv(folder / "a.csv", index=False)
    stored = datasets.Dataset.from_list(rows)
    stored.to_parquet(folder / "a.parquet")
    yield "list", rows
    yield "dataset", stored
    yield "stream", stored.to_iterable_dataset()
    for name in ("a.jsonl", "a.json", "a.csv", "a.parquet"):
        yield name, load_pairs(folder / name, **reading)
    for name in ("a.jsonl", "a.csv", "a.parquet"):
        yield f"stream of {name}", stream_pairs(folder / name, **reading)


@pytest.mark.parametrize("said", LAYOUTS)
def test_a_layout_gives_the_tokens_of_rows_written_by_hand(
    said: str, tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows, by_hand = LAYOUTS[said]
    expected = tokens(by_hand, tokenizer)
    nulls = said == "read as OpenAI rows"  # a table adds nulls, which are removed again
    seen = 0
    caplog.clear()
    for form, data in forms(rows, tmp_path):
        found = tokens(data, tokenizer)
        if not (nulls and ("parquet" in form or form in ("dataset", "stream"))):
            assert found == expected, form
        assert caplog.text.count(said) == 1, form
        assert "not used" not in caplog.text, form
        caplog.clear()
        seen += 1
    assert seen == 10


def test_without_a_chat_template_a_system_text_stands_before_the_prompt(
    tokenizers: dict[str, Any], make_trainer: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    plain = build_tokenizer.__wrapped__()
    plain.chat_template = None
    by_hand = [{"prompt": "terse\n\nthe film\n\n", "chosen": "good", "rejected": "bad"}]
    row = {"chosen": "good", "rejected": "bad"}
    expected = tokens(by_hand, plain)
    assert tokens([{"system": "terse", "prompt": "the film", **row}], plain) == expected
    assert tokens([{"instruction": "terse\n", "input": "the film", **row}], plain) == expected
    found, account = prepare_dataset(
        [{"system": "terse", "question": "the film", **row}], plain, Preparation(), name="train_dataset"
    )
    assert found[0]["prompt_ids"] == expected[0]["prompt_ids"]
    assert "no chat template" in account.remarks[0]
    whole = [{"system": "terse", "chosen": "the film: good", "rejected": "the film: bad"}]
    assert tokens(whole, plain) == tokens([{**by_hand[0], "prompt": "terse\n\nthe film:", **SPACED}], plain)


SPACED = {"chosen": " good", "rejected": " bad"}


def test_rows_of_mixed_layouts_are_refused_with_their_place(tokenizer: Any, tmp_path: Path) -> None:
    orca, plain = LAYOUTS["read as Orca rows"][0][0], {"prompt": "the film", **SPACED}
    for rows, said in (
        ([orca, plain], r"row 2: no column 'system', but earlier rows are Orca rows"),
        ([plain, orca], r"row 2: no column 'prompt'"),
        ([orca, {**orca, "prompt": "x"}], r"row 2: a column 'prompt', but earlier rows are Orca rows"),
        ([{**plain, "system": "x"}, plain], r"row 2: no column 'system'"),
        ([CHATS[1], {**CHATS[1], "system": "x"}], r"row 2: a column 'system', which earlier rows do not have"),
    ):
        (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
        with pytest.raises(DataError, match="train_dataset " + said):
            tokens(rows, tokenizer)
        with pytest.raises(DataError, match=r"a\.jsonl:2" + said.removeprefix("row 2")):
            load_pairs(tmp_path / "a.jsonl")
        with pytest.raises(DataError, match=r"a\.jsonl:2" + said.removeprefix("row 2")):
            tokens(stream_pairs(tmp_path / "a.jsonl"), tokenizer)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (
            {**CHATS[1], "prompt": [{"role": "user", "content": [{"type": "image", "image": "a"}]}]},
            "part 1 of message 1 of 'prompt' has its image in 'image'; images belong in the column 'images'",
        ),
        (
            {**CHATS[1], "chosen": [sharegpt("alien", "x")]},
            "message 1 of 'chosen' is from 'alien', which is not a known role",
        ),
        (
            {**CHATS[1], "prompt": str(CHATS[1]["prompt"])},
            "'prompt' holds messages as Python prints them; write them as JSON",
        ),
        ({**CHATS[0], "system": "long"}, "'system' and the first message are different system texts"),
        ({**CHATS[0], "system": 3}, "'system' must be text, found a number"),
        (
            {"question": "x", **SPACED},
            "no column 'prompt'; it has question, chosen, rejected (did you mean 'question'?)",
        ),
        (
            {"messages": CHATS[1]["prompt"], "chosen": "The good", "rejected": "The bad"},
            "no column 'prompt', and 'messages' may be the prompt; name it in the setting columns",
        ),
        (
            {"messages": CHATS[1]["prompt"], "chosen": [answer("good")], "rejected": [answer("bad")]},
            "no 'prompt', and 'chosen' and 'rejected' share no beginning that could be one; if another column is the "
            "prompt, name it in the setting columns, as in columns: {prompt: messages}",
        ),
        (
            {"conversations": [user("x"), answer("y")], "chosen": answer("good"), "rejected": answer("bad")},
            "'conversations' ends with an answer; it must end before chosen and rejected",
        ),
        (
            {"prompt": [user("x"), answer("good")], "chosen": [answer("good")], "rejected": [answer("bad")]},
            "the prompt ends with the message that 'chosen' begins with; leave it out of the prompt",
        ),
        ({"instruction": "x", "history": ["a"], **SPACED}, "'history' must be a list of [question, answer]"),
        ({"instruction": 3, **SPACED}, "'instruction' must be text, found a number"),
        ({"input": "x", "preferred_output": [], "non_preferred_output": []}, "'input' must be an object with messages"),
        ({**CHATS[1], "chat_template_kwargs": "[1]"}, "'chat_template_kwargs' must be an object or its JSON text"),
        ({**CHATS[1], "chat_template_kwargs": {"tokenize": True}}, "'chat_template_kwargs' cannot contain 'tokenize'"),
    ],
    ids=str,
)
def test_what_is_no_layout_is_refused_with_a_reason(row: dict[str, Any], said: str, tokenizer: Any) -> None:
    for rows in ([row], stream_of([row], "train_dataset")):
        with pytest.raises(DataError) as caught:
            tokens(rows, tokenizer)
        assert "row 1: " + said in str(caught.value)


# --- unused columns --------------------------------------------------------------------------------------------------


def test_columns_that_nobody_reads_are_named_once(
    tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{**row, "id": 1, "source": "x"} for row in build_pairs(3)]
    for form, data in forms(rows, tmp_path):
        tokens(data, tokenizer)
        assert [line.partition(": not")[2] for line in caplog.messages] == [" used: id, source"], form
        caplog.clear()
    rows.append({**build_pairs(1, 9)[0], "note": "y"})
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for data, said in (
        (rows, ["train_dataset: not used: id, source, note"]),
        (stream_of(rows, "x"), ["x: not used: id, source", "x: not used: note"]),
    ):
        tokens(data, tokenizer)
        assert caplog.messages == said
        caplog.clear()
    load_pairs(tmp_path / "b.jsonl")
    assert caplog.messages == [f"{tmp_path / 'b.jsonl'}: not used: id, source, note"]


def test_tools_and_template_arguments_of_text_rows_are_named(tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    tokens([{**row, "tools": TOOLS, "chat_template_kwargs": {"a": 1}} for row in build_pairs(2)], tokenizer)
    assert caplog.messages == ["train_dataset: not used: tools, chat_template_kwargs"]


def test_columns_of_chats_in_csv_files_are_read_and_not_named(
    tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{**row, "tools": TOOLS, "chat_template_kwargs": {"a": 1}} for row in CHATS]
    for form, data in forms(rows, tmp_path):
        tokens(data, tokenizer)
        assert "not used: tools" not in caplog.text, form
    assert "'chosen' and" not in caplog.text
    assert "no column 'prompt'" not in caplog.text


def test_a_prompt_that_is_what_texts_share_is_told_once(
    tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = [{"chosen": "q: good", "rejected": "q: bad"}, {"chosen": "z: good", "rejected": "z: bad"}]
    for form, data in forms(whole, tmp_path):
        tokens(data, tokenizer)
        assert caplog.text.count("what chosen and rejected share at the beginning is the prompt") == 1, form
        caplog.clear()


def test_csv_rows_of_more_fields_than_the_header_are_refused(tmp_path: Path) -> None:
    """pandas would take the first field as the index and shift every column by one."""
    (tmp_path / "a.csv").write_text("prompt,chosen,rejected\nq,a,b,c\nz,a,b,c\n")
    with pytest.raises(DataError, match=r"a\.csv: rows have more fields than the header \(prompt, chosen, rejected\)"):
        load_pairs(tmp_path / "a.csv")


def test_half_a_character_is_named(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "q \\ud800", "chosen": "a", "rejected": "b"}')
    with pytest.raises(DataError, match=r"a\.jsonl:1: a text holds half a character"):
        load_pairs(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match=r"a\.jsonl:1: a text holds half a character"):
        list(stream_pairs(tmp_path / "a.jsonl"))
    with pytest.raises(DataError, match="train_dataset row 1: a text holds half a character"):
        tokens([json.loads((tmp_path / "a.jsonl").read_text())], tokenizer)
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "q \U0001f600", "chosen": "a", "rejected": "b"}))
    assert load_pairs(tmp_path / "a.jsonl")[0]["prompt"] == "q \U0001f600"


@pytest.mark.parametrize("kind", ["float32", "float64", "int64", "float16"])
def test_weights_may_be_numbers_of_numpy(kind: str, tokenizer: Any) -> None:
    rows = [{**row, "weight": getattr(numpy, kind)(2)} for row in build_pairs(2)]
    assert [row["weight"] for row in tokens(rows, tokenizer)] == [2.0, 2.0]


def test_rows_of_ours_are_not_remarked_on(tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    tokens([{**row, "weight": 1.0} for row in build_pairs(3)], tokenizer)
    tokens([{**row, "tools": TOOLS} for row in CHATS], tokenizer)
    assert not caplog.messages


# --- names -------------------------------------------------------------------------------------------------------------


def test_columns_are_read_by_the_names_that_the_setting_gives(
    tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ours = [{**row, "weight": 0.5 + number} for number, row in enumerate(build_pairs(4))]
    rows = [
        {
            "q": row["prompt"],
            "good": row["chosen"],
            "rejected": row["rejected"],
            "margin": row["weight"],
            "prompt": "no",
        }
        for row in ours
    ]
    columns = {"prompt": "q", "chosen": "good", "weight": "margin"}
    expected = tokens(ours, tokenizer)
    for form, data in forms(rows, tmp_path, columns=columns):
        assert tokens(data, tokenizer, columns=columns) == expected, form
        assert caplog.text.count("not used: prompt\n") == 1, form
        caplog.clear()


def test_a_question_becomes_the_prompt_by_name(tokenizer: Any) -> None:
    columns = {"prompt": "question", "system": "sys"}
    rows = [{"question": "the film", "sys": "terse", "chosen": "good", "rejected": "bad"}]
    assert tokens(rows, tokenizer, columns=columns) == tokens(CHATS[:1], tokenizer)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"columns": {"promt": "q"}}, "columns: unknown 'promt' (did you mean 'prompt'?); known are prompt, chosen"),
        ({"columns": {"prompt": 3}}, "columns: 'prompt' must be the name of a column, got 3"),
        ({"columns": {"prompt": "q", "chosen": "q"}}, "columns: 'q' is named for both 'prompt' and 'chosen'"),
        ({"columns": "x"}, "columns: expected a mapping, got 'x'"),
        ({"weight_from": {"chosen": "a"}}, "weight_from: give the columns 'chosen' and 'rejected' of the scores, or"),
        ({"weight_from": {"margn": "a"}}, "weight_from: unknown 'margn' (did you mean 'margin'?); known are chosen"),
        ({"weight_from": {"margin": "a", "scale": 0}}, "weight_from: scale must be positive; got 0"),
        ({"weight_from": {"margin": "a", "power": "x"}}, "weight_from: 'power' must be a number, got 'x'"),
        ({"weight_from": {"margin": "a"}, "columns": {"weight": "b"}}, "weight_from: columns names a 'weight' too"),
        (
            {"chat_template_kwargs": {"tools": []}},
            "chat_template_kwargs: cannot contain 'tools', which the trainer sets",
        ),
        ({"chat_template_kwargs": 3}, "chat_template_kwargs: expected a mapping, got 3"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_meant_are_refused(settings: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        DPOConfig(output_dir=str(tmp_path), **settings)
    assert str(caught.value).startswith(said)
    if set(settings) <= {"columns", "weight_from"}:
        with pytest.raises(ConfigError) as caught:
            load_pairs(tmp_path / "a.jsonl", **settings)
        assert str(caught.value).startswith(said)


def test_a_column_of_ours_that_is_read_in_place_of_the_named_one_is_told(
    tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    columns = {"prompt": "questoin"}
    for form, data in forms(build_pairs(2), tmp_path, columns=columns):
        tokens(data, tokenizer, columns=columns)
        assert caplog.text.count("columns: no column 'questoin'; its column 'prompt' is used") == 1, form
        assert "not used" not in caplog.text, form
        caplog.clear()


def test_a_column_that_is_not_there_is_refused_with_the_nearest(tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"question": "a", **SPACED, "weight": 1.0}]
    for settings, said in (
        (
            {"columns": {"prompt": "queston"}},
            "columns: {}: no column 'queston'; it has question, .*did you mean 'question'",
        ),
        (
            {"columns": {"prompt": "question"}, "weight_from": {"margin": "margin"}},
            "weight_from: {}: there is a column 'weight' already",
        ),
        (
            {"columns": {"prompt": "question", "weight": "w"}, "weight_from": None},
            None,
        ),
    ):
        if said is None:
            assert tokens(rows, tokenizer, **settings)[0]["weight"] == 1.0  # the column already has our name
            continue
        with pytest.raises(ConfigError, match=said.format("train_dataset row 1")):
            tokens(rows, tokenizer, **settings)
        (tmp_path / "a.jsonl").write_text(json.dumps(rows[0]))
        with pytest.raises(ConfigError, match=said.format(r".*a\.jsonl:1")):
            load_pairs(tmp_path / "a.jsonl", **settings)


def test_settings_reach_files_from_the_command_line(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"q": row["prompt"], **row, "prompt": 3, "gap": 1.0} for row in build_pairs(6)]
    Path("a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for streaming in ("false", "true"):
        arguments = f"--model {model_folder} --train_data a.jsonl --output_dir run-{streaming} --streaming {streaming}"
        named = "--columns.prompt q --weight_from.margin gap --weight_from.scale 2 --write_report false --max_steps 1"
        assert main([*arguments.split(), *named.split()]) == 0
        assert caplog.messages.count("a.jsonl: not used: prompt") == 1
        caplog.clear()
        settings = json.loads(Path(f"run-{streaming}/settings.json").read_text())
        assert "'prompt': 'q'" in str(settings)


# --- weights from scores -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [{}, {"scale": 2.0, "power": 0.5, "floor": 0.1}])
def test_scores_become_weights_on_request(
    shape: dict[str, float], tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good, bad = [3.0, 1.0, 0.0], [1.0, 0.5, 2.0]
    rows = [
        {**row, "score_chosen": g, "score_rejected": b} for row, g, b in zip(build_pairs(3), good, bad, strict=True)
    ]
    scale = shape.get("scale", 1.0)
    made = confidence_weights(
        preference_probability(good, bad, scale=scale),
        power=shape.get("power", 1.0),
        floor=shape.get("floor", 0.0),
        normalize=False,
    ).tolist()
    setting = {"chosen": "score_chosen", "rejected": "score_rejected", **shape}
    for form, data in forms(rows, tmp_path, weight_from=setting):
        assert [row["weight"] for row in tokens(data, tokenizer, weight_from=setting)] == pytest.approx(made), form
    assert not caplog.messages
    gaps = [{**row, "margin": g - b} for row, g, b in zip(build_pairs(3), good, bad, strict=True)]
    assert [
        row["weight"] for row in tokens(gaps, tokenizer, weight_from={"margin": "margin", **shape})
    ] == pytest.approx(made)
    tokens(rows, tokenizer)
    assert (
        "not used: score_chosen, score_rejected (the setting weight_from computes weights from scores)" in caplog.text
    )


def test_scores_that_favour_no_chosen_answer_are_refused(tokenizer: Any) -> None:
    rows = [{**row, "margin": -1.0} for row in build_pairs(3)]
    with pytest.raises(DataError, match="weight_from gives every pair the weight 0"):
        tokens(rows, tokenizer, weight_from={"margin": "margin"})
    with pytest.raises(DataError, match="row 1: 'margin' must be a finite number, found None"):
        tokens([{**row, "margin": None} for row in rows], tokenizer, weight_from={"margin": "margin"})


# --- unpaired rows -----------------------------------------------------------------------------------------------------


def test_unpaired_rows_are_paired_where_a_prompt_has_both(
    tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [
        {"prompt": "b", "completion": " bad", "label": False},
        {"prompt": "a", "completion": " good", "label": True},
        {"prompt": "a", "completion": " great", "label": True},
        {"prompt": "b", "completion": " fine", "label": True},
        {"prompt": "a", "completion": " awful", "label": False},
        {"prompt": "c", "completion": " fine", "label": True},
    ]
    by_hand = [
        {"prompt": "a", "chosen": " good", "rejected": " awful"},
        {"prompt": "b", "chosen": " fine", "rejected": " bad"},
    ]
    for form, data in forms(rows[:], tmp_path):
        if "stream" in form:
            with pytest.raises(DataError, match="cannot be paired while they are streamed"):
                tokens(data, tokenizer)
        else:
            assert tokens(data, tokenizer) == tokens(by_hand, tokenizer), form
            assert "4 of 6 rows are paired; 2 are left over" in caplog.text
        caplog.clear()
    with pytest.raises(DataError, match=r"no prompt has both an answer with label true and one with label false"):
        tokens(rows[1:4], tokenizer)
    with pytest.raises(DataError, match=r"row 1: 'label' must be true or false, found 'good'"):
        tokens([{**rows[0], "label": "good"}], tokenizer)


# --- prompts that completions repeat -----------------------------------------------------------------------------------


def test_completions_that_repeat_the_prompt_are_read_without_it(
    tokenizer: Any, tmp_path: Path, make_trainer: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    plain = build_pairs(5)
    rows = [{**row, **{side: row["prompt"] + row[side] for side in ("chosen", "rejected")}} for row in plain]
    for form, data in forms(rows, tmp_path):
        assert tokens(data, tokenizer) == tokens(plain, tokenizer), form
    make_trainer(train_dataset=rows)
    assert "train_dataset: both completions of 5 of 5 pairs begin with the prompt; it is removed there" in caplog.text


def test_a_few_completions_that_begin_as_the_prompt_does_are_left_and_told(
    make_trainer: Callable[..., Any], tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [*build_pairs(5), {"prompt": "good", "chosen": "goodness", "rejected": "good film"}]
    trainer = make_trainer(train_dataset=rows)
    assert "both completions of 1 of 6 pairs begin with the prompt; it is kept there" in caplog.text
    row = trainer.train_dataset[5]
    assert tokenizer.decode(row["prompt_ids"] + row["chosen_ids"]) == "goodgoodness<|end|>"


def test_remarks_are_logged_at_warning_level(tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Scripts without logging set-up show only warnings."""
    tokens(LAYOUTS["read as Orca rows"][0], tokenizer)
    assert {record.levelno for record in caplog.records} == {logging.WARNING}
