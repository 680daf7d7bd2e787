"""Horizontal bars as SVG text: time and memory of each method, with figures, in light and in dark.

The same figures give the same file, byte for byte, and no library is needed. A chart has its own background, so it is
legible on any page.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

#: Colours by role. A chart without a fixed theme holds both and follows the reader's system.
LIGHT = {"page": "#ffffff", "ink": "#1f2328", "faint": "#59636e", "ours": "#1b6ca8", "other": "#b8bec6"}
DARK = {"page": "#0d1117", "ink": "#f0f6fc", "faint": "#9198a1", "ours": "#4493f8", "other": "#4d5560"}

#: In pixels: widths of the chart, heights of a bar and of its row, and the widest character of text, bold text and headings.
WIDTH, NARROW, CHARACTER, BOLD, HEAD, BAR, ROW = 830, 400, 6.9, 7.6, 8.4, 13, 21


@dataclass(frozen=True)
class Bar:
    """One method: a value and its text for each column (None if it was not measured), and the first column's floor."""

    title: str
    ours: bool
    values: Sequence[tuple[float, str] | None]
    floor: float | None = None


@dataclass(frozen=True)
class Panel:
    """One comparison. columns: what each column of bars shows. floor: the meaning of the floor's tick, in words."""

    heading: str
    columns: Sequence[str]
    bars: Sequence[Bar]
    floor: str = ""


def _style(theme: str | None) -> str:
    def rules(colours: dict[str, str]) -> str:
        return (
            "".join(f".{role}{{fill:{colour}}}" for role, colour in colours.items())
            + f".tick{{stroke:{colours['ink']}}}"
        )

    base = "text{font:13px system-ui,-apple-system,'Segoe UI',Helvetica,Arial,sans-serif}.head{font-weight:600;font-size:14px}"
    base += ".mine{font-weight:600}.tick{stroke-width:2}"
    if theme:
        return base + rules(DARK if theme == "dark" else LIGHT)
    return f"{base}{rules(LIGHT)}@media(prefers-color-scheme:dark){{{rules(DARK)}}}"


def _text(x: float, y: float, words: str, kind: str, anchor: str = "start") -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}" class="{kind}" text-anchor="{anchor}">{escape(words)}</text>'


def _row(bar: Bar, top: float, lefts: Sequence[float], width: float, most: Sequence[float]) -> list[str]:
    """The bars of one method, with their figures. A figure stands to the right of its bar and of the floor's tick."""
    lines = []
    for index, (left, value) in enumerate(zip(lefts, bar.values, strict=True)):
        if value is None:
            lines.append(_text(left, top + 11, "not known", "faint"))
            continue
        room = width - CHARACTER * 11
        length = room * value[0] / most[index] if most[index] else 0.0
        lines.append(
            f'<rect x="{left:.0f}" y="{top:.0f}" width="{max(length, 1):.1f}" height="{BAR}" '
            f'class="{"ours" if bar.ours else "other"}"/>'
        )
        end = length
        if index == 0 and bar.floor is not None:
            tick = room * bar.floor / most[0]
            lines.append(f'<path d="M{left + tick:.1f} {top - 3:.0f}v{BAR + 6}" class="tick"/>')
            end = tick if length - 2 < tick < length + 6 + CHARACTER * len(value[1]) else length
        lines.append(_text(left + end + 6, top + 11, value[1], "ink mine" if bar.ours else "ink"))
    return lines


def draw(panels: Sequence[Panel], *, theme: str | None = None, narrow: bool = False, title: str = "") -> str:
    """The panels one below the other as an SVG document.

    theme: "light", "dark", or None for a chart that follows the reader's system. narrow: for a phone; each method's name
    stands above its bars, not to their left. title: for screen readers.
    """
    width = NARROW if narrow else WIDTH
    names = [len(bar.title) * (BOLD if bar.ours else CHARACTER) for panel in panels for bar in panel.bars]
    side = 10.0 if narrow else 14 + max(names, default=0.0)
    body: list[str] = []
    y = 8.0
    for panel in panels:
        columns = len(panel.columns)
        each = (width - side - 10) / columns
        lefts = [side + each * index for index in range(columns)]
        most = [
            max((value[0] for bar in panel.bars if (value := bar.values[index]) is not None), default=0.0)
            for index in range(columns)
        ]
        # A floor may be longer than all bars (if another process slowed the copy); it must lie inside the chart too.
        most[0] = max(most[0], *(bar.floor or 0.0 for bar in panel.bars))
        for line in textwrap.wrap(panel.heading, int((width - 20) / HEAD)):
            body.append(_text(10, y + 14, line, "ink head"))
            y += 18
        y += 4
        body += [_text(left, y + 12, name, "faint") for left, name in zip(lefts, panel.columns, strict=True)]
        y += 21
        for bar in panel.bars:
            kind = "ink mine" if bar.ours else "ink"
            if narrow:
                body.append(_text(side, y + 11, bar.title, kind))
                y += 17
            else:
                body.append(_text(side - 8, y + 11, bar.title, kind, "end"))
            body += _row(bar, y, lefts, each, most)
            y += ROW + (3 if narrow else 0)
        if panel.floor and any(bar.floor is not None for bar in panel.bars):
            y += 4
            body.append(f'<path d="M{side + 1:.0f} {y:.0f}v{BAR}" class="tick"/>')
            for line in textwrap.wrap(panel.floor, int((width - side - 20) / (CHARACTER - 0.4))):
                body.append(_text(side + 9, y + 11, line, "faint"))
                y += 17
        y += 14
    # In other charts the names say which of our variants the blue bars are.
    if any(bar.title.startswith("dpo_") for panel in panels for bar in panel.bars):
        body.append(_text(10, y + 4, "blue: with dpo_kernels, grey: without", "faint"))
        y += 16
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {y:.0f}" width="{width}" height="{y:.0f}" role="img">'
    parts = [head, f"<title>{escape(title)}</title>", f"<style>{_style(theme)}</style>"]
    return "\n".join([*parts, '<rect width="100%" height="100%" class="page"/>', *body, "</svg>"]) + "\n"
