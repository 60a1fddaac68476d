"""The cache of dilated windows equals its mask."""

from __future__ import annotations

import pytest
import torch

from glocal.cache import DilatedWindowCache, WindowCache, replay


@pytest.mark.parametrize(("window", "dilation"), [(3, 2), (4, 3), (2, 5), (1, 2), (3, 1)])
def test_replay_is_the_mask(window, dilation):
    k = torch.randn(2, 3, 23, 4)
    mask = torch.zeros(23, 23, dtype=torch.bool)
    for i in range(23):
        for j in range(i, max(i - window * dilation, -1), -dilation):
            mask[i, j] = True
    assert torch.equal(replay(lambda: DilatedWindowCache(window, dilation), k, k), mask.expand(2, 3, 23, 23))


@pytest.mark.parametrize("chunks", [(7, 1, 1, 5), (1, 13), (14,)])
def test_tokens_may_come_many_at_once(chunks):
    k, v = torch.randn(2, 1, 2, 14, 4).unbind(0)
    cache, one = DilatedWindowCache(3, 2), DilatedWindowCache(3, 2)
    for a, b in zip(k.split(chunks, 2), v.split(chunks, 2), strict=True):
        cache.update(a, b)
    for t in range(14):
        one.update(k[:, :, t : t + 1], v[:, :, t : t + 1])
    for part, other in zip(cache.kept(), one.kept(), strict=True):
        order, other_order = part.position[0, 0].argsort(), other.position[0, 0].argsort()
        assert part.position[0, 0, order].tolist() == [9, 11, 13]
        assert torch.equal(part.v[:, :, order], v[:, :, [9, 11, 13]])
        assert torch.equal(part.k[:, :, order], other.k[:, :, other_order])


def test_memory_is_that_of_the_windows():
    cache, plain = DilatedWindowCache(3, 4), WindowCache(12)
    for _ in range(5):
        new = torch.randn(1, 2, 20, 4)
        cache.update(new, new)
        plain.update(new, new)
    assert cache.nbytes == plain.nbytes


def test_refuses_sizes_below_one():
    with pytest.raises(ValueError, match="window must be at least 1"):
        DilatedWindowCache(0, 2)
    with pytest.raises(ValueError, match="dilation must be at least 1; it was 0"):
        DilatedWindowCache(2, 0)
