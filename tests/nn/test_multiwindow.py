"""S085: blocks and biases of each head against dense masks, torch's attention and Swin's window attention."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from glocal.nn import MultiWindowAttention
from glocal.nn.multiwindow import divisor_windows
from tests.nn.layers import by_mask, gradients_agree, project, steps
from tests.peers import load_timm

WINDOWS = (2, 5, 10, 25, 50, 125, 0, 0)


def make(windows, dim=None, **options):
    torch.manual_seed(0)
    layer = MultiWindowAttention(dim or 8 * len(windows), len(windows), windows=windows, **options).double()
    for values in layer.bias:
        torch.nn.init.normal_(values)
    return layer


def dense(layer, length, shifted=False):
    """Mask and bias ``(H, N, N)``, pair by pair from the definition."""
    mask = torch.zeros(layer.num_heads, length, length, dtype=torch.bool)
    bias = torch.zeros(layer.num_heads, length, length, dtype=torch.float64)
    tables = iter(layer.bias)
    for h, w in enumerate(layer.windows):
        values = next(tables) if w else None
        move = w // 2 if shifted else 0
        for i in range(length):
            for j in range(length):
                if w == 0 or (i - move) // w == (j - move) // w:
                    mask[h, i, j] = j <= i or not layer.causal
                    if w:
                        bias[h, i, j] = values[j - i + w - 1]
    return mask, bias


def test_the_papers_decoder_equals_dense_attention_over_250_tokens():
    layer = make(WINDOWS, qkv_bias=True, out_bias=True)
    x = torch.randn(1, 250, 64, dtype=torch.float64)
    mask, bias = dense(layer, 250)
    q, k, v = project(layer, x)
    out = scaled_dot_product_attention(q, k, v, attn_mask=bias.masked_fill(~mask, -torch.inf))
    torch.testing.assert_close(layer(x), layer.o_proj(out.transpose(1, 2).flatten(2)))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shift", [False, True])
def test_gradients_with_short_last_blocks_and_shared_key_heads(causal, shift):
    layer = make((3, 5, 4, 0), dim=32, num_kv_heads=2, causal=causal, shift=shift)
    x = torch.randn(2, 13, 32, dtype=torch.float64)
    mask, bias = dense(layer, 13, shift)
    torch.testing.assert_close(layer(x), by_mask(layer, x, mask, bias=bias))
    gradients_agree(layer, x, mask, bias=bias)
    # gradients_agree takes the bias as it is written out; its own gradient, by the same weights.
    weights = torch.randn_like(x)
    mine = torch.autograd.grad((layer(x) * weights).sum(), list(layer.bias))
    mask, bias = dense(layer, 13, shift)
    theirs = torch.autograd.grad((by_mask(layer, x, mask, bias=bias) * weights).sum(), list(layer.bias))
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b)
        assert float(a.abs().max()) > 0


def test_gradcheck():
    layer = make((2, 0), dim=4)
    x = torch.randn(1, 5, 4, dtype=torch.float64, requires_grad=True)

    def fn(x, values):
        return torch.func.functional_call(layer, {"bias.0": values}, (x,))

    assert torch.autograd.gradcheck(fn, (x, layer.bias[0].detach().requires_grad_()))


def test_all_global_heads_are_torchs_attention():
    peer = torch.nn.MultiheadAttention(24, 3, bias=True, batch_first=True).double()
    layer = make((0, 0, 0), qkv_bias=True, out_bias=True)
    parts = zip(peer.in_proj_weight.chunk(3), peer.in_proj_bias.chunk(3), strict=True)
    with torch.no_grad():
        for own, (weight, bias) in zip((layer.q_proj, layer.k_proj, layer.v_proj), parts, strict=True):
            own.weight.copy_(weight)
            own.bias.copy_(bias)
        layer.o_proj.load_state_dict(peer.out_proj.state_dict())
    x = torch.randn(2, 10, 24, dtype=torch.float64)
    torch.testing.assert_close(layer(x), peer(x, x, x)[0])
    assert not list(layer.bias)


def copy_joint(peer, layer):
    """Our weights in timm's joint projection."""
    parts = (layer.q_proj, layer.k_proj, layer.v_proj)
    with torch.no_grad():
        peer.qkv.weight.copy_(torch.cat([part.weight for part in parts]))
        peer.qkv.bias.copy_(torch.cat([part.bias for part in parts]))
    peer.proj.load_state_dict(layer.o_proj.state_dict())


