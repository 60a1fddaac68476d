"""S093: against dense attention under the block map, limiting cases, block by block, and what depends on what."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from glocal.cache import BlockRowCache
from glocal.inspect import reach
from glocal.nn import Attention, Rope, UnidirectionalBlockAttention

LT = {(0, 0): 0, (-1, -1): 1, (0, -1): 2, (-1, 0): 3}
RB = {(0, 0): 0, (1, 1): 1, (1, 0): 2, (0, 1): 3}


def make(size=4, dim=16, heads=2, roles=True, **options):
    torch.manual_seed(0)
    layer = UnidirectionalBlockAttention(dim, heads, block_size=size, **options).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    if not roles:
        torch.nn.init.zeros_(layer.roles)
    return layer


def double(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def dense(layer, x, border, direction="lt"):
    """All pairs: each key stands once for every role in which its block is read."""
    h, w = x.shape[1:3]
    size, (rows, columns) = layer.block_size, (h // layer.block_size, w // layer.block_size)
    at = torch.cartesian_prod(torch.arange(h), torch.arange(w))
    q, k, v = (t.flatten(2, 3) for t in layer.project(x, x, at, at))
    block = (at[:, 0] // size) * columns + at[:, 1] // size
    mask = torch.zeros(4, rows * columns, rows * columns, dtype=torch.bool)
    for (dx, dy), role in (LT if direction == "lt" else RB).items():
        for i in range(rows):
            for j in range(columns):
                a, b = i + dx, j + dy
                if border == "replicate":
                    a, b = min(max(a, 0), rows - 1), min(max(b, 0), columns - 1)
                if 0 <= a < rows and 0 <= b < columns:
                    mask[role, i * columns + j, a * columns + b] = True
    mask = torch.cat([m[block][:, block] for m in mask], -1)
    group = layer.num_heads // layer.num_kv_heads
    keys = torch.cat([k + layer.roles[r][None, :, None] for r in range(4)], 2).repeat_interleave(group, 1)
    values = v.repeat(1, 1, 4, 1).repeat_interleave(group, 1)
    out = scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=layer.scale)
    return layer.o_proj(out.movedim(1, -2).flatten(-2)).view_as(x)


def by_blocks(layer, x, m, backward=False):
    """In raster order over super-blocks of m x m blocks (backward: from the lower right), and the cache."""
    step, (h, w) = m * layer.block_size, x.shape[1:3]
    at = torch.cartesian_prod(torch.arange(h), torch.arange(w)).view(h, w, 2)
    rows, out, held = BlockRowCache(w // layer.block_size), torch.zeros_like(x), []
    starts = [(i, j) for i in range(0, h, step) for j in range(0, w, step)]
    for i, j in reversed(starts) if backward else starts:
        part = (slice(i, i + step), slice(j, j + step))
        more = {"positions": at[part].flatten(0, 1), "direction": "rb"} if backward else {}
        out[:, *part] = layer(x[:, *part], rows=rows, **more)
        held.append(rows.numel)
    return out, rows, held


@pytest.mark.parametrize("direction", ["lt", "rb"])
@pytest.mark.parametrize("border", ["drop", "replicate"])
@pytest.mark.parametrize("options", [{}, {"num_kv_heads": 1}, {"rope": None, "qk_norm": None}], ids=str)
def test_equals_dense_attention_under_the_block_map(options, border, direction):
    layer, x = make(border=border, direction=direction, **options), double(2, 12, 8, 16)
    want = dense(layer, x, border, direction)
    torch.testing.assert_close(layer(x), want)
    torch.testing.assert_close(layer(x, direction="lt"), dense(layer, x, border, "lt"))
    grads = [torch.autograd.grad(out.square().sum(), list(layer.parameters())) for out in (layer(x), want)]
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_replicated_borders_are_multiplicities():
    layer, x = make(roles=False), double(1, 12, 12, 16)
    at = torch.cartesian_prod(torch.arange(12), torch.arange(12))
    q, k, v = (t.flatten(2, 3) for t in layer.project(x, x, at, at))
    count = torch.zeros(9, 9, dtype=torch.float64)
    for i in range(3):
        for j in range(3):
            for a, b in ((i, j), (max(i - 1, 0), max(j - 1, 0)), (i, max(j - 1, 0)), (max(i - 1, 0), j)):
                count[3 * i + j, 3 * a + b] += 1
    assert count[0, 0] == 4
    block = (at[:, 0] // 4) * 3 + at[:, 1] // 4
    bias = count.log()[block][:, block]
    out = scaled_dot_product_attention(q, k, v, attn_mask=bias)
    torch.testing.assert_close(layer(x), layer.o_proj(out.movedim(1, -2).flatten(-2)).view_as(x))


@pytest.mark.parametrize(("border", "roles"), [("drop", False), ("replicate", False)])
def test_one_block_is_plain_attention(border, roles):
    layer, x = make(border=border, roles=roles), double(2, 4, 4, 16)
    plain = Attention(16, 2, qk_norm="layer", rope=Rope(axes=2)).double()
    plain.load_state_dict({name: t for name, t in layer.state_dict().items() if name != "roles"})
    torch.testing.assert_close(layer(x), plain(x))


@pytest.mark.parametrize("m", [1, 2, 3])
@pytest.mark.parametrize("border", ["drop", "replicate"])
def test_block_by_block_equals_all_at_once_in_the_memory_of_a_row(border, m):
    layer, x = make(2, border=border), double(1, 10, 14, 16)
    with torch.no_grad():
        out, rows, held = by_blocks(layer, x, m)
        torch.testing.assert_close(out, layer(x))
        back, _, _ = by_blocks(layer, x, 1, backward=True)
        torch.testing.assert_close(back, layer(x, direction="rb"))
    assert rows.at == (5, 0)
    one_block = 2 * 4 * 16  # keys and values of four positions
    assert max(held) <= one_block * (7 + m + 1)
    assert all(t.grad_fn is None for t in rows.tensors())


def test_direction_rb_is_lt_seen_in_a_mirror_with_two_roles_exchanged():
    layer, x = make(4), double(1, 12, 12, 16)
    mirror = make(4)
    mirror.load_state_dict(layer.state_dict())
    with torch.no_grad():
        mirror.roles.copy_(layer.roles[[0, 1, 3, 2]])
    at = torch.cartesian_prod(torch.arange(12), torch.arange(12)).flip(0)
    want = mirror(x.flip(1, 2), positions=at).flip(1, 2)
    torch.testing.assert_close(layer(x, direction="rb"), want)


@pytest.mark.parametrize("border", ["drop", "replicate"])
@pytest.mark.parametrize("depth", [1, 2])
def test_blocks_depend_on_what_lies_above_and_left_within_the_depth(border, depth):
    layers = [make(1, dim=8, border=border, rope=None) for _ in range(depth)]  # blocks of one position

    def network(x):
        for layer in layers:
            x = x + layer(x)
        return x

    found = reach(network, double(1, 4, 4, 8)).view(4, 4, 4, 4)
    for i, j, a, b in torch.cartesian_prod(*[torch.arange(4)] * 4).tolist():
        assert bool(found[i, j, a, b]) == (0 <= i - a <= depth and 0 <= j - b <= depth)


def test_gradcheck():
    layer, x = make(1, dim=8, rope=None), double(1, 2, 3, 8).requires_grad_()
    assert torch.autograd.gradcheck(layer, (x,), fast_mode=True)


def test_roles_start_at_zero_and_learn():
    layer = UnidirectionalBlockAttention(16, 2, block_size=2)
    assert not layer.roles.any()
    layer(torch.randn(1, 4, 4, 16)).square().sum().backward()
    assert bool((layer.roles.grad.abs().sum((1, 2)) > 0).all())


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match="block_size must be at least 1; it was 0"):
        UnidirectionalBlockAttention(16, 2, block_size=0)
    with pytest.raises(ValueError, match=r"border must be .* it was 'zero'"):
        UnidirectionalBlockAttention(16, 2, border="zero")
    with pytest.raises(ValueError, match=r"direction must be .* it was 'tl'"):
        UnidirectionalBlockAttention(16, 2, direction="tl")
    layer = make(4)
    for shape in ((1, 8, 10, 16), (1, 0, 4, 16)):
        with pytest.raises(ValueError, match="x must have sides that are multiples of block_size 4"):
            layer(double(*shape))
    with pytest.raises(ValueError, match="rows"):
        layer(double(1, 4, 4, 16), cache=Attention(16, 2, causal=True).new_cache())
    with pytest.raises(ValueError, match="positions must be given"):
        layer(double(1, 4, 4, 16), rows=BlockRowCache(1), direction="rb")
    rows = BlockRowCache(3)
    layer(double(1, 8, 8, 16), rows=rows)
    with pytest.raises(ValueError, match="at most 1 blocks wide at column 2; it was 2"):
        layer(double(1, 8, 8, 16), rows=rows)
    with pytest.raises(ValueError, match="2 blocks high as its neighbour; it was 1"):
        layer(double(1, 4, 4, 16), rows=rows)
