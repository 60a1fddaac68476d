"""Fewer tokens: blocks pooled to one token each, and the choice of blocks that a query reads in full.

Pooling works on the second to last axis of ``(..., N, D)``; the last block of a sequence may be short and is then
pooled over its real tokens. Choosing is hard, so no gradient passes through it; scores are compared in float32 (or
better) and ties go to the lowest index, so that a choice is the same on every machine and in every batch.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from glocal.shapes import Bool, Float

__all__ = [
    "best",
    "block_sums",
    "blocks_before",
    "choose_blocks",
    "overlapping_blocks",
    "own_block",
    "pool_blocks",
    "pool_overlapping",
    "share_heads",
    "take",
    "weigh_blocks",
]


def split(x: Float[Tensor, "*lead N D"], size: int) -> Float[Tensor, "*lead blocks size D"]:
    """Blocks of ``size`` tokens, the last one filled with zeros.

    >>> split(torch.ones(1, 5, 2), 3).shape
    torch.Size([1, 2, 3, 2])
    """
    _positive(size, "size")
    blocks: Tensor = pad(x, (0, 0, 0, -x.shape[-2] % size)).unflatten(-2, (-1, size))
    return blocks


def real_tokens(x: Tensor, size: int, real: Tensor | None = None) -> Bool[Tensor, "*any blocks size"]:
    """Which places of the blocks of ``x (..., N, D)`` hold a token; ``real (..., N)`` takes padding out as well."""
    length = x.shape[-2]
    if real is None:
        real = torch.ones(length, dtype=torch.bool, device=x.device)
    elif real.dtype != torch.bool or real.shape[-1] != length:
        raise ValueError(f"real must be booleans (..., {length}); it was {real.dtype} {tuple(real.shape)}")
    blocks: Tensor = pad(real, (0, -length % size)).unflatten(-1, (-1, size))
    return blocks


def pool_blocks(
    x: Float[Tensor, "*lead N D"],
    size: int,
    *,
    real: Bool[Tensor, "*any N"] | None = None,
    weights: Float[Tensor, size] | None = None,
    how: str = "mean",
) -> Float[Tensor, "*lead blocks D"]:
    """One token a block: the mean (or the maximum) of its tokens.

    Args:
        x: ``(..., N, D)``.
        size: tokens of a block; the last block may be short.
        real: booleans that broadcast to ``(..., N)``; the others, padding, do not count. A block without any is 0.
        weights: ``(size,)``, a learned weight for each place in the block, used as they are instead of the mean.
        how: ``"mean"`` or ``"max"``.

    Returns:
        ``(..., ceil(N / size), D)``.

    Raises:
        ValueError: a size below 1, weights or a mask that do not fit, or another ``how``.

    >>> pool_blocks(torch.tensor([[1.0], [3.0], [5.0]]), 2).flatten().tolist()
    [2.0, 5.0]
    """
    blocks = split(x, size)
    if how not in ("mean", "max"):
        raise ValueError(f"how must be 'mean' or 'max'; it was {how!r}")
    inside = real_tokens(x, size, real).unsqueeze(-1)
    if how == "max":
        highest = blocks.masked_fill(~inside, -torch.inf).amax(-2)
        return highest.masked_fill(~inside.any(-2), 0)
    wide = blocks.to(_wide(x.dtype)).masked_fill(~inside, 0)
    if weights is None:
        return (wide.sum(-2) / inside.sum(-2).clamp(min=1)).to(x.dtype)
    if weights.shape != (size,):
        raise ValueError(f"weights must be ({size},), one a place in the block; it was {tuple(weights.shape)}")
    return (wide * weights.unsqueeze(-1)).sum(-2).to(x.dtype)


def weigh_blocks(
    x: Float[Tensor, "*lead N D"],
    scores: Float[Tensor, "*lead N"],
    size: int,
    *,
    real: Bool[Tensor, "*any N"] | None = None,
) -> Float[Tensor, "*lead blocks D"]:
    """One token a block: its tokens weighted by their significance, a softmax of ``scores`` inside the block.

    Args:
        x: ``(..., N, D)``.
        scores: ``(..., N)``, one a token, not normalised; gradients flow to them.
        size: tokens of a block; the last block may be short.
        real: as in `pool_blocks`.

    >>> weigh_blocks(torch.tensor([[1.0], [3.0], [5.0]]), torch.tensor([0.0, 1e4, 0.0]), 2).flatten().tolist()
    [3.0, 5.0]
    """
    wide = _wide(x.dtype)
    inside = real_tokens(x, size, real)
    some = inside.any(-1, keepdim=True)
    logits = split(scores.unsqueeze(-1), size).squeeze(-1).to(wide).masked_fill(~inside & some, -torch.inf)
    shares = logits.softmax(-1) * some
    return (shares.unsqueeze(-1) * split(x, size).to(wide)).sum(-2).to(x.dtype)


def block_sums(x: Float[Tensor, "*lead N D"], size: int) -> Float[Tensor, "*lead blocks D"]:
    """Transient-global summaries (LongT5): the sum of each complete block; a tail joins the last complete block.

    Returns ``(..., N // size, D)``, no block at all where ``N < size``. Guo et al., 2021, arXiv 2112.07916.

    >>> block_sums(torch.tensor([[1.0], [2.0], [3.0], [4.0], [5.0]]), 2).flatten().tolist()
    [3.0, 12.0]
    """
    _positive(size, "size")
    count = x.shape[-2] // size
    whole: Tensor = x[..., : count * size, :].unflatten(-2, (count, size)).sum(-2)
    tail = x[..., count * size :, :]
    if not count or not tail.shape[-2]:
        return whole
    return torch.cat([whole[..., :-1, :], whole[..., -1:, :] + tail.sum(-2, keepdim=True)], -2)


def pool_overlapping(x: Float[Tensor, "*lead N D"], size: int, stride: int) -> Float[Tensor, "*lead blocks size D"]:
    """Complete blocks of ``size`` tokens that start every ``stride`` tokens, as a view to be pooled.

    Returns ``(..., blocks, size, D)`` with ``blocks = (N - size) // stride + 1``, none where ``N < size``.

    >>> pool_overlapping(torch.arange(6.0)[:, None], 4, 2).mean(-2).flatten().tolist()
    [1.5, 3.5]
    """
    _positive(size, "size")
    _positive(stride, "stride")
    if x.shape[-2] < size:
        return x.new_zeros(*x.shape[:-2], 0, size, x.shape[-1])
    return x.unfold(-2, size, stride).transpose(-1, -2)


def overlapping_blocks(
    blocks: int, size: int, stride: int, target: int, targets: int
) -> Float[Tensor, "blocks targets"]:
    """How many tokens each block of `pool_overlapping` shares with each aligned block of ``target`` tokens.

    Scores of the former become scores of the latter by a product with this matrix, in units of blocks of ``size``.

    >>> overlapping_blocks(3, 4, 2, 4, 2).tolist()
    [[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]]
    """
    start = (torch.arange(blocks) * stride)[:, None]
    other = (torch.arange(targets) * target)[None]
    shared = torch.minimum(start + size, other + target) - torch.maximum(start, other)
    return shared.clamp(min=0).float() / size


def own_block(queries: int, keys: int, size: int, device: torch.device | None = None) -> Tensor:
    """The block of each query, ``(Nq,)``; queries are the last positions of the keys.

    >>> own_block(3, 6, 2).tolist()
    [1, 2, 2]
    """
    return torch.div(torch.arange(keys - queries, keys, device=device), size, rounding_mode="floor")


def blocks_before(queries: int, keys: int, size: int, device: torch.device | None = None) -> Bool[Tensor, "Nq blocks"]:
    """Which blocks of keys lie wholly before each query's own block: what a causal choice may take.

    >>> blocks_before(4, 4, 2).int().tolist()
    [[0, 0], [0, 0], [1, 0], [1, 0]]
    """
    return torch.arange(-(-keys // size), device=device) < own_block(queries, keys, size, device)[:, None]


def share_heads(
    scores: Float[Tensor, "B H *rest"], num_kv_heads: int, how: str = "sum"
) -> Float[Tensor, "B Hkv *rest"]:
    """Scores of query heads that share a key head, joined, so that the group makes one choice.

    Args:
        scores: ``(B, H, ...)``.
        num_kv_heads: ``Hkv``, which divides ``H``.
        how: ``"sum"`` or ``"mean"``.

    >>> share_heads(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), 2).tolist()
    [[3.0, 7.0]]
    """
    if num_kv_heads < 1 or scores.shape[1] % num_kv_heads:
        raise ValueError(f"num_kv_heads must divide the {scores.shape[1]} heads of scores; it was {num_kv_heads}")
    if how not in ("sum", "mean"):
        raise ValueError(f"how must be 'sum' or 'mean'; it was {how!r}")
    grouped: Tensor = scores.unflatten(1, (num_kv_heads, -1))
    return grouped.sum(2) if how == "sum" else grouped.mean(2)


def best(scores: Float[Tensor, "*lead n"], count: int, *, allowed: Tensor | None = None, ties: str = "first") -> Tensor:
    """The places of the ``count`` highest scores, best first; ties go to the lowest place.

    Args:
        scores: ``(..., n)``.
        count: how many at most.
        allowed: booleans that broadcast to ``(..., n)``; the others are never chosen.
        ties: ``"last"`` lets ties go to the highest place, the most recent token.

    Returns:
        Integers ``(..., min(count, n))``, -1 where fewer were allowed.

    >>> best(torch.tensor([1.0, 3.0, 3.0, 2.0]), 3).tolist()
    [1, 2, 3]
    >>> best(torch.tensor([1.0, 3.0]), 2, allowed=torch.tensor([True, False])).tolist()
    [0, -1]
    >>> best(torch.tensor([1.0, 3.0, 3.0, 2.0]), 1, ties="last").tolist()
    [2]
    """
    _positive(count, "count", least=0)
    if ties not in ("first", "last"):
        raise ValueError(f"ties must be 'first' or 'last'; it was {ties!r}")
    if ties == "last":
        found = best(scores.flip(-1), count, allowed=None if allowed is None else allowed.flip(-1))
        return torch.where(found < 0, -1, scores.shape[-1] - 1 - found)
    scores = scores.detach().to(_wide(scores.dtype))
    # A NaN compares with nothing; as the lowest score it cannot crowd out the others.
    scores = torch.nan_to_num(scores, nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    if allowed is None:
        return scores.sort(dim=-1, descending=True, stable=True).indices[..., :count]
    allowed = allowed.expand(torch.broadcast_shapes(scores.shape, allowed.shape))
    # Two stable sorts: by score, then what is allowed to the front, whatever its score.
    order = scores.expand(allowed.shape).sort(dim=-1, descending=True, stable=True).indices
    front = allowed.gather(-1, order).to(torch.uint8).sort(dim=-1, descending=True, stable=True)
    order = order.gather(-1, front.indices)
    return torch.where(front.values.bool(), order, -1)[..., :count]


def choose_blocks(
    scores: Float[Tensor, "*lead Nq blocks"],
    count: int,
    *,
    allowed: Bool[Tensor, "*any blocks"] | None = None,
    forced: Bool[Tensor, "*any2 blocks"] | None = None,
) -> Tensor:
    """The blocks that each query reads: the forced ones first, then the best of the allowed, ``count`` in all.

    Args:
        scores: ``(..., Nq, blocks)``.
        count: blocks of a query, forced ones included.
        allowed: booleans that broadcast to the scores; what may be chosen by score.
        forced: booleans that broadcast to the scores; chosen first, in order, whether allowed or not.

    Returns:
        Integers ``(..., Nq, min(count, blocks))`` for `glocal.Selected`, -1 where a query has fewer.

    >>> choose_blocks(torch.tensor([[0.1, 0.3, 0.2]]), 2, forced=torch.tensor([[True, False, False]])).tolist()
    [[0, 1]]
    """
    if forced is not None:
        scores = torch.where(forced, torch.inf, scores.detach().to(_wide(scores.dtype)))
        allowed = None if allowed is None else allowed | forced
    return best(scores, count, allowed=allowed)


def take(x: Tensor, index: Tensor) -> Tensor:
    """The tokens ``index (B, heads, K)`` of ``x (B, heads, N)`` or ``(B, heads, N, D)``; -1 takes some token."""
    index = index.clamp(min=0)
    if x.dim() > index.dim():
        index = index.unsqueeze(-1).expand(*index.shape, x.shape[-1])
    return x.gather(2, index)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.float64 else torch.float32


def _positive(value: int, name: str, least: int = 1) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}; it was {value!r}")
