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
    (("beta",), lambda args, _: _other_than_sft(args), "an objective other than sft"),
    (
        ("f_divergence_type",),
        lambda args, _: any("divergence" not in entry for entry in _other_than_sft(args)),
        "an objective without a divergence of its own, other than sft",
    ),
    (
        ("f_alpha_divergence_coef",),
        lambda args, _: args.f_divergence_type == "alpha_divergence",
        "f_divergence_type alpha_divergence",
    ),
    (("discopop_tau",), lambda args, _: any("discopop" in entry for entry in entries(args)), "loss_type discopop"),
    (("memory_budget", "grad_filter"), lambda _, path: path == "linear", "the linear loss path"),
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


def _other_than_sft(args: Any) -> list[str]:
    return [entry for entry in entries(args) if entry.partition("(")[0].strip() != "sft"]
