"""The account of a dataset: how many rows are kept, held out or dropped, and how many evaluation pairs are trained on."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import ConfigError
from . import FILTERS as FILTERS
from .tokens import TOKENS

#: Why a pair with images is dropped, whatever `filters` says: the model would not find its image tokens.
CUT_IMAGES = "whose images max_length or max_prompt_length would cut"
#: Name of the column with a digest of a pair's tokens and images.
CONTENT = "digest"
#: Name of the column with a digest of a pair's prompt: its text or messages, its system text and its images.
PROMPT = "prompt_digest"
#: Columns that the account needs besides the tokens.
MARKS = ("status", CONTENT, "tokens", "repeats", "unscored")

#: (row, status, digest, number of tokens, weight). The status is a name of FILTERS, CUT_IMAGES, or "".
Marked = tuple[Any, str, str, int, float | None]


@dataclass
class Account:
    """Counts of a dataset's rows that were kept, held out or dropped.

    Attributes:
        rows: rows read. For a stream, those of its first pass so far.
        tokens: tokens of the pairs that were kept, with the prompt counted for both sides.
        reasons: number of dropped rows by reason (the values of FILTERS, CUT_IMAGES, and the least weight).
        streamed: whether more rows may follow.
        remarks: more that users should know about the data, one line each.
        trained_on: number of pairs of an evaluation dataset that are training pairs too.
        prompts_trained_on: number of pairs of an evaluation dataset that are not training pairs, but have the prompt of a
            training pair.
        held_out: number of pairs that `val_split` has moved to the evaluation dataset.
    """

    name: str
    rows: int = 0
    tokens: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    streamed: bool = False
    remarks: list[str] = field(default_factory=list)
    trained_on: int = 0
    prompts_trained_on: int = 0
    held_out: int = 0

    @property
    def dropped(self) -> int:
        return sum(self.reasons.values())

    @property
    def kept(self) -> int:
        return self.rows - self.dropped - self.held_out

    def describe(self) -> str:
        """One line for the log: how many rows are kept, and why the rest were dropped."""
        parts = [f"{count:,} {reason}" for reason, count in self.reasons.items() if count]
        tail = f"; dropped {', '.join(parts[:-1])}{' and ' if parts[1:] else ''}{parts[-1]}" if parts else ""
        tail = f", {self.held_out:,} held out{tail}" if self.held_out else tail
        so_far = " so far (a stream)" if self.streamed else ""
        return f"{self.name}: {self.kept:,} of {self.rows:,} pairs kept{so_far}, {self.tokens:,} tokens{tail}"


def sift(marked: Iterable[Marked], account: Account, filters: Sequence[str], min_weight: float | None) -> Iterator[Any]:
    """Yield the rows of one pass that are kept, and count every row in the account."""
    seen: set[str] = set()
    for row, status, digest, tokens, weight in marked:
        reason = status if status == CUT_IMAGES else FILTERS[status] if status in filters else ""
        if not reason and "duplicates" in filters:
            reason = FILTERS["duplicates"] if digest in seen else ""
            seen.add(digest)
        if not reason and min_weight is not None and weight is not None and weight < min_weight:
            reason = f"with a weight below {min_weight:g}"
        account.rows += 1
        if reason:
            account.reasons[reason] += 1
        else:
            account.tokens += tokens
            yield row


def count_trained_on(evaluation: Any, train: Any) -> tuple[int, int]:
    """Count the pairs of a tokenised evaluation dataset that are known from a tokenised training dataset.

    Returns:
        the number of pairs that are, token for token, training pairs; and the number of further pairs that have the prompt
            of a training pair. Both are 0 if one of the datasets is a stream or was tokenised elsewhere.
    """
    if any(
        not {CONTENT, PROMPT} <= set(getattr(dataset, "column_names", None) or ()) for dataset in (evaluation, train)
    ):
        return 0, 0
    pairs, prompts = (set(evaluation[name]).intersection(train[name]) for name in (CONTENT, PROMPT))
    known = [digest in pairs for digest in evaluation[CONTENT]]
    asked = (digest in prompts for digest in evaluation[PROMPT])
    return sum(known), sum(prompt and not pair for prompt, pair in zip(asked, known, strict=True))


def hold_out(dataset: Any, size: float, seed: int) -> list[int]:
    """Sorted indices of the pairs of a tokenised dataset that `val_split` holds out: all pairs of some of its prompts.

    A prompt's rank depends only on the prompt and the seed. So the choice changes little or not at all if pairs are added
    or reordered.

    Args:
        size: below 1, a share of the pairs; from 1, a number of pairs. There may be more, since the last prompt's pairs are
            all held out.

    Raises:
        ConfigError: nothing would be left to train on.
    """
    by_prompt: dict[str, list[int]] = {}
    for place, prompt in enumerate(_prompts(dataset)):
        by_prompt.setdefault(prompt, []).append(place)
    wanted = size if size >= 1 else max(1, round(size * len(dataset)))
    found: list[int] = []
    for prompt in sorted(by_prompt, key=lambda prompt: hashlib.blake2b(f"{seed} {prompt}".encode()).digest()):
        if len(found) < wanted:
            found += by_prompt[prompt]
    if len(found) == len(dataset):
        raise ConfigError(
            f"val_split: {size:g} leaves nothing to train on: there are {len(dataset):,} pairs with {len(by_prompt):,} "
            "different prompts, and pairs with the same prompt stay together"
        )
    return sorted(found)


def _prompts(dataset: Any) -> list[str]:
    """A digest of the prompt for each pair of a tokenised dataset."""
    if PROMPT in dataset.column_names:
        return list(dataset[PROMPT])
    return [hashlib.blake2b(repr(list(ids)).encode(), digest_size=16).hexdigest() for ids in dataset["prompt_ids"]]


def tokens_of(dataset: Any) -> int:
    """Number of tokens of a tokenised dataset, with prompts counted for both sides."""
    lengths = zip(*(map(len, dataset[column]) for column in TOKENS), strict=True)
    return sum(2 * prompt + chosen + rejected for prompt, chosen, rejected in lengths)
