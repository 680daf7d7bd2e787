"""DPOTrainer: `transformers.Trainer` with preference data, a reference model and the fused loss."""

from __future__ import annotations

import contextlib
import inspect
import logging
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, nn
from torch.utils.data import Sampler, SequentialSampler
from transformers import PreTrainedModel, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import rotate_checkpoints

from dpo_kernels import DPOOutput, length_desensitized_weights, objectives, use_backend

from .batch.collator import PairCollator
from .data.prepare import Account
from .data.rows import REFERENCE
from .errors import ConfigError, DataError, ModelError, OutputError, first_line
from .model import loss_path
from .model.fit import check_best_metric, check_fit
from .model.moving_reference import MovingReference
from .model.reference_cache import ReferenceCache, data_fingerprint, folder_of, model_fingerprint
from .model.references import AdapterOffReference, FrozenReference, reference_logps
from .model.split import Batch, SplitModel, call_through, disable_dropout, load_model, load_tokenizer
from .pair_trainer import PairTrainer, looked_at
from .report import page as report
from .report.model_card import write_card
from .run_folder.checkpoints import discard_half, load_state, save_state, sound_checkpoint, written_aside
from .run_folder.lock import EndAfterStep, run_lock
from .run_folder.records import writing
from .settings.config import DPOConfig
from .watch.callbacks import LogAtTheEnd, MetricsFile, ProgressLine, ReportFile
from .watch.diagnostics import Diagnostics
from .watch.evaluated import EvaluatedPairs, look_at
from .watch.metrics import TINY, MetricWindow, memory_mib
from .watch.metrics import names as metric_names
from .watch.samples import Samples, Scorer, load_scorer

logger = logging.getLogger("dpo_trainer")

#: What transformers adds to an evaluation.
SPEEDS = ("runtime", "samples_per_second", "steps_per_second")


class SpoiltUpdate(Exception):
    """The gradient of a step is not finite: its update would make every weight NaN."""


