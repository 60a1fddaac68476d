"""LASS: neighborhood attention whose outputs are then scanned over the whole map, local first and global after."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, silu

from glocal.cache import Cache
from glocal.nn.conv import Depthwise
from glocal.nn.frame import Call
from glocal.nn.neighborhood import NeighborhoodAttention
from glocal.nn.rope import Rope
from glocal.nn.ss2d import CrossScan
from glocal.patterns import Full, Pattern, Window
from glocal.shapes import Float

__all__ = ["LASS"]

_BOTH_WAYS = "what it scans after the windows goes through the whole map, in both directions"
_ONE_MAP = "windows and scans need one map for queries and keys"


class LASS(NeighborhoodAttention):
    """Local Attention and State Space: windows for detail, then a scan for context, both at linear cost.

    Fu et al., 2024, arXiv 2412.11890.

    ``o_proj(y + norm(scan(silu(bn(conv(y))))) + lepe(v))``, where ``y`` is neighborhood attention with a relative bias
    and the scan goes four ways through the map. On a coarse map, with ``full``, full attention takes the scan's place:
    the same queries and keys, with ``y`` for values.

    Args:
        dim, num_heads, options: as in `Attention`; projections have biases, rotary positions are over two axes, and
            values are convolved, 5 x 5, unless told otherwise.
        window: keys an axis. On a map that is smaller, all.
        state: numbers of state a channel of the scan.
        full: sides of the map for which full attention has a bias, learned for each head and pair of places; for other
            maps it is resized bicubically. None scans.

    In training pass a batch of two or more places: there is a batch norm.

    Raises:
        ValueError: what `NeighborhoodAttention` refuses; at use padding, a context or extra tokens, which a scan of the
            map has no place for.

    >>> layer = LASS(32, 4, window=7)
    >>> layer(torch.randn(2, 9, 12, 32)).shape
    torch.Size([2, 9, 12, 32])
    >>> LASS(32, 4, window=7, full=(7, 7))(torch.randn(2, 5, 6, 32)).shape
    torch.Size([2, 5, 6, 32])
    """

    uses: ClassVar[tuple[str, ...]] = ("noncausal-self",)  # type: ignore[assignment]
    refuses: ClassVar[dict[str, str]] = {
        "causal-self": _BOTH_WAYS,
        "noncausal-cross": _ONE_MAP,
        "causal-cross": _ONE_MAP,
    }
    tiny: ClassVar[dict[str, Any]] = {"grid": (3, 4), "window": 3}

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window: int | Sequence[int] = 7,
        *,
        state: int = 1,
        full: tuple[int, int] | None = None,
        **options: Any,
    ) -> None:
        settings: dict[str, Any] = {"rope": Rope(axes=2, interleaved=True, endpoint=True), "lepe": 5} | options
        super().__init__(dim, num_heads, window, 1, 1, **settings)
        if len(self.window) != 2:
            raise ValueError(f"window must be one integer or one for each axis of a map; it was {window}")
        if self.rpb is not None:
            nn.init.zeros_(self.rpb)
        inner = num_heads * self.head_dim
        self.full = full
        if full is None:
            self.conv, self.bn = Depthwise(inner, 3), nn.BatchNorm2d(inner)
            self.scan, self.norm = CrossScan(inner, state), nn.LayerNorm(inner, eps=1e-6)
        else:
            places = full[0] * full[1]
            self.places = nn.Parameter(torch.zeros(num_heads, places, places))

    def where(self, q: Tensor, k: Tensor, call: Call) -> Pattern:
        """A window, or the whole of an axis that is shorter."""
        return Window(tuple(min(w, n) for w, n in zip(self.window, k.shape[2:-1], strict=True)))

    def place_bias(self, grid: tuple[int, ...]) -> Tensor:
        """The bias of full attention on a map of other sides, ``(num_heads, N, N)``: keys are resized, then queries."""
        bias: Tensor = self.places
        if self.full is not None and grid != self.full:
            for _ in range(2):
                bias = interpolate(bias.unflatten(2, self.full), grid, mode="bicubic").flatten(2).mT
        return bias

    def mix(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        """Windows, then the scan or full attention over what they gave."""
        y: Tensor = self.attend(q, k, v, self.where(q, k, call), call)
        if self.full is not None:
            bias = self.place_bias(tuple(q.shape[2:-1])).to(q.dtype)
            out: Tensor = self.attend(q, k, y, Full(), call, bias=bias[None])
            return out
        y = y.movedim(1, -2).flatten(-2)
        scanned = self.scan(silu(self.bn(self.conv(y).movedim(-1, 1))).movedim(1, -1))
        return self.heads(self.norm(scanned) + y, self.num_heads)

    def forward(
        self,
        x: Float[Tensor, "B H W dim"],
        context: Tensor | None = None,
        *,
        extra: Tensor | None = None,
        keys: Tensor | None = None,
        positions: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Float[Tensor, "B H W dim"]:
        """A map to a map of the same size.

        Args:
            x: ``(B, H, W, dim)``.
            positions: ``(H W, 2)``, for rotary embeddings; counted where None.
            context, extra, keys, cache: refused.
        """
        for name, value in (("extra", extra), ("keys", keys)):
            if value is not None:
                raise ValueError(f"{name} must be None: a scan of a map has no place for extra tokens or padding")
        return super().forward(x, context, positions=positions, cache=cache)

    def _fits(self, x: Tensor) -> None:
        if x.dim() != 4 or x.shape[-1] != self.dim:
            raise ValueError(f"x must be (B, *grid, {self.dim}) with a grid of 2 axes; it was {tuple(x.shape)}")
