"""From rows to what is trained on: tokenised once and cached, without the pairs that teach nothing, and an account of those."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import datasets
from datasets.fingerprint import Hasher
from torch.utils.data import IterableDataset

from ..errors import ConfigError, DataError
from .files import RowStream, in_our_columns, reading_of, stream_of, table_of
from .known import Reading
from .messages import as_written
from .rows import NUMBERS, Pair, check_columns, parse_row, split_row
from .template import as_chat, remarks
from .tokens import MASKS, TOKENS, tokenize_pair

#: Why a pair may be left out, by the name that `filters` takes.
FILTERS = {
    "identical": "with chosen equal to rejected",
    "empty": "with an empty completion",
    "truncated": "with nothing of a completion left after truncation",
    "duplicates": "that repeat an earlier one",
}
#: Pairs of a stream that are looked at before training.
SAMPLE = 64

#: Columns beside the tokens, for the account.
DIGEST = "digest"
MARKS = ("status", DIGEST, "tokens", "repeats", "unscored")

#: A row with what decides whether it is kept: status (a name of FILTERS, or ""), digest, number of tokens and weight.
Marked = tuple[Any, str, str, int, float | None]


@dataclass
class Account:
    """What became of a dataset's rows on the way to training.

    Attributes:
        rows: rows seen; of a stream, in its first pass so far.
        tokens: of the pairs that were kept, prompts counted for both sides.
        reasons: rows left out, by reason (the values of FILTERS, and the least weight).
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


@dataclass(frozen=True)
class Preparation:
    """How rows become tokens, and which are left out: the settings of DPOConfig by these names.

    Attributes:
        filters: names of FILTERS.
        min_weight: leave out pairs whose `weight` is less.
        dataset_num_proc: processes to tokenise with.
    """

    max_length: int | None = None
    max_prompt_length: int | None = None
    truncation_mode: str = "keep_end"
    append_eos: bool = True
    filters: Sequence[str] = tuple(FILTERS)
    min_weight: float | None = None
    dataset_num_proc: int | None = None
    columns: Mapping[str, str] | None = None
    weight_from: Mapping[str, Any] | None = None
    chat_template_kwargs: Mapping[str, Any] | None = None
    assistant_only_loss: bool = True

    @property
    def of_tokens(self) -> dict[str, Any]:
        """The settings that decide the tokens."""
        names = ("max_length", "max_prompt_length", "truncation_mode", "append_eos")
        return {name: getattr(self, name) for name in (*names, "chat_template_kwargs", "assistant_only_loss")}

    @property
    def reading(self) -> Reading:
        """How columns are read."""
        return Reading(self.columns, self.weight_from)


def sift(marked: Iterable[Marked], preparation: Preparation, account: Account) -> Iterator[Any]:
    """The rows of one pass that are kept, one after the other. What becomes of every row goes into the account."""
    filters, least = preparation.filters, preparation.min_weight
    seen: set[str] = set()
    for row, status, digest, tokens, weight in marked:
        reason = FILTERS[status] if status in filters else ""
        if not reason and "duplicates" in filters:
            reason = FILTERS["duplicates"] if digest in seen else ""
            seen.add(digest)
        if not reason and least is not None and weight is not None and weight < least:
            reason = f"with a weight below {least:g}"
        account.rows += 1
        if reason:
            account.reasons[reason] += 1
        else:
            account.tokens += tokens
            yield row


