"""Chooses the pairs of every batch and their order, by length or at random, independent of the number of processes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import IterableDataset

from ..errors import ConfigError, DataError
from . import STRATEGIES as STRATEGIES

#: Number of steps within which pairs are sorted by length. It is large enough to find pairs of similar length, and small
#: enough that every epoch groups different pairs.
POOL = 50

Batches = list[list[int]]


@dataclass(frozen=True)
class Batching:
    """How pairs form batches and batches form optimizer steps.

    `num_processes * accumulation` consecutive batches form a step. Each process gets every `num_processes`-th of them. So a
    step holds the same pairs, however the batches are divided between processes and gradient accumulation.

    Attributes:
        pairs: pairs per batch. Not used with `max_tokens`.
        max_tokens: maximum of tokens per batch, counted in the padded layout: two rows for each pair, as long as the longest
            row. The other layouts need fewer tokens.
        pad_to_multiple_of: lengths are rounded up to a multiple of this number.
        strategy: "random"; "sequential"; or "group_by_length": random, but a step holds pairs of similar length. The step
            with the longest pair comes first, so that running out of memory shows at once.
        accumulation: batches that a process accumulates for one step.
        num_processes: processes among which batches are divided.
        seed: seed of the order.
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
        """Capacity of a batch: in pairs, or in tokens with `max_tokens`."""
        return self.pairs if self.max_tokens is None else self.max_tokens

    def share(self, length: int) -> int:
        """How much of `room` a pair takes if its longer side has `length` tokens and no pair in the batch is longer."""
        return 1 if self.max_tokens is None else 2 * (length + -length % (self.pad_to_multiple_of or 1))

    def check(self, length: int) -> None:
        """Raise ConfigError if a single pair whose longer side has `length` tokens exceeds `max_tokens`."""
        if self.share(length) > self.room:
            raise ConfigError(
                f"max_tokens: {self.max_tokens} is less than the {self.share(length)} tokens of a single pair (2 x {length}, "
                "its longer side); raise it, or lower max_length"
            )

    def steps(self, lengths: Sequence[int], epoch: int, fixed: bool = False) -> tuple[list[Batches], Batches]:
        """The full steps of an epoch in order, and the remaining batches, which are too few for a step.

        Args:
            lengths: tokens of the longer side of every pair, prompt included.
            epoch: number of the epoch, part of the seed.
            fixed: with `max_tokens`, every epoch has the same batches, so the number of batches is the same too.
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
            # Sort within pools of consecutive pairs of the random order, so that every epoch groups different pairs.
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
    """Yields batches of row indices for one process; all processes together yield every pair once an epoch.

    An incomplete step comes last in its epoch. Its pairs are divided so that every process gets the same number of batches.
    If there are fewer pairs than processes, some batches are empty. No pair is repeated. With `max_tokens`, the pairs of each
    batch are chosen once, because all epochs must have the same number of steps.

    Args:
        lengths: tokens of the longer side of every pair, prompt included.
        batching: size, order and division of the batches.
        process_index: index of the process that reads these batches.
        drop_last: leave out remaining pairs that do not fill a batch on every process.

    Raises:
        ConfigError: a single pair exceeds `max_tokens`.
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
        """Set the epoch that `__iter__` uses for its order."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self._batches()) // self.batching.num_processes

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self._batches()[self.process_index :: self.batching.num_processes])

    def _batches(self) -> Batches:
        """The epoch's batches of all processes, in order."""
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
    """Yields batches of rows for one process from a stream, without end.

    Rows are collected until they make about POOL steps. They are then grouped and shuffled as `Batching` says. Rows that do
    not fill a step stay for the next pool. After the last row the stream starts again with the first row. So a pass over the
    data need not end with a complete step, and a resumed run finds its position by counting batches.

    Every process reads all rows and yields its own share. At most one dataloader worker may do this in the background:
    `datasets` divides a stream among workers, so each of several workers would read only a part of the rows.

    Args:
        rows: returns an iterator over rows with a `length`, given the number of the pass, counted from 0.
        batching: size, order and division of the batches.
        process_index: index of the process that reads these batches.

    Raises:
        ConfigError: a single pair exceeds `max_tokens`.
        DataError: the stream has no rows.
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
    """Halve batches of a step, the largest first, until their number is a multiple of `multiple`.

    Halving a batch of one pair gives that batch and an empty one.
    """
    step = list(step)
    while len(step) % multiple:
        place = max(range(len(step)), key=lambda index: len(step[index]))
        half = (len(step[place]) + 1) // 2
        step[place : place + 1] = [step[place][:half], step[place][half:]]
    return step
