"""S101: multipole attention by loops, its windows against torch's attention, what reaches what, any size."""

import math

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from glocal.inspect import reach
from glocal.nn.multipole import MultipoleAttention, multipole_levels


def layer(dim=8, heads=2, **options):
    torch.manual_seed(0)
    return MultipoleAttention(dim, heads, **options).double().eval()


def window(module, x):
    """One window ``(B, h, w, C)`` by torch."""
    heads, inner = module.attention.num_heads, module.attention
    x = module.norm2(module.norm1(x))
    q, k, v = (
        proj(x).flatten(1, 2).unflatten(-1, (heads, -1)).movedim(2, 1)
        for proj in (inner.q_proj, inner.k_proj, inner.v_proj)
    )
    out = scaled_dot_product_attention(q, k, v).movedim(1, 2).flatten(2)
    return inner.o_proj(out).view(*x.shape[:-1], -1)


def tiled(module, x, k):
    out = torch.zeros_like(x)
    for row in range(0, x.shape[1], k):
        for column in range(0, x.shape[2], k):
            out[:, row : row + k, column : column + k] = window(module, x[:, row : row + k, column : column + k])
    return out


def test_levels():
    assert [multipole_levels(side, 1, rate) for side, rate in ((243, 3), (242, 3), (81, 3), (1000, 10))] == [5, 4, 4, 3]
    assert [multipole_levels(n, 1) for n in (1, 2, 3, 4, 7, 8, 1024)] == [1, 1, 1, 2, 2, 3, 10]
    assert [multipole_levels(32, k) for k in (2, 4, 8, 16, 32, 64)] == [5, 4, 3, 2, 1, 1]


@pytest.mark.parametrize("size", [(8, 8), (8, 12), (5, 7)])
def test_one_level_is_window_attention(size):
    module = layer(window=4, levels=1)
    x = torch.randn(2, *size, 8).double()
    assert torch.allclose(module(x), tiled(module, x, 4), atol=1e-12)


def test_one_window_is_full_attention():
    module = layer(window=6)
    x = torch.randn(2, 6, 6, 8).double()
    assert torch.allclose(module(x), window(module, x), atol=1e-12)


