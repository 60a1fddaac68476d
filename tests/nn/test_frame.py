"""What every layer must do: its uses, decoding, odd lengths, padding, half precision, clear errors."""

from __future__ import annotations

import pytest
import torch

import glocal.nn
from glocal.inspect import verify
from glocal.nn import USES, Attention, Rope
from tests.nn.layers import by_mask, steps

LAYERS = sorted(
    {kind for kind in vars(glocal.nn).values() if isinstance(kind, type) and issubclass(kind, Attention)},
    key=lambda kind: kind.__name__,
)
DECODERS = [kind for kind in LAYERS if "causal-self" in kind.uses and "grid" not in kind.tiny]


def make(kind, *, dtype=torch.float64, **options):
    """A small layer and its grid."""
    torch.manual_seed(0)
    settings = {**kind.tiny, **options}
    grid, heads = settings.pop("grid", (12,)), settings.pop("num_heads", 2)
    return kind(8 * heads, heads, **settings).to(dtype).eval(), grid, 8 * heads


def default(kind):
    """Causal where the mechanism has nothing else."""
    return {"causal": "noncausal-self" not in kind.uses and "noncausal-cross" not in kind.uses}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("kind", LAYERS)
def test_uses_are_those_that_can_be_verified(kind, use):
    verdict = verify(kind, use)
    if use in kind.uses:
        assert verdict.holds, f"{kind.__name__} says that it has {use}: {verdict}"
    else:
        # A layer that is never causal says so when it is made, before it knows whether it is given a context.
        names = {use, "causal-self"} if use == "causal-cross" else {use}
        assert verdict.refused is not None and verdict.refused.split(" has no ")[1].split(" form")[0] in names


