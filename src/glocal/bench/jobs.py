"""The two jobs of ``glocal compare``: one for text encoders, one for causal language models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from glocal.bench import causal, causal_table, folder, table
from glocal.bench.compare import Comparison, Settings, compare
from glocal.bench.decoder import BYTES
from glocal.bench.run import Step

__all__ = ["Job", "choose"]


@dataclass(frozen=True)
class Job:
    """How to measure, and how to say what was found.

    ``measure(settings, step)`` gives a comparison, of which the others make tables, a headline, and a report in HTML.
    ``caches``: whether the settings take cache policies.
    """

    settings: Callable[..., Any]
    measure: Callable[[Any, Step], Any]
    tables: Callable[[Any], tuple[table.Table, ...]]
    headline: Callable[[Any], str]
    render: Callable[[Any], str]
    caches: bool = False


def choose(model: str | None) -> Job:
    """The job for a model's folder; None is the default encoder, ``"bytes"`` the language model that glocal ships.

    Raises:
        ValueError: the folder is not there, or holds neither kind.
    """
    if model == BYTES or (model is not None and folder.kind(model) == "causal"):
        return _CAUSAL
    return _ENCODER


def _render_encoder(result: Comparison) -> str:
    from glocal.bench.report import render

    return render(result)


def _render_causal(result: causal.Comparison) -> str:
    from glocal.bench.causal_report import render

    return render(result)


_ENCODER = Job(Settings, compare, table.tables, table.headline, _render_encoder)
_CAUSAL = Job(causal.Settings, causal.compare, causal_table.tables, causal_table.headline, _render_causal, True)
