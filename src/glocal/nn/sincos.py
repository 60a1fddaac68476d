"""Fixed sine and cosine embeddings of positions on a line or on a grid."""

from __future__ import annotations

import torch
from torch import Tensor

from glocal.shapes import Float

__all__ = ["sincos", "sincos_grid"]


def sincos(position: Float[Tensor, "*any"], dim: int) -> Float[Tensor, "*any dim"]:
    """Sines, then cosines, of positions at ``dim / 2`` wavelengths from 2 pi to 10,000 times that.

    Args:
        position: ``(...)``, any real numbers.
        dim: channels, a multiple of 2.

    Raises:
        ValueError: an odd ``dim``.

    Vaswani et al., 2017, arXiv 1706.03762; the halves are laid out as in MAE.

    >>> sincos(torch.tensor([0.0]), 4).tolist()
    [[0.0, 0.0, 1.0, 1.0]]
    """
    if dim < 2 or dim % 2:
        raise ValueError(f"dim must be a multiple of 2; it was {dim}")
    rate = 10000.0 ** -(torch.arange(dim // 2, device=position.device, dtype=torch.float64) / (dim // 2))
    angle = position.double().unsqueeze(-1) * rate
    return torch.cat([angle.sin(), angle.cos()], -1).to(torch.get_default_dtype())


def sincos_grid(rows: int, columns: int, dim: int) -> Float[Tensor, "rows*columns dim"]:
    """Positions of a grid, row by row: half of the channels for the column, then half for the row, as in MAE.

    Raises:
        ValueError: ``dim`` is no multiple of 4.

    >>> sincos_grid(2, 3, 8).shape
    torch.Size([6, 8])
    """
    if dim < 4 or dim % 4:
        raise ValueError(f"dim must be a multiple of 4; it was {dim}")
    row, column = (sincos(torch.arange(n), dim // 2) for n in (rows, columns))
    parts = [column.expand(rows, -1, -1), row.unsqueeze(1).expand(-1, columns, -1)]
    return torch.cat(parts, -1).flatten(0, 1)
