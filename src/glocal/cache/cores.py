"""Recent tokens as they are, and one pooled token for each group of old ones."""

from __future__ import annotations

import torch
from torch import Tensor

from glocal.cache.base import Cache, Kept
from glocal.condense import real_tokens, weigh_blocks
from glocal.shapes import Bool, Float

__all__ = ["CoreCache", "pool_cores"]


def pool_cores(
    query: Float[Tensor, "B Hkv N D"],
    k: Float[Tensor, "B Hkv N D"],
    size: int,
    *values: Float[Tensor, "B Hkv N Dv"],
    scale: float,
    real: Bool[Tensor, "B 1 N"] | None = None,
) -> tuple[Tensor, ...]:
    """Each group's tokens weighted by what the group's last token thinks of them: ``softmax(q_last . k_j * scale)``.

    Args:
        query: the pooling query of every token; only that of each group's last (real) token is used.
        k: keys to weigh by, rotated where ``query`` is.
        size: tokens of a group; N is a multiple of it.
        values: what to pool, keys or values of the same tokens.
        scale: of the logits.
        real: which tokens are no padding; a group without any is 0.

    Returns:
        One ``(B, Hkv, N / size, Dv)`` for each of ``values``.

    >>> import torch
    >>> query, k = torch.tensor([0.0, 9.0]).view(1, 1, 2, 1), torch.tensor([9.0, -9.0]).view(1, 1, 2, 1)
    >>> [core.item() for core in pool_cores(query, k, 2, k, scale=1.0)]  # the last token's query likes the first key
    [9.0]
    """
    inside = real_tokens(k, size, real)
    place = (inside * torch.arange(1, size + 1, device=k.device)).argmax(-1)
    last = place + size * torch.arange(inside.shape[-2], device=k.device)
    index = last.expand(*k.shape[:2], -1).unsqueeze(-1).expand(-1, -1, -1, k.shape[-1])
    wide = torch.float64 if k.dtype == torch.float64 else torch.float32
    logits = k.unflatten(2, (-1, size)).to(wide) @ query.gather(2, index).unsqueeze(-1).to(wide)
    scores = logits.flatten(2) * scale
    return tuple(weigh_blocks(value, scores, size, real=real) for value in values)


class CoreCache(Cache):
    """Raw tokens of the local span, and one core token for each complete group before it.

    Query ``i`` sees the cores of the ``max(0, (i + 1 - window) // group_size)`` first groups, and every token after
    those groups: each past token exactly once. A group is pooled when it completes, since only then its last query is
    known, and its tokens are dropped when they leave the local span, which holds less than ``window + group_size``.

    Signals: ``query (B, Hkv, n, D)``, the pooling query of each token, and ``turned (B, Hkv, n, D)``, its key turned
    to the last position of its group. The position of a core in `kept` is that of its group's last token.

    Args:
        group_size: tokens of a group.
        window: tokens that are raw at least.
        scale: of the pooling logits.

    Raises:
        ValueError: a size below 1, or an update without its signals.

    Core Context Aware Attention, 2024, arXiv 2412.12465.

    >>> import torch
    >>> from glocal.cache import CoreCache
    >>> cache, k = CoreCache(4, 8, 0.5), torch.randn(1, 2, 100, 8)
    >>> cache.update(k, k, query=k, turned=k)
    >>> cache.cores, cache.kept()[0].k.shape  # 23 cores for 92 tokens, and the last 8 tokens
    (23, torch.Size([1, 2, 31, 8]))
    """

    def __init__(self, group_size: int, window: int, scale: float) -> None:
        super().__init__()
        for name, value in (("group_size", group_size), ("window", window)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1; it was {value}")
        self.group_size, self.window, self.scale = group_size, window, scale
        self._raw: tuple[Tensor, Tensor] | None = None  # k and v of the local span
        self._pooled: tuple[Tensor, Tensor] | None = None  # k and v of every complete group
        self._turned: Tensor | None = None  # of the group that is not complete

    @property
    def cores(self) -> int:
        """How many entries of `kept` are cores; they come first."""
        return max(0, (self.seen - self.window) // self.group_size)

    def update(self, k: Tensor, v: Tensor, **signals: Tensor) -> None:
        self._check(k, v)
        if set(signals) != {"query", "turned"}:
            raise ValueError(f"CoreCache needs the signals query and turned; it was given {sorted(signals)}")
        size, query, turned = self.group_size, signals["query"], signals["turned"]
        first, done, start = self.cores * size, self.seen // size, self.seen
        self.seen += k.shape[2]
        if self._raw is not None and self._turned is not None:
            k, v = (torch.cat(pair, 2) for pair in zip(self._raw, (k, v), strict=True))
            turned = torch.cat([self._turned, turned], 2)
        groups = self.seen // size - done
        if groups:
            # Of the open group only keys and values are kept: its query is that of a token that has just come.
            query = torch.cat([query.new_zeros(*query.shape[:2], start - done * size, query.shape[-1]), query], 2)
            ended = slice(done * size - first, (done + groups) * size - first)
            query, fresh = query[:, :, : groups * size], turned[:, :, : groups * size]
            new = pool_cores(query, k[:, :, ended], size, fresh, v[:, :, ended], scale=self.scale)
            old = self._pooled or (k[:, :, :0], v[:, :, :0])
            self._pooled = torch.cat([old[0], new[0]], 2), torch.cat([old[1], new[1]], 2)
        # Clones, so that the prompt's memory is not held by a view of its end.
        drop = self.cores * size - first
        self._raw = k[:, :, drop:].clone(), v[:, :, drop:].clone()
        self._turned = turned[:, :, groups * size :].clone()

    def kept(self) -> tuple[Kept, ...]:
        if self._raw is None:
            return ()
        size, cores = self.group_size, self.cores
        k, v = self._raw
        device = k.device
        position = torch.cat(
            [torch.arange(cores, device=device) * size + size - 1, torch.arange(cores * size, self.seen, device=device)]
        )
        if self._pooled is not None and cores:
            k, v = (torch.cat([c[:, :, :cores], r], 2) for c, r in zip(self._pooled, self._raw, strict=True))
        return (Kept(tuple(range(k.shape[1])), k, v, position.expand(1, k.shape[1], -1)),)

    def tensors(self) -> tuple[Tensor, ...]:
        return (*(self._raw or ()), *(self._pooled or ()), *(() if self._turned is None else (self._turned,)))
