"""dpo-train in processes of its own, forked from one that has imported everything: a run then takes a second, not ten."""

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

#: Where a process may be ended: what is called there, by name. Model files are written by transformers in Rust, and
#: optimizer files by torch in C++; so what calls them stands here.
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

#: What is done at a place, given the arguments of the call.
Act = Callable[..., None]


def kill(*_: Any, **__: Any) -> None:
    """No handler, no clean-up."""
    os.kill(os.getpid(), signal.SIGKILL)


def tear(*call: Any, **_: Any) -> None:
    """Leave half of what the call would have written, then kill."""
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
    """From here on no file of this process may grow beyond so many bytes: the system refuses the write (EFBIG)."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))


def at(place: str, call: int, act: Act, *, after: bool = False) -> None:
    """Act before, or after, the so-many-th call (from 0) of what PLACES names, in this process."""
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
        os.dup2(said.fileno(), stream)  # a pipe, which a full disk leaves alone
    sys.stdout, sys.stderr = os.fdopen(1, "w", 1), os.fdopen(2, "w", 1)
    torch.set_num_threads(1)
    if prepare is not None:
        prepare()
    sys.exit(dpo_trainer.cli.main(arguments))


class Started:
    """The process of `dpo-train config.yaml ARGUMENTS`, started in a folder."""

    def __init__(self, folder: Path, *arguments: str, prepare: Callable[[], None] | None = None) -> None:
        self._said, said = _CONTEXT.Pipe(duplex=False)
        target = partial(_child, folder, ["config.yaml", *arguments], said, prepare)
        self.process = _CONTEXT.Process(target=target)
        self.process.start()
        said.close()

    def end(self) -> tuple[int, str]:
        """Wait for it: its exit code, negative for a signal, and what it printed."""
        with os.fdopen(os.dup(self._said.fileno()), errors="replace") as file:
            said = file.read()
        self.process.join(120)
        assert self.process.exitcode is not None, "still running after two minutes"
        return self.process.exitcode, said


def run(folder: Path, *arguments: str, prepare: Callable[[], None] | None = None) -> tuple[int, str]:
    """Run it to its end: its exit code, negative for a signal, and what it printed."""
    return Started(folder, *arguments, prepare=prepare).end()
