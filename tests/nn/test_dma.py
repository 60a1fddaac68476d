"""S077: scores and choices against brute force, transformers' Doge on equal weights, and limiting cases."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import softplus

from glocal.cache import FullCache
from glocal.nn import DynamicMaskAttention, Rope, SlidingWindowAttention
from tests import oracle
from tests.nn.layers import by_mask, project, steps


def make(top_k=16, *, spread=1.0, **options):
    """A layer whose scores differ clearly."""
    torch.manual_seed(0)
    settings = {"num_kv_heads": 2, "causal": True, "rope": Rope()} | options
    layer = DynamicMaskAttention(32, 4, top_k=top_k, **settings).double()
    torch.nn.init.normal_(layer.A, std=spread)
    torch.nn.init.normal_(layer.dt_proj.weight)
    return layer


def tokens(length=100, batch=2):
    return torch.randn(batch, length, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def by_hand(layer, x, context=None):
    """``b (B, Hkv, Nk)`` by the formula, head by head."""
    _, _, v = project(layer, x, context)
    flat = v.transpose(1, 2).flatten(2)
    columns = []
    for h in range(layer.num_kv_heads):
        grown = layer.A[h] * softplus(flat @ layer.dt_proj.weight[h])
        columns.append(grown.exp() if layer.rule == "exp" else grown)
    return torch.stack(columns, 1)


def brute_force(layer, b, length, real=None):
    """Per query, the visible keys sorted by score, the most recent first among equals: ``(B, H, N, N)``."""
    mask = torch.zeros(b.shape[0], layer.num_kv_heads, length, length, dtype=torch.bool)
    for n, h, i in torch.cartesian_prod(*(torch.arange(s) for s in mask.shape[:3])).tolist():
        seen = [j for j in range(i + 1) if real is None or real[n, j]] if layer.causal else range(length)
        for j in sorted(seen, key=lambda j: (-b[n, h, j].item(), -j))[: layer.top_k]:
            mask[n, h, i, j] = True
    return mask.repeat_interleave(layer.num_heads // layer.num_kv_heads, 1)


def as_bias(layer, b):
    return b.repeat_interleave(layer.num_heads // layer.num_kv_heads, 1)[:, :, None]


@pytest.mark.parametrize("rule", ["exp", "log"])
@pytest.mark.parametrize(("top_k", "length"), [(16, 100), (1, 30), (70, 150), (100, 100)])
def test_equals_brute_force(rule, top_k, length):
    layer, x = make(top_k, rule=rule), tokens(length, batch=1)
    b = by_hand(layer, x)
    mask = brute_force(layer, b, length)
    assert torch.equal(mask.sum(-1), torch.arange(1, length + 1).clamp(max=top_k).expand(1, 4, -1))
    torch.testing.assert_close(layer(x), by_mask(layer, x, mask, bias=as_bias(layer, b)))


def by_blocks(mask, size, causal):
    """The mask ``(B, H, N, N)`` after smoothing, block by block."""
    out, length = torch.zeros_like(mask), mask.shape[-1]
    for start in range(0, length, size):
        block = slice(start, min(start + size, length))
        out[..., block] = (mask[..., block].sum(-1, keepdim=True) > size / 2).expand(-1, -1, -1, block.stop - start)
    return out.tril() if causal else out


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("top_k", "size", "length"), [(40, 4, 90), (40, 5, 90), (7, 1, 30), (200, 8, 90), (1, 4, 20)])
def test_smoothing_equals_blocks_of_the_brute_force(causal, top_k, size, length):
    layer, x = make(top_k, causal=causal, smooth=size), tokens(length)
    b = by_hand(layer, x)
    plain = brute_force(layer, b, length)
    mask = by_blocks(plain, size, causal)
    assert torch.equal(mask, plain) == (size == 1)
    torch.testing.assert_close(layer(x), by_mask(layer, x, mask, bias=as_bias(layer, b)))
    if causal:
        with torch.no_grad():
            torch.testing.assert_close(steps(layer, x, length // 3)[0], layer(x))


def test_smoothing_with_padding():
    layer, x = make(20, smooth=4), tokens(50)
    keys = torch.rand(2, 50, generator=torch.Generator().manual_seed(2)) > 0.2
    b = by_hand(layer, x)
    mask = by_blocks(brute_force(layer, b, 50, keys), 4, True) & keys[:, None, None]
    torch.testing.assert_close(layer(x, keys=keys), by_mask(layer, x, mask, bias=as_bias(layer, b)))


def test_gradients_are_those_of_the_kept_keys():
    layer, x = make(7), tokens(30)
    mask = brute_force(layer, by_hand(layer, x), 30)
    x = x.requires_grad_()
    weights, found = torch.randn_like(x), []
    for out in (layer(x), by_mask(layer, x, mask, bias=as_bias(layer, by_hand(layer, x)))):
        found.append(torch.autograd.grad((out * weights).sum(), [x, *layer.parameters()]))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs)
    assert found[0][-1].abs().max().item() > 0


def test_the_gradient_of_a_score_is_the_column_sum_over_the_logits():
    """With the logits as a leaf: what reaches ``b`` is the sum over queries and over the group, of kept pairs only."""
    layer, x = make(7, rule="log"), tokens(30, batch=1)
    q, k, v = project(layer, x)
    b = by_hand(layer, x).detach()
    mask = brute_force(layer, b, 30)
    logits = (q @ k.repeat_interleave(2, 1).mT * layer.scale + as_bias(layer, b)).detach().requires_grad_()
    weights = torch.randn(1, 4, 30, 8, dtype=torch.float64)
    probabilities = logits.masked_fill(~mask, -torch.inf).softmax(-1)
    grad = torch.autograd.grad(((probabilities @ v.repeat_interleave(2, 1)) * weights).sum(), logits)[0]
    columns = (grad * mask).sum(2).unflatten(1, (2, 2)).sum(2)
    scores = b.clone().requires_grad_()
    layer.value_scores = lambda _: scores
    layer.o_proj = torch.nn.Identity()
    out = layer(x).unflatten(-1, (4, 8)).transpose(1, 2)
    torch.testing.assert_close(torch.autograd.grad((out * weights).sum(), scores)[0], columns)


def test_gradcheck_away_from_ties():
    layer = make(3)
    x = tokens(8, batch=1)
    b = by_hand(layer, x).sort(-1).values
    assert (b[..., 1:] - b[..., :-1]).min().item() > 1e-4
    assert torch.autograd.gradcheck(lambda x: layer(x).sum(1), (x.requires_grad_(),), fast_mode=True)


def test_enough_keys_and_no_scale_are_causal_attention():
    """exp adds 1 to every logit, log adds 0: neither counts."""
    x, causal = tokens(50), torch.ones(50, 50, dtype=torch.bool).tril()
    for rule in ("exp", "log"):
        layer = make(50, rule=rule, spread=0.0)
        torch.testing.assert_close(layer(x), by_mask(layer, x, causal))


def test_ties_go_to_the_most_recent_key():
    """Where all scores tie, the best are the last: a sliding window."""
    layer, x = make(8, spread=0.0), tokens(150)
    window = SlidingWindowAttention(32, 4, num_kv_heads=2, window=8, causal=True, rope=Rope(), qk_norm="rms").double()
    window.load_state_dict(layer.state_dict(), strict=False)
    torch.testing.assert_close(layer(x), window(x))
    with torch.no_grad():
        torch.testing.assert_close(steps(layer, x, 20)[0], window(x))


def test_no_later_key_counts():
    layer, x = make(16), tokens(100)
    other = x.clone()
    other[:, 60:] = 3 * torch.randn_like(x[:, 60:])
    torch.testing.assert_close(layer(other)[:, :60], layer(x)[:, :60])


def test_one_set_for_all_queries_would_leak():
    """Variant 4 of the authors' kernel, written out: the best of all keys, causality afterwards."""
    layer, x = make(16), tokens(100, batch=1)
    other = x.clone()
    other[:, 60:] = 3 * torch.randn_like(x[:, 60:])

    def shared(x):
        b = by_hand(layer, x)
        mask = torch.zeros(1, 2, 100, 100, dtype=torch.bool)
        mask[:, :, :, :] = torch.zeros_like(b, dtype=torch.bool).scatter(-1, b.topk(16).indices, True)[:, :, None]
        mask = mask.tril().repeat_interleave(2, 1)
        return by_mask(layer, x, mask, bias=as_bias(layer, b)), mask

    out, mask = shared(x)
    assert not torch.allclose(shared(other)[0][:, :60], out[:, :60])
    assert not bool(mask.any(-1).all())  # and the first queries see nothing
    with pytest.raises(ValueError, match="shared_topk is for one query at a time"):
        make(16, shared_topk=True)(x)
    with torch.no_grad():
        torch.testing.assert_close(steps(make(16, shared_topk=True), x)[0], layer(x))
        torch.testing.assert_close(out[:, -1], layer(x)[:, -1])  # for the last query it is the same


