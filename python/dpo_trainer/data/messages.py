"""Messages as data sets write them, in one form: objects with `role`, `content`, which is text, and perhaps `tool_calls`."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from typing import Any

from ..errors import DataError

#: ShareGPT's names of the roles, in `from`.
ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "function_response": "tool",
    "observation": "tool",
    "function_call": "assistant",
}
#: Those of them that also stand in `role` for templates' names. Others are names of some template.
_SPEAKERS = frozenset(("human", "gpt", "chatgpt", "bing", "bard", "bot", "model", "user", "assistant", "system"))
#: Roles whose words are no answer of the model's.
NOT_ANSWERS = frozenset({"system", "developer", "user", "tool", "function", "ipython", "environment", "observation"})
#: What is kept as JSON text where rows become a table, which would give all objects the union of their keys.
_AS_TEXT: dict[str, Any] = {"tools": list, "arguments": Mapping, "chat_template_kwargs": Mapping}


def plain(value: Any, name: str, where: str) -> Any:
    """A text, or a list of messages in one form. What is neither is returned as it is.

    A single message stands for a list of it, and JSON text of messages for the messages. ShareGPT's `from` and `value`
    become `role` and `content`, and roles such as `human` and `gpt` the names that templates know. Content that is a list
    of text parts becomes their text.

    Args:
        name: of the column, for messages to a person.
        where: how to name the row to a person.

    Raises:
        DataError: a part of the content is no text, `from` is no known role, or a text is Python's way to print messages.
    """
    if isinstance(value, str):
        if value.lstrip("[ \n").startswith(("{'role'", "{'from'", "{'content'", "{'value'")):
            raise DataError(f"{where}: '{name}' holds messages as Python prints them; write them as JSON (json.dumps)")
        value = opened(value)
    if isinstance(value, Mapping) and _is_message(value):
        value = [value]
    if isinstance(value, list):
        return [_message(item, f"message {number} of '{name}'", where) for number, item in enumerate(value, 1)]
    return value


def _is_message(value: Any) -> bool:
    if not isinstance(value, Mapping):
        return False
    said = value.get("content") is not None or value.get("tool_calls") is not None
    return (isinstance(value.get("role"), str) and said) or (isinstance(value.get("from"), str) and "value" in value)


def opened(text: Any) -> Any:
    """The messages that a text holds as JSON; anything else as it is."""
    if isinstance(text, str) and text.lstrip()[:1] in ("[", "{"):
        with contextlib.suppress(ValueError):
            value = json.loads(text)
            found = value if isinstance(value, list) else [value]
            return as_written(value) if found and all(map(_is_message, found)) else text
    return text


def _message(message: Any, which: str, where: str) -> Any:
    if not isinstance(message, Mapping):
        return message
    if message.get("role") is None and isinstance(sender := message.get("from"), str):
        if sender.lower() not in ROLES:
            raise DataError(
                f"{where}: {which} is from '{sender}', which is no known role; known are {', '.join(ROLES)}"
            )
        rest = {key: item for key, item in message.items() if key not in ("from", "value", "role")}
        call = _call(message.get("value")) if sender.lower() == "function_call" else None
        said = {"content": message.get("value")} if call is None else {"tool_calls": call}
        message = {"role": ROLES[sender.lower()], **said, **rest}
    if _renamed(message):
        message = {**message, "role": ROLES[message["role"].lower()]}
    content = message.get("content")
    if not isinstance(content, list) or any(
        isinstance(part, Mapping) and part.get("type") == "image" for part in content
    ):
        return message  # where it has images, `rows` checks its parts
    return {**message, "content": _text_of(content, which, where)}


def _renamed(message: Mapping[str, Any]) -> bool:
    """Whether the role of a message is one that templates know by another name, or in small letters."""
    role = message.get("role")
    return isinstance(role, str) and role.lower() in _SPEAKERS and ROLES[role.lower()] != role


def _call(text: Any) -> list[Any] | None:
    """ShareGPT's function_call, JSON text of a name and arguments, or of several, as tool calls; None where it is none."""
    with contextlib.suppress(ValueError, TypeError):
        value = json.loads(text)
        calls = value if isinstance(value, list) else [value]
        if calls and all(isinstance(call, Mapping) and "name" in call for call in calls):
            return [as_written({"type": "function", "function": call}) for call in calls]
    return None


def past_turns(value: Any, where: str) -> list[Any]:
    """The messages of a column `history`: [question, answer] of each earlier turn, or the JSON text of them."""
    turns = _json_or_itself(value) or []
    if not isinstance(turns, list) or not all(
        isinstance(turn, list) and len(turn) == 2 and all(isinstance(said, str) for said in turn) for turn in turns
    ):
        raise DataError(f"{where}: 'history' must be a list of [question, answer], one for each earlier turn")
    roles = ("user", "assistant")
    return [{"role": role, "content": said} for turn in turns for role, said in zip(roles, turn, strict=True)]


def _json_or_itself(value: Any) -> Any:
    with contextlib.suppress(ValueError, TypeError):
        return json.loads(value)
    return value


def _text_of(parts: list[Any], which: str, where: str) -> str:
    """The text of content that is given in parts, one after the other."""
    texts = []
    for part in parts:
        kind = part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__
        text = part.get("text") if isinstance(part, Mapping) else None
        if kind not in ("text", "input_text", "output_text") or not isinstance(text, str):
            raise DataError(
                f"{where}: {which} has a part of type '{kind}' in 'content'; only text and images can be trained on, and an "
                'image\'s part is {"type": "image"}, with the image in the column \'images\''
            )
        texts.append(text)
    return "".join(texts)


def forms_of(value: Any) -> list[str]:
    """In words, what `plain` would change about a prompt or completion."""
    forms = []
    if isinstance(value, str) and isinstance(read := opened(value), list | dict):
        forms, value = ["JSON text"], read
    if _is_message(value):
        forms, value = [*forms, "a single message"], [value]
    messages = [item for item in value if isinstance(item, Mapping)] if isinstance(value, list) else []
    if any(message.get("role") is None and "from" in message for message in messages):
        forms.append("'from' and 'value'")
    if other := next((message["role"] for message in messages if _renamed(message)), None):
        forms.append(f"role '{other}'")
    if any(isinstance(message.get("content"), list) for message in messages):
        forms.append("content in parts")
    return forms


def as_written(value: Any) -> Any:
    """A row with tools, arguments of tool calls and `chat_template_kwargs` as JSON text, for a table or a line of it."""
    if isinstance(value, str):  # as most are, and Mapping is slow to ask for
        return value
    if isinstance(value, Mapping):
        return {
            key: json.dumps(item) if isinstance(item, _AS_TEXT.get(key, ())) else as_written(item)
            for key, item in value.items()
        }
    return [as_written(item) for item in value] if isinstance(value, list) else value


def with_arguments(message: Any) -> Any:
    """A message whose tool calls have their arguments as objects: templates write them as JSON, which would encode text twice.

    Arguments that are not the JSON text of an object stay as they are.
    """
    if not (isinstance(message, Mapping) and isinstance(message.get("tool_calls"), list)):
        return message

    def called(call: Any) -> Any:
        if not isinstance(call, Mapping):
            return call
        if isinstance(call.get("function"), Mapping):
            return {**call, "function": called(call["function"])}
        with contextlib.suppress(ValueError, TypeError):
            if isinstance(arguments := json.loads(call.get("arguments")), dict):  # type: ignore[arg-type]
                return {**call, "arguments": arguments}
        return call

    return {**message, "tool_calls": [called(call) for call in message["tool_calls"]]}
