"""Preference data as people have them: files, folders, hub names and streams, every row checked and named when it is bad."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import IterableDataset

from ..errors import DataError, did_you_mean, first_line

SIDES = ("chosen", "rejected")
TEXTS = ("prompt", *SIDES)
REFERENCE = ("ref_chosen_logps", "ref_rejected_logps")
COLUMNS = (*TEXTS, "tools", "weight", *REFERENCE)
FORMATS = (".jsonl", ".json", ".parquet", ".csv")
#: What other data sets call the prompt. Where there is one, a missing prompt is not a prompt within the conversations.
PROMPT_LIKE = ("question", "instruction", "query", "input", "context", "prompts")

Where = Callable[[int], str]


# --- whole data sets -----------------------------------------------------------------------------------------------


def load_pairs(path: str | Path) -> Any:
    """Read preference data into a `datasets.Dataset` with the columns of a pair, every row checked.

    Args:
        path: a .jsonl, .json (a list of objects), .parquet or .csv file, a folder made by `Dataset.save_to_disk`, or the
            name of a data set on the hub, "owner/name" or "owner/name:split".

    Raises:
        DataError: naming the file and the line or row.
    """
    import datasets

    name, path = str(path), Path(path).expanduser()
    if not path.exists():
        return _checked(_from_hub(name, streaming=False), name)
    if path.is_dir():
        return _checked(_saved(path), str(path))
    if path.suffix == ".parquet":
        with _readable(path):
            import pyarrow.parquet

            # Not by datasets' own reader, which would copy the file into a cache first.
            dataset = datasets.Dataset(pyarrow.parquet.read_table(path))
        return _checked(dataset, str(path))
    readers = {".jsonl": _jsonl_rows, ".json": _json_rows, ".csv": _csv_rows}
    if path.suffix not in readers:
        raise _unknown_format(path)
    located = list(readers[path.suffix](path))
    rows, places = [row for _, row in located], [place for place, _ in located]
    _check_rows(rows, places.__getitem__, str(path))
    return _named(table_of(rows, places.__getitem__), str(path))


def _named(dataset: Any, name: str) -> Any:
    """The dataset, knowing where it came from: messages about its rows then say so."""
    dataset.info.dataset_name = name
    return dataset


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Errors of pyarrow and pandas while they read a file, as one line."""
    try:
        yield
    except DataError:
        raise
    except (OSError, ValueError) as error:  # their parsing errors are ValueErrors
        raise DataError(f"{path}: not readable as {path.suffix[1:]} ({first_line(error)})") from error


def _unknown_format(path: Path) -> DataError:
    return DataError(
        f"{path}: unknown format '{path.suffix}'; known are {', '.join(FORMATS)} and folders saved by datasets"
    )


def _saved(path: Path) -> Any:
    import datasets

    try:
        dataset = datasets.load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not a folder saved by datasets ({first_line(error)})") from error
    if isinstance(dataset, datasets.DatasetDict):
        raise DataError(
            f"{path}: holds several splits ({', '.join(dataset)}); name one, e.g. {path / next(iter(dataset))}"
        )
    return dataset


def _from_hub(name: str, *, streaming: bool) -> Any:
    """A data set on the hub, by "owner/name" or "owner/name:split"; without a split, its only one."""
    import datasets

    hub_name, _, split = name.partition(":")
    local = Path(hub_name)
    if local.is_absolute() or hub_name.startswith((".", "~")) or hub_name.count("/") > 1 or local.suffix in FORMATS:
        raise DataError(f"{name}: no such file")
    try:
        dataset: Any = datasets.load_dataset(hub_name, split=split or None, streaming=streaming)
    except Exception as error:  # whatever the network, the hub or a data set's own reader raises
        raise DataError(f"{name}: no such file, and not to be had from the hub ({first_line(error)})") from error
    if isinstance(dataset, dict):
        if len(dataset) > 1:
            first = next(iter(dataset))
            raise DataError(f"{name}: holds several splits ({', '.join(dataset)}); name one, e.g. {name}:{first}")
        dataset = next(iter(dataset.values()))
    return dataset


