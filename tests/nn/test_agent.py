"""S004: agent attention by its two softmaxes, its limits, its pooled and learned agents, its causal form."""

import pytest
import torch
from torch.nn.functional import adaptive_avg_pool2d, conv2d, interpolate

from glocal.nn.agent import AgentAttention, AgentBias, agent_attend, causal_agents
from glocal.nn.rope import Rope
from tests.nn.layers import steps
from tests.peers import load_port


def tensors(n=12, m=12, agents=5, d=4, e=3, heads=2):
    torch.manual_seed(0)
    sizes = ((n, d), (m, d), (m, e), (agents, d))
    return [torch.randn(2, heads, *size, dtype=torch.double).requires_grad_() for size in sizes]


def weights(q, k, a, s1, s2, b1=0.0, b2=0.0):
    """The implied matrix ``(B, H, N, M)``."""
    return (q @ a.mT * s2 + b2).softmax(-1) @ (a @ k.mT * s1 + b1).softmax(-1)


@pytest.mark.parametrize("n,m", [(12, 12), (3, 17), (1, 1)])
def test_it_is_the_product_of_two_softmax_matrices(n, m):
    q, k, v, a = tensors(n, m)
    b1, b2 = torch.randn(2, 5, m).double(), torch.randn(2, n, 5).double()
    options = dict(scale=0.7, spread_scale=0.3, gather_bias=b1, spread_bias=b2)
    found = agent_attend(q, k, v, a, **options)
    wanted = weights(q, k, a, 0.7, 0.3, b1, b2) @ v
    assert torch.allclose(found, wanted, atol=1e-12)
    one, other = (torch.autograd.grad(t.square().sum(), (q, k, v, a)) for t in (found, wanted))
    assert all(torch.allclose(x, y, atol=1e-10) for x, y in zip(one, other, strict=True))


def test_scales_are_those_of_softmax_where_none_is_given():
    q, k, v, a = tensors()
    assert torch.allclose(agent_attend(q, k, v, a), weights(q, k, a, 0.5, 0.5) @ v, atol=1e-12)
    assert torch.allclose(agent_attend(q, k, v, a, scale=0.7), weights(q, k, a, 0.7, 0.7) @ v, atol=1e-12)


def test_weights_are_shares():
    q, k, _, a = tensors()
    shown = agent_attend(q, k, torch.eye(12).double().expand(2, 2, -1, -1), a)
    assert torch.allclose(shown.sum(-1), torch.ones(2, 2, 12).double()) and (shown >= 0).all()
    assert torch.linalg.matrix_rank(shown).max() <= 5


@pytest.mark.parametrize("t,error", [(50.0, 0.2), (1e4, 1e-3)])
def test_agents_that_are_the_keys_approach_softmax_attention(t, error):
    """Sharp first softmax, distinct keys of unit norm: each agent reads its own key."""
    q, k, v, _ = tensors()
    k = torch.nn.functional.normalize(k, dim=-1)
    found = agent_attend(q, k, v, t * k, scale=0.5, spread_scale=0.5 / t)
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    assert (found - wanted).abs().max() < error


def test_agents_that_have_keys_of_their_own():
    """The published port for sequences has agents that ask with one projection and answer with another."""
    q, k, v, a = tensors()
    other = torch.randn_like(a)
    found = agent_attend(q, k, v, a, agent_keys=other, scale=0.5)
    gathered = torch.nn.functional.scaled_dot_product_attention(a, k, v)
    assert torch.allclose(found, torch.nn.functional.scaled_dot_product_attention(q, other, gathered), atol=1e-12)


def test_it_is_agent_attention_pytorch():
    peer = load_port("agent_attention_pytorch.agent_attention_pytorch")
    torch.manual_seed(0)
    attention = peer.AgentSelfAttention(16, num_agent_tokens=5, dim_head=8, heads=2, talking_heads=False, gate=False)
    attention = attention.double()
    x = torch.randn(2, 11, 16).double()
    q, k, v = attention.to_qkv(x)
    agents = attention.agent_tokens.expand(2, -1, -1, -1)
    found = agent_attend(q, k, v, agents, scale=8**-0.5)
    assert torch.allclose(attention.to_out(found), attention(x), atol=1e-10)


