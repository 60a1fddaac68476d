"""MetaFormer: a pyramid of four stages around any mixer of tokens; ConvFormer and CAFormer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from glocal.models.registry import register
from glocal.nn import Attention, Depthwise, DropPath
from glocal.shapes import Float

__all__ = [
    "MetaFormer",
    "MetaFormerBlock",
    "SepConv",
    "SquaredReLU",
    "Stage",
    "StarReLU",
    "attention",
    "caformer_s18",
    "convformer_s18",
]


class SquaredReLU(nn.Module):
    """``relu(x) ** 2`` (So et al., 2021, arXiv 2109.08668)."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape to the same."""
        return x.relu().square()


class StarReLU(nn.Module):
    """``scale * relu(x) ** 2 + bias`` with two learned numbers (Yu et al., 2022, arXiv 2210.13452)."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.bias = nn.Parameter(torch.ones(1)), nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        """Any shape to the same."""
        return self.scale * x.relu().square() + self.bias


class SepConv(nn.Module):
    """ConvFormer's mixer: a depthwise convolution of the doubled channels, without biases.

    Args:
        dim: channels.
        ratio: channels that are convolved over ``dim``.
        side: of the convolution, odd.

    >>> SepConv(8)(torch.randn(2, 5, 7, 8)).shape
    torch.Size([2, 5, 7, 8])
    """

    def __init__(self, dim: int, *, ratio: int = 2, side: int = 7) -> None:
        super().__init__()
        self.fc1, self.act = nn.Linear(dim, ratio * dim, bias=False), StarReLU()
        self.dw, self.fc2 = Depthwise(ratio * dim, side, bias=False), nn.Linear(ratio * dim, dim, bias=False)

    def forward(self, x: Float[Tensor, "B H W dim"]) -> Float[Tensor, "B H W dim"]:
        """``(B, H, W, dim)`` to the same."""
        out: Tensor = self.fc2(self.dw(self.act(self.fc1(x))))
        return out


def attention(dim: int) -> Attention:
    """CAFormer's mixer: softmax attention over the whole map in heads of 32 channels, without biases."""
    if dim % 32:
        raise ValueError(f"dim must be a multiple of 32, the channels of a head; it was {dim}")
    return Attention(dim, dim // 32)


class Stage(NamedTuple):
    """One stage of a `MetaFormer`.

    Args:
        dim: channels.
        depth: blocks.
        mixer: makes the mixer of a block, a module from ``(B, H, W, dim)`` to the same, from ``dim``.
        scaled: whether what a branch is added to has a learned scale a channel.
    """

    dim: int
    depth: int
    mixer: Callable[[int], nn.Module]
    scaled: bool = False


class MetaFormerBlock(nn.Module):
    """``x = scale1 * x + mixer(norm1(x))``, then ``scale2 * x + mlp(norm2(x))``.

    Args:
        stage: as in `MetaFormer`.
        drop_path: share of the batch for which a branch is dropped in training.

    Maps are ``(B, H, W, dim)``.
    """

    def __init__(self, stage: Stage, *, drop_path: float = 0.0) -> None:
        super().__init__()
        dim = stage.dim
        self.norm1, self.norm2 = _norm(dim), _norm(dim)
        self.mixer = stage.mixer(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim, bias=False), StarReLU(), nn.Linear(4 * dim, dim, bias=False))
        self.drop_path = DropPath(drop_path)
        self.scale1 = nn.Parameter(torch.ones(dim)) if stage.scaled else None
        self.scale2 = nn.Parameter(torch.ones(dim)) if stage.scaled else None

    def forward(self, x: Float[Tensor, "B H W C"]) -> Float[Tensor, "B H W C"]:
        """A map to a map of the same size."""
        mixed = self.drop_path(self.mixer(self.norm1(x)))
        x = (x if self.scale1 is None else self.scale1 * x) + mixed
        fed = self.drop_path(self.mlp(self.norm2(x)))
        out: Tensor = (x if self.scale2 is None else self.scale2 * x) + fed
        return out


