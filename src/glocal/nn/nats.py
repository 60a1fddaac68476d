"""Each token learns, for each key head, how long it is seen: for ever, until the next such token, or for a window."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import gumbel_softmax, one_hot

from glocal.cache import Cache, TokenRoles
from glocal.cache.roles import GLOBAL, LOCAL, WINDOWED, chunk_roles
from glocal.condense import pool_blocks, real_tokens, share_heads, split
from glocal.nn.frame import Attention, Call
from glocal.patterns import Between, Causal, Keys, Pattern
from glocal.shapes import Bool, Float

__all__ = ["NeuralAttentionSearch"]

_FUTURE = "lifetimes run forward, there is no 'until the next global token' of another direction or sequence"
_BUDGET = 1 << 21  # pairs looked at together in the backward pass


class NeuralAttentionSearch(Attention):
    """A linear scorer gives every token and key head a role, and the role says which queries see the token.

    A *global* token is seen by all later queries. A *local* one by those up to the next global token, that one
    included. A *windowed* one by the ``window`` queries after it. All see themselves, and the first token is global.
    In training roles are drawn (Gumbel softmax, hard, straight through) and the scorer learns how each role would have
    changed the output: the gradient of a mask that multiplies ``exp(score)``, computed for some queries at a time. In
    evaluation the best role is taken, ties go to global, then local. Deng et al., 2025, arXiv 2502.13251.

    Add `lifetime` times a weight to the loss: it is the pressure to be forgotten. To tune the scorers of a frozen
    model, freeze its other parameters and set ``detach_scorer``.

    With ``chunk`` above 1 roles are of chunks of so many tokens, from the mean of their inputs; what is said of tokens
    and queries above then holds for chunks and the chunks of queries. Within a chunk all is causal: its role, which
    its own queries do not need, is read by later chunks only, so no token learns of a later one.

    Args:
        dim, num_heads: as in `Attention`, with all its options.
        window: how many later queries see a windowed token; a multiple of ``chunk``, counted in whole chunks.
        chunk: tokens that share a role.
        tau: temperature of the drawing.
        detach_scorer: no gradient from the scorer to the layer's input.
        causal: only True.

    Raises:
        ValueError: a negative window, a ``chunk`` that does not divide it, a temperature that is not positive, a use
            but causal self-attention, or what `Attention` refuses.

    >>> import torch
    >>> from glocal.nn import NeuralAttentionSearch
    >>> layer = NeuralAttentionSearch(64, 4, window=8)
    >>> loss = layer(torch.randn(1, 100, 64)).square().mean() + 0.1 * layer.lifetime()
    >>> loss.backward()
    >>> layer.scorer.weight.grad.shape
    torch.Size([12, 64])
    """

    uses = ("causal-self",)
    refuses: ClassVar[dict[str, str]] = {
        "noncausal-self": _FUTURE,
        "noncausal-cross": _FUTURE,
        "causal-cross": _FUTURE,
    }
    tiny: ClassVar[dict[str, Any]] = {"window": 2}

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        window: int = 256,
        chunk: int = 1,
        tau: float = 1.0,
        detach_scorer: bool = False,
        causal: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(dim, num_heads, causal=causal, **options)
        TokenRoles(window, chunk)  # its errors, now
        if not tau > 0:
            raise ValueError(f"tau must be positive; it was {tau}")
        self.window, self.chunk, self.tau, self.detach_scorer = window, chunk, tau, detach_scorer
        self.scorer = nn.Linear(dim, 3 * self.num_kv_heads, bias=False)
        self.last: Tensor | None = None  # one-hot roles of the last forward pass, (B, Hkv, chunks, 3)

    def scores(self, call: Call) -> Float[Tensor, "B Hkv n 3"]:
        """What the scorer says of each new token: for global, local, windowed."""
        return self.heads(self.scorer(call.x.detach() if self.detach_scorer else call.x), self.num_kv_heads)

    def choose(self, call: Call) -> Float[Tensor, "B Hkv chunks 3"]:
        """The role of each new token or chunk, one-hot: global, local, windowed; in training with its gradient.

        The score of the mean of a chunk's inputs is the mean of their scores, as the scorer is linear.
        """
        scores = self.scores(call)
        real = None if call.real is None else call.real[:, None]
        if self.training:
            wide = scores.float() if scores.dtype != torch.float64 else scores
            chosen = gumbel_softmax(pool_blocks(wide, self.chunk, real=real), self.tau, hard=True)
        else:
            chosen = one_hot(chunk_roles(scores, self.chunk, real=real), 3).to(scores.dtype)
        start = 0 if call.cache is None else call.cache.seen
        fixed = torch.eye(3, dtype=chosen.dtype, device=chosen.device)
        first = torch.arange(start, start + chosen.shape[2], device=chosen.device) == 0
        if call.real is not None:
            # Padding closes no segment; the first real token takes the place of the first one.
            held = real_tokens(call.x, self.chunk, call.real).any(-1)
            chosen = torch.where(held[:, None, :, None], chosen, fixed[WINDOWED])
            first = (held & (held.cumsum(-1) == 1))[:, None]
        return torch.where(first[..., None], fixed[GLOBAL], chosen)

    def visible(self, roles: Tensor, length: int | None = None) -> Pattern:
        """What ``roles (B, Hkv, chunks)`` let each query of ``length`` tokens see: three boxes, whatever the length."""
        chunk, roles = self.chunk, roles.repeat_interleave(self.num_heads // self.num_kv_heads, 1)
        at = torch.arange(roles.shape[-1] * chunk if length is None else length, device=roles.device)
        own = at // chunk
        opened = (last_global(roles == GLOBAL)[..., own] + 1) * chunk
        near = (own - self.window // chunk).clamp(min=0) * chunk
        ever, until, some = (Keys((roles == kind)[..., own], per_head=True) for kind in (GLOBAL, LOCAL, WINDOWED))
        return ever & Causal() | until & Between(opened, (at + 1).expand_as(opened)) | some & Between(near, at + 1)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        if q.dim() != 4:
            raise ValueError(f"x must be a sequence (B, N, {self.dim}); it had the axes {tuple(q.shape[2:-1])}")
        chosen = self.last = self.choose(call)
        out: Tensor = self.attend(q, k, v, self.visible(chosen.argmax(-1), k.shape[2]), call)
        if chosen.requires_grad:
            parts = (out, chosen, q.detach(), k.detach(), v.detach(), call.real, self.scale, self.window, self.chunk)
            out = _RoleGradient.apply(*parts)  # type: ignore[no-untyped-call]
        return out

    def lifetime(self) -> Tensor:
        """Mean share of the sequence for which a token of the last forward pass is seen beyond its window, a scalar.

        Global: from the token to the end. Local: to the next global token, or the end. Windowed: none.
        """
        if self.last is None:
            raise ValueError("lifetime is of the last forward pass: there was none")
        length = self.last.shape[2]
        at = torch.arange(length, device=self.last.device)
        closing = self.last.argmax(-1) == GLOBAL
        # The first global token after each one, by a running minimum from the end; without any, the last token.
        ends = torch.where(closing, at, length - 1).flip(-1).cummin(-1).values.flip(-1)
        ends = torch.cat([ends[..., 1:], torch.full_like(ends[..., :1], length - 1)], -1)
        lives = self.last[..., GLOBAL] * (length - at) + self.last[..., LOCAL] * (ends - at)
        return lives.mean() / max(1, length)

    def new_cache(self) -> Cache:
        return TokenRoles(self.window, self.chunk)

    def signals(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> dict[str, Tensor]:
        return {"roles": self.choose(call).argmax(-1) if self.chunk == 1 else self.scores(call)}

    def extra_repr(self) -> str:
        return f"window={self.window}" + (f", chunk={self.chunk}" if self.chunk > 1 else "")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "last": None}  # what a copy does not take along


def last_global(closing: Bool[Tensor, "*lead N"]) -> Tensor:
    """The last global token strictly before each position, ``(*lead, N)``, -1 for none.

    >>> last_global(torch.tensor([True, False, True, False])).tolist()
    [-1, 0, 0, 2]
    """
    at = torch.arange(closing.shape[-1], device=closing.device)
    own = torch.where(closing, at, -1).cummax(-1).values
    return torch.cat([torch.full_like(own[..., :1], -1), own[..., :-1]], -1)


class _RoleGradient(torch.autograd.Function):
    """Passes the output on; backward it also tells each token what every role would have changed."""

    @staticmethod
    def forward(
        ctx: Any,
        out: Tensor,
        chosen: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        real: Tensor | None,
        scale: float,
        window: int,
        chunk: int = 1,
        bounded: bool = True,
    ) -> Tensor:
        ctx.save_for_backward(out, chosen, q, k, v, real)
        ctx.settings = (scale, window, chunk, bounded)
        return out.view_as(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        out, chosen, q, k, v, real = ctx.saved_tensors
        roles = role_gradient(grad, out, chosen.argmax(-1), q, k, v, real, *ctx.settings)
        return grad, roles.to(chosen.dtype), *[None] * 8


def role_gradient(
    grad: Float[Tensor, "B H N Dv"],
    out: Float[Tensor, "B H N Dv"],
    roles: Tensor,
    q: Float[Tensor, "B H N D"],
    k: Float[Tensor, "B Hkv N D"],
    v: Float[Tensor, "B Hkv N Dv"],
    real: Bool[Tensor, "B N"] | None,
    scale: float,
    window: int,
    chunk: int = 1,
    bounded: bool = True,
) -> Float[Tensor, "B Hkv chunks 3"]:
    """The gradient of ``M = G[j] + L[j] prod_{j<t<i} (1 - G[t]) + W[j] [i - j <= window]`` that multiplies exp(score).

    With chunks, ``i`` and ``j`` are those of query and key, and what is said of a pair of tokens is added up over them.
    ``dM(i, j) = P(i, j) (dout_i . v_j - dout_i . out_i)``, for some queries at a time. ``P`` is ``exp(score)`` over its
    sum; with ``bounded`` over the sum of all earlier keys, as the paper has it, otherwise of the visible ones: the
    derivative itself, which grows without limit where a query does not see its best key.
    """
    length, heads, wide = q.shape[2], k.shape[1], torch.promote_types(q.dtype, torch.float32)
    grad, out, q, k, v = (t.to(wide) for t in (grad, out, q, k, v))
    k, v = (t.repeat_interleave(q.shape[1] // heads, 1) for t in (k, v))
    inner = (grad * out).sum(-1, keepdim=True)
    token, window = torch.arange(length, device=q.device), window // chunk
    at, local = torch.arange(roles.shape[2], device=q.device), (roles == LOCAL)[:, :, None]
    last = last_global(roles == GLOBAL)
    before = torch.where(last < 0, -1, last.gather(-1, last.clamp(min=0)))  # the global token before the last one
    to_global, to_local, to_window = torch.zeros(3, *roles.shape, dtype=wide, device=q.device).unbind(0)
    for rows in token.split(max(1, _BUDGET // (q.shape[0] * q.shape[1] * length))):
        own = rows // chunk
        i, opened, former = own[:, None], last[:, :, own, None], before[:, :, own, None]
        seen = token <= rows[:, None] if real is None else (token <= rows[:, None]) & real[:, None, None]
        scores = (q[:, :, rows] * scale @ k.mT).masked_fill(~seen, -torch.inf)
        hidden = None if bounded else ~_seen(roles, opened, i, at, window, q.shape[1])[..., token // chunk]
        among = scores if hidden is None else scores.masked_fill(hidden, -torch.inf)
        total = among.logsumexp(-1, keepdim=True)
        weights = torch.exp(scores - torch.where(total == -torch.inf, 0, total))
        pairs = share_heads(weights * (grad[:, :, rows] @ v.mT - inner[:, :, rows]), heads)
        pairs = split(pairs.mT, chunk).sum(-2).mT
        to_global += pairs.sum(2)
        to_local += (pairs * (at >= opened)).sum(2)
        to_window += (pairs * (i - at <= window)).sum(2)
        # What a token takes away by being global: the local tokens before it, from the queries after it. First what
        # any other token would take; then what the last global token has taken, alone.
        open_now = pairs * (local & (at > opened))
        passed = open_now.cumsum(-1) - open_now
        to_global -= (passed * ((at > opened) & (at < i))).sum(2)
        closed = (pairs * (local & (at > former) & (at < opened))).sum(-1)
        to_global.scatter_add_(2, last[:, :, own].clamp(min=0), -closed)
    return torch.stack([to_global, to_local, to_window], -1)


def _seen(roles: Tensor, opened: Tensor, i: Tensor, at: Tensor, window: int, heads: int) -> Tensor:
    """The visible keys of some queries, ``(B, H, n, N)``."""
    kind = roles[:, :, None]
    seen = (kind == GLOBAL) | ((kind == LOCAL) & (at >= opened)) | ((kind == WINDOWED) & (i - at <= window))
    return seen.repeat_interleave(heads // roles.shape[1], 1)
