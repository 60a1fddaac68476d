"""MHLA: linear attention in which every block of queries has its own mixture of the blocks' summaries."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from glocal.linear import Feature
from glocal.nn.frame import Call
from glocal.nn.linear import LinearAttention
from glocal.nn.rope import Rope
from glocal.shapes import Bool, Float

__all__ = ["MultiHeadLinearAttention", "mixing_matrix", "multi_head_linear"]

Positions = tuple[Tensor | None, Tensor | None]


def mixing_matrix(blocks: Sequence[int], kind: str = "linear", *, sigma: float = 3.0) -> Float[Tensor, "m m"]:
    """How much of block ``b``'s summary the queries of block ``i`` get before training, by the distance of the two.

    Args:
        blocks: how many on each axis, m in all, counted row by row.
        kind: ``"linear"`` (one minus the distance over the largest), ``"cos"`` (of an eighth of a turn at the largest),
            ``"exp"``, ``"local"`` (neighbours, diagonal ones too), each divided by the sum of its column; or
            ``"gaussian"``, which is not.
        sigma: the distance at which ``"exp"`` has fallen to 1 / e.

    Returns:
        ``(m, m)``, row i for the queries of block i.

    Raises:
        ValueError: an unknown kind, no blocks on an axis, a ``sigma`` that is not above 0.

    >>> mixing_matrix((3,), "local").tolist()
    [[0.5, 0.3333333432674408, 0.0], [0.5, 0.3333333432674408, 0.5], [0.0, 0.3333333432674408, 0.5]]
    """
    if not blocks or min(blocks) < 1:
        raise ValueError(f"blocks must be at least 1 on each axis; it was {tuple(blocks)}")
    if sigma <= 0:
        raise ValueError(f"sigma must be more than 0; it was {sigma}")
    # On the CPU and from lists, so that a network on the meta device costs nothing and a real one is the same anywhere.
    at = list(product(*[range(n) for n in blocks]))
    far = torch.tensor([[math.dist(a, b) for b in at] for a in at], dtype=torch.float64, device="cpu")
    share = far / far.max().clamp(min=1e-9)
    if kind == "gaussian":
        return (-4.5 * share**2).exp().float()  # a third of the largest distance is one standard deviation
    values = {
        "linear": 1 - share if len(at) > 1 else torch.ones_like(far),
        "cos": (math.pi / 4 * share).cos(),
        "exp": (-far / sigma).exp(),
        "local": (far <= 1.5).double(),
    }
    if kind not in values:
        raise ValueError(f"kind must be one of {', '.join(values)}, gaussian; it was {kind!r}")
    return (values[kind] / values[kind].sum(0)).float()


def multi_head_linear(
    q: Float[Tensor, "B H *grid_q D"],
    k: Float[Tensor, "B Hkv *grid_k D"],
    v: Float[Tensor, "B Hkv *grid_k E"],
    mixing: Float[Tensor, "m m"],
    blocks: Sequence[int],
    *,
    feature: Feature | None = None,
    keys: Bool[Tensor, "B Nk"] | None = None,
    rope: Rope | None = None,
    positions: Positions = (None, None),
    norm: str = "paper",
    least: float = 1e-6,
) -> Float[Tensor, "B H *grid_q E"]:
    """``o_i = sum_j M_ij f(q_i) f(k_j) v_j / sum_j M_ij f(q_i) f(k_j)``, where M is that of the tokens' blocks.

    Tokens are cut into m blocks, as many on each axis as ``blocks`` says; each block of keys has one summary, each
    block of queries mixes these by its row of M. Time grows with N D E + m^2 D E. MHLA, 2026, arXiv 2601.07832.

    Args:
        q: ``(B, H, *grid_q, D)``.
        k: ``(B, Hkv, *grid_k, D)``, H a multiple of Hkv.
        v: ``(B, Hkv, *grid_k, E)``.
        mixing: M, ``(m, m)``; rows are blocks of queries, columns blocks of keys.
        blocks: how many on each axis, both of queries and of keys, m in all. Where they do not divide the grid, blocks
            have the next larger size, and the last ones of an axis are short or empty.
        feature: from ``(..., D)`` to ``(..., F)``, positive; ``relu(x) + 1e-6`` where None.
        keys: which keys are real, booleans ``(B, Nk)``, the grid flattened.
        rope: rotates the features above the line, not those below it.
        positions: of queries and keys, ``(N,)`` or ``(N, axes)``, for ``rope``.
        norm: ``"paper"`` divides by what makes the weights of a query sum to one. ``"released"`` is what the authors'
            code for images does: below the line stand the products of the queries at the same place of the other
            blocks. Weights then do not sum to one.
        least: added to the divisor.

    Returns:
        ``(B, H, *grid_q, E)`` in the type of ``q``.

    Raises:
        ValueError: shapes that do not fit, an unknown ``norm``.

    >>> q, k = torch.rand(2, 1, 2, 8, 8, 4).unbind()
    >>> out = multi_head_linear(q, k, torch.ones(1, 2, 8, 8, 1), mixing_matrix((2, 2)), (2, 2))
    >>> torch.allclose(out, torch.ones(1), atol=1e-4)
    True
    """
    check(q, k, v, mixing, keys)
    if len(blocks) != q.dim() - 3 or min(blocks) < 1 or math.prod(blocks) != len(mixing):
        raise ValueError(
            f"blocks must be a number for each of {q.dim() - 3} axes, {len(mixing)} in all as mixing has rows; it was "
            f"{tuple(blocks)}"
        )
    if norm not in ("paper", "released"):
        raise ValueError(f"norm must be 'paper' or 'released'; it was {norm!r}")
    dtype = torch.promote_types(q.dtype, torch.float32)
    feature = _positive if feature is None else feature
    fq, fk, mixing = feature(q.to(dtype)), feature(k.to(dtype)), mixing.to(dtype)
    if keys is not None:
        fk = fk * keys.view(k.shape[0], 1, *k.shape[2:-1], 1)
    turned_q, turned_k = (turn(t, rope, at) for t, at in zip((fq, fk), positions, strict=True))
    values = _cut(v.to(dtype), blocks)
    # (B, Hkv, m, F, E), then the mixture of each block of queries.
    sums = torch.einsum("ib,nhbfe->nhife", mixing, _cut(turned_k, blocks).mT @ values)
    total = grouped(_cut(turned_q, blocks), k.shape[1]) @ sums[:, :, None]
    heads, counts = grouped(_cut(fq, blocks), k.shape[1]), _cut(fk, blocks).sum(3)  # (B, Hkv, m, F)
    if norm == "paper":
        mixed = torch.einsum("ib,nhbf->nhif", mixing, counts)
        below = heads @ mixed[:, :, None, :, :, None]
    else:
        below = torch.einsum("ib,nhgbtx->nhgitx", mixing, heads @ counts[:, :, None, :, :, None])
    out = (total / (below + least)).flatten(1, 2)
    return _join(out, q.shape[2:-1], blocks).to(q.dtype)


class MultiHeadLinearAttention(LinearAttention):
    """MHLA for images and video (2026, arXiv 2601.07832): linear attention with a learned mixture for each block.

    Args:
        dim, num_heads: as in `Attention`.
        blocks: how many on each axis of the grid. A grid of another size has blocks of another size.
        init, sigma: of the mixing matrix, as in `mixing_matrix`; nothing holds it there in training.
        norm: as in `multi_head_linear`.
        qk_norm: as in `Attention`.
        lepe: side of a depthwise convolution of the values, added to the result; over two axes or three.
        out_norm: an RMSNorm over the channels of each head, before ``lepe``.
        gate: multiplies that by SiLU of one more projection of the input.
        options: as in `Attention`. ``lepe=5, out_bias=True`` is the layer of the image models; ``rope`` on three axes,
            ``out_norm=True, gate=True, lepe=3`` that of the video models.

    In cross-attention queries and keys are cut into equally many blocks; this use is ours.

    Raises:
        ValueError: settings that do not fit each other, a grid with another number of axes.

    >>> layer = MultiHeadLinearAttention(32, 4, blocks=(4, 4), lepe=5)
    >>> layer(torch.randn(2, 16, 12, 32)).shape
    torch.Size([2, 16, 12, 32])
    """

    uses = ("noncausal-self", "noncausal-cross")
    _WHY = "a block's summary holds tokens before and after a query; CausalMultiHeadLinearAttention cuts it there"
    refuses: ClassVar[dict[str, str]] = {"causal-self": _WHY, "causal-cross": _WHY}
    tiny: ClassVar[dict[str, Any]] = {"blocks": (4,)}

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        blocks: Sequence[int] = (4, 4),
        init: str = "linear",
        sigma: float = 3.0,
        norm: str = "paper",
        qk_norm: str | None = "rms_all",
        lepe: int | None = None,
        out_norm: bool = False,
        gate: bool = False,
        **options: Any,
    ) -> None:
        matrix = mixing_matrix(blocks, init, sigma=sigma)
        if norm not in ("paper", "released"):
            raise ValueError(f"norm must be 'paper' or 'released'; it was {norm!r}")
        flat = len(blocks) == 2
        super().__init__(dim, num_heads, feature=_positive, qk_norm=qk_norm, lepe=lepe if flat else None, **options)
        self.blocks, self.norm = tuple(blocks), norm
        self.mixing = nn.Parameter(matrix.to(torch.get_default_device()))
        width = self.num_heads * self.head_dim
        self.near: nn.Conv3d | None = None
        if lepe is not None and not flat:
            if len(blocks) != 3 or lepe < 1 or lepe % 2 == 0 or self.num_kv_heads != num_heads:
                raise ValueError(
                    f"lepe must be odd, over two or three axes, without num_kv_heads; it was {lepe} for blocks {blocks}"
                )
            self.near = nn.Conv3d(width, width, lepe, padding=lepe // 2, groups=width)
        self.out_norm = nn.RMSNorm(self.head_dim, eps=1e-6) if out_norm else None
        self.g_proj = SiLULinear(dim, width, bias=options.get("qkv_bias", False)) if gate else None

    def rotate(self, t: Tensor, at: Tensor | None) -> Tensor:
        """Not before the features are taken."""
        return t

    def mix(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        """`multi_head_linear`, norm, convolution."""
        if len(self.blocks) != q.dim() - 3:
            raise ValueError(f"x must have the {len(self.blocks)} axes of blocks; it was {tuple(call.x.shape)}")
        options: dict[str, Any] = dict(feature=self.feature, keys=call.real, norm=self.norm)
        out = multi_head_linear(q, k, v, self.mixing, self.blocks, rope=self.rope, positions=call.at, **options)
        if self.out_norm is not None:
            out = self.out_norm(out)
        if self.near is not None:
            if call.cross:
                raise ValueError("lepe needs values at the queries: there must be no context")
            out = out + self.near(v.movedim(-1, 2).flatten(1, 2)).unflatten(1, (self.num_heads, -1)).movedim(2, -1)
        return out

    def extra_repr(self) -> str:
        return f"blocks={self.blocks}"


class SiLULinear(nn.Linear):
    """A projection with SiLU."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = nn.functional.silu(super().forward(x))
        return out


