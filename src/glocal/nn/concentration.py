"""L2ViT's parts: linear attention over the whole image with a bounded divisor, and what concentrates it locally."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from glocal.linear import LinearState, linear_attend
from glocal.nn.frame import Call
from glocal.nn.linear import LinearAttention
from glocal.shapes import Bool, Float

__all__ = ["LinearGlobalAttention", "clamped_linear_attend"]


def clamped_linear_attend(
    q: Float[Tensor, "B H N D"],
    k: Float[Tensor, "B Hkv M D"],
    v: Float[Tensor, "B Hkv M E"],
    *,
    denom_min: float = 100.0,
    causal: bool = False,
    keys: Bool[Tensor, "B M"] | None = None,
    state: LinearState | None = None,
    chunk: int = 64,
) -> tuple[Float[Tensor, "B H N E"], LinearState]:
    """``o_i = f(q_i) sum_j f(k_j) v_j / max(f(q_i) sum_j f(k_j), denom_min)`` with ``f(x) = max(x, 0)``.

    Zheng, 2025, arXiv 2501.16182. Where the sum of scores stays below ``denom_min``, weights do not sum to one and
    outputs shrink. The released 100 is for thousands of tokens: 64 of them, of 32 channels with a standard deviation of
    0.5, mostly stay below it. Choose less for few.

    Args:
        q: queries ``(B, H, N, D)``.
        k: keys ``(B, Hkv, M, D)``, H a multiple of Hkv.
        v: values ``(B, Hkv, M, E)``.
        denom_min: the least divisor.
        causal: queries are the last positions of the keys, and see those at and before them.
        keys: which keys are real, booleans ``(B, M)``.
        state: of earlier keys.
        chunk: as in `glocal.linear_attend`.

    Returns:
        ``(B, H, N, E)`` in the type of ``q``, and the state after these keys.

    Raises:
        ValueError: shapes that do not fit, a ``denom_min`` that is not above 0.

    >>> q, k, v = torch.rand(3, 1, 2, 10, 8).unbind()
    >>> out, _ = clamped_linear_attend(q, k, v, denom_min=1000.0)
    >>> torch.allclose(out, q @ k.mT @ v / 1000)
    True
    """
    if not denom_min > 0:
        raise ValueError(f"denom_min must be more than 0; it was {denom_min}")
    dtype = torch.promote_types(q.dtype, torch.float32)
    wide = torch.cat([v.to(dtype), v.new_ones(*v.shape[:-1], 1, dtype=dtype)], -1)  # the sum of scores is that of ones
    if state is not None:
        state = LinearState(torch.cat([state.kv, state.k[..., None]], -1), state.k)
    options: dict[str, Any] = dict(feature="relu", normalise=False, causal=causal, keys=keys, state=state, chunk=chunk)
    out, after = linear_attend(q.to(dtype), k, wide, return_state=True, **options)
    out = out[..., :-1] / out[..., -1:].clamp(min=denom_min)
    return out.to(q.dtype), LinearState(after.kv[..., :-1], after.kv[..., -1])


class LinearGlobalAttention(LinearAttention):
    """L2ViT's attention over the whole image (Zheng, 2025, arXiv 2501.16182): `clamped_linear_attend`, then a factor.

    The factor is learned for each head. It multiplies the output; it is no temperature of the weights.

    Args:
        dim, num_heads: as in `Attention`.
        denom_min: as in `clamped_linear_attend`.
        options: as in `Attention`; ``scale`` is where the factors start. ``qkv_bias=True, out_bias=True`` is the layer
            of L2ViT.

    Raises:
        ValueError: a ``denom_min`` that is not above 0, an option that does not apply.

    >>> layer = LinearGlobalAttention(32, 4, qkv_bias=True, out_bias=True)
    >>> layer(torch.randn(2, 7, 9, 32)).shape
    torch.Size([2, 7, 9, 32])
    """

    tiny: ClassVar[dict[str, Any]] = {"denom_min": 1.0}

    def __init__(self, dim: int, num_heads: int, *, denom_min: float = 100.0, **options: Any) -> None:
        if options.get("feature") is not None:
            raise ValueError("feature does not apply to linear global attention: it is max(x, 0)")
        if not denom_min > 0:
            raise ValueError(f"denom_min must be more than 0; it was {denom_min}")
        super().__init__(dim, num_heads, **options)
        self.denom_min = denom_min
        self.factor = nn.Parameter(torch.full((num_heads,), float(self.scale)))

    def products(self, q: Tensor, k: Tensor, v: Tensor, call: Call, state: Any) -> tuple[Tensor, Any]:
        """`clamped_linear_attend` times the factors."""
        options: dict[str, Any] = dict(causal=self.causal, keys=call.real, state=state)
        out, after = clamped_linear_attend(q, k, v, denom_min=self.denom_min, **options)
        return out * self.factor[:, None, None], after
