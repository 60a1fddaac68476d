"""Numbers of each head, from a record: how far it looks, how evenly, what draws it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from glocal.inspect.recording import Record, Tile
from glocal.patterns.boxes import coordinates
from glocal.steer.rhythm import Rhythm, rhythm_of_rows

__all__ = [
    "METRICS",
    "Metric",
    "entropy",
    "future_influence",
    "local_mass",
    "mean_distance",
    "measure",
    "offset_mass",
    "pair_distance",
    "sink_mass",
    "token_rhythm",
]

Metric = Callable[[Tile], Tensor]
"""Of some rows of a layer's attention, a number of each query and head, ``(B, H, R)``, or more, ``(B, H, R, ...)``.

NaN for queries that do not count.
"""


@torch.no_grad()
def measure(record: Record, metrics: Iterable[str] | Mapping[str, Metric]) -> dict[str, Tensor]:
    """Metrics of each head of each layer: the mean over queries that are no padding and see a key.

    All of them are computed in one pass over the rows, a few at a time, so that no map is held.

    Args:
        record: with attention, of `glocal.inspect.record`.
        metrics: names of `METRICS`, or metrics by names of one's own; any function of a `Tile` is one.

    Returns:
        Each metric ``(layers, H)`` in float64, or ``(layers, H, ...)``; NaN where no query counts, and for heads that a
        layer has not.

    Raises:
        ValueError: no such metric.

    >>> from glocal.inspect import record
    >>> from glocal.nn import Attention
    >>> found = measure(record(Attention(8, 2, scale=0.0), torch.randn(1, 16, 8)), ["entropy", "sink"])
    >>> found["entropy"].exp().round(decimals=4).tolist(), found["sink"].tolist()
    ([[16.0, 16.0]], [[0.0625, 0.0625]])
    """
    if not isinstance(metrics, Mapping):
        names = [metrics] if isinstance(metrics, str) else list(metrics)
        for name in names:
            if name not in METRICS:
                raise ValueError(f"metrics must be of {', '.join(METRICS)}; one was {name!r}")
        metrics = {name: METRICS[name] for name in names}
    rows: dict[str, list[Tensor]] = {name: [] for name in metrics}
    for layer in record:
        sums: dict[str, Tensor] = {}
        for tile in layer.tiles():
            asks = tile.asks
            for name, metric in metrics.items():
                value = metric(tile).double()
                counts = asks.view(*asks.shape, *(1,) * (value.dim() - 3)) & ~value.isnan()
                total = torch.stack([value.masked_fill(~counts, 0), counts.double()]).sum((1, 3))
                sums[name] = sums[name] + total if name in sums else total
        for name, (total, count) in sums.items():  # 0 / 0 is the NaN of heads that nobody asked
            rows[name].append(total / count)
    return {name: stacked(parts) for name, parts in rows.items()}


def stacked(parts: Sequence[Tensor]) -> Tensor:
    """Layers as one tensor; NaN for heads, or other places, that a layer has not."""
    sizes = [max(each) for each in zip(*(part.shape for part in parts), strict=True)]
    found = parts[0].new_full((len(parts), *sizes), torch.nan)
    for n, part in enumerate(parts):
        found[n][tuple(slice(size) for size in part.shape)] = part
    return found


def pair_distance(tile: Tile) -> Tensor:
    """From each query of a tile to each key, in tokens, ``(R, Nk)``: Euclidean on grids of several axes."""
    layer = tile.layer
    keys = torch.arange(layer.keys, device=tile.rows.device)
    ahead = [there - here for here, there in zip(layer.grid_q, layer.grid_k, strict=True)]  # queries come last
    axes = zip(coordinates(tile.rows, layer.grid_q), coordinates(keys, layer.grid_k), ahead, strict=True)
    steps = [(j - i[:, None] - more).double() for i, j, more in axes]
    return steps[0].abs() if len(steps) == 1 else torch.stack(steps).square().sum(0).sqrt()


def mean_distance(tile: Tile) -> Tensor:
    """How far a query looks: the mean distance of keys by their weights, in tokens, ``(B, H, R)``."""
    return (tile.weights * pair_distance(tile).to(tile.weights.dtype)).sum(-1)


def entropy(tile: Tile) -> Tensor:
    """How evenly a query looks: the entropy of its weights, in nats, ``(B, H, R)``."""
    found: Tensor = torch.special.entr(tile.weights).sum(-1)
    return found


def local_mass(window: float = 8) -> Metric:
    """How much of a query's attention goes to keys less than ``window`` tokens away, itself among them."""
    return lambda tile: (tile.weights * (pair_distance(tile) < window)).sum(-1)


