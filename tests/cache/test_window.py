"""Ring buffers and full caches against masks written out."""

from __future__ import annotations

import pytest
import torch

from glocal.cache import BlockCache, FullCache, WindowCache, replay


def data(batch=2, heads=2, length=20, dim=4):
    torch.manual_seed(0)
    return torch.randn(batch, heads, length, dim), torch.randn(batch, heads, length, dim + 1)


@pytest.mark.parametrize("sinks", [0, 3])
@pytest.mark.parametrize("windows", [1, 4, (4, 4), (2, 7), (50, 3)])
def test_window_cache_is_a_window_and_sinks(windows, sinks):
    k, v = data()
    i, j = torch.arange(20)[:, None], torch.arange(20)
    sizes = (windows, windows) if isinstance(windows, int) else windows
    mask = torch.stack([(j <= i) & ((i - j < w) | (j < sinks)) for w in sizes]).expand(2, -1, -1, -1)
    assert torch.equal(replay(lambda: WindowCache(windows, sinks), k, v), mask)


@pytest.mark.parametrize("make", [lambda: WindowCache((2, 7), 3), FullCache, lambda: BlockCache(3)])
def test_many_tokens_at_once_are_as_good_as_one_by_one(make):
    k, v = data()
    one, many = make(), make()
    for t in range(20):
        one.update(k[:, :, t : t + 1], v[:, :, t : t + 1])
    for part in ((0, 1), (1, 9), (9, 9), (9, 20)):
        many.update(k[:, :, slice(*part)], v[:, :, slice(*part)])
    assert one.seen == many.seen == 20 and one.nbytes == many.nbytes
    for a, b in zip(one.kept(), many.kept(), strict=True):
        for x, y in ((a.k, b.k), (a.v, b.v), (a.position, b.position)):
            assert torch.equal(x, y)


def test_entries_are_what_was_given():
    k, v = data()
    cache = WindowCache((2, 7), 3)
    cache.update(k, v)
    for part in cache.kept():
        for n, head in enumerate(part.heads):
            at = part.position[0, n]
            assert torch.equal(part.k[:, n], k[:, head, at]) and torch.equal(part.v[:, n], v[:, head, at])


def test_memory_of_a_window_does_not_grow():
    k, v = data(length=1)
    cache = WindowCache(8, 4)
    cache.update(k, v)
    before = cache.nbytes
    for _ in range(1000):
        cache.update(k, v)
    assert cache.nbytes == before and cache.seen == 1001


def test_full_cache_is_causal():
    k, v = data()
    assert torch.equal(replay(FullCache, k, v)[1, 1], torch.ones(20, 20, dtype=torch.bool).tril())


def test_block_cache_pools_complete_blocks():
    k, v = data()
    cache = BlockCache(3)
    cache.update(k, v)
    torch.testing.assert_close(cache.pooled, k[:, :, :18].unflatten(2, (6, 3)).mean(3))


def test_bad_input():
    k, v = data()
    with pytest.raises(ValueError, match="window must be at least 1"):
        WindowCache(0)
    with pytest.raises(ValueError, match="sinks must not be negative"):
        WindowCache(1, -1)
    with pytest.raises(ValueError, match="window has 3 sizes, k has 2 heads"):
        WindowCache((1, 2, 3)).update(k, v)
    with pytest.raises(ValueError, match="k and v must be"):
        FullCache().update(k, v[:, :, 1:])
    with pytest.raises(ValueError, match="size of a block"):
        BlockCache(0)
