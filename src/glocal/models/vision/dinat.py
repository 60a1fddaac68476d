"""NAT and DiNAT: pyramids of neighborhood attention, every second layer with gaps; also in Swin's layout, and flat."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from glocal.models.registry import register
from glocal.models.vision.patches import Patches, PatchMerge
from glocal.nn import MLP, Block, NeighborhoodAttention
from glocal.shapes import Float

__all__ = [
    "DiNAT",
    "dinat_base",
    "dinat_isotropic_base",
    "dinat_isotropic_small",
    "dinat_large",
    "dinat_large_384",
    "dinat_mini",
    "dinat_s_base",
    "dinat_s_large",
    "dinat_s_small",
    "dinat_s_tiny",
    "dinat_small",
    "dinat_tiny",
    "nat_base",
    "nat_isotropic_base",
    "nat_isotropic_small",
    "nat_mini",
    "nat_small",
    "nat_tiny",
]


class DiNAT(nn.Module):
    """Dilated Neighborhood Attention Transformer: local layers alternate with dilated ones, level by level.

    NAT is the same with every dilation 1. Hassani et al., 2022, arXiv 2204.07143 and 2209.15001.

    Args:
        dim: channels of the first level; each level has twice those before it.
        depths, num_heads: blocks and heads of each level.
        window: keys an axis.
        dilations: of every second block, one a level, the others have 1; ``"auto"`` takes the largest that the map
            allows. The default is for images of 224.
        mlp_ratio: hidden channels of the feed-forward over ``dim``.
        drop_path: of the last block, growing linearly from 0.
        layer_scale: start value of a learned scale of each branch; none where None.
        patch: None embeds by two 3 x 3 convolutions of stride 2, and goes down a level by one; a size embeds patches
            of that size, and goes down by merging 2 x 2 tokens, as in Swin.
        num_classes: outputs; 0 gives the pooled features.
        channels: of the image.

    Images may have any size from which every level keeps a map of at least ``window * dilation`` on each axis.

    Raises:
        ValueError: settings that do not fit each other; at use, an image that is too small for its windows.

    >>> import torch
    >>> from glocal.models.vision.dinat import DiNAT
    >>> model = DiNAT(16, (2, 2), (1, 2), window=3, dilations="auto", num_classes=10)
    >>> x = torch.randn(1, 3, 45, 60)
    >>> model(x).shape, [tuple(level.shape) for level in model.forward_features(x)]
    (torch.Size([1, 10]), [(1, 12, 15, 16), (1, 6, 8, 32)])
    """

    def __init__(
        self,
        dim: int = 64,
        depths: Sequence[int] = (3, 4, 6, 5),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        *,
        window: int = 7,
        dilations: Sequence[int] | str = (8, 4, 2, 1),
        mlp_ratio: float = 3.0,
        drop_path: float = 0.2,
        layer_scale: float | None = None,
        patch: int | None = None,
        num_classes: int = 1000,
        channels: int = 3,
    ) -> None:
        super().__init__()
        if isinstance(dilations, str) and dilations != "auto":
            raise ValueError(f"dilations must be one integer a level or 'auto'; it was {dilations!r}")
        gaps: Sequence[int | str] = [dilations] * len(depths) if isinstance(dilations, str) else dilations
        if not depths or not len(depths) == len(num_heads) == len(gaps):
            raise ValueError(
                f"depths, num_heads and dilations must have one entry a level; they were {tuple(depths)}, "
                f"{tuple(num_heads)} and {dilations}"
            )
        self.window = window
        dims = [dim * 2**level for level in range(len(depths))]
        self.embed = _Embed(channels, dim) if patch is None else Patches(channels, dim, patch)
        down = _Down if patch is None else PatchMerge
        self.down = nn.ModuleList(down(d) for d in dims[:-1])
        rates = iter(torch.linspace(0, drop_path, sum(depths), device="cpu").tolist())
        self.levels = nn.ModuleList(
            nn.ModuleList(
                Block(
                    d,
                    NeighborhoodAttention(d, heads, window, gap if number % 2 else 1),
                    MLP(d, int(mlp_ratio * d)),
                    eps=1e-5,
                    drop_path=next(rates),
                    layer_scale=layer_scale,
                )
                for number in range(depth)
            )
            for d, depth, heads, gap in zip(dims, depths, num_heads, gaps, strict=True)
        )
        self.norm = nn.LayerNorm(dims[-1])
        self.head = nn.Linear(dims[-1], num_classes) if num_classes else nn.Identity()
        self.apply(_init)

    def forward_features(self, x: Float[Tensor, "B C H W"]) -> tuple[Tensor, ...]:
        """The map of each level, finest first, ``(B, h, w, C)``, not normalised: what dense tasks build on."""
        if x.dim() != 4:
            raise ValueError(f"x must be images (B, channels, H, W); it was {tuple(x.shape)}")
        x, maps = self.embed(x), []
        for number, blocks in enumerate(self.levels):
            x = self.down[number - 1](x) if number else x
            for block in cast(nn.ModuleList, blocks):
                self._fits(cast(NeighborhoodAttention, block.attention), x, number)
                x = block(x)
            maps.append(x)
        return tuple(maps)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B num_classes"]:
        """Images to logits, by the mean of the last map."""
        out: Tensor = self.head(self.norm(self.forward_features(x)[-1]).mean((1, 2)))
        return out

    def _fits(self, attention: NeighborhoodAttention, x: Tensor, level: int) -> None:
        grid = tuple(x.shape[1:3])
        for size, dilation in zip(grid, attention.dilations(grid), strict=True):
            if size < self.window * dilation:
                better = "a larger image, or " + ("a smaller window" if dilation == 1 else "dilations='auto'")
                raise ValueError(
                    f"x gives level {level} a map of {grid[0]} x {grid[1]}, too small for window {self.window} with "
                    f"dilation {dilation}; use {better}"
                )


class _Embed(nn.Module):
    """Two overlapping convolutions to a quarter of the image's size."""

    def __init__(self, channels: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            nn.Conv2d(channels, dim // 2, 3, stride=2, padding=1), nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1)
        )
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self.proj(x).movedim(1, -1))
        return out


