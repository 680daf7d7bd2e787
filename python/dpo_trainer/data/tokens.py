"""From a pair of texts or conversations to token ids: the prompt boundary, the chat template, truncation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .rows import SIDES, Pair, parse_row, shared_prefix
from .template import as_chat, options_of, render_chat, scored_tokens

#: The columns of a tokenised pair.
TOKENS = ("prompt_ids", "chosen_ids", "rejected_ids")
#: Whether each token of a completion is scored; columns of pairs of which some are not.
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
    """Token ids of one pair, or of the row that holds one: `prompt_ids`, `chosen_ids`, `rejected_ids`.

    Where some tokens of the completions are not to be scored, also `chosen_mask` and `rejected_mask`, a bool for each token.

    Prompt and completion are tokenised together, because that is how the text reads: cutting first would give
    tokens no generation produces (" great" after a prompt that ends in a space). The prompt then owns the tokens that
    its own tokenisation shares with *both* joined ones. Usually these are all of them; where a token straddles the
    boundary, it belongs to the completions. Both completions of a pair so answer the same prompt, to the token.

    Text completions get the end-of-sequence token unless they end in it, or `append_eos` is false: then they end as
    the tokenizer leaves them, for completions that were cut off and do not teach where to stop. Chat rows are rendered
    by the tokenizer's chat template, which also decides how a turn ends and what becomes of `tools`. Rows without a prompt
    are split as `split_row` says. What users and tools say within a completion of chat messages is not scored, unless
    `assistant_only_loss` is false.

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
        # The template writes the special tokens itself. A template may treat an answer's start specially: the shorter
        # prompt of the two is the shared one.
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
    """How many tokens of each row's completions are scored, of the chosen ones and of the rejected ones.

    Args:
        rows: a dataset of tokenised pairs, or a mapping of its columns to lists.
    """
    masked = MASKS[0] in (rows.column_names if hasattr(rows, "column_names") else rows)
    firsts = [not prompt for prompt in rows[TOKENS[0]]]  # a first token has nothing to be predicted from
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
