"""Mechanisms on tasks as one HTML page that needs nothing but itself."""

from __future__ import annotations

from markupsafe import Markup

from glocal.bench import pictures
from glocal.bench.mechanisms import Result, headline, missing, tables
from glocal.bench.report import colored, page, ticks
from glocal.bench.table import time

__all__ = ["render"]


def render(result: Result) -> str:
    """The report, as text of an HTML file: no script, no address outside the page, all text escaped."""
    scores, *cost = tables(result)
    return page(
        "mechanisms.html.j2",
        command="bench",
        result=result,
        headline=headline(result),
        scores=scores,
        cost=cost[0] if cost else None,
        texts=("mechanism", "uses"),
        best=None,
        numbers=colored([row.mechanism for row in result.rows]),
        curves=_curves(result),
        missing=missing(result),
    )


def _curves(result: Result) -> Markup | None:
    rows = [row for row in result.rows if row.seconds]
    if not rows:
        return None
    color = colored([row.mechanism for row in result.rows])
    series = [
        pictures.Series(
            row.mechanism, color[row.mechanism], tuple((float(n), each) for n, each in sorted(row.seconds.items()))
        )
        for row in rows
    ]
    lengths = sorted({float(n) for row in rows for n in row.seconds})
    x = pictures.doublings("tokens", lengths, lambda v: f"{v:,.0f}")
    y = pictures.decades("time of a layer", [each for row in rows for each in row.seconds.values()], ticks)
    ends = "; ".join(f"{row.mechanism} {time(row.seconds[max(row.seconds)])}" for row in rows)
    alt = f"Time against length, both logarithmic. At the longest: {ends}."
    return pictures.chart(x, y, series, alt, lambda n, s: f"{n:,.0f} tokens, {time(s)}")
