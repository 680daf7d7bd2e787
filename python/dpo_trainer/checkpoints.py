"""Checkpoints that are whole or not there, with what transformers does not keep: the open logging window, running means."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

#: Where a checkpoint is written, inside the run's folder, before it gets its name.
ASIDE = "checkpoint.part"


@contextlib.contextmanager
def written_aside(run_dir: Path, name: str, *, first: bool) -> Iterator[Path]:
    """A folder to write a checkpoint into, which is called `run_dir / name` once the block has ended well.

    Args:
        run_dir: the run's folder.
        name: of the checkpoint.
        first: whether this process creates and renames folders; the others only write into them.
    """
    aside, target = run_dir / ASIDE / name, run_dir / name
    if first:
        shutil.rmtree(run_dir / ASIDE, ignore_errors=True)  # what a kill left behind
        aside.mkdir(parents=True)
    _wait()
    yield aside
    _wait()
    if first:
        if target.exists():  # the same step, saved before
            shutil.rmtree(target)
        aside.replace(target)
        aside.parent.rmdir()
    _wait()


def _wait() -> None:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()


def save_state(folder: Path, rank: int, state: dict[str, Any]) -> None:
    """Write a process's state, nested dicts of tensors and numbers, into a checkpoint."""
    torch.save(state, folder / f"dpo_state_{rank}.pt")


def load_state(folder: Path, rank: int) -> dict[str, Any] | None:
    """A process's state from a checkpoint; None from a checkpoint that has none, such as one of another trainer."""
    path = folder / f"dpo_state_{rank}.pt"
    return torch.load(path, map_location="cpu", weights_only=True) if path.exists() else None
