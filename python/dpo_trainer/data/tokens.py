"""From a pair of texts or conversations to token ids: the prompt boundary, the chat template, truncation."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from jinja2 import TemplateError

from ..errors import DataError, first_line
from .rows import Pair, parse_row, shared_prefix

#: The columns of a tokenised pair.
TOKENS = ("prompt_ids", "chosen_ids", "rejected_ids")


def tokenize_pair(
    pair: Pair | Mapping[str, Any],
    tokenizer: Any,
    *,
    max_length: int | None = None,
    max_prompt_length: int | None = None,
    truncation_mode: str = "keep_end",
    append_eos: bool = True,
) -> dict[str, list[int]]:
    """Token ids of one pair, or of the row that holds one: `prompt_ids`, `chosen_ids`, `rejected_ids`.

    Prompt and completion are tokenised together, because that is how the text reads: cutting first would give
    tokens no generation produces (" great" after a prompt that ends in a space). The prompt then owns the tokens that
    its own tokenisation shares with *both* joined ones. Usually these are all of them; where a token straddles the
    boundary, it belongs to the completions. Both completions of a pair so answer the same prompt, to the token.

    Text completions get the end-of-sequence token unless they end in it, or `append_eos` is false: then they end as
    the tokenizer leaves them, for completions that were cut off and do not teach where to stop. Chat rows are rendered
    by the tokenizer's chat template, which also decides how a turn ends and what becomes of `tools`. Rows without a prompt
    are split as `split_row` says.

    Truncation to `max_length` (see `truncate`) comes last.
    """
    if not isinstance(pair, Pair):
        pair = parse_row(pair, "row")
    start, completions = pair.prompt, (pair.chosen, pair.rejected)
    if isinstance(start, str):
        prompt = tokenizer(start)["input_ids"]
        sides = [tokenizer(start + completion)["input_ids"] for completion in completions]
        end = tokenizer.eos_token_id
        if append_eos and end is not None:
            sides = [ids if ids and ids[-1] == end else [*ids, end] for ids in sides]
    else:
        texts = [render_chat(tokenizer, start, completion, pair.where, tools=pair.tools) for completion in completions]
        # The template writes the special tokens itself. A template may treat an answer's start specially: the shorter
        # prompt of the two is the shared one.
        prompt_text = min((prompt_text for prompt_text, _ in texts), key=len)
        prompt = tokenizer(prompt_text, add_special_tokens=False)["input_ids"]
        sides = [tokenizer(text, add_special_tokens=False)["input_ids"] for _, text in texts]

    boundary = min(shared_prefix(prompt, ids) for ids in sides)
    cut = truncate(
        prompt[:boundary],
        *(ids[boundary:] for ids in sides),
        max_length=max_length,
        max_prompt_length=max_prompt_length,
        mode=truncation_mode,
        bos_token_id=getattr(tokenizer, "bos_token_id", None),
    )
    return dict(zip(TOKENS, cut, strict=True))


def render_chat(
    tokenizer: Any, prompt: list[Any], completion: list[Any], where: str, *, tools: list[Any] | None = None
) -> tuple[str, str]:
    """Text of the prompt (with the generation prompt) and of prompt + completion, the first a prefix of the second.

    Some templates render the start of an answer in two ways (an empty thinking block, say); then the common part counts
    as the prompt, as long as it holds all of its messages. `tools` go to the template as they are.

    Raises:
        DataError: no chat template, a template that refuses these messages, or one that changes the prompt once an
            answer follows.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        raise DataError(f"{where}: rows are chat messages but the tokenizer has no chat template; use text or set one")
    options: dict[str, Any] = {"tokenize": False} if tools is None else {"tokenize": False, "tools": tools}
    render = functools.partial(tokenizer.apply_chat_template, **options)
    try:
        open_turn = prompt[-1]["role"] == "assistant" and bool(completion)
        prompt_text = render(prompt, **{"continue_final_message" if open_turn else "add_generation_prompt": True})
        if open_turn:  # the completion goes on with the assistant's message
            head, *rest = completion
            joined = {**prompt[-1], "content": prompt[-1]["content"] + (head.get("content") or "")}
            full_text = render([*prompt[:-1], joined, *rest])
        else:
            full_text = render([*prompt, *completion])
        bare = prompt_text if open_turn or full_text.startswith(prompt_text) else render(prompt)
    except (TemplateError, KeyError, TypeError, ValueError, AttributeError) as error:  # templates run code of their own
        raise DataError(f"{where}: the chat template refuses these messages: {first_line(error)}") from error
    if not full_text.startswith(bare):
        raise DataError(
            f"{where}: the chat template renders the prompt differently once an answer follows it, "
            "so the answer's tokens cannot be told apart; use another template, or text rows"
        )
    return full_text[: shared_prefix(prompt_text, full_text)], full_text


def truncate(
    prompt: list[int],
    chosen: list[int],
    rejected: list[int],
    *,
    max_length: int | None,
    max_prompt_length: int | None,
    mode: str,
    bos_token_id: int | None = None,
) -> tuple[list[int], list[int], list[int]]:
    """Cut a pair so that prompt + completion has at most `max_length` tokens on either side.

    The prompt is first cut to `max_prompt_length`. Then `keep_end` drops the start of the prompt, by the same amount
    for both sides, as far as the longer completion asks for and a single token remains; `keep_start` leaves the prompt.
    What is still too long loses the end of its completion. A leading BOS survives any cut of the prompt.
    The two sides always keep the same prompt: log-probabilities after different prompts could not be compared.
    """

    def cut_prompt(length: int) -> list[int]:
        if len(prompt) <= length:
            return prompt
        if mode == "keep_start":
            return prompt[:length]
        if length > 1 and bos_token_id is not None and prompt[0] == bos_token_id:
            return [prompt[0], *prompt[len(prompt) - length + 1 :]]
        return prompt[len(prompt) - length :]

    if max_prompt_length is not None:
        prompt = cut_prompt(max_prompt_length)
    if max_length is not None:
        if mode == "keep_end":
            prompt = cut_prompt(max(max_length - max(len(chosen), len(rejected)), 1))
        room = max(max_length - len(prompt), 0)
        prompt, chosen, rejected = prompt[:max_length], chosen[:room], rejected[:room]
    return prompt, chosen, rejected
