"""Token ids of a pair of texts or conversations: the prompt boundary, the chat template, truncation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .rows import SIDES, Pair, parse_row, shared_prefix
from .template import as_chat, options_of, render_chat, scored_tokens

#: The columns of a tokenised pair.
TOKENS = ("prompt_ids", "chosen_ids", "rejected_ids")
#: Columns that say for each token of a completion whether it is scored. They exist if some tokens are not scored.
MASKS = ("chosen_mask", "rejected_mask")


def tokenize_pair(
    pair: Pair | Mapping[str, Any],
    tokenizer: Any,
    *,
    max_length: int | None = None,
    max_prompt_length: int | None = None,
    truncation_mode: str = "keep_end",
    append_eos: bool = True,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    assistant_only_loss: bool = True,
) -> dict[str, list[Any]]:
    """Token ids of one pair, or of one row: `prompt_ids`, `chosen_ids`, `rejected_ids`.

    If some tokens of the completions are not scored, the result also has `chosen_mask` and `rejected_mask`, one bool for
    each token.

    Prompt and completion are joined before they are tokenised. Tokenised apart, they could give tokens that no generation
    produces (" great" after a prompt that ends in a space). The tokens of the prompt are those that the prompt's own
    tokenisation shares with *both* joined texts. Usually these are all of the prompt's tokens. A token that spans the
    boundary belongs to the completions. So both completions of a pair follow exactly the same prompt tokens.

    The end-of-sequence token is appended to a text completion that does not end with it. Set `append_eos` to false for
    completions that were cut off, which do not teach where to stop. Chat rows are rendered by the tokenizer's chat
    template, which also decides how a turn ends and how `tools` are written. `split_row` splits rows without a prompt. The
    messages of users and tools in a completion are not scored, unless `assistant_only_loss` is false.

    Truncation to `max_length` (see `truncate`) comes last.
    """
    if not isinstance(pair, Pair):
        pair = parse_row(pair, "row")
    pair = as_chat(pair, tokenizer)
    start, completions = pair.prompt, (pair.chosen, pair.rejected)
    if isinstance(start, str):
        prompt = tokenizer(start)["input_ids"]
        sides = [tokenizer(start + completion)["input_ids"] for completion in completions]
        end = tokenizer.eos_token_id
        if append_eos and end is not None:
            sides = [ids if ids and ids[-1] == end else [*ids, end] for ids in sides]
    else:
        options = options_of(pair, chat_template_kwargs)
        rendered = [
            render_chat(tokenizer, start, side, pair.where, options=options, answers_only=assistant_only_loss)
            for side in completions
        ]
        # The template writes the special tokens itself. It may render the start of the two answers differently, so the
        # shorter prompt of the two is the shared one.
        prompt_text = min((found.prompt for found in rendered), key=len)
        prompt = tokenizer(prompt_text, add_special_tokens=False)["input_ids"]
        sides = [tokenizer(found.full, add_special_tokens=False)["input_ids"] for found in rendered]

    boundary = min(shared_prefix(prompt, ids) for ids in sides)
    masks: list[list[bool]] = []
    if not isinstance(start, str) and assistant_only_loss:
        masks = [scored_tokens(tokenizer, *side, boundary, options) for side in zip(rendered, sides, strict=True)]
    cut = truncate(
        prompt[:boundary],
        *(ids[boundary:] for ids in sides),
        max_length=max_length,
        max_prompt_length=max_prompt_length,
        mode=truncation_mode,
        bos_token_id=getattr(tokenizer, "bos_token_id", None),
    )
    found = dict(zip(TOKENS, cut, strict=True))
    cut_masks = [mask[: len(side)] for mask, side in zip(masks, cut[1:], strict=False)]
    return found if all(map(all, cut_masks)) else {**found, **dict(zip(MASKS, cut_masks, strict=True))}


def scored_counts(rows: Any) -> list[list[int]]:
    """Two lists with the number of scored tokens in each row: of the chosen and of the rejected completions.

    Args:
        rows: a dataset of tokenised pairs, or a mapping of its columns to lists.
    """
    masked = MASKS[0] in (rows.column_names if hasattr(rows, "column_names") else rows)
    firsts = [not prompt for prompt in rows[TOKENS[0]]]  # a first token cannot be scored: no token precedes it
    return [
        [
            sum(side[first:]) if masked else max(len(side) - first, 0)
            for side, first in zip(rows[name], firsts, strict=True)
        ]
        for name in (MASKS if masked else [f"{side}_ids" for side in SIDES])
    ]


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

    The prompt is first cut to `max_prompt_length`. Mode `keep_end` then drops tokens from the start of the prompt until
    the longer completion fits or one token of the prompt remains; `keep_start` does not. A side that is still too long
    loses the end of its completion. A leading BOS token stays, unless `keep_end` leaves one token of the prompt. Both sides
    always have the same prompt, because log-probabilities after different prompts cannot be compared.
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
