"""How attention over a map falls with distance: a part that decays, a constant floor, and the convolution that fits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from glocal.attention import attend
from glocal.inspect.recorder import record
from glocal.inspect.recording import LayerRecord
from glocal.patterns import Full, Pattern
from glocal.shapes import Float

__all__ = ["Locality", "layer_localities", "locality"]

_AT_ONCE = 1 << 22
"""Weights that are held at a time."""


@dataclass(frozen=True, eq=False)
class Locality:
    """Mean attention weight by the offset from query to key: a part that decays with distance, and a constant floor.

    They are ``amplitude * (1 + d^2)^(-exponent / 2) + floor``, ``d`` the distance in tokens, fitted by least squares
    over all pairs of a query and a key. In large diffusion models the exponent is about 2 (Dong et al., 2025, arXiv
    2504.21292, whose analysis this follows; this form and the share of `side` are ours). Made by `locality`,
    `layer_localities` or `Locality.of`.

    >>> row, column = torch.cartesian_prod(torch.arange(16.0), torch.arange(16.0)).unbind(1)
    >>> square = (row[:, None] - row) ** 2 + (column[:, None] - column) ** 2
    >>> found = Locality.of((1 + square) ** -1.5 + 0.001, (16, 16))
    >>> round(found.exponent, 2), round(found.floor, 4), found.side(), found.kernel_size()
    (3.0, 0.001, 11, 7)
    """

    weights: Float[Tensor, "rows columns"]
    """Mean weight of the pairs with each offset, ``(2 H - 1, 2 W - 1)``; a query's own is in the middle."""
    exponent: float
    """Power of the distance with which the decaying part falls; nan where nothing decays."""
    amplitude: float
    """Of the decaying part, at distance 0."""
    floor: float
    """What every key gets, however far."""

    @classmethod
    def of(cls, weights: Float[Tensor, "*lead N N"], grid: tuple[int, int]) -> Locality:
        """Of weights that are at hand.

        Args:
            weights: ``(..., N, N)``, queries by keys; batch, heads and whatever is before them are averaged.
            grid: rows and columns of the map, N together, row by row.

        Raises:
            ValueError: weights that are not those of the grid.
        """
        count = grid[0] * grid[1]
        if weights.dim() < 2 or weights.shape[-2:] != (count, count):
            raise ValueError(f"weights must be (..., {count}, {count}) for grid {grid}; it was {tuple(weights.shape)}")
        sums = _sums(grid, weights.device)
        _add(sums, weights.double().flatten(0, -3).mean(0) if weights.dim() > 2 else weights.double(), 0, grid)
        return cls._fitted(sums / _pairs(grid, weights.device))

    @classmethod
    def _fitted(cls, weights: Tensor) -> Locality:
        square, pairs = _squares(_grid(weights), weights.device), _pairs(_grid(weights), weights.device)
        exponent, amplitude, floor = _fit(square.flatten(), weights.flatten(), pairs.flatten())
        return cls(weights, exponent, amplitude, floor)

    def histogram(self) -> tuple[Tensor, Tensor]:
        """The distances that occur, in tokens, and the mean weight at each, both ``(distances,)``."""
        grid, device = _grid(self.weights), self.weights.device
        square, which = _squares(grid, device).flatten().unique(return_inverse=True)
        pairs = _pairs(grid, device).flatten()
        parts = (pairs * self.weights.flatten(), pairs)
        total, count = (torch.zeros_like(square).index_add(0, which, part) for part in parts)
        return square.sqrt(), total / count

    def within(self, radius: float) -> float:
        """Share of the attention, floor and all, that goes to keys at most this far."""
        mass = _pairs(_grid(self.weights), self.weights.device) * self.weights
        near = _squares(_grid(self.weights), self.weights.device) <= radius**2
        return float(mass[near].sum() / mass.sum())

    def side(self, share: float = 0.95) -> int:
        """The effective receptive field: tokens of a side of the smallest square with ``share`` of what decays.

        The square is around a query, and what it holds is counted above the floor. 1 where nothing decays.

        Raises:
            ValueError: a share out of range.
        """
        if not 0 < share <= 1:
            raise ValueError(f"share must be above 0 and at most 1; it was {share}")
        rows, columns = _grid(self.weights)
        # What lies below the floor counts against what lies above, or noise far away would make a field.
        above = _pairs((rows, columns), self.weights.device) * (self.weights - self.floor)
        if self.amplitude == 0:
            return 1
        total, longest = above.sum() * (1 - 1e-9), max(rows, columns)
        for radius in range(longest):
            r, c = min(radius, rows - 1), min(radius, columns - 1)
            if above[rows - 1 - r : rows + r, columns - 1 - c : columns + c].sum() >= share * total:
                return 2 * radius + 1
        return 2 * longest - 1

    def kernel_size(self, share: float = 0.6) -> int:
        """The convolution that the paper puts in its place: ``share`` of `side`, to the nearest odd number."""
        return 2 * int(share * self.side() / 2) + 1


