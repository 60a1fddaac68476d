"""The box form: what a query sees, as a union of boxes of strided intervals.

A kernel reads this instead of a mask. On each grid axis a box gives every query position an interval
``lo <= j < hi, (j - lo) % step == 0`` of key positions; the box is the product over axes, and a pattern is the union
of its boxes. Tables have one entry a query position on that axis, so their size is the sum of the axes, not N x N.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

Grid = tuple[int, ...]

MAX_BOXES = 256
"""More boxes than this cost more than a mask does: the pattern then has no box form."""


class NoBoxForm(ValueError):
    """The pattern cannot be written as a short union of boxes; the message says why."""


def join_leads(*leads: tuple[int, ...]) -> tuple[int, ...]:
    """Broadcast leading dimensions: `torch.broadcast_shapes`, without its hundred microseconds."""
    out: list[int] = []
    for lead in leads:
        for place, size in enumerate(reversed(lead)):
            if place == len(out):
                out.append(size)
            elif size != 1 and out[place] not in (1, size):
                raise ValueError(f"patterns disagree on batch or heads: {out[place]} and {size}")
            elif size != 1:
                out[place] = size
    return tuple(reversed(out))


def coordinates(index: Tensor, grid: Grid) -> tuple[Tensor, ...]:
    """Grid coordinates, one tensor an axis, of flattened (row by row) positions."""
    out = []
    for length in reversed(grid):
        out.append(index % length)
        index = index // length
    return tuple(reversed(out))


@dataclass(frozen=True, eq=False)
class Spans:
    """One strided interval of key positions for each query position on one axis.

    ``lo`` and ``hi`` are integer tensors ``(*lead, Lq)``; a query with ``hi <= lo`` sees nothing.
    """

    lo: Tensor
    hi: Tensor
    step: int = 1

    @staticmethod
    def of(lo: Tensor, hi: Tensor, step: int, length: int) -> Spans:
        """Clip to ``[0, length)`` and tighten, so that ``hi - 1`` is the last key of the interval."""
        lo, hi = torch.broadcast_tensors(lo, hi)
        lo = torch.where(lo < 0, lo % step, lo)
        count = ((hi.clamp(max=length) - lo + step - 1) // step).clamp(min=0)
        lo = torch.where(count > 0, lo, 0)
        hi = torch.where(count > 0, lo + (count - 1) * step + 1, 0)
        if step > 1 and (step >= length or not bool((count > 1).any())):
            step = 1
        return Spans(lo, hi, step)

    @staticmethod
    def every(queries: int, keys: int) -> Spans:
        """Every query sees every key of the axis."""
        return Spans(torch.zeros(queries, dtype=torch.long), torch.full((queries,), keys))

    def counts(self) -> Tensor:
        """Keys in each interval, ``(*lead, Lq)``."""
        return ((self.hi - self.lo + self.step - 1) // self.step).clamp(min=0)

    def intersect(self, other: Spans, length: int) -> Spans:
        """Both intervals at once: the steps meet by the Chinese remainder theorem."""
        common = math.gcd(self.step, other.step)
        step = self.step * other.step // common
        lo, hi = torch.maximum(self.lo, other.lo), torch.minimum(self.hi, other.hi)
        if step > 1:
            modulus = other.step // common
            inverse = pow(self.step // common, -1, modulus) if modulus > 1 else 0
            first = self.lo + self.step * (((other.lo - self.lo) // common * inverse) % modulus)
            lo = first + ((lo - first + step - 1) // step).clamp(min=0) * step
            hi = torch.where((other.lo - self.lo) % common == 0, hi, lo)
        return Spans.of(lo, hi, step, length)

    def outside(self, length: int) -> list[Spans]:
        """The rest of the axis, as disjoint spans."""
        zero = torch.zeros_like(self.lo)
        pieces = [
            Spans.of(zero, self.lo, 1, length),
            Spans.of(self.hi, torch.full_like(self.hi, length), 1, length),
        ]
        pieces += [Spans.of(self.lo + r, self.hi, self.step, length) for r in range(1, self.step)]
        return pieces

    def test(self, i: Tensor, j: Tensor) -> Tensor:
        """Element test: ``i (..., Q)`` query and ``j (..., K)`` key positions to booleans ``(*lead, ..., Q, K)``."""
        lo, hi, j = self.lo[..., i].unsqueeze(-1), self.hi[..., i].unsqueeze(-1), j.unsqueeze(-2)
        live = (j >= lo) & (j < hi)
        return live if self.step == 1 else live & ((j - lo) % self.step == 0)


def pick(table: Tensor, index: Tensor, dims: int) -> Tensor:
    """Entries of ``table (*lead, L)`` at ``index``, which has ``dims`` dimensions, or those after a lead of its own."""
    if index.dim() == dims:
        return table[..., index]
    lead = torch.broadcast_shapes(table.shape[:-1], index.shape[:-dims])
    flat = index.expand(*lead, *index.shape[-dims:]).flatten(-dims)
    return table.expand(*lead, -1).gather(-1, flat).reshape(*lead, *index.shape[-dims:])


@dataclass(frozen=True, eq=False)
class Blocks:
    """Key blocks listed for each query block: ``index (*lead, query blocks, n)``, -1 for none, sizes per axis."""

    index: Tensor
    query_size: Grid
    key_size: Grid
    grid_q: Grid
    grid_k: Grid

    def query_blocks(self) -> Grid:
        """Query blocks on each axis."""
        return tuple(-(-n // s) for n, s in zip(self.grid_q, self.query_size, strict=True))

    def key_blocks(self) -> Grid:
        """Key blocks on each axis."""
        return tuple(-(-n // s) for n, s in zip(self.grid_k, self.key_size, strict=True))

    def block_of(self, index: Tensor, *, keys: bool) -> Tensor:
        """The flattened block number of flattened positions."""
        grid, size, blocks = (
            (self.grid_k, self.key_size, self.key_blocks())
            if keys
            else (self.grid_q, self.query_size, self.query_blocks())
        )
        number = torch.zeros_like(index)
        for position, s, count in zip(coordinates(index, grid), size, blocks, strict=True):
            number = number * count + position // s
        return number

    def keys_of(self, rows: Tensor) -> Tensor:
        """Flattened positions ``(*lead, t, n * block)`` of the keys listed for query blocks ``rows``, -1 for none."""
        listed = self.index[..., rows, :]
        again = torch.zeros_like(listed, dtype=torch.bool)  # a block listed twice counts once
        for slot in range(1, listed.shape[-1]):
            again[..., slot] = (listed[..., :slot] == listed[..., slot, None]).any(-1)
        none = (listed < 0) | again
        flat, inside = torch.zeros((), dtype=torch.long, device=rows.device), ~none[..., None]
        corner = coordinates(listed.clamp(min=0), self.key_blocks())
        for axis, (size, length) in enumerate(zip(self.key_size, self.grid_k, strict=True)):
            own = corner[axis][..., None] * size + torch.arange(size, device=rows.device)
            flat = (flat[..., None] * length + own[..., None, :]).flatten(-2) if axis else own
            inside = (inside[..., None] & (own < length)[..., None, :]).flatten(-2)
        return torch.where(inside, flat, -1).flatten(-2)

    def test(self, q: Tensor, k: Tensor) -> Tensor:
        """Element test on flattened positions ``q (..., Q)`` and ``k (..., K)``: ``(*lead, ..., Q, K)``."""
        listed = self.index[..., self.block_of(q, keys=False), :]
        columns = self.block_of(k, keys=True).unsqueeze(-2)
        live = torch.zeros((), dtype=torch.bool, device=k.device)
        for slot in range(listed.shape[-1]):
            live = live | (listed[..., slot, None] == columns)
        return live


@dataclass(frozen=True, eq=False)
class Box:
    """A product of per-axis spans, for the queries in ``rows``, the keys in ``keys``, the blocks in ``blocks``.

    ``rows (*lead, Nq)`` and ``keys (*lead, Nk)`` are booleans over flattened positions; ``None`` means all.
    """

    axes: tuple[Spans, ...]
    rows: Tensor | None = None
    keys: Tensor | None = None
    blocks: Blocks | None = None

    def lead(self) -> tuple[int, ...]:
        """Leading dimensions of the tables: ``()``, ``(H,)`` or ``(B, H)``."""
        shapes: list[tuple[int, ...]] = [a.lo.shape[:-1] for a in self.axes]
        shapes += [t.shape[:-1] for t in (self.rows, self.keys) if t is not None]
        if self.blocks is not None:
            shapes.append(self.blocks.index.shape[:-2])
        return join_leads(*shapes)

    def empty(self) -> bool:
        """Whether no query can see a key through this box."""
        if any(not bool((a.hi > a.lo).any()) for a in self.axes):
            return True
        return any(t is not None and not bool(t.any()) for t in (self.rows, self.keys))

    def intersect(self, other: Box, grid_k: Grid) -> Box:
        """The pairs in both boxes."""
        if self.blocks is not None and other.blocks is not None:
            raise NoBoxForm("two lists of selected blocks meet in one box")
        return Box(
            tuple(a.intersect(b, n) for a, b, n in zip(self.axes, other.axes, grid_k, strict=True)),
            _both(self.rows, other.rows),
            _both(self.keys, other.keys),
            self.blocks if other.blocks is None else other.blocks,
        )

    def outside(self, grid_q: Grid, grid_k: Grid) -> list[Box]:
        """The pairs not in this box, as disjoint boxes."""
        if self.blocks is not None:
            raise NoBoxForm("the complement of selected blocks is not a list of blocks")
        every = tuple(Spans.every(q, k) for q, k in zip(grid_q, grid_k, strict=True))
        pieces: list[Box] = []
        if self.rows is not None:
            pieces.append(Box(every, rows=~self.rows))
        if self.keys is not None:
            pieces.append(Box(every, rows=self.rows, keys=~self.keys))
        # In on the axes before, out on this one, anything on the axes after: the pieces do not overlap.
        for axis, spans in enumerate(self.axes):
            for rest in spans.outside(grid_k[axis]):
                axes = (*self.axes[:axis], rest, *every[axis + 1 :])
                pieces.append(Box(axes, rows=self.rows, keys=self.keys))
        return [box for box in pieces if not box.empty()]

    def test(self, q: Tensor, k: Tensor, grid_q: Grid, grid_k: Grid) -> Tensor:
        """Element test on flattened positions ``q (..., Q)`` and ``k (..., K)``: ``(*lead, ..., Q, K)``.

        Only ``k`` may have leading dimensions of its own.
        """
        pairs = zip(self.axes, coordinates(q, grid_q), coordinates(k, grid_k), strict=True)
        tests = [spans.test(i, j) for spans, i, j in pairs]
        if self.rows is not None:
            tests.append(self.rows[..., q].unsqueeze(-1))
        if self.keys is not None:
            tests.append(pick(self.keys, k, q.dim()).unsqueeze(-2))
        if self.blocks is not None:
            tests.append(self.blocks.test(q, k))
        live = tests[0]
        for test in tests[1:]:
            live = live & test
        return live

    def count(self, lead: tuple[int, ...], grid_k: Grid) -> int | None:
        """Live pairs over all of ``lead``, or None where that needs the pairs themselves."""
        if self.blocks is not None or (self.keys is not None and len(self.axes) > 1):
            return None
        per_axis = [a.counts() for a in self.axes]
        if self.keys is not None:
            per_axis = [_count_keys(self.axes[0], self.keys, grid_k[0])]
        if self.rows is None:
            total = torch.ones((), dtype=torch.long)
            for counts in per_axis:
                total = total * counts.sum(-1)
        else:
            counts = per_axis[0]
            for more in per_axis[1:]:
                counts = (counts.unsqueeze(-1) * more.unsqueeze(-2)).flatten(-2)
            total = (counts * self.rows).sum(-1)
        return int(total.expand(lead).sum())

    def to(self, device: torch.device) -> Box:
        """The same box with its tables on ``device``."""
        blocks = self.blocks if self.blocks is None else replace(self.blocks, index=self.blocks.index.to(device))
        return Box(
            tuple(Spans(a.lo.to(device), a.hi.to(device), a.step) for a in self.axes),
            None if self.rows is None else self.rows.to(device),
            None if self.keys is None else self.keys.to(device),
            blocks,
        )


def _fold(box: Box) -> Box:
    """On a sequence the rows of a box go into its table: a query left out has an empty interval."""
    if box.rows is None or len(box.axes) > 1:
        return box
    spans = box.axes[0]
    lo, hi, rows = torch.broadcast_tensors(spans.lo, spans.hi, box.rows)
    return replace(box, axes=(Spans(torch.where(rows, lo, 0), torch.where(rows, hi, 0), spans.step),), rows=None)


def _both(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a if a is b else a & b


def _count_keys(spans: Spans, keys: Tensor, length: int) -> Tensor:
    """Live keys of each interval by running sums along every residue class of the step."""
    step = spans.step
    padded = torch.nn.functional.pad(keys.long(), (0, -length % step))
    sums = padded.reshape(*keys.shape[:-1], -1, step).cumsum(-2).flatten(-2)
    sums = torch.nn.functional.pad(sums, (step, 0))
    last, first = spans.hi - 1 + step, spans.lo
    lead = torch.broadcast_shapes(sums.shape[:-1], spans.lo.shape[:-1])
    sums = sums.expand(*lead, -1)
    upper, lower = (sums.gather(-1, at.clamp(0, sums.shape[-1] - 1).expand(*lead, -1)) for at in (last, first))
    return torch.where(spans.hi > spans.lo, upper - lower, 0)


@dataclass(frozen=True, eq=False)
class BoxForm:
    """A pattern compiled for one pair of grids: the union of ``boxes``. Iterate it for the boxes.

    ``lead`` are the leading dimensions of the pattern: ``()``, ``(H,)`` or ``(B, H)``.
    """

    grid_q: Grid
    grid_k: Grid
    boxes: tuple[Box, ...]
    lead: tuple[int, ...] = ()

    @staticmethod
    def of(grid_q: Grid, grid_k: Grid, boxes: Sequence[Box], lead: tuple[int, ...] = ()) -> BoxForm:
        """Drop empty boxes and refuse unions too long to be worth it. ``lead`` keeps what dropped boxes had."""
        lead = join_leads(lead, *(box.lead() for box in boxes))
        kept = tuple(box for box in map(_fold, boxes) if not box.empty())
        if len(kept) > MAX_BOXES:
            raise NoBoxForm(f"needs {len(kept)} boxes, more than {MAX_BOXES}")
        return BoxForm(grid_q, grid_k, kept, lead)

    def __iter__(self) -> Iterator[Box]:
        return iter(self.boxes)

    def __len__(self) -> int:
        return len(self.boxes)

    def union(self, other: BoxForm) -> BoxForm:
        """Pairs in either."""
        return BoxForm.of(self.grid_q, self.grid_k, (*self.boxes, *other.boxes), self._lead_with(other))

    def intersect(self, other: BoxForm) -> BoxForm:
        """Pairs in both: each box of one with each of the other."""
        if len(self) * len(other) > 4 * MAX_BOXES:  # said before the work, not after it
            raise NoBoxForm(f"needs {len(self)} x {len(other)} boxes to intersect, more than {4 * MAX_BOXES}")
        boxes = [a.intersect(b, self.grid_k) for a in self for b in other]
        return BoxForm.of(self.grid_q, self.grid_k, boxes, self._lead_with(other))

    def _lead_with(self, other: BoxForm) -> tuple[int, ...]:
        return join_leads(self.lead, other.lead)

    def complement(self) -> BoxForm:
        """Pairs in none of the boxes."""
        every = tuple(Spans.every(q, k) for q, k in zip(self.grid_q, self.grid_k, strict=True))
        out = BoxForm(self.grid_q, self.grid_k, (Box(every),), self.lead)
        for box in self:
            out = out.intersect(BoxForm(self.grid_q, self.grid_k, tuple(box.outside(self.grid_q, self.grid_k))))
        return out

    def mask(self) -> Tensor:
        """Booleans ``(*lead, Nq, Nk)`` from the tables alone."""
        nq, nk = math.prod(self.grid_q), math.prod(self.grid_k)
        live = torch.zeros((*self.lead, nq, nk), dtype=torch.bool)
        for box in self:
            live = live | box.test(torch.arange(nq), torch.arange(nk), self.grid_q, self.grid_k)
        return live

    def count(self, limit: int = 4096) -> int | None:
        """Live pairs by inclusion and exclusion, or None where more than ``limit`` overlaps would have to be met."""
        budget, total = limit, 0
        stack: list[tuple[Box | None, int, int]] = [(None, 0, -1)]
        while stack:
            inside, start, sign = stack.pop()
            for n in range(start, len(self.boxes)):
                box = self.boxes[n]
                if inside is not None:
                    if inside.blocks is not None and box.blocks is not None:
                        return None
                    box = inside.intersect(box, self.grid_k)
                    if box.empty():
                        continue
                count, budget = box.count(self.lead, self.grid_k), budget - 1
                if count is None or budget < 0:
                    return None
                total -= sign * count
                stack.append((box, n + 1, -sign))
        return total
