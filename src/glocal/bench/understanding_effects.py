"""Three predictions of the generative AI paradox, as effects between a model and a reference, by bootstrap.

West et al., 2023, arXiv 2311.00059.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from glocal.bench.understanding import Record

__all__ = ["Effects", "Interval", "bootstrap_interval", "paradox_effects"]

_Array = NDArray[np.float64]
_NUMBERS = 1 << 22  # of weights held at a time


@dataclass(frozen=True)
class Interval:
    """A figure and its interval of 95 %; NaN where it is not defined."""

    value: float
    low: float
    high: float

    @property
    def positive(self) -> bool:
        """Whether the whole interval is above 0."""
        return self.low > 0


@dataclass(frozen=True)
class Effects:
    """How a model differs from a reference; each prediction of the paper is that an effect is positive.

    Args:
        level: the model's lead in making less its lead in understanding.
        generation: its lead in making. The paper's first prediction is for leads of at least 0.
        understanding: its lead in understanding.
        coupling: the reference's correlation, over items, of making and understanding less the model's.
        correlations: of the model and of the reference; NaN where either score does not vary.
        fisher: z of the correlations' difference by Fisher's transform, taking the two for independent, and p.
        brittleness: what the model loses from easy to hard candidates less what the reference loses.
    """

    level: Interval
    generation: Interval
    understanding: Interval
    coupling: Interval
    correlations: tuple[float, float]
    fisher: tuple[float, float]
    brittleness: Interval


def bootstrap_interval(
    statistic: Callable[[_Array], _Array], count: int, *, resamples: int = 10000, seed: int = 0
) -> Interval:
    """Percentile interval of 95 % of a statistic over items drawn anew, with replacement.

    Args:
        statistic: from how often each item was drawn, ``(R, count)`` with rows of sum ``count``, to ``(R,)``.
        count: items.
        resamples: how many draws, R in all.
        seed: of the draws.

    Raises:
        ValueError: no items or resamples.

    >>> scores = np.arange(10.0)
    >>> bootstrap_interval(lambda drawn: drawn @ scores / 10, 10)
    Interval(value=4.5, low=2.7, high=6.3)
    """
    if count < 1 or resamples < 1:
        raise ValueError(f"count and resamples must be at least 1; they were {count} and {resamples}")
    draw, found = np.random.default_rng(seed), []
    for start in range(0, resamples, size := max(1, _NUMBERS // count)):
        rows = min(size, resamples - start)
        picked = draw.integers(0, count, (rows, count)) + count * np.arange(rows)[:, None]
        found.append(statistic(np.bincount(picked.ravel(), minlength=rows * count).reshape(rows, count).astype(float)))
    values = np.concatenate(found)
    values = values[~np.isnan(values)]  # a draw in which a score does not vary, or without hard items
    low, high = np.percentile(values, [2.5, 97.5]) if len(values) else (math.nan, math.nan)
    return Interval(float(statistic(np.ones((1, count)))[0]), float(low), float(high))


def paradox_effects(
    model: Sequence[Record],
    reference: Sequence[Record],
    *,
    understanding: Literal["selective", "interrogative"] = "selective",
    resamples: int = 10000,
    seed: int = 0,
) -> Effects:
    """The three effects between two participants, over the same items.

    Args:
        model, reference: their records, item by item.
        understanding: which score is meant.
        resamples, seed: of the bootstrap, over items.

    Raises:
        ValueError: fewer than four items, records of other items, or nothing asked where ``"interrogative"`` is meant.

    >>> from glocal.bench.participants import Mimic, Understander
    >>> from glocal.bench.understanding import Item, evaluate
    >>> items = [Item(str(n), ("good", "bad"), 0, references=("good",)) for n in range(500)]
    >>> model, people = (evaluate(who, items, lambda item, output: output == "good")
    ...                  for who in (Mimic(items), Understander(items)))
    >>> found = paradox_effects(model, people)
    >>> found.level.positive, found.coupling.positive
    (True, True)
    """
    if understanding not in ("selective", "interrogative"):
        raise ValueError(f"understanding must be 'selective' or 'interrogative'; it was {understanding!r}")
    if len(model) < 4 or [(r.prompt, r.difficulty) for r in model] != [(r.prompt, r.difficulty) for r in reference]:
        raise ValueError(
            f"model and reference must be records of the same items, at least 4; they were {len(model)} and "
            f"{len(reference)} records"
        )
    makes, knows = zip(_scores(model, understanding), _scores(reference, understanding), strict=True)
    hard = np.array([record.difficulty == "hard" for record in model], float)

    def interval(statistic: Callable[[_Array], _Array]) -> Interval:
        return bootstrap_interval(statistic, len(hard), resamples=resamples, seed=seed)

    lead, insight, r = (
        makes[0] - makes[1],
        knows[0] - knows[1],
        [_correlation(g, u) for g, u in zip(makes, knows, strict=True)],
    )
    once = np.ones((1, len(hard)))
    correlations = float(r[0](once)[0]), float(r[1](once)[0])
    return Effects(
        level=interval(_mean(lead - insight)),
        generation=interval(_mean(lead)),
        understanding=interval(_mean(insight)),
        coupling=interval(lambda drawn: r[1](drawn) - r[0](drawn)),
        correlations=correlations,
        fisher=_fisher(*correlations, len(hard)),
        brittleness=interval(lambda drawn: _mean(insight, 1 - hard)(drawn) - _mean(insight, hard)(drawn)),
    )


def _scores(records: Sequence[Record], understanding: str) -> tuple[_Array, _Array]:
    knows = [getattr(record, understanding) for record in records]
    if None in knows:
        raise ValueError("understanding 'interrogative' needs questions with every item; some have none")
    return np.array([record.generation for record in records]), np.array(knows, float)


def _mean(values: _Array, among: _Array | None = None) -> Callable[[_Array], _Array]:
    """Mean of values, under how often each was drawn, among some of the items."""
    some = np.ones_like(values) if among is None else among

    def statistic(drawn: _Array) -> _Array:
        with np.errstate(invalid="ignore"):
            return np.asarray(drawn @ (values * some) / (drawn @ some))

    return statistic


def _correlation(a: _Array, b: _Array) -> Callable[[_Array], _Array]:
    """Pearson's, under how often each item was drawn."""
    a, b = a - a.mean(), b - b.mean()

    def statistic(drawn: _Array) -> _Array:
        n = drawn.sum(1)

        def covariance(x: _Array, y: _Array) -> Any:
            return drawn @ (x * y) / n - (drawn @ x) * (drawn @ y) / n**2

        spread = covariance(a, a) * covariance(b, b)
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.asarray(np.where(spread > 1e-20, covariance(a, b) / np.sqrt(np.abs(spread)), np.nan))

    return statistic


def _fisher(model: float, reference: float, count: int) -> tuple[float, float]:
    """z and two-sided p of two correlations' difference; a correlation of 1 is taken for a little less."""
    a, b = (
        math.atanh(max(-1 + 1e-12, min(1 - 1e-12, r))) if not math.isnan(r) else math.nan for r in (model, reference)
    )
    z = (b - a) / math.sqrt(2 / (count - 3))
    return z, math.erfc(abs(z) / math.sqrt(2))
