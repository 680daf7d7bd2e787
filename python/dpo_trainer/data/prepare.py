"""Preparation of rows for training: tokenise and cache them, drop pairs that teach nothing, and count the dropped ones."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
from datasets.fingerprint import Hasher
from torch.utils.data import IterableDataset

from ..errors import ConfigError, DataError
from ..progress import Line, Phase, count, counted
from .account import CONTENT, CUT_IMAGES, FILTERS, MARKS, PROMPT, Account, Marked, sift, tokens_of
from .files import RowStream, in_our_columns, reading_of, stream_of, table_of
from .images import DIGEST, encoded, state_of_files, text_of
from .known import Reading
from .messages import as_written
from .processor import description_of, read_by, tokenizer_of
from .rows import IMAGES, NUMBERS, Pair, check_columns, parse_row, split_row
from .template import as_chat, remarks
from .tokens import MASKS, TOKENS, tokenize_pair

logger = logging.getLogger("dpo_trainer")

#: Number of a stream's pairs that are examined before training.
SAMPLE = 64


@dataclass(frozen=True)
class Preparation:
    """How rows become tokens, and which rows are dropped: the settings of DPOConfig with the same names.

    Attributes:
        filters: names of FILTERS.
        min_weight: pairs with a smaller `weight` are dropped.
        dataset_num_proc: number of processes that tokenise.
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


def prepare_dataset(
    dataset: Any, processing_class: Any, preparation: Preparation, *, name: str, line: Line | None = None
) -> tuple[Any, Account]:
    """Check and tokenise pairs, and drop the pairs that teach nothing.

    Tokens are kept in the cache of `datasets`, by the contents of data, tokenizer and settings. A tokenised dataset is
    returned unchanged. Pixels take many times the memory of the image files, so the collator makes them for each batch.

    Args:
        dataset: a `datasets.Dataset` or a list of rows.
        name: of the dataset, for messages.
        line: shows the progress, instead of a progress bar of `datasets`.

    Returns:
        the dataset and the account of the dropped rows. The dataset has `prompt_ids`, `chosen_ids`, `rejected_ids`,
            `length` (tokens of prompt and longer side), `digest` (of tokens and images), `prompt_digest` and, if given,
            `weight` and the reference log-probabilities. With images it also has their column unchanged, and
            `images_digest`.

    Raises:
        DataError: a row is bad, and the message names it; or no row is left.
        ConfigError: `min_weight` is set, but the data have no weights.
    """
    reading = preparation.reading
    if isinstance(dataset, (list, tuple)):
        located = [(f"{name} row {number}", as_written(row)) for number, row in enumerate(dataset, 1)]
        dataset = table_of(located, name, reading)
    if not isinstance(dataset, datasets.Dataset):
        splits = (
            f"; pass one of its splits ({', '.join(map(str, dataset))})"
            if isinstance(dataset, datasets.DatasetDict)
            else ""
        )
        raise DataError(
            f"{name}: expected a datasets.Dataset or a list of rows, found {type(dataset).__name__}{splits}"
        )
    if dataset.format["type"] not in (None, "custom"):  # tensors and arrays instead of texts and lists
        dataset = dataset.with_format(None)
    source = dataset.info.dataset_name
    where = f"{name} ({source})" if source else name
    if len(dataset) == 0:
        raise DataError(f"{where}: no rows")
    account = Account(name)
    if is_prepared(dataset):
        if DIGEST not in dataset.column_names and any(column in dataset.column_names for column in IMAGES):
            raise DataError(
                f"{where}: is tokenised and has images; pass rows with texts or messages, or remove the images' column"
            )
        account.rows, account.tokens = len(dataset), tokens_of(dataset)
        return dataset, account
    known = reading_of(dataset)
    if known is None or not (reading.is_default or reading == known):
        try:
            dataset = in_our_columns(dataset, where, lambda number: f"{where} row {number}", reading)
        except ConfigError as error:
            if known is None:
                raise
            raise ConfigError(f"{error}; load_pairs needs the setting too, or drops that column") from error
    check_columns(dataset.column_names, where)
    _check_weights(dataset.column_names, preparation, where)
    parse = split_row if reading_of(dataset) is not None else parse_row
    first = [parse(dataset[index], f"{where} row {index + 1}") for index in range(min(SAMPLE, len(dataset)))]
    strip = _most_repeat(first)
    account.remarks += _remarks(first, processing_class, preparation)
    keep = [column for column in NUMBERS if column in dataset.column_names]
    images = dataset.select_columns([column for column in IMAGES if column in dataset.column_names])
    key = _key(dataset, processing_class, preparation, strip)
    logger.info("%s: tokenising %s pairs", name, f"{len(dataset):,}")
    with _without_bars(), counted(Phase(line, f"tokenising {name}", len(dataset), "pairs")):
        dataset = dataset.map(
            _prepare_row,
            with_indices=True,
            fn_kwargs={
                "parse": parse,
                "processing_class": processing_class,
                "name": where,
                "settings": preparation.of_tokens,
                "strip": strip,
            },
            remove_columns=[column for column in dataset.column_names if column not in keep],
            num_proc=preparation.dataset_num_proc,
            cache_file_name=_cache_file(key),
            new_fingerprint=key,
        )
    if dataset.format["type"] == "custom":  # a transform is for rows, not for tokens
        dataset = dataset.with_format(None)
    if images.column_names and any(dataset[DIGEST]):
        dataset = datasets.concatenate_datasets(
            [dataset, images], axis=1
        )  # a column next to the tokens, not copied into their cache
    elif images.column_names:
        dataset = dataset.remove_columns(DIGEST)
    weights = dataset["weight"] if "weight" in keep else itertools.repeat(None)
    marks = (dataset[column] for column in ("status", CONTENT, "tokens"))
    kept = list(
        sift(
            zip(itertools.count(), *marks, weights, strict=False), account, preparation.filters, preparation.min_weight
        )
    )
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
            f"{where}: weight_from gives every pair the weight 0: no chosen answer has a higher score than its rejected one"
        )
    spent = [column for column in MARKS if column in dataset.column_names and column != CONTENT]
    return dataset.remove_columns(spent), account


