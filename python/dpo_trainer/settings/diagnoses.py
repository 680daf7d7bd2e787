"""The diagnoses of preference training: their names, remedies and thresholds."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from ..errors import ConfigError
from .table import ANY, COUNT, NOT_NEGATIVE, Range, check_choice


@dataclass(frozen=True)
class Diagnosis:
    """A condition that is checked during a run: a title that describes it, and the remedy."""

    title: str
    remedy: str
    #: The thresholds that decide it, which are fields of Limits.
    limits: tuple[str, ...] = ()
    #: Whether a run has failed if the diagnosis still holds at its end.
    fails: bool = False
    #: Whether it means that the loss did not fall. It no longer holds if the loss has fallen at the end.
    stuck: bool = False
    #: Diagnoses that may cause it.
    causes: tuple[str, ...] = ()
    #: Advice on settings: `{name}` is the run's value of a setting, `{name*10}` a multiple of it.
    step: str = ""

    def advice(self, settings: Mapping[str, Any]) -> str:
        """The advice on settings with the run's values, and the remedy. Only the remedy if a value is unknown."""

        def value(found: re.Match[str]) -> str:
            number = float(settings[found[1]]) * float(found[2] or 1)
            if not number:  # no multiple of 0 is a remedy
                raise ValueError
            return f"{number:.4g}"

        try:
            step = re.sub(r"{(\w+)(?:\*([\d.]+))?}", value, self.step)
        except (KeyError, TypeError, ValueError):
            step = ""
        return f"{step} {self.remedy}".strip()


#: The thresholds that decide whether the loss is stuck.
_STUCK = ("stuck_steps", "stuck_share", "stuck_tolerance")

#: All diagnoses by name. Causes come before their consequences.
DIAGNOSES: dict[str, Diagnosis] = {
    "weights_zero": Diagnosis(
        "No pair counts: all weights are 0",
        "Give the column weight a positive number for each pair that should count, or leave the column out.",
        fails=True,
    ),
    "learning_rate_high": Diagnosis(
        "The learning rate is far too high",
        "Start again from the model before training. Usual values are 5e-7 to 5e-6 for whole models and 1e-5 to 1e-4 with LoRA.",
        ("early_steps", "early_share", "kl_level", "loss_rise"),
        fails=True,
        step="Set learning_rate: {learning_rate*0.1}, a tenth of this run's.",
    ),
    "not_finite": Diagnosis(
        "The loss or the gradient is not a number",
        "Use bf16 instead of fp16; check the data's weights and reference columns for infinities.",
        fails=True,
        causes=("learning_rate_high",),
        step="Set learning_rate: {learning_rate*0.1}, a tenth of this run's.",
    ),
    "updates_lost": Diagnosis(
        "16-bit weights lose the updates to rounding, so the loss is stuck",
        "Load the model in float32 (the default of dpo-train) and set bf16: true, which computes in 16 bits with float32 "
        "weights; or train a LoRA adapter in float32. Updates of this size are too small for 16-bit weights.",
        (*_STUCK, "stuck_rewards", "changed_share"),
        fails=True,
        stuck=True,
    ),
    "learning_rate_low": Diagnosis(
        "The learning rate is too low, so the loss is stuck where it started",
        "Usual values are 5e-7 to 5e-6 for whole models and 1e-5 to 1e-4 with LoRA. Check that the parameters you mean to train "
        "require gradients.",
        (*_STUCK, "stuck_rewards"),
        fails=True,
        stuck=True,
        step="Set learning_rate: {learning_rate*10}, ten times this run's.",
    ),
    "pairs_equal": Diagnosis(
        "Chosen and rejected answers are the same to the model",
        "Look at the batches (dpo-train inspect). Truncation may cut both answers to the same tokens, or a template or a "
        "collator may put the same text on both sides.",
        _STUCK,
        fails=True,
        stuck=True,
    ),
    "pairs_swapped": Diagnosis(
        "Rejected answers win, so the labels look flipped",
        "Read five rows of the training data and five of the evaluation data (dpo-train inspect). If chosen and rejected are "
        "swapped in both, set columns: {chosen: rejected, rejected: chosen}; if only in one file, exchange them in that file.",
        (*_STUCK, "swapped_accuracy"),
        fails=True,
        causes=("learning_rate_high",),
    ),
    "pairs_random": Diagnosis(
        "The rewards move, but chosen answers win no more often than by chance",
        "Read twenty pairs: is the preference visible in the text, and is it the same kind of preference in all of them? "
        "Filter unclear pairs, give weights, or set label_smoothing.",
        (*_STUCK, "random_accuracy"),
        fails=True,
        stuck=True,
        causes=("learning_rate_high",),
    ),
    "weak_reference": Diagnosis(
        "The reference is weak on these pairs",
        "Fine-tune on the chosen answers first (SFT), and use the chat template that the model was trained with: DPO moves "
        "probability between answers that the model already gives. If its accuracy is low, check for swapped columns.",
        ("chosen_likelihood", "reference_accuracy"),
        causes=("pairs_swapped",),
    ),
    "empty_answers": Diagnosis(
        "Some answers are empty",
        "Look at these rows: is a column missing, or does a template or truncation remove the text? The filter empty leaves out "
        "pairs with a blank answer.",
    ),
    "uneven_preferences": Diagnosis(
        "A few pairs outweigh the rest",
        "Look at the extreme pairs: filter them, cap the weights, or give a column weight with the confidence of "
        "each preference.",
        ("margin_spread", "weight_share"),
    ),
    "lengths_differ": Diagnosis(
        "Chosen and rejected answers differ in length",
        "The model may learn length instead of quality. Balance the lengths, set ld_alpha below 1, or use a length-normalised "
        "objective (loss_type: sigmoid_norm or simpo).",
        ("length_ratio",),
    ),
    "kl_exploding": Diagnosis(
        "The policy moves far away from the reference",
        "An earlier checkpoint is closer to the reference.",
        ("kl_level", "kl_growth"),
        causes=("learning_rate_high", "not_finite", "pairs_swapped"),
        step="Set learning_rate: {learning_rate*0.3}, a third of this run's, or beta: {beta*2}, twice this run's.",
    ),
    "overfitting": Diagnosis(
        "The model memorises the training pairs",
        "Set load_best_model_at_end: true, or take fewer steps (max_steps, num_train_epochs). More pairs, a larger beta and "
        "label_smoothing help too.",
        ("eval_rise", "accuracy_gap", "memorised_accuracy", "displacement", "random_accuracy"),
        causes=("learning_rate_high", "pairs_random"),
    ),
    "displacement": Diagnosis(
        "Likelihood displacement: chosen and rejected answers both become less likely",
        "The margin grows, but the model unlearns good answers. Add the chosen answers' likelihood to the loss "
        "(loss_type: rpo or dpop, or [sigmoid, sft]), lower the learning rate, or filter pairs whose answers are "
        "nearly alike.",
        ("displacement",),
        causes=("learning_rate_high", "kl_exploding", "overfitting"),
    ),
    "grad_spike": Diagnosis(
        "A gradient is far larger than usual",
        "A single spike suggests unusual pairs at this step: very long, garbled or extreme ones. If spikes repeat, lower the "
        "learning rate, lengthen the warm-up, keep max_grad_norm at 1.",
        ("grad_spike",),
        causes=("learning_rate_high", "kl_exploding"),
    ),
}


