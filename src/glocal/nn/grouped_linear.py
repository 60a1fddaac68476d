"""A linear layer in groups: each block of outputs reads its own block of inputs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from glocal.shapes import Float

__all__ = ["GroupedLinear"]


class GroupedLinear(nn.Module):
    """``groups`` linear layers side by side, on contiguous blocks of channels: a ``groups``-th of the weights.

    ConvBERT's grouped linear operator (Jiang et al., 2020, arXiv 2008.02496).

    Args:
        dim, out_dim: channels in and out.
        groups: a divisor of both.
        bias: whether there is one, ``(out_dim,)``.

    Raises:
        ValueError: groups that do not divide.

    >>> import torch
    >>> layer = GroupedLinear(8, 12, 2)
    >>> layer(torch.randn(3, 5, 8)).shape, tuple(layer.weight.shape)
    (torch.Size([3, 5, 12]), (2, 4, 6))
    """

    def __init__(self, dim: int, out_dim: int, groups: int, *, bias: bool = True) -> None:
        super().__init__()
        if groups < 1 or dim % groups or out_dim % groups:
            raise ValueError(f"groups must divide dim {dim} and out_dim {out_dim}; it was {groups}")
        self.weight = nn.Parameter(torch.empty(groups, dim // groups, out_dim // groups))
        self.bias = nn.Parameter(torch.empty(out_dim)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As of as many `torch.nn.Linear`."""
        bound = self.weight.shape[1] ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Float[Tensor, "*lead dim"]) -> Float[Tensor, "*lead out_dim"]:
        """``(..., dim)`` to ``(..., out_dim)``."""
        groups = self.weight.shape[0]
        out = torch.einsum("...gi,gio->...go", x.unflatten(-1, (groups, -1)), self.weight).flatten(-2)
        return out if self.bias is None else out + self.bias

    def extra_repr(self) -> str:
        groups, inner, outer = self.weight.shape
        return f"{groups * inner}, {groups * outer}, groups={groups}"
