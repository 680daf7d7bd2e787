"""The run's side of `DPOTrainer`: its folder, checkpoints and resuming, what ends it, and what watches it."""

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
    """A trainer with a folder for its run, and observers; it knows no loss.

    Attributes:
        evaluated: single pairs of the last evaluations, by the prefix of their metrics, for the report.
        journal: the run's record files.
    """

    evaluated: dict[str, EvaluatedPairs]
    journal: Journal
    samples: Samples | None
    #: Why the model cannot be trained; `train` raises it.
    obstacle_to_training: str | None = None
    _started_at = _paused_for = 0.0
    #: The step of this run's last checkpoint.
    _saved_at = -1
    #: While a checkpoint is being saved, the folder that it is written to first.
    _aside: Path | None = None

    def _watch(self, scorer: Scorer | None) -> None:
        """Add the observers, in the order in which they are called."""
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
            logger.warning("sample_prompts: the run evaluates nothing, so it samples nothing; set eval_strategy")
        return Samples(self, self.journal, scorer)

    @contextlib.contextmanager
    def pause(self) -> Any:
        """Keep evaluations and checkpoints out of tokens_per_second."""
        start, before = time.perf_counter(), self._paused_for
        try:
            yield
        finally:  # set, not added to: pauses nest when there are several evaluation datasets
            self._paused_for = before + time.perf_counter() - start

    def _training_seconds(self) -> float:
        """Seconds of training since the last call, pauses left out."""
        seconds = time.perf_counter() - self._started_at - self._paused_for
        self._started_at, self._paused_for = time.perf_counter(), 0.0
        return seconds

    # --- from the first step to the last ---------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train, or resume; see `transformers.Trainer.train`.

        SIGTERM and Ctrl-C end it after the step at hand, with a checkpoint: SystemExit with code 143, KeyboardInterrupt.

        Args:
            resume_from_checkpoint: True: the newest checkpoint in `output_dir` that is sound; or a checkpoint's path.

        Raises:
            OutputError: no checkpoint can be used, another run holds `output_dir`, or the disk takes no more.
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
        """The checkpoint to go on from. One process reads the files, and all of them agree."""
        found, refused = "", ""
        if self.is_world_process_zero():
            try:
                found = str(sound_checkpoint(folder, None if wanted is True else str(wanted)))
                logger.info("going on from %s", found)
            except OutputError as error:
                refused = str(error)
        if self.accelerator.num_processes > 1:
            found, refused = broadcast_object_list([found, refused])
        if refused:
            raise OutputError(refused)
        return found

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # transformers would take a step in any case: after a stop before the first one, and where the last one is done.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        if not self.control.should_training_stop:
            try:
                super()._run_epoch(*args, **kwargs)
            except SpoiltUpdate as found:
                self._stop_before_update(str(found), **kwargs)

    def _stop_before_update(self, seen: str, model: nn.Module, trial: Any = None, **_: Any) -> None:
        """End the run as it stood after the last step: no weight has met the gradient."""
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
        """Evaluate on the evaluation dataset, or on another one in the same raw form."""
        if eval_dataset is not None and not isinstance(eval_dataset, (str, dict)):
            eval_dataset = self._ready(eval_dataset, "eval_dataset")
        with self.pause():
            return super().evaluate(eval_dataset, *args, **kwargs)

    def predict(self, test_dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """Rewards of every pair, `predictions [rows, 2]` (chosen, rejected), and metrics with the prefix "test"."""
        return super().predict(self._ready(test_dataset, "test_dataset"), *args, **kwargs)

    # --- files -----------------------------------------------------------------------------------------------------

    def write_report(self, *, finished: bool) -> Path | None:
        """Write `summary.json` (once finished) and `report.html` into `output_dir`; returns the report's path.

        One process writes; the others have nothing to report.
        """
        if not self.is_world_process_zero():
            return None
        with self.pause():
            return report.write_report(self, finished=finished)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model and, unless it is for a checkpoint, its card. Raises OutputError where the disk is full."""
        folder = Path(output_dir) if output_dir else self.args.run_folder
        if self.is_world_process_zero() and (spoilt := _not_finite(self.policy.model)) is not None:
            logger.warning("%s: holds weights that are not finite, first in '%s'", folder.name, spoilt)
        with all_ranks(self.policy.model) if _internal_call else writing(folder):
            super().save_model(output_dir, _internal_call)
        if not _internal_call and self.is_world_process_zero():
            write_card(self, folder, {})  # peft writes one of its own
            for name in active_names(self.policy.model):
                if name != "default":
                    logger.info("the adapter '%s' is saved in %s, where peft keeps it", name, folder / name)

    def _save_base(self, folder: Path, *, anew: bool) -> None:
        """Keep the model that a new adapter belongs to: an older adapter is merged into it, so it stands nowhere else.

        Args:
            anew: also where there is one, which may be an earlier run's, or half of one after a kill.
        """
        model: Any = self.policy.model
        if anew or not (folder / "config.json").exists():
            with writing(folder):
                save_base(self.attached, folder)
                self.processing_class.save_pretrained(folder)  # type: ignore[union-attr]
            logger.info("the model under the new adapter is saved in %s", folder)
        model.peft_config[model.active_adapter].base_model_name_or_path = str(folder.resolve())

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write `README.md` into `output_dir`; takes what `transformers.Trainer.create_model_card` takes.

        `dataset_name` is TRL's name of `dataset`; `push_to_hub` hands it on.
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
        """Load what transformers would not load rightly; whether there was something of that kind."""
        return not self._sharded and (load_translated(model, folder) or load_adapters(model, folder))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self._take_state(load_state(Path(checkpoint), self.args.process_index))
            if self.moving is not None:
                self.moving.load(Path(checkpoint))

    def _own_state(self) -> dict[str, Any]:
        """What a resumed run needs to log and to train on as if it had not stopped, beyond what transformers keeps."""
        raise NotImplementedError

    def _take_state(self, state: dict[str, Any]) -> None:
        """Go on from what `_own_state` gave, or begin where that is empty."""
        raise NotImplementedError


def _not_finite(model: nn.Module) -> str | None:
    """The first parameter with a NaN or an infinity; of a sharded one, this process's shard is looked at."""
    shards = ((name, getattr(value, "_local_tensor", value)) for name, value in model.named_parameters())
    return next((name for name, value in shards if not value.is_meta and not value.isfinite().all()), None)
