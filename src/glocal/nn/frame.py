"""The frame of every attention layer: projections, heads, positions, the four uses, decoding with a cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from glocal.attention import attend
from glocal.cache import Cache, FullCache
from glocal.nn.conv import Depthwise
from glocal.nn.rope import Rope
from glocal.patterns import Causal, Full, Keys, Pattern
from glocal.scores import Score
from glocal.shapes import Bool, Float

__all__ = ["USES", "Attention", "Call"]

USES = ("noncausal-self", "causal-self", "noncausal-cross", "causal-cross")
"""How a mechanism can be used. Cross: keys come from another sequence, whose last positions the queries take."""


class Call(NamedTuple):
    """What a mechanism may look at besides queries, keys and values."""

    x: Tensor
    """The layer's input at the queries, ``(B, *grid_q, dim)``."""
    context: Tensor
    """What keys and values were made of, ``(B, *grid_k, kv_dim)``; ``x`` itself in self-attention."""
    real: Tensor | None
    """Which keys are no padding, ``(B, Nk)`` with the grid flattened; None where all are real."""
    cache: Cache | None
    cross: bool
    at: tuple[Tensor | None, Tensor | None] = (None, None)
    """Positions of queries and keys, as rotary embeddings take them."""


class Attention(nn.Module):
    """Multi-head softmax attention; what a query sees is decided by `where`, which a mechanism overrides.

    The other parts that a mechanism can put something of its own for: `make` (projections), `share` (heads before
    scoring), `score` (bias), `mix` (scoring, normalisation and values), `combine` (heads after it). Mechanisms with
    different parts go together: ``class Both(One, Other)``. Projections are named as in Llama.

    Args:
        dim: channels of the input and the output.
        num_heads: query heads.
        num_kv_heads: key heads, a divisor of ``num_heads``; as many where None.
        head_dim: channels of a head; ``dim // num_heads`` where None.
        kv_dim: channels of the context, where it is not ``dim``.
        causal: no query sees what comes after it.
        qkv_bias, out_bias: whether the projections have biases.
        qk_norm: ``"rms"`` or ``"layer"`` normalises queries and keys of each head, ``"rms_all"`` over all heads.
        rope: rotary positions.
        scale: of the scores; ``head_dim ** -0.5`` where None.
        softcap: scores become ``softcap * tanh(scores / softcap)``, as in Gemma 2.
        dropout: of the attention probabilities, in training.
        backend: as in `glocal.attend`.
        lepe: side of a depthwise convolution of the values over their image, which is added to what is attended to
            (Dong et al., 2021, arXiv 2107.00652); none where None.
        gate: multiplies that, before the output projection, by one more projection of the input.
        project: False leaves out the projections, for `mix` and `step` on queries, keys and values made elsewhere.

    Raises:
        ValueError: numbers that do not divide, or a use that the mechanism does not have.

    >>> import torch
    >>> from glocal.nn import Attention
    >>> layer = Attention(64, 4, num_kv_heads=2, causal=True)
    >>> layer(torch.randn(1, 10, 64)).shape
    torch.Size([1, 10, 64])
    """

    uses: ClassVar[tuple[str, ...]] = USES
    """The uses that the mechanism has; `glocal.inspect.uses` verifies them."""
    refuses: ClassVar[dict[str, str]] = {}
    """Why it has not the others."""
    tiny: ClassVar[dict[str, Any]] = {}
    """Settings that show the mechanism on a dozen tokens."""
    operator: Callable[..., Any] = staticmethod(attend)
    """What computes attention, with the arguments of `glocal.attend`; who looks into a layer puts another here."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        kv_dim: int | None = None,
        causal: bool = False,
        qkv_bias: bool = False,
        out_bias: bool = False,
        qk_norm: str | None = None,
        rope: Rope | None = None,
        scale: float | None = None,
        softcap: float | None = None,
        dropout: float = 0.0,
        backend: str = "auto",
        lepe: int | None = None,
        gate: bool = False,
        project: bool = True,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        for name, value in (("dim", dim), ("num_heads", num_heads), ("num_kv_heads", num_kv_heads)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1; it was {value}")
        if head_dim is None and dim % num_heads:
            raise ValueError(f"dim {dim} must be a multiple of num_heads {num_heads}, or give head_dim")
        if num_heads % num_kv_heads:
            raise ValueError(f"num_kv_heads must divide num_heads {num_heads}; it was {num_kv_heads}")
        if qk_norm not in (None, "rms", "rms_all", "layer"):
            raise ValueError(f"qk_norm must be None, 'rms', 'rms_all' or 'layer'; it was {qk_norm!r}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be at least 0 and less than 1; it was {dropout}")
        self.dim, self.num_heads, self.num_kv_heads = dim, num_heads, num_kv_heads
        self.head_dim = dim // num_heads if head_dim is None else head_dim
        self.causal, self.rope, self.dropout, self.backend = causal, rope, dropout, backend
        self.scale, self.softcap = self.head_dim**-0.5 if scale is None else scale, softcap
        if causal:
            only_cross = "causal-self" not in self.uses and "causal-cross" in self.uses
            self._has_use("causal-cross" if only_cross else "causal-self")
        self.kv_dim = kv_dim = dim if kv_dim is None else kv_dim
        self.qk_norm = qk_norm
        if not project:
            if type(self).make is not Attention.make or type(self).share is not Attention.share:
                raise ValueError(f"project must be True for {type(self).__name__}, which acts on the projections")
            return
        self.q_proj = nn.Linear(dim, num_heads * self.head_dim, bias=qkv_bias)
        self.k_proj = nn.Linear(kv_dim, num_kv_heads * self.head_dim, bias=qkv_bias)
        self.v_proj = nn.Linear(kv_dim, num_kv_heads * self.head_dim, bias=qkv_bias)
        self.o_proj = nn.Linear(num_heads * self.head_dim, dim, bias=out_bias)
        self.lepe = None if lepe is None else Depthwise(num_heads * self.head_dim, lepe)
        self.g_proj = nn.Linear(dim, num_heads * self.head_dim, bias=qkv_bias) if gate else None
        if lepe is not None and (num_kv_heads != num_heads or causal):
            raise ValueError("lepe needs values of every head and both sides of a token: not num_kv_heads or causal")
        if qk_norm is not None:
            kind = nn.LayerNorm if qk_norm == "layer" else nn.RMSNorm
            wide = qk_norm == "rms_all"
            self.q_norm = kind(self.head_dim * (num_heads if wide else 1), eps=1e-6)
            self.k_norm = kind(self.head_dim * (num_kv_heads if wide else 1), eps=1e-6)

    # What a mechanism writes.

    def where(self, q: Tensor, k: Tensor, call: Call) -> Pattern:
        """What each query sees, padding aside."""
        return Causal() if self.causal else Full()

    def make(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries ``(B, H, *grid_q, D)``, keys and values ``(B, Hkv, *grid_k, D)`` of the input and the context."""
        q, k, v = self.q_proj(x), self.k_proj(context), self.v_proj(context)
        return self.heads(q, self.num_heads), self.heads(k, self.num_kv_heads), self.heads(v, self.num_kv_heads)

    def share(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What heads take of one another, in the shapes of `make`, before norms and rotary positions."""
        return q, k, v

    def score(self, call: Call) -> Tensor | Score | None:
        """A bias on the scores."""
        return None

    def mix(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        """Values of each query, ``(B, H, *grid_q, D)``, from ``q`` of that shape and ``k``, ``v (B, Hkv, ...)``."""
        out: Tensor = self.attend(q, k, v, self.where(q, k, call), call)
        return out

    def combine(self, mixed: Tensor, call: Call) -> Tensor:
        """What becomes of the heads' outputs, ``(B, H, *grid_q, D)``, before the output projection."""
        return mixed

    def new_cache(self) -> Cache:
        """An empty cache of the policy that fits the mechanism."""
        return FullCache()

    def signals(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> dict[str, Tensor]:
        """What the cache's policy needs besides keys and values, each ``(B, heads, n, ...)``."""
        return {}

    def decode(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        """One new token, ``(B, H, 1, D)``, with a cache that does not keep everything."""
        assert call.cache is not None
        call.cache.update(k, v, **self.signals(q, k, v, call))
        return self.attend_kept(q, call)

    # What mechanisms use.

    def attend(self, q: Tensor, k: Tensor, v: Tensor, where: Pattern, call: Call, **more: Any) -> Any:
        """`glocal.attend` with the layer's scale, bias, dropout and backend, and with padding taken out."""
        settings: dict[str, Any] = {
            "bias": self.score(call),
            "scale": self.scale,
            "softcap": self.softcap,
            "dropout_p": self.dropout if self.training else 0.0,
            "backend": self.backend,
        }
        return self.operator(q, k, v, where if call.real is None else where & Keys(call.real), **(settings | more))

    def attend_kept(self, q: Tensor, call: Call, **more: Any) -> Tensor:
        """One query, ``(B, H, 1, D)``, over everything that the cache keeps."""
        assert call.cache is not None
        group = self.num_heads // self.num_kv_heads
        grouped = q.unflatten(1, (self.num_kv_heads, group))
        out = q.new_empty(())
        for part in call.cache.kept():
            heads = list(part.heads)
            real = (part.position >= 0).repeat_interleave(group, 1).expand(q.shape[0], -1, -1)
            where: Pattern = Full() if bool(real.all()) else Keys(real, per_head=True)
            mixed = self.attend(grouped[:, heads].flatten(1, 2), part.k, part.v, where, call, **more)
            if not out.dim():
                out = mixed.new_empty(*grouped.shape[:-1], mixed.shape[-1])
            out[:, heads] = mixed.unflatten(1, (len(heads), group))
        return out.flatten(1, 2)

    def heads(self, x: Tensor, count: int) -> Tensor:
        """``(B, *grid, count * D)`` to ``(B, count, *grid, D)``."""
        split: Tensor = x.unflatten(-1, (count, -1))
        return split.movedim(-2, 1)

    # The frame.

    def project(
        self, x: Tensor, context: Tensor, at_q: Tensor | None, at_k: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values by heads, normalised and rotated to their positions."""
        q, k, v = self.share(*self.make(x, context))
        if self.qk_norm is not None:
            q, k = self._normalise(q, self.q_norm), self._normalise(k, self.k_norm)
        return self.rotate(q, at_q), self.rotate(k, at_k), v

    def _normalise(self, t: Tensor, norm: nn.Module) -> Tensor:
        if self.qk_norm != "rms_all":
            return norm(t)  # type: ignore[no-any-return]
        return self.heads(norm(t.movedim(1, -2).flatten(-2)), t.shape[1])

    def rotate(self, t: Tensor, at: Tensor | None) -> Tensor:
        """``t (B, heads, *grid, D)`` rotated to positions ``at (N,)`` or ``(N, axes)``, the grid flattened."""
        if self.rope is None or at is None:
            return t
        return self.rope(t.flatten(2, -2), at).view_as(t)

    def positions(self, grid: tuple[int, ...], start: int, device: torch.device) -> Tensor:
        """Positions of a grid, flattened: ``(N,)``, or ``(N, axes)`` for rotary positions on several axes."""
        if self.rope is None or self.rope.axes == 1 or len(grid) == 1:
            return torch.arange(start, start + torch.Size(grid).numel(), device=device)
        return torch.cartesian_prod(*[torch.arange(n, device=device) for n in grid]).view(-1, len(grid))

    def forward(
        self,
        x: Float[Tensor, "B *grid_q dim"],
        context: Float[Tensor, "B *grid_k kv_dim"] | None = None,
        *,
        keys: Bool[Tensor, "B *grid_k"] | None = None,
        positions: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Float[Tensor, "B *grid_q dim"]:
        """Attend.

        Args:
            x: ``(B, *grid, dim)``.
            context: what to attend to, ``(B, *grid_k, kv_dim)``; ``x`` itself where None.
            keys: booleans ``(B, *grid_k)``, true for what is no padding.
            positions: of the tokens of ``x``, ``(N,)`` or ``(N, axes)``, for rotary embeddings; counted where None.
            cache: of `new_cache`: ``x`` are then the tokens that follow those in the cache.

        Returns:
            ``(B, *grid, dim)``.

        Raises:
            ValueError: shapes that do not fit, a use that the mechanism does not have.
        """
        if x.dim() < 3 or x.shape[-1] != self.dim:
            raise ValueError(f"x must be (B, *grid, {self.dim}); it was {tuple(x.shape)}")
        cross, kv = context is not None, x if context is None else context
        self._has_use(f"{'causal' if self.causal else 'noncausal'}-{'cross' if cross else 'self'}")
        if kv.dim() != x.dim() or kv.shape[-1] != self.kv_dim or kv.shape[0] != x.shape[0]:
            raise ValueError(
                f"context must be (B, *grid_k, {self.kv_dim}) with the batch and the axes of x "
                f"{tuple(x.shape)}; it was {tuple(kv.shape)}"
            )
        start = 0
        if cache is not None:
            if not self.causal or cross or x.dim() != 3:
                raise ValueError("cache is for causal self-attention over a sequence, one token after the other")
            if keys is not None and not cache.complete:
                raise ValueError("keys (padding) cannot be combined with a cache that drops tokens")
            start = cache.seen
        real = (x.shape[0], start + kv.shape[1]) if cache is not None else tuple(kv.shape[:-1])
        if keys is not None and (keys.dtype != torch.bool or tuple(keys.shape) != real):
            raise ValueError(f"keys must be booleans {real}; it was {keys.dtype} {tuple(keys.shape)}")
        at_k = self.positions(tuple(kv.shape[1:-1]), start, x.device) if positions is None or cross else positions
        at_q = at_k if positions is None else positions
        if cross and positions is None:  # the last positions of the context
            ahead = kv.shape[1] - x.shape[1] if x.dim() == 3 else 0
            at_q = self.positions(tuple(x.shape[1:-1]), ahead, x.device)
        q, k, v = self.project(x, kv, at_q, at_k)
        call = Call(x, kv, None if keys is None else keys.flatten(1), cache, cross, (at_q, at_k))
        mixed = self.mix(q, k, v, call) if cache is None else self.step(q, k, v, call, cache)
        mixed = self.combine(mixed, call).movedim(1, -2).flatten(-2)
        if self.lepe is not None:
            if cross or x.dim() != 4:
                raise ValueError(f"lepe needs an image (B, H, W, {self.dim}) and no context; x was {tuple(x.shape)}")
            mixed = mixed + self.lepe(v.movedim(1, -2).flatten(-2))
        if self.g_proj is not None:
            mixed = mixed * self.g_proj(x)
        out: Tensor = self.o_proj(mixed)
        return out

    def step(self, q: Tensor, k: Tensor, v: Tensor, call: Call, cache: Cache) -> Tensor:
        """Tokens that follow those in the cache, ``(B, H, n, D)``: a prompt in parallel, then one after the other."""
        if cache.complete:
            cache.update(k, v, **self.signals(q, k, v, call))
            (part,) = cache.kept()
            return self.mix(q, part.k, part.v, call)
        if cache.seen == 0 and q.shape[2] > 1:  # the prompt, in parallel
            out = self.mix(q, k, v, call._replace(cache=None))
            cache.update(k, v, **self.signals(q, k, v, call))
            return out
        steps = [slice(t, t + 1) for t in range(q.shape[2])]
        return torch.cat(
            [
                self.decode(
                    q[:, :, t], k[:, :, t], v[:, :, t], call._replace(x=call.x[:, t], context=call.context[:, t])
                )
                for t in steps
            ],
            2,
        )

    def _has_use(self, use: str) -> None:
        if use not in self.uses:
            why = self.refuses.get(use, "its definition needs queries and keys that this use does not have")
            raise ValueError(f"{type(self).__name__} has no {use} form: {why}; it has {', '.join(self.uses)}")
