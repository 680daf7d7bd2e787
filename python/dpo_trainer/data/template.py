"""The chat template: rendering of prompt and answer, the tokens that are scored, and the choice of the template."""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import TemplateError, TemplateSyntaxError

from ..errors import ConfigError, DataError, did_you_mean, first_line
from .messages import NOT_ANSWERS
from .rows import Pair, shared_prefix

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
#: Errors that templates, which run code of their own, raise for messages that they do not accept.
_REFUSALS = (TemplateError, KeyError, IndexError, TypeError, ValueError, AttributeError)


#: Names of a message's reasoning. transformers passes it to templates under all of these names.
_THOUGHTS = {"reasoning", "reasoning_content", "thinking"}
#: Number of characters that are compared to find where a text continues after a part of it was left out.
_SURE = 8


class Rendered(NamedTuple):
    """A conversation as text.

    Attributes:
        prompt: the prompt, with the generation prompt; `full` begins with it.
        full: prompt and completion.
        unscored: (start, end) of the parts of `full` that are messages of users and tools within the completion.
        messages: the messages of `full`.
    """

    prompt: str
    full: str
    unscored: list[tuple[int, int]]
    messages: list[Any]


def as_chat(pair: Pair, tokenizer: Any) -> Pair:
    """Convert a text pair with a system text to chat messages. Any other pair is returned unchanged.

    If the tokenizer has no chat template, the system text is joined to the prompt instead.
    """
    if pair.system is None:
        return pair
    values = dict(vars(pair), system=None)
    if getattr(tokenizer, "chat_template", None) is not None:
        prompt = [{"role": "system", "content": pair.system}] if pair.system else []
        values["prompt"] = [*prompt, {"role": "user", "content": pair.prompt}]
        values |= {side: [{"role": "assistant", "content": values[side]}] for side in ("chosen", "rejected")}
    else:
        values["prompt"] = "\n\n".join(filter(None, (pair.system, pair.prompt))) + "\n\n"
    return Pair(**values)


def options_of(pair: Pair, run: Mapping[str, Any] | None) -> dict[str, Any]:
    """The template's arguments: those of the run, those of the row, which take precedence, and the tools."""
    options = {**(run or {}), **pair.template_kwargs}
    return options if pair.tools is None else {**options, "tools": pair.tools}