@pytest.mark.parametrize("shared_topk", [True, False])
@pytest.mark.parametrize("cross", [True, False])
def test_without_causality_all_queries_share_one_set(shared_topk, cross):
    layer, x = make(16, causal=False, shared_topk=shared_topk), tokens(40)
    context = torch.randn(2, 55, 32, dtype=torch.float64) if cross else None
    b = by_hand(layer, x, context)
    keys = torch.rand(2, b.shape[-1]) > 0.3
    keys[1, 9:] = False  # fewer than top_k are real
    for real in (None, keys):
        seen = b if real is None else b.masked_fill(~real[:, None], -torch.inf)
        mask = torch.zeros_like(b, dtype=torch.bool).scatter(-1, seen.topk(16).indices, True)
        mask = mask if real is None else mask & real[:, None]
        mask = mask.repeat_interleave(2, 1)[:, :, None].expand(-1, -1, 40, -1)
        torch.testing.assert_close(
            layer(x, context, keys=real), by_mask(layer, x, mask, context, bias=as_bias(layer, b))
        )


def test_causal_cross_attention_takes_the_last_places():
    layer, x, context = make(8), tokens(70), torch.randn(2, 90, 32, dtype=torch.float64)
    b = by_hand(layer, x, context)
    mask = brute_force(layer, b, 90)[:, :, 20:]
    torch.testing.assert_close(layer(x, context), by_mask(layer, x, mask, context, bias=as_bias(layer, b)))


