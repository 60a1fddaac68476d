"""Neighborhood attention unfused: operators on a compact table of scores, by gathering and by dense tiles.

The table holds one score for each query and each key of its window, in row-major order of the window, so memory grows
with the window; `glocal.attend` with the same `Window` is the fused form, whose memory does not. The tables serve to
look at scores, to change them between the two products, and to check the fused form.

Layout is heads first, ``(B, H, *grid, D)``, as everywhere here. NATTEN's fused operators are heads last,
``(B, *grid, H, D)``: ``x.movedim(-2, 1)`` turns theirs into ours and ``x.movedim(1, -2)`` ours into theirs; its
unfused ones were heads first. Two paths give the same: ``"naive"`` gathers keys by index, one place of the window
at a time; ``"windowed"`` cuts queries into tiles and multiplies each with its contiguous halo of keys, one dense
product a tile, of which the window's entries are kept. Hassani et al., 2024, arXiv 2403.04690.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from glocal.kernels.common import accumulator, softmax
from glocal.patterns.base import per_axis
from glocal.patterns.boxes import Grid, Spans
from glocal.patterns.windows import Window
from glocal.shapes import Float

__all__ = ["PATHS", "inverse_neighborhood", "neighborhood_attention", "neighborhood_av", "neighborhood_qk"]

PATHS = ("naive", "windowed")
"""The unfused ways to compute."""

_TILE = {1: (64,), 2: (8, 8), 3: (4, 4, 4)}


def neighborhood_qk(
    q: Float[Tensor, "B H *grid D"],
    k: Float[Tensor, "B H *grid D"],
    where: Window,
    *,
    rpb: Tensor | None = None,
    path: str = "windowed",
) -> Float[Tensor, "B H *grid K"]:
    """Scores of each query with the keys of its window.

    Args:
        q: ``(B, H, *grid, D)``, scaled already.
        k: of the same shape.
        where: the window, any setting of it.
        rpb: a bias for each head and offset, ``(H, *[2 size - 1 for each axis])``, at ``key - query + size - 1`` in
            steps of the dilation.
        path: one of `PATHS`.

    Returns:
        ``(B, H, *grid, K)`` with ``K = prod(size)``; -inf where a causal window has no such key.

    Raises:
        ValueError: shapes that differ, a window that does not fit the grid, or an unknown path.

    >>> import torch
    >>> from glocal.patterns import Window
    >>> neighborhood_qk(torch.ones(1, 1, 4, 1), torch.arange(4.0).view(1, 1, 4, 1), Window(3)).int().tolist()
    [[[[0, 1, 2], [0, 1, 2], [1, 2, 3], [1, 2, 3]]]]
    """
    grid = _check(q, k, where, path, "q", "k")
    scores = _apply("scores", q, k, where, path)
    if rpb is not None:
        scores = scores + _bias(rpb, _axes(where, grid), q.shape[1])
    live = _live(_axes(where, grid))
    return scores if live is None else scores.masked_fill(~live, -torch.inf)


def neighborhood_av(
    a: Float[Tensor, "B H *grid K"], v: Float[Tensor, "B H *grid Dv"], where: Window, *, path: str = "windowed"
) -> Float[Tensor, "B H *grid Dv"]:
    """The sum of each window's values by the weights ``a``, laid out as `neighborhood_qk` returns scores.

    Args:
        a: ``(B, H, *grid, K)``; what lies at places without a key does not count.
        v: ``(B, H, *grid, Dv)``.
        where, path: as in `neighborhood_qk`.

    Raises:
        ValueError: as `neighborhood_qk`.

    >>> import torch
    >>> from glocal.patterns import Window
    >>> neighborhood_av(torch.ones(1, 1, 4, 3), torch.arange(4.0).view(1, 1, 4, 1), Window(3)).flatten().tolist()
    [3.0, 3.0, 6.0, 6.0]
    """
    grid = _check(a, v, where, path, "a", "v")
    count = math.prod(axis.size for axis in _axes(where, grid))
    if a.shape[-1] != count:
        raise ValueError(f"a must have {count} weights a query, one for each key of {where!r}; it had {a.shape[-1]}")
    live = _live(_axes(where, grid))
    return _apply("values", a if live is None else a.masked_fill(~live, 0), v, where, path)


def neighborhood_attention(
    q: Float[Tensor, "B H *grid D"],
    k: Float[Tensor, "B H *grid D"],
    v: Float[Tensor, "B H *grid Dv"],
    where: Window,
    *,
    rpb: Tensor | None = None,
    scale: float | None = None,
    path: str = "windowed",
) -> tuple[Float[Tensor, "B H *grid Dv"], Float[Tensor, "B H *grid"]]:
    """Attention by the two operators, and its log-sum-exp: what `glocal.attend` computes without the table.

    Arguments are those of the operators; ``scale`` is ``D ** -0.5`` where None. Sums are kept in float32 at least.

    >>> import torch
    >>> from glocal import Window, attend
    >>> q = torch.randn(1, 2, 9, 10, 16)
    >>> out, lse = neighborhood_attention(q, q, q, Window((3, 5)))
    >>> torch.allclose(out, attend(q, q, q, Window((3, 5))), atol=1e-6), lse.shape
    (True, torch.Size([1, 2, 9, 10]))
    """
    wide = accumulator(q.dtype)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = neighborhood_qk(q.to(wide) * scale, k.to(wide), where, rpb=rpb, path=path)
    weights, lse = softmax(scores)
    return neighborhood_av(weights, v.to(wide), where, path=path).to(q.dtype), lse


def inverse_neighborhood(where: Window, grid: Grid) -> list[Spans]:
    """Which queries see a key: on each axis an interval from ``lo`` to before ``hi``, in steps of the dilation.

    What the gradients of keys and values sum over. Near a border it has more or fewer members than the window: without
    stride, key ``j`` of ``n`` is seen from ``0 if j < size else j - right`` to ``n - 1 if j >= n - size else j + left``
    (``left = size // 2``, ``right = size - 1 - left``); on a causal axis from ``j`` to ``min(j + size - 1, n - 1)``.

    >>> from glocal.patterns import Window
    >>> (axis,) = inverse_neighborhood(Window(3), (6,))
    >>> axis.lo.tolist(), axis.hi.tolist()
    ([0, 0, 0, 2, 3, 4], [2, 3, 4, 6, 6, 6])
    """
    where.check(grid)
    found, rank = [], len(grid)
    for axis, length in enumerate(grid):
        size, step, stride = (per_axis(s, rank, "Window")[axis] for s in (where.size, where.dilation, where.stride))
        at = torch.arange(length)
        residue, j = at % step, at // step
        last = (length - residue - 1) // step  # of the residue class
        if per_axis(where.causal, rank, "causal of Window")[axis]:
            lo, hi = j, (j + size - stride) // stride * stride + stride - 1
            hi = torch.where(j + size - 1 >= last, last, torch.minimum(hi, last))
        else:
            # The leader is the centre of its group; all of a group see what the leader does.
            left, centre = size // 2, stride // 2
            lo = -(-(j - (size - 1 - left) - centre) // stride) * stride
            lo = torch.where(j < size, 0, lo)
            hi = torch.minimum((j + left - centre) // stride * stride + stride - 1, last)
            hi = torch.where(j > last - size, last, hi)
        found.append(Spans(residue + lo * step, residue + hi * step + 1, step))
    return found


class _Axis(NamedTuple):
    """Windows on one axis: the first key of each query, the place after its last, the step, and places of a window."""

    lo: Tensor
    hi: Tensor
    step: int
    size: int


class _Tile(NamedTuple):
    """Some queries of a grid, the halo of keys that they see, and where their windows' places lie in it."""

    rows: tuple[slice, ...]
    keys: tuple[slice, ...]
    place: Tensor  # (queries, K)
    live: Tensor | None  # the same shape; None where all are


def _axes(where: Window, grid: Grid) -> list[_Axis]:
    (box,) = where.boxes(grid)
    sizes = per_axis(where.size, len(grid), "size of Window")
    return [_Axis(spans.lo, spans.hi, spans.step, size) for spans, size in zip(box.axes, sizes, strict=True)]


def _cross(tables: Sequence[Tensor], lengths: Sequence[int]) -> Tensor:
    """Tables ``(n, m)`` of one axis each, joined row-major: ``(prod n, prod m)`` of indices in a grid of lengths."""
    out = tables[0]
    for table, length in zip(tables[1:], lengths[1:], strict=True):
        out = (out[:, None, :, None] * length + table[None, :, None, :]).flatten(2).flatten(0, 1)
    return out


def _both(tables: Sequence[Tensor]) -> Tensor:
    """The same for booleans, joined by and."""
    out = tables[0]
    for table in tables[1:]:
        out = (out[:, None, :, None] & table[None, :, None, :]).flatten(2).flatten(0, 1)
    return out


def _places(axis: _Axis) -> tuple[Tensor, Tensor]:
    """Keys of each query's places, ``(L, size)``, and which of them there are."""
    keys = axis.lo[:, None] + torch.arange(axis.size) * axis.step
    live = keys < axis.hi[:, None]
    return torch.where(live, keys, axis.lo[:, None]), live


def _live(axes: Sequence[_Axis]) -> Tensor | None:
    """Which places have a key, ``(*grid, K)``; None where all have."""
    live = [_places(axis)[1] for axis in axes]
    return None if all(bool(table.all()) for table in live) else _both(live).unflatten(0, [len(a.lo) for a in axes])


def _bias(rpb: Tensor, axes: Sequence[_Axis], heads: int) -> Tensor:
    """``(H, *grid, K)`` from a table over offsets."""
    want = (heads, *(2 * axis.size - 1 for axis in axes))
    if tuple(rpb.shape) != want:
        raise ValueError(f"rpb must be {want}; it was {tuple(rpb.shape)}")
    tables = []
    for axis in axes:
        keys, _ = _places(axis)
        tables.append((keys - torch.arange(len(keys))[:, None]) // axis.step + axis.size - 1)
    index = _cross(tables, want[1:]).to(rpb.device)
    bias: Tensor = rpb.flatten(1)[:, index].unflatten(1, [len(axis.lo) for axis in axes])
    return bias


def _check(x: Tensor, y: Tensor, where: Window, path: str, *names: str) -> Grid:
    if not isinstance(where, Window):
        raise TypeError(f"where must be a Window; it was {type(where).__name__}")
    if path not in PATHS:
        raise ValueError(f"path must be one of {', '.join(PATHS)}; it was {path!r}")
    if x.dim() < 4 or x.shape[:-1] != y.shape[:-1] or (names == ("q", "k") and x.shape != y.shape):
        raise ValueError(
            f"{names[0]} and {names[1]} must be (B, H, *grid, ...) of one grid; "
            f"they were {tuple(x.shape)} and {tuple(y.shape)}"
        )
    grid = tuple(x.shape[2:-1])
    where.check(grid)
    return grid


# Three operators, bilinear, each of which has the other two as its derivatives: scores (qk), values (av), and the sum
# over the inverse neighborhood, spread[j] = sum of a[i, place of j] x[i] over the queries i that see j.
# Scores are 0 at places without a key, and weights must be.


class _Operator(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kind: str, x: Tensor, y: Tensor, where: Window, path: str) -> Tensor:
        ctx.save_for_backward(x, y)
        ctx.kind, ctx.how = kind, (where, path)
        return _RUN[kind, path](x, y, where)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x, y), (grad,), how = ctx.saved_tensors, grads, ctx.how
        _, first, second, _, _ = ctx.needs_input_grad
        if ctx.kind == "scores":
            dx = _apply("values", grad, y, *how) if first else None
            dy = _apply("spread", grad, x, *how) if second else None
        elif ctx.kind == "values":
            dx = _apply("scores", grad, y, *how) if first else None
            dy = _apply("spread", x, grad, *how) if second else None
        else:
            dx = _apply("scores", y, grad, *how) if first else None
            dy = _apply("values", x, grad, *how) if second else None
        return None, dx, dy, None, None


def _apply(kind: str, x: Tensor, y: Tensor, where: Window, path: str) -> Tensor:
    out: Tensor = _Operator.apply(kind, x, y, where, path)  # type: ignore[no-untyped-call]
    return out


# Naive: one place of the window at a time, keys gathered by index.


def _one_by_one(where: Window, grid: Grid, device: torch.device) -> Iterator[tuple[int, Tensor, Tensor]]:
    """For each place: its number, the key of each query ``(N,)``, and whether there is one."""
    tables = [_places(axis) for axis in _axes(where, grid)]
    for number, place in enumerate(itertools.product(*[range(keys.shape[1]) for keys, _ in tables])):
        keys = _cross([t[:, o, None] for (t, _), o in zip(tables, place, strict=True)], grid)
        live = _both([t[:, o, None] for (_, t), o in zip(tables, place, strict=True)])
        yield number, keys[:, 0].to(device), live[:, 0].to(device)


def _scores_naive(q: Tensor, k: Tensor, where: Window) -> Tensor:
    grid = tuple(q.shape[2:-1])
    count = math.prod(axis.size for axis in _axes(where, grid))
    flat_q, flat_k = q.flatten(2, -2), k.flatten(2, -2)
    out = q.new_empty(*flat_q.shape[:-1], count)
    for number, keys, live in _one_by_one(where, grid, q.device):
        out[..., number] = (flat_q * flat_k[:, :, keys]).sum(-1).masked_fill_(~live, 0)
    return out.view(*out.shape[:2], *grid, -1)


def _values_naive(a: Tensor, v: Tensor, where: Window) -> Tensor:
    grid = tuple(v.shape[2:-1])
    flat_a, flat_v = a.flatten(2, -2), v.flatten(2, -2)
    out = torch.zeros_like(flat_v, memory_format=torch.contiguous_format)
    for number, keys, _ in _one_by_one(where, grid, a.device):
        out += flat_a[..., number, None] * flat_v[:, :, keys]
    return out.view(*out.shape[:2], *grid, -1)


def _spread_naive(a: Tensor, x: Tensor, where: Window) -> Tensor:
    """Gathered from the queries of the inverse neighborhood, one after the other, so that no two writes meet."""
    grid, axes = tuple(x.shape[2:-1]), _axes(where, tuple(x.shape[2:-1]))
    count = math.prod(axis.size for axis in axes)
    flat_a, flat_x = a.flatten(2), x.flatten(2, -2)
    tables = []
    for axis, span in zip(axes, inverse_neighborhood(where, grid), strict=True):
        queries = span.lo[:, None] + torch.arange(int(span.counts().max())) * span.step
        live = queries < span.hi[:, None]
        queries = torch.where(live, queries, span.lo[:, None])
        place = (torch.arange(len(queries))[:, None] - axis.lo[queries]) // axis.step
        tables.append((queries, place, live))
    out = torch.zeros_like(flat_x, memory_format=torch.contiguous_format)
    sizes = [axis.size for axis in axes]
    for turn in itertools.product(*[range(queries.shape[1]) for queries, _, _ in tables]):
        columns = [[t[:, o, None] for t in table] for table, o in zip(tables, turn, strict=True)]
        queries = _cross([c[0] for c in columns], grid)[:, 0].to(a.device)
        place = _cross([c[1] for c in columns], sizes)[:, 0].to(a.device)
        live = _both([c[2] for c in columns])[:, 0].to(a.device)
        out += (flat_a[..., queries * count + place] * live).unsqueeze(-1) * flat_x[:, :, queries]
    return out.view(*out.shape[:2], *grid, -1)


# Windowed: tiles of queries, each with the contiguous keys that its windows cover. With gaps, each residue class is a
# grid of its own, by slices.


def _cut(axis: _Axis, tile: int) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
    """Tiles of one axis: queries, keys, and ``(queries, size)``: where places lie among the keys, and if there."""
    for residue in range(axis.step):
        first = (axis.lo[residue :: axis.step] - residue) // axis.step
        stop = (axis.hi[residue :: axis.step] - 1 - residue) // axis.step + 1
        for start in range(0, len(first), tile):
            lo, hi = first[start : start + tile], stop[start : start + tile]
            halo = int(lo[0]), int(hi[-1])
            place = lo[:, None] + torch.arange(axis.size)
            live = place < hi[:, None]
            rows = slice(residue + start * axis.step, residue + (start + len(lo) - 1) * axis.step + 1, axis.step)
            keys = slice(residue + halo[0] * axis.step, residue + (halo[1] - 1) * axis.step + 1, axis.step)
            yield rows, keys, torch.where(live, place, lo[:, None]) - halo[0], live


def _tiles(where: Window, grid: Grid, device: torch.device) -> Iterator[_Tile]:
    sizes = _TILE.get(len(grid), (2,) * len(grid))
    axes = [list(_cut(axis, size)) for axis, size in zip(_axes(where, grid), sizes, strict=True)]
    for parts in itertools.product(*axes):
        rows, keys = tuple(p[0] for p in parts), tuple(p[1] for p in parts)
        place = _cross([p[2] for p in parts], [len(range(k.start, k.stop, k.step)) for k in keys])
        some = not all(bool(p[3].all()) for p in parts)
        yield _Tile(rows, keys, place.to(device), _both([p[3] for p in parts]).to(device) if some else None)


def _part(x: Tensor, slices: tuple[slice, ...]) -> Tensor:
    """The tokens of a box, ``(B, H, n, C)``."""
    return x[:, :, *slices].flatten(2, -2)


def _scores_windowed(q: Tensor, k: Tensor, where: Window) -> Tensor:
    grid = tuple(q.shape[2:-1])
    out = q.new_empty(*q.shape[:-1], math.prod(axis.size for axis in _axes(where, grid)))
    for tile in _tiles(where, grid, q.device):
        dense = _part(q, tile.rows) @ _part(k, tile.keys).mT
        part = dense.gather(-1, tile.place.expand(*dense.shape[:2], -1, -1))
        target = out[:, :, *tile.rows]
        target.copy_((part if tile.live is None else part.masked_fill_(~tile.live, 0)).view(target.shape))
    return out


def _dense(a: Tensor, tile: _Tile) -> Tensor:
    """Weights of a tile over all keys of its halo, ``(B, H, queries, keys)``."""
    part = _part(a, tile.rows)
    keys = math.prod(len(range(k.start, k.stop, k.step)) for k in tile.keys)
    # Places without a key have weight 0 and point at the window's first: hence add.
    return part.new_zeros(*part.shape[:-1], keys).scatter_add_(-1, tile.place.expand_as(part), part)


def _values_windowed(a: Tensor, v: Tensor, where: Window) -> Tensor:
    out = torch.empty_like(v, memory_format=torch.contiguous_format)
    for tile in _tiles(where, tuple(v.shape[2:-1]), v.device):
        target = out[:, :, *tile.rows]
        target.copy_((_dense(a, tile) @ _part(v, tile.keys)).view(target.shape))
    return out


def _spread_windowed(a: Tensor, x: Tensor, where: Window) -> Tensor:
    out = torch.zeros_like(x, memory_format=torch.contiguous_format)
    for tile in _tiles(where, tuple(x.shape[2:-1]), x.device):
        target = out[:, :, *tile.keys]
        target += (_dense(a, tile).mT @ _part(x, tile.rows)).view(target.shape)
    return out


_RUN: dict[tuple[str, str], Callable[[Tensor, Tensor, Window], Tensor]] = {
    ("scores", "naive"): _scores_naive,
    ("scores", "windowed"): _scores_windowed,
    ("values", "naive"): _values_naive,
    ("values", "windowed"): _values_windowed,
    ("spread", "naive"): _spread_naive,
    ("spread", "windowed"): _spread_windowed,
}
