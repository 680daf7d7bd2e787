"""Names of metrics in log records. They tell records of training steps from records of evaluations and their datasets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Record = dict[str, Any]


def evaluation_prefix(record: Mapping[str, Any]) -> str | None:
    """ "eval", or "eval_" and the dataset's name, for a record of an evaluation. None for other records."""
    return next(iter(evaluation_prefixes([record])), None)


def evaluation_prefixes(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """The prefixes of all evaluations, in the order in which they first appear."""
    losses = dict.fromkeys(name for record in records for name in record if name.startswith("eval"))
    return [name.removesuffix("_loss") for name in losses if name.endswith("_loss")]


def without_prefix(record: Mapping[str, Any], prefix: str) -> Record:
    """The metrics of one evaluation by their plain names, such as "loss" for "eval_loss"."""
    return {name[len(prefix) + 1 :]: value for name, value in record.items() if name.startswith(prefix + "_")}


def training_records(records: Sequence[Record]) -> list[Record]:
    """The records of training steps."""
    return [without_ties(record) for record in records if "loss" in record]


def evaluation_records(records: Sequence[Record], prefix: str = "eval") -> list[Record]:
    """The last evaluation record of each step, with the prefix removed from the metrics' names."""
    found = {}
    for record in records:
        own = without_prefix(record, prefix)
        if "loss" in own:
            found[record["step"]] = {"step": record["step"], "epoch": record.get("epoch"), **without_ties(own)}
    return list(found.values())


def throughput(records: Sequence[Record]) -> tuple[float, float]:
    """(tokens, seconds) of all training steps in the records, without evaluations and checkpoints."""
    timed = [record for record in records if record.get("tokens_per_second")]
    seconds = sum(record["tokens"] / record["tokens_per_second"] for record in timed)
    return sum(record.get("tokens") or 0 for record in records), seconds


def without_ties(record: Record) -> Record:
    """Remove the accuracy of a model that has not changed: if all rewards are 0, every pair is a tie."""
    tied = {
        name
        for name in record
        if (stem := name.removesuffix("_se")).endswith("rewards/accuracies")
        and record.get(stem.replace("accuracies", "chosen")) == record.get(stem.replace("accuracies", "rejected")) == 0
    }
    return {name: value for name, value in record.items() if name not in tied}
