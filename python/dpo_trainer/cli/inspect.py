"""`dpo-train inspect`: shows a run's data and batches, and its expected memory and time. Trains nothing."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from torch import nn
from torch.utils.benchmark import timer
from transformers.trainer_utils import has_length

from dpo_kernels import linear, objectives

from ..data.processor import tokenizer_of
from ..data.rows import REFERENCE, has_reference
from ..model.loss_path import memory_budget
from ..model.references import FrozenReference
from ..model.split import Batch, SplitModel
from ..report.page import duration
from ..run_folder.summary import changed_settings
from ..trainer import DPOTrainer
from ..watch.diagnostics import reference_facts
from ..watch.evaluated import shortened

BARS = 8
PARTS = ("prompt", "chosen", "rejected")
LONGEST = 900  # length in characters beyond which a shown text is shortened
BATCHES = 256  # number of batches that are examined in a longer epoch
#: Size of an optimizer's state as a multiple of the trained parameters' size, by the start of the optimizer's name.
_STATE = {"adamw_torch": 2, "adamw_apex": 2, "sgd": 0}


class SelfReference(FrozenReference):
    """A reference that is the policy itself instead of a copy: the same computation without the memory."""

    def __init__(self, policy: SplitModel) -> None:
        self.split = policy


class Inspector(DPOTrainer):
    """A trainer before its first step. It makes no copy for the reference and precomputes no log-probabilities."""

    def _frozen_copy(self, *args: Any, **kwargs: Any) -> FrozenReference:
        return SelfReference(self.policy)

    def _reference_columns(self, dataset: Any, name: str) -> tuple[list[float], ...]:
        """The log-probabilities that an earlier run kept; empty if there are none."""
        cache = self.reference_cache(dataset)
        return (cache.complete() if cache is not None else None) or ()

    def inspect(self) -> dict[str, Any]:
        """Everything that `render` shows, as JSON values."""
        batches = self._batches()
        step = self._time(batches)
        taken = step["head_of_timed_batch"]  # None on the logits path
        head = taken and self.plan_of(batches["largest"], taken.partition(":")[0]).describe()
        settings = changed_settings(self.args)
        return {
            "settings": {name: value for name, value in settings.items() if name != "output_dir"},
            "data": [account.describe() for account in self.accounts],
            "lengths": {name: _histogram(values) for name, values in self._lengths().items()},
            "reference": {
                account.name: _reference_figures(dataset)
                for account, dataset in zip(self.accounts, self.datasets(), strict=False)
                if has_reference(dataset)
            },
            "examples": self._examples(),
            "plan": {**self._model_plan(), **batches["plan"], "head": head, **step},
        }

    def _lengths(self) -> dict[str, list[int]]:
        dataset = self.datasets()[0]
        parts = {name: [len(ids) for ids in dataset[f"{name}_ids"]] for name in PARTS}
        longer = map(max, parts["chosen"], parts["rejected"])
        return {**parts, "prompt + longer answer": [a + b for a, b in zip(parts["prompt"], longer, strict=True)]}

    def _examples(self) -> list[dict[str, Any]]:
        dataset, tokenizer = self.datasets()[0], tokenizer_of(self.processing_class)
        found = []
        for index in sorted({0, len(dataset) // 2, len(dataset) - 1}):
            row = dataset[index]
            ids = {name: row[f"{name}_ids"] for name in PARTS}
            texts = {name: {"tokens": len(ids[name]), "text": tokenizer.decode(ids[name])} for name in PARTS}
            weight = {} if row.get("weight") is None else {"weight": row["weight"]}
            found.append({"row": index + 1, **texts, **weight})
        return found

    def _batches(self) -> dict[str, Any]:
        """Steps and tokens of an epoch, from the batches of training. `largest` is the batch with most scored tokens."""
        args = self.args
        loader = self.get_train_dataloader()
        tokens, held, seen, largest = 0, 0, 0, None
        for batch in islice(loader, BATCHES):
            seen += 1
            tokens += int(batch["num_tokens"])
            held += batch["input_ids"].numel()
            if largest is None or len(batch["labels"]) > len(largest["labels"]):
                largest = batch
        per_epoch = max(-(-len(loader) // args.gradient_accumulation_steps), 1) if has_length(loader) else None
        steps = args.max_steps if args.max_steps > 0 else math.ceil((per_epoch or 0) * args.num_train_epochs)
        plan = {
            "steps_per_epoch": per_epoch,
            "steps": steps,
            "tokens_per_step": round(tokens / max(seen, 1) * args.gradient_accumulation_steps * args.world_size),
            # May be below 1: a shared prompt is in the batch once, but its text counts for both sides.
            "batch_tokens_per_text_token": held / max(tokens, 1),
            "batches_seen": seen,
        }
        return {"plan": plan, "largest": largest}

    def _model_plan(self) -> dict[str, Any]:
        model: Any = self.policy.model
        trained = [p for p in model.parameters() if p.requires_grad]
        gradients = sum(p.nbytes for p in trained)
        copied = 0
        if isinstance(self.reference, SelfReference):  # a copy shares parameters that do not train
            copied = gradients
        elif isinstance(self.reference, FrozenReference):
            copied = sum(p.nbytes for p in self.reference.split.model.parameters())
        return {
            "model": type(model).__name__,
            "parameters": sum(p.numel() for p in model.parameters()),
            "trainable_parameters": sum(p.numel() for p in trained),
            "weights_bytes": sum(p.nbytes for p in model.parameters()),
            "gradients_bytes": gradients,
            "optimizer_bytes": next(
                (n * gradients for name, n in _STATE.items() if self.args.optim.startswith(name)), None
            ),
            "reference_bytes": copied,
            "reference": self.reference_kind,
            "loss_path": self.loss_path,
            "layout": getattr(self.data_collator, "layout", "custom"),
        }

    def plan_of(self, batch: Batch, strategy: str) -> linear.Plan:
        """The plan of a training batch with the given strategy, which the timed batch used."""
        head: Any = self.policy.head
        projects_reference = self.reference is not None and "ref_logps" not in batch
        with self._kernels():
            plan = linear.plan_linear_dpo_loss(
                batch["cu_seqlens"].diff().tolist(),
                head.weight,
                bias=head.bias,
                projects_reference=projects_reference,
                memory_budget=memory_budget(self.args.memory_budget, self.policy),
                grad_filter=self.args.grad_filter,
                loss_type=self._objectives,
                statistics=self._statistics(projects_reference),
                kl_coef=self.args.kl_coef,
                reduction="sum",
                flat_softmax=strategy == "two_pass",
            )
        reason = plan.reason.partition("; ")[0]
        return replace(plan, reason=plan.reason.replace(reason, "the strategy of the timed batch", 1))

    def _time(self, batches: dict[str, Any]) -> dict[str, Any]:
        """Time a forward and backward of two pairs of median length, after a short warm-up. The weights do not change."""
        dataset = self.datasets()[0]
        lengths = dataset["length"]
        middle = sorted(range(len(lengths)), key=lengths.__getitem__)[len(lengths) // 2 :][:2]
        batch = self._prepare_inputs(self.data_collator([dict(dataset[row]) for row in middle]))  # type: ignore[arg-type]
        model: Any = self.policy.model
        model.train()
        for item in self._objectives:
            if isinstance(item, nn.Module):
                item.eval()  # running means do not change
        # Zeros replace the log-probabilities that a run with precompute_ref_log_probs computes first.
        unknown = self.reference is None and objectives.needs_reference(self._objectives)
        for timed in filter(None, (self._example_batch(), batch)):
            pairs, device = (len(timed["cu_seqlens"]) - 1) // 2, timed["labels"].device
            zeros = {"ref_logps": torch.zeros(2 * pairs, dtype=torch.float64, device=device)} if unknown else {}
            start = timer()
            with self._kernels():
                output = self.pair_loss({**zeros, **timed}, torch.ones(pairs, device=device))
            output.loss.backward()
            seconds = timer() - start
            model.zero_grad(set_to_none=True)
        tokens = int(batch["num_tokens"])
        per_step = batches["plan"]["tokens_per_step"] / max(self.args.world_size, 1)
        return {
            "timed_tokens": tokens,
            "timed_seconds": seconds,
            "estimated_seconds_per_step": seconds / tokens * per_step,
            "head_of_timed_batch": output.plan and output.plan.describe(),
        }


def _histogram(values: Sequence[int]) -> dict[str, Any]:
    """Counts of whole numbers in at most BARS intervals of the same width, with mean, median and extremes."""
    low, high = min(values), max(values)
    width = max(-(-(high - low + 1) // BARS), 1)
    counts = Counter((value - low) // width for value in values)
    bars = (high - low) // width + 1
    return {
        "mean": statistics.fmean(values),
        "median": statistics.median(values),
        "least": low,
        "most": high,
        "bins": [
            {"from": low + bar * width, "to": low + (bar + 1) * width - 1, "pairs": counts[bar]} for bar in range(bars)
        ],
    }


def _reference_figures(dataset: Any) -> dict[str, Any]:
    """Accuracy and margins of the reference's log-probabilities in the dataset."""
    facts = reference_facts(dataset, [dataset[name] for name in REFERENCE])
    margins = torch.tensor(facts["margins"], dtype=torch.float64)
    return {
        "pairs": len(margins),
        "accuracy": (margins.sign() / 2 + 0.5).mean().item(),
        "accuracy_per_token": facts["accuracy"],
        "margin_mean": margins.mean().item(),
        "margin_std": margins.std(correction=0).item(),
        "chosen_per_token": facts["chosen_per_token"],
    }


