"""S011 and S109: sliding windows, one size a layer or one a head."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from glocal.nn import MultiScaleWindowAttention, SlidingWindowAttention
from glocal.patterns import multiscale_windows
from tests.nn.layers import by_mask, gradients_agree, project, steps


def window_mask(length, window, causal=True):
    distance = torch.arange(length)[:, None] - torch.arange(length)
    return (distance >= 0) & (distance < window) if causal else distance.abs() < window


def data(length=100, dim=32):
    torch.manual_seed(0)
    return torch.randn(2, length, dim, dtype=torch.float64)


@pytest.mark.parametrize("causal", [True, False])
def test_a_window_counts_its_own_token(causal):
    layer, x = SlidingWindowAttention(32, 4, window=16, causal=causal).double(), data()
    mask = window_mask(100, 16, causal)
    torch.testing.assert_close(layer(x), by_mask(layer, x, mask))
    gradients_agree(layer, x, mask)


def test_a_long_window_is_causal_attention():
    layer, x = SlidingWindowAttention(32, 4, window=100, causal=True).double(), data()
    out = scaled_dot_product_attention(*project(layer, x), is_causal=True)
    torch.testing.assert_close(layer(x), layer.o_proj(out.transpose(1, 2).flatten(2)))


def test_equals_local_attention():
    local = pytest.importorskip("local_attention")
    layer, x = SlidingWindowAttention(32, 4, window=17, causal=True).double(), data(96)
    # Its exact window counts the keys before the query, not the query: 16 there are 17 here.
    peer = local.LocalAttention(
        window_size=16, causal=True, look_backward=1, exact_windowsize=True, use_rotary_pos_emb=False
    )
    out = peer(*project(layer, x))
    torch.testing.assert_close(layer(x), layer.o_proj(out.transpose(1, 2).flatten(2)))


def test_decoding_keeps_a_window():
    layer, x = SlidingWindowAttention(32, 4, num_kv_heads=2, window=32, causal=True).double(), data(200)
    with torch.no_grad():
        out, cache = steps(layer, x, prompt=50)
        torch.testing.assert_close(out, layer(x))
    assert cache.nbytes == 2 * 2 * 2 * 32 * 8 * 8  # k and v, batch, key heads, window, head_dim, bytes


# Multi-scale.


def test_each_head_has_its_window():
    layer, x = MultiScaleWindowAttention(32, 4, windows=(2, 8, 8, 40), causal=True).double(), data()
    mask = torch.stack([window_mask(100, w) for w in (2, 8, 8, 40)])
    torch.testing.assert_close(layer(x), by_mask(layer, x, mask))
    gradients_agree(layer, x, mask)


def test_equal_windows_are_a_sliding_window():
    x = data()
    layer = MultiScaleWindowAttention(32, 4, windows=(16,) * 4, causal=True).double()
    plain = SlidingWindowAttention(32, 4, window=16, causal=True).double()
    plain.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer(x), plain(x))


def test_equals_natten_by_head_group():
    natten = pytest.importorskip("natten")
    windows = multiscale_windows(16, 4, 1, by="heads")[0]
    layer, x = MultiScaleWindowAttention(32, 4, windows=windows, causal=True), data().float()
    q, k, v = (t.detach().transpose(1, 2) for t in project(layer, x))
    heads = [
        natten.na1d(q[:, :, [h]], k[:, :, [h]], v[:, :, [h]], kernel_size=w, is_causal=True, backend="flex-fna")
        for h, w in enumerate(windows)
    ]
    out = layer.o_proj(torch.cat(heads, 2).flatten(2))
    torch.testing.assert_close(layer(x), out, atol=1e-5, rtol=1e-5)


def test_budget_is_the_papers():
    def total(by):
        return sum(map(sum, multiscale_windows(128, 8, 12, by=by))) / (128 * 8 * 12)

    assert total("none") == 1 and total("heads") == total("layers") == 15 / 16 and total("both") == 225 / 256
    assert multiscale_windows(128, 8, 12)[0][0] == 8 and multiscale_windows(128, 8, 12)[-1][-1] == 512
    assert multiscale_windows(16, 6, 1, by="heads")[0] == (4, 4, 8, 16, 16, 32)


def test_decoding_keeps_a_ring_for_each_group_of_heads():
    layer, x = MultiScaleWindowAttention(32, 4, num_kv_heads=2, windows=(4, 4, 16, 16), causal=True).double(), data(60)
    with torch.no_grad():
        out, cache = steps(layer, x, prompt=7)
        torch.testing.assert_close(out, layer(x))
    assert [part.k.shape[2] for part in cache.kept()] == [4, 16]


def test_a_key_head_shared_by_two_windows_is_refused_in_decoding():
    layer = MultiScaleWindowAttention(32, 4, num_kv_heads=2, windows=(4, 8, 16, 16), causal=True)
    cache = layer.new_cache()
    with pytest.raises(ValueError, match="one window for all query heads"):
        layer(torch.randn(1, 1, 32), cache=cache)


@pytest.mark.parametrize("windows", [(4, 4, 4), (0, 1, 1, 1), (1.5, 1, 1, 1)])
def test_refuses_windows_that_do_not_fit(windows):
    with pytest.raises(ValueError, match="windows must be 4 integers"):
        MultiScaleWindowAttention(32, 4, windows=windows)


def test_refuses_a_base_that_would_be_empty():
    with pytest.raises(ValueError, match="window must be at least 16"):
        multiscale_windows(8, 4, 4)
