"""Atomic checkpoints with the digests of their files, and the trainer's state that transformers does not save.

Only the functions that read or write tensors import torch, so the command line can examine a folder without it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import re
import shutil
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ..errors import OutputError, first_line
from .records import sha256, writing

logger = logging.getLogger("dpo_trainer")

#: The folder in the run's folder in which a checkpoint is written before it is renamed.
ASIDE = "checkpoint.part"
#: The file with the digests of a checkpoint's files. Its first line is the digest of the other lines, which have the format
#: of `sha256sum`.
DIGESTS = "SHA256SUMS"
#: The file of transformers' own state.
TRAINER_STATE_NAME = "trainer_state.json"

# --- writing -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def written_aside(run_dir: Path, name: str, *, first: bool) -> Iterator[Path]:
    """A context with a temporary folder for a checkpoint. Without an error, it is renamed to `run_dir / name` at the end.

    Args:
        run_dir: the run's folder.
        name: the checkpoint's name.
        first: whether this process creates and renames folders. The other processes only write files.

    Raises:
        OutputError: the checkpoint cannot be written. It is removed, and other checkpoints are unchanged.
    """
    from accelerate.utils import wait_for_everyone

    aside, target = run_dir / ASIDE / name, run_dir / name
    whole = checkpoints(run_dir)
    last = f"the last checkpoint is {whole[-1].name}" if whole else "there is no checkpoint"
    with writing(target, f"{last}; free some space and give the same command again"):
        try:
            if first:
                discard_half(run_dir)
                aside.mkdir(parents=True)
            wait_for_everyone()
            yield aside
            wait_for_everyone()
            if first:
                write_digests(aside)
                if target.exists():  # an earlier checkpoint of the same step
                    shutil.rmtree(target)
                aside.replace(target)
        finally:
            if first:
                discard_half(run_dir)
    wait_for_everyone()


def discard_half(run_dir: Path) -> None:
    """Remove the files of a checkpoint whose writing was interrupted."""
    shutil.rmtree(run_dir / ASIDE, ignore_errors=True)


def write_digests(folder: Path) -> None:
    """Write the SHA-256 digests of all files in a checkpoint into the file DIGESTS. Raises OSError."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    with ThreadPoolExecutor() as pool:
        digests = pool.map(sha256, files)
        lines = [f"{digest}  {path.relative_to(folder)}\n" for digest, path in zip(digests, files, strict=True)]
    text = "".join(lines)
    # The folder is renamed later, so this file need not be written under another name first.
    head = f"# {hashlib.sha256(text.encode()).hexdigest()}\n"
    (folder / DIGESTS).write_text(head + text, encoding="utf-8")


# --- choosing ------------------------------------------------------------------------------------------------------


def checkpoints(run_dir: Path) -> list[Path]:
    """The run's checkpoints, oldest first, including damaged ones."""
    found = [path for path in run_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def sound_checkpoint(run_dir: Path, wanted: str | None = None) -> Path:
    """The checkpoint to resume from. If newer ones are damaged, the log names their damaged files.

    Args:
        run_dir: the run's folder, whose newest undamaged checkpoint is chosen.
        wanted: the path of a checkpoint that is chosen instead.

    Raises:
        OutputError: there is no undamaged checkpoint, or `wanted` is damaged. The message names the damaged files.
    """
    faults: list[str] = []
    for folder in [Path(wanted)] if wanted is not None else reversed(checkpoints(run_dir)):
        reason = fault(folder)
        if reason is None:
            if faults:
                logger.warning("%s; resuming from %s", "; ".join(faults), folder.name)
            return folder
        faults.append(reason)
    if wanted is not None:
        raise OutputError(f"resume_from_checkpoint '{wanted}': {faults[0]}")
    if faults:
        raise OutputError(f"output_dir '{run_dir}': no checkpoint can be used ({'; '.join(faults)}); --overwrite it")
    raise OutputError(f"output_dir '{run_dir}': holds no checkpoint to resume from")


def fault(folder: Path) -> str | None:
    """The first damage of a checkpoint, with the file's path; None if it is not damaged.

    Every file that DIGESTS lists must have its digest. A checkpoint without DIGESTS is accepted if its files can be read.
    """
    sums = folder / DIGESTS
    try:
        if not sums.exists():
            return _unreadable(folder)
        head, _, lines = sums.read_bytes().partition(b"\n")
        if head != b"# " + hashlib.sha256(lines).hexdigest().encode():
            return f"{sums}: damaged"
        listed = (line.split("  ", 1) for line in lines.decode().splitlines())
        wanted = {folder / name: digest for digest, name in listed}
        for path in wanted:
            if not path.exists():
                return f"{path}: missing"
        with ThreadPoolExecutor() as pool:
            for path, found in zip(wanted, pool.map(sha256, wanted), strict=True):
                if found != wanted[path]:
                    return f"{path}: changed since it was written (SHA-256)"
    except OSError as error:
        return f"{error.filename or folder}: cannot be read ({error.strerror})"
    return None


def _unreadable(folder: Path) -> str | None:
    """The first damage of a checkpoint without digests; None if its files can be read."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    if not (folder / TRAINER_STATE_NAME).exists():
        return f"{folder / TRAINER_STATE_NAME}: missing"
    if not any("model" in path.name for path in folder.rglob("*")):
        return f"{folder}: holds no model"
    path = folder
    try:
        for path in files:
            _read_through(path)
    except Exception as error:  # zipfile raises errors of many kinds
        return f"{path}: cannot be read ({first_line(error)})"
    logger.warning("%s: has no %s, as older versions wrote it; its files can be read", folder, DIGESTS)
    return None


def _read_through(path: Path) -> None:
    """Raise an error of any type if a file of a known format cannot be read."""
    if path.name == TRAINER_STATE_NAME:
        from transformers import TrainerState

        TrainerState.load_from_json(str(path))
    elif path.suffix == ".json":
        json.loads(path.read_bytes())
    elif path.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(path, "pt"):
            pass
    elif path.suffix in (".pt", ".pth", ".bin"):  # torch.save writes zip files, whose members have checksums
        with zipfile.ZipFile(path) as file:
            if (member := file.testzip()) is not None:
                raise ValueError(f"{member} is damaged")


# --- the trainer's own state ---------------------------------------------------------------------------------------


def save_state(folder: Path, rank: int, state: dict[str, Any]) -> None:
    """Write a process's state, which consists of nested dicts of tensors and numbers, into a checkpoint."""
    import torch

    torch.save(state, folder / f"dpo_state_{rank}.pt")


def load_state(folder: Path, rank: int) -> dict[str, Any]:
    """A process's state from a checkpoint. Empty if the checkpoint has none, for instance one of another trainer."""
    import torch

    path = folder / f"dpo_state_{rank}.pt"
    return torch.load(path, map_location="cpu", weights_only=True) if path.exists() else {}