def test_padding_and_agents_that_are_none():
    q, k, v, a = tensors()
    keys, real = torch.arange(12) < torch.tensor([[9], [12]]), torch.arange(5) < torch.tensor([[3], [5]])
    found = agent_attend(q, k, v, a, keys=keys, real_agents=real)
    first = agent_attend(q[:1], k[:1, :, :9], v[:1, :, :9], a[:1, :, :3])
    assert torch.allclose(found[:1], first, atol=1e-12)
    assert torch.allclose(found[1:], agent_attend(q, k, v, a)[1:], atol=1e-12)


def test_agents_that_do_not_fit():
    q, k, v, a = tensors()
    with pytest.raises(ValueError, match=r"agents must be .*2, 2, 'n', 4"):
        agent_attend(q, k, v, a[:, :1])
    with pytest.raises(ValueError, match="agent_keys must be"):
        agent_attend(q, k, v, a, agent_keys=a[:, :, :3])


# The causal form.


def prefixes(q, k, v, a, **options):
    """Each query by itself, over the keys up to it."""
    ahead = k.shape[2] - q.shape[2]
    outs = []
    for i in range(q.shape[2]):
        keys = options["keys"][:, : ahead + i + 1] if "keys" in options else None
        seen = [t[:, :, : ahead + i + 1] for t in (k, v)]
        outs.append(agent_attend(q[:, :, i : i + 1], *seen, a, **{**options, "keys": keys}))
    return torch.cat(outs, 2)


@pytest.mark.parametrize("chunk", [1, 7, 12, 64])
@pytest.mark.parametrize("n", [1, 5, 12])
def test_causal_is_each_prefix_by_itself(n, chunk):
    q, k, v, a = tensors(n)
    found = causal_agents(q, k, v, a, scale=0.9, spread_scale=0.4, chunk=chunk)[0]
    wanted = prefixes(q, k, v, a, scale=0.9, spread_scale=0.4)
    assert torch.allclose(found, wanted, atol=1e-12)
    one, other = (torch.autograd.grad(t.square().sum(), (q, k, v, a)) for t in (found, wanted))
    assert all(torch.allclose(x, y, atol=1e-10) for x, y in zip(one, other, strict=True))


def test_causal_gradients():
    q, k, v, a = (t.detach()[:1, :1].requires_grad_() for t in tensors(6, 6, 3))
    assert torch.autograd.gradcheck(lambda *t: causal_agents(*t, chunk=4)[0], (q, k, v, a))


@pytest.mark.parametrize("cut", [1, 5, 11])
def test_in_pieces(cut):
    q, k, v, a = tensors()
    first, state = causal_agents(q[:, :, :cut], k[:, :, :cut], v[:, :, :cut], a, chunk=3)
    then, last = causal_agents(q[:, :, cut:], k[:, :, cut:], v[:, :, cut:], a, state=state, chunk=3)
    whole, end = causal_agents(q, k, v, a)
    assert torch.allclose(torch.cat([first, then], 2), whole, atol=1e-12)
    assert all(torch.allclose(x, y, atol=1e-12) for x, y in zip(last, end, strict=True))
    assert sum(t[0, 0].numel() for t in last) == 5 * (3 + 2)


def test_scores_that_grow_without_bound_do_not_overflow():
    """Each key is far above all before it, so that a fixed reference would give infinities; and far below."""
    _, _, v, a = tensors(agents=1, d=1)
    growing = torch.linspace(1, 3000, 12).double().view(1, 1, 12, 1).expand(2, 2, -1, -1)
    one = torch.ones_like(a)
    for k in (growing, -growing):
        found = causal_agents(torch.ones_like(k), k, v, one, chunk=5)[0]
        assert torch.allclose(found, v if k is growing else v[:, :, :1].expand_as(v), atol=1e-12)


