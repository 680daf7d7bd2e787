"""Images of a row: what they may be given as, where they stand in its messages, and the tokens that a processor makes of them."""

from __future__ import annotations

import copy
import functools
import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.compute
from transformers import ProcessorMixin

from ..errors import DataError, first_line
from .rows import IMAGES, TEXTS, Pair, images_of, shared_prefix

logger = logging.getLogger("dpo_trainer")

#: The column of a tokenised dataset that says that its rows may have images: a digest of a row's images, "" without any.
DIGEST = "images_digest"

#: What a chat template that takes plain text keeps of it.
_PROBE = "Is this text kept?"


def has_images(dataset: Any) -> bool:
    """Whether the rows of a tokenised dataset may have images."""
    return DIGEST in (getattr(dataset, "column_names", None) or ())


def tokenizer_of(processing_class: Any) -> Any:
    """The tokenizer of a processor, or the tokenizer itself."""
    return processing_class.tokenizer if isinstance(processing_class, ProcessorMixin) else processing_class


# --- what an image may be given as ---------------------------------------------------------------------------------


def open_image(value: Any, where: str) -> Any:
    """A PIL image from a path, encoded bytes, an array [height, width, channels] uint8, `datasets.Image`'s object, or a PIL image.

    Raises:
        DataError: it cannot be read. The message starts with `where`.
    """
    with _naming(where, "an image cannot be read"):
        if isinstance(value, (str, Path, bytes, bytearray, Mapping, np.ndarray)):
            value = datasets.Image().decode_example(datasets.Image().encode_example(value))  # type: ignore[arg-type]
        if not hasattr(value, "getexif"):
            raise ValueError(f"expected a path, bytes or a PIL image, found {type(value).__name__}")
        return value


def encoded(value: Any, where: str) -> dict[str, Any]:
    """An image as a table holds it: an object with `bytes` and `path`, as `datasets.Image` has it. Raises DataError."""
    with _naming(where, "an image cannot be stored"):
        if not (isinstance(value, (str, Path, bytes, bytearray, Mapping, np.ndarray)) or hasattr(value, "getexif")):
            raise ValueError(f"expected a path, bytes or a PIL image, found {type(value).__name__}")
        return datasets.Image().encode_example(value)  # type: ignore[arg-type]


