"""Every token, and the running mean of every block of keys: what choosing blocks by their means needs."""

from __future__ import annotations

import torch
from torch import Tensor

from glocal.cache.base import FullCache
from glocal.condense import pool_blocks

__all__ = ["BlockCache"]


class BlockCache(FullCache):
    """Keeps everything, and the mean key of each complete block of ``size`` tokens, so that a step pools nothing twice.

    A query chooses among blocks by ``pooled (B, Hkv, complete blocks, D)`` and reads the tokens of the chosen ones.

    >>> import torch
    >>> from glocal.cache import BlockCache
    >>> cache = BlockCache(2)
    >>> cache.update(torch.tensor([1.0, 3.0, 5.0]).view(1, 1, 3, 1), torch.zeros(1, 1, 3, 1))
    >>> cache.pooled.flatten().tolist()
    [2.0]
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        if size < 1:
            raise ValueError(f"size of a block must be at least 1; it was {size}")
        self.size = size
        self.pooled: Tensor | None = None

    def update(self, k: Tensor, v: Tensor, **signals: Tensor) -> None:
        super().update(k, v)
        assert self.k is not None
        done = 0 if self.pooled is None else self.pooled.shape[2]
        new = pool_blocks(self.k[:, :, done * self.size : self.seen // self.size * self.size], self.size)
        self.pooled = new if self.pooled is None else torch.cat([self.pooled, new], 2)

    def tensors(self) -> tuple[Tensor, ...]:
        return super().tensors() + (() if self.pooled is None else (self.pooled,))
