"""Conversion of messages to their standard form: objects with `role`, `content` (text) and perhaps `tool_calls`."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from typing import Any

from ..errors import DataError

#: ShareGPT's names of the roles (its key `from`), with the role that templates know.
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
#: ShareGPT's names that are converted in `role` too. The rest are left as they are, since some template knows them.
_SPEAKERS = frozenset(("human", "gpt", "chatgpt", "bing", "bard", "bot", "model", "user", "assistant", "system"))
#: Roles of messages that are not the model's answers.
NOT_ANSWERS = frozenset({"system", "developer", "user", "tool", "function", "ipython", "environment", "observation"})
#: Keys whose values are stored as JSON text in a table, which would give all objects the union of their keys.
_AS_TEXT: dict[str, Any] = {"tools": list, "arguments": Mapping, "chat_template_kwargs": Mapping}


def plain(value: Any, name: str, where: str) -> Any:
    """Convert messages to their standard form. Texts, and values that are not messages, are returned unchanged.

    A single message becomes a list, and JSON text of messages becomes the messages. ShareGPT's `from` and `value` become
    `role` and `content`. Roles such as `human` and `gpt` become the names that templates know. Content that is a list of
    text parts becomes one text.

    Args:
        name: the column's name in error messages.
        where: the row's name in error messages.

    Raises:
        DataError: a part of the content is not text, `from` is not a known role, or a text contains messages as Python
            prints them.
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
    """The messages of a JSON text. Any other value is returned unchanged."""
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
                f"{where}: {which} is from '{sender}', which is not a known role; known are {', '.join(ROLES)}"
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
        return message  # `rows` checks the parts of a message with images
    return {**message, "content": _text_of(content, which, where)}


def _renamed(message: Mapping[str, Any]) -> bool:
    """Whether templates know the role of a message by another name, or in lower case."""
    role = message.get("role")
    return isinstance(role, str) and role.lower() in _SPEAKERS and ROLES[role.lower()] != role


def _call(text: Any) -> list[Any] | None:
    """The tool calls of ShareGPT's function_call: JSON text of one or more objects with name and arguments. Else None."""
    with contextlib.suppress(ValueError, TypeError):
        value = json.loads(text)
        calls = value if isinstance(value, list) else [value]
        if calls and all(isinstance(call, Mapping) and "name" in call for call in calls):
            return [as_written({"type": "function", "function": call}) for call in calls]
    return None


def past_turns(value: Any, where: str) -> list[Any]:
    """The messages of a column `history`: a list with [question, answer] for each earlier turn, or its JSON text."""
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
    """The joined text of content that is a list of parts."""
    texts = []
    for part in parts:
        kind = part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__
        text = part.get("text") if isinstance(part, Mapping) else None
        if kind not in ("text", "input_text", "output_text") or not isinstance(text, str):
            raise DataError(
                f"{where}: {which} has a part of type '{kind}' in 'content'; only text and images can be trained on; an "
                'image\'s part is {"type": "image"}, with the image in the column \'images\''
            )
        texts.append(text)
    return "".join(texts)


def forms_of(value: Any) -> list[str]:
    """Names of the forms in a prompt or completion that `plain` would change."""
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
    """A value in the form for a table: tools, arguments of tool calls and `chat_template_kwargs` are JSON text."""
    if isinstance(value, str):  # most values are texts, and a test for Mapping is slow
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
