"""Agent-Swin: Swin with agent attention over the whole map in its first blocks, windows in the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from glocal.models.registry import register
from glocal.models.vision.agent import init_weights
from glocal.models.vision.levels import Levels
from glocal.models.vision.patches import Patches, PatchMerge
from glocal.nn import MLP, Attention, Block, Call
from glocal.nn.agent import AgentAttention
from glocal.patterns import Block as Blocks
from glocal.patterns import Pattern
from glocal.scores import RelativePosition, Score

__all__ = ["AgentSwin", "SwinAttention", "agent_swin_base", "agent_swin_small", "agent_swin_tiny"]

_NO_CROSS = "windows align queries and keys of one image"


class SwinAttention(Attention):
    """Attention inside windows of an image, with a learned bias for each offset (Liu et al., 2021, arXiv 2103.14030).

    Args:
        dim, num_heads: as in `Attention`, with all its options.
        window: tokens a side.
        shift: windows begin half a window later; those at the border are cut, not rolled, and a map that one window
            covers is not shifted.

    Maps may have any size: the last windows are short.

    >>> import torch
    >>> from glocal.models.vision.agent_swin import SwinAttention
    >>> SwinAttention(32, 4, window=7, shift=True)(torch.randn(2, 14, 17, 32)).shape
    torch.Size([2, 14, 17, 32])
    """

    uses = ("noncausal-self",)
    refuses: ClassVar[dict[str, str]] = {
        "causal-self": "inside a window every position sees every other",
        "noncausal-cross": _NO_CROSS,
        "causal-cross": _NO_CROSS,
    }
    tiny: ClassVar[dict[str, Any]] = {"grid": (4, 6), "window": 2}

    def __init__(self, dim: int, num_heads: int, *, window: int = 7, shift: bool = False, **options: Any) -> None:
        super().__init__(dim, num_heads, **options)
        if window < 1:
            raise ValueError(f"window must be at least 1; it was {window}")
        self.window, self.shift = window, shift
        side = 2 * window - 1
        self.bias = nn.Parameter(nn.init.trunc_normal_(torch.empty(num_heads, side, side), std=0.02))

    def where(self, q: Tensor, k: Tensor, call: Call) -> Pattern:
        if q.dim() != 5:
            raise ValueError(f"x must be an image (B, H, W, {self.dim})")
        shift = self.window // 2 if self.shift and min(q.shape[2:4]) > self.window else 0
        return Blocks((self.window, self.window), (shift, shift))

    def score(self, call: Call) -> Tensor | Score | None:
        """Entry ``(o, p)`` is for keys so many rows and columns after the query, less ``window - 1``."""
        return RelativePosition(self.bias)

    def extra_repr(self) -> str:
        return f"window={self.window}, shift={self.shift}"


class AgentSwin(Levels):
    """Agent-Swin (Han et al., 2024, arXiv 2312.08874).

    Args:
        dim: channels of the first level; each level has twice those before it.
        depths, num_heads, num_agents: one entry a level.
        agent_blocks: how many blocks of each level, the first ones, have agents; the others have windows, every
            second one shifted.
        window: tokens a side.
        image: pixels a side of the images that it is made for. Biases are resized for others.
        drop_path: of the last block, growing linearly from 0.
        num_classes: outputs; 0 gives the pooled features.
        channels: of the image.

    Images may have any size; what does not fill a patch is filled with zeros.

    Raises:
        ValueError: settings that do not fit each other.

    >>> import torch
    >>> from glocal.models.vision.agent_swin import AgentSwin
    >>> two: dict = dict(depths=(1, 2), num_heads=(1, 2), num_agents=(4, 9), agent_blocks=(1, 0), window=3)
    >>> AgentSwin(16, **two, image=32, num_classes=10)(torch.randn(2, 3, 45, 60)).shape
    torch.Size([2, 10])
    """

    def __init__(
        self,
        dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        *,
        num_agents: Sequence[int] = (9, 16, 49, 49),
        agent_blocks: Sequence[int] = (2, 2, 6, 0),
        window: int = 7,
        image: int = 224,
        drop_path: float = 0.2,
        num_classes: int = 1000,
        channels: int = 3,
    ) -> None:
        super().__init__()
        given = (depths, num_heads, num_agents, agent_blocks)
        if not depths or any(len(each) != len(depths) for each in given):
            raise ValueError(
                "depths, num_heads, num_agents and agent_blocks must have one entry a level; they were "
                f"{', '.join(str(tuple(each)) for each in given)}"
            )
        dims = [dim * 2**level for level in range(len(depths))]
        self.embed = Patches(channels, dim, 4)
        self.down = nn.ModuleList(PatchMerge(d) for d in dims[:-1])
        rates = iter(torch.linspace(0, drop_path, sum(depths), device="cpu").tolist())

        def block(level: int, number: int, side: int) -> Block:
            width, heads = dims[level], num_heads[level]
            common: dict[str, Any] = dict(qkv_bias=True, out_bias=True)
            mixer: Attention
            if number < agent_blocks[level]:
                mixer = AgentAttention(width, heads, num_agents=num_agents[level], grid=(side, side), lepe=3, **common)
            else:
                mixer = SwinAttention(width, heads, window=window, shift=number % 2 == 1, **common)
            return Block(width, mixer, MLP(width, 4 * width), eps=1e-5, drop_path=next(rates))

        levels, side = [], -(-image // 4)
        for level, depth in enumerate(depths):
            levels.append(nn.Sequential(*(block(level, number, side) for number in range(depth))))
            side = -(-side // 2)
        self.levels = nn.ModuleList(levels)
        self.norm = nn.LayerNorm(dims[-1])
        self.head = nn.Linear(dims[-1], num_classes) if num_classes else nn.Identity()
        self.apply(init_weights)


@register
def agent_swin_tiny(**options: Any) -> AgentSwin:
    """28.9 million parameters; 224 pixels; agents in the first three levels."""
    return AgentSwin(**options)


@register
def agent_swin_small(**options: Any) -> AgentSwin:
    """49.7 million parameters; 224 pixels; agents in the first two levels."""
    settings: dict[str, Any] = {"depths": (2, 2, 18, 2), "agent_blocks": (2, 2, 0, 0), "drop_path": 0.3}
    return AgentSwin(**(settings | options))


@register
def agent_swin_base(**options: Any) -> AgentSwin:
    """88.1 million parameters; 224 pixels; agents in the first two levels and two blocks of the third."""
    settings: dict[str, Any] = {
        "dim": 128,
        "depths": (2, 2, 18, 2),
        "num_heads": (4, 8, 16, 32),
        "agent_blocks": (2, 2, 2, 0),
        "drop_path": 0.5,
    }
    return AgentSwin(**(settings | options))
