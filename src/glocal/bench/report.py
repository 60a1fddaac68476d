"""A comparison as one HTML page that needs nothing but itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from glocal.bench import pictures
from glocal.bench.compare import Comparison
from glocal.bench.table import best, cost_table, fidelity_table, headline, percent, scaled, time
from glocal.patterns import parse

__all__ = ["colored", "page", "render", "ticks"]


def render(result: Comparison) -> str:
    """The report, as text of an HTML file: no script, no address outside the page, all text escaped.

    It shows the tables of `glocal.bench.table`, the fidelity-against-cost plot, time against length, and a picture of
    each pattern.
    """
    chosen = best(result)
    grid = min(result.longest, 512)
    return page(
        "report.html.j2",
        result=result,
        headline=headline(result),
        best=None if chosen is None else chosen.pattern,
        fidelity=fidelity_table(result),
        cost=cost_table(result),
        texts=("pattern", "computed by"),
        numbers=colored([row.pattern for row in result.rows]),
        scatter=_scatter(result),
        curves=_curves(result),
        grid=grid,
        pictures=[(r.pattern, pictures.mask_png(parse(r.pattern), grid), percent(r.share)) for r in result.rows],
    )


def page(template: str, **values: Any) -> str:
    """A page of a template beside this file, all text escaped."""
    environment = Environment(
        loader=PackageLoader("glocal.bench", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.policies["json.dumps_kwargs"] = {"sort_keys": False}
    return environment.get_template(template).render(colors=pictures.COLORS, **values)


def colored(names: Sequence[str]) -> dict[str, int]:
    """The color of each row; with very many rows colors come again, but never full attention's, the first."""
    others = len(pictures.COLORS) - 1
    return {name: 0 if n == 0 else 1 + (n - 1) % others for n, name in enumerate(names)}


def _scatter(result: Comparison) -> Markup | None:
    rows = [row for row in result.rows if row.cost]
    if len(rows) < 2:
        return None
    color = colored([r.pattern for r in result.rows])
    length = rows[0].cost[-1].length
    series = [pictures.Series(r.pattern, color[r.pattern], ((r.cost[-1].seconds, r.cosine),)) for r in rows]
    x = pictures.decades(f"time of attention at {length:,} tokens", [r.cost[-1].seconds for r in rows], ticks)
    y = pictures.linear("mean cosine to full attention", min(r.cosine for r in rows), 1.0, lambda v: f"{v:.3g}")
    said = "; ".join(f"{r.pattern} {time(r.cost[-1].seconds)}, cosine {r.cosine:.4f}" for r in rows)
    return pictures.chart(x, y, series, f"Mean cosine against time: {said}.", lambda s, c: f"{time(s)}, cosine {c:.4f}")


def _curves(result: Comparison) -> Markup | None:
    rows = [row for row in result.rows if row.cost]
    if not rows:
        return None
    color = colored([r.pattern for r in result.rows])
    series = [
        pictures.Series(r.pattern, color[r.pattern], tuple((float(c.length), c.seconds) for c in r.cost)) for r in rows
    ]
    x = pictures.doublings("tokens", [float(c.length) for c in rows[0].cost], lambda v: f"{v:,.0f}")
    y = pictures.decades("time of one forward pass", [c.seconds for r in rows for c in r.cost], ticks)
    ends = "; ".join(f"{r.pattern} {time(r.cost[-1].seconds)}" for r in rows)
    alt = f"Time against length, both logarithmic. At {rows[0].cost[-1].length:,} tokens: {ends}."
    return pictures.chart(x, y, series, alt, lambda n, s: f"{n:,.0f} tokens, {time(s)}")


def ticks(seconds: float) -> str:
    """A time on an axis."""
    value, unit = scaled(seconds)
    return f"{value:.3g} {unit}"