class DPOTrainer(PairTrainer):
    """Trains a causal language model on preference pairs with Direct Preference Optimization (arXiv:2305.18290).

    Batches, checkpoints, resuming, schedules, trackers and distribution are those of `transformers.Trainer`.
    This class adds the data, the reference, the loss, metrics that weigh every pair the same, and the run's files in
    `output_dir`: `metrics.jsonl`, `events.jsonl`, `samples.jsonl`, `summary.json`, `report.html`, the card `README.md`.

    Args:
        model: a causal language model, a peft model, or a path for `load_model`.
        ref_model: the reference: a model or a path. None: the model as it is now (a frozen copy, or nothing at all with
            `precompute_ref_log_probs=True`), or, with an adapter, the model with the adapter switched off. An objective
            that needs no reference gets none, unless one is given: then for the KL in the log.
        args: a DPOConfig; defaults with output_dir "dpo_output" if not given.
        train_dataset: a `datasets.Dataset` or a list of rows with `prompt`, `chosen`, `rejected` (text or chat
            messages; without `prompt`, chosen and rejected are whole and begin alike), optional `tools` (for the chat
            template), optional `weight` (confidence: losses are weighted means), optional `ref_chosen_logps` and
            `ref_rejected_logps` (summed log-probabilities under the reference); or, with `max_steps`, a stream of them: a
            `datasets.IterableDataset`, or one of torch.
        eval_dataset: the same, or a dict of several; no stream.
        processing_class: the tokenizer; loaded from the model's folder if not given.
        data_collator: a PairCollator of your own making.
        peft_config: a peft config; the model is wrapped in an adapter of this kind.
        scorer: judges answers, (prompts, completions) -> a number each, higher is better: logs the win rate of the
            policy's answers to `sample_prompts` held-out prompts. Instead of `win_rate_scorer`, which names one.
        compute_metrics, callbacks, optimizers, optimizer_cls_and_kwargs: as in `transformers.Trainer`. `predict` and
            compute_metrics see rewards `[rows, 2]` (chosen, rejected).

    Raises:
        ConfigError, DataError, ModelError: ValueErrors of one line that say what is wrong and where.
    """

    # Read by transformers: our loss is already a mean over the accumulated batch, not over a micro-batch.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: str | Path | PreTrainedModel | nn.Module,
        ref_model: str | Path | PreTrainedModel | nn.Module | None = None,
        args: DPOConfig | None = None,
        data_collator: Callable[[list[dict[str, Any]]], Batch] | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        compute_metrics: Callable[..., dict[str, float]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        optimizer_cls_and_kwargs: tuple[Any, dict[str, Any]] | None = None,
        peft_config: Any = None,
        scorer: Scorer | None = None,
    ) -> None:
        args = args if args is not None else DPOConfig(output_dir="dpo_output")
        if not isinstance(args, DPOConfig):
            raise ConfigError(f"args: expected a DPOConfig, got {type(args).__name__}")
        if isinstance(model, (str, Path)):
            processing_class = processing_class if processing_class is not None else load_tokenizer(model)
            model = cast(nn.Module, load_model(model, **_kwargs(args.model_init_kwargs)))
        if isinstance(ref_model, (str, Path)):
            ref_model = cast(nn.Module, load_model(ref_model, **_kwargs(args.model_init_kwargs)))
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            raise ModelError(
                f"model: {type(model).__name__} is an encoder-decoder; only causal language models are supported"
            )
        if ref_model is model:
            raise ModelError("ref_model: is the model itself, which would move with it; pass None for a frozen copy")
        if processing_class is None:
            name = getattr(getattr(model, "config", None), "_name_or_path", "")
            if not name:
                raise ModelError("processing_class: no tokenizer given, and the model does not say where it came from")
            processing_class = load_tokenizer(name)

        self.accounts: list[Account] = []
        with args.main_process_first(desc="tokenising", local=True):
            if train_dataset is not None:
                train_dataset = self.tokenize(train_dataset, "train_dataset", args, processing_class)
            if isinstance(eval_dataset, dict):
                eval_dataset = {
                    key: self.tokenize(value, f"eval_dataset {key}", args, processing_class)
                    for key, value in eval_dataset.items()
                }
            elif eval_dataset is not None:
                eval_dataset = self.tokenize(eval_dataset, "eval_dataset", args, processing_class)

        if peft_config is not None:
            from peft import PeftModel, get_peft_model

            if isinstance(model, PeftModel):
                raise ModelError(
                    "peft_config: the model has an adapter already; pass the plain model or no peft_config"
                )
            try:
                model = get_peft_model(model, peft_config)  # type: ignore[arg-type]
            except (ValueError, TypeError) as error:
                raise ConfigError(f"peft_config: {first_line(error)}") from error
        if args.disable_dropout:
            disable_dropout(cast(nn.Module, model))
            if ref_model is not None:
                disable_dropout(ref_model)

        if data_collator is None:
            pad = getattr(processing_class, "pad_token_id", None)
            data_collator = PairCollator(
                pad_token_id=pad if pad is not None else 0,
                pad_to_multiple_of=args.pad_to_multiple_of,
                layout=args.batch_layout,
            )
        check_fit(args, cast(nn.Module, model), ref_model, processing_class, looked_at(train_dataset, eval_dataset))
        if args.n_gpu > 1:
            logger.warning("using one of %d GPUs; start with torchrun or accelerate launch to use all", args.n_gpu)
            args._n_gpu = 1
        super().__init__(
            model=model,  # type: ignore[arg-type]
            args=args,
            data_collator=data_collator,  # type: ignore[arg-type]
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
        )
        self.args: DPOConfig
        # Makes transformers hand the accumulated batch's size to training_step in every version.
        self.model_accepts_loss_kwargs = True
        # Made once: some objectives keep a running mean between steps.
        self._objectives = objectives.build(args.loss_type)
        self._window: dict[str, MetricWindow] = {"train": MetricWindow(), "eval": MetricWindow()}
        self._aside: Path | None = None
        self._saved_at = -1  # the step of this run's last checkpoint
        #: Single pairs of the last evaluations, by the prefix of their metrics, for the report.
        self.evaluated: dict[str, EvaluatedPairs] = {}
        self._grad_norm_max: Tensor | None = None
        self._started_at, self._paused_for = time.perf_counter(), 0.0

        self.policy = SplitModel(self.model)  # type: ignore[arg-type]
        if args.torch_compile and self.policy.backbone is not None:
            self.policy.backbone.compile(backend=args.torch_compile_backend, mode=args.torch_compile_mode)
        example = self._example_batch()
        if example is not None:
            with self.accelerator.autocast():
                self.policy.verify(example)
        self.reference = self._make_reference(ref_model, example)
        self.moving = self._make_moving() if args.sync_ref_model else None
        self._check_layout()
        self.loss_path = loss_path.choose(self.policy, self.reference, args.loss_path)
        given = any(name in dataset.column_names for dataset in self.datasets() for name in REFERENCE)
        for setting, used in (("ld_alpha", args.ld_alpha is not None), ("kl_coef", args.kl_coef > 0)):
            if used and (given or args.precompute_ref_log_probs):
                raise ConfigError(
                    f"{setting}: needs the reference model in every step; log-probabilities computed beforehand are plain sums"
                )
        if args.kl_coef > 0 and self.reference is None:
            raise ConfigError(f"kl_coef: needs a reference, and loss_type {args.loss_type} has none; give a ref_model")
        self.samples = self._make_samples(scorer)
        if compute_metrics is None and eval_dataset is not None:  # compute_metrics has names of its own
            check_best_metric(args, self._evaluation_names())
        if args.precompute_ref_log_probs:
            self._precompute_all()
        self._add_callbacks()

    # --- construction ----------------------------------------------------------------------------------------------

    def _example_batch(self) -> Batch | None:
        """Two short pairs, padded, on which to check the model's split, or None without data."""
        if not self.datasets():
            return None
        dataset = self.datasets()[0]
        rows = [dict(dataset[index]) for index in range(min(2, len(dataset)))]
        for row in rows:
            row["prompt_input_ids"] = row["prompt_input_ids"][-16:]
            for side in ("chosen_input_ids", "rejected_input_ids"):
                row[side] = row[side][:16]
        return self._prepare_inputs(self._padded_collator()(rows))  # type: ignore[arg-type]

    def _padded_collator(self) -> Callable[[list[dict[str, Any]]], Batch]:
        collator: Any = self.data_collator
        return replace(collator, layout="padded") if isinstance(collator, PairCollator) else collator

    def _check_layout(self) -> None:
        """Try a batch in which the longest pair shares its prompt and its row with another; pad where the answers differ.

        The longest, since a model may attend within a window or switch its position encoding from some length on.
        Without autocast, because rounding would hide small leaks from one sequence into another.
        Both attention by sequence and a mask over whole rows are tried, since batches take what costs least. Compiled
        backbones, which would be compiled anew for every number of sequences, get masks alone.
        """
        collator = self.data_collator
        if not isinstance(collator, PairCollator) or collator.layout == "padded" or not self.datasets():
            return
        collator.attention_cost = self.policy.attention_cost()
        dataset = self.datasets()[0]
        lengths = dataset["length"]
        longest = max(range(len(lengths)), key=lengths.__getitem__)
        rows = [dict(dataset[index]) for index in {longest, 0 if longest else len(lengths) - 1}]
        sequences, shared, padded = (
            self._prepare_inputs(replace(collator, layout=layout, attention_cost=0.0)(rows))  # type: ignore[arg-type]
            for layout in ("sequences", "prefix_shared", "padded")
        )
        splits = [self.policy]
        if isinstance(self.reference, FrozenReference):
            splits.append(self.reference.split)

        def obstacle(batch: Batch) -> str | None:
            found = ((split, split.obstacle_to_layout(batch, padded)) for split in splits)
            return next(
                (f"{type(split.model).__name__}: prompts cannot be shared, {why}" for split, why in found if why), None
            )

        if not self.args.torch_compile:
            undo = [split.attend_by_sequence() for split in splits]
            collator.by_sequence = all(undo) and obstacle(sequences) is None
            if not collator.by_sequence:
                for restore in filter(None, undo):
                    restore()
        if reason := obstacle(shared):
            collator.layout = "sequences" if collator.by_sequence else "padded"
            if not collator.by_sequence:
                logger.warning("%s; using padded batches, slower", reason)

    def _make_reference(self, ref_model: Any, example: Batch | None) -> FrozenReference | AdapterOffReference | None:
        datasets = self.datasets()
        if datasets and all(name in dataset.column_names for dataset in datasets for name in REFERENCE):
            return None  # the data bring the reference's log-probabilities
        if ref_model is not None:
            reference = FrozenReference(ref_model.to(self.args.device))
            if example is not None:
                with self.accelerator.autocast():
                    reference.split.verify(example)
            return reference
        if not objectives.needs_reference(self._objectives):
            return None
        if hasattr(self.model, "disable_adapter"):
            return AdapterOffReference(self.policy)
        if self.args.precompute_ref_log_probs:
            return None  # computed from the model itself before it moves
        reference = FrozenReference.copy_of(self.model)  # type: ignore[arg-type]
        reference.split.split = self.policy.split
        return reference

    def _make_moving(self) -> MovingReference:
        if not isinstance(self.reference, FrozenReference) or hasattr(self.model, "disable_adapter"):
            raise ConfigError(
                "sync_ref_model: moves a whole model's weights; it cannot move "
                + (
                    "reference log-probabilities in the data"
                    if self.reference is None
                    else "the reference of an adapter"
                )
            )
        args = self.args
        return MovingReference(
            self.policy.model,
            self.reference.split.model,
            alpha=args.ref_model_mixup_alpha,
            every=args.ref_model_sync_steps,
        )

    def _precompute_all(self) -> None:
        if self.train_dataset is not None:
            self.train_dataset = self._with_reference(self.train_dataset, "train")
        if isinstance(self.eval_dataset, dict):
            self.eval_dataset = {
                key: self._with_reference(value, f"eval {key}") for key, value in self.eval_dataset.items()
            }
        elif self.eval_dataset is not None:
            self.eval_dataset = self._with_reference(self.eval_dataset, "eval")
        self.reference = None

    def _with_reference(self, dataset: Any, name: str) -> Any:
        """The dataset with the reference's log-probabilities as columns, computed unless it has them."""
        if all(column in dataset.column_names for column in REFERENCE):
            return dataset
        batch_size = self.args.precompute_ref_batch_size or self.args.per_device_eval_batch_size
        if (cache := self.reference_cache(dataset)) is None:
            columns = self.reference_logps(dataset, batch_size=batch_size)
        else:
            columns = cache.fill(
                lambda rows: self.reference_logps(dataset.select(rows), batch_size=batch_size),
                name=name,
                process_index=self.args.process_index,
                num_processes=self.args.world_size,
                wait=self.accelerator.wait_for_everyone,
            )
        for column, values in zip(REFERENCE, columns, strict=True):
            dataset = dataset.add_column(column, values)
        return dataset

    def reference_logps(self, rows: Any, *, batch_size: int) -> tuple[list[float], list[float]]:
        """Summed log-probabilities of tokenised rows' answers, chosen and rejected, under the reference.

        Under the model as it stands where no reference is in memory.
        """
        source = self.reference if self.reference is not None else self.policy
        split = source.split if isinstance(source, (FrozenReference, AdapterOffReference)) else source
        was_training = self.policy.model.training
        self.policy.model.eval()
        try:
            return reference_logps(
                source,
                split,
                rows,
                self.data_collator,  # type: ignore[arg-type]
                batch_size=batch_size,
                device=self.args.device,
                context=self._kernels,
            )
        finally:
            self.policy.model.train(was_training)

    def reference_cache(self, dataset: Any) -> ReferenceCache | None:
        """Where the reference's log-probabilities of a tokenised dataset lie; None if they are not kept."""
        root = folder_of(self.args.ref_cache_dir)
        if root is None:
            return None
        precision = self.accelerator.mixed_precision  # autocast changes what the same weights answer
        facts = {
            "model": model_fingerprint(self.policy.model if self.reference is None else self.reference.split.model),
            "data": data_fingerprint(dataset),
            "precision": precision,
        }
        return ReferenceCache(root, facts, dataset["length"])

    def _make_samples(self, scorer: Scorer | None) -> Samples | None:
        if scorer is None and self.args.win_rate_scorer is not None:
            scorer = load_scorer(self.args.win_rate_scorer)
        if not self.args.sample_prompts:
            if scorer is not None:
                raise ConfigError("scorer: there is nothing to score; set sample_prompts, e.g. to 32")
            return None
        if self.eval_dataset is None:
            raise ConfigError("sample_prompts: there is no evaluation dataset to take prompts from")
        return Samples(self, scorer)

    def _add_callbacks(self) -> None:
        for unwanted in (ProgressCallback, PrinterCallback):
            self.remove_callback(unwanted)
        self.add_callback(LogAtTheEnd())
        if self.moving is not None:
            self.add_callback(self.moving)
        self.add_callback(MetricsFile())
        if self.samples is not None:
            self.add_callback(self.samples)
        self.diagnostics = Diagnostics(self)
        self.add_callback(self.diagnostics)
        self.add_callback(ReportFile(self))
        self.signals = EndAfterStep(self)
        self.add_callback(self.signals)
        if not self.args.disable_tqdm:
            self.add_callback(ProgressLine())

    # --- the loss --------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _kernels(self) -> Any:
        """Mixed precision and the choice of kernels around any use of the model."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.accelerator.autocast())
            if self.args.backend is not None:
                stack.enter_context(use_backend(self.args.backend))
            yield

    def pair_loss(self, batch: Batch, pair_weights: Tensor) -> DPOOutput:
        """Policy, reference and loss of one batch: `loss` is the sum over pairs of `pair_weights` [P] times their losses.

        The one place where hidden states become a loss. Only completion tokens meet the head. On the linear path their
        logits exist a chunk at a time and meet their gradient there; on the logits path they all exist, and in training
        their memory is reused for their gradient.
        """
        has_reference = "ref_logps" not in batch and self.reference is not None
        options: dict[str, Any] = {
            "ref_logps": batch.get("ref_logps"),
            "beta": self.args.beta,
            "loss_type": self._objectives,
            "loss_weights": self.args.loss_weights,
            "label_smoothing": self.args.label_smoothing,
            "cu_seqlens": batch["cu_seqlens"],
            "pair_weights": pair_weights,
            "token_weights": self._token_weights(batch),
            "use_weighting": self.args.use_weighting,
            # Summed over pairs the term counts once for each; here it counts as much as the batch does in its step.
            "kl_coef": self.args.kl_coef * float(pair_weights.mean())
            if self.args.kl_coef and len(pair_weights)
            else 0.0,
            "statistics": self._statistics(has_reference),
            "reduction": "sum",
        }
        reference = self.reference if has_reference else None
        if self.loss_path == "linear":
            budget = loss_path.memory_budget(self.args.memory_budget, self.policy)
            options |= {"memory_budget": budget, "grad_filter": self.args.grad_filter}
            return loss_path.from_hidden(self.policy, reference, batch, options)
        return loss_path.from_logits(self.policy, reference, batch, options)

    def _statistics(self, has_reference: bool) -> tuple[str, ...]:
        """The statistics asked for that a batch can have."""
        absent = {"kl"} if not has_reference else set()
        if self.loss_path == "logits":
            absent.add("grad_dropped_mass")  # nothing is left out
        return tuple(name for name in self.args.statistics if name not in absent)

    def _token_weights(self, batch: Batch) -> Tensor | None:
        if self.args.ld_alpha is None:
            return None
        return length_desensitized_weights(batch["labels"], self.args.ld_alpha, cu_seqlens=batch["cu_seqlens"])

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, DPOOutput]:
        """The batch's share of the weighted mean over all pairs of the optimizer step, on all processes.

        `num_items_in_batch` is the sum of the step's weights (transformers gets it from `_get_num_items_in_batch`);
        without it, the mean is over the batch. Dividing by weights, not by the number of pairs, makes their unit
        irrelevant and log 2 the start whatever they are.
        """
        weights = _weights(inputs)
        if num_items_in_batch is None:
            share = weights / weights.sum().clamp(min=TINY)
        else:
            # DDP averages gradients over processes; undo that, the divisor sums over all of them.
            share = weights * (self.accelerator.num_processes / num_items_in_batch)
        for item in self._objectives:
            if isinstance(item, nn.Module):
                item.train(model.training)  # an evaluation leaves running means alone
        with self._kernels():
            if self.accelerator.num_processes > 1 and model.training:
                wrapper = getattr(model, "_orig_mod", model)
                output = call_through(wrapper, self.policy.model, self.pair_loss, inputs, share)
            else:
                output = self.pair_loss(inputs, share)
        self._window["train" if model.training else "eval"].add(output, weights, inputs["num_tokens"])
        loss = output.loss
        return (loss, output) if return_outputs else loss

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor | None:
        """Sum of the weights of one optimizer step's pairs, on all processes (named and called by transformers)."""
        if not batch_samples:
            return None
        total = torch.stack([_weights(batch).sum().to(device) for batch in batch_samples]).sum()
        total = self.accelerator.reduce(total, "sum") if self.accelerator.num_processes > 1 else total
        return total.clamp(min=TINY)

    def _gather_rows(self, rows: Tensor) -> Tensor:
        """All processes' rows, which need not be as many on each."""
        return torch.cat(self._gather([rows.cpu()])).to(rows.device)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Loss of one batch; unless `prediction_loss_only`, also rewards `[P, 2]` and which is preferred."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            loss, output = self.compute_loss(model, inputs, return_outputs=True)
        if prediction_loss_only:
            return loss.detach(), None, None
        rewards = torch.stack([output.chosen_rewards, output.rejected_rewards], dim=1).detach()
        return loss.detach(), rewards, torch.zeros(len(rewards), dtype=torch.int64, device=rewards.device)

    # --- metrics ---------------------------------------------------------------------------------------------------

    def _drain(self, mode: str) -> dict[str, float]:
        return self._window[mode].drain(self._gather)

    def _gather(self, objects: list[Any]) -> list[Any]:
        """All processes' objects, in the order of the processes."""
        return gather_object(objects) if self.accelerator.num_processes > 1 else objects

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        """Keep the window's largest norm: the log has the last step's only. Waits for no device."""
        norm = super()._get_grad_norm(*args, **kwargs)
        if norm is not None:
            seen = torch.as_tensor(norm).detach()
            # A gradient scaler leaves out such updates itself, and meets them as a matter of course.
            if "not_finite" in self.args.stop_on and getattr(self.accelerator, "scaler", None) is None:
                value = float(getattr(seen, "full_tensor", lambda: seen)())  # FSDP2 may shard it
                if not math.isfinite(value):
                    raise SpoiltUpdate(f"the gradient norm of step {self.state.global_step + 1} is {value}")
            before = self._grad_norm_max
            self._grad_norm_max = seen if before is None else torch.maximum(before, seen)
        return norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the window's means to what transformers logs for training steps."""
        if "loss" in logs and "learning_rate" in logs:
            means = self._drain("train")
            seconds = time.perf_counter() - self._started_at - self._paused_for
            self._started_at, self._paused_for = time.perf_counter(), 0.0
            tokens = means.pop("tokens", 0.0)
            if self._grad_norm_max is not None:
                means["grad_norm_max"] = float(self._grad_norm_max)
                self._grad_norm_max = None
            logs = {**logs, **means, "tokens_per_second": tokens / seconds if seconds > 0 else 0.0, "tokens": tokens}
            logs["memory_mib"] = memory_mib(self.args.device)
        super().log(logs, start_time)

    @contextlib.contextmanager
    def _pause(self) -> Any:
        """Keep evaluations and checkpoints out of tokens_per_second."""
        start, before = time.perf_counter(), self._paused_for
        try:
            yield
        finally:  # set, not added to: pauses nest when there are several evaluation datasets
            self._paused_for = before + time.perf_counter() - start

    def _get_eval_sampler(self, eval_dataset: Any) -> Sampler[int] | None:
        # transformers would order evaluations as it orders training; predictions belong to rows, in the rows' order.
        return SequentialSampler(eval_dataset) if self.args.world_size <= 1 else None

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate; the metrics are means over all pairs, and over all completion tokens, of the dataset."""
        self._window["eval"] = MetricWindow()
        if self.accelerator.num_processes > 1:
            self.gather_function = self._gather_rows  # the loop itself sets it back
        result = super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", args[4] if len(args) > 4 else "eval")
        if self.args.write_report and (output := self._window["eval"].joined(self._gather)) is not None:
            dataset = getattr(args[0] if args else kwargs["dataloader"], "dataset", None)
            if (pairs := look_at(output, dataset, self.processing_class)) is not None:
                self.evaluated[prefix] = pairs
        means = self._drain("eval")
        means.pop("tokens", None)
        if self.samples is not None and prefix.startswith("eval"):
            means |= self.samples.evaluate(prefix, getattr(args[0] if args else kwargs["dataloader"], "dataset", None))
        cast(dict[str, float], result.metrics).update({f"{prefix}_{name}": value for name, value in means.items()})
        return result

    def _determine_best_metric(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super()._determine_best_metric(*args, **kwargs)
        except KeyError as error:
            raise ConfigError(f"metric_for_best_model: {error.args[0]}") from error

    def _evaluation_names(self) -> list[str]:
        """What this run's evaluations log, without the prefix "eval_"."""
        found = []
        named: Any = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"": self.eval_dataset}
        for key, dataset in named.items():
            given = self.args.precompute_ref_log_probs or all(name in dataset.column_names for name in REFERENCE)
            own = metric_names(
                self._statistics(self.reference is not None and not given),
                reference=given or self.reference is not None,
            )
            own += [*(self.samples.metric_names if self.samples is not None else ()), *SPEEDS]
            found += [f"{key}_{name}" if key else name for name in own]
        return found

    # --- the run ---------------------------------------------------------------------------------------------------

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
        self._window["train"].drop(self.current_gradient_accumulation_steps)
        self.diagnostics.stop_before_update(self.state, self.control, seen)
        if self.control.should_save and self._saved_at != self.state.global_step:
            self._save_checkpoint(model, trial)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)

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
        self._window["train"] = MetricWindow()
        run_dir, first = Path(str(self.args.output_dir)), self.is_world_process_zero()
        with run_lock(run_dir, first=first), self.signals.listening():
            checkpoint = self._sound_checkpoint(run_dir, resume_from_checkpoint) if resume_from_checkpoint else None
            if first:
                discard_half(run_dir)
            self._started_at, self._paused_for, self._saved_at = time.perf_counter(), 0.0, -1
            return super().train(checkpoint, *args, **kwargs)

    def _sound_checkpoint(self, run_dir: Path, wanted: str | bool) -> str:
        """The checkpoint to go on from. One process reads the files, and all of them agree."""
        found, refused = "", ""
        if self.is_world_process_zero():
            try:
                found = str(sound_checkpoint(run_dir, None if wanted is True else str(wanted)))
                logger.info("going on from %s", found)
            except OutputError as error:
                refused = str(error)
        if self.accelerator.num_processes > 1:
            found, refused = broadcast_object_list([found, refused])
        if refused:
            raise OutputError(refused)
        return found

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        if self.signals.ending:  # the run is not over: no summary, no final model
            self.is_in_train = False
            self.signals.end(self.signals.ending)
        return super()._finalize_training(*args, **kwargs)

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate on the evaluation dataset, or on another one in the same raw form."""
        if eval_dataset is not None and not isinstance(eval_dataset, (str, dict)):
            eval_dataset = self._ready(eval_dataset, "eval_dataset")
        with self._pause():
            return super().evaluate(eval_dataset, *args, **kwargs)

    def predict(self, test_dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """Rewards of every pair, `predictions [rows, 2]` (chosen, rejected), and metrics with the prefix "test"."""
        return super().predict(self._ready(test_dataset, "test_dataset"), *args, **kwargs)

    def _ready(self, dataset: Any, name: str) -> Any:
        """Tokenised, and with a reference to compare with."""
        if "prompt_input_ids" not in getattr(dataset, "column_names", ()):
            dataset = self.tokenize(dataset, name, self.args, self.processing_class)
            self.accounts.pop()  # not part of the run
        needed = objectives.needs_reference(self._objectives)
        if needed and self.reference is None and any(column not in dataset.column_names for column in REFERENCE):
            if self.state.global_step > 0:
                raise DataError(
                    f"{name}: the reference was dropped after precomputing and the model has moved since; "
                    f"pass the dataset to the constructor, or give it the columns {' and '.join(REFERENCE)}"
                )
            dataset = self._with_reference(dataset, name)
        return dataset

    @property
    def reference_kind(self) -> str:
        """Where the reference's log-probabilities come from, in words."""
        if self.moving is not None:
            return self.moving.describe()
        if isinstance(self.reference, AdapterOffReference):
            return "the model without its adapter"
        if isinstance(self.reference, FrozenReference):
            return "a frozen model"
        if not objectives.needs_reference(self._objectives):
            return "none"
        return "log-probabilities computed beforehand"

    def write_report(self, *, finished: bool) -> Path | None:
        """Write `summary.json` (once finished) and `report.html` into `output_dir`; returns the report's path.

        One process writes; the others have nothing to report.
        """
        if not self.is_world_process_zero():
            return None
        with self._pause():
            return report.write_report(self, finished=finished)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model and, unless it is for a checkpoint, its card. Raises OutputError where the disk is full."""
        folder = Path(output_dir or str(self.args.output_dir))
        if self.is_world_process_zero() and (spoilt := _not_finite(self.policy.model)) is not None:
            logger.warning("%s: holds weights that are not finite, first in '%s'", folder.name, spoilt)
        with contextlib.nullcontext() if _internal_call else writing(folder):
            super().save_model(output_dir, _internal_call)
        if not _internal_call and self.is_world_process_zero():
            write_card(self, folder, {})  # peft writes one of its own

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write `README.md` into `output_dir`; takes what `transformers.Trainer.create_model_card` takes."""
        if self.is_world_process_zero():
            given = inspect.signature(super().create_model_card).bind(*args, **kwargs).arguments
            write_card(self, Path(str(self.args.output_dir)), given)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run_dir = Path(super()._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        with self._pause(), written_aside(run_dir, name, first=self.args.should_save) as folder:
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
            best = self.state.best_model_checkpoint
            rotate_checkpoints(str(run_dir), self.args.save_total_limit, best, use_mtime=True)

    def _get_output_dir(self, trial: Any) -> str:
        """While a checkpoint is being saved, the folder that it is written to first."""
        return str(self._aside) if self._aside is not None else super()._get_output_dir(trial)

    def _own_state(self) -> dict[str, Any]:
        """What a resumed run needs to log and to train on as if it had not stopped, beyond what transformers keeps."""
        running = {
            str(index): item.state_dict() for index, item in enumerate(self._objectives) if isinstance(item, nn.Module)
        }
        norm = self._grad_norm_max
        return {
            "window": self._window["train"].state(),
            "grad_norm_max": None if norm is None else norm.cpu(),
            "objectives": running,
        }

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        state = load_state(Path(checkpoint), self.args.process_index) if checkpoint is not None else None
        if state is not None:
            self._window["train"] = MetricWindow.of(state["window"], self.args.device)
            norm = state["grad_norm_max"]
            self._grad_norm_max = None if norm is None else norm.to(self.args.device)
            for index, values in state["objectives"].items():
                cast(nn.Module, self._objectives[int(index)]).load_state_dict(values)
        if self.moving is not None and checkpoint is not None:
            self.moving.load(Path(checkpoint))


def _weights(batch: Batch) -> Tensor:
    """The weights [P] of a batch's pairs: 1 each, unless the data have weights."""
    if "pair_weights" in batch:
        return batch["pair_weights"]
    return torch.ones((len(batch["cu_seqlens"]) - 1) // 2, device=batch["cu_seqlens"].device)


def _not_finite(model: nn.Module) -> str | None:
    """The first parameter with a NaN or an infinity; of a sharded one, this process's shard is looked at."""
    shards = ((name, getattr(value, "_local_tensor", value)) for name, value in model.named_parameters())
    return next((name for name, value in shards if not value.is_meta and not value.isfinite().all()), None)


def _kwargs(value: Any) -> dict[str, Any]:
    return dict(value) if value else {}