def _positive(x: Tensor) -> Tensor:
    return torch.relu(x) + 1e-6


def turn(t: Tensor, rope: Rope | None, at: Tensor | None) -> Tensor:
    """``(B, H, *grid, F)`` rotated to positions of the flattened grid."""
    if rope is None or at is None:
        return t
    out: Tensor = rope(t.flatten(2, -2), at).view(t.shape)
    return out


def grouped(t: Tensor, kv_heads: int) -> Tensor:
    """``(B, H, ...)`` to ``(B, Hkv, H / Hkv, ...)``."""
    groups: Tensor = t.unflatten(1, (kv_heads, -1))
    return groups


def _cut(t: Tensor, blocks: Sequence[int]) -> Tensor:
    """``(B, H, *grid, C)`` to ``(B, H, m, tokens of a block, C)``, zeros where a block is short; both row by row."""
    axes = len(blocks)
    sides = [-(-n // count) for n, count in zip(t.shape[2:-1], blocks, strict=True)]
    short = [s * count - n for s, count, n in zip(sides, blocks, t.shape[2:-1], strict=True)]
    if any(short):
        t = pad(t, (0, 0, *(n for after in reversed(short) for n in (0, after))))
    for axis in reversed(range(axes)):
        t = t.unflatten(2 + axis, (blocks[axis], sides[axis]))
    order = (0, 1, *range(2, 2 + 2 * axes, 2), *range(3, 3 + 2 * axes, 2), 2 + 2 * axes)
    return t.permute(order).flatten(2 + axes, 1 + 2 * axes).flatten(2, 1 + axes)


def _join(t: Tensor, grid: Sequence[int], blocks: Sequence[int]) -> Tensor:
    """What `_cut` has cut, ``(B, H, *grid, C)``."""
    axes = len(blocks)
    sides = [-(-n // count) for n, count in zip(grid, blocks, strict=True)]
    t = t.unflatten(3, sides).unflatten(2, tuple(blocks))
    order = (0, 1, *(n for axis in range(axes) for n in (2 + axis, 2 + axes + axis)), 2 + 2 * axes)
    t = t.permute(order)
    for axis in range(axes):
        t = t.flatten(2 + axis, 3 + axis).narrow(2 + axis, 0, grid[axis])
    return t


def check(q: Tensor, k: Tensor, v: Tensor, mixing: Tensor, keys: Tensor | None) -> None:
    """Refuse, with a ValueError that names it, what does not fit ``q (B, H, *grid, D)``; for the causal form too."""
    for name, t in (("q", q), ("k", k), ("v", v)):
        if t.dim() < 4 or not t.is_floating_point():
            raise ValueError(f"{name} must be floats (B, heads, *grid, channels); it was {t.dtype} {tuple(t.shape)}")
    if k.dim() != q.dim() or q.shape[0] != k.shape[0] or q.shape[-1] != k.shape[-1] or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"k must have q's batch, axes, channels and a divisor of its heads, {tuple(q.shape)}; it was "
            f"{tuple(k.shape)}"
        )
    if v.shape[:-1] != k.shape[:-1]:
        raise ValueError(f"v must be {(*k.shape[:-1], 'E')}; it was {tuple(v.shape)}")
    if mixing.dim() != 2 or mixing.shape[0] != mixing.shape[1]:
        raise ValueError(f"mixing must be square (m, m); it was {tuple(mixing.shape)}")
    real = (k.shape[0], k.shape[2:-1].numel())
    if keys is not None and (keys.dtype != torch.bool or keys.shape != real):
        raise ValueError(f"keys must be booleans {real}; it was {keys.dtype} {tuple(keys.shape)}")
