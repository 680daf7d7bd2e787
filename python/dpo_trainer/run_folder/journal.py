"""The records that a run writes as it goes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..run import Run
from .records import METRICS, json_line, read_records, write_aside, writing


class Journal(TrainerCallback):
    """The record files in `output_dir`, which the main process alone writes. As a callback it appends every log to METRICS.

    A fresh run starts METRICS anew; a resumed one drops the lines after its checkpoint, which will be written again.

    Attributes:
        listeners: each is called with the file's name and the record once a record is written.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.listeners: list[Callable[[str, dict[str, Any]], None]] = []

    @property
    def folder(self) -> Path:
        """The run's `output_dir` as it is now; a trainer may get other arguments for its next run."""
        return self.run.args.run_folder

    @property
    def first(self) -> bool:
        """Whether this process writes."""
        return self.run.args.process_index == 0

    def append(self, name: str, record: dict[str, Any]) -> None:
        """Add a record as a file's last line. Raises OutputError."""
        if self.first:
            path = self.folder / name
            with writing(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("a", encoding="utf-8") as file:
                    file.write(json_line(record))
            for listener in self.listeners:
                listener(name, record)

    def keep(self, name: str, step: int) -> list[dict[str, Any]]:
        """Start a file anew for a fresh run (step 0), or drop what a resumed one will write again after `step`.

        Returns the records that stay. Raises OutputError.
        """
        path = self.folder / name
        kept = [record for record in read_records(path) if record["step"] <= step] if step else []
        if self.first:
            write_aside(path, "".join(map(json_line, kept)))
        return kept

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.keep(METRICS, state.global_step)

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Any = None, **_: Any) -> None:
        if logs and "train_runtime" not in logs:
            self.append(METRICS, {"step": state.global_step, **logs})
