"""A pattern as a matplotlib figure; what it shows is decided in `glocal.patterns.view`."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glocal.patterns.base import Pattern
from glocal.patterns.facts import Facts, facts
from glocal.patterns.view import Panel, Queries, View, view

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which all common kinds of colour vision tell apart.
SEEN, QUERY, UNSEEN, INK, SOFT = "#0072B2", "#E69F00", "#EEF1F4", "#1B1F24", "#5B6570"
ENDINGS = (".png", ".svg")

_LEVELS = 8  # shades of a pooled cell
_ROW = 11.0  # inches before panels wrap
_GAP, _TITLE, _EDGE, _LEFT = 0.3, 0.28, 0.35, 0.3
"""Inches between panels, for a panel's title, around everything, and beside a mask for its label and wedges."""


def figure(
    pattern: Pattern,
    grid: int | Sequence[int],
    *,
    keys: int | Sequence[int] | None = None,
    queries: Queries | None = None,
    batch: int = 0,
    head_dim: int = 64,
    title: str | None = None,
) -> Figure:
    """A matplotlib figure of where queries look; pyplot is not touched.

    Args:
        pattern: any pattern; one with a head dimension gives one picture a head.
        grid: the query grid. A sequence shows the mask and some of its rows, an image the key grid of some queries, a
            volume slices of it along the first axis.
        keys: the key grid, where it differs.
        queries: positions to draw, ``[(14, 14)]``; by default a corner, an edge and the centre.
        batch: which element of the batch, where the pattern has a batch dimension.
        head_dim: for the FLOPs in the caption.
        title: instead of the pattern's expression.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: as `glocal.patterns.view.view`.

    >>> from glocal import Window
    >>> len(Window((7, 7), dilation=2).plot((28, 28)).axes)
    3
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("pictures need matplotlib: pip install 'glocal[plot]'") from None
    shown = view(pattern, grid, keys=keys, queries=queries, batch=batch, cells=128, coarse=96)
    known = facts(pattern, grid, keys, head_dim=head_dim)
    placed, labels, width, height = _layout(shown)
    width = max(width, 5.4)
    characters = int((width - 2 * _EDGE) / 0.105)
    head = textwrap.wrap(title or shown.expression, characters) or [""]
    foot = [line for text in _caption(known, head_dim, shown) for line in textwrap.wrap(text, int(characters * 1.55))]
    top = _EDGE + 0.26 * len(head) + 0.32
    bottom = _EDGE + 0.2 * len(foot) + 0.52
    total = top + height + bottom

    fig = Figure(figsize=(width, total), facecolor="white")
    text = _Texts(fig, width, total)
    for n, line in enumerate(head):
        text(_EDGE, _EDGE + 0.26 * n, line, size=13, weight="bold", family="monospace")
    text(_EDGE, _EDGE + 0.26 * len(head) + 0.03, shown.where, size=9.5, color=SOFT)
    for x, y, label in labels:
        text(x + _EDGE, y + top, label, size=9.5, weight="bold")
    for n, (panel, x, y, w, h) in enumerate(placed):
        left, under = (x + _EDGE) / width, 1 - (y + top + h) / total
        axes = fig.add_axes((left, under, w / width, h / total))
        axes.set_gid(f"panel-{n}")
        draw(axes, panel, cell=w / panel.seen.shape[1])
    _legend(fig, shown, (_EDGE / width, (bottom - 0.2) / total))
    for n, line in enumerate(foot):
        text(_EDGE, total - bottom + 0.5 + 0.2 * n, line, size=9, color=SOFT)
    return fig


def save(fig: Figure, path: str | os.PathLike[str]) -> None:
    """Write a figure as PNG or SVG, by the ending of ``path``: same figure, same bytes; text in an SVG stays text.

    ValueError for another ending.
    """
    ending = Path(path).suffix.lower()
    if ending not in ENDINGS:
        raise ValueError(f"path must end in {' or '.join(ENDINGS)}; it was {str(path)!r}")
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "glocal"}):
        fig.savefig(path, dpi=160, metadata={"Date": None} if ending == ".svg" else {"Software": None})


def _caption(known: Facts, head_dim: int, shown: View) -> list[str]:
    about = "about " if known.estimated else ""
    keys = f"{known.most:,}" if known.fewest == known.most else f"{known.fewest:,} to {known.most:,}"
    lines = [
        f"{about}{percent(known.share)} of full attention: {known.pairs:,} live pairs, {keys} keys a query, "
        f"{quantity(known.flops)}FLOP forward at head dimension {head_dim}"
    ]
    if known.empty:
        lines.append(f"{known.empty:,} queries see no key")
    return lines + [note[0].upper() + note[1:] for note in shown.notes]


def percent(share: float) -> str:
    """A share as text, with digits that tell something: ``6.25 %``, ``0.0031 %``.

    >>> percent(0.0625), percent(1.0), percent(0.000031)
    ('6.25 %', '100 %', '0.0031 %')
    """
    value = 100 * share
    return f"{value:.2f}".rstrip("0").rstrip(".") + " %" if value >= 1 or not value else f"{value:.2g} %"


def quantity(value: int) -> str:
    """A large number with its prefix: ``9.83 M``.

    >>> quantity(9834496), quantity(12)
    ('9.83 M', '12 ')
    """
    amount, prefixes = float(value), " kMGTPE"
    while amount >= 999.5 and len(prefixes) > 1:
        amount, prefixes = amount / 1000, prefixes[1:]
    return f"{amount:.3g} {prefixes[0].strip()}"


class _Texts:
    """Text placed in inches from the top left corner; no mathematics is read into it."""

    def __init__(self, fig: Figure, width: float, height: float) -> None:
        self.fig, self.width, self.height = fig, width, height

    def __call__(self, x: float, y: float, text: str, **style: Any) -> None:
        defaults: dict[str, Any] = {"color": INK, "va": "top", "ha": "left", "parse_math": False}
        self.fig.text(x / self.width, 1 - y / self.height, text, **(defaults | style))


Placed = tuple[Panel, float, float, float, float]


def _layout(shown: View) -> tuple[list[Placed], list[tuple[float, float, str]], float, float]:
    """Panels as ``(panel, x, y, width, height)`` and band titles as ``(x, y, text)``, in inches; then the extent."""
    side = max(max(panel.seen.shape) for panel in shown.panels)
    sequence = len(shown.grid_k) == 1
    longest = {1: 4.6 if len(shown.bands) == 1 else 2.9, 2: 2.9, 3: 1.45}[len(shown.grid_k)]
    cell = min(longest / side, 0.34)
    placed: list[Placed] = []
    labels: list[tuple[float, float, str]] = []
    x = y = right = line = 0.0
    for title, panels in shown.bands:
        # A sequence's mask and rows stand above each other and its heads side by side; else a band is a line.
        columns = [list(panels)] if sequence else [[panel] for panel in panels]
        if x and not sequence:
            x, y, line = 0.0, y + line + _GAP, 0.0
        head = 0.28 if title else 0.0
        for n, column in enumerate(columns):
            sizes = [_size(panel, cell) for panel in column]
            # A title needs room too: about a fourteenth of an inch a character.
            slot = max(max(w, 0.078 * len(panel.title)) for panel, (w, _) in zip(column, sizes, strict=True))
            slot += _LEFT if sequence else 0.0
            if x and x + slot > _ROW:
                x, y, line = 0.0, y + line + _GAP, 0.0
                head = head if n == 0 else 0.0  # the title stands above the first line only
            if title and n == 0:
                labels.append((x, y, title))
            down = y + head
            for panel, (w, h) in zip(column, sizes, strict=True):
                down += _TITLE if panel.title else (0.2 if panel.kind == "mask" else 0.0)
                placed.append((panel, x + (_LEFT if sequence else 0.0), down, w, h))
                down += h
            line, x = max(line, down - y), x + slot + _GAP
            right = max(right, x - _GAP)
    return placed, labels, right + 2 * _EDGE, y + line


def _size(panel: Panel, cell: float) -> tuple[float, float]:
    rows, columns = panel.seen.shape
    return columns * cell, max(rows * cell, 0.16 if panel.kind == "row" else 0.04)


def draw(axes: Axes, panel: Panel, cell: float) -> None:
    """One panel, ``cell`` inches a cell: runs of equal cells as rectangles, which stay sharp in an SVG."""
    from matplotlib.collections import LineCollection, PolyCollection

    rows, columns = panel.seen.shape
    levels = (panel.seen * _LEVELS).ceil().int()
    shapes, colours = [], []
    for r, row in enumerate(levels.tolist()):
        start = 0
        for c in range(1, columns + 1):
            if c == columns or row[c] != row[start]:
                if row[start]:
                    shapes.append([(start, r), (c, r), (c, r + 1), (start, r + 1)])
                    colours.append(shade(row[start] / _LEVELS))
                start = c
    axes.set(xlim=(0, columns), ylim=(rows, 0), xticks=[], yticks=[], facecolor=UNSEEN)
    cells = PolyCollection(shapes, facecolors=colours, edgecolors="none", antialiaseds=False)
    axes.add_collection(cells, autolim=False)
    if panel.exact and cell >= 0.03:
        lines = [[(c, 0), (c, rows)] for c in range(1, columns)] + [[(0, r), (columns, r)] for r in range(1, rows)]
        thin = min(0.8, 10 * cell)
        axes.add_collection(LineCollection(lines, colors="white", linewidths=thin), autolim=False)
    for spine in axes.spines.values():
        spine.set(color="#AAB4BE", linewidth=0.8)
    for row_of, column_of in panel.marks:
        _mark(axes, panel, row_of, column_of, cell)
    if panel.kind == "mask":
        axes.set_title("keys", fontsize=8.5, color=SOFT, pad=3)
        axes.set_ylabel("queries", fontsize=8.5, color=SOFT, labelpad=10)
    elif panel.title:
        axes.set_title(panel.title, fontsize=9, color=INK, loc="left", pad=4)


def _mark(axes: Axes, panel: Panel, r: int, c: int | None, cell: float) -> None:
    """The query: a filled square where it sees itself, a hollow one where it does not, a wedge for a row of a mask."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Rectangle

    if c is None:
        wedge = Line2D([0], [r + 0.5], marker=5, markersize=6, color=QUERY, clip_on=False, markeredgewidth=0)
        wedge.set_transform(axes.transData + _shift(axes, -4.5))
        axes.add_line(wedge)
        return
    # A cell too small to be seen gets a larger mark around its centre.
    grow = max(0.0, (0.075 / cell - 1) / 2)
    tall = 0.0 if panel.kind == "row" else grow
    corner, extent = (c - grow, r - tall), (1 + 2 * grow, 1 + 2 * tall)
    style: dict[str, Any] = {"zorder": 5, "clip_on": False}
    if float(panel.seen[r, c]):
        axes.add_patch(Rectangle(corner, *extent, facecolor=QUERY, edgecolor=INK, linewidth=0.9, **style))
    else:
        axes.add_patch(Rectangle(corner, *extent, facecolor="white", edgecolor=QUERY, linewidth=1.8, **style))


