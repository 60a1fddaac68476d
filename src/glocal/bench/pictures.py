"""The report's pictures: charts as small SVG that follows the page's colors, masks as tiny PNG; no plotting library."""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from markupsafe import Markup, escape

from glocal.patterns import Pattern

__all__ = ["COLORS", "Series", "chart", "mask_png"]

# Light and dark page. Okabe and Ito's set, for readers who do not tell red from green; full attention comes first.
COLORS = (
    ("#1b2430", "#e4e9f0"),
    ("#0072b2", "#56a8e0"),
    ("#d55e00", "#ff8c42"),
    ("#009e73", "#2fc79a"),
    ("#cc79a7", "#e79cc6"),
    ("#b8860b", "#f0c419"),
    ("#6a51a3", "#b39ddb"),
    ("#7f4a1e", "#c79a6b"),
    ("#3a8fb7", "#8fd3f4"),
    ("#a50f15", "#ff7b7b"),
)
_BLUE = bytes((11, 87, 194))
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 640, 390, 112, 24, 20, 68


@dataclass(frozen=True)
class Series:
    """Points ``(x, y)`` of one pattern; ``color`` is its number, ``ring`` draws a ring around its points.

    ``square``: its points are squares, not circles.
    """

    name: str
    color: int
    points: tuple[tuple[float, float], ...]
    ring: bool = False
    square: bool = False


@dataclass(frozen=True)
class Axis:
    """A scale from values to pixels."""

    title: str
    lo: float
    hi: float
    ticks: tuple[float, ...]
    label: Callable[[float], str]
    log: bool = False

    def place(self, value: float) -> float:
        """0 at the low end, 1 at the high end."""
        lo, hi, at = (math.log(v) for v in (self.lo, self.hi, value)) if self.log else (self.lo, self.hi, value)
        return (at - lo) / (hi - lo) if hi > lo else 0.5


def decades(title: str, values: Sequence[float], label: Callable[[float], str]) -> Axis:
    """A logarithmic axis with ticks at 1, 2 and 5 times powers of ten, or at these powers only where they suffice."""
    lo, hi = min(values) / 1.4, max(values) * 1.4
    powers = range(math.floor(math.log10(lo)), math.ceil(math.log10(hi)) + 1)
    for steps in ((1,), (1, 3), (1, 2, 5)):
        ticks = tuple(m * 10.0**n for n in powers for m in steps if lo <= m * 10.0**n <= hi)
        if len(ticks) > 2:
            break
    return Axis(title, lo, hi, ticks, label, True)


def doublings(title: str, values: Sequence[float], label: Callable[[float], str]) -> Axis:
    """A logarithmic axis with a tick at each value (every other one where there are many)."""
    found = sorted(set(values))
    return Axis(title, found[0] / 1.15, found[-1] * 1.15, tuple(found[:: max(1, len(found) // 6)]), label, True)


def linear(title: str, lo: float, hi: float, label: Callable[[float], str]) -> Axis:
    """A linear axis with round ticks."""
    span = max(hi - lo, 1e-9)
    step = 10.0 ** math.floor(math.log10(span / 4))
    step *= next(m for m in (1, 2, 5, 10) if span / (step * m) <= 6)
    first, last = math.floor(lo / step + 1e-9), math.ceil(hi / step - 1e-9)
    return Axis(title, first * step, last * step, tuple(n * step for n in range(first, last + 1)), label)


def chart(x: Axis, y: Axis, series: Sequence[Series], alt: str, tip: Callable[[float, float], str]) -> Markup:
    """Points, joined where a series has several; each says on hover what it is."""

    def at(point: tuple[float, float]) -> tuple[float, float]:
        across = _LEFT + x.place(point[0]) * (_WIDTH - _LEFT - _RIGHT)
        return across, _HEIGHT - _BOTTOM - y.place(point[1]) * (_HEIGHT - _TOP - _BOTTOM)

    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(alt)}">']
    for value in y.ticks:
        _, up = at((x.lo, value))
        parts.append(f'<line class="rule" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{up:.1f}" y2="{up:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{up + 5:.1f}" text-anchor="end">{escape(y.label(value))}</text>')
    for value in x.ticks:
        across, _ = at((value, y.lo))
        low = _HEIGHT - _BOTTOM
        parts.append(f'<line class="axis" x1="{across:.1f}" x2="{across:.1f}" y1="{low}" y2="{low + 5}"/>')
        parts.append(f'<text x="{across:.1f}" y="{low + 26}" text-anchor="middle">{escape(x.label(value))}</text>')
    low, middle = _HEIGHT - _BOTTOM, (_HEIGHT - _BOTTOM + _TOP) / 2
    parts.append(f'<line class="axis" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{low}" y2="{low}"/>')
    center = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(f'<text class="soft" x="{center}" y="{_HEIGHT - 12}" text-anchor="middle">{escape(x.title)}</text>')
    turned = f'transform="rotate(-90 20 {middle})" text-anchor="middle"'
    parts.append(f'<text class="soft" x="20" y="{middle}" {turned}>{escape(y.title)}</text>')
    for one in series:
        places = [at(p) for p in one.points]
        if len(places) > 1:
            line = " ".join(f"{a:.1f},{b:.1f}" for a, b in places)
            parts.append(f'<polyline class="s{one.color}" points="{line}"/>')
        for (a, b), point in zip(places, one.points, strict=True):
            title = escape(f"{one.name}: {tip(*point)}")
            if one.ring:
                parts.append(f'<circle class="ring" cx="{a:.1f}" cy="{b:.1f}" r="10.5"/>')
            shape, place = "circle", f'cx="{a:.1f}" cy="{b:.1f}" r="6"'
            if one.square:
                shape, place = "rect", f'x="{a - 5.5:.1f}" y="{b - 5.5:.1f}" width="11" height="11"'
            parts.append(f'<{shape} class="f{one.color}" {place}><title>{title}</title></{shape}>')
    return Markup("".join(parts) + "</svg>")  # every text in it went through escape


def mask_png(pattern: Pattern, length: int, most: int = 128) -> str:
    """A pattern's mask over ``length`` tokens as a ``data:`` address of a PNG, at most ``most`` pixels a side.

    A pixel is the darker the more of its pairs are live; of a pattern with several heads, in the mean over heads.
    """
    mask = pattern.mask(length).reshape(-1, length, length).float().mean(0)
    if length > most:
        mask = torch.nn.functional.adaptive_avg_pool2d(mask[None], most)[0]
    # The root keeps a thin line, a class token's, in sight.
    shades = (mask.sqrt() * 255).round().int().tolist()
    rows = [b"\0" + b"".join(_BLUE + bytes((shade,)) for shade in row) for row in shades]

    def part(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", mask.shape[1], mask.shape[0], 8, 6, 0, 0, 0)
    body = part(b"IHDR", header) + part(b"IDAT", zlib.compress(b"".join(rows), 9)) + part(b"IEND", b"")
    return "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\n" + body).decode()
