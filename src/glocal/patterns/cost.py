"""What a kernel that skips tiles can gain from a pattern, counted before anything runs.

Hassani et al., 2025, arXiv 2504.16922, describe such a simulator without its code; the definitions here are ours.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from glocal.patterns.base import Pattern, PerAxis, as_grid, per_axis, whole_axes
from glocal.patterns.boxes import Box, BoxForm, Grid, Spans, coordinates
from glocal.patterns.windows import Window

_CHUNK = 1 << 22  # entries of a table looked at together


@dataclass(frozen=True)
class Cost:
    """Key tiles that each query tile visits; a tile is visited if any pair in it is live.

    ``full`` is how many there are, what full attention visits. ``mean`` and ``most`` are over query tiles (and heads),
    with key tiles on a fixed grid; ``dynamic_mean`` and ``dynamic_most`` with key tiles that start at the first key of
    the query tile's range. ``flop_bound`` is full pairs over live pairs. ``perfect`` says that every visited tile is
    wholly live, so that no pair needs a mask. ``padded`` is the share of query slots with no query in them, which
    costs nothing here. ``layout`` is the dilation by which tokens are reordered on each axis before tiles are cut.
    """

    full: int
    mean: float
    most: int
    dynamic_mean: float
    dynamic_most: int
    flop_bound: float
    perfect: bool
    padded: float
    layout: Grid

    @property
    def bound(self) -> float:
        """Speedup over full attention if time is visited tiles."""
        return _over(self.full, self.mean)

    @property
    def worst(self) -> float:
        """The same if every query tile took as long as the longest."""
        return _over(self.full, self.most)

    @property
    def dynamic_bound(self) -> float:
        """The speedup with key tiles that start at the range's first key."""
        return _over(self.full, self.dynamic_mean)

    @property
    def efficiency(self) -> float:
        """``bound / flop_bound``. Above 1 only where tiles do not divide the grid: full attention pays for padding."""
        return self.bound / self.flop_bound if math.isfinite(self.flop_bound) else 1.0


