"""`dpo-train inspect`: what a run would see and what it would take, before any of it is paid for. Trains nothing."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from transformers.trainer_utils import has_length

from dpo_kernels import objectives
from dpo_kernels.linear import planner

from ..data.rows import REFERENCE
from ..model.loss_path import memory_budget
from ..model.references import AdapterOffReference, FrozenReference
from ..model.split import Batch, SplitModel
from ..trainer import DPOTrainer

EXAMPLES = 3
BARS = 8
LONGEST = 900  # characters of a rendered text
BATCHES = 256  # looked at, of a longer epoch
#: Bytes of state that an optimizer keeps for each trained parameter of b bytes, by the start of its name.
_STATE = {"adamw_torch": 2, "adamw_apex": 2, "sgd": 0}


class SelfReference(FrozenReference):
    """The policy in its copy's place: as much work, without the memory."""

    def __init__(self, policy: SplitModel) -> None:
        self.split = policy


class Inspector(DPOTrainer):
    """A trainer as it stands before its first step, that copies no reference and computes none beforehand."""

    def _make_reference(self, ref_model: Any, example: Batch | None) -> FrozenReference | AdapterOffReference | None:
        plain = not hasattr(self.model, "disable_adapter") and not self.args.precompute_ref_log_probs
        if plain and ref_model is None and self._needs_reference_model():
            return SelfReference(self.policy)
        return super()._make_reference(ref_model, example)

    def _needs_reference_model(self) -> bool:
        brought = all(name in dataset.column_names for dataset in self.datasets() for name in REFERENCE)
        return objectives.needs_reference(self._objectives) and not brought

    def _with_reference(self, dataset: Any, name: str) -> Any:
        """The dataset with the log-probabilities that an earlier run kept, if one did."""
        if all(column in dataset.column_names for column in REFERENCE):
            return dataset
        cache = self.reference_cache(dataset)
        found = cache.complete() if cache is not None else None
        for column, values in zip(REFERENCE, found or (), strict=False):
            dataset = dataset.add_column(column, values)
        return dataset

    def inspect(self) -> dict[str, Any]:
        """Everything that the text shows, as JSON values."""
        batches = self._batches()
        step = self._time(batches)
        return {
            "data": [account.describe() for account in self.accounts],
            "lengths": {name: _histogram(values) for name, values in self._lengths().items()},
            "reference": {
                account.name: figures
                for account, dataset in zip(self.accounts, self.datasets(), strict=False)
                if (figures := _reference_figures(dataset)) is not None
            },
            "examples": self._examples(),
            "plan": {
                **self._model_plan(),
                **batches["plan"],
                "head": self._head_plan(batches["largest"], step),
                **step,
            },
        }

    def _lengths(self) -> dict[str, list[int]]:
        dataset = self.datasets()[0]
        parts = {name: [len(ids) for ids in dataset[f"{name}_input_ids"]] for name in ("prompt", "chosen", "rejected")}
        longer = map(max, parts["chosen"], parts["rejected"])
        return {**parts, "prompt + longer answer": [a + b for a, b in zip(parts["prompt"], longer, strict=True)]}

    def _examples(self) -> list[dict[str, Any]]:
        dataset, tokenizer = self.datasets()[0], self.processing_class
        rows = sorted({0, len(dataset) // 2, len(dataset) - 1})[:EXAMPLES]
        found = []
        for row in rows:
            texts = {}
            for name in ("prompt", "chosen", "rejected"):
                ids = dataset[row][f"{name}_input_ids"]
                texts[name] = {"tokens": len(ids), "text": tokenizer.decode(ids, skip_special_tokens=False)}  # type: ignore[union-attr]
            weight = dataset[row].get("weight")
            found.append({"row": row + 1, **texts, **({} if weight is None else {"weight": weight})})
        return found

    # --- the plan ----------------------------------------------------------------------------------------------------

    def _batches(self) -> dict[str, Any]:
        """Steps and tokens of an epoch, from the batches that training would get; `largest` has most scored tokens."""
        args = self.args
        loader = self.get_train_dataloader()
        sized = has_length(loader)
        tokens, held, seen, largest = 0, 0, 0, None
        for batch in loader:
            tokens += int(batch["num_tokens"])
            held += int(batch["input_ids"].numel())
            seen += 1
            if largest is None or len(batch["labels"]) > len(largest["labels"]):
                largest = batch
            if seen == BATCHES:
                break
        per_epoch = max(-(-len(loader) // args.gradient_accumulation_steps), 1) if sized else None
        steps = args.max_steps if args.max_steps > 0 else int(-(-(per_epoch or 0) * args.num_train_epochs // 1))
        step_tokens = tokens / max(seen, 1) * args.gradient_accumulation_steps * args.world_size
        plan = {
            "steps_per_epoch": per_epoch,
            "steps": steps,
            "tokens_per_step": round(step_tokens),
            # Shared prompts stand in the batch once and are counted for both sides: fewer tokens than the text has.
            "batch_tokens_per_text_token": held / max(tokens, 1),
            "batches_seen": seen,
        }
        return {"plan": plan, "largest": largest}

    def _model_plan(self) -> dict[str, Any]:
        model: Any = self.policy.model
        trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
        optimizer = str(getattr(self.args.optim, "value", self.args.optim))
        known = [count for name, count in _STATE.items() if optimizer.startswith(name)]
        reference = 0
        if isinstance(self.reference, FrozenReference):
            reference = _bytes(self.reference.split.model)
        return {
            "model": type(model).__name__,
            "parameters": sum(p.numel() for p in model.parameters()),
            "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "weights_bytes": _bytes(model),
            "gradients_bytes": trained,
            "optimizer_bytes": known[0] * trained if known else None,
            "reference_bytes": reference,
            "reference": "a frozen model" if type(self.reference) is SelfReference else self.reference_kind,
            "loss_path": self.loss_path,
            "layout": getattr(self.data_collator, "layout", "custom"),
        }

    def _head_plan(self, batch: Batch, step: dict[str, Any]) -> str | None:
        """What the linear path does with the batch that has most scored tokens; None on the logits path."""
        said = step.get("head_of_timed_batch")
        if not said or self.loss_path != "linear":
            return None
        return self.plan_of(batch, said.partition(":")[0]).describe()

    def plan_of(self, batch: Batch, strategy: str) -> planner.Plan:
        """The plan of a training batch by a strategy that a batch was seen to take."""
        head: Any = self.policy.head
        dtype = torch.get_autocast_dtype(self.args.device.type) if self._autocasts() else head.weight.dtype
        reference = isinstance(self.reference, (FrozenReference, AdapterOffReference)) and "ref_logps" not in batch
        names = [name for name in self.args.statistics if reference or name != "kl"]
        differentiated = objectives.needs_token_kl(self._objectives) or self.args.kl_coef > 0
        sizes = planner.Head(
            head.weight.shape[1],
            head.weight.shape[0],
            max(dtype.itemsize, 2),
            needs_weight=head.weight.requires_grad,
            projects_reference=reference,
            kl="kl" in names or differentiated,
            widens=self.args.device.type == "cpu" and dtype.itemsize == 2,
            kl_gradient=differentiated,
            device_type=self.args.device.type,
        )
        asked = "two_pass" if strategy == "kept_logits" else strategy
        budget = planner.budget_of(memory_budget(self.args.memory_budget, self.policy), sizes, asked)
        counts = batch["cu_seqlens"].diff().tolist()
        if asked == "whole_pairs":
            return planner.plan_pairs(sizes, counts, budget, "the strategy that the timed batch took")
        return planner.plan_tokens(sizes, asked, sum(counts), budget, "the strategy that the timed batch took")

    def _autocasts(self) -> bool:
        with self.accelerator.autocast():
            return torch.is_autocast_enabled(self.args.device.type)

    def _time(self, batches: dict[str, Any]) -> dict[str, Any]:
        """Forward and backward of two pairs of median length, after one of a few tokens; the weights stay as they are."""
        dataset = self.datasets()[0]
        lengths = dataset["length"]
        middle = sorted(range(len(lengths)), key=lengths.__getitem__)[len(lengths) // 2 :][:2]
        batch = self._prepare_inputs(self.data_collator([dict(dataset[row]) for row in middle]))  # type: ignore[arg-type]
        model: Any = self.policy.model
        was_training, seconds, plan = model.training, 0.0, None
        model.train()
        for item in self._objectives:
            if isinstance(item, nn.Module):
                item.eval()
        try:
            for timed in (self._example_batch(), batch):
                seconds, plan = self._seconds(timed)  # type: ignore[arg-type]
                model.zero_grad(set_to_none=True)
        finally:
            model.train(was_training)
        tokens = int(batch["num_tokens"])
        per_step = batches["plan"]["tokens_per_step"] / max(self.args.world_size, 1)
        return {
            "timed_tokens": tokens,
            "timed_seconds": seconds,
            "estimated_seconds_per_step": seconds / tokens * per_step,
            "head_of_timed_batch": None if plan is None else plan.describe(),
        }

    def _seconds(self, batch: Batch) -> tuple[float, planner.Plan | None]:
        """(seconds of forward and backward, the linear path's plan)."""
        pairs = (len(batch["cu_seqlens"]) - 1) // 2
        if self.reference is None and "ref_logps" not in batch and objectives.needs_reference(self._objectives):
            nothing = torch.zeros(2 * pairs, dtype=torch.float64, device=batch["labels"].device)
            batch = {**batch, "ref_logps": nothing}
        _synchronize(self.args.device)
        start = time.perf_counter()
        with self._kernels():
            output = self.pair_loss(batch, torch.ones(pairs, device=batch["labels"].device))
        output.loss.backward()
        _synchronize(self.args.device)
        return time.perf_counter() - start, output.plan


# --- helpers -------------------------------------------------------------------------------------------------------


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()


def _bytes(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def _histogram(values: Sequence[int]) -> dict[str, Any]:
    """Counts of whole numbers in at most BARS intervals of one width, with mean, median and extremes."""
    low, high = min(values), max(values)
    width = max(-(-(high - low + 1) // BARS), 1)
    edges = list(range(low, high + width + 1, width))
    return {
        "mean": statistics.fmean(values),
        "median": statistics.median(values),
        "least": low,
        "most": high,
        "bins": [
            {"from": a, "to": b - 1, "pairs": sum(a <= value < b for value in values)} for a, b in pairwise(edges)
        ],
    }


def _reference_figures(dataset: Any) -> dict[str, Any] | None:
    """How well the reference's log-probabilities tell the answers apart; None where they are not known."""
    if any(name not in dataset.column_names for name in REFERENCE):
        return None
    chosen, rejected = (torch.tensor(dataset[name], dtype=torch.float64) for name in REFERENCE)
    counts = [
        torch.tensor([max(len(ids), 1) for ids in dataset[f"{side}_input_ids"]]) for side in ("chosen", "rejected")
    ]
    margins, per_token = chosen - rejected, chosen / counts[0] - rejected / counts[1]
    return {
        "pairs": len(margins),
        "accuracy": (margins.sign() / 2 + 0.5).mean().item(),
        "accuracy_per_token": (per_token.sign() / 2 + 0.5).mean().item(),
        "margin_mean": margins.mean().item(),
        "margin_std": margins.std(correction=0).item(),
        "chosen_per_token": (chosen.sum() / counts[0].sum()).item(),
    }


# --- the text ------------------------------------------------------------------------------------------------------


def render(found: dict[str, Any]) -> str:
    """What `Inspector.inspect` found, for a terminal."""
    lines = ["Data", *(f"  {line}" for line in found["data"]), "", "Lengths of training pairs, in tokens"]
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
    lines += ["", "Examples, special tokens shown"]
    for example in found["examples"]:
        weight = f", weight {example['weight']:g}" if "weight" in example else ""
        lines.append(f"  pair {example['row']}{weight}")
        for name in ("prompt", "chosen", "rejected"):
            lines.append(f"    {name}, {example[name]['tokens']} tokens")
            lines += [f"      | {line}" for line in _shortened(example[name]["text"]).split("\n")]
    return "\n".join([*lines, "", *_plan_lines(found["plan"])])


def _plan_lines(plan: dict[str, Any]) -> list[str]:
    def mib(value: int | None) -> str:
        return "not known for this optimizer" if value is None else f"{value / 2**20:,.1f} MiB"

    known = sum(plan[f"{part}_bytes"] or 0 for part in ("weights", "gradients", "optimizer", "reference"))
    epoch = "" if plan["steps_per_epoch"] is None else f", {plan['steps_per_epoch']:,} an epoch"
    step = plan["estimated_seconds_per_step"]
    return [
        f"Plan for {plan['model']}, {plan['trainable_parameters']:,} of {plan['parameters']:,} parameters trained",
        f"  weights          {mib(plan['weights_bytes'])}",
        f"  gradients        {mib(plan['gradients_bytes'])}",
        f"  optimizer state  {mib(plan['optimizer_bytes'])}",
        f"  reference        {mib(plan['reference_bytes'])} ({plan['reference']})",
        f"  together         {mib(known)}, and activations, which grow with the batch",
        f"  loss             {plan['loss_path']} path"
        + (f"; of the batch with most scored tokens, {plan['head']}" if plan["head"] else ""),
        f"  batches          layout {plan['layout']}; {plan['batch_tokens_per_text_token']:.2f} tokens, padding included, "
        "for each token of text",
        f"  steps            {plan['steps']:,}{epoch}; about {plan['tokens_per_step']:,} tokens each",
        f"  time             an estimate: {step:.2f} s a step, {_duration(step * plan['steps'])} in all, without evaluations; "
        f"from one forward and backward of {plan['timed_tokens']} tokens in {plan['timed_seconds']:.2f} s",
    ]


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _shortened(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} [...] {text[-LONGEST // 2 :]}"
