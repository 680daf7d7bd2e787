"""The account of a dataset: which rows are kept, why others are not, and which evaluation pairs are training pairs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

#: Why a pair may be left out, by the name that `filters` takes.
FILTERS = {
    "identical": "with chosen equal to rejected",
    "empty": "with an empty completion",
    "truncated": "with nothing of a completion left after truncation",
    "duplicates": "that repeat an earlier one",
}
#: Why a pair with images is left out whatever `filters` says: the model would not find its image tokens.
CUT_IMAGES = "whose images max_length or max_prompt_length would cut"
#: The column of a digest of a pair's tokens and images.
CONTENT = "digest"
#: Columns beside the tokens, for the account.
MARKS = ("status", CONTENT, "tokens", "repeats", "unscored")

#: A row with what decides whether it is kept: status (a name of FILTERS, CUT_IMAGES, or ""), digest, number of tokens and weight.
Marked = tuple[Any, str, str, int, float | None]


@dataclass
class Account:
    """What became of a dataset's rows on the way to training.

    Attributes:
        rows: rows seen; of a stream, in its first pass so far.
        tokens: of the pairs that were kept, prompts counted for both sides.
        reasons: rows left out, by reason (the values of FILTERS, CUT_IMAGES, and the least weight).
        streamed: whether more may follow.
        remarks: what else a person should know of the data, a line each.
        trained_on: pairs of an evaluation dataset that are training pairs too.
    """

    name: str
    rows: int = 0
    tokens: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    streamed: bool = False
    remarks: list[str] = field(default_factory=list)
    trained_on: int = 0

    @property
    def dropped(self) -> int:
        return sum(self.reasons.values())

    @property
    def kept(self) -> int:
        return self.rows - self.dropped

    def describe(self) -> str:
        """One line for people: rows kept, and the reasons for the others."""
        parts = [f"{count:,} {reason}" for reason, count in self.reasons.items() if count]
        tail = f"; dropped {', '.join(parts[:-1])}{' and ' if parts[1:] else ''}{parts[-1]}" if parts else ""
        so_far = " so far (a stream)" if self.streamed else ""
        return f"{self.name}: {self.kept:,} of {self.rows:,} pairs kept{so_far}, {self.tokens:,} tokens{tail}"


def sift(marked: Iterable[Marked], account: Account, filters: Sequence[str], min_weight: float | None) -> Iterator[Any]:
    """The rows of one pass that are kept, one after the other. What becomes of every row goes into the account."""
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


def count_trained_on(evaluation: Any, train: Any) -> int:
    """How many pairs of a tokenised evaluation dataset are, token for token, pairs of a tokenised training dataset.

    0 where one of them is a stream or was tokenised elsewhere.
    """
    if any(CONTENT not in (getattr(dataset, "column_names", None) or ()) for dataset in (evaluation, train)):
        return 0
    wanted = list(evaluation[CONTENT])
    found = set(wanted).intersection(train[CONTENT])
    return sum(digest in found for digest in wanted)