def simulate(
    pattern: Pattern,
    grid: int | Sequence[int],
    query_tile: PerAxis,
    key_tile: PerAxis,
    keys: int | Sequence[int] | None = None,
) -> Cost:
    """Tiles that a block-skipping kernel visits for ``pattern``, and the speedup that this allows.

    Args:
        grid: query grid; ``keys`` is the key grid where it differs.
        query_tile, key_tile: one size, or one an axis. A last tile may be short.

    A single box costs the product over axes, from tables of one axis. Where all boxes have one dilation, tokens are
    taken in the order of residue classes, each class with tiles of its own; ``full`` stays that of the plain order.

    Raises:
        NoBoxForm: the pattern is not a short union of boxes.
        ValueError: the pattern does not fit the grid, the grid is empty, or a tile size is less than 1.

    Hassani et al., 2025, arXiv 2504.16922.

    >>> from glocal import Window
    >>> found = simulate(Window(2048), 32768, query_tile=256, key_tile=128)
    >>> round(found.bound, 2), found.flop_bound, found.perfect
    (14.32, 16.0, False)
    >>> simulate(Window(2048, stride=256), 32768, query_tile=256, key_tile=128).perfect
    True
    """
    gq, gk = pattern.check(grid, keys)
    if not math.prod(gq) * math.prod(gk):
        raise ValueError(f"grid must have no empty axis; it was {gq} queries and {gk} keys")
    tq, tk = (
        per_axis(whole_axes(tile, name, 1), len(gq), name)
        for name, tile in (("query_tile", query_tile), ("key_tile", key_tile))
    )
    form = pattern.boxes(gq, gk)
    axes = [_Axis.of(*sizes, _dilation(form, a)) for a, sizes in enumerate(zip(gq, gk, tq, tk, strict=True))]
    parts = list(_parts(form, axes))
    counts, areas = zip(*(_visits(part, own, dynamic=False) for part, own in parts), strict=True)
    later = [_visits(part, own, dynamic=True)[0] for part, own in parts]
    live = pattern.count(gq, gk)
    slots = math.prod(len(axis.query_sizes) * axis.query_tile for axis in axes)
    return Cost(
        full=math.prod(-(-n // t) for n, t in zip(gk, tk, strict=True)),
        mean=_mean(counts),
        most=_most(counts),
        dynamic_mean=_mean(later),
        dynamic_most=_most(later),
        flop_bound=_over(math.prod((*form.lead, *gq, *gk)), live),
        perfect=int(_product(areas).sum()) == live,
        padded=1 - math.prod(gq) / slots,
        layout=tuple(axis.step for axis in axes),
    )


def best_stride(
    size: PerAxis, grid: int | Sequence[int], query_tile: PerAxis, key_tile: PerAxis, dilation: PerAxis = 1
) -> tuple[Grid, Cost]:
    """The smallest stride of ``Window(size)`` that leaves no tile partly live, else the one of the highest bound.

    Each axis is searched on its own, which is exact: visited tiles are a product over axes, and a tile is wholly live
    where it is so on every axis. Errors are those of `simulate` and `Window`.

    >>> stride, found = best_stride((80, 80), (256, 256), (16, 8), (16, 8))
    >>> stride, found.perfect, round(found.bound, 2)
    ((16, 16), True, 10.24)
    """
    lengths = as_grid(grid)
    rank = len(lengths)
    simulate(Window(size, dilation), lengths, query_tile, key_tile)  # says what is wrong, with its axis
    sizes, steps, tq, tk = (per_axis(v, rank, "") for v in (size, dilation, query_tile, key_tile))
    smallest: list[int | None] = []
    highest: list[int] = []
    for axis, length in enumerate(lengths):
        smallest.append(None)
        visited: list[int] = []
        for stride in range(1, sizes[axis] + 1):
            tiles, whole = _window(Window(sizes[axis], steps[axis], stride), length, tq[axis], tk[axis])
            visited.append(tiles)
            if whole and smallest[-1] is None:
                smallest[-1] = stride
                if None not in smallest:
                    break
        highest.append(1 + visited.index(min(visited)))
    perfect = tuple(s for s in smallest if s is not None)
    stride_of = perfect if len(perfect) == rank else tuple(highest)
    return stride_of, simulate(Window(tuple(sizes), tuple(steps), stride_of), lengths, query_tile, key_tile)


@dataclass(frozen=True, eq=False)
class _Axis:
    """One axis cut into tiles, residue class after residue class of ``step`` (1: in plain order).

    A query meets keys of its own class only, so its key tiles are numbered within the class. ``tile_of (queries,)`` is
    the tile of each query; ``query_sizes (tiles,)`` and ``key_sizes (tiles, key tiles)`` are the tokens in them.
    """

    query_tile: int
    key_tile: int
    step: int
    tile_of: Tensor
    query_sizes: Tensor
    key_sizes: Tensor

    @staticmethod
    def of(queries: int, keys: int, query_tile: int, key_tile: int, step: int) -> _Axis:
        group, q = torch.arange(step), torch.arange(queries)
        tiles = -(-((queries - group + step - 1) // step).clamp(min=0) // query_tile)
        tile_of = (tiles.cumsum(0) - tiles)[q % step] + q // step // query_tile
        # Queries are the last positions of the keys, so the class of query 0 is keys - queries.
        residue = (torch.repeat_interleave(group, tiles) + keys - queries) % step
        members = (keys - residue + step - 1) // step
        longest = (keys + step - 1) // step
        before = key_tile * torch.arange((longest + key_tile - 1) // key_tile)
        sizes = (members[:, None] - before).clamp(0, key_tile)
        return _Axis(query_tile, key_tile, step, tile_of, torch.bincount(tile_of), sizes)

    def members(self, spans: Spans) -> Spans:
        """The spans in the numbering of a class: an interval of it where ``step`` is theirs."""
        live = spans.hi > spans.lo
        lo = torch.where(live, spans.lo // self.step, 0)
        return Spans(lo, torch.where(live, (spans.hi - 1) // self.step + 1, 0), spans.step // self.step)

    def begin(self, spans: list[Spans], lead: Grid) -> Tensor:
        """The first key of each query tile's range, ``(*lead, tiles)``."""
        far = torch.iinfo(torch.long).max
        first = torch.full((*lead, len(self.query_sizes)), far)
        for own in map(self.members, spans):
            lo = torch.where(own.hi > own.lo, own.lo, far).expand(*lead, -1)
            first = first.scatter_reduce(-1, self.tile_of.expand_as(lo), lo, "amin")
        return torch.where(first == far, 0, first)

    def met(self, spans: Spans, begin: Tensor, tiles: range) -> Tensor:
        """Whether a query of a tile meets a key tile: booleans ``(*lead, len(tiles), key tiles)``."""
        chosen = ((self.tile_of >= tiles.start) & (self.tile_of < tiles.stop)).nonzero().squeeze(-1)
        tile, own, lead = self.tile_of[chosen], self.members(spans), begin.shape[:-1]
        lo, hi = (t[..., chosen].expand(*lead, -1) - begin[..., tile] for t in (own.lo, own.hi))
        if own.step > self.key_tile:
            # Keys further apart than a tile is long skip tiles, so each key is looked at.
            most = int((hi - lo).max()) // own.step + 1
            lo = lo[..., None] + own.step * torch.arange(most)
            hi = torch.where(lo < hi[..., None], lo + 1, lo).flatten(-2)
            lo, tile = lo.flatten(-2), tile.repeat_interleave(most)
        live, width = hi > lo, self.key_sizes.shape[1]
        # Up at the first tile, down after the last: a tile is met where the running sum is positive.
        row = (tile - tiles.start) * (width + 1)
        first = torch.where(live, lo // self.key_tile, 0) + row
        after = torch.where(live, (hi - 1) // self.key_tile + 1, 0) + row
        edges = torch.zeros((*lead, len(tiles) * (width + 1)), dtype=torch.int32)
        edges.scatter_add_(-1, first, live.int()).scatter_add_(-1, after, -live.int())
        return edges.reshape(*lead, len(tiles), width + 1).cumsum(-1)[..., :width].gt(0)


def _window(window: Window, length: int, query_tile: int, key_tile: int) -> tuple[int, bool]:
    """Visited tiles of a window on one axis, summed, and whether none is partly live: from its ranges, no tables."""
    form = window._boxes((length,), (length,))  # a search would drive all else out of the cache
    axis = _Axis.of(length, length, query_tile, key_tile, _dilation(form, 0))
    own = axis.members(form.boxes[0].axes[0])
    first = axis.begin([form.boxes[0].axes[0]], ())
    end = torch.zeros_like(first).scatter_reduce(0, axis.tile_of, own.hi, "amax")
    visited = (end + key_tile - 1) // key_tile - first // key_tile
    same = (own.lo == first[axis.tile_of]) & (own.hi == end[axis.tile_of])
    aligned = (first % key_tile == 0) & ((end % key_tile == 0) | (end == axis.key_sizes.sum(-1)))
    return int(visited.sum()), bool(same.all()) and bool(aligned.all())


def _dilation(form: BoxForm, axis: int) -> int:
    """The step that all boxes have on this axis, each query seeing its own residue class; else 1."""
    steps = {box.axes[axis].step for box in form}
    step = steps.pop() if len(steps) == 1 else 1
    own = torch.arange(form.grid_q[axis]) + form.grid_k[axis] - form.grid_q[axis]
    spans = [box.axes[axis] for box in form]
    return step if all(bool(((s.hi <= s.lo) | ((s.lo - own) % step == 0)).all()) for s in spans) else 1


def _plain(box: Box) -> bool:
    return box.rows is None and box.keys is None and box.blocks is None


def _parts(form: BoxForm, axes: list[_Axis]) -> Iterator[tuple[BoxForm, list[_Axis]]]:
    """The form, or where it is one product of intervals its axes one by one: their costs multiply."""
    if len(form) != 1 or not _plain(form.boxes[0]):
        yield form, axes
        return
    for axis, q, k, spans in zip(axes, form.grid_q, form.grid_k, form.boxes[0].axes, strict=True):
        yield BoxForm((q,), (k,), (Box((spans,)),), form.lead), [axis]


def _visits(form: BoxForm, axes: list[_Axis], *, dynamic: bool) -> tuple[Tensor, Tensor]:
    """Key tiles visited by each query tile ``(*lead, tiles)``, and the pairs in them ``(*lead,)``."""
    lead, rank = form.lead, len(axes)
    begins = [axis.begin([box.axes[a] for box in form], lead) for a, axis in enumerate(axes)]
    if not dynamic:
        begins = [torch.zeros_like(begin) for begin in begins]
    every = [range(len(axis.query_sizes)) for axis in axes]
    rest = [[axes[a].met(box.axes[a], begins[a], every[a]) for a in range(1, rank)] for box in form]
    width = [axis.key_sizes.shape[1] for axis in axes]
    row = math.prod((*lead, *width, *map(len, every[1:]), axes[0].query_tile))
    counts, area = [], torch.zeros(lead, dtype=torch.long)
    for start in every[0][:: max(1, _CHUNK // row)]:
        tiles = every[0][start : start + max(1, _CHUNK // row)]
        visited = torch.zeros((*lead, len(tiles), *map(len, every[1:]), *width), dtype=torch.bool)
        for box, met in zip(form, rest, strict=True):
            if _plain(box):
                visited |= _outer([axes[0].met(box.axes[0], begins[0], tiles), *met])
            else:
                _mark(visited, box, form, axes, begins, tiles)
        sizes = [axis.query_sizes[:, None] * axis.key_sizes for axis in axes]
        weights = _outer([sizes[0][tiles.start : tiles.stop], *sizes[1:]], times=True)
        counts.append(visited.flatten(-rank).sum(-1).flatten(-rank))
        area = area + (visited * weights).flatten(-2 * rank).sum(-1)
    return torch.cat(counts, dim=-1), area


def _outer(tables: list[Tensor], times: bool = False) -> Tensor:
    """``(*lead, tiles, key tiles)`` of each axis to ``(*lead, *tiles, *key tiles)``, by and, or by product."""
    rank, out = len(tables), torch.ones((), dtype=torch.long if times else torch.bool)
    for a, table in enumerate(tables):
        shape = [1] * (2 * rank)
        shape[a], shape[rank + a] = table.shape[-2:]
        own = table.reshape(*table.shape[:-2], *shape)
        out = out * own if times else out & own
    return out


def _mark(visited: Tensor, box: Box, form: BoxForm, axes: list[_Axis], begins: list[Tensor], tiles: range) -> None:
    """Set the tiles of a box that marks single queries, keys or blocks: its pairs are looked at, for such queries."""
    queries, keys = torch.arange(math.prod(form.grid_q)), torch.arange(math.prod(form.grid_k))
    first = axes[0].tile_of[coordinates(queries, form.grid_q)[0]]
    chosen = (first >= tiles.start) & (first < tiles.stop)
    if box.rows is not None:
        chosen = chosen & box.rows.reshape(-1, len(queries)).any(0)
    for rows in queries[chosen].split(max(1, _CHUNK // math.prod((*form.lead, len(keys))))):
        live = box.test(rows, keys, form.grid_q, form.grid_k).expand(*form.lead, -1, -1)
        *lead, q, k = live.nonzero(as_tuple=True)
        at, where = [], []
        for axis, begin, i, j in zip(
            axes, begins, coordinates(rows[q], form.grid_q), coordinates(k, form.grid_k), strict=True
        ):
            at.append(axis.tile_of[i])
            where.append((j // axis.step - begin[(*lead, at[-1])]) // axis.key_tile)
        at[0] = at[0] - tiles.start
        visited[(*lead, *at, *where)] = True


def _product(values: Sequence[Tensor]) -> Tensor:
    out = values[0]
    for value in values[1:]:
        out = out * value
    return out


def _mean(counts: Sequence[Tensor]) -> float:
    return float(_product([c.double().mean(-1) for c in counts]).mean())


def _most(counts: Sequence[Tensor]) -> int:
    return int(_product([c.amax(-1) for c in counts]).max())


def _over(full: float, part: float) -> float:
    return full / part if part else math.inf
