"""Reading of preference data from files, folders, hub names and streams. Every row is checked; errors name the row."""

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

#: Datasets whose rows were all checked, with the fingerprint at that time and the `Reading` that was used. The fingerprint
#: tells a later change, since `set_transform` changes a dataset in place.
_CHECKED: WeakKeyDictionary[Any, tuple[str, Reading]] = WeakKeyDictionary()


# --- whole data sets -----------------------------------------------------------------------------------------------


def load_pairs(
    path: str | Path, *, columns: Mapping[str, str] | None = None, weight_from: Mapping[str, Any] | None = None
) -> Any:
    """Read preference data into a `datasets.Dataset` and check every row.

    Rows of a known layout are converted (docs/data.md). The log names the layout, and the columns that are not used.

    Args:
        path: a .jsonl, .json (a list of objects), .parquet or .csv file, a folder made by `Dataset.save_to_disk`, or the
            name of a data set on the hub, "owner/name" or "owner/name:split".
        columns: the data's column names, by the names of a pair's columns, for instance `{"prompt": "question"}`. It is
            the setting `columns` of DPOConfig.
        weight_from: the columns of scores from which pair weights are computed, the setting `weight_from` of DPOConfig.

    Returns:
        a `datasets.Dataset` with the columns of a pair: chosen, rejected and, as far as the data have them, prompt, images,
            system, tools, chat_template_kwargs, weight and the reference's log-probabilities.

    Raises:
        DataError: the data cannot be read or used. The message names the file and the line or row.
        ConfigError: `columns` or `weight_from` is wrong.
    """
    reading = Reading(columns, weight_from)
    name, dataset = _stored(path, streaming=False)
    if dataset is None and name.endswith(".parquet"):
        with _readable(Path(name)):
            # The reader of `datasets` would copy the file into a cache first.
            dataset = datasets.Dataset(pyarrow.parquet.read_table(name))
        if any(_names_files(dataset.features.get(column)) for column in IMAGES):
            dataset = None  # read as rows: paths of images are relative to the file's folder
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
        ):  # images are opened once, when a batch needs them
            pass
        _CHECKED[dataset] = dataset._fingerprint, reading
    dataset.info.dataset_name = name  # for messages about its rows
    return dataset


def table_of(located: Sequence[tuple[str, Any]], name: str, reading: Reading) -> Any:
    """Check rows and make a `datasets.Dataset` with the columns of a pair from them.

    If rows have images, every image becomes an object with `bytes` and `path`, and every message's content a list of parts.

    Args:
        located: (place, row) of every row. The place is the row's name in messages. Tools, arguments of tool calls and
            `chat_template_kwargs` should be JSON text (`as_written`), since a table would give all of them the same keys.
        name: of the file or data set, for messages.
        reading: how columns are read.

    Raises:
        DataError: there are no rows, or a row is bad or has values of another type than earlier rows. The message names
            the first such row.
        ConfigError: a column that `reading` names does not exist.
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
    mistakes = (ValueError, TypeError, OverflowError)  # the types of pyarrow's errors
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
    """Convert and check a dataset that has other columns than ours. A dataset with our columns is returned unchanged.

    Args:
        dataset: of at least one row.
        place: gives the name of a row, counted from 1, in messages.
    """
    first = dataset[0]
    if reading.leaves(first):
        for _ in reading.rows([(name, first)], name):  # for its log lines
            pass
        return dataset
    own = table_of([(place(number), row) for number, row in enumerate(dataset, 1)], name, reading)
    own.info.dataset_name = dataset.info.dataset_name
    return own


def reading_of(dataset: Any) -> Reading | None:
    """How `load_pairs` or `table_of` read a dataset; None if they did not read it or it was changed since."""
    fingerprint, reading = _CHECKED.get(dataset, ("", None))
    return reading if fingerprint == dataset._fingerprint else None


def _names_files(feature: Any) -> bool:
    """Whether a column's values, or the items of its lists, are texts."""
    return getattr(getattr(feature, "feature", feature), "dtype", None) in ("string", "large_string")


# --- folders and the hub -------------------------------------------------------------------------------------------


def _stored(path: str | Path, *, streaming: bool) -> tuple[str, Any]:
    """(name for messages, dataset) of a folder or a hub name; (name, None) for a file, whose ending is then known."""
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
    """A data set on the hub, named "owner/name" or "owner/name:split". Without a split, it must have a single one."""
    hub_name, _, split = name.partition(":")
    if not is_hub_name(hub_name) or Path(hub_name).suffix in FORMATS:
        raise DataError(f"{name}: no such file")
    try:
        dataset: Any = datasets.load_dataset(hub_name, split=split or None, streaming=streaming)
    except Exception as error:  # of any type: the network, the hub and a data set's own reader raise their own
        raise DataError(f"{name}: no such file, and the hub does not provide it ({first_line(error)})") from error
    if isinstance(dataset, dict):
        if len(dataset) > 1:
            first = next(iter(dataset))
            raise DataError(f"{name}: holds several splits ({', '.join(dataset)}); name one, e.g. {name}:{first}")
        dataset = next(iter(dataset.values()))
    return dataset


