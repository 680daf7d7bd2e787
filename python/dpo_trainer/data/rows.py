"""Rows of preference data: the check that a row is a usable pair, and the `Pair` that it becomes."""

from __future__ import annotations

import contextlib
import json
import math
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

from ..errors import DataError, did_you_mean
from .messages import plain, with_arguments

SIDES = ("chosen", "rejected")
TEXTS = ("prompt", *SIDES)
REFERENCE = ("ref_chosen_logps", "ref_rejected_logps")
NUMBERS = ("weight", *REFERENCE)
IMAGES = ("images", "image")
COLUMNS = (*TEXTS, *IMAGES, "system", "tools", "chat_template_kwargs", *NUMBERS)
#: Arguments of a chat template that the trainer sets; `chat_template_kwargs` must not contain them.
RESERVED = {
    *("messages", "conversation", "tools", "chat_template", "tokenize", "add_generation_prompt"),
    *("continue_final_message", "return_dict", "return_tensors", "return_assistant_tokens_mask"),
    *("padding", "truncation", "max_length", "tokenizer_kwargs", "sanitize_control_tokens"),
}
#: Names of the prompt in other data sets. If a row has one of these columns, the prompt is not taken from the conversations.
PROMPT_LIKE = ("question", "instruction", "query", "input", "context", "prompts")
#: More names of the prompt, for rows whose answers are text: two texts may begin alike by chance ("The ...").
PROMPTS_OF_TEXTS = (
    *("messages", "conversations", "conversation", "history", "dialogue", "dialog", "user", "human", "text", "request"),
    *("problem", "document", "article"),
)


def has_reference(dataset: Any) -> bool:
    """Whether a dataset has columns with the reference's log-probabilities."""
    return all(name in dataset.column_names for name in REFERENCE)


@dataclass(frozen=True)
class Pair:
    """A prompt and two answers to it: a row after it was checked and split.

    Attributes:
        where: the row's name in messages, for instance "pairs.jsonl:17".
        prompt: a text, or a list of messages (objects with role and content).
        chosen: the better answer, of the prompt's type.
        rejected: the worse answer, of the prompt's type.
        tools: descriptions of the tools that the answers may call.
        numbers: by column, those of `weight` and the reference's log-probabilities that the row has.
        system: the text, perhaps empty, of a text row's column `system`. In chat rows the prompt contains it.
        template_kwargs: the row's arguments for the chat template.
        images: the prompt's images as the row has them; None if the row has no column for images.
    """

    where: str
    prompt: Any
    chosen: Any
    rejected: Any
    tools: list[Any] | None
    numbers: dict[str, float]
    system: str | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    images: list[Any] | None = None

    @property
    def kind(self) -> str:
        """The row's type: "text" or "chat messages"."""
        return "text" if isinstance(self.chosen, str) else "chat messages"


def parse_rows(located: Iterable[tuple[str, Any]]) -> Iterator[tuple[Any, Pair]]:
    """Yield every row with its pair. The row keeps only the columns of a pair, and its messages get their standard form.

    Args:
        located: (place, row) of every row. The place is the row's name in messages.

    Raises:
        DataError: a row is not a usable pair, or its columns or its type differ from the first row's.
    """
    columns: list[str] = []
    kind = ""
    for where, given in located:
        row = _plain_row(given, where)
        pair = parse_row(row, where)
        found = [name for name in COLUMNS if name in row]
        columns, kind = columns or found, kind or pair.kind
        if found != columns:
            name = next(name for name in COLUMNS if (name in found) != (name in columns))
            if name in columns:
                raise DataError(f"{where}: no column '{name}', which earlier rows have")
            raise DataError(f"{where}: a column '{name}', which earlier rows do not have")
        if pair.kind != kind:
            raise DataError(f"{where}: {pair.kind}, but earlier rows are {kind}; use one of them for all rows")
        yield {name: row[name] for name in found}, pair


