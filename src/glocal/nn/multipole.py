"""MANO: one window attention on a grid and on its ever coarser copies, added up from coarse to fine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, pad

from glocal.nn.frame import Attention, Call
from glocal.patterns import Block, Full, Pattern
from glocal.shapes import Float

__all__ = ["MultipoleAttention", "multipole_levels"]


def multipole_levels(side: int, window: int, rate: int = 2) -> int:
    """How many levels a map has: ``floor(log(side) to the base of rate)``, but none smaller than a window; at least 1.

    Args:
        side: of the map, the shorter one.
        window: side of a window.
        rate: by which each level is coarser than the one before.

    Raises:
        ValueError: a number below 1, a ``rate`` below 2.

    >>> [multipole_levels(side, 4) for side in (2, 8, 32, 33)], multipole_levels(243, 1, rate=3)
    ([1, 2, 4, 4], 5)
    """
    for name, value, least in (("side", side, 1), ("window", window, 1), ("rate", rate, 2)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}; it was {value}")
    levels, coarse = 0, side
    while coarse >= rate:
        coarse, levels = coarse // rate, levels + 1
    coarse, fit = side, 1
    while -(-coarse // rate) >= window and fit < levels:
        coarse, fit = -(-coarse // rate), fit + 1
    return fit


class MultipoleAttention(nn.Module):
    """Multipole attention (Colagrande et al., 2025, arXiv 2507.02748): near keys as they are, far ones in averages.

    The map is made coarser level by level, the same attention runs in the windows of each level, and results are added
    up from the coarsest: level l of L counts ``(L - 1 - l)! / (L - 1)!``. Convolutions and attention are shared by all
    levels, so that their number changes no parameter. Time grows with the pixels.

    Args:
        dim: channels.
        num_heads: heads.
        window: side of a window, k.
        stride: of windows; those that overlap, with a stride below ``window``, are averaged. ``window`` where None. The
            last window of an axis moves inward where they do not fit.
        rate: by which each level is coarser.
        levels: how many there are at most; as many as `multipole_levels` gives where None.
        sample: ``"conv"`` for learned convolutions between levels, of side and stride ``rate``; ``"average"`` for means
            and copies.
        dropout: after the output projection, in training.
        options: as in `Attention`: ``head_dim``, ``qkv_bias``, ``backend`` and others.

    Input is normalised in each window and then once more, as published. With one head as wide as the input there is no
    output projection. Maps are ``(B, H, W, dim)`` of any size: a side that ``rate`` does not divide is continued with
    its last row or column.

    Raises:
        ValueError: settings that do not fit each other, causal options: coarse pixels hold what is before and after.

    >>> layer = MultipoleAttention(32, 4, window=4)
    >>> layer(torch.randn(2, 32, 30, 32)).shape
    torch.Size([2, 32, 30, 32])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        window: int = 8,
        stride: int | None = None,
        rate: int = 2,
        levels: int | None = None,
        sample: str = "conv",
        dropout: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__()
        stride = window if stride is None else stride
        if window < 1 or not 1 <= stride <= window:
            raise ValueError(f"stride must be from 1 to window {window}; it was {stride}")
        if rate < 2:
            raise ValueError(f"rate must be at least 2; it was {rate}")
        if levels is not None and levels < 1:
            raise ValueError(f"levels must be at least 1; it was {levels}")
        if sample not in ("conv", "average"):
            raise ValueError(f"sample must be 'conv' or 'average'; it was {sample!r}")
        self.dim, self.window, self.stride, self.rate = dim, window, stride, rate
        self.levels, self.sample = levels, sample
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = _Windows(dim, num_heads, window=window if stride == window else None, **options)
        self.drop = nn.Dropout(dropout)
        if sample == "conv":
            self.down = nn.Conv2d(dim, dim, rate, rate, bias=False)
            self.up = nn.ConvTranspose2d(dim, dim, rate, rate, bias=False)

    def windows(self, x: Float[Tensor, "B H W dim"]) -> Float[Tensor, "B H W dim"]:
        """Attention in the windows of one level."""
        if self.stride == self.window:
            return self._attend(x)
        rows, columns = (_starts(n, self.window, self.stride) for n in x.shape[1:3])
        height, width = min(self.window, x.shape[1]), min(self.window, x.shape[2])
        down = torch.tensor(rows, device=x.device)[:, None] + torch.arange(height, device=x.device)
        across = torch.tensor(columns, device=x.device)[:, None] + torch.arange(width, device=x.device)
        # The pixels of each window, (windows, height, width).
        at = (down[:, None, :, None] * x.shape[2] + across[:, None]).flatten(0, 1)
        flat = x.flatten(1, 2)
        mixed = self._attend(flat[:, at].flatten(0, 1)).unflatten(0, (len(x), -1)).flatten(1, 3)
        total = mixed.new_zeros(flat.shape).index_add(1, at.flatten(), mixed)
        count = mixed.new_zeros(flat.shape[1]).index_add(0, at.flatten(), mixed.new_ones(at.numel()))
        out: Tensor = (total / count[:, None]).view(x.shape)
        return out

    def _attend(self, x: Tensor) -> Tensor:
        out: Tensor = self.drop(self.attention(self.norm2(self.norm1(x))))
        return out

    def coarser(self, x: Float[Tensor, "B H W dim"]) -> Float[Tensor, "B h w dim"]:
        """The next level of a map."""
        below, right = (-n % self.rate for n in x.shape[1:3])
        image = x.movedim(-1, 1)
        if below or right:
            image = pad(image, (0, right, 0, below), mode="replicate")
        small: Tensor = self.down(image) if self.sample == "conv" else avg_pool2d(image, self.rate)
        return small.movedim(1, -1)

    def finer(self, x: Float[Tensor, "B h w dim"], size: Sequence[int]) -> Float[Tensor, "B H W dim"]:
        """A coarse map on the finer one's ``size``."""
        if self.sample == "conv":
            large: Tensor = self.up(x.movedim(-1, 1)).movedim(1, -1)
        else:
            large = x.repeat_interleave(self.rate, 1).repeat_interleave(self.rate, 2)
        return large[:, : size[0], : size[1]]

    def forward(self, x: Float[Tensor, "B H W dim"]) -> Float[Tensor, "B H W dim"]:
        """A map ``(B, H, W, dim)`` to the same.

        Raises:
            ValueError: another shape.
        """
        if x.dim() != 4 or x.shape[-1] != self.dim:
            raise ValueError(f"x must be (B, H, W, {self.dim}); it was {tuple(x.shape)}")
        count = multipole_levels(min(x.shape[1:3]), self.window, self.rate)
        count = count if self.levels is None else min(count, self.levels)
        maps = [x]
        while len(maps) < count:
            maps.append(self.coarser(maps[-1]))
        out = self.windows(maps.pop())
        for number, finer in enumerate(reversed(maps), 1):
            out = self.windows(finer) + self.finer(out, finer.shape[1:3]) / number
        return out

    def extra_repr(self) -> str:
        return f"window={self.window}, stride={self.stride}, rate={self.rate}, sample={self.sample!r}"


class _Windows(Attention):
    """Attention in the blocks of a map, or over the whole of one where ``window`` is None."""

    uses = ("noncausal-self",)

    def __init__(self, dim: int, num_heads: int, *, window: int | None, **options: Any) -> None:
        super().__init__(dim, num_heads, **({"out_bias": True} | options))
        self.pattern: Pattern = Full() if window is None else Block(window)
        if num_heads == 1 and self.head_dim == dim:
            self.add_module("o_proj", nn.Identity())

    def where(self, q: Tensor, k: Tensor, call: Call) -> Pattern:
        return self.pattern


def _starts(length: int, window: int, stride: int) -> list[int]:
    """Where the windows of one axis begin."""
    last = max(length - window, 0)
    return [*range(0, last, stride), last]