def test_left_padding_does_not_count_and_what_sees_nothing_is_zero():
    q, k, v, a = tensors()
    keys = torch.arange(12) >= torch.tensor([[4], [12]])
    found = causal_agents(q, k, v, a, keys=keys, chunk=5)[0]
    alone = causal_agents(q[:1, :, 4:], k[:1, :, 4:], v[:1, :, 4:], a[:1])[0]
    assert torch.allclose(found[:1, :, 4:], alone, atol=1e-12)
    assert (found[0, :, :4] == 0).all() and (found[1] == 0).all()
    grads = torch.autograd.grad(found.sum(), (q, k, v, a))
    assert all(g.isfinite().all() for g in grads)


def test_the_future_changes_nothing_before_it():
    q, k, v, a = tensors()
    found = causal_agents(q, k, v, a, chunk=5)[0]
    for t in (k, v):
        t.data[:, :, 8:] += 100
    assert torch.equal(causal_agents(q, k, v, a, chunk=5)[0][:, :, :8], found[:, :, :8])


def test_grouped_keys():
    q, k, v, a = tensors(heads=4)
    k, v = k[:, :2], v[:, :2]
    wide_k, wide_v = (t.repeat_interleave(2, 1) for t in (k, v))
    assert torch.allclose(agent_attend(q, k, v, a), agent_attend(q, wide_k, wide_v, a), atol=1e-12)
    assert torch.allclose(causal_agents(q, k, v, a)[0], causal_agents(q, wide_k, wide_v, a)[0], atol=1e-12)


