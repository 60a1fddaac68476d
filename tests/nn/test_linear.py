"""The layer over linear_attend: its uses, its state, what it shares with softmax attention, and its options."""

import pytest
import torch

from glocal.cache import StateCache
from glocal.nn import Attention, Call, LinearAttention, Rope
from tests.nn.layers import project, steps


def brute(layer, q, k, v, mask):
    scores = (torch.nn.functional.elu(q) + 1) @ (torch.nn.functional.elu(k) + 1).mT * mask
    return layer.o_proj((scores / scores.sum(-1, keepdim=True) @ v).movedim(1, -2).flatten(-2))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("length", [None, 5])
def test_it_is_the_quotient_of_products(causal, length):
    torch.manual_seed(0)
    layer = LinearAttention(24, 3, causal=causal, rope=Rope()).double()
    context = torch.randn(2, 11, 24).double()
    x = context if length is None else torch.randn(2, length, 24).double()
    mask = torch.ones(x.shape[1], 11).tril(11 - x.shape[1]) if causal else torch.ones(x.shape[1], 11)
    found = layer(x) if length is None else layer(x, context)
    assert torch.allclose(found, brute(layer, *project(layer, x, context), mask), atol=1e-12)


def test_an_image_is_its_flattened_grid():
    layer = LinearAttention(24, 3)
    x = torch.randn(2, 4, 5, 24)
    assert torch.allclose(layer(x), layer(x.flatten(1, 2)).unflatten(1, (4, 5)), atol=1e-6)


@pytest.mark.parametrize("prompt", [0, 1, 9])
def test_decoding_with_a_state(prompt):
    torch.manual_seed(0)
    layer = LinearAttention(24, 4, num_kv_heads=2, causal=True, rope=Rope()).double()
    x = torch.randn(2, 20, 24).double()
    found, cache = steps(layer, x, prompt)
    assert torch.allclose(found, layer(x), atol=1e-12)
    assert isinstance(cache, StateCache) and cache.seen == 20 and cache.nbytes == 2 * 2 * (6 * 6 + 6) * 8


def test_a_state_takes_padding_and_beams():
    torch.manual_seed(0)
    layer = LinearAttention(24, 3, causal=True).double()
    x = torch.randn(2, 12, 24).double()
    keys = torch.arange(12) >= torch.tensor([[4], [0]])
    cache = layer.new_cache()
    layer(x[:, :10], keys=keys[:, :10], cache=cache)
    cache.select(torch.tensor([1, 0, 0]))
    found = layer(x[[1, 0, 0], 10:], keys=keys[[1, 0, 0]], cache=cache)
    wanted = layer(x, keys=keys)[[1, 0, 0], 10:]
    assert torch.allclose(found, wanted, atol=1e-12)
    alone = layer(x[:1, 4:])[:, 6:]
    assert torch.allclose(found[1:2], alone, atol=1e-12)


@pytest.mark.parametrize("kind", [Attention, LinearAttention])
def test_lepe_and_gate_stand_around_any_mixer(kind):
    torch.manual_seed(0)
    plain = kind(24, 3)
    layer = kind(24, 3, lepe=3, gate=True)
    layer.load_state_dict(plain.state_dict(), strict=False)
    x = torch.randn(2, 5, 6, 24)
    v = plain.v_proj(x)
    conv = torch.nn.functional.conv2d(
        v.movedim(-1, 1), layer.lepe.weight, layer.lepe.bias, padding=1, groups=24
    ).movedim(1, -1)
    q, k = plain.q_proj(x), plain.k_proj(x)
    mixed = plain.mix(*(plain.heads(t, 3) for t in (q, k, v)), Call(x, x, None, None, False)).movedim(1, -2).flatten(-2)
    assert torch.allclose(layer(x), layer.o_proj((mixed + conv) * layer.g_proj(x)), atol=1e-6)


@pytest.mark.parametrize(
    "options,match",
    [
        (dict(softcap=30.0), "softcap acts on single scores"),
        (dict(dropout=0.1), "dropout acts on single scores"),
        (dict(lepe=4), "side must be odd"),
        (dict(lepe=3, causal=True), "lepe needs values of every head"),
        (dict(feature="magic"), "feature must be a function or one of"),
    ],
)
def test_bad_settings(options, match):
    with pytest.raises(ValueError, match=match):
        LinearAttention(24, 3, **options)(torch.randn(1, 4, 24))


def test_bad_input():
    with pytest.raises(ValueError, match="lepe needs an image"):
        LinearAttention(24, 3, lepe=3)(torch.randn(1, 4, 24))
    with pytest.raises(ValueError, match="cache must be a StateCache"):
        LinearAttention(24, 3, causal=True)(torch.randn(1, 4, 24), cache=Attention(24, 3, causal=True).new_cache())
