"""How well a map says where people look: the usual metrics, one number an image, and SUM's loss.

The metrics are those of Bylinskii et al., 2016, arXiv 1604.03605, as the survey of Cartella et al., 2024, arXiv
2402.18673, takes them up. A predicted map of another size is resized bilinearly to the map of the people. Figures are
comparable only where the blur of the people's map is the same: keep it with the result.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from glocal.shapes import Bool, Float

__all__ = [
    "auc_judd",
    "auc_shuffled",
    "correlation",
    "divergence",
    "information_gain",
    "normalised_scanpath",
    "roc_area",
    "saliency_loss",
    "shares",
    "similarity",
]

_EPS = 2.2204e-16


def _flat(*maps: Tensor) -> list[Tensor]:
    """Each ``(..., H W)`` in float64: the constants of the metrics are below what float32 can tell from 0.

    The last map has the size that counts; others are resized to it.
    """
    last = maps[-1]
    for t in maps:
        if t.dim() < 2 or t.shape[:-2] != last.shape[:-2] or not t.numel():
            shapes = [tuple(t.shape) for t in maps]
            raise ValueError(f"maps must be (..., H, W) with the same leading axes; they were {shapes}")
    return [_resized(t.double(), last.shape[-2:]).flatten(-2) for t in maps]


def _resized(x: Tensor, size: torch.Size) -> Tensor:
    if x.shape[-2:] == size:
        return x
    return interpolate(x.reshape(-1, 1, *x.shape[-2:]), tuple(size), mode="bilinear").view(*x.shape[:-2], *size)


def shares(x: Float[Tensor, "*lead n"]) -> Float[Tensor, "*lead n"]:
    """Divided by the sum over the last axis; even where that is 0.

    Raises:
        ValueError: a value below 0, of which no share can be taken.

    >>> shares(torch.tensor([[1.0, 3.0], [0.0, 0.0]])).tolist()
    [[0.25, 0.75], [0.5, 0.5]]
    """
    if bool((x < 0).any()):
        raise ValueError(f"maps that are divided by their sum must not be below 0; the smallest value was {x.min():g}")
    total = x.sum(-1, keepdim=True)
    return torch.where(total > 0, x / torch.where(total > 0, total, 1.0), 1 / x.shape[-1])


def _standard(x: Tensor) -> Tensor:
    """Less the mean, over the standard deviation; 0 where the map is constant."""
    centred = x - x.mean(-1, keepdim=True)
    variance = centred.square().mean(-1, keepdim=True)
    varies = variance > 1e-24
    return torch.where(varies, centred / torch.where(varies, variance, 1.0).sqrt(), 0.0)


def divergence(found: Float[Tensor, "*lead h w"], wanted: Float[Tensor, "*lead H W"]) -> Float[Tensor, "*lead"]:
    """Kullback-Leibler divergence of what was found from what was wanted, both divided by their sum, in nats.

    >>> half = torch.tensor([[1.0, 1.0], [0.0, 0.0]])
    >>> round(float(divergence(torch.ones(2, 2), half)), 4)  # ln 2
    0.6931
    """
    p, g = (shares(t) for t in _flat(found, wanted))
    return (g * (_EPS + g / (p + _EPS)).log()).sum(-1).to(found.dtype)


def correlation(found: Float[Tensor, "*lead h w"], wanted: Float[Tensor, "*lead H W"]) -> Float[Tensor, "*lead"]:
    """Pearson's; 0 where a map is constant."""
    p, g = (_standard(t) for t in _flat(found, wanted))
    return (p * g).mean(-1).to(found.dtype)


def similarity(found: Float[Tensor, "*lead h w"], wanted: Float[Tensor, "*lead H W"]) -> Float[Tensor, "*lead"]:
    """What two maps have in common, from 0 to 1: each scaled to 0..1, divided by its sum, the smaller counts."""

    def scaled(x: Tensor) -> Tensor:
        low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
        return shares((x - low) / torch.where(high > low, high - low, 1.0))

    p, g = (scaled(t) for t in _flat(found, wanted))
    return torch.minimum(p, g).sum(-1).to(found.dtype)


def normalised_scanpath(
    found: Float[Tensor, "*lead h w"], fixations: Float[Tensor, "*lead H W"] | Bool[Tensor, "*lead H W"]
) -> Float[Tensor, "*lead"]:
    """Mean of the standardised map at the fixations, which are above 0; 0 where there are none."""
    p, at = _flat(found, fixations)
    seen = (at > 0).double()
    return ((_standard(p) * seen).sum(-1) / seen.sum(-1).clamp(min=1)).to(found.dtype)


def information_gain(
    found: Float[Tensor, "*lead h w"],
    baseline: Float[Tensor, "*lead h2 w2"],
    fixations: Float[Tensor, "*lead H W"] | Bool[Tensor, "*lead H W"],
) -> Float[Tensor, "*lead"]:
    """Bits a fixation by which a map foretells better than a baseline, such as a centre bias; 0 without fixations.

    Args:
        found: the map, ``(..., H, W)``.
        baseline: the map to compare with.
        fixations: above 0 where people looked, ``(..., H, W)``.

    >>> seen = torch.tensor([[1, 0], [0, 0]])
    >>> round(float(information_gain(seen.float(), torch.ones(2, 2), seen)), 4)  # one place of four
    2.0
    """
    p, b, at = _flat(found, baseline, fixations)
    seen = (at > 0).double()
    gain = (_EPS + shares(p)).log2() - (_EPS + shares(b)).log2()
    return ((gain * seen).sum(-1) / seen.sum(-1).clamp(min=1)).to(found.dtype)


