"""The last queries beside all keys and values: which they are, in which rows, and what they take."""

import pytest
import torch

from glocal.cache import QueryCache


@pytest.mark.parametrize("count", [0, 1, 3, 50])
@pytest.mark.parametrize("sizes", [(5,) + (1,) * 6, (1, 2, 9, 1)])
def test_keeps_all_tokens_and_the_last_queries(count, sizes):
    cache, parts = QueryCache(count), [torch.randn(2, 3, n, 4) for n in sizes]
    with torch.no_grad():
        for n, part in enumerate(parts):
            cache.update(part, -part, queries=2 * part)
            whole = torch.cat(parts[: n + 1], 2)
            (kept,) = cache.kept()
            assert torch.equal(kept.k, whole) and torch.equal(kept.v, -whole)
            assert torch.equal(cache.queries, 2 * whole[:, :, max(0, whole.shape[2] - count) :])
    assert cache.nbytes == 4 * (kept.k.numel() + kept.v.numel() + cache.queries.numel())


def test_rows_of_the_batch_stay_together():
    cache, t = QueryCache(2), torch.arange(3.0).view(3, 1, 1, 1).expand(3, 1, 4, 2)
    cache.update(t, t, queries=t)
    cache.select(torch.tensor([2, 2, 0]))
    for held in (cache.queries, cache.kept()[0].k, cache.kept()[0].v):
        assert held[:, 0, 0, 0].tolist() == [2, 2, 0]


def test_a_prompt_is_not_held_for_a_few_queries():
    cache, t = QueryCache(2), torch.randn(1, 1, 100, 4)
    cache.update(t, t, queries=t)
    assert cache.queries.untyped_storage().nbytes() == 2 * 4 * 4


def test_errors_name_the_argument():
    t = torch.zeros(1, 1, 3, 2)
    with pytest.raises(ValueError, match="count must be at least 0; it was -1"):
        QueryCache(-1)
    with pytest.raises(ValueError, match=r"queries must be .*; it was None"):
        QueryCache(1).update(t, t)
    with pytest.raises(ValueError, match=r"queries must be \(B, H, 3, D\)"):
        QueryCache(1).update(t, t, queries=t[:, :, 1:])
