"""Mixture of block attention: each query reads the few key blocks whose mean key it agrees with most."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from glocal.cache import BlockCache, Cache
from glocal.condense import blocks_before, choose_blocks, own_block, pool_blocks, real_tokens
from glocal.nn.frame import Attention, Call
from glocal.patterns import Causal, Pattern, Selected

__all__ = ["MixtureOfBlocksAttention"]


class MixtureOfBlocksAttention(Attention):
    """Each query and head reads ``top_k`` key blocks: the own one, and the past ones of the highest ``q . mean(k)``.

    Parameter free, so that it can be exchanged with full attention at any time. The choice is hard: learning goes
    through the keys that were chosen. Scores are compared in float32, ties go to the earlier block.
    Lu et al., 2025, arXiv 2502.13189.

    Args:
        dim, num_heads: as in `Attention`, with all its options.
        block_size: tokens of a block; the last one may be short.
        top_k: blocks of a query, its own included.

    Without causality there is no past: self-attention keeps the own block and chooses among all others, and
    cross-attention chooses among all, as no block is its own.

    Raises:
        ValueError: a size below 1, causal cross-attention, or what `Attention` refuses.

    >>> import torch
    >>> from glocal.nn import MixtureOfBlocksAttention
    >>> layer = MixtureOfBlocksAttention(64, 4, block_size=16, top_k=2, causal=True)
    >>> layer(torch.randn(1, 100, 64)).shape
    torch.Size([1, 100, 64])
    """

    uses = ("noncausal-self", "causal-self", "noncausal-cross")
    refuses: ClassVar[dict[str, str]] = {"causal-cross": "a query outside the context has no block of its own there"}
    tiny: ClassVar[dict[str, Any]] = {"block_size": 3, "top_k": 2}

    def __init__(self, dim: int, num_heads: int, *, block_size: int = 512, top_k: int = 3, **options: Any) -> None:
        super().__init__(dim, num_heads, **options)
        for name, value in (("block_size", block_size), ("top_k", top_k)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1; it was {value}")
        self.block_size, self.top_k = block_size, top_k

    def where(self, q: Tensor, k: Tensor, call: Call) -> Pattern:
        blocks = self.choose(q, k, call)
        chosen = Selected(blocks, self.block_size, query_size=1)
        return chosen & Causal() if self.causal else chosen

    @torch.no_grad()
    def choose(self, q: Tensor, k: Tensor, call: Call) -> Tensor:
        """The blocks of each query, ``(B, H, Nq, top_k)``, -1 for none."""
        queries, keys = q.shape[2], k.shape[2]
        count, real = -(-keys // self.block_size), None
        if isinstance(call.cache, BlockCache) and call.cache.pooled is not None and call.real is None:
            # A block that is not complete has no mean there; it is the own one, so that its score does not count.
            means = pad(call.cache.pooled, (0, 0, 0, count - call.cache.pooled.shape[2]))
        else:
            real = None if call.real is None else call.real[:, None]
            means = pool_blocks(k, self.block_size, real=real)
        some = None if real is None else real_tokens(k, self.block_size, real).any(-1)[:, :, None]
        group = self.num_heads // self.num_kv_heads
        scores = q.float() @ means.float().repeat_interleave(group, 1).mT
        if call.cross:
            return choose_blocks(scores, self.top_k, allowed=some)
        own = own_block(queries, keys, self.block_size, q.device)[:, None] == torch.arange(count, device=q.device)
        past = blocks_before(queries, keys, self.block_size, q.device) if self.causal else None
        allowed = past if some is None else some if past is None else past & some
        return choose_blocks(scores, self.top_k, allowed=allowed, forced=own)

    def new_cache(self) -> Cache:
        return BlockCache(self.block_size)

    def extra_repr(self) -> str:
        return f"block_size={self.block_size}, top_k={self.top_k}"
