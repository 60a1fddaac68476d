"""The nearest of some points: a task that one head of full rank can do at any length, and that low-rank heads cannot.

Amsel et al., 2024, arXiv 2407.16153.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, relu

from glocal.bench.table import Table
from glocal.nn import Attention
from glocal.shapes import Float

__all__ = ["NearestPoint", "PointEncoder", "Points", "RankResult", "rank_table", "squared_error", "train_points"]


class Points(NamedTuple):
    """A batch of the task."""

    points: Float[Tensor, "B M d"]
    queries: Float[Tensor, "B N d"]
    targets: Float[Tensor, "B N d"]


@dataclass(frozen=True)
class NearestPoint:
    """Points on the sphere; the target of each query is the point nearest to it.

    Args:
        dim: channels, d.
        points: of one item, before they are doubled.
        queries: of one item; None makes the points themselves the queries, the target being the point farthest away.
        kind: ``"uniform"``, ``"orthogonal"`` points, or ``"doubled"``: each point and its opposite.

    Raises:
        ValueError: numbers below 1, more orthogonal points than channels, another kind.

    >>> batch = NearestPoint(3, 5, queries=2).batch(4, torch.Generator().manual_seed(0))
    >>> [tuple(t.shape) for t in batch]
    [(4, 5, 3), (4, 2, 3), (4, 2, 3)]
    """

    dim: int
    points: int
    queries: int | None = None
    kind: Literal["uniform", "orthogonal", "doubled"] = "uniform"

    def __post_init__(self) -> None:
        for name in ("dim", "points", "queries"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1; it was {value}")
        if self.kind not in ("uniform", "orthogonal", "doubled"):
            raise ValueError(f"kind must be 'uniform', 'orthogonal' or 'doubled'; it was {self.kind!r}")
        if self.kind == "orthogonal" and self.points > self.dim:
            raise ValueError(f"orthogonal points must be at most dim {self.dim}; it was {self.points}")

    def batch(self, size: int, generator: torch.Generator) -> Points:
        """Draw ``size`` items, in float32 on the generator's device."""

        def sphere(count: int) -> Tensor:
            drawn = torch.randn(size, count, self.dim, generator=generator, device=generator.device)
            return normalize(drawn, dim=-1)

        if self.kind == "orthogonal":
            square = torch.randn(size, self.dim, self.dim, generator=generator, device=generator.device)
            points = torch.linalg.qr(square)[0].mT[:, : self.points]
        else:
            points = sphere(self.points)
        if self.kind == "doubled":
            points = torch.cat([points, -points], 1)
        queries = points if self.queries is None else sphere(self.queries)
        scores = queries @ points.mT
        nearest = scores.argmin(-1) if self.queries is None else scores.argmax(-1)
        return Points(points, queries, points.gather(1, nearest[..., None].expand(-1, -1, self.dim)))


def squared_error(found: Float[Tensor, "B N d"], targets: Float[Tensor, "B N d"]) -> Tensor:
    """Squared error summed over channels, the mean over queries: 1 for answers of zero.

    >>> squared_error(torch.zeros(1, 2, 3), torch.eye(3)[None, :2])
    tensor(1.)
    """
    return (found - targets).square().sum(-1).mean()


class _SphereNorm(nn.Module):
    """A learned length for the whole vector."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        """``(..., d)`` to the same."""
        out: Tensor = self.scale * normalize(x, dim=-1)
        return out


class _EncoderLayer(nn.Module):
    """Post-norm encoder layer; ``width`` attention modules are averaged, which is one of ``width`` times the heads."""

    def __init__(self, dim: int, num_heads: int, hidden: int, width: int) -> None:
        super().__init__()
        rank = dim // num_heads
        self.width = width
        self.attention = Attention(dim, width * num_heads, head_dim=rank, qkv_bias=True, out_bias=True)
        self.linear1, self.linear2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.norm1, self.norm2 = _SphereNorm(), _SphereNorm()
        # As torch draws each module of its own layer: the input projections by Xavier's rule for the three together.
        limit = (6 / (4 * dim)) ** 0.5
        for linear in (self.attention.q_proj, self.attention.k_proj, self.attention.v_proj):
            nn.init.uniform_(linear.weight, -limit, limit)
            nn.init.zeros_(linear.bias)
        nn.init.uniform_(self.attention.o_proj.weight, -(dim**-0.5), dim**-0.5)
        nn.init.zeros_(self.attention.o_proj.bias)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, N, dim)`` to the same."""
        x = self.norm1(x + self.attention(x) / self.width)
        out: Tensor = self.norm2(x + self.linear2(relu(self.linear1(x))))
        return out


