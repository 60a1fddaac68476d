"""Unidirectional block attention: each block of an image reads itself and its neighbours above and at the left."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from glocal.attention import merge
from glocal.cache import Cache
from glocal.cache.rows import BlockRowCache, extend_blocks
from glocal.nn.frame import Attention, Call
from glocal.nn.rope import Rope
from glocal.patterns import Full
from glocal.shapes import Bool, Float

__all__ = ["UnidirectionalBlockAttention"]

_NEIGHBOURS = {
    "lt": ((0, 0), (1, 1), (0, 1), (1, 0)),  # itself, left and above, left, above: rows up and columns left of it
    "rb": ((0, 0), (1, 1), (1, 0), (0, 1)),  # mirrored, but for the roles of row and column
}


class UnidirectionalBlockAttention(Attention):
    """Queries of a block of ``block_size x block_size`` positions read four blocks, in one softmax.

    These are, by role: the block itself, the one above and to the left, the one to the left, the one above. A learned
    vector for each role and key head, zero at first, is added to the keys after their rotation. What a block depends on
    lies above and to the left of it however many layers there are, so an image can be computed block by block, with the
    keys and values of one block row kept (`glocal.cache.BlockRowCache`). Yang et al., 2024, arXiv 2405.04312 (Inf-DiT).

    Queries and keys are normalised by head (``qk_norm="layer"``), each by a norm of its own, and rotated on two axes;
    ``qk_norm`` and ``rope`` change that.

    Args:
        dim, num_heads: as in `Attention`, with all its options.
        block_size: side of a block.
        border: a neighbour outside of the image is the nearest block inside (``"replicate"``, which the block itself
            may be), or is left out (``"drop"``).
        direction: ``"lt"``; or ``"rb"``, which reads itself, below and to the right, below, to the right, in the order
            of the same roles.

    Raises:
        ValueError: a size below 1, another border or direction, a grid that is not made of whole blocks, padding,
            any use but noncausal self-attention, or what `Attention` refuses.

    >>> import torch
    >>> from glocal.cache import BlockRowCache
    >>> from glocal.nn import UnidirectionalBlockAttention
    >>> layer, x = UnidirectionalBlockAttention(64, 4, block_size=4), torch.randn(1, 8, 12, 64)
    >>> rows = BlockRowCache(3)  # blocks in a row; they come in raster order
    >>> parts = [layer(part, rows=rows) for line in x.split(4, 1) for part in line.split(4, 2)]
    >>> whole = torch.cat([torch.cat(parts[:3], 2), torch.cat(parts[3:], 2)], 1)
    >>> torch.allclose(whole, layer(x), atol=1e-5)
    True
    """

    uses = ("noncausal-self",)
    refuses: ClassVar[dict[str, str]] = {
        "causal-self": "inside a block every position sees every other",
        "noncausal-cross": "queries and keys need one grid",
        "causal-cross": "queries and keys need one grid",
    }
    tiny: ClassVar[dict[str, Any]] = {"grid": (6, 4), "block_size": 2}
    no_padding = True

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        block_size: int = 32,
        border: str = "replicate",
        direction: str = "lt",
        **options: Any,
    ) -> None:
        defaults: dict[str, Any] = {"qk_norm": "layer", "rope": Rope(axes=2)}
        super().__init__(dim, num_heads, **(defaults | options))
        if block_size < 1:
            raise ValueError(f"block_size must be at least 1; it was {block_size}")
        if border not in ("replicate", "drop"):
            raise ValueError(f"border must be 'replicate' or 'drop'; it was {border!r}")
        self.block_size, self.border, self.direction = block_size, border, _known(direction)
        self.roles = nn.Parameter(torch.zeros(4, self.num_kv_heads, self.head_dim))

    def mix(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        call: Call,
        rows: BlockRowCache | None = None,
        direction: str | None = None,
    ) -> Tensor:
        direction = self.direction if direction is None else direction
        turned = (2, 3) if direction == "rb" else ()  # in the mirrored order of blocks, below is above
        q, k, v = (self._blocks(t).flip(turned) for t in (q, k, v))
        height, width = q.shape[2:4]
        k, v, real = extend_blocks(k, v) if rows is None else rows.extend(k, v)
        batch, queries, parts = q.shape[0], _by_block(q), []
        for role, (up, left) in zip(self.roles, _NEIGHBOURS[direction], strict=True):
            at = slice(1 - up, 1 - up + height), slice(1 - left, 1 - left + width)
            keys = _by_block(k[:, :, *at] + role[:, None, None, None])
            out, lse = self.attend(queries, keys, _by_block(v[:, :, *at]), Full(), call, return_lse=True)
            if self.border == "drop":
                outside = ~real[at].expand(batch, -1, -1).reshape(-1, 1, 1)
                lse = lse.masked_fill(outside, -torch.inf)
            parts.append((out, lse))
        blocks = merge(parts).unflatten(0, (batch, height, width)).movedim(3, 1).flip(turned)
        return self._image(blocks)

    def forward(
        self,
        x: Float[Tensor, "B h w dim"],
        context: Tensor | None = None,
        *,
        keys: Bool[Tensor, "B h w"] | None = None,
        positions: Tensor | None = None,
        cache: Cache | None = None,
        rows: BlockRowCache | None = None,
        direction: str | None = None,
    ) -> Float[Tensor, "B h w dim"]:
        """Attend.

        Args:
            x: ``(B, h, w, dim)``, both sides multiples of ``block_size``.
            context, keys, cache: refused.
            positions: ``(h * w, 2)``, for rotary positions; counted where None.
            rows: ``x`` is then the next super-block of an image, in raster order; for ``"rb"`` in the reverse order,
                and then with ``positions``.
            direction: instead of the layer's own.

        Returns:
            ``(B, h, w, dim)``.

        Raises:
            ValueError: shapes that do not fit, a use that the mechanism does not have.
        """
        size = self.block_size
        if x.dim() != 4 or x.shape[-1] != self.dim:
            raise ValueError(f"x must be (B, *grid, {self.dim}) with a grid of h x w; it was {tuple(x.shape)}")
        self._has_use("noncausal-self" if context is None else "noncausal-cross")
        if keys is not None or cache is not None:
            raise ValueError("keys (padding) and cache are not for blocks of an image; crop it, or give rows")
        grid = tuple(x.shape[1:3])
        if 0 in grid or any(n % size for n in grid):
            raise ValueError(f"x must have sides that are multiples of block_size {size}; it was {tuple(x.shape)}")
        direction = self.direction if direction is None else _known(direction)
        if positions is None:
            if rows is not None and direction == "rb" and self.rope is not None:
                raise ValueError("positions must be given with rows from the lower right, which do not know the height")
            positions = self.positions(grid, 0, x.device)
            if rows is not None and positions.dim() == 2:
                positions = positions + torch.tensor(rows.at, device=x.device) * size
        q, k, v = self.project(x, x, positions, positions)
        mixed = self.mix(q, k, v, Call(x, x, None, None, False), rows, direction)
        out: Tensor = self.o_proj(mixed.movedim(1, -2).flatten(-2))
        return out

    def _blocks(self, t: Tensor) -> Tensor:
        """``(B, H, h, w, D)`` to ``(B, H, X, Y, n, D)``."""
        size = self.block_size
        blocks: Tensor = t.unflatten(3, (-1, size)).unflatten(2, (-1, size)).transpose(3, 4).flatten(4, 5)
        return blocks

    def _image(self, t: Tensor) -> Tensor:
        """``(B, H, X, Y, n, D)`` to ``(B, H, h, w, D)``."""
        size = self.block_size
        image: Tensor = t.unflatten(4, (size, size)).transpose(3, 4).flatten(4, 5).flatten(2, 3)
        return image

    def extra_repr(self) -> str:
        return f"block_size={self.block_size}, border={self.border!r}, direction={self.direction!r}"


def _by_block(t: Tensor) -> Tensor:
    """``(B, H, X, Y, n, D)`` to ``(B * X * Y, H, n, D)``."""
    return t.movedim(1, 3).flatten(0, 2)


def _known(direction: str) -> str:
    if direction not in _NEIGHBOURS:
        raise ValueError(f"direction must be 'lt' or 'rb'; it was {direction!r}")
    return direction
