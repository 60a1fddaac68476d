"""MALA: linear attention that sharpens when the query grows, as softmax does."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from glocal.kernels.linear import causal_product
from glocal.linear import FEATURES
from glocal.nn.frame import Call
from glocal.nn.linear import LinearAttention
from glocal.nn.rope import Rope
from glocal.shapes import Bool, Float

__all__ = ["MagnitudeAwareAttention", "MagnitudeState", "magnitude_aware"]


class MagnitudeState(NamedTuple):
    """What causal magnitude-aware attention keeps of the past."""

    kv: Tensor
    """Sum of key features times values, ``(B, H, D, E)``."""
    k: Tensor
    """Sum of key features, ``(B, H, D)``."""
    v: Tensor
    """Sum of values, ``(B, H, E)``."""
    seen: Tensor
    """Keys, ``(B, 1)``."""


def magnitude_aware(
    q: Float[Tensor, "B H N D"],
    k: Float[Tensor, "B Hkv M D"],
    v: Float[Tensor, "B Hkv M E"],
    *,
    scale: float | None = None,
    causal: bool = False,
    keys: Bool[Tensor, "B M"] | None = None,
    rope: Rope | None = None,
    positions: tuple[Tensor | None, Tensor | None] = (None, None),
    state: MagnitudeState | None = None,
    chunk: int = 64,
) -> tuple[Float[Tensor, "B H N E"], MagnitudeState]:
    """``o_i = sum_j (b_i S_ij - g_i) v_j`` with ``S_ij = scale f(q_i) f(k_j) / M`` and ``z_i = sum_j S_ij``.

    ``b_i = 1 + 1 / z_i`` and ``g_i = z_i / M``, so that weights sum to one; some are negative. They are those of linear
    attention plus the scores about their mean, which grow with the query. Features are ``elu(x) + 1``. Fan et al.,
    2025, arXiv 2507.00698.

    Args:
        q: ``(B, H, N, D)``.
        k: ``(B, Hkv, M, D)``, H a multiple of Hkv.
        v: ``(B, Hkv, M, E)``.
        scale: ``D ** -0.5`` where None.
        causal: queries are the last positions of the keys, and see those at and before them: M counts these.
        keys: which keys are real, booleans ``(B, M)``; others do not count.
        rope: rotates features for the scores but not for their sums, which it would make small: weights then sum to
            one only nearly.
        positions: of queries and keys, ``(N,)`` and ``(M,)`` or with axes behind, for ``rope``.
        state: of earlier keys.
        chunk: as in `glocal.linear_attend`.

    Returns:
        ``(B, H, N, E)`` in the type of ``q``, and the state after these keys.

    >>> q, k = torch.randn(2, 1, 1, 9, 4).unbind()
    >>> torch.allclose(magnitude_aware(q, k, torch.ones(1, 1, 9, 2))[0], torch.ones(1, 1, 9, 2), atol=1e-5)
    True
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[1] // k.shape[1]
    fq, fk = (FEATURES["elu"](t.to(dtype)) for t in (q, k))
    wide = v.to(dtype)
    real = torch.ones(k.shape[0], k.shape[2], device=k.device, dtype=dtype) if keys is None else keys.to(dtype)
    if keys is not None:
        fk, wide = fk * real[:, None, :, None], wide * real[:, None, :, None]
    fk, wide = (t.repeat_interleave(group, 1) if group > 1 else t for t in (fk, wide))
    turned_q, turned_k = (
        t if rope is None or at is None else rope(t, at) for t, at in zip((fq, fk), positions, strict=True)
    )
    if state is None:
        sizes = (fk.shape[-1], wide.shape[-1]), (fk.shape[-1],), (wide.shape[-1],)
        kv, sum_k, sum_v = (fk.new_zeros(*fk.shape[:2], *size) for size in sizes)
        state = MagnitudeState(kv, sum_k, sum_v, real.new_zeros(len(real), 1))
    fq, turned_q = (t * (q.shape[-1] ** -0.5 if scale is None else scale) for t in (fq, turned_q))
    if causal:
        ahead = k.shape[2] - q.shape[2]
        fq, turned_q = (pad(t, (0, 0, ahead, 0)) for t in (fq, turned_q))
        count = (state.seen + real.cumsum(1))[:, None, :, None]
        total, kv = causal_product(turned_q, turned_k, wide, state.kv, chunk=chunk)
        ones = torch.ones_like(wide[..., :1])
        z, sum_k = causal_product(fq, fk, ones, state.k[..., None], chunk=chunk)
        so_far = state.v[:, :, None] + wide.cumsum(2)
        after = MagnitudeState(kv, sum_k[..., 0], so_far[:, :, -1], count[:, 0, -1])
    else:
        after = MagnitudeState(
            state.kv + turned_k.mT @ wide,
            state.k + fk.sum(2),
            state.v + wide.sum(2),
            state.seen + real.sum(1, keepdim=True),
        )
        total, z = turned_q @ after.kv, fq @ after.k[..., None]
        so_far, count = after.v[:, :, None], after.seen[:, None, :, None]
    count = count.clamp(min=1)
    z = z / count
    out = total / count * (1 + 1 / z.clamp(min=1e-6)) - z * so_far / count
    return out[:, :, -q.shape[2] :].to(q.dtype), after


class MagnitudeAwareAttention(LinearAttention):
    """MALA (Fan et al., 2025, arXiv 2507.00698): linear attention whose weights depend on how large the query is.

    Args:
        dim, num_heads: as in `Attention`.
        options: as in `Attention`. ``lepe=5, gate=True, qkv_bias=True, out_bias=True`` is the layer of MAViT.
            ``rope`` turns the features; the sums of the scores are those of features that are not turned.

    >>> import torch
    >>> layer = MagnitudeAwareAttention(32, 4, lepe=5, gate=True)
    >>> layer(torch.randn(2, 7, 9, 32)).shape
    torch.Size([2, 7, 9, 32])
    """

    def rotate(self, t: Tensor, at: Tensor | None) -> Tensor:
        """Not before the features are taken."""
        return t

    def products(self, q: Tensor, k: Tensor, v: Tensor, call: Call, state: Any) -> tuple[Tensor, Any]:
        """`magnitude_aware`."""
        options: dict[str, Any] = dict(scale=self.scale, causal=self.causal, keys=call.real, state=state)
        return magnitude_aware(q, k, v, rope=self.rope, positions=call.at, **options)
