"""S2AFormer: four stages of strip self-attention beside convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from glocal.models.registry import register
from glocal.nn import MLP, Depthwise, DropPath
from glocal.nn.conv import LocalInteraction
from glocal.nn.strip import StripAttention
from glocal.shapes import Float

__all__ = ["HybridPerceptionBlock", "S2AFormer", "s2aformer_ref_tiny"]


class HybridPerceptionBlock(nn.Module):
    """A convolution, strip attention, local interaction and a feed-forward, each added to its input.

    Args:
        dim: channels.
        attention: a module from ``(B, H, W, dim)`` to the same.
        mlp_ratio: hidden channels of the feed-forward over ``dim``.
        local: False leaves out the local interaction.
        drop_path: share of the batch for which a branch, but the first, is dropped in training.
    """

    def __init__(
        self, dim: int, attention: nn.Module, *, mlp_ratio: float = 4.0, local: bool = True, drop_path: float = 0.0
    ) -> None:
        super().__init__()
        self.dw, self.attention, self.mlp = Depthwise(dim, 3), attention, MLP(dim, int(mlp_ratio * dim))
        self.local = LocalInteraction(dim) if local else None
        self.norm1, self.norm3 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6) if local else None
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Float[Tensor, "B H W dim"]) -> Float[Tensor, "B H W dim"]:
        """A map to a map of the same size."""
        x = x + self.dw(x)
        x = x + self.drop_path(self.attention(self.norm1(x)))
        if self.local is not None and self.norm2 is not None:
            x = x + self.drop_path(self.local(self.norm2(x)))
        out: Tensor = x + self.drop_path(self.mlp(self.norm3(x)))
        return out


class S2AFormer(nn.Module):
    """Strip self-attention transformer (Xu et al., 2025, arXiv 2505.22195), in our reading: theirs is not public.

    Args:
        dims, depths, num_heads, reductions: channels, blocks, heads and the reduction of keys of each stage.
        key_dim: as in `StripAttention`.
        mlp_ratio: as in `HybridPerceptionBlock`.
        drop_path: of the last block, growing linearly from 0.
        num_classes: outputs; 0 gives the pooled features.
        channels: of the image.

    Images may have any size at which the map of no stage is smaller than its reduction: from 29 with the defaults. Pass
    a batch of two or more in training: there are batch norms.

    Raises:
        ValueError: settings that do not fit each other.

    >>> import torch
    >>> from glocal.models.vision.s2aformer import S2AFormer
    >>> S2AFormer((8, 16), (1, 1), (1, 2), (2, 1), num_classes=10).eval()(torch.randn(1, 3, 45, 60)).shape
    torch.Size([1, 10])
    """

    def __init__(
        self,
        dims: Sequence[int] = (32, 64, 128, 192),
        depths: Sequence[int] = (2, 2, 4, 2),
        num_heads: Sequence[int] = (1, 2, 4, 8),
        reductions: Sequence[int] = (8, 4, 2, 1),
        *,
        key_dim: int = 1,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        num_classes: int = 1000,
        channels: int = 3,
    ) -> None:
        super().__init__()
        for name, value in (("depths", depths), ("num_heads", num_heads), ("reductions", reductions)):
            if not dims or len(value) != len(dims):
                raise ValueError(f"{name} must have one entry a stage of dims {tuple(dims)}; it was {tuple(value)}")
        first = max(dims[0] // 2, 1)
        stem: list[nn.Module] = []
        for before, stride in ((channels, 2), (first, 1), (first, 1)):
            stem += [nn.Conv2d(before, first, 3, stride, 1, bias=False), nn.BatchNorm2d(first), nn.GELU()]
        self.stem = nn.Sequential(*stem)
        rates = iter(torch.linspace(0, drop_path, sum(depths), device="cpu").tolist())
        self.embed, self.stages = nn.ModuleList(), nn.ModuleList()
        for dim, depth, heads, r, before in zip(dims, depths, num_heads, reductions, (first, *dims[:-1]), strict=True):
            self.embed.append(nn.Sequential(nn.Conv2d(before, dim, 3, 2, 1, bias=False), nn.BatchNorm2d(dim)))
            self.stages.append(
                nn.Sequential(
                    *(
                        HybridPerceptionBlock(
                            dim,
                            StripAttention(dim, heads, key_dim=key_dim, reduction=r),
                            mlp_ratio=mlp_ratio,
                            drop_path=next(rates),
                        )
                        for _ in range(depth)
                    )
                )
            )
        self.norm = nn.LayerNorm(dims[-1], eps=1e-6)
        self.head = nn.Linear(dims[-1], num_classes) if num_classes else nn.Identity()
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward_features(self, x: Float[Tensor, "B C H W"]) -> tuple[Tensor, ...]:
        """The map of each stage, finest first, ``(B, h, w, dim)``, not normalised: what dense tasks build on."""
        if x.dim() != 4:
            raise ValueError(f"x must be images (B, channels, H, W); it was {tuple(x.shape)}")
        x, maps = self.stem(x), []
        for embed, blocks in zip(self.embed, self.stages, strict=True):
            maps.append(cast(Tensor, blocks(embed(x).movedim(1, -1))))
            x = maps[-1].movedim(-1, 1)
        return tuple(maps)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B num_classes"]:
        """Images to logits."""
        out: Tensor = self.head(self.norm(self.forward_features(x)[-1]).mean((1, 2)))
        return out


@register
def s2aformer_ref_tiny(**options: Any) -> S2AFormer:
    """Our own sizes, as the paper's are not known to us; 224 pixels."""
    return S2AFormer(**options)
