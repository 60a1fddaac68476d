"""The selective scan over images: four ways through the map, alone (`CrossScan`) or in a gated layer (`SS2D`)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import silu, softplus

from glocal.kernels.scan import selective_scan
from glocal.nn.conv import Depthwise
from glocal.shapes import Float

__all__ = ["SS2D", "CrossScan"]


class CrossScan(nn.Module):
    """The sum of four selective scans of a map: row by row, column by column, and both backwards.

    Liu et al., 2024, arXiv 2401.10166 (VMamba). Each scan has its own weights. Step sizes and scans are in float32 or
    wider, also under autocast.

    Args:
        dim: channels.
        state: numbers of state a channel.
        rank: of the projection to the step sizes; a sixteenth of ``dim``, rounded up, where None.

    Raises:
        ValueError: a number below 1; at use, what is no map of ``dim`` channels.

    >>> CrossScan(8, state=4)(torch.randn(2, 5, 7, 8)).shape
    torch.Size([2, 5, 7, 8])
    """

    def __init__(self, dim: int, state: int = 1, *, rank: int | None = None) -> None:
        super().__init__()
        rank = math.ceil(dim / 16) if rank is None else rank
        for name, value in (("dim", dim), ("state", state), ("rank", rank)):
            if value < 1:
                raise ValueError(f"{name} of CrossScan must be at least 1; it was {value}")
        self.dim, self.state, self.rank = dim, state, rank
        # Not linear layers: a network's initialisation of those leaves them as they are.
        self.x_proj = nn.Parameter(torch.empty(4, rank + 2 * state, dim))
        self.dt_weight = nn.Parameter(torch.empty(4, dim, rank))
        self.dt_bias = nn.Parameter(torch.empty(4, dim))
        self.A_log = nn.Parameter(torch.empty(4, dim, state))
        self.D = nn.Parameter(torch.ones(4, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As Mamba: rates 1 to ``state``, step sizes between 0.001 and 0.1, evenly by their logarithms."""
        nn.init.uniform_(self.x_proj, -(self.dim**-0.5), self.dim**-0.5)
        nn.init.uniform_(self.dt_weight, -(self.rank**-0.5), self.rank**-0.5)
        with torch.no_grad():
            step = torch.exp(torch.empty_like(self.dt_bias).uniform_(math.log(1e-3), math.log(0.1)))
            self.dt_bias.copy_(step + torch.log(-torch.expm1(-step)))  # the inverse of softplus
            self.A_log.copy_(torch.arange(1, self.state + 1).log().expand_as(self.A_log))
            self.D.fill_(1)

    def forward(self, x: Float[Tensor, "B H W dim"]) -> Float[Tensor, "B H W dim"]:
        """``(B, H, W, dim)`` to the same."""
        if x.dim() != 4 or x.shape[-1] != self.dim:
            raise ValueError(f"x must be (B, H, W, {self.dim}); it was {tuple(x.shape)}")
        dtype = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            u = _lines(x.to(dtype))
            step, b, c = (u @ self.x_proj.to(dtype).mT).split([self.rank, self.state, self.state], -1)
            delta = softplus(step @ self.dt_weight.to(dtype).mT + self.dt_bias.to(dtype)[:, None])
            y, _ = selective_scan(u, delta, -self.A_log.to(dtype).exp(), b, c, self.D)
        return _map(y, x.shape[1], x.shape[2]).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.dim}, state={self.state}, rank={self.rank}"


class SS2D(nn.Module):
    """VMamba's layer: inputs are convolved and scanned, normalised, and gated by a second projection.

    ``out_proj(norm(scan(silu(conv(u)))) * silu(g))`` of ``u, g = in_proj(x)``. Liu et al., 2024, arXiv 2401.10166.

    Args:
        dim: channels.
        state: numbers of state a channel.
        expand: channels of the scan over ``dim``.
        side: of the depthwise convolution.

    >>> SS2D(8)(torch.randn(2, 5, 7, 8)).shape
    torch.Size([2, 5, 7, 8])
    """

    def __init__(self, dim: int, *, state: int = 16, expand: int = 2, side: int = 3) -> None:
        super().__init__()
        inner = expand * dim
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False)
        self.conv = Depthwise(inner, side)
        self.scan = CrossScan(inner, state, rank=math.ceil(dim / 16))
        self.norm = nn.LayerNorm(inner)
        self.out_proj = nn.Linear(inner, dim, bias=False)

    def forward(
        self, x: Float[Tensor, "B H W dim"], modulation: tuple[Tensor, Tensor, Tensor] | None = None
    ) -> Float[Tensor, "B H W dim"]:
        """``(B, H, W, dim)`` to the same.

        Args:
            x: the map.
            modulation: of a condition, each to broadcast to ``(B, H, W, expand * dim)``: ``scan``, ``scale`` and
                ``shift``. What is scanned is multiplied by ``1 + scan`` before the norm; after it, by ``1 + scale``
                and shifted.
        """
        u, gate = self.in_proj(x).chunk(2, -1)
        y = self.scan(silu(self.conv(u)))
        if modulation is None:
            y = self.norm(y)
        else:
            scan, scale, shift = modulation
            y = self.norm(y * (1 + scan)) * (1 + scale) + shift
        out: Tensor = self.out_proj(y * silu(gate))
        return out


def _lines(x: Tensor) -> Tensor:
    """A map ``(B, H, W, C)`` in the order of each scan, ``(B, 4, H W, C)``."""
    ahead = torch.stack([x.flatten(1, 2), x.transpose(1, 2).flatten(1, 2)], 1)
    return torch.cat([ahead, ahead.flip(2)], 1)


def _map(y: Tensor, height: int, width: int) -> Tensor:
    """The sum over the scans, each place where it was."""
    both = y[:, :2] + y[:, 2:].flip(2)
    rows, columns = both[:, 0].unflatten(1, (height, width)), both[:, 1].unflatten(1, (width, height))
    out: Tensor = rows + columns.transpose(1, 2)
    return out
