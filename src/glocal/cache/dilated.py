"""A sliding window with gaps: a ring buffer for each residue class of positions."""

from __future__ import annotations

from torch import Tensor

from glocal.cache.base import Cache, Kept
from glocal.cache.window import WindowCache

__all__ = ["DilatedWindowCache"]


class DilatedWindowCache(Cache):
    """The last ``window`` tokens of the newest token's residue class modulo ``dilation``, itself included.

    Equal to ``Sliding((window - 1) * dilation, 0) & Strided(dilation)``. The tokens of the other classes are stored as
    well, for the queries to come, ``window * dilation`` in all: memory does not grow with the sequence.

    Args:
        window: tokens that a query sees.
        dilation: how far apart they are.

    Raises:
        ValueError: a window or a dilation below 1.

    >>> import torch
    >>> from glocal.cache import DilatedWindowCache
    >>> cache = DilatedWindowCache(3, dilation=2)
    >>> cache.update(torch.ones(1, 2, 10, 8), torch.ones(1, 2, 10, 8))
    >>> cache.kept()[0].position[0, 0].sort().values.tolist(), cache.tensors()[0].shape
    ([5, 7, 9], torch.Size([1, 2, 3, 8]))
    """

    def __init__(self, window: int, dilation: int) -> None:
        super().__init__()
        if dilation < 1:
            raise ValueError(f"dilation must be at least 1; it was {dilation}")
        self.window, self.dilation = window, dilation
        self._rings = [WindowCache(window) for _ in range(dilation)]

    def update(self, k: Tensor, v: Tensor, **signals: Tensor) -> None:
        self._check(k, v)
        for residue, ring in enumerate(self._rings):
            own = slice((residue - self.seen) % self.dilation, None, self.dilation)
            if k[:, :, own].shape[2]:
                ring.update(k[:, :, own], v[:, :, own])
        self.seen += k.shape[2]

    def kept(self) -> tuple[Kept, ...]:
        residue = (self.seen - 1) % self.dilation
        parts = self._rings[residue].kept()
        return tuple(Kept(p.heads, p.k, p.v, p.position * self.dilation + residue) for p in parts)

    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(t for ring in self._rings for t in ring.tensors())
