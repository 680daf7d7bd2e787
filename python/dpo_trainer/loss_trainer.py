"""The part of `DPOTrainer` that computes losses: a batch's loss, its share of the optimizer step, and the logged means."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, nn

from dpo_kernels import DPOOutput, length_desensitized_weights

from .data.prepare import by_name
from .data.processor import tokenizer_of
from .data.rows import has_reference
from .errors import ConfigError
from .model import loss_path
from .model.adapter_kinds import allocation_state, take_allocation_state
from .model.auxiliary import AuxiliaryLoss
from .model.split import Batch, call_through
from .run_trainer import RunTrainer, SpoiltUpdate
from .watch.evaluated import ERRORS, Evaluations, look_at
from .watch.metrics import TINY, MetricWindow, memory_mib
from .watch.metrics import names as metric_names

#: Metrics that transformers adds to an evaluation.
SPEEDS = ("runtime", "samples_per_second", "steps_per_second")


class LossTrainer(RunTrainer):
    """A trainer that turns batches into losses and metrics. `DPOTrainer` sets its attributes.

    Attributes:
        loss_path: "linear" or "logits", see `model.loss_path`.
        auxiliary: the auxiliary loss of a mixture-of-experts policy, added in training. None if there is none.
    """

    # transformers reads this: our loss is already a mean over the optimizer step, not over a micro-batch.
    loss_is_scaled_for_ga = True
    loss_path: str
    auxiliary: AuxiliaryLoss | None
    _window: dict[str, MetricWindow]
    _grad_norm_max: Tensor | None
    _evaluations = Evaluations()
    #: Tokens trained on so far, prompts counted for both sides.
    _num_tokens = 0.0

    def pair_loss(self, batch: Batch, pair_weights: Tensor) -> DPOOutput:
        """Run policy and reference on one batch and compute the loss.

        Hidden states become a loss here and nowhere else. Only completion tokens pass through the head. The linear path
        computes logits and their gradient one chunk at a time. The logits path keeps all logits and, in training, reuses
        their memory for their gradient.

        Args:
            batch: as `PairCollator` makes it, on the model's device.
            pair_weights: [P], one weight for each pair.

        Returns:
            the loss, the sum over pairs of weight times loss, and each pair's statistics.
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
            # A sum would count the KL term once for each pair. It has to count as much as the batch does in its step. A
            # mean that is scaled afterwards achieves this without a device synchronisation.
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
        if self.auxiliary is not None and torch.is_grad_enabled() and len(pair_weights):
            # The batch's auxiliary loss has the same share of the step as its pairs have.
            auxiliary = self.auxiliary.take(batch)
            self._window["train"].add_auxiliary(auxiliary, _weights(batch))
            output.loss = output.loss + self.auxiliary.factor * pair_weights.sum() * auxiliary
        return output

    @property
    def aux_loss_enabled(self) -> bool:
        """Whether training adds an auxiliary loss that balances the experts' load (the name is TRL's)."""
        return self.auxiliary is not None

    def _statistics(self, has_reference: bool) -> tuple[str, ...]:
        """The requested statistics that a batch can have."""
        absent = {"kl"} if not has_reference else set()
        if self.loss_path == "logits":
            absent.add("grad_dropped_mass")  # the logits path has no gradient filter
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

        The mean divides by the sum of weights, not by the number of pairs. So the unit of the weights does not matter, and
        the loss starts at log 2 whatever the weights are.

        Args:
            num_items_in_batch: the sum of the step's weights, which transformers gets from `_get_num_items_in_batch`. None:
                the mean is over the batch.

        Returns:
            the loss, and with `return_outputs` the output of `pair_loss` too.
        """
        weights = _weights(inputs)
        if num_items_in_batch is None:
            share = weights / weights.sum().clamp(min=TINY)
        else:
            # DDP averages gradients over processes. Undo that, because the divisor already sums over all processes.
            share = weights * (self.accelerator.num_processes / num_items_in_batch)
        for item in self._objectives:
            if isinstance(item, nn.Module):
                item.train(model.training)  # an evaluation must not change running means
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
        """Sum of the weights of one optimizer step's pairs, on all processes. transformers calls this method."""
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
        """Loss of one batch; unless `prediction_loss_only`, also rewards `[P, 2]` and labels `[P]` (0: chosen is preferred)."""
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
        """Keep the window's largest gradient norm, because the log shows only the last step's. Does not synchronise devices."""
        norm = super()._get_grad_norm(*args, **kwargs)
        if norm is not None:
            seen = torch.as_tensor(norm).detach()
            # A gradient scaler skips such updates itself, and they are normal with one.
            if "not_finite" in self.args.stop_on and getattr(self.accelerator, "scaler", None) is None:
                value = float(getattr(seen, "full_tensor", lambda: seen)())  # FSDP2 may shard it
                if not math.isfinite(value):
                    raise SpoiltUpdate(f"the gradient norm of step {self.state.global_step + 1} is {value}")
            before = self._grad_norm_max
            self._grad_norm_max = seen if before is None else torch.maximum(before, seen)
        return norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log what transformers logs for training steps, and the means of the window."""
        if "loss" in logs and "learning_rate" in logs:
            means = self._drain("train")
            seconds, tokens = self._training_seconds(), means.pop("tokens", 0.0)
            if self._grad_norm_max is not None:
                means["grad_norm_max"] = float(self._grad_norm_max)
                self._grad_norm_max = None
            logs = {**logs, **means, "tokens_per_second": tokens / seconds if seconds > 0 else 0.0, "tokens": tokens}
            self._num_tokens += tokens
            logs["num_tokens"] = self._num_tokens
            logs["memory_mib"] = memory_mib(self.args.device)
        super().log(logs, start_time)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate a dataset. Its metrics are means over all pairs or over all completion tokens of the dataset."""
        self._window["eval"] = MetricWindow()
        if self.accelerator.num_processes > 1:
            self.gather_function = self._gather_rows  # the loop resets it
        result = super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", args[4] if len(args) > 4 else "eval")
        dataset = getattr(args[0] if args else kwargs["dataloader"], "dataset", None)
        joined = self._window["eval"].joined(self._gather)
        means = self._drain("eval")
        means.pop("tokens", None)
        if joined is not None:
            output, weights = joined
            means |= self._evaluations.compare(
                prefix, output, weights, begun=self.state.global_step > 0, keep=self.is_in_train
            )
            if self.args.write_report:
                pairs = look_at(output, dataset, tokenizer_of(self.processing_class))
                if pairs is not None:
                    self.evaluated[prefix] = pairs
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
        """Names of the metrics that this run's evaluations log, without the prefix "eval_"."""
        found = []
        for key, dataset in by_name(self.eval_dataset).items():
            given = self.args.precompute_ref_log_probs or has_reference(dataset)
            own = metric_names(
                self._statistics(self.reference is not None and not given),
                reference=given or self.reference is not None,
            )
            own += [*ERRORS, *(self.samples.metric_names if self.samples is not None else ()), *SPEEDS]
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
            "num_tokens": self._num_tokens,
            "evaluations": self._evaluations.losses,
            "objectives": running,
            "ranks": allocation_state(self.policy.model),
        }

    def _take_state(self, state: dict[str, Any]) -> None:
        self._window["train"] = MetricWindow.of(state.get("window", {}), self.args.device)
        self._num_tokens = state.get("num_tokens", 0.0)
        self._evaluations = Evaluations(state.get("evaluations"))
        norm = state.get("grad_norm_max")
        self._grad_norm_max = None if norm is None else norm.to(self.args.device)
        for index, values in state.get("objectives", {}).items():
            cast(nn.Module, self._objectives[int(index)]).load_state_dict(values)
        take_allocation_state(self.policy.model, state.get("ranks", {}))


def _weights(batch: Batch) -> Tensor:
    """The weights [P] of a batch's pairs: 1 each, unless the data have weights."""
    if "pair_weights" in batch:
        return batch["pair_weights"]
    return torch.ones((len(batch["cu_seqlens"]) - 1) // 2, device=batch["cu_seqlens"].device)
