"""A run for other programs: one JSON object a line on standard output, and nothing else there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..run_folder.records import SAMPLES, SUMMARY, json_line, read_records

if TYPE_CHECKING:
    from ..trainer import DPOTrainer


class JsonLines(TrainerCallback):
    """Writes log records, diagnoses, samples and the summary as they come.

    Each line has `type`: "log" (a record of metrics.jsonl, of training or evaluation), "event" (of events.jsonl), "sample"
    (of samples.jsonl), "summary" (summary.json).

    Args:
        trainer: the trainer; the callback must come after its own.
        stream: where to write.
    """

    def __init__(self, trainer: DPOTrainer, stream: IO[str]) -> None:
        self.trainer, self.stream = trainer, stream
        self.events = self.samples = 0

    def write(self, kind: str, record: dict[str, Any]) -> None:
        """One line, at once."""
        self.stream.write(json_line({"type": kind, **record}))
        self.stream.flush()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        resumed = state.global_step > 0  # then earlier ones have been told by the run that was resumed
        self.events = (
            len([e for e in self.trainer.diagnostics.events if e["step"] <= state.global_step]) if resumed else 0
        )
        self.samples = len(self._samples()) if resumed else 0
        self._tell(state)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        if state.is_world_process_zero and logs and "train_runtime" not in logs:
            self.write("log", {"step": state.global_step, **logs})
        self._tell(state)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._tell(state)
        if state.is_world_process_zero:
            self.write("summary", json.loads((Path(str(args.output_dir)) / SUMMARY).read_text(encoding="utf-8")))

    def _samples(self) -> list[dict[str, Any]]:
        return (
            read_records(Path(str(self.trainer.args.output_dir)) / SAMPLES) if self.trainer.samples is not None else []
        )

    def _tell(self, state: TrainerState) -> None:
        """What has come up since the last time."""
        if not state.is_world_process_zero:
            return
        events, samples = self.trainer.diagnostics.events, self._samples()
        for event in events[self.events :]:
            self.write("event", event)
        for sample in samples[self.samples :]:
            self.write("sample", sample)
        self.events, self.samples = len(events), len(samples)
