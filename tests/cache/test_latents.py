"""Latents and compressed blocks: the masks they amount to, written out, and what they hold."""

from __future__ import annotations

import pytest
import torch

from glocal.cache import CompressedCache, LatentCache, WindowCache, replay


def tokens(length, groups=2):
    torch.manual_seed(0)
    latent, rope = torch.randn(2, groups, length, 6), torch.randn(2, 1, length, 3)
    return torch.cat([latent, rope.expand(-1, groups, -1, -1)], -1), latent


CACHES = {
    "all": (LatentCache, lambda i, j: j <= i),
    "ring": (lambda: LatentCache(WindowCache(4)), lambda i, j: i - 4 < j <= i),
    "ring with sinks": (lambda: LatentCache(WindowCache(3, 2)), lambda i, j: j <= i and (j < 2 or j > i - 3)),
    "latents and blocks": (lambda: LatentCache(CompressedCache(4, 2)), lambda i, j: j <= i),
    "blocks": (lambda: CompressedCache(4, 2), lambda i, j: j <= i),
}


@pytest.mark.parametrize("name", CACHES)
def test_replay_is_the_mask(name):
    make, sees = CACHES[name]
    mask = torch.tensor([[sees(i, j) for j in range(13)] for i in range(13)])
    assert torch.equal(replay(make, *tokens(13)), mask.expand(2, 2, 13, 13))
    assert make().complete == all(sees(i, j) for i in range(13) for j in range(i + 1))


@pytest.mark.parametrize("name", CACHES)
@pytest.mark.parametrize("parts", [(13,), (1,) * 13, (5, 1, 1, 6)])
def test_keys_and_values_come_back_however_they_went_in(name, parts):
    make, sees = CACHES[name]
    (k, v), cache = tokens(13), make()
    for a, b in zip(k.split(parts, 2), v.split(parts, 2), strict=True):
        cache.update(a, b)
    (part,) = cache.kept()
    at = part.position[0, 0]
    assert part.heads == (0, 1) and sorted(at.tolist()) == [j for j in range(13) if sees(12, j)] and cache.seen == 13
    assert torch.equal(part.k, k[:, :, at]) and torch.equal(part.v, v[:, :, at])


@pytest.mark.parametrize("make", [lambda: CompressedCache(4, 3), lambda: LatentCache(CompressedCache(4, 3))])
@pytest.mark.parametrize("parts", [(13,), (1,) * 13, (3, 2, 8)])
def test_blocks_are_means_of_complete_blocks(make, parts):
    (k, v), cache = tokens(13), make()
    for a, b in zip(k.split(parts, 2), v.split(parts, 2), strict=True):
        cache.update(a, b)
    for found, t in zip(cache.compressed, (k, v), strict=True):
        torch.testing.assert_close(found, torch.stack([t[:, :, s : s + 4].mean(2) for s in (0, 3, 6, 9)], 2))


def test_only_latents_and_one_rotary_key_are_held():
    cache = LatentCache(WindowCache(4))
    assert cache.nbytes == 0 and cache.compressed is None
    cache.update(*tokens(13))
    assert cache.nbytes == 2 * 4 * (2 * 6 + 3) * 4
    cache = LatentCache(CompressedCache(4, 3))
    cache.update(*tokens(13))
    assert cache.nbytes == 2 * (13 + 4) * (2 * 6 + 3) * 4


def test_refuses():
    k, v = tokens(3)
    with pytest.raises(ValueError, match="k must be latents v"):
        LatentCache().update(v, k)
    with pytest.raises(ValueError, match="stride of blocks must be at least 1; it was 0"):
        CompressedCache(4, 0)
