"""Settings that count only together with others. The trainer warns about those that a run sets without effect."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from .objective import entries

#: Rows of settings, of whether they count in a run with these settings and this loss path, and of what they need.
NEEDS: tuple[tuple[tuple[str, ...], Callable[[Any, str], Any], str], ...] = (
    (("ref_model_mixup_alpha", "ref_model_sync_steps"), lambda args, _: args.sync_ref_model, "sync_ref_model"),
    (
        ("precompute_ref_batch_size", "ref_cache_dir"),
        lambda args, _: args.precompute_ref_log_probs,
        "precompute_ref_log_probs",
    ),
    (("beta",), lambda args, _: _left_open(args, "beta"), "an objective without a beta of its own, other than sft"),
    (
        ("label_smoothing",),
        lambda args, _: _left_open(args, "label_smoothing"),
        "an objective without a label_smoothing of its own, other than sft",
    ),
    (
        ("f_divergence_type",),
        lambda args, _: _left_open(args, "divergence"),
        "an objective without a divergence of its own, other than sft",
    ),
    (
        ("f_alpha_divergence_coef",),
        lambda args, _: args.f_divergence_type == "alpha_divergence",
        "f_divergence_type alpha_divergence",
    ),
    (
        ("discopop_tau",),
        lambda args, _: any("discopop" in entry for entry in _left_open(args, "tau")),
        "loss_type discopop without a tau of its own",
    ),
    (("memory_budget",), lambda _, path: path == "linear", "the linear loss path"),
    (
        ("grad_filter",),
        lambda args, path: (
            path == "linear" and not args.kl_coef and not any("tdpo" in entry for entry in entries(args))
        ),
        "the linear loss path and a loss without token-level KL, whose gradients are exact",
    ),
    (("sample_max_new_tokens", "sample_temperature"), lambda args, _: args.sample_prompts, "sample_prompts"),
    (("label_smoothing_factor",), lambda *_: False, "cross-entropy; DPO's is label_smoothing"),
)


def without_effect(args: Any, loss_path: str) -> list[str]:
    """A line for each setting that differs from its default and has no effect.

    Args:
        args: a DPOConfig.
        loss_path: "linear" or "logits", as the run computes its loss.
    """
    defaults = {item.name: item.default for item in dataclasses.fields(args)}
    return [
        f"{name}: has no effect here; it counts only with {needs}"
        for names, counts, needs in NEEDS
        if not counts(args, loss_path)
        for name in names
        if getattr(args, name) != defaults[name]
    ]


def _left_open(args: Any, name: str) -> list[str]:
    """The entries of loss_type, other than sft, that do not set the hyper-parameter `name` themselves."""
    found = []
    for entry in entries(args):
        kind, _, own = entry.partition("(")
        if kind.strip() != "sft" and name not in (word.partition("=")[0].strip() for word in own.split(",")):
            found.append(entry)
    return found
