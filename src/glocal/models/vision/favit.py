"""FaViT: a pyramid whose blocks attend in factors, a thin global one and windows fused over the whole map."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from glocal.models.registry import register
from glocal.nn import Block, ConvMLP
from glocal.nn.factorised import FactorizedAttention
from glocal.shapes import Float

__all__ = ["FaViT", "favit_b0", "favit_b1", "favit_b2", "favit_b3"]


class FaViT(nn.Module):
    """Factorization vision transformer (Qin et al., 2023, arXiv 2312.08614).

    Args:
        dims, depths, num_heads, mlp_ratios: channels, blocks, heads and hidden channels over ``dims`` of each stage.
        reductions: of the map that the global groups of a stage attend to.
        fusion: as in `glocal.nn.FactorizedAttention`; ``"flat"`` for weights of the released code.
        drop_path: of the last block, growing linearly from 0.
        num_classes: outputs; 0 gives the pooled features.
        channels: of the image.

    Images may have any size at which the map of no stage is smaller than its reduction: from 29 with the defaults.

    Raises:
        ValueError: settings that do not fit each other.

    >>> import torch
    >>> from glocal.models.vision.favit import FaViT
    >>> FaViT((16, 32), (1, 1), (1, 2), (2, 2), (2, 1), num_classes=10).eval()(torch.randn(1, 3, 45, 60)).shape
    torch.Size([1, 10])
    """

    def __init__(
        self,
        dims: Sequence[int] = (32, 64, 128, 256),
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (1, 2, 4, 8),
        mlp_ratios: Sequence[float] = (8, 6, 4, 4),
        reductions: Sequence[int] = (8, 4, 2, 1),
        *,
        fusion: str = "mean",
        drop_path: float = 0.0,
        num_classes: int = 1000,
        channels: int = 3,
    ) -> None:
        super().__init__()
        settings = {"depths": depths, "num_heads": num_heads, "mlp_ratios": mlp_ratios, "reductions": reductions}
        for name, value in settings.items():
            if not dims or len(value) != len(dims):
                raise ValueError(f"{name} must have one entry a stage of dims {tuple(dims)}; it was {tuple(value)}")
        rates = iter(torch.linspace(0, drop_path, sum(depths), device="cpu").tolist())
        self.embed, self.stages, self.norms = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        before = channels
        for n, dim in enumerate(dims):
            side, stride = (3, 2) if n else (7, 4)
            self.embed.append(nn.ModuleList([nn.Conv2d(before, dim, side, stride, side // 2), nn.LayerNorm(dim)]))
            blocks = []
            for _ in range(depths[n]):
                mixer = FactorizedAttention(dim, num_heads[n], reduction=reductions[n], fusion=fusion)
                mlp = ConvMLP(dim, int(mlp_ratios[n] * dim), residual=False)
                blocks.append(Block(dim, mixer, mlp, drop_path=next(rates)))
            self.stages.append(nn.Sequential(*blocks))
            self.norms.append(nn.LayerNorm(dim, eps=1e-6))
            before = dim
        self.head = nn.Linear(dims[-1], num_classes) if num_classes else nn.Identity()
        self.apply(_init)

    def forward_features(self, x: Float[Tensor, "B C H W"]) -> tuple[Tensor, ...]:
        """The map of each stage, finest first, ``(B, h, w, dim)``, normalised: what dense tasks build on."""
        if x.dim() != 4:
            raise ValueError(f"x must be images (B, channels, H, W); it was {tuple(x.shape)}")
        maps: list[Tensor] = []
        for embed, blocks, norm in zip(self.embed, self.stages, self.norms, strict=True):
            conv, first = cast(nn.ModuleList, embed)
            x = norm(blocks(first(conv(x).movedim(1, -1))))
            maps.append(x)
            x = x.movedim(-1, 1)
        return tuple(maps)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B num_classes"]:
        """Images to logits."""
        out: Tensor = self.head(self.forward_features(x)[-1].mean((1, 2)))
        return out


def _init(module: nn.Module) -> None:
    """Linear layers from a normal of 0.02, cut at two; convolutions by their outputs; no biases."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
    elif isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, std=math.sqrt(2 * module.groups / module.weight[:, 0].numel()))
    else:
        return
    if module.bias is not None:
        nn.init.zeros_(module.bias)


@register
def favit_b0(**options: Any) -> FaViT:
    """3.4 million parameters; 224 pixels."""
    return FaViT(**options)


@register
def favit_b1(**options: Any) -> FaViT:
    """13.0 million parameters; 224 pixels."""
    return FaViT(**({"dims": (64, 128, 256, 512)} | options))


@register
def favit_b2(**options: Any) -> FaViT:
    """24.9 million parameters; 224 pixels."""
    return FaViT(**({"dims": (64, 128, 256, 512), "depths": (2, 3, 18, 3)} | options))


@register
def favit_b3(**options: Any) -> FaViT:
    """48.7 million parameters; 224 pixels."""
    return FaViT(**({"dims": (96, 192, 384, 768), "depths": (2, 3, 14, 3)} | options))
