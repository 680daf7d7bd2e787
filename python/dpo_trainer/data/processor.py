"""How a processor reads a pair: the places of images in the messages, and the tokens of texts with images."""

from __future__ import annotations

import copy
import functools
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from transformers import ProcessorMixin

from ..errors import DataError
from .images import in_parts, naming, open_image, text_of
from .rows import TEXTS, Pair, shared_prefix
from .template import as_chat

#: A text that appears in a chat template's output if the template accepts content that is text.
_PROBE = "Is this text kept?"


def image_token_of(processor: Any) -> str | None:
    """The token in a text that the processor replaces by an image's tokens; None if the processor has no such token."""
    token = getattr(processor, "image_token", None)
    return getattr(token, "content", token) or None  # some have an AddedToken


def tokenizer_of(processing_class: Any) -> Any:
    """The tokenizer of a processor, or the tokenizer itself."""
    return processing_class.tokenizer if isinstance(processing_class, ProcessorMixin) else processing_class


# --- places of images ----------------------------------------------------------------------------------------------


def read_by(pair: Pair, processing_class: Any) -> tuple[Pair, Any]:
    """The pair with its messages in the form that is tokenised, and the tokenizer or `Reader` that tokenises it.

    In a pair with images, the content of messages is a list of parts with a place for every image. If the row names no
    places, the images are put at the start of the first user message. In a pair without images, the content is text.

    Raises:
        DataError: images and places do not correspond, an image cannot be read, or there is no processor for it.
    """
    templates = processing_class if getattr(processing_class, "chat_template", None) else tokenizer_of(processing_class)
    pair = as_chat(pair, templates)
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
    if image_token_of(processing_class) is None:
        raise DataError(f"{pair.where}: has images, and {type(processing_class).__name__} has no token for them")
    reader = Reader(processing_class, [open_image(image, pair.where) for image in pair.images], pair.where)
    if not chat:
        return pair, reader
    for name in ("chosen", "rejected"):
        if _places(getattr(pair, name)):
            raise DataError(f"{pair.where}: '{name}' has a place for an image; images belong in the prompt")
    prompt = _with_places(in_parts(pair.prompt), len(pair.images), pair.where)
    return replace(pair, prompt=prompt, chosen=in_parts(pair.chosen), rejected=in_parts(pair.rejected)), reader


def _with_places(prompt: list[Any], images: int, where: str) -> list[Any]:
    """The messages of a prompt with a place for every image."""
    if places := _places(prompt):
        if len(places) != images:
            raise DataError(f"{where}: 'prompt' has {len(places)} places for images, and the row has {images} images")
        order = [place["index"] for place in places if place.get("index") is not None]
        if order and order != list(range(images)):
            raise DataError(
                f"{where}: the places in 'prompt' have the 'index' {order}; images must be in the order of their places"
            )
        return prompt
    first = next((number for number, message in enumerate(prompt) if message["role"] == "user"), None)
    if first is None:
        raise DataError(f"{where}: 'prompt' has no user message that could contain the images")
    content = [{"type": "image"}] * images + (prompt[first].get("content") or [])
    return [*prompt[:first], {**prompt[first], "content": content}, *prompt[first + 1 :]]


def _places(messages: list[Any]) -> list[Any]:
    contents = (message.get("content") for message in messages)
    return [part for content in contents if isinstance(content, list) for part in content if part["type"] == "image"]


def _in_text(messages: list[Any]) -> list[Any]:
    return [
        {**message, "content": text_of(message["content"])} if isinstance(message.get("content"), list) else message
        for message in messages
    ]


# --- tokens of texts with images -----------------------------------------------------------------------------------