def _jsonl_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """(place, row) of every line that is not blank."""
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            if not raw.strip():
                continue
            try:
                yield f"{path}:{number}", json.loads(raw.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError as error:
                raise DataError(f"{path}:{number}: not UTF-8 text (byte {error.start} of the line)") from error
            except json.JSONDecodeError as error:
                raise DataError(f"{path}:{number}: not JSON: {error.msg} at column {error.colno}") from error


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        rows = json.loads(path.read_bytes().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text (byte {error.start})") from error
    except json.JSONDecodeError as error:
        hint = "; for one object a line use the ending .jsonl" if error.msg == "Extra data" else ""
        raise DataError(f"{path}:{error.lineno}: not JSON: {error.msg} at column {error.colno}{hint}") from error
    if not isinstance(rows, list):
        raise DataError(f"{path}: expected a list of objects, found {_kind(rows)}")
    for number, row in enumerate(rows, 1):
        yield f"{path}: row {number}", row


def _csv_rows(path: Path) -> Iterator[tuple[str, Any]]:
    import pandas

    number = 0
    with _readable(path):
        # As text: what pandas makes of a column depends on all of its rows, so that a bad one would spoil good ones.
        for frame in pandas.read_csv(path, dtype=str, keep_default_na=False, chunksize=1024):
            for row in frame.to_dict("records"):
                number += 1
                for name in ("weight", *REFERENCE):
                    if name in row:
                        with contextlib.suppress(ValueError):
                            row[name] = float(row[name])
                yield f"{path}: row {number}", row
        if number == 0:
            check_columns(list(frame.columns), str(path))


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow.parquet

    number = 0
    with _readable(path):
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(1024):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}: row {number}", row


def _checked(dataset: Any, name: str) -> Any:
    check_columns(dataset.column_names, name)
    dataset = dataset.select_columns([column for column in COLUMNS if column in dataset.column_names])
    _check_rows(dataset, lambda index: f"{name}: row {index + 1}", name)
    return _named(dataset, name)


def _check_rows(rows: Any, where: Where, name: str) -> None:
    if len(rows) == 0:
        raise DataError(f"{name}: no rows")
    check = RowCheck()
    for index, row in enumerate(rows):
        check(row, where(index))


def table_of(rows: Sequence[Mapping[str, Any]], where: Where) -> Any:
    """Checked rows as a `datasets.Dataset`; `tools` as JSON text, since a table would give all of them the same keys.

    Raises:
        DataError: naming the first row whose values have other types than those before it.
    """
    import datasets

    def table(count: int) -> Any:
        taken = [_tools_as_text(row) for row in rows[:count]]
        return datasets.Dataset.from_list([{name: row[name] for name in COLUMNS if name in row} for row in taken])

    mistakes = (ValueError, TypeError, OverflowError)  # pyarrow's errors are of these kinds
    try:
        return table(len(rows))
    except mistakes as error:
        good, bad = 0, len(rows)
        while bad - good > 1:
            middle = (good + bad) // 2
            try:
                table(middle)
                good = middle
            except mistakes:
                bad = middle
        raise DataError(
            f"{where(bad - 1)}: a value has another type than in earlier rows ({first_line(error)})"
        ) from error


def _tools_as_text(row: Any) -> Any:
    if isinstance(row, Mapping) and not isinstance(row.get("tools", ""), str):
        return {**row, "tools": json.dumps(row["tools"])}
    return row


# --- streams -------------------------------------------------------------------------------------------------------


class RowStream(IterableDataset):
    """Rows that are read and checked one at a time, each with its place; a pass over them may be made again.

    Args:
        name: of the file or data set, for messages.
        located: makes an iterator over (place, row), where the place names the row to a person, for a pass from 0.
    """

    def __init__(self, name: str, located: Callable[[int], Iterable[tuple[str, Any]]]) -> None:
        self.name, self._located = name, located

    def located(self, number: int = 0) -> Iterator[tuple[str, dict[str, Any]]]:
        """(place, checked row) of every row, in the pass of this number."""
        check = RowCheck()
        for place, row in self._located(number):
            check(row, place)
            yield place, row

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (row for _, row in self.located())


def stream_pairs(path: str | Path) -> RowStream:
    """The pairs of `load_pairs`, read while training: for data that are too large to be read beforehand.

    Args:
        path: a .jsonl, .parquet or .csv file, a folder made by `Dataset.save_to_disk`, or the name of a data set on the
            hub, "owner/name" or "owner/name:split".

    Raises:
        DataError: it does not exist or cannot be streamed. Bad rows are found when they are read.
    """
    name, path = str(path), Path(path).expanduser()
    if not path.exists():
        return stream_of(_from_hub(name, streaming=True), name)
    if path.is_dir():
        return stream_of(_saved(path).to_iterable_dataset(), str(path))
    if path.suffix == ".jsonl":
        return RowStream(str(path), lambda _: ((place, _tools_as_text(row)) for place, row in _jsonl_rows(path)))
    if path.suffix in (".parquet", ".csv"):
        rows = _parquet_rows if path.suffix == ".parquet" else _csv_rows
        return RowStream(str(path), lambda _: rows(path))
    if path.suffix == ".json":
        raise DataError(f"{path}: a .json list is read as a whole; to stream it, write one object a line as .jsonl")
    raise _unknown_format(path)


def stream_of(dataset: Any, name: str) -> RowStream:
    """A `datasets.IterableDataset`, or any other iterable over rows, as a RowStream."""
    if isinstance(dataset, RowStream):
        return dataset

    def located(number: int) -> Iterator[tuple[str, Any]]:
        if hasattr(dataset, "set_epoch"):
            dataset.set_epoch(number)  # another order, where the dataset shuffles
        for index, row in enumerate(dataset, 1):
            yield f"{name}: row {index}", row

    return RowStream(name, located)


# --- rows ----------------------------------------------------------------------------------------------------------


def check_columns(columns: Sequence[str], where: str) -> None:
    """Raise DataError when a needed column is missing, naming the ones that are there."""
    for name in SIDES:
        if name not in columns:
            raise DataError(
                f"{where}: no column '{name}'; it has {', '.join(columns) or 'none'}{did_you_mean(name, columns)}"
            )
    if "prompt" not in columns:
        others = [name for name in columns if name not in COLUMNS and not name.endswith("id")]
        like = next((name for name in PROMPT_LIKE if name in others), None)
        hint = f" (did you mean '{like}'?)" if like is not None else did_you_mean("prompt", others)
        if hint:
            raise DataError(
                f"{where}: no column 'prompt'; it has {', '.join(columns)}{hint}; rename that, or leave it out where chosen "
                "and rejected hold the prompt"
            )
    if (REFERENCE[0] in columns) != (REFERENCE[1] in columns):
        missing = REFERENCE[0] if REFERENCE[0] not in columns else REFERENCE[1]
        raise DataError(f"{where}: no column '{missing}'; reference log-probabilities come in pairs")


class RowCheck:
    """Checks rows one after the other: each a usable pair, and of the same kind as the first."""

    def __init__(self) -> None:
        self._columns: list[str] | None = None
        self._kind = ""

    def __call__(self, row: Any, where: str) -> None:
        """Raise DataError, starting with `where` (for instance "pairs.jsonl:17"), unless the row is like the others."""
        kind = check_row(row, where)
        if self._columns is None:
            self._columns, self._kind = [column for column in COLUMNS if column in row], kind
        for name in COLUMNS:
            if name in self._columns and name not in row:
                raise DataError(f"{where}: no column '{name}', which earlier rows have")
            if name in row and name not in self._columns:
                raise DataError(f"{where}: a column '{name}', which earlier rows do not have")
        if kind != self._kind:
            raise DataError(f"{where}: {kind}, where earlier rows are {self._kind}; use one of them for all rows")


def check_row(row: Any, where: str) -> str:
    """Raise DataError, starting with `where`, unless the row is a usable pair; returns its kind, "text" or "chat messages".

    Args:
        row: an object with chosen and rejected, and prompt unless they are whole texts or conversations: strings or
            lists of messages; optional tools, weight and reference log-probabilities.
        where: how to name the row to a person, for instance "pairs.jsonl:17".
    """
    if not isinstance(row, Mapping):
        raise DataError(f"{where}: expected an object with {', '.join(TEXTS)}, found {_kind(row)}")
    check_columns(list(row), where)
    kinds = {}
    for name in TEXTS:
        if name not in row:
            continue
        value = row[name]
        if isinstance(value, str):
            kinds[name] = "text"
        elif isinstance(value, list):
            kinds[name] = "chat"
            _check_messages(value, name, where)
        else:
            raise DataError(f"{where}: '{name}' must be text or a list of messages, found {_kind(value)}")
    if len(set(kinds.values())) > 1:
        # A prompt as text beside two conversations that begin alike: the conversations say it all.
        told_twice = kinds["chosen"] == kinds["rejected"] == "chat" and shared_prefix(row["chosen"], row["rejected"])
        if not told_twice:
            described = ", ".join(f"{name} is {kind}" for name, kind in kinds.items())
            raise DataError(f"{where}: text and chat are mixed ({described}); use one of them for all three")
    if "prompt" not in row and not shared_prefix(row["chosen"], row["rejected"]):
        raise DataError(f"{where}: no 'prompt', and 'chosen' and 'rejected' share no beginning that could be one")
    _check_tools(row.get("tools"), where)
    for name in ("weight", *REFERENCE):
        if name not in row:
            continue
        value = row[name]
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not _finite(value):
            raise DataError(f"{where}: '{name}' must be a finite number, found {_shown(value)}")
        if name == "weight" and value < 0:
            raise DataError(f"{where}: 'weight' must not be negative, found {value}")
    if kinds["chosen"] == "text":
        return "text"
    split_row(row, where)
    return "chat messages"


def _finite(value: float) -> bool:
    try:
        return math.isfinite(float(value))
    except OverflowError:
        return False


def _check_messages(messages: list[Any], name: str, where: str) -> None:
    if not messages:
        raise DataError(f"{where}: empty {'prompt' if name == 'prompt' else 'completion'} in '{name}' (no messages)")
    for number, message in enumerate(messages, 1):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise DataError(f"{where}: message {number} of '{name}' must be an object with role and content")
        content, calls = message.get("content"), message.get("tool_calls")
        if not isinstance(content, str) and not calls:
            raise DataError(f"{where}: message {number} of '{name}' has no text in 'content' (found {_kind(content)})")


def _check_tools(tools: Any, where: str) -> None:
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise DataError(
                f"{where}: 'tools' must be a list of objects or its JSON text, found {_shown(tools)}"
            ) from error
    if tools and not (isinstance(tools, list) and all(isinstance(tool, Mapping) for tool in tools)):
        raise DataError(f"{where}: 'tools' must be a list of objects or its JSON text, found {_kind(tools)}")


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true/false", int: "a number", float: "a number"}
    return "nothing (null)" if value is None else names.get(type(value), type(value).__name__)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


# --- prompt and completions ----------------------------------------------------------------------------------------


def split_row(row: Mapping[str, Any], where: str = "row") -> tuple[Any, Any, Any, list[Any] | None]:
    """(prompt, chosen, rejected, tools) of a checked row, texts or lists of messages.

    Without a prompt of its own, what chosen and rejected have in common at their beginning is the prompt: characters of
    two texts, messages of two conversations (all but the last, where they are equal). Messages, and tools that are not
    JSON text, lose the keys that hold nothing: a table gives every object the union of all keys.

    Raises:
        DataError: the conversations part at a message that is not an answer.
    """
    chosen, rejected = row["chosen"], row["rejected"]
    prompt, tools = row.get("prompt"), row.get("tools")
    tools = (json.loads(tools) if tools.strip() else None) if isinstance(tools, str) else _without_nothing(tools)
    if isinstance(chosen, str):
        if prompt is None:
            start = shared_prefix(chosen, rejected)
            prompt, chosen, rejected = chosen[:start], chosen[start:], rejected[start:]
        return prompt, chosen, rejected, tools or None
    chosen, rejected = _without_nothing(chosen), _without_nothing(rejected)
    if isinstance(prompt, list):
        prompt = _without_nothing(prompt)
        if all(side[: len(prompt)] == prompt for side in (chosen, rejected)):  # whole conversations all the same
            chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    else:
        start = shared_prefix(chosen, rejected)
        if chosen == rejected:
            start -= 1
        prompt, chosen, rejected = chosen[:start], chosen[start:], rejected[start:]
    for name, side in (("chosen", chosen), ("rejected", rejected)):
        if side and side[0]["role"] in ("user", "system"):
            raise DataError(
                f"{where}: the first message of '{name}' after the prompt is of '{side[0]['role']}', not the assistant's"
            )
    return prompt, chosen, rejected, tools or None


def _without_nothing(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nothing(item) for key, item in value.items() if item is not None}
    return [_without_nothing(item) for item in value] if isinstance(value, list) else value


def shared_prefix(a: Sequence[Any], b: Sequence[Any]) -> int:
    """How many items two sequences have in common at their beginning."""
    low, high = 0, min(len(a), len(b))
    while low < high:  # halving: slices are compared at C speed
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
