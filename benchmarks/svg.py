"""Curves as SVG text: panels one below the other over the same x, each curve with the band that it was in."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BETWEEN = 640, 220, 56, 16, 24, 48
"""Pixels: of the whole, of a panel, and around panels."""
COLOURS = ("#1f6fb2", "#c8501e")


@dataclass(frozen=True, slots=True)
class Line:
    """A curve: at each x its middle, and the least and the most."""

    name: str
    middle: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]


@dataclass(frozen=True, slots=True)
class Panel:
    """Lines with one y axis."""

    title: str
    lines: Sequence[Line]


@dataclass(frozen=True, slots=True)
class _Axis:
    """From values to pixels."""

    least: float
    most: float
    start: float
    stop: float

    def at(self, value: float) -> float:
        return self.start + (value - self.least) / (self.most - self.least or 1.0) * (self.stop - self.start)

    def ticks(self) -> list[float]:
        """At most six round numbers."""
        rough = (self.most - self.least or 1.0) / 5
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(step * power for step in (1, 2, 5, 10) if step * power >= rough * 0.999)
        first, last = math.ceil(self.least / step - 1e-9), math.floor(self.most / step + 1e-9)
        return [number * step for number in range(first, last + 1)]


def chart(panels: Sequence[Panel], x: Sequence[float], x_title: str) -> str:
    """A whole SVG document."""
    height = len(panels) * (HEIGHT + BETWEEN) + TOP
    across = _Axis(min(x), max(x), LEFT, WIDTH - RIGHT)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>',
    ]
    for number, panel in enumerate(panels):
        parts += _panel(panel, x, across, top=TOP + number * (HEIGHT + BETWEEN))
    parts.append(_text(WIDTH / 2, height - 8, x_title, "middle"))
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(panel: Panel, x: Sequence[float], across: _Axis, *, top: float) -> Iterable[str]:
    least = min(min(line.low) for line in panel.lines)
    most = max(max(line.high) for line in panel.lines)
    up = _Axis(least, most, top + HEIGHT, top)
    yield _text(LEFT, top - 8, panel.title, "start")
    for tick in up.ticks():
        y = up.at(tick)
        yield f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="#ddd"/>'
        yield _text(LEFT - 6, y + 4, f"{tick:.4g}", "end")
    for tick in across.ticks():
        yield _text(across.at(tick), top + HEIGHT + 16, f"{tick:.4g}", "middle")
    for number, (line, colour) in enumerate(zip(panel.lines, COLOURS, strict=False)):
        there, back = _points(x, line.low, across, up), _points(x, line.high, across, up)
        yield f'<path d="M{"L".join([*there, *reversed(back)])}Z" fill="{colour}" fill-opacity="0.2"/>'
        middle = "L".join(_points(x, line.middle, across, up))
        yield f'<path d="M{middle}" fill="none" stroke="{colour}" stroke-width="1.5"/>'
        yield _text(WIDTH - RIGHT - 4, top + 16 + 16 * number, line.name, "end", colour)


def _points(x: Sequence[float], y: Sequence[float], across: _Axis, up: _Axis) -> list[str]:
    return [f"{across.at(a):.1f} {up.at(b):.1f}" for a, b in zip(x, y, strict=True)]


def _text(x: float, y: float, words: str, anchor: str, colour: str = "#333") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}">{escape(words)}</text>'
