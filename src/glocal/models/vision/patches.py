"""Patches of images, and going down and up a level by joining and parting tokens, as in Swin and its U-Nets."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import pad

from glocal.shapes import Float

__all__ = ["PatchExpand", "PatchMerge", "Patches"]


class Patches(nn.Module):
    """Patches of one size, embedded and normalised; an image that they do not divide is filled with zeros.

    >>> import torch
    >>> Patches(3, 16, 4)(torch.randn(2, 3, 9, 8)).shape
    torch.Size([2, 3, 2, 16])
    """

    def __init__(self, channels: int, dim: int, size: int) -> None:
        super().__init__()
        self.size = size
        self.proj = nn.Conv2d(channels, dim, size, stride=size)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Float[Tensor, "B channels H W"]) -> Float[Tensor, "B h w dim"]:
        """``(B, channels, H, W)`` to ``(B, H / size, W / size, dim)``."""
        height, width = x.shape[-2:]
        x = pad(x, (0, -width % self.size, 0, -height % self.size))
        out: Tensor = self.norm(self.proj(x).movedim(1, -1))
        return out


class PatchMerge(nn.Module):
    """Half the size, twice the channels or ``out``: 2 x 2 tokens are joined, column by column.

    An odd map is filled with zeros.

    >>> import torch
    >>> PatchMerge(16)(torch.randn(2, 5, 8, 16)).shape
    torch.Size([2, 3, 4, 32])
    """

    def __init__(self, dim: int, out: int | None = None) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.proj = nn.Linear(4 * dim, 2 * dim if out is None else out, bias=False)

    def forward(self, x: Float[Tensor, "B H W dim"]) -> Float[Tensor, "B h w out"]:
        """``(B, H, W, dim)`` to ``(B, H / 2, W / 2, out)``."""
        height, width = x.shape[1:3]
        x = pad(x, (0, 0, 0, width % 2, 0, height % 2))
        x = x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2))  # (B, h, 2, w, 2, C)
        out: Tensor = self.proj(self.norm(x.permute(0, 1, 3, 4, 2, 5).flatten(3)))
        return out


class PatchExpand(nn.Module):
    """The other way: ``factor`` times the size, a ``factor`` of the channels; each token is parted row by row.

    >>> import torch
    >>> PatchExpand(16, 2)(torch.randn(2, 3, 4, 16)).shape
    torch.Size([2, 6, 8, 8])
    """

    def __init__(self, dim: int, factor: int) -> None:
        super().__init__()
        self.factor = factor
        self.proj = nn.Linear(dim, factor * dim, bias=False)
        self.norm = nn.LayerNorm(dim // factor)

    def forward(self, x: Float[Tensor, "B h w dim"]) -> Float[Tensor, "B H W dim_f"]:
        """``(B, h, w, dim)`` to ``(B, factor * h, factor * w, dim / factor)``."""
        parts = self.proj(x).unflatten(-1, (self.factor, self.factor, -1))  # (B, h, w, f, f, c)
        out: Tensor = self.norm(parts.permute(0, 1, 3, 2, 4, 5).flatten(3, 4).flatten(1, 2))
        return out
