"""What stands around an attention layer in a network: norm, residual, feed-forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from glocal.cache import Cache

__all__ = ["MLP", "Block", "DropPath", "GatedGELU", "SwiGLU"]


class MLP(nn.Module):
    """Two linear layers with GELU between them (``approximate="tanh"`` as in torch)."""

    def __init__(
        self, dim: int, hidden: int, *, bias: bool = True, dropout: float = 0.0, approximate: str = "none"
    ) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden, bias=bias), nn.Linear(hidden, dim, bias=bias)
        self.act, self.drop = nn.GELU(approximate=approximate), nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., dim)`` to ``(..., dim)``."""
        out: Tensor = self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))
        return out


class SwiGLU(nn.Module):
    """Llama's feed-forward: ``down(silu(gate(x)) * up(x))``. Shazeer, 2020, arXiv 2002.05202."""

    def __init__(self, dim: int, hidden: int, *, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(dim, hidden, bias=bias), nn.Linear(dim, hidden, bias=bias)
        self.down_proj = nn.Linear(hidden, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., dim)`` to ``(..., dim)``."""
        out: Tensor = self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class GatedGELU(nn.Module):
    """The feed-forward of T5 1.1: ``wo(gelu(wi_0(x)) * wi_1(x))``, GELU by tanh. Shazeer, 2020, arXiv 2002.05202."""

    def __init__(self, dim: int, hidden: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.wi_0, self.wi_1 = nn.Linear(dim, hidden, bias=False), nn.Linear(dim, hidden, bias=False)
        self.wo = nn.Linear(hidden, dim, bias=False)
        self.act, self.drop = nn.GELU(approximate="tanh"), nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., dim)`` to ``(..., dim)``."""
        out: Tensor = self.drop(self.wo(self.drop(self.act(self.wi_0(x)) * self.wi_1(x))))
        return out


class DropPath(nn.Module):
    """Drops the whole branch for some items of the batch, in training (stochastic depth, Huang et al., 2016)."""

    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"p of DropPath must be at least 0 and less than 1; it was {p}")
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """``(B, ...)`` to ``(B, ...)``."""
        if not self.p or not self.training:
            return x
        keep = torch.rand(x.shape[0], *(1,) * (x.dim() - 1), device=x.device) >= self.p
        return x * keep / (1 - self.p)


class Block(nn.Module):
    """A pre-norm transformer block: ``x + attention(norm(x))``, then ``x + mlp(norm(x))``.

    Args:
        dim: channels.
        attention: a layer of `glocal.nn`, or any module from ``(B, *grid, dim)`` to the same.
        mlp: the feed-forward module.
        norm: makes a norm for ``dim`` channels: ``torch.nn.LayerNorm`` (the default) or ``torch.nn.RMSNorm``.
        drop_path: share of the batch for which a branch is dropped in training.
        layer_scale: start value of a learned scale a channel on both branches; none where None.

    >>> import torch
    >>> from glocal.nn import MLP, Attention, Block
    >>> Block(32, Attention(32, 4), MLP(32, 64))(torch.randn(2, 7, 32)).shape
    torch.Size([2, 7, 32])
    """

    def __init__(
        self,
        dim: int,
        attention: nn.Module,
        mlp: nn.Module,
        *,
        norm: Callable[..., nn.Module] = nn.LayerNorm,
        eps: float = 1e-6,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
    ) -> None:
        super().__init__()
        self.norm1, self.attention, self.norm2, self.mlp = norm(dim, eps=eps), attention, norm(dim, eps=eps), mlp
        self.drop_path = DropPath(drop_path)
        scale = None if layer_scale is None else torch.full((dim,), layer_scale)
        self.gamma1 = None if scale is None else nn.Parameter(scale.clone())
        self.gamma2 = None if scale is None else nn.Parameter(scale.clone())

    def forward(self, x: Tensor, *, cache: Cache | None = None, **options: Any) -> Tensor:
        """``(B, *grid, dim)`` to the same; ``cache`` and other options go to the attention."""
        if cache is not None:
            options["cache"] = cache
        mixed = self.attention(self.norm1(x), **options)
        x = x + self.drop_path(mixed if self.gamma1 is None else self.gamma1 * mixed)
        fed = self.mlp(self.norm2(x))
        out: Tensor = x + self.drop_path(fed if self.gamma2 is None else self.gamma2 * fed)
        return out