def _plain_row(row: Any, where: str) -> Any:
    """The row with its messages in their standard form."""
    if not isinstance(row, Mapping):
        return row
    return {**row, **{name: plain(row[name], name, where) for name in TEXTS if name in row}}


def parse_row(row: Any, where: str) -> Pair:
    """The pair that a row holds.

    Args:
        row: an object with chosen, rejected and prompt, which are strings or lists of messages (see `messages.plain`).
            The prompt is absent if chosen and rejected are whole texts or conversations. Optional are system, tools,
            chat_template_kwargs, weight and reference log-probabilities.
        where: the row's name in messages, for instance "pairs.jsonl:17".

    Raises:
        DataError: the row is not a usable pair. The message starts with `where`.
    """
    if not isinstance(row, Mapping):
        raise DataError(f"{where}: expected an object with {', '.join(TEXTS)}, found {json_type(row)}")
    check_columns(list(row), where)
    row = _plain_row(row, where)
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
            raise DataError(f"{where}: '{name}' must be text or a list of messages, found {json_type(value)}")
    if len(set(kinds.values())) > 1:
        # If two conversations begin alike, they contain the prompt, so a prompt that is text may be ignored.
        told_twice = kinds["chosen"] == kinds["rejected"] == "chat" and shared_prefix(row["chosen"], row["rejected"])
        if not told_twice:
            described = ", ".join(f"{name} is {kind}" for name, kind in kinds.items())
            raise DataError(f"{where}: text and chat are mixed ({described}); use one of them for all three")
    if "prompt" not in row and not shared_prefix(row["chosen"], row["rejected"]):
        like = next((name for name in PROMPTS_OF_TEXTS if name in row), "question")
        raise DataError(
            f"{where}: no 'prompt', and 'chosen' and 'rejected' share no beginning that could be one; if another "
            f"column is the prompt, name it in the setting columns, as in columns: {{prompt: {like}}}"
        )
    return split_row(row, where)


def split_row(row: Mapping[str, Any], where: str = "row") -> Pair:
    """The pair of a row whose texts `parse_row` has accepted.

    If the row has no prompt, the common beginning of chosen and rejected is the prompt. It consists of the characters that
    two texts share, or of the messages that two conversations share (all but the last if the conversations are equal).
    Keys without a value are removed from messages, and from tools that are not JSON text, because a table gives every
    object the union of all keys. Arguments of tool calls become objects. A `system` text of a row with messages becomes
    the first message.

    Raises:
        DataError: system, tools, template arguments or numbers are not usable, the first message in which the
            conversations differ is not an answer, or the prompt contains an answer.
    """
    tools, system = _tools(row.get("tools"), where), _system(row, where)
    kwargs = _template_kwargs(row.get("chat_template_kwargs"), where)
    numbers = {name: number_of(row[name], name, where) for name in NUMBERS if name in row}
    prompt, chosen, rejected = (_messages(row.get(name), name, where) for name in TEXTS)
    if not isinstance(prompt, list if isinstance(chosen, list) else str):  # no prompt, or conversations contain it too
        start = shared_prefix(chosen, rejected)
        if chosen == rejected and isinstance(chosen, list):
            start -= 1
        prompt, chosen, rejected = chosen[:start], chosen[start:], rejected[start:]
    elif isinstance(prompt, list) and all(side[: len(prompt)] == prompt for side in (chosen, rejected)):
        chosen, rejected = (
            chosen[len(prompt) :],
            rejected[len(prompt) :],
        )  # whole conversations, although the row has a prompt
    for name, side in (("chosen", chosen), ("rejected", rejected)):
        if isinstance(side, list) and side and side[0]["role"] in ("user", "system"):
            raise DataError(
                f"{where}: the first message of '{name}' after the prompt is of '{side[0]['role']}', not of the assistant"
            )
        if isinstance(prompt, list) and prompt and side and prompt[-1] == side[0]:
            raise DataError(
                f"{where}: the prompt ends with the message that '{name}' begins with; leave it out of the prompt"
            )
    if system is not None and isinstance(prompt, list):
        first = prompt[0] if prompt and prompt[0]["role"] == "system" else None
        if system and first is not None and first.get("content") != system:
            raise DataError(f"{where}: 'system' and the first message are different system texts; keep one of them")
        if system and first is None:
            prompt = [{"role": "system", "content": system}, *prompt]
        system = None
    elif system is not None and row.get("prompt") is None:  # whole texts, not a question and an answer
        prompt, system = "\n\n".join(filter(None, (system, prompt))), None
    return Pair(where, prompt, chosen, rejected, tools, numbers, system, kwargs, images_of(row, where))


