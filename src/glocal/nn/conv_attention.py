"""Attention as a convolution does it: each place of a map attends to the taps of a kernel around it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, pad, relu

from glocal.attention import attend
from glocal.nn.frame import Attention, Call
from glocal.patterns import Keys, Pattern, Sliding, Strided
from glocal.patterns.base import per_axis, whole_axes
from glocal.shapes import Bool, Float

__all__ = ["ConvAttention", "MSAConv", "conv_attend"]

Sides = int | Sequence[int]


def conv_attend(
    q: Float[Tensor, "B H *grid_q D"],
    k: Float[Tensor, "B Hkv *grid_k D"],
    v: Float[Tensor, "B Hkv *grid_k Dv"],
    kernel: Sides,
    *,
    value_kernel: Sides | None = None,
    dilation: Sides = 1,
    border: str = "zero",
    causal: bool = False,
    keys: Bool[Tensor, "B *grid_k"] | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    backend: str = "auto",
) -> Float[Tensor, "B H *grid_q Dv"]:
    """Softmax attention over the taps of a kernel that is centred at the query.

    A tap outside the map is a key and a value of zeros, as in a convolution: it takes weight and gives nothing, so that
    outputs shrink towards the borders. Zhang et al., 2023, arXiv 2310.04134, have this form only.

    Args:
        q: ``(B, H, *grid_q, D)``. With unequal grids the queries are the last positions of the keys, axis by axis.
        k, v: ``(B, Hkv, *grid_k, D or Dv)``.
        kernel: odd side of the kernel, or one an axis.
        value_kernel: sides of another kernel, with as many taps, from which the values come: a tap's weight goes to the
            value at the tap of the same number, row by row. Needs equal grids; memory grows with the taps.
        dilation: how far apart taps are, or that for each axis.
        border: ``"zero"``, or ``"mask"``: taps outside the map do not count.
        causal: only taps that are not after the query count, along the last axis; all other sides must be 1.
        keys: booleans, true for what is no padding, which is treated as outside the map.
        scale: of the scores; ``D ** -0.5`` where None.
        dropout_p: share of weights set to zero, the rest scaled up; apply it in training only.
        backend: as in `glocal.attend`.

    Raises:
        ValueError: an even side, kernels that do not fit each other or the grid, an unknown border.

    >>> import torch
    >>> q = k = v = torch.randn(1, 2, 9, 11, 8)
    >>> conv_attend(q, k, v, (3, 5), dilation=2).shape
    torch.Size([1, 2, 9, 11, 8])
    """
    fits = q.dim() > 3 and k.dim() == q.dim() and v.shape[:-1] == k.shape[:-1] and k.shape[1] > 0
    if not fits or q.shape[0] != k.shape[0] or q.shape[1] % k.shape[1] or q.shape[-1] != k.shape[-1]:
        raise ValueError(
            "q, k and v must be (B, H, *grid_q, D), (B, Hkv, *grid_k, D) and (B, Hkv, *grid_k, Dv); they were "
            f"{tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        )
    grid_q, grid_k = tuple(q.shape[2:-1]), tuple(k.shape[2:-1])
    sides, others, apart = _settle(q.dim() - 3, kernel, value_kernel, dilation, border, causal)
    if keys is not None and (keys.dtype != torch.bool or tuple(keys.shape) != (q.shape[0], *grid_k)):
        raise ValueError(f"keys must be booleans {(q.shape[0], *grid_k)}; it was {keys.dtype} {tuple(keys.shape)}")
    if any(n > m for n, m in zip(grid_q, grid_k, strict=True)):
        raise ValueError(f"q must have at most as many places as k on each axis; it had {grid_q} and k {grid_k}")
    if others is not None:
        if grid_q != grid_k:
            raise ValueError(f"value_kernel needs equal grids; q had {grid_q}, k {grid_k}")
        return _two_kernels(q, k, v, (sides, others), apart, border, keys, scale, dropout_p)
    reach = tuple(d * (side // 2) for side, d in zip(sides, apart, strict=True))
    where: Pattern = Sliding(reach, (*reach[:-1], 0) if causal else reach)
    where = where & Strided(apart) if max(apart) > 1 else where
    where = where if keys is None else where & Keys(keys.flatten(1))
    # Keys of zeros have scores of 0: so many of them add their number to the sum below the fraction line.
    out, lse = attend(q, k, v, where, scale=scale, dropout_p=dropout_p, return_lse=True, backend=backend)
    if border == "mask":
        return out
    last = sides[-1] // 2 + 1 if causal else sides[-1]
    outside = math.prod(sides[:-1]) * last - _inside(grid_q, grid_k, sides, apart, causal, keys, q.device)
    return out * (lse - outside.to(lse).log()).sigmoid().to(out.dtype)[..., None]


def _inside(
    grid_q: Sequence[int],
    grid_k: Sequence[int],
    sides: Sequence[int],
    apart: Sequence[int],
    causal: bool,
    keys: Tensor | None,
    device: torch.device,
) -> Tensor:
    """How many taps of each query are inside the map and no padding, ``(B or 1, 1, *grid_q)``."""
    real = torch.ones(1, 1, *grid_k, 1, dtype=torch.bool, device=device) if keys is None else keys[:, None, ..., None]
    found = torch.zeros(real.shape[0], 1, *grid_q, device=device, dtype=torch.long)
    for offset, tap in _taps(real, sides, apart, grid_q):
        if not causal or offset[-1] <= 0:
            found = found + tap[..., 0]
    return found


def _two_kernels(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sides: tuple[tuple[int, ...], tuple[int, ...]],
    apart: Sequence[int],
    border: str,
    keys: Tensor | None,
    scale: float | None,
    dropout_p: float,
) -> Tensor:
    """Weights by one kernel, values by another; padding is outside the map."""
    grid = q.shape[2:-1]
    real = torch.ones(1, 1, *grid, 1, dtype=torch.bool, device=q.device) if keys is None else keys[:, None, ..., None]
    k, v = (t * real for t in (k, v))
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    q = q * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = torch.stack([(q * tap).sum(-1) for _, tap in _taps(k, sides[0], apart, grid)], -1)
    if border == "mask":
        both = zip(*(_taps(real, side, apart, grid) for side in sides), strict=True)
        live = torch.cat([a & b for (_, a), (_, b) in both], -1)
        # Where nothing is left, as between padding, the weights are not NaN but nothing.
        scores = scores.masked_fill(~live, -torch.inf).masked_fill(~live.any(-1, keepdim=True), 0)
        weights = dropout(scores.softmax(-1), dropout_p) * live
    else:
        weights = dropout(scores.softmax(-1), dropout_p)
    out = torch.zeros_like(q[..., :1] * v)
    for weight, (_, tap) in zip(weights.unbind(-1), _taps(v, sides[1], apart, grid), strict=True):
        out = out + weight[..., None] * tap
    return out


def _taps(
    t: Tensor, sides: Sequence[int], apart: Sequence[int], grid_q: Sequence[int]
) -> Iterator[tuple[tuple[int, ...], Tensor]]:
    """Offset of each tap, and ``t (B, heads, *grid_k, D)`` there, ``(B, heads, *grid_q, D)``; zeros outside."""
    reach = [d * (side // 2) for side, d in zip(sides, apart, strict=True)]
    wide = pad(t, [0, 0, *(r for axis in reversed(reach) for r in (axis, axis))])
    ahead = [n - m for n, m in zip(t.shape[2:-1], grid_q, strict=True)]
    for offset in itertools.product(*(range(-r, r + 1, d) for r, d in zip(reach, apart, strict=True))):
        starts = [a + r + o for a, r, o in zip(ahead, reach, offset, strict=True)]
        places = (slice(start, start + n) for start, n in zip(starts, grid_q, strict=True))
        yield offset, wide[(slice(None), slice(None), *places)]


def _settle(
    rank: int, kernel: Sides, value_kernel: Sides | None, dilation: Sides, border: str, causal: bool
) -> tuple[tuple[int, ...], tuple[int, ...] | None, tuple[int, ...]]:
    """Sides of the kernel, of that of the values, and distances of taps, one an axis, or what does not fit."""
    named = {"kernel": kernel, "value_kernel": kernel if value_kernel is None else value_kernel, "dilation": dilation}
    found = {}
    for name, value in named.items():
        found[name] = per_axis(whole_axes(value if isinstance(value, int) else tuple(value), name, 1), rank, name)
        if name != "dilation" and any(side % 2 == 0 for side in found[name]):
            raise ValueError(f"{name} must have odd sides; it was {value}")
    sides, others = found["kernel"], found["value_kernel"]
    if math.prod(others) != math.prod(sides):
        raise ValueError(f"value_kernel must have as many taps as kernel {sides}; it was {others}")
    if border not in ("zero", "mask"):
        raise ValueError(f"border must be 'zero' or 'mask'; it was {border!r}")
    if causal and (any(side > 1 for side in sides[:-1]) or others != sides):
        raise ValueError(
            f"causal needs sides of 1 on all axes but the last, and values from the same kernel; it was for kernel "
            f"{sides} and value_kernel {others}"
        )
    return sides, None if others == sides else others, found["dilation"]


class ConvAttention(Attention):
    """Each place of a sequence, map or volume attends to the taps of a kernel around it: `conv_attend` as a layer.

    No parameter depends on the size of the map. With a context the queries take its last positions. Decoding keeps all
    keys. Zhang et al., 2023, arXiv 2310.04134.

    Args:
        dim, num_heads: as in `Attention`, with all its options but softcap; ``num_heads=dim`` is the depthwise form.
        kernel: odd sides, as many as the grid has axes; one integer is for both axes of a map.
        value_kernel, dilation, border: as in `conv_attend`.
        causal: no query sees what comes after it on the last axis; the kernel's other sides must be 1.

    Raises:
        ValueError: settings that do not fit each other, what `Attention` refuses, at use a grid with other axes.

    >>> import torch
    >>> from glocal.nn.conv_attention import ConvAttention
    >>> ConvAttention(64, 4, kernel=5)(torch.randn(1, 9, 11, 64)).shape
    torch.Size([1, 9, 11, 64])
    """

    tiny: ClassVar[dict[str, Any]] = {"kernel": (7,)}

    def __init__(
        self,
        dim: int,
        num_heads: int = 1,
        kernel: Sides = 7,
        *,
        value_kernel: Sides | None = None,
        dilation: Sides = 1,
        border: str = "zero",
        causal: bool = False,
        **options: Any,
    ) -> None:
        if options.get("softcap"):
            raise ValueError(f"softcap does not go with a kernel's zero keys; it was {options['softcap']}")
        super().__init__(dim, num_heads, causal=causal, **({"qkv_bias": True, "out_bias": True} | options))
        rank = 2 if isinstance(kernel, int) else len(tuple(kernel))
        self.kernel, self.value_kernel, self.dilation = _settle(rank, kernel, value_kernel, dilation, border, causal)
        self.border = border

    def mix(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        if q.dim() != len(self.kernel) + 3:
            raise ValueError(
                f"x must be (B, *grid, {self.dim}) with the {len(self.kernel)} axes of kernel {self.kernel}; "
                f"it was {tuple(call.x.shape)}"
            )
        return conv_attend(
            *(q, k, v, self.kernel),
            keys=None if call.real is None else call.real.unflatten(1, k.shape[2:-1]),
            scale=self.scale,
            dropout_p=self.dropout if self.training else 0.0,
            value_kernel=self.value_kernel,
            dilation=self.dilation,
            border=self.border,
            causal=self.causal,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return f"kernel={self.kernel}, dilation={self.dilation}, border={self.border!r}"


class MSAConv(nn.Module):
    """A layer of TiC: attention by a kernel, added to its input, then a convolution and ReLU, ``relu(conv(o + x))``.

    The convolution is feed-forward, output projection and downsampling in one. Zhang et al., 2023, arXiv 2310.04134.

    Args:
        dim, out_dim: channels of the input and the output, ``dim`` where None.
        kernel, num_heads, value_kernel, dilation, border: as in `ConvAttention`.
        side, stride: of the convolution.
        dropout: of the attention's weights, in training. The native kernels have none: with it a mask of all pairs of
            places is built, which is much for large maps; 0 avoids it.
        shift: so far a quarter of the channels moves down, one up, one right and one left before the attention, around
            the borders, and back after it; no shift where 0. How the paper does it is not public: this is our reading.

    Raises:
        ValueError: settings out of range, channels that are not a multiple of 4 with a shift.

    >>> import torch
    >>> MSAConv(16, 32, kernel=5, stride=2, shift=3)(torch.randn(2, 9, 11, 16)).shape
    torch.Size([2, 5, 6, 32])
    """

    def __init__(
        self,
        dim: int,
        out_dim: int | None = None,
        *,
        kernel: Sides = 7,
        num_heads: int = 1,
        side: int = 3,
        stride: int = 1,
        dropout: float = 0.1,
        shift: int = 0,
        **options: Any,
    ) -> None:
        super().__init__()
        if side < 1 or side % 2 == 0 or stride < 1:
            raise ValueError(f"side must be odd and stride at least 1; they were {side} and {stride}")
        if shift < 0 or (shift and dim % 4):
            raise ValueError(
                f"shift must be at least 0, and channels a multiple of 4 with one; it was {shift} for {dim} channels"
            )
        self.attention = ConvAttention(dim, num_heads, kernel, dropout=dropout, **options)
        self.attention.register_module("o_proj", nn.Identity())  # the convolution is in its place
        self.conv = nn.Conv2d(dim, dim if out_dim is None else out_dim, side, stride, side // 2, bias=False)
        self.shift = shift

    def _roll(self, x: Tensor, shift: int) -> Tensor:
        """Each quarter of the channels its own way, around the borders."""
        ways = zip(x.chunk(4, -1), (shift, -shift, shift, -shift), (1, 1, 2, 2), strict=True)
        return torch.cat([part.roll(by, axis) for part, by, axis in ways], -1)

    def forward(self, x: Float[Tensor, "B H W dim"]) -> Float[Tensor, "B h w out_dim"]:
        """``(B, H, W, dim)`` to ``(B, ceil(H / stride), ceil(W / stride), out_dim)``."""
        attended = (
            self._roll(self.attention(self._roll(x, self.shift)), -self.shift) if self.shift else self.attention(x)
        )
        out: Tensor = relu(self.conv((attended + x).movedim(-1, 1))).movedim(1, -1)
        return out
