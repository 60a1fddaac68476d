"""L2ViT: windows of softmax attention and linear attention over the whole image take turns."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from glocal.models.registry import register
from glocal.models.vision.levels import Levels
from glocal.nn import MLP, Attention, Depthwise, DropPath
from glocal.nn.concentration import LinearGlobalAttention
from glocal.nn.conv import LocalInteraction
from glocal.shapes import Float

__all__ = ["GlobalBlock", "L2ViT", "WindowBlock", "l2vit_base", "l2vit_base_384", "l2vit_small", "l2vit_tiny"]


class WindowBlock(nn.Module):
    """Softmax attention within windows that do not overlap and never move; positions by two convolutions.

    A map that windows do not divide is filled with zeros on the right and below. These are keys like others, made of
    the biases alone, as in the released code.

    Args:
        dim, num_heads: as in `Attention`.
        window: side.
        mlp_ratio: hidden channels of the feed-forward over ``dim``.
        drop_path: share of the batch for which a branch is dropped in training.

    Maps are ``(B, H, W, dim)``.
    """

    def __init__(
        self, dim: int, num_heads: int, *, window: int = 7, mlp_ratio: float = 4.0, drop_path: float = 0.0
    ) -> None:
        super().__init__()
        if window < 1:
            raise ValueError(f"window must be at least 1; it was {window}")
        self.window = window
        self.position1, self.position2 = Depthwise(dim, 3), Depthwise(dim, 3)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = Attention(dim, num_heads, qkv_bias=True, out_bias=True)
        self.mlp = MLP(dim, int(mlp_ratio * dim))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Float[Tensor, "B H W C"]) -> Float[Tensor, "B H W C"]:
        """A map to a map of the same size."""
        x = x + self.position1(x)
        x = x + self.drop_path(self._attend(self.norm1(x)))
        x = x + self.position2(x)
        out: Tensor = x + self.drop_path(self.mlp(self.norm2(x)))
        return out

    def _attend(self, x: Tensor) -> Tensor:
        side, (height, width) = self.window, x.shape[1:3]
        x = pad(x, (0, 0, 0, -width % side, 0, -height % side))
        x = x.unflatten(2, (-1, side)).unflatten(1, (-1, side)).transpose(2, 3)  # (B, rows, columns, side, side, C)
        mixed = self.attention(x.flatten(0, 2)).view(x.shape)
        out: Tensor = mixed.transpose(2, 3).flatten(3, 4).flatten(1, 2)
        return out[:, :height, :width]


class GlobalBlock(nn.Module):
    """Linear attention over the whole map, then what concentrates it locally, then the feed-forward.

    Args:
        dim, num_heads, denom_min: as in `LinearGlobalAttention`.
        concentrate: False leaves out the local concentration.
        mlp_ratio, drop_path: as in `WindowBlock`.

    Maps are ``(B, H, W, dim)``.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        denom_min: float = 100.0,
        concentrate: bool = True,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.position = Depthwise(dim, 3)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = LinearGlobalAttention(dim, num_heads, denom_min=denom_min, qkv_bias=True, out_bias=True)
        self.local = nn.Sequential(nn.LayerNorm(dim), LocalInteraction(dim, 7)) if concentrate else None
        self.mlp = MLP(dim, int(mlp_ratio * dim))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Float[Tensor, "B H W C"]) -> Float[Tensor, "B H W C"]:
        """A map to a map of the same size."""
        x = x + self.position(x)
        x = x + self.drop_path(self.attention(self.norm1(x)))
        if self.local is not None:
            x = x + self.drop_path(self.local(x))
        out: Tensor = x + self.drop_path(self.mlp(self.norm2(x)))
        return out


