"""S064, S078, S117: the neighborhood layer against its definition by loops, natten, and limiting cases."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch

from glocal.nn import NeighborhoodAttention, Rope, SlidingWindowAttention
from tests import oracle
from tests.nn.layers import steps
from tests.peers import load_timm

GRIDS = [
    # grid, window, dilation, stride, causal
    ((9,), (3,), (1,), (1,), (False,)),
    ((11,), (4,), (2,), (1,), (False,)),
    ((11,), (3,), (2,), (1,), (True,)),
    ((5, 7), (3, 4), (1, 1), (1, 1), (False, False)),
    ((7, 9), (3, 2), (2, 3), (1, 2), (False, False)),
    ((6, 5), (3, 3), (1, 1), (1, 1), (True, False)),
    ((4, 5, 3), (2, 3, 3), (2, 1, 1), (1, 3, 1), (True, False, False)),
]


def window_of(p, n, size, stride, causal):
    """The window of index ``p`` of ``n``, from the definition."""
    if causal:
        leader = min(p // stride * stride + stride - 1, n - 1)
        return range(max(leader - size + 1, 0), p + 1)
    leader = min(p // stride * stride + stride // 2, n - 1)
    start = min(max(leader - size // 2, 0), n - size)
    return range(start, start + size)


def definition(grid, window, dilation, stride, causal, rpb=None):
    """The mask, and the bias by the indexing of NAT, by loops over queries: ``(N, N)`` and ``(H, N, N)``."""
    places = list(itertools.product(*[range(n) for n in grid]))
    number = {place: n for n, place in enumerate(places)}
    mask = torch.zeros(len(places), len(places), dtype=torch.bool)
    bias = None if rpb is None else torch.zeros(rpb.shape[0], len(places), len(places), dtype=rpb.dtype)
    for place in places:
        near = []
        for i, n, k, d, s, c in zip(place, grid, window, dilation, stride, causal, strict=True):
            members = list(range(i % d, n, d))
            near.append([(members[p], p - i // d + k - 1) for p in window_of(i // d, len(members), k, s, c)])
        for pairs in itertools.product(*near):
            j = number[tuple(key for key, _ in pairs)]
            mask[number[place], j] = True
            if bias is not None:
                bias[:, number[place], j] = rpb[(slice(None), *(o for _, o in pairs))]
    return mask, bias


def by_mask(layer, x, mask, bias=None, more=None):
    """The layer under a mask, grids flattened; ``more`` are keys and values that all see, ``(B, M, dim)``."""
    q, k, v = (t.flatten(2, -2) for t in layer.project(x, x, None, None))
    if more is not None:
        _, more_k, more_v = layer.project(more, more, None, None)
        k, v = torch.cat([more_k, k], 2), torch.cat([more_v, v], 2)
        mask = torch.cat([torch.ones(mask.shape[0], more.shape[1], dtype=torch.bool), mask], 1)
        bias = torch.nn.functional.pad(bias, (more.shape[1], 0))
    out, _ = oracle.attend(q, k, v, mask, scale=layer.scale, bias=bias)
    return layer.o_proj(out.to(x.dtype).movedim(1, -2).flatten(-2)).view_as(x)


def make(window, dilation=1, stride=1, causal=False, heads=2, **options):
    torch.manual_seed(0)
    layer = NeighborhoodAttention(8 * heads, heads, window, dilation, stride, causal=causal, **options).double()
    if layer.rpb is not None:
        torch.nn.init.normal_(layer.rpb)
    return layer


@pytest.mark.parametrize("setting", GRIDS, ids=str)
def test_equals_the_definition_with_gradients(setting):
    grid, window, dilation, stride, causal = setting
    layer = make(window, dilation, stride, causal)
    x = torch.randn(2, *grid, 16, dtype=torch.float64, requires_grad=True)
    weights = torch.randn_like(x)
    found = []
    for run in (layer, lambda x: by_mask(layer, x, *definition(*setting, layer.rpb))):
        out = run(x)
        found.append((out, *torch.autograd.grad((out * weights).sum(), [x, *layer.parameters()])))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("setting", [s for s in GRIDS if not any(s[4])], ids=str)
def test_every_query_sees_as_many_keys_and_all_are_its_own_class(setting):
    from glocal.nn import Call

    grid, window, dilation, stride, causal = setting
    layer = make(window, dilation, stride, causal)
    x = torch.zeros(1, *grid, 16, dtype=torch.float64)
    q, k, _ = layer.project(x, x, None, None)
    mask = layer.where(q, k, Call(x, x, None, None, False)).mask(grid)
    assert bool((mask.sum(-1) == torch.tensor(window).prod()).all())
    assert torch.equal(mask.expand(1, 1, -1, -1)[0, 0], definition(*setting)[0])


def test_a_window_as_large_as_the_map_is_full_attention():
    layer = make((5, 4), rpb=False)
    x = torch.randn(2, 5, 4, 16, dtype=torch.float64)
    torch.testing.assert_close(layer(x), by_mask(layer, x, torch.ones(20, 20, dtype=torch.bool)))


def test_dilation_is_neighborhood_attention_on_interleaved_maps():
    layer, plain = make(3, dilation=2), make(3)
    x = torch.randn(1, 8, 6, 16, dtype=torch.float64)
    want = torch.empty_like(x)
    for a, b in itertools.product(range(2), repeat=2):
        want[:, a::2, b::2] = plain(x[:, a::2, b::2])
    torch.testing.assert_close(layer(x), want)


def test_stride_of_a_window_is_blocked_attention():
    layer = make(4, stride=4, rpb=False)
    x = torch.randn(2, 8, 12, 16, dtype=torch.float64)
    q, k, v = layer.project(x, x, None, None)

    def blocks(t):  # Swin's partition: (B, H, 8, 12, D) to (B, H, windows, 16, D)
        return t.unflatten(3, (-1, 4)).unflatten(2, (-1, 4)).transpose(3, 4).flatten(4, 5).flatten(2, 3)

    out = torch.nn.functional.scaled_dot_product_attention(*(blocks(t) for t in (q, k, v)))
    back = out.unflatten(3, (4, 4)).unflatten(2, (2, 3)).transpose(3, 4).flatten(4, 5).flatten(2, 3)
    torch.testing.assert_close(layer(x), layer.o_proj(back.movedim(1, -2).flatten(-2)))


def test_stride_of_a_window_is_attention_in_timms_windows():
    swin = load_timm("models.swin_transformer")
    layer = make((4, 3), stride=(4, 3), rpb=False)
    x = torch.randn(2, 8, 9, 16, dtype=torch.float64)
    q, k, v = (t.movedim(1, -2).flatten(-2) for t in layer.project(x, x, None, None))
    q, k, v = (swin.window_partition(t, (4, 3)).flatten(1, 2).unflatten(-1, (2, 8)).transpose(1, 2) for t in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    back = swin.window_reverse(out.unflatten(1, (4, 3)), (4, 3), 8, 9)
    torch.testing.assert_close(layer(x), layer.o_proj(back))


@pytest.mark.parametrize(
    ("grid", "window", "causal"), [((8, 6), (4, 3), (False, False)), ((5, 6, 4), (2, 3, 3), (True, False, False))]
)
def test_equals_natten(grid, window, causal):
    natten = pytest.importorskip("natten")
    layer = make(window, dilation=(2, *(1,) * (len(grid) - 1)), causal=causal, rpb=False).float()
    x = torch.randn(1, *grid, 16)
    q, k, v = (t.detach().movedim(1, -2) for t in layer.project(x, x, None, None))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = {2: natten.na2d, 3: natten.na3d}[len(grid)](
            q, k, v, kernel_size=window, dilation=layer.dilation, is_causal=causal, backend="flex-fna"
        )
    torch.testing.assert_close(layer(x), layer.o_proj(out.flatten(-2)), atol=1e-5, rtol=1e-5)


def test_extra_keys_are_attention_over_all_keys_with_gradients():
    layer = make(3, heads=4, num_kv_heads=2)
    x = torch.randn(2, 5, 6, 32, dtype=torch.float64, requires_grad=True)
    extra = torch.randn(2, 3, 32, dtype=torch.float64, requires_grad=True)
    mask, bias = definition((5, 6), (3, 3), (1, 1), (1, 1), (False, False), layer.rpb)
    weights, found = torch.randn_like(x), []
    for out in (layer(x, extra=extra), by_mask(layer, x, mask, bias, extra)):
        found.append((out, *torch.autograd.grad((out * weights).sum(), [x, extra, *layer.parameters()])))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_extra_keys_beside_padding():
    layer = make((3,), rpb=False)
    x, extra = torch.randn(1, 6, 16, dtype=torch.float64), torch.randn(1, 2, 16, dtype=torch.float64)
    alone = layer(x, extra=extra, keys=torch.zeros(1, 6, dtype=torch.bool))
    q, _, _ = layer.project(x, x, None, None)
    _, k, v = layer.project(extra, extra, None, None)
    only = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(alone, layer.o_proj(only.movedim(1, -2).flatten(-2)))


@pytest.mark.parametrize("dilation", [1, 2, 3])
@pytest.mark.parametrize("prompt", [0, 1, 8])
def test_decoding_equals_the_parallel_form(dilation, prompt):
    layer = make((3,), dilation, causal=True, heads=4, num_kv_heads=2, rope=Rope())
    x = torch.randn(2, 17, 32, dtype=torch.float64)
    with torch.no_grad():
        out, cache = steps(layer, x, prompt)
        torch.testing.assert_close(out, layer(x))
    assert cache.kept()[0].k.shape[2] == 3


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 7])
@pytest.mark.parametrize("stride", [1, 2])
def test_short_causal_axes_see_all_of_their_class(length, stride):
    layer = make((3,), 2, stride, causal=True)
    x = torch.randn(1, length, 16, dtype=torch.float64)
    setting = ((length,), (3,), (2,), (stride,), (True,))
    torch.testing.assert_close(layer(x), by_mask(layer, x, *definition(*setting, layer.rpb)))


def test_a_causal_line_is_a_sliding_window():
    layer = make((4,), causal=True, rpb=False)
    peer = SlidingWindowAttention(16, 2, window=4, causal=True, qkv_bias=True, out_bias=True).double()
    peer.load_state_dict(layer.state_dict())
    x = torch.randn(2, 13, 16, dtype=torch.float64)
    torch.testing.assert_close(layer(x), peer(x))


def test_automatic_dilation_is_the_largest_that_fits():
    layer, x = make(3, "auto"), torch.randn(1, 8, 13, 16, dtype=torch.float64)
    assert layer.dilations((8, 13)) == (2, 4)
    torch.testing.assert_close(layer(x), make(3, (2, 4))(x))


def test_rows_of_the_bias_reach_every_offset():
    layer, x = make(4), torch.randn(1, 7, 9, 16, dtype=torch.float64)
    layer(x).square().sum().backward()
    assert layer.rpb.shape == (2, 7, 7) and bool((layer.rpb.grad != 0).all())


def test_gradcheck():
    layer = make(3, heads=1)
    x = torch.randn(1, 5, 6, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, x, fast_mode=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "window must be at least 1"),
        ({"window": 3, "stride": 4}, "stride must be at most window"),
        ({"window": (3, 3), "dilation": (1, 1, 1)}, "dilation has 3 values"),
        ({"window": 3, "dilation": "most"}, "dilation must be integers or 'auto'"),
        ({"window": 3, "causal": (True,)}, "causal has 1 values"),
    ],
)
def test_refuses_settings(options, message):
    with pytest.raises(ValueError, match=message):
        NeighborhoodAttention(16, 2, **options)


def test_refuses_inputs():
    x = torch.randn(1, 8, 20, 16, dtype=torch.float64)
    with pytest.raises(ValueError, match="window 3 with dilation 4 needs 12 positions on axis 0, x has 8; use a dila"):
        make(3, 4)(x)
    with pytest.raises(ValueError, match="use a window of at most 8"):
        make(9)(x)
    with pytest.raises(ValueError, match="with a grid of 2 axes"):
        make(3)(x.flatten(1, 2))
    with pytest.raises(ValueError, match=r"extra must be \(1, M, 16\)"):
        make(3)(x, extra=x)
    with pytest.raises(ValueError, match="no noncausal-cross form"):
        make(3)(x, x)
    with pytest.raises(ValueError, match="extra goes with self-attention"):
        make(3)(x, x, extra=x[:, 0])
    for options in ({"stride": 2}, {"dilation": "auto"}):
        with pytest.raises(ValueError, match="decoding needs one axis, stride 1"):
            make((3,), causal=True, **options).new_cache()
    with pytest.raises(ValueError, match="decoding needs one axis"):
        make(3, causal=True).new_cache()
