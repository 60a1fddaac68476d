"""S003: convolutional additive attention by loops over taps, its limits, shifts, and what it costs."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from glocal.nn import Attention
from glocal.nn.additive import ContextGate, ConvAdditiveAttention


def make(dim=6, seed=0):
    """A layer whose batch norms have seen something."""
    torch.manual_seed(seed)
    layer = ConvAdditiveAttention(dim).double()
    layer(torch.randn(4, 6, 5, dim).double())
    for module in layer.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight), nn.init.normal_(module.bias)
    return layer.eval()


def convolve(t, weight, bias):
    """A depthwise convolution of ``(H, W, C)`` by loops over places and taps; outside is zero."""
    out = bias.expand_as(t).clone()
    h, w, _ = t.shape
    for i in range(h):
        for j in range(w):
            for a in range(-1, 2):
                for b in range(-1, 2):
                    if 0 <= i + a < h and 0 <= j + b < w:
                        out[i, j] += weight[:, 0, a + 1, b + 1] * t[i + a, j + b]
    return out


def gate(t, g):
    seen = convolve(t, g.dw.weight, g.dw.bias)
    seen = (seen - g.norm.running_mean) / (g.norm.running_var + g.norm.eps).sqrt() * g.norm.weight + g.norm.bias
    t = t * torch.sigmoid(seen.clamp(min=0) @ g.place.weight[0])[..., None]
    return t * torch.sigmoid(g.channel.weight @ t.flatten(0, 1).mean(0))


def test_by_loops():
    layer = make()
    x = torch.randn(2, 5, 7, 6).double()
    with torch.no_grad():
        for one, found in zip(x, layer(x), strict=True):
            q, k, v = (one @ w.T for w in layer.qkv_proj.weight.split(6))
            mixed = convolve(gate(q, layer.q_gate) + gate(k, layer.k_gate), layer.dw.weight, layer.dw.bias) * v
            assert torch.allclose(found, convolve(mixed, layer.o_proj.weight, layer.o_proj.bias), atol=1e-12)


def test_with_open_gates_and_convolutions_of_one_place_it_is_a_sum_times_a_value():
    layer = make()
    layer.q_gate = layer.k_gate = nn.Identity()
    for dw in (layer.dw, layer.o_proj):
        nn.init.dirac_(dw.weight, groups=6), nn.init.zeros_(dw.bias)
    x = torch.randn(2, 4, 3, 6).double()
    q, k, v = layer.qkv_proj(x).chunk(3, -1)
    assert torch.equal(layer(x), (q + k) * v)


def test_it_moves_with_the_map_once_the_channel_gates_stand_still():
    layer = make()
    x = torch.randn(1, 16, 17, 6).double()
    for g in (layer.q_gate, layer.k_gate):
        nn.init.zeros_(g.channel.weight)  # every channel times 1/2, whatever the means
    moved = layer(x.roll((3, 3), (1, 2)))
    # Three convolutions of 3 x 3 follow each other: what is 3 from a border, rolled or not, does not see it.
    assert torch.allclose(moved[:, 6:-3, 6:-3], layer(x)[:, 3:-6, 3:-6], atol=1e-12)


def test_every_place_counts_everywhere_through_the_channel_gates():
    layer = make()
    x = torch.randn(1, 9, 11, 6).double().requires_grad_()
    layer(x)[0, 0, 0].sum().backward()
    assert (x.grad.abs().sum(-1) > 0).all()


def test_gates_are_between_nothing_and_all():
    x = torch.randn(2, 5, 7, 6)
    ratio = ContextGate(6)(x) / x
    assert ((ratio > 0) & (ratio < 1)).all()


def test_four_times_the_tokens_are_four_times_the_work():
    def work(layer, side):
        with FlopCounterMode(display=False) as counted, torch.no_grad():
            layer(torch.randn(1, side, side, 16))
        return counted.get_total_flops()

    mine = ConvAdditiveAttention(16).eval()
    assert 3 < work(mine, 64) / work(mine, 32) < 5.5
    softmax = Attention(16, 1, backend="sdpa").eval()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert work(softmax, 64) / work(softmax, 32) > 8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    layer, x = make().float(), torch.randn(2, 5, 7, 6)
    wanted = layer(x)
    found = layer.to(dtype)(x.to(dtype))
    assert found.dtype == dtype and torch.allclose(found.float(), wanted, atol=0.1)


def test_gradients():
    layer = make(3)
    x = torch.randn(1, 3, 4, 3).double().requires_grad_()
    assert torch.autograd.gradcheck(layer, (x,))


def test_bad_input():
    with pytest.raises(ValueError, match="dim must"):
        ConvAdditiveAttention(0)
    with pytest.raises(ValueError, match="dropout"):
        ConvAdditiveAttention(4, dropout=1.0)
    with pytest.raises(ValueError, match=r"x must be \(B, H, W, 4\)"):
        ConvAdditiveAttention(4)(torch.randn(2, 7, 4))
