"""Line charts as SVG files, in the colours of the report's charts: panels side by side, one line a rule."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#b8578f", "#6b6b6b", "#c98b00", "#2d9bd6", "#1c1d1f")
DASHES = ("", "6 3", "2 3", "8 3 2 3", "", "6 3", "2 3", "8 3 2 3")
PANEL, HEIGHT, LEFT, TOP, BOTTOM, GAP = 250, 190, 54, 46, 40, 62
LEGEND_ROW, LEGEND_COLUMN = 18, 130
INK, FAINT = "#1c1d1f", "#d8d8d4"


@dataclass(frozen=True, slots=True)
class Panel:
    """One set of axes.

    Args:
        title: above it.
        x: places of the points, in order; drawn at equal distances, each with its number or name.
        lines: y values by the name of the line, one for each x.
    """

    title: str
    x: Sequence[float | str]
    lines: Mapping[str, Sequence[float]]


def write_chart(
    path: Path, title: str, x_label: str, y_label: str, panels: Sequence[Panel], *, common: bool = True
) -> None:
    """Write one SVG file with all panels and one legend. The same data give the same bytes.

    Args:
        path: of the file.
        title, x_label, y_label: above it, and of its axes.
        panels: from left to right.
        common: whether they have one y axis; otherwise each has its own.
    """
    names = list(dict.fromkeys(name for panel in panels for name in panel.lines))
    values = [[value for line in panel.lines.values() for value in line] for panel in panels]
    everything = [value for own in values for value in own]
    domains = [_domain(everything if common else own) for own in values]
    width = LEFT + len(panels) * (PANEL + GAP)
    columns = max(1, (width - LEFT) // LEGEND_COLUMN)
    legend_rows = -(-len(names) // columns)
    legend_top = TOP + HEIGHT + BOTTOM + 12
    height = legend_top + legend_rows * LEGEND_ROW
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="sans-serif" font-size="11" fill="{INK}" role="img">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        f'<text x="{LEFT}" y="16" font-size="13" font-weight="bold">{escape(title)}</text>',
        f'<text transform="translate(12 {TOP + HEIGHT / 2:.0f}) rotate(-90)" text-anchor="middle">'
        f"{escape(y_label)}</text>",
    ]
    for at, panel in enumerate(panels):
        parts += _panel(panel, LEFT + at * (PANEL + GAP), names, domains[at], x_label)
    for at, name in enumerate(names):
        x, y = LEFT + at % columns * LEGEND_COLUMN, legend_top + at // columns * LEGEND_ROW
        parts.append(f'<line x1="{x}" y1="{y}" x2="{x + 22}" y2="{y}" {_stroke(at)}/>')
        parts.append(f'<text x="{x + 28}" y="{y + 4}">{escape(name)}</text>')
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([*parts, "</svg>"]) + "\n", encoding="utf-8")


def _panel(panel: Panel, left: float, names: Sequence[str], domain: tuple[float, float], x_label: str) -> list[str]:
    low, high = domain
    step = PANEL / max(1, len(panel.x) - 1)

    def y_of(value: float) -> float:
        return TOP + HEIGHT * (high - value) / (high - low)

    parts = [f'<text x="{left}" y="{TOP - 10}">{escape(panel.title)}</text>']
    for tick in _ticks(low, high):
        y = y_of(tick)
        parts.append(f'<line x1="{left}" y1="{y:.1f}" x2="{left + PANEL}" y2="{y:.1f}" stroke="{FAINT}"/>')
        parts.append(f'<text x="{left - 5}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for at, value in enumerate(panel.x):
        parts.append(
            f'<text x="{left + at * step:.1f}" y="{TOP + HEIGHT + 16}" text-anchor="middle">'
            f"{escape(value) if isinstance(value, str) else f'{value:g}'}</text>"
        )
    parts.append(
        f'<text x="{left + PANEL / 2}" y="{TOP + HEIGHT + 32}" text-anchor="middle">{escape(x_label)}</text>'
    )
    for name, line in panel.lines.items():
        points = [(left + at * step, y_of(value)) for at, value in enumerate(line) if math.isfinite(value)]
        drawn = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline points="{drawn}" fill="none" {_stroke(names.index(name))}/>')
    return parts


def _stroke(number: int) -> str:
    dash = DASHES[number % len(DASHES)]
    return f'stroke="{COLOURS[number % len(COLOURS)]}" stroke-width="1.8"' + (
        f' stroke-dasharray="{dash}"' if dash else ""
    )


def _domain(values: Sequence[float]) -> tuple[float, float]:
    """Round ends that hold all finite values and 0."""
    known = [0.0, *(value for value in values if math.isfinite(value))]
    low, high = min(known), max(known)
    step = _step(low, high)
    return math.floor(low / step) * step, max(math.ceil(high / step) * step, step)


def _ticks(low: float, high: float) -> list[float]:
    step = _step(low, high)
    return [round(low + at * step, 10) for at in range(round((high - low) / step) + 1)]


def _step(low: float, high: float) -> float:
    """A step of 1, 2 or 5 times a power of ten, of which four to ten make the range."""
    raw = max(high - low, 1e-9) / 5
    power = 10.0 ** math.floor(math.log10(raw))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw)
