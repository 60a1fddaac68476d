"""Whether attention can still set chosen tokens apart from the others, as there are more of them; head by head.

Mudarisov et al., 2025, arXiv 2508.17821. What counts as distance and as separable is our reading of the paper.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from glocal.inspect.calls import HeadCall
from glocal.inspect.normalisers import normalise
from glocal.shapes import Bool, Float

__all__ = [
    "HeadSelection",
    "SelectionDistance",
    "Sensitivity",
    "critical_size",
    "finite_sensitivity",
    "gradient_sensitivity",
    "selection_distance",
    "selection_report",
    "separability",
]


class SelectionDistance(NamedTuple):
    """How far the sum of the chosen tokens is from each other token, ``(..., Q)``; nan where no token is left over."""

    mean: Tensor
    total: Tensor


class Sensitivity(NamedTuple):
    """Of weights to their logits, ``(...)``."""

    norm: Tensor
    """Spectral norm of the Jacobian, at most ``1 / (2 T)``."""
    entry: Tensor
    """Its largest entry, at most ``1 / (4 T)``."""


class HeadSelection(NamedTuple):
    """One head, means over queries that are no padding. Made by `selection_report`."""

    layer: str
    head: int
    keys: int
    """Of a row, at most."""
    entropy: float
    """Of the weights, over the log of the keys that a query sees: 1 for equal ones."""
    distance: float
    """`SelectionDistance.mean` at the asked share of the keys."""
    separable: float
    """`separability` there."""
    critical: float
    """`critical_size` over the number of keys; nan where the distance does not fall so far."""
    sensitivity: tuple[float, ...]
    """Greatest spectral norm over the queries, at each temperature."""


def selection_distance(
    weights: Float[Tensor, "*lead Q L"],
    x: Float[Tensor, "*lead L d"],
    size: int,
    *,
    live: Bool[Tensor, "*lead Q L"] | None = None,
) -> SelectionDistance:
    """Distance of ``s = sum of w_i x_i`` over the ``size`` greatest weights from ``w_j x_j`` of each token left over.

    Args:
        weights: ``(..., Q, L)``. Equal weights are chosen in the order of their tokens.
        x: values or states of the tokens, ``(..., L, d)``; of unit length in the paper's theory.
        size: how many are chosen, N.
        live: which tokens take part for a query, broadcasts to the weights: no padding, no sink. All where None.

    Returns:
        Mean and sum over the tokens left over, each ``(..., Q)`` in float64.

    Raises:
        ValueError: shapes that do not fit, a size below 1.

    >>> found = selection_distance(torch.full((1, 4), 0.25), torch.eye(4), 2)
    >>> found.mean * 4, found.total * 4  # three places of one quarter differ
    (tensor([1.7321], dtype=torch.float64), tensor([3.4641], dtype=torch.float64))
    """
    return _far(*_distances(weights, x, size, live))


def separability(
    weights: Float[Tensor, "*lead Q L"],
    x: Float[Tensor, "*lead L d"],
    size: int,
    *,
    live: Bool[Tensor, "*lead Q L"] | None = None,
) -> Float[Tensor, "*lead Q"]:
    """Share of the chosen tokens that are no farther from their sum than the nearest token left over.

    Args:
        weights, x, size, live: as in `selection_distance`.

    Returns:
        ``(..., Q)`` in float64, from 0 to 1; nan where no token is left over.

    Raises:
        ValueError: as in `selection_distance`.

    >>> separability(torch.eye(3), torch.eye(3), 1)
    tensor([1., 1., 1.], dtype=torch.float64)
    """
    return _near(*_distances(weights, x, size, live))


def critical_size(distances: Float[Tensor, "*lead sizes"], sizes: Sequence[int], fraction: float = 0.1) -> Tensor:
    """The smallest size at which a distance falls below a fraction of its maximum over the sizes.

    Args:
        distances: ``(..., sizes)``.
        sizes: at which they were taken, rising.
        fraction: of the maximum.

    Returns:
        ``(...)`` in float64; nan where it falls so far at none.

    Raises:
        ValueError: another number of sizes, a fraction out of range.

    >>> critical_size(torch.tensor([[1.0, 0.5, 0.05], [1.0, 0.9, 0.8]]), [1, 2, 4])
    tensor([4., nan], dtype=torch.float64)
    """
    if distances.shape[-1] != len(sizes):
        raise ValueError(f"sizes must be as many as the distances, {distances.shape[-1]}; it was {len(sizes)}")
    if not 0 < fraction < 1:
        raise ValueError(f"fraction must be between 0 and 1; it was {fraction}")
    below = distances < fraction * distances.nan_to_num(-torch.inf).amax(-1, keepdim=True)
    at = torch.tensor(list(sizes), dtype=torch.float64, device=distances.device)
    found = at.expand(below.shape).masked_fill(~below, torch.inf).amin(-1)
    out: Tensor = found.masked_fill(found.isinf(), torch.nan)
    return out


def gradient_sensitivity(
    logits: Float[Tensor, "*rows L"], temperature: float = 1.0, *, live: Bool[Tensor, "*any L"] | None = None
) -> Sensitivity:
    """Norm and largest entry of the softmax's Jacobian ``(diag w - w w^T) / T``, in O(L) a row.

    The norm is at most ``1 / (2 T)``, an entry at most ``1 / (4 T)``; two equal logits and no others reach both. The
    often quoted ``1 / (4 T)`` does not bound the norm.

    Args:
        logits: ``(..., L)``; the log of weights will do.
        temperature: T.
        live: which keys a row has; all where None.

    Raises:
        ValueError: a temperature that is not above 0.

    >>> gradient_sensitivity(torch.zeros(2))
    Sensitivity(norm=tensor(0.5000, dtype=torch.float64), entry=tensor(0.2500, dtype=torch.float64))
    """
    weights = normalise(logits.double(), temperature=temperature, live=live)
    # A product of two weights is at most w (1 - w) of either, so that the largest entry is on the diagonal.
    entry = (weights * (1 - weights)).amax(-1) / temperature
    if weights.shape[-1] == 1:
        return Sensitivity(torch.zeros_like(entry), entry)
    high, low = weights.topk(2, -1).values.split(1, -1)
    # The norm lies between the two greatest weights, where sum of w^2 / (w - norm) is 1: halve until it is found.
    for _ in range(45):
        middle = (low + high) / 2
        away = weights - middle
        above = (weights.square() / away.where(away != 0, 1.0)).sum(-1, keepdim=True) > 1
        low, high = low.where(above, middle), middle.where(above, high)
    return Sensitivity(((low + high) / 2)[..., 0] / temperature, entry)


def finite_sensitivity(
    logits: Float[Tensor, "*rows L"], change: Float[Tensor, "*rows L"], temperature: float = 1.0
) -> Float[Tensor, "*rows"]:
    """How far weights move for a change of the logits, ``|w(l + c) - w(l)| / |c|``, ``(...)`` in float64.

    >>> finite_sensitivity(torch.zeros(2), torch.tensor([1e-4, -1e-4]))
    tensor(0.5000, dtype=torch.float64)
    """
    before, after = (normalise(t.double(), temperature=temperature) for t in (logits, logits.double() + change))
    out: Tensor = (after - before).norm(dim=-1) / change.double().norm(dim=-1)
    return out


@torch.no_grad()
def selection_report(
    calls: Iterable[HeadCall],
    *,
    share: float = 0.25,
    temperatures: Sequence[float] = (1.0,),
    fraction: float = 0.1,
    sink: int = 0,
    unit: bool = True,
) -> list[HeadSelection]:
    """How each head of each layer selects: distance, separable share, critical size, entropy, sensitivity.

    Args:
        calls: of `glocal.inspect.record_heads` or `layer_call`.
        share: of the keys that are chosen, rounded to at least one.
        temperatures: at which sensitivity is taken, the weights being those at 1.
        fraction: of the greatest distance, for the critical size; distances are summed over the tokens left over.
        sink: first keys that take no part.
        unit: values are scaled to unit length.

    Returns:
        One row a head, layers in order.

    Raises:
        ValueError: a share out of range, or as in `critical_size` and `gradient_sensitivity`.

    >>> from glocal.inspect import layer_call
    >>> from glocal.nn import Attention
    >>> rows = selection_report([layer_call(Attention(8, 2, scale=0.0), torch.randn(1, 16, 8))])
    >>> [round(row.entropy, 3) for row in rows]
    [1.0, 1.0]
    """
    if not 0 < share < 1:
        raise ValueError(f"share must be between 0 and 1; it was {share}")
    found = []
    for call in calls:
        x = call.v.double().repeat_interleave(call.weights.shape[1] // call.v.shape[1], 1)
        x = normalize(x, dim=-1) if unit else x
        keys = call.weights.shape[-1] - sink
        live = call.live.clone()
        live[..., :sink] = False
        live &= call.real[:, None, :, None]
        size = max(1, round(share * keys))
        sizes = sorted({max(1, round(keys * step / 32)) for step in range(1, 32)})
        weights, ranks = call.weights.double(), _ranks(call.weights, live)
        totals = [_far(*_split(weights, x, ranks < n, live)).total.nanmean((0, 2)) for n in sizes]
        critical = critical_size(torch.stack(totals, -1), sizes, fraction) / keys
        split = _split(weights, x, ranks < size, live)
        mean, apart = _far(*split).mean.nanmean((0, 2)), _near(*split).nanmean((0, 2))
        logits = weights.log()
        norms = [gradient_sensitivity(logits, t, live=live & ~logits.isneginf()).norm for t in temperatures]
        worst = torch.stack([norm.amax((0, 2)) for norm in norms], -1)
        entropy = _evenness(weights * live, live).nanmean((0, 2))
        for head in range(weights.shape[1]):
            e, d, s, c = (float(t[head]) for t in (entropy, mean, apart, critical))
            found.append(HeadSelection(call.name, head, keys, e, d, s, c, tuple(worst[head].tolist())))
    return found


def _far(chosen: Tensor, left: Tensor, far: Tensor) -> SelectionDistance:
    count = left.sum(-1)
    total = (far * left).sum(-1)
    return SelectionDistance(total / count, total.masked_fill(count == 0, torch.nan))


def _near(chosen: Tensor, left: Tensor, far: Tensor) -> Tensor:
    radius = far.masked_fill(~left, torch.inf).amin(-1, keepdim=True)
    # Distances are made of sums of squares: what is equal but for rounding is no farther.
    near = chosen & (far <= radius * (1 + 1e-7) + 1e-12)
    share = near.sum(-1) / chosen.sum(-1).double()
    return share.masked_fill(~left.any(-1), torch.nan)


def _evenness(weights: Tensor, live: Tensor) -> Tensor:
    """Entropy of weights made to sum to 1, over that of equal ones; nan where there is no choice."""
    count = live.sum(-1)
    shares = weights / weights.sum(-1, keepdim=True)
    out: Tensor = (torch.special.entr(shares).sum(-1) / count.log()).masked_fill(count < 2, torch.nan)
    return out


def _distances(weights: Tensor, x: Tensor, size: int, live: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Which tokens are chosen, which are left over, and how far each is from the sum, all ``(..., Q, L)``."""
    if weights.dim() < 2 or x.dim() < 2 or weights.shape[-1] != x.shape[-2]:
        raise ValueError(
            f"weights must be (..., Q, L) and x (..., L, d); they were {tuple(weights.shape)} and {tuple(x.shape)}"
        )
    if size < 1:
        raise ValueError(f"size must be at least 1; it was {size}")
    seen = torch.ones_like(weights, dtype=torch.bool) if live is None else live.expand(weights.shape)
    return _split(weights.double(), x.double(), _ranks(weights, seen) < size, seen)


def _ranks(weights: Tensor, seen: Tensor) -> Tensor:
    """Place of each token by its weight, from 0; those that take no part come last."""
    order = torch.sort(weights.masked_fill(~seen, -1), dim=-1, descending=True, stable=True).indices
    places = torch.arange(weights.shape[-1], device=weights.device).expand(weights.shape)
    return torch.empty_like(order).scatter_(-1, order, places)


def _split(weights: Tensor, x: Tensor, first: Tensor, seen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`_distances` where it is known which tokens come first."""
    chosen, left = first & seen, ~first & seen
    total = (weights * chosen) @ x
    square = x.square().sum(-1)[..., None, :]
    far = total.square().sum(-1, keepdim=True) - 2 * weights * (total @ x.mT) + weights.square() * square
    return chosen, left, far.clamp(min=0).sqrt()
