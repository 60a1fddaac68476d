"""Heads of any rank: queries and keys of few channels, while each head maps whole inputs to whole outputs."""

from __future__ import annotations

from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn

from glocal.attention import attend
from glocal.nn.frame import Attention, Call
from glocal.patterns import Full, Keys, Pattern
from glocal.shapes import Float

__all__ = ["LowRankAttention", "hard_attend", "low_rank_attention"]

_AT_ONCE = 1 << 22
"""Scores that are held at a time."""


def low_rank_attention(
    points: Float[Tensor, "B M d"],
    queries: Float[Tensor, "B N d"],
    q_weight: Float[Tensor, "H r d"],
    k_weight: Float[Tensor, "H r d"],
    vo_weight: Float[Tensor, "H d e"],
    *,
    where: Pattern | None = None,
    hard: bool = False,
    scale: float | None = None,
    **options: Any,
) -> Float[Tensor, "B N e"]:
    """``sum_h VO_h^T X softmax(X^T K_h^T Q_h y / sqrt(r))`` for each query y: heads of rank r over points X.

    With ``H r = d`` and VO of rank r it is standard multi-head attention; one head of rank d costs as much in scores as
    ``d / r`` of rank r. Amsel et al., 2024, arXiv 2407.16153.

    Args:
        points: ``(B, M, d)``; the official code has channels before points.
        queries: ``(B, N, d)``.
        q_weight, k_weight: ``(H, r, d)``.
        vo_weight: ``(H, d, e)``, values and output projection in one.
        where: what a query sees; every point where None.
        hard: a query takes the point with the highest score, the first of equal ones, instead of a softmax.
        scale: of the scores; ``r ** -0.5`` where None.
        options: ``backend``, ``dropout_p``, ``softcap`` of `glocal.attend`, where not hard.

    Returns:
        ``(B, N, e)``.

    Raises:
        ValueError: shapes that do not fit.

    >>> unit = torch.eye(3)[None]
    >>> points, query = torch.eye(3)[None], torch.tensor([[[0.1, 0.9, 0.2]]])
    >>> low_rank_attention(points, query, unit, unit, unit, hard=True)
    tensor([[[0., 1., 0.]]])
    """
    if q_weight.dim() != 3 or k_weight.shape != q_weight.shape:
        raise ValueError(
            f"q_weight and k_weight must both be (H, r, d); they were {tuple(q_weight.shape)}, {tuple(k_weight.shape)}"
        )
    heads, rank, dim = q_weight.shape
    if vo_weight.dim() != 3 or vo_weight.shape[:2] != (heads, dim):
        raise ValueError(f"vo_weight must be ({heads}, {dim}, e); it was {tuple(vo_weight.shape)}")
    for name, t in (("points", points), ("queries", queries)):
        if t.dim() != 3 or t.shape[-1] != dim or len(t) != len(points):
            raise ValueError(f"{name} must be ({len(points)}, n, {dim}); it was {tuple(t.shape)}")
    q, k = (torch.einsum("bnd,hrd->bhnr", t, w) for t, w in ((queries, q_weight), (points, k_weight)))
    v = points[:, None].expand(-1, heads, -1, -1)
    where, scale = Full() if where is None else where, rank**-0.5 if scale is None else scale
    mixed = hard_attend(q, k, v, where, scale=scale) if hard else attend(q, k, v, where, scale=scale, **options)
    return torch.einsum("bhnd,hde->bne", mixed, vo_weight)


