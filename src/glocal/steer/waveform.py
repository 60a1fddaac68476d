"""How a rotary base lets attention rise and fall with distance, and bases whose peaks cover each other's troughs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["RAG_BASES", "TOOL_BASES", "BaseSearch", "peaks", "search_bases", "troughs", "waveform"]

TOOL_BASES = (10000, 17500, 18000, 19000, 20000, 25000)
"""The paper's bases for the use of tools, for heads of 128 and 4,096 tokens."""
RAG_BASES = (10000, 13000, 16000, 19000, 22000, 25000, 28000)
"""The paper's for answers from retrieved documents."""


def waveform(distance: ArrayLike, base: float, head_dim: int = 128) -> NDArray[np.float64]:
    """The score of a query and a key of ones, ``2 / sqrt(D) * sum_j cos(m * base^(-2j/D))``.

    It falls with distance, in waves: at a trough a token gets less attention than others farther off (Chen et al.,
    2023, arXiv 2312.04455).

    Args:
        distance: m, positions between query and key, any shape.
        base: of the rotary embedding.
        head_dim: D, even.

    Returns:
        Of the shape of ``distance``.

    Raises:
        ValueError: a base of 0 or less, an odd head dimension.

    >>> waveform([0, 1000], 10000, 64).round(3)
    array([8.   , 2.231])
    """
    if not base > 0:
        raise ValueError(f"base must be above 0; it was {base}")
    if head_dim < 2 or head_dim % 2:
        raise ValueError(f"head_dim must be even and at least 2; it was {head_dim}")
    frequencies = float(base) ** (-np.arange(0, head_dim, 2) / head_dim)
    angles = np.asarray(distance, np.float64)[..., None] * frequencies
    found: NDArray[np.float64] = 2 / np.sqrt(head_dim) * np.cos(angles).sum(-1)
    return found


def peaks(values: ArrayLike, *, window: int = 500, gap: int = 50, most: int = 6) -> list[int]:
    """Where a wave crests: the highest local maximum, then each time the highest of those soon after it.

    Args:
        values: ``(N,)``, one a position.
        window: how many positions on the next one is looked for; at the end of the wave there are fewer.
        gap: least distance to the one before.
        most: how many at most.

    Returns:
        Indices in rising order; none for a wave without a local maximum.

    Raises:
        ValueError: values of another shape, settings below 1.

    >>> peaks([0, 3, 0, 1, 0, 2, 0], window=4, gap=1)
    [1, 5]
    """
    wave = np.asarray(values, np.float64)
    if wave.ndim != 1:
        raise ValueError(f"values must be (N,); they were {wave.shape}")
    for name, value in {"window": window, "gap": gap, "most": most}.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1; it was {value}")
    tops = 1 + ((wave[1:-1] > wave[:-2]) & (wave[1:-1] > wave[2:])).nonzero()[0]
    found: list[int] = []
    near = tops
    while len(near) and len(found) < most:
        found.append(int(near[wave[near].argmax()]))
        near = tops[(tops >= found[-1] + gap) & (tops < found[-1] + gap + window)]
    return found


def troughs(values: ArrayLike, *, window: int = 500, gap: int = 50, most: int = 6) -> list[int]:
    """Where a wave is lowest: the `peaks` of the negated wave, looked for from its far end.

    Args:
        values: ``(N,)``, one a position.
        window: as in `peaks`.
        gap: as in `peaks`.
        most: as in `peaks`.

    Returns:
        Indices in rising order.

    Raises:
        ValueError: as `peaks`.

    >>> troughs([3, 1, 3, 2, 3, 0, 3], window=4, gap=1)
    [1, 5]
    """
    wave = np.asarray(values, np.float64)
    found = peaks(-wave[::-1], window=window, gap=gap, most=most)
    return [len(wave) - 1 - at for at in reversed(found)]


class BaseSearch(NamedTuple):
    """Bases in the order in which they were taken, and how many troughs each addition covered; the pair comes first."""

    bases: tuple[float, ...]
    covered: tuple[int, ...]


def search_bases(
    candidates: Iterable[float] = range(10000, 30001, 500),
    *,
    count: int = 6,
    first: Sequence[float] = (),
    head_dim: int = 128,
    distances: tuple[int, int] = (1000, 4090),
    within: int = 3,
    window: int = 500,
    gap: int = 50,
    most: int = 6,
) -> BaseSearch:
    """Bases of which some have a peak where others have a trough.

    A peak of one base covers a trough of another where they are at most ``within`` positions apart. The pair with the
    most covered comes first, then greedily what covers most with those taken; between equals, the smaller mean squared
    distance. After each addition the positions that are both peak and trough count no more (Chen et al., 2023).

    The waveform depends on the head dimension, and the distances that matter on the context: search anew for other
    models. With these settings the search does not give the paper's own sets, `TOOL_BASES` and `RAG_BASES`.

    Args:
        candidates: bases to choose from.
        count: how many to choose.
        first: bases to begin with instead of the best pair, at least one.
        head_dim: of the model.
        distances: the first and the last distance at which peaks and troughs count.
        within: positions.
        window: as in `peaks`.
        gap: as in `peaks`.
        most: as in `peaks`.

    Raises:
        ValueError: too few candidates, an empty range of distances.

    >>> search_bases([10000, 18000, 22500, 24000], count=3).bases
    (22500, 24000, 18000)
    """
    choices = list(dict.fromkeys([*first, *candidates]))
    low, high = distances
    if count < max(2, len(first)) or len(choices) < count:
        raise ValueError(
            f"count must be from {max(2, len(first))} to the number of candidates, {len(choices)}; it was {count}"
        )
    if not 0 <= low < high:
        raise ValueError(f"distances must be two rising numbers from 0 on; they were {distances}")
    settings: dict[str, Any] = {"window": window, "gap": gap, "most": most}
    waves = {base: waveform(np.arange(low, high + 1), base, head_dim) for base in choices}
    tops = {base: {low + at for at in peaks(wave, **settings)} for base, wave in waves.items()}
    lows = {base: {low + at for at in troughs(wave, **settings)} for base, wave in waves.items()}

    def score(high_points: set[int], low_points: set[int], base: float) -> tuple[int, float]:
        """How many troughs are covered either way, and how well."""
        apart = [abs(a - b) for a, b in _pairs(tops[base], low_points) + _pairs(high_points, lows[base])]
        near = [distance**2 for distance in apart if distance <= within]
        return len(near), -sum(near) / len(near) if near else -np.inf

    chosen, covered = list(first), []
    if not chosen:
        pairs = {(a, b): score(tops[a], lows[a], b) for a, b in combinations(choices, 2)}
        pair, (most_covered, _) = max(pairs.items(), key=lambda item: item[1])
        chosen = list(pair)
        covered.append(most_covered)
    high_points: set[int] = set()
    low_points: set[int] = set()
    taken = 0
    while True:
        for base in chosen[taken:]:
            high_points, low_points = high_points | tops[base], low_points | lows[base]
            high_points, low_points = high_points - low_points, low_points - high_points
        taken = len(chosen)
        if taken == count:
            return BaseSearch(tuple(chosen), tuple(covered))
        rest = [base for base in choices if base not in chosen]
        scores = {base: score(high_points, low_points, base) for base in rest}
        chosen.append(max(rest, key=scores.__getitem__))
        covered.append(scores[chosen[-1]][0])


def _pairs(some: set[int], others: set[int]) -> list[tuple[int, int]]:
    return [(a, b) for a in some for b in others]
