"""Which key positions each tile of queries needs: the plan that the ``sdpa`` kernel follows.

One box at a time. Where its step is more than 1 on an axis (dilation, strides), queries are first sorted by the
residue class of their keys, so that a tile's keys are neighbours once the other residues are left out. Tiles are
boxes of the grid; tiles whose key ranges have about the same extent form one group, which is computed as a batch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from glocal.patterns.boxes import Blocks, Box, BoxForm, Grid, Spans

_TILE = {1: (64,), 2: (8, 8), 3: (4, 4, 4)}


@dataclass(frozen=True, eq=False)
class Group:
    """Tiles with key ranges of one extent.

    ``queries (T, Tq)`` are flattened query positions, -1 where a tile is cut short; ``first (T, axes)`` the first key
    of each range, ``extent`` and ``step`` its length and spacing on each axis. ``whole`` says that the range is the
    whole key grid, so nothing has to be gathered. With ``blocks`` the keys are those listed for the queries' block.
    """

    queries: Tensor
    first: Tensor
    extent: Grid
    step: Grid
    whole: bool
    blocks: Blocks | None = None

    def keys(self, tiles: slice, grid_k: Grid) -> Tensor:
        """Flattened key positions ``(t, Tk)`` of some tiles, -1 for none; ``(*lead, t, Tk)`` of listed blocks."""
        if self.blocks is not None:
            return self.blocks.keys_of(self.blocks.block_of(self.queries[tiles, 0], keys=False))
        first = self.first[tiles]
        flat = torch.zeros((len(first), 1), dtype=torch.long, device=first.device)
        inside = torch.ones_like(flat, dtype=torch.bool)
        for axis, length in enumerate(grid_k):
            own = first[:, axis, None] + torch.arange(self.extent[axis], device=first.device) * self.step[axis]
            flat = (flat[:, :, None] * length + own[:, None, :]).flatten(1)
            inside = (inside[:, :, None] & (own < length)[:, None, :]).flatten(1)
        return torch.where(inside, flat, -1)


@dataclass(frozen=True)
class _Run:
    """A tile's part on one axis: its query positions, and its first key, key count and step."""

    queries: Tensor
    first: int
    count: int
    step: int


def plan(form: BoxForm) -> list[list[Group]]:
    """For each box of the form, its groups of tiles. Tiles that see nothing are left out."""
    return [_groups(box, form) if box.blocks is None else [_listed(box.blocks)] for box in form]


def _listed(blocks: Blocks) -> Group:
    """One tile for each query block."""
    number = blocks.block_of(torch.arange(math.prod(blocks.grid_q)), keys=False)
    order = number.argsort(stable=True)
    counts = number.bincount(minlength=math.prod(blocks.query_blocks()))
    place = torch.arange(len(order)) - (counts.cumsum(0) - counts)[number[order]]
    queries = torch.full((len(counts), math.prod(blocks.query_size)), -1)
    queries[number[order], place] = order
    return Group(queries, torch.zeros((len(counts), 0)), (), (), False, blocks)


def _runs(spans: Spans, size: int, keys: int) -> Iterator[_Run]:
    """Cut one axis into tiles of up to ``size`` queries whose keys share a residue class."""
    lo, hi, step = spans.lo, spans.hi, spans.step
    live = hi > lo
    residue = torch.where(live, lo % step, -1).reshape(-1, lo.shape[-1])
    low, high = residue.masked_fill(residue < 0, step).amin(0), residue.amax(0)
    if not bool((low >= high).all()):
        # The heads disagree on the class of a query: keep all residues and let the element test sort them out.
        step = 1
        low, high = torch.zeros_like(low), torch.where(high >= 0, 0, -1)
    lo = lo.masked_fill(~live, keys).reshape(-1, lo.shape[-1]).amin(0)
    hi = hi.masked_fill(~live, 0).reshape(-1, hi.shape[-1]).amax(0)
    for cls in range(step):
        members = torch.nonzero(high == cls).squeeze(1)
        for tile in members.split(size) if len(members) else ():
            first, last = int(lo[tile].min()), int(hi[tile].max()) - 1
            yield _Run(tile, first, (last - first) // step + 1, step)


def _groups(box: Box, form: BoxForm) -> list[Group]:
    rank = len(form.grid_k)
    sizes = _TILE.get(rank, (2,) * rank)
    axes = [list(_runs(a, s, k)) for a, s, k in zip(box.axes, sizes, form.grid_k, strict=True)]
    if box.rows is not None:
        rows = box.rows.reshape(-1, box.rows.shape[-1]).any(0)
    found: dict[tuple[Grid, Grid], list[tuple[Tensor, list[int]]]] = {}
    for tile in itertools.product(*axes):
        flat = tile[0].queries
        for run, length in zip(tile[1:], form.grid_q[1:], strict=True):
            flat = (flat[:, None] * length + run.queries).flatten()
        if box.rows is not None and not bool(rows[flat].any()):
            continue
        extent = tuple(min(_round(r.count), -(-k // r.step)) for r, k in zip(tile, form.grid_k, strict=True))
        # A range rounded up may start earlier, so that it ends inside the grid.
        first = [
            max(
                r.first % r.step,
                min(r.first, r.first % r.step + ((k - 1 - r.first % r.step) // r.step + 1 - e) * r.step),
            )
            for r, e, k in zip(tile, extent, form.grid_k, strict=True)
        ]
        found.setdefault((extent, tuple(r.step for r in tile)), []).append((flat, first))
    size = math.prod(sizes)
    groups = []
    for (extent, step), tiles in found.items():
        queries = torch.full((len(tiles), size), -1)
        for n, (flat, _) in enumerate(tiles):
            queries[n, : len(flat)] = flat
        whole = extent == form.grid_k
        if whole:
            queries = queries[queries >= 0][None]
        groups.append(Group(queries, torch.tensor([start for _, start in tiles]), extent, step, whole))
    return groups


def _round(count: int) -> int:
    """Round an extent up to three significant bits, so that few different extents remain."""
    unit = 1 << max(0, count.bit_length() - 3)
    return -(-count // unit) * unit


def live(form: BoxForm, number: int, queries: Tensor, keys: Tensor) -> Tensor:
    """Pairs ``(*lead, t, Tq, Tk)`` that box ``number`` has and no box before it: each pair is counted once."""
    boxes = form.boxes
    rows, columns = queries.clamp(min=0), keys.clamp(min=0)
    test = boxes[number].test(rows, columns, form.grid_q, form.grid_k)
    test = test & (queries >= 0).unsqueeze(-1) & (keys >= 0).unsqueeze(-2)
    for before in boxes[:number]:
        test = test & ~before.test(rows, columns, form.grid_q, form.grid_k)
    return test
