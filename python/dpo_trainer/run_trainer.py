"""The part of `DPOTrainer` that handles the run: its folder, checkpoints, resuming, callbacks and early end."""

from __future__ import annotations

import contextlib
import inspect
import logging
import time
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from torch import nn
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import rotate_checkpoints

from .errors import ConfigError, DataError, ModelError, OutputError
from .model.adapter_kinds import active_names, all_ranks
from .model.adapters import BASE, save_base
from .model.checkpoint_weights import check_kind, load_adapters, load_translated
from .reference_trainer import ReferenceTrainer
from .report import page as report
from .report.model_card import write_card
from .run_folder.checkpoints import discard_half, load_state, save_state, sound_checkpoint, written_aside
from .run_folder.journal import Journal
from .run_folder.lock import run_lock
from .run_folder.records import writing
from .settings.pace import KEPT
from .settings.trl import tell_differences
from .watch.callbacks import LogAtTheEnd, Pace, ProgressLine, ReportFile
from .watch.diagnostics import Diagnostics
from .watch.end_after_step import EndAfterStep
from .watch.evaluated import EvaluatedPairs
from .watch.samples import Samples, Scorer, load_scorer

logger = logging.getLogger("dpo_trainer")


class SpoiltUpdate(Exception):
    """The gradient of a step is not finite: its update would make every weight NaN."""


