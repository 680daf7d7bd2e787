"""Writes docs/objectives.md and its plots from the registry: `python docs/objectives.py`.

This script writes the plots as plain SVG without a plotting library, whose version could change the output. So the page can
be compared with the code byte for byte.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from dpo_kernels.objectives import (
    DIVERGENCE_FORMULAS,
    OBJECTIVES,
    ObjectiveInfo,
    Pairs,
    RunningObjective,
    objective,
)

FOLDER = Path(__file__).resolve().parent

# One token per answer and beta = 1, so that the axis is beta times the margin for summing and averaging objectives alike.
# The log-ratios are +-x/2, around a reference log-probability of -4.
SPAN, POINTS, REFERENCE = 6.0, 121, -4.0


@dataclass(frozen=True)
class Curves:
    """An objective along the axis: the loss and its derivatives with respect to log pi(chosen) and log pi(rejected)."""

    x: list[float]
    loss: list[float]
    chosen: list[float]
    rejected: list[float]


def curves(info: ObjectiveInfo, label_smoothing: float) -> Curves:
    """Evaluate one objective pair by pair (each in a batch of one), with running means at 0."""
    made = objective(info.name)
    if isinstance(made, RunningObjective):
        made.eval()
    found = Curves([], [], [], [])
    for k in range(POINTS):
        x = -SPAN + 2 * SPAN * k / (POINTS - 1)
        one = torch.ones(1, dtype=torch.float64)
        chosen = (one * (REFERENCE + x / 2)).requires_grad_()
        rejected = (one * (REFERENCE - x / 2)).requires_grad_()
        ref = one * REFERENCE
        loss = made(Pairs(chosen, rejected, ref, ref, one, one, one, one * label_smoothing, 0 * one, 0 * one)).sum()
        by_chosen, by_rejected = torch.autograd.grad(loss, (chosen, rejected), allow_unused=True)
        found.x.append(x)
        found.loss.append(loss.item())
        found.chosen.append(by_chosen.item() if by_chosen is not None else 0.0)
        found.rejected.append(by_rejected.item() if by_rejected is not None else 0.0)
    return found


# --- SVG ----------------------------------------------------------------------------------------------------------

WIDTH, HEIGHT, TOP, BOTTOM = 640, 230, 34, 40
PANEL = {"loss": (56, 300), "gradient": (376, 620)}
BLUE, GREEN, RED = "#1f5fa8", "#2a7d3f", "#c0392b"


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers between low and high."""
    raw = (high - low) / 4
    power = 10 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw)
    return [k * step for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _panel(name: str, title: str, lines: list[tuple[list[float], str, bool]], x: list[float]) -> list[str]:
    left, right = PANEL[name]
    values = [v for line, _, _ in lines for v in line]
    low, high = min(*values, 0.0), max(*values, 0.0)
    room = 0.05 * (high - low or 1.0)
    low, high = low - room, high + room

    def place(px: float, py: float) -> tuple[float, float]:
        across = left + (px + SPAN) / (2 * SPAN) * (right - left)
        return across, HEIGHT - BOTTOM - (py - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    drawn = [f'<text x="{left}" y="20" font-weight="bold">{title}</text>']
    for tick in _ticks(low, high):
        y = place(0, tick)[1]
        drawn.append(f'<line x1="{left}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}" class="grid"/>')
        drawn.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for tick in (-6, -4, -2, 0, 2, 4, 6):
        across = place(tick, 0)[0]
        drawn.append(f'<line x1="{across:.1f}" y1="{TOP}" x2="{across:.1f}" y2="{HEIGHT - BOTTOM}" class="grid"/>')
        drawn.append(f'<text x="{across:.1f}" y="{HEIGHT - BOTTOM + 15}" text-anchor="middle">{tick}</text>')
    zero = place(0, 0)
    drawn.append(f'<line x1="{left}" y1="{zero[1]:.1f}" x2="{right}" y2="{zero[1]:.1f}" class="axis"/>')
    drawn.append(f'<line x1="{zero[0]:.1f}" y1="{TOP}" x2="{zero[0]:.1f}" y2="{HEIGHT - BOTTOM}" class="axis"/>')
    middle = (left + right) / 2
    drawn.append(f'<text x="{middle}" y="{HEIGHT - 8}" text-anchor="middle">beta x margin</text>')
    for line, colour, dashed in lines:
        points = " ".join("{:.1f},{:.1f}".format(*place(px, py)) for px, py in zip(x, line, strict=True))
        dash = ' stroke-dasharray="5 4"' if dashed else ""
        drawn.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.8"{dash}/>')
    return drawn


def smoothings(info: ObjectiveInfo) -> list[float]:
    """The curves to draw: the plain objective, and, dashed, the smoothed objective if it supports label smoothing."""
    if info.smoothing_range is None:
        return [0.0]
    return [0.0 if info.smoothing_range.holds(0, 0) else 1e-3, 0.1]


def plot(info: ObjectiveInfo) -> str:
    """The SVG of one objective: loss on the left, gradient on the right."""
    drawn = [curves(info, e) for e in smoothings(info)]
    losses = [(c.loss, BLUE, k > 0) for k, c in enumerate(drawn)]
    slopes = [
        (line, colour, k > 0) for k, c in enumerate(drawn) for line, colour in ((c.chosen, GREEN), (c.rejected, RED))
    ]
    legend = f'<tspan fill="{GREEN}">by chosen</tspan>, <tspan fill="{RED}">by rejected</tspan>'
    body = _panel("loss", f"{info.name}: loss", losses, drawn[0].x)
    body += _panel("gradient", f"gradient {legend}", slopes, drawn[0].x)
    style = "text{font:11px sans-serif;fill:#333}.grid{stroke:#e4e4e4}.axis{stroke:#999}"
    opening = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}">'
    )
    background = f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>'
    return "\n".join([opening, f"<style>{style}</style>", background, *body, "</svg>"]) + "\n"