@torch.no_grad()
def _best(q: Tensor, k: Tensor, where: Pattern, scale: float) -> tuple[Tensor, Tensor]:
    """Which key scores highest and whether there is any, both ``(B, H, N)``, grids flattened."""
    grids = where.check(tuple(q.shape[2:-1]), tuple(k.shape[2:-1]))
    group, keys = q.shape[1] // k.shape[1], k.flatten(2, -2).mT
    found, any_live, start = [], [], 0
    for some in q.flatten(2, -2).split(max(1, _AT_ONCE // max(1, len(q) * q.shape[1] * keys.shape[-1])), 2):
        at = torch.arange(start, start + some.shape[2], device=q.device)
        live = where.rows(at, *grids).to(q.device)
        scores = (some.unflatten(1, (-1, group)) @ keys[:, :, None]).flatten(1, 2) * scale
        found.append(scores.masked_fill(~live, -torch.inf).argmax(-1))
        any_live.append(live.any(-1).expand(scores.shape[:-1]))
        start += some.shape[2]
    return torch.cat(found, 2), torch.cat(any_live, 2)


def hard_attend(
    q: Float[Tensor, "B H *grid_q D"],
    k: Float[Tensor, "B Hkv *grid_k D"],
    v: Float[Tensor, "B Hkv *grid_k E"],
    where: Pattern | None = None,
    *,
    scale: float = 1.0,
) -> Float[Tensor, "B H *grid_q E"]:
    """The value whose key scores highest, for each query: attention at temperature zero.

    Scores are held for some queries at a time. Values get gradients, queries and keys none.

    Args:
        q: ``(B, H, *grid_q, D)``.
        k: ``(B, Hkv, *grid_k, D)``, H a multiple of Hkv.
        v: ``(B, Hkv, *grid_k, E)``.
        where: what a query sees; every key where None. A query that sees no key gives zeros.
        scale: of the scores: only its sign counts.

    Returns:
        ``(B, H, *grid_q, E)``. Of equal scores the first key counts.

    Raises:
        ValueError: shapes that do not fit.

    >>> q, k = torch.tensor([[[[1.0]]]]), torch.tensor([[[[0.0], [2.0], [1.0]]]])
    >>> hard_attend(q, k, torch.arange(3.0).view(1, 1, 3, 1)).item()
    1.0
    """
    if q.dim() != k.dim() or q.dim() < 4 or len(q) != len(k) or q.shape[-1] != k.shape[-1] or q.shape[1] % k.shape[1]:
        raise ValueError(
            "q and k must be (B, heads, *grid, D), heads of q a multiple of those of k; they were "
            f"{tuple(q.shape)} and {tuple(k.shape)}"
        )
    if v.shape[:-1] != k.shape[:-1]:
        raise ValueError(f"v must be {(*k.shape[:-1], 'E')} like k; it was {tuple(v.shape)}")
    best, live = _best(q, k, Full() if where is None else where, scale)
    values = v.flatten(2, -2).repeat_interleave(q.shape[1] // k.shape[1], 1)
    out = values.gather(2, best[..., None].expand(-1, -1, -1, v.shape[-1])) * live[..., None]
    return out.view(*q.shape[:-1], v.shape[-1])


class LowRankAttention(Attention):
    """Multi-head attention whose heads have any rank, and values and output projection in one matrix a head.

    With rank ``dim`` one head can give the point that is nearest to a query, at any number of points; of lower rank it
    takes a number of heads that grows exponentially with ``dim``. Amsel et al., 2024, arXiv 2407.16153.

    Args:
        dim: channels, d.
        num_heads: H.
        rank: channels of a query and a key, r; ``dim // num_heads`` where None.
        hard: each head takes the one key that scores highest; queries and keys then get no gradient.
        options: of `Attention`, other than ``head_dim``, ``lepe`` and ``gate``.

    Raises:
        ValueError: numbers that do not divide; ``hard`` with a bias on the scores.

    >>> layer = LowRankAttention(8, 4, rank=1)
    >>> [tuple(matrix.shape) for matrix in layer.matrices()]
    [(4, 1, 8), (4, 1, 8), (4, 8, 8)]
    """

    def __init__(
        self, dim: int, num_heads: int, *, rank: int | None = None, hard: bool = False, **options: Any
    ) -> None:
        for name in ("head_dim", "lepe", "gate"):
            if options.get(name):
                raise ValueError(f"{name} is not for LowRankAttention, whose values have all channels; see rank")
        super().__init__(dim, num_heads, head_dim=rank, **options)
        self.hard = hard
        del self.v_proj
        self.o_proj = nn.Linear(num_heads * self.kv_dim, dim, bias=self.o_proj.bias is not None)
        # Each head's matrices are drawn as if they stood alone; the output's range falls with the number of heads.
        for linear in (self.q_proj, self.k_proj):
            nn.init.uniform_(linear.weight, *self._range(self.head_dim + linear.in_features))
        nn.init.uniform_(self.o_proj.weight, *self._range(self.o_proj.in_features + dim))

    @staticmethod
    def _range(fans: int) -> tuple[float, float]:
        return -sqrt(6 / fans), sqrt(6 / fans)

    def matrices(self) -> tuple[Tensor, Tensor, Tensor]:
        """Q ``(H, r, dim)``, K ``(Hkv, r, kv_dim)`` and VO ``(H, kv_dim, dim)`` as `low_rank_attention` takes them."""
        q = self.q_proj.weight.unflatten(0, (self.num_heads, -1))
        k = self.k_proj.weight.unflatten(0, (self.num_kv_heads, -1))
        return q, k, self.o_proj.weight.mT.unflatten(0, (self.num_heads, -1))

    def make(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Values are the context itself, one and the same for every head."""
        q, k = self.heads(self.q_proj(x), self.num_heads), self.heads(self.k_proj(context), self.num_kv_heads)
        return q, k, context[:, None].expand(-1, self.num_kv_heads, *context.shape[1:])

    def mix(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        """Whole inputs of each head, ``(B, H, *grid_q, kv_dim)``."""
        if not self.hard:
            return super().mix(q, k, v, call)
        if self.score(call) is not None:
            raise ValueError("hard=True takes no bias on the scores")
        where = self.where(q, k, call)
        return hard_attend(q, k, v, where if call.real is None else where & Keys(call.real), scale=self.scale)
