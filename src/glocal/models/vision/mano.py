"""MANO: networks of multipole attention, for images in Swin's layout and for maps of physical quantities."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from glocal.models.registry import register
from glocal.models.vision.patches import PatchMerge
from glocal.nn import MLP, Block
from glocal.nn.multipole import MultipoleAttention
from glocal.shapes import Float

__all__ = ["MANO", "MANOOperator", "mano_base", "mano_darcy", "mano_small", "mano_tiny"]


class MANO(nn.Module):
    """Swin's pyramid (Liu et al., 2021, arXiv 2103.14030) with multipole attention in place of its shifted windows.

    Colagrande et al., 2025, arXiv 2507.02748. The widths are Swin's; how the authors put their layer into it is not
    published, so this is our reading.

    Args:
        dims, depths, num_heads: channels, blocks and heads of each stage.
        patch: side of a patch in pixels.
        window, sample: as in `MultipoleAttention`, which has as many levels as a stage's map allows.
        mlp_ratio: hidden channels of the feed-forward over a stage's.
        drop_path: of the last block, growing linearly from 0.
        num_classes: outputs; 0 gives the pooled features.
        channels: of the image.

    Images may have any size: zeros are added at the right and below where a patch, or two by two tokens, are not full.

    Raises:
        ValueError: settings that do not fit each other; at use, what is no image.

    >>> model = MANO((16, 32), (1, 1), (1, 2), window=4, num_classes=10).eval()
    >>> model(torch.randn(1, 3, 45, 60)).shape
    torch.Size([1, 10])
    """

    def __init__(
        self,
        dims: Sequence[int] = (96, 192, 384, 768),
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        *,
        patch: int = 4,
        window: int = 7,
        sample: str = "conv",
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        num_classes: int = 1000,
        channels: int = 3,
    ) -> None:
        super().__init__()
        if not dims or not len(dims) == len(depths) == len(num_heads):
            raise ValueError(
                f"dims, depths and num_heads must have one entry a stage; they were {tuple(dims)}, {tuple(depths)} and "
                f"{tuple(num_heads)}"
            )
        self.patch = patch
        self.embed, self.embed_norm = nn.Conv2d(channels, dims[0], patch, patch), nn.LayerNorm(dims[0])
        self.down = nn.ModuleList(PatchMerge(a, b) for a, b in pairwise(dims))
        rates = iter(torch.linspace(0, drop_path, sum(depths), device="cpu").tolist())

        def block(stage: int) -> nn.Module:
            dim = dims[stage]
            layer = MultipoleAttention(dim, num_heads[stage], window=window, sample=sample, qkv_bias=True)
            return Block(dim, layer, MLP(dim, int(mlp_ratio * dim)), drop_path=next(rates), eps=1e-5)

        self.stages = nn.ModuleList(
            nn.Sequential(*(block(stage) for _ in range(depth))) for stage, depth in enumerate(depths)
        )
        self.norm = nn.LayerNorm(dims[-1])
        self.head = nn.Linear(dims[-1], num_classes) if num_classes else nn.Identity()
        self.apply(_init)

    def forward_features(self, x: Float[Tensor, "B C H W"]) -> tuple[Tensor, ...]:
        """The map of each stage, finest first, ``(B, h, w, dim)``, not normalised."""
        if x.dim() != 4:
            raise ValueError(f"x must be images (B, channels, H, W); it was {tuple(x.shape)}")
        below, right = (-n % self.patch for n in x.shape[2:])
        x = pad(x, (0, right, 0, below)) if below or right else x
        x, maps = self.embed_norm(self.embed(x).movedim(1, -1)), []
        for number, blocks in enumerate(self.stages):
            x = self.down[number - 1](x) if number else x
            x = cast(Tensor, blocks(x))
            maps.append(x)
        return tuple(maps)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B num_classes"]:
        """Images to logits."""
        out: Tensor = self.head(self.norm(self.forward_features(x)[-1]).mean((1, 2)))
        return out


class MANOOperator(nn.Module):
    """From maps of what is given to maps of what is sought, pixel by pixel: MANO's network for Darcy flow.

    Colagrande et al., 2025, arXiv 2507.02748.

    Args:
        in_channels, out_channels: of the maps.
        dim, depth, num_heads: channels, blocks, heads.
        mlp_ratio: hidden channels of the feed-forward over ``dim``.
        dropout: after the first layer, in training.
        options: as in `MultipoleAttention`.

    Maps may have any size. Nothing tells where a pixel is: give coordinates as channels, as in `mano_darcy`.

    Raises:
        ValueError: settings that do not fit each other; at use, other channels.

    >>> model = MANOOperator(3, 1, dim=16, depth=2, num_heads=2, window=4)
    >>> model(torch.randn(2, 3, 32, 20)).shape
    torch.Size([2, 1, 32, 20])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        dim: int = 64,
        depth: int = 8,
        num_heads: int = 4,
        mlp_ratio: float = 2.0,
        dropout: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__()
        if in_channels < 1 or out_channels < 1 or depth < 1:
            raise ValueError(
                f"in_channels, out_channels and depth must be at least 1; they were {in_channels}, {out_channels} and "
                f"{depth}"
            )
        self.in_channels = in_channels
        self.embed, self.drop = nn.Linear(in_channels, dim), nn.Dropout(dropout)
        self.mixers = nn.ModuleList(MultipoleAttention(dim, num_heads, **options) for _ in range(depth))
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(depth))
        self.mlps = nn.ModuleList(MLP(dim, int(mlp_ratio * dim)) for _ in range(depth))
        self.head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.Tanh(), nn.Linear(dim, out_channels))

    def forward(self, x: Float[Tensor, "B in_channels H W"]) -> Float[Tensor, "B out_channels H W"]:
        """A map to a map of the same size."""
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise ValueError(f"x must be maps (B, {self.in_channels}, H, W); it was {tuple(x.shape)}")
        x = self.drop(self.embed(x.movedim(1, -1)))
        for mixer, norm, mlp in zip(self.mixers, self.norms, self.mlps, strict=True):
            x = x + mixer(x)  # the mixer normalises its windows itself
            x = x + mlp(norm(x))
        out: Tensor = self.head(x).movedim(-1, 1)
        return out


def _init(module: nn.Module) -> None:
    """Linear layers from a normal of 0.02, cut at two, and without biases; convolutions as torch makes them."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


@register
def mano_tiny(**options: Any) -> MANO:
    """Swin-T's widths and depths; 224 pixels."""
    return MANO(**({"drop_path": 0.2} | options))


@register
def mano_small(**options: Any) -> MANO:
    """Swin-S's widths and depths; 224 pixels."""
    settings: dict[str, Any] = {"depths": (2, 2, 18, 2), "drop_path": 0.3}
    return MANO(**(settings | options))


@register
def mano_base(**options: Any) -> MANO:
    """Swin-B's widths and depths; 224 pixels."""
    settings: dict[str, Any] = {
        "dims": (128, 256, 512, 1024),
        "depths": (2, 2, 18, 2),
        "num_heads": (4, 8, 16, 32),
        "drop_path": 0.5,
    }
    return MANO(**(settings | options))


@register
def mano_darcy(**options: Any) -> MANOOperator:
    """Permeability and two coordinates to pressure; windows of 2 x 2. The sizes are ours."""
    settings: dict[str, Any] = {"in_channels": 3, "out_channels": 1, "dim": 32, "depth": 4, "window": 2}
    return MANOOperator(**(settings | options))
