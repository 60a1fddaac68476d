"""S028: the pattern against masks written out, and against three peers."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from glocal.cache import WindowCache, replay
from glocal.nn import LongT5Attention, PrefixGlobalAttention
from glocal.scores import T5Buckets
from tests.nn.layers import by_mask, gradients_agree, project, steps


def written_out(length, prefix, radius, causal=False):
    pairs = [
        [(i < prefix or j < prefix or abs(i - j) <= radius) and not (causal and j > i) for j in range(length)]
        for i in range(length)
    ]
    return torch.tensor(pairs)


def make(prefix, radius, **options):
    torch.manual_seed(0)
    layer = PrefixGlobalAttention(32, 4, prefix=prefix, radius=radius, **options).double()
    if layer.bias is not None:
        torch.nn.init.normal_(layer.bias.weight)
    return layer


SIZES = [(200, 16, 8), (37, 5, 8), (37, 13, 3), (20, 1, 0), (9, 0, 4)]


@pytest.mark.parametrize(("length", "prefix", "radius"), SIZES)
def test_equals_sdpa_under_the_mask(length, prefix, radius):
    layer, x = make(prefix, radius), torch.randn(2, length, 32, dtype=torch.float64)
    q, k, v = project(layer, x)
    mask = written_out(length, prefix, radius)
    out = sdpa(q, k, v, attn_mask=mask)
    torch.testing.assert_close(layer(x), layer.o_proj(out.movedim(1, -2).flatten(-2)))
    gradients_agree(layer, x, mask)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("length", "prefix", "radius"), SIZES)
def test_every_backend_sees_the_same_pairs_with_grouped_heads_and_biases(length, prefix, radius, causal):
    layer = make(prefix, radius, causal=causal, num_kv_heads=2, num_buckets=8, max_distance=16, scale=1.0).float()
    x, mask = torch.randn(2, length, 32), written_out(length, prefix, radius, causal)
    bias = T5Buckets(layer.bias.weight, bidirectional=not causal, max_distance=16).dense((length,), (length,))
    expected = by_mask(layer, x, mask, bias=bias)
    for backend in ("auto", "sdpa", "dense"):
        layer.backend = backend
        torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-4)


def test_enough_prefix_is_full_attention():
    x = torch.randn(2, 20, 32, dtype=torch.float64)
    for prefix in (20, 21, 500):
        layer = make(prefix, 2)
        torch.testing.assert_close(layer(x), by_mask(layer, x, torch.ones(20, 20, dtype=torch.bool)))


@pytest.mark.parametrize(("length", "prefix", "radius"), [(512, 64, 15), (1024, 512, 127), (50, 50, 3), (40, 0, 3)])
def test_counts(length, prefix, radius):
    """Prefix rows, prefix columns of the others, and the band of the others among themselves."""
    rest = length - prefix
    band = sum(min(i + radius, rest - 1) - max(i - radius, 0) + 1 for i in range(rest))
    pattern = make(prefix, radius).pattern(length)
    assert pattern.count(length) == prefix * length + rest * prefix + band
    assert pattern.count(length) == int(written_out(length, prefix, radius).sum())


@pytest.mark.parametrize("inside", [True, False])
def test_padding_inside_and_outside_the_prefix(inside):
    layer, x = make(6, 3, num_buckets=8), torch.randn(2, 30, 32, dtype=torch.float64)
    keys = torch.ones(2, 30, dtype=torch.bool)
    keys[0, 2 : 4 if inside else 2] = False
    keys[1, 22:] = False
    mask = written_out(30, 6, 3) & keys[:, None, None]
    bias = layer.score(None).dense((30,), (30,))
    torch.testing.assert_close(layer(x, keys=keys), by_mask(layer, x, mask, bias=bias))


def test_without_a_prefix_it_is_local_longt5():
    layer = make(0, 7, num_buckets=32, scale=1.0)
    local = LongT5Attention(32, 4, radius=7, global_block_size=None).double()
    local.load_state_dict(layer.state_dict())
    x, keys = torch.randn(2, 50, 32, dtype=torch.float64), torch.arange(50) < torch.tensor([50, 33])[:, None]
    torch.testing.assert_close(layer(x, keys=keys), local(x, keys=keys))
    longt5 = pytest.importorskip("transformers.models.longt5.modeling_longt5")
    config = longt5.LongT5Config(d_model=32, d_kv=8, num_heads=4, local_radius=7, dropout_rate=0.0)
    peer = longt5.LongT5LocalAttention(config, has_relative_attention_bias=True).double()
    state = {name.replace("_proj", ""): value for name, value in layer.state_dict().items()}
    peer.load_state_dict({name.replace("bias.", "relative_attention_bias."): value for name, value in state.items()})
    mask = longt5._get_local_attention_mask(keys.long(), 8, x.device)
    theirs = peer(x, mask=mask)[0]
    torch.testing.assert_close(layer(x, keys=keys)[keys], theirs[keys], atol=1e-5, rtol=1e-5)  # its softmax: float32


@pytest.mark.parametrize("prefix", [1, 16, 21])
def test_equals_longformer_with_one_set_of_projections(prefix):
    longformer = pytest.importorskip("transformers.models.longformer.modeling_longformer")
    torch.manual_seed(0)
    config = longformer.LongformerConfig(
        hidden_size=32, num_attention_heads=4, attention_window=[16], attention_probs_dropout_prob=0.0
    )
    peer = longformer.LongformerSelfAttention(config, 0).double().eval()
    layer = make(prefix, 8, qkv_bias=True)
    for name in ("query", "key", "value"):
        own = getattr(layer, f"{name[0]}_proj").state_dict()
        getattr(peer, name).load_state_dict(own)
        getattr(peer, f"{name}_global").load_state_dict(own)
    x, place = torch.randn(2, 96, 32, dtype=torch.float64), torch.arange(96)
    lengths = torch.tensor([96, 70])[:, None]
    first, padding = (place < prefix).expand(2, -1), place >= lengths
    marks = torch.where(padding, -10000.0, torch.where(first, 10000.0, 0.0)).double()
    theirs = peer(x, marks, is_index_masked=padding, is_index_global_attn=first & ~padding, is_global_attn=True)[0]
    mixed = layer.o_proj(theirs)
    torch.testing.assert_close(layer(x, keys=~padding)[~padding], mixed[~padding], atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:flex_attention called")
def test_equals_flex_attention():
    flex = pytest.importorskip("torch.nn.attention.flex_attention")
    layer, x = make(16, 8), torch.randn(1, 200, 32, dtype=torch.float64)
    rules = flex.or_masks(
        lambda b, h, q, k: k < 16,
        lambda b, h, q, k: q < 16,
        lambda b, h, q, k: (q - k).abs() <= 8,
    )
    block_mask = flex.create_block_mask(rules, None, None, 200, 200, device="cpu")
    with torch.no_grad():
        q, k, v = project(layer, x)
        out = flex.flex_attention(q, k, v, block_mask=block_mask)
        torch.testing.assert_close(layer(x), layer.o_proj(out.movedim(1, -2).flatten(-2)), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(("prefix", "radius"), [(3, 2), (0, 3), (9, 1)])
def test_the_causal_cache_is_the_causal_mask(prefix, radius):
    layer = make(prefix, radius, causal=True)
    k = torch.zeros(1, 2, 25, 4)
    expected = written_out(25, prefix, radius, causal=True)
    assert torch.equal(layer.pattern(25).mask(25), expected)
    for new in (layer.new_cache, lambda: WindowCache(radius + 1, sinks=prefix)):
        assert torch.equal(replay(new, k, k), expected.expand(1, 2, -1, -1))


@pytest.mark.parametrize("prompt", [0, 11])
def test_decoding_knows_how_far_each_key_is(prompt):
    layer = make(3, 4, causal=True, num_buckets=8, max_distance=12, num_kv_heads=2)
    x = torch.randn(2, 40, 32, dtype=torch.float64)
    with torch.no_grad():
        out, cache = steps(layer, x, prompt)
        torch.testing.assert_close(out, layer(x))
    assert cache.kept()[0].k.shape[2] == 3 + 5


def test_a_prefix_carries_what_no_window_reaches_in_two_layers():
    """From the last token to the first of the rest: through the prefix, not without it."""
    x = torch.randn(1, 60, 32, dtype=torch.float64, requires_grad=True)
    reached = []
    for prefix in (2, 0):
        first, second = make(prefix, 3), make(prefix, 3)
        (grad,) = torch.autograd.grad(second(first(x))[0, 20].sum(), x)
        reached.append(bool(grad[0, 59].any()))
    assert reached == [True, False]


def test_refuses():
    for name, options in {
        "prefix": {"prefix": -1},
        "radius": {"radius": -1},
        "num_buckets": {"num_buckets": 0},
        "max_distance": {"num_buckets": 32, "max_distance": 8},
        "bias": {"bias": torch.nn.Embedding(8, 2)},
    }.items():
        with pytest.raises(ValueError, match=name):
            PrefixGlobalAttention(32, 4, **options)
    with pytest.raises(ValueError, match="noncausal-cross"):
        PrefixGlobalAttention(32, 4)(torch.randn(1, 4, 32), torch.randn(1, 5, 32))