def test_a_decoder_keeps_a_state_of_fixed_size():
    torch.manual_seed(0)
    layer = AgentAttention(16, 2, num_agents=4, learned=True, causal=True, rope=Rope()).double()
    x = torch.randn(2, 40, 16).double()
    out, cache = steps(layer, x, 7)
    assert torch.allclose(out, layer(x), atol=1e-11)
    assert cache.nbytes == 2 * 2 * 4 * (8 + 2) * 8
    cache.select(torch.tensor([1, 1]))
    assert torch.equal(cache.state.values[0], cache.state.values[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_inputs(dtype):
    q, k, v, a = (t.detach().to(dtype) for t in tensors(300, 300))
    for found, wanted in (
        (agent_attend(q, k, v, a), agent_attend(*(t.double() for t in (q, k, v, a)))),
        (causal_agents(q, k, v, a)[0], causal_agents(*(t.double() for t in (q, k, v, a)))[0]),
    ):
        assert found.dtype == dtype and torch.allclose(found.double(), wanted, atol=4 * torch.finfo(dtype).eps)


def test_bad_lengths():
    q, k, v, a = tensors(13, 12)
    with pytest.raises(ValueError, match="at most as many tokens as k, 12; it had 13"):
        causal_agents(q, k, v, a)
    with pytest.raises(ValueError, match="chunk"):
        causal_agents(q[:, :, :3], k, v, a, chunk=0)


# The layer.


def image_layer(**options):
    torch.manual_seed(0)
    settings = dict(num_agents=9, grid=(6, 6), lepe=3, qkv_bias=True, out_bias=True)
    layer = AgentAttention(16, 2, **(settings | options)).double()
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return layer


def by_hand(layer, x, side=3):
    """Items 2 and 3 of the definition, with channels first and no code of ours."""
    batch, rows, columns, dim = x.shape
    q, k, v = (proj(x).flatten(1, 2) for proj in (layer.q_proj, layer.k_proj, layer.v_proj))
    pooled = adaptive_avg_pool2d(q.mT.reshape(batch, dim, rows, columns), side).flatten(2).mT

    def heads(t):
        return t.reshape(batch, -1, 2, dim // 2).transpose(1, 2)

    def bias(part):
        whole = interpolate(part.map, (rows, columns), mode="bilinear", align_corners=False)
        return (whole + part.rows[:, :, :, None] + part.columns[:, :, None, :]).reshape(2, side**2, -1)

    q, k, a, values = heads(q), heads(k), heads(pooled), heads(v)
    gathered = (a @ k.mT * 8**-0.5 + bias(layer.gather_bias)).softmax(-1) @ values
    out = (q @ a.mT * 8**-0.5 + bias(layer.spread_bias).mT).softmax(-1) @ gathered
    out = out.transpose(1, 2).reshape(batch, rows, columns, dim)
    near = conv2d(v.mT.reshape(batch, dim, rows, columns), layer.local.weight, layer.local.bias, padding=1, groups=dim)
    return layer.o_proj(out + near.movedim(1, -1))


def test_the_layer_by_hand():
    layer, x = image_layer(), torch.randn(2, 6, 6, 16).double()
    assert torch.allclose(layer(x), by_hand(layer, x), atol=1e-11)


def test_a_layer_that_is_not_square_by_hand():
    layer, x = image_layer(grid=(5, 9)), torch.randn(2, 5, 9, 16).double()
    assert torch.allclose(layer(x), by_hand(layer, x), atol=1e-11)


def test_agents_of_the_whole_map_and_one_head_mean_pool():
    layer, x = image_layer(num_agents=1, grid=None, lepe=None), torch.randn(1, 4, 4, 16).double()
    q, k, v = layer.project(x, x, None, None)
    weights = (q.mean((2, 3))[:, :, None] @ k.flatten(2, 3).mT * 8**-0.5).softmax(-1)
    one = (weights @ v.flatten(2, 3)).transpose(1, 2).flatten(2)
    assert torch.allclose(layer(x), layer.o_proj(one)[:, None].expand(-1, 4, 4, -1), atol=1e-12)


@pytest.mark.parametrize("size", [(1, 1), (2, 7), (13, 11)])
@pytest.mark.parametrize("options", [{}, {"learned": True, "num_agents": 5}], ids=["pooled", "learned"])
def test_any_image(size, options):
    layer, x = image_layer(**options), torch.randn(2, *size, 16, dtype=torch.double, requires_grad=True)
    layer(x).square().sum().backward()
    assert x.grad.isfinite().all() and all(p.grad is not None for p in layer.parameters())


def test_biases_are_resized_between_the_centres_of_cells():
    bias = AgentBias(1, 1, (4, 4))
    with torch.no_grad():
        bias.map.zero_()
        bias.rows.copy_(torch.arange(4.0))
        bias.columns.zero_()
    assert torch.equal(bias((4, 3)).view(4, 3)[:, 0], torch.arange(4.0))
    assert torch.equal(bias((2, 1)).flatten(), torch.tensor([0.5, 2.5]))


def test_keys_of_a_reduced_image():
    layer = image_layer(reduction=2)
    x = torch.randn(2, 6, 6, 16).double()
    small = layer.reduce_norm(layer.reduce(x.movedim(-1, 1)).movedim(1, -1))
    q, k, v = layer.project(x, x, None, None)
    assert torch.equal(k, layer.heads(layer.k_proj(small), 2)) and k.shape[2:4] == (3, 3)
    agents = adaptive_avg_pool2d(layer.q_proj(x).movedim(-1, 1), 3).flatten(2).mT
    agents = agents.unflatten(-1, (2, 8)).transpose(1, 2)
    gathered = (agents @ k.flatten(2, 3).mT * 8**-0.5 + layer.gather_bias((3, 3))).softmax(-1) @ v.flatten(2, 3)
    out = (q.flatten(2, 3) @ agents.mT * 8**-0.5 + layer.spread_bias((6, 6)).mT).softmax(-1) @ gathered
    values = interpolate(layer.v_proj(small).movedim(-1, 1), (6, 6), mode="bilinear")
    near = layer.local(values.movedim(1, -1))
    wanted = layer.o_proj(out.transpose(1, 2).flatten(2).unflatten(1, (6, 6)) + near)
    assert torch.allclose(layer(x), wanted, atol=1e-11)
    assert layer(torch.randn(1, 7, 5, 16).double()).shape == (1, 7, 5, 16)


def test_pooled_agents_leave_padding_out():
    torch.manual_seed(0)
    layer = AgentAttention(16, 2, num_agents=4).double()
    x, keys = torch.randn(1, 12, 16).double(), torch.arange(12)[None] < 7
    other = torch.where(keys[..., None], x, 1e3)
    assert torch.allclose(layer(x, keys=keys)[:, :7], layer(other, keys=keys)[:, :7], atol=1e-12)
    # The last of four pieces of three has no real token, the third has one of three.
    agents, some = layer.pool(layer.heads(layer.q_proj(x), 2), keys)
    assert some.tolist() == [[True, True, True, False]]
    assert torch.allclose(agents[:, :, 2], layer.heads(layer.q_proj(x), 2)[:, :, 6], atol=1e-12)
    none = layer(x, keys=torch.zeros_like(keys))
    assert none.isfinite().all()


def test_cross_attention_pools_agents_from_the_queries():
    torch.manual_seed(0)
    layer = AgentAttention(16, 2, num_agents=4, kv_dim=12).double()
    x, context = torch.randn(2, 8, 16).double(), torch.randn(2, 5, 12).double()
    keys = torch.arange(5) < torch.tensor([[5], [3]])
    q = layer.heads(layer.q_proj(x), 2)
    k, v = (layer.heads(proj(context), 2) for proj in (layer.k_proj, layer.v_proj))
    agents = q.unflatten(2, (4, 2)).mean(3)
    gathered = (agents @ k.mT * 8**-0.5).masked_fill(~keys[:, None, None], -torch.inf).softmax(-1) @ v
    out = (q @ agents.mT * 8**-0.5).softmax(-1) @ gathered
    wanted = layer.o_proj(out.transpose(1, 2).flatten(2))
    assert torch.allclose(layer(x, context, keys=keys), wanted, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_layer_in_half_precision(dtype):
    layer = image_layer(grid=(14, 14)).float()
    x = torch.randn(1, 9, 10, 16)
    near = (layer.to(dtype)(x.to(dtype)).float() - layer.float()(x)).abs()
    assert near.max() < 0.5 and near.mean() < 0.05


def test_dropout_is_of_both_softmaxes_in_training_only():
    torch.manual_seed(0)
    layer = AgentAttention(16, 2, num_agents=4, dropout=0.5)
    x = torch.randn(1, 12, 16)
    assert torch.equal(layer.eval()(x), layer(x)) and not torch.equal(layer.train()(x), layer(x))


@pytest.mark.parametrize(
    "options,message",
    [
        ({"num_agents": 0}, "num_agents must be at least 1"),
        ({"reduction": 0}, "reduction must be at least 1"),
        ({"causal": True}, "learned=True"),
        ({"causal": True, "learned": True, "dropout": 0.1}, "dropout act on single scores"),
        ({"causal": True, "learned": True, "grid": (4, 4)}, "are of images"),
        ({"num_agents": 5, "grid": (4, 4)}, "must be a square"),
        ({"reduction": 2, "rope": Rope()}, "not with reduction"),
        ({"lepe": 3, "num_kv_heads": 1}, "num_kv_heads must be 2"),
        ({"grid": (4, 0)}, "rows and columns"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        AgentAttention(16, 2, **options)


def test_bad_inputs():
    x = torch.randn(1, 8, 16)
    with pytest.raises(ValueError, match="biases over images"):
        AgentAttention(16, 2, num_agents=4, grid=(4, 4))(x)
    with pytest.raises(ValueError, match="lepe needs an image"):
        AgentAttention(16, 2, num_agents=4, lepe=3)(x)
    with pytest.raises(ValueError, match="reduction=2 needs an image"):
        AgentAttention(16, 2, num_agents=4, reduction=2)(x)
    with pytest.raises(ValueError, match="must be a square"):
        AgentAttention(16, 2, num_agents=5)(x.view(1, 2, 4, 16))
    with pytest.raises(ValueError, match="a sequence or an image"):
        AgentAttention(16, 2, num_agents=4)(x.view(1, 2, 2, 2, 16))
    causal = AgentAttention(16, 2, num_agents=4, learned=True, causal=True)
    with pytest.raises(ValueError, match="must be a sequence"):
        causal(x.view(1, 2, 4, 16))
