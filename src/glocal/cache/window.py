"""A ring buffer for each group of heads with one window, and the sinks before it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from glocal.cache.base import Cache, Kept

__all__ = ["WindowCache"]


class WindowCache(Cache):
    """The last ``window`` tokens of each key head, itself included, and the first ``sinks`` tokens.

    Equal to ``Sliding(window - 1, 0) | Sinks(sinks)``. Memory does not grow with the sequence.

    Args:
        window: one size for all key heads, or one a head; heads of one size share a ring buffer.
        sinks: tokens at the start that are never dropped (Xiao et al., 2023, arXiv 2309.17453).

    Raises:
        ValueError: a window below 1, sinks below 0, or as many windows as there are no heads.

    >>> import torch
    >>> from glocal.cache import WindowCache
    >>> cache = WindowCache((2, 4))
    >>> for _ in range(100):
    ...     cache.update(torch.ones(1, 2, 1, 8), torch.ones(1, 2, 1, 8))
    >>> [part.k.shape[2] for part in cache.kept()], cache.nbytes
    ([2, 4], 384)
    """

    def __init__(self, window: int | Sequence[int], sinks: int = 0) -> None:
        super().__init__()
        windows = (window,) if isinstance(window, int) else tuple(window)
        if not windows or any(w < 1 for w in windows):
            raise ValueError(f"window must be at least 1 for every head; it was {window!r}")
        if sinks < 0:
            raise ValueError(f"sinks must not be negative; it was {sinks}")
        self.windows, self.sinks = windows, sinks
        self._rings: dict[int, tuple[Tensor, Tensor]] = {}  # window size: k and v, sinks first

    def _groups(self, heads: int) -> dict[int, tuple[int, ...]]:
        windows = self.windows * heads if len(self.windows) == 1 else self.windows
        if len(windows) != heads:
            raise ValueError(f"window has {len(windows)} sizes, k has {heads} heads; give one size a key head")
        return {w: tuple(h for h in range(heads) if windows[h] == w) for w in sorted(set(windows))}

    def _slots(self, first: int, last: int, window: int) -> tuple[Tensor, Tensor]:
        """Of the tokens from ``first`` to ``last``, those to store and their slots."""
        tokens = torch.arange(first, last)
        tokens = tokens[(tokens < self.sinks) | (tokens >= last - window)]
        ring = self.sinks + (tokens - self.sinks) % window
        return tokens, torch.where(tokens < self.sinks, tokens, ring)

    def update(self, k: Tensor, v: Tensor, **signals: Tensor) -> None:
        self._check(k, v)
        for window, heads in self._groups(k.shape[1]).items():
            if window not in self._rings:
                shape = (k.shape[0], len(heads), self.sinks + window)
                self._rings[window] = k.new_zeros(*shape, k.shape[-1]), v.new_zeros(*shape, v.shape[-1])
            tokens, slots = self._slots(self.seen, self.seen + k.shape[2], window)
            for ring, new in zip(self._rings[window], (k, v), strict=True):
                ring[:, :, slots] = new[:, list(heads)][:, :, tokens - self.seen].detach()
        self.seen += k.shape[2]

    def kept(self) -> tuple[Kept, ...]:
        parts = []
        for window, (k, v) in self._rings.items():
            heads = self._groups(sum(ring.shape[1] for ring, _ in self._rings.values()))[window]
            tokens, slots = self._slots(0, self.seen, window)
            filled = torch.full((self.sinks + window,), -1)
            filled[slots] = tokens
            used = min(self.seen, self.sinks + window)  # slots fill from the first
            position = filled[:used].to(k.device).expand(1, len(heads), -1)
            parts.append(Kept(heads, k[:, :, :used], v[:, :, :used], position))
        return tuple(parts)

    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(t for ring in self._rings.values() for t in ring)
