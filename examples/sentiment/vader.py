"""The judge of the sentiment example: VADER, a lexicon of words rated by people, ranks continuations of a prompt."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer


@cache
def _analyzer() -> SentimentIntensityAnalyzer:
    return SentimentIntensityAnalyzer()


def score(text: str) -> float:
    """Sentiment of a text: VADER's compound score in [-1, 1]; 0 if no word is rated (Hutto & Gilbert, 2014)."""
    return _analyzer().polarity_scores(text)["compound"]


def usable(text: str) -> bool:
    """Whether a continuation is plain text that can follow the prompt: a space, then printable ASCII and newlines.

    Text that is cut inside a multi-byte character would change when written to a file.
    """
    return text.startswith(" ") and all(" " <= letter <= "~" or letter == "\n" for letter in text)


def pair_up(texts: Iterable[str], *, gap: float, limit: int) -> list[tuple[str, str, float]]:
    """Pair the best text with the worst, the second best with the second worst, and so on.

    Every text is used at most once, so pairs of a prompt share only the prompt.

    Args:
        texts: continuations of one prompt; duplicates and unusable ones are dropped.
        gap: least difference of the two scores of a pair.
        limit: largest number of pairs; those with the largest differences are kept.

    Returns:
        ``(chosen, rejected, difference)``, the largest difference first. Ties in score are broken by the text itself.
    """
    ranked = sorted((score(text), text) for text in set(texts) if usable(text))
    pairs = []
    for (low, rejected), (high, chosen) in zip(ranked[: len(ranked) // 2], reversed(ranked), strict=False):
        if high - low < gap or len(pairs) == limit:
            break
        pairs.append((chosen, rejected, round(high - low, 4)))
    return pairs
