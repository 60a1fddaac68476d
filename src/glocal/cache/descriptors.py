"""Descriptors of past frames, for a stream of frames that comes in chunks."""

from __future__ import annotations

import torch
from torch import Tensor

from glocal.shapes import Float

__all__ = ["DescriptorCache"]


class DescriptorCache:
    """What `glocal.nn.DescriptorAttention` keeps of a stream: descriptors of each frame, frame 0 in full.

    Of past chunks every ``keep_every``-th frame is kept (numbers 0, m, 2 m, ...), of the newest one all. It holds
    features, not keys and values, and whole frames, not tokens: so it is no `Cache`, and each chunk projects all that
    is kept again. FlashVGGT, 2025, arXiv 2512.01540.

    Args:
        keep_every: of the frames of past chunks, one in this many is kept.

    Raises:
        ValueError: ``keep_every`` below 1.

    >>> import torch
    >>> from glocal.cache import DescriptorCache
    >>> cache = DescriptorCache(keep_every=2)
    >>> for _ in range(3):
    ...     cache.update(torch.ones(1, 3, 4, 8))  # 3 frames of 4 descriptors
    >>> cache.seen, cache.frames.tolist(), cache.kept()[0].shape
    (9, [0, 2, 4, 6, 7, 8], torch.Size([1, 24, 8]))
    """

    def __init__(self, keep_every: int = 1) -> None:
        if keep_every < 1:
            raise ValueError(f"keep_every must be at least 1; it was {keep_every}")
        self.keep_every = keep_every
        self.seen = 0
        """Frames so far."""
        self.frames = torch.empty(0, dtype=torch.long)
        """Numbers of the frames whose descriptors are kept."""
        self.first: Tensor | None = None
        self.first_position: Tensor | None = None
        self.descriptors: Tensor | None = None
        self.position: Tensor | None = None

    def update(
        self,
        descriptors: Float[Tensor, "B n T C"],
        position: Tensor | None = None,
        *,
        first: Float[Tensor, "B P C"] | None = None,
        first_position: Tensor | None = None,
    ) -> None:
        """Add a chunk.

        Args:
            descriptors: of ``n`` frames, ``(B, n, T, C)``.
            position: of each descriptor, ``(n, T, axes)``, where positions matter.
            first: tokens of frame 0 to be kept in full, ``(B, P, C)``; only with the first chunk.
            first_position: theirs, ``(P, axes)``.

        Raises:
            ValueError: shapes that do not fit what is kept, or ``first`` after the first chunk.
        """
        old = self.descriptors
        if descriptors.dim() != 4 or (
            old is not None and (descriptors.shape[0], *descriptors.shape[2:]) != (old.shape[0], *old.shape[2:])
        ):
            like = "(B, n, T, C)" if old is None else f"({old.shape[0]}, n, {old.shape[2]}, {old.shape[3]})"
            raise ValueError(f"descriptors must be {like}; it was {tuple(descriptors.shape)}")
        if first is not None and self.seen:
            raise ValueError(f"first belongs to the first chunk; {self.seen} frames came before")
        if old is not None and (position is None) != (self.position is None):
            raise ValueError("position must come with every chunk or with none")
        if first is not None:
            self.first, self.first_position = first, first_position
        keep = self.frames % self.keep_every == 0
        new = torch.arange(self.seen, self.seen + descriptors.shape[1])
        if old is None:
            self.descriptors, self.position = descriptors, position
        else:
            past = keep.nonzero().squeeze(1).to(old.device)
            self.descriptors = torch.cat([old.index_select(1, past), descriptors], 1)
            if self.position is not None and position is not None:
                self.position = torch.cat([self.position.index_select(0, past), position])
        self.frames = torch.cat([self.frames[keep], new])
        self.seen += descriptors.shape[1]

    def kept(self) -> tuple[Float[Tensor, "B Nk C"], Tensor | None]:
        """What the newest chunk sees, features ``(B, Nk, C)`` and positions ``(Nk, axes)``: frame 0, then the rest."""
        if self.descriptors is None:
            raise ValueError("the cache is empty: update it with a chunk first")
        parts = [self.descriptors.flatten(1, 2)] if self.first is None else [self.first, self.descriptors.flatten(1, 2)]
        if self.position is None:
            return torch.cat(parts, 1), None
        at = [self.position.flatten(0, 1)]
        return torch.cat(parts, 1), torch.cat(at if self.first_position is None else [self.first_position, *at])

    def tensors(self) -> tuple[Tensor, ...]:
        """Everything that takes memory."""
        held = (self.first, self.first_position, self.descriptors, self.position)
        return tuple(t for t in held if t is not None)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(t.numel() * t.element_size() for t in self.tensors())
