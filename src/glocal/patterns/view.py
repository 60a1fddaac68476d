"""What a picture of a pattern shows: cells to draw, for whichever renderer draws them.

The terminal (`glocal.cli.show`) and matplotlib (`glocal.patterns.plot`) draw the same `View`. Only the rows of chosen
queries are ever computed, so a picture of a large grid costs little; what was pooled or left out is said in the view.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from glocal.patterns.base import Pattern
from glocal.patterns.boxes import Grid

MAX_KEYS = 1 << 22  # one row of the mask beyond this is no longer cheap
_MASK_PAIRS = 1 << 24  # pairs looked at for the picture of a mask
_MAX_SLICES = 6

Queries = Sequence[int | Sequence[int]]


@dataclass(frozen=True)
class Panel:
    """One raster of cells.

    ``seen (rows, columns)`` is the share of each cell's pairs that are live, 0 or 1 where a cell is one pair; ``step``
    the positions a cell covers per axis; ``marks`` the cells where queries stand, ``None`` where a mark names a whole
    row. ``kind`` is ``mask`` (queries down, keys across), ``row`` (one query) or ``grid`` (keys in their grid).
    """

    kind: str
    title: str
    seen: Tensor
    step: tuple[int, int] = (1, 1)
    marks: tuple[tuple[int, int | None], ...] = ()

    @property
    def exact(self) -> bool:
        """Whether each cell is a single pair."""
        return self.step == (1, 1)


@dataclass(frozen=True)
class View:
    """A pattern's picture: bands of panels that belong side by side, each band with a title (may be empty)."""

    expression: str
    grid_q: Grid
    grid_k: Grid
    bands: tuple[tuple[str, tuple[Panel, ...]], ...]
    notes: tuple[str, ...] = ()

    @property
    def panels(self) -> tuple[Panel, ...]:
        """All panels, in order."""
        return tuple(panel for _, panels in self.bands for panel in panels)

    @property
    def where(self) -> str:
        """The grids in words."""
        words = "sequence of {}" if len(self.grid_k) == 1 else "grid of {}"
        if self.grid_q == self.grid_k:
            return words.format(size(self.grid_k))
        return f"{size(self.grid_q)} queries on a " + words.format(f"{size(self.grid_k)} keys")


def size(grid: Grid) -> str:
    """A grid as text: ``28 x 28``."""
    return " x ".join(map(str, grid))


