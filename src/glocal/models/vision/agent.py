"""Agent-DeiT: a plain vision transformer with a class token whose blocks have agent attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from glocal.models.registry import register
from glocal.nn import MLP, Attention, Block
from glocal.nn.agent import AgentAttention, agent_attend
from glocal.shapes import Float

__all__ = ["AgentDeiT", "ClassTokenAgents", "agent_deit_base", "agent_deit_small", "agent_deit_tiny", "init_weights"]


class ClassTokenAgents(nn.Module):
    """Agent attention over a class token and an image: agents are pooled from the image's queries only.

    The convolution of the values skips the class token, for which each softmax has a bias of its own. Han et al.,
    2024, arXiv 2312.08874.

    Args:
        dim, num_heads, num_agents: as in `AgentAttention`.
        grid: rows and columns of the patches that it is made for.

    >>> import torch
    >>> from glocal.models.vision.agent import ClassTokenAgents
    >>> ClassTokenAgents(32, 4, 9, (14, 14))(torch.randn(2, 1 + 6 * 8, 32), grid=(6, 8)).shape
    torch.Size([2, 49, 32])
    """

    def __init__(self, dim: int, num_heads: int, num_agents: int, grid: tuple[int, int]) -> None:
        super().__init__()
        options: dict[str, Any] = dict(grid=grid, lepe=3, qkv_bias=True, out_bias=True)
        self.inner = AgentAttention(dim, num_heads, num_agents=num_agents, **options)
        self.gather_class = nn.Parameter(torch.empty(num_heads, num_agents, 1))
        self.spread_class = nn.Parameter(torch.empty(num_heads, num_agents, 1))
        for p in (self.gather_class, self.spread_class):
            nn.init.trunc_normal_(p, std=0.02)

    def forward(self, x: Float[Tensor, "B N dim"], *, grid: tuple[int, int]) -> Float[Tensor, "B N dim"]:
        """The class token and the patches, row by row: ``(B, 1 + h w, dim)`` to the same."""
        if x.dim() != 3 or x.shape[1] != 1 + grid[0] * grid[1]:
            raise ValueError(f"x must be a class token and patches of {grid}, (B, 1 + h w, C); it was {tuple(x.shape)}")
        inner = self.inner
        assert inner.gather_bias is not None and inner.spread_bias is not None
        q, k, v = inner.project(x, x, None, None)
        agents, _ = inner.pool(q[:, :, 1:].unflatten(2, grid))
        gather = torch.cat([self.gather_class, inner.gather_bias(grid)], -1)
        spread = torch.cat([self.spread_class, inner.spread_bias(grid)], -1).mT
        out = agent_attend(q, k, v, agents, gather_bias=gather, spread_bias=spread, scale=inner.scale)
        mixed = out.movedim(1, -2).flatten(-2)
        near = inner.near(v[:, :, 1:].unflatten(2, grid), grid).flatten(1, 2)
        result: Tensor = inner.o_proj(torch.cat([mixed[:, :1], mixed[:, 1:] + near], 1))
        return result


class AgentDeiT(nn.Module):
    """Agent-DeiT (Han et al., 2024, arXiv 2312.08874).

    Args:
        dim, depth, num_heads: channels, blocks, heads.
        num_agents: of a block, a square.
        agent_blocks: how many blocks, the first ones, have agents, the others softmax attention; all where None.
        image: pixels a side of the images that it is made for. Positions and biases are resized for others.
        patch: pixels a side of a patch; what an image has more than whole patches is left out.
        drop_path: of the last block, growing linearly from 0.
        num_classes: outputs; 0 gives the class token's features.
        channels: of the image.

    Raises:
        ValueError: an image smaller than a patch.

    >>> import torch
    >>> from glocal.models.vision.agent import AgentDeiT
    >>> AgentDeiT(32, 2, 2, num_agents=4, image=32, patch=8, num_classes=10)(torch.randn(2, 3, 24, 40)).shape
    torch.Size([2, 10])
    """

    def __init__(
        self,
        dim: int = 192,
        depth: int = 12,
        num_heads: int = 3,
        *,
        num_agents: int = 49,
        agent_blocks: int | None = None,
        image: int = 224,
        patch: int = 16,
        drop_path: float = 0.1,
        num_classes: int = 1000,
        channels: int = 3,
    ) -> None:
        super().__init__()
        if image < patch:
            raise ValueError(f"image must be at least a patch of {patch} pixels; it was {image}")
        self.patch, self.agent_blocks = patch, depth if agent_blocks is None else agent_blocks
        grid = (image // patch, image // patch)
        self.embed = nn.Conv2d(channels, dim, patch, stride=patch)
        self.class_token = nn.Parameter(torch.empty(1, 1, dim))
        self.class_position = nn.Parameter(torch.empty(1, 1, dim))
        self.positions = nn.Parameter(torch.empty(1, dim, *grid))
        for p in (self.class_token, self.class_position, self.positions):
            nn.init.trunc_normal_(p, std=0.02)

        def mixer(number: int) -> nn.Module:
            if number < self.agent_blocks:
                return ClassTokenAgents(dim, num_heads, num_agents, grid)
            return Attention(dim, num_heads, qkv_bias=True, out_bias=True)

        rates = torch.linspace(0, drop_path, depth, device="cpu").tolist()
        self.blocks = nn.ModuleList(
            Block(dim, mixer(n), MLP(dim, 4 * dim), drop_path=rate) for n, rate in enumerate(rates)
        )
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, num_classes) if num_classes else nn.Identity()
        self.apply(init_weights)

    def forward_features(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B N dim"]:
        """The class token and the patches after the last norm, ``(B, 1 + h w, dim)``."""
        if x.dim() != 4 or min(x.shape[2:]) < self.patch:
            raise ValueError(f"x must be images (B, channels, H, W) of at least a patch; it was {tuple(x.shape)}")
        image = self.embed(x)
        grid = (image.shape[2], image.shape[3])
        image = image + resized(self.positions, grid)
        first = (self.class_token + self.class_position).expand(len(x), -1, -1)
        x = torch.cat([first, image.flatten(2).mT], 1)
        for number, block in enumerate(self.blocks):
            x = block(x, grid=grid) if number < self.agent_blocks else block(x)
        out: Tensor = self.norm(x)
        return out

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B num_classes"]:
        """Images to logits, by the class token."""
        out: Tensor = self.head(self.forward_features(x)[:, 0])
        return out


def resized(positions: Tensor, grid: tuple[int, int]) -> Tensor:
    """Learned positions ``(1, C, h, w)`` for another grid."""
    return positions if positions.shape[2:] == grid else interpolate(positions, grid, mode="bilinear")


def init_weights(module: nn.Module) -> None:
    """Linear layers from a normal of 0.02, cut at two, and without biases."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


@register
def agent_deit_tiny(**options: Any) -> AgentDeiT:
    """6.0 million parameters; 224 pixels."""
    return AgentDeiT(**({"drop_path": 0.1} | options))


@register
def agent_deit_small(**options: Any) -> AgentDeiT:
    """22.6 million parameters; 224 pixels."""
    return AgentDeiT(**({"dim": 384, "num_heads": 6} | options))


@register
def agent_deit_base(**options: Any) -> AgentDeiT:
    """87.2 million parameters; 224 pixels; agents in the first 4 blocks."""
    return AgentDeiT(**({"dim": 768, "num_heads": 12, "num_agents": 81, "agent_blocks": 4} | options))