class RunTrainer(ReferenceTrainer):
    """A trainer with a folder for its run, and callbacks that observe it. It has no loss.

    Attributes:
        evaluated: single pairs of the last evaluations, by the prefix of their metrics, for the report.
        journal: the run's record files.
    """

    evaluated: dict[str, EvaluatedPairs]
    journal: Journal
    samples: Samples | None
    #: Why the model cannot be trained, or None. `train` raises a ModelError with this text.
    obstacle_to_training: str | None = None
    _started_at = _paused_for = 0.0
    #: The step of this run's last checkpoint.
    _saved_at = -1
    #: While a checkpoint is being saved, the folder that it is written to first.
    _aside: Path | None = None

    def _watch(self, scorer: Scorer | None) -> None:
        """Add the callbacks that observe the run, in the order in which they are called."""
        self.evaluated, self.journal = {}, Journal(self)
        self.samples = self._make_samples(scorer)
        self.diagnostics, self.signals = Diagnostics(self, self.journal), EndAfterStep(self)
        for unwanted in (ProgressCallback, PrinterCallback):
            self.remove_callback(unwanted)
        observers = [
            Pace(self),
            LogAtTheEnd(),
            self.moving,
            self.journal,
            self.samples,
            self.diagnostics,
            ReportFile(self),
            self.signals,
            None if self.args.disable_tqdm else ProgressLine(),
        ]
        for observer in observers:
            if observer is not None:
                self.add_callback(observer)

    def _make_samples(self, scorer: Scorer | None) -> Samples | None:
        if scorer is None and self.args.win_rate_scorer is not None:
            scorer = load_scorer(self.args.win_rate_scorer)
        if not self.args.sample_prompts:
            if scorer is not None:
                raise ConfigError("scorer: there is nothing to score; set sample_prompts, e.g. to 32")
            return None
        if self.eval_dataset is None:
            raise ConfigError("sample_prompts: there is no evaluation dataset to take prompts from")
        if self.args.eval_strategy == "no" and not self.args.eval_on_start:
            logger.warning("sample_prompts: the run has no evaluations, so it samples no answers; set eval_strategy")
        return Samples(self, self.journal, scorer)

    @contextlib.contextmanager
    def pause(self) -> Any:
        """A context for evaluations and checkpoints, whose duration does not count in tokens_per_second."""
        start, before = time.perf_counter(), self._paused_for
        try:
            yield
        finally:  # the outer pause sets the total: with several evaluation datasets, pauses are nested
            self._paused_for = before + time.perf_counter() - start

    def _training_seconds(self) -> float:
        """Seconds of training since the last call, without pauses."""
        seconds = time.perf_counter() - self._started_at - self._paused_for
        self._started_at, self._paused_for = time.perf_counter(), 0.0
        return seconds

    # --- from the first step to the last ---------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train, or resume a run.

        SIGTERM and Ctrl-C end the run after the current step with a checkpoint. They raise SystemExit with code 143, or
        KeyboardInterrupt.

        Args:
            resume_from_checkpoint: the path of a checkpoint, or True for the newest undamaged checkpoint in `output_dir`.
            args: as in `transformers.Trainer.train`.
            kwargs: as in `transformers.Trainer.train`.

        Returns:
            the `TrainOutput` of `transformers.Trainer.train`.

        Raises:
            DataError: there is no training data.
            ModelError: the model cannot be trained.
            OutputError: no checkpoint can be used, another run uses `output_dir`, or a file cannot be written.
        """
        if self.train_dataset is None:
            raise DataError("train_dataset: none given, nothing to train on")
        if self.obstacle_to_training is not None:
            raise ModelError(self.obstacle_to_training)
        if self.is_world_process_zero():
            tell_differences(self.args)
        folder, first = self.journal.folder, self.is_world_process_zero()
        with run_lock(folder, first=first), self.signals.listening():
            checkpoint = self._sound_checkpoint(folder, resume_from_checkpoint) if resume_from_checkpoint else None
            if first:
                discard_half(folder)
                if self.attached.merged and self.attached.is_new:
                    self._save_base(folder / BASE, anew=checkpoint is None)
            self._training_seconds()  # the clock starts here
            self._saved_at = -1
            self._take_state({})
            wanted = self.args.eval_on_start
            if wanted is None:
                self.args.eval_on_start = checkpoint is None and self.args.eval_strategy != "no"
            try:
                return super().train(checkpoint, *args, **kwargs)
            finally:
                self.args.eval_on_start = wanted

    def _sound_checkpoint(self, folder: Path, wanted: str | bool) -> str:
        """The checkpoint to resume from. The main process checks the files, and all processes get its answer."""
        found, refused = "", ""
        if self.is_world_process_zero():
            try:
                found = str(sound_checkpoint(folder, None if wanted is True else str(wanted)))
                logger.info("resuming from %s", found)
            except OutputError as error:
                refused = str(error)
        if self.accelerator.num_processes > 1:
            found, refused = broadcast_object_list([found, refused])
        if refused:
            raise OutputError(refused)
        return found

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # transformers would take a step even if the run was stopped before its first step, or its last step is done.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        if not self.control.should_training_stop:
            try:
                super()._run_epoch(*args, **kwargs)
            except SpoiltUpdate as found:
                self._stop_before_update(str(found), **kwargs)

    def _stop_before_update(self, seen: str, model: nn.Module, trial: Any = None, **_: Any) -> None:
        """End the run in its state after the last step. The gradient was not applied to any weight."""
        model.zero_grad()
        self.diagnostics.stop_before_update(self.state, self.control, seen)
        if self.control.should_save and self._saved_at != self.state.global_step:
            self._save_checkpoint(model, trial)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        if self.signals.ending:  # the run is not over: no summary, no final model
            self.is_in_train = False
            self.signals.end(self.signals.ending)
        return super()._finalize_training(*args, **kwargs)

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate on the evaluation dataset, or on another dataset.

        Args:
            eval_dataset: rows in the form of the constructor's `eval_dataset`. None: the constructor's.
            args: as in `transformers.Trainer.evaluate`.
            kwargs: as in `transformers.Trainer.evaluate`.

        Returns:
            the metrics by name, with the prefix "eval_".

        Raises:
            DataError: the rows cannot be used.
        """
        if eval_dataset is not None and not isinstance(eval_dataset, (str, dict)):
            eval_dataset = self._ready(eval_dataset, "eval_dataset")
        with self.pause():
            return super().evaluate(eval_dataset, *args, **kwargs)

    def predict(self, test_dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """Compute the rewards and metrics of a dataset.

        Args:
            test_dataset: rows in the form of the constructor's `eval_dataset`.
            args: as in `transformers.Trainer.predict`.
            kwargs: as in `transformers.Trainer.predict`.

        Returns:
            a `PredictionOutput` with the rewards `predictions` [rows, 2] (chosen, rejected), and metrics with the prefix
                "test_".

        Raises:
            DataError: the rows cannot be used.
        """
        return super().predict(self._ready(test_dataset, "test_dataset"), *args, **kwargs)

    # --- files -----------------------------------------------------------------------------------------------------

    def write_report(self, *, finished: bool) -> Path | None:
        """Write `report.html` into `output_dir`.

        Args:
            finished: whether the run is finished. Then `summary.json` is written too.

        Returns:
            the report's path; None in all processes but the main process, and with `write_report=False`.
        """
        if not self.is_world_process_zero():
            return None
        with self.pause():
            return report.write_report(self, finished=finished)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model and its card.

        Args:
            output_dir: the folder; `args.output_dir` if not given.
            _internal_call: whether transformers saves a checkpoint, which gets no card.

        Raises:
            OutputError: a file cannot be written.
        """
        folder = Path(output_dir) if output_dir else self.args.run_folder
        if self.is_world_process_zero() and (spoilt := _not_finite(self.policy.model)) is not None:
            logger.warning("%s: contains weights that are not finite, first in '%s'", folder.name, spoilt)
        with all_ranks(self.policy.model) if _internal_call else writing(folder):
            super().save_model(output_dir, _internal_call)
        if not _internal_call and self.is_world_process_zero():
            write_card(self, folder, {})  # replaces the card that peft writes
            for name in active_names(self.policy.model):
                if name != "default":
                    logger.info("the adapter '%s' is saved in %s, where peft keeps it", name, folder / name)

    def _save_base(self, folder: Path, *, anew: bool) -> None:
        """Save the base model of a new adapter. An older adapter was merged into it, so no other folder has it.

        Args:
            anew: also save it if the folder has a model, which may be an earlier run's or incomplete.
        """
        model: Any = self.policy.model
        if anew or not (folder / "config.json").exists():
            with writing(folder):
                save_base(self.attached, folder)
                self.processing_class.save_pretrained(folder)  # type: ignore[union-attr]
            logger.info("the model under the new adapter is saved in %s", folder)
        model.peft_config[model.active_adapter].base_model_name_or_path = str(folder.resolve())

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the model card `README.md` into `output_dir`.

        Args:
            args: as in `transformers.Trainer.create_model_card`.
            kwargs: as in `transformers.Trainer.create_model_card`. `dataset_name` is TRL's name for `dataset`, and
                `push_to_hub` passes it on.
        """
        if self.is_world_process_zero():
            if "dataset_name" in kwargs:
                kwargs["dataset"] = kwargs.pop("dataset_name") or kwargs.get("dataset")
            given = inspect.signature(super().create_model_card).bind(*args, **kwargs).arguments
            write_card(self, self.journal.folder, given)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run_dir = Path(super()._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        with self.pause(), written_aside(run_dir, name, first=self.args.should_save) as folder:
            self._aside = folder.parent
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._aside = None
            save_state(folder, self.args.process_index, self._own_state())
            if self.moving is not None and self.args.should_save:
                self.moving.save(folder)
            if self.state.best_global_step == self.state.global_step:
                self.state.best_model_checkpoint = str(run_dir / name)
            if self.args.should_save:
                self.state.save_to_json(str(folder / TRAINER_STATE_NAME))
        self._saved_at = self.state.global_step
        if self.args.should_save:
            kept, best = self.args.save_total_limit, self.state.best_model_checkpoint
            if kept is None and self.args.save_steps is None:
                kept = KEPT
            rotate_checkpoints(str(run_dir), kept, best, use_mtime=True)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._aside) if self._aside is not None else super()._get_output_dir(trial)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        into = model or self.model
        if not self._sharded:
            check_kind(into, resume_from_checkpoint)
        if not self._load_weights(into, resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        if not (best and self._load_weights(self.model, best)):
            super()._load_best_model()

    def _load_weights(self, model: Any, folder: str) -> bool:
        """Load weights that transformers would load wrongly. Returns whether there were such weights."""
        return not self._sharded and (load_translated(model, folder) or load_adapters(model, folder))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self._take_state(load_state(Path(checkpoint), self.args.process_index))
            if self.moving is not None:
                self.moving.load(Path(checkpoint))

    def _own_state(self) -> dict[str, Any]:
        """State that transformers does not save, with which a resumed run trains and logs as if it had not stopped."""
        raise NotImplementedError

    def _take_state(self, state: dict[str, Any]) -> None:
        """Restore the result of `_own_state`. An empty state starts a new run."""
        raise NotImplementedError


def _not_finite(model: nn.Module) -> str | None:
    """Name of the first parameter with a NaN or an infinity, or None. Of sharded parameters, only this process's shard."""
    shards = ((name, getattr(value, "_local_tensor", value)) for name, value in model.named_parameters())
    return next((name for name, value in shards if not value.is_meta and not value.isfinite().all()), None)
