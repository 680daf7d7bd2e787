"""DPOTrainer: `transformers.Trainer` with preference data, a reference model and the fused loss."""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback, set_seed
from transformers.trainer_utils import number_of_arguments

from .batch.collator import PairCollator
from .batch.images import ImageInputs
from .data.images import DIGEST, has_images
from .data.processor import tokenizer_of
from .data.rows import REFERENCE
from .data.template import with_chat_template
from .data.tokens import MASKS, scored_counts
from .errors import ConfigError, DataError, ModelError
from .loss_trainer import LossTrainer
from .model import loss_path
from .model.adapter_kinds import AllocateRanks, moved
from .model.adapters import attach, keep_trainable, named_adapter, obstacle_to_training, trainable_in, unsaved
from .model.auxiliary import auxiliary_loss
from .model.causal import check_answers
from .model.dropout import disable_dropout, settle
from .model.layouts import choose_layout
from .model.loading import load_parts, set_pad_token
from .model.references import FrozenReference
from .model.split import Batch, SplitModel
from .pair_trainer import looked_at
from .report.model_card import TAGS
from .settings import objective
from .settings.combinations import without_effect
from .settings.config import DPOConfig, check_settings
from .settings.fit import READ_ONCE, check_best_metric, check_fit, check_images, check_model_init, init_of
from .watch.metrics import MetricWindow
from .watch.samples import Scorer

logger = logging.getLogger("dpo_trainer")


