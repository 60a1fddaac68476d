"""The selective scan of state-space models: ``h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t``, ``y_t = C_t h_t``."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from glocal.shapes import Float

__all__ = ["selective_scan"]

_AT_ONCE = 1 << 22
"""Numbers of states that the backward pass holds at a time: 16 MiB in float32."""


def selective_scan(
    u: Float[Tensor, "*lead N C"],
    delta: Float[Tensor, "*lead N C"],
    a: Float[Tensor, "*scan C S"],
    b: Float[Tensor, "*lead N S"],
    c: Float[Tensor, "*lead N S"],
    d: Float[Tensor, "*scan C"] | None = None,
    *,
    state: Float[Tensor, "*lead C S"] | None = None,
    chunk: int | None = None,
) -> tuple[Float[Tensor, "*lead N C"], Float[Tensor, "*lead C S"]]:
    """Each channel a recurrence whose step and inputs depend on the token, in time and memory that grow with N.

    Gu and Dao, 2023, arXiv 2312.00752: ``h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t`` and ``y_t = C_t h_t + D
    u_t``, with S numbers of state a channel. All chunks go side by side, position by position; what each is left with
    is handed to the next, then they go again from the right starts. That is about ``3 sqrt(N)`` steps. The backward
    pass keeps the chunks' starts only and makes the states anew, a part at a time. All in float32 or wider. Of one
    token, with ``state``, it is the recurrent step.

    Args:
        u: inputs ``(*lead, N, C)``.
        delta: step sizes, of the same shape, not negative.
        a: rates ``(*scan, C, S)``, negative where the past is to fade; what is before C broadcasts to ``lead``.
        b, c: what goes into the state and what is read of it, ``(*lead, N, S)``.
        d: weight of the input itself, ``(*scan, C)``.
        state: what is left of earlier tokens, ``(*lead, C, S)``; zeros where None.
        chunk: tokens that a chunk goes through one after the other; about ``sqrt(N)``, and at least S, where None.

    Returns:
        ``(*lead, N, C)`` in the type of ``u``, and the state after the last token ``(*lead, C, S)``, in float32 or
        wider.

    Raises:
        ValueError: shapes that do not fit, a chunk below 1.

    >>> u, delta = torch.randn(2, 50, 8), torch.rand(2, 50, 8)
    >>> b, c = torch.randn(2, 2, 50, 4).unbind()
    >>> whole, _ = selective_scan(u, delta, -torch.ones(8, 4), b, c)
    >>> first, state = selective_scan(*(t[:, :30] for t in (u, delta)), -torch.ones(8, 4), b[:, :30], c[:, :30])
    >>> then, _ = selective_scan(
    ...     *(t[:, 30:] for t in (u, delta)), -torch.ones(8, 4), b[:, 30:], c[:, 30:], state=state
    ... )
    >>> torch.allclose(torch.cat([first, then], 1), whole, atol=1e-5)
    True
    """
    _check(u, delta, a, b, c, d, state, chunk)
    lead, (length, channels), size = u.shape[:-2], u.shape[-2:], a.shape[-1]
    rows = math.prod(lead)
    dtype = torch.promote_types(u.dtype, torch.float32)
    wide, step, b, c = (t.to(dtype).reshape(rows, length, t.shape[-1]) for t in (u, delta, b, c))
    # Channels stand last: they are many, and S may be 1.
    rates = a.to(dtype).mT.expand(*lead, size, channels).reshape(rows, size, channels)
    if state is None:
        start = wide.new_zeros(rows, size, channels)
    else:
        start = state.to(dtype).mT.reshape(rows, size, channels)
    if length:
        chunk = max(size, math.isqrt(length)) if chunk is None else chunk
        y, last, _ = _scan(wide, step, rates, b, c, start, min(chunk, length))
    else:
        y, last = wide, start
    y = y.view(u.shape)
    if d is not None:
        y = y + d.to(dtype)[..., None, :] * u
    return y.to(u.dtype), last.mT.reshape(*lead, channels, size)


def _check(
    u: Tensor,
    delta: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None,
    state: Tensor | None,
    chunk: int | None,
) -> None:
    if u.dim() < 2 or not u.is_floating_point():
        raise ValueError(f"u must be floats (..., tokens, channels); it was {u.dtype} {tuple(u.shape)}")
    lead, (length, channels) = tuple(u.shape[:-2]), u.shape[-2:]
    if delta.shape != u.shape:
        raise ValueError(f"delta must be {tuple(u.shape)}, as u; it was {tuple(delta.shape)}")
    if a.dim() < 2 or a.shape[-2] != channels or not _broadcasts(a.shape[:-2], lead):
        raise ValueError(f"a must be (..., {channels}, S), to broadcast to {lead}; it was {tuple(a.shape)}")
    wanted = (*lead, length, a.shape[-1])
    for name, t in (("b", b), ("c", c)):
        if tuple(t.shape) != wanted:
            raise ValueError(f"{name} must be {wanted}; it was {tuple(t.shape)}")
    if d is not None and (d.dim() < 1 or d.shape[-1] != channels or not _broadcasts(d.shape[:-1], lead)):
        raise ValueError(f"d must be (..., {channels}), to broadcast to {lead}; it was {tuple(d.shape)}")
    if state is not None and tuple(state.shape) != (*lead, channels, a.shape[-1]):
        raise ValueError(f"state must be {(*lead, channels, a.shape[-1])}; it was {tuple(state.shape)}")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk must be at least 1; it was {chunk}")


def _broadcasts(shape: torch.Size, lead: tuple[int, ...]) -> bool:
    last = lead[len(lead) - len(shape) :]
    return len(shape) <= len(lead) and all(n in (1, m) for n, m in zip(shape, last, strict=True))


@torch.library.custom_op("glocal::selective_scan", mutates_args=())
def _scan(
    u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, start: Tensor, chunk: int
) -> tuple[Tensor, Tensor, Tensor]:
    """``u``, ``delta (R, N, C)``, ``a``, ``start (R, S, C)``, ``b``, ``c (R, N, S)``.

    Returns outputs ``(R, N, C)``, the last state, and the state before each chunk ``(R, chunks, S, C)``.
    """
    parts = _Chunks(u, delta, a, b, c, chunk)
    starts = u.new_empty(u.shape[0], parts.count, *a.shape[1:])
    h = torch.zeros_like(starts)
    if parts.count > 1:
        for t in range(chunk):
            parts.step(h, t)
    state, fade = start.clone(), parts.fades()
    for n in range(parts.count):
        starts[:, n] = state
        state.mul_(fade[:, n]).add_(h[:, n])
    h.copy_(starts)
    y = u.new_empty(u.shape[0], parts.count, chunk, u.shape[2])
    for t in range(chunk):
        parts.step(h, t)
        y[:, :, t] = (parts.c[:, :, t, :, None] * h).sum(2)
    return y.flatten(1, 2)[:, : u.shape[1]].contiguous(), h[:, -1].clone(), starts


@_scan.register_fake
def _(
    u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, start: Tensor, chunk: int
) -> tuple[Tensor, Tensor, Tensor]:
    chunks = (u.shape[1] + chunk - 1) // chunk
    return u.new_empty(u.shape), u.new_empty(start.shape), u.new_empty(u.shape[0], chunks, *a.shape[1:])


@torch.library.custom_op("glocal::selective_scan_backward", mutates_args=())
def _scan_backward(
    grad: Tensor,
    grad_last: Tensor,
    u: Tensor,
    delta: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    starts: Tensor,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, delta, a, b, c and the start.

    With ``g_t`` the gradient of ``h_t``: ``g_t = C_t dy_t + exp(delta_{t+1} A) g_{t+1}``. It is the same recurrence,
    backwards in time.
    """
    parts = _Chunks(u, delta, a, b, c, chunk)
    dy = _in_chunks(grad, chunk)
    ends = torch.empty_like(starts)  # the gradient of the state after each chunk
    g = torch.zeros_like(starts)
    if parts.count > 1:
        for t in reversed(range(chunk)):
            g.addcmul_(parts.c[:, :, t, :, None], dy[:, :, t, None]).mul_(parts.fade(t))
    end, fade = grad_last.clone(), parts.fades()
    for n in reversed(range(parts.count)):
        ends[:, n] = end
        end.mul_(fade[:, n]).add_(g[:, n])
    du, ddelta = torch.empty_like(parts.u), torch.empty_like(parts.u)
    db, dc = torch.empty_like(parts.b), torch.empty_like(parts.b)
    da = torch.zeros_like(a)
    at_once = max(1, _AT_ONCE // max(1, chunk * starts[:, :1].numel()))
    for first in reversed(range(0, parts.count, at_once)):
        some = slice(first, first + at_once)
        part, g, out = parts.only(some), ends[:, some].clone(), dy[:, some]
        h = starts.new_empty(chunk + 1, *g.shape)
        h[0] = starts[:, some]
        for t in range(chunk):
            part.step(h[t + 1].copy_(h[t]), t)
        for t in reversed(range(chunk)):
            g.addcmul_(part.c[:, :, t, :, None], out[:, :, t, None])
            dc[:, some, t] = (h[t + 1] * out[:, :, t, None]).sum(-1)
            db[:, some, t] = (g * part.input[:, :, t, None]).sum(-1)
            entered = (g * part.b[:, :, t, :, None]).sum(2)
            du[:, some, t] = entered * part.delta[:, :, t]
            g.mul_(part.fade(t))
            kept = torch.mul(h[t], g, out=h[t + 1])  # which is no longer needed
            da += (kept * part.delta[:, :, t, None]).sum(1)
            ddelta[:, some, t] = (kept * part.a).sum(2).addcmul_(entered, part.u[:, :, t])
    du, ddelta, db, dc = (t.flatten(1, 2)[:, : u.shape[1]].contiguous() for t in (du, ddelta, db, dc))
    return du, ddelta, da, db, dc, g[:, 0].clone()


@_scan_backward.register_fake
def _(
    grad: Tensor,
    grad_last: Tensor,
    u: Tensor,
    delta: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    starts: Tensor,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    du, ddelta, da, db, dc = (t.new_empty(t.shape) for t in (u, u, a, b, c))
    return du, ddelta, da, db, dc, u.new_empty(grad_last.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    u, delta, a, b, c, _, ctx.chunk = inputs
    ctx.save_for_backward(u, delta, a, b, c, output[2])


def _grad(ctx: Any, grad: Tensor | None, grad_last: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    u, delta, a, b, c, starts = ctx.saved_tensors
    grad = torch.zeros_like(u) if grad is None else grad
    grad_last = torch.zeros_like(starts[:, 0]) if grad_last is None else grad_last
    return *_scan_backward(grad, grad_last, u, delta, a, b, c, starts, ctx.chunk), None


_scan.register_autograd(_grad, setup_context=_setup)


class _Chunks:
    """The inputs cut into chunks, ``(R, chunks, chunk, ...)``. What fills the last one changes no state: delta is 0."""

    def __init__(self, u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, chunk: int) -> None:
        self.u, self.delta, self.b, self.c = (_in_chunks(t, chunk) for t in (u, delta, b, c))
        self.a, self.input, self.count = a[:, None], self.u * self.delta, self.u.shape[1]

    def only(self, some: slice) -> _Chunks:
        """Some of the chunks."""
        part = object.__new__(_Chunks)
        part.u, part.delta, part.b, part.c, part.input = (
            t[:, some] for t in (self.u, self.delta, self.b, self.c, self.input)
        )
        part.a, part.count = self.a, part.u.shape[1]
        return part

    def fade(self, t: int) -> Tensor:
        """What is left of the states of position ``t - 1`` at ``t``, ``(R, chunks, S, C)``."""
        return (self.delta[:, :, t, None] * self.a).exp_()

    def fades(self) -> Tensor:
        """What is left of the states before each chunk after it, ``(R, chunks, S, C)``."""
        return (self.delta.sum(2)[:, :, None] * self.a).exp_()

    def step(self, h: Tensor, t: int) -> None:
        """The states of position ``t`` for those before it."""
        h.mul_(self.fade(t)).addcmul_(self.b[:, :, t, :, None], self.input[:, :, t, None])


def _in_chunks(t: Tensor, chunk: int) -> Tensor:
    """``(R, N, ...)`` to ``(R, chunks, chunk, ...)``, zeros at the end."""
    chunks: Tensor = torch.nn.functional.pad(t, (0, 0, 0, -t.shape[1] % chunk)).unflatten(1, (-1, chunk))
    return chunks
