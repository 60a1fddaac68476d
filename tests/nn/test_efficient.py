"""S080: efficient attention by its two softmaxes, against a peer, prefix by prefix, and for any range of keys."""

import pytest
import torch

from glocal.nn import Attention
from glocal.nn.efficient import EfficientAttention, EfficientState, context_maps, efficient_attention
from tests.nn.layers import project, steps
from tests.peers import load_port


def tensors(n=13, m=13, d=4, e=3, heads=2, kv_heads=2, spread=1.0):
    torch.manual_seed(0)
    sizes = ((heads, n, d), (kv_heads, m, d), (kv_heads, m, e))
    q, k, v = (torch.randn(2, *size, dtype=torch.double) for size in sizes)
    return [t.requires_grad_() for t in (q, spread * k, v)]


def brute(q, k, v):
    """The N x M matrix of weights, times the values."""
    group = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(group, 1) for t in (k, v))
    return torch.einsum("bhnd,bhmd->bhnm", q.softmax(3), k.softmax(2)) @ v


def prefixes(q, k, v, function=brute):
    """Each query on its own with the keys up to it."""
    ahead = k.shape[2] - q.shape[2]
    return torch.cat(
        [function(q[:, :, t : t + 1], *(x[:, :, : ahead + t + 1] for x in (k, v))) for t in range(q.shape[2])], 2
    )


