"""Preference data as people have them: files, folders, hub names and streams. Every row is checked; an error names its place."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import datasets
import pandas
import pyarrow.parquet
from torch.utils.data import IterableDataset

from ..errors import DataError, first_line, is_hub_name
from . import FORMATS as FORMATS
from .images import beside_file, for_table
from .known import AS_THEY_ARE, Located, Reading, Told
from .messages import as_written
from .rows import COLUMNS, IMAGES, NUMBERS, Pair, check_columns, json_type, parse_rows

#: Datasets whose rows were all checked, with their fingerprints at that time, because `set_transform` changes one in place; and
#: how they were read.
_CHECKED: WeakKeyDictionary[Any, tuple[str, Reading]] = WeakKeyDictionary()


# --- whole data sets -----------------------------------------------------------------------------------------------


def load_pairs(
    path: str | Path, *, columns: Mapping[str, str] | None = None, weight_from: Mapping[str, Any] | None = None
) -> Any:
    """Read preference data into a `datasets.Dataset` with the columns of a pair, every row checked.

    Known layouts become our columns; a line tells which, and another what nobody reads (docs/data.md).

    Args:
        path: a .jsonl, .json (a list of objects), .parquet or .csv file, a folder made by `Dataset.save_to_disk`, or the
            name of a data set on the hub, "owner/name" or "owner/name:split".
        columns, weight_from: the settings of DPOConfig, see `known.Reading`.

    Raises:
        DataError: naming the file and the line or row.
        ConfigError: `columns` or `weight_from` is wrong.
    """
    reading = Reading(columns, weight_from)
    name, dataset = _stored(path, streaming=False)
    if dataset is None and name.endswith(".parquet"):
        with _readable(Path(name)):
            # Not by datasets' own reader, which would copy the file into a cache first.
            dataset = datasets.Dataset(pyarrow.parquet.read_table(name))
        if any(_names_files(dataset.features.get(column)) for column in IMAGES):
            dataset = None  # read as rows, whose paths begin at the file
    if dataset is None:
        dataset = table_of(list(_rows_of(Path(name))), name, reading)
    elif len(dataset) == 0:
        check_columns(dataset.column_names, name)
        raise DataError(f"{name}: no rows")
    elif (own := in_our_columns(dataset, name, lambda number: f"{name}: row {number}", reading)) is not dataset:
        dataset = own
    else:
        check_columns(dataset.column_names, name)
        dataset = dataset.select_columns([column for column in COLUMNS if column in dataset.column_names])
        images = [column for column in IMAGES if column in dataset.column_names]
        for _ in parse_rows(
            numbered(name, dataset.remove_columns(images))
        ):  # images are opened once, when they are read
            pass
        _CHECKED[dataset] = dataset._fingerprint, reading
    dataset.info.dataset_name = name  # messages about its rows then say where they come from
    return dataset


def table_of(located: Sequence[tuple[str, Any]], name: str, reading: Reading) -> Any:
    """Rows, checked, as a `datasets.Dataset` with the columns of a pair.

    Where rows have images, they become objects with `bytes` and `path`, and the content of all messages a list of parts.

    Args:
        located: (place, row) of every row, where the place names the row to a person. Tools, arguments of tool calls and
            `chat_template_kwargs` should be JSON text (`as_written`), because a table would give all of them the same keys.
        name: of the file or data set, for messages.
        reading: how columns are read.

    Raises:
        DataError: there are none; or naming the first that is bad, or whose values have other types than those before it.
        ConfigError: a column that `reading` names is not there.
    """
    places: list[str] = []
    rows: list[dict[str, Any]] = []

    def noted() -> Located:
        for where, row in reading.rows(located, name):
            places.append(where)
            yield where, row

    rows.extend(row for row, _ in parse_rows(noted()))
    if not rows:
        raise DataError(f"{name}: no rows")
    if any(column in row for row in rows for column in IMAGES):
        rows = [for_table(row, where) for where, row in zip(places, rows, strict=True)]
    mistakes = (ValueError, TypeError, OverflowError)  # pyarrow's errors are of these kinds
    try:
        dataset = datasets.Dataset.from_list(rows)
    except mistakes as error:
        good, bad = 0, len(rows)
        while bad - good > 1:
            middle = (good + bad) // 2
            try:
                datasets.Dataset.from_list(rows[:middle])
                good = middle
            except mistakes:
                bad = middle
        where = places[bad - 1]
        if isinstance(error, UnicodeEncodeError):
            raise DataError(f"{where}: a text holds half a character ({first_line(error)})") from error
        raise DataError(f"{where}: a value has another type than in earlier rows ({first_line(error)})") from error
    _CHECKED[dataset] = dataset._fingerprint, reading
    return dataset


def in_our_columns(dataset: Any, name: str, place: Callable[[int], str], reading: Reading) -> Any:
    """A dataset of at least one row that may have other columns than ours, as a checked one; itself where it has ours.

    Args:
        place: names a row, counted from 1, to a person.
    """
    first = dataset[0]
    if reading.leaves(first):
        for _ in reading.rows([(name, first)], name):  # for what it tells
            pass
        return dataset
    own = table_of([(place(number), row) for number, row in enumerate(dataset, 1)], name, reading)
    own.info.dataset_name = dataset.info.dataset_name
    return own


def reading_of(dataset: Any) -> Reading | None:
    """How `load_pairs` or `table_of` has read a dataset that nothing has changed since; None for any other."""
    fingerprint, reading = _CHECKED.get(dataset, ("", None))
    return reading if fingerprint == dataset._fingerprint else None


def _names_files(feature: Any) -> bool:
    """Whether a column's values, or the items of its lists, are texts."""
    return getattr(getattr(feature, "feature", feature), "dtype", None) in ("string", "large_string")


