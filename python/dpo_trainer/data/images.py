"""Images of a row: what they may be given as, how tables hold them, and the messages that they stand in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.compute

from ..errors import DataError, first_line
from .rows import IMAGES, TEXTS, images_of

#: The column of a tokenised dataset that says that its rows may have images: a digest of a row's images, "" without any.
DIGEST = "images_digest"


def has_images(dataset: Any) -> bool:
    """Whether the rows of a tokenised dataset may have images."""
    return DIGEST in (getattr(dataset, "column_names", None) or ())


def open_image(value: Any, where: str) -> Any:
    """A PIL image, from itself, a path, encoded bytes, `datasets.Image`'s object, or an array [height, width, channels] uint8.

    Raises:
        DataError: it cannot be read. The message starts with `where`.
    """
    with naming(where, "an image cannot be read"):
        if isinstance(value, (str, Path, bytes, bytearray, Mapping, np.ndarray)):
            value = datasets.Image().decode_example(datasets.Image().encode_example(value))  # type: ignore[arg-type]
        if not hasattr(value, "getexif"):
            raise ValueError(f"expected a path, bytes or a PIL image, found {type(value).__name__}")
        return value


def encoded(value: Any, where: str) -> dict[str, Any]:
    """An image as a table holds it: an object with `bytes` and `path`, as `datasets.Image` has it. Raises DataError."""
    with naming(where, "an image cannot be stored"):
        if not (isinstance(value, (str, Path, bytes, bytearray, Mapping, np.ndarray)) or hasattr(value, "getexif")):
            raise ValueError(f"expected a path, bytes or a PIL image, found {type(value).__name__}")
        if hasattr(value, "getexif"):
            value = value.copy()  # without the name of its file, which would be read in place of what was made of it
        return datasets.Image().encode_example(value)  # type: ignore[arg-type]


def for_table(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A row with images as a table can hold it beside others: `images` as a list of objects, all messages in parts."""
    found = {name: value for name, value in row.items() if name not in IMAGES}
    found |= {name: in_parts(row[name]) for name in TEXTS if isinstance(row.get(name), list)}
    return {**found, "images": [encoded(image, where) for image in images_of(row, where) or ()]}


def beside_file(row: Any, folder: Path) -> Any:
    """A row of a file, with the paths of its images that are relative to the file's folder made absolute."""

    def found(value: Any) -> Any:
        if isinstance(value, list):
            return [found(item) for item in value]
        if isinstance(value, Mapping) and not value.get("bytes"):
            return {**value, "path": found(value.get("path"))}
        if isinstance(value, str) and value.strip() and (folder / value).is_file():
            return str((folder / value).absolute())
        return value

    if not isinstance(row, Mapping):
        return row
    return {**row, **{name: found(row[name]) for name in IMAGES if name in row}}


def state_of_files(dataset: Any) -> list[tuple[str, int, int]]:
    """(path, bytes, time of change in ns) of every image file that a dataset's rows name, so that changed files are seen."""
    found = []
    for name in IMAGES:
        if name not in dataset.column_names:
            continue
        column = dataset.data.column(name)
        while pyarrow.types.is_list(column.type) or pyarrow.types.is_large_list(column.type):
            column = pyarrow.compute.list_flatten(column)
        if pyarrow.types.is_struct(column.type) and column.type.get_field_index("path") >= 0:
            column = pyarrow.compute.struct_field(column, "path")
        if not (pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type)):
            continue
        for path in sorted(set(column.to_pylist()) - {None, ""}):
            if Path(path).is_file():
                state = Path(path).stat()
                found.append((path, state.st_size, state.st_mtime_ns))
    return found


def text_of(content: Any) -> str:
    """The text of a message's content, which may be in parts."""
    if isinstance(content, list):
        return "".join(part.get("text") or "" for part in content)
    return content or ""


def in_parts(messages: list[Any]) -> list[Any]:
    """Messages whose content is a list of parts."""
    return [
        {**message, "content": [{"type": "text", "text": message["content"]}]}
        if isinstance(message.get("content"), str)
        else message
        for message in messages
    ]


@contextmanager
def naming(where: str, what: str) -> Iterator[None]:
    """Errors of PIL, datasets and processors, whatever they are, as one line."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{where}: {what} ({first_line(error)})") from error