def render_chat(
    tokenizer: Any,
    prompt: list[Any],
    completion: list[Any],
    where: str,
    *,
    options: Mapping[str, Any] | None = None,
    answers_only: bool = False,
) -> Rendered:
    """Render prompt and completion with the chat template.

    Some templates render the start of an answer in two ways, for instance with and without an empty thinking block. The
    common part then counts as the prompt, as long as it contains all of the prompt's messages.

    Args:
        options: arguments of the template, see `options_of`.
        answers_only: find the messages of users and tools within the completion.

    Raises:
        DataError: there is no chat template, or it refuses these messages. Or it changes the prompt once an answer
            follows. Or it changes an answer once a user or tool follows, so that the answer's end cannot be found.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        raise DataError(
            f"{where}: rows are chat messages but the tokenizer has no chat template; use text or set chat_template_path"
        )
    render = functools.partial(tokenizer.apply_chat_template, tokenize=False, **(options or {}))
    messages, answered = [*prompt, *completion], bool(completion) and completion[0]["role"] not in NOT_ANSWERS
    begin = len(prompt)
    try:
        open_turn = answered and begin > 0 and prompt[-1]["role"] == "assistant"
        if open_turn:  # the completion continues the assistant's message
            head, *rest = completion
            said = prompt[-1].get("content") or ""
            messages = [*prompt[:-1], {**prompt[-1], **head, "content": said + (head.get("content") or "")}, *rest]
            begin -= 1
            prompt_text = render(prompt, continue_final_message=True)
        else:
            prompt_text = render(prompt, add_generation_prompt=answered or not completion)
        full_text = render(messages)
        bare = prompt_text if open_turn or full_text.startswith(prompt_text) else render(prompt)
        if not full_text.startswith(bare):
            raise DataError(
                f"{where}: the chat template renders the prompt differently once an answer follows it, "
                "so the answer's tokens cannot be told apart; use another template, or text rows"
            )
        unscored = _others(render, messages, begin, full_text, where) if answers_only else []
    except DataError:
        raise
    except _REFUSALS as error:
        raise DataError(
            f"{where}: the chat template refuses these messages: {first_line(error)} (chat_template_path sets another)"
        ) from error
    return Rendered(full_text[: shared_prefix(prompt_text, full_text)], full_text, unscored, messages)


def _others(
    render: Callable[..., str], messages: list[Any], begin: int, full: str, where: str
) -> list[tuple[int, int]]:
    """(start, end) in the text of the messages of users and tools, from message `begin` on. Each ends at the next answer."""
    found = []
    roles = [message["role"] in NOT_ANSWERS for message in messages]
    number = begin
    while number < len(messages):
        if not roles[number]:
            number += 1
            continue
        end = number
        while end < len(messages) and roles[end]:
            end += 1
        start, stop = _place(render(messages[:number]), full, messages[number - 1]), len(full)
        if end < len(messages):
            before = render(messages[:end])
            opened = render(messages[:end], add_generation_prompt=True)
            after = _place(before, full, messages[end - 1])
            header = opened[len(before) :] if opened.startswith(before) else ""
            stop = -1 if after is None else after + shared_prefix(header, full[after:])
        if start is None or stop < start:
            raise DataError(
                f"{where}: the chat template renders an answer differently once message {number + 1} follows it, so the words "
                "of users and tools cannot be told from the answers; use a template with {% generation %}, or set "
                "assistant_only_loss: false to train on all of them"
            )
        found.append((start, stop))
        number = end
    return found


def _place(part: str, full: str, last: Mapping[str, Any]) -> int | None:
    """Where the first messages, rendered alone in `part`, end in the text of all messages; None if that is unknown.

    A template may leave out parts of an answer, such as its reasoning, once another message follows. Such parts of `part`
    are skipped, but not in the content of the last message and the text after it.
    """
    content = str(last.get("content") or "").strip()
    tail = part[part.rfind(content) :] if content in part and content else part[-_SURE:]

    def aligned(at: int, place: int) -> int | None:
        """The end of `part` in `full`, given that `part[at:]` corresponds to `full[place:]`."""
        same = shared_prefix(part[at:], full[place:])
        at, place = at + same, place + same
        if at == len(part):
            return place if full[:place].endswith(tail) else None
        for after in range(at + 1, len(part) - len(tail) + 1):
            ahead = part[after : after + _SURE]
            if full.startswith(ahead, place) and (end := aligned(after, place)) is not None:
                return end
        return None

    return aligned(0, 0)


def scored_tokens(
    tokenizer: Any, rendered: Rendered, ids: list[int], boundary: int, options: Mapping[str, Any]
) -> list[bool]:
    """Whether each token of the completion, which begins at `boundary`, is scored.

    The template's marks `{% generation %}` decide it if the completion has any. Otherwise all tokens except those of
    `unscored` are scored.
    """
    if _marks(tokenizer, options):
        made = tokenizer.apply_chat_template(
            rendered.messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, **options
        )
        marked = [bool(mark) for mark in made["assistant_masks"]][boundary:]
        if made["input_ids"] == ids and any(marked):
            return marked
    scored = [True] * len(ids)
    for span in rendered.unscored:
        start, end = (
            shared_prefix(tokenizer(rendered.full[:place], add_special_tokens=False)["input_ids"], ids)
            for place in span
        )
        scored[start:end] = [False] * (end - start)
    return scored[boundary:]


def _marks(tokenizer: Any, options: Mapping[str, Any]) -> bool:
    return getattr(tokenizer, "is_fast", False) and _GENERATION.search(template_text(tokenizer, options)) is not None


def template_text(tokenizer: Any, options: Mapping[str, Any]) -> str:
    """The template that is used. A tokenizer may have several."""
    if isinstance(tokenizer.chat_template, str):
        return tokenizer.chat_template
    return tokenizer.get_chat_template(None, options.get("tools"))


# --- choice of the template ----------------------------------------------------------------------------------------


def with_chat_template(tokenizer: Any, path: str | None) -> Any:
    """A copy of the tokenizer with another chat template. Without a path, the tokenizer itself.

    Args:
        path: a file with a template, or the folder of a tokenizer that has one.

    Raises:
        ConfigError: there is no template at `path`, or it is not a Jinja template.
    """
    if path is None:
        return tokenizer
    place = Path(path).expanduser()
    try:
        if place.is_dir():
            from transformers import AutoTokenizer

            template = AutoTokenizer.from_pretrained(str(place)).chat_template
        else:
            template = place.read_text(encoding="utf-8")
    except (OSError, ValueError, KeyError) as error:
        why = getattr(error, "strerror", None) or first_line(error)
        raise ConfigError(f"chat_template_path: '{path}' cannot be read ({why})") from error
    if not template:
        raise ConfigError(f"chat_template_path: '{path}' contains no chat template")
    tokenizer = copy.copy(tokenizer)
    tokenizer.chat_template = template
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    except TemplateSyntaxError as error:
        raise ConfigError(f"chat_template_path: '{path}' is not a Jinja template ({first_line(error)})") from error
    except _REFUSALS:
        pass  # rows show later which messages it accepts
    return tokenizer


def remarks(tokenizer: Any, pairs: Sequence[Pair], run: Mapping[str, Any] | None, answer: Sequence[int]) -> list[str]:
    """Remarks on the template for the log, one line each.

    Args:
        pairs: some pairs of chat messages.
        run: the template's arguments for all rows.
        answer: the scored tokens of the first pair's chosen answer, not truncated.
    """
    text = template_text(tokenizer, options_of(pairs[0], run))
    words = set(re.findall(r"\w+", text))
    told = {name for pair in pairs for name in pair.template_kwargs}.union(run or ())
    said = [
        f"chat_template_kwargs: the chat template does not use '{name}'{did_you_mean(name, words)}"
        for name in sorted(told - words)
    ]
    messages = [message for pair in pairs for side in (pair.prompt, pair.chosen, pair.rejected) for message in side]
    written = {name for message in messages for name in message if message[name]} - words - {"role", "content"}
    unused = sorted(written - (_THOUGHTS if _THOUGHTS & words else set()))
    unused += ["tools"] if "tools" not in words and any(pair.tools for pair in pairs) else []
    if unused:
        said.append(f"the chat template does not use the rows' {', '.join(unused)}; the model will not see it")
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    ends = [number for number in answer if tokenizer.decode([number]).strip() or number in special]
    if ends and ends[-1] not in special | set(tokenizer.all_special_ids):
        said.append(
            "the chat template writes no end token after an answer, so nothing teaches the model where to stop; add the "
            "end-of-sequence token to the template"
        )
    return said
