"""Native sparse attention: compressed blocks, the blocks chosen by them, and a window, each gated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from glocal.cache import Cache, CompressedCache, LatentCache, WindowCache
from glocal.condense import choose_blocks, overlapping_blocks, own_block, pool_overlapping, real_tokens, share_heads
from glocal.nn.frame import Attention, Call
from glocal.patterns import Between, Causal, Full, Selected, Sliding

__all__ = ["BRANCHES", "NativeSparseAttention"]

BRANCHES = ("compress", "select", "slide")

_NO_CROSS = "the own block, the one before it and the window need one index for queries and keys"
_SCORES = 2**24  # scores of compressed blocks that are held at a time


class MeanPool(nn.Module):
    """The mean of each block ``(B, H, blocks, size, D)`` over what is ``inside (B, 1, blocks, size)``."""

    def forward(self, blocks: Tensor, inside: Tensor | None = None) -> Tensor:
        if inside is None:
            return blocks.mean(-2)
        total = blocks.masked_fill(~inside.unsqueeze(-1), 0).mean(-2)
        return total * (blocks.shape[-2] / inside.sum(-1, keepdim=True).clamp(min=1)).to(total.dtype)


class LearnedPool(nn.Module):
    """Each block, with a learned embedding for each of its places, through two linear layers with ReLU between."""

    def __init__(self, heads: int, size: int, dim: int) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.zeros(heads, 1, size, dim))
        self.fc1, self.fc2 = nn.Linear(size * dim, size * dim), nn.Linear(size * dim, dim)

    def forward(self, blocks: Tensor, inside: Tensor | None = None) -> Tensor:
        placed = blocks + self.place
        if inside is not None:
            placed = placed.masked_fill(~inside.unsqueeze(-1), 0)
        return cast(Tensor, self.fc2(self.fc1(placed.flatten(-2)).relu()))


class NativeSparseAttention(Attention):
    """Three attentions over the same keys, added up with a gate for each token, head and branch.

    *compress* sees one key and value for each complete block of the past. *select* sees the tokens of the first, the
    own and the previous block and of those that the compressed keys give the highest probability, summed over the
    query heads of a key head. *slide* sees a window. Gates are sigmoids of a linear layer of the input; a single
    branch has none. The choice is hard: the compressed branch trains it. A query before the first complete block gets
    zeros from *compress*. Yuan et al., 2025, arXiv 2502.11089.

    Args:
        dim, num_heads: as in `Attention`, with all its options.
        branches: some of ``"compress"``, ``"select"``, ``"slide"``.
        compress: how a block becomes one key: ``"mean"``, or ``"mlp"``, learned.
        compress_size, compress_stride: tokens of a compressed block, and from one to the next.
        block_size: tokens of a block that is chosen.
        top_k: chosen blocks, the three forced ones included.
        window: keys, the query's own included.

    Without causality blocks, choice and window reach to both sides, and a short last block is compressed too.

    Raises:
        ValueError: a size below 1, ``top_k`` below 3, an unknown branch, a cross use, or what `Attention` refuses.

    >>> import torch
    >>> from glocal.nn import NativeSparseAttention
    >>> sizes = dict(compress_size=8, compress_stride=4, block_size=16, top_k=4, window=16)
    >>> layer = NativeSparseAttention(64, 4, num_kv_heads=2, causal=True, **sizes)
    >>> layer(torch.randn(1, 100, 64)).shape
    torch.Size([1, 100, 64])
    """

    uses = ("noncausal-self", "causal-self")
    refuses: ClassVar[dict[str, str]] = {"noncausal-cross": _NO_CROSS, "causal-cross": _NO_CROSS}
    tiny: ClassVar[dict[str, Any]] = {
        "compress_size": 2,
        "compress_stride": 1,
        "block_size": 2,
        "top_k": 4,
        "window": 3,
    }

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        branches: Sequence[str] = BRANCHES,
        compress: str = "mean",
        compress_size: int = 32,
        compress_stride: int = 16,
        block_size: int = 64,
        top_k: int = 16,
        window: int = 512,
        **options: Any,
    ) -> None:
        super().__init__(dim, num_heads, **options)
        sizes = {"compress_size": compress_size, "compress_stride": compress_stride, "block_size": block_size}
        for name, value in {**sizes, "window": window}.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1; it was {value}")
        if compress_stride > compress_size:
            raise ValueError(f"compress_stride must be at most compress_size {compress_size}; it was {compress_stride}")
        if top_k < 3:
            raise ValueError(f"top_k must be at least 3, the first, the own and the previous block; it was {top_k}")
        if not branches or len(set(branches)) != len(branches) or not set(branches) <= set(BRANCHES):
            raise ValueError(f"branches must be some of {', '.join(BRANCHES)}, each once; it was {branches!r}")
        if compress not in ("mean", "mlp"):
            raise ValueError(f"compress must be 'mean' or 'mlp'; it was {compress!r}")
        self.branches = tuple(name for name in BRANCHES if name in branches)
        self.compress_size, self.compress_stride, self.block_size = compress_size, compress_stride, block_size
        self.top_k, self.window = top_k, window
        if self.branches != ("slide",):
            learned = compress == "mlp"
            self.k_pool, self.v_pool = (
                LearnedPool(self.num_kv_heads, compress_size, self.head_dim) if learned else MeanPool()
                for _ in range(2)
            )
        if len(self.branches) > 1:
            self.gate_proj = nn.Linear(dim, num_heads * len(self.branches), bias=False)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        if q.dim() != 4:
            raise ValueError(f"x must be a sequence (B, N, {self.dim}); it was {tuple(call.x.shape)}")
        outs = []
        if self.branches != ("slide",):
            keys, values, some = self.compress(k, v, call)
            hi = self.complete_blocks(q.shape[2], k.shape[2], keys.shape[2], q.device)
            where = Full() if hi is None else Between(torch.zeros_like(hi), hi)
            out, lse = self.attend(q, keys, values, where, call._replace(real=some), return_lse=True)
            if "compress" in self.branches:
                outs.append(out)
            if "select" in self.branches:
                blocks = self.choose(q, k, keys, lse, call, hi, some)
                group = self.num_heads // self.num_kv_heads
                chosen = Selected(blocks.repeat_interleave(group, 1), self.block_size, query_size=1)
                outs.append(self.attend(q, k, v, chosen & Causal() if self.causal else chosen, call))
        if "slide" in self.branches:
            outs.append(self.attend(q, k, v, Sliding(self.window - 1, 0 if self.causal else self.window - 1), call))
        if len(outs) == 1:
            return cast(Tensor, outs[0])
        gates = self.heads(self.gate_proj(call.x), self.num_heads).sigmoid()
        return cast(Tensor, sum(gate * out for gate, out in zip(gates.split(1, -1), outs, strict=True)))

    def compress(self, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys and values of the blocks, ``(B, Hkv, blocks, D)``, and which of them count, ``(B, blocks)``."""
        if call.real is None and isinstance(call.cache, CompressedCache | LatentCache) and call.cache.compressed:
            return (*call.cache.compressed, None)
        size, stride, length = self.compress_size, self.compress_stride, k.shape[2]
        tail = 0 if self.causal else max(size - length, (size - length) % stride)  # a short last block
        inside, some = None, None
        if tail or call.real is not None:
            real = torch.ones_like(k[:, 0, :, 0], dtype=torch.bool) if call.real is None else call.real
            inside = pool_overlapping(pad(real, (0, tail))[:, None, :, None], size, stride).squeeze(-1)
            if call.real is not None:  # a block counts for a token that the one before it has not
                some = torch.cat([inside[:, 0, :1].any(-1), inside[:, 0, 1:, size - stride :].any(-1)], -1)
        blocks = [pool_overlapping(pad(t, (0, 0, 0, tail)), size, stride) for t in (k, v)]
        return self.k_pool(blocks[0], inside), self.v_pool(blocks[1], inside), some

    def complete_blocks(self, queries: int, keys: int, blocks: int, device: torch.device) -> Tensor | None:
        """How many compressed blocks end at or before each query, ``(Nq,)``; None where there is no past."""
        if not self.causal:
            return None
        after = torch.arange(keys - queries, keys, device=device) + 1 - self.compress_size
        return (after.div(self.compress_stride, rounding_mode="floor") + 1).clamp(0, blocks)

    @torch.no_grad()
    def choose(
        self, q: Tensor, k: Tensor, compressed: Tensor, lse: Tensor, call: Call, hi: Tensor | None, some: Tensor | None
    ) -> Tensor:
        """The blocks of each query and key head, ``(B, Hkv, Nq, top_k)``, -1 for none.

        A block's importance is the probability of the ``compressed`` keys, weighted by how much of them lies in it.
        """
        (queries, keys), count = (q.shape[2], k.shape[2]), compressed.shape[2]
        number = torch.arange(-(-keys // self.block_size), device=q.device)
        own = own_block(queries, keys, self.block_size, q.device)[:, None]
        real = None if call.real is None else call.real[:, None]
        held = real_tokens(k, self.block_size, real).any(-1).unsqueeze(-2)
        forced = ((number == 0) | (number == own) | (number == own - 1)) & held
        allowed = ((number <= own) if self.causal else (number >= 0)) & held
        overlap = overlapping_blocks(count, self.compress_size, self.compress_stride, self.block_size, len(number))
        seen = torch.ones(queries, count, dtype=torch.bool, device=q.device)
        if hi is not None:
            seen = torch.arange(count, device=q.device) < hi[:, None]
        seen = seen if some is None else seen & some[:, None, None]
        group, wide = self.num_heads // self.num_kv_heads, lse.dtype
        mine, chosen = compressed.to(wide).repeat_interleave(group, 1).mT, []
        for rows in torch.arange(queries).split(max(1, _SCORES // max(1, q.shape[0] * q.shape[1] * count))):
            at = slice(int(rows[0]), int(rows[-1]) + 1)
            share = (self.scale * (q[:, :, at].to(wide) @ mine) - lse[:, :, at, None]).exp()
            share = share_heads(share.masked_fill(~seen[..., at, :], 0), self.num_kv_heads)
            scores = share @ overlap.to(share)
            chosen.append(choose_blocks(scores, self.top_k, allowed=allowed[..., at, :], forced=forced[..., at, :]))
        return torch.cat(chosen, 2)

    def new_cache(self) -> Cache:
        if self.branches == ("slide",):
            return WindowCache(self.window)
        return CompressedCache(self.compress_size, self.compress_stride, self.k_pool, self.v_pool)

    def extra_repr(self) -> str:
        sizes = f"compress_size={self.compress_size}, compress_stride={self.compress_stride}"
        return (
            f"branches={self.branches}, {sizes}, block_size={self.block_size}, top_k={self.top_k}, window={self.window}"
        )
