"""S067: block-sparse attention over views against brute force, FlexAttention, and its limits."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from glocal.nn import Attention, BlockSparseAttention, Call, Rope
from glocal.nn.block_sparse import Views
from glocal.patterns.hilbert import hilbert_order
from tests import oracle
from tests.nn.layers import gradients_agree

VIEWS, SPECIAL, SIDE, TOKENS = 3, 5, 12, 149
N = VIEWS * TOKENS


def make(dtype=torch.float64, **options):
    torch.manual_seed(0)
    sizes = {"patches": (SIDE, SIDE), "special": SPECIAL, "query_size": 16, "key_size": 8}
    return BlockSparseAttention(32, 2, **(sizes | options)).to(dtype)


def tokens(batch=1, length=N):
    return torch.randn(batch, length, 32, dtype=torch.float64)


def project(layer, x):
    at = layer.positions((x.shape[1],), 0, x.device)
    return layer.project(x, x, at, at)


def brute_force(layer, q, k, real=None):
    """The mask by loops over the definition, ``(B, H, N, N)``, raster order."""
    batch, heads, length, _ = q.shape
    k = k.repeat_interleave(heads // k.shape[1], 1)
    mask = torch.zeros(batch, heads, length, length, dtype=torch.bool)
    patches = [t for t in range(length) if t % layer.views.tokens >= SPECIAL]
    special = [t for t in range(length) if t % layer.views.tokens < SPECIAL]
    rows = [patches[i : i + layer.query_size] for i in range(0, len(patches), layer.query_size)]
    columns = [patches[i : i + layer.key_size] for i in range(0, len(patches), layer.key_size)]
    pool = (lambda t: t.mean(0)) if layer.pool == "mean" else (lambda t: t.amax(0))
    for b in range(batch):
        good = [t for t in range(length) if real is None or real[b, t]]
        live = [[t for t in c if t in set(good)] for c in columns]
        for h in range(heads):
            mask[b, h, :, special] = True
            mask[b, h, special] = True
            for row in rows:
                inside = [t for t in row if t in set(good)]
                if not inside:
                    mask[b, h, row] = False  # padding: whatever it sees does not matter
                    continue
                pooled = pool(q[b, h, inside])
                raw = [(pooled @ pool(k[b, h, c])).item() * layer.scale if c else -math.inf for c in live]
                total = sum(math.exp(s) for s in raw)
                shares = [math.exp(s) / total for s in raw]
                order = sorted((n for n in range(len(raw)) if live[n]), key=lambda n: (-shares[n], n))
                least, held = max(1, math.floor(layer.ratio * len(order) + 1e-6)), 0.0
                for place, n in enumerate(order):
                    if place < least or held < layer.mass:
                        for t in row:
                            mask[b, h, t, columns[n]] = True
                    held += shares[n]
        if real is not None:
            mask[b, :, :, ~real[b]] = False
    return mask


def by_mask(layer, x, mask):
    q, k, v = project(layer, x)
    out, _ = oracle.attend(q, k, v, mask, scale=layer.scale)
    return layer.o_proj(out.movedim(1, -2).flatten(-2))


RULES = [{"ratio": 0.3, "mass": 0.0}, {"ratio": 0.0, "mass": 0.4}, {"ratio": 0.1, "mass": 0.3, "pool": "max"}]


@pytest.mark.parametrize("options", RULES)
def test_equals_brute_force(options):
    layer, x = make(num_kv_heads=1, rope=Rope(100.0, axes=2), qk_norm="layer", **options), tokens(2)
    q, k, _ = project(layer, x)
    mask = brute_force(layer, q, k)
    torch.testing.assert_close(layer(x), by_mask(layer, x, mask))
    assert 0.05 < mask.double().mean() < 0.8


def test_gradients_are_those_under_the_mask():
    layer, x = make(ratio=0.3, mass=0.0), tokens()
    q, k, _ = project(layer, x)
    gradients_agree(layer, x, brute_force(layer, q, k))


def test_padding_is_left_out_of_pooling_and_reading():
    layer, x = make(ratio=0.2, mass=0.3), tokens(2)
    real = torch.rand(2, N) > 0.2
    real[1, 2 * TOKENS :] = False  # a view less
    q, k, _ = project(layer, x)
    found = layer(x, keys=real)
    theirs = by_mask(layer, x, brute_force(layer, q, k, real))
    torch.testing.assert_close(found[real], theirs[real])


@pytest.mark.parametrize("order", ["raster", "hilbert"])
@pytest.mark.parametrize("options", [{"ratio": 1.0, "mass": 0.0}, {"ratio": 0.0, "mass": 1.0}])
def test_keeping_all_is_full_attention_in_any_order(options, order):
    rope = Rope(100.0, axes=2)
    layer, full = make(order=order, rope=rope, **options), Attention(32, 2, rope=rope).double()
    full.load_state_dict(layer.state_dict())
    x = tokens(2, N - 40)  # the last view is cut short
    torch.testing.assert_close(layer(x), full(x, positions=layer.views.positions(N - 40)))
    assert bool((layer.last_kept == 1).all()) and bool((layer.last_mass > 1 - 1e-9).all())
    for other in (tokens(2, N), tokens(2, 40)):  # more keys, fewer keys
        at_q, at_k = layer.views.positions(N - 40), layer.views.positions(other.shape[1])
        q, k, v = layer.project(x, other, at_q, at_k)
        dense = scaled_dot_product_attention(q, k, v).movedim(1, -2).flatten(-2)
        torch.testing.assert_close(layer(x, other), layer.o_proj(dense))


def test_equals_torch_with_a_block_mask_expanded_to_tokens_and_special_rows_are_dense():
    layer, x = make(ratio=0.25, mass=0.0, qk_norm="layer"), tokens()
    q, k, v = project(layer, x)
    special, patches = layer.views.parts(N)
    chosen = layer.choose(q[:, :, patches], k[:, :, patches]).blocks
    blocks = torch.zeros(1, 2, 27, 54, dtype=torch.bool).scatter(-1, chosen, True)
    mask = torch.ones(1, 2, N, N, dtype=torch.bool)
    mask[:, :, patches[:, None], patches] = blocks.repeat_interleave(16, 2).repeat_interleave(8, 3)
    found = layer.mix(q, k, v, Call(x, x, None, None, False))
    torch.testing.assert_close(found, scaled_dot_product_attention(q, k, v, attn_mask=mask))
    dense = scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(found[:, :, special], dense[:, :, special], rtol=0, atol=1e-14)


def test_equals_flex_attention_under_the_same_block_map():
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    layer, x = make(torch.float32, ratio=0.25, mass=0.0, special=0), torch.randn(1, VIEWS * SIDE**2, 32)
    q, k, v = (t.detach() for t in project(layer, x))
    chosen = layer.choose(q, k).blocks
    blocks = torch.zeros(1, 2, 27, 54, dtype=torch.bool).scatter(-1, chosen, True)
    where = create_block_mask(
        lambda b, h, i, j: blocks[b, h, i // 16, j // 8], 1, 2, q.shape[2], k.shape[2], "cpu", BLOCK_SIZE=(16, 8)
    )
    theirs = flex_attention(q, k, v, block_mask=where)
    torch.testing.assert_close(layer.mix(q, k, v, Call(x, x, None, None, False)), theirs, atol=1e-5, rtol=1e-5)


def test_chosen_blocks_hold_more_of_dense_attention_than_random_ones():
    layer = make(ratio=0.25, mass=0.0, special=0)
    q, k, _ = project(layer, tokens(1, VIEWS * SIDE**2))
    k = k + q.unfold(2, 8, 8).mean(-1).repeat_interleave(8, 2)  # keys that have something to do with the queries
    dense = (q @ k.mT * layer.scale).softmax(-1)
    held = dense.unflatten(-1, (54, 8)).sum(-1).unflatten(-2, (27, 16)).mean(-2)
    chosen = layer.choose(q, k).blocks
    mine = held.gather(-1, chosen).sum(-1).mean()
    others = [held.gather(-1, torch.rand_like(held).argsort(-1)[..., : chosen.shape[-1]]).sum(-1) for _ in range(20)]
    assert mine > 1.02 * torch.stack(others).mean((1, 2, 3)).max()


def test_mass_includes_the_block_that_reaches_it_and_ratio_is_a_floor():
    layer = make(ratio=0.0, mass=0.6, special=0, patches=(1, 4), query_size=1, key_size=1, scale=1.0)
    shares = torch.tensor([0.1, 0.5, 0.15, 0.25], dtype=torch.float64)
    q = torch.zeros(1, 2, 1, 16, dtype=torch.float64)
    q[..., 0] = 1
    k = torch.zeros(1, 2, 4, 16, dtype=torch.float64)
    k[..., 0] = shares.log()
    assert layer.choose(q, k).blocks[0, 0, 0].tolist() == [1, 3]
    torch.testing.assert_close(layer.last_mass, torch.full((1, 2, 1), 0.75, dtype=torch.float64))
    assert layer.last_kept.tolist() == [[[0.5], [0.5]]]
    layer.ratio = 0.75
    assert layer.choose(q, k).blocks[0, 0, 0].tolist() == [1, 3, 2]
    layer.ratio, layer.mass = 0.0, 0.0
    assert layer.choose(q, k).blocks[0, 0, 0].tolist() == [1]


def test_ties_go_to_the_first_block_and_last_blocks_pool_their_own_tokens():
    layer = make(ratio=0.5, mass=0.0, special=0, patches=(1, 7), query_size=4, key_size=2)
    same = torch.ones(1, 2, 7, 16, dtype=torch.float64)
    assert layer.choose(same, same).blocks.tolist() == [[[[0, 1]] * 2] * 2]
    torch.testing.assert_close(layer.shares(same, same), torch.full((1, 2, 2, 4), 0.25, dtype=torch.float64))


def test_special_keys_are_never_lost():
    """Of 13 patches the last block is short: in the released code special keys would fall into it."""
    layer = make(ratio=0.1, mass=0.0, patches=(1, 13), query_size=4, key_size=4)
    x = tokens(1, 18).requires_grad_()
    (grad,) = torch.autograd.grad(layer(x)[:, SPECIAL:].pow(2).sum(), x)
    assert bool((grad[0, :SPECIAL].abs().sum(-1) > 0).all())


def test_a_permutation_of_views_moves_the_outputs_where_blocks_do_not_straddle():
    """144 patches are 9 query blocks of 16 and 18 key blocks of 8."""
    layer, x = make(ratio=0.25, mass=0.0), tokens()
    views = x.unflatten(1, (VIEWS, TOKENS))
    moved = layer(views[:, [2, 0, 1]].flatten(1, 2)).unflatten(1, (VIEWS, TOKENS))
    torch.testing.assert_close(moved, layer(x).unflatten(1, (VIEWS, TOKENS))[:, [2, 0, 1]])


@pytest.mark.parametrize("h", range(1, 14))
def test_hilbert_order_walks_through_every_cell(h):
    for w in range(1, 14):
        order = hilbert_order(h, w)
        assert sorted(order.tolist()) == list(range(h * w)) and order[0] == 0
        rows, columns = order // w, order % w
        far = rows.diff().abs() + columns.diff().abs()
        diagonal = max(h, w) % 2 == 1 and min(h, w) % 2 == 0  # where one step may be diagonal
        assert bool((torch.maximum(rows.diff().abs(), columns.diff().abs()) <= 1).all())
        assert int((far > 1).sum()) <= int(diagonal)


def test_hilbert_blocks_are_compact():
    def spread(order):
        at = torch.stack([order // 24, order % 24], -1).view(-1, 64, 2).double()
        return float(at.var(1).sum(-1).mean())

    assert spread(hilbert_order(24, 24)) < 0.4 * spread(torch.arange(24 * 24))


def test_views_keep_the_order_of_the_curve_inside_each_view():
    special, patches = Views(1, (2, 2)).parts(9, hilbert_order(2, 2))
    assert special.tolist() == [0, 5]
    assert patches.tolist() == [1, 3, 4, 2, 6, 8, 7]  # of the second view the last patch is missing
    assert Views(0, (2, 2)).parts(3)[1].tolist() == [0, 1, 2]


def test_views_on_a_grid_of_their_own():
    layer, x = make(rope=Rope(100.0, axes=2)), tokens()
    torch.testing.assert_close(layer(x.view(1, VIEWS, TOKENS, 32)).flatten(1, 2), layer(x))


@pytest.mark.parametrize(
    ("name", "value"),
    [("ratio", 1.5), ("mass", -0.1), ("query_size", 0), ("key_size", 0), ("pool", "sum"), ("order", "z"),
     ("special", -1), ("patches", (0, 3))],
)  # fmt: skip
def test_refuses(name, value):
    with pytest.raises(ValueError, match=name):
        make(**{name: value})
