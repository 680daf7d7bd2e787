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
#: What the trainer itself tells a chat template; `chat_template_kwargs` must not.
RESERVED = {
    *("messages", "conversation", "tools", "chat_template", "tokenize", "add_generation_prompt"),
    *("continue_final_message", "return_dict", "return_tensors", "return_assistant_tokens_mask"),
    *("padding", "truncation", "max_length", "tokenizer_kwargs", "sanitize_control_tokens"),
}
#: What other data sets call the prompt. Where there is one, a missing prompt is not a prompt within the conversations.
PROMPT_LIKE = ("question", "instruction", "query", "input", "context", "prompts")
#: The same for answers that are text, which may begin alike by chance ("The ...").
PROMPTS_OF_TEXTS = (
    *("messages", "conversations", "conversation", "history", "dialogue", "dialog", "user", "human", "text", "request"),
    *("problem", "document", "article"),
)


def has_reference(dataset: Any) -> bool:
    """Whether a dataset brings the reference's log-probabilities."""
    return all(name in dataset.column_names for name in REFERENCE)


@dataclass(frozen=True)
class Pair:
    """A prompt and two answers to it: what a row says, checked and split.

    Attributes:
        where: how to name the row to a person, for instance "pairs.jsonl:17".
        prompt: a text, or a list of messages (objects with role and content).
        chosen: the better answer, of the prompt's type.
        rejected: the worse answer, of the prompt's type.
        tools: descriptions of the tools that the answers may call.
        numbers: `weight` and the reference's log-probabilities, as far as the row has them, by column.
        system: of a text row with a column `system`, its text, perhaps empty. In chat messages it stands in the prompt.
        template_kwargs: what the row tells the chat template.
        images: of the prompt, as the row has them; None where it has no column for them.
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
        """What the row holds: "text" or "chat messages"."""
        return "text" if isinstance(self.chosen, str) else "chat messages"


def parse_rows(located: Iterable[tuple[str, Any]]) -> Iterator[tuple[Any, Pair]]:
    """Every row, with the columns of a pair alone and its messages in one form, and the pair that it becomes.

    Args:
        located: (place, row) of every row, where the place names the row to a person.

    Raises:
        DataError: a row is no usable pair, or has other columns than the first or is of another kind.
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
            raise DataError(f"{where}: {pair.kind}, where earlier rows are {kind}; use one of them for all rows")
        yield {name: row[name] for name in found}, pair


def _plain_row(row: Any, where: str) -> Any:
    """The row with its messages in one form."""
    if not isinstance(row, Mapping):
        return row
    return {**row, **{name: plain(row[name], name, where) for name in TEXTS if name in row}}


