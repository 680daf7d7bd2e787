"""Whether a run may use `output_dir`: the settings and the data's digests that a run records there, and their check."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

from ..errors import ConfigError, OutputError
from .checkpoints import checkpoints, discard_half
from .records import EVENTS, METRICS, REPORT, SAMPLES, SETTINGS, SUMMARY, read_object, sha256, write_aside

#: The entry of SETTINGS with the digests of the data files.
DIGESTS = "data_sha256"


def check_place(folder: Path) -> None:
    """Raise OutputError where the folder cannot be made or written to."""
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"output_dir '{folder}': is a file")
    parent = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        obstacle = "not writable" if parent.is_dir() else "a file"
        raise OutputError(f"output_dir '{folder}': cannot be made, '{parent}' is {obstacle}")


def check_output(
    folder: Path, settings: dict[str, Any], digests: dict[str, str], *, resume: bool, overwrite: bool
) -> bool:
    """Whether a run may use the folder; returns whether it goes on from a checkpoint there.

    An unfinished run goes on when the same command is given again: its settings, and the digests of its data files, are
    recorded in the folder. With other settings or other data it goes on only if asked to.

    Args:
        digests: of `data_digests`.

    Raises:
        OutputError: it holds a run and neither --resume nor --overwrite was given, or there is nothing to resume.
    """
    if resume and overwrite:
        raise ConfigError("--resume and --overwrite contradict each other")
    found = checkpoints(folder)
    wanted = json.loads(json.dumps(settings, default=str))
    recorded = read_object(folder / SETTINGS)
    known = recorded.pop(DIGESTS, None) or {}
    changed = [key for key in digests if key in known and known[key] != digests[key]]
    what = f"{' and '.join(changed)} changed since the run began"
    if resume:
        if not found:
            raise OutputError(f"output_dir '{folder}': holds no checkpoint to resume from")
        if changed:
            logging.getLogger("dpo_trainer").warning("%s; going on with the new contents", what)
        return True
    if overwrite:
        return False
    if (folder / SUMMARY).exists():
        raise OutputError(f"output_dir '{folder}': holds a finished run; choose another folder, or --overwrite it")
    if recorded == wanted:
        if found and changed:
            raise OutputError(
                f"output_dir '{folder}': {what} (last checkpoint: {found[-1].name}); --resume goes on with the new "
                "contents, --overwrite starts anew"
            )
        return bool(found)
    if found:
        others = [key for key in {**recorded, **wanted} if recorded.get(key) != wanted.get(key)]
        with_others = f" with other settings ({', '.join(others)})" if recorded else ""
        raise OutputError(
            f"output_dir '{folder}': holds an unfinished run{with_others} (last checkpoint: {found[-1].name}); "
            "--resume or --overwrite it"
        )
    for name in ("config.json", "adapter_config.json"):
        if (folder / name).exists():
            raise OutputError(f"output_dir '{folder}': holds a model; choose another folder, or --overwrite it")
    return False


def data_digests(settings: dict[str, Any]) -> dict[str, str]:
    """The SHA-256 digests of the data files, by the words that name them: the setting and its path.

    For a stream, which may be too large to be read twice, the size is used instead. Data of the hub have no digest.
    """
    found = {}
    for key in ("train_data", "eval_data"):
        path = Path(str(settings.get(key))).expanduser()
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        with contextlib.suppress(OSError):  # reading the data says what is wrong with them
            parts = [
                str(file.stat().st_size) if key == "train_data" and settings.get("streaming") else sha256(file)
                for file in files
                if file.is_file()
            ]
            if parts:
                found[f"{key} '{settings[key]}'"] = " ".join(parts)
    return found


def record_run(folder: Path, settings: dict[str, Any], digests: dict[str, str]) -> None:
    """Write down what `check_output` compares a later command with. Raises OutputError."""
    write_aside(folder / SETTINGS, json.dumps({**settings, DIGESTS: digests}, indent=2, default=str) + "\n")


def clear_run(folder: Path) -> None:
    """Remove what a run left: checkpoints, settings, metrics, events, summary, report. Nothing else is touched."""
    discard_half(folder)
    for checkpoint in checkpoints(folder):
        shutil.rmtree(checkpoint, ignore_errors=True)
    for name in (SETTINGS, METRICS, EVENTS, SAMPLES, SUMMARY, REPORT):
        (folder / name).unlink(missing_ok=True)
