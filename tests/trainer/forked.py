"""Runs dpo-train in forked processes that have already imported everything, so that a run takes one second, not ten."""

import json
import multiprocessing
import os
import resource
import signal
import sys
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

import dpo_trainer.cli
from dpo_trainer import DPOTrainer, run_trainer
from dpo_trainer.model import reference_cache
from dpo_trainer.run_folder import checkpoints, records
from dpo_trainer.watch import callbacks, samples

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["dpo_trainer.cli", "dpo_trainer.cli.inspect", "transformers.models.llama.modeling_llama"]
)

#: Places where a process may be ended: for each name, the function that is called there. Model files are written in Rust and
#: optimizer files in C++, so these entries are the Python functions that call the writers.
PLACES: dict[str, tuple[Any, str]] = {
    "computing": (DPOTrainer, "compute_loss"),
    "evaluating": (DPOTrainer, "prediction_step"),
    "sampling": (samples, "generate"),
    "logging": (records, "json_line"),
    "saving the model": (DPOTrainer, "save_model"),
    "saving with torch": (torch, "save"),
    "saving the state": (DPOTrainer, "_own_state"),
    "writing digests": (checkpoints, "write_digests"),
    "renaming": (Path, "replace"),
    "rotating": (run_trainer, "rotate_checkpoints"),
    "writing a text": (Path, "write_text"),
    "reporting": (DPOTrainer, "write_report"),
    "writing the card": (run_trainer, "write_card"),
    "caching references": (reference_cache.ReferenceCache, "write"),
    "finishing": (callbacks.SaveAtTheEnd, "on_train_end"),
}

#: A function that is called at a place with the arguments of the call there.
Act = Callable[..., None]


def kill(*_: Any, **__: Any) -> None:
    """Kill this process, without handlers or clean-up."""
    os.kill(os.getpid(), signal.SIGKILL)


def tear(*call: Any, **_: Any) -> None:
    """Write half of the call's output, then kill this process."""
    match call:
        case Path() as path, str() as text:
            path.write_bytes(text.encode()[: len(text) // 2])
        case DPOTrainer(), str() as folder, *_:
            Path(folder).mkdir(exist_ok=True)
            (Path(folder) / "model.safetensors").write_bytes(b"half")
        case ({"step": _},):
            with Path("run/metrics.jsonl").open("a") as file:
                file.write(json.dumps(call[0])[:20])
        case _, Path() | str() as path:
            Path(path).write_bytes(b"PK half")
    kill()


def fill_the_disk(limit: int, *_: Any, **__: Any) -> None:
    """From now on, no file of this process may exceed `limit` bytes: the system refuses the write (EFBIG)."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))


def at(place: str, call: int, act: Act, *, after: bool = False) -> None:
    """In this process, run `act` before (or after) call number `call`, counted from 0, of a function in PLACES."""
    owner, name = PLACES[place]
    real = getattr(owner, name)
    count = 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        mine, count = count, count + 1
        if mine == call and not after:
            act(*args, **kwargs)
        found = real(*args, **kwargs)
        if mine == call and after:
            act(*args, **kwargs)
        return found

    setattr(owner, name, counted)


def _child(folder: Path, arguments: list[str], said: Connection, prepare: Callable[[], None] | None) -> None:
    os.chdir(folder)
    os.environ["DPO_TRAINER_CACHE"] = str(folder / "cache")
    for stream in (1, 2):
        os.dup2(said.fileno(), stream)  # a pipe, which a full disk does not affect
    sys.stdout, sys.stderr = os.fdopen(1, "w", 1), os.fdopen(2, "w", 1)
    torch.set_num_threads(1)
    if prepare is not None:
        prepare()
    sys.exit(dpo_trainer.cli.main(arguments))


class Started:
    """A process that runs `dpo-train config.yaml ARGUMENTS` in a folder."""

    def __init__(self, folder: Path, *arguments: str, prepare: Callable[[], None] | None = None) -> None:
        self._said, said = _CONTEXT.Pipe(duplex=False)
        target = partial(_child, folder, ["config.yaml", *arguments], said, prepare)
        self.process = _CONTEXT.Process(target=target)
        self.process.start()
        said.close()

    def end(self) -> tuple[int, str]:
        """Wait for the process and return its exit code (negative for a signal) and its output."""
        with os.fdopen(os.dup(self._said.fileno()), errors="replace") as file:
            said = file.read()
        self.process.join(120)
        assert self.process.exitcode is not None, "still running after two minutes"
        return self.process.exitcode, said


def run(folder: Path, *arguments: str, prepare: Callable[[], None] | None = None) -> tuple[int, str]:
    """Run the process to its end and return its exit code (negative for a signal) and its output."""
    return Started(folder, *arguments, prepare=prepare).end()
