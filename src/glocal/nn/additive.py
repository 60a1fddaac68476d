"""Convolutional additive attention: queries and keys are gated and added, place by place; no pair is compared."""

from __future__ import annotations

from torch import Tensor, nn

from glocal.nn.conv import BatchNorm, Depthwise
from glocal.shapes import Float

__all__ = ["ContextGate", "ConvAdditiveAttention"]


class ContextGate(nn.Module):
    """Weighs the places of a map by what is around them, then its channels by their means.

    Args:
        dim: channels.

    >>> import torch
    >>> ContextGate(8)(torch.randn(2, 5, 7, 8)).shape
    torch.Size([2, 5, 7, 8])
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dw, self.norm, self.act = Depthwise(dim, 3), BatchNorm(dim), nn.ReLU()
        self.place, self.channel = nn.Linear(dim, 1, bias=False), nn.Linear(dim, dim, bias=False)

    def forward(self, x: Float[Tensor, "B H W dim"]) -> Float[Tensor, "B H W dim"]:
        """A map to a map, each entry times two numbers between 0 and 1."""
        x = x * self.place(self.act(self.norm(self.dw(x)))).sigmoid()
        out: Tensor = x * self.channel(x.mean((1, 2), keepdim=True)).sigmoid()
        return out


class ConvAdditiveAttention(nn.Module):
    """The token mixer of CAS-ViT: ``proj(dw(gate(q) + gate(k)) * v)``, linear in the tokens.

    There are no attention weights to return. Queries, keys and values are combined place by place, so that there is no
    cross form, and the gates take means over the whole map, so that there is no causal one. Zhang et al., 2024, arXiv
    2408.03703.

    Args:
        dim: channels.
        qkv_bias: whether the projections have biases.
        dropout: of the output.

    Raises:
        ValueError: settings out of range, an input that is no map of ``dim`` channels.

    There are batch norms inside: pass a batch of two or more in training.

    >>> import torch
    >>> ConvAdditiveAttention(16)(torch.randn(2, 5, 7, 16)).shape
    torch.Size([2, 5, 7, 16])
    """

    def __init__(self, dim: int, *, qkv_bias: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        if dim < 1:
            raise ValueError(f"dim must be at least 1; it was {dim}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be at least 0 and less than 1; it was {dropout}")
        self.dim = dim
        self.qkv_proj = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.q_gate, self.k_gate = ContextGate(dim), ContextGate(dim)
        self.dw, self.o_proj, self.drop = Depthwise(dim, 3), Depthwise(dim, 3), nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, "B H W dim"]) -> Float[Tensor, "B H W dim"]:
        """``(B, H, W, dim)`` to the same."""
        if x.dim() != 4 or x.shape[-1] != self.dim:
            raise ValueError(f"x must be (B, H, W, {self.dim}); it was {tuple(x.shape)}")
        q, k, v = self.qkv_proj(x).chunk(3, -1)
        out: Tensor = self.drop(self.o_proj(self.dw(self.q_gate(q) + self.k_gate(k)) * v))
        return out
