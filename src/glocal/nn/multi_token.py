"""Multi-token attention: scores and weights are convolved over neighbouring queries and keys, and mixed over heads."""

from __future__ import annotations

import math
from collections.abc import Collection
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, dropout, pad
from torch.utils.checkpoint import checkpoint

from glocal.cache import Cache, QueryCache
from glocal.nn.frame import Attention, Call
from glocal.patterns import Causal, Full, Pattern
from glocal.shapes import Bool, Float

__all__ = ["MultiTokenAttention", "multi_token_attend"]

_PAIRS = 1 << 22
"""Pairs of a query and a key that are held at a time, of all heads and items of the batch."""
_LEAST = 32
"""Queries of a tile, where a tile of so many pairs has fewer."""


def multi_token_attend(
    q: Float[Tensor, "B H N D"],
    k: Float[Tensor, "B Hkv M D"],
    v: Float[Tensor, "B Hkv M E"],
    where: Pattern | None = None,
    *,
    causal: bool = True,
    score_kernel: Float[Tensor, "H a b"] | None = None,
    score_mix: Float[Tensor, "H H"] | None = None,
    weight_kernel: Float[Tensor, "H c d"] | None = None,
    weight_mix: Float[Tensor, "G g g"] | None = None,
    keys: Bool[Tensor, "B M"] | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    halo: int = 0,
    tile_size: int | None = None,
) -> Float[Tensor, "B H n E"]:
    """Attention whose scores, before the softmax, and weights, after it, are convolved over queries and keys.

    Every weight depends on scores of other pairs: no kernel that forms them one by one can compute it. So they are
    formed, for a tile of queries at a time and all keys that those see; gradients form them again. Work is
    O(N M H (D + taps)), memory that of a tile, whatever N. Golovneva et al., 2025, arXiv 2504.00927.

    Args:
        q: ``(B, H, N, D)``, the queries of the last N of M tokens.
        k, v: ``(B, Hkv, M, D or E)``, H a multiple of Hkv.
        where: what a query sees, every key where None; scores of other pairs are 0 in the convolution, which does not
            stop where segments meet: give documents one by one.
        causal: kernels reach over earlier queries only, and no query sees what comes after it. Otherwise over as many
            later ones, one less where the side is even.
        score_kernel, weight_kernel: for each head, ``(H, queries, keys)`` with an odd side over keys, the row of the
            query itself is the last one, ``queries // 2`` if not causal.
        score_mix: scores of head ``h`` become ``sum_i score_mix[h, i] scores_i``, ``(H, H)``.
        weight_mix: weights of head ``c`` of a group become ``sum_i weights_i weight_mix[i, c]``, ``(groups, g, g)``.
        keys: which tokens are no padding, ``(B, M)``; others are left out as queries too.
        scale: of the scores; ``D ** -0.5`` where None.
        dropout_p: share of weights set to zero, the rest scaled up; apply it in training only.
        halo: so many of the first queries are only there for those after them.
        tile_size: queries of a tile; so many that a tile has about four million pairs where None.

    Returns:
        ``(B, H, N - halo, E)``; zeros where a query sees nothing.

    Raises:
        ValueError: shapes that do not fit each other, an even side over keys.

    >>> import torch
    >>> q = k = v = torch.randn(1, 2, 9, 8)
    >>> kernel = torch.zeros(2, 3, 5)
    >>> kernel[:, 1, 1] = 1  # the scores of the query before, moved by a key: pairs of tokens that follow each other
    >>> multi_token_attend(q, k, v, score_kernel=kernel).shape
    torch.Size([1, 2, 9, 8])
    """
    if q.dim() != 4 or k.dim() != 4 or v.shape[:-1] != k.shape[:-1] or q.shape[1] % k.shape[1]:
        raise ValueError(
            "q, k and v must be (B, H, N, D), (B, Hkv, M, D) and (B, Hkv, M, E); they were "
            f"{tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        )
    heads, count, length = q.shape[1], q.shape[2], k.shape[2]
    if count > length or not 0 <= halo <= count:
        raise ValueError(f"q must have at most the {length} tokens of k, and halo of them; it had {count}, halo {halo}")
    for name, kernel in (("score_kernel", score_kernel), ("weight_kernel", weight_kernel)):
        if kernel is not None and (kernel.dim() != 3 or kernel.shape[0] != heads or kernel.shape[2] % 2 == 0):
            raise ValueError(f"{name} must be ({heads}, queries, keys), keys odd; it was {tuple(kernel.shape)}")
    if tile_size is None:
        tile_size = max(_LEAST, _PAIRS // max(1, q.shape[0] * heads * length))
    group, where = heads // k.shape[1], Full() if where is None else where
    tile = partial(
        _tile,
        where=where & Causal() if causal else where,
        causal=causal,
        kernels=(score_kernel, weight_kernel),
        mixes=(score_mix, weight_mix),
        keys=keys,
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        dropout_p=dropout_p,
    )
    k, v = (t.repeat_interleave(group, 1) if group > 1 else t for t in (k, v))
    starts = range(halo, count, tile_size)
    again = torch.is_grad_enabled() and len(starts) > 1
    parts = []
    for start in starts:
        rows = start, min(start + tile_size, count)
        out = checkpoint(tile, q, k, v, rows, use_reentrant=False) if again else tile(q, k, v, rows)
        parts.append(out)
    return torch.cat(parts, 2) if parts else q.new_empty(*q.shape[:2], 0, v.shape[-1])


def _tile(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: tuple[int, int],
    *,
    where: Pattern,
    causal: bool,
    kernels: tuple[Tensor | None, Tensor | None],
    mixes: tuple[Tensor | None, Tensor | None],
    keys: Tensor | None,
    scale: float,
    dropout_p: float,
) -> Tensor:
    """Outputs of the queries ``rows``: weights are needed of some around them, and scores of some around those."""
    count, length = q.shape[2], k.shape[2]
    weighed = _around(rows, kernels[1], causal, count)
    scored = _around(weighed, kernels[0], causal, count)
    # What no query of the tile sees is left out, in eighths: few sizes, or freed memory would fit no later tile.
    eighth = -(-length // 8)
    seen = min(length, -(-(length - count + scored[1]) // eighth) * eighth) if causal else length
    at = torch.arange(*scored, device=q.device)
    live = where.rows(at, (count,), (length,)).to(q.device)[..., :seen]
    if keys is not None:
        real = keys[:, None, length - count :, None][:, :, scored[0] : scored[1]]
        live = live & keys[:, None, None, :seen] & real
    scores = (q[:, :, scored[0] : scored[1]] * scale) @ k[:, :, :seen].mT
    scores = scores.to(torch.promote_types(q.dtype, torch.float32)).masked_fill(~live, 0)
    scores = _convolve(scores, kernels[0], scored, weighed, causal)
    if mixes[0] is not None:
        scores = torch.einsum("hi,binm->bhnm", mixes[0].to(scores.dtype), scores)
    live = live[..., weighed[0] - scored[0] : weighed[1] - scored[0], :]
    # Not -inf, so that a query that sees nothing is no NaN.
    weights = scores.masked_fill(~live, torch.finfo(scores.dtype).min).softmax(-1).masked_fill(~live, 0)
    weights = _convolve(weights, kernels[1], weighed, rows, causal)
    weights = weights.masked_fill(~live[..., rows[0] - weighed[0] : rows[1] - weighed[0], :], 0)
    if mixes[1] is not None:
        grouped = weights.unflatten(1, mixes[1].shape[:2])
        weights = torch.einsum("buinm,uic->bucnm", grouped, mixes[1].to(weights.dtype)).flatten(1, 2)
    return dropout(weights, dropout_p).to(v.dtype) @ v[:, :, :seen]


def _reach(kernel: Tensor | None, causal: bool) -> tuple[int, int]:
    """How many queries a kernel reaches back and ahead."""
    side = 1 if kernel is None else kernel.shape[1]
    return (side - 1, 0) if causal else (side // 2, (side - 1) // 2)


def _around(rows: tuple[int, int], kernel: Tensor | None, causal: bool, count: int) -> tuple[int, int]:
    """The queries that a convolution reads for ``rows``."""
    back, ahead = _reach(kernel, causal)
    return max(0, rows[0] - back), min(count, rows[1] + ahead)


def _convolve(
    t: Tensor, kernel: Tensor | None, given: tuple[int, int], wanted: tuple[int, int], causal: bool
) -> Tensor:
    """Rows ``wanted`` of the convolution of rows ``given``, with zeros beyond the first and the last query and key."""
    if kernel is None:
        return t
    back, ahead = _reach(kernel, causal)
    side = kernel.shape[2] // 2
    t = pad(t, (side, side, given[0] - wanted[0] + back, wanted[1] + ahead - given[1]))
    return conv2d(t, kernel.to(t.dtype).unsqueeze(1), groups=len(kernel))


class MultiTokenAttention(Attention):
    """Attention that can look for several tokens together: `multi_token_attend`, then a norm and a gate a head.

    Kernels and mixing start as the identity, so that up to norm and gate it starts as `Attention`. Without
    convolutions and mixing it is `Attention` with norm and gate, on any backend; otherwise weights are formed tile by
    tile, which no backend does. It has no cross form. Over both sides of a query it is ours; the paper has the causal
    one. Decoding keeps all tokens and the queries of the last few (`QueryCache`): ``query_kernel - 1`` for each of the
    two convolutions, as weights depend on earlier weights, and those on earlier scores. Golovneva et al., 2025, arXiv
    2504.00927; in their models every fourth layer has convolutions, each the rest.

    Args:
        dim, num_heads: as in `Attention`.
        query_kernel, key_kernel: queries and keys of the convolutions' kernels, the latter odd.
        convolve: which of ``"scores"`` and ``"weights"`` are convolved.
        mix_heads: which of ``"scores"`` and ``"weights"`` are mixed over heads.
        group: heads that mix weights with each other, a divisor of ``num_heads``; all where None.
        head_norm: RMS norm over the channels of each head, with one weight for all heads.
        depth: number of the layer in its network, from 0, by which the norm is multiplied with
            ``0.2 + 0.6 exp(-0.3 depth)``; with 1 where None, as in the released models.
        head_gate: multiplies each head by the sigmoid of a projection of itself to one number.
        tile_size: as in `multi_token_attend`.
        options: as in `Attention`, without softcap and backend where there are convolutions or mixing.

    Weight decay would pull the identity to zero: `glocal.nn.no_weight_decay` lists what to leave out of it.

    Raises:
        ValueError: sizes that do not fit, an input that is no sequence, a bias on the scores, or what `Attention`
            refuses.

    >>> import torch
    >>> from glocal.nn import MultiTokenAttention
    >>> layer = MultiTokenAttention(64, 4, query_kernel=3, key_kernel=5, causal=True)
    >>> layer(torch.randn(2, 20, 64)).shape, layer.score_kernel.shape
    (torch.Size([2, 20, 64]), torch.Size([4, 3, 5]))
    """

    uses = ("noncausal-self", "causal-self")
    refuses: ClassVar[dict[str, str]] = dict.fromkeys(
        ("noncausal-cross", "causal-cross"), "it is defined where queries and keys are the same tokens"
    )
    tiny: ClassVar[dict[str, Any]] = {"query_kernel": 3, "key_kernel": 3}
    undecayed = ("score_kernel", "weight_kernel", "score_mix", "weight_mix")

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        query_kernel: int = 6,
        key_kernel: int = 11,
        convolve: Collection[str] = ("scores", "weights"),
        mix_heads: Collection[str] = ("scores", "weights"),
        group: int | None = None,
        head_norm: bool = True,
        depth: int | None = None,
        head_gate: bool = True,
        tile_size: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(dim, num_heads, **options)
        if query_kernel < 1:
            raise ValueError(f"query_kernel must be at least 1; it was {query_kernel}")
        if key_kernel < 1 or key_kernel % 2 == 0:
            raise ValueError(f"key_kernel must be odd; it was {key_kernel}")
        for name, chosen in (("convolve", convolve), ("mix_heads", mix_heads)):
            if isinstance(chosen, str) or not set(chosen) <= {"scores", "weights"}:
                raise ValueError(f"{name} must be of 'scores' and 'weights'; it was {chosen!r}")
        group = num_heads if group is None else group
        if group < 1 or num_heads % group:
            raise ValueError(f"group must divide num_heads {num_heads}; it was {group}")
        if depth is not None and (depth < 0 or not head_norm):
            raise ValueError(f"depth must be at least 0, and is of the norm; it was {depth}, head_norm {head_norm}")
        if tile_size is not None and tile_size < 1:
            raise ValueError(f"tile_size must be at least 1; it was {tile_size}")
        self.query_kernel, self.key_kernel, self.tile_size = query_kernel, key_kernel, tile_size
        self.plain = not convolve and not mix_heads
        if not self.plain and (self.softcap is not None or self.backend != "auto"):
            raise ValueError(
                "softcap must be None and backend 'auto' where scores or weights are convolved or mixed; they were "
                f"{self.softcap} and {self.backend!r}"
            )
        kernel, square = (num_heads, query_kernel, key_kernel), (num_heads // group, group, group)
        self.score_kernel = _parameter(kernel if "scores" in convolve else None)
        self.weight_kernel = _parameter(kernel if "weights" in convolve else None)
        self.score_mix = _parameter((num_heads, num_heads) if "scores" in mix_heads else None)
        self.weight_mix = _parameter(square if "weights" in mix_heads else None)
        self.head_norm = nn.RMSNorm(self.head_dim, eps=1e-5) if head_norm else None
        self.norm_scale = 1.0 if depth is None else 0.2 + 0.6 * math.exp(-0.3 * depth)
        self.head_gate = nn.Linear(self.head_dim, 1) if head_gate else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The identity."""
        for kernel in (self.score_kernel, self.weight_kernel):
            if kernel is not None:
                nn.init.zeros_(kernel)
                with torch.no_grad():
                    kernel[:, _reach(kernel, self.causal)[0], self.key_kernel // 2] = 1
        for mix in (self.score_mix, self.weight_mix):
            if mix is not None:
                with torch.no_grad():
                    mix.copy_(torch.eye(mix.shape[-1], device=mix.device))

    def mix(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        return super().mix(q, k, v, call) if self.plain else self._spread(q, k, v, call, 0)

    def _spread(self, q: Tensor, k: Tensor, v: Tensor, call: Call, halo: int) -> Tensor:
        if q.dim() != 4:
            raise ValueError(f"x must be a sequence (B, N, {self.dim}); it was {tuple(call.x.shape)}")
        if self.score(call) is not None:
            raise ValueError("score must be None: a bias does not go with scores that are convolved")
        return multi_token_attend(
            *(q, k, v, self.where(q, k, call)),
            causal=self.causal,
            score_kernel=self.score_kernel,
            score_mix=self.score_mix,
            weight_kernel=self.weight_kernel,
            weight_mix=self.weight_mix,
            keys=call.real,
            scale=self.scale,
            dropout_p=self.dropout if self.training else 0.0,
            halo=halo,
            tile_size=self.tile_size,
        )

    def combine(self, mixed: Tensor, call: Call) -> Tensor:
        mixed = super().combine(mixed, call)
        if self.head_norm is not None:
            mixed = self.head_norm(mixed) * self.norm_scale
        return mixed if self.head_gate is None else mixed * self.head_gate(mixed).sigmoid()

    def new_cache(self) -> Cache:
        """All tokens, and the queries that weights of the next one depend on."""
        if self.plain:
            return super().new_cache()
        kernels = (self.score_kernel, self.weight_kernel)
        return QueryCache(sum(_reach(kernel, True)[0] for kernel in kernels))

    def step(self, q: Tensor, k: Tensor, v: Tensor, call: Call, cache: Cache) -> Tensor:
        if self.plain:
            return super().step(q, k, v, call, cache)
        if not isinstance(cache, QueryCache):
            raise ValueError(f"cache must be a QueryCache, of new_cache(); it was a {type(cache).__name__}")
        before = cache.queries
        cache.update(k, v, queries=q)
        (part,) = cache.kept()
        halo = 0 if before is None else before.shape[2]
        return self._spread(q if before is None else torch.cat([before, q], 2), part.k, part.v, call, halo)

    def extra_repr(self) -> str:
        return f"query_kernel={self.query_kernel}, key_kernel={self.key_kernel}"


def _parameter(shape: tuple[int, ...] | None) -> nn.Parameter | None:
    return None if shape is None else nn.Parameter(torch.empty(shape))