class L2ViT(Levels):
    """The Linear Attention Resurrection in Vision Transformer (Zheng, 2025, arXiv 2501.16182).

    In each level blocks of windows and of the whole map take turns, windows first.

    Args:
        dim: channels of the first level; each level has twice those before it.
        depths, num_heads: blocks and heads of each level.
        window: side of the windows.
        denom_min: as in `LinearGlobalAttention`. The released 100 is for images of 224 and more.
        mlp_ratio: hidden channels of the feed-forward over a level's.
        drop_path: of the last block, growing linearly from 0.
        num_classes: outputs; 0 gives the pooled features.
        channels: of the image.

    Images may have any size. Pass a batch of two or more in training: there are batch norms.

    Raises:
        ValueError: settings that do not fit each other.

    >>> from glocal.models.vision.l2vit import L2ViT
    >>> model = L2ViT(16, (2, 2), (1, 2), denom_min=1.0, num_classes=10).eval()
    >>> model(torch.randn(1, 3, 45, 60)).shape
    torch.Size([1, 10])
    """

    def __init__(
        self,
        dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        *,
        window: int = 7,
        denom_min: float = 100.0,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        num_classes: int = 1000,
        channels: int = 3,
    ) -> None:
        super().__init__()
        if not depths or len(depths) != len(num_heads):
            raise ValueError(
                f"depths and num_heads must have one entry a level; they were {tuple(depths)} and {tuple(num_heads)}"
            )
        dims = [dim * 2**level for level in range(len(depths))]
        self.embed = _Stem(channels, dim)
        self.down = nn.ModuleList(_Down(a, b) for a, b in pairwise(dims))
        rates = iter(torch.linspace(0, drop_path, sum(depths), device="cpu").tolist())

        def block(number: int, width: int, heads: int) -> nn.Module:
            common: dict[str, Any] = dict(mlp_ratio=mlp_ratio, drop_path=next(rates))
            if number % 2:
                return GlobalBlock(width, heads, denom_min=denom_min, **common)
            return WindowBlock(width, heads, window=window, **common)

        self.levels = nn.ModuleList(
            nn.Sequential(*(block(number, width, heads) for number in range(depth)))
            for width, depth, heads in zip(dims, depths, num_heads, strict=True)
        )
        self.norm = nn.LayerNorm(dims[-1])
        self.head = nn.Linear(dims[-1], num_classes) if num_classes else nn.Identity()
        self.apply(_init)


class _Stem(nn.Module):
    """Two convolutions to a quarter of the image's size."""

    def __init__(self, channels: int, dim: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(channels, dim // 2, 3, 2, 1), nn.BatchNorm2d(dim // 2)
        self.conv2, self.norm2 = nn.Conv2d(dim // 2, dim, 3, 2, 1), nn.BatchNorm2d(dim)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm2(self.conv2(self.norm1(self.conv1(x)).relu()))
        out: Tensor = self.norm(x.movedim(1, -1))
        return out


class _Down(nn.Module):
    """Half the size, twice the channels; an odd map is filled with zeros."""

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.norm, self.conv = nn.LayerNorm(dim), nn.Conv2d(dim, out, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        x = pad(self.norm(x), (0, 0, 0, width % 2, 0, height % 2))
        out: Tensor = self.conv(x.movedim(-1, 1)).movedim(1, -1)
        return out


def _init(module: nn.Module) -> None:
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


@register
def l2vit_tiny(**options: Any) -> L2ViT:
    """28.6 million parameters; 224 pixels."""
    return L2ViT(**options)


@register
def l2vit_small(**options: Any) -> L2ViT:
    """50.2 million parameters; 224 pixels."""
    return L2ViT(**({"depths": (2, 2, 18, 2)} | options))


@register
def l2vit_base(**options: Any) -> L2ViT:
    """88.6 million parameters; 224 pixels."""
    settings: dict[str, Any] = {"dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32)}
    return L2ViT(**(settings | options))


@register
def l2vit_base_384(**options: Any) -> L2ViT:
    """`l2vit_base` with windows of 12, for 384 pixels."""
    return l2vit_base(**({"window": 12} | options))
