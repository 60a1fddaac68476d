"""Attention whose scores and weights are convolved over queries and keys and mixed over heads, a tile at a time."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import conv2d, dropout, pad
from torch.utils.checkpoint import checkpoint

from glocal.patterns import Causal, Full, Pattern
from glocal.shapes import Bool, Float

__all__ = ["kernel_reach", "multi_token_attend"]

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
        ValueError: shapes that do not fit each other, an even side over keys, a tile without queries.

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
    if score_mix is not None and score_mix.shape != (heads, heads):
        raise ValueError(f"score_mix must be ({heads}, {heads}); it was {tuple(score_mix.shape)}")
    if weight_mix is not None:
        shape = tuple(weight_mix.shape)
        if len(shape) != 3 or shape[1] != shape[2] or shape[0] * shape[1] != heads:
            raise ValueError(f"weight_mix must be (groups, g, g), {heads} heads in all; it was {shape}")
    if keys is not None and (keys.dtype != torch.bool or keys.shape != (k.shape[0], length)):
        raise ValueError(f"keys must be booleans {(k.shape[0], length)}; it was {keys.dtype} {tuple(keys.shape)}")
    if tile_size is not None and tile_size < 1:
        raise ValueError(f"tile_size must be at least 1; it was {tile_size}")
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
    if keys is not None:  # weights of 0 would not keep out what is not finite
        v = v.masked_fill(~keys[:, None, :, None], 0)
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


def kernel_reach(kernel: Tensor | None, causal: bool) -> tuple[int, int]:
    """How many queries a kernel ``(H, queries, keys)`` reaches back and ahead; none where None."""
    side = 1 if kernel is None else kernel.shape[1]
    return (side - 1, 0) if causal else (side // 2, (side - 1) // 2)


def _around(rows: tuple[int, int], kernel: Tensor | None, causal: bool, count: int) -> tuple[int, int]:
    """The queries that a convolution reads for ``rows``."""
    back, ahead = kernel_reach(kernel, causal)
    return max(0, rows[0] - back), min(count, rows[1] + ahead)


def _convolve(
    t: Tensor, kernel: Tensor | None, given: tuple[int, int], wanted: tuple[int, int], causal: bool
) -> Tensor:
    """Rows ``wanted`` of the convolution of rows ``given``, with zeros beyond the first and the last query and key."""
    if kernel is None:
        return t
    back, ahead = kernel_reach(kernel, causal)
    side = kernel.shape[2] // 2
    t = pad(t, (side, side, given[0] - wanted[0] + back, wanted[1] + ahead - given[1]))
    return conv2d(t, kernel.to(t.dtype).unsqueeze(1), groups=len(kernel))