# --- the page -----------------------------------------------------------------------------------------------------

INTRODUCTION = """\
<!-- Written by docs/objectives.py from dpo_kernels/objectives/; edit those. -->
# Objectives

This page lists every objective (loss of a pair): when to use it, and below its formula, picture and source.

Every objective is a function of a few numbers per pair. So all of them run on the same kernels, from logits or from hidden
states, and any of them can be mixed:

```python
import torch
from dpo_kernels import DPOLoss, dpo_loss, objective

logits, labels = torch.randn(4, 8, 100, requires_grad=True), torch.randint(0, 100, (4, 8))
ref_logits = torch.randn(4, 8, 100)    # 2 pairs

dpo_loss(logits, labels, ref_logits=ref_logits, loss_type="ipo")
dpo_loss(logits, labels, loss_type=objective("simpo", gamma=1.0, beta=2.0))

mixed = DPOLoss(loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.1])
mixed(logits, labels, ref_logits=ref_logits)

own = lambda pairs: (1 - pairs.beta * pairs.margins) ** 2    # a vector, one loss a pair
dpo_loss(logits, labels, ref_logits=ref_logits, loss_type=own)
```

In a configuration file or on the command line, the same is text: `simpo(gamma=1.0, beta=2.0)`. An objective's own `beta` and
`label_smoothing` override the call's, so that each part of a mix can have its own. `python -m pydoc
dpo_kernels.objectives` has the rest.

Symbols of the formulas [below](#plots): `c`, `r` are the log-ratios log pi - log pi_ref of the chosen and the rejected answer
(sums over tokens), `x = beta (c - r)`, `s` the sigmoid, `e` label_smoothing, `|.|` lengths in tokens (sums of the token weights,
if there are any).
"Needs": a *reference* (logits, hidden states or precomputed sums); *neighbours*, when the loss of a pair depends on the rest
of its batch; *memory*, when a running mean is kept between calls (`DPOLoss` keeps it and saves it in its state_dict; with
`dpo_loss`, make the objective once and pass it each time). "Typical beta" is where to start.
"""

DIVERGENCES_TEXT = """\
## Divergences

DPO keeps the policy near the reference in reverse KL. f-DPO (Wang et al. 2023, Beyond Reverse KL: Generalizing Direct
Preference Optimization with Diverse Divergence Constraints) replaces the divergence: f'(pi / pi_ref) takes the place of
each log-ratio `u`. It applies to objectives of the difference of the two log-ratios alone: {able}.
Ask for it with `objective("sigmoid", divergence="js")` or `sigmoid(divergence=js)`. Reported rewards stay log-ratios.

| `divergence` | in the place of `u` |
|---|---|
{rows}
"""