def prepare_dataset(dataset: Any, tokenizer: Any, preparation: Preparation, *, name: str) -> tuple[Any, Account]:
    """Check and tokenise a `datasets.Dataset` (or a list of rows) of pairs, and drop what teaches nothing.

    Returns the dataset with `prompt_ids`, `chosen_ids`, `rejected_ids`, `length` (tokens of the
    longer side), `digest` (of all tokens) and, where given, `weight` and the reference log-probabilities; and the account of
    what was dropped.
    Tokens are kept in the cache of `datasets`, by the contents of data, tokenizer and settings. Datasets that are
    tokenised already pass through.

    Raises:
        DataError: naming the row, or saying that nothing is left.
        ConfigError: `min_weight` without weights.
    """
    reading = preparation.reading
    if isinstance(dataset, (list, tuple)):
        located = [(f"{name} row {number}", as_written(row)) for number, row in enumerate(dataset, 1)]
        dataset = table_of(located, name, reading)
    if not isinstance(dataset, datasets.Dataset):
        raise DataError(f"{name}: expected a datasets.Dataset or a list of rows, found {type(dataset).__name__}")
    source = dataset.info.dataset_name
    where = f"{name} ({source})" if source else name
    if len(dataset) == 0:
        raise DataError(f"{where}: no rows")
    account = Account(name)
    if is_prepared(dataset):
        lengths = zip(*(map(len, dataset[column]) for column in TOKENS), strict=True)
        account.rows, account.tokens = len(dataset), sum(2 * prompt + c + r for prompt, c, r in lengths)
        return dataset, account
    known = reading_of(dataset)
    if known is None or not (reading.is_default or reading == known):
        try:
            dataset = in_our_columns(dataset, where, lambda number: f"{where} row {number}", reading)
        except ConfigError as error:
            if known is None:
                raise
            raise ConfigError(f"{error}; load_pairs takes the setting too, and leaves out what nobody names") from error
    check_columns(dataset.column_names, where)
    _check_weights(dataset.column_names, preparation, where)
    parse = split_row if reading_of(dataset) is not None else parse_row
    first = [parse(dataset[index], f"{where} row {index + 1}") for index in range(min(SAMPLE, len(dataset)))]
    strip = _most_repeat(first)
    account.remarks += _remarks(first, tokenizer, preparation)
    keep = [column for column in NUMBERS if column in dataset.column_names]
    key = _key(dataset, tokenizer, preparation, strip)
    dataset = dataset.map(
        _prepare_row,
        with_indices=True,
        fn_kwargs={
            "parse": parse,
            "tokenizer": tokenizer,
            "name": where,
            "settings": preparation.of_tokens,
            "strip": strip,
        },
        remove_columns=[column for column in dataset.column_names if column not in keep],
        num_proc=preparation.dataset_num_proc,
        cache_file_name=_cache_file(key),
        new_fingerprint=key,
        desc=f"Tokenising {name}",
    )
    weights = dataset["weight"] if "weight" in keep else itertools.repeat(None)
    marks = (dataset[column] for column in ("status", DIGEST, "tokens"))
    kept = list(sift(zip(itertools.count(), *marks, weights, strict=False), preparation, account))
    if repeated := sum(dataset["repeats"]):
        account.remarks.append(_of_repeated(name, f"{repeated:,} of {len(dataset):,} pairs", strip))
    if not sum(dataset["unscored"]):
        dataset = dataset.remove_columns([column for column in MASKS if column in dataset.column_names])
    if account.dropped:
        dataset = dataset.select(kept)
    if account.kept == 0:
        raise DataError(f"{where}: nothing is left to train on: {account.describe()}")
    if set(dataset["status"]) == {"truncated"}:
        raise DataError(f"{where}: no pair has tokens of both completions left to score; raise max_length")
    if preparation.weight_from and "weight" in keep and not any(dataset["weight"]):
        raise DataError(
            f"{where}: weight_from gives every pair the weight 0: no chosen answer has a higher score than the rejected one"
        )
    spent = [column for column in MARKS if column in dataset.column_names and column != DIGEST]
    return dataset.remove_columns(spent), account


