"""Caches reference log-probabilities on disk, in shards, under a hash of everything that they depend on.

Each key has a folder. The key is a hash of the reference's weights and config, the precision it runs in, the token ids of
every pair (which depend on template, truncation and end tokens), and the pairs' images (their contents and processing).
Each shard is a file, written atomically, so a killed run loses at most the shard that it was computing. A file repeats its
key and its rows and contains a digest of its numbers. A truncated, changed or misplaced file is computed again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import torch
from torch import nn

from ..data.images import DIGEST, has_images
from ..data.tokens import MASKS, TOKENS
from ..errors import first_line
from .split import unwrap_adapter

logger = logging.getLogger("dpo_trainer")

#: Pairs per file. A killed run has to compute at most this many pairs again.
SHARD = 256
FORMAT = 2
#: Entries of a model's config that do not affect what the model computes.
_INCIDENTAL = ("_name_or_path", "transformers_version", "use_cache", "dtype", "torch_dtype", "architectures")
#: Attributes of a peft layer, other than weights, that affect what it computes.
_IN_LAYERS = ("active_adapters", "disable_adapters", "merged_adapters", "scaling")

Logps = tuple[list[float], list[float]]


def folder_of(setting: str | None) -> Path | None:
    """The folder that the setting `ref_cache_dir` names; None without a cache.

    "auto" is the folder in the environment variable `DPO_TRAINER_CACHE`, or dpo_trainer in the user's cache folder.
    """
    if setting == "auto":
        setting = os.environ.get("DPO_TRAINER_CACHE") or f"{os.environ.get('XDG_CACHE_HOME') or '~/.cache'}/dpo_trainer"
    return None if setting is None else Path(setting).expanduser()


# --- what the numbers depend on ------------------------------------------------------------------------------------


def model_fingerprint(model: nn.Module, *, adapter: bool = True) -> str:
    """A hash of a model's class, config and weights. With `adapter=False`, a peft model's adapter is left out."""
    base: Any = unwrap_adapter(model)
    prefix = getattr(getattr(model, "base_model", None), "prefix", None) if base is not model else None
    config = base.config.to_dict() if hasattr(base, "config") else {}
    said = {name: value for name, value in config.items() if name not in _INCIDENTAL}
    about: list[Any] = [type(base).__name__, said]
    if adapter:
        about += [(name, [getattr(part, key, None) for key in _IN_LAYERS]) for name, part in _adapter_layers(model)]
    weights = base.state_dict()
    if adapter and base is not model:
        adapters: Any = model
        about += [(name, adapters.peft_config[name].to_dict()) for name in adapters.active_adapters]
        weights, prefix = model.state_dict(), None
    digest = hashlib.sha256(json.dumps(about, sort_keys=True, default=_as_json).encode())
    for name, value in sorted(weights.items()):
        if not isinstance(value, torch.Tensor) or (prefix and prefix in name):
            continue
        # peft adds `.base_layer` to the name of a layer that it wraps. The weight is the same.
        digest.update(f"{name.replace('.base_layer', '')} {value.dtype} {tuple(value.shape)}".encode())
        try:
            data = value.detach().cpu().contiguous().reshape(-1)
        except NotImplementedError:  # a quantised tensor of a class that has no views, such as torchao's
            data = value.detach().dequantize().cpu().contiguous().reshape(-1)
        digest.update(data.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _adapter_layers(model: nn.Module) -> list[tuple[str, Any]]:
    return [(name, part) for name, part in model.named_modules() if hasattr(part, "adapter_layer_names")]


def _as_json(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else str(value)


def data_fingerprint(dataset: Any) -> str:
    """A hash of the token ids and images of all pairs in order, and of the scored tokens if some are not scored."""
    digest = hashlib.sha256()
    names = [*TOKENS, *(name for name in MASKS if name in dataset.column_names)]
    for rows in dataset.select_columns(names).iter(1000):
        for name in names:
            digest.update(np.array([len(ids) for ids in rows[name]], dtype=np.int64).tobytes())
            digest.update(np.array([token for ids in rows[name] for token in ids], dtype=np.int64).tobytes())
    if has_images(dataset):
        digest.update(json.dumps(list(dataset[DIGEST])).encode())
    return digest.hexdigest()


def _digest(logps: Logps) -> str:
    """A hash of a shard's numbers and their count."""
    return hashlib.sha256(json.dumps([list(side) for side in logps]).encode()).hexdigest()


