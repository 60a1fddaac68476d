"""The stream of S072: which frames a chunk sees, as a mask written out."""

from __future__ import annotations

import pytest
import torch

from glocal.cache import DescriptorCache
from glocal.nn import DescriptorAttention


def seen(layer, x, sizes, keep_every):
    """Which frames reach each frame through a stream of chunks, by gradients."""
    count, tokens = x.shape[1], x.shape[2]
    x = x.clone().requires_grad_()
    cache = DescriptorCache(keep_every)
    out = torch.cat([layer(chunk.flatten(1, 2), cache=cache) for chunk in x.split(sizes, 1)], 1)
    out = out.unflatten(1, (count, tokens))
    rows = [
        torch.autograd.grad(out[:, t].sum(), x, retain_graph=True)[0].abs().sum((0, 2, 3)) > 0 for t in range(count)
    ]
    return torch.stack(rows), cache


@pytest.mark.parametrize("keep_every", [1, 2, 3])
def test_a_chunk_sees_itself_and_every_mth_frame_of_the_past(keep_every):
    torch.manual_seed(0)
    layer = DescriptorAttention(16, 2, patches=(4, 4), special=1, factor=2).double()
    x = torch.randn(1, 9, 17, 16, dtype=torch.float64)
    sizes = [3, 2, 1, 3]
    chunk = [0, 0, 0, 1, 1, 2, 3, 3, 3]
    mask = torch.zeros(9, 9, dtype=torch.bool)
    for i in range(9):
        for j in range(9):
            mask[i, j] = chunk[j] == chunk[i] or (chunk[j] < chunk[i] and j % keep_every == 0)
    found, cache = seen(layer, x, sizes, keep_every)
    assert torch.equal(found, mask)
    assert cache.frames.tolist() == [j for j in range(9) if mask[8, j]] and cache.seen == 9


def test_frame_zero_is_kept_in_full_and_memory_is_counted():
    layer = DescriptorAttention(16, 2, patches=(8, 8), special=1, factor=4)
    cache, x = DescriptorCache(keep_every=100), torch.randn(2, 3, 65, 16)
    for _ in range(50):
        layer(x.flatten(1, 2), cache=cache)
    # Frame 0 in full with its positions, then 5 frames of 5 descriptors with theirs.
    assert [tuple(t.shape) for t in cache.tensors()] == [(2, 64, 16), (64, 1), (2, 5, 5, 16), (5, 5, 1)]
    assert cache.frames.tolist() == [0, 100, 147, 148, 149]
    torch.testing.assert_close(cache.kept()[0][:, :64], x[:, 0, 1:])
    assert cache.nbytes == 4 * 2 * (64 + 25) * 16 + 8 * (64 + 25)


def test_chunks_that_do_not_fit_are_refused():
    cache = DescriptorCache()
    with pytest.raises(ValueError, match="empty"):
        cache.kept()
    cache.update(torch.ones(1, 2, 3, 4), first=torch.ones(1, 9, 4))
    with pytest.raises(ValueError, match=r"descriptors must be \(1, n, 3, 4\); it was \(1, 2, 3, 5\)"):
        cache.update(torch.ones(1, 2, 3, 5))
    with pytest.raises(ValueError, match="first belongs to the first chunk; 2 frames"):
        cache.update(torch.ones(1, 2, 3, 4), first=torch.ones(1, 9, 4))
    with pytest.raises(ValueError, match="position must come with every chunk or with none"):
        cache.update(torch.ones(1, 2, 3, 4), torch.ones(2, 3, 2))
    with pytest.raises(ValueError, match="keep_every must be at least 1; it was 0"):
        DescriptorCache(0)
