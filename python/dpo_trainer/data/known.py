"""Conversion of columns with other names, and of layouts of preference data that other programs write, to our rows."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from dpo_kernels.confidence import confidence_weights, preference_probability

from ..errors import ConfigError, DataError, did_you_mean
from .messages import as_written, forms_of, opened, past_turns, plain
from .rows import COLUMNS, NUMBERS, SIDES, TEXTS, check_whole_texts, json_type, number_of

logger = logging.getLogger("dpo_trainer")

#: (place, row) of every row. The place is the row's name in messages.
Located = Iterable[tuple[str, Any]]

UNPAIRED = ("prompt", "completion", "label")
#: Keys of `weight_from`: names of columns, and the parameters of `dpo_kernels.confidence` with their defaults.
_SCORES = ("chosen", "rejected", "margin")
_SHAPE = {"scale": 1.0, "power": 1.0, "floor": 0.0}


@dataclass(frozen=True)
class Layout:
    """A known layout: the columns by which it is recognised, and the conversion of its rows to ours.

    Attributes:
        words: the meaning of its columns, for the log.
        needs: columns that every row has.
        without: columns that no row has.
        reads: optional columns that are used.
        make: takes (row, place) and returns values for our columns.
    """

    name: str
    words: str
    needs: tuple[str, ...]
    without: tuple[str, ...]
    make: Callable[[Mapping[str, Any], str], dict[str, Any]]
    reads: tuple[str, ...] = ()

    def fits(self, columns: Iterable[str]) -> bool:
        """Whether a row with these columns has this layout."""
        return set(self.needs) <= set(columns) and not set(self.without) & set(columns)


def _openai(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    given = row["input"]
    if isinstance(given, str):
        try:
            given = as_written(json.loads(given))
        except ValueError as error:
            raise DataError(f"{where}: 'input' must be an object with messages, or its JSON text") from error
    if not isinstance(given, Mapping) or given.get("messages") is None:
        raise DataError(f"{where}: 'input' must be an object with messages, found {json_type(given)}")
    found = {"prompt": given["messages"], "chosen": row["preferred_output"], "rejected": row["non_preferred_output"]}
    return found if given.get("tools") is None else {**found, "tools": given["tools"]}


def _conversation(column: str) -> Layout:
    def make(row: Mapping[str, Any], where: str) -> dict[str, Any]:
        prompt = plain(row[column], column, where)
        last = prompt[-1] if isinstance(prompt, list) and prompt else None
        if isinstance(last, Mapping) and last.get("role") == "assistant":
            raise DataError(
                f"{where}: '{column}' ends with an answer; it must end before chosen and rejected, which answer it"
            )
        return {"prompt": prompt, **{side: _answer(row[side], side, where) for side in SIDES}}

    words = f"'{column}' is the prompt; chosen and rejected are the messages that follow"
    return Layout("ShareGPT rows", words, (column, *SIDES), ("prompt",), make)


def _answer(value: Any, side: str, where: str) -> Any:
    """A completion as chat messages. A text becomes one message of the assistant."""
    value = plain(value, side, where)
    return [{"role": "assistant", "content": value}] if isinstance(value, str) else value


def _question(*parts: str) -> Callable[[Mapping[str, Any], str], dict[str, Any]]:
    """Make `Layout.make` for a prompt that is a question in one or more columns, perhaps with a system text."""

    def make(row: Mapping[str, Any], where: str) -> dict[str, Any]:
        texts = [row.get(name) or "" for name in parts]
        for name, text in zip(parts, texts, strict=True):
            if not isinstance(text, str):
                raise DataError(f"{where}: '{name}' must be text, found {json_type(text)}")
        prompt: Any = "\n".join(filter(None, texts))
        sides = {side: plain(row[side], side, where) for side in SIDES}
        if "history" in row and "instruction" in parts:
            prompt = [*past_turns(row["history"], where), {"role": "user", "content": prompt}]
            sides = {side: _answer(value, side, where) for side, value in sides.items()}
        elif all(isinstance(side, list) for side in sides.values()):
            prompt = [{"role": "user", "content": prompt}]
        return {"prompt": prompt, "system": row.get("system") or "", **sides}

    return make


_CHAT = "a chat if the tokenizer has a chat template"
#: Known layouts. The first one that fits is used.
LAYOUTS = (
    Layout(
        "OpenAI rows",
        "'input' holds the prompt's messages and tools, preferred_output and non_preferred_output the answers",
        ("input", "preferred_output", "non_preferred_output"),
        SIDES,
        _openai,
    ),
    *map(_conversation, ("conversations", "conversation")),
    Layout(
        "alpaca rows",
        f"'instruction' and 'input' are the user's message, 'system' the system's, 'history' earlier turns; {_CHAT}",
        ("instruction", *SIDES),
        ("prompt",),
        _question("instruction", "input"),
        ("input", "system", "history"),
    ),
    Layout(
        "Orca rows",
        f"'question' is the user's message, 'system' the system's; {_CHAT}",
        ("system", "question", *SIDES),
        ("prompt",),
        _question("question"),
    ),
    Layout(
        "rows with a system text",
        f"'system' is the system's message; with a prompt of text, {_CHAT}",
        ("system", *SIDES),
        (),
        lambda row, _: {},
    ),
    Layout(
        "unpaired rows",
        "answers to one prompt with label true and false make pairs",
        UNPAIRED,
        SIDES,
        lambda row, _: {},
    ),
)


@dataclass
class Told:
    """What the log already says about a data set.

    Attributes:
        layout: whether the layout was logged.
        columns: the columns that are not used, in the order in which they were found.
        count: how many of `columns` were logged.
    """

    name: str
    layout: bool = False
    columns: dict[str, None] = field(default_factory=dict)
    count: int = 0

    def unread(self) -> None:
        """Log the columns that are not used, unless they were logged before."""
        if new := list(self.columns)[self.count :]:
            scored = any("score" in name or "rating" in name or name == "margin" for name in map(str, new))
            hint = " (the setting weight_from computes weights from scores)" if scored else ""
            logger.warning("%s: not used: %s%s", self.name, ", ".join(map(str, new)), hint)
        self.count = len(self.columns)


@dataclass(frozen=True)
class Reading:
    """How the columns of a data set are read: the settings `columns` and `weight_from`.

    Attributes:
        columns: the data's column names, by our names.
        weight_from: the columns of scores (`chosen` and `rejected`, or `margin`) from which weights are computed:
            max(2 p - 1, floor)^power with p = sigmoid(margin / scale), see `dpo_kernels.confidence`.

    Raises:
        ConfigError: a name is unknown, or a value is not a column name or a number as required.
    """

    columns: Mapping[str, str] | None = None
    weight_from: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        for setting in ("columns", "weight_from"):
            if not isinstance(given := getattr(self, setting), Mapping | None):
                raise ConfigError(f"{setting}: expected a mapping, got {given!r}")
        ours = (*COLUMNS, *UNPAIRED[1:])
        for name, theirs in (self.columns or {}).items():
            if name not in ours:
                raise ConfigError(
                    f"columns: unknown '{name}'{did_you_mean(str(name), ours)}; known are {', '.join(ours)}"
                )
            if not isinstance(theirs, str):
                raise ConfigError(f"columns: '{name}' must be the name of a column, got {theirs!r}")
            if other := [own for own, column in (self.columns or {}).items() if column == theirs and own != name]:
                raise ConfigError(f"columns: '{theirs}' is named for both '{name}' and '{other[0]}'")
        known = (*_SCORES, *_SHAPE)
        given = self.weight_from or {}
        for name, value in given.items():
            if name not in known:
                raise ConfigError(
                    f"weight_from: unknown '{name}'{did_you_mean(str(name), known)}; known are {', '.join(known)}"
                )
            if name in _SCORES and not isinstance(value, str):
                raise ConfigError(f"weight_from: '{name}' must be the name of a column, got {value!r}")
            if name in _SHAPE and (isinstance(value, bool) or not isinstance(value, (int, float))):
                raise ConfigError(f"weight_from: '{name}' must be a number, got {value!r}")
        if self.weight_from is not None and tuple(sorted(set(given) & set(_SCORES))) not in (SIDES, ("margin",)):
            raise ConfigError("weight_from: give the columns 'chosen' and 'rejected' of the scores, or 'margin'")
        if self.weight_from is not None and "weight" in (self.columns or {}):
            raise ConfigError("weight_from: columns names a 'weight' too; keep one of them")
        try:
            self._weight([1.0], [0.0])
        except ValueError as error:
            raise ConfigError(f"weight_from: {error}") from error

    @property
    def is_default(self) -> bool:
        """Whether columns are read as they are."""
        return not self.columns and not self.weight_from

    def leaves(self, row: Any) -> bool:
        """Whether rows like this one need no conversion."""
        layout = layout_of(row) if isinstance(row, Mapping) else None
        return self.is_default and (layout is None or layout.name == "rows with a system text")

    def rows(self, located: Located, name: str, told: Told | None = None) -> Iterator[tuple[str, Any]]:
        """(place, row) of every row in our columns. The layout and the unused columns are logged once.

        Args:
            name: of the data set, for messages.
            told: for a stream, which is read more than once: what earlier passes have logged.

        Raises:
            ConfigError: a column that a setting names does not exist.
            DataError: a row has another layout than the first row, or unpaired rows cannot be paired.
        """
        located = iter(located)
        streamed, told = told is not None, told or Told(name)
        for where, row in located:
            located = itertools.chain([(where, row)], located)
            break
        else:
            return
        first = self._renamed(row, where)[0] if isinstance(row, Mapping) else {}
        layout = layout_of(first)
        if not told.layout:
            told.layout = True
            for own, theirs in (self.columns or {}).items():
                if theirs not in row and own in row:
                    logger.warning("%s: columns: no column '%s'; its column '%s' is used", name, theirs, own)
            if layout is None and "prompt" not in first and isinstance(opened(first.get("chosen")), str):
                check_whole_texts(first, where)
                logger.warning(
                    "%s: no column 'prompt': what chosen and rejected share at the beginning is the prompt", name
                )
            if layout is not None:
                logger.warning("%s: read as %s: %s", name, layout.name, layout.words)
            if forms := dict.fromkeys(form for text in TEXTS for form in forms_of(first.get(text))):
                logger.warning("%s: messages are written as %s; read as role and content", name, " and ".join(forms))

        def converted() -> Located:
            for where, row in located:
                yield where, self._ours(where, row, layout, told)
                if streamed:
                    told.unread()

        ours = converted()
        if layout is not None and layout.name == "unpaired rows":
            if streamed:
                raise DataError(
                    f"{name}: unpaired rows ({', '.join(UNPAIRED)}) cannot be paired while they are streamed; read them whole"
                )
            ours = _paired(ours, name)
        yield from ours
        told.unread()

    def _renamed(self, row: Mapping[str, Any], where: str) -> tuple[dict[str, Any], set[str]]:
        """The row with our names for the columns that the setting names, and the set of columns that were used."""
        found = {name: value for name, value in row.items() if name not in (self.columns or {}).values()}
        read = set()
        for name, theirs in (self.columns or {}).items():
            if theirs not in row and name in row:
                read.add(name)  # another data set, whose column has our name
                continue
            if theirs not in row:
                raise ConfigError(f"columns: {where}: no column '{theirs}'; it has {_listed(row, theirs)}")
            value = row[theirs]
            found[name] = _as_number(value) if name in NUMBERS else value
            read.add(theirs)
        return found, read

    def _ours(self, where: str, row: Any, layout: Layout | None, told: Told) -> Any:
        if not isinstance(row, Mapping):
            return row
        found, read = self._renamed(row, where)
        read |= {name for name in COLUMNS if name in row and name not in (self.columns or {})}
        if layout is not None:
            if not layout.fits(found):
                missing = next((name for name in layout.needs if name not in found), "")
                what = (
                    f"no column '{missing}'"
                    if missing
                    else f"a column '{next(n for n in layout.without if n in found)}'"
                )
                raise DataError(f"{where}: {what}, but earlier rows are {layout.name}")
            read |= {*layout.needs, *layout.reads}
            found = {**found, **layout.make(found, where)}
        if self.weight_from:
            found["weight"] = self._weight_of(row, where)
            read |= {self.weight_from[name] for name in _SCORES if name in self.weight_from}
        if isinstance(opened(found.get("chosen")), str) and "system" not in found:
            read -= {"tools", "chat_template_kwargs"}  # only chats use them
        told.columns.update(dict.fromkeys(name for name in row if name not in read))
        return found

    def _weight_of(self, row: Mapping[str, Any], where: str) -> float:
        given: Mapping[str, Any] = self.weight_from or {}
        if "weight" in row:
            raise ConfigError(f"weight_from: {where}: there is a column 'weight' already; leave the setting out")
        scores = {}
        for name in _SCORES:
            if name in given:
                if given[name] not in row:
                    raise ConfigError(
                        f"weight_from: {where}: no column '{given[name]}'; it has {_listed(row, given[name])}"
                    )
                scores[name] = number_of(_as_number(row[given[name]]), given[name], where)
        chosen, rejected = scores.get("chosen", scores.get("margin", 0.0)), scores.get("rejected", 0.0)
        return self._weight([chosen], [rejected])

    def _weight(self, chosen: list[float], rejected: list[float]) -> float:
        scale, power, floor = ((self.weight_from or {}).get(name, value) for name, value in _SHAPE.items())
        likely = preference_probability(chosen, rejected, scale=scale)
        # Not divided by their mean, which is unknown in a stream. The loss is a weighted mean in any case.
        return confidence_weights(likely, power=power, floor=floor, normalize=False).item()


#: Reads columns unchanged.
AS_THEY_ARE = Reading()


def layout_of(row: Mapping[str, Any]) -> Layout | None:
    """The known layout of a row, or None."""
    return next((layout for layout in LAYOUTS if layout.fits(row)), None)


def _paired(located: Located, name: str) -> Iterator[tuple[str, Any]]:
    """Pair the n-th answer to a prompt with label true with its n-th answer with label false, in the order of the former."""
    answers: dict[str, tuple[list[Any], list[Any]]] = {}
    count = 0
    for where, row in located:
        count += 1
        if not isinstance(row, Mapping) or not set(UNPAIRED) <= set(row):
            raise DataError(f"{where}: expected an object with {', '.join(UNPAIRED)}, as earlier rows are")
        rest = {key: value for key, value in row.items() if key in COLUMNS and key not in NUMBERS}
        sides = answers.setdefault(json.dumps(rest, sort_keys=True, default=str), ([], []))
        sides[0 if _label(row["label"], where) else 1].append((count, where, row))
    pairs = sorted(
        (pair for sides in answers.values() for pair in zip(*sides, strict=False)), key=lambda pair: pair[0][0]
    )
    if not pairs:
        raise DataError(
            f"{name}: unpaired rows ({', '.join(UNPAIRED)}), and no prompt has both an answer with label true and one with "
            "label false; DPO compares two answers to one prompt"
        )
    logger.warning(
        "%s: %d of %d rows are paired; %d are left over%s",
        *(name, 2 * len(pairs), count, count - 2 * len(pairs)),
        ", with no answer of the other label to their prompt" if count > 2 * len(pairs) else "",
    )
    for (_, where, good), (_, _, bad) in pairs:
        row = {key: value for key, value in good.items() if key not in UNPAIRED[1:]}
        yield where, {**row, "chosen": good["completion"], "rejected": bad["completion"]}


def _label(value: Any, where: str) -> bool:
    known = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
    if (text := str(value).strip().lower()) not in known:
        raise DataError(f"{where}: 'label' must be true or false, found {value!r}")
    return known[text]


def _as_number(value: Any) -> Any:
    """The number in a text, for files whose cells are all text. Any other value is returned unchanged."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _listed(row: Mapping[str, Any], wanted: str) -> str:
    return f"{', '.join(map(str, row))}{did_you_mean(wanted, map(str, row))}"
