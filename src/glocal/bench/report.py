"""A comparison as one HTML page that needs nothing but itself."""

from __future__ import annotations

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from glocal.bench import pictures
from glocal.bench.compare import Comparison
from glocal.bench.table import best, cost_table, fidelity_table, headline, percent, scaled, time
from glocal.patterns import parse

__all__ = ["render"]


def render(result: Comparison) -> str:
    """The report, as text of an HTML file: no script, no address outside the page, all text escaped.

    It shows the tables of `glocal.bench.table`, the fidelity-against-cost plot, time against length, and a picture of
    each pattern.
    """
    environment = Environment(
        loader=PackageLoader("glocal.bench", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    chosen = best(result)
    grid = min(result.longest, 512)
    return environment.get_template("report.html.j2").render(
        result=result,
        headline=headline(result),
        best=None if chosen is None else chosen.pattern,
        fidelity=fidelity_table(result),
        cost=cost_table(result),
        texts=("pattern", "computed by"),
        colors=pictures.COLORS,
        numbers=_numbers(result),
        scatter=_scatter(result),
        curves=_curves(result),
        grid=grid,
        pictures=[(row, pictures.mask_png(parse(row.pattern), grid)) for row in result.rows],
        share=lambda row: percent(row.share),
    )


def _numbers(result: Comparison) -> dict[str, int]:
    """The color of each pattern; with very many patterns colors come again, but never full attention's."""
    others = len(pictures.COLORS) - 1
    return {row.pattern: 0 if n == 0 else 1 + (n - 1) % others for n, row in enumerate(result.rows)}


def _scatter(result: Comparison) -> Markup | None:
    rows = [row for row in result.rows if row.cost]
    if len(rows) < 2:
        return None
    color = _numbers(result)
    length = rows[0].cost[-1].length
    series = [pictures.Series(r.pattern, color[r.pattern], ((r.cost[-1].seconds, r.cosine),)) for r in rows]
    x = pictures.decades(f"time of attention at {length:,} tokens", [r.cost[-1].seconds for r in rows], _tick)
    y = pictures.linear("mean cosine to full attention", min(r.cosine for r in rows), 1.0, lambda v: f"{v:.3g}")
    said = "; ".join(f"{r.pattern} {time(r.cost[-1].seconds)}, cosine {r.cosine:.4f}" for r in rows)
    return pictures.chart(x, y, series, f"Mean cosine against time: {said}.", lambda s, c: f"{time(s)}, cosine {c:.4f}")


def _curves(result: Comparison) -> Markup | None:
    rows = [row for row in result.rows if row.cost]
    if not rows:
        return None
    color = _numbers(result)
    series = [
        pictures.Series(r.pattern, color[r.pattern], tuple((float(c.length), c.seconds) for c in r.cost)) for r in rows
    ]
    x = pictures.doublings("tokens", [float(c.length) for c in rows[0].cost], lambda v: f"{v:,.0f}")
    y = pictures.decades("time of one forward pass", [c.seconds for r in rows for c in r.cost], _tick)
    ends = "; ".join(f"{r.pattern} {time(r.cost[-1].seconds)}" for r in rows)
    alt = f"Time against length, both logarithmic. At {rows[0].cost[-1].length:,} tokens: {ends}."
    return pictures.chart(x, y, series, alt, lambda n, s: f"{n:,.0f} tokens, {time(s)}")


def _tick(seconds: float) -> str:
    value, unit = scaled(seconds)
    return f"{value:.3g} {unit}"
