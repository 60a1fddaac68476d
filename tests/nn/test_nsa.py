"""S016, the base: the three branches against loops over their definitions, and against limiting cases."""

from __future__ import annotations

import pytest
import torch

from glocal.nn import NativeSparseAttention, Rope
from glocal.nn import nsa as module
from glocal.patterns import Between
from tests import oracle
from tests.nn.layers import by_mask, project, steps
from tests.peers import load_fla

SIZES = {"compress_size": 6, "compress_stride": 3, "block_size": 4, "top_k": 5, "window": 7}


def reference(layer, q, k, v, groups):
    """Outputs of the branches, ``(B, H, N, D)``, and the selection's mask, from keys of every query head; by loops."""
    size, stride, block, length = layer.compress_size, layer.compress_stride, layer.block_size, q.shape[2]
    starts = range(0, length - size + 1, stride)
    keys = torch.stack([k[:, :, s : s + size].mean(2) for s in starts], 2)
    values = torch.stack([v[:, :, s : s + size].mean(2) for s in starts], 2)
    done = torch.tensor([[s + size - 1 <= t for s in starts] for t in range(length)])
    chosen = torch.zeros(*q.shape[:2], length, length, dtype=torch.bool)
    heads = q.shape[1] // groups
    for b in range(q.shape[0]):
        for g in range(groups):
            for t in range(length):
                importance, own = [0.0] * -(-length // block), t // block
                for h in range(g * heads, (g + 1) * heads) if done[t].any() else ():
                    share = (layer.scale * keys[b, h, done[t]] @ q[b, h, t]).softmax(0)
                    for s, p in zip(starts, share.tolist(), strict=False):
                        for token in range(s, s + size):
                            importance[token // block] += p / size
                forced = sorted({0, own, max(own - 1, 0)})
                free = sorted((n for n in range(own) if n not in forced), key=lambda n: (-importance[n], n))
                for n in forced + free[: layer.top_k - len(forced)]:
                    chosen[b, g * heads : (g + 1) * heads, t, n * block : min((n + 1) * block, t + 1)] = True
    i, j = torch.arange(length)[:, None], torch.arange(length)
    masks = {"compress": done, "select": chosen, "slide": (j <= i) & (j > i - layer.window)}
    sides = {"compress": (keys, values), "select": (k, v), "slide": (k, v)}
    return [oracle.attend(q, *sides[n], masks[n], scale=layer.scale)[0] for n in layer.branches], chosen


def gated(layer, x, outs):
    """The branches' sum, by the layer's gates."""
    if len(outs) > 1:
        gates = layer.gate_proj(x).sigmoid().unflatten(-1, (layer.num_heads, len(outs))).transpose(1, 2)
        outs = [sum(gates[..., n, None] * out for n, out in enumerate(outs))]
    return layer.o_proj(outs[0].movedim(1, -2).flatten(-2))


def by_loops(layer, x):
    q, k, v = project(layer, x)
    k, v = (t.repeat_interleave(layer.num_heads // layer.num_kv_heads, 1) for t in (k, v))
    outs, chosen = reference(layer, q, k, v, layer.num_kv_heads)
    return gated(layer, x, outs), chosen


def make(**options):
    torch.manual_seed(0)
    return NativeSparseAttention(32, 4, **({**SIZES, "causal": True, "rope": Rope()} | options)).double()


@pytest.mark.parametrize(
    "options",
    [
        {"num_kv_heads": 2},
        {"num_kv_heads": 1, "branches": ("compress", "select"), "scale": 3.0},
        {"branches": ("select", "slide"), "compress_size": 4, "compress_stride": 4},
        {"branches": ("compress",)},
    ],
    ids=str,
)
def test_equals_loops_with_a_short_last_block(options, monkeypatch):
    monkeypatch.setattr(module, "_SCORES", 2 * 4 * 13 * 10)  # chunks of about ten queries
    layer = make(**options)
    x = torch.randn(2, 41, 32, dtype=torch.float64, requires_grad=True)
    theirs, chosen = by_loops(layer, x)
    mine = layer(x)
    torch.testing.assert_close(mine, theirs)
    if "select" in layer.branches:
        assert int(chosen[:, :, -1].sum(-1).max()) < 41  # it had a choice, and not all chose alike
        assert len(chosen[:, :, -1].flatten(0, 1).unique(dim=0)) > 1
    weights = torch.randn_like(x)
    inputs = [x, *layer.parameters()]
    a, b = (torch.autograd.grad((out * weights).sum(), inputs, allow_unused=True) for out in (mine, theirs))
    for one, other in zip(a, b, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other)


def test_equals_flash_linear_attention():
    """Its definition: a mean of each block, one size for compressed and chosen blocks, 16 query heads a key head."""
    naive = load_fla("ops.nsa.naive")
    torch.manual_seed(0)
    sizes = {"compress_size": 16, "compress_stride": 16, "block_size": 16, "top_k": 4}
    layer = NativeSparseAttention(
        64, 32, num_kv_heads=2, head_dim=16, causal=True, rope=Rope(), branches=("compress", "select"), **sizes
    ).double()
    torch.nn.init.normal_(layer.q_proj.weight, std=0.5)  # scores that are not flat
    x = torch.randn(1, 256, 64, dtype=torch.float64)
    q, k, v = project(layer, x)
    theirs = [t.transpose(1, 2) for t in (q, k, v)]
    gates = layer.gate_proj(x).sigmoid().unflatten(-1, (32, 2))
    with torch.no_grad():
        out, blocks = naive.naive_nsa(
            *theirs, *gates.unbind(-1), block_counts=4, block_size=16, return_block_indices=True
        )
        torch.testing.assert_close(layer(x), layer.o_proj(out.flatten(2)), atol=1e-5, rtol=1e-5)  # its softmax: float32
        call = module.Call(x, x, None, None, False)
        keys, values, _ = layer.compress(k, v, call)
        hi = layer.complete_blocks(256, 256, 16, x.device)
        mixed, lse = layer.attend(q, keys, values, Between(torch.zeros_like(hi), hi), call, return_lse=True)
        chosen = layer.choose(q, k, keys, lse, call, hi, None)
        compressed = naive.naive_nsa_compression(theirs[0], *(t.transpose(1, 2) for t in (keys, values)), 16, 0.25)
    assert torch.equal(chosen.sort(-1).values, blocks.transpose(1, 2).sort(-1).values)
    assert len(chosen[:, :, -1].flatten(0, 1).unique(dim=0)) == 2  # the two groups chose, each its own
    torch.testing.assert_close(mixed.transpose(1, 2), compressed[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse.transpose(1, 2), compressed[1].to(lse), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"branches": ("select",), "top_k": 11},
        {"branches": ("slide",), "window": 41},
        {"branches": ("compress",), "compress_size": 1, "compress_stride": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("causal", [True, False])
def test_limits_are_full_attention(options, causal):
    layer = make(causal=causal, num_kv_heads=2, **options)
    x = torch.randn(2, 41, 32, dtype=torch.float64)
    mask = torch.ones(41, 41, dtype=torch.bool)
    torch.testing.assert_close(layer(x), by_mask(layer, x, mask.tril() if causal else mask))


def test_the_importance_of_a_block_is_its_share_of_compressed_probability():
    """Where sizes divide, the paper's sum (equation 9), with its range written so that it covers the block."""
    layer = make(compress_size=4, compress_stride=2, block_size=4, top_k=5, num_kv_heads=1)
    length, seen = 40, {}

    def spy(scores, count, **masks):
        seen["scores"] = scores
        return choose(scores, count, **masks)

    choose, module.choose_blocks = module.choose_blocks, spy
    try:
        x = torch.randn(1, length, 32, dtype=torch.float64)
        layer(x)
    finally:
        module.choose_blocks = choose
    q, k, _ = project(layer, x)
    keys = torch.stack([k[0, 0, s : s + 4].mean(0) for s in range(0, length - 3, 2)])
    share = (layer.scale * q[0, :, -1] @ keys.T).softmax(-1).sum(0)
    for j in range(length // 4):
        inside = [(2 * j - 1, 0.5), (2 * j, 1.0), (2 * j + 1, 0.5)]
        total = sum(w * share[c] for c, w in inside if 0 <= c < len(share))
        torch.testing.assert_close(seen["scores"][0, 0, -1, j], total)


def test_nothing_after_a_token_changes_what_it_chose():
    layer = make(num_kv_heads=2, compress="mlp")
    x = torch.randn(1, 41, 32, dtype=torch.float64)
    full = layer(x)
    for t in (8, 23, 24, 40):
        other = x.clone()
        other[:, t:] = 10 * torch.randn_like(other[:, t:])
        torch.testing.assert_close(layer(other)[:, :t], full[:, :t])
        assert not torch.allclose(layer(other)[:, t:], full[:, t:])


def test_learned_compression_can_be_the_mean():
    layer, mean = make(compress="mlp"), make()
    mean.load_state_dict(layer.state_dict(), strict=False)
    with torch.no_grad():
        for pool in (layer.k_pool, layer.v_pool):
            pool.fc1.weight.copy_(torch.eye(48))
            pool.fc1.bias.fill_(100)  # nothing is negative, so ReLU changes nothing
            pool.fc2.weight.copy_(torch.eye(8, dtype=torch.float64).repeat(1, 6) / 6)
            pool.fc2.bias.fill_(-100)
    x = torch.randn(2, 41, 32, dtype=torch.float64)
    torch.testing.assert_close(layer(x), mean(x))


def test_learned_compression_learns_and_knows_places():
    layer = make(compress="mlp", branches=("compress",))
    x = torch.randn(1, 41, 32, dtype=torch.float64)
    layer(x).sum().backward()
    for parameter in (*layer.k_pool.parameters(), *layer.v_pool.parameters()):
        assert parameter.grad is not None and bool(parameter.grad.any())
    with torch.no_grad():
        other = x[:, [0, *range(5, 0, -1), *range(6, 41)]]
        layer.rope = None
        assert not torch.allclose(layer(other)[:, 6:], layer(x)[:, 6:])


@pytest.mark.parametrize("compress", ["mean", "mlp"])
def test_decoding_compresses_each_block_once(compress):
    layer, x = make(num_kv_heads=2, compress=compress), torch.randn(2, 41, 32, dtype=torch.float64)
    with torch.no_grad():
        out, cache = steps(layer, x, 10)
        torch.testing.assert_close(out, layer(x))
        assert cache.compressed[0].shape == (2, 2, (41 - 6) // 3 + 1, 8)
        cache.compressed[0][:] = 0  # read by the next step, and not made anew
        assert not torch.allclose(layer(x[:, :1], cache=cache), layer(torch.cat([x, x[:, :1]], 1))[:, -1:])


def test_the_window_alone_decodes_from_a_ring():
    layer, x = make(branches=("slide",)), torch.randn(2, 41, 32, dtype=torch.float64)
    with torch.no_grad():
        out, cache = steps(layer, x, 10)
        torch.testing.assert_close(out, layer(x))
    assert cache.kept()[0].k.shape[2] == 7


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("compress", ["mean", "mlp"])
def test_padding_at_the_end_is_a_shorter_sequence(causal, compress):
    """Block 2 of the compressed ones has real tokens and padding; a mean must be over the former."""
    layer = make(causal=causal, compress=compress, rope=None)
    x = torch.randn(1, 20, 32, dtype=torch.float64)
    keys = torch.arange(20)[None] < 10
    torch.testing.assert_close(layer(x, keys=keys)[:, :10], layer(x[:, :10]))


def test_padding_with_a_cache():
    layer, x = make(), torch.randn(1, 20, 32, dtype=torch.float64)
    keys = torch.rand(1, 20) > 0.3
    cache = layer.new_cache()
    first = layer(x[:, :12], keys=keys[:, :12], cache=cache)
    torch.testing.assert_close(torch.cat([first, layer(x[:, 12:], keys=keys, cache=cache)], 1), layer(x, keys=keys))


def test_without_causality_a_short_last_block_is_its_real_mean():
    layer = make(causal=False, branches=("compress",), compress_size=4, compress_stride=4)
    x = torch.randn(1, 10, 32, dtype=torch.float64)
    q, k, v = project(layer, x)
    k, v = (torch.stack([t[:, :, s : s + 4].mean(2) for s in (0, 4, 8)], 2) for t in (k, v))
    out = oracle.attend(q, k, v, torch.ones(10, 3, dtype=torch.bool))[0]
    torch.testing.assert_close(layer(x), gated(layer, x, [out]))


def test_ties_go_to_the_earlier_block():
    layer = make(top_k=5, rope=None, num_kv_heads=1, compress_size=4, compress_stride=4)
    x = torch.randn(1, 1, 32, dtype=torch.float64).expand(1, 48, 32)
    q, k, _ = project(layer, x)
    hi, lse = layer.complete_blocks(48, 48, 12, x.device), torch.zeros(1, 4, 48, dtype=torch.float64)
    keys = k[:, :, :1].expand(-1, -1, 12, -1)
    chosen = layer.choose(q, k, keys, lse, module.Call(x, x, None, None, False), hi, None)
    assert chosen[0, 0, -1].tolist() == [0, 10, 11, 1, 2]
    assert chosen[0, 0, 5].tolist() == [0, 1, -1, -1, -1]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"block_size": 0}, "block_size must be at least 1; it was 0"),
        ({"compress_stride": 7}, "compress_stride must be at most compress_size 6; it was 7"),
        ({"top_k": 2}, "top_k must be at least 3"),
        ({"branches": ("slide", "global")}, "branches must be some of compress, select, slide"),
        ({"compress": "max"}, "compress must be 'mean' or 'mlp'; it was 'max'"),
    ],
    ids=str,
)
def test_refuses(options, match):
    with pytest.raises(ValueError, match=match):
        make(**options)


def test_refuses_grids():
    with pytest.raises(ValueError, match="x must be a sequence"):
        make(rope=None, causal=False)(torch.randn(1, 4, 4, 32, dtype=torch.float64))