class PreparedStream(IterableDataset):
    """Rows of a stream, tokenised and filtered while they are read.

    Attributes:
        sample: a dataset of the first pairs, tokenised.
        account: of the rows that the first pass has read so far.
    """

    def __init__(self, dataset: Any, processing_class: Any, preparation: Preparation, *, name: str) -> None:
        self._source: RowStream = stream_of(dataset, name, preparation.reading)
        self._processing_class, self._preparation = processing_class, preparation
        self.account = Account(name, streamed=True)
        first = list(itertools.islice(self._source.pairs(0), SAMPLE))
        self._strip = _most_repeat(first)
        self.account.remarks += _remarks(first, processing_class, preparation)
        if self._strip:
            self.account.remarks.append(_of_repeated(name, f"the first {len(first)} pairs", strip=True))
        rows = [
            {**row, "images": [encoded(image, name) for image in row["images"]]} if DIGEST in row else row
            for row in itertools.islice(self.rows(0), SAMPLE)
        ]
        self.sample = datasets.Dataset.from_list(rows)
        if len(self.sample) == 0:
            nothing = f"nothing is left to train on: {self.account.describe()}" if self.account.rows else "no rows"
            raise DataError(f"{self._source.name}: {nothing}")

    def rows(self, number: int) -> Iterator[dict[str, Any]]:
        """The pairs of one pass. Passes are counted from 0."""
        account = self.account if number == 0 else Account(self.account.name, streamed=True)
        account.rows = account.tokens = 0  # the first pass may start again, as it does after the sample
        account.reasons.clear()
        return sift(
            map(self._marked, self._source.pairs(number)),
            account,
            self._preparation.filters,
            self._preparation.min_weight,
        )

    def _marked(self, pair: Pair) -> Marked:
        _check_weights(pair.numbers, self._preparation, self._source.name)
        found = _prepared(pair, self._processing_class, self._preparation.of_tokens, self._strip)
        status, digest, tokens, *_ = (found.pop(mark) for mark in MARKS)
        found |= {} if pair.images is None else {"images": pair.images}
        return {**found, CONTENT: digest}, status, digest, tokens, pair.numbers.get("weight")

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self.rows(0)


def by_name(eval_dataset: Any) -> dict[str, Any]:
    """The evaluation datasets by name. The name of a single dataset is ""."""
    if isinstance(eval_dataset, dict):
        return eval_dataset
    return {} if eval_dataset is None else {"": eval_dataset}


def is_prepared(dataset: Any) -> bool:
    """Whether `prepare_dataset` has tokenised a dataset. TRL's columns of tokens have the same names, but no lengths."""
    return {*TOKENS, "length"} <= set(getattr(dataset, "column_names", None) or ())


def is_stream(dataset: Any) -> bool:
    """Whether a dataset is iterable only, without access to single rows."""
    return isinstance(dataset, (IterableDataset, datasets.IterableDataset))


def _check_weights(columns: Iterable[str], preparation: Preparation, name: str) -> None:
    if preparation.min_weight is not None and "weight" not in columns:
        raise ConfigError(f"min_weight: the pairs of {name} have no column 'weight'")