def render(found: dict[str, Any]) -> str:
    """The result of `Inspector.inspect` as text for a terminal."""
    lines = ["Settings that are not at their defaults"]
    lines += [f"  {name}: {value}" for name, value in found["settings"].items()]
    lines += ["", "Data", *(f"  {line}" for line in found["data"]), "", "Lengths of training pairs, in tokens"]
    for name, histogram in found["lengths"].items():
        lines.append(
            f"  {name}: mean {histogram['mean']:.1f}, median {histogram['median']:g}, {histogram['least']} to {histogram['most']}"
        )
        most = max(bar["pairs"] for bar in histogram["bins"])
        for bar in histogram["bins"]:
            span = f"{bar['from']}" if bar["from"] == bar["to"] else f"{bar['from']}-{bar['to']}"
            lines.append(f"  {span:>13} {bar['pairs']:>8,} {'#' * -(-40 * bar['pairs'] // most)}")
    lines += ["", "Reference"]
    for name, figures in found["reference"].items():
        lines.append(
            f"  {name}: chosen likelier in {figures['accuracy']:.1%} of {figures['pairs']:,} pairs "
            f"({figures['accuracy_per_token']:.1%} per token); margin {figures['margin_mean']:+.2f} nats, standard deviation "
            f"{figures['margin_std']:.2f}; chosen answers {figures['chosen_per_token']:.2f} nats per token"
        )
    if not found["reference"]:
        lines.append("  no log-probabilities are known; a run with precompute_ref_log_probs keeps them")
    lines += ["", "Examples with special tokens"]
    for example in found["examples"]:
        weight = f", weight {example['weight']:g}" if "weight" in example else ""
        lines.append(f"  pair {example['row']}{weight}")
        for name in PARTS:
            lines.append(f"    {name}, {example[name]['tokens']} tokens")
            lines += [f"      | {line}" for line in shortened(example[name]["text"], LONGEST, "[...]").split("\n")]
    return "\n".join([*lines, "", *_plan_lines(found["plan"])])


