"""DiT with multi-head linear attention: a diffusion transformer over latents, conditioned on time and class."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, nn

from glocal.models.registry import register
from glocal.nn import MLP
from glocal.nn.mhla import MultiHeadLinearAttention
from glocal.nn.sincos import sincos_grid
from glocal.shapes import Float

__all__ = ["MHLADiT", "mhla_dit_base", "mhla_dit_large", "mhla_dit_small", "mhla_dit_xlarge"]


class MHLADiT(nn.Module):
    """DiT (Peebles and Xie, 2023, arXiv 2212.09748) with the attention of MHLA (2026, arXiv 2601.07832).

    Args:
        dim, depth, num_heads: channels, blocks, heads.
        size: side of the latents; those of another size get as many blocks, of another size.
        patch: side of a patch.
        block_size: tokens of a block, a square of a number that divides the patches of a side.
        channels: of the latents.
        num_classes: labels; one more stands for no label.
        label_dropout: share of labels that are replaced by it in training.
        variance: predicts the noise and its variance, twice as many channels.
        init, norm: as in `MultiHeadLinearAttention`.

    Raises:
        ValueError: numbers that do not divide; at use, what are no latents.

    >>> model = MHLADiT(32, 2, 2, size=8, block_size=4, num_classes=10)
    >>> model(torch.randn(2, 4, 8, 8), torch.tensor([0.0, 999.0]), torch.tensor([3, 10])).shape
    torch.Size([2, 8, 8, 8])
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        num_heads: int,
        *,
        size: int = 32,
        patch: int = 2,
        block_size: int = 16,
        channels: int = 4,
        num_classes: int = 1000,
        label_dropout: float = 0.1,
        variance: bool = True,
        init: str = "linear",
        norm: str = "paper",
    ) -> None:
        super().__init__()
        if patch < 1 or size % patch:
            raise ValueError(f"patch must divide size {size}; it was {patch}")
        side = math.isqrt(max(block_size, 0))
        if side < 1 or side**2 != block_size or (size // patch) % side:
            raise ValueError(
                f"block_size must be the square of a number that divides the {size // patch} patches of a side; it was "
                f"{block_size}"
            )
        if not 0 <= label_dropout < 1:
            raise ValueError(f"label_dropout must be at least 0 and less than 1; it was {label_dropout}")
        self.dim, self.patch, self.channels, self.num_classes = dim, patch, channels, num_classes
        self.label_dropout = label_dropout
        self.embed = nn.Conv2d(channels, dim, patch, patch)
        self.time = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.label = nn.Embedding(num_classes + 1, dim)
        blocks = (size // patch // side,) * 2
        common: dict[str, Any] = dict(blocks=blocks, init=init, norm=norm, lepe=3, out_bias=True)
        self.blocks = nn.ModuleList(_Block(dim, num_heads, **common) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))
        self.head = nn.Linear(dim, patch**2 * channels * (2 if variance else 1))
        self._init()

    def _init(self) -> None:
        """As in DiT: blocks pass on their input, and the output is zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.embed.weight.view(self.dim, -1))
        assert self.embed.bias is not None
        nn.init.zeros_(self.embed.bias)
        for weight in (self.label.weight, *(p for p in self.time.parameters() if p.dim() > 1)):
            nn.init.normal_(weight, std=0.02)
        last = [cast(_Block, block).modulation[1] for block in self.blocks]
        for module in (*last, self.modulation[1], self.head):
            for p in module.parameters():
                nn.init.zeros_(p)

    def forward(
        self, x: Float[Tensor, "B C H W"], time: Float[Tensor, "B"], label: Tensor
    ) -> Float[Tensor, "B C_out H W"]:
        """What the diffusion predicts for latents ``x (B, C, H, W)``.

        Args:
            x: noisy latents.
            time: step of the diffusion of each, from 0 to 999.
            label: classes ``(B,)``, integers; ``num_classes`` for none.
        """
        if x.dim() != 4 or x.shape[1] != self.channels or any(n % self.patch for n in x.shape[2:]):
            raise ValueError(
                f"x must be latents (B, {self.channels}, H, W) of whole patches of {self.patch}; it was "
                f"{tuple(x.shape)}"
            )
        if label.shape != x.shape[:1] or label.is_floating_point():
            raise ValueError(f"label must be integers {tuple(x.shape[:1])}; it was {label.dtype} {tuple(label.shape)}")
        rate = torch.exp(-math.log(10000.0) * torch.arange(128, device=x.device) / 128)
        angle = time[:, None].float() * rate
        if self.training and self.label_dropout:
            dropped = torch.rand(label.shape, device=label.device) < self.label_dropout
            label = label.masked_fill(dropped, self.num_classes)
        waves = torch.cat([angle.cos(), angle.sin()], -1).to(self.label.weight.dtype)
        condition = self.time(waves) + self.label(label)
        x = self.embed(x).movedim(1, -1)
        places = sincos_grid(x.shape[1], x.shape[2], self.dim).to(x).view(*x.shape[1:])
        x = x + places
        for block in self.blocks:
            x = block(x, condition)
        shift, scale = self.modulation(condition)[:, None, None].chunk(2, -1)
        out = self.head(self.norm(x) * (1 + scale) + shift).unflatten(-1, (self.patch, self.patch, -1))
        return cast(Tensor, out.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3))


class _Block(nn.Module):
    """Attention and feed-forward, each shifted, scaled and gated by the condition."""

    def __init__(self, dim: int, num_heads: int, **options: Any) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        # The published layer normalises its input once more.
        self.attention = nn.Sequential(nn.LayerNorm(dim, eps=1e-6), MultiHeadLinearAttention(dim, num_heads, **options))
        self.mlp = MLP(dim, 4 * dim, approximate="tanh")
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition)[:, None, None].chunk(6, -1)
        x = x + gate1 * self.attention(self.norm(x) * (1 + scale1) + shift1)
        return cast(Tensor, x + gate2 * self.mlp(self.norm(x) * (1 + scale2) + shift2))


@register
def mhla_dit_small(**options: Any) -> MHLADiT:
    """DiT-S/2's size; latents of 32 x 32."""
    return MHLADiT(**({"dim": 384, "depth": 12, "num_heads": 6} | options))


@register
def mhla_dit_base(**options: Any) -> MHLADiT:
    """DiT-B/2's size; latents of 32 x 32."""
    return MHLADiT(**({"dim": 768, "depth": 12, "num_heads": 12} | options))


@register
def mhla_dit_large(**options: Any) -> MHLADiT:
    """DiT-L/2's size; latents of 32 x 32."""
    return MHLADiT(**({"dim": 1024, "depth": 24, "num_heads": 16} | options))


@register
def mhla_dit_xlarge(**options: Any) -> MHLADiT:
    """DiT-XL/2's size; latents of 32 x 32."""
    return MHLADiT(**({"dim": 1152, "depth": 28, "num_heads": 16} | options))
