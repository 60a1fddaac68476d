"""Which softmax a sparse distributed memory is like: its temperature by radius, good radii, temperatures of heads.

Bricken and Pehlevan, 2021, arXiv 2111.05498.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from statistics import NormalDist
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from glocal.inspect.overlaps import ball_overlaps
from glocal.shapes import Float

__all__ = ["BetaFit", "effective_beta", "fit_beta", "optimal_radius"]


@dataclass(frozen=True)
class BetaFit:
    """``exp(beta * x + bias)``, fitted to what two balls share, x the cosine of their centres. Made by `fit_beta`."""

    bits: int
    radius: int
    beta: float
    """Inverse temperature of the softmax over cosines of unit vectors."""
    bias: float
    r2: float
    """Share of the variance of the logarithm that the least-squares line explains, whatever ``legacy_ddof``."""
    total_variation: float
    """Half the absolute difference of both weights by distance, each made to sum to 1."""


def fit_beta(bits: int, radius: int, *, upto: int | None = None, legacy_ddof: bool = False) -> BetaFit:
    """Fit a softmax to the memory's weights: the slope of log overlap over ``x = 1 - 2 d / bits``.

    Args:
        bits: of an address, n.
        radius: Hamming distance within which a neuron is active.
        upto: distances 0 to ``upto - 1`` are fitted, those without overlap left out; ``radius`` where None.
        legacy_ddof: the published slope, which divides a covariance of ``count - 1`` by a variance of ``count``, and
            is larger by ``count / (count - 1)``. The authors' figures (35.5, 15.9 and 10.1 at 64 bits and radius 5, 11
            and 15) come out only with it; least squares gives 28.4, 14.4 and 9.4.

    Raises:
        ValueError: fewer than two distances, or numbers out of range.

    >>> [round(fit_beta(64, 11, legacy_ddof=legacy).beta, 1) for legacy in (False, True)]
    [14.4, 15.9]
    """
    overlaps = ball_overlaps(bits, radius)
    upto = radius if upto is None else upto
    kept = [d for d in range(min(upto, bits + 1)) if overlaps[d]]
    if len(kept) < 2:
        raise ValueError(f"radius and upto must leave two distances or more to fit; they were {radius} and {upto}")
    x = np.array([1 - 2 * d / bits for d in kept])
    y = np.array([math.log(overlaps[d]) for d in kept])
    away = x - x.mean()
    slope = float(away @ (y - y.mean()) / (away @ away))
    error = y - y.mean() - slope * away
    r2 = 1 - float(error @ error) / float((y - y.mean()) @ (y - y.mean()))
    beta = slope * len(kept) / (len(kept) - 1) if legacy_ddof else slope
    mine, its = np.exp(y - y.max()), np.exp(beta * (x - x.max()))
    apart = float(np.abs(mine / mine.sum() - its / its.sum()).sum() / 2)
    return BetaFit(bits, radius, beta, float(y.mean() - beta * x.mean()), r2, apart)


def optimal_radius(
    bits: int,
    neurons: int,
    patterns: int | None = None,
    *,
    by: Literal["snr", "capacity"] = "snr",
    recall: float = 0.5,
) -> int:
    """The radius that is best for signal against noise, or for the number of patterns.

    A radius is the smallest whose ball holds the share p of space. Signal against noise is best at
    ``p = (2 patterns neurons)^(-1/3)``; the most patterns, ``((p R)^2 / z^2 - p R) / (p^2 R + (p^2 R)^2)``, R neurons,
    are kept where that is largest, z the normal quantile at which all bits of a pattern are right by chance ``recall``.

    Args:
        bits: of an address.
        neurons: how many there are, R.
        patterns: that are stored; only for ``"snr"``.
        by: ``"snr"`` or ``"capacity"``.
        recall: chance that a whole pattern is right, for ``"capacity"``.

    Raises:
        ValueError: ``"snr"`` without ``patterns``, or numbers out of range.

    >>> optimal_radius(64, 2**64, 1024), optimal_radius(64, 2**64, by="capacity")
    (11, 5)
    """
    if bits < 1 or neurons < 1:
        raise ValueError(f"bits and neurons must be at least 1; they were {bits} and {neurons}")
    if by == "snr":
        if patterns is None or patterns < 1:
            raise ValueError(f"patterns must be at least 1 for by='snr'; it was {patterns}")
        return _radius(bits, (2 * patterns * neurons) ** (-1 / 3))
    if by != "capacity":
        raise ValueError(f"by must be 'snr' or 'capacity'; it was {by!r}")
    if not 0.5**bits < recall < 1:
        raise ValueError(f"recall must be above chance, 2^-{bits}, and below 1; it was {recall}")
    z = NormalDist().inv_cdf(recall ** (1 / bits))
    # Where the derivative is zero: 2 R^2 p^3 = 3 R z^2 p^2 + z^2, with t = p sqrt(R) to keep numbers near 1.
    a = z * z / (2 * math.sqrt(neurons))
    roots = np.roots([1.0, -3 * a, 0.0, -a])
    best = float(roots[np.abs(roots.imag) < 1e-9].real.max())
    return _radius(bits, best / math.sqrt(neurons))


def effective_beta(
    q: Float[Tensor, "B H *grid_q D"], k: Float[Tensor, "B Hkv *grid_k D"], *, scale: float | Tensor | None = None
) -> Float[Tensor, " H"]:
    """Inverse temperature of each head if its queries and keys were unit vectors: the mean of ``|q| |k| scale``.

    Args:
        q: queries ``(B, H, *grid_q, D)``, after norms.
        k: keys ``(B, Hkv, *grid_k, D)``, H a multiple of Hkv. The mean is over all pairs.
        scale: of the scores, a number or ``(H,)``; ``D ** -0.5`` where None. Where queries and keys have unit length,
            it is the effective beta.

    Returns:
        ``(H,)``, in float32 or the wider type of ``q``.

    Raises:
        ValueError: shapes that do not fit.

    >>> effective_beta(torch.full((1, 2, 5, 4), 2.0), torch.ones(1, 1, 7, 4))
    tensor([4., 4.])
    """
    if q.dim() != k.dim() or q.dim() < 4 or len(q) != len(k) or q.shape[-1] != k.shape[-1] or q.shape[1] % k.shape[1]:
        raise ValueError(
            "q and k must be (B, heads, *grid, D), heads of q a multiple of those of k; they were "
            f"{tuple(q.shape)} and {tuple(k.shape)}"
        )
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    lengths = [t.to(torch.promote_types(t.dtype, torch.float32)).norm(dim=-1).flatten(2).mean(-1) for t in (q, k)]
    pairs = lengths[0] * lengths[1].repeat_interleave(q.shape[1] // k.shape[1], 1)
    found: Tensor = pairs.mean(0) * scale
    return found


def _radius(bits: int, share: float) -> int:
    """The smallest radius whose ball holds this share of space."""
    wanted, held = Fraction(share) * 2**bits, 0
    for radius in range(bits + 1):
        held += math.comb(bits, radius)
        if held >= wanted:
            return radius
    return bits