@pytest.mark.parametrize("kind", DECODERS)
@pytest.mark.parametrize("prompt", [0, 5, 12])
def test_decoding_after_a_prompt_equals_the_parallel_form(kind, prompt):
    layer, _, dim = make(kind, causal=True)
    x = torch.randn(2, 17, dim, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(steps(layer, x, prompt)[0], layer(x))


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("length", [1, 2, 7, 13])
def test_any_length(kind, length):
    if "grid" in kind.tiny:
        pytest.skip(f"{kind.__name__} is for grids; its own tests have odd ones")
    layer, _, dim = make(kind, **default(kind))
    if "noncausal-self" in kind.uses or "causal-self" in kind.uses:
        x = torch.randn(2, length, dim, dtype=torch.float64, requires_grad=True)
        layer(x).sum().backward()
        assert x.grad is not None and bool(x.grad.isfinite().all())


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(kind, dtype):
    layer, grid, dim = make(kind, dtype=torch.float32, **default(kind))
    x = torch.randn(1, *grid, dim)
    # The choice of blocks may differ near ties; most outputs must be near.
    near = ((layer.to(dtype)(x.to(dtype)).float() - layer.float()(x)).abs() < 0.1).float().mean()
    assert float(near) > 0.8


@pytest.mark.parametrize("kind", LAYERS)
def test_padding_does_not_count(kind):
    layer, grid, dim = make(kind, **default(kind))
    if len(grid) > 1 or getattr(kind, "no_padding", False):
        with pytest.raises(ValueError, match=r"keys|padding"):
            layer(torch.randn(1, *grid, dim, dtype=torch.float64), keys=torch.zeros(1, *grid, dtype=torch.bool))
        return
    x = torch.randn(1, *grid, dim, dtype=torch.float64)
    keys = torch.ones(1, *grid, dtype=torch.bool)
    keys[:, -3:] = False
    other = x.clone()
    other[:, -3:] = 5 * torch.randn_like(other[:, -3:])
    with torch.no_grad():
        torch.testing.assert_close(layer(x, keys=keys)[:, :-3], layer(other, keys=keys)[:, :-3])


@pytest.mark.parametrize("kind", LAYERS)
def test_nothing_real_gives_finite_outputs(kind):
    layer, grid, dim = make(kind, **default(kind))
    if len(grid) > 1 or getattr(kind, "no_padding", False):
        pytest.skip(f"{kind.__name__} takes no padding, and says so")
    x = torch.randn(2, *grid, dim, dtype=torch.float64, requires_grad=True)
    out = layer(x, keys=torch.zeros(2, *grid, dtype=torch.bool))
    out.sum().backward()
    assert bool(out.isfinite().all()) and bool(x.grad.isfinite().all())


@pytest.mark.parametrize("kind", LAYERS)
def test_refuses_bad_sizes(kind):
    options = {k: v for k, v in kind.tiny.items() if k not in ("grid", "num_heads")} | default(kind)
    heads = kind.tiny.get("num_heads", 2)
    with pytest.raises(ValueError, match="num_heads"):
        kind(8 * heads + 1, heads, **options)
    with pytest.raises(ValueError, match=r"num_kv_heads|num_heads"):
        kind(8 * heads, heads, num_kv_heads=heads + 1, **options)
    layer, grid, dim = make(kind, **default(kind))
    with pytest.raises(ValueError, match=rf"x must be \(B, \*grid, {dim}\)"):
        layer(torch.randn(1, *grid, dim + 1, dtype=torch.float64))
    with pytest.raises(ValueError, match="x must be"):
        layer(torch.randn(dim, dtype=torch.float64))


@pytest.mark.parametrize("kind", LAYERS)
def test_state_dict_round_trip(kind):
    layer, grid, dim = make(kind, **default(kind))
    torch.manual_seed(1)
    again, _, _ = make(kind, **default(kind))
    for parameter in again.parameters():
        torch.nn.init.normal_(parameter)
    again.load_state_dict(layer.state_dict())
    x = torch.randn(1, *grid, dim, dtype=torch.float64)
    assert torch.equal(layer(x), again(x))


def test_full_attention_is_torchs():
    torch.manual_seed(0)
    peer = torch.nn.MultiheadAttention(24, 3, bias=True, batch_first=True).double()
    layer = Attention(24, 3, qkv_bias=True, out_bias=True).double()
    weights = zip(peer.in_proj_weight.chunk(3), peer.in_proj_bias.chunk(3), strict=True)
    with torch.no_grad():
        for own, (weight, bias) in zip((layer.q_proj, layer.k_proj, layer.v_proj), weights, strict=True):
            own.weight.copy_(weight)
            own.bias.copy_(bias)
        layer.o_proj.load_state_dict(peer.out_proj.state_dict())
    x, context = torch.randn(2, 5, 24, dtype=torch.float64), torch.randn(2, 9, 24, dtype=torch.float64)
    torch.testing.assert_close(layer(x, context), peer(x, context, context)[0])
    keys = torch.rand(2, 9) > 0.3
    torch.testing.assert_close(layer(x, context, keys=keys), peer(x, context, context, key_padding_mask=~keys)[0])


@pytest.mark.parametrize("norm", ["rms", "rms_all", "layer"])
def test_grouped_heads_norms_and_positions_equal_transformers(norm):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    common = {**sizes, "num_hidden_layers": 1, "rms_norm_eps": 1e-6, "attn_implementation": "eager"}
    if norm == "rms":
        from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention as Peer
        from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding as Rotary

        config = transformers.Qwen3Config(**common)
    elif norm == "rms_all":
        from transformers.models.olmo2.modeling_olmo2 import Olmo2Attention as Peer
        from transformers.models.olmo2.modeling_olmo2 import Olmo2RotaryEmbedding as Rotary

        config = transformers.Olmo2Config(**common)
    else:  # no such peer: normalised by hand
        layer = Attention(16, 2, qk_norm="layer", rope=Rope()).double()
        x = torch.randn(1, 5, 16, dtype=torch.float64)
        q = torch.nn.functional.layer_norm(layer.heads(layer.q_proj(x), 2), (8,), eps=1e-6)
        torch.testing.assert_close(layer.project(x, x, None, None)[0], q)
        return
    torch.manual_seed(0)
    peer = Peer(config, 0).double().eval()
    layer = Attention(32, 4, num_kv_heads=2, causal=True, qk_norm=norm, rope=Rope()).double()
    layer.load_state_dict(peer.state_dict())
    x = torch.randn(2, 11, 32, dtype=torch.float64)
    where = Rotary(config)(x, torch.arange(11)[None])
    causal = torch.full((11, 11), -torch.inf, dtype=torch.float64).triu(1)[None, None]
    theirs = peer(x, tuple(t.double() for t in where), causal)[0]
    torch.testing.assert_close(layer(x), theirs, atol=1e-6, rtol=1e-6)  # its angles are float32


def test_cross_attention_aligns_queries_with_the_last_keys():
    layer = Attention(16, 2, causal=True).double()
    x, context = torch.randn(1, 3, 16, dtype=torch.float64), torch.randn(1, 5, 16, dtype=torch.float64)
    mask = torch.ones(3, 5, dtype=torch.bool).tril(2)
    torch.testing.assert_close(layer(x, context), by_mask(layer, x, mask, context))


def test_more_queries_than_keys_count_back_from_the_last_key():
    layer = Attention(16, 2, rope=Rope()).double()
    x, context = torch.randn(1, 5, 16, dtype=torch.float64), torch.randn(1, 3, 16, dtype=torch.float64)
    torch.testing.assert_close(layer(x, context), layer(x, context, positions=torch.arange(-2, 3)))
    torch.testing.assert_close(layer(x, context)[:, 2:], layer(x[:, 2:], context))


def test_errors_name_the_argument():
    layer = Attention(16, 2, causal=True)
    x = torch.randn(1, 4, 16)
    with pytest.raises(ValueError, match="keys must be booleans"):
        layer(x, keys=torch.ones(1, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match="context must be"):
        layer(x, torch.randn(1, 4, 8))
    with pytest.raises(ValueError, match="cache is for causal self-attention"):
        Attention(16, 2)(x, cache=layer.new_cache())
    with pytest.raises(ValueError, match="qk_norm"):
        Attention(16, 2, qk_norm="batch")
    with pytest.raises(ValueError, match="head_dim"):
        Attention(6, 2, rope=Rope())(torch.randn(1, 4, 6))
