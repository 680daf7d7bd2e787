"""From preference files to tokenised pairs: reading, checking, the prompt boundary, truncation, what was dropped."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import DataError, did_you_mean, first_line

REQUIRED = ("prompt", "chosen", "rejected")
REFERENCE = ("ref_chosen_logps", "ref_rejected_logps")
COLUMNS = (*REQUIRED, "weight", *REFERENCE)
FORMATS = (".jsonl", ".json", ".parquet", ".csv")

Where = Callable[[int], str]


# --- files ---------------------------------------------------------------------------------------------------------


def load_pairs(path: str | Path) -> Any:
    """Read a preference file into a `datasets.Dataset` with the columns of a pair, every row checked.

    Args:
        path: a .jsonl, .json (a list of objects), .parquet or .csv file, or a folder made by `Dataset.save_to_disk`.

    Raises:
        DataError: naming the file and the line or row.
    """
    import datasets

    path = Path(path).expanduser()
    if not path.exists():
        raise DataError(f"{path}: no such file")
    if path.is_dir():
        try:
            dataset = datasets.load_from_disk(str(path))
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: not a folder saved by datasets ({first_line(error)})") from error
        if isinstance(dataset, datasets.DatasetDict):
            raise DataError(
                f"{path}: holds several splits ({', '.join(dataset)}); name one, e.g. {path / next(iter(dataset))}"
            )
        return _checked(dataset, str(path))
    if path.suffix in (".jsonl", ".json"):
        rows, lines = _read_jsonl(path) if path.suffix == ".jsonl" else _read_json(path)
        unit = f"{path}:" if lines else f"{path}: row "
        _check_rows(rows, lambda index: f"{unit}{lines[index] if lines else index + 1}", str(path))
        return datasets.Dataset.from_list([{name: row[name] for name in COLUMNS if name in row} for row in rows])
    if path.suffix in (".parquet", ".csv"):
        # Read by pyarrow and pandas directly: datasets' own readers would copy the file into a cache first.
        try:
            if path.suffix == ".parquet":
                import pyarrow.parquet

                dataset = datasets.Dataset(pyarrow.parquet.read_table(path))
            else:
                import pandas

                frame = pandas.read_csv(path, dtype=dict.fromkeys(REQUIRED, str), keep_default_na=False)
                dataset = datasets.Dataset.from_pandas(frame, preserve_index=False)
        except (OSError, ValueError) as error:  # pyarrow's and pandas' parsing errors are ValueErrors
            raise DataError(f"{path}: not readable as {path.suffix[1:]} ({first_line(error)})") from error
        return _checked(dataset, str(path))
    raise DataError(
        f"{path}: unknown format '{path.suffix}'; known are {', '.join(FORMATS)} and folders saved by datasets"
    )


def _read_jsonl(path: Path) -> tuple[list[Any], list[int]]:
    rows, lines = [], []
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            if not raw.strip():
                continue
            try:
                rows.append(json.loads(raw.decode("utf-8")))
            except UnicodeDecodeError as error:
                raise DataError(f"{path}:{number}: not UTF-8 text (byte {error.start} of the line)") from error
            except json.JSONDecodeError as error:
                raise DataError(f"{path}:{number}: not JSON: {error.msg} at column {error.colno}") from error
            lines.append(number)
    return rows, lines


def _read_json(path: Path) -> tuple[list[Any], list[int]]:
    try:
        rows = json.loads(path.read_bytes().decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text (byte {error.start})") from error
    except json.JSONDecodeError as error:
        hint = "; for one object a line use the ending .jsonl" if error.msg == "Extra data" else ""
        raise DataError(f"{path}:{error.lineno}: not JSON: {error.msg} at column {error.colno}{hint}") from error
    if not isinstance(rows, list):
        raise DataError(f"{path}: expected a list of objects, found {_kind(rows)}")
    return rows, []


def _checked(dataset: Any, name: str) -> Any:
    check_columns(dataset.column_names, name)
    dataset = dataset.select_columns([column for column in COLUMNS if column in dataset.column_names])
    _check_rows(dataset, lambda index: f"{name}: row {index + 1}", name)
    return dataset


def _check_rows(rows: Any, where: Where, name: str) -> None:
    if len(rows) == 0:
        raise DataError(f"{name}: no rows")
    expected: list[str] | None = None
    for index, row in enumerate(rows):
        check_row(row, where(index), expected)
        if expected is None:
            expected = [column for column in COLUMNS if column in row]


# --- rows ----------------------------------------------------------------------------------------------------------


def check_columns(columns: Sequence[str], where: str) -> None:
    """Raise DataError when a required column is missing, naming the ones that are there."""
    for name in REQUIRED:
        if name not in columns:
            raise DataError(
                f"{where}: no column '{name}'; it has {', '.join(columns) or 'none'}{did_you_mean(name, columns)}"
            )
    if (REFERENCE[0] in columns) != (REFERENCE[1] in columns):
        missing = REFERENCE[0] if REFERENCE[0] not in columns else REFERENCE[1]
        raise DataError(f"{where}: no column '{missing}'; reference log-probabilities come in pairs")


def check_row(row: Any, where: str, expected: Sequence[str] | None = None) -> None:
    """Raise DataError, starting with `where`, unless the row is a usable pair.

    Args:
        row: an object with prompt, chosen, rejected: three strings or three lists of messages; optional weight
            and reference log-probabilities.
        where: how to name the row to a person, for instance "pairs.jsonl:17".
        expected: columns that the first row had and so every row must have.
    """
    if not isinstance(row, Mapping):
        raise DataError(f"{where}: expected an object with {', '.join(REQUIRED)}, found {_kind(row)}")
    check_columns(list(row), where)
    for name in expected or ():
        if name not in row:
            raise DataError(f"{where}: no column '{name}', which earlier rows have")
    kinds = {}
    for name in REQUIRED:
        value = row[name]
        if isinstance(value, str):
            kinds[name] = "text"
            if name != "prompt" and not value.strip():
                raise DataError(f"{where}: empty completion in '{name}'")
        elif isinstance(value, list):
            kinds[name] = "chat"
            _check_messages(value, name, where)
        else:
            raise DataError(f"{where}: '{name}' must be text or a list of messages, found {_kind(value)}")
    if len(set(kinds.values())) > 1:
        described = ", ".join(f"{name} is {kind}" for name, kind in kinds.items())
        raise DataError(f"{where}: text and chat are mixed ({described}); use one of them for all three")
    for name in ("weight", *REFERENCE):
        if name not in row:
            continue
        value = row[name]
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise DataError(f"{where}: '{name}' must be a finite number, found {_shown(value)}")
        if name == "weight" and value < 0:
            raise DataError(f"{where}: 'weight' must not be negative, found {value}")


def _check_messages(messages: list[Any], name: str, where: str) -> None:
    if not messages:
        raise DataError(f"{where}: empty {'prompt' if name == 'prompt' else 'completion'} in '{name}' (no messages)")
    for number, message in enumerate(messages, 1):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise DataError(f"{where}: message {number} of '{name}' must be an object with role and content")
        content, calls = message.get("content"), message.get("tool_calls")
        if not isinstance(content, str) and not calls:
            raise DataError(f"{where}: message {number} of '{name}' has no text in 'content' (found {_kind(content)})")
    last = messages[-1]
    if name != "prompt" and not (last.get("content") or "").strip() and not last.get("tool_calls"):
        raise DataError(f"{where}: empty completion in '{name}'")


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true/false", int: "a number", float: "a number"}
    return "nothing (null)" if value is None else names.get(type(value), type(value).__name__)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


# --- tokens --------------------------------------------------------------------------------------------------------


def tokenize_pair(
    row: Mapping[str, Any],
    tokenizer: Any,
    *,
    max_length: int | None = None,
    max_prompt_length: int | None = None,
    truncation_mode: str = "keep_end",
    append_eos: bool = True,
    where: str = "row",
) -> dict[str, list[int]]:
    """Token ids of one pair: `prompt_input_ids`, `chosen_input_ids`, `rejected_input_ids`.

    Prompt and completion are tokenised together, because that is how the text reads: cutting first would give
    tokens no generation produces (" great" after a prompt that ends in a space). The prompt then owns the tokens that
    its own tokenisation shares with *both* joined ones. Usually these are all of them; where a token straddles the
    boundary, it belongs to the completions. Both completions of a pair so answer the same prompt, to the token.

    Text completions get the end-of-sequence token unless they end in it, or `append_eos` is false: then they end as
    the tokenizer leaves them, for completions that were cut off and do not teach where to stop. Chat rows are rendered
    by the tokenizer's chat template, which also decides how a turn ends.

    Truncation to `max_length` (see `truncate`) comes last.
    """
    if isinstance(row["prompt"], str):
        prompt = tokenizer(row["prompt"])["input_ids"]
        sides = [tokenizer(row["prompt"] + row[side])["input_ids"] for side in ("chosen", "rejected")]
        end = tokenizer.eos_token_id
        if append_eos and end is not None:
            sides = [ids if ids and ids[-1] == end else [*ids, end] for ids in sides]
    else:
        texts = [render_chat(tokenizer, row["prompt"], row[side], where) for side in ("chosen", "rejected")]
        # The template writes the special tokens itself. A template may treat an answer's start specially: the shorter
        # prompt of the two is the shared one.
        prompt_text = min((prompt_text for prompt_text, _ in texts), key=len)
        prompt = tokenizer(prompt_text, add_special_tokens=False)["input_ids"]
        sides = [tokenizer(text, add_special_tokens=False)["input_ids"] for _, text in texts]

    boundary = min(_shared_prefix(prompt, ids) for ids in sides)
    chosen, rejected = (ids[boundary:] for ids in sides)
    prompt, chosen, rejected = truncate(
        prompt[:boundary],
        chosen,
        rejected,
        max_length=max_length,
        max_prompt_length=max_prompt_length,
        mode=truncation_mode,
        bos_token_id=getattr(tokenizer, "bos_token_id", None),
    )
    return {"prompt_input_ids": prompt, "chosen_input_ids": chosen, "rejected_input_ids": rejected}


def render_chat(tokenizer: Any, prompt: list[Any], completion: list[Any], where: str = "row") -> tuple[str, str]:
    """Text of the prompt (with the generation prompt) and of prompt + completion, the first a prefix of the second.

    Some templates render the start of an answer in two ways (an empty thinking block, say); then the common part counts
    as the prompt, as long as it holds all of its messages.

    Raises:
        DataError: no chat template, a template that refuses these messages, or one that changes the prompt once an
            answer follows.
    """
    from jinja2 import TemplateError

    # Arrow gives every message the union of all keys, with None where a message had none.
    prompt = [{key: value for key, value in message.items() if value is not None} for message in prompt]
    completion = [{key: value for key, value in message.items() if value is not None} for message in completion]
    if getattr(tokenizer, "chat_template", None) is None:
        raise DataError(f"{where}: rows are chat messages but the tokenizer has no chat template; use text or set one")
    try:
        open_turn = prompt[-1]["role"] == "assistant"
        kind = {"continue_final_message": True} if open_turn else {"add_generation_prompt": True}
        prompt_text = tokenizer.apply_chat_template(prompt, tokenize=False, **kind)
        if open_turn:  # the completion goes on with the assistant's message
            head, *rest = completion
            joined = {**prompt[-1], "content": prompt[-1]["content"] + (head.get("content") or "")}
            full_text = tokenizer.apply_chat_template([*prompt[:-1], joined, *rest], tokenize=False)
        else:
            full_text = tokenizer.apply_chat_template([*prompt, *completion], tokenize=False)
        if not full_text.startswith(prompt_text):
            bare = prompt_text if open_turn else tokenizer.apply_chat_template(prompt, tokenize=False)
            if not full_text.startswith(bare):
                raise DataError(
                    f"{where}: the chat template renders the prompt differently once an answer follows it, "
                    "so the answer's tokens cannot be told apart; use another template, or text rows"
                )
            prompt_text = full_text[: _shared_prefix(prompt_text, full_text)]
    except (TemplateError, KeyError, TypeError) as error:
        raise DataError(f"{where}: the chat template refuses these messages: {first_line(error)}") from error
    return prompt_text, full_text


def truncate(
    prompt: list[int],
    chosen: list[int],
    rejected: list[int],
    *,
    max_length: int | None,
    max_prompt_length: int | None,
    mode: str,
    bos_token_id: int | None = None,
) -> tuple[list[int], list[int], list[int]]:
    """Cut a pair so that prompt + completion has at most `max_length` tokens on either side.

    The prompt is first cut to `max_prompt_length`. Then `keep_end` drops the start of the prompt, by the same amount
    for both sides, as far as the longer completion asks for and a single token remains; `keep_start` leaves the prompt.
    What is still too long loses the end of its completion. A leading BOS survives any cut of the prompt.
    The two sides always keep the same prompt: log-probabilities after different prompts could not be compared.
    """

    def cut_prompt(length: int) -> list[int]:
        if len(prompt) <= length:
            return prompt
        if mode == "keep_start":
            return prompt[:length]
        if length > 1 and bos_token_id is not None and prompt[0] == bos_token_id:
            return [prompt[0], *prompt[len(prompt) - length + 1 :]]
        return prompt[len(prompt) - length :]

    if max_prompt_length is not None:
        prompt = cut_prompt(max_prompt_length)
    if max_length is not None:
        if mode == "keep_end":
            prompt = cut_prompt(max(max_length - max(len(chosen), len(rejected)), 1))
        room = max(max_length - len(prompt), 0)
        prompt, chosen, rejected = prompt[:max_length], chosen[:room], rejected[:room]
    return prompt, chosen, rejected


def _shared_prefix(a: Sequence[Any], b: Sequence[Any]) -> int:
    length = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        length += 1
    return length


# --- datasets ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Account:
    """What became of a dataset's rows on the way to training."""

    name: str
    rows: int
    identical: int
    cut: int
    tokens: int

    @property
    def kept(self) -> int:
        return self.rows - self.identical - self.cut

    @property
    def dropped(self) -> int:
        return self.identical + self.cut

    def describe(self) -> str:
        """One line for people: rows kept, and the reasons for the others."""
        reasons = []
        if self.identical:
            reasons.append(f"{self.identical:,} with chosen equal to rejected")
        if self.cut:
            reasons.append(f"{self.cut:,} with nothing of a completion left after truncation")
        tail = f"; dropped {' and '.join(reasons)}" if reasons else ""
        return f"{self.name}: {self.kept:,} of {self.rows:,} pairs kept, {self.tokens:,} tokens{tail}"


