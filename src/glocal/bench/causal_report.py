"""A comparison on a causal language model as one HTML page that needs nothing but itself."""

from __future__ import annotations

from collections.abc import Callable

from markupsafe import Markup

from glocal.bench import pictures
from glocal.bench.causal import Comparison, Row
from glocal.bench.causal_table import best, bits_table, copy_table, cost_table, frontier, headline, needle_table
from glocal.bench.report import colored, page, ticks
from glocal.bench.table import percent, time
from glocal.patterns import Causal, parse

__all__ = ["render"]


def render(result: Comparison) -> str:
    """The report, as text of an HTML file: no script, no address outside the page, all text escaped.

    It shows the tables of `glocal.bench.causal_table`, bits per byte against what each way reads, holds and takes,
    with the frontiers marked, time against length, and a picture of each pattern.
    """
    chosen, grid = best(result), min(result.length, 512)
    return page(
        "causal.html.j2",
        result=result,
        headline=headline(result),
        best=None if chosen is None else chosen.name,
        bits=bits_table(result),
        needle=needle_table(result),
        copy=copy_table(result),
        cost=cost_table(result),
        texts=("attention",),
        numbers=_colored(result),
        squares=[row.name for row in result.rows if row.kind == "cache"],
        frontiers=[found for found in (_read(result), _held(result), _timed(result)) if found],
        curves=_curves(result),
        grid=grid,
        pictures=_pictures(result, grid),
    )


_Chart = tuple[str, Markup, str]


def _colored(result: Comparison) -> dict[str, int]:
    """The color of each row; cache policies, which are drawn as squares, have the colors from the first on again."""
    caches = [row.name for row in result.rows if row.kind == "cache"]
    reference, *others = [row.name for row in result.rows if row.kind != "cache"]
    return colored([reference, *others]) | {n: c for n, c in colored([reference, *caches]).items() if c}


def _read(result: Comparison) -> _Chart | None:
    note = f"Keys that the last of {result.length:,} tokens reads."
    return _chart(
        result, "Bits against keys read", note, "share of keys read", lambda r: r.read, _share, list(result.rows)
    )


def _held(result: Comparison) -> _Chart | None:
    rows = [row for row in result.rows if row.kind not in ("pattern", "heads")]
    note = "A pattern alone, decoding with the model's own cache, holds all of it and is left out."
    return _chart(
        result, "Bits against cache", note, "cache of one sequence", lambda r: r.bytes / 2**20, _mebibytes, rows
    )


def _timed(result: Comparison) -> _Chart | None:
    rows = [row for row in result.rows if row.cost]
    if not rows:
        return None
    title, length = "Bits against time", rows[0].cost[-1].length
    note = "The whole model decodes a token; the other layers' time is in it."
    return _chart(
        result, title, note, f"time of a token after {length:,}", lambda r: r.cost[-1].token, time, rows, ticks
    )


def _chart(
    result: Comparison,
    title: str,
    note: str,
    axis: str,
    price: Callable[[Row], float],
    say: Callable[[float], str],
    rows: list[Row],
    tick: Callable[[float], str] | None = None,
) -> _Chart | None:
    if len(rows) < 2:
        return None
    color, ringed = _colored(result), frontier(rows, price)
    series = [
        pictures.Series(
            r.name, color[r.name], ((price(r), r.late),), any(r is other for other in ringed), r.kind == "cache"
        )
        for r in rows
    ]
    x = pictures.decades(axis, [price(r) for r in rows], tick or say)
    low, high = min(r.late for r in rows), max(r.late for r in rows)
    y = pictures.linear("bits per byte, last quarter", low, high, lambda v: f"{v:.4g}")
    said = "; ".join(f"{r.name} {say(price(r))}, {r.late:.4f} bits" for r in rows)
    edge = ", ".join(r.name for r in ringed)
    alt = f"{title}: {said}. On the frontier: {edge}."
    return title, pictures.chart(x, y, series, alt, lambda a, b: f"{say(a)}, {b:.4f} bits per byte"), note


def _curves(result: Comparison) -> Markup | None:
    rows = [row for row in result.rows if row.cost]
    if not rows:
        return None
    color = _colored(result)
    series = [
        pictures.Series(
            r.name, color[r.name], tuple((float(c.length), c.token) for c in r.cost), square=r.kind == "cache"
        )
        for r in rows
    ]
    x = pictures.doublings("tokens", [float(c.length) for c in rows[0].cost], lambda v: f"{v:,.0f}")
    y = pictures.decades("time of a token", [c.token for r in rows for c in r.cost], ticks)
    ends = "; ".join(f"{r.name} {time(r.cost[-1].token)}" for r in rows)
    alt = f"Time of a token against length, both logarithmic. At {rows[0].cost[-1].length:,} tokens: {ends}."
    return pictures.chart(x, y, series, alt, lambda n, s: f"{n:,.0f} tokens, {time(s)}")


def _pictures(result: Comparison, grid: int) -> list[tuple[str, str, str]]:
    """Full attention's mask and the patterns'; what mechanisms and policies read depends on the text."""
    found = []
    for row in result.rows:
        if row.kind in ("full", "pattern"):
            where = parse(row.text) & Causal()
            share = where.count(grid) / (1 if not where.lead((grid,), (grid,)) else result.heads) / grid**2
            found.append((row.name, pictures.mask_png(where, grid), percent(share)))
    return found


def _share(value: float) -> str:
    return f"{value * 100:.3g} %"


def _mebibytes(value: float) -> str:
    return f"{value:.3g} MiB"