@pytest.mark.parametrize("backend", ["native", "sdpa", "dense"])
def test_by_loops(backend):
    """Four means of means of 8 x 8 pixels with windows of 2 x 2, each level's weight written out."""
    module = layer(window=2, sample="average", backend=backend)
    module = module.float() if backend == "native" else module
    x = torch.randn(1, 8, 8, 8).to(module.norm1.weight.dtype)
    wanted = torch.zeros_like(x)
    for level, share in ((0, 1.0), (1, 0.5), (2, 0.5)):  # (L - 1 - l)! / (L - 1)! of L = 3
        side = 2**level
        small = torch.zeros(1, 8 // side, 8 // side, 8, dtype=x.dtype)
        for row in range(8 // side):
            for column in range(8 // side):
                part = x[:, row * side : (row + 1) * side, column * side : (column + 1) * side]
                small[:, row, column] = part.mean((1, 2))
        small = tiled(module, small, 2)
        for row in range(8):
            for column in range(8):
                wanted[:, row, column] += share * small[:, row // side, column // side]
    assert torch.allclose(module(x), wanted, atol=1e-5 if backend == "native" else 1e-12)


@pytest.mark.parametrize("rate,side", [(2, 16), (3, 27)])
def test_convolutions_by_matrix_products_and_the_weights_of_the_levels(rate, side):
    module = layer(window=1, rate=rate, dropout=0.5)
    count = multipole_levels(side, 1, rate)
    assert count == {2: 4, 3: 3}[rate]
    x = torch.randn(1, side, side, 8).double()
    maps = [x]
    for _ in range(count - 1):
        n = maps[-1].shape[1] // rate
        parts = maps[-1].view(1, n, rate, n, rate, 8)
        maps.append(torch.einsum("bhrwsc,dcrs->bhwd", parts, module.down.weight))
    wanted = torch.zeros_like(x)
    for level, part in enumerate(maps):
        y = window(module, part.view(-1, 1, 1, 8)).view(part.shape)
        for _ in range(level):
            y = torch.einsum("bhwc,cdrs->bhrwsd", y, module.up.weight)
            y = y.flatten(3, 4).flatten(1, 2)
        wanted += y * math.factorial(count - 1 - level) / math.factorial(count - 1)
    assert torch.allclose(module(x), wanted, atol=1e-12)


@pytest.mark.parametrize("size,starts", [((8, 6), ((0, 2, 4), (0, 2))), ((7, 3), ((0, 2, 3), (0,)))])
def test_windows_that_overlap_are_averaged(size, starts):
    module = layer(window=4, stride=2, levels=1)
    x = torch.randn(2, *size, 8).double()
    total, count = torch.zeros_like(x), torch.zeros(*size, 1).double()
    for row in starts[0]:
        for column in starts[1]:
            at = (slice(row, row + 4), slice(column, column + 4))
            total[:, at[0], at[1]] += window(module, x[:, at[0], at[1]])
            count[at] += 1
    assert torch.allclose(module(x), total / count, atol=1e-12)


@pytest.mark.parametrize("stride", [None, 1])
@pytest.mark.parametrize("size", [(16, 16), (13, 10)])
def test_a_constant_map_stays_one(size, stride):
    module = layer(window=3, stride=stride, sample="average")
    out = module(torch.randn(8).double().expand(1, *size, 8))
    assert torch.allclose(out, out[:, :1, :1].expand_as(out), atol=1e-12)


def test_a_side_that_does_not_divide_goes_on_with_its_last_pixels():
    x = torch.randn(1, 7, 4, 8).double()
    found = layer(rate=3, sample="average").coarser(x)
    assert found.shape == (1, 3, 2, 8)
    for row in range(3):
        for column in range(2):
            at = [(min(3 * row + r, 6), min(3 * column + c, 3)) for r in range(3) for c in range(3)]
            assert torch.allclose(found[:, row, column], sum(x[:, r, c] for r, c in at) / 9)


def test_levels_share_all_parameters():
    sizes = {sum(p.numel() for p in layer(window=2, levels=n).parameters()) for n in (1, 2, 4, None)}
    # Two norms, q, k, v, the output with its bias, two convolutions of 2 x 2.
    assert sizes == {2 * 16 + 4 * 64 + 8 + 2 * 4 * 64}
    assert isinstance(layer(heads=1).attention.o_proj, torch.nn.Identity)
    assert not isinstance(layer(heads=2, head_dim=16).attention.o_proj, torch.nn.Identity)


def test_every_pixel_reaches_every_other_once_the_coarsest_map_is_one_window():
    x = torch.randn(1, 8, 8, 8).double()
    assert reach(layer(window=2, sample="average"), x).all()
    two = reach(layer(window=2, levels=2, sample="average"), x).view(8, 8, 8, 8)
    wanted = torch.arange(8)[:, None] // 4 == torch.arange(8) // 4
    assert torch.equal(two, wanted[:, None, :, None] & wanted[None, :, None, :])


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (3, 3), (17, 31)])
@pytest.mark.parametrize("stride", [None, 2])
def test_any_size_with_gradients(size, stride):
    module = layer(window=4, stride=stride)
    x = torch.randn(2, *size, 8).double().requires_grad_()
    out = module(x)
    out.square().sum().backward()
    assert out.shape == x.shape and out.isfinite().all() and x.grad.isfinite().all()
    levels = multipole_levels(min(size), 4)
    for name, p in module.named_parameters():
        assert (p.grad is not None) == (levels > 1 or name not in ("down.weight", "up.weight"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    x = torch.randn(1, 16, 16, 8).to(dtype)
    for stride in (None, 2):
        module = layer(window=4, stride=stride)
        wanted = module(x.double())
        found = module.to(dtype)(x)
        assert found.dtype == dtype and (found.double() - wanted).abs().mean() < 0.02


def test_bad_settings():
    for options, match in (
        ({"stride": 9}, "stride must be from 1 to window 8"),
        ({"rate": 1}, "rate must be"),
        ({"levels": 0}, "levels must be"),
        ({"sample": "max"}, "sample must be"),
        ({"causal": True}, "has no causal-self form"),
    ):
        with pytest.raises(ValueError, match=match):
            MultipoleAttention(8, 2, **options)
    with pytest.raises(ValueError, match=r"x must be \(B, H, W, 8\)"):
        layer()(torch.randn(1, 8, 8))
