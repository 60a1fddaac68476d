"""A small diffusion transformer over pixels, to be trained and taken apart in minutes."""

from __future__ import annotations

import math
from typing import Any, cast

from torch import Tensor, nn

from glocal.models.registry import register
from glocal.nn import MLP, Attention, Block, Rope
from glocal.nn.sincos import sincos
from glocal.shapes import Float

__all__ = ["Denoiser", "denoiser_tiny", "noised"]


def noised(clean: Float[Tensor, "B C H W"], time: Float[Tensor, "B"], noise: Tensor) -> Float[Tensor, "B C H W"]:
    """Clean images with noise at levels ``time`` from 0, none, to 1, nothing else; by a cosine, so that variance stays.

    >>> import torch
    >>> noised(torch.ones(1, 1, 1, 1), torch.tensor([0.5]), torch.ones(1, 1, 1, 1)).item()
    1.41421...
    """
    angle = time[:, None, None, None] * (math.pi / 2)
    return clean * angle.cos() + noise * angle.sin()


class Denoiser(nn.Module):
    """Noisy images and the level of their noise to the noise: pre-norm blocks of self-attention over all pixels.

    The plain form of a diffusion transformer (Peebles and Xie, 2023, arXiv 2212.09748): a token is a pixel, the
    embedded level is added to all tokens instead of shifting and scaling norms, and positions rotate queries and keys.

    Args:
        dim, depth, num_heads: channels, blocks, heads; a head has a multiple of 4 channels.
        channels: of the images.

    Raises:
        ValueError: numbers that do not divide; at use, what are no images or no levels.

    >>> import torch
    >>> Denoiser(16, 1, 2)(torch.randn(2, 1, 8, 6), torch.tensor([0.1, 1.0])).shape
    torch.Size([2, 1, 8, 6])
    """

    def __init__(self, dim: int, depth: int, num_heads: int, *, channels: int = 1) -> None:
        super().__init__()
        if num_heads < 1 or dim < 4 * num_heads or dim % (4 * num_heads):
            raise ValueError(f"dim must be a multiple of 4 for each of num_heads, {num_heads}; it was {dim}")
        if depth < 1:
            raise ValueError(f"depth must be at least 1; it was {depth}")
        self.dim, self.channels = dim, channels
        self.embed = nn.Conv2d(channels, dim, 3, padding=1)
        self.time = MLP(dim, dim)
        common: dict[str, Any] = dict(qkv_bias=True, out_bias=True, rope=Rope(100.0, axes=2))
        self.blocks = nn.ModuleList(
            Block(dim, Attention(dim, num_heads, **common), MLP(dim, 4 * dim)) for _ in range(depth)
        )
        self.norm, self.head = nn.LayerNorm(dim, eps=1e-6), nn.Linear(dim, channels)

    def forward(self, x: Float[Tensor, "B C H W"], time: Float[Tensor, "B"]) -> Float[Tensor, "B C H W"]:
        """The noise in ``x (B, C, H, W)``, whose levels are ``time (B,)``, from 0 to 1."""
        if x.dim() != 4 or x.shape[1] != self.channels:
            raise ValueError(f"x must be images (B, {self.channels}, H, W); it was {tuple(x.shape)}")
        if time.shape != x.shape[:1]:
            raise ValueError(f"time must be levels {tuple(x.shape[:1])}; it was {tuple(time.shape)}")
        level = self.time(sincos(1000 * time, self.dim).to(x))
        x = self.embed(x).movedim(1, -1) + level[:, None, None]
        for block in self.blocks:
            x = block(x)
        return cast(Tensor, self.head(self.norm(x)).movedim(-1, 1))


@register
def denoiser_tiny(**options: Any) -> Denoiser:
    """For small gray images: one block of 32 channels, 2 heads."""
    return Denoiser(**({"dim": 32, "depth": 1, "num_heads": 2} | options))
