"""Caches that read chosen tokens: a set that changes with every step, or the best by a score that never changes."""

from __future__ import annotations

import torch
from torch import Tensor

from glocal.cache.base import Cache, FullCache, Kept
from glocal.condense import best, take

__all__ = ["BestTokens", "SelectedTokens"]


class SelectedTokens(FullCache):
    """Keeps every token; the newest query sees the set that came with it, or everything where none came.

    The policy of LessIsMore's sparse layers (Yang et al., 2025, arXiv 2508.07101): a later step may choose any token
    again. Signal: ``chosen (B, Hkv or 1, n, K)``, the positions that each of the ``n`` tokens sees, -1 for none.

    >>> import torch
    >>> from glocal.cache import SelectedTokens
    >>> cache, k = SelectedTokens(), torch.arange(4.0).view(1, 1, 4, 1)
    >>> cache.update(k, k)
    >>> cache.update(k[:, :, :1], k[:, :, :1], chosen=torch.tensor([0, 3, 4]).view(1, 1, 1, 3))
    >>> cache.kept()[0].k.flatten().tolist(), cache.seen
    ([0.0, 3.0, 0.0], 5)
    """

    def __init__(self) -> None:
        super().__init__()
        self.chosen: Tensor | None = None
        """Of the newest token, ``(B, Hkv or 1, K)``."""

    def update(self, k: Tensor, v: Tensor, **signals: Tensor) -> None:
        chosen, seen = signals.get("chosen"), self.seen + k.shape[2]
        if chosen is not None:
            if chosen.dim() != 4 or chosen.shape[2] != k.shape[2] or chosen.is_floating_point():
                raise ValueError(
                    f"chosen must be integers (B, Hkv or 1, {k.shape[2]}, K); it was {chosen.dtype} "
                    f"{tuple(chosen.shape)}"
                )
            if chosen.numel() and not bool(((chosen >= -1) & (chosen < seen)).all()):
                raise ValueError(f"chosen must be positions from -1 (none) to {seen - 1}, the newest token")
        super().update(k, v)
        self.chosen = None if chosen is None else chosen[:, :, -1]

    def kept(self) -> tuple[Kept, ...]:
        if self.chosen is None or self.k is None or self.v is None:
            return super().kept()
        position = self.chosen.expand(self.k.shape[0], self.k.shape[1], -1)
        k, v = (take(t, position) for t in (self.k, self.v))
        return (Kept(tuple(range(k.shape[1])), k, v, position),)

    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(t for t in (self.k, self.v) if t is not None)


class BestTokens(Cache):
    """The ``top_k`` tokens of each key head with the highest scores, ties going to the most recent.

    A token's score is its own and does not change, so what has fallen out can never come back: dropping is exact, and
    memory does not grow. The policy of dynamic mask attention (Shi et al., 2025, arXiv 2508.02124).
    Signal: ``score (B, Hkv, n)``.

    Raises:
        ValueError: ``top_k`` below 1, or scores that do not fit.

    >>> import torch
    >>> from glocal.cache import BestTokens, replay
    >>> k = torch.zeros(1, 1, 4, 2)
    >>> replay(lambda: BestTokens(2), k, k, score=torch.tensor([[[3.0, 1.0, 2.0, 1.0]]]))[0, 0].int().tolist()
    [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 0]]
    """

    def __init__(self, top_k: int) -> None:
        super().__init__()
        if isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1:
            raise ValueError(f"top_k must be an integer of at least 1; it was {top_k!r}")
        self.top_k = top_k
        self._held: tuple[Tensor, ...] = ()  # k, v, score, position

    def update(self, k: Tensor, v: Tensor, **signals: Tensor) -> None:
        self._check(k, v)
        score = signals.get("score")
        if score is None or score.shape != k.shape[:3]:
            found = None if score is None else tuple(score.shape)
            raise ValueError(f"score must be (B, Hkv, n) = {tuple(k.shape[:3])}; it was {found}")
        new = torch.arange(self.seen, self.seen + k.shape[2], device=k.device).expand(*k.shape[:2], -1)
        held: tuple[Tensor, ...] = (k, v, score, new)
        if self._held:
            held = tuple(torch.cat(pair, 2) for pair in zip(self._held, held, strict=True))
        if held[0].shape[2] > self.top_k:
            index = best(held[2], self.top_k, ties="last").sort(-1).values
            held = tuple(take(t, index) for t in held)
        self._held, self.seen = held, self.seen + k.shape[2]

    @property
    def score(self) -> Tensor:
        """Scores of what is kept, ``(B, Hkv, T)``."""
        return self._held[2]

    def kept(self) -> tuple[Kept, ...]:
        if not self._held:
            return ()
        k, v, _, position = self._held
        return (Kept(tuple(range(k.shape[1])), k, v, position),)

    def tensors(self) -> tuple[Tensor, ...]:
        return self._held[:3]
