"""linear_attend: attention whose scores are products of features, so that its cost grows with N and not with N x N."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor
from torch.nn.functional import pad

from glocal.kernels.linear import causal_product, native_linear, why_not_native
from glocal.shapes import Bool, Float

__all__ = ["FEATURES", "LinearState", "linear_attend"]

Feature = Callable[[Tensor], Tensor]

FEATURES: dict[str, Feature] = {
    "elu": lambda x: x.clamp(max=0).exp() + x.relu(),  # elu(x) + 1 would round exp(-20) to 0
    "relu": torch.relu,
    "identity": lambda x: x,
}
"""Feature maps by name: ``elu(x) + 1`` of Katharopoulos et al., 2020, arXiv 2006.16236; ``relu(x)``; none."""


class LinearState(NamedTuple):
    """What causal linear attention keeps of the past, whatever its length.

    Args:
        kv: sum of key features times values, ``(B, Hkv, F, E)``, in float32 or wider.
        k: sum of key features, ``(B, Hkv, F)``.
    """

    kv: Tensor
    k: Tensor


@overload
def linear_attend(
    q: Float[Tensor, "B H N D"],
    k: Float[Tensor, "B Hkv M D"],
    v: Float[Tensor, "B Hkv M E"],
    *,
    feature: str | Feature = ...,
    causal: bool = ...,
    keys: Bool[Tensor, "B M"] | None = ...,
    decay: Float[Tensor, "B Hkv M"] | None = ...,
    normalise: bool = ...,
    least: float = ...,
    state: LinearState | None = ...,
    return_state: Literal[False] = ...,
    chunk: int = ...,
) -> Float[Tensor, "B H N E"]: ...


@overload
def linear_attend(
    q: Float[Tensor, "B H N D"],
    k: Float[Tensor, "B Hkv M D"],
    v: Float[Tensor, "B Hkv M E"],
    *,
    feature: str | Feature = ...,
    causal: bool = ...,
    keys: Bool[Tensor, "B M"] | None = ...,
    decay: Float[Tensor, "B Hkv M"] | None = ...,
    normalise: bool = ...,
    least: float = ...,
    state: LinearState | None = ...,
    return_state: Literal[True],
    chunk: int = ...,
) -> tuple[Float[Tensor, "B H N E"], LinearState]: ...


def linear_attend(
    q: Float[Tensor, "B H N D"],
    k: Float[Tensor, "B Hkv M D"],
    v: Float[Tensor, "B Hkv M E"],
    *,
    feature: str | Feature = "elu",
    causal: bool = False,
    keys: Bool[Tensor, "B M"] | None = None,
    decay: Float[Tensor, "B Hkv M"] | None = None,
    normalise: bool = True,
    least: float = 1e-6,
    state: LinearState | None = None,
    return_state: bool = False,
    chunk: int = 64,
) -> Float[Tensor, "B H N E"] | tuple[Float[Tensor, "B H N E"], LinearState]:
    """Linear attention: ``o_i = sum_j f(q_i) f(k_j) v_j / sum_j f(q_i) f(k_j)``, in time and memory that grow with N.

    Katharopoulos et al., 2020, arXiv 2006.16236. Three ways that agree: all keys at once; causal in chunks; and, with
    ``state``, token by token or piece by piece. Sums are taken in float32 or wider, whatever the inputs.

    Args:
        q: queries ``(B, H, N, D)``.
        k: keys ``(B, Hkv, M, D)``; H is a multiple of Hkv.
        v: values ``(B, Hkv, M, E)``.
        feature: a name of `FEATURES`, or a function from ``(..., D)`` to features ``(..., F)``.
        causal: queries are the last positions of the keys, and see those at and before them.
        keys: which keys are real, booleans ``(B, M)``.
        decay: in the causal form, logarithms at most 0 by which all that is before a position fades there, ``(B, Hkv,
            M)``: of pairs, ``exp`` of the sum after ``j`` up to ``i``.
        normalise: whether the sum of the scores divides. Else the result is the sum of ``f(q_i) f(k_j) v_j``.
        least: the divisor's least absolute value, where the largest feature of a query is 1: a query of which all
            scores are 0 gets zeros.
        state: of an earlier call, whose keys come before these.
        return_state: whether the state after these keys is returned.
        chunk: positions of the causal form that are compared pair by pair; changes the speed only.

    Returns:
        ``(B, H, N, E)`` in the type of ``q``, and with ``return_state`` the state.

    Raises:
        ValueError: shapes that do not fit, an unknown feature; ``decay`` without ``causal``; with it, more queries than
            keys.

    >>> q, k, v = torch.randn(3, 1, 2, 100, 16).unbind()
    >>> whole = linear_attend(q, k, v, causal=True)
    >>> first, state = linear_attend(q[:, :, :60], k[:, :, :60], v[:, :, :60], causal=True, return_state=True)
    >>> then = linear_attend(q[:, :, 60:], k[:, :, 60:], v[:, :, 60:], causal=True, state=state)
    >>> torch.allclose(torch.cat([first, then], 2), whole, atol=1e-5)
    True
    """
    apply = _feature(feature)
    check(q, k, v, causal, keys, decay, chunk)
    if causal and decay is None and isinstance(feature, str) and _fused(q, k, v, state):
        past = _state(state, k, v, k.shape[-1])
        sums = past.k.float() if normalise else None
        result, kv, total = native_linear(q, k, v, past.kv.float(), sums, keys, feature, least, False)
        return (result, LinearState(kv, total if normalise else past.k)) if return_state else result
    dtype = torch.promote_types(q.dtype, torch.float32)
    fq, fk, wide = apply(q.to(dtype)), apply(k.to(dtype)), v.to(dtype)
    if keys is not None:
        fk = fk * keys[:, None, :, None]
    state = _state(state, k, v, fk.shape[-1])
    if normalise:
        # The quotient does not change, and what is large no longer overflows.
        largest = fq.detach().abs().amax(-1, keepdim=True)
        fq = fq / torch.where(largest > 0, largest, 1.0)
        wide = torch.cat([wide, wide.new_ones(*wide.shape[:-1], 1)], -1)  # the sum of scores is that of ones
        sums = torch.cat([state.kv, state.k[..., None]], -1)
    else:
        sums = state.kv
    group = q.shape[1] // k.shape[1]
    if causal:
        if group > 1:
            fk, wide, sums = (t.repeat_interleave(group, 1) for t in (fk, wide, sums))
            decay = None if decay is None else decay.repeat_interleave(group, 1)
        fade = None if decay is None else decay.to(dtype)
        fq = pad(fq, (0, 0, k.shape[2] - q.shape[2], 0))
        out, sums = causal_product(fq, fk, wide, sums.to(dtype), fade, chunk)
        out = out[:, :, k.shape[2] - q.shape[2] :]
        sums = sums[:, ::group]
    else:
        sums = sums.to(dtype) + fk.mT @ wide
        out = (fq.unflatten(1, (-1, group)) @ sums[:, :, None]).flatten(1, 2)
    if normalise:
        kept, total, out = sums[..., :-1], out[..., -1:], out[..., :-1]
        out = out / torch.where(total.abs() < least, torch.where(total < 0, -least, least), total)
        past = LinearState(kept, sums[..., -1])
    else:
        past = LinearState(sums, state.k)
    result = out.to(q.dtype)
    return (result, past) if return_state else result


def _fused(q: Tensor, k: Tensor, v: Tensor, state: LinearState | None) -> bool:
    """Whether the native kernel makes the features too: where nothing is to be learned from the result."""
    given = (q, k, v) if state is None else (q, k, v, *state)
    learns = torch.is_grad_enabled() and any(t.requires_grad for t in given)
    return not learns and q.dtype == k.dtype == v.dtype and why_not_native(q) is None


def _state(state: LinearState | None, k: Tensor, v: Tensor, features: int) -> LinearState:
    """What came before the keys: zeros where it was not given."""
    shape = (*k.shape[:2], features, v.shape[-1])
    if state is None:
        kv = k.new_zeros(shape, dtype=torch.promote_types(k.dtype, torch.float32))
        return LinearState(kv, kv.new_zeros(shape[:3]))
    if state.kv.shape != shape:
        raise ValueError(f"state.kv must be {shape}; it was {tuple(state.kv.shape)}")
    return state


def _feature(feature: str | Feature) -> Feature:
    if not isinstance(feature, str):
        return feature
    if feature not in FEATURES:
        raise ValueError(f"feature must be a function or one of {', '.join(FEATURES)}; it was {feature!r}")
    return FEATURES[feature]


def check(q: Tensor, k: Tensor, v: Tensor, causal: bool, keys: Tensor | None, decay: Tensor | None, chunk: int) -> None:
    """Refuse what linear attention cannot take; for mechanisms of the family too."""
    for name, t in (("q", q), ("k", k), ("v", v)):
        if t.dim() != 4 or not t.is_floating_point():
            raise ValueError(f"{name} must be floats (B, heads, tokens, channels); it was {t.dtype} {tuple(t.shape)}")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"k must have q's batch, its channels and a divisor of its heads, {tuple(q.shape)}; it was {tuple(k.shape)}"
        )
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(f"v must be {(*k.shape[:3], 'E')}; it was {tuple(v.shape)}")
    if keys is not None and (keys.dtype != torch.bool or keys.shape != (k.shape[0], k.shape[2])):
        raise ValueError(f"keys must be booleans {(k.shape[0], k.shape[2])}; it was {keys.dtype} {tuple(keys.shape)}")
    if causal and q.shape[2] > k.shape[2]:
        raise ValueError(f"causal: {q.shape[2]} queries cannot be the last positions of {k.shape[2]} keys")
    if decay is not None and not causal:
        raise ValueError("decay is over time: it needs causal=True")
    if decay is not None and decay.shape != k.shape[:3]:
        raise ValueError(f"decay must be {tuple(k.shape[:3])}; it was {tuple(decay.shape)}")
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1; it was {chunk}")
