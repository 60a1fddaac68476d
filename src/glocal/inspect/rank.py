"""What heads of low rank can do about the nearest of some points, by formula; and the rank of attention maps.

Amsel et al., 2024, arXiv 2407.16153.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from glocal.shapes import Float

__all__ = [
    "LowRankHeads",
    "MapRank",
    "WeightedHeads",
    "equally_spaced_heads",
    "exact_heads",
    "head_overlaps",
    "head_targets",
    "map_rank",
    "random_heads",
    "random_projection_heads",
    "weigh_heads",
]


class LowRankHeads(NamedTuple):
    """Heads as `glocal.nn.low_rank_attention` takes them: ``low_rank_attention(points, queries, *heads)``."""

    q: Float[Tensor, "H r d"]
    k: Float[Tensor, "H r d"]
    vo: Float[Tensor, "H d d"]


class WeightedHeads(NamedTuple):
    """Weights of heads, and what comes of them where two points stand for choice."""

    weights: Float[Tensor, " H"]
    """Best ones, ``C^-1 b``."""
    error: float
    """Expected squared error with them."""
    uniform: float
    """The same with ``1 / H`` for each head."""


class MapRank(NamedTuple):
    """Rank of attention maps; all ``(...)``."""

    rank: Tensor
    """Singular values that are not zero to rounding."""
    held: Tensor
    """Singular values that hold the asked share of the squared sum."""
    effective: Tensor
    """``exp`` of the entropy of singular values (Roy and Vetterli, 2007)."""


def exact_heads(dim: int, sharpness: float = 1e4, *, farthest: bool = False) -> LowRankHeads:
    """One head of full rank that gives the nearest point, the more exactly the sharper it is.

    Args:
        dim: channels.
        sharpness: factor of the queries.
        farthest: the farthest instead.

    >>> exact_heads(3, 5.0).q[0, 0]
    tensor([5., 0., 0.])
    """
    unit = torch.eye(dim)[None]
    return LowRankHeads(-sharpness * unit if farthest else sharpness * unit, unit, unit)


def equally_spaced_heads(num_heads: int) -> LowRankHeads:
    """Heads of rank 1 in the plane, at angles ``k pi / H``, averaged.

    >>> equally_spaced_heads(2).q[:, 0].round(decimals=3).abs().tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """
    angles = torch.arange(num_heads) * (math.pi / num_heads)
    q = torch.stack([angles.cos(), angles.sin()], 1)[:, None]
    return LowRankHeads(q, q, torch.eye(2).expand(num_heads, -1, -1) / num_heads)


def random_projection_heads(dim: int, rank: int, num_heads: int, generator: torch.Generator) -> LowRankHeads:
    """Heads whose queries and keys are seen in one random subspace each, averaged.

    Raises:
        ValueError: a rank above ``dim``.

    >>> heads = random_projection_heads(5, 2, 3, torch.Generator().manual_seed(0))
    >>> torch.allclose(heads.q @ heads.q.mT, torch.eye(2), atol=1e-6)
    True
    """
    if not 1 <= rank <= dim:
        raise ValueError(f"rank must be from 1 to dim {dim}; it was {rank}")
    q = torch.linalg.qr(torch.randn(num_heads, dim, dim, generator=generator))[0][:, :rank]
    return LowRankHeads(q, q, torch.eye(dim).expand(num_heads, -1, -1) / num_heads)


def random_heads(dim: int, num_heads: int, generator: torch.Generator) -> LowRankHeads:
    """Heads of rank 1 with random unit vectors for queries and for keys; in the plane with the best weights.

    >>> [tuple(t.shape) for t in random_heads(3, 4, torch.Generator().manual_seed(0))]
    [(4, 1, 3), (4, 1, 3), (4, 3, 3)]
    """
    q, k = normalize(torch.randn(2, num_heads, 1, dim, generator=generator), dim=-1).unbind()
    weights = weigh_heads(q[:, 0], k[:, 0]).weights if dim == 2 else torch.full((num_heads,), 1 / num_heads)
    return LowRankHeads(q, k, torch.eye(dim) * weights.to(q)[:, None, None])


def head_overlaps(q: Float[Tensor, "H d"], k: Float[Tensor, "H d"]) -> Float[Tensor, "H H"]:
    """C: expected dot product of what two hard heads of rank 1 choose of two random points on the sphere.

    ``1/2 + 2 / pi^2 asin(q q') asin(k k')``, in any dimension.

    Args:
        q, k: unit vectors, ``(H, d)``.

    Raises:
        ValueError: other shapes, or vectors that are not of unit length.

    >>> head_overlaps(torch.eye(2), torch.eye(2))
    tensor([[1.0000, 0.5000],
            [0.5000, 1.0000]], dtype=torch.float64)
    """
    q, k = _unit(q, k)
    return 0.5 + 2 / math.pi**2 * (q @ q.mT).clamp(-1, 1).asin() * (k @ k.mT).clamp(-1, 1).asin()


def head_targets(q: Float[Tensor, "H 2"], k: Float[Tensor, "H 2"]) -> Float[Tensor, " H"]:
    """b: expected dot product of what a hard head of rank 1 chooses of two points in the plane with the nearer one.

    Args:
        q, k: unit vectors, ``(H, 2)``; the formula is for the plane.

    Raises:
        ValueError: other shapes, or vectors that are not of unit length.

    >>> head_targets(torch.eye(2), -torch.eye(2))
    tensor([0.2500, 0.2500], dtype=torch.float64)
    """
    q, k = _unit(q, k)
    if q.shape[-1] != 2:
        raise ValueError(f"q and k must be in the plane, (H, 2); they were {tuple(q.shape)}")
    angle = (q * k).sum(-1).clamp(-1, 1).acos()
    near = math.pi / 2 - (math.pi / 2 - angle).abs()
    return 0.5 + torch.sign(math.pi / 2 - angle) * (0.25 - (near / math.pi) ** 2)


def weigh_heads(q: Float[Tensor, "H 2"], k: Float[Tensor, "H 2"]) -> WeightedHeads:
    """The weights at which hard heads of rank 1 in the plane come nearest to the nearer of two points.

    The expected error of weights a is ``1 - 2 b a + a C a``. Where heads repeat each other they share a weight.

    Args:
        q, k: unit vectors, ``(H, 2)``.

    Raises:
        ValueError: as in `head_targets`.

    >>> found = weigh_heads(torch.eye(2), torch.eye(2))
    >>> found.weights, round(found.error, 4)
    (tensor([0.5000, 0.5000], dtype=torch.float64), 0.25)
    """
    overlaps, targets = head_overlaps(q, k), head_targets(q, k)
    weights = torch.linalg.pinv(overlaps, hermitian=True) @ targets
    equal = torch.full_like(weights, 1 / len(weights))
    errors = [float(1 - 2 * targets @ a + a @ overlaps @ a) for a in (weights, equal)]
    return WeightedHeads(weights, *errors)


def map_rank(maps: Float[Tensor, "*heads N M"], share: float = 0.99) -> MapRank:
    """Rank of attention maps, or of scores: heads of rank r have scores of rank r, and maps of a higher one.

    Args:
        maps: ``(..., N, M)``.
        share: of the squared singular values, for ``held``.

    Raises:
        ValueError: a share out of range.

    >>> map_rank(torch.full((4, 4), 0.25)).rank, map_rank(torch.eye(4)).effective
    (tensor(1), tensor(4., dtype=torch.float64))
    """
    if not 0 < share <= 1:
        raise ValueError(f"share must be above 0 and at most 1; it was {share}")
    single = maps.dtype != torch.float64
    values = torch.linalg.svdvals(maps.double())
    floor = (torch.finfo(torch.float32 if single else torch.float64).eps * max(maps.shape[-2:])) * values[..., :1]
    squares = values.square().cumsum(-1)
    held = (squares < share * (1 - 1e-12) * squares[..., -1:]).sum(-1) + 1
    parts = values / values.sum(-1, keepdim=True)
    return MapRank((values > floor).sum(-1), held, torch.special.entr(parts).sum(-1).exp())


def _unit(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    for name, t in (("q", q), ("k", k)):
        if t.dim() != 2 or t.shape != q.shape:
            raise ValueError(f"{name} must be (H, d), as many as q; it was {tuple(t.shape)}")
        if not bool(((t.norm(dim=-1) - 1).abs() < 1e-3).all()):
            raise ValueError(f"{name} must hold unit vectors; the norms were {t.norm(dim=-1).tolist()}")
    return q.double(), k.double()
