"""S114: block choice against brute force and limiting cases."""

from __future__ import annotations

import pytest
import torch

from glocal.nn import MixtureOfBlocksAttention
from tests.nn.layers import by_mask, gradients_agree, project, steps


def brute_force(layer, x):
    """The mask by loops over the definition: ``(B, H, N, N)``."""
    q, k, _ = project(layer, x)
    k = k.repeat_interleave(layer.num_heads // layer.num_kv_heads, 1)
    size, length = layer.block_size, x.shape[1]
    mask = torch.zeros(*q.shape[:3], length, dtype=torch.bool)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for i in range(length):
                own = i // size
                scores = [(float(q[b, h, i] @ k[b, h, n * size : (n + 1) * size].mean(0)), -n) for n in range(own)]
                chosen = [-n for _, n in sorted(scores, reverse=True)[: layer.top_k - 1]]
                for n in [*chosen, own]:
                    mask[b, h, i, n * size : min((n + 1) * size, i + 1)] = True
    return mask


def make(top_k, **options):
    torch.manual_seed(0)
    return MixtureOfBlocksAttention(32, 4, block_size=16, top_k=top_k, causal=True, **options).double()


@pytest.mark.parametrize("num_kv_heads", [4, 2])
def test_equals_brute_force_with_a_short_last_block(num_kv_heads):
    layer = make(3, num_kv_heads=num_kv_heads)
    x = torch.randn(2, 100, 32, dtype=torch.float64)
    mask = brute_force(layer, x)
    torch.testing.assert_close(layer(x), by_mask(layer, x, mask))
    gradients_agree(layer, x, mask)


def test_enough_blocks_are_causal_attention_and_one_is_block_diagonal():
    x = torch.randn(2, 100, 32, dtype=torch.float64)
    causal = torch.ones(100, 100, dtype=torch.bool).tril()
    layer = make(7)
    torch.testing.assert_close(layer(x), by_mask(layer, x, causal))
    layer, block = make(1), torch.arange(100) // 16
    torch.testing.assert_close(layer(x), by_mask(layer, x, causal & (block[:, None] == block)))


def test_permuting_a_past_block_changes_nothing_after_it():
    layer, x = make(3), torch.randn(1, 100, 32, dtype=torch.float64)
    other = x.clone()
    other[:, 16:32] = x[:, 16:32][:, torch.randperm(16)]
    torch.testing.assert_close(layer(other)[:, 32:], layer(x)[:, 32:])


def test_ties_go_to_the_earlier_block():
    layer = make(2)
    x = torch.randn(1, 1, 32, dtype=torch.float64).expand(1, 64, 32)
    q, k, _ = project(layer, x)
    from glocal.nn import Call

    assert layer.choose(q, k, Call(x, x, None, None, False))[0, 0, -1].tolist() == [3, 0]


def test_decoding_pools_each_block_once():
    layer, x = make(3), torch.randn(2, 50, 32, dtype=torch.float64)
    with torch.no_grad():
        out, cache = steps(layer, x)
        torch.testing.assert_close(out, layer(x))
    assert cache.pooled.shape[2] == 3
    _, k, _ = project(layer, x)
    torch.testing.assert_close(cache.pooled[:, :, 1], k[:, :, 16:32].mean(2))


def test_without_causality():
    layer = MixtureOfBlocksAttention(32, 4, block_size=16, top_k=7).double()
    x, context = torch.randn(1, 100, 32, dtype=torch.float64), torch.randn(1, 55, 32, dtype=torch.float64)
    torch.testing.assert_close(layer(x), by_mask(layer, x, torch.ones(100, 100, dtype=torch.bool)))
    torch.testing.assert_close(layer(x, context), by_mask(layer, x, torch.ones(100, 55, dtype=torch.bool), context))


@pytest.mark.parametrize("name", ["block_size", "top_k"])
def test_refuses_empty_selections(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1; it was 0"):
        MixtureOfBlocksAttention(32, 4, **{name: 0})