class MetaFormer(nn.Module):
    """MetaFormer (Yu et al., 2022, "MetaFormer Baselines for Vision", arXiv 2210.13452).

    A stem to about a quarter of the image's size, stages of half the size of the one before, and a classifier with a
    hidden layer on the mean of the last map.

    Args:
        stages: finest first.
        drop_path: of the last block, growing linearly from 0.
        num_classes: outputs; 0 gives the normalised mean of the last map.
        channels: of the image.

    Images may have any size from 3 pixels on that the mixers can take.

    Raises:
        ValueError: no stages.

    >>> from glocal.models.vision.metaformer import MetaFormer, SepConv, Stage
    >>> model = MetaFormer([Stage(16, 1, SepConv), Stage(32, 1, SepConv, scaled=True)], num_classes=10)
    >>> model(torch.randn(1, 3, 45, 60)).shape
    torch.Size([1, 10])
    """

    def __init__(
        self, stages: Sequence[Stage], *, drop_path: float = 0.0, num_classes: int = 1000, channels: int = 3
    ) -> None:
        super().__init__()
        if not stages:
            raise ValueError("stages must have at least one entry; it was empty")
        dims = [stage.dim for stage in stages]
        self.stem = nn.Conv2d(channels, dims[0], 7, 4, 2)
        self.stem_norm = _norm(dims[0])
        self.norms = nn.ModuleList(_norm(dim) for dim in dims[:-1])
        self.down = nn.ModuleList(nn.Conv2d(a, b, 3, 2, 1) for a, b in pairwise(dims))
        rates = iter(torch.linspace(0, drop_path, sum(stage.depth for stage in stages), device="cpu").tolist())
        self.stages = nn.ModuleList(
            nn.Sequential(*(MetaFormerBlock(stage, drop_path=next(rates)) for _ in range(stage.depth)))
            for stage in stages
        )
        last = dims[-1]
        self.norm = nn.LayerNorm(last, eps=1e-6)
        self.head: nn.Module = nn.Identity()
        if num_classes:
            hidden = 4 * last
            self.head = nn.Sequential(
                nn.Linear(last, hidden), SquaredReLU(), nn.LayerNorm(hidden, eps=1e-6), nn.Linear(hidden, num_classes)
            )
        self.apply(_init)

    def forward_features(self, x: Float[Tensor, "B C H W"]) -> tuple[Tensor, ...]:
        """The map of each stage, finest first, ``(B, h, w, dim)``, not normalised: what dense tasks build on."""
        if x.dim() != 4 or x.shape[1] != self.stem.in_channels or min(x.shape[2:]) < 3:
            raise ValueError(
                f"x must be images (B, {self.stem.in_channels}, H, W) of at least 3 pixels each way; "
                f"it was {tuple(x.shape)}"
            )
        x, maps = self.stem_norm(self.stem(x).movedim(1, -1)), []
        for number, blocks in enumerate(self.stages):
            if number:
                x = self.down[number - 1](self.norms[number - 1](x).movedim(-1, 1)).movedim(1, -1)
            x = cast(Tensor, blocks(x))
            maps.append(x)
        return tuple(maps)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B num_classes"]:
        """Images to logits."""
        out: Tensor = self.head(self.norm(self.forward_features(x)[-1].mean((1, 2))))
        return out


def _norm(dim: int) -> nn.LayerNorm:
    return nn.LayerNorm(dim, eps=1e-6, bias=False)


def _init(module: nn.Module) -> None:
    """Linear layers and convolutions from a normal of 0.02, cut at two, and without biases."""
    if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d)):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _s18(mixers: Sequence[Callable[[int], nn.Module]], **options: Any) -> MetaFormer:
    sizes = zip((64, 128, 320, 512), (3, 3, 9, 3), mixers, strict=True)
    return MetaFormer([Stage(*size, scaled=number > 1) for number, size in enumerate(sizes)], **options)


@register
def convformer_s18(**options: Any) -> MetaFormer:
    """Separable convolutions everywhere; 26.8 million parameters."""
    return _s18([SepConv] * 4, **options)


@register
def caformer_s18(**options: Any) -> MetaFormer:
    """Separable convolutions in the two finest stages, softmax attention in the others; 26.3 million parameters."""
    return _s18([SepConv] * 2 + [attention] * 2, **options)
