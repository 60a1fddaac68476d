"""How far heads of a vision transformer look, ring by ring around each patch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from glocal.inspect.metrics import Metric
from glocal.inspect.recording import Record, Tile

__all__ = ["class_map", "patch_distance", "patch_entropy", "ring_mass", "ring_strength"]


def _grid(tile: Tile, first: int) -> tuple[int, int]:
    """Rows and columns of patches, where ``first`` tokens come before them: the layer's grid, or a square.

    Raises:
        ValueError: the tokens after those are no square.
    """
    grid = tile.layer.grid_k
    if len(grid) == 2 and not first:
        return grid[0], grid[1]
    side = math.isqrt(max(0, tile.layer.keys - first))
    if side * side != tile.layer.keys - first or not side:
        raise ValueError(f"grid must be given: {tile.layer.keys} tokens without the first {first} are no square")
    return side, side


def ring_mass(grid: tuple[int, int] | None = None, first: int = 1) -> Metric:
    """How much of a patch's attention goes to each ring of patches around it, and last to the tokens before patches.

    Ring ``r`` is the patches whose row or column is ``r`` away and neither is more (Chebyshev distance). The numbers of
    a patch add up to 1, and so do their means in `glocal.inspect.measure`, which is over patches.

    Args:
        grid: rows and columns of patches; a square, or the layer's own grid, where None.
        first: tokens before the patches: 1 for a class token, 0 where there is none.

    Returns:
        A metric ``(B, H, R, rings + 1)``; ``rings`` is the longer side of the grid.
    """

    def metric(tile: Tile) -> Tensor:
        rings, share = _rings(tile, grid, first)
        return torch.cat([_sums(tile, rings, first), tile.weights[..., :first].sum(-1, keepdim=True)], -1) * share

    return metric


def ring_strength(grid: tuple[int, int] | None = None, first: int = 1) -> Metric:
    """What a patch pays each patch of a ring, on average: the ring's mass by how many patches it has.

    Rings are cut off at the border; the mean is over those patches that have a patch in the ring.

    Args:
        grid, first: as in `ring_mass`.

    Returns:
        A metric ``(B, H, R, rings)``.
    """

    def metric(tile: Tile) -> Tensor:
        rings, share = _rings(tile, grid, first)
        sizes = rings.sum(-2)  # (R, rings)
        everywhere, _ = _rings(tile, grid, first, torch.arange(tile.layer.queries, device=tile.rows.device))
        having = (everywhere.sum(-2) > 0).sum(0)
        patches = tile.layer.queries - first
        factor = torch.where(sizes > 0, 1 / sizes.clamp_min(1), 0.0) * (patches / having)
        return _sums(tile, rings, first) * (factor * share).to(tile.weights.dtype)

    return metric


def patch_distance(grid: tuple[int, int] | None = None, first: int = 1) -> Metric:
    """Mean Euclidean distance, in patches, of what a patch attends to among the patches.

    Args:
        grid, first: as in `ring_mass`.
    """

    def metric(tile: Tile) -> Tensor:
        rows, columns = grid or _grid(tile, first)
        place = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).double().to(tile.rows.device)
        away = torch.cdist(place, place)[(tile.rows - first).clamp_min(0)]
        weights, share = _patches(tile, first)
        return (weights * away).sum(-1) * share

    return metric


def patch_entropy(first: int = 1) -> Metric:
    """How evenly a patch attends to the patches: the entropy of its weights among them, in nats.

    Args:
        first: as in `ring_mass`.
    """

    def metric(tile: Tile) -> Tensor:
        weights, share = _patches(tile, first)
        found: Tensor = torch.special.entr(weights).sum(-1) * share
        return found

    return metric


@torch.no_grad()
def class_map(record: Record) -> Tensor:
    """What the class token, the first one, attends to, the mean over images, ``(layers, H, N)`` in float64.

    Args:
        record: with attention, of layers with as many heads and tokens.

    >>> from glocal.inspect import record
    >>> from glocal.nn import Attention
    >>> class_map(record(Attention(8, 2, scale=0.0), torch.randn(3, 5, 8)))[0, 0].round(decimals=4).tolist()
    [0.2, 0.2, 0.2, 0.2, 0.2]
    """
    first = torch.zeros(1, dtype=torch.long, device=record[0].q.device)
    return torch.stack([layer.weights(first)[:, :, 0].double().mean(0) for layer in record])


def _patches(tile: Tile, first: int) -> tuple[Tensor, Tensor]:
    """Weights among patches, which add up to 1, ``(B, H, R, patches)``; and as `_share`."""
    weights = tile.weights[..., first:].double()
    return weights / weights.sum(-1, keepdim=True).clamp_min(1e-300), _share(tile, first)


def _share(tile: Tile, first: int) -> Tensor:
    """0 for queries before the patches, else how many queries there are for a patch: means are over all queries."""
    return (tile.rows >= first).double() * tile.layer.queries / (tile.layer.queries - first)


def _rings(
    tile: Tile, grid: tuple[int, int] | None, first: int, queries: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Which patch is in which ring of which query, booleans ``(R, patches, rings)``; and as `_share`, ``(R, 1)``."""
    rows, columns = grid or _grid(tile, first)
    if rows * columns + first != tile.layer.keys:
        raise ValueError(f"grid must be of {tile.layer.keys - first} patches; it was {rows} x {columns}")
    queries = tile.rows if queries is None else queries
    key = torch.arange(rows * columns, device=queries.device)
    at = (queries - first)[:, None]
    apart = torch.maximum((at // columns - key // columns).abs(), (at % columns - key % columns).abs())
    inside = apart[..., None] == torch.arange(max(rows, columns), device=queries.device)
    return inside & (at >= 0)[..., None], _share(tile, first).to(tile.weights.dtype)[:, None]


def _sums(tile: Tile, rings: Tensor, first: int) -> Tensor:
    """``(B, H, R, rings)``."""
    return torch.einsum("bhrk,rkn->bhrn", tile.weights[..., first:], rings.to(tile.weights.dtype))