def parse_row(row: Any, where: str) -> Pair:
    """The pair that a row holds.

    Args:
        row: an object with chosen and rejected, and prompt unless they are whole texts or conversations: strings or
            lists of messages (see `messages.plain`); optional system, tools, chat_template_kwargs, weight and reference
            log-probabilities.
        where: how to name the row to a person, for instance "pairs.jsonl:17".

    Raises:
        DataError: the row is no usable pair. The message starts with `where`.
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
        # A prompt as text with two conversations that begin alike: the conversations say it all.
        told_twice = kinds["chosen"] == kinds["rejected"] == "chat" and shared_prefix(row["chosen"], row["rejected"])
        if not told_twice:
            described = ", ".join(f"{name} is {kind}" for name, kind in kinds.items())
            raise DataError(f"{where}: text and chat are mixed ({described}); use one of them for all three")
    if "prompt" not in row and not shared_prefix(row["chosen"], row["rejected"]):
        like = next((name for name in PROMPTS_OF_TEXTS if name in row), "question")
        raise DataError(
            f"{where}: no 'prompt', and 'chosen' and 'rejected' share no beginning that could be one; where another "
            f"column is the prompt, name it by the setting columns, as in columns: {{prompt: {like}}}"
        )
    return split_row(row, where)


def split_row(row: Mapping[str, Any], where: str = "row") -> Pair:
    """The pair of a row whose texts `parse_row` has found good.

    Without a prompt of its own, what chosen and rejected have in common at their beginning is the prompt: characters of
    two texts, messages of two conversations (all but the last, where they are equal). Messages, and tools that are not
    JSON text, lose the keys that hold nothing: a table gives every object the union of all keys. Arguments of tool calls
    become objects. A `system` next to messages becomes their first one.

    Raises:
        DataError: system, tools, template arguments or numbers are not usable, the conversations part at a message that is
            not an answer, or the prompt holds an answer.
    """
    tools, system = _tools(row.get("tools"), where), _system(row, where)
    kwargs = _template_kwargs(row.get("chat_template_kwargs"), where)
    numbers = {name: number_of(row[name], name, where) for name in NUMBERS if name in row}
    prompt, chosen, rejected = (_messages(row.get(name), name, where) for name in TEXTS)
    if not isinstance(prompt, list if isinstance(chosen, list) else str):  # none, or one that conversations hold too
        start = shared_prefix(chosen, rejected)
        if chosen == rejected and isinstance(chosen, list):
            start -= 1
        prompt, chosen, rejected = chosen[:start], chosen[start:], rejected[start:]
    elif isinstance(prompt, list) and all(side[: len(prompt)] == prompt for side in (chosen, rejected)):
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]  # they were whole conversations all the same
    for name, side in (("chosen", chosen), ("rejected", rejected)):
        if isinstance(side, list) and side and side[0]["role"] in ("user", "system"):
            raise DataError(
                f"{where}: the first message of '{name}' after the prompt is of '{side[0]['role']}', not the assistant's"
            )
        if isinstance(prompt, list) and prompt and side and prompt[-1] == side[0]:
            raise DataError(
                f"{where}: the prompt ends with the message that '{name}' begins with; leave it out of the prompt"
            )
    if system is not None and isinstance(prompt, list):
        first = prompt[0] if prompt and prompt[0]["role"] == "system" else None
        if system and first is not None and first.get("content") != system:
            raise DataError(f"{where}: 'system' is one system text and the first message another; keep one of them")
        if system and first is None:
            prompt = [{"role": "system", "content": system}, *prompt]
        system = None
    elif system is not None and row.get("prompt") is None:  # whole texts, which are no question and answer
        prompt, system = "\n\n".join(filter(None, (system, prompt))), None
    return Pair(where, prompt, chosen, rejected, tools, numbers, system, kwargs, images_of(row, where))


def images_of(row: Mapping[str, Any], where: str = "row") -> list[Any] | None:
    """The images of a row, in order; None where it has no column for them. Raises DataError where it has two with images."""
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
        raise DataError(f"{where}: '{held[0]}' holds nothing (null) in the place of an image")
    return found


def check_columns(columns: Sequence[str], where: str) -> None:
    """Raise DataError when a needed column is missing, naming the ones that are there."""
    for name in SIDES:
        if name not in columns:
            hint = did_you_mean(name, columns) or "; if it has another name, give that in the setting columns"
            raise DataError(f"{where}: no column '{name}'; it has {', '.join(columns) or 'none'}{hint}")
    if "prompt" not in columns:
        others = [name for name in columns if name not in COLUMNS and not name.endswith("id")]
        like = next((name for name in PROMPT_LIKE if name in others), None)
        hint = f" (did you mean '{like}'?)" if like is not None else did_you_mean("prompt", others)
        if hint:
            raise DataError(
                f"{where}: no column 'prompt'; it has {', '.join(columns)}{hint}; name it by the setting columns, as in "
                "columns: {prompt: question}, or leave it out where chosen and rejected hold the prompt"
            )
    if (REFERENCE[0] in columns) != (REFERENCE[1] in columns):
        missing = REFERENCE[0] if REFERENCE[0] not in columns else REFERENCE[1]
        raise DataError(f"{where}: no column '{missing}'; reference log-probabilities come in pairs")


def check_whole_texts(row: Mapping[str, Any], where: str) -> None:
    """Raise DataError where another column of a text row without a prompt seems to be it."""
    check_columns(list(row), where)
    if like := next((name for name in PROMPTS_OF_TEXTS if name in row), None):
        raise DataError(
            f"{where}: no column 'prompt', and '{like}' may be it; name it by the setting columns, as in "
            f"columns: {{prompt: {like}}}, or remove it where chosen and rejected hold the prompt"
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
    """The text of a column `system`, "" where the row has none in it; None without the column."""
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
            raise DataError(f"{where}: 'chat_template_kwargs' cannot hold '{name}', which the trainer sets")
    return (found if isinstance(kwargs, str) else _without_nothing(found)) or {}


def _check_parts(parts: list[Any], message: str, where: str) -> None:
    """Parts of a message are {"type": "text", "text": ...} and {"type": "image"}."""
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
                f"{where}: part {number} of {message} holds its image in '{held[0]}'; images belong in the column 'images', "
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
    """A finite number as a float; a weight is not negative. Raises DataError with the column's name."""
    number = math.nan
    if isinstance(value, Real) and not isinstance(value, bool):
        with contextlib.suppress(OverflowError):  # of integers that no float can hold
            number = float(value)
    if not math.isfinite(number):
        raise DataError(f"{where}: '{name}' must be a finite number, found {_shown(value)}")
    if name == "weight" and number < 0:
        raise DataError(f"{where}: 'weight' must not be negative, found {value}")
    return number


def json_type(value: Any) -> str:
    """How to name a value's type to a person, for instance "a list"."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true/false", int: "a number", float: "a number"}
    return "nothing (null)" if value is None else names.get(type(value), type(value).__name__)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _without_nothing(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_nothing(item) for item in value]
    if isinstance(value, str) or not isinstance(value, Mapping):  # nearly all are texts, and Mapping is slow to ask for
        return value
    return {key: _without_nothing(item) for key, item in value.items() if item is not None}


def shared_prefix(a: Sequence[Any], b: Sequence[Any]) -> int:
    """How many items two sequences have in common at their beginning."""
    # By halving, because slices are compared at C speed.
    return bisect_left(range(1, min(len(a), len(b)) + 1), True, key=lambda count: a[:count] != b[:count])
