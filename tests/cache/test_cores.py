"""The policy of `CoreCache` against a mask that is written out, and its pooling against loops."""

from __future__ import annotations

import pytest
import torch

from glocal.cache import CoreCache, replay
from glocal.cache.cores import pool_cores

# Groups of 2, window 3: c is the last token of a group, read as its core; 1 is a raw token.
PLAN = """
1.......
11......
111.....
1111....
.c111...
.c1111..
.c.c111.
.c.c1111
"""


def test_replay_is_the_mask():
    k = torch.randn(1, 2, 8, 4)
    mask = replay(lambda: CoreCache(2, 3, 0.5), k, k, query=k, turned=k)
    want = torch.tensor([[c != "." for c in row] for row in PLAN.split()])
    assert torch.equal(mask, want.expand(1, 2, -1, -1))


def tensors(length):
    torch.manual_seed(0)
    return {name: torch.randn(2, 3, length, 4, dtype=torch.float64) for name in ("k", "v", "query", "turned")}


@pytest.mark.parametrize("sizes", [[1] * 23, [23], [5, 1, 1, 9, 7], [4, 4, 4, 11]])
def test_many_tokens_at_once_are_as_good_as_one_by_one(sizes):
    every, cache, start = tensors(23), CoreCache(4, 6, 0.5), 0
    for size in sizes:
        cache.update(**{name: t[:, :, start : start + size] for name, t in every.items()})
        start += size
    (part,) = cache.kept()
    assert cache.cores == 4 and part.position[0, 0].tolist() == [3, 7, 11, 15, *range(16, 23)]
    for name, got in (("k", part.k), ("v", part.v)):
        torch.testing.assert_close(got[:, :, 4:], every[name][:, :, 16:])
    for b in range(2):
        for h in range(3):
            for u in range(4):
                at = slice(4 * u, 4 * u + 4)
                weights = (0.5 * every["k"][b, h, at] @ every["query"][b, h, 4 * u + 3]).softmax(0)
                torch.testing.assert_close(part.k[b, h, u], weights @ every["turned"][b, h, at])
                torch.testing.assert_close(part.v[b, h, u], weights @ every["v"][b, h, at])


def test_raw_tokens_stay_bounded():
    cache = CoreCache(4, 6, 0.5)
    for t, one in enumerate(torch.randn(200, 1, 1, 1, 4)):
        cache.update(one, one, query=one, turned=one)
        raw = cache.kept()[0].k.shape[2] - cache.cores
        assert raw == t + 1 if t < 6 else 6 <= raw < 10
    one_token = 4 * 4
    assert cache.nbytes <= one_token * (2 * (200 // 4 + 9) + 3)


def test_pooling_takes_the_last_real_query_and_real_tokens_only():
    every = tensors(8)
    real = torch.tensor([1, 1, 1, 0, 0, 0, 0, 0]).bool().expand(2, 1, 8)
    (core,) = pool_cores(every["query"], every["k"], 4, every["v"], scale=0.3, real=real)
    weights = (0.3 * every["k"][:, :, :3] @ every["query"][:, :, 2, :, None]).softmax(2)
    torch.testing.assert_close(core[:, :, 0], (weights * every["v"][:, :, :3]).sum(2))
    assert not core[:, :, 1].any()


def test_half_precision_is_pooled_in_float32():
    torch.manual_seed(0)
    k = torch.randn(1, 1, 64, 16)
    (core,) = pool_cores(k.half(), k.half(), 64, k.half() + 100, scale=0.0)
    (want,) = pool_cores(k, k, 64, k.half().float() + 100, scale=0.0)
    torch.testing.assert_close(core.float(), want, atol=0.05, rtol=0)


def test_errors_name_the_argument():
    for name, sizes in (("group_size", (0, 3)), ("window", (2, 0))):
        with pytest.raises(ValueError, match=f"{name} must be at least 1; it was 0"):
            CoreCache(*sizes, 1.0)
    k = torch.zeros(1, 1, 1, 4)
    with pytest.raises(ValueError, match=r"signals query and turned; it was given \['query'\]"):
        CoreCache(2, 2, 1.0).update(k, k, query=k)