@torch.no_grad()
def locality(
    q: Float[Tensor, "B H rows columns D"],
    k: Float[Tensor, "B Hkv rows columns D"],
    *,
    scale: float | None = None,
    where: Pattern | None = None,
) -> Locality:
    """How softmax attention over a map falls with distance; weights are rebuilt for some queries at a time.

    Args:
        q: queries ``(B, H, rows, columns, D)``; batch and heads are averaged.
        k: keys ``(B, Hkv, rows, columns, D)``, H a multiple of Hkv.
        scale: of the scores; ``D ** -0.5`` where None.
        where: what a query sees; every key where None.

    Raises:
        ValueError: tensors that are no maps of one size.

    >>> q, k = torch.randn(2, 1, 2, 8, 6, 4).unbind()
    >>> locality(0 * q, k).within(2) < 0.25
    True
    """
    if q.dim() != 5 or k.dim() != 5 or q.shape[2:] != k.shape[2:] or q.shape[1] % k.shape[1] or len(q) != len(k):
        raise ValueError(
            "q and k must be (B, heads, rows, columns, D) over one map, heads of q a multiple of those of k; they were "
            f"{tuple(q.shape)} and {tuple(k.shape)}"
        )
    rows, columns = q.shape[2:4]
    grid, count = (rows, columns), rows * columns
    where, scale = Full() if where is None else where, q.shape[-1] ** -0.5 if scale is None else scale
    q, k = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (q, k))
    _, lse = attend(q, k, k, where, scale=scale, return_lse=True)
    lse = lse.flatten(2)[..., None]
    keys = k.flatten(2, 3).repeat_interleave(q.shape[1] // k.shape[1], 1).mT
    sums, start = _sums(grid, q.device), 0
    for some in q.flatten(2, 3).split(max(1, _AT_ONCE // (len(q) * q.shape[1] * count)), 2):
        at = torch.arange(start, start + some.shape[2], device=q.device)
        share = (some @ keys * scale - lse[:, :, at]).exp().masked_fill(~where.rows(at, grid, grid), 0)
        _add(sums, share.double().mean((0, 1)), start, grid)
        start += some.shape[2]
    return Locality._fitted(sums / _pairs(grid, q.device))


def layer_localities(model: nn.Module, *inputs: Any, **options: Any) -> dict[str, Locality]:
    """`locality` of each layer that attends over maps, by its name, in one call of the model.

    It looks at each `glocal.nn.Attention` that is softmax under a pattern.

    Args:
        model: is called as ``model(*inputs, **options)``, without gradients.

    Raises:
        ValueError: a layer that adds to its scores, caps them or has padding; no layer over a map was called, or one
            twice.

    >>> from glocal.nn import MLP, Attention, Block
    >>> layer_localities(Block(8, Attention(8, 2), MLP(8, 8)), torch.randn(1, 6, 6, 8)).keys()
    dict_keys(['attention'])
    """
    found: dict[str, Locality] = {}
    for layer in record(model, inputs, **options) if inputs else record(model, options):
        if len(layer.grid_q) == 2 and not layer.cross:
            if layer.name in found:
                raise ValueError(
                    f"layer {layer.name!r} was called twice: call model once, with all there is in a batch"
                )
            found[layer.name] = _of_layer(layer)
    if not found:
        raise ValueError("model must call layers that attend over maps (B, H, W, dim); it called none")
    return found


def _of_layer(layer: LayerRecord) -> Locality:
    if layer.tensors.keys() & {"bias", "table"} or layer.softcap or layer.real is not None:
        raise ValueError(
            f"layer {layer.name!r} adds to its scores, caps them or has padding: give `locality` what it computes with"
        )
    q, k = layer.q.unflatten(2, layer.grid_q), layer.k.unflatten(2, layer.grid_k)
    return locality(q, k, scale=layer.scale, where=layer.where)


def _grid(weights: Tensor) -> tuple[int, int]:
    return (weights.shape[0] + 1) // 2, (weights.shape[1] + 1) // 2


def _away(size: int, device: torch.device) -> Tensor:
    """Offsets along an axis, ``(2 size - 1,)``."""
    return torch.arange(1 - size, size, device=device, dtype=torch.float64)


def _squares(grid: tuple[int, int], device: torch.device) -> Tensor:
    """Squared distance of each offset."""
    return _away(grid[0], device)[:, None] ** 2 + _away(grid[1], device) ** 2


def _pairs(grid: tuple[int, int], device: torch.device) -> Tensor:
    """How many pairs of a query and a key have each offset."""
    rows, columns = (size - _away(size, device).abs() for size in grid)
    return rows[:, None] * columns


def _sums(grid: tuple[int, int], device: torch.device) -> Tensor:
    return torch.zeros(2 * grid[0] - 1, 2 * grid[1] - 1, dtype=torch.float64, device=device)


def _add(sums: Tensor, weights: Tensor, start: int, grid: tuple[int, int]) -> None:
    """Add weights ``(n, N)`` of the queries from ``start`` to the sums of their offsets."""
    key = torch.arange(grid[0] * grid[1], device=weights.device)
    query = torch.arange(start, start + len(weights), device=weights.device)[:, None]
    row = key // grid[1] - query // grid[1] + grid[0] - 1
    column = key % grid[1] - query % grid[1] + grid[1] - 1
    sums.view(-1).index_add_(0, (row * (2 * grid[1] - 1) + column).flatten(), weights.flatten())


def _fit(square: Tensor, weights: Tensor, pairs: Tensor) -> tuple[float, float, float]:
    """Exponent, amplitude and floor: for each exponent of a fine row the best other two, none below zero."""
    low, high = 0.05, 20.0
    best = 0.0, 0.0, 0.0
    mean = (pairs * weights).sum() / pairs.sum()
    for _ in range(3):  # each row spans two steps of the one before
        powers = torch.linspace(low, high, 201, dtype=torch.float64, device=square.device)
        shape = (1 + square) ** (-powers[:, None] / 2)
        centre = (pairs * shape).sum(1, keepdim=True) / pairs.sum()
        amplitude = (pairs * (shape - centre) * (weights - mean)).sum(1) / (pairs * (shape - centre) ** 2).sum(1)
        floor = mean - amplitude * centre[:, 0]
        alone = (pairs * shape * weights).sum(1) / (pairs * shape**2).sum(1)
        amplitude = torch.where(floor < 0, alone, amplitude).clamp(min=0).nan_to_num()  # nan on a map of one token
        floor = torch.where(amplitude == 0, mean, floor.clamp(min=0))
        error = (pairs * (amplitude[:, None] * shape + floor[:, None] - weights) ** 2).sum(1)
        at = int(error.argmin())
        best = float(powers[at]), float(amplitude[at]), float(floor[at])
        step = (high - low) / 200
        low, high = max(0.05, best[0] - step), min(20.0, best[0] + step)
    if best[1] <= 1e-9 * best[2]:  # nothing but the rounding of equal weights
        return torch.nan, 0.0, float(mean)
    return best
