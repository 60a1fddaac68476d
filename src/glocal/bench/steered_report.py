"""An evaluation of ways of steering as one HTML page that needs nothing but itself."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

from glocal.bench.report import colored, page
from glocal.bench.steered import Asked, Evaluation, ask_both, example, views_of
from glocal.bench.steered_table import caption_table, headline, poll_table, refusals
from glocal.bench.vlm import Vlm

__all__ = ["pictured", "png", "render"]


def render(result: Evaluation, examples: Sequence[tuple[Any, str, Asked]] = ()) -> str:
    """The page, as text: no script, no address outside the page, all text escaped.

    Args:
        result: what was measured.
        examples: pictures, questions and how they were answered, to be looked at.
    """
    measured = [row for row in result.rows if not row.refused]
    best = max(measured, key=lambda row: sum(p.accuracy for p in row.polled), default=None)
    return page(
        "steered.html.j2",
        command="steer",
        result=result,
        headline=headline(result),
        poll=poll_table(result),
        captions=caption_table(result),
        refused=refusals(result),
        texts=("method", "negatives"),
        best=None if best is None else best.name,
        numbers=colored([row.name for row in result.rows]),
        examples=[(png(views_of(asked, image)), question) for image, question, asked in examples],
    )


def pictured(vlm: Vlm, result: Evaluation, count: int = 3) -> list[tuple[Any, str, Asked]]:
    """A few scenes with what AGLA looked at, where it is among the ways."""
    if not any(row.name == "agla" and not row.refused for row in result.rows):
        return []
    found = []
    for seed in range(count):
        image, question = example(seed, result.settings.noise, result.settings.opacity)
        found.append((image, question, ask_both(vlm, image, question, "agla")))
    return found


def png(figure: Any) -> str:
    """A figure as an address that holds it."""
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=110)
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