def test_all_global_heads_are_timms_attention():
    peer = load_timm("layers").Attention(24, 3, qkv_bias=True).double()
    layer = make((0, 0, 0), qkv_bias=True, out_bias=True)
    copy_joint(peer, layer)
    x = torch.randn(2, 10, 24, dtype=torch.float64)
    torch.testing.assert_close(layer(x), peer(x))


@pytest.mark.parametrize("heads", [1, 2])
def test_heads_of_one_window_are_timms_window_attention_on_a_row(heads):
    swin = load_timm("models.swin_transformer")
    layer = make((5,) * heads, dim=16, qkv_bias=True, out_bias=True)
    peer = swin.WindowAttention(16, heads, window_size=(1, 5)).double()
    copy_joint(peer, layer)
    with torch.no_grad():  # it counts query minus key, we key minus query
        peer.relative_position_bias_table.copy_(torch.stack([values.flip(0) for values in layer.bias], 1))
    x = torch.randn(2, 20, 16, dtype=torch.float64)
    windows = swin.window_partition(x[:, None], (1, 5)).flatten(1, 2)
    theirs = swin.window_reverse(peer(windows).view(-1, 1, 5, 16), (1, 5), 1, 20)
    torch.testing.assert_close(layer(x), theirs[:, 0])


def test_a_window_of_the_whole_length_is_full_attention_with_a_relative_bias():
    layer = make((10, 10))
    x = torch.randn(2, 10, 16, dtype=torch.float64)
    place = torch.arange(10)
    bias = torch.stack([values[place - place[:, None] + 9] for values in layer.bias])
    torch.testing.assert_close(layer(x), by_mask(layer, x, torch.ones(10, 10, dtype=torch.bool), bias=bias))


def swin(window, layer):
    """Swin's layer with a window of one row, with our weights."""
    swin = pytest.importorskip("transformers.models.swin.modeling_swin")
    config = swin.SwinConfig(qkv_bias=True, attn_implementation="eager")
    peer = swin.SwinAttention(config, 16, 1, window).double().eval()
    peer.relative_position_bias = swin.SwinRelativePositionBias(1, (1, window)).double()
    with torch.no_grad():
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            getattr(peer, name).load_state_dict(getattr(layer, name).state_dict())
        # Swin counts query minus key, we key minus query.
        peer.relative_position_bias.relative_position_bias_table.copy_(layer.bias[0].flip(0)[:, None])
    return peer


def test_one_head_is_swins_window_attention_on_a_row():
    layer = make((5,), dim=16, qkv_bias=True, out_bias=True)
    x = torch.randn(2, 20, 16, dtype=torch.float64)
    theirs = swin(5, layer)(x.view(8, 5, 16))[0].view(2, 20, 16)
    torch.testing.assert_close(layer(x), theirs, atol=1e-6, rtol=1e-6)  # its softmax is in float32


def test_shifted_blocks_are_swins_rolled_windows():
    layer = make((5,), dim=16, qkv_bias=True, out_bias=True, shift=True)
    x = torch.randn(2, 20, 16, dtype=torch.float64)
    wrapped = torch.arange(20).roll(-2).view(4, 5) < 2
    mask = -100.0 * (wrapped[:, :, None] != wrapped[:, None]).double()
    theirs = swin(5, layer)(x.roll(-2, 1).view(8, 5, 16), mask)[0].view(2, 20, 16).roll(2, 1)
    torch.testing.assert_close(layer(x), theirs, atol=1e-6, rtol=1e-6)


def test_blocks_are_independent():
    layer = make((5, 5))
    x = torch.randn(1, 20, 16, dtype=torch.float64)
    other = x.clone()
    other[:, 7] += 1
    changed = (layer(x) != layer(other)).any(-1)[0]
    assert changed.nonzero().flatten().tolist() == [5, 6, 7, 8, 9]


def test_causal_decoding_with_bias_and_shift():
    layer = make((3, 4, 0), causal=True, shift=True)
    x = torch.randn(2, 17, 24, dtype=torch.float64)
    torch.testing.assert_close(steps(layer, x, 6)[0], layer(x))


def test_windows_are_the_divisors():
    assert divisor_windows(250, 8) == WINDOWS
    assert divisor_windows(64, 8) == (2, 4, 8, 16, 32, 0, 0, 0)
    assert divisor_windows(7, 2) == (0, 0)
    with pytest.raises(ValueError, match="num_heads must be at least 6"):
        divisor_windows(250, 5)


@pytest.mark.parametrize("windows", [(2,), (2, -1), (2, 2.0), (True, 2)])
def test_refuses_bad_windows(windows):
    with pytest.raises(ValueError, match="windows must be 2 integers"):
        MultiWindowAttention(16, 2, windows=windows)