# --- folders and the hub -------------------------------------------------------------------------------------------


def _stored(path: str | Path, *, streaming: bool) -> tuple[str, Any]:
    """(name for messages, dataset) of a folder or a hub name; of a file, which then has a known ending, (name, None)."""
    name, path = str(path), Path(path).expanduser()
    if not path.exists():
        return name, _from_hub(name, streaming=streaming)
    if path.is_dir():
        return str(path), _saved(path)
    if path.suffix not in FORMATS:
        raise DataError(
            f"{path}: unknown format '{path.suffix}'; known are {', '.join(FORMATS)} and folders saved by datasets"
        )
    return str(path), None


def _saved(path: Path) -> Any:
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
    hub_name, _, split = name.partition(":")
    if not is_hub_name(hub_name) or Path(hub_name).suffix in FORMATS:
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


# --- files ---------------------------------------------------------------------------------------------------------


def _rows_of(path: Path) -> Located:
    """(place, row) of every row of a file. Paths of images begin at the file's folder, where they lead to a file."""
    readers = {".json": _json_rows, ".parquet": _parquet_rows, ".csv": _csv_rows}
    rows = _jsonl_rows(path) if path.suffix == ".jsonl" else numbered(str(path), readers[path.suffix](path))
    return ((where, beside_file(row, path.parent)) for where, row in rows)


