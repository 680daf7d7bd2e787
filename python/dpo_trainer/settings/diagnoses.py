"""What goes wrong in preference training: the name of each diagnosis, what to do about it, and the thresholds that decide it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from ..errors import ConfigError
from .table import ANY, COUNT, NOT_NEGATIVE, Range, check_choice


@dataclass(frozen=True)
class Diagnosis:
    """A condition that is watched for: its name in a sentence, and what to do about it."""

    title: str
    remedy: str
    #: Thresholds that decide it: fields of Limits.
    limits: tuple[str, ...] = ()
    #: Whether a run in which it holds to the end has failed.
    fails: bool = False


#: When a loss counts as stuck.
_STUCK = ("stuck_steps", "stuck_share", "stuck_tolerance")

#: Causes stand before their consequences.
DIAGNOSES: dict[str, Diagnosis] = {
    "weights_zero": Diagnosis(
        "No pair counts: all weights are 0",
        "Give the column weight a positive number for each pair that should count, or leave the column out.",
        fails=True,
    ),
    "learning_rate_high": Diagnosis(
        "The learning rate is far too high",
        "Lower it tenfold or more (5e-7 to 5e-6 for whole models, 1e-5 to 1e-4 with LoRA) and begin again: the first steps "
        "have already taken the model far from its reference.",
        ("early_steps", "early_share", "kl_level"),
        fails=True,
    ),
    "not_finite": Diagnosis(
        "The loss or the gradient is not a number",
        "Lower the learning rate; use bf16 instead of fp16; check the data's weights and reference columns for "
        "infinities.",
        fails=True,
    ),
    "updates_lost": Diagnosis(
        "The loss is stuck where it started because updates are lost to rounding",
        "16-bit weights cannot take updates of this size. Load the model in float32 (the default) and set bf16: true for "
        "16-bit arithmetic on float32 weights, or train a LoRA adapter in float32.",
        (*_STUCK, "stuck_rewards", "changed_share"),
        fails=True,
    ),
    "learning_rate_low": Diagnosis(
        "The loss is stuck where it started and the rewards do not move",
        "Raise the learning rate tenfold (5e-7 to 5e-6 for whole models, 1e-5 to 1e-4 with LoRA), and check that the "
        "parameters you mean to train require gradients.",
        (*_STUCK, "stuck_rewards"),
        fails=True,
    ),
    "pairs_equal": Diagnosis(
        "Chosen and rejected answers are the same to the model",
        "Look at the batches (dpo-train inspect): a truncation that cuts both answers to the same tokens, a template "
        "or a collator that puts one text on both sides.",
        _STUCK,
        fails=True,
    ),
    "pairs_swapped": Diagnosis(
        "Rejected answers win: accuracy is well under 50 %",
        "Check that the columns chosen and rejected are not swapped, in training and in evaluation data, and that both "
        "were labelled by the same rule.",
        (*_STUCK, "swapped_accuracy"),
        fails=True,
    ),
    "pairs_random": Diagnosis(
        "The rewards move, but chosen answers win no more often than by chance",
        "Read twenty pairs: is the preference visible in the text, and the same kind of preference throughout? Filter "
        "unclear pairs, give weights, or set label_smoothing. A learning rate that is far too high looks the same.",
        (*_STUCK, "random_accuracy"),
        fails=True,
    ),
    "weak_reference": Diagnosis(
        "The reference is weak on these pairs",
        "Fine-tune on the chosen answers first (SFT), and use the chat template the model was trained with: DPO moves "
        "probability between answers the model can already give. If its accuracy is low, check for swapped columns.",
        ("chosen_likelihood", "reference_accuracy"),
    ),
    "uneven_preferences": Diagnosis(
        "A few pairs outweigh the rest",
        "Look at the extreme pairs: filter them, cap the weights, or give a column weight with the confidence of "
        "each preference.",
        ("margin_spread", "weight_share"),
    ),
    "lengths_differ": Diagnosis(
        "Chosen and rejected answers differ in length",
        "The model may learn length for quality. Balance the lengths, set ld_alpha below 1, or use a length-normalised "
        "objective (loss_type: sigmoid_norm or simpo).",
        ("length_ratio",),
    ),
    "kl_exploding": Diagnosis(
        "The policy is running away from the reference",
        "Lower the learning rate, raise beta, or stop at an earlier checkpoint.",
        ("kl_level", "kl_growth"),
    ),
    "overfitting": Diagnosis(
        "The model memorises the training pairs",
        "Stop here or go back to the best checkpoint; fewer epochs, a lower learning rate, a larger beta, more pairs, "
        "or label_smoothing.",
        ("eval_rise", "accuracy_gap", "memorised_accuracy", "displacement"),
    ),
    "displacement": Diagnosis(
        "Likelihood displacement: chosen and rejected answers both become less likely",
        "The margin grows while good answers are unlearnt. Add the chosen answers' likelihood to the loss "
        "(loss_type: rpo or dpop, or [sigmoid, sft]), lower the learning rate, or filter pairs whose answers are "
        "nearly alike.",
        ("displacement",),
    ),
    "grad_spike": Diagnosis(
        "A gradient far above the usual",
        "A lone spike points to odd pairs at this step: very long, garbled or extreme ones. Repeated ones: lower the "
        "learning rate, lengthen the warm-up, keep max_grad_norm at 1.",
        ("grad_spike",),
    ),
}


def _limit(default: float, meaning: str, rule: Range = NOT_NEGATIVE, *, off: float = math.inf) -> Any:
    """A threshold; `off` is the infinity that is never passed."""
    return field(default=default, metadata={"help": meaning, "rule": rule, "off": off})


#: A threshold that speaks when something is below it; the others speak above.
_floor = partial(_limit, off=-math.inf)


@dataclass(frozen=True)
class Limits:
    """The thresholds. Given as None, a threshold becomes the infinity that is never passed, which turns its check off."""

    windows: float = _limit(5, "logged records that count as recent", COUNT)
    probe_pairs: float = _limit(32, "training pairs that the reference is asked about before the first step", COUNT)
    probe_tokens: float = _limit(
        2048, "tokens of these pairs, above which fewer are asked about, but at least 16 pairs"
    )
    stuck_steps: float = _limit(20, "steps after the warm-up before the loss may be called stuck")
    stuck_share: float = _limit(0.1, "share of the run after the warm-up before the loss may be called stuck")
    stuck_tolerance: float = _floor(0.015, "stuck: less than this share of the first loss below it")
    stuck_rewards: float = _floor(0.02, "rewards below this do not move")
    changed_share: float = _floor(0.5, "of the 16-bit weights with a gradient, that an update must change")
    random_accuracy: float = _floor(0.58, "up to this, accuracy is near 50 %")
    swapped_accuracy: float = _floor(0.4, "below this, it is well under 50 %")
    eval_rise: float = _limit(0.1, "rise of the evaluation loss over its least, as a share of the first loss")
    accuracy_gap: float = _limit(0.25, "training accuracy above evaluation accuracy")
    memorised_accuracy: float = _limit(0.99, "with chosen log-probs falling by more than `displacement`")
    early_steps: float = _limit(
        10, "steps after the warm-up in which a KL above `kl_level` means a learning rate far too high"
    )
    early_share: float = _limit(0.1, "the same as a share of the run, where that is more")
    kl_level: float = _limit(1.0, "nats per token")
    kl_growth: float = _limit(4.0, "recent KL over that of the windows before, from a fifth of kl_level on")
    chosen_likelihood: float = _floor(-4.0, "mean log-prob per chosen token under the reference, in nats", ANY)
    reference_accuracy: float = _floor(0.4, "share of pairs whose chosen answer is likelier per token")
    margin_spread: float = _limit(10.0, "95th percentile of the reference's |margins| over their median")
    weight_share: float = _floor(0.5, "effective number of pairs, (sum w)^2 / sum w^2, over their number")
    displacement: float = _limit(0.1, "nats per token lost on both sides")
    length_ratio: float = _limit(1.5, "mean completion lengths, either way round")
    grad_spike: float = _limit(10.0, "over the median of the records before")

    @classmethod
    def of(cls, given: Mapping[str, Any] | None) -> Limits:
        """The defaults with the given ones put over them. Raises ConfigError for unknown names and bad values."""
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
