"""Depthwise convolutions on images with channels last, and feed-forwards with one."""

from __future__ import annotations

from torch import Tensor, nn

from glocal.shapes import Float

__all__ = ["BatchNorm", "ConvMLP", "Depthwise", "LocalInteraction"]


class Depthwise(nn.Conv2d):
    """A depthwise convolution of odd side, with zeros around the image: ``(B, H, W, dim)`` to the same.

    >>> import torch
    >>> Depthwise(8, 3)(torch.randn(2, 5, 7, 8)).shape
    torch.Size([2, 5, 7, 8])
    """

    def __init__(self, dim: int, side: int, *, bias: bool = True) -> None:
        if side < 1 or side % 2 == 0:
            raise ValueError(f"side must be odd; it was {side}")
        super().__init__(dim, dim, side, padding=side // 2, groups=dim, bias=bias)

    def forward(self, x: Float[Tensor, "B H W dim"]) -> Float[Tensor, "B H W dim"]:
        """Channels last in and out."""
        out: Tensor = super().forward(x.movedim(-1, 1)).movedim(1, -1)
        return out


class ConvMLP(nn.Module):
    """A feed-forward whose hidden map is convolved: ``fc2(t + dw(t))`` of ``t = gelu(fc1(x))``.

    Args:
        dim: channels.
        hidden: channels of the hidden map.
        residual: False convolves before the activation, with nothing beside: ``fc2(gelu(dw(fc1(x))))``, as in PVT v2.
        side: of the convolution.

    >>> import torch
    >>> ConvMLP(8, 32)(torch.randn(2, 5, 7, 8)).shape
    torch.Size([2, 5, 7, 8])
    """

    def __init__(self, dim: int, hidden: int, *, residual: bool = True, side: int = 3) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.dw, self.act, self.residual = Depthwise(hidden, side), nn.GELU(), residual

    def forward(self, x: Float[Tensor, "B H W dim"]) -> Float[Tensor, "B H W dim"]:
        """``(B, H, W, dim)`` to the same."""
        hidden = self.fc1(x)
        if self.residual:
            hidden = self.act(hidden)
            hidden = hidden + self.dw(hidden)
        else:
            hidden = self.act(self.dw(hidden))
        out: Tensor = self.fc2(hidden)
        return out


class BatchNorm(nn.BatchNorm2d):
    """Batch norm of maps with channels last, ``(B, H, W, dim)`` to the same.

    >>> import torch
    >>> BatchNorm(8)(torch.randn(2, 5, 7, 8)).shape
    torch.Size([2, 5, 7, 8])
    """

    def forward(self, x: Float[Tensor, "B H W dim"]) -> Float[Tensor, "B H W dim"]:
        """Channels last in and out."""
        out: Tensor = super().forward(x.movedim(-1, 1)).movedim(1, -1)
        return out


class LocalInteraction(nn.Module):
    """Two depthwise convolutions with GELU and batch norm between: what gathers near a token what attention has spread.

    XCiT's local patch interaction (El-Nouby et al., 2021, arXiv 2106.09681); with a side of 7 L2ViT's local
    concentration (Zheng, 2025, arXiv 2501.16182).

    Args:
        dim: channels.
        side: of both convolutions.

    >>> import torch
    >>> LocalInteraction(8)(torch.randn(2, 5, 7, 8)).shape
    torch.Size([2, 5, 7, 8])
    """

    def __init__(self, dim: int, side: int = 3) -> None:
        super().__init__()
        self.conv1, self.conv2 = Depthwise(dim, side), Depthwise(dim, side)
        self.act, self.norm = nn.GELU(), BatchNorm(dim)

    def forward(self, x: Float[Tensor, "B H W dim"]) -> Float[Tensor, "B H W dim"]:
        """``(B, H, W, dim)`` to the same."""
        out: Tensor = self.conv2(self.norm(self.act(self.conv1(x))))
        return out