class PreparedStream(IterableDataset):
    """Rows of a stream, tokenised and sifted as they are read.

    Attributes:
        sample: a dataset of the first pairs, as prepared.
        account: of what the first pass has read so far.
    """

    def __init__(self, dataset: Any, tokenizer: Any, preparation: Preparation, *, name: str) -> None:
        self._source: RowStream = stream_of(dataset, name, preparation.reading)
        self._tokenizer, self._preparation = tokenizer, preparation
        self.account = Account(name, streamed=True)
        first = list(itertools.islice(self._source.pairs(0), SAMPLE))
        self._strip = _most_repeat(first)
        self.account.remarks += _remarks(first, tokenizer, preparation)
        if self._strip:
            self.account.remarks.append(_of_repeated(name, f"the first {len(first)} pairs", strip=True))
        self.sample = datasets.Dataset.from_list(list(itertools.islice(self.rows(0), SAMPLE)))
        if len(self.sample) == 0:
            nothing = f"nothing is left to train on: {self.account.describe()}" if self.account.rows else "no rows"
            raise DataError(f"{self._source.name}: {nothing}")

    def rows(self, number: int) -> Iterator[dict[str, Any]]:
        """The pairs of a pass, counted from 0."""
        account = self.account if number == 0 else Account(self.account.name, streamed=True)
        account.rows = account.tokens = 0  # the first pass may begin again, as it does after the sample
        account.reasons.clear()
        return sift(map(self._marked, self._source.pairs(number)), self._preparation, account)

    def _marked(self, pair: Pair) -> Marked:
        _check_weights(pair.numbers, self._preparation, self._source.name)
        found = _prepared(pair, self._tokenizer, self._preparation.of_tokens, self._strip)
        status, digest, tokens, *_ = (found.pop(mark) for mark in MARKS)
        return {**found, DIGEST: digest}, status, digest, tokens, pair.numbers.get("weight")

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self.rows(0)


def count_trained_on(evaluation: Any, train: Any) -> int:
    """How many pairs of a tokenised evaluation dataset are, token for token, pairs of a tokenised training dataset.

    0 where one of them is a stream or was tokenised elsewhere.
    """
    if any(DIGEST not in (getattr(dataset, "column_names", None) or ()) for dataset in (evaluation, train)):
        return 0
    wanted = list(evaluation[DIGEST])
    found = set(wanted).intersection(train[DIGEST])
    return sum(digest in found for digest in wanted)


def by_name(eval_dataset: Any) -> dict[str, Any]:
    """The evaluation datasets that there are: several by their names, a single one by ""."""
    if isinstance(eval_dataset, dict):
        return eval_dataset
    return {} if eval_dataset is None else {"": eval_dataset}


def is_prepared(dataset: Any) -> bool:
    """Whether `prepare_dataset` has made the tokens of a dataset. TRL's have the same names, and no lengths."""
    return {*TOKENS, "length"} <= set(getattr(dataset, "column_names", None) or ())


def is_stream(dataset: Any) -> bool:
    """Whether a dataset is one whose rows come one after the other."""
    return isinstance(dataset, (IterableDataset, datasets.IterableDataset))


def _check_weights(columns: Iterable[str], preparation: Preparation, name: str) -> None:
    if preparation.min_weight is not None and "weight" not in columns:
        raise ConfigError(f"min_weight: the pairs of {name} have no column 'weight'")


def _prepare_row(
    row: dict[str, Any],
    index: int,
    *,
    parse: Callable[[Any, str], Pair],
    tokenizer: Any,
    name: str,
    settings: Any,
    strip: bool,
) -> dict[str, Any]:
    return _prepared(parse(row, f"{name} row {index + 1}"), tokenizer, settings, strip)


