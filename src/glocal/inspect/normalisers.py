"""Ways from logits to weights that sum to one, and how thin such weights must be spread over many keys.

Mudarisov et al., 2025, arXiv 2508.17821.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from glocal.nn import sparsemax
from glocal.shapes import Bool, Float

__all__ = ["Normaliser", "dilution_bounds", "normalise"]

Normaliser = Literal["softmax", "power", "sigmoid", "softplus", "sparsemax", "scalable"]
"""The first four are ``F(l_i) / sum_j F(l_j)`` with an F that knows nothing of the number of keys."""


def normalise(
    logits: Float[Tensor, "*rows L"],
    kind: Normaliser = "softmax",
    *,
    temperature: float = 1.0,
    power: float = 2.0,
    floor: float = 1e-6,
    sharpness: float = 1.0,
    live: Bool[Tensor, "*any L"] | None = None,
) -> Float[Tensor, "*rows L"]:
    """Weights of each row, for comparing normalisers; layers normalise in `glocal.attend`.

    With l a logit over the temperature: ``exp(l)`` for softmax, ``relu(l)^power + floor``, ``sigmoid(l)``,
    ``softplus(l)``; sparsemax is the nearest point of the simplex (Martins and Astudillo, 2016, arXiv 1602.02068);
    scalable softmax is ``exp(sharpness log(L) l)``, L the keys of the row (Nakanishi, 2025, arXiv 2501.19399).

    Args:
        logits: ``(..., L)``.
        kind: one of `Normaliser`.
        temperature: divides the logits.
        power, floor: of ``"power"``.
        sharpness: of ``"scalable"``.
        live: which keys a row has, broadcasts to ``(..., L)``; all where None. A row without keys gives zeros.

    Returns:
        ``(..., L)`` in float32 or the wider type of the logits.

    Raises:
        ValueError: another kind, numbers that are not above 0.

    >>> logits = torch.tensor([2.0, 1.0, -1.0])
    >>> normalise(logits, "sparsemax"), normalise(logits, "power", power=1.0)
    (tensor([1., 0., 0.]), tensor([6.6667e-01, 3.3333e-01, 3.3333e-07]))
    """
    _check(kind, temperature, power, floor, sharpness)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    seen = torch.ones_like(wide, dtype=torch.bool) if live is None else live.expand(wide.shape)
    if kind == "sparsemax":
        logits = wide / temperature
        # What lies 1 or more below the greatest logit gets nothing.
        nothing = logits.masked_fill(~seen, -torch.inf).amax(-1, keepdim=True).nan_to_num(neginf=0.0) - 2
        return sparsemax(torch.where(seen, logits, nothing)).masked_fill(~seen, 0.0)
    count = seen.sum(-1, keepdim=True).clamp(min=1)
    logs = _log(wide / temperature, kind, power, floor, sharpness, count).masked_fill(~seen, -torch.inf)
    return logs.softmax(-1).masked_fill(~seen, 0.0)


def dilution_bounds(
    low: float,
    high: float,
    length: int,
    kind: Normaliser = "softmax",
    *,
    temperature: float = 1.0,
    power: float = 2.0,
    floor: float = 1e-6,
    sharpness: float = 1.0,
) -> tuple[float, float]:
    """What no weight can fall below or rise above where all logits lie between two numbers.

    ``F(low) / (length F(high)) <= weight <= F(high) / (length F(low))``: both fall as ``1 / length`` for an F that
    knows nothing of the length.

    Args:
        low, high: of the logits.
        length: keys of a row.
        kind, temperature, power, floor, sharpness: as in `normalise`; not ``"sparsemax"``, which has no F.

    Returns:
        The least and the greatest.

    Raises:
        ValueError: ``"sparsemax"``, ``low`` above ``high``, or as in `normalise`.

    >>> dilution_bounds(-1.0, 1.0, 100)  # doctest: +ELLIPSIS
    (0.00135..., 0.0738...)
    """
    _check(kind, temperature, power, floor, sharpness)
    if kind == "sparsemax":
        raise ValueError("kind must be of the family F(l) / sum F(l); 'sparsemax' is not")
    if low > high or length < 1:
        raise ValueError(f"low must be at most high and length at least 1; they were {low}, {high} and {length}")
    ends = torch.tensor([low, high], dtype=torch.float64) / temperature
    first, last = _log(ends, kind, power, floor, sharpness, torch.tensor(length)).tolist()
    return math.exp(first - last) / length, math.exp(last - first) / length


def _log(logits: Tensor, kind: str, power: float, floor: float, sharpness: float, count: Tensor) -> Tensor:
    """Log of F."""
    if kind == "power":
        return (logits.clamp(min=0) ** power + floor).log()
    if kind == "sigmoid":
        return logsigmoid(logits)
    if kind == "softplus":
        # Far below zero, softplus(l) is exp(l): its log keeps what the sum in it would round away.
        return torch.where(logits < -15, logits, softplus(logits.clamp(min=-15)).log())
    return sharpness * count.to(logits).log() * logits if kind == "scalable" else logits


def _check(kind: str, temperature: float, power: float, floor: float, sharpness: float) -> None:
    if kind not in get_args(Normaliser):
        raise ValueError(f"kind must be one of {', '.join(get_args(Normaliser))}; it was {kind!r}")
    given = {"temperature": temperature, "power": power, "floor": floor, "sharpness": sharpness}
    for name, value in given.items():
        if not value > 0:
            raise ValueError(f"{name} must be above 0; it was {value}")
