"""Patterns that carry data: padding masks, intervals, chosen blocks, one pattern a head, gates, any predicate."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from glocal.patterns.base import Pattern, PerAxis, Positions, one_box, per_axis, whole_axes
from glocal.patterns.boxes import Blocks, Box, BoxForm, Grid, NoBoxForm, Spans
from glocal.patterns.order import every_axis


def boolean(value: Any, what: str) -> Tensor:
    """Check a boolean tensor."""
    if not isinstance(value, Tensor) or value.dtype != torch.bool:
        raise TypeError(f"{what} must be a boolean tensor; it was {getattr(value, 'dtype', type(value))}")
    return value


@dataclass(frozen=True, repr=False, eq=False)
class Keys(Pattern):
    """The keys that a boolean ``mask (B, Nk)`` marks as real, for every query: padding.

    ``(B, *grid_k)`` is flattened. Meant to be intersected: ``Sliding(255, 0) & Keys(mask)``. With ``per_head`` the
    mask is ``(B, H, *grid_k)``: each head has keys of its own, as in caches that evict by head.

    >>> import torch
    >>> from glocal import Keys
    >>> Keys(torch.tensor([[True, True, False]])).mask(2, 3).int().tolist()
    [[[[1, 1, 0], [1, 1, 0]]]]
    """

    real: Tensor  # (B, H or 1, Nk)
    per_head: bool = False

    def __init__(self, mask: Tensor, per_head: bool = False) -> None:
        least = 3 if per_head else 2
        if boolean(mask, "mask of Keys").dim() < least:
            layout = "(B, H, Nk)" if per_head else "(B, Nk)"
            raise ValueError(f"mask of Keys must be {layout}; it was {tuple(mask.shape)}")
        flat = mask.flatten(least - 1)
        object.__setattr__(self, "real", flat if per_head else flat[:, None])
        object.__setattr__(self, "per_head", bool(per_head))

    def _check(self, grid_q: Grid, grid_k: Grid) -> None:
        if self.real.shape[-1] != math.prod(grid_k):
            raise ValueError(
                f"mask of Keys marks {self.real.shape[-1]} keys, the grid {grid_k} has {math.prod(grid_k)}"
            )

    def spec(self, data: list[Tensor]) -> str:
        data.append(self.real if self.per_head else self.real[:, 0])
        return f"keys(${len(data) - 1}{', per_head=true' if self.per_head else ''})"

    def _live(self, at: Positions) -> Tensor:
        return self.real[:, :, None, :]

    def _boxes(self, grid_q: Grid, grid_k: Grid) -> BoxForm:
        real, every = self.real.cpu(), every_axis(grid_q, grid_k)
        if len(grid_k) == 1 and real.numel():
            # Padding at one end is an interval, which lets a kernel skip tiles.
            lo, count = real.long().argmax(-1, keepdim=True), real.sum(-1, keepdim=True)
            place = torch.arange(grid_k[0])
            if torch.equal(real, (place >= lo) & (place < lo + count)):
                table = [t.expand(-1, -1, grid_q[0]) for t in (lo, lo + count)]
                return one_box(grid_q, grid_k, [Spans.of(table[0], table[1], 1, grid_k[0])])
        return one_box(grid_q, grid_k, every, keys=real)


@dataclass(frozen=True, repr=False, eq=False)
class Between(Pattern):
    """Keys from ``lo`` up to, not including, ``hi`` on a sequence: one interval for each query, from data.

    ``lo`` and ``hi`` are integers ``(*lead, Nq)`` that broadcast together; ``lead`` is empty, ``(H,)`` or ``(B, H)``
    (1 broadcasts). A query with ``hi <= lo`` sees nothing. For what a formula gives that no other pattern has:
    complete blocks of the past, groups up to one's own, tokens since a boundary.

    >>> import torch
    >>> from glocal import Between
    >>> Between(torch.tensor([0, 1]), torch.tensor([2, 1])).mask(2, 3).int().tolist()
    [[1, 1, 0], [0, 0, 0]]
    """

    lo: Tensor
    hi: Tensor

    def __post_init__(self) -> None:
        for name in ("lo", "hi"):
            value = getattr(self, name)
            if not isinstance(value, Tensor) or value.is_floating_point() or value.dtype == torch.bool:
                raise TypeError(
                    f"{name} of Between must be an integer tensor; it was {getattr(value, 'dtype', type(value))}"
                )
            if not 1 <= value.dim() <= 3:
                raise ValueError(f"{name} of Between must be (*lead, Nq); it was {tuple(value.shape)}")

    def _check(self, grid_q: Grid, grid_k: Grid) -> None:
        if len(grid_k) != 1:
            raise ValueError(f"Between is for a sequence; the grid has {len(grid_k)} axes {grid_k}")
        for name in ("lo", "hi"):
            if getattr(self, name).shape[-1] != grid_q[0]:
                raise ValueError(
                    f"{name} of Between has {getattr(self, name).shape[-1]} entries, there are {grid_q[0]} queries"
                )

    def spec(self, data: list[Tensor]) -> str:
        data += [self.lo, self.hi]
        return f"between(${len(data) - 2}, ${len(data) - 1})"

    def _live(self, at: Positions) -> Tensor:
        lo, hi = (t[..., at.rows].unsqueeze(-1) for t in (self.lo, self.hi))
        return (at.k[0] >= lo) & (at.k[0] < hi)

    def _boxes(self, grid_q: Grid, grid_k: Grid) -> BoxForm:
        lo, hi = (t.cpu().long() for t in (self.lo, self.hi))
        return one_box(grid_q, grid_k, [Spans.of(lo.clamp(min=0), hi, 1, grid_k[0])])


@dataclass(frozen=True, repr=False, eq=False)
class Selected(Pattern):
    """The key blocks listed for a query's block, from data.

    Args:
        blocks: integers ``(*lead, query blocks, n)``, numbers of key blocks row by row, -1 for none; ``lead`` is
            empty, ``(H,)`` or ``(B, H)`` (1 broadcasts).
        size: keys of a block, one value or one an axis. The last block of an axis may be short.
        query_size: queries of a block, where it differs; 1 lists blocks for every query.

    >>> import torch
    >>> from glocal import Selected
    >>> Selected(torch.tensor([[0, -1], [0, 1]]), 2).mask(4).int().tolist()
    [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]]
    """

    blocks: Tensor
    size: PerAxis
    query_size: PerAxis | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.blocks, Tensor) or self.blocks.is_floating_point() or self.blocks.dtype == torch.bool:
            raise TypeError(
                f"blocks of Selected must be an integer tensor; it was {getattr(self.blocks, 'dtype', '?')}"
            )
        if not 2 <= self.blocks.dim() <= 4:
            raise ValueError(f"blocks of Selected must be (*lead, query blocks, n); it was {tuple(self.blocks.shape)}")
        object.__setattr__(self, "size", whole_axes(self.size, "size of Selected", 1))
        if self.query_size is not None:
            object.__setattr__(self, "query_size", whole_axes(self.query_size, "query_size of Selected", 1))

    def _table(self, grid_q: Grid, grid_k: Grid) -> Blocks:
        rank = len(grid_k)
        size = per_axis(self.size, rank, "size of Selected")
        queries = size if self.query_size is None else per_axis(self.query_size, rank, "query_size of Selected")
        return Blocks(self.blocks.long(), queries, size, grid_q, grid_k)

    def _check(self, grid_q: Grid, grid_k: Grid) -> None:
        table = self._table(grid_q, grid_k)
        queries, keys = math.prod(table.query_blocks()), math.prod(table.key_blocks())
        if self.blocks.shape[-2] != queries:
            raise ValueError(
                f"blocks of Selected lists {self.blocks.shape[-2]} query blocks, grid {grid_q} has {queries}"
            )
        if self.blocks.numel() and not bool(((self.blocks >= -1) & (self.blocks < keys)).all()):
            raise ValueError(f"blocks of Selected must be numbers from -1 (none) to {keys - 1}")

    def spec(self, data: list[Tensor]) -> str:
        data.append(self.blocks)
        more = "" if self.query_size is None else f", query_size={self.query_size!r}"
        return f"selected(${len(data) - 1}, {self.size!r}{more})"

    def _live(self, at: Positions) -> Tensor:
        table = self._table(at.grid_q, at.grid_k)
        rows = table.block_of(at.rows, keys=False)
        columns = table.block_of(at.flat_k().squeeze(0), keys=True)
        listed = table.index[..., rows, :].unsqueeze(-2)  # (*lead, n, 1, slots)
        return (listed == columns[:, None]).any(-1)

    def _boxes(self, grid_q: Grid, grid_k: Grid) -> BoxForm:
        table = self._table(grid_q, grid_k)
        return one_box(grid_q, grid_k, every_axis(grid_q, grid_k), blocks=replace(table, index=table.index.cpu()))


@dataclass(frozen=True, repr=False, eq=False)
class PerHead(Pattern):
    """One pattern for each query head, in order.

    >>> from glocal import PerHead, Sliding, Full
    >>> PerHead([Sliding(0, 0), Full()]).count(4)
    20
    """

    heads: tuple[Pattern, ...]

    def __init__(self, heads: Sequence[Pattern]) -> None:
        heads = tuple(heads)
        if not heads or not all(isinstance(p, Pattern) for p in heads):
            raise TypeError(f"heads of PerHead must be one or more patterns; it was {heads!r}")
        object.__setattr__(self, "heads", heads)

    def children(self) -> tuple[Pattern, ...]:
        return self.heads

    def _check(self, grid_q: Grid, grid_k: Grid) -> None:
        for inner in (node for pattern in self.heads for node in pattern.walk()):
            if isinstance(inner, PerHead) and len(inner.heads) != len(self.heads):
                raise ValueError(f"heads of PerHead are {len(self.heads)}, of a PerHead inside it {len(inner.heads)}")

    def spec(self, data: list[Tensor]) -> str:
        return f"per_head([{', '.join(p.spec(data) for p in self.heads)}])"

    def _live(self, at: Positions) -> Tensor:
        shape = (len(at.rows), math.prod(at.grid_k))
        masks = []
        for h, pattern in enumerate(self.heads):
            live = pattern._live(at)
            masks.append(head_of(live.expand(torch.broadcast_shapes(live.shape, shape)), h, 2, len(self.heads)))
        masks = list(torch.broadcast_tensors(*masks))
        return torch.stack(masks, dim=-3)

    def _boxes(self, grid_q: Grid, grid_k: Grid) -> BoxForm:
        """Boxes of equal steps share one table with a row a head; the others are empty for the other heads."""
        count = len(self.heads)
        slots: list[tuple[tuple[int, ...], dict[int, Box]]] = []
        lead: tuple[int, ...] = (count,)
        for h, pattern in enumerate(self.heads):
            form = pattern._boxes(grid_q, grid_k)
            lead = tuple(torch.broadcast_shapes(lead, form.lead))
            for box in form:
                steps = tuple(a.step for a in box.axes)
                plain = box.rows is None and box.keys is None and box.blocks is None
                free = [s for s in slots if s[0] == steps and h not in s[1]] if plain else []
                if free:
                    free[0][1][h] = box
                else:
                    slots.append((steps if plain else (), {h: box}))
        return BoxForm.of(grid_q, grid_k, [self._join(found, count) for _, found in slots], lead)

    @staticmethod
    def _join(found: dict[int, Box], heads: int) -> Box:
        some = next(iter(found.values()))

        def table(axis: int, name: str) -> Tensor:
            rows = []
            for h in range(heads):
                spans = found[h].axes[axis] if h in found else some.axes[axis]
                row = head_of(getattr(spans, name), h, 1, heads)
                rows.append(row if h in found else torch.zeros_like(row))
            return torch.stack(list(torch.broadcast_tensors(*rows)), dim=-2)

        axes = [Spans(table(a, "lo"), table(a, "hi"), spans.step) for a, spans in enumerate(some.axes)]
        return replace(some, axes=tuple(axes))


def head_of(table: Tensor, head: int, trailing: int, heads: int) -> Tensor:
    """One head's part of ``(*lead, ...)`` with ``trailing`` dimensions after the lead; the head dimension goes."""
    if table.dim() == trailing:
        return table
    size = table.shape[-trailing - 1]
    if size not in (1, heads):
        raise ValueError(f"a pattern inside PerHead has {size} heads; PerHead has {heads}")
    return table.select(-trailing - 1, head if size > 1 else 0)