def _limit(default: float, meaning: str, rule: Range = NOT_NEGATIVE, *, off: float = math.inf) -> Any:
    """A threshold. `off` is the infinity that no value exceeds, which turns the check off."""
    return field(default=default, metadata={"help": meaning, "rule": rule, "off": off})


#: A threshold for values that are too low. `_limit` makes thresholds for values that are too high.
_floor = partial(_limit, off=-math.inf)


@dataclass(frozen=True)
class Limits:
    """The thresholds of the diagnoses. None as a threshold turns its check off."""

    windows: float = _limit(5, "number of logged records that count as recent", COUNT)
    probe_pairs: float = _limit(32, "training pairs that the reference scores before the first step", COUNT)
    probe_tokens: float = _limit(
        2048, "tokens of these pairs; if they have more, the reference scores fewer pairs, but at least 16"
    )
    stuck_steps: float = _limit(20, "steps after the warm-up before the loss may count as stuck")
    stuck_share: float = _limit(0.1, "share of the run after the warm-up before the loss may count as stuck")
    stuck_tolerance: float = _floor(0.015, "the loss is stuck if it fell by less than this share of the first loss")
    stuck_rewards: float = _floor(0.02, "rewards smaller than this count as unchanged")
    changed_share: float = _floor(0.5, "share of the 16-bit weights with a gradient that an update must change")
    random_accuracy: float = _floor(0.58, "an accuracy up to this is near 50 %")
    swapped_accuracy: float = _floor(0.4, "an accuracy below this is well under 50 %")
    eval_rise: float = _limit(0.1, "rise of the evaluation loss over its minimum, as a share of the first loss")
    accuracy_gap: float = _limit(0.25, "training accuracy minus evaluation accuracy")
    memorised_accuracy: float = _limit(0.99, "training accuracy, if chosen log-probs fall by more than `displacement`")
    early_steps: float = _limit(
        10, "steps after the warm-up in which a KL above `kl_level` means that the learning rate is far too high"
    )
    early_share: float = _limit(0.1, "these steps as a share of the run, if that is more")
    loss_rise: float = _limit(
        0.5,
        "rise of the recent training loss, as a share of the first loss, at which the learning rate is far too high",
    )
    kl_level: float = _limit(1.0, "KL from the reference, in nats per token")
    kl_growth: float = _limit(4.0, "recent KL divided by that of the window before, from a fifth of kl_level on")
    chosen_likelihood: float = _floor(-4.0, "mean log-prob per chosen token under the reference, in nats", ANY)
    reference_accuracy: float = _floor(0.4, "share of pairs whose chosen answer the reference finds likelier per token")
    margin_spread: float = _limit(10.0, "95th percentile of the reference's |margins| over their median")
    weight_share: float = _floor(0.5, "effective number of pairs, (sum w)^2 / sum w^2, divided by their number")
    displacement: float = _limit(0.1, "log-probability lost by chosen and by rejected answers, in nats per token")
    length_ratio: float = _limit(1.5, "longer mean length of chosen or rejected answers divided by the shorter one")
    grad_spike: float = _limit(10.0, "gradient norm divided by the median of the records before")

    @classmethod
    def of(cls, given: Mapping[str, Any] | None) -> Limits:
        """The defaults, replaced by the given values. Raises ConfigError for unknown names and bad values."""
        rows = {item.name: item.metadata for item in dataclasses.fields(cls)}
        fitted: dict[str, float] = {}
        for name, value in (given or {}).items():
            check_choice("diagnostics", name, rows, "threshold")
            try:
                number = math.inf if value is None else float(value)
            except (TypeError, ValueError):
                number = math.nan
            if isinstance(value, bool) or not (value is None or math.isfinite(number)):
                raise ConfigError(f"diagnostics.{name}: expected a number, or null to turn it off, got {value!r}")
            if not rows[name]["rule"].holds(number):
                raise ConfigError(f"diagnostics.{name}: {rows[name]['rule'].words}, got {value}")
            fitted[name] = rows[name]["off"] if value is None else number
        return cls(**fitted)