def _prepare_row(
    row: dict[str, Any],
    index: int,
    *,
    parse: Callable[[Any, str], Pair],
    processing_class: Any,
    name: str,
    settings: Any,
    strip: bool,
) -> dict[str, Any]:
    count()
    return _prepared(parse(row, f"{name} row {index + 1}"), processing_class, settings, strip)


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """Turn off the progress bars of `datasets`, which fill a log."""
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def _prepared(pair: Pair, processing_class: Any, settings: dict[str, Any], strip: bool) -> dict[str, Any]:
    """Tokens, numbers and MARKS of a pair, and the images' digest if rows may have images.

    Pairs of chat messages always get masks, since a table needs them in all rows or in none.

    Args:
        strip: remove the prompt from the beginning of completions that repeat it.
    """
    repeats = _repeats(pair)
    if strip and repeats:
        start = len(pair.prompt)
        pair = replace(pair, chosen=pair.chosen[start:], rejected=pair.rejected[start:])
    pair, reader = read_by(pair, processing_class)
    asked = pair.prompt.strip() if isinstance(pair.prompt, str) else pair.prompt
    ids = tokenize_pair(pair, reader, **settings)
    prompt, chosen, rejected = (ids[name] for name in TOKENS)
    masks = [ids.get(name) or [True] * len(side) for name, side in zip(MASKS, (chosen, rejected), strict=True)]
    if settings["assistant_only_loss"] and isinstance(pair.prompt, list):
        ids.update(zip(MASKS, masks, strict=True))
    images = {} if pair.images is None else {DIGEST: reader.digest if pair.images else ""}
    status = ""
    # The very first token cannot be scored: no token precedes it.
    if not all(any(mask[0 if prompt else 1 :]) for mask in masks):
        status = "truncated"
    elif chosen == rejected:
        status = "identical"
    if _is_blank(pair.chosen) or _is_blank(pair.rejected):
        status = "identical" if pair.chosen == pair.rejected else "empty"
    if pair.images:
        whole = tokenize_pair(pair, reader, **{**settings, "max_length": None, "max_prompt_length": None})
        status = CUT_IMAGES if reader.cuts_images(whole[TOKENS[0]], prompt) else status
    pictures = list(filter(None, images.values()))
    digest = _digest([prompt, chosen, rejected, *pictures])
    longer = max(len(chosen), len(rejected))
    found = {**ids, **pair.numbers, "length": len(prompt) + longer, PROMPT: _digest([asked, *pictures])}
    tokens = 2 * len(prompt) + len(chosen) + len(rejected)
    unscored = sum(not token for mask in masks for token in mask)
    return {**found, **images, **dict(zip(MARKS, (status, digest, tokens, repeats, unscored), strict=True))}


def _digest(content: list[Any]) -> str:
    """A digest of values that can be written as JSON."""
    return hashlib.blake2b(json.dumps(content, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()


def _repeats(pair: Pair) -> bool:
    """Whether both completions of a text pair begin with its prompt."""
    start = pair.prompt
    if not isinstance(start, str) or not start.strip():
        return False
    return bool(pair.chosen.startswith(start) and pair.rejected.startswith(start))


def _most_repeat(pairs: Sequence[Pair]) -> bool:
    """Whether more than half of the pairs repeat the prompt in both completions: in a few pairs it may be chance."""
    return 2 * sum(map(_repeats, pairs)) > len(pairs)


def _of_repeated(name: str, which: str, strip: bool) -> str:
    done = "it is removed there" if strip else "it is kept there, since most other pairs do not repeat it"
    return f"{name}: both completions of {which} begin with the prompt; {done}"


def _remarks(pairs: Sequence[Pair], processing_class: Any, preparation: Preparation) -> list[str]:
    """Remarks on the chat template, from the first pairs."""
    if not pairs:
        return []
    pair, reader = read_by(pairs[0], processing_class)
    kwargs = preparation.chat_template_kwargs
    if isinstance(pair.prompt, str):
        if pairs[0].system is not None:
            return [
                "the tokenizer has no chat template: system text, prompt and answer form one text, separated by blank lines"
            ]
        if kwargs:
            return ["chat_template_kwargs: not used, because rows are text"]
        if getattr(processing_class, "chat_template", None):  # no warning: text is right for a base model
            logger.info("rows are text, so the chat template is not used; for a chat model, write chat messages")
        return []
    ids = tokenize_pair(pair, reader, **{**preparation.of_tokens, "max_length": None})
    answer = ids["chosen_ids"]
    scored = ids.get("chosen_mask", [True] * len(answer))
    chats = [as_chat(pair, reader) for pair in pairs]
    return remarks(reader, chats, kwargs, list(itertools.compress(answer, scored)))


def _is_blank(completion: str | list[Any]) -> bool:
    if isinstance(completion, str):
        return not completion.strip()
    return not completion or not (text_of(completion[-1].get("content")).strip() or completion[-1].get("tool_calls"))


def _key(dataset: Any, processing_class: Any, preparation: Preparation, strip: bool) -> str:
    """Cache key of the tokens. It changes with the data, the tokenizer, the settings and the code that makes them."""
    tokenizer = tokenizer_of(processing_class)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    # A fast tokenizer's description as text: the hash of the object changes after its first use.
    described = backend.to_str() if backend is not None else Hasher.hash(tokenizer)
    special = [getattr(tokenizer, name, None) for name in ("bos_token_id", "eos_token_id", "chat_template")]
    if tokenizer is not processing_class:
        special += [description_of(processing_class), processing_class.chat_template, state_of_files(dataset)]
    folder = Path(__file__).parent
    code = [path.read_bytes() for path in sorted(folder.glob("*.py"))]
    return Hasher.hash([dataset._fingerprint, described, special, preparation.of_tokens, strip, code])


def _cache_file(key: str) -> str | None:
    """The cache file of the tokens; None if the caching of `datasets` is off or its folder cannot be written."""
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "dpo_trainer"
    try:
        if not datasets.is_caching_enabled():
            return None
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return str(folder / f"{key}.arrow")