def _shift(axes: Axes, points: float) -> Any:
    from matplotlib.transforms import ScaledTranslation

    scale = axes.get_figure(root=True).dpi_scale_trans  # type: ignore[union-attr]
    return ScaledTranslation(points / 72, 0, scale)


def shade(share: float) -> tuple[float, float, float]:
    """The colour of a cell of which this share is seen: pale to full."""
    full = [int(SEEN[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    pale = [0.80, 0.89, 0.96]
    red, green, blue = (p + (f - p) * share for p, f in zip(pale, full, strict=True))
    return red, green, blue


def _legend(fig: Figure, shown: View, place: tuple[float, float]) -> None:
    """Only what the picture has: seen, part of a pooled cell, not seen, the query in the forms that occur."""
    from matplotlib.patches import Patch

    panels = shown.panels
    entries = [Patch(facecolor=SEEN, label="seen")]
    if not all(panel.exact for panel in panels):
        entries = [
            Patch(facecolor=shade(1 / _LEVELS), label="a part seen"),
            Patch(facecolor=SEEN, label="all seen"),
        ]
    entries.append(Patch(facecolor=UNSEEN, edgecolor="#AAB4BE", linewidth=0.6, label="not seen"))
    marked = {bool(panel.seen[r, c]) for panel in panels for r, c in panel.marks if c is not None}
    if True in marked:
        entries.append(Patch(facecolor=QUERY, edgecolor=INK, linewidth=0.9, label="query"))
    if False in marked:
        entries.append(Patch(facecolor="white", edgecolor=QUERY, linewidth=1.6, label="query, blind to itself"))
    fig.legend(
        handles=entries, loc="upper left", bbox_to_anchor=place, ncols=len(entries), frameon=False, fontsize=9,
        handlelength=1, handleheight=1, borderpad=0, borderaxespad=0, columnspacing=1.4, labelcolor=INK,
    )  # fmt: skip
