"""Neighborhood attention: a window around each query, moved inward at borders; gaps, strides, extra keys."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from glocal.attention import merge
from glocal.cache import Cache, DilatedWindowCache, WindowCache
from glocal.nn.frame import Attention, Call
from glocal.patterns import Full, Pattern, Strided, Window
from glocal.patterns.base import per_axis, whole_axes
from glocal.scores import RelativePosition, Score
from glocal.shapes import Float

__all__ = ["NeighborhoodAttention"]

_NO_CROSS = "a neighborhood needs one grid for queries and keys; keys without a place go in as extra"


class NeighborhoodAttention(Attention):
    """Each query of a sequence, map or volume sees ``window`` keys an axis around it, ``dilation`` apart.

    Near a border the window moves inward, so that no query loses keys and nothing is padded. With ``stride``, so many
    neighbouring queries share one window; ``stride=window`` is blocked attention. Hassani et al., 2022, arXiv
    2204.07143 and (dilation) 2209.15001; Hassani et al., 2024, arXiv 2403.04690 (settings an axis, causal axes); 2025,
    arXiv 2504.16922 (stride, extra keys).

    Settings but the window are one value, or one an axis.

    Args:
        dim, num_heads: as in `Attention`, with all its options; the projections have biases unless told otherwise.
        window: keys an axis, as many as the grid has axes; one integer is for both axes of a map. An even window has
            its spare key on the left.
        dilation: how far apart they are. ``"auto"`` takes the largest that each axis allows, ``length // window``.
        stride: queries that share their leader's window, at most ``window``.
        rpb: whether to learn a bias for each head and offset, ``(num_heads, *[2 window - 1 for each axis])``.
        causal: no query sees what comes after it on the axis; the window is then clipped at the start, not moved.

    Decoding is for one causal axis, with stride 1: the window of a last, partial group depends on the length.

    Raises:
        ValueError: settings below 1 or that do not fit each other, a cross use, what `Attention` refuses, and at use an
            axis, not causal, that is shorter than ``window * dilation``.

    >>> import torch
    >>> from glocal.nn import NeighborhoodAttention
    >>> layer = NeighborhoodAttention(64, 4, window=7, dilation=2)
    >>> layer(torch.randn(1, 15, 20, 64)).shape
    torch.Size([1, 15, 20, 64])
    >>> video = NeighborhoodAttention(64, 4, window=(4, 3, 3), causal=(True, False, False))
    >>> video(torch.randn(1, 9, 6, 5, 64), extra=torch.randn(1, 2, 64)).shape
    torch.Size([1, 9, 6, 5, 64])
    """

    uses = ("noncausal-self", "causal-self")
    refuses: ClassVar[dict[str, str]] = {"noncausal-cross": _NO_CROSS, "causal-cross": _NO_CROSS}
    tiny: ClassVar[dict[str, Any]] = {"grid": (12,), "window": (3,), "dilation": 2}

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window: int | Sequence[int] = 7,
        dilation: int | Sequence[int] | str = 1,
        stride: int | Sequence[int] = 1,
        rpb: bool = True,
        *,
        causal: bool | Sequence[bool] = False,
        **options: Any,
    ) -> None:
        size = _axes((window, window) if isinstance(window, int) else window, None, "window")
        rank = len(size)
        flags = per_axis(causal if isinstance(causal, bool) else tuple(causal), rank, "causal")
        super().__init__(dim, num_heads, causal=any(flags), **({"qkv_bias": True, "out_bias": True} | options))
        self.window, self.causal_axes = size, tuple(bool(flag) for flag in flags)
        if isinstance(dilation, str) and dilation != "auto":
            raise ValueError(f"dilation must be integers or 'auto'; it was {dilation!r}")
        self.dilation = None if isinstance(dilation, str) else _axes(dilation, rank, "dilation")
        self.stride = _axes(stride, rank, "stride")
        if any(s > w for s, w in zip(self.stride, self.window, strict=True)):
            raise ValueError(f"stride must be at most window {self.window}; it was {self.stride}")
        self.rpb = nn.Parameter(torch.empty(num_heads, *(2 * w - 1 for w in self.window))) if rpb else None
        if self.rpb is not None:
            nn.init.trunc_normal_(self.rpb, std=0.02)

    def dilations(self, grid: Sequence[int]) -> tuple[int, ...]:
        """The dilation of each axis of a grid."""
        if self.dilation is not None:
            return self.dilation
        return tuple(max(1, n // w) for n, w in zip(grid, self.window, strict=True))

    def where(self, q: Tensor, k: Tensor, call: Call) -> Pattern:
        grid = k.shape[2:-1]
        axes, apart = [], []
        for length, window, dilation, stride, causal in zip(
            grid, self.window, self.dilations(grid), self.stride, self.causal_axes, strict=True
        ):
            # On a short causal axis everything before the query, in its residue class, is near enough.
            short = causal and window * dilation > length
            axes.append((length, 1, 1) if short else (window, dilation, stride))
            apart.append(dilation if short else 1)
        size, dilations, strides = zip(*axes, strict=True)
        near = Window(size, dilations, strides, self.causal_axes)
        return near & Strided(tuple(apart)) if max(apart) > 1 else near

    def score(self, call: Call) -> Score | None:
        return None if self.rpb is None else RelativePosition(self.rpb, self.dilations(call.x.shape[1:-1]))

    def forward(
        self,
        x: Float[Tensor, "B *grid dim"],
        context: Tensor | None = None,
        *,
        extra: Float[Tensor, "B M dim"] | None = None,
        keys: Tensor | None = None,
        positions: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Float[Tensor, "B *grid dim"]:
        """Attend.

        Args:
            x: ``(B, *grid, dim)``.
            context: refused: see ``extra``.
            extra: tokens without a place, such as text, ``(B, M, dim)``; every query attends to all of them as well.
            keys, positions, cache: as in `Attention`.
        """
        self._fits(x)
        if extra is None:
            return super().forward(x, context, keys=keys, positions=positions, cache=cache)
        if context is not None or cache is not None:
            raise ValueError("extra goes with self-attention over a whole grid, without context or cache")
        if extra.dim() != 3 or extra.shape[0] != x.shape[0] or extra.shape[-1] != self.dim:
            raise ValueError(f"extra must be ({x.shape[0]}, M, {self.dim}); it was {tuple(extra.shape)}")
        at = self.positions(tuple(x.shape[1:-1]), 0, x.device) if positions is None else positions
        q, k, v = self.project(x, x, at, at)
        _, more_k, more_v = self.project(extra, extra, None, None)
        call = Call(x, x, None if keys is None else keys.flatten(1), None, False)
        near, lse = self.attend(q, k, v, self.where(q, k, call), call, return_lse=True)
        far = self.attend(
            q.flatten(2, -2), more_k, more_v, Full(), call._replace(real=None), bias=None, return_lse=True
        )
        mixed = merge([(near.flatten(2, -2), lse.flatten(2)), far])
        out: Tensor = self.o_proj(mixed.movedim(1, -2).flatten(-2))
        return out.view_as(x)

    def new_cache(self) -> Cache:
        if len(self.window) > 1 or self.stride != (1,) or self.dilation is None:
            raise ValueError(
                f"decoding needs one axis, stride 1 and a dilation in numbers; the layer has window {self.window}, "
                f"stride {self.stride} and dilation {self.dilation or 'auto'}"
            )
        (window,), (dilation,) = self.window, self.dilation
        return WindowCache(window) if dilation == 1 else DilatedWindowCache(window, dilation)

    def decode(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        assert call.cache is not None and self.dilation is not None
        call.cache.update(k, v)
        bias = None
        if self.rpb is not None:
            (part,) = call.cache.kept()
            back = (part.position[0, 0] - (call.cache.seen - 1)) // self.dilation[0]
            bias = self.rpb[:, back + self.window[0] - 1][None, :, None]
        return self.attend_kept(q, call, bias=bias)

    def _fits(self, x: Tensor) -> None:
        rank = len(self.window)
        if x.dim() != rank + 2 or x.shape[-1] != self.dim:
            raise ValueError(f"x must be (B, *grid, {self.dim}) with a grid of {rank} axes; it was {tuple(x.shape)}")
        grid = x.shape[1:-1]
        for axis, (n, w, d) in enumerate(zip(grid, self.window, self.dilations(grid), strict=True)):
            if w * d > n and not self.causal_axes[axis]:
                better = f"a dilation of at most {n // w}" if n >= w else f"a window of at most {n}"
                raise ValueError(
                    f"window {w} with dilation {d} needs {w * d} positions on axis {axis}, x has {n}; use {better}"
                )

    def extra_repr(self) -> str:
        return f"window={self.window}, dilation={self.dilation or 'auto'}, stride={self.stride}"


def _axes(value: int | Sequence[int], rank: int | None, name: str) -> tuple[int, ...]:
    found = whole_axes(value if isinstance(value, int) else tuple(value), name, 1)
    return found if rank is None and isinstance(found, tuple) else per_axis(found, rank or 1, name)
