"""S020: strip attention against PVT's, full attention and XCiT's local interaction; what one channel can say."""

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from glocal.inspect import verify
from glocal.nn import USES, Call
from glocal.nn.strip import StripAttention
from tests.peers import load_timm


def make(heads=2, **options):
    torch.manual_seed(0)
    return StripAttention(8 * heads, heads, **options).double()


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("options", [{"reduction": 2}, {"reduction": 1}, {"reduction": 2, "key_dim": 3}])
def test_uses(use, options):
    found = verify(type("Kind", (StripAttention,), {"tiny": {"grid": (4, 5), **options}}), use)
    assert found.holds == (use in StripAttention.uses), found


@pytest.mark.parametrize("reduction", [1, 2, 4])
def test_with_whole_keys_it_is_the_attention_of_pvt(reduction):
    kind = load_timm("models.pvt_v2").Attention
    layer = make(key_dim=8, reduction=reduction)
    peer = kind(16, num_heads=2, sr_ratio=reduction, linear_attn=False, qkv_bias=True).double().eval()
    peer.q.load_state_dict(layer.q_proj.state_dict()), peer.proj.load_state_dict(layer.o_proj.state_dict())
    with torch.no_grad():
        for name in ("weight", "bias"):
            both = torch.cat([getattr(layer.k_proj, name), getattr(layer.v_proj, name)])
            getattr(peer.kv, name).copy_(both)
    if reduction > 1:
        peer.sr.load_state_dict(layer.reduce.state_dict()), peer.norm.load_state_dict(layer.norm.state_dict())
    x = torch.randn(2, 8, 12, 16).double()
    torch.testing.assert_close(layer(x), peer(x.flatten(1, 2), (8, 12)).view(x.shape))


def test_with_whole_keys_of_the_whole_map_it_is_full_attention():
    layer = make(key_dim=8)
    x = torch.randn(2, 3, 5, 16).double()
    q, k, v = (p(x).view(2, 15, 2, 8).transpose(1, 2) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    wanted = scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
    torch.testing.assert_close(layer(x), layer.o_proj(wanted))


def seen(layer, x):
    """Weights of each head, ``(B, H, N, M)``, read with values that are one key each; and q and k of one channel."""
    q, k, _ = layer.project(x, x, None, None)
    eye = torch.eye(k.shape[2:4].numel()).double().expand(*k.shape[:2], -1, -1).view(*k.shape[:-1], -1)
    weights = layer.mix(q, k, eye, Call(x, x, None, None, False))
    return weights.flatten(2, 3), q.flatten(2), k.flatten(2)


def test_one_channel_has_one_order_of_keys_for_all_queries():
    layer = make(heads=3, reduction=2)
    weights, q, k = seen(layer, torch.randn(2, 8, 6, 24).double())
    torch.testing.assert_close(weights, (q[..., None] * k[..., None, :]).softmax(-1))
    top, bottom = (pick(-1)[..., None].expand_as(q) for pick in (k.argmax, k.argmin))
    assert torch.equal(weights.argmax(-1), torch.where(q > 0, top, bottom))
    order = k.argsort(-1)
    steps = weights.gather(-1, order[:, :, None].expand_as(weights)).diff(dim=-1)
    assert (steps * q.sign()[..., None] > 0).all()


def test_queries_of_zero_give_the_mean_of_the_values():
    layer = make(reduction=2)
    nn.init.zeros_(layer.q_proj.weight), nn.init.zeros_(layer.q_proj.bias)
    x = torch.randn(2, 8, 6, 16).double()
    v = layer.v_proj(layer.norm(layer.reduce(x.movedim(-1, 1)).movedim(1, -1)))
    torch.testing.assert_close(layer(x), layer.o_proj(v.mean((1, 2), keepdim=True)).expand_as(x))


def test_keys_of_another_map():
    layer = make(reduction=2, kv_dim=5)
    x, context = torch.randn(2, 3, 4, 16).double(), torch.randn(2, 7, 8, 5).double()
    assert layer(x, context).shape == x.shape
    swapped = layer(x.flip(1), context)
    torch.testing.assert_close(swapped, layer(x, context).flip(1))


def test_gradients():
    layer = make(heads=1, reduction=2)
    x = torch.randn(1, 4, 5, 8).double().requires_grad_()
    assert torch.autograd.gradcheck(layer, (x,))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    layer, x = make(reduction=2).float(), torch.randn(1, 8, 9, 16)
    wanted = layer(x)
    found = layer.to(dtype)(x.to(dtype))
    assert found.dtype == dtype and torch.allclose(found.float(), wanted, atol=0.05)


def test_bad_input():
    for match, options in (
        ("key_dim", {"key_dim": 0}),
        ("reduction", {"reduction": 0}),
        ("qk_norm does not go", {"qk_norm": "rms"}),
        ("lepe does not go", {"lepe": 3}),
        ("no causal-self form", {"causal": True}),
    ):
        with pytest.raises(ValueError, match=match):
            make(**options)
    layer = make(reduction=4)
    for match, call in (
        ("x must have 4 places", lambda: layer(torch.randn(1, 3, 9, 16).double())),
        ("context must have 4 places", lambda: layer(*(torch.randn(1, n, n, 16).double() for n in (5, 3)))),
        ("grid of 2 axes", lambda: layer(torch.randn(1, 9, 16).double())),
        ("padding", lambda: layer(torch.randn(1, 4, 4, 16).double(), keys=torch.ones(1, 4, 4, dtype=torch.bool))),
    ):
        with pytest.raises(ValueError, match=match):
            call()