def roc_area(positives: Tensor, negatives: Tensor, thresholds: Tensor | None = None) -> float:
    """Area under the curve of positives over negatives at or above each threshold, straight between its points.

    Args:
        positives, negatives: values, each ``(n,)``; neither may be empty.
        thresholds: in any order; all the values where None, which makes the area exact: the chance that a positive is
            above a negative, ties counting one half.

    Raises:
        ValueError: no positives or no negatives.

    >>> roc_area(torch.tensor([2.0, 1.0]), torch.tensor([1.0, 0.0]))
    0.875
    """
    if not len(positives) or not len(negatives):
        raise ValueError(f"positives and negatives must not be empty; they had {len(positives)} and {len(negatives)}")
    at = (torch.cat([positives, negatives]) if thresholds is None else thresholds).sort(descending=True).values
    ends = at.new_zeros(1), at.new_ones(1)
    hits, alarms = (
        torch.cat([ends[0], 1 - torch.searchsorted(x.sort().values, at) / x.new_tensor(len(x)), ends[1]])
        for x in (positives, negatives)
    )
    return float(torch.trapezoid(hits, alarms))


def auc_judd(
    found: Float[Tensor, "h w"],
    fixations: Float[Tensor, "H W"] | Bool[Tensor, "H W"],
    *,
    jitter: float = 0.0,
    seed: int = 0,
) -> float:
    """Area under the curve of hits at the fixations against the share of other pixels above each of their values.

    The curve has a point at the value of each fixation only: with few of them it flatters.

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
    if jitter:
        draw = torch.Generator(p.device).manual_seed(seed)
        p = p + jitter * torch.rand(p.shape, generator=draw, dtype=p.dtype, device=p.device)
    return roc_area(p[seen], p[~seen], p[seen])


def auc_shuffled(
    found: Float[Tensor, "h w"],
    fixations: Float[Tensor, "H W"] | Bool[Tensor, "H W"],
    others: Tensor,
    *,
    splits: int | None = 100,
    step: float = 0.1,
    seed: int = 0,
) -> float:
    """Area under the curve against places where people looked in other images: a centre bias alone gains nothing.

    Args:
        found: one map ``(H, W)``, scaled to 0..1.
        fixations: above 0 where people looked.
        others: how many fixations of other images a pixel has, ``(H, W)``, or one such map an image, ``(..., H, W)``.
        splits: draws of as many of these as there are fixations, or of all if they are fewer, whose areas are averaged;
            None takes all of them and every value as a threshold, without chance.
        step: between thresholds, with splits. Figures then depend on the map's scale.
        seed: of the draws.

    Raises:
        ValueError: no fixation, here or elsewhere, or ``splits`` or ``step`` not above 0.

    >>> centre = torch.tensor([[0.0, 1.0, 0.0]])
    >>> auc_shuffled(centre, torch.tensor([[0, 1, 0]]), torch.tensor([[0, 5, 0]]))
    0.5
    """
    if (splits is not None and splits < 1) or step <= 0:
        raise ValueError(f"splits and step must be above 0; they were {splits} and {step}")
    count = others.flatten(0, -3).sum(0) if others.dim() > 2 else others
    p, elsewhere, at = _flat(found, count, fixations)
    if count.shape != fixations.shape:
        raise ValueError(f"others must be (..., *{tuple(fixations.shape)}); it was {tuple(others.shape)}")
    low, high = p.amin(), p.amax()
    p = (p - low) / torch.where(high > low, high - low, 1.0)
    positives, negatives = p[at > 0], p.repeat_interleave(elsewhere.clamp(min=0).long())
    if splits is None or not len(positives) or not len(negatives):
        return roc_area(positives, negatives)
    draw, size = torch.Generator().manual_seed(seed), min(len(positives), len(negatives))
    areas = []
    for _ in range(splits):
        drawn = negatives[torch.randperm(len(negatives), generator=draw)[:size].to(p.device)]
        top = float(torch.maximum(positives.amax(), drawn.amax()))
        thresholds = step * torch.arange(int(top / step + 1e-9) + 1, dtype=p.dtype, device=p.device)
        areas.append(roc_area(positives, drawn, thresholds))
    return sum(areas) / splits


def saliency_loss(
    found: Float[Tensor, "B H W"],
    wanted: Float[Tensor, "B H W"],
    fixations: Float[Tensor, "B H W"] | Bool[Tensor, "B H W"],
) -> Float[Tensor, ""]:
    """``10 KL - 2 CC - SIM - NSS + 5 MSE``, the mean of the batch (Hosseini et al., 2024, arXiv 2406.17815)."""
    near = (found - wanted).square().mean((-2, -1))
    each = 10 * divergence(found, wanted) - 2 * correlation(found, wanted) - similarity(found, wanted)
    return (each - normalised_scanpath(found, fixations) + 5 * near).mean()