def _plan_lines(plan: dict[str, Any]) -> list[str]:
    def mib(value: int | None) -> str:
        return "unknown for this optimizer" if value is None else f"{value / 2**20:,.1f} MiB"

    known = sum(plan[f"{part}_bytes"] or 0 for part in ("weights", "gradients", "optimizer", "reference"))
    epoch = "" if plan["steps_per_epoch"] is None else f", {plan['steps_per_epoch']:,} per epoch"
    step = plan["estimated_seconds_per_step"]
    return [
        f"Plan for {plan['model']}, {plan['trainable_parameters']:,} of {plan['parameters']:,} parameters trained",
        f"  weights          {mib(plan['weights_bytes'])}",
        f"  gradients        {mib(plan['gradients_bytes'])}",
        f"  optimizer state  {mib(plan['optimizer_bytes'])}",
        f"  reference        {mib(plan['reference_bytes'])} ({plan['reference']})",
        f"  together         {mib(known)}, and activations, which grow with the batch",
        f"  loss             {plan['loss_path']} path"
        + (f"; for the batch with most scored tokens: {plan['head']}" if plan["head"] else ""),
        f"  batches          layout {plan['layout']}; {plan['batch_tokens_per_text_token']:.2f} tokens, padding included, "
        "for each token of text",
        f"  steps            {plan['steps']:,}{epoch}; about {plan['tokens_per_step']:,} tokens each",
        f"  time             an estimate: {step:.2f} s per step, {duration(step * plan['steps'])} in all, without evaluations; "
        f"measured: one forward and backward of {plan['timed_tokens']} tokens in {plan['timed_seconds']:.2f} s",
    ]
