"""Darcy flow on the unit square: the pressure of a fluid in a porous body, the usual test of operator networks.

    - div(a grad u) = f,  u = 0 on the border

``a`` is what the body lets through, ``u`` the pressure. Li et al., 2021, arXiv 2010.08895, have made it a benchmark: f
is 1, and a is 12 or 3 after the sign of a smooth Gaussian field. Here it is solved by finite volumes, on cells.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from glocal.shapes import Float

__all__ = ["Darcy", "darcy", "permeability", "pressure", "relative_error"]

Grid = npt.NDArray[np.float64]


class Darcy(NamedTuple):
    """Pairs of what is given and what is sought."""

    a: Tensor
    """What the body lets through, ``(count, 1, side, side)``."""
    u: Tensor
    """Pressure, ``(count, 1, side, side)``."""


def permeability(
    side: int, generator: np.random.Generator, *, low: float = 3.0, high: float = 12.0, tau: float = 3.0
) -> Grid:
    """``high`` where a Gaussian field of covariance ``(tau^2 - Laplace)^-2`` is positive, ``low`` elsewhere.

    The field has no flux through the border, and its mean is 0.

    Args:
        side: cells on each axis.
        generator: of the field.
        low, high: the two values, above 0.
        tau: inverse length of what is alike.

    Returns:
        ``(side, side)``.

    >>> field = permeability(16, np.random.default_rng(0))
    >>> field.shape, sorted(set(field.flatten().tolist()))
    ((16, 16), [3.0, 12.0])
    """
    from scipy.fft import idctn

    if side < 2:
        raise ValueError(f"side must be at least 2; it was {side}")
    if min(low, high) <= 0:
        raise ValueError(f"low and high must be more than 0; they were {low} and {high}")
    wave = np.pi * np.arange(side)
    share = 1 / (wave[:, None] ** 2 + wave[None] ** 2 + tau**2)
    share[0, 0] = 0.0
    field: Grid = idctn(share * generator.standard_normal((side, side)), norm="ortho")
    return np.where(field > 0, high, low)


def pressure(a: Grid, f: Grid | float = 1.0) -> Grid:
    """The ``u`` of ``- div(a grad u) = f`` in the unit square with ``u = 0`` on its border, at the centres of cells.

    Five points a cell; through a face goes what the harmonic mean of its two cells lets through. Errors fall with the
    square of the cells' size where ``a`` is smooth.

    Args:
        a: above 0, at the centres of cells, ``(rows, columns)``.
        f: the same shape, or one number.

    Returns:
        ``(rows, columns)``.

    Raises:
        ValueError: no two axes, an ``a`` that is not above 0, an ``f`` of another shape.

    >>> u = pressure(np.ones((32, 32)))
    >>> round(float(u.max()), 3)  # 0.0737 in the middle of a membrane
    0.074
    """
    from scipy.sparse import coo_matrix
    from scipy.sparse.linalg import spsolve

    a = np.asarray(a, dtype=np.float64)
    if a.ndim != 2 or not (a > 0).all():
        raise ValueError(f"a must be (rows, columns), all above 0; it was {a.shape}, at least {a.min(initial=np.inf)}")
    right = np.broadcast_to(np.asarray(f, dtype=np.float64), a.shape) if np.ndim(f) == 0 else np.asarray(f)
    if right.shape != a.shape:
        raise ValueError(f"f must be a number or {a.shape}; it was {right.shape}")
    number = np.arange(a.size).reshape(a.shape)
    centre = np.zeros(a.shape)
    rows: list[npt.NDArray[Any]] = []
    columns: list[npt.NDArray[Any]] = []
    values: list[npt.NDArray[Any]] = []
    for axis, cells in enumerate(a.shape):
        wide = 1.0 / cells**2
        one, other = (np.take(a, range(*ends), axis) for ends in ((0, cells - 1), (1, cells)))
        flow = 2 * one * other / (one + other) / wide
        here, there = (np.take(number, range(*ends), axis) for ends in ((0, cells - 1), (1, cells)))
        for first, second in ((here, there), (there, here)):
            rows.append(first.ravel())
            columns.append(second.ravel())
            values.append(-flow.ravel())
            np.add.at(centre, np.unravel_index(first.ravel(), a.shape), flow.ravel())
        for end in (0, cells - 1):  # half a cell to the border, where u is 0
            border: tuple[slice | int, slice | int] = (end, slice(None)) if axis == 0 else (slice(None), end)
            centre[border] += 2 * a[border] / wide
    rows.append(number.ravel())
    columns.append(number.ravel())
    values.append(centre.ravel())
    at = (np.concatenate(rows), np.concatenate(columns))
    matrix = coo_matrix((np.concatenate(values), at), shape=(a.size, a.size)).tocsc()
    found: Grid = spsolve(matrix, right.ravel()).reshape(a.shape)
    return found


def darcy(count: int, side: int, *, seed: int = 0) -> Darcy:
    """Bodies and their pressures under ``f = 1``, each from the field of its own number.

    Args:
        count: pairs.
        side: cells on each axis.
        seed: the first ``n`` pairs of a seed are the same for every ``count``.

    >>> data = darcy(2, 16)
    >>> data.a.shape, data.u.shape
    (torch.Size([2, 1, 16, 16]), torch.Size([2, 1, 16, 16]))
    """
    if count < 1:
        raise ValueError(f"count must be at least 1; it was {count}")
    bodies = [permeability(side, np.random.default_rng((seed, n))) for n in range(count)]
    stacked = (np.stack(bodies), np.stack([pressure(body) for body in bodies]))
    a, u = (torch.from_numpy(t).float()[:, None] for t in stacked)
    return Darcy(a, u)


def relative_error(found: Float[Tensor, "B *any"], wanted: Float[Tensor, "B *any"]) -> Tensor:
    """``|found - wanted| / |wanted|`` of each item, by Euclidean norms; the mean over the batch."""
    apart, size = (torch.linalg.vector_norm(t.flatten(1), dim=1) for t in (found - wanted, wanted))
    mean: Tensor = (apart / size).mean()
    return mean
