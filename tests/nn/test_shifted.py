"""S012: groups with shifted borders, against loops, rolling by hand, and transformers' chunked mask."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from glocal.nn import Attention, Call, Rope, ShiftedSparseAttention
from tests.nn.layers import by_mask, gradients_agree, project, steps


def make(group_size=16, unshift_ratio=0.5, sinks=4, heads=4, causal=True, **options):
    torch.manual_seed(0)
    settings = {"group_size": group_size, "unshift_ratio": unshift_ratio, "sinks": sinks, "causal": causal}
    return ShiftedSparseAttention(8 * heads, heads, **settings, **options).double()


def sample(length, dim=32, batch=2):
    return torch.randn(batch, length, dim, dtype=torch.float64)


def groups(length, size, heads, ratio):
    """The group of each token and head by the definition: ``(H, N)``."""
    shifted = round(ratio * heads / 2)
    rows = []
    for head in range(heads):
        moved = size // 2 if heads // 2 <= head < heads - shifted else 0
        rows.append([(i + moved) // size for i in range(length)])
    return torch.tensor(rows)


def brute_force(length, size, heads, ratio, sinks, causal=True):
    """The mask by loops: ``(H, N, N)``."""
    group, mask = groups(length, size, heads, ratio), torch.zeros(heads, length, length, dtype=torch.bool)
    for h in range(heads):
        for i in range(length):
            for j in range(length):
                near = group[h, i] == group[h, j]
                mask[h, i, j] = (near or j < sinks) and j <= i if causal else near or j < sinks or i < sinks
    return mask


@pytest.mark.parametrize("sinks", [0, 4])
@pytest.mark.parametrize("ratio", [0.0, 0.5, 1.0])
def test_equals_the_mask_written_out(ratio, sinks):
    layer, x = make(unshift_ratio=ratio, sinks=sinks), sample(64)
    mask = brute_force(64, 16, 4, ratio, sinks)
    assert torch.equal(layer.where(*project(layer, x)[:2], Call(x, x, None, None, False)).mask(64), mask)
    q, k, v = project(layer, x)
    peer = scaled_dot_product_attention(q, k, v, attn_mask=mask)
    torch.testing.assert_close(layer(x), layer.o_proj(peer.transpose(1, 2).flatten(2)))
    gradients_agree(layer, x, mask)


@pytest.mark.parametrize("length", [3, 61])
@pytest.mark.parametrize("causal", [True, False])
def test_grouped_heads_odd_lengths_and_both_uses(length, causal):
    layer, x = make(num_kv_heads=2, causal=causal, rope=Rope()), sample(length)
    mask = brute_force(length, 16, 4, 0.5, 4, causal)
    torch.testing.assert_close(layer(x), by_mask(layer, x, mask))


def test_limits_are_block_diagonal_and_causal_attention():
    x, causal = sample(64), torch.ones(64, 64, dtype=torch.bool).tril()
    block = torch.arange(64) // 16
    layer = make(unshift_ratio=1.0, sinks=0)
    torch.testing.assert_close(layer(x), by_mask(layer, x, causal & (block[:, None] == block)))
    layer = make(group_size=64, unshift_ratio=1.0, sinks=0)
    torch.testing.assert_close(layer(x), by_mask(layer, x, causal))
    layer = make(sparse=False)
    torch.testing.assert_close(layer(x), by_mask(layer, x, causal))


def rolled(layer, x, causal):
    """S2-Attn as its authors compute it: roll the shifted heads, attend in groups, roll back."""
    size, half = layer.group_size, layer.group_size // 2
    outs = []
    for h, (q, k, v) in enumerate(zip(*(t.unbind(1) for t in project(layer, x)), strict=True)):
        shift = half if h >= layer.num_heads // 2 else 0
        q, k, v = (t.roll(-shift, 1).unflatten(1, (-1, size)) for t in (q, k, v))
        outs.append(scaled_dot_product_attention(q, k, v, is_causal=causal).flatten(1, 2).roll(shift, 1))
    return layer.o_proj(torch.stack(outs, 2).flatten(2))


@pytest.mark.parametrize("causal", [True, False])
def test_leak_is_rolling_by_hand(causal):
    layer, x = make(unshift_ratio=0.0, sinks=0, wrap="leak", causal=causal), sample(64)
    torch.testing.assert_close(layer(x), rolled(layer, x, causal))


def test_only_the_leak_sees_the_future():
    x = sample(64)
    for wrap, pairs in (("leak", 64), ("split", 0)):
        layer = make(unshift_ratio=0.0, sinks=0, wrap=wrap)
        mask = layer.where(*project(layer, x)[:2], Call(x, x, None, None, False)).mask(64)
        ahead = mask[-1].triu(1)
        assert int(ahead.sum()) == pairs and int(ahead.any(-1).sum()) == pairs // 8
        other = x.clone()
        other[:, -1] += 1
        assert torch.equal(layer(other)[:, 0], layer(x)[:, 0]) == (wrap == "split")


def test_heads_without_shift_have_the_chunked_mask_of_transformers():
    masking = pytest.importorskip("transformers.masking_utils")
    chunked = masking.chunked_causal_mask_function(16, torch.zeros(1, dtype=torch.long))
    at = torch.arange(61)
    peer = torch.stack([torch.stack([torch.as_tensor(chunked(0, 0, i, j)) for j in at]) for i in at])
    x = sample(61)
    layer = make(sinks=0)
    mask = layer.where(*project(layer, x)[:2], Call(x, x, None, None, False)).mask(61)
    assert layer.shifted == (False, False, True, False)
    for head, shifted in enumerate(layer.shifted):
        assert torch.equal(mask[head], peer.view(61, 61)) != shifted


def test_padding_is_taken_out_of_every_group_of_every_item():
    layer, x = make(), sample(64)
    keys = torch.rand(2, 64) > 0.3
    mask = brute_force(64, 16, 4, 0.5, 4) & keys[:, None, None]
    torch.testing.assert_close(layer(x, keys=keys), by_mask(layer, x, mask))


@pytest.mark.parametrize("sparse", [True, False])
def test_decodes_as_it_is_set(sparse):
    layer, x = make(sparse=sparse, num_kv_heads=2, rope=Rope()), sample(50)
    with torch.no_grad():
        torch.testing.assert_close(steps(layer, x, 21)[0], layer(x))


def test_tuned_weights_attend_in_full():
    layer, full = make(sparse=False), Attention(32, 4, causal=True).double()
    full.load_state_dict(layer.state_dict())
    x = sample(64)
    assert torch.equal(layer(x), full(x))
    layer.sparse = True
    assert not torch.allclose(layer(x), full(x))


def test_numerical_gradients():
    layer, x = make(group_size=8, sinks=2, heads=2, unshift_ratio=0.0), sample(16, 16, 1)
    assert torch.autograd.gradcheck(layer, x.requires_grad_(), fast_mode=True)


def test_refuses_what_it_cannot_do():
    x = sample(64)
    with pytest.raises(ValueError, match="wrap='split' with a cache"):
        layer = make(wrap="leak")
        layer(x, cache=layer.new_cache())
    with pytest.raises(ValueError, match="multiple of group_size 16 tokens; it was 61"):
        make(wrap="leak")(x[:, :61])
    for bad in ({"group_size": 7}, {"unshift_ratio": 1.5}, {"sinks": -1}, {"wrap": "ring"}):
        with pytest.raises(ValueError, match=f"{next(iter(bad))} must"):
            make(**bad)
