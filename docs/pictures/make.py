"""Draw the README's picture, ``patterns.svg`` and ``patterns.png``, beside this file."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from glocal import parse
from glocal.patterns.facts import facts
from glocal.patterns.plot import INK, QUERY, SEEN, SOFT, UNSEEN, draw, percent, save
from glocal.patterns.view import view

HERE = Path(__file__).parent

# Above masks of sequences, queries down and keys across; below what one query sees on a grid.
SEQUENCE = ["causal()", "sliding(7, 0) | prefix(3)", "block(8)", "strided(4) | sliding(2, 2)"]
IMAGE = ["window(7)", "window(7, dilation=2)", "block(7, shift=3)", "strided(4)"]
QUERIES = {"block(7, shift=3)": (12, 15)}

SIDE, GAP, EDGE, HEAD = 2.3, 0.42, 0.3, 0.52
"""Inches."""


def picture() -> Figure:
    """Eight patterns, each with its share of full attention."""
    width = 2 * EDGE + 4 * SIDE + 3 * GAP
    height = 2 * (SIDE + HEAD) + GAP + EDGE + 0.45
    fig = Figure(figsize=(width, height), facecolor="white")
    for row, (expressions, grid) in enumerate(((SEQUENCE, (32,)), (IMAGE, (28, 28)))):
        for column, text in enumerate(expressions):
            pattern = parse(text)
            middle = tuple(n // 2 for n in grid)
            panel = view(pattern, grid, queries=[QUERIES.get(text, middle)]).panels[0]
            left, top = EDGE + column * (SIDE + GAP), EDGE + HEAD + row * (SIDE + HEAD + GAP) - 0.1
            axes = fig.add_axes((left / width, 1 - (top + SIDE) / height, SIDE / width, SIDE / height))
            if len(grid) == 1:  # the whole mask is the picture, no row of it stands out
                panel = type(panel)(panel.kind, "", panel.seen)
            else:
                panel = type(panel)(panel.kind, "", panel.seen, marks=panel.marks)
            draw(axes, panel, cell=SIDE / panel.seen.shape[1])
            axes.set(title="", ylabel="queries" if len(grid) == 1 and not column else "")
            axes.yaxis.labelpad = 3
            share = percent(facts(pattern, grid).share)
            style = {"ha": "left", "va": "bottom", "parse_math": False}
            place = left / width, 1 - (top - 0.07) / height
            fig.text(*place, f"{share} of full attention", size=9, color=SOFT, **style)
            place = left / width, 1 - (top - 0.26) / height
            fig.text(*place, text, family="monospace", weight="bold", size=9.5, color=INK, **style)
    _legend(fig, height, width)
    return fig


def _legend(fig: Figure, height: float, width: float) -> None:
    from matplotlib.patches import Patch

    entries = [
        Patch(facecolor=SEEN, label="key seen"),
        Patch(facecolor=UNSEEN, edgecolor="#AAB4BE", linewidth=0.6, label="key not seen"),
        Patch(facecolor=QUERY, edgecolor=INK, linewidth=0.9, label="the query"),
    ]
    fig.legend(
        handles=entries, loc="lower left", bbox_to_anchor=(EDGE / width, 0.16 / height), ncols=3, frameon=False,
        fontsize=9, handlelength=1, handleheight=1, borderpad=0, borderaxespad=0, columnspacing=1.6, labelcolor=INK,
    )  # fmt: skip
    words = "above: sequences of 32, queries down, keys across; below: one query on a grid of 28 x 28"
    fig.text(1 - EDGE / width, 0.16 / height, words, size=9, color=SOFT, ha="right", va="bottom")


if __name__ == "__main__":
    for ending in ("svg", "png"):
        save(picture(), HERE / f"patterns.{ending}")
        print(f"wrote patterns.{ending}")