def prepare_dataset(
    dataset: Any,
    tokenizer: Any,
    *,
    name: str,
    max_length: int | None,
    max_prompt_length: int | None,
    truncation_mode: str,
    append_eos: bool = True,
    num_proc: int | None = None,
) -> tuple[Any, Account]:
    """Check and tokenise a `datasets.Dataset` (or a list of rows) of pairs, and drop what teaches nothing.

    Returns the dataset with `prompt_input_ids`, `chosen_input_ids`, `rejected_input_ids`, `length` (tokens of the
    longer side, for `train_sampling_strategy="group_by_length"`) and, where given, `weight` and the reference
    log-probabilities; and the account of what was dropped: pairs whose sides are equal (before or after truncation,
    their gradient is zero) and pairs of which a side has no token left to score. Datasets that are tokenised already
    pass through.

    Raises:
        DataError: naming the row, or saying that nothing is left.
    """
    import datasets

    if isinstance(dataset, (list, tuple)):
        _check_rows(dataset, lambda index: f"{name} row {index + 1}", name)
        dataset = datasets.Dataset.from_list([{key: row[key] for key in COLUMNS if key in row} for row in dataset])
    if not isinstance(dataset, datasets.Dataset):
        raise DataError(f"{name}: expected a datasets.Dataset or a list of rows, found {type(dataset).__name__}")
    if len(dataset) == 0:
        raise DataError(f"{name}: no rows")
    if "prompt_input_ids" not in dataset.column_names:
        check_columns(dataset.column_names, name)
        keep = [column for column in ("weight", *REFERENCE) if column in dataset.column_names]
        dataset = dataset.map(
            _tokenize_row,
            with_indices=True,
            fn_kwargs={
                "tokenizer": tokenizer,
                "name": name,
                "max_length": max_length,
                "max_prompt_length": max_prompt_length,
                "truncation_mode": truncation_mode,
                "append_eos": append_eos,
            },
            remove_columns=[column for column in dataset.column_names if column not in keep],
            num_proc=num_proc,
            desc=f"Tokenising {name}",
        )
        status = dataset["status"]
        rows, identical, cut = len(dataset), sum(s == "identical" for s in status), sum(s == "cut" for s in status)
        if identical or cut:
            dataset = dataset.select([index for index, s in enumerate(status) if s == "kept"])
        dataset = dataset.remove_columns("status")
    else:
        rows, identical, cut = len(dataset), 0, 0
    tokens = sum(
        2 * len(row["prompt_input_ids"]) + len(row["chosen_input_ids"]) + len(row["rejected_input_ids"])
        for row in dataset.select_columns(["prompt_input_ids", "chosen_input_ids", "rejected_input_ids"])
    )
    account = Account(name, rows, identical, cut, tokens)
    if account.kept == 0:
        raise DataError(f"{account.describe()}; nothing is left to train on")
    return dataset, account


def _tokenize_row(row: dict[str, Any], index: int, *, tokenizer: Any, name: str, **limits: Any) -> dict[str, Any]:
    where = f"{name} row {index + 1}"
    check_row(row, where)
    ids = tokenize_pair(row, tokenizer, where=where, **limits)
    scored = min(
        len(ids["prompt_input_ids"]) + len(ids[side]) - max(len(ids["prompt_input_ids"]), 1)
        for side in ("chosen_input_ids", "rejected_input_ids")
    )
    if ids["chosen_input_ids"] == ids["rejected_input_ids"]:
        status = "identical" if scored > 0 else "cut"
    else:
        status = "kept" if scored > 0 else "cut"
    longer = max(len(ids["chosen_input_ids"]), len(ids["rejected_input_ids"]))
    return {**ids, "length": len(ids["prompt_input_ids"]) + longer, "status": status}