def numbered(name: str, rows: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    """(place, row) of rows whose places are their numbers."""
    return ((f"{name}: row {number}", row) for number, row in enumerate(rows, 1))


def _jsonl_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """(place, row) of every line that is not blank."""
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            if not raw.strip():
                continue
            try:
                row = json.loads(raw.decode("utf-8-sig" if number == 1 else "utf-8"))
                if b"\\ud" in raw.lower():  # JSON can write half a character, which no tokenizer takes
                    json.dumps(row, ensure_ascii=False).encode()
            except UnicodeEncodeError as error:
                raise DataError(f"{path}:{number}: a text holds half a character ({first_line(error)})") from error
            except UnicodeDecodeError as error:
                raise DataError(f"{path}:{number}: not UTF-8 text (byte {error.start} of the line)") from error
            except json.JSONDecodeError as error:
                raise DataError(f"{path}:{number}: not JSON: {error.msg} at column {error.colno}") from error
            yield f"{path}:{number}", as_written(row)


def _json_rows(path: Path) -> list[Any]:
    try:
        rows = json.loads(path.read_bytes().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text (byte {error.start})") from error
    except json.JSONDecodeError as error:
        hint = "; for one object a line use the ending .jsonl" if error.msg == "Extra data" else ""
        raise DataError(f"{path}:{error.lineno}: not JSON: {error.msg} at column {error.colno}{hint}") from error
    if not isinstance(rows, list):
        raise DataError(f"{path}: expected a list of objects, found {json_type(rows)}")
    return as_written(rows)


def _csv_rows(path: Path) -> Iterator[dict[str, Any]]:
    with _readable(path):
        # As text: what pandas makes of a column depends on all of its rows, so that a bad one would spoil good ones.
        for frame in pandas.read_csv(path, dtype=str, keep_default_na=False, chunksize=1024):
            if not isinstance(frame.index, pandas.RangeIndex):  # pandas takes what is too much for an index
                raise DataError(f"{path}: rows have more fields than the header ({', '.join(frame.columns)})")
            if frame.empty:
                check_columns(list(frame.columns), str(path))
            for row in frame.to_dict("records"):
                for name in NUMBERS:
                    if name in row:
                        with contextlib.suppress(ValueError):
                            row[name] = float(row[name])
                yield row


def _parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    with _readable(path):
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(1024):
            yield from batch.to_pylist()


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Errors of pyarrow and pandas while they read a file, as one line."""
    try:
        yield
    except DataError:
        raise
    except (OSError, ValueError) as error:  # their parsing errors are ValueErrors
        raise DataError(f"{path}: not readable as {path.suffix[1:]} ({first_line(error)})") from error


# --- streams -------------------------------------------------------------------------------------------------------


class RowStream(IterableDataset):
    """Rows that are read and checked one at a time; a pass over them may be made again.

    Args:
        name: of the file or data set, for messages.
        located: makes an iterator over (place, row), where the place names the row to a person, for a pass from 0.
        reading: how columns are read.
    """

    def __init__(self, name: str, located: Callable[[int], Located], reading: Reading) -> None:
        self.name, self.reading, self._located = name, reading, located
        self._told = Told(name)

    def read_with(self, reading: Reading) -> RowStream:
        """The same rows, read otherwise; itself where they are read so, or nothing is said of it."""
        return self if reading.is_default or reading == self.reading else RowStream(self.name, self._located, reading)

    def pairs(self, number: int) -> Iterator[Pair]:
        """What the rows become, in the pass of this number."""
        return (pair for _, pair in self._parsed(number))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (row for row, _ in self._parsed(0))

    def _parsed(self, number: int) -> Iterator[tuple[Any, Pair]]:
        return parse_rows(self.reading.rows(self._located(number), self.name, self._told))


def stream_pairs(
    path: str | Path, *, columns: Mapping[str, str] | None = None, weight_from: Mapping[str, Any] | None = None
) -> RowStream:
    """The pairs of `load_pairs`, read while training: for data that are too large to be read beforehand.

    Args:
        path: a .jsonl, .parquet or .csv file, a folder made by `Dataset.save_to_disk`, or the name of a data set on the
            hub, "owner/name" or "owner/name:split".
        columns, weight_from: the settings of DPOConfig, see `known.Reading`.

    Raises:
        DataError: it does not exist or cannot be streamed. Bad rows are found when they are read.
        ConfigError: `columns` or `weight_from` is wrong.
    """
    reading = Reading(columns, weight_from)
    name, dataset = _stored(path, streaming=True)
    if dataset is not None:
        return stream_of(dataset, name, reading)
    if name.endswith(".json"):
        raise DataError(f"{name}: a .json list is read as a whole; to stream it, write one object a line as .jsonl")
    return RowStream(name, lambda _: _rows_of(Path(name)), reading)


def stream_of(dataset: Any, name: str, reading: Reading = AS_THEY_ARE) -> RowStream:
    """A `datasets.IterableDataset`, or any other iterable over rows, as a RowStream."""
    if isinstance(dataset, RowStream):
        return dataset.read_with(reading)

    def located(number: int) -> Located:
        if hasattr(dataset, "set_epoch"):
            dataset.set_epoch(number)  # another order, where the dataset shuffles
        return numbered(name, dataset)

    return RowStream(name, located, reading)
