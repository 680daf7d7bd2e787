"""The check whether a run may use `output_dir`, by the settings and data digests that an earlier run recorded there."""

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
    """Raise OutputError if the folder cannot be created or written to."""
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"output_dir '{folder}': is a file")
    parent = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        obstacle = "not writable" if parent.is_dir() else "a file"
        raise OutputError(f"output_dir '{folder}': cannot be created, '{parent}' is {obstacle}")


def check_output(
    folder: Path, settings: dict[str, Any], digests: dict[str, str], *, resume: bool, overwrite: bool
) -> bool:
    """Check whether a run may use the folder.

    The same command resumes an unfinished run. The folder has a record of the run's settings and of the digests of its data
    files. With other settings or other data, only --resume resumes it.

    Args:
        digests: the result of `data_digests`.

    Returns:
        whether the run resumes from a checkpoint in the folder.

    Raises:
        OutputError: the folder contains a run and neither --resume nor --overwrite was given, or there is nothing to resume.
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
            logging.getLogger("dpo_trainer").warning("%s; continuing with the new contents", what)
        split = [key for key in ("val_split", "seed", "data_seed") if recorded.get(key) != wanted.get(key)]
        if recorded and split and (recorded.get("val_split") or wanted.get("val_split")):
            raise OutputError(
                f"{', '.join(split)}: would hold out pairs that this run was trained on; resume with the run's own values"
            )
        return True
    if overwrite:
        return False
    if (folder / SUMMARY).exists():
        raise OutputError(f"output_dir '{folder}': holds a finished run; choose another folder, or --overwrite it")
    if recorded == wanted:
        if found and changed:
            raise OutputError(
                f"output_dir '{folder}': {what} (last checkpoint: {found[-1].name}); --resume continues with the new "
                "contents, --overwrite starts again"
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
    """The SHA-256 digests of the data files, by the name of the setting with its path.

    A stream may be too large to be read twice, so the file's size is used instead. Data from the hub have no digest.
    """
    found = {}
    for key in ("train_data", "eval_data"):
        path = Path(str(settings.get(key))).expanduser()
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        with contextlib.suppress(OSError):  # the error is reported when the data are read
            parts = [
                str(file.stat().st_size) if key == "train_data" and settings.get("streaming") else sha256(file)
                for file in files
                if file.is_file()
            ]
            if parts:
                found[f"{key} '{settings[key]}'"] = " ".join(parts)
    return found


def record_run(folder: Path, settings: dict[str, Any], digests: dict[str, str]) -> None:
    """Write the settings and digests with which `check_output` compares a later command. Raises OutputError."""
    write_aside(folder / SETTINGS, json.dumps({**settings, DIGESTS: digests}, indent=2, default=str) + "\n")


def clear_run(folder: Path) -> None:
    """Remove a run's checkpoints, settings, metrics, events, samples, summary and report. Other files are kept."""
    discard_half(folder)
    for checkpoint in checkpoints(folder):
        shutil.rmtree(checkpoint, ignore_errors=True)
    for name in (SETTINGS, METRICS, EVENTS, SAMPLES, SUMMARY, REPORT):
        (folder / name).unlink(missing_ok=True)
