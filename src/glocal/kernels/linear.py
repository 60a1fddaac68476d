"""Causal products of linear attention, in chunks: ``o_i = fq_i S_i`` with ``S_i = e^{a_i} S_{i-1} + fk_i v_i^T``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.flop_counter import register_flop_formula

from glocal.kernels import cpu, native

__all__ = ["causal_product", "native_linear", "why_not_native"]

_AT_ONCE = 1 << 20
"""Numbers of the chunks' states that are held at a time: 4 MiB in float32, to stay in the cache."""

_NATIVE_FROM = 16
"""Positions from which the native kernel is worth its call."""


def causal_product(
    fq: Tensor,
    fk: Tensor,
    v: Tensor,
    state: Tensor,
    decay: Tensor | None = None,
    chunk: int = 64,
    *,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """Each query's features times the sum of what stands before and at it, in O(N (F E + chunk (F + E))).

    Within a chunk the scores are computed, between chunks the state is handed on. Memory beyond the results does not
    grow with N, also in training: the backward pass makes the states anew. In float32 on a CPU, without decay, it is
    the native kernel's.

    Args:
        fq, fk: features ``(..., N, F)``.
        v: ``(..., N, E)``.
        state: before the first position, ``(..., F, E)``.
        decay: logarithms, at most 0, by which the state fades before each position is added, ``(..., N)``; none where
            None.
        chunk: positions that are compared pair by pair; the native kernel has its own.
        reverse: time runs from the last position to the first.

    Returns:
        ``(..., N, E)``, and the state after the last position ``(..., F, E)``.
    """
    lead, length = fq.shape[:-2], fq.shape[-2]
    if not length:
        return v, state
    given = [t.reshape(-1, *t.shape[len(lead) :]) for t in (fq, fk, v, state)]
    fade = None if decay is None else decay.reshape(-1, length)
    out, last = _CausalProduct.apply(*given, fade, min(chunk, length), reverse)  # type: ignore[no-untyped-call]
    return out.view(*lead, length, -1), last.view(state.shape)


class _CausalProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, fq: Tensor, fk: Tensor, v: Tensor, state: Tensor, decay: Tensor | None, chunk: int, reverse: bool
    ) -> tuple[Tensor, Tensor]:
        out, last = _forward(fq, fk, v, state, decay, chunk, reverse)
        ctx.chunk, ctx.reverse = chunk, reverse
        ctx.save_for_backward(fq, fk, v, state, decay, out, last)
        return out, last

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_last: Tensor) -> tuple[Tensor | None, ...]:
        """All three are causal products again: of the queries forwards, of keys and values backwards in time."""
        fq, fk, v, state, decay, out, last = ctx.saved_tensors
        back, later, fade = not ctx.reverse, decay, None
        if decay is not None:  # a position's own decay stands before it; backwards in time, the next one's does
            later = pad(decay[:, :-1], (1, 0)) if ctx.reverse else pad(decay[:, 1:], (0, 1))
        dq, _ = causal_product(grad, v, fk, state.mT, decay, ctx.chunk, reverse=ctx.reverse)
        dk, into = causal_product(v, grad, fq, grad_last.mT, later, ctx.chunk, reverse=back)
        dv, _ = causal_product(fk, fq, grad, grad_last, later, ctx.chunk, reverse=back)
        dstate = into.mT
        if decay is not None:
            # All that reaches a position or what is after it has gone through its decay, but for what starts there.
            through = (grad * out).sum(-1) - (fk * dk).sum(-1)
            fade = through.cumsum(1) if ctx.reverse else through.flip(1).cumsum(1).flip(1)
            fade = fade + (grad_last * last).sum((1, 2))[:, None]
            dstate = dstate * decay[:, -1 if ctx.reverse else 0, None, None].exp()
        return dq, dk, dv, dstate, fade, None, None


