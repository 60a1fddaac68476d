"""Dynamic mask attention: each key head scores its keys by their values, and a query reads only the best of them."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad, softplus

from glocal.cache import BestTokens, Cache, FullCache
from glocal.condense import best, take
from glocal.nn.frame import Attention, Call
from glocal.patterns import Causal, Full, Keys, Pattern, Selected
from glocal.shapes import Float

__all__ = ["DynamicMaskAttention"]

_LARGEST = 80.0  # e^80 is still finite in float32


class DynamicMaskAttention(Attention):
    """Each query reads the ``top_k`` visible keys of the highest value score ``b``, which is added to their logits.

    ``dt = dt_proj(v)``, one number a key head from the values of all key heads; ``b = exp(A softplus(dt))``. The
    choice is hard: ``A`` and ``dt_proj`` learn through the ``b`` of the keys that were kept. Ties go to the most
    recent key, as the scores all tie where ``A`` is 0 (elsewhere in this library they go to the first).
    Scores are computed in float32. Parameters are named as in Doge of transformers, whose attention this is with
    ``rule="exp"``. Shi et al., 2025, arXiv 2508.02124.

    A score never changes, so decoding drops for good what falls out of the ``top_k``: `glocal.cache.BestTokens`.

    With ``smooth``, keys are cut into blocks of so many and a query reads those blocks whole of which it has chosen
    more than half, and nothing else: whole tiles for a kernel, but fewer or more keys than ``top_k``, perhaps none. A
    block that is read holds keys that were not chosen, so decoding then keeps everything.

    Args:
        dim, num_heads: as in `Attention`, with all its options.
        top_k: keys of a query, ``keep_window_size`` in transformers.
        rule: ``"exp"``, or ``"log"`` for ``b = A softplus(dt)``, as in the authors' later code.
        shared_topk: one set for all queries, chosen from all keys. Without causality and for one query at a time that
            is the same; a causal sequence in parallel is refused, as its choice would look at later keys.
        smooth: keys of a block that is read whole or not at all; no blocks where None.

    Raises:
        ValueError: ``top_k`` or ``smooth`` below 1, another rule, ``shared_topk`` with several causal queries, or what
            `Attention` refuses.

    >>> import torch
    >>> from glocal.nn import DynamicMaskAttention
    >>> layer = DynamicMaskAttention(64, 4, num_kv_heads=2, top_k=16, causal=True)
    >>> layer(torch.randn(1, 100, 64)).shape
    torch.Size([1, 100, 64])
    """

    tiny: ClassVar[dict[str, Any]] = {"top_k": 3}
    chunk: ClassVar[int] = 64
    """Causal queries that choose at a time, each among ``top_k + chunk`` candidates."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        top_k: int = 2048,
        rule: str = "exp",
        shared_topk: bool = False,
        smooth: int | None = None,
        qk_norm: str | None = "rms",
        qkv_bias: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(dim, num_heads, qk_norm=qk_norm, qkv_bias=qkv_bias, **options)
        if isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1:
            raise ValueError(f"top_k must be an integer of at least 1; it was {top_k!r}")
        if rule not in ("exp", "log"):
            raise ValueError(f"rule must be 'exp' or 'log'; it was {rule!r}")
        if smooth is not None and smooth < 1:
            raise ValueError(f"smooth must be at least 1, or None; it was {smooth}")
        self.top_k, self.rule, self.shared_topk, self.smooth = top_k, rule, shared_topk, smooth
        self.A = nn.Parameter(0.02 * torch.randn(self.num_kv_heads))
        self.dt_proj = nn.Linear(self.num_kv_heads * self.head_dim, self.num_kv_heads, bias=qkv_bias)

    def value_scores(self, v: Float[Tensor, "B Hkv Nk D"]) -> Float[Tensor, "B Hkv Nk"]:
        """``b`` of each key, in float32 or better."""
        wide = torch.promote_types(v.dtype, torch.float32)
        bias = None if self.dt_proj.bias is None else self.dt_proj.bias.to(wide)
        dt = linear(v.to(wide).transpose(1, 2).flatten(2), self.dt_proj.weight.to(wide), bias).transpose(1, 2)
        scores = self.A.to(wide)[:, None] * softplus(dt)
        return scores.clamp(max=_LARGEST).exp() if self.rule == "exp" else scores

    def mix(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        grid, (q, k, v) = q.shape[2:-1], (t.flatten(2, -2) for t in (q, k, v))
        scores, queries = self.value_scores(v), q.shape[2]
        if self.causal and queries > 1:
            if self.shared_topk:
                raise ValueError(
                    f"shared_topk is for one query at a time where causal; there were {queries}, "
                    "and the set of the last would show the others later keys"
                )
            where: Pattern = Causal()
            if k.shape[2] > self.top_k or self.smooth is not None:
                chosen = self.choose(scores, queries, call.real).repeat_interleave(self._group, 1)
                where = Selected(chosen, self.smooth or 1, query_size=1)
                where = where if self.smooth is None else where & Causal()  # of the own block, what is not later
        elif self.smooth is not None:  # one list of blocks for all queries
            index = best(scores, self.top_k, allowed=None if call.real is None else call.real[:, None], ties="last")
            blocks = self.smoothed(index.unsqueeze(2), k.shape[2]).repeat_interleave(self._group, 1)
            where = Selected(blocks, self.smooth, query_size=queries)
        else:
            where = Full()
            if k.shape[2] > self.top_k:  # one set for all queries: gather it
                index = best(scores, self.top_k, allowed=None if call.real is None else call.real[:, None], ties="last")
                k, v, scores = (take(t, index) for t in (k, v, scores))
                if call.real is not None:
                    where = Keys((index >= 0).repeat_interleave(self._group, 1), per_head=True)
                call = call._replace(real=None)
        out = self.attend(q, k, v, where, call, bias=self._added(scores))
        mixed: Tensor = out.unflatten(2, grid)
        return mixed

    @torch.no_grad()
    def choose(self, scores: Tensor, queries: int, real: Tensor | None = None) -> Tensor:
        """The keys of each causal query, ``(B, Hkv, Nq, top_k)``, or its blocks with ``smooth``; -1 for none.

        The best of all keys so far are among the best before the chunk and the chunk itself.
        """
        keys, device = scores.shape[-1], scores.device
        real = torch.ones_like(scores, dtype=torch.bool) if real is None else real[:, None].expand_as(scores)
        start, chosen = keys - queries, []
        past = best(scores[..., :start], self.top_k, allowed=real[..., :start], ties="last")
        past = pad(past, (0, self.top_k - past.shape[-1]), value=-1)
        for at in range(start, keys, self.chunk):
            new = torch.arange(at, min(at + self.chunk, keys), device=device)
            candidates = torch.cat([past, new.expand(*past.shape[:2], -1)], -1).sort(-1).values
            allowed = (candidates >= 0) & take(real, candidates)
            visible = allowed[:, :, None] & (candidates[:, :, None] <= new[:, None])
            place = best(take(scores, candidates)[:, :, None], self.top_k, allowed=visible, ties="last")
            index = candidates[:, :, None].expand(-1, -1, len(new), -1).gather(-1, place.clamp(min=0))
            kept = torch.where(place < 0, -1, index)
            chosen.append(kept if self.smooth is None else self.smoothed(kept, keys))
            past = kept[:, :, -1]
        return torch.cat(chosen, 2)

    def smoothed(self, chosen: Tensor, keys: int) -> Tensor:
        """The blocks of which ``chosen (B, Hkv, n, K)`` has more than half: ``(B, Hkv, n, m)``, -1 for none."""
        assert self.smooth is not None
        blocks = -(-keys // self.smooth)
        block = torch.where(chosen < 0, blocks, chosen // self.smooth)  # none of them falls beyond the last
        count = torch.zeros(*chosen.shape[:3], blocks + 1, device=chosen.device)
        count = count.scatter_add(-1, block, torch.ones_like(block, dtype=count.dtype))[..., :blocks]
        return best(count, max(1, 2 * self.top_k // self.smooth), allowed=2 * count > self.smooth)

    def new_cache(self) -> Cache:
        return BestTokens(self.top_k) if self.smooth is None else FullCache()

    def signals(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> dict[str, Tensor]:
        return {"score": self.value_scores(v)}

    def decode(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        cache = call.cache
        if not isinstance(cache, BestTokens):
            raise ValueError(f"cache must be BestTokens or keep everything; it was {type(cache).__name__}")
        cache.update(k, v, **self.signals(q, k, v, call))
        return self.attend_kept(q, call, bias=self._added(cache.score))

    def _added(self, scores: Tensor) -> Tensor:
        """``(B, Hkv, Nk)`` as a bias ``(B, H, 1, Nk)``."""
        return scores.repeat_interleave(self._group, 1).unsqueeze(2)

    @property
    def _group(self) -> int:
        return self.num_heads // self.num_kv_heads

    def extra_repr(self) -> str:
        smooth = "" if self.smooth is None else f", smooth={self.smooth}"
        return f"top_k={self.top_k}, rule={self.rule!r}{smooth}" + (", shared_topk=True" if self.shared_topk else "")