WEIGHTS_TEXT = """\
## Uneven pairs

Some pairs are clear, and the labels of others are nearly random. `label_smoothing` and `beta` take one value per pair, and
`pair_weights` scales each pair's loss. `dpo_kernels.confidence` makes them from ratings, margins or votes (in the trainer:
`weight_from`):

```python
import torch
from dpo_kernels import dpo_loss
from dpo_kernels.confidence import confidence_smoothing, confidence_weights, preference_probability

logits, labels = torch.randn(4, 8, 100, requires_grad=True), torch.randint(0, 100, (4, 8))    # 2 pairs
ref_logps = torch.tensor([-40.0, -41.0, -42.0, -39.0])
p = preference_probability([8.0, 6.0], [3.0, 5.5], scale=1.0)    # of two ratings: sigmoid(gap / scale)
smoothing = confidence_smoothing(p)    # min(1 - p, 0.5): bounds the margin
weights = confidence_weights(p)        # (2 p - 1) / mean: doubtful pairs count less
dpo_loss(logits, labels, ref_logps=ref_logps, label_smoothing=smoothing)
dpo_loss(logits, labels, ref_logps=ref_logps, pair_weights=weights)
```

Answers of different length: `token_weights=length_desensitized_weights(labels, ld_alpha)` counts the longer answer's
surplus tokens at weight `ld_alpha` (Liu et al. 2024, Length Desensitization in Direct Preference Optimization).

`use_weighting=True` weighs each pair by how likely the policy is to have written both answers itself (Zhou et al. 2024, WPO:
Enhancing RLHF with Weighted Preference Optimization, eq. 2): off-policy data count less. The log sum of squared
probabilities that it needs comes from the pass that finds the log-probabilities; `linear_logps` returns it as `"log_sum_sq"`.

## Staying near the reference

`kl_coef` adds that multiple of the mean per-token KL(policy || reference), exact over the vocabulary and differentiable. It
needs the reference's logits or hidden states, as `tdpo` and `tdpo2` do; log-probabilities of the labels do not determine a KL.
"""


def _needs(info: ObjectiveInfo) -> str:
    found = []
    if info.needs_token_kl:
        found.append("reference logits")
    elif info.needs_reference:
        found.append("reference")
    if info.couples_pairs:
        found.append("neighbours")
    if info.observe is not None:
        found.append("memory")
    return ", ".join(found) or "nothing"


def _row(info: ObjectiveInfo) -> str:
    parameters = ", ".join(f"`{p.name}={p.default:g}`" for p in info.parameters) or "none"
    smoothing = "no" if info.smoothing_range is None else str(info.smoothing_range)
    cells = [f"[{info.name}](#{info.name})", info.use, _needs(info), smoothing, parameters]
    return "| " + " | ".join([*cells, f"{info.typical_beta:g}"]) + " |"


def _section(info: ObjectiveInfo) -> str:
    lines = [f"### {info.name}", "", f"![{info.name}: loss and gradient](objectives/{info.name}.svg)", ""]
    lines += [f"`{info.formula}`", "", f"{info.source[0].upper()}{info.source[1:]}."]
    lines += ["", *(f"* `{p.name}`: {p.help}; in {p.legal}, default {p.default:g}." for p in info.parameters)]
    return "\n".join(lines).rstrip() + "\n"


def render() -> dict[str, str]:
    """The text of every generated file, by its path under docs/."""
    rows = list(OBJECTIVES.values())
    head = "| name | when to use it | needs | label smoothing | own parameters | typical beta |"
    table = "\n".join([head, "|---" * 6 + "|", *map(_row, rows)])
    able = ", ".join(f"`{row.name}`" for row in rows if row.divergence)
    divergences = "\n".join(f"| `{name}` | `{formula}` |" for name, formula in DIVERGENCE_FORMULAS.items())
    plots = (
        "## Plots\n\nThe pictures show loss and gradient of a pair against beta times its margin: log-ratios `+x/2` and "
        "`-x/2` under a reference log-probability of -4, one token, beta = 1, defaults, a batch of one, running means and "
        "KLs at 0.\nGreen: derivative by log pi(chosen). Red: by log pi(rejected). Where a derivative is negative, training "
        "raises the log-probability. Dashed: label smoothing 0.1."
    )
    page = [INTRODUCTION, table, "", DIVERGENCES_TEXT.format(able=able, rows=divergences), WEIGHTS_TEXT, plots, ""]
    files = {"objectives.md": "\n".join([*page, *map(_section, rows)])}
    return files | {f"objectives/{row.name}.svg": plot(row) for row in rows}


def main() -> None:
    """Write the files, and delete plots of objectives that no longer exist."""
    files = render()
    (FOLDER / "objectives").mkdir(exist_ok=True)
    for old in (FOLDER / "objectives").glob("*.svg"):
        if f"objectives/{old.name}" not in files:
            old.unlink()
    for path, text in files.items():
        (FOLDER / path).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
