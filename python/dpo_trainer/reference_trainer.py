"""The part of `DPOTrainer` that chooses the reference and precomputes and caches its log-probabilities."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from typing import Any

from dpo_kernels import objectives, use_backend

from .data.prepare import is_prepared
from .data.rows import REFERENCE, has_reference
from .errors import ConfigError, DataError, ModelError
from .model.adapters import Attached, covers_embeddings, effect, named_adapter, without_adapter
from .model.causal import check_answers
from .model.moving_reference import MovingReference
from .model.reference_cache import ReferenceCache, data_fingerprint, folder_of, model_fingerprint
from .model.references import AdapterOffReference, FrozenReference, Reference, reference_logps
from .model.split import Batch, SplitModel, evaluating
from .pair_trainer import PairTrainer
from .progress import Phase, line_of
from .settings.fit import check_images

logger = logging.getLogger("dpo_trainer")


class ReferenceTrainer(PairTrainer):
    """A trainer of pairs that has a policy and possibly a reference, but computes no loss.

    Attributes:
        policy: the trained model.
        reference: None if no reference is in memory.
        moving: updates the reference during training. None if the reference does not change.
        attached: the model as it was given or loaded, with its adapter.
    """

    attached: Attached
    policy: SplitModel
    reference: Reference
    moving: MovingReference | None
    _objectives: list[Any]
    #: Names of the trainable parameters that the model uses even when its adapter is off.
    _beside_adapter: list[str]

    @property
    def _sharded(self) -> bool:
        """Whether FSDP or DeepSpeed shards the weights."""
        return bool(self.is_fsdp_enabled or self.is_deepspeed_enabled)

    @contextlib.contextmanager
    def _kernels(self) -> Any:
        """A context with the run's mixed precision and kernel backend, for every use of the model."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.accelerator.autocast())
            if self.args.backend is not None:
                stack.enter_context(use_backend(self.args.backend))
            yield

    def _make_reference(self, ref_model: Any, example: Batch | None) -> Reference:
        datasets = self.datasets()
        if datasets and all(map(has_reference, datasets)):
            for setting, given in (("ref_model", ref_model), ("ref_adapter_name", self.args.ref_adapter_name)):
                if given is not None:
                    columns = " and ".join(REFERENCE)
                    logger.warning("%s: not used, because all data have the columns %s", setting, columns)
            return None
        if ref_model is not None:
            self._check_given(ref_model)
            reference = FrozenReference(ref_model.to(self.args.device))
            if example is not None:
                with self.accelerator.autocast():
                    check_answers(reference.split, example, "ref_model")
                    reference.split.verify(example)
            return reference
        if (name := self.args.ref_adapter_name) is not None:
            return self._frozen_copy(
                lambda copy: named_adapter(copy, name, "ref_adapter_name"), f"with its adapter '{name}'"
            )
        if not objectives.needs_reference(self._objectives):
            return None
        if hasattr(self.model, "disable_adapter"):
            return self._reference_of_adapter(example)
        if self.args.precompute_ref_log_probs:
            return None  # the log-probabilities are computed from the model before its first update
        return self._frozen_copy()

    def _check_given(self, ref_model: Any) -> None:
        """Raise ConfigError if two references are given, ModelError if the given one shares trainable weights."""
        if self.args.ref_adapter_name is not None:
            raise ConfigError(
                "ref_adapter_name: names an adapter of the model, but ref_model is given too; leave one out"
            )
        own = {id(value) for value in ref_model.parameters()}
        for name, value in self.policy.model.named_parameters():
            if value.requires_grad and id(value) in own:
                raise ModelError(
                    f"ref_model: shares '{name}' with the model, which trains it; pass None for the model as it is given"
                )

    def _reference_of_adapter(self, example: Batch | None) -> Reference:
        """The model as it was given: without its new adapter, or with the adapter that it came with."""
        moved = None if example is None else effect(self.policy, example)
        neutral = moved == 0.0 and not covers_embeddings(self.policy.model)
        without = (self.attached.is_new and self.attached.keeps_base) or neutral
        if self.attached.is_new and without and moved is not None and moved > 1e-5:
            logger.info("adapter: the model answers differently with it from the start, so the first loss is not log 2")
        if without and (not self._beside_adapter or self.args.precompute_ref_log_probs):
            return AdapterOffReference(self.policy)
        if self.args.precompute_ref_log_probs:
            return None
        if without:
            logger.info(
                "reference: a frozen copy of the weights that train, because '%s' is no part of the adapter",
                self._beside_adapter[0],
            )
            return self._frozen_copy(without_adapter, "without its adapter", begins_alike=neutral)
        why = "rewrites the model's weights" if self.attached.is_new else "is trained already"
        logger.info("reference: the model with a frozen copy of its adapter as it starts, because the adapter %s", why)
        return self._frozen_copy(None, "with its adapter as it started")

    def _frozen_copy(
        self, change: Callable[[Any], Any] | None = None, kind: str = "", *, begins_alike: bool = True
    ) -> FrozenReference:
        """A frozen copy of the model as it is now, after `change` if given.

        Args:
            change: gets the copy and returns the reference.
            kind: the copy in words, for `reference_kind`.
            begins_alike: whether the reference computes the same as the policy before the first update.
        """
        reference = FrozenReference.copy_of(self.model, change, shared=not self._sharded)  # type: ignore[arg-type]
        reference.split.split = self.policy.split
        reference.copied = begins_alike
        if kind:
            reference.kind = f"a frozen copy of the model {kind}"
        else:
            logger.info("reference: a frozen copy of the model")
        return reference

    def _make_moving(self) -> MovingReference | None:
        if not self.args.sync_ref_model:
            return None
        if not isinstance(self.reference, FrozenReference) or hasattr(self.model, "disable_adapter"):
            what = (
                "reference log-probabilities in the data" if self.reference is None else "the reference of an adapter"
            )
            raise ConfigError(f"sync_ref_model: moves a whole model's weights; it cannot move {what}")
        alpha, every = self.args.ref_model_mixup_alpha, self.args.ref_model_sync_steps
        return MovingReference(self.policy.model, self.reference.split.model, alpha=alpha, every=every)

    @property
    def reference_kind(self) -> str:
        """The source of the reference's log-probabilities, in words."""
        if self.moving is not None:
            return self.moving.describe()
        if self.reference is not None:
            return self.reference.kind
        needed = objectives.needs_reference(self._objectives)
        return "log-probabilities computed beforehand" if needed else "none"

    # --- precomputed log-probabilities -----------------------------------------------------------------------------

    def _precompute_all(self) -> None:
        """Add the reference's log-probabilities to all datasets, then drop the reference."""
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
        """The dataset with the reference's log-probabilities as columns. They are computed if the dataset lacks them."""
        if not has_reference(dataset):
            for column, values in zip(REFERENCE, self._reference_columns(dataset, name), strict=False):
                dataset = dataset.add_column(column, values)
        return dataset

    def _reference_columns(self, dataset: Any, name: str) -> tuple[list[float], ...]:
        """The reference's log-probabilities of chosen and rejected answers, read from the cache if there is one."""
        batch_size = self.args.precompute_ref_batch_size or self.args.per_device_eval_batch_size
        what = f"reference log-probabilities of the {name} pairs"
        with Phase(line_of(self.args), what, len(dataset), "pairs") as phase:
            if (cache := self.reference_cache(dataset)) is None:
                logger.info("reference log-probabilities of %s %s pairs: computing", f"{len(dataset):,}", name)
                return self.reference_logps(dataset, batch_size=batch_size, advance=phase.advance)

            def begin(count: int) -> None:
                phase.total = count

            return cache.fill(
                lambda rows: self.reference_logps(dataset.select(rows), batch_size=batch_size, advance=phase.advance),
                name=name,
                process_index=self.args.process_index,
                num_processes=self.args.world_size,
                wait=self.accelerator.wait_for_everyone,
                begin=begin,
            )

    def reference_logps(
        self, rows: Any, *, batch_size: int, advance: Callable[[int], None] = lambda _: None
    ) -> tuple[list[float], list[float]]:
        """Log-probabilities of answers under the reference, or under the current model if no reference is in memory.

        Args:
            rows: a tokenised dataset.
            batch_size: pairs per batch.
            advance: receives the number of pairs of each computed batch.

        Returns:
            the sums over the tokens of each chosen and each rejected answer, in nats, in the order of `rows`.
        """
        with evaluating(self.policy.model):
            return reference_logps(
                self.reference if self.reference is not None else self.policy,
                rows,
                self.data_collator,  # type: ignore[arg-type]
                batch_size=batch_size,
                device=self.args.device,
                context=self._kernels,
                advance=advance,
            )

    def reference_cache(self, dataset: Any) -> ReferenceCache | None:
        """The cache of the reference's log-probabilities of a tokenised dataset; None if `ref_cache_dir` is not set."""
        if (root := folder_of(self.args.ref_cache_dir)) is None:
            return None
        facts = {
            "model": model_fingerprint(
                self.policy.model if self.reference is None else self.reference.split.model,
                adapter=not isinstance(self.reference, AdapterOffReference),
            ),
            "data": data_fingerprint(dataset),
            "precision": self.accelerator.mixed_precision,  # autocast changes the numbers that the same weights give
        }
        return ReferenceCache(root, facts, dataset["length"])

    def _ready(self, dataset: Any, name: str) -> Any:
        """Tokenise a dataset that is not part of the run and make sure that it has a reference to compare with."""
        if not is_prepared(dataset):
            dataset = self.tokenize(dataset, name, self.args, self.processing_class)
            self.accounts.pop()  # not part of the run
            reference = None if self.reference is None else self.reference.split.model
            check_images(self.args, self.policy.model, reference, [dataset])
        if objectives.needs_reference(self._objectives) and self.reference is None and not has_reference(dataset):
            if self.state.global_step > 0:
                raise DataError(
                    f"{name}: the reference was dropped after precomputing and the model has moved since; "
                    f"pass the dataset to the constructor, or give it the columns {' and '.join(REFERENCE)}"
                )
            dataset = self._with_reference(dataset, name)
        return dataset