def sink_mass(sinks: int = 1) -> Metric:
    """How much of a query's attention goes to the first ``sinks`` keys that are no padding."""

    def metric(tile: Tile) -> Tensor:
        real = tile.layer.real
        if real is None or real.shape[-1] != tile.weights.shape[-1]:
            return tile.weights[..., :sinks].sum(-1)
        first = (real.cumsum(-1) <= sinks) & real
        return (tile.weights * first[:, None, None]).sum(-1)

    return metric


def offset_mass(offset: int = 1) -> Metric:
    """How much of a query's attention goes to the key that stands ``offset`` tokens before it, on a sequence.

    Queries without such a key give 0.
    """

    def metric(tile: Tile) -> Tensor:
        at, count = tile.at - offset, tile.weights.shape[-1]
        inside = (at >= 0) & (at < count)
        place = at.clamp(0, count - 1)[:, None].expand(*tile.weights.shape[:-1], 1)
        return tile.weights.gather(-1, place)[..., 0] * inside

    return metric


def future_influence(low: int = 10, high: int = 50) -> Metric:
    """How much a key is looked back at: the mean of the attention that queries ``low`` to ``high`` tokens on pay it.

    The mean over keys that have such queries (future attention influence of Li et al., 2025, arXiv 2510.13554; of each
    token, `glocal.inspect.token_rhythm`). On a sequence, in self-attention.

    Raises:
        ValueError: bounds that are no range.
    """
    if not 0 <= low <= high:
        raise ValueError(f"low and high must be a range of distances, 0 <= low <= high; they were {low} and {high}")

    def metric(tile: Tile) -> Tensor:
        layer, count = tile.layer, tile.weights.shape[-1]
        key = torch.arange(count, device=tile.rows.device)
        real = key.new_ones(1, layer.queries) if layer.real is None else layer.real
        real = torch.nn.functional.pad(real.double(), (count - layer.queries, 0))
        before = torch.nn.functional.pad(real.cumsum(1), (1, 0))
        # How many queries look back at each key, (B or 1, Nk); padding is nobody's key.
        looking = before[:, (key + high + 1).clamp(max=count)] - before[:, (key + low).clamp(max=count)]
        if layer.queries == count:
            looking = looking * real
        share = torch.where(looking > 0, 1 / looking, 0.0) * real.sum() / (looking > 0).sum()
        back = tile.at[:, None] - key
        within = (back >= low) & (back <= high)
        return (tile.weights * within * share[:, None, None].to(tile.weights.dtype)).sum(-1)

    return metric


@torch.no_grad()
def token_rhythm(record: Record, response: Tensor | None = None, **settings: Any) -> Rhythm:
    """Windowed average attention distance and future attention influence of each token (`glocal.steer.Rhythm`).

    Args:
        record: with attention, of self-attention over one sequence, every layer with as many heads.
        response: which positions count, booleans ``(B, N)``; all that are no padding where None.
        **settings: ``window``, ``horizon``, ``share`` and ``sinks`` of `glocal.steer.rhythm`.

    Raises:
        ValueError: as `glocal.steer.rhythm`.

    >>> from glocal.inspect import record
    >>> from glocal.nn import Attention
    >>> found = token_rhythm(record(Attention(8, 2, causal=True, scale=0.0), torch.randn(1, 30, 8)), window=30)
    >>> found.waad[0, :4].round(decimals=4).tolist()  # all keys alike
    [0.0, 0.5, 1.0, 1.5]
    """
    first = record[0]
    real = torch.ones(len(first.q), first.queries, dtype=torch.bool) if first.real is None else first.real
    rows = (((tile.rows, tile.weights) for tile in layer.tiles()) for layer in record)
    return rhythm_of_rows(rows, real if response is None else response, real=first.real, **settings)


METRICS: dict[str, Metric] = {
    "distance": mean_distance,
    "entropy": entropy,
    "local": local_mass(),
    "sink": sink_mass(),
    "previous": offset_mass(1),
    "future": future_influence(),
}
"""Metrics by name, with their usual settings."""
