"""Images of a row: the forms that are accepted, the form in tables, and messages with images."""

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

#: The column of a tokenised dataset whose rows may have images: a digest of a row's images, "" if it has none.
DIGEST = "images_digest"


def has_images(dataset: Any) -> bool:
    """Whether the rows of a tokenised dataset may have images."""
    return DIGEST in (getattr(dataset, "column_names", None) or ())


def open_image(value: Any, where: str) -> Any:
    """Open an image as a PIL image.

    Args:
        value: a PIL image, a path, encoded bytes, the object of `datasets.Image`, or a uint8 array
            [height, width, channels].
        where: the row's name in messages.

    Raises:
        DataError: the image cannot be read. The message starts with `where`.
    """
    with naming(where, "an image cannot be read"):
        if isinstance(value, (str, Path, bytes, bytearray, Mapping, np.ndarray)):
            value = datasets.Image().decode_example(datasets.Image().encode_example(value))  # type: ignore[arg-type]
        if not hasattr(value, "getexif"):
            raise ValueError(f"expected a path, bytes or a PIL image, found {type(value).__name__}")
        return value


def encoded(value: Any, where: str) -> dict[str, Any]:
    """An image in the form for a table: the object with `bytes` and `path` of `datasets.Image`. Raises DataError."""
    with naming(where, "an image cannot be stored"):
        if not (isinstance(value, (str, Path, bytes, bytearray, Mapping, np.ndarray)) or hasattr(value, "getexif")):
            raise ValueError(f"expected a path, bytes or a PIL image, found {type(value).__name__}")
        if hasattr(value, "getexif"):
            value = value.copy()  # drops the file name: datasets would store the file instead of the image
        return datasets.Image().encode_example(value)  # type: ignore[arg-type]


def for_table(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A row with images in the form for a table: `images` is a list of objects, and every message's content has parts."""
    found = {name: value for name, value in row.items() if name not in IMAGES}
    found |= {name: in_parts(row[name]) for name in TEXTS if isinstance(row.get(name), list)}
    return {**found, "images": [encoded(image, where) for image in images_of(row, where) or ()]}


def beside_file(row: Any, folder: Path) -> Any:
    """A row of a file. Paths of images that exist relative to the file's folder become absolute."""

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
    """(path, bytes, modification time in ns) of every image file that a dataset's rows name, to notice changed files."""
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
    """The messages with their content as a list of parts."""
    return [
        {**message, "content": [{"type": "text", "text": message["content"]}]}
        if isinstance(message.get("content"), str)
        else message
        for message in messages
    ]


@contextmanager
def naming(where: str, what: str) -> Iterator[None]:
    """Turn any error of PIL, datasets or a processor into a DataError of one line."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{where}: {what} ({first_line(error)})") from error
