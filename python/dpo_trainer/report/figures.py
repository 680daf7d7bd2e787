"""The format of figures on all pages: labels, digits and templates. Imports no torch, because `compare` uses it."""

from __future__ import annotations

import math
from typing import Any

#: Labels of an evaluation's metrics, on all pages.
LABELS = {
    "loss": "loss",
    "rewards/accuracies": "accuracy",
    "rewards/margins": "reward margin",
    "rewards/chosen": "chosen reward",
    "rewards/rejected": "rejected reward",
    "kl": "KL from the reference",
    "entropy": "entropy",
    "win_rate": "win rate",
}
#: The metrics whose standard error is logged: 1 if a higher value is better, -1 if a lower value is better.
BETTER = {"loss": -1, "rewards/accuracies": 1, "win_rate": 1}


def template(name: str) -> Any:
    """One of this package's page templates."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("dpo_trainer.report", "templates"),
        autoescape=not name.endswith(".md.j2"),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters |= {"figure": figure, "with_error": with_error}
    return environment.get_template(name)


def figure(value: Any, metric: str = "") -> str:
    """A value as text: shares as percentages, counts in full, other numbers with four decimals or three digits."""
    if value is None:
        return "-"
    if metric.endswith(("accuracies", "win_rate")):
        return f"{value:.1%}"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, int) or metric == "tokens_per_second":
        return f"{value:,.0f}"
    return f"{value:.4f}" if 1e-3 <= abs(value) < 1e4 or value == 0 else f"{value:.3g}"


def with_error(value: Any, error: float | None, metric: str = "") -> str:
    """The value and its standard error with the same decimals. Only the value if the error is unknown or rounds to 0."""
    text = figure(value, metric)
    if value is None or error is None or not math.isfinite(error):
        return text
    decimals = len(text.rstrip("%").partition(".")[2]) if "e" not in text else 4
    uncertain = f"{100 * error:.{decimals}f}%" if text.endswith("%") else f"{error:.{decimals}f}"
    return f"{text} \u00b1 {uncertain}" if float(uncertain.rstrip("%")) else text


def duration(seconds: float) -> str:
    """A time in its two largest units, such as "2 h 5 min"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
