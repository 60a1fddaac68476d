"""An order of the cells of a grid in which neighbours in the order are neighbours in the grid."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from glocal.patterns.base import whole

__all__ = ["hilbert_order"]


def hilbert_order(h: int, w: int) -> Tensor:
    """A Hilbert curve through a grid of any size: flattened cells, in the order in which the curve meets them.

    A run of the order is a compact region, where a run of rows is a strip. It starts at cell 0, and each step goes to
    an adjacent cell, but for one diagonal step where the longer side is odd and the other even.

    Args:
        h, w: rows and columns.

    Returns:
        Integers ``(h * w,)``, a permutation.

    Raises:
        ValueError: a side below 1.

    >>> hilbert_order(2, 2).tolist()
    [0, 2, 3, 1]
    >>> hilbert_order(3, 4)[:6].tolist()
    [0, 1, 5, 4, 8, 9]
    """
    whole(h, "h", 1)
    whole(w, "w", 1)
    long, short = (complex(w), complex(0, h)) if w >= h else (complex(0, h), complex(w))
    return torch.tensor([int(cell.imag) * w + int(cell.real) for cell in _walk(0j, long, short)], device="cpu")


def _walk(at: complex, along: complex, across: complex) -> Iterator[complex]:
    """Cells (column + i row) of the rectangle that two axis-parallel sides span from ``at``, walked along the first."""
    length, width = int(abs(along)), int(abs(across))
    ahead, aside = along / length, across / width  # unit steps
    if width == 1:
        yield from (at + n * ahead for n in range(length))
    elif length == 1:
        yield from (at + n * aside for n in range(width))
    elif 2 * length > 3 * width:  # long: two halves, one after the other
        half = _half(along, ahead)
        yield from _walk(at, half, across)
        yield from _walk(at + half, along - half, across)
    else:  # up on one side, over, and down on the other
        half, far = _floor(along), _half(across, aside)
        yield from _walk(at, far, half)
        yield from _walk(at + far, along, across - far)
        yield from _walk(at + (along - ahead) + (far - aside), -far, half - along)


def _floor(side: complex) -> complex:
    return complex(side.real // 2, side.imag // 2)


def _half(side: complex, step: complex) -> complex:
    """Half a side, even where it can be: an even piece ends where the next one can start."""
    half = _floor(side)
    return half + step if int(abs(half)) % 2 and abs(side) > 2 else half
