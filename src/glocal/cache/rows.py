"""The border of what is done, while blocks of an image are computed in raster order: one block row and one column."""

from __future__ import annotations

import torch
from torch import Tensor

from glocal.shapes import Bool, Float

__all__ = ["BlockRowCache", "extend_blocks"]

Pair = tuple[Tensor, Tensor]


def extend_blocks(
    k: Float[Tensor, "B Hkv X Y n D"],
    v: Float[Tensor, "B Hkv X Y n Dv"],
    above: Pair | None = None,
    left: Pair | None = None,
    corner: Pair | None = None,
) -> tuple[Float[Tensor, "B Hkv X1 Y1 n D"], Float[Tensor, "B Hkv X1 Y1 n Dv"], Bool[Tensor, "X1 Y1"]]:
    """Blocks with one row above and one column at the left; where there is none, the nearest block is repeated.

    Args:
        k, v: X x Y blocks of n tokens.
        above, left, corner: keys and values of 1 x Y, X x 1 and 1 x 1 blocks; None outside of the image.

    Returns:
        Keys and values of ``X + 1`` rows and ``Y + 1`` columns, and which of these blocks are none that was repeated.

    >>> k = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).view(1, 1, 2, 2, 1, 1)
    >>> extend_blocks(k, k)[0].view(3, 3).int().tolist()
    [[1, 1, 2], [1, 1, 2], [3, 3, 4]]
    """
    wide = []
    for n, x in enumerate((k, v)):
        top = x[:, :, :1] if above is None else above[n]
        side = x[:, :, :, :1] if left is None else left[n]
        first = corner[n] if corner is not None else top[:, :, :, :1] if left is None else side[:, :, :1]
        wide.append(torch.cat([torch.cat([first, top], 3), torch.cat([side, x], 3)], 2))
    real = torch.ones(wide[0].shape[2:4], dtype=torch.bool, device=k.device)
    real[0] &= above is not None
    real[:, 0] &= left is not None
    return wide[0], wide[1], real


class BlockRowCache:
    """Keys and values that the next blocks read: of the block row above them, and of the block column at their left.

    Not a `Cache`, whose tokens come one after the other: here rectangles of blocks (super-blocks) come from left to
    right, then row after row. Memory is that of one block row, one super-block's column and a corner, whatever the
    height of the image.

    Args:
        columns: blocks in a row of the image.

    Raises:
        ValueError: no columns, or a super-block that does not fit where it should go.

    Unidirectional block attention, Yang et al., 2024, arXiv 2405.04312.

    >>> cache, k = BlockRowCache(4), torch.randn(1, 2, 2, 2, 9, 8)  # 2 heads, 2 x 2 blocks of 9 tokens
    >>> for _ in range(10):
    ...     wide, _, real = cache.extend(k, k)
    >>> wide.shape, cache.at
    (torch.Size([1, 2, 3, 3, 9, 8]), (10, 0))
    >>> cache.numel == 2 * (4 + 2 + 1) * 2 * 9 * 8  # keys and values of a row, a column and a corner
    True
    """

    def __init__(self, columns: int) -> None:
        if columns < 1:
            raise ValueError(f"columns must be at least 1; it was {columns}")
        self.columns = columns
        self.at = (0, 0)
        """Block row and block column at which the next super-block starts."""
        self._row: Pair | None = None  # bottom blocks: of this row of super-blocks up to `at`, then of the one above
        self._left: Pair | None = None
        self._corner: Pair | None = None  # at the upper left of the next super-block

    def extend(
        self, k: Float[Tensor, "B Hkv X Y n D"], v: Float[Tensor, "B Hkv X Y n Dv"]
    ) -> tuple[Float[Tensor, "B Hkv X1 Y1 n D"], Float[Tensor, "B Hkv X1 Y1 n Dv"], Bool[Tensor, "X1 Y1"]]:
        """The next super-block as `extend_blocks` gives it; then its own border takes the place of what it has read."""
        (x, y), (height, width) = self.at, k.shape[2:4]
        if y + width > self.columns:
            raise ValueError(f"k must be at most {self.columns - y} blocks wide at column {y}; it was {width}")
        if y and self._left is not None and self._left[0].shape[2] != height:
            raise ValueError(f"k must be {self._left[0].shape[2]} blocks high as its neighbour; it was {height}")
        if self._row is None:
            shapes = ((*t.shape[:2], 1, self.columns, *t.shape[4:]) for t in (k, v))
            row_k, row_v = (t.new_empty(shape) for t, shape in zip((k, v), shapes, strict=True))
            self._row = row_k, row_v
        here, end = slice(y, y + width), y + width
        above = (self._row[0][:, :, :, here], self._row[1][:, :, :, here]) if x else None
        out = extend_blocks(k, v, above, self._left if y else None, self._corner if x and y else None)
        last = slice(end - 1, end)
        self._corner = (self._row[0][:, :, :, last].clone(), self._row[1][:, :, :, last].clone()) if x else None
        for row, t in zip(self._row, (k, v), strict=True):
            row[:, :, :, here] = t[:, :, -1:].detach()
        self._left = k[:, :, :, -1:].detach().clone(), v[:, :, :, -1:].detach().clone()
        self.at = (x, end) if end < self.columns else (x + height, 0)
        return out

    def tensors(self) -> tuple[Tensor, ...]:
        """Everything that takes memory."""
        return (*(self._row or ()), *(self._left or ()), *(self._corner or ()))

    @property
    def numel(self) -> int:
        """Numbers held."""
        return sum(t.numel() for t in self.tensors())
