"""Latents in the place of keys and values, and one rotary key that all groups share."""

from __future__ import annotations

import torch
from torch import Tensor

from glocal.cache.base import Cache, FullCache, Kept
from glocal.cache.compressed import CompressedCache

__all__ = ["LatentCache"]


class LatentCache(Cache):
    """Stores each token's latents and its rotary key, once; another cache decides which tokens are kept.

    The keys of latent attention are ``(B, groups, n, rank + rope_dim)``, each latent followed by the rotary key, and
    its values are the latents themselves, ``(B, groups, n, rank)``. So ``groups * rank + rope_dim`` numbers a token
    say all. DeepSeek-AI, 2024, arXiv 2405.04434.

    Args:
        inner: what decides, over one head: `FullCache` where None, `WindowCache` for a ring, `CompressedCache`.

    Raises:
        ValueError: keys that are narrower than values.

    >>> import torch
    >>> from glocal.cache import LatentCache, WindowCache
    >>> cache, latent, rope = LatentCache(WindowCache(8)), torch.randn(1, 2, 100, 16), torch.randn(1, 1, 100, 4)
    >>> cache.update(torch.cat([latent, rope.expand(-1, 2, -1, -1)], -1), latent)
    >>> cache.kept()[0].k.shape, cache.nbytes == 8 * (2 * 16 + 4) * 4
    (torch.Size([1, 2, 8, 20]), True)
    """

    def __init__(self, inner: Cache | None = None) -> None:
        super().__init__()
        self.inner = FullCache() if inner is None else inner
        self.complete = self.inner.complete
        self._groups = 1

    def update(self, k: Tensor, v: Tensor, **signals: Tensor) -> None:
        self._check(k, v)
        if k.shape[-1] < v.shape[-1]:
            raise ValueError(f"k must be latents v {tuple(v.shape)} and a rotary key; it was {tuple(k.shape)}")
        self._groups = v.shape[1]
        self.inner.update(k[:, :1, :, v.shape[-1] :], v.transpose(1, 2).flatten(2)[:, None], **signals)
        self.seen = self.inner.seen

    def kept(self) -> tuple[Kept, ...]:
        heads = tuple(range(self._groups))
        return tuple(
            Kept(heads, *self._by_groups(part.k, part.v), part.position.expand(-1, self._groups, -1))
            for part in self.inner.kept()
        )

    @property
    def compressed(self) -> tuple[Tensor, Tensor] | None:
        """Keys and values of the blocks that a `CompressedCache` inside has."""
        blocks = self.inner.compressed if isinstance(self.inner, CompressedCache) else None
        return None if blocks is None else self._by_groups(*blocks)

    def tensors(self) -> tuple[Tensor, ...]:
        return self.inner.tensors()

    def _by_groups(self, rope: Tensor, latents: Tensor) -> tuple[Tensor, Tensor]:
        latent = latents[:, 0].unflatten(-1, (self._groups, -1)).transpose(1, 2)
        return torch.cat([latent, rope.expand(-1, self._groups, -1, -1)], -1), latent
