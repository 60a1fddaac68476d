"""Agent-PVT: the pyramid vision transformer with agent attention in all four levels."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn

from glocal.models.registry import register
from glocal.models.vision.agent import init_weights, resized
from glocal.nn import MLP, Block
from glocal.nn.agent import AgentAttention
from glocal.shapes import Float

__all__ = ["AgentPVT", "agent_pvt_large", "agent_pvt_medium", "agent_pvt_small", "agent_pvt_tiny"]


class AgentPVT(nn.Module):
    """Agent-PVT (Han et al., 2024, arXiv 2312.08874): patches of 4, then of 2 x 2 tokens, positions in each level.

    As its published sizes imply, there is no class token, and no norm before the classifier.

    Args:
        dims, depths, num_heads, num_agents, mlp_ratios: one entry a level.
        reductions: keys and values come from a smaller map, as in PVT; 1 everywhere in the published networks.
        image: pixels a side of the images that it is made for. Positions and biases are resized for others.
        drop_path: of the last block, growing linearly from 0.
        num_classes: outputs; 0 gives the pooled features.
        channels: of the image.

    Images may have any size from which the last level keeps a token; what does not fill a patch is left out.

    Raises:
        ValueError: settings that do not fit each other; an image that is too small.

    >>> import torch
    >>> from glocal.models.vision.agent_pvt import AgentPVT
    >>> two: dict = dict(dims=(16, 32), depths=(1, 1), num_heads=(1, 2), num_agents=(4, 9), mlp_ratios=(2, 2))
    >>> AgentPVT(**two, reductions=(1, 1), image=32, num_classes=10)(torch.randn(2, 3, 32, 44)).shape
    torch.Size([2, 10])
    """

    def __init__(
        self,
        dims: Sequence[int] = (64, 128, 320, 512),
        depths: Sequence[int] = (2, 2, 2, 2),
        num_heads: Sequence[int] = (1, 2, 5, 8),
        *,
        num_agents: Sequence[int] = (9, 16, 49, 49),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        reductions: Sequence[int] = (1, 1, 1, 1),
        image: int = 224,
        drop_path: float = 0.1,
        num_classes: int = 1000,
        channels: int = 3,
    ) -> None:
        super().__init__()
        given = (dims, depths, num_heads, num_agents, mlp_ratios, reductions)
        if not dims or any(len(each) != len(dims) for each in given):
            raise ValueError(
                "dims, depths, num_heads, num_agents, mlp_ratios and reductions must have one entry a level; they "
                f"were {', '.join(str(tuple(each)) for each in given)}"
            )
        self.least = 4 * 2 ** (len(dims) - 1)
        if image < self.least:
            raise ValueError(f"image must be at least {self.least} pixels; it was {image}")
        self.embeds = nn.ModuleList(
            nn.Conv2d(a, b, side, stride=side)
            for (a, b), side in zip(pairwise([channels, *dims]), (4, *(2 for _ in dims[1:])), strict=True)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for dim in dims)
        sides = [image // 4]
        for _ in dims[1:]:
            sides.append(sides[-1] // 2)
        self.positions = nn.ParameterList(
            nn.init.trunc_normal_(torch.empty(1, dim, side, side), std=0.02)
            for dim, side in zip(dims, sides, strict=True)
        )
        rates = iter(torch.linspace(0, drop_path, sum(depths), device="cpu").tolist())

        def block(n: int) -> Block:
            attention = AgentAttention(
                dims[n],
                num_heads[n],
                num_agents=num_agents[n],
                grid=(sides[n], sides[n]),
                reduction=reductions[n],
                lepe=3,
                qkv_bias=True,
                out_bias=True,
            )
            return Block(dims[n], attention, MLP(dims[n], int(mlp_ratios[n] * dims[n])), drop_path=next(rates))

        self.levels = nn.ModuleList(nn.Sequential(*(block(n) for _ in range(depth))) for n, depth in enumerate(depths))
        self.head = nn.Linear(dims[-1], num_classes) if num_classes else nn.Identity()
        self.apply(init_weights)

    def forward_features(self, x: Float[Tensor, "B C H W"]) -> tuple[Tensor, ...]:
        """The map of each level, finest first, ``(B, h, w, dim)``, not normalised: what dense tasks build on."""
        if x.dim() != 4 or min(x.shape[2:]) < self.least:
            raise ValueError(
                f"x must be images (B, channels, H, W) of at least {self.least} pixels; it was {tuple(x.shape)}"
            )
        maps = []
        for embed, norm, positions, level in zip(self.embeds, self.norms, self.positions, self.levels, strict=True):
            image = embed(x)
            tokens = norm(image.movedim(1, -1)) + resized(positions, tuple(image.shape[2:])).movedim(1, -1)
            maps.append(cast(Tensor, level(tokens)))
            x = maps[-1].movedim(-1, 1)
        return tuple(maps)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B num_classes"]:
        """Images to logits, by the mean of the last map."""
        out: Tensor = self.head(self.forward_features(x)[-1].mean((1, 2)))
        return out


@register
def agent_pvt_tiny(**options: Any) -> AgentPVT:
    """11.6 million parameters; 224 pixels."""
    return AgentPVT(**options)


@register
def agent_pvt_small(**options: Any) -> AgentPVT:
    """20.6 million parameters; 224 pixels."""
    return AgentPVT(**({"depths": (3, 4, 6, 3)} | options))


@register
def agent_pvt_medium(**options: Any) -> AgentPVT:
    """35.9 million parameters; 224 pixels."""
    settings: dict[str, Any] = {"depths": (3, 4, 18, 3), "drop_path": 0.3}
    return AgentPVT(**(settings | options))


@register
def agent_pvt_large(**options: Any) -> AgentPVT:
    """48.7 million parameters; 224 pixels."""
    settings: dict[str, Any] = {"depths": (3, 8, 27, 3), "drop_path": 0.3}
    return AgentPVT(**(settings | options))
