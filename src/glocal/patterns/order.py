"""Patterns over the flattened order of tokens: full, causal, prefix, sinks, chosen tokens, packed segments."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from glocal.patterns.base import Pattern, Positions, one_box, whole
from glocal.patterns.boxes import Box, BoxForm, Grid, Spans, coordinates

_MAX_RUNS = 16  # more runs of keys than this become one box with a key mask


def positions(queries: int, keys: int) -> Tensor:
    """Query positions of one axis in key coordinates: the last ``queries`` of ``keys``."""
    return torch.arange(queries) + keys - queries


def every_axis(grid_q: Grid, grid_k: Grid) -> list[Spans]:
    """Spans that see everything, one an axis."""
    return [Spans.every(q, k) for q, k in zip(grid_q, grid_k, strict=True)]


def constant(lo: int, hi: int, queries: int, keys: int) -> Spans:
    """The same interval for every query."""
    return Spans.of(torch.full((queries,), lo), torch.full((queries,), hi), 1, keys)


@dataclass(frozen=True, repr=False, eq=False)
class Full(Pattern):
    """Every query sees every key.

    >>> from glocal import Full
    >>> Full().count((4, 4))
    256
    """

    def spec(self, data: list[Tensor]) -> str:
        return "full()"

    def _live(self, at: Positions) -> Tensor:
        return torch.ones((1, 1), dtype=torch.bool, device=at.rows.device)

    def _boxes(self, grid_q: Grid, grid_k: Grid) -> BoxForm:
        return one_box(grid_q, grid_k, every_axis(grid_q, grid_k))


@dataclass(frozen=True, repr=False, eq=False)
class Causal(Pattern):
    """Keys not after the query, in row-by-row order; queries are the last positions of the keys.

    >>> from glocal import Causal
    >>> Causal().mask(2, 4).int().tolist()
    [[1, 1, 1, 0], [1, 1, 1, 1]]
    """

    def spec(self, data: list[Tensor]) -> str:
        return "causal()"

    def _live(self, at: Positions) -> Tensor:
        # Lexicographic comparison, from the last axis to the first.
        live = at.k[-1] <= at.q[-1]
        for q, k in zip(reversed(at.q[:-1]), reversed(at.k[:-1]), strict=True):
            live = (k < q) | ((k == q) & live)
        return live

    def _boxes(self, grid_q: Grid, grid_k: Grid) -> BoxForm:
        boxes: list[Box] = []
        own: list[Spans] = []
        for axis, (q, k) in enumerate(zip(grid_q, grid_k, strict=True)):
            p = positions(q, k)
            zero, last = torch.zeros_like(p), axis == len(grid_q) - 1
            before = Spans.of(zero, p + 1 if last else p, 1, k)
            boxes.append(Box((*own, before, *every_axis(grid_q[axis + 1 :], grid_k[axis + 1 :]))))
            own.append(Spans.of(p, p + 1, 1, k) if bool((p >= 0).all()) else _own_or_none(p, k))
        return BoxForm.of(grid_q, grid_k, boxes)


def _own_or_none(p: Tensor, keys: int) -> Spans:
    # A position before the first key is nobody's own: Spans.of would move it up to key 0.
    return Spans.of(torch.where(p < 0, keys, p), torch.where(p < 0, 0, p + 1), 1, keys)


@dataclass(frozen=True, repr=False, eq=False)
class Prefix(Pattern):
    """The first ``n`` keys in row-by-row order (all of them where there are fewer).

    >>> from glocal import Prefix
    >>> Prefix(2).mask(1, 4).int().tolist()
    [[1, 1, 0, 0]]
    """

    n: int

    def __post_init__(self) -> None:
        whole(self.n, f"n of {type(self).__name__}", 0)

    def spec(self, data: list[Tensor]) -> str:
        return f"{type(self).__name__.lower()}({self.n})"

    def _live(self, at: Positions) -> Tensor:
        return at.flat_k() < self.n

    def _boxes(self, grid_q: Grid, grid_k: Grid) -> BoxForm:
        if self.n >= math.prod(grid_k):
            return one_box(grid_q, grid_k, every_axis(grid_q, grid_k))
        # The digits of n in the grid's own number system: whole slices, then a part of the next one.
        boxes: list[Box] = []
        own: list[Spans] = []
        for axis, digit in enumerate(int(c) for c in coordinates(torch.tensor(self.n), grid_k)):
            rest = every_axis(grid_q[axis + 1 :], grid_k[axis + 1 :])
            boxes.append(Box((*own, constant(0, digit, grid_q[axis], grid_k[axis]), *rest)))
            own.append(constant(digit, digit + 1, grid_q[axis], grid_k[axis]))
        return BoxForm.of(grid_q, grid_k, boxes)


@dataclass(frozen=True, repr=False, eq=False)
class Sinks(Prefix):
    """The first ``n`` keys that are not after the query: ``Prefix(n) & Causal()``.

    Attention sinks, after Xiao et al., 2023, arXiv 2309.17453.

    >>> from glocal import Sinks
    >>> Sinks(2).mask(3).int().tolist()
    [[1, 0, 0], [1, 1, 0], [1, 1, 0]]
    """

    def _live(self, at: Positions) -> Tensor:
        return super()._live(at) & Causal()._live(at)

    def _boxes(self, grid_q: Grid, grid_k: Grid) -> BoxForm:
        return super()._boxes(grid_q, grid_k).intersect(Causal()._boxes(grid_q, grid_k))


@dataclass(frozen=True, repr=False, eq=False)
class Tokens(Pattern):
    """The tokens in ``index`` (flattened positions) see all keys and are seen by all queries.

    Global tokens, as in Longformer (Beltagy et al., 2020, arXiv 2004.05150).

    >>> from glocal import Tokens
    >>> Tokens([1]).mask(3).int().tolist()
    [[0, 1, 0], [1, 1, 1], [0, 1, 0]]
    """

    index: tuple[int, ...]

    def __init__(self, index: Iterable[int]) -> None:
        chosen = sorted({whole(i, "index of Tokens", 0) for i in index})
        object.__setattr__(self, "index", tuple(chosen))

    def _check(self, grid_q: Grid, grid_k: Grid) -> None:
        if self.index and self.index[-1] >= math.prod(grid_k):
            raise ValueError(f"index of Tokens names token {self.index[-1]}, grid {grid_k} has {math.prod(grid_k)}")

    def spec(self, data: list[Tensor]) -> str:
        return f"tokens({list(self.index)})"

    def _table(self, size: int, device: torch.device) -> Tensor:
        table = torch.zeros(size + 1, dtype=torch.bool, device=device)  # one more: position -1 is no token
        table[list(self.index)] = True
        return table

    def _live(self, at: Positions) -> Tensor:
        table = self._table(math.prod(at.grid_k), at.rows.device)
        return table[at.flat_q()] | table[at.flat_k()]

    def _boxes(self, grid_q: Grid, grid_k: Grid) -> BoxForm:
        every, size = every_axis(grid_q, grid_k), math.prod(grid_k)
        table = self._table(size, torch.device("cpu"))
        at = Positions.of(grid_q, grid_k, torch.arange(math.prod(grid_q)))
        boxes = [Box(tuple(every), rows=table[at.flat_q().squeeze(-1)])]
        runs = self._runs(grid_k[-1])
        if len(runs) > _MAX_RUNS:
            boxes.append(Box(tuple(every), keys=table[:size]))
        else:
            for first, last in runs:
                lo, hi = (coordinates(torch.tensor(t), grid_k) for t in (first, last))
                spans = zip(lo, hi, grid_q, grid_k, strict=True)
                boxes.append(Box(tuple(constant(int(a), int(b) + 1, q, k) for a, b, q, k in spans)))
        return BoxForm.of(grid_q, grid_k, boxes)

    def _runs(self, width: int) -> list[tuple[int, int]]:
        """First and last token of each run of neighbours that stays within one row."""
        runs: list[tuple[int, int]] = []
        for token in self.index:
            if runs and token == runs[-1][1] + 1 and token % width:
                runs[-1] = (runs[-1][0], token)
            else:
                runs.append((token, token))
        return runs


@dataclass(frozen=True, repr=False, eq=False)
class Segments(Pattern):
    """Only keys of the query's own segment, in a sequence packed from pieces of these ``lengths``.

    >>> from glocal import Segments
    >>> Segments([2, 1]).mask(3).int().tolist()
    [[1, 1, 0], [1, 1, 0], [0, 0, 1]]
    """

    lengths: tuple[int, ...]

    def __init__(self, lengths: Iterable[int]) -> None:
        checked = tuple(whole(n, "lengths of Segments", 0) for n in lengths)
        object.__setattr__(self, "lengths", checked)

    def _check(self, grid_q: Grid, grid_k: Grid) -> None:
        if len(grid_k) != 1:
            raise ValueError(f"Segments packs a sequence; the grid has {len(grid_k)} axes {grid_k}")
        if sum(self.lengths) != grid_k[0]:
            raise ValueError(f"lengths of Segments add up to {sum(self.lengths)}, there are {grid_k[0]} keys")
        if grid_q[0] > grid_k[0]:
            raise ValueError(f"Segments needs at most as many queries as keys; it was {grid_q[0]} and {grid_k[0]}")

    def spec(self, data: list[Tensor]) -> str:
        return f"segments({list(self.lengths)})"

    def _live(self, at: Positions) -> Tensor:
        number = torch.repeat_interleave(torch.arange(len(self.lengths)), torch.tensor(self.lengths, dtype=torch.long))
        number = number.to(at.rows.device)
        return number[at.q[0]] == number[at.k[0]]

    def _boxes(self, grid_q: Grid, grid_k: Grid) -> BoxForm:
        lengths = torch.tensor(self.lengths, dtype=torch.long)
        ends = lengths.cumsum(0)
        p = positions(grid_q[0], grid_k[0])
        own = torch.searchsorted(ends, p, right=True)
        return one_box(grid_q, grid_k, [Spans.of((ends - lengths)[own], ends[own], 1, grid_k[0])])