def _forward(
    fq: Tensor, fk: Tensor, v: Tensor, state: Tensor, decay: Tensor | None, chunk: int, reverse: bool
) -> tuple[Tensor, Tensor]:
    if decay is None and fq.dtype == torch.float32 and not why_not_native(fq):
        heads = [t[:, None] for t in (fq, fk, v, state)]
        out, last, _ = native_linear(*heads, None, None, "identity", 0.0, reverse)
        return out[:, 0], last[:, 0]
    if reverse:
        fade = None if decay is None else decay.flip(1)
        out, last = _forward(fq.flip(1), fk.flip(1), v.flip(1), state, fade, chunk, False)
        return out.flip(1), last
    batch, length, features = fq.shape
    chunks = max(1, _AT_ONCE // (batch * features * v.shape[2]))
    at_once = chunk * (chunks if decay is None else min(chunks, chunk))  # decays compare chunks pair by pair
    out = v.new_empty(batch, length, v.shape[2])
    for start in range(0, length, at_once):
        part = slice(start, start + at_once)
        fade = None if decay is None else decay[:, part]
        out[:, part], state = _some(fq[:, part], fk[:, part], v[:, part], state, fade, chunk)
    return out, state.clone()


def _some(fq: Tensor, fk: Tensor, v: Tensor, state: Tensor, decay: Tensor | None, chunk: int) -> tuple[Tensor, Tensor]:
    """As many chunks as are held at a time."""
    length = fq.shape[1]
    fq, fk, v = (pad(t, (0, 0, 0, -length % chunk)).unflatten(1, (-1, chunk)) for t in (fq, fk, v))
    scores = fq @ fk.mT  # (B, chunks, chunk, chunk)
    if decay is None:
        sums = fk.mT @ v
        before = torch.cat([state[:, None], sums[:, :-1]], 1).cumsum(1)
        out = scores.tril_() @ v
        out += fq @ before
        return out.flatten(1, 2)[:, :length], before[:, -1] + sums[:, -1]
    fade = pad(decay, (0, -length % chunk)).unflatten(1, (-1, chunk)).cumsum(2)
    whole = fade[:, :, -1].cumsum(1)  # (B, chunks)
    sums = (fk * (fade[:, :, -1:] - fade).exp()[..., None]).mT @ v
    lasts = _from_to(whole) @ sums.flatten(2) + whole.exp()[..., None] * state.flatten(1)[:, None]
    before = torch.cat([state[:, None], lasts[:, :-1].unflatten(2, state.shape[1:])], 1)
    out = (scores * _from_to(fade)) @ v
    out += (fq * fade.exp()[..., None]) @ before
    return out.flatten(1, 2)[:, :length], lasts[:, -1].view(state.shape)


def _from_to(fade: Tensor) -> Tensor:
    """What is left of position ``j`` at ``i``, ``exp(fade_i - fade_j)``, 0 where ``j > i``: ``(..., n, n)``."""
    between = fade[..., :, None] - fade[..., None, :]
    n = fade.shape[-1]
    later = torch.ones(n, n, dtype=torch.bool, device=fade.device).triu(1)
    return between.masked_fill(later, -torch.inf).exp()


def why_not_native(q: Tensor) -> str | None:
    """The reason why the native kernel does not take queries and keys like these ``(B, H, N, F)``, or None."""
    if q.device.type != "cpu":
        return f"it runs on a CPU, the tensors are on {q.device.type}"
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"it computes in float32, the tensors are {q.dtype}"
    if q.shape[-2] < _NATIVE_FROM:
        return f"below {_NATIVE_FROM} positions its call costs more than it saves"
    return cpu.missing()


@torch.library.custom_op("glocal::linear", mutates_args=())
def native_linear(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv: Tensor,
    sums: Tensor | None,
    keys: Tensor | None,
    feature: str,
    least: float,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`glocal.kernels.native.linear` as an operator, for ``torch.compile``; nothing where there are no sums.

    It has no gradient: `causal_product` has.
    """
    out, after, total = native.linear(q, k, v, kv, sums, keys, feature=feature, least=least, reverse=reverse)
    return out, after, kv.new_empty(0) if total is None else total


@native_linear.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, kv: Tensor, sums: Tensor | None, keys: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    out = q.new_empty((*q.shape[:3], v.shape[3]))
    return out, kv.new_empty(kv.shape), kv.new_empty(0 if sums is None else sums.shape)


@register_flop_formula(torch.ops.glocal.linear)
def _flops(q: torch.Size, k: torch.Size, v: torch.Size, *_: Any, **__: Any) -> int:
    """Scores and values of half a chunk's pairs, the read-out of a query, the sum of a key."""
    batch, heads, queries, features = q
    kv_heads, keys, width = k[1], k[2], v[3]
    pairs = 16 * (features + width)
    return 2 * batch * (heads * queries * (pairs + features * width) + kv_heads * keys * features * width)
