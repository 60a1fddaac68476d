"""SUM: one U-Net of selective scans that predicts where people look, told what kind of image it sees."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn

from glocal.models.registry import register
from glocal.models.vision.patches import Patches, PatchExpand, PatchMerge
from glocal.nn import DropPath
from glocal.nn.ss2d import SS2D
from glocal.shapes import Float

__all__ = ["CONDITIONS", "SUM", "Condition", "VSSBlock", "sum_small", "sum_tiny", "sum_vssm"]

CONDITIONS = ("photograph, mouse", "photograph, eyes", "e-commerce", "user interface")
"""What kind of image, and how it was recorded where people looked, by number."""


class Condition(nn.Module):
    """Five numbers for each condition, by a small perceptron from a learned table.

    ``conditions`` integers ``(B,)`` to ``(5, B, 1, 1, 1)``: shift and scale of a block's input, shift and scale after
    the inner norm, scale of what is scanned; all near 0 at the start.
    """

    def __init__(self, conditions: int, width: int = 128) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(conditions, width))
        layers = nn.Linear(width, 128), nn.GELU(), nn.Linear(128, 64), nn.GELU(), nn.Linear(64, 5)
        self.mlp = nn.Sequential(*layers)

    def forward(self, condition: Tensor) -> Tensor:
        """As above."""
        found: Tensor = self.mlp(self.table[condition])
        return found.T[..., None, None, None]


class VSSBlock(nn.Module):
    """``x + ss2d(norm(x))``, on the way scaled and shifted by a condition if there are ``conditions``."""

    def __init__(self, dim: int, *, drop_path: float = 0.0, state: int = 16, conditions: int = 0) -> None:
        super().__init__()
        self.norm, self.mixer = nn.LayerNorm(dim, eps=1e-6), SS2D(dim, state=state)
        self.condition = Condition(conditions) if conditions else None
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Float[Tensor, "B H W dim"], condition: Tensor | None = None) -> Float[Tensor, "B H W dim"]:
        """A map to a map of the same size; ``condition`` are integers ``(B,)``."""
        seen = self.norm(x)
        if self.condition is None:
            mixed = self.mixer(seen)
        else:
            shift1, scale1, shift2, scale2, scale3 = self.condition(condition)
            mixed = self.mixer(seen * (1 + scale1) + shift1, (scale3, scale2, shift2))
        out: Tensor = x + self.drop_path(mixed)
        return out


class SUM(nn.Module):
    """Saliency Unification through Mamba (Hosseini et al., 2024, arXiv 2406.17815).

    Args:
        dims: channels of the levels, each twice those before it.
        depths: blocks of the encoder's levels.
        decoder_depths: of the decoder's, the coarsest first.
        drop_path: of the encoder's last block and the decoder's first, from 0 at the other end.
        state: numbers of state a channel.
        conditions: how many kinds of image there are.
        channels: of the image.

    Images have sides that are multiples of 4 times a power of two, 32 with four levels.

    Raises:
        ValueError: settings that do not fit each other; at use, an image of other sides, an unknown condition.

    >>> import torch
    >>> from glocal.models.human.sum import SUM
    >>> model = SUM((16, 32), (1, 1), (1, 1))
    >>> model(torch.randn(2, 3, 32, 48), torch.tensor([0, 3])).shape
    torch.Size([2, 1, 32, 48])
    """

    def __init__(
        self,
        dims: Sequence[int] = (96, 192, 384, 768),
        depths: Sequence[int] = (2, 2, 9, 2),
        decoder_depths: Sequence[int] = (2, 9, 2, 2),
        *,
        drop_path: float = 0.2,
        state: int = 16,
        conditions: int = len(CONDITIONS),
        channels: int = 3,
    ) -> None:
        super().__init__()
        if not dims or not len(dims) == len(depths) == len(decoder_depths):
            raise ValueError(
                f"dims, depths and decoder_depths must have one entry a level; they were {tuple(dims)}, "
                f"{tuple(depths)} and {tuple(decoder_depths)}"
            )
        if any(b != 2 * a for a, b in pairwise(dims)) or dims[0] % 4:
            raise ValueError(f"dims must double from level to level, from a multiple of 4; they were {tuple(dims)}")

        def level(dim: int, rates: Sequence[float], told: int = 0) -> nn.ModuleList:
            return nn.ModuleList(VSSBlock(dim, drop_path=rate, state=state, conditions=told) for rate in rates)

        self.embed = Patches(channels, dims[0], 4)
        self.encoder = nn.ModuleList(level(d, rates) for d, rates in zip(dims, _parted(drop_path, depths), strict=True))
        self.down = nn.ModuleList(PatchMerge(d) for d in dims[:-1])
        rates = _parted(drop_path, decoder_depths[::-1])[::-1]
        self.decoder = nn.ModuleList(
            level(d, some[::-1], conditions) for d, some in zip(dims[::-1], rates, strict=True)
        )
        self.up = nn.ModuleList(PatchExpand(d, 2) for d in dims[:0:-1])
        self.conditions = conditions
        self.last = PatchExpand(dims[0], 4)
        self.head = nn.Conv2d(dims[0] // 4, 1, 1)
        self.apply(_init)

    def forward(self, x: Float[Tensor, "B C H W"], condition: Tensor | int = 0) -> Float[Tensor, "B 1 H W"]:
        """Images to maps from 0 to 1 of where people look.

        Args:
            x: images ``(B, channels, H, W)``.
            condition: integers ``(B,)``, or one for all; `CONDITIONS` for the published model.
        """
        side = 4 * 2 ** len(self.down)
        if x.dim() != 4 or x.shape[2] % side or x.shape[3] % side:
            raise ValueError(f"x must be images (B, C, H, W) with sides that {side} divides; it was {tuple(x.shape)}")
        chosen = torch.as_tensor(condition, device=x.device).expand(len(x))
        if not torch.compiler.is_compiling() and not bool(((chosen >= 0) & (chosen < self.conditions)).all()):
            raise ValueError(f"condition must be from 0 to {self.conditions - 1}; it was {condition}")
        maps = []
        x = self.embed(x)
        for number, blocks in enumerate(self.encoder):
            x = self.down[number - 1](x) if number else x
            maps.append(x)
            for block in cast(nn.ModuleList, blocks):
                x = block(x)
        for number, blocks in enumerate(self.decoder):
            # The input of the encoder's level, at the coarser size; that of the finest is not used.
            x = self.up[number - 1](x + maps[-number]) if number else x
            for block in cast(nn.ModuleList, blocks):
                x = block(x, chosen)
        out: Tensor = self.head(self.last(x).movedim(-1, 1)).sigmoid()
        return out


def _parted(highest: float, depths: Sequence[int]) -> list[list[float]]:
    """Rates from 0 to ``highest``, evenly over all blocks, by level."""
    rates = iter(torch.linspace(0, highest, sum(depths), device="cpu").tolist())
    return [[next(rates) for _ in range(depth)] for depth in depths]


def _init(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


@register
def sum_small(**options: Any) -> SUM:
    """57.5 million parameters, as it was trained: 256 pixels."""
    settings: dict[str, Any] = {"depths": (2, 2, 27, 2), "decoder_depths": (2, 2, 2, 1), "drop_path": 0.3}
    return SUM(**(settings | options))


@register
def sum_vssm(**options: Any) -> SUM:
    """44.7 million parameters: the authors' class without arguments."""
    return SUM(**options)


@register
def sum_tiny(**options: Any) -> SUM:
    """Three levels of one block, for trying out."""
    settings: dict[str, Any] = {"dims": (16, 32, 64), "depths": (1, 1, 1), "decoder_depths": (1, 1, 1)}
    return SUM(**(settings | options))
