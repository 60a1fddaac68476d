"""CAS-ViT: four stages of convolutional additive attention for small devices."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn

from glocal.models.registry import register
from glocal.nn import MLP, Depthwise, DropPath
from glocal.nn.additive import ConvAdditiveAttention
from glocal.nn.conv import BatchNorm
from glocal.shapes import Float

__all__ = ["CASBlock", "CASViT", "LocalIntegration", "casvit_m", "casvit_s", "casvit_t", "casvit_xs"]


class LocalIntegration(nn.Sequential):
    """Channels mixed, normalised, convolved place by place, mixed again: ``(B, H, W, dim)`` to the same."""

    def __init__(self, dim: int) -> None:
        super().__init__(nn.Linear(dim, dim), BatchNorm(dim), Depthwise(dim, 3), nn.GELU(), nn.Linear(dim, dim))


class CASBlock(nn.Module):
    """Local integration, additive attention and a feed-forward, each added to its input; maps are ``(B, H, W, dim)``.

    Args:
        dim: channels.
        mlp_ratio: hidden channels of the feed-forward over ``dim``.
        drop_path: share of the batch for which the last two branches are dropped in training.
        dropout: of the output of the attention.
    """

    def __init__(self, dim: int, *, mlp_ratio: float = 4.0, drop_path: float = 0.0, dropout: float = 0.0) -> None:
        super().__init__()
        self.local, self.norm1, self.norm2 = LocalIntegration(dim), BatchNorm(dim), BatchNorm(dim)
        self.mixer, self.mlp = ConvAdditiveAttention(dim, dropout=dropout), MLP(dim, int(mlp_ratio * dim))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Float[Tensor, "B H W dim"]) -> Float[Tensor, "B H W dim"]:
        """A map to a map of the same size."""
        x = x + self.local(x)
        x = x + self.drop_path(self.mixer(self.norm1(x)))
        out: Tensor = x + self.drop_path(self.mlp(self.norm2(x)))
        return out


class CASViT(nn.Module):
    """Convolutional additive self-attention vision transformer (Zhang et al., 2024, arXiv 2408.03703).

    Args:
        dims, depths: channels and blocks of each stage, the first at a quarter of the image's size.
        mlp_ratio, dropout: as in `CASBlock`.
        drop_path: of the last block, growing linearly from 0.
        distilled: whether a second classifier learns from a teacher.
        num_classes: outputs; 0 gives the pooled features.
        channels: of the image.

    Images may have any size. Pass a batch of two or more in training: there are batch norms.

    Raises:
        ValueError: no stages, or not one depth a stage.

    >>> import torch
    >>> from glocal.models.vision.casvit import CASViT
    >>> CASViT((16, 24), (1, 1), num_classes=10).eval()(torch.randn(1, 3, 45, 60)).shape
    torch.Size([1, 10])
    """

    def __init__(
        self,
        dims: Sequence[int] = (48, 56, 112, 220),
        depths: Sequence[int] = (2, 2, 4, 2),
        *,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        distilled: bool = True,
        num_classes: int = 1000,
        channels: int = 3,
    ) -> None:
        super().__init__()
        if not dims or len(dims) != len(depths):
            raise ValueError(
                f"dims and depths must have one entry a stage; they were {tuple(dims)} and {tuple(depths)}"
            )
        half = dims[0] // 2
        self.stem = nn.Sequential(
            *(nn.Conv2d(channels, half, 3, 2, 1), nn.BatchNorm2d(half), nn.ReLU()),
            *(nn.Conv2d(half, dims[0], 3, 2, 1), nn.BatchNorm2d(dims[0]), nn.ReLU()),
        )
        self.down = nn.ModuleList(nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), nn.BatchNorm2d(b)) for a, b in pairwise(dims))
        rates = iter(torch.linspace(0, drop_path, sum(depths), device="cpu").tolist())
        self.stages = nn.ModuleList(
            nn.Sequential(*(CASBlock(d, mlp_ratio=mlp_ratio, drop_path=next(rates), dropout=dropout) for _ in range(n)))
            for d, n in zip(dims, depths, strict=True)
        )
        self.norm = BatchNorm(dims[-1])
        self.head = nn.Linear(dims[-1], num_classes) if num_classes else nn.Identity()
        self.teacher_head = nn.Linear(dims[-1], num_classes) if num_classes and distilled else None
        for head in (self.head, self.teacher_head):
            if isinstance(head, nn.Linear):
                nn.init.trunc_normal_(head.weight, std=0.02)
                nn.init.zeros_(head.bias)

    def forward_features(self, x: Float[Tensor, "B C H W"]) -> tuple[Tensor, ...]:
        """The map of each stage, finest first, ``(B, h, w, dim)``, not normalised: what dense tasks build on."""
        if x.dim() != 4:
            raise ValueError(f"x must be images (B, channels, H, W); it was {tuple(x.shape)}")
        x, maps = self.stem(x), []
        for number, blocks in enumerate(self.stages):
            x = self.down[number - 1](x) if number else x
            maps.append(cast(Tensor, blocks(x.movedim(1, -1))))
            x = maps[-1].movedim(-1, 1)
        return tuple(maps)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Tensor | tuple[Tensor, Tensor]:
        """Images to logits ``(B, num_classes)``.

        With two classifiers: in training the logits of both, the one that learns from labels first; else their mean.
        """
        pooled = self.norm(self.forward_features(x)[-1]).mean((1, 2))
        logits: Tensor = self.head(pooled)
        if self.teacher_head is None:
            return logits
        other: Tensor = self.teacher_head(pooled)
        return (logits, other) if self.training else (logits + other) / 2


def _variant(dims: Sequence[int], depths: Sequence[int], options: dict[str, Any]) -> CASViT:
    return CASViT(**({"dims": dims, "depths": depths} | options))


@register
def casvit_xs(**options: Any) -> CASViT:
    """3.2 million parameters; 224 pixels."""
    return _variant((48, 56, 112, 220), (2, 2, 4, 2), options)


@register
def casvit_s(**options: Any) -> CASViT:
    """5.8 million parameters; 224 pixels."""
    return _variant((48, 64, 128, 256), (3, 3, 6, 3), options)


@register
def casvit_m(**options: Any) -> CASViT:
    """12.4 million parameters; 224 pixels."""
    return _variant((64, 96, 192, 384), (3, 3, 6, 3), options)


@register
def casvit_t(**options: Any) -> CASViT:
    """21.8 million parameters; 224 pixels."""
    return _variant((96, 128, 256, 512), (3, 3, 6, 3), options)
