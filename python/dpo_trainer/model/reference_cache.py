"""Reference log-probabilities on disk: computed once, shard by shard, and found again by what they were computed from.

A folder a key, and the key is a hash of everything that the numbers depend on: the reference's weights and config, the
precision it runs in, and the token ids of every pair (in which template, truncation and end tokens show) and its images
(their contents, and how they are processed). A file a shard,
written aside and renamed, so that a kill loses the shard at work and nothing else. Each file repeats its key and its rows
and carries a digest of its numbers: what is cut short, changed or from elsewhere is computed again.
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

#: Pairs a file: what a kill may cost.
SHARD = 256
FORMAT = 2
#: Entries of a model's config that say where it lies and how it is run, not what it computes.
_INCIDENTAL = ("_name_or_path", "transformers_version", "use_cache", "dtype", "torch_dtype", "architectures")
#: What a layer of peft keeps of how its adapters are used, beside their weights.
_IN_LAYERS = ("active_adapters", "disable_adapters", "merged_adapters", "scaling")

Logps = tuple[list[float], list[float]]


def folder_of(setting: str | None) -> Path | None:
    """The folder that `ref_cache_dir` means; "auto": `DPO_TRAINER_CACHE`, or dpo_trainer in the user's cache."""
    if setting == "auto":
        setting = os.environ.get("DPO_TRAINER_CACHE") or f"{os.environ.get('XDG_CACHE_HOME') or '~/.cache'}/dpo_trainer"
    return None if setting is None else Path(setting).expanduser()


# --- what the numbers depend on ------------------------------------------------------------------------------------


def model_fingerprint(model: nn.Module, *, adapter: bool = True) -> str:
    """A hash of a model's class, config and weights; with `adapter=False`, of a peft model without its adapter."""
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
        # peft moves what it wraps one level down; the weight is the same.
        digest.update(f"{name.replace('.base_layer', '')} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _adapter_layers(model: nn.Module) -> list[tuple[str, Any]]:
    return [(name, part) for name, part in model.named_modules() if hasattr(part, "adapter_layer_names")]


def _as_json(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else str(value)


def data_fingerprint(dataset: Any) -> str:
    """A hash of all token ids and images, pair by pair, in order, and of which tokens are scored, where some are not."""
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
    """A hash of a shard's numbers and of how many there are."""
    return hashlib.sha256(json.dumps([list(side) for side in logps]).encode()).hexdigest()


# --- the files -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ReferenceCache:
    """The shards of one dataset under one reference.

    Attributes:
        root: folder of all references.
        facts: what the numbers depend on, as JSON values; its hash is the key.
        lengths: tokens of each pair. Shards follow it, so that batches of neighbours carry little padding.
    """

    root: Path
    facts: dict[str, Any]
    lengths: Sequence[int]

    @cached_property
    def order(self) -> list[int]:
        """The dataset's rows, the shortest first."""
        return np.argsort(list(self.lengths), kind="stable").tolist()

    @property
    def key(self) -> str:
        """The folder's name."""
        return hashlib.sha256(json.dumps([FORMAT, self.facts], sort_keys=True).encode()).hexdigest()[:32]

    @property
    def folder(self) -> Path:
        return self.root / "reference_logps" / self.key

    @property
    def shards(self) -> int:
        return -(-len(self.order) // SHARD)

    def rows(self, shard: int) -> list[int]:
        """The dataset's rows that a shard holds."""
        return self.order[shard * SHARD : (shard + 1) * SHARD]

    def path(self, shard: int) -> Path:
        return self.folder / f"{shard:05}-of-{self.shards:05}.parquet"

    def read(self, shard: int) -> Logps | None:
        """The shard's log-probabilities; None where there is no file, or one that is not to be trusted (a line says why)."""
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
        """Write a shard beside its place and rename it there. Raises OSError."""
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
            aside.unlink(missing_ok=True)  # half a file on a full disk
            raise

    def _stamp(self, shard: int) -> dict[str, Any]:
        return {"key": self.key, "shard": shard, "shards": self.shards, **self.facts}

    def complete(self) -> Logps | None:
        """All log-probabilities in the dataset's order if every shard is there, else None. Computes nothing."""
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
        """All log-probabilities in the dataset's order: read where they are, computed and written where not.

        Args:
            compute: the log-probabilities (chosen, rejected) of given rows.
            name: of the dataset, for messages.
            process_index, num_processes: the processes that share the missing shards out among themselves.
            wait: where processes meet before they read one another's shards.
            begin: is told how many rows this process will compute.
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
        wait()  # nobody writes before everybody has looked; also where nothing is missing, since others may see it otherwise
        writable, mine = True, missing[process_index::num_processes]
        begin(sum(len(self.rows(shard)) for shard in mine))
        for shard in mine:
            found = parts[shard] = compute(self.rows(shard))
            try:
                self.write(shard, found)
            except OSError as error:
                if writable:
                    logger.warning("%s: cannot be kept (%s)", what, first_line(error))
                writable = False
        wait()
        for shard, part in enumerate(parts):
            if part is None:  # another process's, or on a disk that is not shared
                parts[shard] = self.read(shard) or compute(self.rows(shard))
        return self._joined(parts)