class PointEncoder(nn.Module):
    """The transformer of the sweep over rank, heads and depth: points to the point farthest from each.

    Post-norm encoder layers whose norms give the whole vector one learned length, with no dropout.

    Args:
        dim: channels of a point.
        num_heads: of one attention module; each has rank ``(dim + position_dim) / num_heads``.
        num_layers: depth.
        width: attention modules side by side in a layer, averaged: ``width * num_heads`` heads in all.
        hidden: of the feed-forward.
        position_dim: channels of learned positions that are appended; heads divide them too.
        add_positions: learned positions are added.
        max_points: as many positions as there are.

    Raises:
        ValueError: heads that do not divide the channels, numbers below 1, positions without ``max_points``.

    >>> PointEncoder(8, 2, 1, width=4, hidden=16)(torch.randn(3, 5, 8)).shape
    torch.Size([3, 5, 8])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_layers: int,
        *,
        width: int = 1,
        hidden: int = 2048,
        position_dim: int = 0,
        add_positions: bool = False,
        max_points: int = 0,
    ) -> None:
        super().__init__()
        given = {"dim": dim, "num_heads": num_heads, "num_layers": num_layers, "width": width, "hidden": hidden}
        for name, value in given.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1; it was {value}")
        inner = dim + position_dim
        if inner % num_heads:
            raise ValueError(f"num_heads must divide dim + position_dim {inner}; it was {num_heads}")
        if (position_dim or add_positions) and max_points < 1:
            raise ValueError(f"max_points must be at least 1 for positions; it was {max_points}")
        self.dim = dim
        self.appended = nn.Parameter(torch.empty(max_points, position_dim).uniform_(-1, 1)) if position_dim else None
        self.added = nn.Parameter(torch.randn(max_points, dim)) if add_positions else None
        self.layers = nn.ModuleList([_EncoderLayer(inner, num_heads, hidden, width) for _ in range(num_layers)])

    def forward(self, points: Float[Tensor, "B N d"], context: None = None) -> Float[Tensor, "B N d"]:
        """``(B, N, dim)`` to the same; there is no context.

        Raises:
            ValueError: more points than positions, or a context.
        """
        if context is not None:
            raise ValueError("PointEncoder attends to its own points; context must be None")
        count = points.shape[1]
        for positions in (self.added, self.appended):
            if positions is not None and count > len(positions):
                raise ValueError(f"points must be at most max_points {len(positions)}; it was {count}")
        x = points if self.added is None else points + self.added[:count]
        if self.appended is not None:
            x = torch.cat([x, self.appended[:count].expand(len(x), -1, -1)], -1)
        for layer in self.layers:
            x = layer(x)
        return x[..., : self.dim]


def train_points(
    model: nn.Module,
    task: NearestPoint,
    *,
    steps: int = 2000,
    batch: int = 128,
    lr: float = 0.01,
    seed: int = 0,
    held: int = 4096,
) -> float:
    """Train on fresh batches by Adam with a one-cycle rate, and give the `squared_error` on ``held`` fresh items.

    Args:
        model: called as ``model(queries, points)``, or ``model(points)`` where the task has no queries of its own; its
            weights are changed.
        task: what to learn.
        steps, batch, lr, seed: of training; ``lr`` is the highest rate.
        held: items to measure on, drawn apart from those of training.

    >>> from glocal.nn import LowRankAttention
    >>> train_points(LowRankAttention(4, 2), NearestPoint(4, 3, queries=2), steps=2, held=16) > 0
    True
    """
    draw = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)

    def error(given: Points) -> Tensor:
        inputs: tuple[Any, ...] = (given.points,) if task.queries is None else (given.queries, given.points)
        return squared_error(model(*inputs), given.targets)

    for _ in range(steps):
        error(task.batch(batch, draw)).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    fresh = torch.Generator().manual_seed(10_000 + seed)
    with torch.no_grad():
        sizes = [min(256, held - start) for start in range(0, held, 256)]
        return sum(float(error(task.batch(size, fresh))) * size for size in sizes) / held


class RankResult(NamedTuple):
    """What a trained network leaves of the error."""

    rank: int
    heads: int
    depth: int
    error: float
    """Of `squared_error`; 1 for answers of zero."""


def rank_table(results: Iterable[RankResult]) -> Table:
    """Errors by rank, heads and depth, those that took part in the same number of channels beside each other.

    >>> rank_table([RankResult(8, 1, 1, 0.05)]).rows
    (('8', '1', '1', '8', '0.050'),)
    """
    header = ("rank", "heads", "depth", "rank x heads", "error")
    legend = (
        "channels of a query and of a key",
        "of one layer",
        "layers",
        "what parameters of queries and keys grow with",
        "squared error of the point found, mean over queries; 1 for answers of zero",
    )
    rows = [
        (str(r.rank), str(r.heads), str(r.depth), str(r.rank * r.heads), f"{r.error:.3f}")
        for r in sorted(results, key=lambda r: (r.depth, r.rank * r.heads, -r.rank))
    ]
    return Table("The nearest point by heads of each rank", header, legend, tuple(rows))