# --- files ---------------------------------------------------------------------------------------------------------


def _rows_of(path: Path) -> Located:
    """(place, row) of every row of a file. Image paths that exist relative to the file's folder become absolute."""
    readers = {".json": _json_rows, ".parquet": _parquet_rows, ".csv": _csv_rows}
    rows = _jsonl_rows(path) if path.suffix == ".jsonl" else numbered(str(path), readers[path.suffix](path))
    return ((where, beside_file(row, path.parent)) for where, row in rows)


def numbered(name: str, rows: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    """(place, row) of every row. The place is the name with the row's number, from 1."""
    return ((f"{name}: row {number}", row) for number, row in enumerate(rows, 1))


def _jsonl_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """(place, row) of every line that is not blank."""
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            if not raw.strip():
                continue
            try:
                row = json.loads(raw.decode("utf-8-sig" if number == 1 else "utf-8"))
                if b"\\ud" in raw.lower():  # JSON can contain half a surrogate pair, which no tokenizer accepts
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
        hint = "; if every line is one object, use the ending .jsonl" if error.msg == "Extra data" else ""
        raise DataError(f"{path}:{error.lineno}: not JSON: {error.msg} at column {error.colno}{hint}") from error
    if not isinstance(rows, list):
        raise DataError(f"{path}: expected a list of objects, found {json_type(rows)}")
    return as_written(rows)


def _csv_rows(path: Path) -> Iterator[dict[str, Any]]:
    with _readable(path):
        # As text: pandas chooses a column's type from all of its rows, so one bad row would change the good ones.
        for frame in pandas.read_csv(path, dtype=str, keep_default_na=False, chunksize=1024):
            if not isinstance(frame.index, pandas.RangeIndex):  # pandas makes an index of surplus fields
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
    """Turn errors of pyarrow and pandas while they read a file into a DataError of one line."""
    try:
        yield
    except DataError:
        raise
    except (OSError, ValueError) as error:  # their parsing errors are ValueErrors
        raise DataError(f"{path}: not readable as {path.suffix[1:]} ({first_line(error)})") from error


# --- streams -------------------------------------------------------------------------------------------------------


class RowStream(IterableDataset):
    """Rows that are read and checked one at a time, in any number of passes.

    Args:
        name: of the file or data set, for messages.
        located: takes the number of a pass, from 0, and makes an iterator over (place, row). The place is the row's name
            in messages.
        reading: how columns are read.
    """

    def __init__(self, name: str, located: Callable[[int], Located], reading: Reading) -> None:
        self.name, self.reading, self._located = name, reading, located
        self._told = Told(name)

    def read_with(self, reading: Reading) -> RowStream:
        """The same rows with another `Reading`. Returns itself if it has this `Reading`, or the `Reading` is the default."""
        return self if reading.is_default or reading == self.reading else RowStream(self.name, self._located, reading)

    def pairs(self, number: int) -> Iterator[Pair]:
        """The pairs of the rows in the pass of this number."""
        return (pair for _, pair in self._parsed(number))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (row for row, _ in self._parsed(0))

    def _parsed(self, number: int) -> Iterator[tuple[Any, Pair]]:
        return parse_rows(self.reading.rows(self._located(number), self.name, self._told))


def stream_pairs(
    path: str | Path, *, columns: Mapping[str, str] | None = None, weight_from: Mapping[str, Any] | None = None
) -> RowStream:
    """Read the pairs of `load_pairs` during training, for data that are too large to be read before it.

    Args:
        path: a .jsonl, .parquet or .csv file, a folder made by `Dataset.save_to_disk`, or the name of a data set on the
            hub, "owner/name" or "owner/name:split".
        columns: the setting of DPOConfig, see `known.Reading`.
        weight_from: the setting of DPOConfig, see `known.Reading`.

    Raises:
        DataError: the data do not exist or cannot be streamed. Errors in rows are raised when the rows are read.
        ConfigError: `columns` or `weight_from` is wrong.
    """
    reading = Reading(columns, weight_from)
    name, dataset = _stored(path, streaming=True)
    if dataset is not None:
        return stream_of(dataset, name, reading)
    if name.endswith(".json"):
        raise DataError(f"{name}: a .json list is read as a whole; to stream it, write one object per line as .jsonl")
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
