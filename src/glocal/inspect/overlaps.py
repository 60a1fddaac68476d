"""How much of space two balls share by the distance of their centres: binary addresses, and caps of the sphere."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

__all__ = ["ball_overlaps", "cap_overlap", "check_ball"]

_AT_ONCE = 1 << 22
"""Points of an integral that are held at a time."""


@lru_cache(maxsize=64)
def ball_overlaps(bits: int, radius: int) -> tuple[int, ...]:
    """How many binary addresses lie within ``radius`` of two centres, by the centres' distance from 0 to ``bits``.

    Args:
        bits: of an address, n.
        radius: Hamming distance, the bound included.

    Returns:
        ``n + 1`` whole numbers, exact: the first is the size of a ball, all beyond ``2 * radius`` are 0.

    Raises:
        ValueError: no bits, or a radius that is not from 0 to ``bits``.

    >>> ball_overlaps(4, 1)
    (5, 2, 2, 0, 0)
    """
    check_ball(bits, radius)
    found = []
    for distance in range(bits + 1):
        same = bits - distance
        tail = [0]  # how many ways to agree with both centres on at least so many of the bits where they agree
        for agreed in range(same, -1, -1):
            tail.append(tail[-1] + math.comb(same, agreed))
        tail.reverse()
        count = 0
        for first in range(distance + 1):  # of the other bits, those that agree with the first centre
            least = max(0, bits - radius - min(first, distance - first))
            count += math.comb(distance, first) * (tail[least] if least <= same else 0)
        found.append(count)
    return tuple(found)


def cap_overlap(cosine: Tensor, bits: int, radius: int, *, points: int = 128) -> Tensor:
    """Log of the share of the unit sphere in ``bits`` dimensions that lies in two caps: `ball_overlaps`, continuous.

    A cap holds what is within an angle ``arccos(1 - 2 radius / bits)`` of its centre. Computed by Gauss-Legendre
    quadrature, in logarithms, in float64.

    Args:
        cosine: between the centres, any shape.
        bits: dimensions, at least 3.
        radius: Hamming distance of that angle, at least 1 and at most half of ``bits``.
        points: of each of the two integrals.

    Returns:
        Of the shape of ``cosine``, in float64; minus infinity where caps do not meet.

    Raises:
        ValueError: fewer than 3 dimensions, or a radius out of range.

    >>> cap_overlap(torch.tensor([1.0, -1.0]), 8, 4).exp()
    tensor([0.5000, 0.0000], dtype=torch.float64)
    """
    if bits < 3 or not 1 <= radius <= bits / 2:
        raise ValueError(f"cap_overlap needs bits >= 3 and 1 <= radius <= bits / 2; it was {bits} and {radius}")
    x, w = (torch.from_numpy(t).to(cosine.device) for t in np.polynomial.legendre.leggauss(points))
    x, w = (x + 1) / 2, w.log() - math.log(2)
    edge, flat = math.acos(1 - 2 * radius / bits), cosine.double().clamp(-1, 1).flatten()
    # The half of both caps beyond the plane between them; the inner integral is an incomplete beta function.
    whole = 0.5 * math.log(math.pi) + math.lgamma((bits - 2) / 2) - math.lgamma((bits - 1) / 2) - math.log(2)
    front = math.lgamma(bits / 2) - math.lgamma((bits - 1) / 2) - 0.5 * math.log(math.pi)
    found = []
    for some in flat.split(max(1, _AT_ONCE // points**2)):
        half = some.acos()[:, None] / 2
        angle = half + (edge - half).clamp(min=0) * x
        reach = (half.tan() / angle.tan()).clamp(max=1).acos()
        inner = torch.logsumexp((bits - 3) * (reach[..., None] * x).sin().log() + w, -1) + reach.log()
        outer = torch.logsumexp((bits - 2) * angle.sin().log() + inner - whole + w, -1)
        found.append(front + outer + (edge - half[:, 0]).clamp(min=0).log())
    return torch.cat(found).view(cosine.shape)


def check_ball(bits: int, radius: int) -> None:
    """Raise a ValueError unless there are bits and the radius is from 0 to their number."""
    if bits < 1 or not 0 <= radius <= bits:
        raise ValueError(f"bits must be at least 1 and radius from 0 to bits; they were {bits} and {radius}")
