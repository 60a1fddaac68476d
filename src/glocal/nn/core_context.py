"""Core context aware attention: near tokens as they are, each group of far ones pooled by its last query."""

from __future__ import annotations

from functools import reduce
from operator import or_
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from glocal.attention import merge
from glocal.cache import Cache
from glocal.cache.cores import CoreCache, pool_cores
from glocal.condense import real_tokens
from glocal.nn.frame import Attention, Call
from glocal.patterns import Between, Full, Pattern

__all__ = ["CoreContextAttention"]

Spans = list[tuple[Tensor, Tensor]]


class CoreContextAttention(Attention):
    """A query reads the tokens of its local span and, for each group of tokens before it, one core token.

    The core of a group is the mean of its keys, and of its values, weighted by a softmax of ``q_last . k_j * scale``
    with the query of the group's last token. There are no new parameters, so that a pretrained model can be tuned to
    it. Query ``i`` sees ``j = max(0, (i + 1 - window) // group_size)`` cores and the tokens from ``j * group_size`` on:
    every past token exactly once. Core Context Aware Attention, 2024, arXiv 2412.12465.

    Keys are weighed rotated, pooled unrotated, and rotated to the last position of their group. Query heads that share
    a key head pool with the mean of their queries (the mean of their logits), so that the cache keeps one core a key
    head. Tokens after the last complete group are never pooled; a group with padding is pooled over its real tokens.

    Args:
        dim, num_heads: as in `Attention`, with all its options.
        group_size: tokens that one core stands for.
        window: tokens that are raw at least; the span holds less than ``window + group_size``.
        pool_rotated: pool the rotated keys and leave them as they are.
        fusion: ``"softmax"`` over cores and tokens at once; ``"lse"``, which is the same from two attentions;
            ``"mean"`` of the two attentions, where a query has both.
        group_bias: add ``log`` of the number of its tokens to the score of a core.

    Without causality a query also sees the cores of the groups that begin ``window`` or more after it.
    Cross-attention has no local span: it reads all cores, pooled by queries made of the context, and the tokens after
    the last complete group.

    Raises:
        ValueError: a size below 1, an unknown fusion, ``kv_dim`` other than ``dim``, positions that do not count up
            by one, causal cross-attention, or what `Attention` refuses.

    >>> import torch
    >>> from glocal.nn import CoreContextAttention
    >>> layer = CoreContextAttention(64, 4, group_size=4, window=8, causal=True)
    >>> cache, x = layer.new_cache(), torch.randn(1, 100, 64)
    >>> steps = torch.cat([layer(x[:, t : t + 1], cache=cache) for t in range(100)], 1)
    >>> torch.allclose(steps, layer(x), atol=1e-5), cache.kept()[0].k.shape[2]
    (True, 31)
    """

    uses = ("noncausal-self", "causal-self", "noncausal-cross")
    refuses: ClassVar[dict[str, str]] = {"causal-cross": "its local span ends at a query that is one of the keys"}
    tiny: ClassVar[dict[str, Any]] = {"group_size": 2, "window": 3}

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        group_size: int = 16,
        window: int = 1024,
        pool_rotated: bool = False,
        fusion: str = "softmax",
        group_bias: bool = False,
        **options: Any,
    ) -> None:
        if (kv_dim := options.get("kv_dim") or dim) != dim:
            raise ValueError(f"kv_dim must be dim {dim}: pooling queries are made of the context; it was {kv_dim}")
        super().__init__(dim, num_heads, **options)
        for name, value in (("group_size", group_size), ("window", window)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1; it was {value}")
        if fusion not in ("softmax", "lse", "mean"):
            raise ValueError(f"fusion must be 'softmax', 'lse' or 'mean'; it was {fusion!r}")
        if fusion == "mean" and group_bias:
            raise ValueError("group_bias must be False with fusion='mean', where cores do not compete with tokens")
        self.group_size, self.window, self.pool_rotated = group_size, window, pool_rotated
        self.fusion, self.group_bias = fusion, group_bias

    # Pooling.

    def pooling_query(self, q: Tensor) -> Tensor:
        """The query that a group's last token pools with: ``q (B, H, N, D)``, its mean for each key head."""
        shared: Tensor = q.unflatten(1, (self.num_kv_heads, -1)).mean(2)
        return shared

    def turned(self, k: Tensor, start: int) -> Tensor:
        """Keys as rotated to the last position of their group; ``start`` is the first one's place."""
        if self.pool_rotated or self.rope is None:
            return k
        # Rotations add up: what is left to turn is the distance to the end of the group.
        place = torch.arange(start, start + k.shape[2], device=k.device) % self.group_size
        return self.rope(k, self.group_size - 1 - place)

    def cores(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Keys and values of all complete groups, ``(B, Hkv, U, D)``, which of them have a token, and their biases."""
        size = self.group_size
        whole = k.shape[2] // size * size
        if call.cross:
            at = self.positions((k.shape[2],), 0, k.device)
            q = self.project(call.context, call.context, at, at)[0]
        real = None if call.real is None else call.real[:, None, :whole]
        query, end = self.pooling_query(q)[:, :, :whole], slice(whole)
        core_k, core_v = pool_cores(
            query, k[:, :, end], size, self.turned(k, 0)[:, :, end], v[:, :, end], scale=self.scale, real=real
        )
        if real is None:
            return core_k, core_v, None, self._bias(k.new_full((1, core_k.shape[2]), size))
        count = real_tokens(k[:, :, end], size, real).sum(-1)[:, 0]
        return core_k, core_v, count > 0, self._bias(count.clamp(min=1).to(k.dtype))

    def _bias(self, count: Tensor) -> Tensor | None:
        return count.log()[:, None, None] if self.group_bias else None

    # Where each query looks.

    def spans(self, queries: int, keys: int, cross: bool, device: torch.device) -> tuple[Spans, Spans]:
        """The cores and the tokens that each query sees, as intervals ``[lo, hi)``."""
        size = self.group_size
        i = torch.arange(queries, device=device)
        zero, end, groups = torch.zeros_like(i), torch.full_like(i, keys), torch.full_like(i, keys // size)
        if cross:
            return [(zero, groups)], [(groups * size, end)]
        before = (i + 1 - self.window).clamp(min=0) // size
        if self.causal:
            return [(zero, before)], [(before * size, i + 1)]
        after = torch.minimum((i + self.window + size - 1) // size, groups)
        return [(zero, before), (after, groups)], [(before * size, after * size), (groups * size, end)]

    # Attention.

    def mix(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        core_k, core_v, some, bias = self.cores(q, k, v, call)
        seen, near = self.spans(q.shape[2], k.shape[2], call.cross, q.device)
        if self.fusion != "softmax":
            far = self.attend(q, core_k, core_v, _union(seen), call._replace(real=some), bias=bias, return_lse=True)
            return self._fuse(far, self.attend(q, k, v, _union(near), call, return_lse=True))
        # One attention over the cores and, after them, the tokens.
        groups = core_k.shape[2]
        where = _union([*seen, *((lo + groups, hi + groups) for lo, hi in near)])
        real = None if call.real is None or some is None else torch.cat([some, call.real], 1)
        bias = None if bias is None else pad(bias, (0, k.shape[2]))
        k, v = torch.cat([core_k, k], 2), torch.cat([core_v, v], 2)
        out: Tensor = self.attend(q, k, v, where, call._replace(real=real), bias=bias)
        return out

    def _fuse(self, far: tuple[Tensor, Tensor], near: tuple[Tensor, Tensor]) -> Tensor:
        if self.fusion == "lse":
            return merge([far, near])
        parts = (far[1] > -torch.inf).int() + (near[1] > -torch.inf).int()
        return (far[0] + near[0]) / parts.clamp(min=1).unsqueeze(-1).to(far[0].dtype)

    # Decoding.

    def new_cache(self) -> Cache:
        return CoreCache(self.group_size, self.window, self.scale)

    def signals(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> dict[str, Tensor]:
        assert call.cache is not None
        return {"query": self.pooling_query(q), "turned": self.turned(k, call.cache.seen)}

    def decode(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        assert isinstance(call.cache, CoreCache)
        call.cache.update(k, v, **self.signals(q, k, v, call))
        n = call.cache.cores
        bias = self._bias(k.new_full((1, n), self.group_size))
        if self.fusion != "mean":
            rest = call.cache.seen - n * self.group_size
            return self.attend_kept(q, call, bias=None if bias is None else pad(bias, (0, rest)))
        (part,) = call.cache.kept()
        halves = ((part.k[:, :, half], part.v[:, :, half]) for half in (slice(n), slice(n, None)))
        far, near = (self.attend(q, *half, Full(), call, return_lse=True) for half in halves)
        return self._fuse(far, near)

    def project(
        self, x: Tensor, context: Tensor, at_q: Tensor | None, at_k: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        if x.dim() != 3:
            raise ValueError(
                f"x must be (B, *grid, {self.dim}) with a grid of one axis, as groups are runs; it was {tuple(x.shape)}"
            )
        if at_k is not None and self.rope is not None and bool((at_k.diff() != 1).any()):
            raise ValueError("positions must count up by one, so that a group has one last position")
        return super().project(x, context, at_q, at_k)

    def extra_repr(self) -> str:
        return f"group_size={self.group_size}, window={self.window}, fusion={self.fusion!r}"


def _union(spans: Spans) -> Pattern:
    """The union of disjoint intervals."""
    return reduce(or_, (Between(lo, hi) for lo, hi in spans))
