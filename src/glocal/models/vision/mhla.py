"""DeiT with multi-head linear attention: a flat network over patches, no class token, the mean of all tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, pad

from glocal.models.registry import register
from glocal.nn import MLP, Block
from glocal.nn.mhla import MultiHeadLinearAttention
from glocal.shapes import Float

__all__ = ["MHLADeiT", "mhla_deit_base", "mhla_deit_small", "mhla_deit_tiny"]


class MHLADeiT(nn.Module):
    """DeiT's layout (Touvron et al., 2021, arXiv 2012.12877) with the attention of MHLA (2026, arXiv 2601.07832).

    Args:
        dim, depth, num_heads: channels, blocks, heads.
        patch: side of a patch in pixels.
        blocks: of tokens, on each axis, that have a mixture of their own.
        size: side of the images for which there are learned positions; those of another size get them interpolated.
        init, norm: as in `MultiHeadLinearAttention`.
        mlp_ratio: hidden channels of the feed-forward over ``dim``.
        drop_path: of the last block, growing linearly from 0.
        num_classes: outputs; 0 gives the pooled features.
        channels: of the image.

    Images may have any size: zeros are added around them to the next multiple of ``patch * blocks``, 224 to 256. The
    layers normalise their input once more than the blocks do, as the published ones.

    Raises:
        ValueError: settings that do not fit each other; at use, what is no image.

    >>> model = MHLADeiT(32, 2, 2, patch=4, blocks=(2, 2), size=32, num_classes=10)
    >>> model(torch.randn(1, 3, 30, 45)).shape
    torch.Size([1, 10])
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        num_heads: int,
        *,
        patch: int = 16,
        blocks: Sequence[int] = (4, 4),
        size: int = 224,
        init: str = "linear",
        norm: str = "paper",
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        num_classes: int = 1000,
        channels: int = 3,
    ) -> None:
        super().__init__()
        for name, value in (("depth", depth), ("patch", patch), ("size", size)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1; it was {value}")
        if len(blocks) != 2:
            raise ValueError(f"blocks must be two numbers, of rows and columns; it was {tuple(blocks)}")
        self.patch, self.blocks = patch, (blocks[0], blocks[1])
        self.embed = nn.Conv2d(channels, dim, patch, patch)
        rows, columns = (-(-size // (patch * n)) * n for n in self.blocks)
        self.positions = nn.Parameter(torch.zeros(rows, columns, dim))
        common: dict[str, Any] = dict(blocks=self.blocks, init=init, norm=norm, lepe=5, out_bias=True)

        def attention() -> nn.Module:
            layer = MultiHeadLinearAttention(dim, num_heads, **common)
            return nn.Sequential(nn.LayerNorm(dim, eps=1e-6), layer)

        rates = torch.linspace(0, drop_path, depth, device="cpu").tolist()
        self.layers = nn.Sequential(
            *(Block(dim, attention(), MLP(dim, int(mlp_ratio * dim)), drop_path=rate) for rate in rates)
        )
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, num_classes) if num_classes else nn.Identity()
        self.apply(_init)
        nn.init.trunc_normal_(self.positions, std=0.02)

    def forward_features(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B h w dim"]:
        """The map of normalised tokens, with those of the zeros around the image."""
        if x.dim() != 4:
            raise ValueError(f"x must be images (B, channels, H, W); it was {tuple(x.shape)}")
        above, left = (-n % (self.patch * count) for n, count in zip(x.shape[2:], self.blocks, strict=True))
        if above or left:
            x = pad(x, (left // 2, left - left // 2, above // 2, above - above // 2))
        x = self.embed(x).movedim(1, -1)
        positions: Tensor = self.positions
        if positions.shape[:2] != x.shape[1:3]:
            image = positions.movedim(-1, 0)[None]
            positions = interpolate(image, tuple(x.shape[1:3]), mode="bicubic", align_corners=False)[0].movedim(0, -1)
        out: Tensor = self.norm(self.layers(x + positions))
        return out

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B num_classes"]:
        """Images to logits."""
        out: Tensor = self.head(self.forward_features(x).mean((1, 2)))
        return out


def _init(module: nn.Module) -> None:
    """Linear layers and convolutions from a normal of 0.02, cut at two, and without biases."""
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


@register
def mhla_deit_tiny(**options: Any) -> MHLADeiT:
    """5.8 million parameters; 224 pixels."""
    return MHLADeiT(**({"dim": 192, "depth": 12, "num_heads": 3} | options))


@register
def mhla_deit_small(**options: Any) -> MHLADeiT:
    """22.2 million parameters; 224 pixels."""
    return MHLADeiT(**({"dim": 384, "depth": 12, "num_heads": 6, "drop_path": 0.1} | options))


@register
def mhla_deit_base(**options: Any) -> MHLADeiT:
    """86.8 million parameters; 224 pixels."""
    return MHLADeiT(**({"dim": 768, "depth": 12, "num_heads": 12, "drop_path": 0.1} | options))