def _prepared(pair: Pair, tokenizer: Any, settings: dict[str, Any], strip: bool) -> dict[str, Any]:
    """Tokens, numbers and MARKS of a pair. Of chat messages also masks, since a table needs them in all rows or in none.

    Args:
        strip: take the prompt from the beginning of completions that repeat it.
    """
    repeats = _repeats(pair)
    if strip and repeats:
        start = len(pair.prompt)
        pair = replace(pair, chosen=pair.chosen[start:], rejected=pair.rejected[start:])
    ids = tokenize_pair(pair, tokenizer, **settings)
    prompt, chosen, rejected = (ids[name] for name in TOKENS)
    masks = [ids.get(name) or [True] * len(side) for name, side in zip(MASKS, (chosen, rejected), strict=True)]
    if settings["assistant_only_loss"] and isinstance(as_chat(pair, tokenizer).prompt, list):
        ids.update(zip(MASKS, masks, strict=True))
    status = ""
    # The first token of all has nothing to be predicted from.
    if not all(any(mask[0 if prompt else 1 :]) for mask in masks):
        status = "truncated"
    elif chosen == rejected:
        status = "identical"
    if _is_blank(pair.chosen) or _is_blank(pair.rejected):
        status = "identical" if pair.chosen == pair.rejected else "empty"
    digest = hashlib.blake2b(json.dumps([prompt, chosen, rejected]).encode(), digest_size=16).hexdigest()
    longer = max(len(chosen), len(rejected))
    found = {**ids, **pair.numbers, "length": len(prompt) + longer}
    tokens = 2 * len(prompt) + len(chosen) + len(rejected)
    unscored = sum(not token for mask in masks for token in mask)
    return {**found, **dict(zip(MARKS, (status, digest, tokens, repeats, unscored), strict=True))}


def _repeats(pair: Pair) -> bool:
    """Whether both completions of a text pair begin with its prompt."""
    start = pair.prompt
    return (
        isinstance(start, str)
        and bool(start.strip())
        and pair.chosen.startswith(start)
        and pair.rejected.startswith(start)
    )


def _most_repeat(pairs: Sequence[Pair]) -> bool:
    """Whether completions are written with their prompts: in a few pairs it may be chance."""
    return 2 * sum(map(_repeats, pairs)) > len(pairs)


def _of_repeated(name: str, which: str, strip: bool) -> str:
    done = "it is taken away there" if strip else "it is left there, since most others do not"
    return f"{name}: both completions of {which} begin with the prompt; {done}"


def _remarks(pairs: Sequence[Pair], tokenizer: Any, preparation: Preparation) -> list[str]:
    """What is to be said of the template, from the first pairs."""
    if not pairs:
        return []
    pair, kwargs = as_chat(pairs[0], tokenizer), preparation.chat_template_kwargs
    if isinstance(pair.prompt, str):
        if pairs[0].system is not None:
            return [
                "the tokenizer has no chat template: system text, prompt and answer stand in one text, a blank line apart"
            ]
        return ["chat_template_kwargs: not used, since rows are text"] if kwargs else []
    ids = tokenize_pair(pair, tokenizer, **{**preparation.of_tokens, "max_length": None})
    answer = ids["chosen_ids"]
    scored = ids.get("chosen_mask", [True] * len(answer))
    chats = [as_chat(pair, tokenizer) for pair in pairs]
    return remarks(tokenizer, chats, kwargs, list(itertools.compress(answer, scored)))


def _is_blank(completion: str | list[Any]) -> bool:
    if isinstance(completion, str):
        return not completion.strip()
    return not completion or not ((completion[-1].get("content") or "").strip() or completion[-1].get("tool_calls"))


def _key(dataset: Any, tokenizer: Any, preparation: Preparation, strip: bool) -> str:
    """Name of the tokens: changes with the data, the tokenizer, the settings and the code that makes them."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    # A fast tokenizer's own description; as an object it would hash differently after its first use.
    described = backend.to_str() if backend is not None else Hasher.hash(tokenizer)
    special = [getattr(tokenizer, name, None) for name in ("bos_token_id", "eos_token_id", "chat_template")]
    folder = Path(__file__).parent
    code = [path.read_bytes() for path in sorted(folder.glob("*.py"))]
    return Hasher.hash([dataset._fingerprint, described, special, preparation.of_tokens, strip, code])


def _cache_file(key: str) -> str | None:
    """Where tokens are kept; None where datasets' caching is off or its folder cannot be written."""
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "dpo_trainer"
    try:
        if not datasets.is_caching_enabled():
            return None
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return str(folder / f"{key}.arrow")