def view(
    pattern: Pattern,
    grid: int | Sequence[int],
    *,
    keys: int | Sequence[int] | None = None,
    queries: Queries | None = None,
    batch: int = 0,
    cells: int = 128,
    coarse: int | None = None,
) -> View:
    """What to draw of ``pattern``.

    Args:
        pattern: any pattern; one with a head dimension gives a band a head.
        grid: the query grid, one to three axes.
        keys: the key grid, where it differs.
        queries: positions in the query grid to draw; by default a corner, an edge and the centre.
        batch: which element of the batch, where the pattern has a batch dimension.
        cells: most cells across one panel; a longer axis is pooled to at most ``coarse`` cells.

    Raises:
        ValueError: the pattern does not fit the grids, the grid is empty, too large or has more than three axes, a
            query lies outside, or there is no such batch element.

    >>> from glocal import Window
    >>> view(Window(3), 5, queries=[2]).panels[1].seen.int().tolist()
    [[0, 1, 1, 1, 0]]
    """
    gq, gk = pattern.check(grid, keys)
    chosen = _chosen(queries, _drawable(gq, gk))
    flat = torch.tensor([_flat(q, gq) for q in chosen], device=pattern.device())
    live = _heads(pattern.rows(flat, gq, gk), batch)
    across = coarse or cells
    notes: list[str] = []
    bands: list[tuple[str, tuple[Panel, ...]]] = []
    longest = max(gk[-2:]) if len(gk) > 1 else max(gq[0], gk[0])
    step = 1 if longest <= cells else -(-longest // across)
    if step > 1:
        what = f"{step} x {step} pairs" if len(gk) == 1 else f"{step} x {step} keys"
        notes.append(f"one cell is {what}, shaded by the share that is seen")
    masks = _mask(pattern, gq, gk, batch, step, notes) if len(gk) == 1 else None
    for head in range(live.shape[0]):
        name = f"head {head}" if live.shape[0] > 1 else ""
        if masks is not None:
            rows = tuple((q[0] // step, None) for q in chosen)
            panels = [Panel("mask", "", masks[head], (step, step), rows)]
            for row, query in zip(live[head], chosen, strict=True):
                place = _place(query, gq, gk)
                marks = () if place is None else ((0, place[0] // step),)
                panels.append(Panel("row", _says(query, row), pool(row[None], (1, step)), (1, step), marks))
            bands.append((name, tuple(panels)))
        elif len(gk) == 2:
            pairs = zip(live[head], chosen, strict=True)
            planes = (_plane(row.view(gk), _says(q, row), _place(q, gq, gk), step) for row, q in pairs)
            bands.append((name, tuple(planes)))
        else:
            for row, query in zip(live[head], chosen, strict=True):
                bands.append(_slices(row.view(gk), query, _place(query, gq, gk), step, name))
    return View(repr(pattern), gq, gk, tuple(bands), tuple(notes))


def pool(live: Tensor, step: tuple[int, int]) -> Tensor:
    """Share of true values in each ``step``-sized cell of ``live (..., rows, columns)``; cells at the end may be short.

    >>> pool(torch.tensor([[True, False, True]]), (1, 2)).tolist()
    [[0.5, 1.0]]
    """
    (rows, columns), (down, right) = live.shape[-2:], step
    padded = torch.nn.functional.pad(live.float(), (0, -columns % right, 0, -rows % down))
    sums = padded.unflatten(-1, (-1, right)).unflatten(-3, (-1, down)).sum((-1, -3))
    tall = (rows - torch.arange(0, rows, down)).clamp(max=down)
    wide = (columns - torch.arange(0, columns, right)).clamp(max=right)
    share: Tensor = sums.cpu() / (tall[:, None] * wide)
    return share


def _drawable(gq: Grid, gk: Grid) -> Grid:
    if len(gk) > 3:
        raise ValueError(f"grid has {len(gk)} axes; pictures are drawn of one to three")
    if not math.prod(gq) or not math.prod(gk):
        raise ValueError(f"grid {size(gq)} with keys {size(gk)} is empty; there is nothing to draw")
    if max(math.prod(gq), math.prod(gk)) > MAX_KEYS:
        raise ValueError(f"grid {size(gk)} has {math.prod(gk):,} positions; pictures are drawn up to {MAX_KEYS:,}")
    return gq


def _chosen(queries: Queries | None, gq: Grid) -> list[Grid]:
    """Checked positions of the queries to draw, each once."""
    middle = tuple(n // 2 for n in gq)
    if queries is None:
        corner = (0,) * len(gq)
        third = {1: (gq[0] - 1,), 2: (0, middle[-1])}.get(len(gq), corner)
        found = [corner, middle, third] if len(gq) == 1 else [corner, third, middle]
        return list(dict.fromkeys(found))
    out = []
    for query in queries:
        place = (query,) if isinstance(query, int) else tuple(int(p) for p in query)
        if len(place) != len(gq) or not all(0 <= p < n for p, n in zip(place, gq, strict=True)):
            last = ", ".join(str(n - 1) for n in gq)
            raise ValueError(f"query {_at(place)} is not in the grid {size(gq)}; positions go up to {last}")
        out.append(place)
    if not out:
        raise ValueError("queries is empty; name at least one position, or leave it out")
    return list(dict.fromkeys(out))


def _flat(place: Grid, grid: Grid) -> int:
    flat = 0
    for p, n in zip(place, grid, strict=True):
        flat = flat * n + p
    return flat


def _place(query: Grid, gq: Grid, gk: Grid) -> Grid | None:
    """The query's position among the keys, if it has one."""
    place = tuple(p + k - q for p, q, k in zip(query, gq, gk, strict=True))
    return place if min(place) >= 0 else None


def _at(place: Grid) -> str:
    return str(place[0]) if len(place) == 1 else str(place)


def _says(query: Grid, row: Tensor) -> str:
    count = int(row.sum())
    return f"query {_at(query)}: {count:,} key{'' if count == 1 else 's'}"


def _heads(rows: Tensor, batch: int) -> Tensor:
    """``(*lead, n, Nk)`` to ``(H, n, Nk)``."""
    while rows.dim() < 4:
        rows = rows.unsqueeze(0)
    if not 0 <= batch < rows.shape[0]:
        raise ValueError(f"batch is {batch}; the pattern has {rows.shape[0]} batch elements, from 0")
    return rows[batch]


def _plane(keys: Tensor, title: str, place: Grid | None, step: int) -> Panel:
    marks = () if place is None else ((place[0] // step, place[1] // step),)
    return Panel("grid", title, pool(keys, (step, step)), (step, step), marks)


def _slices(keys: Tensor, query: Grid, place: Grid | None, step: int, name: str) -> tuple[str, tuple[Panel, ...]]:
    """The planes along the first axis: all of a few, else some of those where the query sees keys, and its own."""
    own = None if place is None else place[0]
    drawn = list(range(len(keys)))
    if len(drawn) > _MAX_SLICES:
        full = keys.flatten(1).any(1).tolist()
        drawn = [i for i in drawn if full[i] or i == own] or drawn[:1]
    if len(drawn) > _MAX_SLICES:
        even = [drawn[i * (len(drawn) - 1) // (_MAX_SLICES - 1)] for i in range(_MAX_SLICES)]
        if own is not None and own not in even:
            even[min(range(_MAX_SLICES), key=lambda i: abs(even[i] - own))] = own
        drawn = sorted(set(even))
    title = _says(query, keys)
    if len(drawn) < len(keys):
        left = int(keys.sum()) - sum(int(keys[i].sum()) for i in drawn)
        title += f"; {len(drawn)} of {len(keys)} slices drawn, {left:,} keys in the others"
    panels = [_plane(keys[i], f"slice {i}", place[1:] if place is not None and i == own else None, step) for i in drawn]
    return (f"{name}, {title}" if name else title), tuple(panels)


def _mask(pattern: Pattern, gq: Grid, gk: Grid, batch: int, step: int, notes: list[str]) -> Tensor:
    """The mask of a sequence, pooled: ``(H, rows, columns)``. Of a long one, not all queries are looked at."""
    most = max(1, _MASK_PAIRS // gk[0] // -(-gq[0] // step))
    if most < min(step, gq[0]):
        notes.append(f"the mask is drawn from {most} of every {step} queries")
    out = []
    for first in range(0, gq[0], step):
        count = min(step, gq[0] - first)
        picked = first + torch.arange(min(most, count), device=pattern.device()) * count // min(most, count)
        live = _heads(pattern.rows(picked, gq, gk), batch)
        out.append(pool(live, (len(picked), step)))
    return torch.cat(out, dim=-2)
