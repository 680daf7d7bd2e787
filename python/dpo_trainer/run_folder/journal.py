"""The journal of a run: appends records to the files in `output_dir` during the run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..run import Run
from .records import METRICS, json_line, read_records, write_aside, writing


class Journal(TrainerCallback):
    """The record files in `output_dir`, which only the main process writes. The callback appends every log to METRICS.

    A new run empties METRICS. A resumed run removes the lines after its checkpoint, since it writes them again.

    Attributes:
        listeners: functions that are called with the file's name and the record after each written record.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.listeners: list[Callable[[str, dict[str, Any]], None]] = []

    @property
    def folder(self) -> Path:
        """The run's current `output_dir`. A trainer may get other arguments for its next run."""
        return self.run.args.run_folder

    @property
    def first(self) -> bool:
        """Whether this is the main process, which writes."""
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
        """Empty a file for a new run (step 0), or remove the records after `step`, which a resumed run writes again.

        Returns the remaining records. Raises OutputError.
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
