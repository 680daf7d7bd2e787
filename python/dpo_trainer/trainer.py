"""DPOTrainer: `transformers.Trainer` with preference data, a reference model and the fused loss."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback

from dpo_kernels import DPOOutput, length_desensitized_weights, objectives

from .batch.collator import PairCollator
from .data.prepare import by_name
from .data.rows import REFERENCE, has_reference
from .errors import ConfigError
from .model import loss_path
from .model.layouts import choose_layout
from .model.loading import load_parts, with_adapter
from .model.references import FrozenReference
from .model.split import Batch, SplitModel, call_through, disable_dropout
from .pair_trainer import looked_at
from .run_trainer import RunTrainer, SpoiltUpdate
from .settings.config import DPOConfig, as_mapping
from .settings.fit import check_best_metric, check_fit
from .watch.evaluated import look_at
from .watch.metrics import TINY, MetricWindow, memory_mib
from .watch.metrics import names as metric_names
from .watch.samples import Scorer

logger = logging.getLogger("dpo_trainer")

#: What transformers adds to an evaluation.
SPEEDS = ("runtime", "samples_per_second", "steps_per_second")


class DPOTrainer(RunTrainer):
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
        init = as_mapping("model_init_kwargs", args.model_init_kwargs) or {}
        policy, reference, processing_class = load_parts(model, ref_model, processing_class, init)
        train_dataset, eval_dataset = self._tokenize_all(train_dataset, eval_dataset, args, processing_class)
        if peft_config is not None:
            policy = with_adapter(policy, peft_config)
        if args.disable_dropout:
            for part in (policy, reference):
                if part is not None:
                    disable_dropout(part)

        if data_collator is None:
            pad = getattr(processing_class, "pad_token_id", None)
            data_collator = PairCollator(
                pad_token_id=pad if pad is not None else 0,
                pad_to_multiple_of=args.pad_to_multiple_of,
                layout=args.batch_layout,
            )
        check_fit(args, policy, reference, processing_class, looked_at(train_dataset, eval_dataset))
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
        # Made once: some objectives keep a running mean between steps.
        self._objectives = objectives.build(args.loss_type)
        self._window = {"train": MetricWindow(), "eval": MetricWindow()}
        self._grad_norm_max: Tensor | None = None

        self.policy = SplitModel(self.model)  # type: ignore[arg-type]
        if args.torch_compile and self.policy.backbone is not None:
            self.policy.backbone.compile(backend=args.torch_compile_backend, mode=args.torch_compile_mode)
        example = self._example_batch()
        if example is not None:
            with self.accelerator.autocast():
                self.policy.verify(example)
        self.reference = self._make_reference(reference, example)
        self.moving = self._make_moving()
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
        self._watch(scorer)
        if compute_metrics is None and eval_dataset is not None:  # compute_metrics has names of its own
            check_best_metric(args, self._evaluation_names())
        if args.precompute_ref_log_probs:
            self._precompute_all()

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
        collator: Any = self.data_collator
        padded = replace(collator, layout="padded") if isinstance(collator, PairCollator) else collator
        return self._prepare_inputs(padded(rows))

    def _check_layout(self) -> None:
        """Choose the layout by the longest pair and another.

        The longest, since a model may attend within a window or switch its position encoding from some length on.
        """
        collator = self.data_collator
        if not isinstance(collator, PairCollator) or collator.layout == "padded" or not self.datasets():
            return
        dataset = self.datasets()[0]
        lengths = dataset["length"]
        longest = max(range(len(lengths)), key=lengths.__getitem__)
        rows = [dict(dataset[index]) for index in {longest, 0 if longest else len(lengths) - 1}]
        splits = [self.policy, *([self.reference.split] if isinstance(self.reference, FrozenReference) else [])]
        choose_layout(collator, splits, rows, self._prepare_inputs, compiled=self.args.torch_compile)

    # --- the loss --------------------------------------------------------------------------------------------------

    def pair_loss(self, batch: Batch, pair_weights: Tensor) -> DPOOutput:
        """Policy, reference and loss of one batch: `loss` is the sum over pairs of `pair_weights` [P] times their losses.

        The one place where hidden states become a loss. Only completion tokens meet the head. On the linear path their
        logits exist a chunk at a time and meet their gradient there; on the logits path they all exist, and in training
        their memory is reused for their gradient.
        """
        reference = self.reference if "ref_logps" not in batch else None
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
            "kl_coef": self.args.kl_coef,
            "statistics": self._statistics(reference is not None),
            "reduction": "sum",
        }
        mean = None
        if self.args.kl_coef and len(pair_weights):
            # Summed over pairs the term would count once for each; here it counts as much as the batch does in its step.
            # A mean that is scaled afterwards says so without waiting for the device.
            mean = pair_weights.mean()
            options |= {"pair_weights": pair_weights / mean.clamp(min=TINY), "reduction": "mean"}
        if self.loss_path == "linear":
            budget = loss_path.memory_budget(self.args.memory_budget, self.policy)
            options |= {"memory_budget": budget, "grad_filter": self.args.grad_filter}
            output = loss_path.from_hidden(self.policy, reference, batch, options)
        else:
            output = loss_path.from_logits(self.policy, reference, batch, options)
        if mean is not None:
            output.loss = output.loss * (mean * len(pair_weights))
        return output

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
            seconds, tokens = self._training_seconds(), means.pop("tokens", 0.0)
            if self._grad_norm_max is not None:
                means["grad_norm_max"] = float(self._grad_norm_max)
                self._grad_norm_max = None
            logs = {**logs, **means, "tokens_per_second": tokens / seconds if seconds > 0 else 0.0, "tokens": tokens}
            logs["memory_mib"] = memory_mib(self.args.device)
        super().log(logs, start_time)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate; the metrics are means over all pairs, and over all completion tokens, of the dataset."""
        self._window["eval"] = MetricWindow()
        if self.accelerator.num_processes > 1:
            self.gather_function = self._gather_rows  # the loop itself sets it back
        result = super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", args[4] if len(args) > 4 else "eval")
        dataset = getattr(args[0] if args else kwargs["dataloader"], "dataset", None)
        if self.args.write_report and (output := self._window["eval"].joined(self._gather)) is not None:
            pairs = look_at(output, dataset, self.processing_class)
            if pairs is not None:
                self.evaluated[prefix] = pairs
        means = self._drain("eval")
        means.pop("tokens", None)
        if self.samples is not None and prefix.startswith("eval"):
            means |= self.samples.evaluate(prefix, dataset)
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
        for key, dataset in by_name(self.eval_dataset).items():
            given = self.args.precompute_ref_log_probs or has_reference(dataset)
            own = metric_names(
                self._statistics(self.reference is not None and not given),
                reference=given or self.reference is not None,
            )
            own += [*(self.samples.metric_names if self.samples is not None else ()), *SPEEDS]
            found += [f"{key}_{name}" if key else name for name in own]
        return found

    # --- the run ---------------------------------------------------------------------------------------------------

    def _stop_before_update(self, seen: str, model: nn.Module, trial: Any = None, **kwargs: Any) -> None:
        self._window["train"].drop(self.current_gradient_accumulation_steps)
        super()._stop_before_update(seen, model, trial, **kwargs)

    def _own_state(self) -> dict[str, Any]:
        running = {
            str(index): item.state_dict() for index, item in enumerate(self._objectives) if isinstance(item, nn.Module)
        }
        norm = self._grad_norm_max
        return {
            "window": self._window["train"].state(),
            "grad_norm_max": None if norm is None else norm.cpu(),
            "objectives": running,
        }

    def _take_state(self, state: dict[str, Any]) -> None:
        self._window["train"] = MetricWindow.of(state.get("window", {}), self.args.device)
        norm = state.get("grad_norm_max")
        self._grad_norm_max = None if norm is None else norm.to(self.args.device)
        for index, values in state.get("objectives", {}).items():
            cast(nn.Module, self._objectives[int(index)]).load_state_dict(values)


def _weights(batch: Batch) -> Tensor:
    """The weights [P] of a batch's pairs: 1 each, unless the data have weights."""
    if "pair_weights" in batch:
        return batch["pair_weights"]
    return torch.ones((len(batch["cu_seqlens"]) - 1) // 2, device=batch["cu_seqlens"].device)
