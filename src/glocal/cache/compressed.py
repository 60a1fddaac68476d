"""Every token, and one key and value for each complete block: what compressing and choosing blocks needs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from glocal.cache.base import FullCache
from glocal.condense import pool_overlapping

__all__ = ["CompressedCache"]


def mean(blocks: Tensor) -> Tensor:
    """``(..., blocks, size, D)`` to ``(..., blocks, D)``."""
    return blocks.mean(-2)


class CompressedCache(FullCache):
    """Keeps everything, and a key and a value for each complete block, so that a step compresses no block twice.

    Blocks of ``size`` tokens start every ``stride`` tokens. `compressed` holds keys and values,
    ``(B, Hkv, complete blocks, D)``, or None before the first token.

    Args:
        size: tokens of a block.
        stride: tokens from one block to the next; ``size`` where None.
        k_pool, v_pool: from ``(B, Hkv, blocks, size, D)`` to ``(B, Hkv, blocks, D)``; the mean where not given.

    Raises:
        ValueError: a size or a stride below 1.

    >>> import torch
    >>> from glocal.cache import CompressedCache
    >>> cache = CompressedCache(2, 1)
    >>> cache.update(torch.tensor([1.0, 3.0, 5.0]).view(1, 1, 3, 1), torch.zeros(1, 1, 3, 1))
    >>> cache.compressed[0].flatten().tolist()
    [2.0, 4.0]
    """

    def __init__(
        self,
        size: int,
        stride: int | None = None,
        k_pool: Callable[[Tensor], Tensor] = mean,
        v_pool: Callable[[Tensor], Tensor] = mean,
    ) -> None:
        super().__init__()
        self.size, self.stride, self.k_pool, self.v_pool = size, size if stride is None else stride, k_pool, v_pool
        for name, value in (("size", self.size), ("stride", self.stride)):
            if value < 1:
                raise ValueError(f"{name} of blocks must be at least 1; it was {value}")
        self.compressed: tuple[Tensor, Tensor] | None = None

    def update(self, k: Tensor, v: Tensor, **signals: Tensor) -> None:
        super().update(k, v)
        assert self.k is not None and self.v is not None
        start = 0 if self.compressed is None else self.compressed[0].shape[2] * self.stride
        blocks = [pool_overlapping(t[:, :, start:], self.size, self.stride) for t in (self.k, self.v)]
        new = self.k_pool(blocks[0]), self.v_pool(blocks[1])
        if self.compressed is None:
            self.compressed = new
        elif new[0].shape[2]:
            self.compressed = torch.cat([self.compressed[0], new[0]], 2), torch.cat([self.compressed[1], new[1]], 2)

    def tensors(self) -> tuple[Tensor, ...]:
        return super().tensors() + (self.compressed or ())
