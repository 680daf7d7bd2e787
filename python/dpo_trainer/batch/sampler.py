"""Which pairs make a batch, in which order: by length or not, by number or by tokens, the same on any number of processes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import IterableDataset

from ..errors import ConfigError, DataError
from . import STRATEGIES as STRATEGIES

#: Steps within which pairs are sorted by length: enough to find neighbours, too few to fix who they are.
POOL = 50

Batches = list[list[int]]


@dataclass(frozen=True)
class Batching:
    """How pairs become batches and batches become optimizer steps.

    `num_processes * accumulation` consecutive batches make a step, of which each process gets every `num_processes`-th.
    So a step holds the same pairs however they are divided into processes and accumulated batches.

    Attributes:
        pairs: pairs per batch. Not used with `max_tokens`.
        max_tokens: most tokens per batch as the padded layout counts them: two rows a pair, as long as the longest. The
            other layouts need fewer.
        pad_to_multiple_of: what lengths are rounded up to a multiple of.
        strategy: "random"; "group_by_length": random, but with pairs of similar length in a step, and the longest first
            of all, so that what does not fit into memory shows at once; "sequential".
        accumulation: batches that a process accumulates to a step.
        num_processes: processes among which batches are divided.
        seed: of the order.
    """

    pairs: int
    max_tokens: int | None = None
    pad_to_multiple_of: int | None = None
    strategy: str = "group_by_length"
    accumulation: int = 1
    num_processes: int = 1
    seed: int = 0

    @property
    def batches_per_step(self) -> int:
        return self.num_processes * self.accumulation

    @property
    def room(self) -> int:
        """What a batch holds: pairs, or tokens with `max_tokens`."""
        return self.pairs if self.max_tokens is None else self.max_tokens

    def share(self, length: int) -> int:
        """What a pair whose longer side has `length` tokens takes of `room` when no longer pair is in the batch."""
        return 1 if self.max_tokens is None else 2 * (length + -length % (self.pad_to_multiple_of or 1))

    def check(self, length: int) -> None:
        """Raise ConfigError if a pair whose longer side has `length` tokens exceeds `max_tokens` alone."""
        if self.share(length) > self.room:
            raise ConfigError(
                f"max_tokens: {self.max_tokens} is less than the {self.share(length)} tokens of a single pair (2 x {length}, "
                "its longer side); raise it, or lower max_length"
            )

    def steps(self, lengths: Sequence[int], epoch: int, fixed: bool = False) -> tuple[list[Batches], Batches]:
        """The full steps of an epoch in order, and the batches left over, which fill no step.

        Args:
            lengths: tokens of the longer side of every pair, prompt included.
            epoch: seeds the order.
            fixed: with `max_tokens`, put the same pairs together in every epoch. All epochs then have the same number of batches.
        """
        batches = self._batches(lengths, 0 if fixed and self.max_tokens is not None else epoch)
        unit = self.batches_per_step
        steps = [batches[start : start + unit] for start in range(0, len(batches), unit)]
        rest: Batches = []
        if steps and (len(steps[-1]) < unit or (self.max_tokens is None and len(steps[-1][-1]) < self.pairs)):
            rest = steps.pop()
        if self.strategy != "sequential":
            steps = [steps[index] for index in self._permutation(len(steps), epoch, 1)]
        if self.strategy == "group_by_length" and epoch == 0 and steps:
            longest = max(range(len(steps)), key=lambda step: max(lengths[i] for batch in steps[step] for i in batch))
            steps.insert(0, steps.pop(longest))
        return steps, rest

    def _batches(self, lengths: Sequence[int], epoch: int) -> Batches:
        order = list(range(len(lengths)))
        if self.strategy != "sequential":
            order = self._permutation(len(order), epoch, 0)
        if self.strategy == "group_by_length":
            # Sorted within pools of neighbours in the random order, so that every epoch groups other pairs.
            count = max(self.room * len(order) // max(sum(map(self.share, lengths)), 1), 1)
            pool = POOL * count * self.batches_per_step
            pools = [order[start : start + pool] for start in range(0, len(order), pool)]
            order = [index for part in pools for index in sorted(part, key=lambda index: -lengths[index])]
        batches: Batches = []
        longest = 0
        for index in order:
            longest = max(longest, lengths[index])
            if not batches or self.share(longest) * (len(batches[-1]) + 1) > self.room:
                batches.append([])
                longest = lengths[index]
            batches[-1].append(index)
        return batches

    def _permutation(self, count: int, epoch: int, purpose: int) -> list[int]:
        generator = torch.Generator().manual_seed((self.seed << 20) + (epoch << 1) + purpose)
        return torch.randperm(count, generator=generator).tolist()


class PairBatchSampler:
    """Batches of row indices for one process; together the processes see every pair once an epoch.

    An epoch's last step, for which too few pairs are left, comes last. What is left is divided such that every process
    gets the same number of batches; where there are fewer pairs than processes, some batches hold none. No pair is repeated.
    With `max_tokens`, the pairs of each batch are chosen once, since all epochs must have the same number of steps.

    Args:
        lengths: tokens of the longer side of every pair, prompt included.
        process_index: whose batches.
        drop_last: leave out what does not fill a batch on every process.

    Raises:
        ConfigError: a pair alone exceeds `max_tokens`.
    """

    def __init__(
        self, lengths: Sequence[int], batching: Batching, *, process_index: int = 0, drop_last: bool = False
    ) -> None:
        self.lengths, self.batching = list(lengths), batching
        self.process_index, self.drop_last = process_index, drop_last
        self.epoch = 0
        self._made: tuple[int, Batches] | None = None
        batching.check(max(self.lengths, default=0))

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order `__iter__` gives."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self._batches()) // self.batching.num_processes

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self._batches()[self.process_index :: self.batching.num_processes])

    def _batches(self) -> Batches:
        """All processes' batches of the epoch, in order."""
        if self._made is None or self._made[0] != self.epoch:
            rule, number = self.batching, self.batching.num_processes
            steps, rest = rule.steps(self.lengths, self.epoch, fixed=True)
            if self.drop_last:
                whole = [batch for batch in rest if rule.max_tokens is not None or len(batch) == rule.pairs]
                rest = whole[: len(whole) // number * number]
            else:
                rest = divided(rest, number)
            self._made = (self.epoch, [batch for step in [*steps, rest] for batch in step])
        return self._made[1]


class PairStream(IterableDataset):
    """Batches of rows, for one process, from rows that come one after the other: no end, and nothing left over.

    Rows are gathered until they make about POOL steps, and are grouped and shuffled among themselves as `Batching` says;
    those that fill no step wait for the next ones. After the last row the first one follows again, so that a pass over
    the data need not end with a step, and a resumed run finds its place by counting batches.
    Every process reads all rows and yields its share. One worker may do that in the background; several would each read
    a part only, as `datasets` divides its streams.

    Args:
        rows: makes an iterator over rows with `length` for a pass, counted from 0.
        process_index: whose batches.
    """

    def __init__(
        self, rows: Callable[[int], Iterable[dict[str, Any]]], batching: Batching, *, process_index: int = 0
    ) -> None:
        self.rows, self.batching, self.process_index = rows, batching, process_index

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        return itertools.islice(self._batches(), self.process_index, None, self.batching.num_processes)

    def _batches(self) -> Iterator[list[dict[str, Any]]]:
        rule = self.batching
        enough = POOL * rule.batches_per_step * rule.room
        waiting: list[dict[str, Any]] = []
        size = pools = 0
        for row in self._all():
            rule.check(row["length"])
            waiting.append(row)
            size += rule.share(row["length"])
            if size >= enough:
                steps, rest = rule.steps([row["length"] for row in waiting], pools)
                for batch in itertools.chain.from_iterable(steps):
                    yield [waiting[index] for index in batch]
                waiting = [waiting[index] for batch in rest for index in batch]
                size = sum(rule.share(row["length"]) for row in waiting)
                pools += 1

    def _all(self) -> Iterator[dict[str, Any]]:
        for number in itertools.count():
            nothing = True
            for row in self.rows(number):
                nothing = False
                yield row
            if nothing:
                raise DataError("train_dataset: the stream has no pairs to train on")


def divided(step: Batches, multiple: int) -> Batches:
    """Split batches of a step, the largest first, until their number is a multiple of `multiple`. Half of one pair is empty."""
    step = list(step)
    while len(step) % multiple:
        place = max(range(len(step)), key=lambda index: len(step[index]))
        half = (len(step[place]) + 1) // 2
        step[place : place + 1] = [step[place][:half], step[place][half:]]
    return step