class Reader:
    """A processor with the images of one row, used like a tokenizer. It replaces each image token by the image's tokens.

    Args:
        images: the row's opened images, in the order of their places.
        where: the row's name in messages.
    """

    def __init__(self, processor: Any, images: Sequence[Any], where: str) -> None:
        self.tokenizer, self.images, self.where = processor.tokenizer, list(images), where
        self._whole = processor
        if images:  # process the images once: prompt and both sides need them, and processing is slow
            self._whole = copy.copy(processor)
            self._whole.image_processor = _Once(processor.image_processor)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["tokenizer"], name)

    @property
    def chat_template(self) -> Any:
        return self._whole.chat_template or self.tokenizer.chat_template

    @property
    def digest(self) -> str:
        """A digest of the images and of how they are processed; "" without images."""
        if not self.images:
            return ""
        found = hashlib.blake2b(description_of(self._whole).encode(), digest_size=16)
        for image in self.images:
            found.update(f"{image.mode} {image.size} {image.getpalette()}".encode())
            found.update(image.tobytes())
        return found.hexdigest()

    def apply_chat_template(self, messages: list[Any], **options: Any) -> str:
        """The messages as text with one image token for every image."""
        render = _template_of(self._whole)
        if not self.images and not takes_text(self._whole, str(self.chat_template)):
            messages = in_parts(messages)
        text = render(messages, **options)
        if self.images:
            self._check_places(text, "the chat template writes")
        return text

    def __call__(self, text: str, **options: Any) -> Mapping[str, Any]:
        """The text's `input_ids`, with as many tokens for each image as the model needs.

        Raises:
            DataError: the text does not have one image token for each image, or the processor fails.
        """
        self._check_places(text, "the row has")
        if not self.images:
            return self.tokenizer(text, **options)
        with naming(self.where, f"{type(self._whole).__name__} fails on the images"):
            ids = self._whole(text=[text], images=[self.images], **options)["input_ids"][0]
            return {"input_ids": [int(token) for token in ids]}  # some processors always return tensors

    def cuts_images(self, whole: Sequence[int], kept: Sequence[int]) -> bool:
        """Whether truncation of a prompt from `whole` to `kept` removed image tokens or special tokens next to them."""
        start = shared_prefix(whole, kept)
        return not self._around_images(whole).isdisjoint(range(start, start + len(whole) - len(kept)))

    def _around_images(self, ids: Sequence[int]) -> set[int]:
        """Indices of the image tokens and of the special tokens next to them."""
        image_ids = getattr(self._whole, "image_token_ids", None)
        image_ids = image_ids or [self.tokenizer.convert_tokens_to_ids(image_token_of(self._whole))]
        special = self.tokenizer.added_tokens_decoder
        found = {place for place, token in enumerate(ids) if token in image_ids}
        for place, step in [(place, step) for place in found for step in (-1, 1)]:
            place += step
            while 0 <= place < len(ids) and ids[place] in special and place not in found:
                found.add(place)
                place += step
        return found

    def _check_places(self, text: str, who: str) -> None:
        token = image_token_of(self._whole)
        if token and (count := text.count(token)) != len(self.images):
            raise DataError(
                f"{self.where}: {who} {count} of the image token '{token}' for {len(self.images)} images; each image needs one"
            )


class _Once:
    """An image processor that processes its first input and returns the same result in later calls."""

    def __init__(self, processor: Any) -> None:
        self._processor, self._found = processor, None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._found is None:
            self._found = self._processor(*args, **kwargs)
        return copy.copy(self._found)  # processors remove entries that the model does not need

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_processor"], name)


def description_of(processor: Any) -> str:
    """The settings that decide the pixels and the tokens of an image, as text."""
    image_processor = getattr(processor, "image_processor", None)
    return f"{type(processor).__name__} {image_processor and image_processor.to_json_string()}"


def _template_of(processor: Any) -> Any:
    """`apply_chat_template` of the processor, or of its tokenizer if only the tokenizer has a template."""
    return (processor if processor.chat_template else processor.tokenizer).apply_chat_template


@functools.lru_cache(maxsize=4)
def takes_text(processor: Any, template: str) -> bool:
    """Whether the processor's chat template accepts content that is text. Some vision-language models accept parts only.

    The argument `template` is part of the cache's key, so that a changed template is tested again.
    """
    try:
        return _PROBE in _template_of(processor)([{"role": "user", "content": _PROBE}], tokenize=False)
    except Exception:  # templates run code of their own
        return True  # the error of the row itself is clearer
