"""Training-free block-sparse attention over many views: pooled blocks say which key blocks a query block reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from glocal.attention import merge
from glocal.condense import best, pool_blocks, real_tokens
from glocal.nn.frame import Attention, Call
from glocal.patterns import Full, Pattern, Selected
from glocal.patterns.hilbert import hilbert_order
from glocal.shapes import Float

__all__ = ["BlockSparseAttention", "Views"]


@dataclass(frozen=True)
class Views:
    """How the tokens of several pictures follow each other: of each its special tokens, then its patches row by row.

    The last view may be cut short.

    Args:
        special: tokens before the patches (cameras, registers).
        patches: rows and columns.

    Raises:
        ValueError: a negative number of special tokens, or a side below 1.

    >>> Views(1, (1, 2)).positions(6).tolist()
    [[0, 0], [1, 1], [1, 2], [0, 0], [1, 1], [1, 2]]
    """

    special: int
    patches: tuple[int, int]

    def __post_init__(self) -> None:
        object.__setattr__(self, "patches", tuple(self.patches))
        if self.special < 0:
            raise ValueError(f"special must be at least 0; it was {self.special}")
        if len(self.patches) != 2 or min(self.patches) < 1:
            raise ValueError(f"patches must be (rows, columns), each at least 1; it was {self.patches}")

    @property
    def tokens(self) -> int:
        """Tokens of a view."""
        return self.special + self.patches[0] * self.patches[1]

    def positions(self, length: int, device: torch.device | None = None) -> Tensor:
        """Row and column of each of ``length`` tokens, ``(length, 2)``, counted from 1; special tokens are at 0."""
        place = torch.arange(length, device=device) % self.tokens - self.special
        at = torch.stack([place // self.patches[1], place % self.patches[1]], -1) + 1
        return at.masked_fill(place[:, None] < 0, 0)

    def parts(
        self, length: int, order: Tensor | None = None, device: torch.device | None = None
    ) -> tuple[Tensor, Tensor]:
        """Where the special tokens are and where the patches, those of each view in ``order (h * w,)``."""
        index = torch.arange(length, device=device)
        place = index % self.tokens - self.special
        special, patches = index[place < 0], index[place >= 0]
        if order is not None:
            rank = order.to(index.device).argsort()[place[patches]]
            patches = patches[(patches // self.tokens * self.tokens + rank).argsort()]
        return special, patches


class BlockSparseAttention(Attention):
    """Patch queries read the special tokens and, in each head, the patch blocks that pooled scores rank highest.

    Queries are pooled in blocks of ``query_size``, keys in blocks of ``key_size``, over the patches of all views one
    after the other, so that a block may straddle two views. ``P = softmax(pooled q . pooled k)`` ranks the key blocks
    of a query block; the best are kept, ``ratio`` of them in any case and as many as hold ``mass`` of P. One softmax
    runs over what is kept. Special tokens are read by all, and read all. Nothing is learned: the weights are those
    of full attention. Wang et al., 2025, arXiv 2509.07120.

    The released code differs in four ways. Its ratio is the share that is *removed*. Its mass rule stops before the
    block that reaches the mass, ours includes it. Where the patches are no multiple of ``key_size`` its first special
    keys fall into the last patch block and can be lost; here special keys are apart. Its kernel rounds to 8 bits.

    Args:
        dim, num_heads: as in `Attention`, with all its options. Rotary positions on two axes are those of `Views`.
        patches: rows and columns of a view.
        special: tokens of a view before its patches.
        ratio: the share of key blocks that is always kept, rounded down; at least one block is.
        mass: keep blocks until they hold this share of P; 0 turns it off, 1 keeps everything.
        query_size, key_size: patches of a block; the last one may be short.
        pool: ``"mean"`` or ``"max"``.
        order: ``"raster"``, or ``"hilbert"`` for blocks that are compact regions of a view.

    After a call ``last_kept`` and ``last_mass``, both ``(B, H, query blocks)``, say what share of the key blocks each
    query block read, and what share of P they hold.

    Raises:
        ValueError: a size below 1, a share outside 0 to 1, a causal use, or what `Attention` refuses.

    >>> import torch
    >>> from glocal.nn import BlockSparseAttention
    >>> layer = BlockSparseAttention(64, 4, patches=(8, 8), special=5, ratio=0.25, mass=0, query_size=16, key_size=8)
    >>> layer(torch.randn(1, 3 * 69, 64)).shape, layer.last_kept.mean().item()
    (torch.Size([1, 207, 64]), 0.25)
    """

    uses = ("noncausal-self", "noncausal-cross")
    refuses: ClassVar[dict[str, str]] = {
        "causal-self": "a block of queries chooses together, so that the first would depend on the last",
        "causal-cross": "a block of queries chooses together, so that the first would depend on the last",
    }
    tiny: ClassVar[dict[str, Any]] = {
        "patches": (2, 2),
        "special": 1,
        "ratio": 0.5,
        "mass": 0.0,
        "query_size": 3,
        "key_size": 2,
    }

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        patches: tuple[int, int],
        special: int = 5,
        ratio: float = 0.25,
        mass: float = 0.9,
        query_size: int = 128,
        key_size: int = 64,
        pool: str = "mean",
        order: str = "raster",
        **options: Any,
    ) -> None:
        super().__init__(dim, num_heads, **options)
        for name, share in (("ratio", ratio), ("mass", mass)):
            if not 0 <= share <= 1:
                raise ValueError(f"{name} must be from 0 to 1; it was {share}")
        for name, size in (("query_size", query_size), ("key_size", key_size)):
            if size < 1:
                raise ValueError(f"{name} must be at least 1; it was {size}")
        if pool not in ("mean", "max"):
            raise ValueError(f"pool must be 'mean' or 'max'; it was {pool!r}")
        if order not in ("raster", "hilbert"):
            raise ValueError(f"order must be 'raster' or 'hilbert'; it was {order!r}")
        self.views = Views(special, patches)
        self.ratio, self.mass, self.query_size, self.key_size = ratio, mass, query_size, key_size
        self.pool, self.order = pool, order
        self._curve = hilbert_order(*patches) if order == "hilbert" else None
        self.last_kept: Tensor | None = None
        self.last_mass: Tensor | None = None

    def positions(self, grid: tuple[int, ...], start: int, device: torch.device) -> Tensor:
        if self.rope is not None and self.rope.axes == 2:
            return self.views.positions(torch.Size(grid).numel(), device)
        return super().positions(grid, start, device)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        grid = q.shape[2:-1]
        q, k, v = q.flatten(2, -2), k.flatten(2, -2), v.flatten(2, -2)
        special, patches = self.views.parts(q.shape[2], self._curve, q.device)
        special_keys, patch_keys = self.views.parts(k.shape[2], self._curve, k.device)
        outs, picked = [], q[:, :, patches]
        if len(special):
            outs.append(self.attend(q[:, :, special], k, v, Full(), call))
        if len(patches):
            blocks: Pattern = Full()
            if len(patch_keys):
                real = None if call.real is None else call.real[:, None, patch_keys]
                # In self-attention the padding among the keys is the padding among the queries.
                own = None if call.real is None or call.cross else call.real[:, None, patches]
                blocks = self.choose(picked, k[:, :, patch_keys], own, real)
            parts = []
            for index, where in ((patch_keys, blocks), (special_keys, Full())):
                if len(index):
                    part = call._replace(real=None if call.real is None else call.real[:, index])
                    parts.append(self.attend(picked, k[:, :, index], v[:, :, index], where, part, return_lse=True))
            outs.append(merge(parts))
        back = torch.cat([special, patches]).argsort()
        out: Tensor = torch.cat(outs, 2)[:, :, back].unflatten(2, grid)
        return out

    @torch.no_grad()
    def shares(
        self,
        q: Float[Tensor, "B H Nq D"],
        k: Float[Tensor, "B Hkv Nk D"],
        real_q: Tensor | None = None,
        real_k: Tensor | None = None,
    ) -> Float[Tensor, "B H query_blocks key_blocks"]:
        """P of patch queries and patch keys; ``real_q``, ``real_k (B, 1, N)`` leave padding out."""
        group = self.num_heads // self.num_kv_heads
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        pooled_q = pool_blocks(q, self.query_size, real=real_q, how=self.pool).to(wide)
        pooled_k = pool_blocks(k, self.key_size, real=real_k, how=self.pool).to(wide).repeat_interleave(group, 1)
        scores = pooled_q @ pooled_k.mT * self.scale
        if real_k is not None:
            some = real_tokens(k, self.key_size, real_k).any(-1)[:, :, None]
            # Where no block has a token all shares are zero.
            scores = scores.masked_fill(~some, -torch.inf)
            return torch.where(some, scores.softmax(-1), 0)
        return scores.softmax(-1)

    @torch.no_grad()
    def choose(self, q: Tensor, k: Tensor, real_q: Tensor | None = None, real_k: Tensor | None = None) -> Selected:
        """The key blocks of each query block and head, best first; arguments as in `shares`."""
        shares = self.shares(q, k, real_q, real_k)
        count = shares.shape[-1]
        some = torch.ones(1, 1, 1, count, dtype=torch.bool, device=q.device)
        if real_k is not None:
            some = real_tokens(k, self.key_size, real_k).any(-1)[:, :, None]
        order = best(shares, count, allowed=some)
        ranked = shares.gather(-1, order.clamp(min=0)) * (order >= 0)
        least = (some.sum(-1, keepdim=True) * self.ratio + 1e-6).floor().clamp(min=1)
        before = pad(ranked.cumsum(-1)[..., :-1], (1, 0))  # mass of the blocks that rank higher
        keep = torch.arange(count, device=q.device) < least
        keep = keep | (before < self.mass) if self.mass < 1 else torch.ones_like(order, dtype=torch.bool)
        order = order.masked_fill(~keep, -1)
        self.last_kept = (order >= 0).sum(-1) / some.sum(-1).clamp(min=1)
        self.last_mass = (ranked * keep).sum(-1)
        return Selected(order[..., : max(1, int(keep.sum(-1).max()))], self.key_size, query_size=self.query_size)

    def extra_repr(self) -> str:
        return (
            f"patches={self.views.patches}, special={self.views.special}, ratio={self.ratio}, mass={self.mass}, "
            f"query_size={self.query_size}, key_size={self.key_size}, pool={self.pool!r}, order={self.order!r}"
        )