def for_table(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A row with images as a table can hold it beside others: `images` as a list of objects, all messages in parts."""
    found = {name: value for name, value in row.items() if name not in IMAGES}
    found |= {name: _in_parts(row[name]) for name in TEXTS if isinstance(row.get(name), list)}
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


# --- where they stand ----------------------------------------------------------------------------------------------


def text_of(content: Any) -> str:
    """The text of a message's content, which may be in parts."""
    if isinstance(content, list):
        return "".join(part.get("text") or "" for part in content)
    return content or ""


def reading(pair: Pair, processing_class: Any) -> tuple[Pair, Any]:
    """The pair with its messages in the form in which they are read, and what reads it as a tokenizer does.

    With images, messages are in parts and every image has its place, at the start of the first user's message where the
    row names none. Without, their content is text.

    Raises:
        DataError: images and places do not correspond, an image cannot be read, or there is no processor for it.
    """
    chat = isinstance(pair.chosen, list)
    if not pair.images:
        if chat:
            for name in TEXTS:
                if _places(getattr(pair, name)):
                    raise DataError(f"{pair.where}: '{name}' has a place for an image, but the row has no images")
            prompt, chosen, rejected = map(_in_text, (pair.prompt, pair.chosen, pair.rejected))
            pair = replace(pair, prompt=prompt, chosen=chosen, rejected=rejected)
        whole = isinstance(processing_class, ProcessorMixin)
        return pair, Reader(processing_class, [], pair.where) if whole else processing_class
    if not isinstance(processing_class, ProcessorMixin):
        raise DataError(
            f"{pair.where}: has images, and {type(processing_class).__name__} reads text only; pass a vision-language model's "
            "processor as processing_class, or remove the column"
        )
    if not getattr(processing_class, "image_token", None):
        raise DataError(f"{pair.where}: has images, and {type(processing_class).__name__} has no token for them")
    reader = Reader(processing_class, [open_image(image, pair.where) for image in pair.images], pair.where)
    if not chat:
        return pair, reader
    for name in ("chosen", "rejected"):
        if _places(getattr(pair, name)):
            raise DataError(f"{pair.where}: '{name}' has a place for an image; images belong in the prompt")
    prompt = _with_places(_in_parts(pair.prompt), len(pair.images), pair.where)
    return replace(pair, prompt=prompt, chosen=_in_parts(pair.chosen), rejected=_in_parts(pair.rejected)), reader


def _with_places(prompt: list[Any], images: int, where: str) -> list[Any]:
    """The messages of a prompt with a place for every image."""
    if places := _places(prompt):
        if places != images:
            raise DataError(f"{where}: 'prompt' has {places} places for images, and the row has {images} images")
        return prompt
    first = next((number for number, message in enumerate(prompt) if message["role"] == "user"), None)
    if first is None:
        raise DataError(f"{where}: 'prompt' has no message of the user's, where the images could stand")
    content = [{"type": "image"}] * images + (prompt[first].get("content") or [])
    return [*prompt[:first], {**prompt[first], "content": content}, *prompt[first + 1 :]]


def _places(messages: list[Any]) -> int:
    contents = (message.get("content") for message in messages)
    return sum(part["type"] == "image" for content in contents if isinstance(content, list) for part in content)


def _in_parts(messages: list[Any]) -> list[Any]:
    return [
        {**message, "content": [{"type": "text", "text": message["content"]}]}
        if isinstance(message.get("content"), str)
        else message
        for message in messages
    ]


def _in_text(messages: list[Any]) -> list[Any]:
    return [
        {**message, "content": text_of(message["content"])} if isinstance(message.get("content"), list) else message
        for message in messages
    ]


# --- what a processor makes of them --------------------------------------------------------------------------------


class Reader:
    """A processor and the images of one row, in the form of a tokenizer: a text's image tokens are as many as the images need.

    Args:
        images: of the row, opened, in the order of their places.
        where: how to name the row to a person.
    """

    def __init__(self, processor: Any, images: Sequence[Any], where: str) -> None:
        self.tokenizer, self.images, self.where = processor.tokenizer, list(images), where
        self._whole = processor
        if images:  # prompt and both sides are read one after the other, and images are slow to process
            self._whole = copy.copy(processor)
            self._whole.image_processor = _Once(processor.image_processor)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["tokenizer"], name)

    @property
    def chat_template(self) -> Any:
        return self._whole.chat_template or self.tokenizer.chat_template

    @property
    def digest(self) -> str:
        """A digest of the images and of how they are processed; "" without any."""
        if not self.images:
            return ""
        found = hashlib.blake2b(description_of(self._whole).encode(), digest_size=16)
        for image in self.images:
            found.update(f"{image.mode} {image.size} {image.getpalette()}".encode())
            found.update(image.tobytes())
        return found.hexdigest()

    def apply_chat_template(self, messages: list[Any], **options: Any) -> str:
        """The messages as text, one image token for every image."""
        render = _template_of(self._whole)
        if not self.images and not takes_text(self._whole):
            messages = _in_parts(messages)
        text = render(messages, **options)
        if self.images:
            self._check_places(text, "the chat template writes")
        return text

    def __call__(self, text: str, **options: Any) -> Mapping[str, Any]:
        """The text's `input_ids`; those of images as many as the model needs.

        Raises:
            DataError: the text has other than one image token for each image, or the processor fails.
        """
        self._check_places(text, "the row has")
        if not self.images:
            return self.tokenizer(text, **options)
        with _naming(self.where, f"{type(self._whole).__name__} fails on the images"):
            return {"input_ids": list(self._whole(text=[text], images=[self.images], **options)["input_ids"][0])}

    def cuts_images(self, whole: Sequence[int], kept: Sequence[int]) -> bool:
        """Whether truncation of a prompt, from `whole` to `kept`, took image tokens or the marks around them."""
        start = shared_prefix(whole, kept)
        return not self._around_images(whole).isdisjoint(range(start, start + len(whole) - len(kept)))

    def _around_images(self, ids: Sequence[int]) -> set[int]:
        """The places of image tokens, and of the special tokens next to them."""
        image_ids = getattr(self._whole, "image_token_ids", None)
        image_ids = image_ids or [self.tokenizer.convert_tokens_to_ids(self._whole.image_token)]
        special = self.tokenizer.added_tokens_decoder
        found = {place for place, token in enumerate(ids) if token in image_ids}
        for place, step in [(place, step) for place in found for step in (-1, 1)]:
            place += step
            while 0 <= place < len(ids) and ids[place] in special and place not in found:
                found.add(place)
                place += step
        return found

    def _check_places(self, text: str, who: str) -> None:
        token = getattr(self._whole, "image_token", None)
        if token and (count := text.count(token)) != len(self.images):
            raise DataError(
                f"{self.where}: {who} {count} of the image token '{token}' for {len(self.images)} images; each image needs one"
            )


class _Once:
    """An image processor that processes what it is given first, and gives the same again."""

    def __init__(self, processor: Any) -> None:
        self._processor, self._found = processor, None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._found is None:
            self._found = self._processor(*args, **kwargs)
        return copy.copy(self._found)  # processors take out what the model does not need

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_processor"], name)


def description_of(processor: Any) -> str:
    """What decides the pixels and the tokens of an image, as text."""
    image_processor = getattr(processor, "image_processor", None)
    return f"{type(processor).__name__} {image_processor and image_processor.to_json_string()}"


def _template_of(processor: Any) -> Any:
    """`apply_chat_template` of the processor, or of its tokenizer where that alone has a template."""
    return (processor if processor.chat_template else processor.tokenizer).apply_chat_template


@functools.lru_cache(maxsize=4)
def takes_text(processor: Any) -> bool:
    """Whether the chat template keeps content that is text; those of some vision-language models read parts alone."""
    try:
        return _PROBE in _template_of(processor)([{"role": "user", "content": _PROBE}], tokenize=False)
    except Exception:  # templates run code of their own
        return True  # the row's own error says more


@contextmanager
def _naming(where: str, what: str) -> Iterator[None]:
    """Errors of PIL, datasets and processors, whatever they are, as one line."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{where}: {what} ({first_line(error)})") from error
