"""Factorised attention: a few channels look at the whole map, the others at one window made of all windows."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from glocal.attention import attend
from glocal.nn.conv import Depthwise
from glocal.shapes import Float

__all__ = ["FactorizedAttention"]


class _Fused(nn.Module):
    """Keys and values of a local group: its windows' mean, projected, ``(B, heads, window ** 2, C / heads)`` each."""

    def __init__(self, dim: int, num_heads: int, window: int, dilation: int, fusion: str) -> None:
        super().__init__()
        self.num_heads, self.window, self.dilation, self.fusion = num_heads, window, dilation, fusion
        self.extent = dilation * (window - 1) + 1
        self.fuse_proj = nn.Linear(dim // num_heads, dim // num_heads)
        self.kv_proj = nn.Linear(dim // num_heads, 2 * dim // num_heads)
        self.dw = Depthwise(dim, 3)

    def windows(self, x: Tensor) -> Tensor:
        """``(B, H, W, C)`` to ``(B, windows, window, window, C)``, windows row by row."""
        x = _fill(x, self.extent)
        size, step = self.extent, self.dilation
        parts: Tensor = x.unflatten(2, (-1, size)).unflatten(1, (-1, size))[:, :, ::step, :, ::step]
        return parts.transpose(2, 3).flatten(1, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        parts = self.windows(x).unflatten(-1, (self.num_heads, -1))
        if self.fusion == "mean":
            fused = parts.mean(1)
        else:
            # (windows, channels) as one row, cut into as many runs as there are channels.
            fused = parts.movedim(1, -2).flatten(-2).unflatten(-1, (parts.shape[-1], -1)).mean(-1)
        k, v = self.kv_proj(self.fuse_proj(fused)).chunk(2, -1)
        v = v + self.dw(v.flatten(-2)).view_as(v)
        return k.flatten(1, 2).transpose(1, 2), v.flatten(1, 2).transpose(1, 2)


class FactorizedAttention(nn.Module):
    """The attention of FaViT (FaSA): image-wide context at the price of windows of 7 x 7.

    Channels are split. The first ``2/16`` (or ``1/8`` with ``reduction=1``) attend, in one head, to the whole map
    reduced by a strided convolution. The others form a group a dilation, 1 and ``reduction``: the map is cut into
    windows of ``window ** 2`` places so far apart, the windows are averaged into one, and every query attends to its
    ``window ** 2`` keys. Every convolution and mean reads what comes after: there is no causal form. Qin et al., 2023,
    arXiv 2312.08614.

    Args:
        dim: channels, a multiple of 16 (of 8 with ``reduction=1``).
        num_heads: of the local groups.
        reduction: how much smaller the map of the global group's keys is, and the second group's dilation.
        window: side of a window.
        fusion: ``"mean"`` of the windows, as the paper means it, or ``"flat"``, for weights of the released code: there
            each channel of the fused window is the mean of a run of numbers from all windows and channels in a row.
        qkv_bias: whether the projection of the queries, and of the global keys and values, have biases.
        attention_dropout, dropout: of the weights, and of the output.

    Raises:
        ValueError: channels that do not divide, settings out of range; at use a map smaller than ``reduction``.

    Where a map does not divide into windows it is reflected at its right and lower border, or, if it is too small for
    that, its last places are repeated.

    >>> import torch
    >>> FactorizedAttention(32, 2, reduction=4)(torch.randn(1, 28, 30, 32)).shape
    torch.Size([1, 28, 30, 32])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        reduction: int = 1,
        window: int = 7,
        fusion: str = "mean",
        qkv_bias: bool = True,
        attention_dropout: float = 0.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        for name, value in (("dim", dim), ("num_heads", num_heads), ("reduction", reduction), ("window", window)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1; it was {value}")
        parts = 8 if reduction == 1 else 16
        if dim % parts:
            raise ValueError(f"dim must be a multiple of {parts} with reduction {reduction}; it was {dim}")
        if fusion not in ("mean", "flat"):
            raise ValueError(f"fusion must be 'mean' or 'flat'; it was {fusion!r}")
        for name, share in (("attention_dropout", attention_dropout), ("dropout", dropout)):
            if not 0 <= share < 1:
                raise ValueError(f"{name} must be at least 0 and less than 1; it was {share}")
        local = 7 * (dim // parts)
        if local % num_heads:
            raise ValueError(
                f"num_heads must divide the {local} channels of a local group of {dim}; it was {num_heads}"
            )
        self.dim, self.num_heads, self.reduction, self.group = dim, num_heads, reduction, local
        dilations = (1,) if reduction == 1 else (1, reduction)
        self.thin = dim - len(dilations) * local
        self.attention_dropout = attention_dropout
        self.q_proj, self.o_proj = nn.Linear(dim, dim, bias=qkv_bias), nn.Linear(dim, dim)
        self.reduce, self.norm = nn.Conv2d(self.thin, self.thin, reduction, reduction), nn.LayerNorm(self.thin)
        self.kv_proj, self.v_dw = nn.Linear(self.thin, 2 * self.thin, bias=qkv_bias), Depthwise(self.thin, 3)
        wide = dim - self.thin
        self.local = nn.Sequential(Depthwise(wide, 3), nn.Linear(wide, wide))
        self.groups = nn.ModuleList(_Fused(local, num_heads, window, d, fusion) for d in dilations)
        self.drop = nn.Dropout(dropout)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, dropout_p=self.attention_dropout if self.training else 0.0)

    def global_keys(self, x: Float[Tensor, "B H W thin"]) -> tuple[Tensor, Tensor]:
        """Keys and values of the global group from its channels, ``(B, 1, M, thin)`` of a map reduced to M places."""
        reduced = self.norm(self.reduce(x.movedim(-1, 1)).movedim(1, -1))
        k, v = self.kv_proj(reduced).chunk(2, -1)
        v = v + self.v_dw(v)
        return k.flatten(1, 2)[:, None], v.flatten(1, 2)[:, None]

    def forward(self, x: Float[Tensor, "B H W dim"]) -> Float[Tensor, "B H W dim"]:
        """``(B, H, W, dim)`` to the same."""
        if x.dim() != 4 or x.shape[-1] != self.dim or min(x.shape[1:3]) < self.reduction:
            raise ValueError(
                f"x must be (B, H, W, {self.dim}) of {self.reduction} places a side or more; it was {tuple(x.shape)}"
            )
        q = self.q_proj(x).flatten(1, 2)
        outs = [self._attend(q[:, None, :, : self.thin], *self.global_keys(x[..., : self.thin]))[:, 0]]
        # A head's channels hold its part of the first group, then that of the second.
        heads = q[..., self.thin :].unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        maps = self.local(x[..., self.thin :]).split(self.group, -1)
        for part, fused, own in zip(heads.chunk(len(maps), -1), self.groups, maps, strict=True):
            outs.append(self._attend(part, *fused(own)).transpose(1, 2).flatten(-2))
        out: Tensor = self.drop(self.o_proj(torch.cat(outs, -1))).view_as(x)
        return out

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, reduction={self.reduction}"


def _fill(x: Tensor, size: int) -> Tensor:
    """A map ``(B, H, W, C)`` whose sides are multiples of ``size``."""
    x = x.movedim(-1, 1)
    for axis in (2, 3):
        more = math.ceil(x.shape[axis] / size) * size - x.shape[axis]
        where = [0, 0, 0, more] if axis == 2 else [0, more, 0, 0]
        if more:
            x = pad(x, where, "reflect" if more < x.shape[axis] else "replicate")
    return x.movedim(1, -1)
