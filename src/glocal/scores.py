"""Biases that depend on where a key lies relative to its query, which every kernel can apply tile by tile.

Each becomes one table over offsets, of size the sum of the axes and not N x N: entry ``o`` of an axis holds the
offset ``key - query = o - (Lk - 1)``, queries being the last positions of the keys. Gradients flow to the parameters.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from glocal.kernels.common import offset_index
from glocal.patterns.boxes import Grid


class Score(ABC):
    """A bias over offsets."""

    @abstractmethod
    def table(self, grid_q: Grid, grid_k: Grid) -> Tensor:
        """The bias at every offset: ``(H or 1, *[Lq + Lk - 1 for each axis])``."""

    def dense(self, grid_q: Grid, grid_k: Grid) -> Tensor:
        """The same bias for every pair: ``(H or 1, Nq, Nk)``, for looking and testing."""
        table = self.table(grid_q, grid_k)
        q, k = (torch.arange(math.prod(grid), device=table.device) for grid in (grid_q, grid_k))
        return table.flatten(1)[:, offset_index(q, k, grid_q, grid_k)]


def offsets(grid_q: Grid, grid_k: Grid, axis: int, device: torch.device) -> Tensor:
    """Offsets ``key - query`` on one axis in table order: from ``-(Lk - 1)`` to ``Lq - 1``, plus nothing."""
    queries, keys = grid_q[axis], grid_k[axis]
    return torch.arange(max(0, queries + keys - 1), device=device) - (keys - 1)


@dataclass(frozen=True, eq=False)
class RelativePosition(Score):
    """A learned bias for each head and offset: ``values (H, *[2 r + 1 for each axis])``, offsets ``-r`` to ``r``.

    Offsets are key minus query, in steps of ``dilation`` (as in NAT and DiNAT, Hassani et al., 2022, arXiv
    2204.07143). What the table does not cover gets no bias.

    Raises:
        ValueError: at use, where the table's axes are not those of the grid.

    >>> import torch
    >>> from glocal.scores import RelativePosition
    >>> RelativePosition(torch.tensor([[1.0, 2.0, 3.0]])).dense((3,), (3,)).int().tolist()
    [[[2, 3, 0], [1, 2, 3], [0, 1, 2]]]
    """

    values: Tensor
    dilation: int | tuple[int, ...] = 1

    def __post_init__(self) -> None:
        if self.values.dim() < 2 or any(n % 2 == 0 for n in self.values.shape[1:]):
            raise ValueError(
                f"values of RelativePosition must be (H, 2 r + 1, ...), odd on every axis; "
                f"it was {tuple(self.values.shape)}"
            )

    def table(self, grid_q: Grid, grid_k: Grid) -> Tensor:
        rank = len(grid_k)
        if self.values.dim() != rank + 1:
            raise ValueError(f"values of RelativePosition have {self.values.dim() - 1} axes, the grid has {rank}")
        dilation = self.dilation if isinstance(self.dilation, tuple) else (self.dilation,) * rank
        out = self.values
        for axis in range(rank):
            offset = offsets(grid_q, grid_k, axis, out.device)
            radius = self.values.shape[axis + 1] // 2
            step = torch.div(offset, dilation[axis], rounding_mode="floor")
            covered = (offset % dilation[axis] == 0) & (step.abs() <= radius)
            shape = [1] * (rank + 1)
            shape[axis + 1] = -1
            out = out.index_select(axis + 1, (step + radius).clamp(0, 2 * radius)) * covered.view(shape)
        return out


@dataclass(frozen=True, eq=False)
class ALiBi(Score):
    """Attention with linear biases on a sequence: ``-slopes[h] * |key - query|``. ``slopes`` is ``(H,)``.

    Press et al., 2021, arXiv 2108.12409. ``ALiBi.of(num_heads)`` has the paper's slopes.

    >>> from glocal.scores import ALiBi
    >>> ALiBi.of(2).dense((1,), (3,))[:, 0, :2].tolist()
    [[-0.125, -0.0625], [-0.0078125, -0.00390625]]
    """

    slopes: Tensor

    @staticmethod
    def of(num_heads: int) -> ALiBi:
        """The paper's slopes: a geometric series; other than powers of two are filled from the next one."""

        def series(n: int) -> list[float]:
            return [2 ** (-8 * (i + 1) / n) for i in range(n)]

        power = 2 ** math.floor(math.log2(num_heads))
        return ALiBi(torch.tensor(series(power) + series(2 * power)[::2][: num_heads - power]))

    def table(self, grid_q: Grid, grid_k: Grid) -> Tensor:
        _sequence(grid_k, "ALiBi")
        return -self.slopes[:, None] * offsets(grid_q, grid_k, 0, self.slopes.device).abs()


@dataclass(frozen=True, eq=False)
class T5Buckets(Score):
    """T5's relative bias on a sequence: ``values (num_buckets, H)``, exact near, logarithmic far.

    Raffel et al., 2019, arXiv 1910.10683. With ``bidirectional=False`` (decoders) keys after the query share
    bucket 0. ``values`` has the layout of T5's ``relative_attention_bias.weight``.

    >>> import torch
    >>> from glocal.scores import T5Buckets
    >>> T5Buckets(torch.arange(4.0)[:, None], max_distance=8).dense((3,), (3,)).int().tolist()
    [[[0, 3, 3], [1, 0, 3], [1, 1, 0]]]
    """

    values: Tensor
    bidirectional: bool = True
    max_distance: int = 128

    def table(self, grid_q: Grid, grid_k: Grid) -> Tensor:
        _sequence(grid_k, "T5Buckets")
        offset = offsets(grid_q, grid_k, 0, self.values.device)
        buckets, base = self.values.shape[0], torch.zeros_like(offset)
        if self.bidirectional:
            buckets //= 2
            base, distance = (offset > 0) * buckets, offset.abs()
        else:
            distance = (-offset).clamp(min=0)
        exact = buckets // 2
        ratio = torch.log(distance.clamp(min=1).float() / exact) / math.log(self.max_distance / exact)
        far = (exact + (ratio * (buckets - exact)).long()).clamp(max=buckets - 1)
        return self.values[base + torch.where(distance < exact, distance, far)].t()


def _sequence(grid: Sequence[int], name: str) -> None:
    if len(grid) != 1:
        raise ValueError(f"{name} is a bias over a sequence; the grid has {len(grid)} axes {tuple(grid)}")
