"""A pyramid of four levels around any mixer of tokens: what MAViT, PPMA and SegMAN's encoder have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from glocal.nn import ConvMLP, Depthwise, DropPath
from glocal.shapes import Float

__all__ = ["Level", "Pyramid", "PyramidBlock"]


class Level(NamedTuple):
    """One level of a pyramid.

    Args:
        dim: channels.
        depth: blocks.
        mlp_ratio: hidden channels of the feed-forward over ``dim``.
        mixer: makes the mixer of tokens of a block, a module from ``(B, H, W, dim)`` to the same, from its number.
        layer_scale: start value of a learned scale of each branch; none where None.
        scale_bias: whether a learned shift, 0 at the start, goes with each scale.
    """

    dim: int
    depth: int
    mlp_ratio: float
    mixer: Callable[[int], nn.Module]
    layer_scale: float | None = None
    scale_bias: bool = False


class PyramidBlock(nn.Module):
    """A pre-norm block whose positions come from a depthwise convolution before it, added to its input.

    Args:
        level: as in `Pyramid`.
        number: of the block in its level.
        drop_path: share of the batch for which a branch is dropped in training.
        positions: how many such convolutions: one before the mixer, or one more before the feed-forward.

    Maps are ``(B, H, W, dim)``.
    """

    def __init__(self, level: Level, number: int, *, drop_path: float = 0.0, positions: int = 1) -> None:
        super().__init__()
        dim = level.dim
        self.positions = nn.ModuleList(Depthwise(dim, 3) for _ in range(positions))
        self.norm1, self.norm2 = (nn.LayerNorm(dim, eps=1e-6) for _ in range(2))
        self.mixer = level.mixer(number)
        self.mlp = ConvMLP(dim, int(level.mlp_ratio * dim))
        self.drop_path = DropPath(drop_path)
        scale = None if level.layer_scale is None else torch.full((dim,), level.layer_scale)
        self.gamma1 = None if scale is None else nn.Parameter(scale.clone())
        self.gamma2 = None if scale is None else nn.Parameter(scale.clone())
        shift = None if scale is None or not level.scale_bias else torch.zeros(dim)
        self.beta1 = None if shift is None else nn.Parameter(shift.clone())
        self.beta2 = None if shift is None else nn.Parameter(shift.clone())

    def forward(self, x: Float[Tensor, "B H W C"]) -> Float[Tensor, "B H W C"]:
        """A map to a map of the same size."""
        x = x + self.positions[0](x)
        mixed = self.mixer(self.norm1(x))
        x = x + self.drop_path(_scaled(mixed, self.gamma1, self.beta1))
        if len(self.positions) > 1:
            x = x + self.positions[1](x)
        fed = self.mlp(self.norm2(x))
        out: Tensor = x + self.drop_path(_scaled(fed, self.gamma2, self.beta2))
        return out


class Pyramid(nn.Module):
    """A stem to a quarter of the image's size, levels of half the size of the one before, a classifier.

    Args:
        levels: finest first.
        stem: output channels and stride of each of its convolutions of 3 x 3.
        projected: channels between the last level and the classifier.
        positions: as in `PyramidBlock`.
        drop_path: of the last block, growing linearly from 0.
        bias: whether the convolutions of the stem and between the levels have biases.
        num_classes: outputs; 0 gives the projected, pooled features.
        channels: of the image.

    Images may have any size. Pass a batch of two or more in training: there are batch norms.

    Raises:
        ValueError: no levels, a stem whose last channels are not the first level's.
    """

    def __init__(
        self,
        levels: Sequence[Level],
        *,
        stem: Sequence[tuple[int, int]],
        projected: int,
        positions: int = 1,
        drop_path: float = 0.0,
        bias: bool = True,
        num_classes: int = 1000,
        channels: int = 3,
    ) -> None:
        super().__init__()
        if not levels or not stem or stem[-1][0] != levels[0].dim:
            raise ValueError(
                f"stem must end with the first level's channels; it was {tuple(stem)} for levels of "
                f"{tuple(level.dim for level in levels)}"
            )
        parts: list[nn.Module] = []
        for before, (width, stride) in zip([channels, *(w for w, _ in stem)], stem, strict=False):
            parts += [nn.Conv2d(before, width, 3, stride, 1, bias=bias), nn.BatchNorm2d(width), nn.GELU()]
        self.stem = nn.Sequential(*parts[:-1])
        dims = [level.dim for level in levels]
        self.down = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, 2, 1, bias=bias), nn.BatchNorm2d(b)) for a, b in pairwise(dims)
        )
        rates = iter(torch.linspace(0, drop_path, sum(level.depth for level in levels), device="cpu").tolist())
        self.levels = nn.ModuleList(
            nn.Sequential(
                *(PyramidBlock(level, n, drop_path=next(rates), positions=positions) for n in range(level.depth))
            )
            for level in levels
        )
        self.proj = nn.Sequential(nn.Conv2d(dims[-1], projected, 1), nn.BatchNorm2d(projected), nn.SiLU())
        self.head = nn.Linear(projected, num_classes) if num_classes else nn.Identity()
        self.apply(_init)

    def forward_features(self, x: Float[Tensor, "B C H W"]) -> tuple[Tensor, ...]:
        """The map of each level, finest first, ``(B, h, w, dim)``, not normalised: what dense tasks build on."""
        if x.dim() != 4:
            raise ValueError(f"x must be images (B, channels, H, W); it was {tuple(x.shape)}")
        x, maps = self.stem(x), []
        for number, blocks in enumerate(self.levels):
            x = self.down[number - 1](x) if number else x
            maps.append(cast(Tensor, blocks(x.movedim(1, -1))))
            x = maps[-1].movedim(-1, 1)
        return tuple(maps)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B num_classes"]:
        """Images to logits."""
        last = self.forward_features(x)[-1].movedim(-1, 1)
        out: Tensor = self.head(self.proj(last).mean((2, 3)))
        return out


def _scaled(x: Tensor, gamma: Tensor | None, beta: Tensor | None) -> Tensor:
    x = x if gamma is None else gamma * x
    return x if beta is None else x + beta


def _init(module: nn.Module) -> None:
    """Linear layers and convolutions from a normal of 0.02, cut at two, and without biases."""
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
