"""Polyline path masks: learned decays summed along the L-shaped path between two places of a map, on the scores."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, softplus

from glocal.kernels.linear import causal_product
from glocal.linear import FEATURES, Feature, linear_attend
from glocal.nn.frame import Attention, Call
from glocal.nn.linear import LinearAttention
from glocal.patterns import Full
from glocal.shapes import Bool, Float

__all__ = [
    "PathDecay",
    "PolylineAttention",
    "PolylineLinearAttention",
    "path_mask",
    "polyline_linear_attend",
    "polyline_mask",
    "polyline_product",
]

First = Literal["horizontal", "vertical"]

_NO_CROSS = "the mask follows a path between two places of one map"


def path_mask(decay: Float[Tensor, "*lead N"], *, causal: bool = False) -> Float[Tensor, "*lead N N"]:
    """Log mask of a line: the sum of ``decay`` over what lies after the one position up to the other.

    Args:
        decay: logarithms, at most 0 and finite, ``(..., N)``.
        causal: minus infinity for keys after the query; what is left is the mask of Mamba-2 (Dao & Gu, 2024, arXiv
            2405.21060).

    Returns:
        ``(..., N, N)``, queries first.

    >>> path_mask(torch.tensor([-1.0, -2.0, -4.0])).int().tolist()
    [[0, -2, -6], [-2, 0, -4], [-6, -4, 0]]
    """
    total = decay.cumsum(-1)
    mask = -(total[..., :, None] - total[..., None, :]).abs()
    if not causal:
        return mask
    later = torch.ones(mask.shape[-2:], dtype=torch.bool, device=mask.device).triu(1)
    return mask.masked_fill(later, -torch.inf)


def polyline_mask(
    horizontal: Float[Tensor, "*lead Y X"],
    vertical: Float[Tensor, "*lead Y X"],
    *,
    first: First = "horizontal",
    causal: bool = False,
) -> Float[Tensor, "*lead N N"]:
    """Log mask of a map: decays along the path from a query to a key that turns once.

    Zhao et al., 2025, arXiv 2506.15940. To be added to scores before a softmax.

    Args:
        horizontal, vertical: logarithms, at most 0 and finite, by which a step along its row, or its column, to or from
            the place before fades, ``(..., Y, X)``.
        first: ``"horizontal"`` goes along the query's row, then along the key's column; ``"vertical"`` along the
            query's column, then along the key's row, which is the transpose.
        causal: minus infinity for keys that are below the query or to the right of it.

    Returns:
        ``(..., N, N)`` with N = Y X, the map flattened row by row, queries first.

    Raises:
        ValueError: decays of different shapes or without two axes, an unknown ``first``.

    >>> row, column = torch.tensor([[0.0, -1.0], [0.0, -2.0]]), torch.tensor([[0.0, 0.0], [-3.0, -5.0]])
    >>> polyline_mask(row, column)[0].int().tolist()  # to the last place: right, -1, then down, -5
    [0, -1, -3, -6]
    """
    _check(horizontal, vertical, first)
    rows, columns = path_mask(horizontal, causal=causal), path_mask(vertical.mT, causal=causal)  # (y x x), (x y y)
    if first == "horizontal":
        mask = rows.unsqueeze(-2) + columns.movedim(-3, -1).unsqueeze(-3)
    else:
        mask = columns.movedim(-3, -2).unsqueeze(-1) + rows.movedim(-3, -2).unsqueeze(-4)
    return mask.flatten(-4, -3).flatten(-2, -1)


def polyline_product(
    x: Float[Tensor, "*lead Y X E"],
    horizontal: Float[Tensor, "*lead Y X"],
    vertical: Float[Tensor, "*lead Y X"],
    *,
    first: First = "horizontal",
    causal: bool = False,
    scan: bool = True,
    chunk: int = 16,
) -> Float[Tensor, "*lead Y X E"]:
    """``exp(polyline_mask(...)) @ x`` without the mask: it is the product of one matrix a column and one a row.

    Args:
        x: ``(..., Y, X, E)``.
        horizontal, vertical, first, causal: as in `polyline_mask`.
        scan: by recurrences along the lines, in O(N E); else by their matrices, in O(N (Y + X) E).
        chunk: positions of a recurrence that are compared pair by pair; changes the speed only.

    Returns:
        ``(..., Y, X, E)``, in float32 or wider.

    Raises:
        ValueError: as `polyline_mask`; ``x`` that is not on the decays' map.

    >>> x, row, column = torch.randn(4, 5, 3), -torch.rand(4, 5), -torch.rand(4, 5)
    >>> whole = polyline_mask(row, column).exp() @ x.flatten(0, 1)
    >>> torch.allclose(polyline_product(x, row, column).flatten(0, 1), whole, atol=1e-5)
    True
    """
    _check(horizontal, vertical, first)
    if x.shape[:-1] != horizontal.shape:
        raise ValueError(f"x must be {(*horizontal.shape, 'E')}; it was {tuple(x.shape)}")
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1; it was {chunk}")
    x, horizontal, vertical = (t.to(_wide(x)) for t in (x, horizontal, vertical))

    def along(x: Tensor, decay: Tensor) -> Tensor:
        if not scan:
            return path_mask(decay, causal=causal).exp() @ x
        one = x.new_ones(*x.shape[:-1], 1)
        return _scan(one, one, x, decay, causal, chunk)

    # The line that is nearest to the query comes last.
    if first == "vertical":
        x = along(x, horizontal)
    x = along(x.transpose(-3, -2), vertical.mT).transpose(-3, -2)
    return along(x, horizontal) if first == "horizontal" else x


def polyline_linear_attend(
    q: Float[Tensor, "B H *grid D"],
    k: Float[Tensor, "B H *grid D"],
    v: Float[Tensor, "B H *grid E"],
    horizontal: Float[Tensor, "B H *grid"],
    vertical: Float[Tensor, "B H *grid"] | None = None,
    *,
    feature: str | Feature = "elu",
    causal: bool = False,
    keys: Bool[Tensor, "B *grid"] | None = None,
    chunk: int = 64,
) -> Float[Tensor, "B H *grid E"]:
    """Linear attention whose scores ``f(q_i) f(k_j)`` are multiplied by a polyline path mask, in O(N D E).

    On a map the mean of the two ways to go. Zhao et al., 2025, arXiv 2506.15940. Sums are taken in float32 or wider.

    Args:
        q, k: ``(B, H, *grid, D)`` on a sequence or a map.
        v: ``(B, H, *grid, E)``.
        horizontal: as in `polyline_mask`, ``(B, H, *grid)``; that of a sequence.
        vertical: of a map, ``(B, H, *grid)``.
        feature: as in `glocal.linear_attend`, not negative: a query's scores should not cancel.
        causal: on a sequence, keys up to the query, by the recurrence ``S_t = exp(decay_t) S_(t-1) + f(k_t) v_t``; on a
            map, keys that are neither below the query nor to the right of it.
        keys: which keys are real, booleans ``(B, *grid)``; others do not count, and a path does not fade at them.
        chunk: of a sequence, as in `glocal.linear_attend`.

    Returns:
        ``(B, H, *grid, E)`` in the type of ``q``. A query of which all scores are 0 gets zeros.

    Raises:
        ValueError: shapes that do not fit, an unknown feature.

    >>> q, k, v = torch.randn(3, 1, 2, 6, 7, 8).unbind()
    >>> row, column = -torch.rand(2, 1, 2, 6, 7)
    >>> polyline_linear_attend(q, k, v, row, column).shape
    torch.Size([1, 2, 6, 7, 8])
    """
    line = vertical is None
    if q.dim() != (4 if line else 5) or k.shape != q.shape or v.shape[:-1] != q.shape[:-1]:
        raise ValueError(
            f"q, k and v must be (B, H, {'N' if line else 'Y, X'}, channels) of one grid; they were {tuple(q.shape)}, "
            f"{tuple(k.shape)} and {tuple(v.shape)}"
        )
    for name, t in (("horizontal", horizontal), ("vertical", vertical)):
        if t is not None and t.shape != q.shape[:-1]:
            raise ValueError(f"{name} must be {tuple(q.shape[:-1])}; it was {tuple(t.shape)}")
    if keys is not None:
        if keys.dtype != torch.bool or keys.shape != (q.shape[0], *q.shape[2:-1]):
            wanted = (q.shape[0], *q.shape[2:-1])
            raise ValueError(f"keys must be booleans {wanted}; it was {keys.dtype} {tuple(keys.shape)}")
        horizontal = horizontal.masked_fill(~keys[:, None], 0)
        vertical = None if vertical is None else vertical.masked_fill(~keys[:, None], 0)
    if vertical is None and causal:
        return linear_attend(q, k, v, feature=feature, causal=True, keys=keys, decay=horizontal, chunk=chunk)
    if isinstance(feature, str) and feature not in FEATURES:
        raise ValueError(f"feature must be a function or one of {', '.join(FEATURES)}; it was {feature!r}")
    apply = FEATURES[feature] if isinstance(feature, str) else feature
    wide = _wide(q)
    fq, fk = (apply(t.to(wide)) for t in (q, k))
    if keys is not None:
        fk = fk * keys[:, None, ..., None]
    values = torch.cat([v.to(wide), fk.new_ones(*v.shape[:-1], 1)], -1)  # the sum of scores is that of ones
    if vertical is None:
        return _quotient(_scan(fq, fk, values, horizontal.to(wide), causal, chunk)).to(q.dtype)
    states = (fk[..., :, None] * values[..., None, :]).flatten(-2)
    out = torch.zeros_like(values[..., :-1])
    for first in ("horizontal", "vertical"):
        seen = polyline_product(states, horizontal, vertical, first=first, causal=causal)
        out = out + 0.5 * _quotient((fq[..., None, :] @ seen.unflatten(-1, (fq.shape[-1], -1))).squeeze(-2))
    return out.to(q.dtype)


class PathDecay(nn.Module):
    """What each step along a row and along a column fades by, from the token: one linear layer for all heads.

    ``-softplus(linear(x_h) + bias_h) exp(log_rate_h)`` of a head's slice of the channels.

    Args:
        dim, num_heads: channels and heads.

    Raises:
        ValueError: a dimension that is no multiple of the heads.

    >>> horizontal, vertical = PathDecay(32, 4)(torch.randn(2, 5, 7, 32))
    >>> horizontal.shape, bool((vertical <= 0).all())
    (torch.Size([2, 4, 5, 7]), True)
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"dim must be a multiple of num_heads {num_heads}; it was {dim}")
        self.num_heads = num_heads
        self.proj = nn.Linear(dim // num_heads, 2, bias=False)
        low, high = math.log(0.001), math.log(0.1)
        start = (low + (high - low) * torch.rand(num_heads)).exp().clamp(min=1e-4)
        self.bias = nn.Parameter(start + (-(-start).expm1()).log())  # whose softplus is start
        self.log_rate = nn.Parameter((1 + 0.1 * torch.rand(num_heads)).log())

    def forward(self, x: Float[Tensor, "B *grid dim"]) -> tuple[Tensor, Tensor]:
        """``(B, *grid, dim)`` to the logarithms of rows and of columns, ``(B, H, *grid)``, in float32 or wider."""
        step = self.proj(x.unflatten(-1, (self.num_heads, -1))).to(_wide(x))
        fade = -softplus(step + self.bias.to(step)[:, None]) * self.log_rate.to(step).exp()[:, None]
        horizontal, vertical = fade.movedim(-2, 1).unbind(-1)
        return horizontal, vertical


class PolylineAttention(Attention):
    """Softmax attention over a map, with polyline path masks on the scores.

    Zhao et al., 2025, arXiv 2506.15940. Over the whole map: the mean of the attention by both ways to go, in O(N N).
    Criss-cross: attention along rows and then along columns, and the other order, each with the mask of its line; their
    mean, in O(N (Y + X)). Key heads are repeated for their query heads.

    Args:
        dim, num_heads: as in `Attention`; every head has its decays.
        criss_cross: by lines instead of over the whole map.
        options: as in `Attention`. ``lepe=5, qkv_bias=True, out_bias=True, rope=Rope(interleaved=True, endpoint=True)``
            is the layer of PPMA, whose rotary positions count row by row.

    Raises:
        ValueError: what is not a map, padding, a cross or causal use, and what `Attention` refuses.

    >>> layer = PolylineAttention(32, 4, criss_cross=True, lepe=5)
    >>> layer(torch.randn(2, 7, 9, 32)).shape
    torch.Size([2, 7, 9, 32])
    """

    uses = ("noncausal-self",)
    refuses: ClassVar[dict[str, str]] = {
        "causal-self": "a map has no order in time; PolylineLinearAttention has a causal form for sequences",
        "noncausal-cross": _NO_CROSS,
        "causal-cross": _NO_CROSS,
    }
    tiny: ClassVar[dict[str, Any]] = {"grid": (3, 4)}

    def __init__(self, dim: int, num_heads: int, *, criss_cross: bool = False, **options: Any) -> None:
        super().__init__(dim, num_heads, **options)
        self.criss_cross, self.decay = criss_cross, PathDecay(dim, num_heads)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        """Over a map: ``(B, H, Y, X, D)``."""
        if call.x.dim() != 4:
            raise ValueError(f"x must be a map (B, Y, X, {self.dim}); it was {tuple(call.x.shape)}")
        if call.real is not None:
            raise ValueError("keys (padding) do not go with paths over a map, some of which would cross it")
        horizontal, vertical = self.decay(call.x)
        if not self.criss_cross:
            mask = polyline_mask(horizontal, vertical)
            one, other = (self.attend(q, k, v, Full(), call, bias=bias) for bias in (mask, mask.mT))
            both: Tensor = 0.5 * (one + other)
            return both
        group = self.num_heads // self.num_kv_heads
        k, v = (t.repeat_interleave(group, 1) if group > 1 else t for t in (k, v))
        rows, columns = path_mask(horizontal), path_mask(vertical.mT)

        def along(axis: int, values: Tensor) -> Tensor:
            """Each row, or column, as one of the batch."""
            q_, k_, v_ = (t.movedim(axis, 1).flatten(0, 1) for t in (q, k, values))
            bias = (rows if axis == 2 else columns).movedim(2, 1).flatten(0, 1)
            mixed: Tensor = self.attend(q_, k_, v_, Full(), call, bias=bias)
            lines: Tensor = mixed.unflatten(0, (len(q), -1))
            return lines.movedim(1, axis)

        return 0.5 * (along(3, along(2, v)) + along(2, along(3, v)))

    def extra_repr(self) -> str:
        return f"criss_cross={self.criss_cross}"


class PolylineLinearAttention(LinearAttention):
    """Linear attention with polyline path masks, over a sequence or a map; see `polyline_linear_attend`.

    Zhao et al., 2025, arXiv 2506.15940. On a sequence only the decays of rows count. Causal, it decodes from a state.

    Args:
        dim, num_heads, feature, options: as in `LinearAttention`. Key heads are repeated for their query heads.

    Raises:
        ValueError: more than two axes, a cross use, and what `LinearAttention` refuses.

    >>> layer = PolylineLinearAttention(32, 4)
    >>> layer(torch.randn(2, 7, 9, 32)).shape
    torch.Size([2, 7, 9, 32])
    """

    uses = ("noncausal-self", "causal-self")
    refuses: ClassVar[dict[str, str]] = {"noncausal-cross": _NO_CROSS, "causal-cross": _NO_CROSS}

    def __init__(self, dim: int, num_heads: int, **options: Any) -> None:
        super().__init__(dim, num_heads, **options)
        self.decay = PathDecay(dim, num_heads)

    def products(self, q: Tensor, k: Tensor, v: Tensor, call: Call, state: Any) -> tuple[Tensor, Any]:
        """`polyline_linear_attend`, and with a state `glocal.linear_attend`."""
        grid = call.x.shape[1:-1]
        if len(grid) > 2:
            raise ValueError(f"x must be a sequence or a map, (B, *grid, {self.dim}); it was {tuple(call.x.shape)}")
        group = self.num_heads // self.num_kv_heads
        k, v = (t.repeat_interleave(group, 1) if group > 1 else t for t in (k, v))
        horizontal, vertical = self.decay(call.x)
        if self.causal and len(grid) == 1:
            if call.real is not None:
                horizontal = horizontal.masked_fill(~call.real[:, None], 0)
            options: dict[str, Any] = dict(causal=True, keys=call.real, decay=horizontal, state=state)
            return linear_attend(q, k, v, feature=self.feature, return_state=True, **options)
        q, k, v = (t.unflatten(2, grid) for t in (q, k, v))
        keys = None if call.real is None else call.real.unflatten(1, grid)
        down = vertical if len(grid) == 2 else None
        out = polyline_linear_attend(q, k, v, horizontal, down, feature=self.feature, causal=self.causal, keys=keys)
        return out.flatten(2, -2), None


def _scan(fq: Tensor, fk: Tensor, v: Tensor, decay: Tensor, causal: bool, chunk: int) -> Tensor:
    """Along ``(..., N, channels)`` from the start, and without ``causal`` from the end too, what is there once."""
    state = v.new_zeros(*v.shape[:-2], fk.shape[-1], v.shape[-1])
    out, _ = causal_product(fq, fk, v, state, decay, chunk)
    if causal:
        return out
    later = pad(decay[..., 1:], (0, 1)).flip(-1)  # backwards, the decay of the next position stands before one
    back, _ = causal_product(fq.flip(-2), fk.flip(-2), v.flip(-2), state, later, chunk)
    return out + back.flip(-2) - (fq * fk).sum(-1, keepdim=True) * v


def _quotient(sums: Tensor) -> Tensor:
    total = sums[..., -1:]
    return sums[..., :-1] / torch.where(total.abs() < 1e-6, torch.where(total < 0, -1e-6, 1e-6), total)


def _wide(t: Tensor) -> torch.dtype:
    return torch.promote_types(t.dtype, torch.float32)


def _check(horizontal: Tensor, vertical: Tensor, first: str) -> None:
    if horizontal.dim() < 2 or horizontal.shape != vertical.shape:
        raise ValueError(
            f"horizontal and vertical must be decays (..., Y, X) of one shape; they were {tuple(horizontal.shape)} and "
            f"{tuple(vertical.shape)}"
        )
    if first not in ("horizontal", "vertical"):
        raise ValueError(f"first must be 'horizontal' or 'vertical'; it was {first!r}")
