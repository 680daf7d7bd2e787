"""The objective of a run: `loss_type`, the settings of single objectives, and their checks."""

from __future__ import annotations

from typing import Any

from dpo_kernels.names import OBJECTIVES

from ..errors import ConfigError
from .aliases import objective_of
from .table import check_choice

#: Names of the divergences in the kernels, by TRL's names.
DIVERGENCES = {
    "reverse_kl": "reverse_kl",
    "forward_kl": "forward_kl",
    "js_divergence": "js",
    "alpha_divergence": "alpha",
}


def build(config: Any) -> list[Any]:
    """The objectives of a DPOConfig as callables. Every call makes new ones, which matters for those with state."""
    from dpo_kernels import objectives

    return objectives.build(_texts(config))


def entries(config: Any) -> list[str]:
    """The entries of `loss_type` as texts; a function of the user's is its name."""
    kinds = config.loss_type
    return [str(entry) for entry in ([kinds] if isinstance(kinds, str) or callable(kinds) else kinds)]


def _texts(config: Any) -> list[Any]:
    """The entries of `loss_type`, with the values of other settings for hyper-parameters that the entry does not set."""
    kind = DIVERGENCES[config.f_divergence_type]
    found: list[Any] = []
    kinds = config.loss_type
    for entry in [kinds] if isinstance(kinds, str) or callable(kinds) else kinds:
        if not isinstance(entry, str):
            found.append(entry)
            continue
        name, _, own = (part.strip() for part in entry.partition("("))
        words = [own.removesuffix(")").strip()] if own.removesuffix(")").strip() else []
        # sft uses only the chosen answer, without a reference, so it has no divergence.
        if kind != "reverse_kl" and name != "sft" and "divergence" not in own:
            words.append(f"divergence={kind}")
            if kind == "alpha":
                words.append(f"divergence_alpha={config.f_alpha_divergence_coef}")
        if name == "discopop" and "tau" not in own:
            words.append(f"tau={config.discopop_tau}")
        found.append(f"{name}({', '.join(words)})" if words else entry)
    return found


def check_names(config: Any) -> None:
    """Raise ConfigError for an unknown objective, or a number of weights other than that of objectives. No torch."""
    names = [config.loss_type] if isinstance(config.loss_type, str) else list(config.loss_type)
    if not names:
        raise ConfigError("loss_type: at least one objective is needed")
    for name in names:
        # "simpo(gamma=1)" names simpo, with a hyper-parameter of its own.
        word = name.partition("(")[0].strip()
        if word not in OBJECTIVES and (ours := objective_of(word)) != word:
            raise ConfigError(f"loss_type: '{word}' is called '{ours}'")
        check_choice("loss_type", word, OBJECTIVES, "objective")
    if config.loss_weights is not None and len(config.loss_weights) != len(names):
        raise ConfigError(f"loss_weights: {len(config.loss_weights)} weights for {len(names)} objectives in loss_type")


def check(config: Any) -> None:
    """Raise ConfigError if the objective of a DPOConfig cannot be built or contradicts its other settings."""
    from dpo_kernels import objectives

    check_names(config)
    try:
        objectives.build(config.loss_type)
    except ValueError as error:
        raise ConfigError(f"loss_type: {error}") from error
    try:
        built = build(config)
    except ValueError as error:
        raise ConfigError(f"f_divergence_type: {error}") from error
    try:
        objectives.check(built, config.loss_weights, config.label_smoothing)
    except ValueError as error:
        raise ConfigError(f"label_smoothing: {error}") from error
    if config.precompute_ref_log_probs:
        check_sums_suffice(config, built)
    for name in ("precompute_ref_log_probs", "sync_ref_model"):
        if getattr(config, name) and not objectives.needs_reference(built):
            raise ConfigError(f"{name}: loss_type {config.loss_type} uses no reference; leave the setting off")


def check_sums_suffice(config: Any, built: list[Any]) -> None:
    """Raise ConfigError if the loss needs more of the reference than the log-probabilities of whole answers."""
    from dpo_kernels import objectives

    for setting, used in (
        ("ld_alpha", config.ld_alpha is not None),
        ("kl_coef", config.kl_coef > 0),
        (f"loss_type {config.loss_type}", objectives.needs_token_kl(built)),
    ):
        if used:
            raise ConfigError(
                f"{setting}: needs the reference model in every step, not only precomputed log-probabilities"
            )