class DPOTrainer(LossTrainer):
    """Trains a causal language model on preference pairs with Direct Preference Optimization (arXiv:2305.18290).

    Batches, checkpoints, resuming, schedules, trackers and distribution are those of `transformers.Trainer`.
    This class adds the data, the reference, the loss, metrics in which every pair has the same weight, and the run's files
    in `output_dir`: `metrics.jsonl`, `events.jsonl`, `samples.jsonl`, `summary.json`, `report.html`, the card `README.md`.

    Args:
        model: a causal language model, a vision-language model, a peft model, or the path of a model or an adapter for
            `load_model`.
        ref_model: the reference: a model or a path. None: the model before training, as a frozen copy. With
            `peft_config`, it is the model without the adapter instead of a copy. If the model already has a trained
            adapter, the adapter is copied. With `precompute_ref_log_probs=True`, no reference stays in memory. An
            objective that needs no reference has none, unless one is given, which is used for the KL in the log.
        args: a DPOConfig; the defaults with output_dir "dpo_output" if not given.
        data_collator: a PairCollator with other options.
        train_dataset: a `datasets.Dataset` or a list of rows. A row has `prompt`, `chosen` and `rejected`: texts or chat
            messages. Without `prompt`, the common beginning of chosen and rejected is the prompt. Optional columns are
            `system`, `tools` and `chat_template_kwargs` (for the chat template), `images` or `image`, `weight`
            (confidence: losses are weighted means), `ref_chosen_logps` and `ref_rejected_logps` (summed log-probabilities
            under the reference, in nats). Rows may have another known layout (docs/data.md). With `max_steps`, the data
            may be a stream of rows: a `datasets.IterableDataset` or torch's `IterableDataset`.
        eval_dataset: rows as in `train_dataset`, or a dict of several datasets. A stream is read as a whole.
        processing_class: the tokenizer, or the processor of a vision-language model. If not given, it is loaded from the
            model's folder.
        compute_metrics: as in `transformers.Trainer`. It gets rewards [rows, 2] (chosen, rejected), as `predict` returns.
        callbacks: as in `transformers.Trainer`.
        optimizers: as in `transformers.Trainer`.
        quantization_config: from_pretrained's argument for a model that is given as a path, e.g. a BitsAndBytesConfig.
        peft_config: a peft config. The model gets a new adapter of this kind. The setting `adapter` is for a model that
            already has an adapter.
        optimizer_cls_and_kwargs: as in `transformers.Trainer`.
        scorer: a function (prompts, completions) -> one number for each completion; higher is better. The log then has
            the win rate of the policy's answers to `sample_prompts` held-out prompts. It replaces the setting
            `win_rate_scorer`, which names such a function.
        model_init: a function that makes the model at every call of `train`, instead of `model`, for
            `hyperparameter_search`. It may take the trial as an argument.
        preprocess_logits_for_metrics: must be None, since there are no logits.

    Raises:
        ConfigError: a setting or an argument is wrong.
        DataError: the data cannot be used. The message names the row.
        ModelError: a model or tokenizer cannot be loaded or trained.
    """

    def __init__(
        self,
        model: str | Path | PreTrainedModel | nn.Module | None = None,
        ref_model: str | Path | PreTrainedModel | nn.Module | None = None,
        args: DPOConfig | None = None,
        data_collator: Callable[[list[dict[str, Any]]], Batch] | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        compute_metrics: Callable[..., dict[str, float]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
        optimizer_cls_and_kwargs: tuple[Any, dict[str, Any]] | None = None,
        scorer: Scorer | None = None,
        model_init: Callable[..., Any] | None = None,
        preprocess_logits_for_metrics: Any = None,
    ) -> None:
        args = args if args is not None else DPOConfig(output_dir="dpo_output")
        if not isinstance(args, DPOConfig):
            kind = type(args)
            raise ConfigError(
                f"args: expected a DPOConfig, got {kind.__name__} of {kind.__module__}; import it from dpo_trainer"
            )
        if preprocess_logits_for_metrics is not None:
            raise ConfigError(
                "preprocess_logits_for_metrics: there are no logits to preprocess; compute_metrics gets rewards [rows, 2]"
            )
        if train_dataset is None and eval_dataset is None:  # without data, the model cannot be checked
            raise DataError(
                "train_dataset: none given, nothing to train on; to evaluate or predict alone, give an eval_dataset"
            )
        set_seed(args.seed)  # for random weights in model_init or when a model is loaded
        if model_init is not None:
            check_model_init(args, model)
            model = self._made(model_init)
        if model is None:
            raise ModelError("model: none given; pass a model, a path, or a model_init")
        init = init_of(args, model, ref_model, quantization_config)
        for name, given in (("model", model), ("reference", ref_model)):
            if isinstance(given, (str, Path)):
                logger.info("%s: loading %s", name, given)
        policy, reference, processing_class = load_parts(model, ref_model, processing_class, init)
        set_pad_token(processing_class, args.pad_token)
        processing_class = with_chat_template(processing_class, args.chat_template_path)
        train_dataset, eval_dataset = self._tokenize_all(train_dataset, eval_dataset, args, processing_class)
        self._peft_config = peft_config
        policy = self._dressed(policy, args, loaded=isinstance(model, (str, Path)))
        if reference is not None:
            keep_trainable(reference)  # so that it rounds as the policy does
            if args.disable_dropout:
                disable_dropout(reference)

        tokenizer = tokenizer_of(processing_class)
        if data_collator is None:
            pad = getattr(tokenizer, "pad_token_id", None)
            data_collator = PairCollator(
                pad_token_id=pad if pad is not None else 0,
                pad_to_multiple_of=args.padded_to,
                layout=args.batch_layout,
            )
        check_fit(args, policy, reference, tokenizer, looked_at(train_dataset, eval_dataset))
        if isinstance(data_collator, PairCollator) and tokenizer is not processing_class:
            data_collator.images = ImageInputs(processing_class)
        seen = check_images(args, policy, reference, looked_at(train_dataset, eval_dataset))
        if seen and isinstance(data_collator, PairCollator):
            data_collator.layout = "padded"
        if args.n_gpu > 1:
            logger.warning("using one of %d GPUs; start with torchrun or accelerate launch to use all", args.n_gpu)
            args._n_gpu = 1
        super().__init__(
            model=policy,
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
        # With this, every version of transformers passes the accumulated batch's size to training_step.
        self.model_accepts_loss_kwargs = True
        self._window = {"train": MetricWindow(), "eval": MetricWindow()}
        self._grad_norm_max: Tensor | None = None
        self.model_init = cast(Any, model_init)
        self._given_reference = (
            reference if model_init is not None else None
        )  # otherwise it must not stay in memory longer than needed
        self._take_model(reference)
        self._watch(scorer)
        if AllocateRanks.wanted(self.model):
            self.add_callback(AllocateRanks())
        if compute_metrics is None and eval_dataset is not None:  # compute_metrics may add other names
            check_best_metric(args, self._evaluation_names())
        if args.precompute_ref_log_probs:
            self._precompute_all()

    def _dressed(self, model: Any, args: DPOConfig, *, loaded: bool) -> Any:
        """Attach the run's adapter to the model, and turn its dropout off if the settings say so."""
        keep_trainable(model)
        set_seed(args.seed)  # for a new adapter's weights
        self.attached = attach(model, self._peft_config, args.adapter, loaded=loaded)
        model = self.attached.model
        if args.model_adapter_name is not None:
            named_adapter(model, args.model_adapter_name, "model_adapter_name")
        if args.disable_dropout:
            disable_dropout(model)
        return model

    def _take_model(self, ref_model: Any) -> None:
        """Make `self.model` the policy, and set what depends on it: reference, layout, loss path and auxiliary loss."""
        args = self.args
        # Built once for each model, because some objectives keep a running mean between steps.
        self._objectives = objective.build(args)
        self.policy = SplitModel(self.model)  # type: ignore[arg-type]
        self._beside_adapter = []
        example = self._example_batch()
        if example is not None:
            logger.info("checking the model on two short pairs")
            with self.accelerator.autocast():
                check_answers(self.policy, example)
                self.policy.verify(example)
                if args.disable_dropout:
                    with moved(self.policy.model):
                        name = type(self.policy.model).__name__
                        settle(self.policy.model, lambda: self.policy.packed_logits(example), name)
                self.obstacle_to_training = obstacle_to_training(self.policy, example)
                if hasattr(self.model, "disable_adapter"):
                    self._beside_adapter = trainable_in(self.policy, example, adapter=False)
                if names := unsaved(self.model, self._beside_adapter):
                    logger.warning(
                        "model: '%s' (%d in all) trains in addition to the adapter, but peft does not save it; name its "
                        "module in modules_to_save",
                        names[0],
                        len(names),
                    )
        self.auxiliary = auxiliary_loss(self.policy, args.router_aux_loss_coef, example)
        self.reference = self._make_reference(ref_model, example)
        self.moving = self._make_moving()
        self._check_layout()
        if args.torch_compile and self.policy.backbone is not None:
            # After the trials above, which would each be compiled separately for a single use without gradient.
            self.policy.backbone.compile(backend=args.torch_compile_backend, mode=args.torch_compile_mode)
        self.loss_path = loss_path.choose(self.policy, self.reference, args.loss_path)
        for line in without_effect(args, self.loss_path):
            logger.warning(line)
        if any(name in dataset.column_names for dataset in self.datasets() for name in REFERENCE):
            objective.check_sums_suffice(args, self._objectives)
        if args.kl_coef > 0 and self.reference is None:
            raise ConfigError(f"kl_coef: needs a reference, and loss_type {args.loss_type} has none; give a ref_model")
        if hasattr(self.model, "add_model_tags"):
            cast(Any, self.model).add_model_tags(list(TAGS))

    @staticmethod
    def _made(model_init: Callable[..., Any], trial: Any = None) -> Any:
        """The model that `model_init` returns. Raises ConfigError if it returns None."""
        model = model_init(trial) if number_of_arguments(model_init) else model_init()
        if model is None:
            raise ConfigError("model_init: returned None; it must return a model")
        return model

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """Make a new model for a call of `train`. transformers calls this before `_hp_search_setup`."""
        return self._dressed(self._made(cast(Any, self.model_init), trial), self.args, loaded=False)

    def _hp_search_setup(self, trial: Any) -> None:
        before = {name: getattr(self.args, name) for name in READ_ONCE}
        super()._hp_search_setup(trial)
        for name, value in before.items():
            if getattr(self.args, name) != value:
                raise ConfigError(f"{name}: is read when the trainer is made, so it cannot be searched")
        if self.model_init is not None:
            check_settings(self.args)
            moving = self.moving
            self._take_model(self._given_reference)
            observers = self.callback_handler.callbacks
            observers[:] = [self.moving if moving is not None and item is moving else item for item in observers]

    def hyperparameter_search(
        self, hp_space: Any = None, compute_objective: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Search hyper-parameters as `transformers.Trainer.hyperparameter_search` does.

        Args:
            hp_space: as in `transformers.Trainer.hyperparameter_search`.
            compute_objective: the quantity that is minimised, computed from an evaluation's metrics. If not given, it is
                the evaluation loss; transformers would use the sum of all metrics.
            args: as in `transformers.Trainer.hyperparameter_search`.
            kwargs: as in `transformers.Trainer.hyperparameter_search`.

        Returns:
            the best run, as in `transformers.Trainer.hyperparameter_search`.

        Raises:
            ConfigError: a searched setting is read only when the trainer is made.
        """
        return super().hyperparameter_search(hp_space, compute_objective or _loss_of, *args, **kwargs)

    # --- attributes for code that was written for TRL ----------------------------------------------------------------

    @property
    def ref_model(self) -> nn.Module | None:
        """The reference's model, or None if the reference is not a separate model."""
        return self.reference.split.model if isinstance(self.reference, FrozenReference) else None

    @property
    def beta(self) -> float:
        """The setting `beta`."""
        return self.args.beta

    @property
    def loss_types(self) -> list[str]:
        """`loss_type` as a list."""
        return [self.args.loss_type] if isinstance(self.args.loss_type, str) else list(self.args.loss_type)

    def _example_batch(self) -> Batch | None:
        """A padded batch of two short pairs for checks of the model, or None without a pair to score.

        The first pair has images, if any pair has.
        """
        dataset = next(filter(has_images, self.datasets()), None)
        pictured = [] if dataset is None else [place for place, digest in enumerate(dataset[DIGEST]) if digest]
        rows = self._scored_rows(lambda lengths: [pictured, *[range(len(lengths))] * 2], dataset)[:2]
        for row in rows:
            if not row.get(DIGEST):  # image tokens are never cut
                row["prompt_ids"] = row["prompt_ids"][-16:]
            for side in ("chosen_ids", "rejected_ids"):
                row[side] = row[side][:16]
            for mask in MASKS:
                row.pop(mask, None)
        if not rows:
            return None
        collator: Any = self.data_collator
        padded = replace(collator, layout="padded") if isinstance(collator, PairCollator) else collator
        batch = padded(rows)
        if missing := next((name for name in ("input_ids", "labels", "cu_seqlens") if name not in batch), None):
            raise ConfigError(f"data_collator: its batches have no '{missing}'; leave it out, or pass a PairCollator")
        return self._prepare_inputs(batch)

    def _scored_rows(
        self, orders: Callable[[Any], Iterable[Iterable[int]]], dataset: Any = None
    ) -> list[dict[str, Any]]:
        """For each order of rows, the first new pair that has tokens to score on both sides.

        Args:
            orders: takes the pairs' lengths and returns orders of row indices.
            dataset: the first dataset if not given.
        """
        if not self.datasets():
            return []
        dataset = dataset if dataset is not None else self.datasets()[0]
        found: dict[int, dict[str, Any]] = {}
        for order in orders(list(dataset["length"])):
            for index in order:
                if index not in found and all(all(side) for side in scored_counts(dataset[index : index + 1])):
                    found[index] = dict(dataset[index])
                    break
        return list(found.values())

    def _check_layout(self) -> None:
        """Choose the layout with two pairs, one of which is the longest.

        The longest pair shows whether the model attends within a window or changes its position encoding at some length.
        """
        collator = self.data_collator
        if not isinstance(collator, PairCollator) or collator.layout == "padded" or not self.datasets():
            return
        rows = self._scored_rows(
            lambda lengths: [
                sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True),
                itertools.chain([0], reversed(range(len(lengths)))),
            ]
        )
        if not rows:
            return
        splits = [self.policy, *([self.reference.split] if isinstance(self.reference, FrozenReference) else [])]
        choose_layout(collator, splits, rows, self._prepare_inputs, compiled=self.args.torch_compile)


def _loss_of(metrics: dict[str, float]) -> float:
    """The evaluation loss. With several evaluation datasets, the mean of their losses."""
    losses = [value for name, value in metrics.items() if re.fullmatch(r"eval_(\w+_)?loss", name)]
    return sum(losses) / len(losses)