def test_padding_is_never_kept():
    layer, x = make(8), tokens(80)
    keys = torch.rand(2, 80) > 0.4
    keys[:, 0] = True
    b = by_hand(layer, x)
    mask = brute_force(layer, b, 80, keys)
    torch.testing.assert_close(layer(x, keys=keys), by_mask(layer, x, mask, bias=as_bias(layer, b)))


@pytest.mark.parametrize("prompt", [0, 40])
def test_decoding_forgets_what_falls_out(prompt):
    layer, x = make(16), tokens(70)
    with torch.no_grad():
        out, cache = steps(layer, x, prompt)
        torch.testing.assert_close(out, layer(x))
        assert cache.kept()[0].k.shape[2] == 16
        full = FullCache()
        torch.testing.assert_close(torch.cat([layer(x[:, t : t + 1], cache=full) for t in range(70)], 1), layer(x))


def test_on_a_grid_without_causality():
    layer = make(5, causal=False, rope=None)
    x = torch.randn(1, 4, 6, 32, dtype=torch.float64)
    torch.testing.assert_close(layer(x).flatten(1, 2), layer(x.flatten(1, 2)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_large_scores_stay_finite_in_half_precision(dtype):
    layer, x = make(4).to(dtype), tokens(20).to(dtype)
    with torch.no_grad():
        layer.A.fill_(300.0)
    assert layer.value_scores(project(layer, x)[2]).max().item() > torch.finfo(torch.float16).max
    out = layer(x)
    out.float().sum().backward()
    assert bool(out.isfinite().all()) and all(bool(p.grad.isfinite().all()) for p in layer.parameters())


def doge(**more):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.DogeConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        keep_window_size=16,
        attn_implementation="eager",
        **more,
    )
    model = transformers.DogeModel(config).double().eval()
    for block in model.layers:
        torch.nn.init.normal_(block.self_attn.A)
        torch.nn.init.normal_(block.self_attn.dt_proj.weight)
    return config, model


@pytest.mark.parametrize("attention_bias", [True, False])
def test_equals_doge_attention(attention_bias):
    _, model = doge(attention_bias=attention_bias)
    theirs, x = model.layers[0].self_attn, tokens(64)
    layer = make(16, qkv_bias=attention_bias, out_bias=attention_bias)
    layer.load_state_dict(theirs.state_dict())
    where = model.rotary_emb(x, torch.arange(64)[None])
    causal = torch.ones(64, 64, dtype=torch.bool).tril()[None, None]
    expected = theirs(x, tuple(t.double() for t in where), causal)[0]
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)  # its softmax and angles are float32


def test_equals_the_doge_model():
    config, model = doge()
    ids = torch.randperm(128).view(2, 64)  # equal tokens would tie, and its order of ties is torch's

    class Ours(torch.nn.Module):
        def __init__(self, theirs):
            super().__init__()
            self.layer = make(16, rope=Rope(config.rope_parameters["rope_theta"]))
            self.layer.load_state_dict(theirs.state_dict())

        def forward(self, hidden_states, **_):
            return self.layer(hidden_states), None

    with torch.no_grad():
        theirs = model(ids).last_hidden_state
        for block in model.layers:
            block.self_attn = Ours(block.self_attn)
        torch.testing.assert_close(model(ids).last_hidden_state, theirs, atol=1e-5, rtol=1e-5)
        model.layers[0].self_attn.layer.top_k = 15
        assert not torch.allclose(model(ids).last_hidden_state, theirs, atol=1e-3)


@pytest.mark.parametrize(("name", "value"), [("top_k", 0), ("top_k", 1.5), ("rule", "relu"), ("smooth", 0)])
def test_refuses_bad_settings(name, value):
    with pytest.raises(ValueError, match=f"{name} must be"):
        DynamicMaskAttention(32, 4, **{name: value})


def test_the_oracle_agrees_with_the_layer_at_one_token():
    layer, x = make(), tokens(1)
    q, k, v = project(layer, x)
    out, _ = oracle.attend(q, k, v, torch.ones(1, 1, dtype=torch.bool))
    torch.testing.assert_close(layer(x), layer.o_proj(out.transpose(1, 2).flatten(2)))
