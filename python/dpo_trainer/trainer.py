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
from .model.adapters import attach, named_adapter, obstacle_to_training, trainable_in, unsaved
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
from .settings.config import DPOConfig, check_settings
from .settings.fit import READ_ONCE, check_best_metric, check_fit, check_images, check_model_init, init_of
from .watch.metrics import MetricWindow
from .watch.samples import Scorer

logger = logging.getLogger("dpo_trainer")


class DPOTrainer(LossTrainer):
    """Trains a causal language model on preference pairs with Direct Preference Optimization (arXiv:2305.18290).

    Batches, checkpoints, resuming, schedules, trackers and distribution are those of `transformers.Trainer`.
    This class adds the data, the reference, the loss, metrics that weigh every pair the same, and the run's files in
    `output_dir`: `metrics.jsonl`, `events.jsonl`, `samples.jsonl`, `summary.json`, `report.html`, the card `README.md`.

    Args:
        model: a causal language model or a vision-language model, a peft model, or a path for `load_model`, also of an adapter.
        ref_model: the reference: a model or a path. None: the model as it is given. That is a frozen copy, or nothing at all
            with `precompute_ref_log_probs=True`. With `peft_config` it is the model with the adapter switched off. Of a
            model that brings a trained adapter, the adapter is copied. An objective that needs no reference gets none,
            unless one is given: then for the KL in the log.
        args: a DPOConfig; defaults with output_dir "dpo_output" if not given.
        train_dataset: a `datasets.Dataset` or a list of rows with `prompt`, `chosen`, `rejected` (text or chat
            messages; without `prompt`, chosen and rejected are whole and begin alike), optional `system`, `tools` and
            `chat_template_kwargs` (for the chat template), optional `images` or `image`, optional `weight` (confidence:
            losses are weighted means), optional `ref_chosen_logps` and `ref_rejected_logps` (summed log-probabilities under
            the reference); or of a known layout (docs/data.md); or, with `max_steps`, a stream of them: a
            `datasets.IterableDataset`, or one of torch.
        eval_dataset: the same, or a dict of several; no stream.
        processing_class: the tokenizer, or the processor of a vision-language model; loaded from the model's folder if
            not given.
        data_collator: a PairCollator of your own making.
        quantization_config: for a model that is given as a path: from_pretrained's, e.g. a BitsAndBytesConfig.
        peft_config: a peft config; the model is wrapped in an adapter of this kind. See the setting `adapter` for a model
            that brings one.
        scorer: judges answers, (prompts, completions) -> a number each, higher is better: logs the win rate of the
            policy's answers to `sample_prompts` held-out prompts. Instead of `win_rate_scorer`, which names one.
        model_init: makes the model, instead of `model`, at every call of `train`: for `hyperparameter_search`. It may take
            the trial.
        compute_metrics, callbacks, optimizers, optimizer_cls_and_kwargs: as in `transformers.Trainer`. `predict` and
            compute_metrics see rewards `[rows, 2]` (chosen, rejected).
        preprocess_logits_for_metrics: refused, because there are no logits.

    Raises:
        ConfigError, DataError, ModelError: ValueErrors of one line that say what is wrong and where.
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
        if train_dataset is None and eval_dataset is None:  # without data nothing about the model can be checked
            raise DataError(
                "train_dataset: none given, nothing to train on; to evaluate or predict alone, give an eval_dataset"
            )
        set_seed(args.seed)  # for what model_init, or the loading of a model, draws
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
        if args.disable_dropout and reference is not None:
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
        # Makes transformers hand the accumulated batch's size to training_step in every version.
        self.model_accepts_loss_kwargs = True
        self._window = {"train": MetricWindow(), "eval": MetricWindow()}
        self._grad_norm_max: Tensor | None = None
        self.model_init = cast(Any, model_init)
        self._given_reference = (
            reference if model_init is not None else None
        )  # else nobody may hold it longer than needed
        self._take_model(reference)
        self._watch(scorer)
        if AllocateRanks.wanted(self.model):
            self.add_callback(AllocateRanks())
        if compute_metrics is None and eval_dataset is not None:  # compute_metrics has names of its own
            check_best_metric(args, self._evaluation_names())
        if args.precompute_ref_log_probs:
            self._precompute_all()

    def _dressed(self, model: Any, args: DPOConfig, *, loaded: bool) -> Any:
        """The model with the adapter and without the dropout that the run asks for."""
        set_seed(args.seed)  # for a new adapter's weights
        self.attached = attach(model, self._peft_config, args.adapter, loaded=loaded)
        model = self.attached.model
        if args.model_adapter_name is not None:
            named_adapter(model, args.model_adapter_name, "model_adapter_name")
        if args.disable_dropout:
            disable_dropout(model)
        return model

    def _take_model(self, ref_model: Any) -> None:
        """Make of `self.model` the policy and what depends on it: the reference, the layout and the way of the loss."""
        args = self.args
        # Made once for a model: some objectives keep a running mean between steps.
        self._objectives = objective.build(args)
        self.policy = SplitModel(self.model)  # type: ignore[arg-type]
        self._beside_adapter = []
        example = self._example_batch()
        if example is not None:
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
                        "model: '%s' (%d in all) trains in addition to the adapter, and peft saves it neither in checkpoints nor "
                        "at the end; name its module in modules_to_save",
                        names[0],
                        len(names),
                    )
        self.auxiliary = auxiliary_loss(self.policy, args.router_aux_loss_coef, example)
        self.reference = self._make_reference(ref_model, example)
        self.moving = self._make_moving()
        self._check_layout()
        if args.torch_compile and self.policy.backbone is not None:
            # After the trials above: each would be compiled by itself, without gradient, and never be used again.
            self.policy.backbone.compile(backend=args.torch_compile_backend, mode=args.torch_compile_mode)
        self.loss_path = loss_path.choose(self.policy, self.reference, args.loss_path)
        given = any(name in dataset.column_names for dataset in self.datasets() for name in REFERENCE)
        for setting, used in (("ld_alpha", args.ld_alpha is not None), ("kl_coef", args.kl_coef > 0)):
            if used and (given or args.precompute_ref_log_probs):
                raise ConfigError(
                    f"{setting}: needs the reference model in every step; log-probabilities computed beforehand are plain sums"
                )
        if args.kl_coef > 0 and self.reference is None:
            raise ConfigError(f"kl_coef: needs a reference, and loss_type {args.loss_type} has none; give a ref_model")
        if hasattr(self.model, "add_model_tags"):
            cast(Any, self.model).add_model_tags(list(TAGS))

    @staticmethod
    def _made(model_init: Callable[..., Any], trial: Any = None) -> Any:
        """What `model_init` makes. Raises ConfigError where it makes nothing."""
        model = model_init(trial) if number_of_arguments(model_init) else model_init()
        if model is None:
            raise ConfigError("model_init: gave no model; it must return one")
        return model

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """A new model for a call of `train`, which transformers makes before it calls `_hp_search_setup`."""
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
        """As `transformers.Trainer.hyperparameter_search`; what is sought is the least evaluation loss, unless given.

        transformers would take the sum of all metrics.
        """
        return super().hyperparameter_search(hp_space, compute_objective or _loss_of, *args, **kwargs)

    # --- what code that was written for TRL reads --------------------------------------------------------------------

    @property
    def ref_model(self) -> nn.Module | None:
        """The reference's model, or None where it is no model of its own."""
        return self.reference.split.model if isinstance(self.reference, FrozenReference) else None

    @property
    def beta(self) -> float:
        """The setting of this name."""
        return self.args.beta

    @property
    def loss_types(self) -> list[str]:
        """`loss_type` as a list."""
        return [self.args.loss_type] if isinstance(self.args.loss_type, str) else list(self.args.loss_type)

    def _example_batch(self) -> Batch | None:
        """Two short pairs, padded, on which to check the model's split, or None without data or anything to score.

        The first has images, if some pair has.
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
            raise ConfigError(
                f"data_collator: its batches have no '{missing}'; leave it out, or make it of a PairCollator"
            )
        return self._prepare_inputs(batch)

    def _scored_rows(
        self, orders: Callable[[Any], Iterable[Iterable[int]]], dataset: Any = None
    ) -> list[dict[str, Any]]:
        """The first pair of each order (made from lengths) that has tokens to score on both sides and was not taken before.

        Of the first dataset, unless another one is given.
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
        """Choose the layout by the longest pair and another.

        The longest, because a model may attend within a window or switch its position encoding from some length on.
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
    """The loss of an evaluation; the mean of several ones'."""
    losses = [value for name, value in metrics.items() if re.fullmatch(r"eval_(\w+_)?loss", name)]
    return sum(losses) / len(losses)