class _Down(nn.Module):
    """Half the size, twice the channels, by a convolution."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(dim, 2 * dim, 3, stride=2, padding=1, bias=False)
        self.norm = nn.LayerNorm(2 * dim)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self.proj(x.movedim(-1, 1)).movedim(1, -1))
        return out


def _init(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


_DEEP, _LOCAL = (3, 4, 18, 5), (1, 1, 1, 1)
_MINI: dict[str, Any] = {"dim": 64, "num_heads": (2, 4, 8, 16), "mlp_ratio": 3.0, "drop_path": 0.2}
_SMALL: dict[str, Any] = {"dim": 96, "depths": _DEEP, "num_heads": (3, 6, 12, 24), "mlp_ratio": 2.0, "drop_path": 0.3}
_BASE: dict[str, Any] = {
    **{"dim": 128, "depths": _DEEP, "num_heads": (4, 8, 16, 32), "mlp_ratio": 2.0, "drop_path": 0.5},
    "layer_scale": 1e-5,
}
_LARGE: dict[str, Any] = {
    "dim": 192,
    "depths": _DEEP,
    "num_heads": (6, 12, 24, 48),
    "mlp_ratio": 2.0,
    "drop_path": 0.35,
}
_SWIN: dict[str, Any] = {"depths": (2, 2, 18, 2), "mlp_ratio": 4.0, "patch": 4}
_FLAT: dict[str, Any] = {"depths": (12,), "mlp_ratio": 4.0, "patch": 16, "dilations": (2,)}


@register
def dinat_mini(**options: Any) -> DiNAT:
    """DiNAT-Mini, 20 million parameters.

    >>> round(sum(p.numel() for p in dinat_mini().parameters()) / 1e6, 2)
    19.98
    """
    return DiNAT(**(_MINI | options))


@register
def dinat_tiny(**options: Any) -> DiNAT:
    """DiNAT-Tiny, 28 million parameters."""
    return DiNAT(**(_MINI | {"depths": _DEEP} | options))


@register
def dinat_small(**options: Any) -> DiNAT:
    """DiNAT-Small, 51 million parameters."""
    return DiNAT(**(_SMALL | options))


@register
def dinat_base(**options: Any) -> DiNAT:
    """DiNAT-Base, 90 million parameters."""
    return DiNAT(**(_BASE | options))


@register
def dinat_large(**options: Any) -> DiNAT:
    """DiNAT-Large, 201 million parameters, for images of 224."""
    return DiNAT(**(_LARGE | options))


@register
def dinat_large_384(**options: Any) -> DiNAT:
    """DiNAT-Large with the dilations for images of 384."""
    return DiNAT(**(_LARGE | {"dilations": (13, 6, 3, 1)} | options))


@register
def nat_mini(**options: Any) -> DiNAT:
    """NAT-Mini: DiNAT-Mini without dilation."""
    return dinat_mini(**({"dilations": _LOCAL} | options))


@register
def nat_tiny(**options: Any) -> DiNAT:
    """NAT-Tiny: DiNAT-Tiny without dilation."""
    return dinat_tiny(**({"dilations": _LOCAL} | options))


@register
def nat_small(**options: Any) -> DiNAT:
    """NAT-Small: DiNAT-Small without dilation."""
    return dinat_small(**({"dilations": _LOCAL} | options))


@register
def nat_base(**options: Any) -> DiNAT:
    """NAT-Base: DiNAT-Base without dilation."""
    return dinat_base(**({"dilations": _LOCAL} | options))


@register
def dinat_s_tiny(**options: Any) -> DiNAT:
    """DiNAT_s-Tiny: Swin-Tiny's layout with neighborhoods for windows, dilated ones for shifted windows."""
    sizes: dict[str, Any] = {"dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24), "drop_path": 0.2}
    return DiNAT(**(_SWIN | sizes | options))


@register
def dinat_s_small(**options: Any) -> DiNAT:
    """DiNAT_s-Small, in Swin-Small's layout."""
    return DiNAT(**(_SWIN | {"dim": 96, "num_heads": (3, 6, 12, 24), "drop_path": 0.3} | options))


@register
def dinat_s_base(**options: Any) -> DiNAT:
    """DiNAT_s-Base, in Swin-Base's layout."""
    return DiNAT(**(_SWIN | {"dim": 128, "num_heads": (4, 8, 16, 32), "drop_path": 0.5} | options))


@register
def dinat_s_large(**options: Any) -> DiNAT:
    """DiNAT_s-Large, in Swin-Large's layout."""
    return DiNAT(**(_SWIN | {"dim": 192, "num_heads": (6, 12, 24, 48), "drop_path": 0.35} | options))


@register
def dinat_isotropic_small(**options: Any) -> DiNAT:
    """DiNAT on one level of patches of 16, with the sizes of ViT-S but 12 heads."""
    return DiNAT(**(_FLAT | {"dim": 384, "num_heads": (12,), "drop_path": 0.1} | options))


@register
def dinat_isotropic_base(**options: Any) -> DiNAT:
    """DiNAT on one level of patches of 16, with the sizes of ViT-B but 24 heads."""
    return DiNAT(**(_FLAT | {"dim": 768, "num_heads": (24,), "drop_path": 0.4} | options))


@register
def nat_isotropic_small(**options: Any) -> DiNAT:
    """NAT on one level of patches of 16, with the sizes of ViT-S but 12 heads."""
    return dinat_isotropic_small(**({"dilations": (1,)} | options))


@register
def nat_isotropic_base(**options: Any) -> DiNAT:
    """NAT on one level of patches of 16, with the sizes of ViT-B but 24 heads."""
    return dinat_isotropic_base(**({"dilations": (1,)} | options))