@dataclass(frozen=True, repr=False, eq=False)
class Choose(Pattern):
    """``a`` where ``gate`` is true, ``b`` where not: a boolean per query, ``(*lead, *grid_q)``.

    ``lead`` is empty, ``(H,)`` or ``(B, H)`` (1 broadcasts); the grid may be flattened.

    >>> import torch
    >>> from glocal import Choose, Full, Sliding
    >>> Choose(torch.tensor([True, False]), Full(), Sliding(0, 0)).mask(2).int().tolist()
    [[1, 1], [0, 1]]
    """

    gate: Tensor
    a: Pattern
    b: Pattern

    def __post_init__(self) -> None:
        boolean(self.gate, "gate of Choose")
        for name in ("a", "b"):
            if not isinstance(getattr(self, name), Pattern):
                raise TypeError(f"{name} of Choose must be a pattern; it was {getattr(self, name)!r}")

    def children(self) -> tuple[Pattern, ...]:
        return (self.a, self.b)

    def _check(self, grid_q: Grid, grid_k: Grid) -> None:
        self._gate(grid_q)

    def _gate(self, grid_q: Grid) -> Tensor:
        """The gate as ``(*lead, Nq)``."""
        rank, shape = len(grid_q), tuple(self.gate.shape)
        if shape[-rank:] == grid_q and len(shape) <= rank + 2:
            return self.gate.reshape(*shape[:-rank], math.prod(grid_q))
        if shape[-1:] == (math.prod(grid_q),) and len(shape) <= 3:
            return self.gate
        raise ValueError(f"gate of Choose must be (*lead, *grid_q) with grid_q {grid_q}; it was {shape}")

    def spec(self, data: list[Tensor]) -> str:
        data.append(self.gate)
        gate = f"${len(data) - 1}"
        return f"choose({gate}, {self.a.spec(data)}, {self.b.spec(data)})"

    def _live(self, at: Positions) -> Tensor:
        gate = self._gate(at.grid_q)[..., at.rows].unsqueeze(-1)
        return torch.where(gate, self.a._live(at), self.b._live(at))

    def _boxes(self, grid_q: Grid, grid_k: Grid) -> BoxForm:
        gate, every = self._gate(grid_q).cpu(), every_axis(grid_q, grid_k)
        on, off = (BoxForm.of(grid_q, grid_k, [Box(tuple(every), rows=g)]) for g in (gate, ~gate))
        a, b = self.a._boxes(grid_q, grid_k).intersect(on), self.b._boxes(grid_q, grid_k).intersect(off)
        return a.union(b)