def images_of(row: Mapping[str, Any], where: str = "row") -> list[Any] | None:
    """The images of a row, in order; None if it has no column for images. Raises DataError if two columns have images."""
    given = [name for name in IMAGES if name in row]
    held = [
        name for name in given if row[name] is not None and not (isinstance(row[name], str) and not row[name].strip())
    ]
    if len(held) > 1:
        raise DataError(f"{where}: has both 'images' and 'image'; use one of them")
    if not held:
        return [] if given else None
    found = row[held[0]]
    found = list(found) if isinstance(found, (list, tuple)) else [found]
    if any(image is None for image in found):
        raise DataError(f"{where}: '{held[0]}' contains null instead of an image")
    return found


def check_columns(columns: Sequence[str], where: str) -> None:
    """Raise a DataError that names the existing columns if a required column is missing."""
    for name in SIDES:
        if name not in columns:
            hint = did_you_mean(name, columns) or "; if it has another name, give the name in the setting columns"
            raise DataError(f"{where}: no column '{name}'; it has {', '.join(columns) or 'none'}{hint}")
    if "prompt" not in columns:
        others = [name for name in columns if name not in COLUMNS and not name.endswith("id")]
        like = next((name for name in PROMPT_LIKE if name in others), None)
        hint = f" (did you mean '{like}'?)" if like is not None else did_you_mean("prompt", others)
        if hint:
            raise DataError(
                f"{where}: no column 'prompt'; it has {', '.join(columns)}{hint}; name it in the setting columns, as in "
                "columns: {prompt: question}, or leave it out if chosen and rejected contain the prompt"
            )
    if (REFERENCE[0] in columns) != (REFERENCE[1] in columns):
        missing = REFERENCE[0] if REFERENCE[0] not in columns else REFERENCE[1]
        raise DataError(f"{where}: no column '{missing}'; reference log-probabilities come in pairs")


def check_whole_texts(row: Mapping[str, Any], where: str) -> None:
    """Raise DataError if a text row has no prompt and one of its other columns seems to be the prompt."""
    check_columns(list(row), where)
    if like := next((name for name in PROMPTS_OF_TEXTS if name in row), None):
        raise DataError(
            f"{where}: no column 'prompt', and '{like}' may be the prompt; name it in the setting columns, as in "
            f"columns: {{prompt: {like}}}, or remove it if chosen and rejected contain the prompt"
        )


def _check_messages(messages: list[Any], name: str, where: str) -> None:
    if not messages:
        raise DataError(f"{where}: empty {'prompt' if name == 'prompt' else 'completion'} in '{name}' (no messages)")
    for number, message in enumerate(messages, 1):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise DataError(f"{where}: message {number} of '{name}' must be an object with role and content")
        content, calls = message.get("content"), message.get("tool_calls")
        if isinstance(content, list) and content:
            _check_parts(content, f"message {number} of '{name}'", where)
        elif not isinstance(content, str) and not calls:
            raise DataError(
                f"{where}: message {number} of '{name}' has no text in 'content' (found {json_type(content)})"
            )


