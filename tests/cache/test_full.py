"""The full cache's buffer: the same tokens as joining them one after the other, and nothing written into a graph."""

import pytest
import torch

from glocal.cache import BlockCache, FullCache, SelectedTokens


def pieces(sizes, grad: bool = False):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, n, 4, generator=generator).requires_grad_(grad) for n in sizes]


@pytest.mark.parametrize("make", [FullCache, SelectedTokens, lambda: BlockCache(3)])
@pytest.mark.parametrize("sizes", [(5,) + (1,) * 20, (1, 9, 2, 30, 1), (4, 0, 4)])
def test_holds_what_came_in_its_order(make, sizes):
    cache, parts = make(), pieces(sizes)
    with torch.no_grad():
        for n, part in enumerate(parts):
            cache.update(part, -part)
            whole = torch.cat(parts[: n + 1], 2)
            assert cache.seen == whole.shape[2]
            (kept,) = cache.kept()
            assert torch.equal(kept.k, whole) and torch.equal(kept.v, -whole)


def test_steps_do_not_copy_what_is_held():
    cache, parts = FullCache(), pieces((64,) + (1,) * 20)
    places = set()
    with torch.no_grad():
        for part in parts:
            cache.update(part, part)
            places.add(cache.k.data_ptr())
    assert len(places) == 2  # the prompt's own memory, and one buffer


def test_views_handed_out_stay_as_they_were():
    cache, (first, *later) = FullCache(), pieces((6, 1, 1, 1, 1))
    with torch.no_grad():
        cache.update(first, first)
        for part in later:
            before = cache.k
            copy = before.clone()
            cache.update(part, part)
            assert torch.equal(before, copy)


def test_gradients_through_tokens_that_came_one_by_one():
    cache, parts = FullCache(), pieces((3, 1, 1, 1), grad=True)
    total = torch.zeros(())
    for part in parts:
        cache.update(part, part)
        total = total + (cache.k * cache.v).sum()  # saves what the next update must not write into
    total.backward()
    for n, part in enumerate(parts):
        assert torch.allclose(part.grad, 2 * part * (len(parts) - n))


def test_from_inference_mode_and_back():
    cache, parts = FullCache(), pieces((5, 1, 1, 1))
    with torch.inference_mode():
        cache.update(parts[0], parts[0])
        cache.update(parts[1].clone(), parts[1].clone())
    with torch.no_grad():
        for part in parts[2:]:
            cache.update(part, part)
    assert torch.equal(cache.k, torch.cat(parts, 2))
