"""How well a map says where people look: the usual metrics, one number an image, and SUM's loss."""

from __future__ import annotations

import torch
from torch import Tensor

from glocal.shapes import Bool, Float

__all__ = ["auc_judd", "correlation", "divergence", "normalised_scanpath", "saliency_loss", "similarity"]

_EPS = 2.2e-16


def _flat(*maps: Tensor) -> list[Tensor]:
    """Each ``(..., H W)`` in float64: the constants of the metrics are below what float32 can tell from 0."""
    first = maps[0].shape
    for t in maps:
        if t.shape != first or t.dim() < 2:
            raise ValueError(f"maps must be (..., H, W) of one shape; they were {[tuple(t.shape) for t in maps]}")
    return [t.double().flatten(-2) for t in maps]


def _shares(x: Tensor) -> Tensor:
    """Divided by the sum; even where that is 0."""
    total = x.sum(-1, keepdim=True)
    return torch.where(total > 0, x / torch.where(total > 0, total, 1.0), 1 / x.shape[-1])


def _standard(x: Tensor) -> Tensor:
    """Less the mean, over the standard deviation; 0 where the map is constant."""
    centred = x - x.mean(-1, keepdim=True)
    spread = centred.square().mean(-1, keepdim=True).sqrt()
    return torch.where(spread > 1e-12, centred / torch.where(spread > 1e-12, spread, 1.0), 0.0)


def divergence(found: Float[Tensor, "*lead H W"], wanted: Float[Tensor, "*lead H W"]) -> Float[Tensor, "*lead"]:
    """Kullback-Leibler divergence of what was found from what was wanted, both divided by their sum, in nats.

    >>> half = torch.tensor([[1.0, 1.0], [0.0, 0.0]])
    >>> round(float(divergence(torch.ones(2, 2), half)), 4)  # ln 2
    0.6931
    """
    p, g = (_shares(t) for t in _flat(found, wanted))
    return (g * (_EPS + g / (p + _EPS)).log()).sum(-1).to(found.dtype)


def correlation(found: Float[Tensor, "*lead H W"], wanted: Float[Tensor, "*lead H W"]) -> Float[Tensor, "*lead"]:
    """Pearson's; 0 where a map is constant."""
    p, g = (_standard(t) for t in _flat(found, wanted))
    return (p * g).mean(-1).to(found.dtype)


def similarity(found: Float[Tensor, "*lead H W"], wanted: Float[Tensor, "*lead H W"]) -> Float[Tensor, "*lead"]:
    """What two maps have in common, from 0 to 1: each scaled to 0..1, divided by its sum, the smaller counts."""

    def scaled(x: Tensor) -> Tensor:
        low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
        return _shares((x - low) / torch.where(high > low, high - low, 1.0))

    p, g = (scaled(t) for t in _flat(found, wanted))
    return torch.minimum(p, g).sum(-1).to(found.dtype)


def normalised_scanpath(
    found: Float[Tensor, "*lead H W"], fixations: Float[Tensor, "*lead H W"] | Bool[Tensor, "*lead H W"]
) -> Float[Tensor, "*lead"]:
    """Mean of the standardised map at the fixations, which are above 0; 0 where there are none."""
    p, at = _flat(found, fixations)
    seen = (at > 0).double()
    return ((_standard(p) * seen).sum(-1) / seen.sum(-1).clamp(min=1)).to(found.dtype)


def auc_judd(
    found: Float[Tensor, "H W"],
    fixations: Float[Tensor, "H W"] | Bool[Tensor, "H W"],
    *,
    jitter: float = 1e-7,
    seed: int = 0,
) -> float:
    """Area under the curve of hits at the fixations against the share of other pixels above each of their values.

    Args:
        found: one map ``(H, W)``.
        fixations: above 0 where people looked.
        jitter: random numbers below this part ties.
        seed: of these.

    Raises:
        ValueError: no fixation, or nothing else.

    >>> auc_judd(torch.tensor([[3.0, 2.0], [1.0, 0.0]]), torch.tensor([[1, 0], [0, 0]]))
    1.0
    """
    p, at = _flat(found, fixations)
    seen = at > 0
    if seen.all() or not seen.any():
        raise ValueError(f"fixations must be at some pixels and not at all; they were at {int(seen.sum())} of {len(p)}")
    draw = torch.Generator(p.device).manual_seed(seed)
    p = p + jitter * torch.rand(p.shape, generator=draw, dtype=p.dtype, device=p.device)
    thresholds = p[seen].sort(descending=True).values
    above = (p >= thresholds[:, None]).sum(1).double()
    hits = torch.arange(1, len(thresholds) + 1, device=p.device).double()
    ends = torch.tensor([0.0, 1.0], dtype=torch.double, device=p.device)
    true = torch.cat([ends[:1], hits / len(thresholds), ends[1:]])
    false = torch.cat([ends[:1], (above - hits) / (len(p) - len(thresholds)), ends[1:]])
    return float(torch.trapezoid(true, false))


def saliency_loss(
    found: Float[Tensor, "B H W"],
    wanted: Float[Tensor, "B H W"],
    fixations: Float[Tensor, "B H W"] | Bool[Tensor, "B H W"],
) -> Float[Tensor, ""]:
    """``10 KL - 2 CC - SIM - NSS + 5 MSE``, the mean of the batch (Hosseini et al., 2024, arXiv 2406.17815)."""
    near = (found - wanted).square().mean((-2, -1))
    each = 10 * divergence(found, wanted) - 2 * correlation(found, wanted) - similarity(found, wanted)
    return (each - normalised_scanpath(found, fixations) + 5 * near).mean()
