"""S058: the layer against transformers and against loops, convolutions against torch's own in their limiting cases."""

from __future__ import annotations

import pytest
import torch
from torch.func import functional_call
from torch.nn.functional import avg_pool1d, scaled_dot_product_attention, unfold

from glocal.inspect import layer_call
from glocal.nn import (
    GroupedLinear,
    KnockingHeadsAttention,
    Rope,
    SlidingWindowAttention,
    SpanConvAttention,
    dynamic_conv,
)
from tests.nn.layers import project

DIM, HEADS, SIDE, LENGTH = 24, 4, 5, 13


class Sliding(SpanConvAttention, SlidingWindowAttention):
    """Both mechanisms."""


class Knocking(SpanConvAttention, KnockingHeadsAttention):
    """Both mechanisms."""


def make(kind=SpanConvAttention, heads=HEADS, **options):
    torch.manual_seed(0)
    layer = kind(DIM, heads, **({"kernel_size": SIDE} | options)).double()
    for p in layer.parameters():  # kernels far from even
        torch.nn.init.normal_(p, std=0.5)
    return layer


def tokens(length=LENGTH, batch=2):
    return torch.randn(batch, length, DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def attending(layer, x, mask=None):
    """Torch's attention for the attending half, ``(B, H, N, D)``."""
    q, k, v = project(layer, x)
    return scaled_dot_product_attention(q, k, v, mask, scale=layer.scale, enable_gqa=True)


def join(layer, *halves):
    return layer.o_proj(torch.cat(halves, 1).transpose(1, 2).flatten(2))


def convolving_by_loops(layer, x):
    """The section's second to fourth step, token by token, head by head and tap by tap."""
    batch, length, _ = x.shape
    heads, width, reach = layer.num_heads, layer.head_dim, SIDE // 2
    out = torch.zeros(batch, heads, length, width, dtype=x.dtype)
    values = x @ layer.conv_proj.weight.T + layer.conv_proj.bias
    for b in range(batch):
        for n in range(length):
            inside = [(j, n + j - reach) for j in range(SIDE) if 0 <= n + j - reach < length]
            mixed = sum(layer.depthwise.weight[:, 0, j] * x[b, at] for j, at in inside)
            span = layer.pointwise.weight @ mixed + layer.pointwise.bias
            query = layer.q_proj.weight @ x[b, n] + layer.q_proj.bias
            logits = layer.kernel_proj.weight @ (span * query) + layer.kernel_proj.bias
            for h in range(heads):
                taps = torch.softmax(logits[h * SIDE : (h + 1) * SIDE], 0)
                for j, at in inside:
                    out[b, h, n] += taps[j] * values[b, at, h * width : (h + 1) * width]
    return out


@pytest.mark.parametrize("sizes", [(32, 4, 9), (48, 2, 3), (48, 8, 7)])
def test_equals_transformers(sizes):
    transformers = pytest.importorskip("transformers")
    from transformers.models.convbert.modeling_convbert import ConvBertSelfAttention

    dim, heads, side = sizes
    config = transformers.ConvBertConfig(
        hidden_size=dim, num_attention_heads=heads, conv_kernel_size=side, attention_probs_dropout_prob=0.0
    )
    torch.manual_seed(0)
    peer, layer = ConvBertSelfAttention(config), SpanConvAttention(dim, heads, kernel_size=side, mask_conv=False)
    for p in peer.parameters():
        torch.nn.init.normal_(p, std=0.4)
    theirs = peer.key_conv_attn_layer
    pairs = [
        (layer.q_proj, peer.query),
        (layer.k_proj, peer.key),
        (layer.v_proj, peer.value),
        (layer.kernel_proj, peer.conv_kernel_layer),
        (layer.conv_proj, peer.conv_out_layer),
        (layer.depthwise, theirs.depthwise),
    ]
    for mine, other in pairs:
        mine.load_state_dict(other.state_dict())
    layer.pointwise.load_state_dict({"weight": theirs.pointwise.weight[..., 0], "bias": theirs.bias[:, 0]})
    layer.o_proj = torch.nn.Identity()
    x = torch.randn(2, 17, dim)
    torch.testing.assert_close(layer(x), peer(x)[0], atol=1e-5, rtol=0)
    keys = torch.arange(17) < torch.tensor([[17], [11]])
    mask = torch.zeros(2, 1, 1, 17).masked_fill(~keys[:, None, None], torch.finfo(torch.float32).min)
    torch.testing.assert_close(layer(x, keys=keys), peer(x, mask)[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("length", [1, 2, 4, LENGTH])
@pytest.mark.parametrize("heads", [2, 4])
def test_every_token_head_and_tap_by_itself(length, heads):
    layer, x = make(heads=heads), tokens(length)
    torch.testing.assert_close(layer(x), join(layer, attending(layer, x), convolving_by_loops(layer, x)))


def test_a_kernel_of_one_tap_gives_the_values_themselves():
    layer, x = make(kernel_size=1), tokens()
    torch.testing.assert_close(layer.convolve(x), layer.heads(layer.conv_proj(x), layer.num_heads))


def test_kernels_from_zero_are_moving_averages_with_zeros_around():
    layer, x = make(), tokens()
    for p in layer.kernel_proj.parameters():
        torch.nn.init.zeros_(p)
    means = avg_pool1d(layer.conv_proj(x).mT, SIDE, 1, SIDE // 2, count_include_pad=True).mT
    torch.testing.assert_close(layer.convolve(x), layer.heads(means, layer.num_heads))


@pytest.mark.parametrize("side", [1, 3, 9, 31])
def test_the_convolution_is_a_product_with_unfolded_columns(side):
    v, weights = torch.randn(2, 3, LENGTH, 4), torch.randn(2, 3, LENGTH, side)
    columns = unfold(v.transpose(2, 3).flatten(1, 2).unsqueeze(-1), (side, 1), padding=(side // 2, 0))
    columns = columns.view(2, 3, 4, side, LENGTH)
    torch.testing.assert_close(dynamic_conv(v, weights), torch.einsum("bhdkn,bhnk->bhnd", columns, weights))


def test_moving_the_tokens_moves_what_is_away_from_the_borders():
    layer, x = make(), tokens(30)
    reach, by = SIDE - 1, 7  # a span within a window
    moved = layer.convolve(x.roll(by, 1))
    inner = slice(by + reach, 30 - reach)
    torch.testing.assert_close(moved[:, :, inner], layer.convolve(x).roll(by, 2)[:, :, inner])
    assert not torch.allclose(moved[:, :, by : by + 1], layer.convolve(x).roll(by, 2)[:, :, by : by + 1])


def test_kernels_do_not_turn_with_rotary_positions():
    layer, plain, x = make(rope=Rope()), make(), tokens()
    torch.testing.assert_close(layer.convolve(x), plain.convolve(x))
    torch.testing.assert_close(layer(x), join(layer, attending(layer, x), layer.convolve(x)))
    assert not torch.allclose(layer(x), plain(x))


@pytest.mark.parametrize("backend", ["auto", "dense", "sdpa"])
def test_in_a_sliding_window(backend):
    layer, x = make(Sliding, window=3, backend=backend), tokens()
    i = torch.arange(LENGTH)
    mask = (i - i[:, None]).abs() < 3
    torch.testing.assert_close(layer(x), join(layer, attending(layer, x, mask), convolving_by_loops(layer, x)))


def test_with_knocking_heads():
    layer, x = make(Knocking, form="linear", on="v"), tokens()
    q, k, v = (layer.heads(proj(x), layer.num_heads) for proj in (layer.q_proj, layer.k_proj, layer.v_proj))
    heads = scaled_dot_product_attention(q, k, v @ layer.v_share.weight)
    torch.testing.assert_close(layer(x), join(layer, heads, convolving_by_loops(layer, x)))


def test_grouped_keys_and_a_gate():
    layer, x = make(heads=8, num_kv_heads=2, gate=True), tokens()
    heads = torch.cat([attending(layer, x), convolving_by_loops(layer, x)], 1).transpose(1, 2).flatten(2)
    torch.testing.assert_close(layer(x), layer.o_proj(heads * layer.g_proj(x)))


def test_a_padded_sequence_gives_what_it_gives_alone():
    layer, x = make(), tokens()
    keys = torch.arange(LENGTH) < torch.tensor([[LENGTH], [8]])
    out = layer(x, keys=keys)
    torch.testing.assert_close(out[1:, :8], layer(x[1:, :8]))
    torch.testing.assert_close(out[:1], layer(x[:1]))
    layer.mask_conv = False  # as in the paper's code, padding near the end is seen
    out = layer(x, keys=keys)
    reach = SIDE // 2
    alone = layer(x[1:, :8])
    torch.testing.assert_close(out[1:, : 8 - reach], alone[:, : 8 - reach])
    assert not torch.isclose(out[1:, 8 - reach : 8], alone[:, 8 - reach :]).all(-1).any()


def test_nan_in_padding_stays_there():
    layer, x = make(), tokens()
    keys = torch.arange(LENGTH) < torch.tensor([[LENGTH], [8]])
    expected, x = layer(x, keys=keys)[keys], x.masked_fill(~keys[..., None], torch.nan)
    torch.testing.assert_close(layer(x, keys=keys)[keys], expected)


def test_the_attending_half_can_be_inspected():
    layer, x = make(), tokens()
    call = layer_call(layer, x)
    assert call.weights.shape == (2, HEADS // 2, LENGTH, LENGTH)
    torch.testing.assert_close(call.weights @ call.v, attending(layer, x))


def test_gradients():
    torch.manual_seed(0)
    layer = SpanConvAttention(8, 4, kernel_size=3).double()
    names, values = zip(*layer.named_parameters(), strict=True)
    x, keys = torch.randn(1, 5, 8, dtype=torch.float64), torch.tensor([[True, True, True, True, False]])
    inputs = [t.detach().clone().requires_grad_() for t in (x, *values)]
    assert torch.autograd.gradcheck(
        lambda x, *w: functional_call(layer, dict(zip(names, w, strict=True)), (x,), {"keys": keys}), inputs
    )


def test_parameters_are_those_of_the_formulas():
    dim, heads, side = 64, 8, 9
    layer, inner = SpanConvAttention(dim, heads, qkv_bias=False, out_bias=False), dim // 2
    expected = 3 * dim * inner + dim * side + dim * inner + inner * heads // 2 * side + dim * inner + dim**2
    assert sum(p.numel() for p in layer.parameters()) == expected


@pytest.mark.parametrize("groups", [1, 2, 3])
def test_a_grouped_linear_layer_is_linear_layers_side_by_side(groups):
    layer, x = GroupedLinear(12, 18, groups).double(), torch.randn(2, 3, 5, 12, dtype=torch.float64)
    blocks = [part @ weight for part, weight in zip(x.chunk(groups, -1), layer.weight, strict=True)]
    torch.testing.assert_close(layer(x), torch.cat(blocks, -1) + layer.bias)


def test_options_that_say_none_are_left_out():
    layer = make(head_dim=None, lepe=None)
    assert layer.state_dict().keys() == make().state_dict().keys()
    assert torch.equal(layer(tokens()), make()(tokens()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 3}, "num_heads must be even.*; it was 3"),
        ({"heads": 10}, "num_heads must be even.*divide dim 24; it was 10"),
        ({"kernel_size": 4}, "kernel_size must be odd; it was 4"),
        ({"head_dim": 8}, "head_dim must be None"),
        ({"lepe": 3}, "lepe must be None"),
        ({"project": False}, "project must be True"),
        ({"causal": True}, "no causal-self form: the windows"),
    ],
)
def test_refuses_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_refuses_bad_input():
    with pytest.raises(ValueError, match=r"x must be a sequence \(B, N, 24\)"):
        make()(tokens(12).unflatten(1, (3, 4)))
    with pytest.raises(ValueError, match="no noncausal-cross form: kernels"):
        make()(tokens(), tokens())
    for shape in ((1, 2, 5, 4), (1, 2, 4, 3)):
        with pytest.raises(ValueError, match="v and weights must be"):
            dynamic_conv(torch.randn(1, 2, 5, 4), torch.randn(shape))
    with pytest.raises(ValueError, match="groups must divide dim 8 and out_dim 6; it was 4"):
        GroupedLinear(8, 6, 4)