def assert_same(found, wanted, inputs, atol=1e-10):
    assert torch.allclose(found, wanted, atol=atol)
    weight = torch.sin(torch.arange(found.numel(), dtype=found.dtype)).view(found.shape)
    one, other = (torch.autograd.grad((t * weight).sum(), inputs) for t in (found, wanted))
    assert all(torch.allclose(a, b, atol=atol) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("n,m,heads", [(13, 13, 2), (5, 20, 4), (7, 3, 2), (1, 1, 2)])
def test_by_definition(n, m, heads):
    q, k, v = tensors(n, m, heads=heads)
    assert_same(efficient_attention(q, k, v)[0], brute(q, k, v), (q, k, v))


def test_equals_linear_attention_transformer():
    """The peer multiplies by ``D ** -0.5`` besides."""
    peer = load_port("linear_attention_transformer.linear_attention_transformer")
    q, k, v = tensors(e=4)
    torch.testing.assert_close(efficient_attention(q, k, v)[0], 2 * peer.linear_attn(q, k, v))
    keys = torch.arange(13) >= torch.tensor([[4], [0]])
    theirs = 2 * peer.linear_attn(q, k.detach().clone(), v.detach().clone(), kv_mask=keys)
    torch.testing.assert_close(efficient_attention(q, k, v, keys=keys)[0], theirs)


@pytest.mark.parametrize("causal", [False, True])
def test_scaling_is_dot_product_attention_without_softmax(causal):
    q, k, v = tensors(9, 20)
    mask = torch.ones(9, 20, dtype=torch.double).tril(11) if causal else torch.ones(9, 20, dtype=torch.double)
    wanted = (q @ k.mT * mask / mask.sum(-1, keepdim=True)) @ v
    assert_same(efficient_attention(q, k, v, form="scaling", causal=causal)[0], wanted, (q, k, v))


@pytest.mark.parametrize("causal", [False, True])
def test_one_channel_gives_every_query_the_mean_by_the_keys(causal):
    q, k, v = tensors(d=1)
    found = efficient_attention(q, k, v, causal=causal)[0]
    wanted = k[..., 0].softmax(-1)[:, :, None] @ v
    assert torch.allclose(
        found if not causal else found[:, :, -1:], wanted.expand(2, 2, 13, 3)[:, :, : 1 if causal else 13]
    )


@pytest.mark.parametrize("causal", [False, True])
def test_what_changes_nothing_and_what_does(causal):
    """A constant a channel of all keys; a constant a token of a query. The other way round they count."""
    q, k, v = tensors()
    plain = efficient_attention(q, k, v, causal=causal)[0]
    a_channel, a_token = torch.randn(2, 2, 1, 4).double(), torch.randn(2, 2, 13, 1).double()
    assert torch.allclose(efficient_attention(q + a_token, k + a_channel, v, causal=causal)[0], plain, atol=1e-12)
    assert not torch.allclose(efficient_attention(q + a_channel, k, v, causal=causal)[0], plain, atol=1e-3)
    assert not torch.allclose(efficient_attention(q, k + a_token, v, causal=causal)[0], plain, atol=1e-3)


@pytest.mark.parametrize("chunk", [1, 7, 64, 100])
@pytest.mark.parametrize("n", [1, 13, 100])
def test_causal_is_each_prefix_anew(n, chunk):
    q, k, v = tensors(n, 100, heads=4)
    assert_same(efficient_attention(q, k, v, causal=True, chunk=chunk)[0], prefixes(q, k, v), (q, k, v))


@pytest.mark.parametrize("sign", [1, -1])
def test_keys_of_any_range(sign):
    """Keys that rise or fall by hundreds within a chunk, in float32: the sums of one base would overflow or vanish."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 150, 4).unbind()
    k = k + sign * torch.linspace(0, 3000, 150)[:, None]
    k[:, :, 70] = 500.0
    q, k, v = (t.requires_grad_() for t in (q, k, v))
    found = efficient_attention(q, k, v, causal=True)[0]
    exact = [t.detach().double().requires_grad_() for t in (q, k, v)]
    wanted = prefixes(*exact)
    assert torch.allclose(found.double(), wanted, atol=1e-4)
    grads = torch.autograd.grad(found.sin().sum(), (q, k, v)), torch.autograd.grad(wanted.sin().sum(), exact)
    assert all(torch.allclose(a.double(), b, atol=1e-3) for a, b in zip(*grads, strict=True))


def test_gradients_by_differences():
    q, k, v = (t.detach()[:1, :1].requires_grad_() for t in tensors(9, 9))
    state = efficient_attention(*(t[:1, :1] for t in tensors(3, 3)))[1]
    given = (q, k, v, *(t.detach().requires_grad_() for t in state))

    def call(q, k, v, total, context):
        out, after = efficient_attention(q, k, v, causal=True, state=EfficientState(total, context), chunk=4)
        return out, *after

    assert torch.autograd.gradcheck(call, given)


@pytest.mark.parametrize("form", ["softmax", "scaling"])
@pytest.mark.parametrize("cut", [1, 6, 12])
def test_in_pieces(form, cut):
    q, k, v = tensors(heads=4)
    first, state = efficient_attention(*(t[:, :, :cut] for t in (q, k, v)), causal=True, form=form)
    then, last = efficient_attention(*(t[:, :, cut:] for t in (q, k, v)), causal=True, form=form, state=state)
    whole, after = efficient_attention(q, k, v, causal=True, form=form, chunk=4)
    assert_same(torch.cat([first, then], 2), whole, (q, k, v))
    every = efficient_attention(q, k, v, form=form)[1]
    assert all(torch.allclose(a, b) and torch.allclose(a, c) for a, b, c in zip(last, after, every, strict=True))
    rest = efficient_attention(q, *(t[:, :, cut:] for t in (k, v)), form=form, state=state)[0]
    assert torch.allclose(rest, efficient_attention(q, k, v, form=form)[0])


def test_the_state_is_the_context_vectors_and_the_maps_are_their_weights():
    q, k, v = tensors()
    context = efficient_attention(q, k, v)[1].context
    assert torch.allclose(context_maps(k) @ v, context)
    assert torch.allclose(context_maps(k).sum(-1), torch.ones(2, 2, 4).double())
    layer = EfficientAttention(24, 3)
    x, keys = torch.randn(2, 5, 6, 24), torch.rand(2, 5, 6) > 0.3
    maps = layer.maps(x, keys=keys)
    assert maps.shape == (2, 3, 8, 5, 6) and not maps.movedim((3, 4), (1, 2))[~keys].any()


@pytest.mark.parametrize("form", ["softmax", "scaling"])
@pytest.mark.parametrize("causal", [False, True])
def test_padding_does_not_count(causal, form):
    q, k, v = tensors()
    keys = torch.arange(13) >= torch.tensor([[4], [0]])
    found = efficient_attention(q, k, v, keys=keys, causal=causal, form=form, chunk=4)[0]
    alone = efficient_attention(*(t[:1, :, 4:] for t in (q, k, v)), causal=causal, form=form)[0]
    assert torch.allclose(found[:1, :, 4:], alone, atol=1e-12)
    assert not causal or not found[0, :, :4].any()
    nothing = efficient_attention(q, k, v, keys=torch.zeros_like(keys), causal=causal, form=form)[0]
    assert not nothing.any()


def test_a_change_in_the_future_leaves_the_past_bit_for_bit():
    q, k, v = (t.detach().float() for t in tensors(100, 100))
    before = efficient_attention(q, k, v, causal=True)[0]
    for t in (q, k, v):
        t[:, :, 77:] += 50
    after = efficient_attention(q, k, v, causal=True)[0]
    assert torch.equal(before[:, :, :77], after[:, :, :77]) and not torch.allclose(before[:, :, 77:], after[:, :, 77:])


def test_training_on_a_long_sequence_holds_little(monkeypatch):
    """Pieces are computed anew in backward: what is saved is their inputs, and gradients are those without pieces."""
    q, k, v = tensors(300, 300)
    sizes = []

    def pack(t):
        sizes.append(t.untyped_storage())
        return t

    def held():
        sizes.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = efficient_attention(q, k, v, causal=True, chunk=16)[0]
        return out, sum({s.data_ptr(): s.nbytes() for s in sizes}.values())

    whole, much = held()
    monkeypatch.setattr("glocal.nn.efficient._AT_ONCE", 64)
    pieces, little = held()
    assert_same(pieces, whole, (q, k, v))
    assert 3 * little < much


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("causal", [False, True])
def test_half_inputs(dtype, causal):
    """Of 5,000 keys each has a weight that half precision could not add up."""
    q, k, v = (t.detach().to(dtype) for t in tensors(5000, 5000))
    found = efficient_attention(q, k, v, causal=causal)[0]
    wanted = efficient_attention(*(t.double() for t in (q, k, v)), causal=causal)[0]
    assert found.dtype == dtype and torch.allclose(found.double(), wanted, atol=torch.finfo(dtype).eps, rtol=0.01)


@pytest.mark.parametrize("form", ["softmax", "scaling"])
@pytest.mark.parametrize("value_head_dim", [None, 5])
def test_the_layer_is_the_operator_between_projections(form, value_head_dim):
    layer = EfficientAttention(24, 3, form=form, value_head_dim=value_head_dim, qkv_bias=True, out_bias=True).double()
    x = torch.randn(2, 4, 5, 24).double()
    q, k, v = project(layer, x.flatten(1, 2))
    wanted = brute(q, k, v) if form == "softmax" else q @ k.mT @ v / 20
    assert torch.allclose(layer(x).flatten(1, 2), layer.o_proj(wanted.movedim(1, -2).flatten(-2)))
    assert layer.o_proj.bias is not None and layer.v_proj.bias is not None


@pytest.mark.parametrize("options", [{}, {"form": "scaling"}, {"value_head_dim": 3}, {"num_kv_heads": 1}])
@pytest.mark.parametrize("prompt", [0, 1, 9])
def test_decoding_with_a_state(options, prompt):
    torch.manual_seed(0)
    layer = EfficientAttention(24, 3, causal=True, **options).double()
    x = torch.randn(2, 20, 24).double()
    assert torch.allclose(steps(layer, x, prompt)[0], layer(x), atol=1e-12)


@pytest.mark.parametrize(
    "options,match",
    [
        (dict(form="soft"), "form must be 'softmax' or 'scaling'; it was 'soft'"),
        (dict(scale=0.5), "scale does not apply"),
        (dict(feature="elu"), "feature does not apply"),
        (dict(value_head_dim=0), "value_head_dim must be at least 1; it was 0"),
        (dict(value_head_dim=5, gate=True), "lepe and gate"),
    ],
)
def test_bad_settings(options, match):
    with pytest.raises(ValueError, match=match):
        EfficientAttention(24, 3, **options)


def test_bad_input():
    q, k, v = tensors(5, 4)
    with pytest.raises(ValueError, match="5 queries cannot be the last positions of 4 keys"):
        efficient_attention(q, k, v, causal=True)
    with pytest.raises(ValueError, match="form must be"):
        efficient_attention(q, k, v, form="dot")
    with pytest.raises(ValueError, match="maps need form='softmax'"):
        EfficientAttention(24, 3, form="scaling").maps(torch.randn(1, 4, 24))


def test_it_is_not_softmax_attention():
    """Nor does it claim to be: on the same projections the outputs differ."""
    torch.manual_seed(0)
    layer, other = EfficientAttention(24, 3), Attention(24, 3)
    other.load_state_dict(layer.state_dict())
    x = 3 * torch.randn(2, 9, 24)
    assert not torch.allclose(layer(x), other(x), atol=1e-2)
