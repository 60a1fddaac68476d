"""Prefix global attention: the first tokens see and are seen by all, the rest looks around itself."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from glocal.cache import Cache, WindowCache
from glocal.nn.frame import Attention, Call
from glocal.nn.longt5 import bucket_table
from glocal.patterns import Pattern, Sinks, Sliding, Tokens
from glocal.scores import Score, T5Buckets

__all__ = ["PrefixGlobalAttention"]


class PrefixGlobalAttention(Attention):
    """The first ``prefix`` tokens see all and are seen by all; the others see ``radius`` tokens to either side.

    For inputs whose important part is known, and put first. The prefix are tokens like all others, with the same
    projections. Burns et al., 2023, arXiv 2305.03668. T5's conventions are ``num_buckets=32, scale=1.0``.

    With ``causal=True`` no token sees what comes after it, so the prefix no longer sees the rest: it is a set of
    attention sinks before a window, and half of the mechanism is gone.

    Args:
        dim, num_heads: as in `Attention`, with all its options.
        prefix: global tokens; all tokens where there are fewer.
        radius: how far the others see: ``|i - j| <= radius``.
        num_buckets, max_distance: of a learned bias, `glocal.scores.T5Buckets`; none where ``num_buckets`` is None.
        bias: ``Embedding(buckets, num_heads)``, given to share one among layers, instead of ``num_buckets``.

    Raises:
        ValueError: a size below 0, a bias of other heads, a cross use, or what `Attention` refuses.

    >>> import torch
    >>> from glocal.nn import PrefixGlobalAttention
    >>> layer = PrefixGlobalAttention(64, 4, prefix=8, radius=7)
    >>> layer(torch.randn(1, 100, 64)).shape
    torch.Size([1, 100, 64])
    >>> layer.pattern(128).count(128) / 128**2
    0.2275390625
    """

    uses = ("noncausal-self", "causal-self")
    refuses: ClassVar[dict[str, str]] = {
        "noncausal-cross": "the window needs one index for queries and keys",
        "causal-cross": "the window needs one index for queries and keys",
    }
    tiny: ClassVar[dict[str, Any]] = {"prefix": 2, "radius": 2, "num_buckets": 8}

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        prefix: int = 512,
        radius: int = 127,
        num_buckets: int | None = None,
        max_distance: int = 128,
        bias: nn.Embedding | None = None,
        **options: Any,
    ) -> None:
        super().__init__(dim, num_heads, **options)
        for name, value in (("prefix", prefix), ("radius", radius)):
            if value < 0:
                raise ValueError(f"{name} must be at least 0; it was {value}")
        self.prefix, self.radius, self.max_distance = prefix, radius, max_distance
        some = bias is not None or num_buckets is not None
        self.bias = bucket_table(bias, num_buckets or 0, num_heads, max_distance) if some else None

    def pattern(self, length: int) -> Pattern:
        """What is seen in a sequence of ``length`` tokens."""
        if self.causal:
            return Sinks(self.prefix) | Sliding(self.radius, 0)
        return Tokens(range(min(self.prefix, length))) | Sliding(self.radius, self.radius)

    def where(self, q: Tensor, k: Tensor, call: Call) -> Pattern:
        return self.pattern(k.shape[2])

    def score(self, call: Call) -> Score | None:
        if self.bias is None:
            return None
        return T5Buckets(self.bias.weight, bidirectional=not self.causal, max_distance=self.max_distance)

    def new_cache(self) -> Cache:
        return WindowCache(self.radius + 1, sinks=self.prefix)

    def decode(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        score = self.score(call)
        if score is None or call.cache is None:
            return super().decode(q, k, v, call)
        call.cache.update(k, v)
        (part,) = call.cache.kept()
        # What is kept is no sequence without gaps: the bias by the position of each key. Far ones share a bucket.
        distance = (call.cache.seen - 1 - part.position[0, 0]).clamp(max=self.max_distance)
        line = score.table((1,), (self.max_distance + 1,))
        return self.attend_kept(q, call, bias=line[:, self.max_distance - distance].unsqueeze(1))

    def extra_repr(self) -> str:
        return f"prefix={self.prefix}, radius={self.radius}"