@dataclass(frozen=True, repr=False, eq=False)
class Where(Pattern):
    """Any predicate on indices, for what has no name yet: ``fn(q, k)`` gives booleans.

    On a sequence ``q (n, 1)`` and ``k (1, Nk)`` are position tensors; on a grid they are tuples of them, one an
    axis. It has no box form, so it runs on the ``dense`` and ``flex`` backends, and its text cannot be read back.

    >>> from glocal import Where
    >>> Where(lambda q, k: (q + k) % 2 == 0).mask(3).int().tolist()
    [[1, 0, 1], [0, 1, 0], [1, 0, 1]]
    """

    fn: Callable[[Any, Any], Tensor]

    def __post_init__(self) -> None:
        if not callable(self.fn):
            raise TypeError(f"fn of Where must be a function of query and key positions; it was {self.fn!r}")

    def spec(self, data: list[Tensor]) -> str:
        # The address keeps two functions of one name apart.
        return f"where({getattr(self.fn, '__qualname__', type(self.fn).__name__)} at {id(self.fn):#x})"

    def _live(self, at: Positions) -> Tensor:
        one = len(at.grid_k) == 1
        return boolean(self.fn(at.q[0] if one else at.q, at.k[0] if one else at.k), "the result of Where's fn")

    def _boxes(self, grid_q: Grid, grid_k: Grid) -> BoxForm:
        raise NoBoxForm("Where is a predicate, with no box form")