def _messages(value: Any, name: str, where: str) -> Any:
    value = _without_nothing(plain(value, name, where))
    return [with_arguments(message) for message in value] if isinstance(value, list) else value


def _system(row: Mapping[str, Any], where: str) -> str | None:
    """The text of the column `system`, "" if the row's cell is empty; None without the column."""
    if "system" not in row:
        return None
    if not isinstance(system := row["system"] or "", str):
        raise DataError(f"{where}: 'system' must be text, found {json_type(system)}")
    return system


def _template_kwargs(kwargs: Any, where: str) -> Mapping[str, Any]:
    found = kwargs
    if isinstance(found, str) and found.strip():
        with contextlib.suppress(ValueError):
            found = json.loads(found)
    if found and not isinstance(found, Mapping):
        raise DataError(f"{where}: 'chat_template_kwargs' must be an object or its JSON text, found {_shown(kwargs)}")
    for name in found or ():
        if name in RESERVED:
            raise DataError(f"{where}: 'chat_template_kwargs' cannot contain '{name}', which the trainer sets")
    return (found if isinstance(kwargs, str) else _without_nothing(found)) or {}


def _check_parts(parts: list[Any], message: str, where: str) -> None:
    """Raise DataError for a part of a message other than {"type": "text", "text": ...} and {"type": "image"}."""
    for number, part in enumerate(parts, 1):
        what = part.get("type") if isinstance(part, Mapping) else None
        if what == "text" and isinstance(part.get("text"), str):
            continue
        if what != "image":
            raise DataError(
                f"{where}: part {number} of {message} must be {{'type': 'text', 'text': ...}} or {{'type': 'image'}}, "
                f"found {_shown(part)}"
            )
        if held := [name for name in ("image", "path", "url", "base64") if part.get(name) is not None]:
            raise DataError(
                f"{where}: part {number} of {message} has its image in '{held[0]}'; images belong in the column 'images', "
                "in the order of their places"
            )


def _tools(tools: Any, where: str) -> list[Any] | None:
    text = tools
    if isinstance(text, str) and text.strip():
        try:
            tools = json.loads(text)
        except ValueError as error:
            raise DataError(
                f"{where}: 'tools' must be a list of objects or its JSON text, found {_shown(text)}"
            ) from error
    if tools and not (isinstance(tools, list) and all(isinstance(tool, Mapping) for tool in tools)):
        raise DataError(f"{where}: 'tools' must be a list of objects or its JSON text, found {json_type(tools)}")
    return (tools if isinstance(text, str) else _without_nothing(tools)) or None


def number_of(value: Any, name: str, where: str) -> float:
    """The value as a float. Raises a DataError with the column's name if it is not finite, or a negative weight."""
    number = math.nan
    if isinstance(value, Real) and not isinstance(value, bool):
        with contextlib.suppress(OverflowError):  # an integer beyond the range of floats
            number = float(value)
    if not math.isfinite(number):
        raise DataError(f"{where}: '{name}' must be a finite number, found {_shown(value)}")
    if name == "weight" and number < 0:
        raise DataError(f"{where}: 'weight' must not be negative, found {value}")
    return number


def json_type(value: Any) -> str:
    """The name of a value's type in messages, for instance "a list"."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true/false", int: "a number", float: "a number"}
    return "nothing (null)" if value is None else names.get(type(value), type(value).__name__)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _without_nothing(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_nothing(item) for item in value]
    if isinstance(value, str) or not isinstance(
        value, Mapping
    ):  # most values are texts, and a test for Mapping is slow
        return value
    return {key: _without_nothing(item) for key, item in value.items() if item is not None}


def shared_prefix(a: Sequence[Any], b: Sequence[Any]) -> int:
    """How many items two sequences have in common at their beginning."""
    # A binary search, because slices are compared at C speed.
    return bisect_left(range(1, min(len(a), len(b)) + 1), True, key=lambda count: a[:count] != b[:count])