# --- the files -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ReferenceCache:
    """The cached log-probabilities of one dataset under one reference.

    Attributes:
        root: folder of the cache, for all references.
        facts: everything that the numbers depend on, as JSON values. The hash of it is the key.
        lengths: tokens of each pair. Shards hold pairs of similar length, so that batches need little padding.
    """

    root: Path
    facts: dict[str, Any]
    lengths: Sequence[int]

    @cached_property
    def order(self) -> list[int]:
        """Indices of the dataset's rows, the shortest row first."""
        return np.argsort(list(self.lengths), kind="stable").tolist()

    @property
    def key(self) -> str:
        """The name of the folder."""
        return hashlib.sha256(json.dumps([FORMAT, self.facts], sort_keys=True).encode()).hexdigest()[:32]

    @property
    def folder(self) -> Path:
        return self.root / "reference_logps" / self.key

    @property
    def shards(self) -> int:
        return -(-len(self.order) // SHARD)

    def rows(self, shard: int) -> list[int]:
        """Indices of the dataset's rows that a shard holds."""
        return self.order[shard * SHARD : (shard + 1) * SHARD]

    def path(self, shard: int) -> Path:
        return self.folder / f"{shard:05}-of-{self.shards:05}.parquet"

    def read(self, shard: int) -> Logps | None:
        """The shard's log-probabilities; None without a file, or (with a warning) if the file is not valid."""
        path = self.path(shard)
        if not path.exists():
            return None
        try:
            table = pyarrow.parquet.read_table(path, page_checksum_verification=True)
            stamp = json.loads((table.schema.metadata or {}).get(b"dpo_trainer", b"{}"))
            digest = stamp.pop("digest", None)
            if stamp != self._stamp(shard):
                raise ValueError("it belongs to another reference or other data")
            if table["row"].to_pylist() != self.rows(shard):
                raise ValueError("it holds other rows")
            logps = table["ref_chosen_logps"].to_pylist(), table["ref_rejected_logps"].to_pylist()
            if digest != _digest(logps):
                raise ValueError("its numbers are not those that were computed")
            if not np.isfinite(logps).all():
                raise ValueError("it holds numbers that are not finite")
            return logps
        except (OSError, ValueError, TypeError, AttributeError, KeyError, pyarrow.ArrowException) as error:
            logger.warning(
                "reference log-probabilities: %s is not used, %s; computing it again", path, first_line(error)
            )
            return None

    def write(self, shard: int, logps: Logps) -> None:
        """Write a shard atomically: into a temporary file that is then renamed. Raises OSError."""
        self.folder.mkdir(parents=True, exist_ok=True)
        table = pyarrow.table(
            {"row": self.rows(shard), "ref_chosen_logps": logps[0], "ref_rejected_logps": logps[1]},
            metadata={"dpo_trainer": json.dumps({**self._stamp(shard), "digest": _digest(logps)}, sort_keys=True)},
        )
        path = self.path(shard)
        aside = path.with_name(f"{path.name}.{os.getpid()}.part")
        try:
            pyarrow.parquet.write_table(table, aside, write_page_checksum=True)
            aside.replace(path)
        except OSError:
            aside.unlink(missing_ok=True)  # an incomplete file, on a full disk for example
            raise

    def _stamp(self, shard: int) -> dict[str, Any]:
        return {"key": self.key, "shard": shard, "shards": self.shards, **self.facts}

    def complete(self) -> Logps | None:
        """All log-probabilities in the dataset's order; None if a shard is missing. Computes nothing."""
        parts = [self.read(shard) for shard in range(self.shards)]
        return None if None in parts else self._joined(parts)

    def _joined(self, parts: list[Any]) -> Logps:
        columns = np.empty((2, len(self.order)))
        columns[:, self.order] = np.concatenate(parts, axis=1)
        chosen, rejected = columns.tolist()
        return chosen, rejected

    def fill(
        self,
        compute: Callable[[list[int]], Logps],
        *,
        name: str,
        process_index: int,
        num_processes: int,
        wait: Callable[[], Any],
        begin: Callable[[int], Any] = lambda _: None,
    ) -> Logps:
        """Read the shards that exist, compute and write the missing ones, and return all log-probabilities.

        Args:
            compute: returns the log-probabilities (chosen, rejected) of the rows with the given indices.
            name: the dataset's name in messages.
            process_index, num_processes: the missing shards are divided among the processes.
            wait: a barrier for all processes.
            begin: receives the number of rows that this process will compute.

        Returns:
            the log-probabilities (chosen, rejected) in nats, in the dataset's order.
        """
        parts = [self.read(shard) for shard in range(self.shards)]
        missing = [shard for shard, part in enumerate(parts) if part is None]
        what = f"reference log-probabilities of {len(self.order)} {name} pairs"
        if missing:
            kept = self.shards - len(missing)
            rest = f" the rest ({kept} of {self.shards} files are there)" if kept else ""
            logger.info("%s: computing%s into %s", what, rest, self.folder)
        else:
            logger.info("%s: read from %s", what, self.folder)
        wait()  # all processes look for shards before any writes one; all must call this, because each may see other files
        writable, mine = True, missing[process_index::num_processes]
        begin(sum(len(self.rows(shard)) for shard in mine))
        for shard in mine:
            found = parts[shard] = compute(self.rows(shard))
            try:
                self.write(shard, found)
            except OSError as error:
                if writable:
                    logger.warning("%s: cannot be written to the cache (%s)", what, first_line(error))
                writable = False
        wait()
        for shard, part in enumerate(parts):
            if part is None:  # computed by another process; its disk may not be shared
                parts[shard] = self.read(shard) or compute(self.rows(shard))
        return self._joined(parts)
